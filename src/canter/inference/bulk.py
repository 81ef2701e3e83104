"""Transcription of many items: shared among the ranks that ``torchrun`` starts, and resumed after a stop."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from hashlib import blake2b
from pathlib import Path
from typing import cast

import numpy as np

from canter.corpus.manifest import Utterance
from canter.errors import ConfigError
from canter.events import Events
from canter.inference.engine.engine import Engine
from canter.inference.inputs import Item, names_of
from canter.inference.recording import TranscribeConfig, Transcription
from canter.inference.resume import Partial, read_done, row_key
from canter.inference.transcribe import Decoded, transcribe_events
from canter.models.model import SpeechModel
from canter.models.protocol import AnyModel
from canter.planning.elastic import share_out
from canter.ranks import Ranks
from canter.redaction import redacted

TOKENS_PER_SECOND = 4.0  # of speech, to weigh the decoder against the encoder
LONGEST_WAIT = timedelta(days=30)  # a rank waits for the slowest however long it takes


def expected_work(model: AnyModel, utterances: Sequence[Utterance]) -> np.ndarray:
    """Return the expected multiplications (N,), float64, of each utterance, which stand for its time.

    The encoder counts with its parameters per frame and quadratic attention, the decoder with its parameters per token
    and attention to all frames. Audio longer than the window counts as full windows. For a model without a cost model
    the seconds are returned.
    """
    seconds = np.array([utterance.duration for utterance in utterances], dtype=np.float64)
    if "cost_model" not in model.supports:
        return seconds
    config, padded = cast(SpeechModel, model).config, model.padded_seconds
    if padded:
        windows = np.maximum(1.0, np.ceil(seconds / padded))
        frames = np.full(len(seconds), float(model.encoder_frames(padded)))
    else:
        windows = np.ones(len(seconds))
        frames = np.ceil(seconds / model.frame_seconds)
    tokens = np.maximum(1.0, seconds * TOKENS_PER_SECOND)
    parts = (cast(SpeechModel, model).encoder, cast(SpeechModel, model).decoder)
    encoder, decoder = (sum(weight.numel() for weight in part.parameters()) for part in parts)
    wide, deep = config.encoder.width, config.encoder.layers
    return windows * frames * (encoder + 2 * deep * wide * frames) + tokens * (
        decoder + 2 * config.decoder.layers * config.decoder.width * frames
    )


@dataclass(frozen=True)
class Started:
    """Report that decoding begins."""

    utterances: int
    seconds: float
    """Seconds of audio to decode on this rank."""


@dataclass(frozen=True)
class ItemFinished:
    """Report of the transcription of one item."""

    index: int
    item: Item
    transcription: Transcription


Report = Started | Decoded | ItemFinished


@dataclass(frozen=True)
class PartialFiles:
    """Files of partial results beside the output: the path of the first, and the model and settings that made them."""

    first: Path
    identity: dict[str, object]

    def of_rank(self, rank: int) -> Path:
        """Return the file that a rank writes."""
        return self.first.with_name(f"{self.first.name}-{rank}") if rank else self.first


@dataclass(frozen=True)
class BulkResult:
    """Transcriptions of all items on rank 0, and statistics of all ranks."""

    transcriptions: list[Transcription]
    resumed: set[int]
    """Items taken from partial results."""
    counters: Mapping[str, float]
    """Sums of the engines' counters, on rank 0."""
    audio_seconds: float
    """Seconds of audio decoded by all ranks, on rank 0."""


def transcribe_items(
    engine: Engine,
    items: Sequence[Item],
    config: TranscribeConfig,
    ranks: Ranks,
    events: Events[Report],
    partial: PartialFiles | None = None,
    max_seconds: float = math.inf,
) -> BulkResult:
    """Transcribe all items that no partial result has, each rank its part of about equal work.

    ``events`` receives the reports of this rank. Raises ConfigError where the ranks have different items, or partial
    results were made by another model or other settings.
    """
    _check_same_items(items, ranks)
    results = [Transcription("", error=item.problem) for item in items]
    known: set[int] = set()
    if partial and (done := read_done(partial.first, partial.identity)):
        for index, item in enumerate(items):
            if item.utterance and (result := done.get(row_key(item.utterance))):
                results[index] = result
                known.add(index)
    known_by = ranks.all_gather_objects(known)
    resumed = set[int]().union(*known_by)
    if resumed:
        kept = names_of([items[index] for index in sorted(resumed)])
        events.message(f"{len(resumed):,} kept from an earlier start: {kept}")
    wanted = [(index, one.utterance) for index, one in enumerate(items) if one.utterance and index not in resumed]
    if ranks.size > 1:
        work = expected_work(engine.model, [utterance for _, utterance in wanted])
        wanted = [wanted[place] for place in share_out(work, ranks.size)[ranks.rank]]
    utterances = [utterance for _, utterance in wanted]
    file = Partial(partial.of_rank(ranks.rank), partial.identity) if partial else None
    keys = [row_key(utterance) for utterance in utterances] if file else []
    tokenizer = engine.model.tokenizer
    assert tokenizer is not None
    audio_seconds = 0.0
    events.step(Started(len(utterances), sum(utterance.duration for utterance in utterances)))
    try:
        for event in transcribe_events(engine, tokenizer, utterances, max_seconds, config):
            if isinstance(event, Decoded):
                events.step(event)
                continue
            number, result = event
            index, utterance = wanted[number]
            path = redacted(utterance.audio_filepath)
            if result.error is None:
                audio_seconds += utterance.duration
            elif path not in result.error:
                result = replace(result, error=f"{path}: {result.error}")
            results[index] = result
            if file:
                file.add(utterance, result, keys[number])
            events.step(ItemFinished(index, items[index], result))
    finally:
        if file:
            file.close()
    mine = {index: results[index] for index in {*(index for index, _ in wanted), *(known - known_by[0])}}
    found = ranks.gather_objects((mine, asdict(engine.counters), audio_seconds))
    for transcriptions, _, _ in found:
        for index, result in transcriptions.items():
            results[index] = result
    counters = {name: sum(one[name] for _, one, _ in found) for name in asdict(engine.counters)}
    return BulkResult(results, resumed, counters, sum(seconds for *_, seconds in found))


def _check_same_items(items: Sequence[Item], ranks: Ranks) -> None:
    if ranks.size == 1:
        return
    rows = blake2b(digest_size=8)
    for item in items:
        rows.update(json.dumps(item.row, sort_keys=True).encode())
    if len(set(ranks.all_gather_objects(rows.hexdigest()))) > 1:
        raise ConfigError("the ranks found different rows: every machine needs the same files at the same paths")
