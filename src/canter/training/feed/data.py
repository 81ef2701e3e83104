"""Rows of the length index to padded micro-batches, which worker processes decode ahead of training."""

import copy
import errno
import math
import multiprocessing
import os
import queue
import resource
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field, replace
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np
import soxr
import torch
from torch import Tensor

from canter.corpus.audio import load_utterance
from canter.corpus.index import LengthIndex
from canter.corpus.manifest import Problem, Utterance
from canter.errors import AudioError, CanterError, ConfigError, ManifestError
from canter.models.batch import Batch
from canter.planning.budget import Budget
from canter.planning.plan import Plan, Position
from canter.planning.sampler import PlannedStep, Stepper
from canter.processes import end_with_parent, ignore_signals
from canter.ranks import SINGLE_RANK, Ranks
from canter.text import Characters, Tokenizer
from canter.training.feed.augment import Augmentation
from canter.training.feed.speed import speeds_of

SECONDS_TOLERANCE = 0.25  # between the duration in a manifest and that of the audio
RELATIVE_TOLERANCE = 0.1
MAX_NAMED = 8  # files that a message names
MORE_FILES = "raise the limit on open files (ulimit -n) or use fewer --workers"
NOTICE_SECONDS = 30.0  # between messages while a run waits for data
STOP_SECONDS = 10.0  # that a run which was asked to stop waits for the data of the current step
POLL_SECONDS = 0.5  # between looks at the clock and at signals
LOOK_SECONDS = 10.0  # that count as waiting between two looks; in more this process was stopped, as by Ctrl-Z
CLOSE_SECONDS = 5.0  # that data workers have to end by themselves
ASK_SECONDS = 2.0  # to find out the name of a file that is waited for
PREFETCH = 8  # micro-batches that a worker loads ahead
TENSORS = 8  # tensors of a micro-batch, each of which a worker hands over as an open file
OTHER_FILES = 64  # files that a process has open besides those, with a margin
T = TypeVar("T")


@dataclass(frozen=True)
class Address:
    """Micro-batch of a run: its optimiser step, its number in the step and its rows (B,).

    A rank without a micro-batch in a step has an address without rows.
    """

    step: int
    number: int
    last: bool
    """True for this rank's last micro-batch of the step."""
    rows: np.ndarray
    epoch: int = 0
    """Epoch that speeds and masks are drawn for."""


class Steps(Stepper):
    """A `Stepper` that gives addresses, by which the micro-batches are loaded."""

    def __init__(self, plan: Plan, ranks: Ranks = SINGLE_RANK, memory: Budget | None = None) -> None:
        super().__init__(plan, ranks.rank, ranks.size, memory)

    def addresses(self, start: dict[str, object] | None, epoch: int, step: int) -> Iterator[Address]:
        """Yield this rank's micro-batches from a step of the run on, without end.

        ``start``: the saved position of the step in the epoch; None is the epoch's beginning. A step in which the rank
        has no micro-batch yields one address without rows. Raises PlanError for a plan without a step.
        """
        self.epoch, self.number = epoch, step
        self.start = None if start is None else Position.from_json(start)
        for planned in self.draw():
            mine = planned.micro_batches(self.rank, self.ranks)
            # speeds and masks are drawn for each epoch, or for each window of an endless stream
            draw = planned.window if planned.plan.endless else planned.epoch
            for batch in mine:
                yield Address(planned.number, batch.number, batch.number == mine[-1].number, batch.rows, draw)
            if not mine:
                yield Address(planned.number, -1, True, planned.rows[0][:0], draw)

    @staticmethod
    def position(start: dict[str, object] | None, plan: Plan) -> Position | None:
        """Return a saved position as one of ``plan``, whose budget may have been tightened since."""
        if start is None:
            return None
        place = Position.from_json(start)
        return Position(place.epoch, place.window, place.step, plan.fingerprint)

    def taken(self, step: int) -> PlannedStep:
        """Return the step, which is now taken."""
        planned = self.take()
        assert planned.number == step, f"step {planned.number} was drawn and step {step} taken"
        return planned


@dataclass(frozen=True)
class Loaded:
    """A micro-batch read from disk; ``batch`` is None if none of its utterances can be used."""

    address: Address
    batch: Batch | None
    skipped: list[Problem]
    fatal: CanterError | None = None
    """Error that ends the run; the training process raises it, as messages of workers are hard to read."""
    unaugmented: list[Problem] = field(default_factory=list)
    """Noise and impulse responses that could not be read; their utterances are in the batch without them."""

    def pin_memory(self) -> "Loaded":  # DataLoader calls it for a GPU
        return self if self.batch is None else replace(self, batch=self.batch.pin_memory())


