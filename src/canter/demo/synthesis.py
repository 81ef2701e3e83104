"""Synthesise a small speech corpus with espeak-ng: two languages, about a hundred voices, any number of sentences.

    folder/corpus.json                     settings of the corpus; a folder with other settings is refused
    folder/train.jsonl, test.jsonl         NeMo manifests, written last
    folder/train/000000.flac ...           16 kHz, mono, 16 bit

Every utterance is planned from the seed, then batches of `BATCH` are spoken in parallel. espeak-ng keeps state between
utterances, so a fresh process speaks each batch: the audio depends on the seed only, and neither on the number of
workers nor on where an earlier run was interrupted.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soundfile
import soxr

from canter.demo.sentences import GRAMMARS, is_test_text, reference_text
from canter.errors import CanterError
from canter.events import QUIET, Events
from canter.extras import needed_by
from canter.files import replacing, write_text
from canter.processes import start_pool_worker

if TYPE_CHECKING:
    from canter.training.run.reports import StepReport

FORMAT = "canter-synthesis/1"
BATCH = 64
RATE_JITTER = 0.12  # maximum deviation of an utterance's rate from its speaker's
UNSEEN_EVERY = 3  # every third test utterance has a speaker that training lacks
MAX_WORKERS = 8
SAMPLE_RATE = 16000

# -- voices: espeak-ng variants crossed with dialect, pitch and pitch range --
# Whisper tiny.en understood each of these variants reading English; whispering, croaking, echoing and robotic ones are
# left out. Unseen speakers have other variants than every training speaker (other formants and voicing), in the same
# dialects. They come from the same synthesiser and pronunciation rules, so "unseen" means far less than for people.
DIALECTS = {"en": ("en-us", "en-gb-x-rp"), "es": ("es", "es-419")}
TRAINING_VARIANTS = (
    "", "m1", "m2", "m3", "m4", "m6", "m7", "f1", "f2", "f4", "Alex", "Annie", "Denis", "Gene", "Hugo",
    "Mario", "Michael", "Mike", "Storm", "adam", "aunty", "benjamin", "edward", "gustave", "iven2", "iven4",
    "klatt", "klatt2", "klatt4", "linda", "max", "michel", "mike2",
)  # fmt: skip
UNSEEN_VARIANTS = ("m5", "m8", "f3", "f5", "Reed", "caleb", "david", "grandma", "grandpa", "john", "marcelo")
PITCHES = {"training": (38, 50, 62), "unseen": (44, 56)}


@dataclass(frozen=True)
class Voice:
    """A speaker of one language."""

    language: str
    dialect: str
    variant: str
    pitch: int
    """0 to 99, in espeak's units."""
    pitch_range: int
    """0 to 99, in espeak's units."""
    rate: int
    """Words a minute."""

    @property
    def name(self) -> str:
        """Name of the voice in espeak-ng."""
        return f"{self.dialect}+{self.variant}" if self.variant else self.dialect

    @property
    def id(self) -> str:
        """Name of the speaker in the manifests."""
        return f"{self.name}/p{self.pitch}"


@cache
def voices(language: str, *, unseen: bool) -> tuple[Voice, ...]:
    """Return the training or the unseen speakers of a language, in an order that is the same on every machine."""
    part = "unseen" if unseen else "training"
    rng = np.random.default_rng([sum(language.encode()), unseen])
    return tuple(
        Voice(
            language,
            dialect,
            variant,
            pitch=int(rng.choice(PITCHES[part])),
            pitch_range=int(rng.integers(35, 66)),
            rate=int(rng.integers(150, 186)),
        )
        for variant in (UNSEEN_VARIANTS if unseen else TRAINING_VARIANTS)
        for dialect in DIALECTS[language]
    )


@dataclass(frozen=True)
class Spoken:
    """An utterance to synthesise."""

    file: str
    sentence: str
    voice: Voice
    rate: int
    """Words a minute."""
    seen: bool
    """True where training has the speaker too."""

    @property
    def text(self) -> str:
        return reference_text(self.sentence)


