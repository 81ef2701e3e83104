"""Measure the times of words of `canter align`, by CTC and by cross-attention.

Known times: espeak-ng reports when it begins each word of a sentence that it speaks. The sentences are those of the
demo's test set. Errors are of word starts, per sentence and in one long recording of all sentences with pauses, whose
text is divided over windows by the model's own transcript.

Real speech: the manifest's clips one after another, with their texts, in one recording. Their boundaries are known, so
a word whose middle lies outside its clip is misplaced.

    CANTER_SHARED=... python benchmarks/alignment.py MODEL [--languages en es] [--sentences 100] [--manifest FILE]
"""

import ctypes
import json
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro

from canter.corpus.audio import load_utterance
from canter.corpus.manifest import Utterance, read_manifest
from canter.demo.synthesis import SAMPLE_RATE, Espeak, Voice, plan_part
from canter.inference.align import Aligner, Method
from canter.inference.loading import load_engine
from canter.inference.transcript.segments import Word
from canter.reporting.machine import describe_machine

SHARED = Path(os.environ.get("CANTER_SHARED", "."))
PAUSES = (0.1, 1.5)  # shortest and longest pause in seconds between sentences and clips
WORD_EVENT = 1  # espeakEVENT_WORD in espeak-ng's speak_lib.h
MISPLACED = 0.5  # seconds of an error that is counted


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path]
    """Model that aligns."""
    methods: tuple[Method, ...] = ("attention",)
    """Methods to compare: ctc needs a model with a CTC head."""
    languages: tuple[str, ...] = ("en",)
    """Languages of the spoken sentences: en, es."""
    sentences: int = 100
    """Number of spoken sentences."""
    manifest: Path | None = None
    """Manifest of clips for the recording of real speech (default: none)."""
    clips: int = 100
    """Maximum number of clips."""
    json: Path | None = None
    """Write the figures to this file."""


class _Event(ctypes.Structure):
    """``espeak_EVENT`` of speak_lib.h, without its last field."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # milliseconds
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    )


class TimedEspeak(Espeak):
    """espeak-ng that keeps the time at which each word begins."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[tuple[int, float]] = []
        """Place in the text, from 0, and start in seconds of each word."""

    def _collect(self, samples, count: int, events) -> int:
        place = events
        while place and (event := _Event.from_address(place)).type:
            if event.type == WORD_EVENT:
                self.words.append((event.text_position - 1, event.audio_position / 1000))
            place += ctypes.sizeof(_Event)
        return super()._collect(samples, count, events)

    def timed(self, text: str, voice: Voice, rate: int) -> tuple[np.ndarray, list[float] | None]:
        """Return samples (S,) float32 and the start of every word; None where espeak-ng has other words."""
        self.words.clear()
        samples = self.say(text, voice, rate).astype(np.float32) / 32768
        starts = dict(self.words)
        places = [place for place, one in enumerate(text) if one != " " and (not place or text[place - 1] == " ")]
        known = all(place in starts for place in places)
        return samples, [starts[place] for place in places] if known else None


@dataclass
class Recording:
    """Clips one after another, with pauses between them."""

    parts: list[np.ndarray] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    begins: list[float] = field(default_factory=list)
    """Start of each clip in seconds."""
    seconds: float = 0.0

    def add(self, samples: np.ndarray, text: str, pause: float) -> None:
        self.begins.append(self.seconds)
        silence = np.random.default_rng(len(self.text)).normal(size=round(pause * SAMPLE_RATE)) * 1e-4
        self.parts += [samples, silence.astype(np.float32)]
        self.text.append(text)
        self.seconds = sum(map(len, self.parts)) / SAMPLE_RATE

    def align(self, aligner: Aligner) -> list[Word]:
        utterance = Utterance("recording", self.seconds, "\n".join(self.text), lang="en")
        ((_, found),) = aligner.align([utterance], np.concatenate(self.parts))
        if found.error:
            raise SystemExit(found.error)
        return [word for segment in found.segments for word in segment.words]


def main() -> int:
    options = tyro.cli(Options, description=__doc__)
    engine = load_engine(options.model, device="cpu")
    assert engine.model.tokenizer is not None
    figures: dict[str, object] = {"machine": describe_machine(), "model": options.model.name}
    for method in options.methods:
        aligner = Aligner(engine, engine.model.tokenizer, method)
        made = spoken(aligner, options) | ({} if options.manifest is None else real(aligner, options))
        print(method, json.dumps(made), flush=True)
        figures[method] = made
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def spoken(aligner: Aligner, options: Options) -> dict[str, object]:
    """Return errors of word starts in sentences that espeak-ng speaks."""
    espeak, chance = TimedEspeak(), random.Random(0)
    planned = [one for one in plan_part("test", 8 * options.sentences, 0) if one.voice.language in options.languages]
    short: list[float] = []
    truth: list[float] = []
    recording = Recording()
    sentences = 0
    for one in planned:
        samples, starts = espeak.timed(one.text, one.voice, one.rate)
        if starts is None or sentences == options.sentences:
            continue
        sentences += 1
        utterance = Utterance(one.file, len(samples) / SAMPLE_RATE, one.text, lang=one.voice.language)
        ((_, found),) = aligner.align([utterance], samples)
        words = [word for segment in found.segments for word in segment.words]
        short += [word.start - start for word, start in zip(words, starts, strict=True)]
        recording.add(samples, one.text, chance.uniform(*PAUSES))
        truth += [start + recording.begins[-1] for start in starts]
    made: dict[str, object] = {"sentences": sentences, "sentence": errors(short)}
    if len(options.languages) == 1:
        words = recording.align(aligner)
        made["recording"] = {"seconds": round(recording.seconds, 1)} | errors(
            [word.start - start for word, start in zip(words, truth, strict=True)]
        )
    return made


def real(aligner: Aligner, options: Options) -> dict[str, object]:
    """Return the fraction of words that are placed outside their clips, in one recording of clips."""
    assert options.manifest is not None
    rows = [row for row in read_manifest(options.manifest) if isinstance(row, Utterance) and row.lang == "en"]
    chance = random.Random(0)
    recording = Recording()
    ends: list[float] = []
    for row in chance.sample(rows, min(options.clips, len(rows))):
        samples = load_utterance(row, SAMPLE_RATE)
        recording.add(samples, row.text, chance.uniform(*PAUSES))
        ends.append(recording.begins[-1] + len(samples) / SAMPLE_RATE)
    words = iter(recording.align(aligner))
    outside: list[float] = []
    for begin, end, text in zip(recording.begins, ends, recording.text):
        for _ in text.split():
            word = next(words)
            middle = (word.start + word.end) / 2
            outside.append(max(begin - middle, middle - end, 0.0))
    return {
        "real_speech": {
            "seconds": round(recording.seconds, 1),
            "clips": len(ends),
            "words": len(outside),
            "outside": float(np.mean(np.array(outside) > 0)),
            "outside_by_half_a_second": float(np.mean(np.array(outside) > MISPLACED)),
        }
    }


def errors(found: Sequence[float]) -> dict[str, float]:
    """Return figures of errors in seconds, as milliseconds."""
    away = 1000 * np.abs(np.array(found))
    return {
        "words": len(found),
        "median_ms": round(float(np.median(away)), 1),
        "p90_ms": round(float(np.quantile(away, 0.9)), 1),
        "bias_ms": round(1000 * float(np.median(found)), 1),
        "over_half_a_second": round(float(np.mean(away > 1000 * MISPLACED)), 4),
    }


if __name__ == "__main__":
    sys.exit(main())
