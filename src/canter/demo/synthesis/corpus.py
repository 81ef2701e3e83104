"""Builds a synthetic speech corpus: plans every utterance from the seed, then speaks them in parallel.

    folder/corpus.json                     what it was made of; a folder that holds something else is refused
    folder/train.jsonl, test.jsonl         NeMo manifests, written last
    folder/train/000000.flac ...           16 kHz, mono, 16 bit

Utterances are spoken in batches of `BATCH`, each batch by a fresh process, because espeak remembers what it
said before: so the audio depends on the seed only, neither on the number of workers nor on where an earlier
run was interrupted.
"""

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from canter.demo.synthesis.espeak import SAMPLE_RATE, espeak
from canter.demo.synthesis.sentences import GRAMMARS, is_test, normalised
from canter.demo.synthesis.voices import Voice, voices
from canter.errors import CanterError
from canter.files import write_text
from canter.processes import start_pool_worker

FORMAT = "canter-synthesis/1"
BATCH = 64
RATE_JITTER = 0.12  # how far an utterance's rate strays from its speaker's
UNSEEN_SHARE = 3  # one in so many test utterances has a speaker that training lacks
MAX_WORKERS = 8


@dataclass(frozen=True)
class Spoken:
    """One utterance to be spoken: where to, what, by whom, at how many words a minute."""

    file: str
    sentence: str
    voice: Voice
    rate: int
    seen: bool

    @property
    def text(self) -> str:
        return normalised(self.sentence)


@dataclass(frozen=True)
class Corpus:
    """A finished corpus. `seconds` is its audio, train and test together."""

    train_manifest: Path
    test_manifest: Path
    utterances: int
    test_utterances: int
    seconds: float
    voices: int
    unseen_voices: int


def plan_part(part: str, utterances: int, seed: int) -> Iterator[Spoken]:
    """What the train or test part says; test texts are distinct. A longer part begins with the shorter
    ones."""
    test = part == "test"
    taken: set[str] = set()
    for number in range(utterances):
        rng = np.random.default_rng([seed, test, number])
        seen = not (test and number % UNSEEN_SHARE == UNSEEN_SHARE - 1)
        language = list(GRAMMARS)[int(rng.integers(len(GRAMMARS)))]
        speakers = voices(language, unseen=not seen)
        voice = speakers[rng.integers(len(speakers))]
        sentence = GRAMMARS[language].sentence(rng)
        while is_test(normalised(sentence)) != test or sentence in taken:
            sentence = GRAMMARS[language].sentence(rng)
        if test:
            taken.add(sentence)
        rate = round(voice.rate * rng.uniform(1 - RATE_JITTER, 1 + RATE_JITTER))
        yield Spoken(f"{part}/{number:06}.flac", sentence, voice, rate, seen)


def synthesise(
    folder: str | os.PathLike,
    *,
    utterances: int = 3000,
    test_utterances: int = 200,
    seed: int = 0,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Corpus:
    """Makes, or completes, the corpus in `folder`.

    `progress` is told (utterances done, of how many); without it a bar shows on stderr if that is a terminal.
    Audio that is there already from the same seed stays, also when the numbers of utterances have grown.
    Raises CanterError if espeak-ng is missing or the folder holds another corpus.
    """
    folder = Path(folder)
    recipe = hashlib.blake2b(repr(list(plan_part("train", 256, seed))).encode(), digest_size=8).hexdigest()
    _claim(folder, {"format": FORMAT, "seed": seed, "espeak": espeak().version, "recipe": recipe})
    parts = {
        "train": list(plan_part("train", utterances, seed)),
        "test": list(plan_part("test", test_utterances, seed)),
    }
    workers = workers or min(os.cpu_count() or 1, MAX_WORKERS)
    with nullcontext(progress) if progress else _bar() as report:
        seconds = _speak_all(folder, list(parts.values()), workers, report)
    for part, spoken in parts.items():
        lines = [json.dumps(_row(one, seconds[one.file]), ensure_ascii=False) for one in spoken]
        write_text(folder / f"{part}.jsonl", "".join(f"{line}\n" for line in lines))
    return Corpus(
        folder / "train.jsonl",
        folder / "test.jsonl",
        utterances,
        test_utterances,
        sum(seconds.values()),
        len({one.voice for one in parts["train"]}),
        len({one.voice for one in parts["test"] if not one.seen}),
    )


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    console = Console(stderr=True)
    columns = [TextColumn("synthesising"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("")
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _row(spoken: Spoken, seconds: float) -> dict:
    language = spoken.voice.language
    return {
        "audio_filepath": spoken.file,
        "duration": round(seconds, 4),
        "text": spoken.text,
        "lang": language,
        "source_lang": language,
        "target_lang": language,
        "speaker": spoken.voice.id,
        "speaker_seen": spoken.seen,
        "speed": spoken.rate,
    }


def _claim(folder: Path, settings: dict) -> None:
    """Creates the folder, or makes sure that it holds a corpus of these settings."""
    file = folder / "corpus.json"
    if file.exists():
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if found != settings:
            raise CanterError(f"{file}: the folder holds another corpus than {settings}; choose another, or delete it")
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise CanterError(f"{folder}: the folder is not empty and holds no corpus.json; choose another folder")
    for part in ("train", "test"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(settings, indent=1) + "\n")


def _speak_all(
    folder: Path, parts: Sequence[list[Spoken]], workers: int, report: Callable[[int, int], None]
) -> dict[str, float]:
    """Speaks every utterance that is missing; returns the seconds of each file."""
    batches = [part[at : at + BATCH] for part in parts for at in range(0, len(part), BATCH)]
    total = sum(map(len, batches))
    seconds: dict[str, float] = {}
    missing = []
    for batch in batches:
        try:
            seconds |= {one.file: soundfile.info(folder / one.file).duration for one in batch}
        except soundfile.LibsndfileError:
            missing.append(batch)
    report(len(seconds), total)
    if not missing:
        return seconds
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["canter.demo.synthesis.corpus"])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start_pool_worker, max_tasks_per_child=1)
    try:
        for future in as_completed([pool.submit(_speak, folder, batch) for batch in missing]):
            seconds |= future.result()
            report(len(seconds), total)
    finally:
        pool.shutdown(cancel_futures=True)
    return seconds


def _speak(folder: Path, batch: list[Spoken]) -> dict[str, float]:
    """Speaks a batch, in order, in a process that has spoken nothing before."""
    seconds = {}
    for one in batch:
        voice = one.voice
        samples = espeak().say(
            one.sentence, voice.name, rate=one.rate, pitch=voice.pitch, pitch_range=voice.pitch_range
        )
        file = folder / one.file
        unfinished = file.with_suffix(".partial")
        try:
            soundfile.write(unfinished, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
        except soundfile.LibsndfileError as error:
            raise CanterError(f"{file}: cannot be written ({error}); is there room on the disk?") from error
        unfinished.replace(file)  # a file that exists is whole
        seconds[one.file] = len(samples) / SAMPLE_RATE
    return seconds