@dataclass(frozen=True)
class Corpus:
    """A finished corpus."""

    train_manifest: Path
    test_manifest: Path
    utterances: int
    test_utterances: int
    seconds: float
    """Duration of all audio, train and test."""
    voices: int
    unseen_voices: int


def plan_part(part: str, utterances: int, seed: int) -> Iterator[Spoken]:
    """Yield the utterances of the part "train" or "test"; test texts are distinct.

    A larger number of utterances begins with those of a smaller number.
    """
    test = part == "test"
    taken: set[str] = set()
    for number in range(utterances):
        rng = np.random.default_rng([seed, test, number])
        seen = not (test and number % UNSEEN_EVERY == UNSEEN_EVERY - 1)
        language = list(GRAMMARS)[int(rng.integers(len(GRAMMARS)))]
        speakers = voices(language, unseen=not seen)
        voice = speakers[rng.integers(len(speakers))]
        sentence = GRAMMARS[language].sentence(rng)
        while is_test_text(reference_text(sentence)) != test or sentence in taken:
            sentence = GRAMMARS[language].sentence(rng)
        if test:
            taken.add(sentence)
        rate = round(voice.rate * rng.uniform(1 - RATE_JITTER, 1 + RATE_JITTER))
        yield Spoken(f"{part}/{number:06}.flac", sentence, voice, rate, seen)


def synthesise(
    folder: str | os.PathLike[str],
    *,
    utterances: int = 3000,
    test_utterances: int = 200,
    seed: int = 0,
    workers: int | None = None,
    events: Events[StepReport] = QUIET,
) -> Corpus:
    """Synthesise the corpus in ``folder``, or complete it.

    Audio that an earlier call made from the same seed is kept, also where the numbers of utterances have grown. Raises
    CanterError where espeak-ng is not installed or the folder holds another corpus.
    """
    folder = Path(folder)
    recipe = hashlib.blake2b(repr(list(plan_part("train", 256, seed))).encode(), digest_size=8).hexdigest()
    _claim(folder, {"format": FORMAT, "seed": seed, "espeak": espeak().version, "recipe": recipe})
    parts = {
        "train": list(plan_part("train", utterances, seed)),
        "test": list(plan_part("test", test_utterances, seed)),
    }
    seconds = _speak_all(folder, list(parts.values()), workers or min(os.cpu_count() or 1, MAX_WORKERS), events)
    for part, planned in parts.items():
        lines = (json.dumps(_manifest_row(one, seconds[one.file]), ensure_ascii=False) + "\n" for one in planned)
        write_text(folder / f"{part}.jsonl", lines)
    return Corpus(
        folder / "train.jsonl",
        folder / "test.jsonl",
        utterances,
        test_utterances,
        sum(seconds.values()),
        len({one.voice for one in parts["train"]}),
        len({one.voice for one in parts["test"] if not one.seen}),
    )


def _manifest_row(utterance: Spoken, seconds: float) -> dict[str, object]:
    language = utterance.voice.language
    return {
        "audio_filepath": utterance.file,
        "duration": round(seconds, 4),
        "text": utterance.text,
        "lang": language,
        "source_lang": language,
        "target_lang": language,
        "speaker": utterance.voice.id,
        "speaker_seen": utterance.seen,
        "speed": utterance.rate,
    }


def _claim(folder: Path, settings: Mapping[str, object]) -> None:
    """Create the folder, or check that it holds a corpus of these settings."""
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
    folder: Path, parts: Sequence[list[Spoken]], workers: int, events: Events[StepReport]
) -> dict[str, float]:
    """Synthesise every utterance that is missing, and return the seconds of each file."""
    seconds: dict[str, float] = {}
    missing = []
    for batch in (part[at : at + BATCH] for part in parts for at in range(0, len(part), BATCH)):
        try:
            seconds |= {one.file: soundfile.info(folder / one.file).duration for one in batch}
        except soundfile.LibsndfileError:
            missing.append(batch)
    if not missing:
        return seconds
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["canter.demo.synthesis"])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start_pool_worker, max_tasks_per_child=1)
    try:
        done = as_completed([pool.submit(_speak, folder, batch) for batch in missing])
        for _ in events.progress(missing, "speaking"):
            seconds |= next(done).result()
    finally:
        pool.shutdown(cancel_futures=True)
    return seconds


