"""Drafts change the number of steps and never the text: any drafts, widths, rules and neighbours."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from canter.errors import ConfigError
from canter.inference.engine.drafts import MEASURED, PRIOR, REVISIT, Draft, StepWidths
from canter.inference.engine.engine import Engine
from canter.inference.engine.graphs import FixedSteps
from canter.inference.engine.hotwords import HotWords
from canter.inference.engine.requests import EngineConfig, Hypothesis, Request
from canter.models.model import SpeechModel

from ..conftest import END, noises, small_model
from .test_search import Replayed

VOCABULARY = 40
# three seconds of 0.02 s in the last tokens, as a Whisper has them
STAMPED = {"no_timestamps_token_id": 27, "max_initial_timestamp_index": 6, "suppress_tokens": [9, 11]}


def varied_model(seed: int = 0, **shape) -> SpeechModel:
    """Random model with a head of its own, so that a text is more than one token repeated."""
    shape = small_model(**shape).config
    torch.manual_seed(seed)
    model = SpeechModel(replace(shape, decoder=replace(shape.decoder, tied=False))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for layer in model.decoder.layers:
            layer.cross_attention.query.weight *= 8
        model.decoder.output.copy_(torch.randn_like(model.decoder.output))
    return model


class Writer:
    """Drafter that gives the same text to a request every time."""

    def __init__(self, texts: dict[object, list[int]]):
        self.texts = texts

    def decode(self, requests: list[Request]) -> list[Hypothesis]:
        return [Hypothesis(one.key, list(self.texts[one.key]), True) for one in requests]


def requests(count: int, seed: int = 0, **more) -> list[Request]:
    clips = enumerate(noises(count, seed))
    return [Request(clip, [5] * (1 + n % 3) + [7], n, scored=n % 2 == 0, **more) for n, clip in clips]


def damaged(text: list[int], random: np.random.Generator, errors: float) -> list[int]:
    """Return the text with tokens replaced, left out and added."""
    found: list[int] = []
    for token in text:
        kind = random.choice(4, p=[1 - errors, errors / 3, errors / 3, errors / 3])
        found += [[token], [int(random.integers(VOCABULARY))], [], [token, int(random.integers(VOCABULARY))]][kind]
    return found


def plain(model, asked: list[Request], **settings) -> list[Hypothesis]:
    return Engine(model, END, EngineConfig(draft="off", **settings)).decode(asked)


def assert_same(found: list[Hypothesis], expected: list[Hypothesis]) -> None:
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    assert [one.finished for one in found] == [one.finished for one in expected]
    for one, other in zip(found, expected):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 7),
    random=st.integers(0, 2**32 - 1).map(np.random.default_rng),
    errors=st.sampled_from([0.0, 0.1, 0.4, 1.0]),
    kind=st.sampled_from(["whole", "empty", "cut", "too long", "noise"]),
    width=st.sampled_from([None, 1, 2, 3, 5, 9, 20]),
    rows=st.sampled_from([1, 3, 8]),
    stamped=st.booleans(),
    guard=st.sampled_from([0, 1, 3]),
)
def test_any_draft_gives_the_same_text(seed, random, errors, kind, width, rows, stamped, guard):
    model = varied_model(seed)
    model.generation = dict(STAMPED) if stamped else {}
    asked = requests(9, seed)
    settings = {"rows": rows, "frames": 60, "max_repeats": guard, "extra_tokens": 4}
    expected = plain(model, asked, **settings)
    texts: dict[object, list[int]] = {}
    for one in expected:
        text = damaged(one.tokens, random, errors)
        noise = random.integers(VOCABULARY, size=40).tolist()
        texts[one.key] = {
            "whole": text,
            "empty": [],
            "cut": text[: len(text) // 2],
            "too long": text + noise,
            "noise": noise,
        }[kind]
    drafted = Engine(model, END, EngineConfig(draft_width=width, **settings), drafter=Writer(texts))
    assert_same(drafted.decode(asked), expected)
    assert drafted.counters.tokens == sum(len(one.tokens) + one.finished for one in expected) or guard


def test_a_correct_draft_takes_few_steps():
    model, asked = varied_model(), requests(6)
    expected = plain(model, asked, rows=1, max_repeats=0)
    right = Writer({one.key: one.tokens for one in expected})
    drafted = Engine(model, END, EngineConfig(rows=1, draft_width=8, max_repeats=0), drafter=right)
    assert_same(drafted.decode(asked), expected)
    # the first token comes with the prompt
    assert drafted.counters.steps == sum(-(-(len(one.tokens) + one.finished - 1) // 8) for one in expected)
    assert drafted.counters.acceptance == 1


def test_one_error_costs_one_step():
    """After an error the draft is used again, whatever it was."""
    model, asked = varied_model(), requests(12)
    expected = [one for one in plain(model, asked, rows=1) if len(one.tokens) > 12]
    assert expected
    asked = [one for one in asked if one.key in {other.key for other in expected}]
    for change in (lambda text: text[:4] + text[5:], lambda text: [*text[:4], 39, *text[5:]]):
        wrong = Writer({one.key: change(one.tokens) for one in expected})
        drafted = Engine(model, END, EngineConfig(rows=1, draft_width=64), drafter=wrong)
        assert_same(drafted.decode(asked), expected)
        assert drafted.counters.steps <= 3 * len(asked)


@pytest.mark.parametrize("width", [1, 4])
def test_rows_without_drafts_share_steps(width):
    """Rows at a temperature, with hot words and with suppressed tokens of their own in one batch."""
    model = varied_model()
    phrases = [[first, second] for first in range(8, 20) for second in range(8, 39)]
    words = HotWords(phrases, 5.0, [True] * VOCABULARY)
    kinds = ({}, {"temperature": 0.8}, {"hotwords": words}, {"suppress_tokens": (15, 26, 9)})
    asked = [replace(one, **kinds[n % 4]) for n, one in enumerate(requests(16))]
    expected = plain(model, asked, rows=6)
    right = Writer({one.key: one.tokens for one in plain(model, requests(16))})
    drafted = Engine(model, END, EngineConfig(rows=6, draft_width=width), drafter=right)
    assert_same(drafted.decode(asked), expected)
    assert (drafted.counters.accepted > 0) == (width > 1)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("captured", [False, True])
def test_fixed_shapes(monkeypatch, rows, captured):
    model, asked = varied_model(), requests(16)
    expected = plain(model, asked)
    random = np.random.default_rng(0)
    writer = Writer({one.key: damaged(one.tokens, random, 0.2) for one in expected})
    steps = Replayed(model.decoder) if captured else FixedSteps(model.decoder, capture=False)
    monkeypatch.setattr(Engine, "_fixed_steps", lambda engine: steps)
    drafted = Engine(model, END, EngineConfig(rows=rows, draft_width=4), drafter=writer)
    assert_same(drafted.decode(asked), expected)
    assert drafted.counters.accepted > 0


def test_a_draft_may_reach_the_last_position():
    model = varied_model(positions=16)
    model.decoder.head_bias.data[END] = -1e9  # every row ends at the limit
    asked = requests(6)
    expected = plain(model, asked)
    writer = Writer({one.key: one.tokens * 2 for one in expected})
    assert_same(Engine(model, END, EngineConfig(draft_width=8), drafter=writer).decode(asked), expected)


def test_ctc_drafts_where_it_reads_tokens():
    """A head over the decoder's tokens whose outputs are the text, by luck of a model that copies them."""
    model = varied_model()
    model.ctc = torch.nn.Linear(model.config.encoder.width, VOCABULARY)
    model.config = replace(model.config, ctc_vocabulary=VOCABULARY)
    asked = requests(8)
    expected = plain(model, asked)
    for draft in ("auto", "ctc"):
        drafted = Engine(model, END, EngineConfig(draft=draft, draft_width=3))
        assert drafted.drafts
        assert_same(drafted.decode(asked), expected)
        assert drafted.counters.drafted > 0


