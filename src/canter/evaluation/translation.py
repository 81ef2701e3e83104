"""Compute BLEU and chrF of translations with sacrebleu (the extra ``bleu``); its signatures make them comparable.

BLEU: Papineni et al., ACL 2002; chrF: Popović, WMT 2015; signatures: Post, WMT 2018.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from canter.evaluation.normalize import language
from canter.extras import require
from canter.text.languages import is_said

# sacrebleu's tokenizer by language; ja-mecab and ko-mecab need packages of their own.
TOKENIZERS = {"zh": "zh", "yue": "zh", "ja": "char", "ko": "char", "th": "char", "lo": "char", "my": "char"}
DEFAULT_TOKENIZER = "13a"


@dataclass(frozen=True, slots=True)
class TranslationScore:
    """Scores of the translations into one language; texts are not normalised, so case and punctuation count."""

    utterances: int
    bleu: float
    """0 to 100."""
    chrf: float
    """chrF2, 0 to 100."""
    bleu_signature: str
    """All settings that the figure depends on; quote it with the figure."""
    chrf_signature: str


def score_translations(
    references: Sequence[str], hypotheses: Sequence[str], langs: Sequence[str | None]
) -> dict[str, TranslationScore]:
    """Return corpus BLEU and chrF by target language, the most frequent first; (N,) texts each.

    Raises MissingExtraError without sacrebleu and ValueError where the sequences differ in length.
    """
    require("sacrebleu", "the score of translations (BLEU, chrF)")
    if not len(references) == len(hypotheses) == len(langs):
        raise ValueError(f"{len(references)} references, {len(hypotheses)} hypotheses, {len(langs)} languages")
    rows: dict[str, list[int]] = {}
    for row, lang in enumerate(langs):
        rows.setdefault(language(lang) if is_said(lang) else "und", []).append(row)
    groups = sorted(rows.items(), key=lambda item: (-len(item[1]), item[0]))
    return {
        name: _score([references[row] for row in group], [hypotheses[row] for row in group], name)
        for name, group in groups
    }


def _score(references: list[str], hypotheses: list[str], lang: str) -> TranslationScore:
    from sacrebleu.metrics import BLEU, CHRF  # pyright: ignore[reportMissingImports]  # an extra

    bleu, chrf = BLEU(tokenize=TOKENIZERS.get(lang, DEFAULT_TOKENIZER)), CHRF()
    words, characters = (metric.corpus_score(hypotheses, [references]).score for metric in (bleu, chrf))
    return TranslationScore(len(references), words, characters, str(bleu.get_signature()), str(chrf.get_signature()))
