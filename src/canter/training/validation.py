"""WER of a model in training, by the decoding engine."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from canter.corpus.audio import load_utterance
from canter.corpus.manifest import Utterance
from canter.errors import AudioError
from canter.evaluation.wer import score
from canter.inference.engine import Engine, EngineConfig, Request
from canter.models.model import SpeechModel
from canter.text import Tokenizer

EXAMPLES = 5


def validator(
    utterances: Sequence[Utterance], tokenizer: Tokenizer, sample_rate: int, precision: str
) -> Callable[[SpeechModel, int], dict[str, Any]]:
    """``validate(model, step) -> metrics`` over ``utterances``, whose audio is read once; unreadable ones are left
    out. WER and CER are of the texts as they are."""
    kept: list[Utterance] = []
    requests: list[Request] = []
    for utterance in utterances:
        try:
            audio = load_utterance(utterance, sample_rate)
        except AudioError:
            continue
        kept.append(utterance)
        requests.append(Request(audio, tokenizer.prompt(utterance)))

    def validate(model: SpeechModel, step: int) -> dict[str, Any]:
        engine = Engine(model, tokenizer.end, EngineConfig())
        device = next(model.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            hypotheses = engine.decode(requests)
        texts = [tokenizer.decode(hypothesis.tokens) for hypothesis in hypotheses]
        scored = score([u.text for u in kept], texts, [u.lang for u in kept], normalize="none")
        spread = range(0, len(kept), max(1, len(kept) // EXAMPLES))
        return {
            "wer": scored.total.wer,
            "cer": scored.total.cer,
            "rtfx": engine.counters.rtfx,
            "utterances": len(kept),
            "examples": [{"text": kept[i].text, "pred_text": texts[i]} for i in spread][:EXAMPLES],
        }

    return validate


def spread_over(utterances: Sequence[Utterance], most: int) -> list[Utterance]:
    """At most so many of ``utterances``, evenly spread."""
    if len(utterances) <= most:
        return list(utterances)
    return [utterances[i * len(utterances) // most] for i in range(most)]