def test_what_cannot_be_drafted_is_refused():
    model = varied_model()
    with pytest.raises(ConfigError, match="greedy"):
        Engine(model, END, EngineConfig(beams=2), drafter=Writer({}))
    with pytest.raises(ConfigError, match="greedy"):
        Engine(model, END, EngineConfig(beams=2, draft="ctc"))
    with pytest.raises(ConfigError, match="not known how"):
        Engine(model, END, EngineConfig(draft="ctc"))
    model.ctc = None
    with pytest.raises(ConfigError, match="no CTC head"):
        Engine(model, END, EngineConfig(draft="ctc"))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=30), st.lists(st.integers(0, 5), max_size=30))
def test_a_draft_continues_where_it_is_nearest(tokens, written):
    """The place is among those of the least edit distance after a token that the draft does not have next."""
    draft = Draft(tokens)
    for count, token in enumerate(written, 1):
        agreed = draft.following(1) == [token]
        before = draft.place
        draft.took([token], 0)
        draft.following(0)
        if agreed:
            assert draft.place == before + 1
            continue
        distances = [distance(written[:count], tokens[:place]) for place in range(len(tokens) + 1)]
        assert distances[draft.place] == min(distances)


def distance(one: list[int], other: list[int]) -> int:
    row = list(range(len(other) + 1))
    for count, token in enumerate(one, 1):
        above, row = row, [count]
        for place, wanted in enumerate(other, 1):
            row.append(min(above[place] + 1, row[-1] + 1, above[place - 1] + (token != wanted)))
    return row[-1]


