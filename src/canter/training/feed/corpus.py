"""A run's training data before it is batched: its rows, the tokenizer, the length index; found, or made once."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from canter.corpus.build import build_index
from canter.corpus.columns import Columns
from canter.corpus.counting import PromptCheck, prompt_length
from canter.corpus.index import VERIFIED_ROWS, LengthIndex
from canter.corpus.manifest import Problem, Utterance, no_usable_row
from canter.corpus.mixture import Group, leaves, sources_of
from canter.corpus.sources import open_source, read_unit, units_of
from canter.models.hub import checkpoint_of
from canter.models.model import SpeechModel
from canter.text import Characters, load_tokenizer, train_tokenizer
from canter.text.tokenizer import Tokenizer
from canter.training.config import TrainConfig
from canter.training.feed.data import prompt_and_text
from canter.training.run.folder import Run


def columns_of(config: TrainConfig) -> Columns:
    """Return the columns that the configuration names."""
    return Columns(config.text_column or "", config.lang_column or "", config.audio_column or "")


def utterances(config: TrainConfig) -> Iterator[Utterance]:
    """The rows of the training manifests, with the tags of their sources."""
    sources = sources_of(config.manifest, columns_of(config))
    for source in leaves(sources) if isinstance(sources, Group) else sources:
        for row in open_source(source.path, audio=source.audio, columns=source.columns):
            if isinstance(row, Utterance):
                yield source.tagged(row)


Numbered = tuple[str, int, Utterance | Problem]
"""The file that a row is of, its line, and what it holds."""


def validation_rows(config: TrainConfig) -> list[Numbered]:
    """Return the rows of the validation manifests. Raises ManifestError for one that has none to use."""
    found: list[Numbered] = []
    columns = columns_of(config)
    for path in config.valid:
        for unit in units_of(str(path), columns=columns):
            found += ((unit.path, line, row) for line, row in read_unit(unit, columns=columns))
    return found


def usable_rows(
    rows: Iterable[Numbered], tokenizer: Any, longest_seconds: float, most_tokens: float
) -> tuple[list[Utterance], list[Problem]]:
    """Return the utterances that the model can take, by what their rows say, and a problem for each other row.

    Raises ManifestError where there are rows but none can be used.
    """
    usable: list[Utterance] = []
    problems: list[Problem] = []
    prompts = PromptCheck(tokenizer)
    for file, line, row in rows:
        if isinstance(row, Problem):
            problems.append(row)
            continue
        reason = prompts.fault(row)
        if reason is None and row.duration > longest_seconds:
            reason = f"longer than the model takes: {row.duration:g} s, at most {longest_seconds:g} s"
        if reason is None and math.isfinite(most_tokens):
            prompt, text = prompt_and_text(tokenizer, row)
            count = len(prompt) + len(text) + 1  # the end token
            if count > most_tokens:
                reason = f"more tokens than the model has positions for: {count}, at most {most_tokens}"
        if reason is None:
            usable.append(row)
        else:
            problems.append(Problem(file, line, reason))
    if problems and not usable:
        raise no_usable_row("--valid", problems)
    return usable, problems


def find_tokenizer(
    config: TrainConfig, run: Run, initial: SpeechModel | None, say: Callable[[str], None]
) -> tuple[Tokenizer, Characters]:
    """The run's tokenizer and alphabet: those of --init or --tokenizer, or made from the transcripts, once."""
    if initial is not None and "characters" not in initial.supports:
        return initial.tokenizer, Characters("")  # another library's, which its checkpoints bring along
    folder = run.folder / "tokenizer"
    if config.init is not None and initial is not None and not (folder / "characters.json").exists():
        alphabet = Characters("")  # without a CTC head nothing is written in characters
        if initial.ctc is not None:
            alphabet = Characters.load(checkpoint_of(config.init))
        folder.mkdir(exist_ok=True)
        initial.tokenizer.save(folder)
        alphabet.save(folder)
    if not (folder / "characters.json").exists():
        texts: list[str] = []
        languages: set[str] = set()
        for row in utterances(config):
            texts.append(row.text)
            languages |= {lang for lang in (row.lang, row.source_lang, row.target_lang) if lang}
        folder.mkdir(exist_ok=True)
        if config.tokenizer is not None:
            load_tokenizer(config.tokenizer).save(folder)
        else:
            with warnings.catch_warnings(record=True) as notices:
                warnings.simplefilter("always")
                trained = train_tokenizer(texts, languages, config.vocabulary, folder)
            for notice in notices:
                say(str(notice.message))
            say(f"tokenizer of {trained.vocab_size} tokens trained on {len(texts)} transcripts")
        Characters.of(texts).save(folder)
    return load_tokenizer(folder), Characters.load(folder)


def find_index(config: TrainConfig, run: Run, tokenizer: Tokenizer) -> LengthIndex:
    """The run's length index, built where it is not there yet."""
    path = run.folder / "lengths.arrow"
    if path.exists():
        index = LengthIndex.open(path)
        if run.writes and len(index) > VERIFIED_ROWS:
            index.verify()
        return index
    return build_index(
        sources_of(config.manifest, columns_of(config)),
        path,
        tokenizer,
        prompt_tokens=prompt_length(tokenizer, utterances(config)),
        progress=True,
    )
