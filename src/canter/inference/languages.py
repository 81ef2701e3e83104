"""Language rules: what decides in which language a recording is transcribed, and whether it is translated.

The first of these that applies decides:

1. the recording's row in a manifest, or the request to the service;
2. the default of the user (`--language`, ``language=``);
3. the only language of a model that knows one;
4. detection, by a multilingual Whisper or OWSM (`canter.inference.engine.language`).

A model that needs a language and cannot detect it refuses recordings without one. `canter.text.languages` reads codes
and names of languages.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from canter.corpus.manifest import Utterance
from canter.errors import ConfigError
from canter.inference.engine import language
from canter.text.languages import canonical, is_said, resolve, same, shortened
from canter.text.owsm import OwsmTokenizer
from canter.text.prompts import TASKS, TRANSCRIBING, utterance_slots
from canter.text.seamless import SeamlessTokenizer
from canter.text.tokenizer import Tokenizer
from canter.text.whisper import WhisperTokenizer

Task = Literal["transcribe", "translate"]
Probabilities = tuple[float, tuple[float, ...]]
"""Seconds of a part of the audio, and the probability of each language in it."""


def detects_language(tokenizer: Tokenizer) -> bool:
    """Return True for a model that detects the language of a recording: a multilingual Whisper, or OWSM."""
    return tokenizer.detects_language and len(tokenizer.languages) > 1


def translation_targets(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return the languages that a model may translate into, of those that it knows; none for Cohere Transcribe."""
    if isinstance(tokenizer, OwsmTokenizer):
        return tokenizer.translations
    return () if getattr(tokenizer, "prompt_format", None) in TRANSCRIBING else tokenizer.languages


def prompts_written_language(tokenizer: Tokenizer) -> bool:
    """Return True for a model whose prompt names only the language that is written: Seamless."""
    return isinstance(tokenizer, SeamlessTokenizer)


@dataclass(frozen=True)
class Defaults:
    """Language and task of recordings that name none."""

    language: str | None = None
    """Language spoken."""
    task: Task | None = None
    target_language: str = "en"
    """Language written, if the task is to translate."""
    required: tuple[str, ...] = field(default=(), compare=False)
    """Languages of a model that must be given one of them; empty where none is needed."""
    written_only: bool = field(default=False, compare=False)
    """True for a model whose translations need only the language written, such as Seamless."""

    @classmethod
    def of(
        cls, tokenizer: Tokenizer, language: str | None, task: Task | None = None, target_language: str = "en"
    ) -> "Defaults":
        """Return the defaults of a user for a model, with languages in the model's own codes.

        Raises ConfigError for languages that the model does not know, and for a translation that it cannot make.
        """
        known = tokenizer.languages
        only_english = isinstance(tokenizer, WhisperTokenizer) and not tokenizer.multilingual
        spoken = known[0] if len(known) == 1 or only_english else None  # whatever was added to English
        required = known if spoken is None and known and not detects_language(tokenizer) else ()
        if is_said(language):
            spoken = spoken_language(tokenizer, language)
        if task != "translate":
            return cls(spoken, task, required=required, written_only=prompts_written_language(tokenizer))
        if len(known) < 2:
            raise ConfigError("this model knows only one language and cannot translate; leave the task out")
        targets = translation_targets(tokenizer)
        if not targets:
            raise ConfigError("this model transcribes and does not translate; leave the task out")
        written = resolve(target_language, targets)
        if isinstance(tokenizer, WhisperTokenizer) and not same(written, "en"):
            raise ConfigError(f"a Whisper translates only into English, not into {target_language!r}")
        return cls(spoken, task, written, required, prompts_written_language(tokenizer))

    def complete(self, utterance: Utterance) -> Utterance:
        """Return the utterance with unset fields taken from the defaults.

        Raises ConfigError where the model needs a language and there is none; a target language is not enough.
        """
        stated = map(is_said, (utterance.lang, utterance.source_lang, utterance.target_lang))
        changes: dict[str, str] = {}
        if self.language and not any(stated):
            changes["lang"] = self.language
        if self.task and not utterance.taskname:
            changes["taskname"] = self.task
            if self.task == "translate" and not is_said(utterance.target_lang):
                source = next(filter(is_said, (utterance.source_lang, utterance.lang, self.language)), None)
                changes |= {"source_lang": source} if source else {}
                changes["target_lang"] = self.target_language
        found = replace(utterance, **changes) if changes else utterance
        slots = utterance_slots(found)
        translated = self.written_only and TASKS.get(slots["task"]) == TASKS["translate"]
        if self.required and ("target_lang" if translated else "source_lang") not in slots:
            raise ConfigError(
                f"{utterance.audio_filepath} names no language, and the model knows {shortened(self.required)}: give "
                "'lang' in the manifest, or --language"
            )
        return found


