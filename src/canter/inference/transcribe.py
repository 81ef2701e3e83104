"""Utterances in, transcripts out: audio is read ahead, batched by length, and decoded by the engine."""

import json
import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from canter.corpus.audio import load_utterance
from canter.corpus.manifest import Utterance
from canter.errors import AudioError, CanterError, CheckpointError
from canter.inference.engine import Engine, Request, encoder_batches
from canter.inference.segments import Segment
from canter.models.model import SpeechModel
from canter.text.tokenizer import Tokenizer

READERS = 2  # threads that decode audio while the model works
AHEAD = 2  # batches read ahead


@dataclass(frozen=True)
class Transcription:
    """What was heard in one utterance, or why nothing could be."""

    text: str
    tokens: tuple[int, ...] = ()
    """Prompt and end token left out."""
    finished: bool = True
    """False where the limit on tokens ended it: the model found no end."""
    ctc: tuple[int, ...] | None = None
    """The CTC head's greedy outputs, where the engine was told to give them."""
    error: str | None = None
    segments: tuple[Segment, ...] = ()
    """Stretches of the utterance with their times, in order; their texts joined are ``text``."""
    language: str | None = None
    """What the utterance's prompt said, or what was detected."""


def transcribe(
    engine: Engine, tokenizer: Tokenizer, utterances: Sequence[Utterance], longest_seconds: float = 300.0
) -> list[Transcription]:
    """The transcriptions of ``utterances``, in their order. What cannot be read is a transcription with an
    ``error``."""
    results: list[Transcription] = [Transcription("")] * len(utterances)
    for index, transcription in transcribe_stream(engine, tokenizer, utterances, longest_seconds):
        results[index] = transcription
    return results


def transcribe_stream(
    engine: Engine, tokenizer: Tokenizer, utterances: Sequence[Utterance], longest_seconds: float = 300.0
) -> Iterator[tuple[int, Transcription]]:
    """As ``transcribe``, but each (index, transcription) as soon as it is finished, long utterances first.

    Batches follow the stated durations; only a few batches of audio are in memory at a time.
    """
    failed: deque[tuple[int, Transcription]] = deque()
    frames = [engine.model.encoder_frames(utterance.duration) for utterance in utterances]
    batches = encoder_batches(frames, engine.config.frames, engine.config.rows)

    longest_seconds = min(longest_seconds, most_seconds(engine.model))

    def request(index: int) -> Request:
        utterance = utterances[index]
        prompt = tokenizer.prompt(utterance)
        audio = load_utterance(utterance, engine.model.config.features.sample_rate)
        seconds = len(audio) / engine.model.config.features.sample_rate
        if seconds > longest_seconds:
            raise AudioError(
                f"{utterance.audio_filepath} is {seconds:.0f} s long, over the limit of "
                f"{longest_seconds:g} s (--longest-seconds, or what the model can take): cut it"
            )
        return Request(audio, prompt, index)

    def requests() -> Iterator[list[Request]]:
        with ThreadPoolExecutor(READERS) as pool:
            ahead: deque[list[tuple[int, Future[Request]]]] = deque()
            try:
                for batch in [*batches, *[[]] * AHEAD]:  # empty ones push the last out
                    ahead.append([(index, pool.submit(request, index)) for index in batch])
                    if len(ahead) <= AHEAD:
                        continue
                    ready: list[Request] = []
                    for index, future in ahead.popleft():
                        try:
                            ready.append(future.result())
                        except CanterError as error:
                            failed.append((index, Transcription("", error=str(error))))
                    yield ready
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    for hypothesis in engine.run(requests()):
        while failed:
            yield failed.popleft()
        index = hypothesis.key
        assert isinstance(index, int)
        ctc = None if hypothesis.ctc is None else tuple(hypothesis.ctc)
        text = tokenizer.decode(hypothesis.tokens).strip()
        yield index, Transcription(text, tuple(hypothesis.tokens), hypothesis.finished, ctc)
    yield from failed


def most_seconds(model: SpeechModel) -> float:
    """How long an utterance the model itself can take: Whisper's encoder has positions for 30 s alone."""
    padded = getattr(model.config.features, "pad_seconds", 0.0)
    positions = getattr(model.config.encoder, "positions", math.inf)
    return padded or positions / model.encoder_frames(100.0) * 100.0


def checkpoint_of(path: str | Path) -> Path:
    """The model that ``path`` stands for: of a run folder its best checkpoint, or without one its newest;
    anything else stands for itself.

    Raises CheckpointError for a run without a whole checkpoint.
    """
    checkpoints = Path(path) / "checkpoints"
    if not checkpoints.is_dir():
        return Path(path)
    best = checkpoints / "best.json"
    if best.exists():
        try:
            chosen = checkpoints / json.loads(best.read_text(encoding="utf-8"))["checkpoint"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{best} is damaged ({error}); name a folder of {checkpoints} instead"
            ) from None
        if chosen.is_dir():
            return chosen
    whole = sorted(file.parent for file in checkpoints.glob("step-*/config.json"))
    if not whole:
        raise CheckpointError(f"{path} holds no checkpoint yet; train on, or name a model folder")
    return whole[-1]
