"""The Trainer under a plan, with a small random Whisper whose dropout and masks would betray any lost randomness."""

import json
import logging
import multiprocessing
import os
from collections import Counter

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from canter.corpus.index import LengthIndex  # noqa: E402
from canter.errors import PlanError  # noqa: E402
from canter.integrations.transformers_trainer import PlannedSeq2SeqTrainer, SpeechCollator, accept_short_audio  # noqa: E402
from canter.planning import Budget, Plan  # noqa: E402

START, END, ROWS, SECONDS = 1, 2, 23, 2.0


def whisper(dropout=0.1):
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=40, pad_token_id=0, bos_token_id=START, eos_token_id=END, decoder_start_token_id=START,
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=20, max_source_positions=100,
        max_target_positions=40, suppress_tokens=None, begin_suppress_tokens=None, dropout=dropout,
        apply_spec_augment=dropout > 0, mask_time_prob=0.2, mask_time_length=5, mask_time_min_masks=1,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


class Clips(torch.utils.data.Dataset):
    """Noise of half a second to two, with labels; remembers which rows were read."""

    def __init__(self):
        random = np.random.default_rng(3)
        self.seconds = random.uniform(0.3, 1.9, ROWS).astype(np.float32)
        self.tokens = random.integers(3, 12, ROWS)
        self.read = []

    def __len__(self):
        return ROWS

    def __getitem__(self, row):
        self.read.append(row)
        random = np.random.default_rng(row)
        audio = random.normal(size=int(self.seconds[row] * 16000)).astype(np.float32)
        return {"audio": audio, "labels": [START, *random.integers(3, 40, self.tokens[row] - 2).tolist(), END]}


def plan_of(clips, strategy="random", **options):
    # about four utterances a micro-batch: 23 of them make six, so the last step has two for M = 4
    return Plan(
        LengthIndex(clips.seconds, clips.tokens, ["x"]),
        Budget.from_batch_seconds(8.0, frame_seconds=0.02),
        strategy,
        **{"micro_batches_per_step": 4, "seed": 5} | options,
    )


def collator(padded=False):
    return SpeechCollator(transformers.WhisperFeatureExtractor(20, chunk_length=2), START, padded)


def trainer_of(folder, steps, dropout=0.1, padded=False, workers=0, plan=None, **settings):
    clips = Clips()
    args = transformers.Seq2SeqTrainingArguments(
        output_dir=str(folder), max_steps=steps, learning_rate=3e-3, logging_steps=1, use_cpu=True,
        report_to="none", disable_tqdm=True, save_strategy=settings.pop("save_strategy", "no"), seed=7,
        dataloader_num_workers=workers, lr_scheduler_type="constant", remove_unused_columns=False, **settings,
    )  # fmt: skip
    return PlannedSeq2SeqTrainer(
        model=accept_short_audio(whisper(dropout)),
        args=args,
        plan=plan or plan_of(clips),
        train_dataset=clips,
        data_collator=collator(padded),
    )


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def test_rows_are_the_plans_and_the_gradient_is_that_of_the_step(tmp_path):
    trainer = trainer_of(tmp_path, 2, dropout=0.0)
    before = whisper(0.0)
    trainer.train()
    plan = trainer.plan
    assert len(plan) == 2
    rows = [rows.tolist() for step in plan for rows in step]
    read = trainer.train_dataset.read
    assert read[: sum(map(len, rows))] == [row for batch in rows for row in batch]
    assert sorted(read[:ROWS]) == list(range(ROWS))
    # the loss by hand: all of the step's utterances, one by one, over the step's labels
    clips, total, count = Clips(), 0.0, 0
    for rows in plan.step(0):
        batch = collator()([clips[row] for row in rows.tolist()])
        logits = accept_short_audio(before)(**batch).logits.detach()
        labels = batch["labels"]
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        count += int((labels != -100).sum())
    assert losses(trainer)[0] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("stop", [3, 4])  # in the middle of an epoch, and at its end
def test_resumes_to_the_same_bits(tmp_path, stop):
    whole = trainer_of(tmp_path / "whole", 6)
    whole.train()
    first = trainer_of(tmp_path / "cut", stop, save_strategy="steps", save_steps=stop)
    first.train()
    again = trainer_of(tmp_path / "cut", 6, workers=2)
    again.train(resume_from_checkpoint=True)
    assert losses(again) == losses(whole)
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(again).items())
    assert len(set(losses(whole))) == 6


def test_a_checkpoint_of_another_plan_is_refused(tmp_path):
    trainer_of(tmp_path, 1, save_strategy="steps", save_steps=1).train()
    other = trainer_of(tmp_path, 2, plan=plan_of(Clips(), seed=6))
    with pytest.raises(PlanError, match="another plan"):
        other.train(resume_from_checkpoint=True)


