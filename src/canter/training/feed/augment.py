"""Waveform augmentation in the data workers: the effects that an utterance gets in an epoch, and their files.

Every effect has a generator of its own, made from (seed, epoch, row), so that switching one on does not change what is
drawn for the others, and no draw depends on rank, worker or batch. The noise and impulse responses of a run are checked
once, before its first step; the run folder keeps the list, from which a resumed run draws the same ones.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Never, TypeVar

import numpy as np

from canter.corpus.audio import audio_blocks, load_audio
from canter.corpus.manifest import no_usable_row
from canter.corpus.remote import is_url, stamp
from canter.corpus.sources import read_unit, units_of
from canter.corpus.utterance import Problem, Utterance
from canter.errors import AudioError, CheckpointError, ManifestError
from canter.events import QUIET, Events
from canter.files import write_text
from canter.planning.windows import mix
from canter.training.config import AugmentConfig, TrainConfig
from canter.training.feed.waveform import change_gain, clip_peaks, low_pass, mix_noise, reverberate, telephone

FILES = "augment.json"  # in the run folder: the usable noise and impulse responses
SALT = 0xA0613E  # keeps these draws apart from those of speeds and masks
EFFECTS = ("rir", "noise", "gain", "clipping", "low_pass", "telephone")
"""Effects in the order in which they are applied: room, noise at the microphone, amplifier, channel."""
LEAST_SECONDS = {"noise": 0.1, "rir": 0.001}
LONGEST_RESPONSE = 10.0  # seconds of an impulse response that are used
CHECK_RATE = 16000
T = TypeVar("T")


@dataclass(frozen=True)
class AugmentFile:
    """A checked recording of noise, or an impulse response."""

    path: str
    offset: float
    """Start in the file, in seconds."""
    seconds: float
    channel: int | None
    """Channel to read, from 0; None averages all."""
    stamp: str
    """Size and time of modification when it was checked; empty for a URL."""


@dataclass(frozen=True)
class AugmentFiles:
    """Usable noise and room impulse responses of a run."""

    noise: tuple[AugmentFile, ...] = ()
    rir: tuple[AugmentFile, ...] = ()


@dataclass(frozen=True)
class Augmentation:
    """Waveform augmentation of a run."""

    config: AugmentConfig
    files: AugmentFiles
    seed: int
    sample_rate: int

    def apply(self, audio: np.ndarray, epoch: int, row: int) -> tuple[np.ndarray, list[tuple[str, AudioError]]]:
        """Return audio (S,) with the effects that are drawn for a row in an epoch.

        Also returns the files that could not be read, with the reason; their effects are left out.
        """
        failed: list[tuple[str, AudioError]] = []
        for effect in EFFECTS:
            draw = self._drawn(effect, epoch, row)
            if draw is None:
                continue
            if effect in ("rir", "noise"):
                file = _one_of(getattr(self.files, effect), draw)
                try:
                    audio = (self._reverberated if effect == "rir" else self._noisy)(audio, file, draw)
                except AudioError as error:
                    failed.append((file.path, error))
            elif effect == "gain":
                audio = change_gain(audio, _uniform(self.config.gain, draw))
            elif effect == "clipping":
                audio = clip_peaks(audio, _uniform(self.config.clipping, draw))
            elif effect == "low_pass":
                audio = low_pass(audio, self.sample_rate, _uniform(self.config.low_pass, draw))
            else:
                audio = telephone(audio, self.sample_rate, _one_of(self.config.telephone, draw))
        return audio, failed

    def _drawn(self, effect: str, epoch: int, row: int) -> np.random.Generator | None:
        """Return the generator of an effect, or None for an utterance that does not get it."""
        if not getattr(self.config, effect):
            return None
        draw = np.random.default_rng(mix(self.seed, epoch, row, SALT, EFFECTS.index(effect)))
        return draw if draw.random() < getattr(self.config, f"{effect}_probability") else None

    def _reverberated(self, audio: np.ndarray, file: AugmentFile, _: np.random.Generator) -> np.ndarray:
        return reverberate(audio, self._read(file, 0.0, min(file.seconds, LONGEST_RESPONSE)))

    def _noisy(self, audio: np.ndarray, file: AugmentFile, draw: np.random.Generator) -> np.ndarray:
        """Return the audio with a random part of a recording, which is looped if it is shorter."""
        snr, place = _uniform(self.config.noise_snr, draw), draw.random()
        wanted = len(audio) / self.sample_rate
        if file.seconds > wanted:
            noise = self._read(file, place * (file.seconds - wanted), wanted)
        else:
            noise = self._read(file, 0.0, file.seconds)
            noise = np.roll(noise, -int(place * len(noise)))
        return mix_noise(audio, np.resize(noise, len(audio)), snr)

    def _read(self, file: AugmentFile, start: float, seconds: float) -> np.ndarray:
        return load_audio(
            file.path, offset=file.offset + start, duration=seconds, sample_rate=self.sample_rate, channel=file.channel
        )


def _uniform(limits: Sequence[float], draw: np.random.Generator) -> float:
    return float(draw.uniform(limits[0], limits[-1]))


def _one_of(items: Sequence[T], draw: np.random.Generator) -> T:
    return items[int(draw.integers(len(items)))]


def describe_augmentation(config: AugmentConfig, files: AugmentFiles) -> str:
    """Return a line with the augmentation that is on; empty if there is none."""

    def limits(values: Sequence[float], unit: str) -> str:
        return f"{' to '.join(f'{value:g}' for value in dict.fromkeys(values))}{unit}"

    masks = f"{config.frequency_masks} frequency and {config.time_masks} time masks"
    parts = [f"speeds {', '.join(f'{speed:g}' for speed in config.speed)}"] if config.speed else []
    details = {
        "rir": f"{len(files.rir)} room impulse responses",
        "noise": f"{len(files.noise)} noise files at an SNR of {limits(config.noise_snr, ' dB')}",
        "gain": f"gain {limits(config.gain, ' dB')}",
        "clipping": f"clipping at {limits(config.clipping, ' of the peak')}",
        "low_pass": f"low-pass at {limits(config.low_pass, ' Hz')}",
        "telephone": f"telephone ({', '.join(config.telephone)})",
    }
    for effect in EFFECTS:
        if getattr(config, effect):
            parts.append(f"{details[effect]}, probability {getattr(config, f'{effect}_probability'):g}")
    parts += [masks] if config.frequency_masks or config.time_masks else []
    return f"augmentation: {'; '.join(parts)}" if parts else ""


# -- the files of a run --


def find_augment_files(
    config: TrainConfig, folder: Path, events: Events[Never] = QUIET, writes: bool = True
) -> tuple[AugmentFiles, list[Problem]]:
    """Return the usable noise and impulse responses of --augment.noise and --augment.rir.

    They are decoded and checked once, and kept in ``folder``. Also returns the rows that were found to be unusable.
    Raises ManifestError where a manifest cannot be read or has no usable row, and CheckpointError for a damaged list.
    """
    given = {"noise": config.augment.noise, "rir": config.augment.rir}
    kept = folder / FILES
    if not any(given.values()):
        return AugmentFiles(), []
    if kept.exists():
        files = _read_files(kept)
        if writes:
            _report_changes(files, events)
        return files, []
    found: dict[str, tuple[AugmentFile, ...]] = {}
    problems: list[Problem] = []
    for kind, manifests in given.items():
        found[kind], unusable = _check_manifests(kind, manifests, events)
        problems += unusable
    files = AugmentFiles(**found)
    if writes:
        write_text(kept, json.dumps({kind: [astuple(one) for one in getattr(files, kind)] for kind in given}) + "\n")
    return files, problems


def _check_manifests(
    kind: str, manifests: Sequence[Path], events: Events[Never]
) -> tuple[tuple[AugmentFile, ...], list[Problem]]:
    rows: list[tuple[str, int, Utterance]] = []
    problems: list[Problem] = []
    usable: list[AugmentFile] = []
    for manifest in manifests:
        for unit in units_of(str(manifest)):
            for line, row in read_unit(unit, require_text=False, measure_durations=True):
                if isinstance(row, Problem):
                    problems.append(row)
                else:
                    rows.append((unit.path, line, row))
    for path, line, row in events.progress(rows, "noise" if kind == "noise" else "impulse responses"):
        checked = check_file(row, kind)
        if isinstance(checked, AugmentFile):
            usable.append(checked)
        else:
            problems.append(Problem(path, line, checked))
    if manifests and not usable:
        raise no_usable_row(f"--augment.{kind}", problems)
    return tuple(usable), problems


def check_file(row: Utterance, kind: str) -> AugmentFile | str:
    """Decode a row of noise or an impulse response (``kind``: noise or rir); return it, or why it cannot be used."""
    samples, sound = 0, False
    try:
        for block in audio_blocks(row, CHECK_RATE):
            samples += len(block)
            sound = sound or bool(block.any())
        held = row.audio_filepath if os.path.exists(row.audio_filepath) else row.audio_filepath.partition("::")[0]
        mark = "" if is_url(held) else stamp(held)
    except (AudioError, ManifestError, OSError) as error:
        return str(error)
    seconds, least = samples / CHECK_RATE, LEAST_SECONDS[kind]
    if not sound:
        return f"{row.audio_filepath} is silent: every sample is 0; leave it out of --augment.{kind}"
    if seconds < least:
        return f"{row.audio_filepath} has {seconds:.4f} s, and needs {least:g} s; leave it out of --augment.{kind}"
    # the average of several microphones would be the response of none of them
    channel = 0 if kind == "rir" and row.channel_selector is None else row.channel_selector
    return AugmentFile(row.audio_filepath, row.offset or 0.0, seconds, channel, mark)


def _read_files(path: Path) -> AugmentFiles:
    kinds = {"path": str, "offset": float, "seconds": float, "channel": (int, type(None)), "stamp": str}
    names = [field.name for field in fields(AugmentFile)]
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = {kind: tuple(AugmentFile(*values) for values in content[kind]) for kind in ("noise", "rir")}
        for one in (*found["noise"], *found["rir"]):
            if not all(isinstance(getattr(one, name), kinds[name]) for name in names) or not math.isfinite(one.seconds):
                raise ValueError(f"{one}")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path} is damaged ({reason}); remove it, and add --allow-changes: the noise is then checked again"
        ) from None
    return AugmentFiles(**found)


def _report_changes(files: AugmentFiles, events: Events[Never]) -> None:
    """Name noise that is missing or has changed since the run began."""
    changed: list[str] = []
    for path, mark in {(one.path, one.stamp) for one in (*files.noise, *files.rir) if one.stamp}:
        held = path if os.path.exists(path) else path.partition("::")[0]
        try:
            changed += [] if stamp(held) == mark else [f"{path} has changed"]
        except OSError:
            changed.append(f"{path} is missing")
    if changed:
        events.message(
            f"{len(changed)} noise files or impulse responses are not those with which the run began, and its steps "
            f"will differ: {min(changed)}; restore them"
        )
