"""What can be asked of a model, and what that needs: `canter info` and docs/models.md show it."""

# pyright: strict

from __future__ import annotations

from canter.models.protocol import AnyModel, Capability

EVERYWHERE = ("info", "tune", "score", "--precision bf16", "--adapter", "convert --merge")
"""Commands and options that take every model."""
WITH_TOKENIZER = ("train --init", "train --lora.rank", "train --teacher", "transcribe", "serve", "bench", "--beam-size")
"""Commands and options that take every model with a tokenizer."""
NATIVE = ("convert", "reshape", "extend")
"""Commands for models in a native format (see `canter.loading.FORMATS`)."""
NEEDS: dict[str, Capability] = {
    "--timestamps word": "word_timestamps",
    "--ctc-weight": "joint_decoding",
    "--precision int8": "int8",
    "--max-repeats": "repetition_guard",
    "--detect-language": "language_detection",
    "--condition-on-previous-text": "previous_text",
    "--suppress-tokens": "cached_decoding",
    "--hotwords": "cached_decoding",
    "--logprobs": "cached_decoding",
    "--nbest": "cached_decoding",
    "--hallucination-silence-threshold": "word_timestamps",
    "align": "cached_decoding",
    "inspect --suspects": "cached_decoding",
    "bench --against": "cached_decoding",
    "train --compile": "compile",
    "train --parallel shard": "shard",
    "train --augment masks": "spec_augment",
    "train --pad-seconds": "any_length",
    "train --strategy packed": "packing",
    "train --init --tokenizer": "vocabulary",
    "train --init --loss.ctc-weight": "joint_decoding",
    "CTC head on characters": "characters",
    "bf16 copies of the weights in training": "bf16_weights",
    "decoder on parts of a batch after an out-of-memory error": "split_decoder",
    "FLOPs and memory from the configuration": "cost_model",
}
"""Options, and what else Canter does, with the capability that each needs."""
WITH_CTC_HEAD: tuple[Capability, ...] = ("joint_decoding", "characters")


def abilities(model: AnyModel, native: bool) -> dict[str, bool]:
    """Return every command and option, with True if it works on ``model``; ``native``: its format is native."""
    lacking = {*(WITH_CTC_HEAD if model.ctc is None else ())}
    if "pad_seconds" not in model.layers().get("features", {}):
        lacking.add("any_length")
    return {
        **dict.fromkeys(EVERYWHERE, True),
        **dict.fromkeys(WITH_TOKENIZER, model.tokenizer is not None),
        **dict.fromkeys(NATIVE, native),
        **{name: needed in model.supports and needed not in lacking for name, needed in NEEDS.items()},
    }
