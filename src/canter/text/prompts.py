"""Prompt formats: the tokens before a transcript, made of slots (language, task, punctuation, ...).

``canary`` (canary-1b) and ``canary2`` (the flash and v2 models) follow NVIDIA's Canary, ``cohere`` Cohere Transcribe,
and ``whisper`` OpenAI's Whisper. A format is a sequence of special tokens and slot names; a slot's value is a word such
as "en", "asr" or "yes", or a special token such as "<|en|>".
"""

from collections.abc import Mapping

from canter.corpus.manifest import Utterance
from canter.errors import ConfigError
from canter.text.languages import find, is_said, resolve, same
from canter.text.tokenizer import Tokenizer

FORMATS = {
    "canary": ("<|startoftranscript|>", "source_lang", "task", "target_lang", "pnc"),
    "canary2": (
        "<|startofcontext|>", "decodercontext", "<|startoftranscript|>", "emotion", "source_lang",
        "target_lang", "pnc", "itn", "timestamp", "diarize",
    ),
    "cohere": (
        "▁", "<|startofcontext|>", "<|startoftranscript|>", "emotion", "source_lang", "target_lang", "pnc", "itn",
        "<|notimestamp|>", "diarize",
    ),
    "canary2_partial": ("<|startofcontext|>", "decodercontext", "<|startoftranscript|>"),
    "whisper": ("prevtext", "<|startoftranscript|>", "source_lang", "task", "timestamp"),
    "whisper_english": ("prevtext", "<|startoftranscript|>", "timestamp"),
}  # fmt: skip
DEFAULTS = {
    "task": "asr", "pnc": "yes", "itn": "no", "timestamp": "no", "diarize": "no",
    "emotion": "<|emo:undefined|>", "decodercontext": "", "prevtext": "",
}  # fmt: skip
TASKS = {
    "asr": "<|transcribe|>",
    "transcribe": "<|transcribe|>",
    "ast": "<|translate|>",
    "s2t_translation": "<|translate|>",
    "translate": "<|translate|>",
}
TRUE = ("yes", "1", "True", "true")
TRANSCRIBING = ("cohere",)
"""Formats of models that write the language spoken only."""
FLAGS = ("pnc", "itn", "timestamp", "diarize")
CONTEXTS = ("decodercontext", "prevtext")
"""Slots of text that precedes a recording."""
LANGUAGES = ("source_lang", "target_lang")


def format_of(tokenizer: Tokenizer | None) -> tuple[str, ...]:
    """Return the tokens and slots of the prompts of a tokenizer; empty where they are not known."""
    slots: tuple[str, ...] | None = getattr(tokenizer, "prompt_slots", None)
    return slots or FORMATS.get(getattr(tokenizer, "prompt_format", ""), ())


def utterance_slots(utterance: Utterance) -> dict[str, str]:
    """Return the prompt slots of an utterance: languages (``lang`` sets both), task and punctuation.

    Without ``taskname``, an utterance whose two languages differ is a translation. The target language of a translation
    is not taken for the source language. Languages are returned as they are written, and "auto" is left out.
    """
    spoken, lang, written = (
        value if is_said(value) else None for value in (utterance.source_lang, utterance.lang, utterance.target_lang)
    )
    source = spoken or lang
    if not source and TASKS.get(utterance.taskname or "") != "<|translate|>":
        source = written
    target = written or lang or spoken
    alike = source == target or (source is not None and target is not None and same(source, target))
    task = utterance.taskname or ("asr" if alike else "ast")
    slots = {"source_lang": source, "target_lang": target, "task": task, "pnc": utterance.pnc}
    return {name: value for name, value in slots.items() if value is not None}


def prompt_ids(tokenizer: Tokenizer, name: str, slots: Mapping[str, str]) -> list[int]:
    """Return the ids of the prompt of format ``name``; slots that are not given have their defaults.

    Raises ConfigError for an unknown format, slot or value, and for a language that the tokenizer lacks.
    """
    if name not in FORMATS:
        raise ConfigError(f"'{name}' is not a prompt format; there are {', '.join(FORMATS)}")
    unknown = slots.keys() - DEFAULTS.keys() - {"source_lang", "target_lang", "prompt_language"}
    if unknown:
        raise ConfigError(f"{', '.join(sorted(unknown))}: not a slot of prompts; there are {', '.join(DEFAULTS)}")
    spoken, written = slots.get("source_lang"), slots.get("target_lang")
    if name in TRANSCRIBING and spoken and written and not same(spoken, written):
        raise ConfigError(f"this model transcribes and does not translate: it cannot write {written} of {spoken}")
    slots = {**DEFAULTS, **slots}
    ids: list[int] = []
    for part in FORMATS[name]:
        if part in CONTEXTS:
            ids += _context(tokenizer, part, slots)
            continue
        token = part if part.startswith(("<|", "▁")) else _token(name, part, slots)
        if token and part in LANGUAGES:
            ids.append(_language_id(tokenizer, token))
        elif token:
            ids.append(tokenizer.special_id(token))
    return ids


def _language_id(tokenizer: Tokenizer, token: str) -> int:
    """Return the id of a language's token, in any spelling of the language."""
    written = token.removeprefix("<|").removesuffix("|>")
    found = find(written, tokenizer.languages)
    if found is not None:
        return tokenizer.special_id(f"<|{found}|>")
    try:
        return tokenizer.special_id(token)  # not the code of a language, such as <|unklang|>
    except ConfigError:
        resolve(written, tokenizer.languages)  # which raises
        raise


def _context(tokenizer: Tokenizer, slot: str, slots: Mapping[str, str]) -> list[int]:
    """Return the ids of earlier text; Whisper's begins with a token and a space."""
    text = slots[slot]
    if not text:
        return []
    if slot == "prevtext":
        return [tokenizer.special_id("<|startofprev|>"), *tokenizer.encode(" " + text.strip())]
    return tokenizer.encode(text, slots.get("target_lang"))


def _token(name: str, slot: str, slots: Mapping[str, str]) -> str:
    """Return the special token of a slot's value; "" where the format writes none."""
    if slot not in slots:
        raise ConfigError(f"the prompt needs {slot}: give 'lang' in the manifest, or --language")
    value = slots[slot]
    if value.startswith("<|"):
        return value
    if name.startswith("whisper") and slot == "timestamp":
        return "" if value in TRUE else "<|notimestamps|>"
    if slot in FLAGS:
        return f"<|{slot}|>" if value in (*TRUE, slot) else f"<|no{slot}|>"
    if slot == "task":
        if value not in TASKS:
            raise ConfigError(f"'{value}' is not a task; there are {', '.join(TASKS)}")
        return TASKS[value]
    return f"<|{value}|>"