def take_part(folder, rank, ranks, address, steps, resume):
    """One process of several; writes what it read and its losses."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    os.environ |= {
        "OMP_NUM_THREADS": "1",  # accelerate warns where it is not set
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(address),
    }  # fmt: skip
    torch.set_num_threads(1)
    trainer = trainer_of(
        folder, steps, save_strategy="steps", save_steps=steps, ddp_backend="gloo", ddp_find_unused_parameters=False
    )
    trainer.train(resume_from_checkpoint=resume)
    result = {"read": trainer.train_dataset.read, "losses": losses(trainer)}
    (folder / f"rank{rank}-{steps}.json").write_text(json.dumps(result))
    if rank == 0:
        torch.save(weights(trainer), folder / f"weights-{steps}.pt")
    torch.distributed.destroy_process_group()


def together(folder, address, ranks, steps, resume=False):
    context = multiprocessing.get_context("fork")
    folder.mkdir(exist_ok=True)
    processes = [
        context.Process(target=take_part, args=(folder, rank, ranks, address, steps, resume)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(1800)
    assert [process.exitcode for process in processes] == [0] * ranks
    return [json.loads((folder / f"rank{rank}-{steps}.json").read_text()) for rank in range(ranks)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking a process that has threads
def test_two_processes_take_the_same_steps(tmp_path, free_port):
    """Six steps of one process; and three of two, gone on with by three, which do not divide M."""
    alone = trainer_of(tmp_path / "alone", 6)
    alone.train()
    with free_port() as port:
        two = together(tmp_path / "more", port, 2, 3)
    with free_port() as port:
        three = together(tmp_path / "more", port, 3, 6, resume=True)
    assert two[0]["losses"] == pytest.approx(losses(alone)[:3], rel=1e-5)
    assert three[0]["losses"] == pytest.approx(losses(alone), rel=1e-5)
    shared = torch.load(tmp_path / "more" / "weights-6.pt", weights_only=True)
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(shared[name], tensor, rtol=1e-4, atol=1e-5)
    steps = [step for epoch in (0, 1) for step in alone.plan.at_epoch(epoch)]
    wanted = Counter(row for step in steps[:3] for rows in step for row in rows.tolist())
    extra = Counter(row for rank in two for row in rank["read"]) - wanted
    assert set(extra) <= {int(Clips().seconds.argmin())}  # what stands in for an empty batch


def test_settings_without_effect_are_named(tmp_path):
    with pytest.warns(UserWarning, match="gradient_accumulation_steps=3: has no effect"):
        trainer = trainer_of(tmp_path, 1, gradient_accumulation_steps=3)
    assert trainer.args.gradient_accumulation_steps == 4
    index = LengthIndex(Clips().seconds[1:], Clips().tokens[1:], ["x"])
    plan = Plan(index, Budget.from_batch_seconds(8.0))
    with pytest.raises(PlanError, match="train_dataset has 23 rows and the plan's index 22"):
        trainer_of(tmp_path, 1, plan=plan)


def test_evaluates_and_predicts_as_ever(tmp_path):
    trainer = trainer_of(tmp_path, 1, dropout=0.0, predict_with_generate=True, generation_max_length=8)
    trainer.eval_dataset = torch.utils.data.Subset(Clips(), range(6))
    trainer.train()
    metrics = trainer.evaluate()
    assert np.isfinite(metrics["eval_loss"])
    assert trainer.predict(trainer.eval_dataset).predictions.shape[0] == 6


def test_short_audio_and_thirty_seconds(caplog):
    """At full length the output is unchanged; at its own length an utterance equals one with positions removed."""
    plain, short = whisper(0.0).eval(), accept_short_audio(whisper(0.0)).eval()
    example = [Clips()[4]]
    full = collator(padded=True)(example)
    assert full["input_features"].shape[-1] == 200
    assert torch.equal(plain(**full).logits, short(**full).logits)
    own = collator(padded=False)(example)
    assert own["input_features"].shape[-1] < 200
    assert short(**own).logits.shape == plain(**full).logits.shape
    with pytest.raises(ValueError, match="expects the mel input features"):
        plain(**own)
    assert short.state_dict().keys() == plain.state_dict().keys()
    assert short.config.max_source_positions == 100
    long = {"audio": np.zeros(48000, np.float32), "labels": [START, 5, END]}
    with caplog.at_level(logging.WARNING, "canter.integrations.transformers_trainer"):
        assert torch.equal(collator()([long, *example])["labels"], collator()(example)["labels"])
        assert (collator()([long])["labels"] == -100).all()
    assert "1 utterances are longer than the model's 2 s and left out" in caplog.text


@pytest.mark.parametrize(("name", "value"), [("seconds", 2.5), ("tokens", 41)])
def test_what_the_model_cannot_take_is_in_no_batch(tmp_path, caplog, name, value):
    clips = Clips()
    getattr(clips, name)[7] = value
    with caplog.at_level(logging.WARNING, "canter.integrations.transformers_trainer"):
        trainer = trainer_of(tmp_path, 2, plan=plan_of(clips))
    assert f"1 of {ROWS} utterances are in no batch" in caplog.text
    trainer.train()
    assert set(trainer.train_dataset.read) == set(range(ROWS)) - {7}


class Stream(torch.utils.data.IterableDataset):
    """Read from front to back."""

    def __iter__(self):
        return iter(Clips())


@pytest.mark.parametrize("kind", ["torch", "datasets", "none"])
def test_data_without_rows_by_number_is_refused_in_one_line(tmp_path, kind):
    datasets = pytest.importorskip("datasets")
    stream = datasets.IterableDataset.from_generator(lambda: iter(Clips())) if kind == "datasets" else Stream()
    args = transformers.Seq2SeqTrainingArguments(output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to="none")
    message = "give the Trainer its train_dataset" if kind == "none" else r"train_dataset is a \w+ \w+, .*streaming"
    data = None if kind == "none" else stream
    with pytest.raises(PlanError, match=message):
        PlannedSeq2SeqTrainer(whisper(), args, collator(), data, plan=plan_of(Clips()))