@dataclass(frozen=True)
class Example:
    """Audio and targets of an utterance."""

    audio: np.ndarray  # (S,) float32
    tokens: list[int]
    prompt: int
    """Number of tokens at the start that bear no loss."""
    characters: list[int]
    row: int


class MicroBatches(torch.utils.data.Dataset):
    """Dataset of micro-batches by address. A file that cannot be used is skipped and named, never fatal."""

    def __init__(
        self,
        index: LengthIndex,
        tokenizer: Tokenizer,
        ctc_targets: Characters | Tokenizer | None,
        sample_rate: int,
        speeds: tuple[float, ...] = (),
        seed: int = 0,
        longest_seconds: float = math.inf,
        most_tokens: float = math.inf,
        augmentation: Augmentation | None = None,
    ):
        """Take what makes the targets of CTC from a text, and the model's maximum seconds and tokens, prompt and end
        token included."""
        self.index, self.tokenizer, self.ctc_targets = index, tokenizer, ctc_targets
        self.sample_rate, self.speeds, self.seed = sample_rate, speeds, seed
        self.longest_seconds, self.most_tokens = longest_seconds, most_tokens
        self.augmentation = augmentation
        self.reading: Tensor | None = None
        """Row that each worker is reading, -1 for none: (workers,), in shared memory."""

    def __getitem__(self, address: Address) -> Loaded:
        examples, skipped, unaugmented = [], [], []
        speeds = np.ones(len(address.rows))
        if self.speeds:
            speeds = speeds_of(address.rows, self.seed, address.epoch, self.speeds)
        for row, speed in zip(address.rows.tolist(), speeds.tolist()):
            self._note(row)
            try:
                utterance = self.index.utterance(row)
            except ManifestError as error:  # not one bad file: the plan belongs to another manifest
                return Loaded(address, None, skipped, error)
            try:
                example = self.example(utterance, row, speed)
                if self.augmentation is not None:
                    audio, failed = self.augmentation.apply(example.audio, address.epoch, row)
                    for file, reason in failed:
                        if _out_of_files(reason):
                            raise reason
                        unaugmented.append(Problem(file, row, str(reason)))
                    example = replace(example, audio=audio)
                examples.append(example)
            except AudioError as error:
                if _out_of_files(error):  # not one bad file
                    return Loaded(address, None, skipped, CanterError(f"{error}; {MORE_FILES}"))
                skipped.append(Problem(utterance.audio_filepath, row, str(error)))
        self._note(-1)
        batch = collate(examples, self.tokenizer.pad) if examples else None
        return Loaded(address, batch, skipped, unaugmented=unaugmented)

    def _note(self, row: int) -> None:
        if self.reading is not None:
            worker = torch.utils.data.get_worker_info()
            self.reading[worker.id if worker else 0] = row

    def being_read(self) -> str:
        """Return the rows that workers are reading, with their files."""
        rows = [row for row in ([] if self.reading is None else self.reading.tolist()) if row >= 0]
        return ", ".join(f"row {row} ({self.index.utterance(row).audio_filepath})" for row in rows[:MAX_NAMED])

    def example(self, utterance: Utterance, row: int = -1, speed: float = 1.0) -> Example:
        """Return audio and targets of an utterance at ``speed``.

        Raises AudioError for a file that cannot be used, is silent, or differs from the duration in the manifest (for
        which the plan was made) by more than a tenth and 0.25 s; and for audio or text longer than the model takes.
        """
        audio = load_utterance(utterance, self.sample_rate)
        seconds = len(audio) / self.sample_rate
        if abs(seconds - utterance.duration) > max(SECONDS_TOLERANCE, RELATIVE_TOLERANCE * utterance.duration):
            raise AudioError(
                f"{utterance.audio_filepath}: duration is {utterance.duration:g} s in the manifest, but the audio "
                f"has {seconds:.2f} s; correct the manifest"
            )
        if not audio.any():
            raise AudioError(f"{utterance.audio_filepath} is silent: every sample is 0; leave it out")
        if speed != 1:
            audio = soxr.resample(audio, self.sample_rate * speed, self.sample_rate, quality="HQ")
        prompt, text = prompt_and_text(self.tokenizer, utterance)
        tokens = [*prompt, *text, self.tokenizer.end]
        self.check_length(utterance, audio, len(tokens))
        characters = self.ctc_targets.encode(utterance.text) if self.ctc_targets else []
        start = self.tokenizer.loss_after
        without_loss = len(prompt) if start is None else prompt.index(start) + 1
        return Example(audio, tokens, without_loss, characters, row)

    def check_length(self, utterance: Utterance, audio: np.ndarray, tokens: int) -> None:
        """Raise AudioError for audio or text, with prompt and end token, that is longer than the model takes."""
        if len(audio) > self.longest_seconds * self.sample_rate:
            raise AudioError(
                f"{utterance.audio_filepath}: {len(audio) / self.sample_rate:.2f} s are more than the "
                f"{self.longest_seconds:g} s that the model takes; cut it"
            )
        if tokens > self.most_tokens:
            raise AudioError(
                f"{utterance.audio_filepath}: its text has {tokens} tokens with prompt and end, more than the "
                f"{self.most_tokens} that the model has positions for; cut it"
            )


