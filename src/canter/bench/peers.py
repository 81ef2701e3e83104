"""Run a model's weights in transformers, CTranslate2 and ESPnet, to measure Canter beside them.

Each is used only where it is installed, and nothing is downloaded: all read a folder that is written here.
"""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
import yaml

from canter.bench.speed import Clip, Details, System
from canter.errors import ConfigError
from canter.extras import install
from canter.inference.engine.requests import EngineConfig
from canter.loading import save_module
from canter.models.features import WhisperFeatureConfig
from canter.models.formats.espnet import CONFIG_FILE, META, MODEL_FILE, write_espnet
from canter.models.model import SpeechModel

PACKAGES = {
    "transformers": install("transformers"),
    "ctranslate2": "pip install ctranslate2",
    "espnet": "docs/evaluation.md says how, in an environment of its own",
    "canter": "",
}
MODULES = {"espnet": "espnet2"}  # where the package has another name
TYPES = {
    "transformers": ("float32", "bfloat16", "float16"),
    "canter": ("float32", "bfloat16", "int8"),
    "ctranslate2": ("float32", "bfloat16", "float16", "int8", "int8_float16", "int8_bfloat16"),
    "espnet": ("float32", "bfloat16", "float16"),
}


def parse_peer(spec: str, default: str) -> tuple[str, str]:
    """Return package and type of a peer: ``ctranslate2:int8``, or ``ctranslate2`` with the type ``default``.

    Raises ConfigError for an unknown or missing package, and for a type that it does not have.
    """
    package, _, kind = spec.partition(":")
    if package not in PACKAGES:
        raise ConfigError(f"--against {spec}: there are {', '.join(PACKAGES)}, as in ctranslate2:int8")
    if not kind and package in ("transformers", "espnet") and default == "int8":
        default = "float32"
    if (kind or default) not in TYPES[package]:
        raise ConfigError(f"--against {spec}: {package} has {', '.join(TYPES[package])}")
    if not find_spec(MODULES.get(package, package)):
        raise ConfigError(f"--against {spec}: it is not installed; {PACKAGES[package]}")
    return package, kind or default


def load_peer(
    model: SpeechModel, package: str, kind: str, batch: int, work: Path, search: EngineConfig | None = None
) -> System:
    """Return ``model``'s weights in another package, on the same device.

    kind: type to compute in. batch: clips decoded together, but ESPnet decodes one. work: folder for the files that the
    package reads. search: beam size, CTC weight and limits, which only ESPnet follows (None: greedy). Raises
    CheckpointError where the package does not have the architecture.
    """
    if package == "espnet":
        return EspnetPeer(model, work / "espnet", kind, search or EngineConfig())
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


class EspnetPeer:
    """ESPnet's ``Speech2Text`` for OWSM, one clip at a time, which is all that it takes."""

    def __init__(self, model: SpeechModel, folder: Path, kind: str, search: EngineConfig):
        if not folder.exists():
            write_espnet(model, folder)
        import espnet2.bin.s2t_inference as espnet  # pyright: ignore[reportMissingImports]  # only for this comparison

        logging.getLogger("espnet").setLevel(logging.ERROR)  # it warns of each text that ends at the limit
        meta = yaml.safe_load((folder / META).read_text(encoding="utf-8"))
        with contextlib.chdir(folder):  # paths in the configuration are relative to it
            self.model = espnet.Speech2Text(
                meta["yaml_files"][CONFIG_FILE],
                meta["files"][MODEL_FILE],
                device=str(next(model.parameters()).device),
                dtype=kind,
                beam_size=search.beams,
                ctc_weight=search.ctc_weight,
                penalty=search.length_penalty or 0.0,
            )
        self.model.tokenizer = None  # text is not timed
        limit = search.most_tokens(model.encoder_frames(model.padded_seconds), model.generation)
        self.positions, self.limit, self.tokenizer = model.positions, limit, model.tokenizer

    @torch.inference_mode()
    def __call__(self, clips: Sequence[Clip]) -> list[list[int]]:
        return [self._decode(clip) for clip in clips]

    def _decode(self, clip: Clip) -> list[int]:
        """Return the tokens after the prompt, at most as many as Canter's engine decodes."""
        language, task = (self.tokenizer.tokens[number] for number in clip.prompt[1:3])
        self.model.maxlenratio = -min(self.limit, self.positions - len(clip.prompt))
        timed = self.tokenizer.ids["<notimestamps>"] not in clip.prompt
        ((_, _, _, _, best),) = self.model(clip.audio, lang_sym=language, task_sym=task, predict_time=timed)
        tokens = best.yseq[len(clip.prompt) :].tolist()
        return tokens[: tokens.index(self.tokenizer.end)]

    def details(self) -> Details:
        return {}
