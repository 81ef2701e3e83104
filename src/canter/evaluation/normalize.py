"""Text normalisation before scoring: casing, punctuation and spelling are not recognition errors.

The rules are those of Whisper (Radford et al., 2022, appendix C) as the Open ASR leaderboard applies them, by
the package ``whisper-normalizer``.
"""

from collections.abc import Callable
from functools import cache
from typing import Literal, get_args

Normalization = Literal["leaderboard", "basic", "none"]

# Written without spaces: Whisper's evaluation splits them into characters, so that their WER is a CER.
UNSPACED = frozenset({"zh", "yue", "ja", "th", "lo", "my"})


def language(code: str | None) -> str:
    """The language of a code like ``en``, ``en-US`` or ``EN_us``; an unknown one is taken for English."""
    return (code or "en").replace("_", "-").split("-")[0].lower()


def normalizer(rule: Normalization, lang: str | None = None) -> Callable[[str], str]:
    """The function that prepares a text of this language for scoring.

    ``leaderboard`` is Whisper's English normaliser (numbers, contractions, spelling, fillers) for English
    and its basic one for every other language; ``basic`` the basic one for all; ``none`` changes nothing.
    """
    if rule not in get_args(Normalization):
        raise ValueError(f"normalisation '{rule}' is unknown; one of: {', '.join(get_args(Normalization))}")
    if rule == "none":
        return str
    code = language(lang)
    return _english() if rule == "leaderboard" and code == "en" else _basic(code in UNSPACED)


@cache
def _english() -> Callable[[str], str]:
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer()


@cache
def _basic(split_letters: bool) -> Callable[[str], str]:
    from whisper_normalizer.basic import BasicTextNormalizer

    return BasicTextNormalizer(split_letters=split_letters)
