"""OWSM is decoded as ESPnet decodes it, token for token, in any batch; its timestamps are in order."""

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from canter.errors import ConfigError
from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import EngineConfig, Hypothesis, Request
from canter.inference.engine.timestamps import EspnetOrder, TimestampTokens
from canter.models.formats.espnet import read_espnet

SHARED = Path(os.environ.get("CANTER_SHARED", "absent")) / "fixtures" / "owsm"
with_fixtures = pytest.mark.skipif(not SHARED.is_dir(), reason="CANTER_SHARED names no folder with OWSM fixtures")
CLIPS = range(3)
DECODES = ("greedy", "beam5", "beam5_penalty", "beam3_ctc0.3", "greedy_times", "beam5_times")


@pytest.fixture(scope="module", params=["v31", "v4"])
def owsm(request):
    folder = SHARED / request.param
    model = read_espnet(folder).eval()
    return model, load_file(folder / "arrays.safetensors"), json.loads((folder / "meta.json").read_text())["clips"]


def decode(owsm, label: str, rows: int, copies: int = 1, **drafts) -> list[Hypothesis]:
    """Decode the clips as ESPnet did for the fixture: at most 0.05 tokens for each encoder frame."""
    model, arrays, told = owsm
    asked = told[0]["decodes"][label]["settings"]
    config = EngineConfig(
        rows=rows,
        beams=asked["beam_size"],
        ctc_weight=asked["ctc_weight"],
        length_penalty=asked.get("penalty"),
        tokens_per_frame=0,
        extra_tokens=int(0.05 * model.encoder_frames(30.0)),
        max_repeats=0,
        **drafts,
    )
    prompt = model.tokenizer.prompt_ids({"source_lang": "en", "timestamp": "yes" if "times" in label else "no"})
    requests = [Request(arrays[f"{clip}.audio"].numpy(), prompt, scored=True) for clip in CLIPS] * copies
    return Engine(model, model.tokenizer.end, config).decode(requests)


def same(hypothesis: Hypothesis, expected: list[dict], tokenizer) -> None:
    """Check the N best; ESPnet leaves blanks out of its tokens, and writes the end token twice at the limit."""
    found = [(beam.tokens, beam.logprob) for beam in hypothesis.alternatives]
    found = found or [(tuple(hypothesis.tokens), hypothesis.logprob)]
    for (tokens, score), one in zip(found, expected):
        ids = [*hypothesis.prompt[1:], *(token for token in tokens if token != tokenizer.pad)]
        assert ids == [token for token in one["ids"] if token != tokenizer.end]
        assert score == pytest.approx(one["score"], abs=1e-3)
    assert len(found) >= len(expected)


@with_fixtures
@pytest.mark.parametrize("label", DECODES)
def test_hypotheses_and_scores_are_espnets(owsm, label):
    for clip, hypothesis in zip(CLIPS, decode(owsm, label, rows=2), strict=True):
        same(hypothesis, owsm[2][clip]["decodes"][label]["nbest"], owsm[0].tokenizer)


@with_fixtures
@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize("label", ["greedy", "beam3_ctc0.3", "beam5_times"])
def test_the_same_in_any_batch(owsm, label, rows):
    copies = min(rows, 4)
    for number, hypothesis in enumerate(decode(owsm, label, rows, copies)):
        same(hypothesis, owsm[2][number % 3]["decodes"][label]["nbest"], owsm[0].tokenizer)


@with_fixtures
@pytest.mark.parametrize("label", [label for label in DECODES if label.startswith("greedy")])
def test_drafts_of_the_ctc_head_change_nothing(owsm, label):
    for clip, hypothesis in zip(CLIPS, decode(owsm, label, rows=2, draft="ctc", draft_width=5), strict=True):
        same(hypothesis, owsm[2][clip]["decodes"][label]["nbest"], owsm[0].tokenizer)


@with_fixtures
def test_language_is_detected_among_its_language_tokens(owsm):
    model, arrays, _ = owsm
    tokenizer = model.tokenizer
    audio = arrays["0.audio"]
    names = [tokenizer.special_id(f"<|{name}|>") for name in tokenizer.languages]
    with torch.inference_mode():
        encoded = model.encode(*model.features(audio[None], torch.tensor([len(audio)])))
        expected = model.logits(*encoded, torch.tensor([[tokenizer.ids["<sos>"]]]))[0, 0, names].softmax(-1)
    prompt = tokenizer.prompt_ids({"source_lang": tokenizer.languages[0], "prevtext": "of course"})
    request = Request(audio.numpy(), prompt, languages=tuple(names), language_at=prompt.index(names[0]))
    (found,) = Engine(model, tokenizer.end, EngineConfig(extra_tokens=3, tokens_per_frame=0)).decode([request])
    assert found.languages == pytest.approx(expected.tolist(), abs=1e-4)
    assert found.prompt[request.language_at] == names[int(expected.argmax())]


@with_fixtures
def test_a_beam_wider_than_half_the_vocabulary_is_refused(owsm):
    model = owsm[0]
    with pytest.raises(ConfigError, match=f"--beam-size 2000 is more than half of the model's {model.vocabulary:,}"):
        Engine(model, model.tokenizer.end, EngineConfig(beams=2000))


START, END, FIRST, LAST, SIZE = 0, 1, 5, 55, 70


@settings(max_examples=80)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=40), st.booleans())
def test_timestamps_surround_every_segment(seeds, stamped):
    """Whatever the model wants, what the rules leave of it is segments between two timestamps, in order."""
    order = EspnetOrder(TimestampTokens(FIRST, LAST), END, START)
    tokens: list[int] = []
    ended = False
    for seed in seeds:
        logits = torch.randn(2, SIZE, generator=torch.Generator().manual_seed(seed)) * 4
        logits[:, START] = -100.0
        before = logits[0].clone()
        order.apply(logits, [False, stamped], [[], tokens])
        assert torch.equal(torch.isinf(logits[0]), (torch.arange(SIZE) >= FIRST) & (torch.arange(SIZE) <= LAST))
        assert torch.equal(logits[0, :FIRST], before[:FIRST])
        token = int(logits[1].argmax())
        ended = token == END
        if ended:
            break
        tokens.append(token)
    times = [token for token in tokens if FIRST <= token <= LAST]
    if not stamped:
        assert not times
        return
    assert FIRST <= tokens[0] <= LAST
    places = [place for place, token in enumerate(tokens) if token in times]
    assert times == sorted(times)
    assert all(one < other for one, other in zip(times[::2], times[1::2]))
    assert all(other == one + 1 for one, other in zip(places[1::2], places[2::2]))
    assert not ended or (len(times) % 2 == 0 and tokens[-1] in times)
    assert all(other > one for one, other in pairwise(places))
