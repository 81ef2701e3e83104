"""Measure how many corrupted rows `canter inspect --suspects` finds among rows of real speech.

A fraction of the rows is corrupted, each by one kind of fault, and all rows are scored by the command's own functions.
For each kind: the probability that a corrupted row is more suspect than a clean one (AUC), and the fraction that the
limits find (recall). For all of them: the fraction of the rows found that are corrupted (precision), with the limits
and among the k most suspect rows, k being the number of corrupted ones. Clean rows are taken as they are, so a fault
that the corpora have of their own counts as a false alarm.

    CANTER_SHARED=... python benchmarks/suspects.py [MODEL] [--rows 800] [--corrupted 0.1] [--seeds 3] [--json FILE]
"""

import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile
import tyro

from canter.corpus.audio import load_utterance
from canter.corpus.manifest import Utterance, read_manifest
from canter.evaluation.suspects import suspicions
from canter.inference.align import Aligner, TextScore
from canter.inference.loading import load_engine
from canter.reporting.machine import describe_machine

SHARED = Path(os.environ.get("CANTER_SHARED", "."))
RATE = 16000
FEWEST_WORDS = 4  # of rows whose words are changed


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path] = SHARED / "models/whisper-tiny.en"
    """Model that scores the rows."""
    manifests: tuple[Path, ...] = tuple(
        SHARED / f"data/speech/{name}/manifest.jsonl" for name in ("an4", "commonvoice61_sample", "librivox_mini")
    )
    """Manifests of the rows; those in --language count."""
    language: str = "en"
    """Language of the rows; others serve as faults."""
    rows: int = 800
    """Maximum number of rows."""
    corrupted: float = 0.1
    """Fraction of the rows that is corrupted."""
    seeds: int = 3
    """Number of random choices of the corrupted rows; figures are of all of them together."""
    json: Path | None = None
    """Write the figures to this file."""


