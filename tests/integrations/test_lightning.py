"""A small model trained by Lightning under a plan."""

import json
import logging

import numpy as np
import pytest
import torch

pl = pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed (extra 'lightning')")

from canter.corpus.index import LengthIndex  # noqa: E402
from canter.corpus.manifest import Problem  # noqa: E402
from canter.errors import PlanError  # noqa: E402
from canter.integrations.lightning import PlanDataModule, PlanModule  # noqa: E402
from canter.models.decoder import DecoderConfig  # noqa: E402
from canter.models.features import WhisperFeatureConfig  # noqa: E402
from canter.models.model import ModelConfig, SpeechModel  # noqa: E402
from canter.models.whisper import WhisperEncoderConfig  # noqa: E402
from canter.planning import Budget, Plan  # noqa: E402
from canter.training.feed.data import Address, Example, Loaded, collate  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have"),
    pytest.mark.filterwarnings("ignore:.*TF32|.*isinstance.*LeafSpec", "ignore::DeprecationWarning"),
]
ROWS = 23
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


class Clips:
    """Noise by row, as `MicroBatches` would read it; remembers what was read, and cannot read row 3."""

    def __init__(self):
        random = np.random.default_rng(0)
        seconds, tokens = random.uniform(0.3, 1.9, ROWS), random.integers(4, 12, ROWS)
        self.index, self.read = LengthIndex(seconds, tokens, ["x"]), []

    def __getitem__(self, address):
        examples = []
        for row in address.rows.tolist():
            self.read.append((address.step, row))
            random = np.random.default_rng(row)
            audio = random.normal(size=int(self.index.seconds[row] * 16000)).astype(np.float32)
            tokens = [1, *random.integers(3, 40, int(self.index.tokens[row]) - 2).tolist(), 2]
            examples += [Example(audio, tokens, 1, [], row)] if row != 3 else []
        skipped = [Problem("3.wav", 3, "3.wav is silent")] if 3 in address.rows else []
        return Loaded(address, collate(examples, 0) if examples else None, skipped)


def plan_of(clips, **options):
    settings = {"micro_batches_per_step": 4, "seed": 5} | options
    return Plan(clips.index, Budget.from_batch_seconds(8.0, frame_seconds=0.02), "random", **settings)


def model_of(dropout=0.1):
    torch.manual_seed(0)
    return SpeechModel(
        ModelConfig(
            WhisperFeatureConfig(mels=20, pad_seconds=0.0),
            WhisperEncoderConfig(1, 16, 2, 32, 20, 100, dropout=dropout),
            # a key's bias has no gradient but rounding, which Adam would make steps of
            DecoderConfig(
                layers=1, width=16, heads=2, feedforward=32, vocabulary=40, positions=20, pad=0, key_bias=False
            ),
        )
    )


class Losses(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seen.append(float(trainer.callback_metrics["loss"]))

    def on_train_end(self, trainer, module):
        if trainer.is_global_zero:
            self.keep.write_text(json.dumps(self.seen))


def fit(folder, steps, resume=None, plan=None, dropout=0.1, devices=1):
    """Trains; returns the losses, the module and the clips, which several processes keep to themselves."""
    clips, losses = Clips(), Losses()
    module = PlanModule(
        model_of(dropout),
        # its epsilon above the rounding of gradients, which Adam would make steps of where there is nothing else
        optimizer=lambda p: torch.optim.AdamW(p, 3e-3, eps=1e-5),
        schedule=lambda s: 0.9**s,
    )
    strategy = "auto" if devices == 1 else "ddp_fork"
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", devices=devices, strategy=strategy, logger=False,
        enable_progress_bar=False,
        enable_model_summary=False, callbacks=[losses], default_root_dir=folder, enable_checkpointing=False,
    )  # fmt: skip
    losses.keep = folder / f"losses-{steps}.json"
    trainer.fit(module, datamodule=PlanDataModule(plan or plan_of(clips), clips), ckpt_path=resume)
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return losses.seen, module, clips


def test_what_the_model_cannot_take_is_in_no_batch(tmp_path, caplog):
    clips = Clips()
    clips.longest_seconds, clips.most_tokens = float(clips.index.seconds[5]) - 0.01, 10**6
    longer = set(np.flatnonzero(clips.index.seconds > clips.longest_seconds).tolist())
    with caplog.at_level(logging.WARNING, "canter.integrations.lightning"):
        module = PlanDataModule(plan_of(clips), clips)
    assert {row for step in module.plan for rows in step for row in rows.tolist()} == set(
        range(len(clips.index))
    ) - longer
    assert f"{len(longer)} of {len(clips.index)} utterances are in no batch" in caplog.text
    clips.longest_seconds = 100.0
    assert PlanDataModule(plan_of(clips), clips).plan.fingerprint == plan_of(clips).fingerprint


def test_steps_are_the_plans_and_the_loss_is_that_of_the_step(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "canter.integrations.lightning"):
        losses, _, clips = fit(tmp_path, 3, dropout=0.0)
    plan = plan_of(clips)
    assert len(plan) == 2
    steps = [step for epoch in (0, 1) for step in plan.at_epoch(epoch)][:3]
    assert clips.read == [(n, row) for n, step in enumerate(steps) for rows in step for row in rows.tolist()]
    assert "3.wav is silent" in caplog.text
    # the first loss by hand: sums over all utterances, divided once
    model, total, count = model_of(0.0), 0.0, 0
    for rows in steps[0]:
        for row in rows.tolist():
            loaded = Clips()[Address(0, 0, True, np.array([row]))]
            if loaded.batch is not None:
                found = model.loss(loaded.batch)
                total, count = total + found.attention.item(), count + int(found.attention_count)
    assert losses[0] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("stop", [2, 3])  # at the end of an epoch, and in the middle
def test_resumes_to_the_same_bits(tmp_path, stop):
    whole, module, _ = fit(tmp_path, 6)
    first, _, _ = fit(tmp_path, stop)
    rest, again, clips = fit(tmp_path, 6, resume=tmp_path / f"{stop}.ckpt")
    assert first + rest == whole
    assert len(set(whole)) == 6
    assert {step for step, _ in clips.read} == set(range(stop, 6))
    for a, b in zip(module.parameters(), again.parameters()):
        assert torch.equal(a, b)


def test_a_checkpoint_of_another_plan_is_refused(tmp_path):
    fit(tmp_path, 1)
    with pytest.raises(PlanError, match="another plan"):
        fit(tmp_path, 2, resume=tmp_path / "1.ckpt", plan=plan_of(Clips(), seed=6))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking a process that has threads
@pytest.mark.filterwarnings("ignore:.*sync_dist=True")
@pytest.mark.parametrize("devices", [2, 3])  # which divide the four micro-batches of a step, and do not
def test_several_processes_take_the_same_steps(tmp_path, devices):
    alone, module, _ = fit(tmp_path, 4)
    (tmp_path / "more").mkdir()
    _, shared, _ = fit(tmp_path / "more", 4, devices=devices)
    assert json.loads((tmp_path / "more" / "losses-4.json").read_text()) == pytest.approx(alone, rel=1e-5)
    for (name, a), b in zip(module.named_parameters(), shared.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
