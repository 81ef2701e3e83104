import numpy as np
import pytest
import torch

from canter.corpus.index import LengthIndex
from canter.events import Events
from canter.models.decoder import DecoderConfig
from canter.models.fastconformer import FastConformerConfig
from canter.models.features import FeatureConfig
from canter.models.model import ModelConfig, SpeechModel
from canter.training.config import OptimizerConfig, TrainConfig
from canter.training.measure import SyntheticStep
from canter.tuning.probe import ProbedStep


class Messages(Events[object]):
    def __init__(self):
        self.lines = []

    def message(self, text):
        self.lines.append(text)


class AnyStep(ProbedStep):
    """A step that calls a function."""

    def __init__(self, model, run, compiled=False):
        self.model, self.run, self.compiled, self.frame_seconds = model, run, compiled, 0.08

    def __call__(self, batch, frames, tokens):
        self.run(batch, frames, tokens)


def small_model() -> SpeechModel:
    torch.manual_seed(0)
    encoder = FastConformerConfig(
        layers=2, width=32, heads=2, feedforward=64, kernel_size=9, subsampling_channels=8, mels=40
    )
    decoder = DecoderConfig(layers=1, width=32, heads=2, feedforward=64, vocabulary=60, positions=128, pad=0)
    return SpeechModel(ModelConfig(FeatureConfig(mels=40), encoder, decoder, ctc_vocabulary=20))


def small_step(model: SpeechModel, copied: bool = True) -> SyntheticStep:
    config = TrainConfig(optimizer=OptimizerConfig(name="adamw"))
    return SyntheticStep(config, model, "float32", copied=copied)


@pytest.fixture
def model():
    return small_model()


@pytest.fixture
def index():
    """200 utterances of 1 to 8 s."""
    rng = np.random.default_rng(0)
    seconds = rng.uniform(1.0, 8.0, 200).astype(np.float32)
    return LengthIndex(seconds, np.maximum(4, seconds * rng.uniform(2, 6, 200)).astype(np.int64))


class Formula:
    """A step that takes no memory and no time: what it would take is a formula, in place of the measurement."""

    def __init__(self, fixed=1e6, t=1000.0, tt=3.0, u=500.0):
        self.fixed, self.t, self.tt, self.u = fixed, t, tt, u
        self.ran: list[tuple[int, int, int]] = []

    def bytes(self, b, t, u):
        return int(self.fixed + b * (self.t * t + self.tt * t * t + self.u * u))

    def seconds(self, b, t, u):
        return 0.01 + b * (1e-4 * t + 1e-6 * t * u)


@pytest.fixture
def formula():
    return Formula()


@pytest.fixture
def known_costs(monkeypatch, formula):
    """Makes every Prober measure by the formula; a step over its cap runs out of memory."""
    from canter.runtime import OutOfMemory
    from canter.tuning.probe import Prober

    def peak(self, shape, cap):
        self.steps += 1
        formula.ran.append(tuple(shape))
        size = formula.bytes(*shape)
        if cap is not None and size > cap:
            raise OutOfMemory(size)
        return size, formula.seconds(*shape)

    monkeypatch.setattr(Prober, "_peak", peak)
    layer = torch.nn.Linear(10, 10)
    return AnyStep(layer, lambda b, t, u: None)
