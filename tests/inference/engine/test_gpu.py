"""On a GPU, with concurrent encoding and CUDA graphs, rows give the same results as on a CPU."""

import copy

import pytest
import torch

from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import EngineConfig

from ..conftest import END, small_model
from .test_drafts import Writer
from .test_engine import UNGUARDED, expected, requests

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
    pytest.mark.usefixtures("without_tf32"),
]


@pytest.fixture(scope="module")
def model():
    return copy.deepcopy(small_model()).cuda()


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("frames", [100, 100000])
def test_tokens_are_those_of_teacher_forcing_on_a_cpu(model, graphs, rows, frames):
    engine = Engine(model, END, EngineConfig(rows=rows, frames=frames, graphs=graphs, **UNGUARDED))
    for _ in range(2):  # the second time with graphs that are there
        assert [found.tokens for found in engine.decode(requests())] == expected()
    assert engine.counters.encoder_seconds > 0
    assert engine.counters.decoder_seconds > 0


@pytest.mark.parametrize("graphs", [True, False])
def test_beams_are_those_of_a_cpu(model, graphs):
    config = EngineConfig(rows=7, beams=4, graphs=graphs)
    ours = Engine(model, END, config).decode(requests())
    theirs = Engine(small_model(), END, config).decode(requests())
    assert [found.tokens for found in ours] == [found.tokens for found in theirs]
    assert [found.logprob for found in ours] == pytest.approx([found.logprob for found in theirs], abs=1e-3)


@pytest.mark.parametrize("graphs", [True, False])
def test_drafts_give_the_same_tokens(model, graphs):
    known = dict(enumerate(expected()))
    config = EngineConfig(rows=7, graphs=graphs, draft_width=4, **UNGUARDED)
    engine = Engine(model, END, config, drafter=Writer({key: text[::2] + text for key, text in known.items()}))
    for _ in range(2):  # the second time with graphs that are there
        assert {found.key: found.tokens for found in engine.run([requests()])} == known
    assert engine.counters.accepted > 0


def test_an_engine_continues_after_rows_are_cancelled(model):
    engine = Engine(model, END, EngineConfig(rows=7, **UNGUARDED))
    left = {found.key: found.tokens for found in engine.run([requests()], cancelled=lambda key: key % 2)}
    assert left == {key: tokens for key, tokens in enumerate(expected()) if key % 2 == 0}
    assert [found.tokens for found in engine.decode(requests())] == expected()
