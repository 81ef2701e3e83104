"""The model card of a checkpoint: a README.md with the front matter of the Hugging Face hub.

It names data by file names and hub names only, never by folders of this machine, and holds no secrets of URLs. The
format is that of https://huggingface.co/docs/hub/model-cards.
"""

# pyright: strict

from __future__ import annotations

import dataclasses
import platform
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

import torch
import yaml

from canter.corpus.remote import is_url
from canter.evaluation.wer import percent
from canter.fields import FileOnly, to_mapping
from canter.models.hub import is_hub_name
from canter.redaction import redacted
from canter.text.languages import canonical, english_name
from canter.training.config import TrainConfig
from canter.training.run.checkpoints import Scores

LICENCE_HINT = "not stated; 'canter train --license NAME', such as apache-2.0, writes it here"
TAGS = ("automatic-speech-recognition", "speech", "canter")
PRIVATE = ("upload", "allow_changes")
"""Settings that the command leaves out."""


@dataclass(frozen=True)
class TrainedOn:
    """Training data of a checkpoint, up to its step."""

    steps: int
    audio_seconds: float
    """Seconds of audio of all its steps; every pass over the data counts."""
    data_seconds: float
    """Seconds of audio of the training data."""
    utterances: int
    """Utterances of the training data."""
    languages: Sequence[str] = ()
    parameters: int = 0


def model_card(config: TrainConfig, trained: TrainedOn, metrics: Scores | None) -> str:
    """Return the model card of a checkpoint as Markdown.

    metrics: of the validation of this checkpoint ("wer", "cer" as fractions, "utterances", and "bleu"); None without
    one.
    """
    name = bare_name(config.output)
    languages = sorted({canonical(one) or one for one in trained.languages})
    values: dict[str, object] = {
        "license": config.license or "other",
        "library_name": "canter",
        "pipeline_tag": "automatic-speech-recognition",
        "tags": [*TAGS],
    }
    if languages:
        values["language"] = languages
    if is_hub_name(config.init):
        values["base_model"] = str(config.init).partition("@")[0]
    if metrics is not None:
        values |= {"metrics": ["wer", "cer"], "model-index": [_index(name, config, metrics)]}
    front = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000)
    if config.license is None:
        front = front.replace("license: other\n", f"license: other  # {LICENCE_HINT}\n", 1)
    sections = [
        f"---\n{front}---\n\n# {name}",
        _summary(config, trained, languages),
        "## Use\n\n```python\nimport canter\n\n"
        'model = canter.load("MODEL")  # this folder, or its name on the Hugging Face hub\n'
        'print(model.transcribe("audio.wav").text)\n```',
        "## Results\n\n" + _results(config, metrics),
        "## Training\n\n" + _training(config, trained),
        f"## Licence\n\n{config.license or LICENCE_HINT[0].upper() + LICENCE_HINT[1:]}.",
    ]
    return "\n\n".join(sections) + "\n"


def with_library(card: str, library: str) -> str:
    """Return a card whose front matter names another library."""
    return re.sub(r"(?m)\A(---\n(?:.*\n)*?library_name: ).*$", rf"\g<1>{library}", card, count=1)


def bare_name(path: str | Path) -> str:
    """Return the name of a file, folder, hub model or URL, without the folders that it lies in and without secrets."""
    text = redacted(str(path))
    if is_hub_name(text):
        return text
    parts = (PurePosixPath(part.partition("?")[0]).name for part in text.split("::"))
    return "::".join(part for part in parts if part) or "model"


def _summary(config: TrainConfig, trained: TrainedOn, languages: Sequence[str]) -> str:
    spoken = ", ".join(map(english_name, languages)) or "languages that its data does not name"
    start = "trained from scratch" if config.init is None else f"fine-tuned from {bare_name(config.init)}"
    lora = f" with LoRA of rank {config.lora.rank}" if config.lora.rank else ""
    return (
        f"A speech recognition model for {spoken}, {start}{lora} with Canter on {trained.data_seconds / 3600:.2f} "
        "hours of audio."
    )


