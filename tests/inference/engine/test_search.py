"""Beams are those of a search that recomputes everything; the rules of timestamps hold; draws are the row's own."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from canter.inference.engine.engine import Engine
from canter.inference.engine.graphs import PATIENCE, FixedSteps, _Captured, next_shape, power_of_two
from canter.inference.engine.requests import EngineConfig, Request
from canter.inference.engine.search import Rules, best

from ..conftest import END, noises, small_model


def requests(count: int = 12, **more) -> list[Request]:
    return [Request(clip, [5] * (1 + n % 3) + [7], n, **more) for n, clip in enumerate(noises(count))]


@torch.inference_mode()
def slow_beams(model, request: Request, beams: int, limit: int, in_place: bool, penalty: float):
    """Return tokens and sums of beam search by the forward pass of training over complete prefixes, best first."""
    features = model.features(torch.from_numpy(request.audio)[None], torch.tensor([len(request.audio)]))
    encoded, lengths = model.encode(*features)
    prompt, running, done = list(request.prompt), [((), 0.0)], []
    for length in range(1, limit + 1):
        candidates = []
        for tokens, total in running:
            if in_place and tokens and tokens[-1] == END:
                candidates.append((tokens, total))
                continue
            logits = model.logits(encoded, lengths, torch.tensor([prompt + list(tokens)]))[0, -1]
            scores = logits.float().log_softmax(-1)
            candidates += [((*tokens, token), total + float(scores[token])) for token in range(len(scores))]
        candidates.sort(key=lambda one: -one[1])
        if in_place:
            running = candidates[:beams]
            if all(tokens[-1] == END for tokens, _ in running):
                break
            continue
        at_limit = length == limit
        ended = [one for one in candidates[:beams] if one[0][-1] == END or at_limit]
        done = sorted(done + [(total / length**penalty, t, total) for t, total in ended], reverse=True)[:beams]
        running = [one for one in candidates if one[0][-1] != END][:beams]
        if len(done) == beams and running[0][1] / length**penalty <= done[-1][0]:
            break
    found = running if in_place else [(tokens, total) for _, tokens, total in done]
    return [([t for t in tokens if t != END], total) for tokens, total in found]


@pytest.mark.parametrize("whisper", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_beams_in_any_batch(whisper, rows):
    model = small_model()
    if whisper:
        model.generation = {"no_timestamps_token_id": 7}  # which ends every prompt here
    limit = 12
    config = EngineConfig(rows=rows, beams=3, tokens_per_frame=0, extra_tokens=limit, length_penalty=0.0)
    found = Engine(model, END, config).decode(requests(8))
    for request, hypothesis in zip(requests(8), found):
        expected = slow_beams(model, request, 3, limit, not whisper, 0.0)
        assert [list(one.tokens) for one in hypothesis.alternatives] == [tokens for tokens, _ in expected]
        sums = [one.logprob for one in hypothesis.alternatives]
        assert sums == pytest.approx([total for _, total in expected], abs=1e-4)


def test_length_penalty_and_early_stopping():
    model = small_model()
    model.generation = {"no_timestamps_token_id": 7}
    config = {"beams": 3, "tokens_per_frame": 0, "extra_tokens": 12}
    plain = Engine(model, END, EngineConfig(**config)).decode(requests(8))
    for request, hypothesis in zip(requests(8), plain):
        expected = slow_beams(model, request, 3, 12, False, 1.0)
        assert hypothesis.tokens == expected[0][0]
    early = Engine(model, END, EngineConfig(**config, early_stopping=True))
    late = Engine(model, END, EngineConfig(**config))
    early.decode(requests(8)), late.decode(requests(8))
    assert early.counters.row_steps <= late.counters.row_steps


@given(st.integers(1, 3), st.integers(1, 700), st.integers(1, 12), st.integers(0, 99))
def test_best_is_topk(rows, size, count, seed):
    logits = torch.randn(rows, max(size, count), generator=torch.Generator().manual_seed(seed))
    values, places = best(logits, count)
    expected = logits.topk(count)
    assert torch.equal(values, expected.values)
    assert torch.equal(places, expected.indices)


def test_draws_do_not_depend_on_the_batch(model):
    found = [
        [h.tokens for h in Engine(model, END, EngineConfig(rows=rows)).decode(requests(8, temperature=1.0))]
        for rows in (1, 8)
    ]
    assert found[0] == found[1]
    assert found[0] != [h.tokens for h in Engine(model, END).decode(requests(8))]
    assert len(Engine(model, END, EngineConfig(beams=3)).decode(requests(2, temperature=1.0))) == 2


def test_retry_decodes_again_without_encoding_again(model):
    seen = []

    class Policy:
        def retry(self, hypothesis):
            seen.append(hypothesis.temperature)
            return 0.5 if hypothesis.temperature == 0 else None

        def continue_at(self, hypothesis, seconds):
            return None

    engine = Engine(model, END, EngineConfig(rows=3))
    found = engine.decode(requests(8, policy=Policy(), scored=True))
    assert sorted(seen) == [0.0] * 8 + [0.5] * 8
    assert all(hypothesis.temperature == 0.5 for hypothesis in found)
    assert engine.counters.utterances == engine.counters.retries == 8
    assert all(hypothesis.logprob < 0 for hypothesis in found)


def test_sums_of_log_probabilities(model):
    for hypothesis, request in zip(Engine(model, END).decode(requests(4, scored=True)), requests(4)):
        with torch.inference_mode():
            features = model.features(torch.from_numpy(request.audio)[None], torch.tensor([len(request.audio)]))
            tokens = [*request.prompt, *hypothesis.tokens, *([END] if hypothesis.finished else [])]
            scores = model.log_probs(*model.encode(*features), torch.tensor([tokens[:-1]]))[0]
        first = len(request.prompt)
        total = sum(float(scores[place - 1, tokens[place]]) for place in range(first, len(tokens)))
        assert hypothesis.logprob == pytest.approx(total, abs=1e-3)


def test_cancelled_rows_leave_and_empty_batches_are_no_end(model):
    gone: set[int] = set()
    engine = Engine(model, END, EngineConfig(rows=4))
    items = requests(12)

    def batches():
        for start in range(0, 12, 3):
            yield []
            yield items[start : start + 3]
            yield []

    found = []
    for hypothesis in engine.run(batches(), cancelled=gone.__contains__):
        found.append(hypothesis.key)
        gone.update(key for key in (1, 5, 10) if key not in found)
    kept = set(range(12)) - (gone - set(found))
    assert set(found) == kept
    assert len(found) == len(kept)
    expected = {h.key: h.tokens for h in Engine(model, END).decode(items)}
    again = {h.key: h.tokens for h in Engine(model, END, EngineConfig(rows=2)).run(batches())}
    assert again == expected


@pytest.mark.parametrize("beams", [1, 3])
def test_fixed_shapes_give_the_same(model, beams, monkeypatch):
    """The way of the GPU, without the capture."""
    expected = Engine(model, END, EngineConfig(rows=5, beams=beams)).decode(requests(20))
    steps = FixedSteps(model.decoder, shapes=(1, 2, 4, 8), capture=False)
    engine = Engine(model, END, EngineConfig(rows=5, beams=beams))
    monkeypatch.setattr(engine, "_fixed_steps", lambda: steps)
    assert [h.tokens for h in engine.decode(requests(20))] == [h.tokens for h in expected]
    assert engine.counters.useful_rows < 1


class Replayed(FixedSteps):
    """Like a CUDA graph, a step runs on the buffers that existed when its shape was first seen."""

    def _capture(self, key, cache, tokens):
        assert self.captured or self.pool is None  # one whose graphs are all gone cannot be captured into
        self.pool = self.pool or object()
        (rows, n, columns, frames), then = key, copy.copy(cache)
        buffer, column = tokens.new_zeros(rows, n), torch.tensor([cache.column])
        logits = self.decoder.fixed_step(buffer, column, then, columns, frames)

        def replay():
            logits.copy_(self.decoder.fixed_step(buffer, column, then, columns, frames))

        self.captured[key] = step = _Captured(SimpleNamespace(replay=replay), buffer, column, logits)
        return step


@pytest.mark.parametrize("beams", [1, 3])
def test_graphs_read_and_write_what_is_there(model, beams, monkeypatch):
    expected = Engine(model, END, EngineConfig(rows=5, beams=beams)).decode(requests(20))
    steps = Replayed(model.decoder, shapes=(1, 2, 4, 8))
    engine = Engine(model, END, EngineConfig(rows=5, beams=beams))
    monkeypatch.setattr(engine, "_fixed_steps", lambda: steps)
    assert [h.tokens for h in engine.decode(requests(20))] == [h.tokens for h in expected]
    assert steps.version > 1  # buffers have moved on the way


@torch.inference_mode()
def test_a_shape_met_in_passing_is_computed_by_a_larger_graph(model):
    """It gives the same; a capture takes as long as many steps, so a shape must be asked for often to be worth one."""
    encoded = torch.randn(5, 20, model.config.decoder.width, generator=torch.Generator().manual_seed(0))
    cache, plain = model.decoder.cache(), model.decoder.cache()
    for one in (cache, plain):
        model.decoder.admit([[5, 7]] * 5, encoded, [20] * 5, one)
        one.reserve(3, 0, before=0, after=64)  # buffers that move would end all graphs
    steps = Replayed(model.decoder, shapes=(1, 2, 4, 8))
    computed = []
    for number in range(2 * PATIENCE):
        if number == 2:
            for one in (cache, plain):
                one.remove([0, 1])
        tokens = torch.full((cache.rows, 1), 3 + number % 5)
        ours, theirs = steps.step(tokens, cache), model.decoder.step(tokens, plain)
        assert torch.allclose(ours, theirs, atol=1e-4)
        computed.append(steps.rows)
    assert computed == [8] * (2 + PATIENCE) + [4] * (PATIENCE - 2)


def test_shapes():
    assert [next_shape(n, (1, 2, 4)) for n in (1, 2, 3, 4, 5, 9)] == [1, 2, 4, 4, 8, 12]
    assert [power_of_two(n, 1000) for n in (1, 64, 65, 900, 1000)] == [64, 64, 128, 1000, 1000]


@settings(max_examples=60)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=40))
def test_timestamps_are_in_order(draws):
    """Whatever the model wants, what the rules leave of it is well-formed."""
    end, first, size = 50, 60, 60 + 101
    settings = {"no_timestamps_token_id": first - 1, "max_initial_timestamp_index": 10}
    rules = Rules({**settings, "suppress_tokens": [*range(end + 1, first - 1)]}, end, torch.device("cpu"))
    tokens: list[int] = []
    for seed in draws:
        logits = torch.randn(2, size, generator=torch.Generator().manual_seed(seed)) * 4
        rules.suppress(logits[1:], opening=not tokens)
        rules.order_timestamps(logits, [False, True], [[], tokens])
        assert not torch.isinf(logits[0]).any()
        token = int(logits[1].argmax())
        if token == end:
            break
        tokens.append(token)
    stamps = [token for token in tokens if token >= first]
    assert first <= tokens[0] <= first + 10
    assert stamps == sorted(stamps)
    assert first - 1 not in tokens
    for (before, here), after in zip(itertools.pairwise(tokens), tokens[2:]):
        if before >= first and here >= first:
            assert after < first
        if before < first <= here:
            assert after >= first
