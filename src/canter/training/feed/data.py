"""Rows of the length index to padded micro-batches, decoded ahead by worker processes."""

import copy
import errno
import math
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import forkserver, resource_tracker
from typing import Any

import numpy as np
import soxr
import torch
from torch import Tensor

from canter.corpus.audio import load_utterance
from canter.corpus.index import LengthIndex
from canter.corpus.manifest import Problem, Utterance
from canter.errors import AudioError, CanterError, ManifestError
from canter.models.batch import Batch
from canter.processes import end_with_parent, ignore_signals
from canter.text import Characters, Tokenizer
from canter.training.feed.speed import speeds_of
from canter.training.feed.waiting import Patience, Puller, children_of, prefetch_within_limit

SECONDS_TOLERANCE = 0.25
SHARE_TOLERANCE = 0.1
MOST_NAMED = 8  # files that a message names
MORE_FILES = "raise the limit on open files (ulimit -n) or take fewer --workers"


@dataclass(frozen=True)
class Address:
    """Which micro-batch of the run: its optimiser step, its place in the step and its rows (B,), none where the rank
    has nothing to do in the step."""

    step: int
    number: int
    last: bool
    """Whether it is the last of this rank's in the step."""
    rows: np.ndarray
    epoch: int = 0
    """By which speeds and masks are drawn."""


@dataclass(frozen=True)
class Loaded:
    """A micro-batch read from disk; ``batch`` is None where none of its utterances could be used."""

    address: Address
    batch: Batch | None
    skipped: list[Problem]
    fatal: CanterError | None = None
    """What the run cannot go on with; raised in the training process, where it reads better than in a worker."""

    def pin_memory(self) -> "Loaded":
        """DataLoader asks for it where the device is a GPU."""
        return self if self.batch is None else replace(self, batch=self.batch.pin_memory())


@dataclass(frozen=True)
class Example:
    audio: np.ndarray  # (S,) float32
    tokens: list[int]
    prompt: int
    characters: list[int]
    row: int


class MicroBatches(torch.utils.data.Dataset):
    """Reads the micro-batch at an address. A file that cannot be used is skipped and named, never fatal."""

    def __init__(
        self,
        index: LengthIndex,
        tokenizer: Tokenizer,
        characters: Characters | None,
        sample_rate: int,
        speeds: tuple[float, ...] = (),
        seed: int = 0,
        longest_seconds: float = math.inf,
        most_tokens: float = math.inf,
    ):
        """``longest_seconds`` and ``most_tokens``, prompt and end token included, are the model's."""
        self.index, self.tokenizer, self.characters = index, tokenizer, characters
        self.sample_rate, self.speeds, self.seed = sample_rate, speeds, seed
        self.longest_seconds, self.most_tokens = longest_seconds, most_tokens
        self.reading: Tensor | None = None
        """Row that each worker is reading, -1 for none (workers,), in memory that they share."""

    def __getitem__(self, address: Address) -> Loaded:
        examples, skipped = [], []
        speeds = np.ones(len(address.rows))
        if self.speeds:
            speeds = speeds_of(address.rows, self.seed, address.epoch, self.speeds)
        for row, speed in zip(address.rows.tolist(), speeds.tolist()):
            self._note(row)
            try:
                utterance = self.index.utterance(row)
            except ManifestError as error:  # not one bad file: the whole plan is of another manifest
                return Loaded(address, None, skipped, error)
            try:
                examples.append(self.example(utterance, row, speed))
            except AudioError as error:
                if _out_of_files(error):  # not one bad file
                    return Loaded(address, None, skipped, CanterError(f"{error}; {MORE_FILES}"))
                skipped.append(Problem(utterance.audio_filepath, row, str(error)))
        self._note(-1)
        return Loaded(address, collate(examples, self.tokenizer.pad) if examples else None, skipped)

    def _note(self, row: int) -> None:
        if self.reading is not None:
            worker = torch.utils.data.get_worker_info()
            self.reading[worker.id if worker else 0] = row

    def being_read(self) -> str:
        """Return the rows that are being read now, with their files."""
        rows = [row for row in ([] if self.reading is None else self.reading.tolist()) if row >= 0]
        return ", ".join(f"row {row} ({self.index.utterance(row).audio_filepath})" for row in rows[:MOST_NAMED])

    def example(self, utterance: Utterance, row: int = -1, speed: float = 1.0) -> Example:
        """Audio and targets of one utterance, spoken ``speed`` times as fast. Raises AudioError where the file is
        unusable, silent throughout, or longer or shorter than the manifest says by over a tenth and 0.25 s: the plan
        was made for the stated length; and where audio or text are longer than the model takes."""
        audio = load_utterance(utterance, self.sample_rate)
        seconds = len(audio) / self.sample_rate
        if abs(seconds - utterance.duration) > max(SECONDS_TOLERANCE, SHARE_TOLERANCE * utterance.duration):
            raise AudioError(
                f"{utterance.audio_filepath}: duration is {utterance.duration:g} s in the manifest, but the audio "
                f"has {seconds:.2f} s; correct the manifest"
            )
        if not audio.any():
            raise AudioError(f"{utterance.audio_filepath} is silent: every sample is 0; leave it out")
        if speed != 1:
            audio = soxr.resample(audio, self.sample_rate * speed, self.sample_rate, quality="HQ")
        if len(audio) > self.longest_seconds * self.sample_rate:
            raise AudioError(
                f"{utterance.audio_filepath}: {len(audio) / self.sample_rate:.2f} s are more than the "
                f"{self.longest_seconds:g} s that the model takes; cut it"
            )
        prompt, text = prompt_and_text(self.tokenizer, utterance)
        tokens = [*prompt, *text, self.tokenizer.end]
        if len(tokens) > self.most_tokens:
            raise AudioError(
                f"{utterance.audio_filepath}: its text has {len(tokens)} tokens with prompt and end, more than the "
                f"{self.most_tokens} that the model has positions for; cut it"
            )
        characters = self.characters.encode(utterance.text) if self.characters else []
        return Example(audio, tokens, len(prompt), characters, row)


