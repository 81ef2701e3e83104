"""Change the vocabulary of a trained model: embedding, head, and a CTC head on the same tokens.

The rows of ids that mean the same are kept to the bit; others start from means of old rows (`canter.text.spelling`).
All other weights stay.
"""

# pyright: strict

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from canter.errors import ConfigError
from canter.models.formats.fitting import build
from canter.models.formats.generation import IDS, LISTS, TABLES, with_defaults
from canter.models.model import SpeechModel
from canter.text.spelling import Start, starts_of_extended, starts_of_other
from canter.text.tokenizer import Tokenizer

EMBEDDING, OUTPUT, BIAS = "decoder.embedding.weight", "decoder.output", "decoder.head_bias"
FOLLOWING = ("max_initial_timestamp_index", "timestamp_rules", "is_multilingual", "forced_decoder_ids")
"""Settings for decoding that depend on the tokenizer, besides those of ids."""


@dataclass(frozen=True)
class VocabularyChange:
    """A model with another vocabulary, and the origin of its rows."""

    model: SpeechModel
    kept: int
    """Number of ids with the row of the same piece or token."""
    copied: int
    """Number of new ids that start as a copy of another row."""
    averaged: int
    """Number of new ids that start as a mean of several rows."""
    dropped: int
    """Number of old ids that no new one stands for."""

    def __str__(self) -> str:
        new = self.copied + self.averaged
        dropped = f"; {self.dropped:,} old ones are dropped" if self.dropped else ""
        return (
            f"{self.kept + new:,} tokens: {self.kept:,} keep the rows of the model, {new:,} are new, each the mean of "
            f"the old pieces that spell it (languages: of the old languages){dropped}"
        )


def extend_vocabulary(model: SpeechModel, tokenizer: Tokenizer, like: str | None = None) -> VocabularyChange:
    """Return the model with ``tokenizer``, whose first ids are those of its own (`canter.text.extension`).

    All old rows stay to the bit, and so do the logits of old tokens. ``like``: language from which a new language token
    starts (default: the mean of the languages). ``model`` does not change.
    """
    old = _tokenizer_of(model)
    starts = starts_of_extended(old, tokenizer, like)
    rows = [*starts, *(Start((number,), kept=True) for number in range(len(starts), model.vocabulary))]
    changed = _with_rows(model, rows, model.config.decoder.pad)
    changed.tokenizer, changed.generation = tokenizer, dict(model.generation)
    for table, form in (("lang_to_id", "<|{}|>"), ("text_decoder_lang_to_code_id", "{}")):  # Whisper's and Seamless'
        if isinstance(languages := changed.generation.get(table), dict):
            added = {form.format(code): tokenizer.special_id(f"<|{code}|>") for code in tokenizer.languages}
            changed.generation[table] = {**languages, **added}
    return _change(changed, starts, old)


def replace_vocabulary(model: SpeechModel, tokenizer: Tokenizer) -> VocabularyChange:
    """Return the model with another tokenizer; rows of pieces and special tokens that both have stay to the bit.

    Settings for decoding that name ids follow the new tokenizer. ``model`` does not change. Raises ConfigError for a
    model whose CTC head is on tokens and a tokenizer whose id 0 is not the blank.
    """
    old = _tokenizer_of(model)
    if _on_tokens(model) and tokenizer.pad != 0:
        raise ConfigError(
            "the model's CTC head is on its tokens, of which id 0 is the blank, and the new tokenizer has no blank "
            "there; use one of OWSM's kind"
        )
    starts = starts_of_other(old, tokenizer)
    changed = _with_rows(model, starts, tokenizer.pad)
    bound = {*IDS, *LISTS, *TABLES, *FOLLOWING}
    kept = {name: value for name, value in model.generation.items() if name not in bound and "token_id" not in name}
    changed.tokenizer, changed.generation = tokenizer, with_defaults(tokenizer, kept)
    return _change(changed, starts, old)


def _tokenizer_of(model: SpeechModel) -> Tokenizer:
    if model.tokenizer is None:
        raise ConfigError("the model has no tokenizer, without which nothing says what its ids stand for")
    return model.tokenizer


def _on_tokens(model: SpeechModel) -> bool:
    return model.ctc is not None and "characters" not in model.supports


def _change(model: SpeechModel, starts: Sequence[Start | None], old: Tokenizer) -> VocabularyChange:
    known = [start for start in starts if start is not None]
    new = [start for start in known if not start.kept]
    kept = {start.ids for start in known if start.kept}
    copied = sum(len(start.ids) == 1 for start in new)
    return VocabularyChange(model, len(known) - len(new), copied, len(new) - copied, max(0, old.vocab_size - len(kept)))


def _with_rows(model: SpeechModel, starts: Sequence[Start | None], pad: int) -> SpeechModel:
    """Return a model whose tensors over the vocabulary have these rows; None is a row of zeros, never decoded."""
    size = len(starts)
    decoder = replace(model.config.decoder, vocabulary=size, pad=pad)
    config = replace(model.config, decoder=decoder)
    if _on_tokens(model):
        config = replace(config, ctc_vocabulary=size)
    changed = build(config, "the new vocabulary")
    tensors: dict[str, Any] = dict(model.state_dict())
    for name in (EMBEDDING, OUTPUT, BIAS):
        if tensors.get(name) is not None:
            tensors[name] = _rows(tensors[name], starts)
    for name in ("ctc.weight", "ctc.bias") if _on_tokens(model) else ():
        parts = tensors[name].unflatten(0, (model.config.ctc_upsampling, -1))
        tensors[name] = torch.cat([_rows(part, starts) for part in parts])
    changed.load_state_dict(tensors)
    changed.characters = model.characters
    return changed.to(model.decoder.embedding.weight.device).train(model.training)


def _rows(old: Tensor, starts: Sequence[Start | None]) -> Tensor:
    """Return the rows (V', ...) of a tensor (V, ...): copies to the bit, and means computed in float64."""
    first = torch.tensor([start.ids[0] if start else 0 for start in starts], device=old.device)
    found = old.detach().index_select(0, first)
    for place, start in enumerate(starts):
        if start is None:
            found[place] = 0
        elif len(start.ids) > 1:
            ids = torch.tensor(start.ids, device=old.device)
            found[place] = old.detach().index_select(0, ids).double().mean(0).to(old.dtype)
    return found
