"""LoRA in training: adapters only are trained, saved and measured; the rest of training is as ever."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

import canter
from canter.cli.convert import Options
from canter.cli.convert import run as convert
from canter.errors import CheckpointError, ConfigError
from canter.loading import load_model, save_module
from canter.models.lora import fingerprint_of
from canter.training.config import LoraConfig, LossConfig, ModelShape, OptimizerConfig, TrainConfig
from canter.training.defaults import decided
from canter.training.measure import SyntheticStep, measured_on
from canter.training.recipe import prepare_training, run_training

from ..conftest import Messages, a_config, memory_cap, stopping_after
from ..distributed.test_ranks import assert_same_steps, steps, train_on

# Python 3.12 warns of forking where threads are
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


@pytest.fixture(scope="module")
def adapted(spoken, tmp_path_factory):
    """Settings of a run that adapts a trained model, with dropout."""
    folder = tmp_path_factory.mktemp("adapted")
    config = dataclasses.replace(a_config(spoken, folder), valid=(), track=(), steps=4, output=folder / "base")
    run_training(config)
    save_module(load_model(next((folder / "base" / "checkpoints").glob("step-*"))), folder / "model")
    return dataclasses.replace(
        config,
        init=folder / "model",
        model=ModelShape(),
        vocab_size=TrainConfig.vocab_size,
        optimizer=OptimizerConfig(learning_rate=1e-2),
        loss=LossConfig(),
        lora=LoraConfig(rank=4, dropout=0.1),
    )


@pytest.fixture
def config(adapted, tmp_path):
    return dataclasses.replace(adapted, output=tmp_path / "run")


def newest(config):
    return sorted((config.output / "checkpoints").glob("step-*"))[-1]


def matrices(config):
    return load_file(newest(config) / "adapter_model.safetensors")


def assert_same_bits(ours, theirs):
    ours, theirs = matrices(ours), matrices(theirs)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_trains_and_saves_the_adapter_only(config):
    said = []
    finished = run_training(config, Messages(said))
    model, base = finished.prepared.subject.model, load_model(config.init)
    assert any(line.startswith("LoRA of rank 4 on 18 linear layers (") for line in said)
    tensors = dict(base.named_parameters())
    assert all(torch.equal(x, tensors[name]) for name, x in model.named_parameters() if "lora" not in name)
    assert all(torch.equal(x, dict(base.named_buffers())[name]) for name, x in model.named_buffers())
    assert any(x.abs().max() > 0 for name, x in matrices(config).items() if "lora_B" in name)
    assert {path.name for path in newest(config).iterdir()} >= {"adapter_config.json", "canter_adapter.json"}
    assert not (newest(config) / "model.safetensors").exists()
    optimizers = torch.load(newest(config) / "training" / "optimizers.pt", weights_only=True)
    assert {name.rpartition(".")[2] for state in optimizers for name in state["state"]} == {"lora_A", "lora_B"}


def test_a_run_stands_for_its_model_with_the_adapter(config, spoken, tmp_path):
    run_training(config)
    audio = spoken.test_manifest.parent / json.loads(spoken.test_manifest.read_text().splitlines()[0])["audio_filepath"]
    convert(Options(config.output, tmp_path / "merged", merge=True))
    loaded = [
        canter.load(config.output),
        canter.load(config.init, adapter=config.output),
        canter.load(tmp_path / "merged"),
    ]
    texts = {model.transcribe(audio, language="en").text for model in loaded}
    assert len(texts) == 1
    weights = [model.module.state_dict() for model in loaded]
    assert all(torch.equal(x, other[name]) for other in weights[1:] for name, x in weights[0].items())
    assert len({json.dumps(model.module.generation) for model in loaded}) <= 2  # --adapter takes a run's settings too


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_stopped_run_resumes_bit_exactly(config, tmp_path, ema):
    config = dataclasses.replace(config, save_every=2, optimizer=dataclasses.replace(config.optimizer, ema=ema))
    run_training(config)
    stopped = dataclasses.replace(config, output=tmp_path / "stopped")
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run_training(stopped, stopping_after(3))
    assert newest(stopped).name == "step-000002"
    run_training(stopped)
    assert steps(stopped) == steps(config)
    assert_same_bits(stopped, config)


def test_two_ranks_take_the_steps_of_one(config, tmp_path, on_ranks):
    config = dataclasses.replace(config, micro_batches_per_step=2)
    other = dataclasses.replace(config, output=tmp_path / "two")
    assert train_on(0, config) == 4
    for done, error in on_ranks(2, train_on, other):
        assert (done, error) == (4, "")
    assert_same_steps(steps(other), steps(config))


def test_a_step_that_does_not_fit_is_split(config, tmp_path):
    config = dataclasses.replace(config, lora=LoraConfig(rank=4), batch_seconds=40.0)
    run_training(config)
    short = dataclasses.replace(config, output=tmp_path / "short", check_memory=False)
    with memory_cap(2**40) as kept:
        run_training(dataclasses.replace(config, output=tmp_path / "measured"))
    with memory_cap(int(0.7 * kept[1])):
        run_training(short)
    assert '"out of memory"' in (short.output / "metrics.jsonl").read_text()
    assert_same_steps(steps(short), steps(config))


def test_another_base_is_refused_on_resuming(config, tmp_path):
    base = load_model(config.init)
    save_module(base, tmp_path / "base")
    config = dataclasses.replace(config, init=tmp_path / "base", save_every=2)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run_training(config, stopping_after(3))
    with torch.no_grad():
        base.decoder.embedding.weight.mul_(1.01)
    save_module(base, tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"step-000002 is an adapter of a model with the fingerprint"):
        run_training(config)
    with pytest.raises(CheckpointError, match=r"name the right one"):
        canter.load(config.output)
    with pytest.raises(ConfigError, match=r"lora.rank: 4 -> 8"):
        run_training(dataclasses.replace(config, lora=LoraConfig(rank=8)))


def test_the_budget_is_measured_on_the_step_that_trains(config):
    def kept(config):
        subject = prepare_training(config).subject
        step = SyntheticStep(config, subject.model, "float32")
        with memory_cap(2**40):
            step(2, 40, 10)
        measured = measured_on(config, subject.model, "float32")["model_shape"]
        weights = sum(x.nbytes for x in subject.model.parameters())
        return sum(x.nbytes for x in step.tensors()) - weights, measured

    full = dataclasses.replace(config, lora=LoraConfig(), output=config.output / "full")
    beside, shape = kept(dataclasses.replace(config, output=config.output / "lora"))
    beside_full, shape_full = kept(full)
    assert beside < 0.5 * beside_full  # moments of the adapter only
    assert shape.endswith("LoRA of rank 4 on 18 layers")
    assert "LoRA" not in shape_full


def test_the_adapter_goes_with_a_teacher_frozen_parts_and_another_run(config, adapted, tmp_path):
    config = dataclasses.replace(config, teacher=adapted.init, freeze=("encoder.*",), steps=2)
    run_training(config)
    assert not any(".encoder." in name for name in matrices(config))
    again = dataclasses.replace(config, init=config.output, freeze=(), teacher=None, output=tmp_path / "again")
    run_training(again)  # an adapter on the model with the first adapter
    merged = load_model(newest(again))
    assert fingerprint_of(merged) != fingerprint_of(load_model(newest(config)))


def test_defaults_and_refused_combinations(tmp_path):
    config = decided(TrainConfig(init=tmp_path, lora=LoraConfig(rank=16)))
    assert (config.lora.alpha, config.optimizer.learning_rate) == (32.0, pytest.approx(3e-4))
    assert decided(TrainConfig(init=tmp_path)).lora == LoraConfig()
    for settings, message in (
        ({"lora": LoraConfig(alpha=8)}, "--lora.alpha needs --lora.rank"),
        ({"init": None}, "--lora.rank 4 needs --init"),
        ({"parallel": "shard"}, "--lora.rank 4 cannot go with --parallel shard"),
        ({"optimizer": OptimizerConfig(name="muon")}, "cannot go with --optimizer.name muon"),
        ({"loss": LossConfig(ctc_weight=0.3, ctc_warmup=0.2)}, "cannot go with a CTC-only warm-up"),
        ({"lora": LoraConfig(rank=-1)}, "--lora.rank is -1; it must be 0 or more"),
        ({"lora": LoraConfig(rank=4, dropout=1.0)}, "--lora.dropout is 1.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            TrainConfig(**{"init": tmp_path, "lora": LoraConfig(rank=4), **settings})