@dataclass(frozen=True)
class Corrupter:
    """Makes faulty rows of a clean one."""

    rows: Sequence[Utterance]
    foreign: Sequence[Utterance]
    folder: Path
    """Folder for changed audio."""
    chance: random.Random

    def other(self, row: Utterance) -> Utterance:
        """Return a row with another text."""
        while (found := self.chance.choice(self.rows)).text == row.text:
            pass
        return found

    def with_audio(self, row: Utterance, samples: np.ndarray) -> Utterance:
        path = self.folder / f"{len(list(self.folder.iterdir()))}.flac"
        soundfile.write(path, samples, RATE)
        return replace(row, audio_filepath=str(path), offset=None, duration=len(samples) / RATE)

    def swapped_text(self, row: Utterance) -> Utterance:
        return replace(row, text=self.other(row).text)

    def foreign_text(self, row: Utterance) -> Utterance:
        return replace(row, text=self.chance.choice(self.foreign).text)

    def foreign_audio(self, row: Utterance) -> Utterance:
        other = self.chance.choice(self.foreign)
        return replace(row, audio_filepath=other.audio_filepath, duration=other.duration)

    def silent_audio(self, row: Utterance) -> Utterance:
        noise = np.random.default_rng(self.chance.randrange(2**31)).normal(size=round(row.duration * RATE))
        return self.with_audio(row, 1e-3 * noise)

    def audio_cut_short(self, row: Utterance) -> Utterance:
        samples = load_utterance(row, RATE)
        return self.with_audio(row, samples[: round(0.6 * len(samples))])

    def text_cut_short(self, row: Utterance) -> Utterance:
        words = row.text.split()
        return replace(row, text=" ".join(words[: max(1, round(0.6 * len(words)))]))

    def words_missing(self, row: Utterance) -> Utterance:
        words = row.text.split()
        gone = set(self.chance.sample(range(len(words)), max(1, len(words) // 4)))
        return replace(row, text=" ".join(word for place, word in enumerate(words) if place not in gone))

    def words_added(self, row: Utterance) -> Utterance:
        return replace(row, text=" ".join([row.text, *self.other(row).text.split()[:3]]))

    def wrong_word(self, row: Utterance) -> Utterance:
        words = row.text.split()
        place = self.chance.randrange(len(words))
        while (new := self.chance.choice(self.other(row).text.split())) == words[place]:
            pass
        return replace(row, text=" ".join([*words[:place], new, *words[place + 1 :]]))

    @property
    def kinds(self) -> dict[str, Callable[[Utterance], Utterance]]:
        return {
            "text of another row": self.swapped_text,
            "text in another language": self.foreign_text,
            "audio in another language": self.foreign_audio,
            "audio silent": self.silent_audio,
            "audio cut to 60 %": self.audio_cut_short,
            "text cut to 60 %": self.text_cut_short,
            "a quarter of the words missing": self.words_missing,
            "3 words added": self.words_added,
            "1 wrong word": self.wrong_word,
        }


def main() -> int:
    options = tyro.cli(Options, description=__doc__)
    found = [row for path in options.manifests for row in read_manifest(path) if isinstance(row, Utterance)]
    chance = random.Random(0)
    rows = [row for row in found if row.lang == options.language]
    rows = chance.sample(rows, min(options.rows, len(rows)))
    foreign = [row for row in found if row.lang in ("de", "es", "fr", "it", "nl")]
    engine = load_engine(options.model, device="cpu")
    assert engine.model.tokenizer is not None
    aligner = Aligner(engine, engine.model.tokenizer, "attention")
    begun = time.perf_counter()
    clean = scored(aligner, rows)
    seconds = time.perf_counter() - begun
    print(f"{len(rows)} clean rows in {seconds:.0f} s", file=sys.stderr, flush=True)
    values: dict[str, list[float]] = {"clean": []}
    precision_at_k: list[float] = []
    reasons: dict[str, dict[str, int]] = {}
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            corrupter = Corrupter(rows, foreign, Path(folder), random.Random(seed))
            faulty = corrupted_rows(corrupter, rows, round(options.corrupted * len(rows)))
            scores = list(clean)
            new = scored(aligner, [row for _, row in faulty.values()])
            for place, score in zip(faulty, new):
                scores[place] = score
        judged = suspicions(scores, [options.language] * len(scores))
        for place, suspicion in enumerate(judged):
            kind = faulty[place][0] if place in faulty else "clean"
            values.setdefault(kind, []).append(suspicion.value)
            if suspicion.is_suspect:
                counts = reasons.setdefault(kind, {})
                counts[suspicion.reason] = counts.get(suspicion.reason, 0) + 1
        order = sorted(range(len(judged)), key=lambda place: -judged[place].value)
        precision_at_k.append(float(np.mean([place in faulty for place in order[: len(faulty)]])))
        print(f"seed {seed}: precision among the {len(faulty)} most suspect {precision_at_k[-1]:.3f}", file=sys.stderr)
    report(options, values, precision_at_k, reasons, len(rows), seconds)
    return 0


def scored(aligner: Aligner, rows: Sequence[Utterance]) -> list[TextScore]:
    """Return the scores of rows that can all be read."""
    found = dict(aligner.scores(rows))
    bad = [score for score in found.values() if isinstance(score, str)]
    if bad:
        raise SystemExit(f"{len(bad)} rows cannot be scored: {bad[0]}")
    return [score for place in range(len(rows)) if isinstance(score := found[place], TextScore)]


def corrupted_rows(corrupter: Corrupter, rows: Sequence[Utterance], count: int) -> dict[int, tuple[str, Utterance]]:
    """Return the places of about ``count`` rows, equally many of each kind of fault, with the kind and the new row."""
    kinds = list(corrupter.kinds.items())
    places = list(range(len(rows)))
    corrupter.chance.shuffle(places)
    places = [place for place in places if len(rows[place].text.split()) >= FEWEST_WORDS]
    chosen = places[: count // len(kinds) * len(kinds)]
    return {place: (kinds[n % len(kinds)][0], kinds[n % len(kinds)][1](rows[place])) for n, place in enumerate(chosen)}


def report(
    options: Options,
    values: dict[str, list[float]],
    precision_at_k: Sequence[float],
    reasons: dict[str, dict[str, int]],
    rows: int,
    seconds: float,
) -> None:
    clean = np.array(values.pop("clean"))
    kinds = {
        kind: {
            "rows": len(found),
            "auc": float(np.mean([np.mean(clean < value) + np.mean(clean == value) / 2 for value in found])),
            "recall": float(np.mean(np.array(found) >= 1)),
            "reasons": reasons.get(kind, {}),
        }
        for kind, found in values.items()
    }
    faulty = np.array([value for found in values.values() for value in found])
    hits, alarms = int((faulty >= 1).sum()), int((clean >= 1).sum())
    total = {
        "corrupted": len(faulty),
        "clean": len(clean),
        "recall": hits / len(faulty),
        "precision": hits / max(1, hits + alarms),
        "false_alarms": alarms / len(clean),
        "precision_at_k": float(np.mean(precision_at_k)),
        "reasons_of_false_alarms": reasons.get("clean", {}),
    }
    print(f"{'fault':32} {'rows':>5} {'AUC':>6} {'recall':>7}")
    for kind, one in kinds.items():
        print(f"{kind:32} {one['rows']:5} {one['auc']:6.3f} {one['recall']:7.1%}")
    print(json.dumps(total))
    if options.json:
        made = {
            "machine": describe_machine(),
            "model": options.model.name,
            "rows": rows,
            "corrupted": options.corrupted,
            "seconds_of_clean_rows": round(seconds, 1),
            "seeds": options.seeds,
            "total": total,
            "kinds": kinds,
        }
        options.json.write_text(json.dumps(made, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
