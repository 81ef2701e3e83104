"""Text normalisation before scoring: casing, punctuation and spelling are not recognition errors.

The rules are those of Whisper (Radford et al., 2022, appendix C), by the package ``whisper-normalizer``, with what
the Open ASR leaderboard (github.com/huggingface/open_asr_leaderboard) adds: initials become one word.
"""

import re
from collections.abc import Callable
from functools import cache
from typing import Literal, get_args

from canter.text.languages import canonical, is_said

Normalization = Literal["leaderboard", "basic", "none"]

# Written without spaces: Whisper's evaluation splits them into characters, so that their WER is a CER.
UNSPACED = frozenset({"zh", "yue", "ja", "th", "lo", "my"})

# TED-LIUM's mark for what nobody transcribed; the leaderboard leaves such utterances out.
UNSCORED = "ignore time segment in scoring"
_INITIALS = re.compile(r"\b[a-z](?:\.[a-z]\b)+")


def language(code: str | None) -> str:
    """Return the code of a language as people write it (``en-US``, ``English``); English where none is named."""
    return canonical(code) or code.strip().lower() if code is not None and is_said(code) else "en"


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

    normalize = EnglishTextNormalizer()
    return lambda text: normalize(_INITIALS.sub(lambda found: found[0].replace(".", ""), text.lower()))


@cache
def _basic(split_letters: bool) -> Callable[[str], str]:
    from whisper_normalizer.basic import BasicTextNormalizer

    return BasicTextNormalizer(split_letters=split_letters)
