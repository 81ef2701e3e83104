"""Compare transcripts across batch sizes, precisions and `transformers`: whisper-tiny.en on English clips.

1. float32: batches of 1, 8 and 64, of encoder and decoder, against each other and against `transformers`, greedy.
   Rows in which the two best tokens are ever closer than 1e-4 are counted separately.
2. Other precisions: the number of rows equal to float32, of rows equal in all batches, and the WER.
3. Beam size 5: scores compared with `transformers`.

    CANTER_SHARED=... python benchmarks/identity.py [--most 30] [--json FILE]

It fails if a row that is no near tie differs in 1, or a score by more than 1e-4 in 3.
"""

import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

from canter.corpus.audio import load_audio
from canter.corpus.manifest import Utterance, read_manifest
from canter.evaluation.wer import score_texts
from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import EngineConfig, Hypothesis, Request
from canter.inference.engine.search import Greedy, RepetitionGuard, Row
from canter.loading import load_module

SHARED = Path(os.environ.get("CANTER_SHARED", "."))
NEAR = 1e-4


@dataclass(frozen=True)
class Options:
    model: Path = SHARED / "models/whisper-tiny.en"
    manifests: tuple[Path, ...] = tuple(
        SHARED / "data/speech" / name / "manifest.jsonl" for name in ("librivox_mini", "commonvoice61_sample", "an4")
    )
    """Manifests of the English clips to decode."""
    most: int = 1000
    """Maximum number of clips of each manifest, evenly spread."""
    batches: tuple[int, ...] = (1, 8, 64)
    precisions: tuple[Literal["bf16", "int8"], ...] = ("int8", "bf16")
    slow_every: int = 4
    """Use every N-th of these clips for bf16 and beam search."""
    threads: int = 1
    json: Path | None = None
    """Write the figures to this file."""


@dataclass(frozen=True)
class Clip:
    audio: np.ndarray
    text: str


class Margins(Greedy):
    """Greedy search that records the smallest distance between a row's two best tokens."""

    def __init__(self, rules):
        super().__init__(rules, RepetitionGuard(1, 0))
        self.margins: dict[int, float] = {}  # by the row's identity

    def choose(self, logits, first, opening):
        scores = logits[:, 0].float().clone()
        self.rules.suppress(scores, opening)
        two = scores.topk(2, dim=-1).values
        for row, margin in zip(self.rows[first:], (two[:, 0] - two[:, 1]).tolist()):
            self.margins[id(row)] = min(margin, self.margins.get(id(row), margin))
        return super().choose(logits, first, opening)


class WatchedEngine(Engine):
    """Engine that records the smallest margin of every request, by its key."""

    def __init__(self, model, end, config):
        super().__init__(model, end, config)
        self.margins: dict[object, float] = {}
        self.drawn: list[Row] = []  # kept, so that no identity is given twice

    def _search(self):
        self.search = Margins(self.rules)
        return self.search

    def _hypothesis(self, live, slot):
        row = live.drawn[slot]
        self.drawn.append(row)
        self.margins[live.rows[slot].request.key] = self.search.margins[id(row)]
        return super()._hypothesis(live, slot)


def read_clips(options: Options) -> list[Clip]:
    clips: list[Clip] = []
    for manifest in options.manifests:
        rows = [row for row in read_manifest(manifest) if isinstance(row, Utterance) and row.lang == "en"]
        chosen = np.linspace(0, len(rows) - 1, min(options.most, len(rows))).astype(int)
        clips += [Clip(load_audio(rows[place].audio_filepath), rows[place].text) for place in chosen]
    return clips


class Decoding:
    """Model in one precision, to decode clips in batches of several sizes."""

    def __init__(self, options: Options, precision: Literal["float32", "bf16", "int8"]):
        self.model = load_module(options.model, precision=precision)
        self.precision = precision
        self.prompt = self.model.tokenizer.prompt_ids({"source_lang": "en", "target_lang": "en"})

    def config(self, batch: int, beams: int = 1) -> EngineConfig:
        frames = batch * self.model.encoder_frames(30.0)  # the encoder's batches are as large
        return EngineConfig(rows=batch, frames=frames, max_repeats=0, beams=beams)

    def greedy(self, clips: Sequence[Clip], batch: int) -> tuple[list[list[int]], list[float]]:
        """Return tokens and margins."""
        engine = WatchedEngine(self.model, self.model.tokenizer.end, self.config(batch))
        begun = time.perf_counter()
        found = engine.decode([Request(clip.audio, self.prompt) for clip in clips])
        print(f"{self.precision}, batch {batch}: {time.perf_counter() - begun:.0f} s", flush=True)
        return [one.tokens for one in found], [engine.margins[number] for number in range(len(clips))]

    def beams(self, clips: Sequence[Clip], beams: int) -> list[Hypothesis]:
        engine = Engine(self.model, self.model.tokenizer.end, self.config(8, beams))
        return engine.decode([Request(clip.audio, self.prompt) for clip in clips])


