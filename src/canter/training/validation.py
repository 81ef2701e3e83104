"""WER of a model in training, by the decoding engine."""

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from canter.corpus.audio import load_utterance
from canter.corpus.manifest import Utterance, row_from_utterance
from canter.errors import AudioError, ManifestError
from canter.evaluation.translation import score_translations
from canter.evaluation.wer import score_texts
from canter.inference.engine.engine import engine_for
from canter.inference.engine.requests import EngineConfig, Request
from canter.models.model import SpeechModel
from canter.redaction import redacted
from canter.text import Tokenizer
from canter.text.languages import same
from canter.training.distributed.ranks import ALONE, Ranks
from canter.training.feed.data import prompt_and_text

EXAMPLES = 5


def validator(
    utterances: Sequence[Utterance],
    tokenizer: Tokenizer,
    sample_rate: int,
    precision: str,
    ranks: Ranks = ALONE,
    say: Callable[[str], None] = lambda _: None,
    longest_seconds: float = math.inf,
    most_tokens: float = math.inf,
) -> Callable[[SpeechModel, int], dict[str, Any]]:
    """``validate(model, step) -> metrics`` over ``utterances``, whose audio is read once; those that are
    unreadable, or longer than the model's ``longest_seconds`` or ``most_tokens``, are left out, and ``say`` is told.
    WER and CER are of the texts as they are, BLEU (where sacrebleu is installed) of those that are translations: "bleu"
    is its mean over languages. "set" tells sets of utterances apart; "transcripts" are the utterances' manifest rows
    with ``pred_text``. Each rank decodes its part, and all have the result.

    Raises ManifestError where none can be used.
    """
    kept: list[Utterance] = []
    requests: list[Request] = []
    problems: list[str] = []
    for utterance in utterances[ranks.rank :: ranks.size]:
        try:
            audio = load_utterance(utterance, sample_rate)
            prompt, text = prompt_and_text(tokenizer, utterance)
            tokens = len(prompt) + len(text) + 1  # the end's
            _refuse_too_long(utterance, len(audio) / sample_rate, tokens, longest_seconds, most_tokens)
        except AudioError as error:
            problems.append(str(error))
            continue
        kept.append(utterance)
        requests.append(Request(audio, prompt))
    if left_out := [problem for some in ranks.objects(problems) for problem in some]:
        told = f"{len(left_out)} of {len(utterances)} validation utterances cannot be used: {left_out[0]}"
        if len(left_out) == len(utterances):
            raise ManifestError(told)
        say(told)
    scored_set = fingerprint([utterance for part in ranks.objects(kept) for utterance in part])

    def validate(model: SpeechModel, step: int) -> dict[str, Any]:
        engine = engine_for(model, tokenizer.end, EngineConfig())
        device = next(model.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            hypotheses = engine.decode(requests)
        texts = [tokenizer.decode(hypothesis.tokens) for hypothesis in hypotheses]
        pairs = [
            pair for part in ranks.objects(list(zip(kept, texts))) for pair in part
        ]  # in the ranks' order, the same at every validation
        done, texts = [u for u, _ in pairs], [text for _, text in pairs]
        scored = score_texts([u.text for u in done], texts, [u.lang for u in done], normalize="none")
        spread = range(0, len(done), max(1, len(done) // EXAMPLES))
        return {
            "wer": scored.total.wer,
            "cer": scored.total.cer,
            "rtfx": float(ranks.table([engine.counters.rtfx]).sum()),
            "utterances": len(done),
            "set": scored_set,
            **translations(pairs),
            "examples": [{"text": done[i].text, "pred_text": texts[i]} for i in spread][:EXAMPLES],
            "transcripts": [
                row_from_utterance(u) | {"audio_filepath": redacted(u.audio_filepath), "pred_text": text}
                for u, text in pairs
            ],
        }

    return validate


def translations(pairs: Sequence[tuple[Utterance, str]]) -> dict[str, float]:
    """BLEU by target language of those utterances that are translated, and its mean as "bleu"; empty without any, or
    without sacrebleu."""
    rows = [
        (u, text) for u, text in pairs if u.target_lang and u.source_lang and not same(u.target_lang, u.source_lang)
    ]
    if not rows or not find_spec("sacrebleu"):
        return {}
    scores = score_translations([u.text for u, _ in rows], [t for _, t in rows], [u.target_lang for u, _ in rows])
    by_language = {f"bleu_{lang}": score.bleu for lang, score in scores.items()}
    return {"bleu": sum(by_language.values()) / len(by_language), **by_language}


def fingerprint(utterances: Sequence[Utterance]) -> str:
    """Of what is decoded and what it is compared with, in any order and wherever the audio lies."""
    keys = (
        (
            os.path.basename(u.audio_filepath),
            u.offset,
            u.duration,
            u.text,
            u.lang,
            u.source_lang,
            u.target_lang,
        )
        for u in utterances
    )
    return hashlib.blake2b(repr(sorted(map(repr, keys))).encode(), digest_size=8).hexdigest()


def _refuse_too_long(u: Utterance, seconds: float, tokens: int, most_seconds: float, most: float) -> None:
    if seconds > most_seconds:
        raise AudioError(
            f"{u.audio_filepath}: {seconds:.2f} s are more than the {most_seconds:g} s that the model takes"
        )
    if tokens > most:
        raise AudioError(
            f"{u.audio_filepath}: its text has {tokens} tokens with prompt and end, more than the {most} that the "
            "model has positions for"
        )


def spread_over(utterances: Sequence[Utterance], most: int) -> list[Utterance]:
    """At most so many of ``utterances``, evenly spread."""
    if len(utterances) <= most:
        return list(utterances)
    return [utterances[i * len(utterances) // most] for i in range(most)]