def spoken_language(tokenizer: Tokenizer, name: str) -> str:
    """Return the model's code of a language; for a model without a list of languages the usual code.

    Raises ConfigError for a language that the model does not know.
    """
    if tokenizer.languages:
        return resolve(name, tokenizer.languages)
    code = canonical(name)
    if code is None:
        raise ConfigError(f"{name!r} is not the name or code of a language")
    try:
        tokenizer.prompt_ids({"source_lang": code, "target_lang": code})
    except ConfigError:
        resolve(name, ())  # raises an error that lists the languages
    return code


def read_languages(tokenizer: Tokenizer, named: str | Iterable[str] | None) -> tuple[str | None, tuple[str, ...]]:
    """Return the language that a user names, and those among which to detect it if there are several, in the model's
    own codes. One text may name several, separated by commas.

    Raises ConfigError for languages that the model does not know, and for several of a model that cannot detect them.
    """
    texts = [named] if isinstance(named, str) or named is None else [*named]
    names = [name.strip() for text in texts if is_said(text) for name in str(text).split(",")]
    if len(names) < 2:
        return (names[0] if names else None), ()
    if not detects_language(tokenizer):
        raise ConfigError(f"this model cannot detect which of {', '.join(names)} is spoken; name one language")
    codes = tuple(dict.fromkeys(spoken_language(tokenizer, name) for name in names))
    return (codes[0], ()) if len(codes) == 1 else (None, codes)


def languages_to_detect(tokenizer: Tokenizer, slots: Mapping[str, str], among: Sequence[str] = ()) -> Sequence[str]:
    """Return the languages among which to detect the one of a recording, by default all; none where its prompt slots
    name one, or the model does not detect languages."""
    known = among or tokenizer.languages
    return known if detects_language(tokenizer) and "source_lang" not in slots else ()


def detected_language(languages: Sequence[str], parts: Iterable[Probabilities]) -> tuple[str, float] | None:
    """Return the most probable one of the ``languages`` over all speech of a recording, and its probability; None where
    nothing was detected."""
    found = language.spoken(parts)
    return (_code(languages[found[0]]), found[1]) if found else None


def language_probabilities(languages: Sequence[str], parts: Iterable[Probabilities]) -> tuple[tuple[str, float], ...]:
    """Return each of the ``languages`` with its probability over all speech of a recording, the most probable first;
    empty where nothing was detected."""
    found = zip(map(_code, languages), language.weighted_mean(parts).tolist())
    return tuple(sorted(found, key=lambda one: -one[1]))


def language_in_prompt(tokenizer: Tokenizer, prompt: Iterable[int]) -> str | None:
    """Return the language that the prompt of a model which detects languages names."""
    if not detects_language(tokenizer):
        return None
    named = set(prompt)
    return next((_code(name) for name in tokenizer.languages if tokenizer.special_id(f"<|{name}|>") in named), None)


def _code(name: str) -> str:
    """Return the usual code of a language of a model: OWSM writes "deu"."""
    return canonical(name) or name
