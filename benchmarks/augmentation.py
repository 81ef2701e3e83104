"""Measure what noise in training does for WER on noisy speech, and what augmentation costs in a data worker.

    python benchmarks/augmentation.py wer MODEL SPEECH -o FOLDER [--seeds 3] [--steps 200] [--json FILE]
    python benchmarks/augmentation.py throughput MODEL SPEECH -o FOLDER [--json FILE]

SPEECH is a manifest whose rows have a ``speaker`` and a ``split``, such as AN4's. `wer` fine-tunes a Whisper on the
split 'train' at the clips' own lengths, with and without noise, and transcribes the split 'test', clean and in noise:

babble      six other speakers of the same split at once
coloured    noise with a power of 1/f^a, a drawn from 0 (white) to 2 (brown)

The noise of a test clip is drawn once, and is the same at every SNR, for every arm and seed. Training has noise of its
own: babble of the training speakers, who do not speak in the test set, and other coloured noise. Every run keeps its
scores in FOLDER/runs/ARM-SEED/scores.json; the same command continues where it stopped.

`throughput` decodes the training clips in one process and applies each effect to all of them, in turns. Rates are per
second of CPU time.
"""

import json
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import soundfile
import tyro
from rich.console import Console
from rich.table import Table

import canter
from canter.corpus.audio import load_audio, load_utterance
from canter.corpus.manifest import write_manifest
from canter.corpus.sources import open_source
from canter.corpus.utterance import Utterance
from canter.errors import ConfigError, ManifestError
from canter.evaluation.wer import score_texts
from canter.reporting.machine import describe_machine
from canter.training.config import AugmentConfig, TrainConfig
from canter.training.feed.augment import Augmentation, find_augment_files
from canter.training.feed.waveform import mean_power, mix_noise

RATE = 16000
SPEAKERS = 6  # who speak at once in babble
NOISE_SECONDS, BABBLE_FILES, COLOURED_FILES = 20.0, 12, 6  # of the training noise
KINDS = ("babble", "coloured")
ARMS = ("clean", "noise")
Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    part: tyro.conf.Positional[Literal["wer", "throughput"]]
    model: tyro.conf.Positional[Path]
    """Whisper to fine-tune."""
    speech: tyro.conf.Positional[Path]
    """Manifest of speech with speakers and the splits 'train' and 'test'."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder for noise, noisy speech and runs."""
    arms: tuple[str, ...] = ARMS
    seeds: int = 3
    first_seed: int = 0
    steps: int = 200
    batch_seconds: float = 32.0
    """Maximum audio of a step, padding included."""
    train_snr: tuple[float, float] = (0.0, 20.0)
    """Range of the SNR in training, in dB."""
    probability: float = 0.5
    """Probability that an utterance gets noise in training."""
    snrs: tuple[float, ...] = (20.0, 10.0, 5.0, 0.0)
    """SNRs of the noisy test sets, in dB."""
    test_clips: int | None = None
    """Number of test clips, evenly spaced (default: all)."""
    threads: int = 1
    rounds: int = 3
    """Passes of `throughput` over the clips, for each effect."""
    json: Path | None = None
    """File for the figures."""


# -- noise --


def rows_of(manifest: Path, split: str) -> list[Row]:
    """Return the rows of a split, with absolute paths. Raise ManifestError where there are none with speakers."""
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    found = [
        row | {"audio_filepath": str((manifest.parent / row["audio_filepath"]).resolve())}
        for row in rows
        if row.get("split") == split and row.get("speaker")
    ]
    if len({row["speaker"] for row in found}) <= SPEAKERS:
        raise ManifestError(f"{manifest}: the split '{split}' needs more than {SPEAKERS} speakers; name another one")
    return found


def babble(rows: Sequence[Row], samples: int, draw: np.random.Generator, without: str = "") -> np.ndarray:
    """Return (S,) of `SPEAKERS` drawn speakers at once, equally loud; ``without``: a speaker that is not among them."""
    speakers = sorted({row["speaker"] for row in rows} - {without})
    total = np.zeros(samples)
    for speaker in draw.choice(speakers, SPEAKERS, replace=False):
        theirs = [row for row in rows if row["speaker"] == speaker]
        clips = [load_audio(theirs[n]["audio_filepath"], sample_rate=RATE) for n in draw.permutation(len(theirs))]
        voice = np.concatenate(clips).astype(np.float64)
        voice = np.resize(np.roll(voice, -int(draw.integers(len(voice)))), samples)
        total += voice / np.sqrt(mean_power(voice) or 1.0)
    return total


def coloured(samples: int, exponent: float, draw: np.random.Generator) -> np.ndarray:
    """Return (S,) of Gaussian noise whose power falls with 1/f^exponent above 20 Hz."""
    spectrum = np.fft.rfft(draw.standard_normal(samples))
    hertz = np.maximum(np.fft.rfftfreq(samples, 1 / RATE), 20.0)
    return np.fft.irfft(spectrum * hertz ** (-exponent / 2), samples)


