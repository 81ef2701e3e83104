"""transformers' Trainer under a plan, with an exact resume.

B: utterances, S: samples, F: feature frames (10 ms), M: mel bins, T: encoder frames, U: tokens.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import (
    PreTrainedModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.trainer_utils import TrainOutput, get_last_checkpoint

from canter.corpus.audio import load_utterance
from canter.corpus.index import LengthIndex
from canter.errors import ConfigError, PlanError
from canter.files import write_text
from canter.planning.plan import Plan
from canter.planning.sampler import StepSampler
from canter.planning.windows import mix

STATE = "canter_plan.json"  # in a checkpoint, beside trainer_state.json
IGNORED = -100  # a label that bears no loss
WHISPER_FRAME_SECONDS = 0.02  # per encoder position
Model = TypeVar("Model", bound=PreTrainedModel)
logger = logging.getLogger(__name__)


class PlanTrainerMixin:
    """Mixin that makes a Trainer train by a plan: ``class Mine(PlanTrainerMixin, Seq2SeqTrainer)``.

    The rows of the plan's index are those of ``train_dataset``, in order. The dataset, the collator (which must return
    ``labels``), callbacks and everything else are the Trainer's. The mixin changes this:

    - A step is one of the plan: its M micro-batches are distributed over the processes by predicted time, which sets
      ``gradient_accumulation_steps``. A process without a micro-batch runs one that bears no loss.
      ``per_device_train_batch_size`` has no effect.
    - Batches do not pass through Accelerate, which would distribute them a second time.
    - The loss is the cross-entropy summed over the step and divided by the step's labels over all processes, label
      smoothing included. Some models of transformers, such as Whisper, divide by the labels of each micro-batch.
    - Utterances that the model has no positions for are left out of the plan, and counted in the log.
    - Dropout and masks are drawn from (seed, step, micro-batch). So a run resumed with
      ``train(resume_from_checkpoint=...)`` takes the same steps as one that never stopped. On another number of
      processes, losses agree up to the order of float additions. A checkpoint of another plan is refused.

    An epoch of the Trainer has the number of steps of the plan's first epoch (see ``StepSampler``).

    Raises PlanError if dataset and plan do not match, or if one process drives several GPUs.
    """

    args: Seq2SeqTrainingArguments
    state: TrainerState
    accelerator: Accelerator

    def __init__(self, *args: Any, plan: Plan, **kwargs: Any):
        settings = kwargs.get("args", args[1] if len(args) > 1 else None)
        if settings is None:
            raise PlanError("give the Trainer its TrainingArguments (args=...)")
        if settings.n_gpu > 1:
            raise PlanError(
                f"one process drives {settings.n_gpu} GPUs; start one for each with torchrun --nproc-per-node"
            )
        _refuse_streams(kwargs.get("train_dataset", args[3] if len(args) > 3 else None))
        plan = plan.within(*_limits_of(kwargs.get("model", args[0] if args else None)))
        if plan.model is not None:
            count = len(plan.left_out())
            logger.warning("%d of %d utterances are in no batch: the model cannot take them", count, len(plan.index))
        ranks, rank = settings.world_size, settings.process_index
        self._steps = StepSampler(plan, rank, ranks, first=self._first_step)
        _follow_the_plan(settings, self._steps.accumulation)
        kwargs.setdefault("compute_loss_func", self._summed_loss)
        super().__init__(*args, **kwargs)
        self.plan = plan
        if len(self.train_dataset) != len(plan.index):  # type: ignore[attr-defined]
            raise PlanError(
                f"train_dataset has {len(self.train_dataset)} rows and the plan's index {len(plan.index)}: "  # type: ignore[attr-defined]
                "they must be the same, in order"
            )
        self._drawn = (-1, 0)  # the step being taken, and the number of its micro-batches taken so far
        self.add_callback(_KeepPlan(plan.fingerprint))  # type: ignore[attr-defined]

    def _first_step(self) -> int:
        """Return the first step of the epoch that begins or is resumed now."""
        return self.state.global_step // self._steps.steps * self._steps.steps

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: object, **kwargs: object) -> TrainOutput:
        """Train as the Trainer does. Raises PlanError for a checkpoint of another plan."""
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)
        if folder and (held := Path(folder) / STATE).exists():
            before = json.loads(held.read_text(encoding="utf-8"))["plan"]
            if before != self.plan.fingerprint:
                raise PlanError(
                    f"{folder} was trained by another plan ({before}, this one is {self.plan.fingerprint}): index, "
                    "budget, strategy, seed, window and micro-batches per step must be those of the run"
                )
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of this process's micro-batches, which Accelerate has not prepared."""
        args = self.args
        dataset: Any = self.train_dataset  # type: ignore[attr-defined]
        if isinstance(dataset, datasets.Dataset) and args.remove_unused_columns:
            dataset = self._remove_unused_columns(dataset, description="training")  # type: ignore[attr-defined]
        lengths = np.asarray(self.plan.index.seconds)
        return DataLoader(
            dataset,  # pyright: ignore[reportArgumentType]
            batch_sampler=self._steps,
            collate_fn=_AllowEmpty(self.data_collator, dataset, int(lengths.argmin())),  # type: ignore[attr-defined]
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            generator=torch.Generator().manual_seed(self.plan.seed),  # does not touch torch's global one
        )

    def training_step(self, *args: object, **kwargs: object) -> Tensor:
        step, place = self._drawn
        if step != self.state.global_step:
            step, place = self.state.global_step, 0
        self._drawn = (step, place + 1)
        mine = self._steps.micro_batches(step)
        number = mine[place].number if place < len(mine) else self.plan.micro_batches_per_step
        set_seed(mix(self.args.seed, step, number) % 2**32)
        return super().training_step(*args, **kwargs)  # type: ignore[misc]

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: object, **kwargs: object) -> Tensor:
        if "decoder_input_ids" not in inputs and "labels" in inputs:
            inputs = {**inputs, "decoder_input_ids": self._shifted(inputs["labels"])}
        return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def _shifted(self, labels: Tensor) -> Tensor:
        """Return labels (B, U) as decoder inputs: shifted right behind the start token."""
        model: Any = self.accelerator.unwrap_model(self.model)  # type: ignore[attr-defined]
        start = model.config.decoder_start_token_id
        if start is None:
            raise PlanError(
                f"{type(model).__name__} has no decoder_start_token_id; let the collator give decoder_input_ids"
            )
        pad = model.config.pad_token_id
        shifted = torch.cat([labels.new_full((len(labels), 1), start), labels[:, :-1]], dim=1)
        return shifted.masked_fill(shifted == IGNORED, start if pad is None else pad)

    def _summed_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """Return the sum of the cross-entropy over labels (B, U), divided by the step's number of labels."""
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[1]
        total = F.cross_entropy(
            logits.float().flatten(0, 1),
            labels.flatten(),
            ignore_index=IGNORED,
            reduction="sum",
            label_smoothing=self.args.label_smoothing_factor,
        )
        return total / ((labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)


class PlannedSeq2SeqTrainer(PlanTrainerMixin, Seq2SeqTrainer):
    """The `Seq2SeqTrainer` of transformers, with ``plan=``."""


def _limits_of(model: object) -> tuple[float, float]:
    """Return the seconds of audio and the number of tokens that a model of transformers has positions for."""
    config = getattr(model, "config", None)
    seconds = math.inf
    if config is not None and getattr(config, "model_type", None) == "whisper":
        seconds = config.max_source_positions * WHISPER_FRAME_SECONDS
    tokens = getattr(config, "max_target_positions", None)
    return seconds, tokens if isinstance(tokens, int) else math.inf


def _refuse_streams(dataset: object) -> None:
    """Raise PlanError for training data that has no rows by number."""
    if dataset is None:
        raise PlanError("give the Trainer its train_dataset: the plan names rows of it")
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise PlanError(
            f"train_dataset is a {type(dataset).__module__.partition('.')[0]} {type(dataset).__name__}, which is read "
            "from front to back, and a plan names rows by number: load it without streaming=True, or save it to disk"
        )


def _follow_the_plan(settings: TrainingArguments, accumulation: int) -> None:
    """Set what the plan decides, and warn of settings that lose their effect."""
    ignored = []
    if settings.gradient_accumulation_steps not in (1, accumulation):
        ignored.append(f"gradient_accumulation_steps={settings.gradient_accumulation_steps}")
    sampling = getattr(settings, "train_sampling_strategy", "random")
    if sampling != "random":
        ignored.append(f"train_sampling_strategy={sampling}")
    if settings.auto_find_batch_size:
        ignored.append("auto_find_batch_size")
        settings.auto_find_batch_size = False
    if ignored:
        warnings.warn(
            f"{', '.join(ignored)}: has no effect, the plan decides what a step is", UserWarning, stacklevel=4
        )
    settings.gradient_accumulation_steps = accumulation
    settings.average_tokens_across_devices = True


class _KeepPlan(TrainerCallback):
    """Callback that writes the plan's fingerprint into each checkpoint."""

    def __init__(self, fingerprint: str):
        self.fingerprint = fingerprint

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            write_text(folder / STATE, json.dumps({"plan": self.fingerprint}) + "\n")


@dataclass
class _AllowEmpty:
    """Collator that makes a batch of no rows from the shortest row, without loss."""

    collate: Callable[[list[object]], dict[str, Tensor]]
    dataset: Dataset
    shortest: int

    def __call__(self, examples: list[object]) -> dict[str, Tensor]:
        if examples:
            return self.collate(examples)
        batch = self.collate([self.dataset[self.shortest]])
        batch["labels"] = torch.full_like(batch["labels"], IGNORED)
        return batch


class SpeechDataset(Dataset):
    """Rows of an index as ``{"audio": (S,) float32, "labels": token ids}``, for `SpeechCollator`.

    tokenizer: one of transformers; labels are its tokens of the text, special tokens included.
    """

    def __init__(self, index: LengthIndex, tokenizer: PreTrainedTokenizerBase, sample_rate: int = 16000):
        self.index, self.tokenizer, self.sample_rate = index, tokenizer, sample_rate

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Return the example of a row. Raises AudioError that names a file which cannot be used."""
        utterance = self.index.utterance(row)
        return {
            "audio": load_utterance(utterance, self.sample_rate),
            "labels": self.tokenizer(utterance.text).input_ids,
        }


@dataclass(frozen=True)
class SpeechCollator:
    """Collator of `SpeechDataset`: examples to ``input_features`` (B, M, F) and ``labels`` (B, U).

    extractor: that of Whisper. start: the token that decoding starts with, which is dropped from the labels because the
    model prepends it. padded: pad to the extractor's 30 s; otherwise to the longest example of the batch, which needs
    `accept_short_audio`.
    """

    extractor: Any
    start: int
    padded: bool = True

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        most = self.extractor.n_samples
        longest = max(len(example["audio"]) for example in examples)
        if longest > most:
            examples = self._short(examples, most / self.extractor.sampling_rate)
        features = self.extractor(
            [example["audio"] for example in examples],
            sampling_rate=self.extractor.sampling_rate,
            return_tensors="pt",
            padding="max_length" if self.padded else "longest",
            pad_to_multiple_of=None if self.padded else 2 * self.extractor.hop_length,
        ).input_features
        labels = [torch.tensor(example["labels"][example["labels"][0] == self.start :]) for example in examples]
        padded = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        return {"input_features": features, "labels": padded}

    def _short(self, examples: Sequence[dict[str, Any]], seconds: float) -> Sequence[dict[str, Any]]:
        """Return the examples that the model can take; if there are none, the start of the first, without loss."""
        most = self.extractor.n_samples
        kept = [example for example in examples if len(example["audio"]) <= most]
        logger.warning(
            "%d utterances are longer than the model's %g s and left out of a batch", len(examples) - len(kept), seconds
        )
        if kept:
            return kept
        first = examples[0]
        return [{"audio": first["audio"][:most], "labels": [IGNORED] * len(first["labels"])}]


class AnyLengthWhisperEncoder(WhisperEncoder):
    """Whisper's encoder of transformers for features (B, M, F) of any even F up to 3,000; see `accept_short_audio`."""

    def forward(self, input_features: Tensor, *args: object, **kwargs: object) -> object:
        positions, config = self.embed_positions, self.config
        frames = input_features.shape[-1] // 2
        self.config = copy.copy(config)
        self.config.max_source_positions = frames
        self.embed_positions = nn.Embedding.from_pretrained(positions.weight[:frames])
        try:
            return super().forward(input_features, *args, **kwargs)
        finally:
            self.embed_positions, self.config = positions, config


def accept_short_audio(model: Model) -> Model:
    """Let a Whisper of transformers, which insists on 30 s, encode shorter audio at its own length; return the model.

    Training then takes time for the utterances' durations instead of 30 s each. A pretrained model must be fine-tuned
    this way before it can transcribe this way (see docs/models.md). Its input is padded with silence to the longest
    utterance of the batch; `canter train` masks the padding instead.
    """
    encoder = model.get_encoder()
    if not isinstance(encoder, WhisperEncoder):
        raise ConfigError(f"{type(model).__name__} is not a Whisper of transformers")
    encoder.__class__ = AnyLengthWhisperEncoder
    return model
