import pytest

from canter.corpus.synthesis import synthesise
from canter.planning.budget import Budget
from canter.training.config import LossConfig, ModelShape, TrainConfig


@pytest.fixture(scope="session")
def spoken(tmp_path_factory):
    """A little spoken corpus."""
    return synthesise(tmp_path_factory.mktemp("spoken"), utterances=40, test_utterances=6, workers=1)


@pytest.fixture
def config(spoken, tmp_path):
    """A run of eight small steps, with a given budget: a measured one differs from time to time."""
    Budget.from_batch_seconds(60.0).save(tmp_path / "budget.json")
    return TrainConfig(
        manifest=(spoken.train_manifest,),
        valid=(spoken.test_manifest,),
        output=tmp_path / "run",
        vocabulary=100,
        budget=tmp_path / "budget.json",
        steps=8,
        batch_seconds=12.0,
        workers=0,
        threads=1,
        precision="float32",
        valid_every=4,
        valid_utterances=3,
        model=ModelShape(
            encoder_layers=1, decoder_layers=1, width=32, heads=2, subsampling_channels=8, mels=40
        ),
        loss=LossConfig(ctc_alone=0.25),
    )
