"""Training data of a run before it is batched: rows of manifests, tokenizer and length index."""

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Never

from canter.corpus.build import index_sources
from canter.corpus.columns import Columns
from canter.corpus.counting import PromptCheck, prompt_length
from canter.corpus.index import VERIFIED_ROWS, LengthIndex
from canter.corpus.manifest import Problem, Utterance, no_usable_row
from canter.corpus.mixture import Group, leaves, sources_of
from canter.corpus.sources import open_source, read_unit, units_of
from canter.events import QUIET, Events
from canter.models.hub import checkpoint_of
from canter.models.protocol import AnyModel
from canter.text import Characters, load_tokenizer, train_tokenizer
from canter.text.tokenizer import Tokenizer
from canter.training.config import TrainConfig
from canter.training.feed.augment import EFFECTS, Augmentation, AugmentFiles
from canter.training.feed.data import MicroBatches, prompt_and_text

Numbered = tuple[str, int, Utterance | Problem]
"""File, line and content of a row."""


@dataclass(frozen=True)
class TrainingData:
    """Data of a run, from its manifests to micro-batches."""

    tokenizer: Tokenizer
    characters: Characters
    """Alphabet of the CTC head."""
    index: LengthIndex
    valid: list[Utterance]
    """Usable rows of --valid."""
    micro_batches: MicroBatches


def load_data(
    config: TrainConfig,
    model: AnyModel,
    index: LengthIndex,
    characters: Characters,
    rows: Iterable[Numbered],
    files: AugmentFiles,
) -> tuple[TrainingData, list[Problem]]:
    """Return the training data for ``model``, and a problem for each row of --valid that cannot be used.

    files: noise and impulse responses of the augmentation.

    Raises ManifestError if --valid has rows but none can be used.
    """
    assert model.tokenizer is not None
    valid, problems = usable_rows(rows, model.tokenizer, model.longest_seconds, model.positions)
    ctc_targets = characters if "characters" in model.supports else model.tokenizer
    on = any(getattr(config.augment, effect) for effect in EFFECTS)
    augmentation = Augmentation(config.augment, files, config.seed, model.sample_rate) if on else None
    micro_batches = MicroBatches(
        index,
        model.tokenizer,
        ctc_targets if config.loss.ctc_weight else None,
        model.sample_rate,
        config.augment.speed,
        config.seed,
        model.longest_seconds,
        model.positions,
        augmentation,
    )
    return TrainingData(model.tokenizer, characters, index, valid, micro_batches), problems


def columns_of(config: TrainConfig) -> Columns:
    return Columns(config.text_column or "", config.language_column or "", config.audio_column or "")


def utterances(config: TrainConfig) -> Iterator[Utterance]:
    """Yield the rows of the training manifests, with the tags of their sources."""
    sources = sources_of(config.manifest, columns_of(config))
    for source in leaves(sources) if isinstance(sources, Group) else sources:
        for row in open_source(source.path, audio=source.audio, columns=source.columns):
            if isinstance(row, Utterance):
                yield source.tagged(row)


def validation_rows(config: TrainConfig) -> list[Numbered]:
    """Return the rows of the validation manifests. Raise ManifestError for a manifest without a usable row."""
    found: list[Numbered] = []
    columns = columns_of(config)
    for path in config.valid:
        for unit in units_of(str(path), columns=columns):
            found += ((unit.path, line, row) for line, row in read_unit(unit, columns=columns))
    return found


def usable_rows(
    rows: Iterable[Numbered], tokenizer: Tokenizer, longest_seconds: float, most_tokens: float
) -> tuple[list[Utterance], list[Problem]]:
    """Return the utterances whose rows fit the model, and a problem for each other row.

    Raises ManifestError if there are rows but none can be used.
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
    config: TrainConfig, folder: Path, initial: AnyModel | None = None, events: Events[Never] = QUIET
) -> tuple[Tokenizer, Characters]:
    """Return tokenizer and alphabet: those of --init or --tokenizer, or trained on the transcripts.

    ``folder`` keeps them, and once it does, they are read from there.
    """
    if initial is not None and "characters" not in initial.supports:  # a library's: its checkpoints include it
        assert initial.tokenizer is not None
        return initial.tokenizer, Characters("")
    kept = folder / "tokenizer"
    if not (kept / "characters.json").exists():
        kept.mkdir(exist_ok=True)
        if config.init is not None and initial is not None:
            assert initial.tokenizer is not None
            initial.tokenizer.save(kept)
            characters = Characters.load(checkpoint_of(config.init)) if initial.ctc is not None else Characters("")
        else:
            characters = _make_tokenizer(config, kept, events)
        characters.save(kept)
    return load_tokenizer(kept), Characters.load(kept)


def _make_tokenizer(config: TrainConfig, folder: Path, events: Events[Never]) -> Characters:
    """Write the tokenizer of --tokenizer, or one trained on the transcripts; return their alphabet."""
    texts: list[str] = []
    languages: set[str] = set()
    for row in utterances(config):
        texts.append(row.text)
        languages |= {lang for lang in (row.lang, row.source_lang, row.target_lang) if lang}
    if config.tokenizer is not None:
        load_tokenizer(config.tokenizer).save(folder)
    else:
        with warnings.catch_warnings(record=True) as notices:
            warnings.simplefilter("always")
            trained = train_tokenizer(texts, languages, config.vocab_size, folder)
        for notice in notices:
            events.message(str(notice.message))
        events.message(f"tokenizer of {trained.vocab_size} tokens trained on {len(texts)} transcripts")
    return Characters.of(texts)


def find_index(
    config: TrainConfig, folder: Path, tokenizer: Tokenizer, events: Events[Never] = QUIET, verify: bool = True
) -> LengthIndex:
    """Return the length index of the training data in ``folder``, which is built if it is not there yet.

    verify: check the content of a large index too.
    """
    path = folder / "lengths.arrow"
    if path.exists():
        index = LengthIndex.open(path)
        if verify and len(index) > VERIFIED_ROWS:
            index.verify()
    else:
        index = index_sources(
            sources_of(config.manifest, columns_of(config)),
            path,
            tokenizer,
            prompt_tokens=prompt_length(tokenizer, utterances(config)),
            progress=True,
        )
    if index.problems:
        listed = path.with_name("lengths.skipped.jsonl")
        events.message(f"{len(index.problems)} rows left out, listed in {listed}: {index.problems[0]}")
    return index
