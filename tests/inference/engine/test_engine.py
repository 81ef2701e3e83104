"""Transcripts are those of plain greedy decoding, whatever the batch."""

import math
from collections import deque
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from canter.inference.engine.ctc import ctc_greedy
from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import EngineConfig, Request, encoder_batches

from ..conftest import END, noises, small_model

UNGUARDED = {"max_repeats": 0}


def requests(count: int = 40) -> list[Request]:
    """Prompts of three lengths."""
    return [Request(clip, [5] * (1 + number % 3) + [7], number) for number, clip in enumerate(noises(count))]


@torch.inference_mode()
def teacher_forced(model, request: Request, tokens_per_frame: float = 1.0, extra: int = 10) -> list[int]:
    """Decode one clip greedily by the forward pass of training, over the complete prefix at every token."""
    features = model.features(torch.from_numpy(request.audio)[None], torch.tensor([len(request.audio)]))
    encoded, lengths = model.encode(*features)
    prompt = list(request.prompt)
    limit = math.ceil(tokens_per_frame * int(lengths)) + extra
    tokens: list[int] = []
    while len(tokens) < min(limit, model.config.decoder.positions - len(prompt)):
        best = int(model.logits(encoded, lengths, torch.tensor([prompt + tokens]))[0, -1].argmax())
        if best == END:
            break
        tokens.append(best)
    return tokens


@cache
def expected() -> list[list[int]]:
    model = small_model()
    return [teacher_forced(model, request) for request in requests()]


@pytest.mark.parametrize("rows", [1, 3, 8, 64])
@pytest.mark.parametrize("frames", [1, 100, 100000])
def test_same_tokens_as_teacher_forcing_in_any_batch(model, rows, frames):
    engine = Engine(model, END, EngineConfig(rows=rows, frames=frames, **UNGUARDED))
    found = engine.decode(requests())
    assert [hypothesis.tokens for hypothesis in found] == expected()
    assert [hypothesis.key for hypothesis in found] == list(range(40))
    lengths = {len(tokens) for tokens in expected()}
    assert len(lengths) > 10, "the random model does not exercise rows that leave at different times"


def test_rows_are_useful_and_slots_are_full(model):
    engine = Engine(model, END, EngineConfig(rows=4, **UNGUARDED))
    engine.decode(requests())
    counters = engine.counters
    assert counters.useful_rows == 1
    assert counters.mean_rows > 0.8 * counters.slots
    assert counters.utterances == 40
    assert counters.audio_seconds == pytest.approx(sum(len(item.audio) for item in requests()) / 16000)


def test_decoding_continues_after_an_early_end(model):
    """The audio after each early end gives the engine's result for that audio; nothing is counted twice."""
    left = [1.2, 0.5]  # seconds at which the hypotheses of one of them end

    class Policy:
        def retry(self, found):
            return None

        def continue_at(self, found, seconds):
            return left.pop(0) if found.key == 3 and left else None

    asked = [replace(request, policy=Policy()) for request in requests(6)]
    engine = Engine(model, END, EngineConfig(rows=2, **UNGUARDED))
    found = [*engine.run([[one] for one in asked])]
    assert len(found) == 6
    assert engine.counters.utterances == 6
    for hypothesis in found:
        audio = asked[hypothesis.key].audio
        places = [0, 19200, 19200 + 8000] if hypothesis.key == 3 else [0]
        parts = [replace(asked[hypothesis.key], audio=audio[place:], policy=None) for place in places]
        assert [one.tokens for one in hypothesis.parts] == [one.tokens for one in engine.decode(parts)]
        assert [one.continues_at for one in hypothesis.parts] == ([1.2, 0.5, 0.0] if len(places) > 1 else [0.0])


def test_rows_that_a_gpu_still_encodes_do_not_enter(model):
    """Live rows would wait for the encoder with them; where none lives, the first batch is waited for."""
    engine = Engine(model, END, EngineConfig(rows=8))
    done, busy = SimpleNamespace(query=lambda: True), SimpleNamespace(query=lambda: False)
    row = engine._encode(requests(1))[0]
    first, second, third = (
        [replace(row, encoding=replace(row.encoding, ready=ready))] * 3 for ready in (done, busy, done)
    )
    live, none = SimpleNamespace(rows=[row]), SimpleNamespace(rows=[])
    engine.gpu = True
    assert engine._ready(live, deque([*first, *second])) == 3
    assert engine._ready(live, deque([*second, *third])) == 0
    assert engine._ready(none, deque([*second, *third])) == 6
    assert engine._ready(none, deque()) == 0


def test_limit_on_tokens(model):
    engine = Engine(model, END, EngineConfig(tokens_per_frame=0.0, extra_tokens=2, **UNGUARDED))
    for hypothesis, tokens in zip(engine.decode(requests()), expected()):
        assert hypothesis.tokens == tokens[:2]
        assert hypothesis.finished == (len(tokens) < 2)


