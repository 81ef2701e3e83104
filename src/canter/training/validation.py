"""Validation of a model in training: WER, CER and BLEU of what the decoding engine transcribes."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Never

import torch

from canter.corpus.audio import load_utterance
from canter.corpus.manifest import Utterance, row_from_utterance
from canter.errors import AudioError, ManifestError
from canter.evaluation.translation import score_translations
from canter.evaluation.wer import score_texts
from canter.events import QUIET, Events
from canter.inference.engine.engine import engine_for
from canter.inference.engine.requests import EngineConfig, Request
from canter.models.protocol import AnyModel
from canter.ranks import SINGLE_RANK, Ranks
from canter.redaction import redacted
from canter.text.languages import same
from canter.training.feed.data import MicroBatches, prompt_and_text
from canter.training.run.checkpoints import Scores

EXAMPLES = 5


@dataclass(frozen=True)
class Validation:
    """Result of a validation."""

    metrics: Scores
    """WER and CER of the unnormalised texts, BLEU of translations, RTFx, examples and the "set" of utterances."""
    transcripts: Sequence[Mapping[str, object]]
    """Manifest rows of the utterances, with ``pred_text``."""


class Validator:
    """Validation of a model on utterances whose audio is read once; ranks share them, and all get the result.

    Utterances that cannot be read or are too long for the model are left out with a message. Raises ManifestError if
    none can be used.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        data: MicroBatches,
        precision: str,
        ranks: Ranks = SINGLE_RANK,
        events: Events[Never] = QUIET,
    ):
        """Read the audio of ``utterances``; ``data`` gives tokenizer, sample rate and the model's limits."""
        self.tokenizer, self.precision, self.ranks, self.events = data.tokenizer, precision, ranks, events
        self.utterances: list[Utterance] = []
        self.requests: list[Request] = []
        problems: list[str] = []
        for utterance in utterances[ranks.rank :: ranks.size]:
            try:
                audio = load_utterance(utterance, data.sample_rate)
                prompt, text = prompt_and_text(data.tokenizer, utterance)
                data.check_length(utterance, audio, len(prompt) + len(text) + 1)
            except AudioError as error:
                problems.append(str(error))
                continue
            self.utterances.append(utterance)
            self.requests.append(Request(audio, prompt))
        if left_out := [problem for some in ranks.all_gather_objects(problems) for problem in some]:
            message = f"{len(left_out)} of {len(utterances)} validation utterances cannot be used: {left_out[0]}"
            if len(left_out) == len(utterances):
                raise ManifestError(message)
            events.message(message)
        everyone = [utterance for some in ranks.all_gather_objects(self.utterances) for utterance in some]
        self.scored_set = fingerprint(everyone)

    def __call__(self, model: AnyModel) -> Validation:
        """Transcribe and score the utterances."""
        engine = engine_for(model, self.tokenizer.end, EngineConfig())
        device = next(model.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16"):
            hypotheses = engine.decode(self.requests)
        if failed := [hypothesis.error for hypothesis in hypotheses if hypothesis.error]:
            self.events.message(f"{len(failed)} validation utterances count as empty transcripts: {failed[0]}")
        mine = list(zip(self.utterances, (self.tokenizer.decode(hypothesis.tokens) for hypothesis in hypotheses)))
        pairs = [pair for some in self.ranks.all_gather_objects(mine) for pair in some]  # in the order of ranks
        scored = score_texts(
            [u.text for u, _ in pairs], [text for _, text in pairs], [u.lang for u, _ in pairs], normalize="none"
        )
        examples = pairs[:: max(1, len(pairs) // EXAMPLES)][:EXAMPLES]
        metrics = {
            "wer": scored.total.wer,
            "cer": scored.total.cer,
            "rtfx": float(self.ranks.all_gather([engine.counters.rtfx]).sum()),
            "utterances": len(pairs),
            "set": self.scored_set,
            **translations(pairs),
            "examples": [{"text": u.text, "pred_text": text} for u, text in examples],
        }
        transcripts = [
            row_from_utterance(u) | {"audio_filepath": redacted(u.audio_filepath), "pred_text": text}
            for u, text in pairs
        ]
        return Validation(metrics, transcripts)


def translations(pairs: Sequence[tuple[Utterance, str]]) -> dict[str, float]:
    """Return BLEU of translated utterances by target language, and its mean as "bleu".

    Empty if none is translated or sacrebleu is not installed.
    """
    rows = [
        (u, text) for u, text in pairs if u.target_lang and u.source_lang and not same(u.target_lang, u.source_lang)
    ]
    if not rows or not find_spec("sacrebleu"):
        return {}
    scores = score_translations([u.text for u, _ in rows], [t for _, t in rows], [u.target_lang for u, _ in rows])
    by_language = {f"bleu_{lang}": score.bleu for lang, score in scores.items()}
    return {"bleu": sum(by_language.values()) / len(by_language), **by_language}


def fingerprint(utterances: Sequence[Utterance]) -> str:
    """Return a hash of utterances and references that does not depend on their order or the audio's folder."""
    keys = (
        (os.path.basename(u.audio_filepath), u.offset, u.duration, u.text, u.lang, u.source_lang, u.target_lang)
        for u in utterances
    )
    return hashlib.blake2b(repr(sorted(map(repr, keys))).encode(), digest_size=8).hexdigest()


def spread_over(utterances: Sequence[Utterance], limit: int) -> list[Utterance]:
    """Return at most ``limit`` of the utterances, evenly spread."""
    if len(utterances) <= limit:
        return list(utterances)
    return [utterances[i * len(utterances) // limit] for i in range(limit)]
