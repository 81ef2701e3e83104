"""Run the benchmarks that need no GPU, each at a small size: `make bench`, or `make bench BENCH="index models"`.

    CANTER_SHARED=... python benchmarks [NAME ...] [--list]

A script that needs data from CANTER_SHARED is skipped, with a message, where that is not set. Full sizes: README.md.
"""

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
# name -> its command lines; $shared is CANTER_SHARED, $scratch a folder that is removed
RUNS: dict[str, tuple[str, ...]] = {
    "planning": (
        "$shared/reference/million.py $scratch/million.parquet",
        "planning.py $scratch/million.parquet $shared/reference/canary-1b.budget.json --scratch $scratch",
    ),
    "planning_real": (
        "planning_real.py $shared/reference/canary-1b.budget.json $shared/data/lengths/css10_es.parquet "
        "$shared/data/lengths/ljspeech_en.parquet",
    ),
    "index": ("index.py --rows 10000000 --build-rows 200000",),
    "budget": ("budget.py predict small $shared/data/lengths/librispeech_devtest_en.parquet --count 10",),
    "ranks_memory": ("ranks_memory.py",),
    "alignment": ("alignment.py $shared/models/whisper-tiny.en --sentences 10",),
    "suspects": ("suspects.py --rows 60 --seeds 1",),
    "ranks": ("ranks.py -o $scratch/ranks.json --smoke",),
    "ranks_check": (
        "ranks_check.py -o $scratch/check $shared/data/speech/an4/manifest.jsonl --steps 12 --rounds 1 --probes 12",
    ),
    "training": ("training.py $shared/data/lengths/librispeech_devtest_en.parquet",),
    "training_defaults": (
        "$shared/reference/million.py $scratch/million.parquet",
        "training_defaults.py $scratch/million.parquet $shared/data/lengths/librispeech_devtest_en.parquet "
        "$shared/data/lengths/an4_en.parquet",
    ),
    "training_updates": (
        "training_updates.py -o $scratch/updates --whisper $shared/models/whisper-tiny.en --speech $shared/data/speech "
        "--tasks an4 --batch-seconds 16 64",
    ),
    "convergence": ("convergence.py -o $scratch/convergence --updates 100 --seeds 1",),
    "time_to_wer": (
        "time_to_wer.py -o $scratch/time --seeds 1 --minutes 0.5 --utterances 1000 --test-utterances 100 --timed 10",
    ),
    "decoder_depth": (
        "decoder_depth.py -o $scratch/depth --seeds 1 --steps 30 --utterances 1000 --test-utterances 100",
    ),
    "step_mixing": (
        "step_mixing.py -o $scratch/mixing --seeds 1 --updates 20 --utterances 1000 --test-utterances 100",
    ),
    "demo_steps": ("demo_steps.py -o $scratch/demo --steps 60 --seeds 1 --utterances 600 --beam 1",),
    "finetune": (
        "finetune.py $shared/models/whisper-tiny.en --train $shared/data/speech/an4/manifest.jsonl "
        "--valid $shared/data/speech/an4/manifest.jsonl --split train --steps 20",
    ),
    "augmentation": (
        "augmentation.py throughput $shared/models/whisper-tiny.en $shared/data/speech/an4/manifest.jsonl "
        "-o $scratch/augmentation --rounds 1",
        "augmentation.py wer $shared/models/whisper-tiny.en $shared/data/speech/an4/manifest.jsonl "
        "-o $scratch/augmentation --seeds 1 --steps 20 --test-clips 20",
    ),
    "lora": (
        "lora.py $shared/models/whisper-tiny.en --train $shared/data/speech/an4/manifest.jsonl "
        "--valid $shared/data/speech/an4/manifest.jsonl --work $scratch/lora --steps 10 --valid-utterances 20",
    ),
    "resilience": (
        "resilience.py kills -o $scratch/kills --trials 5",
        "resilience.py broken -o $scratch/broken --files 200",
    ),
    "fuzzing": ("fuzzing.py -o $scratch/fuzzing --cases 100",),
    "elastic": ("elastic.py ranks -o $scratch/ranks", "elastic.py cuts -o $scratch/cuts"),
    "models": ("models.py",),
    "decoder_shift": ("decoder_shift.py --clips 64",),
    "decoding": ("decoding.py",),
    "identity": ("identity.py --most 60",),
    "whisper_windows": ("whisper_windows.py",),
    "serving": ("serving.py --seconds 30",),
    "long_audio": ("long_audio.py --minutes 10",),
}
SHARED = {"decoding", "identity", "whisper_windows", "serving", "long_audio"}  # whose defaults are below CANTER_SHARED


def main(names: list[str]) -> int:
    """Return the exit status: 1 where a benchmark failed, 2 for an unknown name."""
    if names == ["--list"]:
        for name, lines in RUNS.items():
            print("\n".join(f"{name}: {line}" for line in lines))
        return 0
    if unknown := [name for name in names if name not in RUNS]:
        print(f"no benchmark named {unknown[0]!r}; there are {', '.join(RUNS)}", file=sys.stderr)
        return 2
    failed = [name for name in names or RUNS if not run(name)]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


def run(name: str) -> bool:
    """Run a benchmark, or skip it without its data, and return False where it failed."""
    print(f"== {name}", flush=True)
    shared = os.environ.get("CANTER_SHARED")
    if not shared and (name in SHARED or any("$shared" in line for line in RUNS[name])):
        print("passed over: it takes real lengths or speech from the folder that CANTER_SHARED names; "
              f"or give your own: python benchmarks/{name}.py --help", flush=True)  # fmt: skip
        return True
    with tempfile.TemporaryDirectory() as scratch:
        for line in RUNS[name]:
            words = [w.replace("$shared", shared or "").replace("$scratch", scratch) for w in shlex.split(line)]
            if subprocess.run([sys.executable, HERE / words[0], *words[1:]]).returncode:
                return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
