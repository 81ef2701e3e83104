"""Measure Whisper on short audio: padded to 30 s or less, not padded, or several utterances in one window.

Speed and WER of each, greedy with timestamps off, on the same utterances, runs one after the other. Of a shared window
the words are given back to utterances by their times (cross-attention alignment).

    CANTER_SHARED=... python benchmarks/whisper_windows.py [--manifests MANIFEST ...] [--limit 100] [--json FILE]
"""

import json
import os
import platform
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

import canter
from canter.corpus.audio import load_audio
from canter.corpus.manifest import Utterance, read_manifest
from canter.evaluation.wer import score_texts
from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import EngineConfig, Request
from canter.inference.transcript.reading import words_of
from canter.models.model import SpeechModel

SHARED = Path(os.environ.get("CANTER_SHARED", "."))
WINDOW = 30.0


@dataclass(frozen=True)
class Options:
    model: Path = SHARED / "models/whisper-tiny.en"
    manifests: tuple[Path, ...] = tuple(
        SHARED / "data/speech" / name / "manifest.jsonl" for name in ("librivox_mini", "commonvoice61_sample", "an4")
    )
    """Manifests; each gets a table."""
    limit: int = 60
    """Number of English utterances of each, evenly spread."""
    pads: tuple[float, ...] = (30.0, 20.0, 15.0, 0.0)
    """Seconds that audio is padded to; 0 is no padding. Longer audio is not padded."""
    gap: float = 1.0
    """Seconds of silence between utterances that share a window."""
    rows: int = 16
    threads: int = 1
    json: Path | None = None


def shared_windows(clips: list[np.ndarray], gap: int, size: int) -> list[list[int]]:
    """Return the indices of the clips in each window, by first fit from the longest clip on."""
    windows: list[tuple[int, list[int]]] = []
    for index in sorted(range(len(clips)), key=lambda i: -len(clips[i])):
        need = len(clips[index]) + gap
        for place, (used, members) in enumerate(windows):
            if used + need <= size:
                windows[place] = (used + need, [*members, index])
                break
        else:
            windows.append((need, [index]))
    return [members for _, members in windows]


def measure_manifest(model: SpeechModel, manifest: Path, options: Options) -> dict[str, Any]:
    """Return speed and WER of every kind of padding on the utterances of a manifest."""
    tokenizer = model.tokenizer
    rows = [
        row for row in read_manifest(manifest) if isinstance(row, Utterance) and row.duration < 28 and row.lang == "en"
    ]
    rows = rows[:: max(1, len(rows) // options.limit)][: options.limit]
    clips = [load_audio(row.audio_filepath) for row in rows]
    texts = [row.text for row in rows]
    prompt = tokenizer.prompt_ids({"source_lang": "en", "target_lang": "en"})
    seconds = sum(map(len, clips)) / 16000
    found = []

    def measure(name: str, decode) -> None:
        begun = time.perf_counter()
        heard = decode()
        taken = time.perf_counter() - begun
        total = score_texts(texts, heard, ["en"] * len(texts)).total
        found.append({"way": name, "seconds": taken, "rtfx": seconds / taken, "wer": total.wer})
        print(f"{name:22} {taken:7.1f} s  RTFx {seconds / taken:6.1f}  WER {100 * total.wer:6.1f} %", flush=True)

    def alone() -> list[str]:
        engine = Engine(model, tokenizer.end, EngineConfig(rows=options.rows, frames=6000))
        return [tokenizer.decode(one.tokens) for one in engine.decode(Request(clip, prompt) for clip in clips)]

    def together() -> list[str]:
        gap = round(options.gap * 16000)
        windows = shared_windows(clips, gap, round(WINDOW * 16000))
        requests, spans = [], []
        for members in windows:
            at, parts, ends = 0, [], []
            for index in members:
                parts += [clips[index], np.zeros(gap, np.float32)]
                at += len(clips[index]) + gap
                ends.append((at - gap / 2) / 16000)
            requests.append(Request(np.concatenate(parts)[: round(WINDOW * 16000)], prompt, aligned=True))
            spans.append(ends)
        engine = Engine(model, tokenizer.end, EngineConfig(rows=options.rows, frames=6000))
        heard = [""] * len(clips)
        for members, ends, one in zip(windows, spans, engine.decode(requests)):
            assert one.alignment is not None
            for word in words_of(one.alignment, tokenizer):
                place = int(np.searchsorted(ends, (word.start + word.end) / 2))
                heard[members[min(place, len(members) - 1)]] += word.text
        return heard

    for pad in options.pads:
        model.set_features(pad_seconds=pad)
        if pad and pad < max(map(len, clips)) / 16000:
            continue  # the features refuse what is longer
        measure(f"padded to {pad:g} s" if pad else "not padded", alone)
    model.set_features(pad_seconds=WINDOW)
    measure("windows shared", together)
    return {"manifest": manifest.parent.name, "utterances": len(rows), "audio_seconds": seconds, "ways": found}


def run(options: Options) -> None:
    torch.set_num_threads(options.threads)
    model = canter.load_model(options.model)
    tables = []
    for manifest in options.manifests:
        print(manifest.parent.name)
        tables.append(measure_manifest(model, manifest, options))
    if options.json:
        result = {"date": date.today().isoformat(), "model": options.model.name, "threads": options.threads,
                  "device": platform.processor() or platform.machine(), "torch": torch.__version__,
                  "tables": tables}  # fmt: skip
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(tyro.cli(Options, description=__doc__))
