"""Prompt formats: what a decoder reads before it writes, made of slots (language, task, punctuation, ...).

`canary` (canary-1b) and `canary2` (the flash and v2 models) follow NVIDIA's Canary, `whisper` follows
OpenAI's. A format is a row of special tokens and slot names; the values of slots are words such as "en",
"asr", "yes", or special tokens written out, "<|en|>".
"""

from collections.abc import Mapping
from typing import Protocol

from canter.corpus.manifest import Utterance
from canter.errors import ConfigError
from canter.text.languages import find, is_said, resolve, same

FORMATS = {
    "canary": ("<|startoftranscript|>", "source_lang", "task", "target_lang", "pnc"),
    "canary2": (
        "<|startofcontext|>", "decodercontext", "<|startoftranscript|>", "emotion", "source_lang",
        "target_lang", "pnc", "itn", "timestamp", "diarize",
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
FLAGS = ("pnc", "itn", "timestamp", "diarize")
CONTEXTS = ("decodercontext", "prevtext")
LANGUAGES = ("source_lang", "target_lang")


class Vocabulary(Protocol):
    """What a prompt needs of a tokenizer."""

    @property
    def languages(self) -> tuple[str, ...]: ...

    def encode(self, text: str, lang: str | None = None) -> list[int]: ...

    def special_id(self, token: str) -> int: ...


def utterance_slots(utterance: Utterance) -> dict[str, str]:
    """The slots that an utterance fills: languages (`lang` stands for both), task and punctuation.

    Without `taskname`, an utterance whose two languages differ is a translation. Of one, the language written says
    nothing of the language spoken. Languages stay as they are written; "auto" is none.
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


def prompt_ids(vocabulary: Vocabulary, name: str, slots: Mapping[str, str]) -> list[int]:
    """Token ids of the prompt of format `name`; slots that are not given have their defaults.

    Raises ConfigError for an unknown format, slot or value, or a language that the tokenizer lacks.
    """
    if name not in FORMATS:
        raise ConfigError(f"'{name}' is not a prompt format; there are {', '.join(FORMATS)}")
    unknown = slots.keys() - DEFAULTS.keys() - {"source_lang", "target_lang", "prompt_language"}
    if unknown:
        raise ConfigError(f"{', '.join(sorted(unknown))}: not a slot of prompts; there are {', '.join(DEFAULTS)}")
    slots = {**DEFAULTS, **slots}
    ids: list[int] = []
    for part in FORMATS[name]:
        if part in CONTEXTS:
            ids += _context(vocabulary, part, slots)
            continue
        token = part if part.startswith("<|") else _token(name, part, slots)
        if token and part in LANGUAGES:
            ids.append(_language_id(vocabulary, token))
        elif token:
            ids.append(vocabulary.special_id(token))
    return ids


def _language_id(vocabulary: Vocabulary, token: str) -> int:
    """The id of a language's token, however the language is written in it."""
    written = token.removeprefix("<|").removesuffix("|>")
    found = find(written, vocabulary.languages)
    if found is not None:
        return vocabulary.special_id(f"<|{found}|>")
    try:
        return vocabulary.special_id(token)  # of no language that has a code, such as <|unklang|>
    except ConfigError:
        resolve(written, vocabulary.languages)  # which raises
        raise


def _context(vocabulary: Vocabulary, slot: str, slots: Mapping[str, str]) -> list[int]:
    """Earlier text, in the target language; Whisper's has a token and a space in front."""
    text = slots[slot]
    if not text:
        return []
    if slot == "prevtext":
        return [vocabulary.special_id("<|startofprev|>"), *vocabulary.encode(" " + text.strip())]
    return vocabulary.encode(text, slots.get("target_lang"))


def _token(name: str, slot: str, slots: Mapping[str, str]) -> str:
    """The special token of a slot's value; empty where the format writes nothing."""
    if slot not in slots:
        raise ConfigError(f"the prompt needs {slot}: give 'lang' in the manifest, or --lang")
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