class Transformers:
    """`generate` of transformers with its features, 16 clips at a time."""

    def __init__(self, folder: Path, prompt: Sequence[int]):
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.version = transformers.__version__
        self.extractor = transformers.WhisperFeatureExtractor.from_pretrained(folder)
        self.model = transformers.WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        self.model.eval()
        self.prompt = list(prompt)

    def __call__(self, clips: Sequence[Clip], beams: int = 1) -> tuple[list[list[int]], list[float]]:
        """Return tokens and, for beam search, scores."""
        tokens, scores = [], []
        end = self.model.generation_config.eos_token_id
        for start in range(0, len(clips), 16):
            audio = [clip.audio for clip in clips[start : start + 16]]
            inputs = self.extractor(audio, sampling_rate=16000, return_tensors="pt")
            with warnings.catch_warnings(), torch.inference_mode():
                warnings.simplefilter("ignore")
                found = self.model.generate(
                    inputs.input_features, num_beams=beams, return_dict_in_generate=True, output_scores=beams > 1
                )
            for row in found["sequences"].tolist():
                row = row[len(self.prompt) :] if row[: len(self.prompt)] == self.prompt else row
                tokens.append(row[: row.index(end)] if end in row else row)
            if beams > 1:
                scores += found["sequences_scores"].tolist()
        return tokens, scores


def compare(one: list[list[int]], other: list[list[int]], near: list[bool]) -> dict[str, float]:
    """Return the number of equal rows, and the different rows without near ties."""
    differing = [place for place, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
    return {
        "same": 1 - len(differing) / len(one),
        "differing": sum(not near[place] for place in differing),
        "differing_near_ties": sum(near[place] for place in differing),
    }


def run(options: Options) -> int:
    torch.set_num_threads(options.threads)
    clips = read_clips(options)
    texts = [clip.text for clip in clips]
    exact = Decoding(options, "float32")
    spell = exact.model.tokenizer.decode

    def wer(tokens: list[list[int]], texts: list[str]) -> float:
        return score_texts(texts, [spell(row) for row in tokens], ["en"] * len(texts)).total.wer

    found = {batch: exact.greedy(clips, batch) for batch in options.batches}
    first, margins = found[options.batches[0]]
    near = [margin < NEAR for margin in margins]
    theirs = Transformers(options.model, exact.prompt)
    begun = time.perf_counter()
    reference, _ = theirs(clips)
    print(f"transformers: {time.perf_counter() - begun:.0f} s", flush=True)
    float32 = {
        "near_ties": sum(near),
        "smallest_margin": min(margins),
        "wer": wer(first, texts),
        "transformers_wer": wer(reference, texts),
        **{f"batch_{batch}": compare(first, found[batch][0], near) for batch in options.batches[1:]},
        "transformers": compare(first, reference, near),
    }
    result = {
        "date": date.today().isoformat(),
        "model": options.model.name,
        "clips": len(clips),
        "audio_seconds": sum(len(clip.audio) for clip in clips) / 16000,
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": theirs.version,
        "threads": options.threads,
        "float32": float32,
    }
    for precision in options.precisions:
        chosen = slice(None, None, options.slow_every if precision == "bf16" else 1)
        decoding = Decoding(options, precision)
        rows = {batch: decoding.greedy(clips[chosen], batch)[0] for batch in options.batches[1:]}
        small, large = rows[options.batches[1]], rows[options.batches[-1]]
        result[precision] = {
            "clips": len(small),
            "same_as_float32": compare(first[chosen], large, near[chosen])["same"],
            "same_in_both_batches": compare(small, large, near[chosen])["same"],
            "batches": options.batches[1:],
            "wer": wer(large, texts[chosen]),
            "float32_wer": wer(first[chosen], texts[chosen]),
        }
    some = clips[:: options.slow_every]
    hypotheses = exact.beams(some, 5)
    tokens, scores = theirs(some, beams=5)
    apart = [abs(one.avg_logprob - theirs) for one, theirs in zip(hypotheses, scores, strict=True)]
    result["beam_5"] = {
        "clips": len(some),
        "same_tokens": sum(one.tokens == row for one, row in zip(hypotheses, tokens)) / len(some),
        "largest_difference_of_scores": max(apart),
        "wer": wer([one.tokens for one in hypotheses], [clip.text for clip in some]),
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    differing = [float32[f"batch_{batch}"]["differing"] for batch in options.batches[1:]]
    return 1 if any(differing) or float32["transformers"]["differing"] or max(apart) > NEAR else 0


if __name__ == "__main__":
    sys.exit(run(tyro.cli(Options, description=__doc__)))