def test_a_model_knows_how_fast_people_speak():
    model = small_model()
    model.generation = {"tokens_per_frame": 0.0}
    config = EngineConfig(extra_tokens=2, **UNGUARDED)
    found = Engine(model, END, config).decode(requests())
    assert [hypothesis.tokens for hypothesis in found] == [tokens[:2] for tokens in expected()]
    asked = EngineConfig(tokens_per_frame=1.0, **UNGUARDED)
    assert [hypothesis.tokens for hypothesis in Engine(model, END, asked).decode(requests())] == expected()


def test_positions_end_a_row():
    model = small_model(positions=12)
    found = Engine(model, END, EngineConfig(**UNGUARDED)).decode(requests())
    assert max(len(h.tokens) + len(r.prompt) for h, r in zip(found, requests())) == 12


def test_prompt_must_fit(model):
    with pytest.raises(ValueError, match="64 positions"):
        Engine(model, END).decode([Request(noises(1)[0], [5] * 64)])


def test_shortest_audio(model):
    found = Engine(model, END).decode([Request(noises(1)[0][:1], [5])])
    assert len(found) == 1


def test_training_mode_is_restored(model):
    model.train()
    try:
        trained = Engine(model, END, EngineConfig(**UNGUARDED)).decode(requests(4))
        assert model.training
    finally:
        model.eval()
    assert [hypothesis.tokens for hypothesis in trained] == expected()[:4]


def test_autocast_keeps_its_type_in_the_cache(model):
    with torch.autocast("cpu", torch.bfloat16):
        assert model.decoder.cache().own.dtype == torch.bfloat16
        found = Engine(model, END, EngineConfig(**UNGUARDED)).decode(requests())
    same = sum(hypothesis.tokens == tokens for hypothesis, tokens in zip(found, expected()))
    assert same > 20


def test_suppressed_tokens_are_never_chosen():
    model = small_model()
    plain = [token for hypothesis in Engine(model, END).decode(requests()) for token in hypothesis.tokens]
    most = max(plain, key=plain.count)
    model.generation = {"suppress_tokens": [most], "begin_suppress_tokens": [END]}
    found = Engine(model, END).decode(requests())
    assert all(most not in hypothesis.tokens and hypothesis.tokens for hypothesis in found)


@pytest.mark.parametrize("beams", [1, 3])
def test_rows_of_one_batch_suppress_tokens_of_their_own(beams):
    """Each is decoded as by an engine with its set, which replaces the model's or, with -1, adds to it."""
    model = small_model()
    plain = [token for hypothesis in Engine(model, END).decode(requests()) for token in hypothesis.tokens]
    most, second, *_ = sorted({*plain}, key=plain.count, reverse=True)
    model.generation = {"suppress_tokens": [most], "begin_suppress_tokens": [END]}
    sets = (None, (), (second,), (-1, second))
    wanted = [
        Engine(model, END, EngineConfig(beams=beams, suppress_tokens=(-1,) if one is None else one)).decode(requests(8))
        for one in sets
    ]
    mixed = [replace(request, suppress_tokens=one) for request in requests(8) for one in sets]
    found = Engine(model, END, EngineConfig(beams=beams, rows=32)).decode(mixed)
    assert [hypothesis.tokens for hypothesis in found] == [
        hypotheses[number].tokens for number in range(8) for hypotheses in wanted
    ]
    assert len({tuple(token for one in hypotheses for token in one.tokens) for hypotheses in wanted}) == 4


def test_ctc(model):
    request = requests(1)[0]
    with torch.inference_mode():
        features = model.features(torch.from_numpy(request.audio)[None], torch.tensor([len(request.audio)]))
        wanted = ctc_greedy(*model.ctc_log_probs(*model.encode(*features)))
    assert Engine(model, END, ctc=True).decode([request])[0].ctc == wanted[0]
    assert Engine(model, END).decode([request])[0].ctc is None


def test_ctc_greedy_collapses_and_drops_blanks():
    path = torch.tensor([[1, 1, 0, 1, 2, 2, 0, 3], [0, 0, 2, 2, 2, 3, 3, 3]])
    log_probs = torch.nn.functional.one_hot(path, 4).float().log()
    assert ctc_greedy(log_probs, torch.tensor([8, 5])) == [[1, 1, 2, 3], [2]]


def test_encoder_batches_fill_the_budget():
    batches = encoder_batches([5, 9, 1, 30, 4, 4], budget=20)
    assert batches == [[3], [1, 0], [4, 5, 2]]
    assert encoder_batches([1] * 5, budget=100, rows=2) == [[0, 1], [2, 3], [4]]
