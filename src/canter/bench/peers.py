"""Run a model's weights in transformers and CTranslate2, to measure Canter beside them.

Each is used only where it is installed, and nothing is downloaded: both read a folder that is written here.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from canter.bench.speed import Clip, Details, System
from canter.errors import ConfigError
from canter.extras import install
from canter.loading import save_module
from canter.models.features import WhisperFeatureConfig
from canter.models.model import SpeechModel

PACKAGES = {"transformers": install("transformers"), "ctranslate2": "pip install ctranslate2", "canter": ""}
TYPES = {
    "transformers": ("float32", "bfloat16", "float16"),
    "canter": ("float32", "bfloat16", "int8"),
    "ctranslate2": ("float32", "bfloat16", "float16", "int8", "int8_float16", "int8_bfloat16"),
}


def parse_peer(spec: str, default: str) -> tuple[str, str]:
    """Return package and type of a peer: ``ctranslate2:int8``, or ``ctranslate2`` with the type ``default``.

    Raises ConfigError for an unknown or missing package, and for a type that it does not have.
    """
    package, _, kind = spec.partition(":")
    if package not in PACKAGES:
        raise ConfigError(f"--against {spec}: there are {', '.join(PACKAGES)}, as in ctranslate2:int8")
    if not kind and package == "transformers" and default == "int8":
        default = "float32"
    if (kind or default) not in TYPES[package]:
        raise ConfigError(f"--against {spec}: {package} has {', '.join(TYPES[package])}")
    if not find_spec(package):
        raise ConfigError(f"--against {spec}: it is not installed; {PACKAGES[package]}")
    return package, kind or default


def load_peer(model: SpeechModel, package: str, kind: str, batch: int, work: Path) -> System:
    """Return ``model``'s weights in another package, on the same device.

    kind: type to compute in. batch: clips decoded together. work: folder for the files that the package reads.
    Raises CheckpointError where the package does not have the architecture.
    """
    folder = work / "huggingface"
    if not folder.exists():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # clips bring their prompts, and no text is encoded
            save_module(model, folder, form="huggingface")
    if package == "transformers":
        return TransformersPeer(model, folder, kind, batch)
    return CTranslate2Peer(model, folder, kind, batch)


class TransformersPeer:
    """transformers' ``generate``, greedy, with scaled-dot-product attention."""

    def __init__(self, model: SpeechModel, folder: Path, kind: str, batch: int):
        import transformers

        from canter.integrations.transformers import TransformersModel

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.model = TransformersModel.from_pretrained(folder, prompt=[0], dtype=getattr(torch, kind))
        self.model.model.to(next(model.parameters()).device)
        self.model.extractor.max_audio_clip_s = math.inf  # Cohere's would split longer clips into several
        self.batch = batch

    def __call__(self, clips: Sequence[Clip]) -> list[list[int]]:
        longest = self.model.padded_seconds or max(clip.seconds for clip in clips)
        return self.model.transcribe(
            [clip.audio for clip in clips],
            [clip.prompt for clip in clips],
            batch_seconds=self.batch * longest + 1e-3,
            limits=[self.model.positions - len(clip.prompt) for clip in clips],
        )

    def details(self) -> Details:
        return {}


class CTranslate2Peer:
    """CTranslate2's Whisper, greedy, on Canter's features padded to 30 s, clips sorted by length."""

    def __init__(self, model: SpeechModel, folder: Path, kind: str, batch: int):
        import ctranslate2  # pyright: ignore[reportMissingImports]  # only for this comparison

        if not isinstance(model.config.features, WhisperFeatureConfig):
            raise ConfigError("--against ctranslate2: it has Whisper's architecture, and no Canary's")
        converted = folder.with_name("ctranslate2")
        if not converted.exists():
            ctranslate2.converters.TransformersConverter(str(folder)).convert(str(converted))
        self.device = next(model.parameters()).device
        self.views = ctranslate2.StorageView
        self.model = ctranslate2.models.Whisper(
            str(converted),
            device=self.device.type,
            device_index=self.device.index or 0,
            compute_type=kind,
            inter_threads=1,
            intra_threads=torch.get_num_threads(),
        )
        self.features = WhisperFeatureConfig(mels=model.config.features.mels).build().to(self.device)
        self.batch = batch
        self.positions = model.config.decoder.positions

    @torch.inference_mode()
    def __call__(self, clips: Sequence[Clip]) -> list[list[int]]:
        order = sorted(range(len(clips)), key=lambda place: -clips[place].seconds)
        found: list[list[int]] = [[] for _ in clips]
        for start in range(0, len(order), self.batch):
            places = order[start : start + self.batch]
            lengths = torch.tensor([len(clips[place].audio) for place in places])
            audio = torch.zeros(len(places), int(lengths.max()))
            for row, place in zip(audio, places):
                row[: len(clips[place].audio)] = torch.from_numpy(clips[place].audio)
            features, _ = self.features(audio.to(self.device), lengths.to(self.device))
            results = self.model.generate(
                self.views.from_array(features.transpose(1, 2).contiguous().cpu().numpy()),
                [list(clips[place].prompt) for place in places],
                beam_size=1,
                max_length=self.positions,
            )
            for place, result in zip(places, results):
                found[place] = list(result.sequences_ids[0])
        return found

    def details(self) -> Details:
        return {}