def write(path: Path, audio: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, audio, RATE, subtype="PCM_16")


def at_level(audio: np.ndarray, peak: float = 0.5) -> np.ndarray:
    return audio * (peak / np.abs(audio).max())


def write_noise(folder: Path, rows: Sequence[Row]) -> Path:
    """Write the training noise to ``folder`` once, and return it."""
    if not (folder / ".complete").exists():
        samples, draw = round(NOISE_SECONDS * RATE), np.random.default_rng(1)
        for number in range(BABBLE_FILES):
            write(folder / f"babble-{number}.flac", at_level(babble(rows, samples, draw)))
        for number, exponent in enumerate(np.linspace(0, 2, COLOURED_FILES)):
            write(folder / f"coloured-{number}.flac", at_level(coloured(samples, float(exponent), draw)))
        (folder / ".complete").touch()
    return folder


def write_tests(options: Options, rows: Sequence[Row]) -> dict[str, Path]:
    """Write the clean and noisy test sets once; return the manifest of each condition."""
    chosen = list(rows)
    if options.test_clips is not None:
        places = np.linspace(0, len(rows) - 1, min(options.test_clips, len(rows)), dtype=int)
        chosen = [rows[place] for place in sorted(set(places.tolist()))]
    conditions = [(f"{kind} {snr:g} dB", kind, snr) for kind in KINDS for snr in options.snrs]
    folder = options.output / f"test-{len(chosen)}"
    manifests = {"clean": folder / "clean.jsonl"} | {
        name: folder / f"{kind}-{snr:g}.jsonl" for name, kind, snr in conditions
    }
    if all(path.exists() for path in manifests.values()):
        return manifests
    noisy: dict[str, list[Row]] = {name: [] for name, _, _ in conditions}
    for number, row in enumerate(chosen):
        speech = load_audio(row["audio_filepath"], sample_rate=RATE)
        draw = np.random.default_rng([2, number])
        noises = {
            "babble": babble(rows, len(speech), draw, without=row["speaker"]),
            "coloured": coloured(len(speech), draw.uniform(0, 2), draw),
        }
        for name, kind, snr in conditions:
            path = folder / f"{kind}-{snr:g}" / f"{Path(row['audio_filepath']).stem}.flac"
            write(path, mix_noise(speech, noises[kind].astype(np.float32), snr))
            noisy[name].append(row | {"audio_filepath": str(path)})
    for name, path in manifests.items():
        write_manifest(path, noisy.get(name, chosen))
    return manifests


# -- word error rates --