def run(widths: StepWidths, drafts: list[Draft | None], seconds, steps: int, accepted: bool) -> list[int]:
    """Return the widths of ``steps`` steps that take ``seconds(width)``, with drafts all ``accepted`` or none."""
    chosen = []
    for _ in range(steps):
        width = widths.choose(drafts)
        chosen.append(width)
        tried = len(drafts) * (width - 1)
        outcome = (tried, 0) if accepted else (0, len(drafts) if tried else 0)
        widths.record(len(drafts), width, seconds(width), *outcome)
    return chosen


def long_drafts(rows: int) -> list[Draft | None]:
    return [Draft(range(1000)) for _ in range(rows)]


def test_width_where_steps_cost_nothing():
    widths = StepWidths()
    chosen = run(widths, long_drafts(1), lambda width: 1.0, 40, True)
    assert chosen[: MEASURED + 1] == [1] * MEASURED + [2]
    assert set(chosen[20:]) == {16}


def test_width_where_a_token_costs_what_a_step_costs():
    chosen = run(StepWidths(), long_drafts(16), lambda width: float(width), 200, False)
    assert chosen.count(1) > 0.95 * len(chosen)


def test_width_without_agreement_is_one():
    chosen = run(StepWidths(), long_drafts(4), lambda width: 1 + 0.1 * width, 300, False)
    assert chosen.count(1) > 0.95 * len(chosen)


def test_a_time_that_was_a_hiccup_is_measured_again():
    widths, drafts = StepWidths((1, 4)), long_drafts(1)
    for width, seconds in ((1, 1.0), (4, 16.0)):
        for _ in range(MEASURED):
            widths.record(1, width, seconds, width - 1, 0)
    chosen = run(widths, drafts, lambda width: 2.0 if width == 4 else 1.0, 9 * REVISIT, True)
    assert chosen[0] == 1
    assert chosen[-REVISIT:].count(4) > 0.98 * REVISIT


def test_rows_without_a_draft_take_one_token():
    assert StepWidths().choose([None, Draft([])]) == 1
    assert PRIOR > 0
