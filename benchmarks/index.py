"""Measure the length index at scale: time and resident memory to open it, to read a row, and to build it.

    python benchmarks/index.py [--rows 100000000] [--build-rows 1000000] [--output results/index-DATE.json]

Opening is measured in a fresh process, without imports, as the median of five times. The index and the manifests are
made in a temporary folder (16 bytes a row: 1.6 GB at 100 M) and removed.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from canter.corpus.build import index_sources
from canter.corpus.counting import UnitCounter
from canter.corpus.index import PLACE_BITS, LengthIndex, Shard, Source

ROWS_IN_SHARD = 10_000
OPEN = """
import json, random, sys, time
def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024
from canter.corpus.index import LengthIndex
result = {"resident_mb_imports": resident()}
times = []
for _ in range(5):
    start, used = time.perf_counter(), time.process_time()
    index = LengthIndex.open(sys.argv[1])
    times.append((time.perf_counter() - start, time.process_time() - used))
    result.setdefault("resident_mb_opened", resident())
result |= {"rows": len(index), "shards": len(index.shards), "open_seconds_first": times[0][0],
    "open_seconds_median": sorted(times)[2][0], "open_cpu_seconds_first": times[0][1]}
start = time.perf_counter()
for row in random.Random(0).sample(range(len(index)), 1000):
    float(index.seconds[row])
result["seconds_1000_random_rows"] = time.perf_counter() - start
result["resident_mb_1000_random_rows"] = resident()
print(json.dumps(result))
"""


def make_index(rows: int, path: Path) -> None:
    """Make an index like that of a tarred corpus: 10,000 rows a shard, three sources."""
    generator = np.random.default_rng(0)
    seconds = generator.lognormal(1.8, 0.7, rows).astype(np.float32).clip(0.3, 40)
    tokens = (seconds * 4).astype(np.uint16) + 5
    number = np.arange(rows, dtype=np.uint64)
    shard, line = number // ROWS_IN_SHARD, number % ROWS_IN_SHARD
    starts = range(0, rows, ROWS_IN_SHARD)
    source_of = np.minimum(number * 3 // rows, 2).astype(np.uint16)
    shards = [
        Shard(f"/data/corpus/sharded_manifests/manifest_{n}.json", f"/data/corpus/audio_{n}.tar",
              2_000_000, int(source_of[start]), start, min(start + ROWS_IN_SHARD, rows))
        for n, start in enumerate(starts)
    ]  # fmt: skip
    places = shard << np.uint64(PLACE_BITS) | line * np.uint64(200)
    sources = [Source("/data/a", weight=1.0), Source("/data/b", weight=2.0), Source("/data/c", weight=1.0)]
    LengthIndex(seconds, tokens, sources, source_of, places=places, shards=shards, problems=()).save(path)


def make_manifest(rows: int, path: Path) -> None:
    """Make a NeMo manifest of 12 words a row."""
    with open(path, "w") as file:
        for row in range(rows):
            text = f"the quick brown fox jumps over the lazy dog for the time {row}"
            fields = {"audio_filepath": f"clips/{row:09d}.flac", "duration": 1 + row % 3000 / 100, "text": text}
            file.write(json.dumps(fields) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--build-rows", type=int, default=1_000_000)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    result: dict = {"date": time.strftime("%Y-%m-%d"), "processor": processor(), "cores": os.cpu_count()}
    result["load_average_before"] = os.getloadavg()[0]
    result |= {"python": platform.python_version(), "numpy": np.__version__}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "lengths.arrow")
        make_index(options.rows, path)
        result["bytes_a_row"] = path.stat().st_size / options.rows
        done = subprocess.run([sys.executable, "-c", OPEN, path], capture_output=True, text=True, check=True)
        result["open"] = json.loads(done.stdout)
        path.unlink()
        manifest = Path(folder, "train.jsonl")
        make_manifest(options.build_rows, manifest)
        for workers in (1, 2):
            start = time.perf_counter()
            target = Path(folder, f"built{workers}.arrow")
            index = index_sources(manifest, target, UnitCounter("chars"), workers=workers)
            result[f"build_rows_per_second_{workers}_workers"] = round(len(index) / (time.perf_counter() - start))
        start = time.perf_counter()
        for row in np.random.default_rng(0).integers(0, len(index), 10_000):
            index.utterance(int(row))
        result["utterance_microseconds"] = round((time.perf_counter() - start) * 100, 1)
    text = json.dumps(result, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


def processor() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        return platform.processor()


if __name__ == "__main__":
    main()