def transcribed(model: Path, manifests: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Return WER, errors and words of each condition."""
    recognizer = canter.load(model)
    scores = {}
    for name, manifest in manifests.items():
        rows = [row for row in open_source(manifest) if isinstance(row, Utterance)]
        texts = [one.text for one in recognizer.transcribe([row.audio_filepath for row in rows], vad="none")]
        total = score_texts([row.text for row in rows], texts, ["en"] * len(rows)).total
        scores[name] = {"wer": total.wer, "errors": total.errors, "words": total.words}
    return scores


def settings(options: Options, arm: str, seed: int, train: Path, noise: Path) -> TrainConfig:
    """Return the run of an arm. Raise ConfigError for an unknown one."""
    if arm not in ARMS:
        raise ConfigError(f"--arms {arm}: known arms are {', '.join(ARMS)}")
    augment = AugmentConfig()
    if arm == "noise":
        augment = AugmentConfig(
            noise=(noise,), noise_probability=options.probability, noise_snr=tuple(sorted(options.train_snr))
        )
    budget = options.output / "budget.json"
    return TrainConfig(
        manifest=(train,),
        output=options.output / "runs" / f"{arm}-{seed}",
        init=options.model,
        pad_seconds=0.0,
        budget=budget if budget.exists() else None,
        steps=options.steps,
        batch_seconds=options.batch_seconds,
        seed=seed,
        threads=options.threads,
        valid_every=max(1, options.steps),
        track=(),
        augment=augment,
    )


def measure_wer(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    rows = rows_of(options.speech, "train")
    train = options.output / "train.jsonl"
    train.parent.mkdir(parents=True, exist_ok=True)
    write_manifest(train, rows)
    noise = write_noise(options.output / "noise", rows)
    tests = write_tests(options, rows_of(options.speech, "test"))
    runs: list[dict[str, Any]] = []
    before = options.output / "before.json"
    runs.append(kept(before, lambda: {"arm": "before", "seed": None, "scores": transcribed(options.model, tests)}))
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for arm in options.arms:
            config = settings(options, arm, seed, train, noise)

            def one(config: TrainConfig = config, arm: str = arm, seed: int = seed) -> dict[str, Any]:
                canter.train(config, progress=False)
                return {"arm": arm, "seed": seed, "scores": transcribed(config.output, tests)}

            runs.append(kept(config.output / "scores.json", one))
            if not (options.output / "budget.json").exists():  # all further runs have the batches of the first
                shutil.copy(config.output / "budget.json", options.output / "budget.json")
            noisy = [score["wer"] for name, score in runs[-1]["scores"].items() if name != "clean"]
            say(f"{arm}, seed {seed}: clean {runs[-1]['scores']['clean']['wer']:.1%}, noisy {np.mean(noisy):.1%}")
    return {"conditions": list(tests), "runs": runs}


def kept(path: Path, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the content of a JSON file, which ``work`` makes if it is missing."""
    if not path.exists():
        done = work()
        path.write_text(json.dumps(done, indent=2) + "\n", encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def table_of(found: dict[str, Any]) -> Table:
    arms = list(dict.fromkeys(run["arm"] for run in found["runs"]))
    table = Table("WER", *(arm if arm == "before" else f"fine-tuned, {arm}" for arm in arms))
    for condition in found["conditions"]:
        cells = []
        for arm in arms:
            rates = [run["scores"][condition]["wer"] for run in found["runs"] if run["arm"] == arm]
            spread = f" ({', '.join(f'{rate:.1%}' for rate in rates)})" if len(rates) > 1 else ""
            cells.append(f"{statistics.mean(rates):.1%}{spread}")
        table.add_row(condition, *cells)
    return table


# -- throughput --


def write_rooms(folder: Path) -> Path:
    """Write impulse responses of half a second with exponential decay."""
    for number in range(4):
        draw = np.random.default_rng([3, number])
        response = 0.2 * draw.standard_normal(RATE // 2) * np.exp(-np.arange(RATE // 2) / (800 * (number + 1)))
        response[40] = 1.0
        write(folder / f"{number}.wav", np.clip(response, -1, 1))
    return folder


def measure_throughput(options: Options) -> dict[str, Any]:
    """Return utterances per second of CPU time: plain decoding, and with each effect on every utterance."""
    rows = rows_of(options.speech, "train")
    train = options.output / "train.jsonl"
    train.parent.mkdir(parents=True, exist_ok=True)
    write_manifest(train, rows)
    noise, rooms = write_noise(options.output / "noise", rows), write_rooms(options.output / "rir")
    always: dict[str, dict[str, Any]] = {
        "rir": {"rir": (rooms,), "rir_probability": 1.0},
        "noise": {"noise": (noise,), "noise_probability": 1.0},
        "gain": {"gain": (-20.0, 6.0), "gain_probability": 1.0},
        "clipping": {"clipping": (0.2, 0.9), "clipping_probability": 1.0},
        "low_pass": {"low_pass": (2500.0, 7000.0), "low_pass_probability": 1.0},
        "telephone, mulaw": {"telephone": ("mulaw",), "telephone_probability": 1.0},
        "telephone, gsm": {"telephone": ("gsm",), "telephone_probability": 1.0},
    }
    every = {name: value for one in always.values() for name, value in one.items()} | {"telephone": ("mulaw", "alaw")}
    defaults = {name: value for name, value in every.items() if not name.endswith("_probability")}
    arms: dict[str, Augmentation | None] = {"decoding": None}
    for name, values in (always | {"everything, always": every, "everything, by default": defaults}).items():
        config = TrainConfig(augment=AugmentConfig(**values))
        folder = options.output / "lists" / name.replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        arms[name] = Augmentation(config.augment, find_augment_files(config, folder)[0], 0, RATE)
    utterances = [row for row in open_source(train) if isinstance(row, Utterance)]
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(options.rounds + 1):  # the first round warms the disk's cache
        for name, augmentation in arms.items():
            began = time.process_time()
            for row, utterance in enumerate(utterances):
                audio = load_utterance(utterance, RATE)
                if augmentation is not None:
                    audio, failed = augmentation.apply(audio, number, row)
                    assert not failed
            if number:
                seconds[name].append(time.process_time() - began)
    total = sum(utterance.duration for utterance in utterances)
    return {
        "utterances": len(utterances),
        "mean_seconds": total / len(utterances),
        "arms": {
            name: {
                "utterances_per_second": len(utterances) / statistics.median(taken),
                "audio_seconds_per_second": total / statistics.median(taken),
                "seconds": taken,
            }
            for name, taken in seconds.items()
        },
    }


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    console = Console()
    if options.part == "wer":
        found = measure_wer(options, console.print)
        console.print(table_of(found))
    else:
        found = measure_throughput(options)
        table = Table("effect", "utterances per second", "audio per second")
        for name, arm in found["arms"].items():
            table.add_row(name, f"{arm['utterances_per_second']:.0f}", f"{arm['audio_seconds_per_second']:.0f} s")
        console.print(table)
    if options.json is not None:
        given = {name: value.name if isinstance(value, Path) else value for name, value in asdict(options).items()}
        text = json.dumps({"machine": describe_machine(), "options": given, **found}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