def prompt_and_text(tokenizer: Tokenizer, utterance: Utterance) -> tuple[list[int], list[int]]:
    """Return the token ids of an utterance's prompt and of its text. Raises AudioError, naming the utterance, where its
    language or task is none of the tokenizer's."""
    try:
        return tokenizer.prompt(utterance), tokenizer.encode(utterance.text, utterance.text_lang)
    except (CanterError, ValueError, KeyError) as error:
        raise AudioError(f"{utterance.audio_filepath}: prompt cannot be made: {error}") from None


def collate(examples: Sequence[Example], pad: int) -> Batch:
    """Pads B examples on the right."""

    def lengths(items: Iterable[Any]) -> Tensor:
        return torch.tensor([len(item) for item in items])

    def padded(items: Sequence[Any], dtype: torch.dtype, value: int) -> Tensor:
        tensors = [torch.as_tensor(item, dtype=dtype) for item in items]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    audio = [e.audio for e in examples]
    tokens, characters = [e.tokens for e in examples], [e.characters for e in examples]
    return Batch(
        audio=padded(audio, torch.float32, 0),
        audio_lengths=lengths(audio),
        tokens=padded(tokens, torch.long, pad),
        token_lengths=lengths(tokens),
        prompt_lengths=torch.tensor([e.prompt for e in examples]),
        characters=padded(characters, torch.long, 0),
        character_lengths=lengths(characters),
        rows=torch.tensor([e.row for e in examples]),
    )


def start_worker(_: int) -> None:
    """Has a data worker end with the process that it works for, however that ends, and not before: Ctrl-C reaches
    every process of a terminal, SLURM's SIGTERM every process of a job; the step in hand still needs its data."""
    ignore_signals(signal.SIGINT, signal.SIGTERM)
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def complain(*what: Any) -> None:
        """A thread that was handing over a batch when the other process ended has nothing to say."""
        parent.join(timeout=1.0)
        if parent.is_alive():
            sys.__excepthook__(*what)
        else:
            os._exit(1)

    sys.excepthook = complain
    end_with_parent()  # DataLoader's own watchdog looks at the fork server, which waits for the workers


def _start_server() -> None:
    """Starts the process that workers are forked from with SIGTERM blocked: it would end by what reaches all processes
    of a job, and the workers after it."""
    resource_tracker.ensure_running()  # it sets the mask for itself
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Stream(torch.utils.data.Sampler):
    """An iterator of addresses, as DataLoader wants it."""

    def __init__(self, addresses: Iterator[Address]):
        self.addresses = addresses

    def __iter__(self) -> Iterator[Address]:
        return self.addresses


def _out_of_files(error: BaseException) -> bool:
    """Return whether a file could not be opened because too many are open."""
    cause = error.__context__
    return isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE)


def load_ahead(
    dataset: MicroBatches,
    addresses: Iterator[Address],
    workers: int,
    pin: bool = False,
    patience: Patience | None = None,
    held: int = 1,
) -> Generator[Loaded]:
    """Micro-batches in the order of ``addresses``, decoded by ``workers`` processes (0: a thread of this one).

    ``held`` of them are in use at a time. Raises CanterError where data does not come within ``patience.limit``, and
    StoppedWaitingError where the run is asked to stop while it waits.
    """
    patience = patience or Patience()
    dataset = copy.copy(dataset)
    dataset.reading = torch.full((max(1, workers),), -1).share_memory_()
    context: dict[str, Any] = {}
    if workers:
        prefetch = prefetch_within_limit(workers, held, patience.say)
        _start_server()
        context = {
            "multiprocessing_context": "forkserver",
            "prefetch_factor": prefetch,
            "worker_init_fn": start_worker,
        }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores is the user's choice
        loader = torch.utils.data.DataLoader(
            dataset,
            sampler=_Stream(addresses),
            batch_size=None,
            num_workers=workers,
            pin_memory=pin,
            **context,
        )
        micro_batches, children = children_of(lambda: iter(loader))
    puller = Puller(micro_batches, children, dataset.being_read)
    del micro_batches  # it ends with the puller
    try:
        while (one := _next_of(puller, patience)) is not None:
            if one.fatal is not None:
                raise one.fatal
            yield one
    except RuntimeError as error:
        if "Too many open files" in str(error):
            raise CanterError(f"data workers have too many open files; {MORE_FILES}") from None
        if "DataLoader worker" in str(error):
            raise CanterError(
                f"a data worker died: {error}. Was it out of memory? Try fewer --workers; the run continues where "
                "its last checkpoint is"
            ) from None
        raise
    finally:
        puller.close()


def _next_of(puller: Puller[Loaded], patience: Patience) -> Loaded | None:
    """Return the next micro-batch, None at the end: a generator must not raise StopIteration."""
    try:
        return puller.next(patience)
    except StopIteration:
        return None
