"""Read a folder, or a name on the hub, into transformers' model, feature extractor and tokenizer.

Folders come from anywhere. transformers is called so that it runs no code of theirs and opens no connection, and only
after the files that it would read are checked: it allocates whatever a configuration asks for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoFeatureExtractor,
    AutoModelForSpeechSeq2Seq,
    AutoTokenizer,
    FeatureExtractionMixin,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from canter.errors import CheckpointError
from canter.models.formats.files import check_safetensors, read_json, stored_bytes, tensor_files
from canter.models.formats.fitting import SMALL
from canter.models.formats.generation import check_generation
from canter.models.hub import ADAPTER, checkpoint_of, refuse_adapter

# How every part is read: with transformers' own classes alone, and from the disk alone.
SAFELY = {"trust_remote_code": False, "local_files_only": True}
SETTINGS = ("config", "generation_config", "preprocessor_config", "processor_config", "tokenizer_config",
            "special_tokens_map", "added_tokens")  # fmt: skip
READ = (".json", ".txt", ".model", ".jinja")
"""Endings of the files that transformers reads beside the weights."""
MOST_VOCABULARY_BYTES = 64 * 2**20
"""Size of such a file; the largest vocabulary of a speech model has 18 MB."""
MOST_LIST = 100_000
"""Entries of a list in a configuration."""
ATTENTION = (None, "eager", "sdpa")
"""Other ways fetch compiled kernels from the hub, or need a package of their own."""
# Settings of transformers' GenerationConfig that are kept; each has a range in `check_generation`.
GENERATION = ("max_length", "max_new_tokens", "min_length", "min_new_tokens", "length_penalty", "repetition_penalty",
              "no_repeat_ngram_size", "suppress_tokens", "begin_suppress_tokens", "bos_token_id", "eos_token_id",
              "pad_token_id", "decoder_start_token_id", "forced_bos_token_id", "use_cache")  # fmt: skip
# Names of settings, of any architecture, and the range of their values: lists and objects are looked into.
RANGES = tuple(
    (re.compile(pattern), least, most)
    for pattern, least, most in (
        (r"(^|_)layers$", 0, 256),
        (r"(^num|attention|key_value)_heads$", 1, 512),
        (r"(^|_)(vocab_size|positions|position_embeddings|max_length|max_new_tokens)$", 0, 2_000_000),
        (r"(^|_)(size|dim|d_model|channels|stride|kernel_sizes?|experts|codebooks)$", -1, 2_000_000),
        (r"^(sampling_rate|sample_rate)$", 1000, 192_000),
        (r"^(feature_size|num_mel_bins|n_mels)$", 1, 512),
        (r"^(n_fft|win_length|hop_length|fft_length|frame_length|frame_shift|hop_size)$", 1, 8192),
        (r"^chunk_length(_s)?$", 0.1, 300),
        (r"^n_samples$", 1, 300 * 192_000),
        (r"^nb_max_frames$", 1, 300 * 1000),
        (r"(^|_)(dropout|layerdrop|drop)$", 0, 1),
    )
)


def load_parts(
    name: str | Path, **kwargs: object
) -> tuple[PreTrainedModel, FeatureExtractionMixin, PreTrainedTokenizerBase]:
    """Return model, feature extractor and tokenizer, as ``TransformersModel.from_pretrained`` wants them.

    Raises CheckpointError for a folder that is refused (see `check_folder`) or that transformers cannot load.
    """
    folder = checkpoint_of(name)
    refuse_adapter(folder)
    check_folder(folder)
    with _quietly(folder):
        model, loading = AutoModelForSpeechSeq2Seq.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, **SAFELY, **kwargs
        )
        extractor = AutoFeatureExtractor.from_pretrained(folder, **SAFELY)
        tokenizer = AutoTokenizer.from_pretrained(folder, **SAFELY)
    faults = {what: sorted(map(str, loading[f"{what}_keys"])) for what in ("missing", "mismatched")}
    told = [f"{len(names)} {what}: {', '.join(names[:8])}" for what, names in faults.items() if names]
    if told:
        raise CheckpointError(f"{folder}: tensors do not fit the configuration. {'; '.join(told)}")
    model.generation_config = _plain_generation(model, folder)
    return model.eval(), extractor, tokenizer


def _plain_generation(model: Any, folder: Path) -> GenerationConfig:
    """Return the model's generation settings without those that change how ``generate`` works.

    Some have it fetch code from the hub (contrastive and constrained search) or compile. Settings that are the model's
    own, such as ids of languages, stay. Raises CheckpointError for values out of range; see `check_generation`.
    """
    source = folder / "generation_config.json"
    plain = GenerationConfig()
    known = vars(plain).keys() - set(GENERATION)
    kept = {name: value for name, value in vars(model.generation_config).items() if name not in known}
    size = model.get_output_embeddings().weight.shape[0]
    for name, value in check_generation(kept, source if source.exists() else folder / "config.json", size).items():
        setattr(plain, name, value)
    return plain


@contextmanager
def _quietly(folder: Path) -> Iterator[None]:
    """Silence transformers in this context, and raise CheckpointError for whatever it raises."""
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    except Exception as error:  # what transformers raises for a file that it cannot use is not documented
        told = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(f"{folder}: transformers cannot load it: {told}") from None
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def check_folder(folder: Path) -> None:
    """Check a model folder before transformers reads it.

    Raises CheckpointError for an adapter; an architecture that is not one of transformers' own; settings that name
    other files, quantisation, or kernels to fetch; numbers out of range; weights outside the folder; and a model of
    more parameters than its weights have bytes.
    """
    config_file = folder / "config.json"
    refuse_adapter(folder)
    if (folder / ADAPTER).exists():  # beside a model: peft, where it is installed, would load it too
        raise CheckpointError(f"{folder} holds an adapter, not a whole model; merge it into its base model first")
    settings = {name: read_json(folder / f"{name}.json") for name in SETTINGS if (folder / f"{name}.json").exists()}
    config = settings.get("config") or read_json(config_file)
    for name in settings.keys() & {"config", "preprocessor_config", "processor_config"}:
        for setting, value in _numbers(settings[name]):
            _check_number(setting, value, folder / f"{name}.json")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{config_file}: model_type is {kind!r:.80}, which is not an architecture of transformers itself; code "
            "that comes with a model is never run"
        )
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("quantization_config", "transformers_weights"):
            if section.get(key) is not None:
                raise CheckpointError(f"{config_file}: {key} is not supported; save the model without it")
        for key in ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"):
            if section.get(key) not in ATTENTION:
                raise CheckpointError(
                    f"{config_file}: {key} is {section[key]!r:.80}; it must be 'eager' or 'sdpa', as nothing is "
                    "fetched to run a model"
                )
    for file in folder.iterdir():
        if file.suffix in READ and not file.is_dir():
            if not file.is_file():
                raise CheckpointError(f"{file} is not a regular file")
            if file.stat().st_size > MOST_VOCABULARY_BYTES:
                raise CheckpointError(f"{file} has more than {MOST_VOCABULARY_BYTES:,} bytes")
    weights = folder / "model.safetensors"
    for file in tensor_files(weights):
        if not file.exists():
            raise CheckpointError(f"{file} is missing; copy the whole model folder (pickled weights are not read)")
        check_safetensors(file)
    with _quietly(folder), torch.device("meta"):
        shapes = AutoModelForSpeechSeq2Seq.from_config(AutoConfig.from_pretrained(folder, **SAFELY))
    stored = stored_bytes(weights)
    size = sum(tensor.numel() for tensor in (*shapes.parameters(), *shapes.buffers()))
    if size > max(stored, SMALL):
        raise CheckpointError(
            f"{config_file} describes a model of {size:,} parameters, but its weights have only {stored:,} bytes; was "
            "the configuration edited, or are the weights another model's?"
        )


def _numbers(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value but lists and objects, with the name of the setting that it belongs to."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, str(name))
    elif isinstance(value, list):
        if len(value) > MOST_LIST:
            value = value[:MOST_LIST]
        for inner in value:
            yield from _numbers(inner, path)
    else:
        yield path, value


def _check_number(name: str, value: Any, source: Path) -> None:
    if value is None or isinstance(value, bool | str):
        return
    for pattern, least, most in RANGES:
        if pattern.search(name) and not least <= value <= most:
            raise CheckpointError(f"{source}: {name} is {value!r:.80}; it must be from {least:,} to {most:,}")
