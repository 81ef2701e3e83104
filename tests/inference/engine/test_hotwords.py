"""Hot words: greedy search equals a slow one that recomputes everything, and what is taken back leaves no trace."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from canter.inference.engine.engine import Engine
from canter.inference.engine.graphs import FixedSteps
from canter.inference.engine.hotwords import ATTEMPTS, ROOT, Credit, HotWords
from canter.inference.engine.requests import EngineConfig, Request

from ..conftest import END, noises, small_model

LIMIT = 14
VOCABULARY = 40
CONFIG = {"tokens_per_frame": 0, "extra_tokens": LIMIT}


def words_of(seed: int, weight: float, count: int = 12) -> HotWords:
    """Random phrases of one to four tokens; before two thirds of the tokens a word may end."""
    random = np.random.default_rng(seed)
    begins = random.random(VOCABULARY) < 0.67
    begins[END] = True
    texts = list(range(8, VOCABULARY))
    phrases = [random.choice(texts, random.integers(1, 5)).tolist() for _ in range(count)]
    return HotWords(phrases[:-2], weight, begins.tolist(), phrases[-2:])


def requests(words: HotWords | None, count: int = 10, **more) -> list[Request]:
    return [
        Request(clip, [5] * (1 + n % 3) + [7], n, hotwords=words, scored=True, **more)
        for n, clip in enumerate(noises(count))
    ]


@torch.inference_mode()
def slow_greedy(model, request: Request, words: HotWords) -> list[int]:
    """Return the tokens of greedy search with hot words, by the forward pass of training over complete prefixes."""
    features = model.features(torch.from_numpy(request.audio)[None], torch.tensor([len(request.audio)]))
    encoded, lengths = model.encode(*features)

    def gaps(tokens: list[int]) -> tuple[int, list[float]]:
        logits = model.logits(encoded, lengths, torch.tensor([[*request.prompt, *tokens]]))[0, -1].float()
        return int(logits.argmax()), (logits.max() - logits).tolist()

    def completed(tokens: list[int], node: int, spent: float) -> tuple[list[int], int] | None:
        """Return the tokens with the phrase that begins at ``node``, and its node; None if it does not come about."""
        own, gap = gaps(tokens)
        if node in words.ends and words.begins_word[own]:
            return tokens, node
        following = sorted((gap[token], token) for token in words.children[node])
        if not following or spent + following[0][0] > words.weight or len(tokens) + 1 >= LIMIT:
            return None
        least, token = following[0]
        return completed([*tokens, token], words.children[node][token], spent + least)

    tokens: list[int] = []
    nodes = {words.opening}
    while len(tokens) < LIMIT:
        own, gap = gaps(tokens)
        pairs = [pair for node in nodes for pair in words.children[node].items()]
        firsts = sorted((gap[token], token) for token in words.children[ROOT])[:ATTEMPTS]
        tries = [(distance, token, words.children[ROOT][token]) for distance, token in firsts]
        tries += [(gap[token], token, node) for token, node in pairs]
        tries = sorted((one for one in tries if one[1] != own and one[0] <= words.weight), key=lambda one: one[0])
        found = None
        for distance, token, node in tries[:ATTEMPTS] if len(tokens) + 1 < LIMIT else []:
            found = completed([*tokens, token], node, distance)
            if found:
                break
        if found:
            tokens, nodes = found[0], {found[1]}
            continue
        if own == END:
            break
        reached = {words.children[node].get(own) for node in nodes | {ROOT}}
        tokens, nodes = [*tokens, own], reached - {None}
    return tokens


@pytest.mark.parametrize("rows", [1, 4, 64])
@pytest.mark.parametrize("weight", [2.5, 4.0, 8.0])
def test_greedy_is_the_slow_search(weight, rows):
    model = small_model()
    words = words_of(int(10 * weight), weight, 30)
    found = Engine(model, END, EngineConfig(rows=rows, max_repeats=0, **CONFIG)).decode(requests(words))
    plain = Engine(model, END, EngineConfig(rows=rows, max_repeats=0, **CONFIG)).decode(requests(None))
    expected = [slow_greedy(model, request, words) for request in requests(words)]
    assert [one.tokens for one in found] == expected
    assert any(one.tokens != other.tokens for one, other in zip(found, plain))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 12.0))
def test_any_phrases_and_weights(seed, weight):
    model, words = small_model(), words_of(seed, weight)
    request = requests(words, 4)[seed % 4]
    (found,) = Engine(model, END, EngineConfig(max_repeats=0, **CONFIG)).decode([request])
    assert found.tokens == slow_greedy(model, request, words)


def test_a_phrase_that_is_not_completed_has_no_effect():
    """The last token of every phrase is suppressed, so that none is ever completed."""
    model = small_model()
    model.generation = {"suppress_tokens": [39]}
    phrases = [[first, second, 39] for first in range(8, 20) for second in range(8, 39)]
    words = HotWords(phrases, 30.0, [True] * VOCABULARY)
    engine = Engine(model, END, EngineConfig(rows=3, **CONFIG))
    found, steps = engine.decode(requests(words)), engine.counters.steps
    plain = Engine(model, END, EngineConfig(rows=3, **CONFIG))
    expected = plain.decode(requests(None))
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    for one, other in zip(found, expected):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
    assert steps > 2 * plain.counters.steps  # attempts were made


def test_rows_with_and_without_hot_words_share_a_batch():
    model, words = small_model(), words_of(60, 6.0)
    mixed = [one if n % 2 else two for n, (one, two) in enumerate(zip(requests(words), requests(None)))]
    together = Engine(model, END, EngineConfig(rows=5, **CONFIG)).decode(mixed)
    alone = [Engine(model, END, EngineConfig(rows=1, **CONFIG)).decode([one])[0] for one in mixed]
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    plain = Engine(model, END, EngineConfig(rows=5, **CONFIG)).decode(requests(None))
    assert [one.tokens for one in together[::2]] == [one.tokens for one in plain[::2]]


def test_fixed_shapes_take_tokens_back_too(monkeypatch):
    model, words = small_model(), words_of(60, 6.0)
    expected = Engine(model, END, EngineConfig(rows=5, **CONFIG)).decode(requests(words))
    monkeypatch.setattr(Engine, "_fixed_steps", lambda engine: FixedSteps(engine.model.decoder, capture=False))
    found = Engine(model, END, EngineConfig(rows=5, **CONFIG)).decode(requests(words))
    assert [one.tokens for one in found] == [one.tokens for one in expected]


def test_no_words_are_lengthened():
    """A phrase after which the model's own text continues the word is not written."""
    model = small_model()
    (plain,) = Engine(model, END, EngineConfig(**CONFIG)).decode(requests(None, 1))
    others = [token for token in range(8, VOCABULARY) if token not in plain.tokens]
    (written,) = Engine(model, END, EngineConfig(**CONFIG)).decode(
        requests(HotWords([others[:1]], 30.0, [True] * VOCABULARY), 1)
    )
    assert others[0] in written.tokens
    (inside,) = Engine(model, END, EngineConfig(**CONFIG)).decode(
        requests(HotWords([others[:1]], 30.0, [False] * VOCABULARY), 1)
    )
    assert inside.tokens == plain.tokens