def prompt_and_text(tokenizer: Tokenizer, utterance: Utterance) -> tuple[list[int], list[int]]:
    """Return the token ids of an utterance's prompt and of its text.

    Raises AudioError, naming the utterance, for a language or task that the tokenizer does not have.
    """
    try:
        return tokenizer.prompt(utterance), tokenizer.encode(utterance.text, utterance.text_lang)
    except (CanterError, ValueError, KeyError) as error:
        raise AudioError(f"{utterance.audio_filepath}: prompt cannot be made: {error}") from None


def collate(examples: Sequence[Example], pad: int) -> Batch:
    """Return a batch of B examples, padded on the right."""

    def lengths(items: Iterable[Sized]) -> Tensor:
        return torch.tensor([len(item) for item in items])

    def padded(items: Sequence[object], dtype: torch.dtype, value: int) -> Tensor:
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


# -- loading ahead --


class StoppedWaitingError(Exception):
    """The run was asked to stop, and the data of the current step did not come in time."""


@dataclass(frozen=True)
class Patience:
    """Limits and messages of waiting for data."""

    limit: float = 300.0
    """Seconds after which the run ends."""
    stopping: Callable[[], bool] = lambda: False
    """Return whether the run was asked to stop."""
    warn: Callable[[str], None] = lambda _: None


class _Done:
    """End of the iterator."""


class Puller(Generic[T]):
    """Reader of an iterator in a thread, so that the caller can stop waiting for a value.

    ``children`` are the processes behind the iterator, which are killed if they do not end by themselves.
    ``being_read`` returns what they are reading; it runs in another thread, as it may wait for the same storage.
    """

    def __init__(self, values: Iterator[T], children: list[BaseProcess], being_read: Callable[[], str] = lambda: ""):
        self.children, self.being_read = children, being_read
        self.asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self.given: queue.SimpleQueue[T | _Done | BaseException] = queue.SimpleQueue()
        self.hangs = False
        self.thread = threading.Thread(target=_pull, args=([values], self.asked, self.given), daemon=True)
        self.thread.start()

    def next(self, patience: Patience) -> T:
        """Return the next value.

        Raises StopIteration at the end, CanterError after ``patience.limit`` seconds, StoppedWaitingError some seconds
        after the run was asked to stop, and what the iterator raises.
        """
        self.asked.put(True)
        last = time.monotonic()
        waited = warned = stopped = 0.0
        while True:
            try:
                value = self.given.get(timeout=POLL_SECONDS)
            except queue.Empty:
                pass
            else:
                if isinstance(value, _Done):
                    raise StopIteration
                if isinstance(value, BaseException):
                    raise value
                return value
            now = time.monotonic()
            waited += min(now - last, LOOK_SECONDS)
            last = now
            if patience.stopping():
                stopped = stopped or now
                if now - stopped >= STOP_SECONDS:
                    self.hangs = True
                    raise StoppedWaitingError
            if waited >= patience.limit:
                self.hangs = True
                raise CanterError(
                    f"no data for {waited:.0f} s{self._reading()}; make the storage answer or remove these rows, "
                    "and the same command resumes from the checkpoint saved now; --data-timeout sets the limit"
                )
            if waited - warned >= NOTICE_SECONDS:
                warned = waited
                patience.warn(
                    f"waiting for data for {waited:.0f} s{self._reading()}; the run ends after "
                    f"{patience.limit:g} s (--data-timeout)"
                )

    def close(self) -> None:
        """End the iterator and the processes behind it within some seconds."""
        self.asked.put(False)
        if not self.hangs:
            self.thread.join(CLOSE_SECONDS)
        # what hangs: a reference to a raised exception, too, keeps the iterator and its processes alive
        for child in self.children:
            if child.is_alive():
                child.kill()  # data workers ignore SIGTERM, and the interpreter waits for them when it exits

    def _reading(self) -> str:
        files = answer_within(ASK_SECONDS, self.being_read)
        return f", while reading {files}" if files else ""


