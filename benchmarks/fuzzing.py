"""Manifests of every kind, mutated at random, through the reader that 'canter index' and 'canter train' share: anything
but rows, problems or a CanterError fails. Run by resilience.py."""

import json
import random
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from canter.corpus.mixture import read_mixture
from canter.corpus.sources import open_source
from canter.corpus.synthesis import synthesise
from canter.errors import CanterError

VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x" * 5000,
    "é\u0000",
    [],
    {},
    [1],
    "1.5",
]
KEYS = ["", "Text", "audio", "\ud800", "_skipme", "target_lang", "pnc", "offset"]


def spoilt(draw: random.Random, value: Any) -> Any:
    """A JSON object in which some keys, at any depth, are gone, new, or have another value."""
    if isinstance(value, list):
        return [spoilt(draw, one) for one in value]
    if not isinstance(value, dict):
        return value
    one = {key: spoilt(draw, item) for key, item in value.items()}
    for _ in range(draw.randint(0, 2)):
        key = draw.choice([*one, *KEYS])
        if draw.random() < 0.25:
            one.pop(key, None)
        else:
            one[key] = draw.choice(VALUES)
    return one


def harmed(draw: random.Random, content: bytes) -> bytes:
    """``content`` with none to fifty bytes changed, dropped or put in."""
    harmed = bytearray(content)
    for _ in range(draw.choice([0, 0, 0, 1, 5, 50])):
        if not harmed:
            break
        place = draw.randrange(len(harmed))
        harm = draw.random()
        if harm < 0.5:
            harmed[place] = draw.randrange(256)
        elif harm < 0.8:
            del harmed[place : place + draw.randint(1, 20)]
        else:
            harmed[place:place] = bytes(draw.randrange(256) for _ in range(draw.randint(1, 8)))
    return bytes(harmed)


def json_lines(draw: random.Random, row: dict[str, Any]) -> bytes:
    rows = [spoilt(draw, row) for _ in range(draw.randint(1, 4))]
    return harmed(draw, b"\n".join(json.dumps(one).encode() for one in rows))


def table(draw: random.Random, row: dict[str, str]) -> bytes:
    rows = [{**row, draw.choice([*row]): draw.choice(["", "\t", "x" * 5000, "a\0b", "é"])} for _ in range(3)]
    return harmed(
        draw, "\n".join("\t".join(one) for one in (row.keys(), *(r.values() for r in rows))).encode()
    )


def mixture(draw: random.Random, entry: dict[str, Any]) -> bytes:
    group = {"type": "group", "weight": 2, "temperature": 0.5, "input_cfg": [dict(entry), dict(entry)]}
    return harmed(draw, json.dumps(spoilt(draw, [group, {"weight": 1, **entry}])).encode())


def fuzz(folder: Path, manifests: int, seed: int) -> dict[str, Any]:
    """Reads that many NeMo manifests, and a fifth as many of each other kind; the figures, by kind and in all."""
    corpus = synthesise(folder / "corpus", utterances=40, test_utterances=6, workers=1)
    row = json.loads(corpus.train_manifest.read_text(encoding="utf-8").splitlines()[0])
    audio = row["audio_filepath"] = str(corpus.train_manifest.parent / row["audio_filepath"])
    recording = {
        "id": "a",
        "sources": [{"type": "file", "channels": [0], "source": audio}],
        "sampling_rate": 16000,
        "num_samples": int(16000 * row["duration"]),
        "duration": row["duration"],
        "channel_ids": [0],
    }
    said = {"id": "s", "recording_id": "a", "start": 0.0, "duration": row["duration"], "channel": 0}
    said |= {"text": row["text"], "language": "en", "custom": {"pnc": "no"}}
    cut = {"id": "c", "start": 0.0, "duration": row["duration"], "channel": 0}
    cut |= {"supervisions": [said], "recording": recording, "type": "MonoCut"}
    voice = {"client_id": "1", "path": audio, "sentence": row["text"], "locale": "en"}
    made: list[tuple[str, int, str, Callable, dict]] = [
        ("nemo", manifests, ".jsonl", json_lines, row),
        ("lhotse", manifests // 5, ".jsonl", json_lines, cut),
        ("commonvoice", manifests // 5, ".tsv", table, voice),
        (
            "mixture",
            manifests // 5,
            ".yaml",
            mixture,
            {"manifest_filepath": str(corpus.train_manifest)},
        ),
    ]
    draw = random.Random(seed)
    result: dict[str, Any] = {"manifests": 0, "rows": 0, "problems": 0, "refused": 0}
    failures: list[str] = []
    for kind, count, suffix, make, sound in made:
        path = folder / f"fuzzed{suffix}"
        found = {"manifests": count, "rows": 0, "problems": 0, "refused": 0, "tracebacks": 0}
        for _ in range(count):
            content = make(draw, sound)
            path.write_bytes(content)
            try:
                for one in [read_mixture(path)] if kind == "mixture" else open_source(path):
                    found["problems" if hasattr(one, "reason") else "rows"] += 1
            except CanterError:
                found["refused"] += 1
            except Exception:
                found["tracebacks"] += 1
                failures.append(f"{kind}: {content[:300]!r}\n{traceback.format_exc(limit=-3)}")
        result[kind] = found
        for name in ("manifests", "rows", "problems", "refused"):
            result[name] += found[name]
    return result | {"tracebacks": len(failures), "first": failures[:3]}
