"""Whisper fine-tuned by transformers' Seq2SeqTrainer under a plan, at the clips' own lengths instead of 30 s each.

python examples/finetune_whisper.py --model openai/whisper-tiny.en --manifest train.jsonl --output FOLDER
torchrun --nproc-per-node 4 examples/finetune_whisper.py ...      the same steps, shared out

Run it again with more --steps, and it goes on where it stopped. FOLDER/model is what it leaves.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from transformers import Seq2SeqTrainingArguments, WhisperForConditionalGeneration, WhisperProcessor
from transformers.trainer_utils import get_last_checkpoint

from canter.corpus.build import build_index
from canter.corpus.index import LengthIndex
from canter.integrations.transformers_trainer import (
    PlannedSeq2SeqTrainer,
    SpeechCollator,
    SpeechDataset,
    accept_short_audio,
)
from canter.planning import Budget, Plan
from canter.text import WhisperTokenizer


@dataclass(frozen=True)
class Options:
    model: str
    """Folder or name of a Whisper, as from_pretrained takes it."""
    manifest: Path
    """Training data; clips of 30 s at most."""
    output: Path
    """Checkpoints, the length index, the finished model."""
    steps: int = 1000
    """Updates in all."""
    save_every: int = 500
    """Updates between checkpoints."""
    learning_rate: float = 1e-5
    """Falls linearly to 0."""
    batch_seconds: float = 60.0
    """Audio in a micro-batch, padding included: what the memory holds."""
    micro_batches: int = 1
    """In an update, over all processes."""


def main(options: Options) -> None:
    args = Seq2SeqTrainingArguments(
        str(options.output),
        max_steps=options.steps,
        learning_rate=options.learning_rate,
        save_steps=options.save_every,
        logging_steps=1,
        remove_unused_columns=False,  # the collator wants the audio, which is no argument of the model
        report_to="none",
        use_cpu=not torch.cuda.is_available(),  # or else several processes take each other for one
    )
    processor = WhisperProcessor.from_pretrained(options.model)
    model = WhisperForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32)

    # the plan: how long every clip and its text are, and how much fits in a micro-batch (20 ms a frame)
    lengths = options.output / "lengths.arrow"
    if args.process_index == 0:
        options.output.mkdir(parents=True, exist_ok=True)
        tokenizer = WhisperTokenizer(processor.tokenizer.backend_tokenizer.to_str())
        prompt = len(processor.tokenizer("").input_ids) - 1  # but for the end token
        build_index([options.manifest], lengths, tokenizer, prompt_tokens=prompt)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    index = LengthIndex.open(lengths)
    budget = Budget.from_batch_seconds(options.batch_seconds, frame_seconds=0.02)

    trainer = PlannedSeq2SeqTrainer(
        model=accept_short_audio(model),
        args=args,
        plan=Plan(index, budget, micro_batches_per_step=options.micro_batches),
        train_dataset=SpeechDataset(index, processor.tokenizer),
        data_collator=SpeechCollator(
            processor.feature_extractor, model.config.decoder_start_token_id, padded=False
        ),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(args.output_dir))
    trainer.save_model(str(options.output / "model"))
    if trainer.is_world_process_zero():
        processor.save_pretrained(options.output / "model")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