@pytest.mark.parametrize("whisper", [False, True])
def test_beams_have_the_credit_of_their_phrases(whisper):
    model, weight = small_model(), 3.0
    if whisper:
        model.generation = {"no_timestamps_token_id": 7}
    words = words_of(7, weight)
    config = {"beams": 4, "length_penalty": 0.0, **CONFIG}
    found = Engine(model, END, EngineConfig(rows=4, **config)).decode(requests(words))
    single = [Engine(model, END, EngineConfig(rows=1, **config)).decode([one])[0] for one in requests(words)]
    for one, other in zip(found, single):
        assert [beam.tokens for beam in one.alternatives] == [beam.tokens for beam in other.alternatives]
        for beam in one.alternatives:
            assert sum(beam.logprobs) == pytest.approx(beam.logprob, abs=1e-4)
    plain = Engine(model, END, EngineConfig(rows=4, **config)).decode(requests(None))
    assert [one.tokens for one in found] != [one.tokens for one in plain]


def test_credit_is_given_for_complete_phrases_only():
    begins = [False] * VOCABULARY
    for token in (END, 10, 12, 14):
        begins[token] = True
    words = HotWords([[10, 11], [10, 11, 12, 13]], 4.0, begins)
    scores = torch.zeros(VOCABULARY)

    def credit_of(tokens: list[int]) -> float:
        credit = Credit(words, words.opening)
        total = credit.total
        for token in tokens:
            scores.zero_()
            credit.add_to(scores)
            total += float(scores[token])
            credit = credit.after(token)
            assert credit.total == pytest.approx(total)
        return total

    assert credit_of([10]) == 2.0
    assert credit_of([10, 11]) == credit_of([10, 11, END]) == credit_of([14, 10, 11, 12]) == 4.0
    assert credit_of([10, 12]) == credit_of([10, END]) == credit_of([10, 11, 20]) == 0.0
    assert credit_of([10, 11, 12, 13, END]) == credit_of([10, 11, 12, 14]) == 4.0
    assert credit_of([10, 11, 10, 11, END]) == 8.0
