"""Fine-tune Whisper with transformers' Seq2SeqTrainer under a plan, at the clips' own lengths instead of 30 s each.

python examples/finetune_whisper.py --model openai/whisper-tiny.en --manifest train.jsonl --output FOLDER
torchrun --nproc-per-node 4 examples/finetune_whisper.py ...      the same steps on 4 processes

To resume, run it again with more --steps. The trained model is in FOLDER/model.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from transformers import Seq2SeqTrainingArguments, WhisperForConditionalGeneration, WhisperProcessor
from transformers.trainer_utils import get_last_checkpoint

import canter
from canter.integrations.transformers_trainer import (
    PlannedSeq2SeqTrainer,
    SpeechCollator,
    SpeechDataset,
    accept_short_audio,
)


@dataclass(frozen=True)
class Options:
    model: str
    """Folder or hub name of a Whisper, as from_pretrained takes it."""
    manifest: Path
    """Training data; clips of 30 s at most."""
    output: Path
    """Folder for checkpoints, the length index and the trained model."""
    steps: int = 1000
    """Optimiser steps."""
    save_every: int = 500
    """Optimiser steps between checkpoints."""
    learning_rate: float = 1e-5
    """Peak learning rate; it falls linearly to 0."""
    batch_seconds: float = 60.0
    """Seconds of audio in a micro-batch, padding included; set it to what fits into memory."""
    micro_batches: int = 1
    """Micro-batches in an optimiser step, over all processes."""


def main(options: Options) -> None:
    args = Seq2SeqTrainingArguments(
        str(options.output),
        max_steps=options.steps,
        learning_rate=options.learning_rate,
        save_steps=options.save_every,
        logging_steps=1,
        remove_unused_columns=False,  # the collator needs the audio, which is no argument of the model
        report_to="none",
        use_cpu=not torch.cuda.is_available(),  # without this, several CPU processes would not find each other
    )
    processor = WhisperProcessor.from_pretrained(options.model)
    model = WhisperForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32)

    # the plan, from the lengths of all clips and transcripts and the size of a micro-batch (20 ms a frame)
    lengths = options.output / "lengths.arrow"
    if args.process_index == 0:
        options.output.mkdir(parents=True, exist_ok=True)
        canter.build_index(options.manifest, lengths, tokenizer=options.model)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    index = canter.LengthIndex.open(lengths)
    budget = canter.Budget.from_batch_seconds(options.batch_seconds, frame_seconds=0.02)

    trainer = PlannedSeq2SeqTrainer(
        model=accept_short_audio(model),
        args=args,
        plan=canter.Plan(index, budget, micro_batches_per_step=options.micro_batches),
        train_dataset=SpeechDataset(index, processor.tokenizer),
        data_collator=SpeechCollator(processor.feature_extractor, model.config.decoder_start_token_id, padded=False),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(args.output_dir))
    trainer.save_model(str(options.output / "model"))
    if trainer.is_world_process_zero():
        processor.save_pretrained(options.output / "model")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