def _pull(values: list[Iterator[T]], asked: queue.SimpleQueue, given: queue.SimpleQueue) -> None:
    """Answer each request with a value, an exception, or _Done. The iterator ends with this thread."""
    iterator = values.pop()
    while asked.get():
        try:
            given.put(next(iterator))
        except StopIteration:
            given.put(_Done())
        except BaseException as error:  # raised again by `Puller.next`
            given.put(error)


def answer_within(seconds: float, work: Callable[[], T]) -> T | None:
    """Return ``work()``, computed in a thread, or None if it takes longer or fails."""
    answers: queue.SimpleQueue[T] = queue.SimpleQueue()

    def compute() -> None:
        try:
            answers.put(work())
        except Exception:
            return

    threading.Thread(target=compute, daemon=True).start()
    try:
        return answers.get(timeout=seconds)
    except queue.Empty:
        return None


def children_of(start: Callable[[], T]) -> tuple[T, list[BaseProcess]]:
    """Return ``start()`` and the processes that it started."""
    before = set(multiprocessing.active_children())
    value = start()
    return value, [child for child in multiprocessing.active_children() if child not in before]


def prefetch_within_limit(workers: int, held: int, warn: Callable[[str], None] = lambda _: None) -> int:
    """Return the number of micro-batches that each worker may load ahead within the limit on open files.

    held: number of micro-batches that the training process uses at a time. Raises ConfigError if not even one fits: a
    worker that cannot hand over a batch would leave the run waiting forever.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return PREFETCH
    mine = (limit - len(os.listdir("/dev/fd")) - OTHER_FILES) // TENSORS - held
    prefetch = min(PREFETCH, mine // workers, (limit - OTHER_FILES) // TENSORS)
    if prefetch < 1:
        needed = (workers + held) * TENSORS + 2 * OTHER_FILES
        raise ConfigError(
            f"--workers {workers} needs about {needed} open files, and this process may have {limit}: raise the limit "
            f"(ulimit -n {max(1024, 2 * needed)}) or use fewer --workers; --workers 0 needs none"
        )
    if prefetch < PREFETCH:
        warn(
            f"at most {limit} open files (ulimit -n): each of {workers} workers loads {prefetch} instead of {PREFETCH} "
            "micro-batches ahead"
        )
    return prefetch


def start_worker(_: int) -> None:
    """Make a data worker end with its training process, and not before.

    Ctrl-C reaches every process of a terminal and SLURM's SIGTERM every process of a job, but the current step still
    needs its data.
    """
    ignore_signals(signal.SIGINT, signal.SIGTERM)
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def except_when_orphaned(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        parent.join(timeout=1.0)
        if parent.is_alive():
            sys.__excepthook__(kind, error, traceback)
        else:
            os._exit(1)

    sys.excepthook = except_when_orphaned
    end_with_parent()  # DataLoader's watchdog observes the fork server, which waits for the workers


def _start_server() -> None:
    """Start the process that workers are forked from with SIGTERM blocked, which reaches all processes of a job."""
    resource_tracker.ensure_running()  # it sets its own mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Stream(torch.utils.data.Sampler):
    def __init__(self, addresses: Iterator[Address]):
        self.addresses = addresses

    def __iter__(self) -> Iterator[Address]:
        return self.addresses


def _out_of_files(error: BaseException) -> bool:
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
    """Yield micro-batches in the order of ``addresses``, decoded by ``workers`` processes (0: a thread of this one).

    held: number of them that are in use at a time. Raises CanterError if data does not come within ``patience.limit``,
    and StoppedWaitingError if the run is asked to stop while it waits.
    """
    patience = patience or Patience()
    dataset = copy.copy(dataset)
    dataset.reading = torch.full((max(1, workers),), -1).share_memory_()
    context: dict[str, Any] = {}
    if workers:
        prefetch = prefetch_within_limit(workers, held, patience.warn)
        _start_server()
        context = {"multiprocessing_context": "forkserver", "prefetch_factor": prefetch, "worker_init_fn": start_worker}
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "This DataLoader will create"
        )  # more workers than cores are the user's choice
        loader = torch.utils.data.DataLoader(
            dataset, sampler=_Stream(addresses), batch_size=None, num_workers=workers, pin_memory=pin, **context
        )
        micro_batches, children = children_of(lambda: iter(loader))
    puller = Puller(micro_batches, children, dataset.being_read)
    del micro_batches  # it must end with the puller
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
                f"a data worker died: {error}. Was it out of memory? Try fewer --workers; the same command resumes "
                "from the last checkpoint"
            ) from None
        raise
    finally:
        puller.close()


def _next_of(puller: Puller[Loaded], patience: Patience) -> Loaded | None:
    """Return the next micro-batch, or None at the end, as a generator must not raise StopIteration."""
    try:
        return puller.next(patience)
    except StopIteration:
        return None
