"""Normalise text before scoring, since case, punctuation and spelling are not recognition errors, but vowel signs are.

The English rules are those of Whisper (Radford et al., 2022, appendix C), by the package ``whisper-normalizer``, with
what the Open ASR leaderboard (github.com/huggingface/open_asr_leaderboard) adds: initials become one word. Whisper's
rules remove combining marks, which are vowels in Hindi, Thai, Tamil and many other scripts; ``standard`` keeps them.
"""

import re
import unicodedata
from collections.abc import Callable
from functools import cache
from typing import Literal, get_args

from canter.text.languages import canonical, is_said

Normalization = Literal["standard", "leaderboard", "basic", "none"]

# Languages written without spaces between words; CER ignores spaces in them.
UNSPACED = frozenset({"zh", "yue", "wuu", "nan", "hak", "ja", "th", "lo", "my", "km"})
# Languages in which Whisper's evaluation makes a word of each character, so that WER is a CER.
WHISPER_LETTERS = frozenset({"zh", "yue", "ja", "th", "lo", "my"})
# Languages in which a character is about a word; in others it is about a consonant, and "standard" splits at spaces.
LETTERS = frozenset({"zh", "yue", "wuu", "nan", "hak", "ja"})
DOTLESS = frozenset({"tr", "az"})  # the capital of a dotless i has no dot either

# TED-LIUM's mark for speech without a transcript; the leaderboard leaves such utterances out.
UNSCORED = "ignore time segment in scoring"
_INITIALS = re.compile(r"\b[a-z](?:\.[a-z]\b)+")
_BRACKETS = re.compile(r"[<\[][^>\]]*[>\]]|\([^)]+?\)")
_TYPOGRAPHY = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u02bb\u02bc\u02b9\u2032\u00b4\u0060\uff07", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb\u2033\uff02", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u2043\ufe63\uff0d", "-"),
        "\u2026": "...",
        "\u0130": "i",  # the Turkish capital, of which str.lower makes two characters
        "\u0640": "",  # Arabic tatweel, which stretches a word
        "\u034f": "",
    }
)
_SELECTORS = re.compile("[\u180b-\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]")
_PRIVATE = 0xF0000  # private-use characters, in which text of other scripts passes Whisper's English rules


def language(code: str | None) -> str:
    """Return the code of a language given as a code or name (``en-US``, ``English``); English where none is named."""
    return canonical(code) or code.strip().lower() if code is not None and is_said(code) else "en"


def normalizer(rule: Normalization, lang: str | None = None) -> Callable[[str], str]:
    """Return the function that prepares a text of this language for scoring.

    ``standard``: Whisper's English rules (numbers, contractions, spelling, fillers) for English, and where no language
    is named, though accents count there; for every other language no case, no punctuation, but every letter and
    combining mark. Typographic apostrophes, quotes, dashes and spaces equal plain ones, and composed characters equal
    decomposed ones. ``leaderboard``: Whisper's English rules for English and its basic ones elsewhere, which ignore
    combining marks; ``basic``: the basic ones for all; ``none``: change nothing. Raises ValueError for another rule.
    """
    if rule not in get_args(Normalization):
        raise ValueError(f"normalisation '{rule}' is unknown; one of: {', '.join(get_args(Normalization))}")
    if rule == "none":
        return str
    code = language(lang)
    if rule == "standard":
        return _standard_english(is_said(lang)) if code == "en" else _standard(code in LETTERS, code in DOTLESS)
    return _english() if rule == "leaderboard" and code == "en" else _basic(code in WHISPER_LETTERS)


@cache
def _english() -> Callable[[str], str]:
    from whisper_normalizer.english import EnglishTextNormalizer

    normalize = EnglishTextNormalizer()

    def without_initials(text: str) -> str:
        """Normalise a text, composed first: an initial is one letter, whichever way its accent is written."""
        text = unicodedata.normalize("NFC", text.lower())
        return normalize(_INITIALS.sub(lambda found: found[0].replace(".", ""), text))

    return without_initials


@cache
def _basic(split_letters: bool) -> Callable[[str], str]:
    from whisper_normalizer.basic import BasicTextNormalizer

    return BasicTextNormalizer(split_letters=split_letters)


@cache
def _standard(letters: bool, dotless: bool) -> Callable[[str], str]:
    """Return the rule for a language other than English; ``letters``: every character becomes a word."""

    def normalize(text: str) -> str:
        text = _plain("NFKC", text)
        text = (text.replace("I", "\u0131") if dotless else text).lower()
        text = _BRACKETS.sub("", text)
        # a dot above that follows an i is what lower() leaves of a decomposed capital
        text = unicodedata.normalize("NFKC", text.replace("i\u0307", "i"))
        text = "".join(" " if unicodedata.category(one)[0] in "SP" else one for one in text)
        if letters:
            import regex

            text = " ".join(regex.findall(r"\X", text))
        return " ".join(text.split())

    return normalize


@cache
def _standard_english(named: bool) -> Callable[[str], str]:
    """Return the leaderboard's English rules for Latin script; other scripts keep their letters and marks.

    Accents are spelling in English; in a text whose language is not ``named`` they are letters.
    """

    def normalize(text: str) -> str:
        text = _plain("NFC", text)
        if not text.isascii():
            text = _shield(text.lower(), _is_latin if named else str.isascii)
        text = _english()(text)
        return text if text.isascii() else "".join(map(_unshielded, text))

    return normalize


def _plain(form: Literal["NFC", "NFKC"], text: str) -> str:
    """Return the text in a Unicode normal form, with plain apostrophes, quotes and dashes, without invisible ones."""
    text = _SELECTORS.sub("", unicodedata.normalize(form, text.translate(_TYPOGRAPHY)).translate(_TYPOGRAPHY))
    if text.isascii():
        return text
    return "".join(one for one in text if unicodedata.category(one) != "Cf")


def _shield(text: str, is_plain: Callable[[str], bool]) -> str:
    """Replace letters that are not plain, and marks on them, by private-use characters."""
    shielded, other = [], False
    for one in text:
        kind = unicodedata.category(one)[0]
        if kind == "L":
            other = not is_plain(one)
        elif kind != "M":
            other = False
        elif is_plain is str.isascii:
            other = True
        shielded.append(chr(_PRIVATE + ord(one)) if other and ord(one) < 0x20000 else one)
    return "".join(shielded)


def _unshielded(one: str) -> str:
    return chr(ord(one) - _PRIVATE) if ord(one) >= _PRIVATE else one


@cache
def _is_latin(letter: str) -> bool:
    return letter.isascii() or "LATIN" in unicodedata.name(letter, "") or letter in "\u00aa\u00ba"
