import re

import numpy as np
import pytest

from canter.cli.main import main
from canter.corpus.index import LengthIndex
from canter.loading import save_module
from canter.models.decoder import DecoderConfig
from canter.planning import Budget
from canter.text import train_tokenizer
from canter.training.config import LoraConfig, ModelShape, TrainConfig, dump_config

from ..models.conftest import small_model


@pytest.fixture
def files(tmp_path):
    """A configuration of a small model, and the lengths of 100 utterances."""
    shape = ModelShape(encoder_layers=1, decoder_layers=1, width=32, heads=2, subsampling_channels=8, mels=40)
    config = TrainConfig(vocab_size=60, precision="float32", threads=1, model=shape)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    rng = np.random.default_rng(0)
    seconds = rng.uniform(1, 5, 100).astype(np.float32)
    LengthIndex(seconds, (4 * seconds + 3).astype(np.int64)).save(tmp_path / "lengths.arrow")
    return tmp_path


def tune(folder, *options):
    return main(
        ["tune", str(folder / "config.yaml"), "--index", str(folder / "lengths.arrow"), "-o",
         str(folder / "budget.json"), "--threads", "1", *options]
    )  # fmt: skip


def test_a_configuration_is_measured_and_read_by_plan(files, capsys):
    assert tune(files, "--memory", "400MiB", "--probes", "8", "--buckets", "2", "--figure", str(files / "b.png")) == 0
    assert "memory explained within" in capsys.readouterr().err
    budget = Budget.load(files / "budget.json")
    assert budget.limit_bytes < 400 * 2**20
    assert budget.measured_on["precision"] == "float32"
    assert (files / "b.png").exists()
    assert len((files / "budget.probes.jsonl").read_text().splitlines()) == budget.measured_on["probes"]
    planned = ["plan", str(files / "lengths.arrow"), "--budget", str(files / "budget.json")]
    assert main([*planned, "--json"]) == 0
    assert main([*planned, "--strategy", "bucket_2d", "--bins"]) == 0
    assert "bucket_batch_size" in capsys.readouterr().out
    assert tune(files, "--memory", "400MiB", "--probes", "8") == 0
    told = " ".join(capsys.readouterr().err.split())
    assert int(re.search(r"(\d+) steps", told)[1]) <= 3  # the warm-up, and what the first run had to repeat
    assert f"{budget.measured_on['probes']} probes of an earlier run" in told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--memory", "many"), "--memory is 'many'; give a size"),
        (("--probes", "0"), "--probes is 0; it must be at least 1"),
        (("--memory", "900TB"), "is more than the"),
        (("--memory", "1MiB"), "not even one utterance"),
    ],
)
def test_what_cannot_be(files, capsys, options, message):
    assert tune(files, *options) == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (files / "budget.json").exists()


def test_lora_of_a_configuration_is_measured(tmp_path, capsys):
    """Its gradients and optimiser state are those of the additions only."""
    tokenizer = train_tokenizer(["yes no stop enter"] * 20, languages=["en"], vocab_size=40)
    decoder = DecoderConfig(layers=4, width=256, heads=4, vocabulary=tokenizer.vocab_size, feedforward=1024)
    model = small_model(decoder=decoder, ctc_vocabulary=0)
    model.tokenizer = tokenizer
    save_module(model, tmp_path / "model")
    LengthIndex(np.linspace(1, 3, 40).astype(np.float32), np.full(40, 9)).save(tmp_path / "lengths.arrow")
    found = {}
    for rank in (0, 4):
        config = TrainConfig(init=tmp_path / "model", precision="float32", threads=1, lora=LoraConfig(rank=rank))
        (tmp_path / "config.yaml").write_text(dump_config(config))
        (tmp_path / "budget.probes.jsonl").unlink(missing_ok=True)
        assert tune(tmp_path, "--probes", "6") == 0, capsys.readouterr().err
        found[rank] = Budget.load(tmp_path / "budget.json").fixed_bytes
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert found[0] > found[4] + 1.5 * weights  # gradients, and at least one moment of the optimiser