def _index(name: str, config: TrainConfig, metrics: Scores) -> dict[str, object]:
    found = [{"type": kind, "name": kind.upper(), "value": round(100 * metrics[kind], 2)} for kind in ("wer", "cer")]
    if "bleu" in metrics:
        found.append({"type": "bleu", "name": "BLEU", "value": round(metrics["bleu"], 2)})
    data = ", ".join(map(bare_name, config.valid)) or "validation"
    return {
        "name": name,
        "results": [
            {
                "task": {"type": "automatic-speech-recognition", "name": "Speech recognition"},
                "dataset": {"type": "validation", "name": f"{data} ({metrics['utterances']} utterances)"},
                "metrics": found,
            }
        ],
    }


def _results(config: TrainConfig, metrics: Scores | None) -> str:
    if metrics is None:
        return "The run had no validation data."
    rows = [("WER", percent(metrics["wer"])), ("CER", percent(metrics["cer"]))]
    if "bleu" in metrics:
        rows.append(("BLEU", f"{metrics['bleu']:.1f}"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        f"On {metrics['utterances']} validation utterances of {', '.join(map(bare_name, config.valid))}, with greedy "
        f"decoding and without normalisation of the text:\n\n| metric | value |\n|---|---|\n{table}"
    )


def _training(config: TrainConfig, trained: TrainedOn) -> str:
    import canter

    rows = [
        ("training data", ", ".join(map(bare_name, config.manifest))),
        ("audio of the data", f"{trained.data_seconds / 3600:.2f} h in {trained.utterances:,} utterances"),
        ("audio of all updates", f"{trained.audio_seconds / 3600:.2f} h"),
        ("updates", f"{trained.steps:,}"),
        ("initialised from", "random weights" if config.init is None else bare_name(config.init)),
        ("parameters", f"{trained.parameters:,}"),
        ("versions", f"Canter {canter.__version__}, torch {torch.__version__}, Python {platform.python_version()}"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    command, file = command_of(config)
    text = f"| | |\n|---|---|\n{table}\n\n```bash\n{command}\n```"
    return f"{text}\n\nwith these settings in its YAML file:\n\n```yaml\n{file}```" if file else text


def command_of(config: TrainConfig) -> tuple[str, str]:
    """Return the command that trains with these settings, and those as YAML that only a configuration file can have.

    Files and folders are named without the folders that they lie in.
    """
    words, others = ["canter", "train"], dict[str, object]()
    for name, value, file_only in _changed(config, TrainConfig()):
        if file_only:
            group, _, last = name.rpartition(".")
            inside = others.setdefault(group, {}) if group else others
            assert isinstance(inside, dict)
            inside[last] = value
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, *_as_typed(value)]
    return shlex.join(words), yaml.safe_dump(others, sort_keys=False) if others else ""


def _changed(config: Any, default: Any, prefix: str = "") -> Iterator[tuple[str, object, bool]]:
    """Yield (dotted name, value, whether only a file can set it) of the settings that are not the default."""
    plain = to_mapping(config)
    for field in dataclasses.fields(config):
        value, usual = getattr(config, field.name), getattr(default, field.name)
        if value == usual or field.name in PRIVATE:
            continue
        if dataclasses.is_dataclass(value):
            yield from _changed(value, usual, f"{prefix}{field.name}.")
            continue
        file_only = any(isinstance(mark, FileOnly) for mark in getattr(field.type, "__metadata__", ()))
        yield prefix + field.name, _without_folders(value, plain[field.name]), file_only


def _without_folders(value: object, plain: object) -> object:
    if isinstance(value, Path) or (isinstance(value, str) and is_url(value)):
        return bare_name(value)
    if isinstance(value, tuple):
        several = cast("tuple[object, ...]", value)
        if any(isinstance(one, Path) for one in several):
            return [bare_name(str(one)) for one in several]
    return plain


def _as_typed(value: object) -> Iterable[str]:
    if isinstance(value, list):
        several = cast("list[str | float | list[float]]", value)
        return [":".join(f"{part:g}" for part in one) if isinstance(one, list) else f"{one}" for one in several]
    return ["none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)]