def _speak(folder: Path, batch: list[Spoken]) -> dict[str, float]:
    """Synthesise a batch in order; the process must not have spoken before."""
    seconds = {}
    for one in batch:
        samples = espeak().say(one.sentence, one.voice, one.rate)
        file = folder / one.file
        try:
            with replacing(file, durable=False) as fresh:
                soundfile.write(fresh, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
        except soundfile.LibsndfileError as error:
            raise CanterError(f"{file}: cannot be written ({error}); is there room on the disk?") from error
        seconds[one.file] = len(samples) / SAMPLE_RATE
    return seconds


# -- espeak-ng in this process, through the library that `espeakng-loader` ships; constants of its speak_lib.h --
_SYNCHRONOUS, _DONT_EXIT = 2, 0x8000
_POSITION_CHARACTER, _UTF8 = 1, 1
_RATE, _PITCH, _RANGE = 1, 3, 4
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Espeak:
    """The espeak-ng library, initialised once in a process by `espeak`.

    The library keeps state: the flutter of a voice continues from one utterance to the next, so the same sentence
    sounds slightly different after another one. Repeatable audio needs the same sequence in a fresh process.
    """

    def __init__(self) -> None:
        with needed_by("speech synthesis"):
            import espeakng_loader
        try:
            self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        except OSError as error:
            raise CanterError(
                f"espeak-ng cannot be loaded ({error}): pip install --force-reinstall espeakng-loader"
            ) from error
        self._pieces: list[bytes] = []
        self._callback = _CALLBACK(self._collect)  # kept: the library holds only the address
        data = str(espeakng_loader.get_data_path())
        self.native_rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, data.encode(), _DONT_EXIT)
        if self.native_rate <= 0:
            raise CanterError(f"espeak-ng does not start with its data in {data}: reinstall espeakng-loader")
        self._library.espeak_SetSynthCallback(self._callback)
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # seeded by the clock otherwise
        self._library.espeak_Info.restype = ctypes.c_char_p
        self.version = self._library.espeak_Info(None).decode()

    def _collect(self, samples, count: int, _events) -> int:
        if samples and count > 0:
            self._pieces.append(ctypes.string_at(samples, 2 * count))
        return 0

    def say(self, text: str, voice: Voice, rate: int) -> np.ndarray:
        """Return ``text`` spoken at ``rate`` words a minute: int16 samples (S,) at 16 kHz, mono.

        Raises CanterError for a voice that espeak does not have.
        """
        if self._library.espeak_SetVoiceByName(voice.name.encode()) != 0:
            raise CanterError(f"espeak-ng {self.version} has no voice '{voice.name}'")
        for parameter, value in ((_RATE, rate), (_PITCH, voice.pitch), (_RANGE, voice.pitch_range)):
            self._library.espeak_SetParameter(parameter, value, 0)
        encoded = text.encode() + b"\0"
        self._pieces.clear()
        status = self._library.espeak_Synth(encoded, len(encoded), 0, _POSITION_CHARACTER, 0, _UTF8, None, None)
        if status != 0:
            raise CanterError(f"espeak-ng failed with status {status} on '{text}' ({voice.name})")
        native = np.frombuffer(b"".join(self._pieces), dtype=np.int16)
        # in floating point, since soxr adds dither seeded by the clock to integers
        samples = soxr.resample(native.astype(np.float32), self.native_rate, SAMPLE_RATE)
        return np.rint(np.clip(samples, -32768, 32767)).astype(np.int16)


@cache
def espeak() -> Espeak:
    """Return this process's espeak-ng. Raises CanterError where it is not installed."""
    return Espeak()
