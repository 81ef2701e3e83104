"""Joint CTC/attention decoding: prefix scores are those of all alignments, and searches find what a slow one finds."""

import itertools
import math
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from canter.errors import ConfigError
from canter.inference.engine.ctc import IMPOSSIBLE, Joint, PrefixScorer, Spelling, spelling_of
from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import EngineConfig, Request
from canter.inference.engine.search import CANDIDATES, BeamSearch, Row, Rules
from canter.loading import load_model
from canter.models.formats.checkpoint import save_model
from canter.text import Characters, train_tokenizer

from ..conftest import END, noises, small_model

CPU = torch.device("cpu")
Text = tuple[int, ...]


def random_log_probs(seed: int, frames: int, outputs: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(frames, outputs, generator=generator)).log_softmax(-1)


def all_texts(log_probs: torch.Tensor, blank: int = 0) -> dict[Text, float]:
    """Probability of every text, summed over every alignment."""
    frames, outputs = log_probs.shape
    found: dict[Text, float] = {}
    for alignment in itertools.product(range(outputs), repeat=frames):
        text = tuple(symbol for symbol, _ in itertools.groupby(alignment) if symbol != blank)
        score = sum(float(log_probs[frame, symbol]) for frame, symbol in enumerate(alignment))
        found[text] = found.get(text, 0.0) + math.exp(score)
    return found


def expected_score(texts: dict[Text, float], before: Text, after: Text | None) -> float:
    """log P(text begins with ``after`` | it begins with ``before``); of None, that it ends there."""

    def begins(prefix: Text) -> float:
        return sum(p for text, p in texts.items() if text[: len(prefix)] == prefix)

    possible = begins(before)
    if not possible:
        return 0.0
    share = (texts.get(before, 0.0) if after is None else begins(after)) / possible
    return max(math.log(share), IMPOSSIBLE) if share else IMPOSSIBLE


# Token 0 ends; the others spell nothing, one symbol or several; 3 is the separator, and the blank the output `blank`.
SPELLED = [(), (), (1,), (2,), (3,), (1, 1), (3, 2, 3), (3, 3), (2, 3)]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.integers(0, 1000),
    st.lists(st.tuples(st.integers(0, 1), st.integers(1, len(SPELLED) - 1)), min_size=6, max_size=6),
    st.sampled_from([0, 3]),
)
def test_prefix_scores_are_sums_over_all_alignments(frames, seed, choices, blank):
    """Rows of several lengths, two hypotheses each, that take different tokens, leave and enter."""
    spelled = [tuple(0 if blank and s == blank else s for s in symbols) for symbols in SPELLED]
    spelling = Spelling(spelled, blank=blank, separator=0 if blank else 3)
    rows = [random_log_probs(seed + number, size, 4) for number, size in enumerate(frames)]
    scorer = PrefixScorer(spelling, end=0, beams=2, device=CPU)
    scorer.add(rows[:1])
    if rows[1:]:
        scorer.add(rows[1:])
    texts = [all_texts(row, blank) for row in rows]
    said: list[Text] = [()] * (2 * len(rows))
    for step in range(2):
        pairs = [(hypothesis, token) for hypothesis in range(len(said)) for token in range(len(spelled))]
        hypotheses, tokens = (torch.tensor(column) for column in zip(*pairs))
        half = len(pairs) // 2  # in two calls, which add up
        scores = torch.cat(
            [scorer.score(hypotheses[:half], tokens[:half]), scorer.score(hypotheses[half:], tokens[half:])]
        )
        longer: list[Text] = []
        for (hypothesis, token), score in zip(pairs, scores.tolist()):
            before = said[hypothesis]
            longer.append(before + (spelled[token] if before else spelling.at_start(spelled[token])))
            wanted = expected_score(texts[hypothesis // 2], before, None if token == 0 else longer[-1])
            assert score == pytest.approx(wanted, abs=1e-5)
        picked = []
        for hypothesis in range(len(said)):
            beam, token = choices[(hypothesis + step) % len(choices)]
            picked.append((hypothesis // 2 * 2 + beam) * len(spelled) + token)
        picked[0] = -1  # stays as it is
        scorer.choose(0, torch.tensor(picked))
        said = [said[0], *(longer[number] for number in picked[1:])]
        if step == 0:
            scorer.remove([0])  # the last row takes its slot
            texts[0], said[:2] = texts[-1], said[-2:]
            rows[0] = rows[-1]
            scorer.add([random_log_probs(seed + 9, 3, 4)])
            texts[-1], said[-2:] = all_texts(random_log_probs(seed + 9, 3, 4), blank), [(), ()]


def test_a_head_over_the_same_tokens_spells_each_as_itself():
    log_probs = random_log_probs(0, 5, 4)
    scorer = PrefixScorer(Spelling([(0,), (1,), (2,), (3,)], blank=3), end=0, beams=1, device=CPU)
    scorer.add([log_probs])
    texts = all_texts(log_probs, blank=3)
    scores = scorer.score(torch.zeros(4, dtype=torch.long), torch.arange(4))
    wanted = [expected_score(texts, (), None if token == 0 else (token,)) for token in range(3)]
    assert scores.tolist()[:3] == pytest.approx(wanted, abs=1e-5)


def test_frames_of_other_rows_change_nothing():
    short, long = random_log_probs(0, 4, 5), random_log_probs(1, 300, 5)
    spelling = Spelling([(), (1,), (2, 3), (4,)])
    scores = []
    for rows in ([short], [short, long]):
        scorer = PrefixScorer(spelling, end=0, beams=1, device=CPU)
        scorer.add(rows)
        found = []
        for token in (1, 2, 0):
            found.append(float(scorer.score(torch.tensor([0]), torch.tensor([token]))))
            scorer.choose(0, torch.tensor([0]))
        scores.append(found)
    assert scores[0] == pytest.approx(scores[1], abs=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_a_wide_beam_by_ctc_only_finds_the_text_of_the_highest_probability(seed):
    log_probs = random_log_probs(seed, 5, 4)
    tokens = [(), *((s,) for s in (1, 2, 3)), *itertools.product((1, 2, 3), repeat=2)]
    tokens += itertools.product((1, 2, 3), repeat=3)
    joint = Joint(PrefixScorer(Spelling(tokens), end=0, beams=20, device=CPU), weight=1.0)
    search = BeamSearch(Rules({}, 0, CPU), 20, 0.0, False, style="nemo", pad=0, joint=joint)
    row = Row(limit=8, ctc=log_probs)
    search.add([row])
    generator = torch.Generator().manual_seed(seed)  # attention has no say
    ended = search.choose(torch.randn(1, 1, len(tokens), generator=generator), 0, True).ended
    while not ended:
        ended = search.choose(torch.randn(1, 20, len(tokens), generator=generator), 0, False).ended
    texts = all_texts(log_probs)
    likeliest = max(texts, key=lambda text: texts[text])
    assert tuple(s for token in row.tokens for s in tokens[token]) == likeliest
    assert row.logprob == pytest.approx(math.log(texts[likeliest]), abs=1e-5)


# -- the engine --

LETTERS = "abcdefghij"


@cache
def joint_model():
    """A random model whose 40 tokens spell up to three letters, with a head that is sure of some."""
    model = small_model()
    random = np.random.default_rng(0)
    pieces = ["", "", "", "", "", "", "", ""]  # prompts are made of these, and END is one
    for number in range(len(pieces), 40):
        letters = "".join(random.choice([*LETTERS], random.integers(1, 4)))
        pieces.append(("▁" if number % 2 else "") + letters)
    model.tokenizer = SimpleNamespace(
        languages=(),
        encode=lambda text, lang: [],
        piece=lambda token: pieces[token],
        decode=lambda tokens: "".join(pieces[token] for token in tokens).replace("▁", " ").strip(),
    )
    model.characters = Characters([" ", *LETTERS])
    assert model.ctc is not None
    with torch.no_grad():
        model.ctc.weight *= 4
    return model


def requests(count: int = 8) -> list[Request]:
    clips = noises(count, longest=1.2)
    return [Request(clip, [5] * (1 + number % 3) + [7], number) for number, clip in enumerate(clips)]


def prefix_probability(log_probs: np.ndarray, text: Text) -> tuple[float, float]:
    """log P(text begins so), log P(text is this), by Graves' forward variables, a frame at a time."""
    label, pause = np.full(len(text) + 1, -np.inf), np.full(len(text) + 1, -np.inf)
    pause[0], begins = 0.0, 0.0 if not text else -np.inf
    for frame in log_probs:
        new_label, new_pause = label.copy(), pause.copy()
        for place in range(len(text) + 1):
            new_pause[place] = np.logaddexp(label[place], pause[place]) + frame[0]
            if place:
                repeats = place > 1 and text[place - 1] == text[place - 2]
                begun = pause[place - 1] if repeats else np.logaddexp(pause[place - 1], label[place - 1])
                new_label[place] = np.logaddexp(label[place], begun) + frame[text[place - 1]]
                if place == len(text):
                    begins = np.logaddexp(begins, begun + frame[text[-1]])
        label, pause = new_label, new_pause
    return float(begins), float(np.logaddexp(label[-1], pause[-1]))


def test_the_slow_prefix_probabilities_are_those_of_all_alignments():
    log_probs = random_log_probs(3, 5, 4)
    texts = all_texts(log_probs)
    for text in [(), (1,), (1, 1), (2, 3, 1), (3, 3, 3)]:
        begins, whole = prefix_probability(log_probs.double().numpy(), text)
        assert begins == pytest.approx(math.log(sum(p for t, p in texts.items() if t[: len(text)] == text)), abs=1e-5)
        assert whole == pytest.approx(math.log(texts[text]), abs=1e-5)


@torch.inference_mode()
def slow_joint(request: Request, weight: float, beams: int, limit: int) -> tuple[list[int], float]:
    """Return tokens and score of joint search that recomputes complete prefixes."""
    count = CANDIDATES if beams == 1 else 2 * beams
    model = joint_model()
    spelling = spelling_of(model)
    features = model.features(torch.from_numpy(request.audio)[None], torch.tensor([len(request.audio)]))
    encoded, lengths = model.encode(*features)
    ctc = model.ctc_log_probs(encoded, lengths)[0][0].double().numpy()

    def spelled(tokens: tuple[int, ...]) -> Text:
        return spelling.at_start(tuple(s for token in tokens for s in spelling.symbols[token]))

    running: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    while True:
        found = []
        for tokens, score in running:
            if tokens and tokens[-1] == END:
                found.append((tokens, score))
                continue
            logits = model.logits(encoded, lengths, torch.tensor([[*request.prompt, *tokens]]))[0, -1]
            attention = logits.float().log_softmax(-1).tolist()
            begins, whole = prefix_probability(ctc, spelled(tokens))
            likeliest = sorted(range(len(attention)), key=lambda token: -attention[token])[:count]
            for token in {*likeliest, END}:
                after = whole if token == END else prefix_probability(ctc, spelled((*tokens, token)))[0]
                own = max(after - begins, IMPOSSIBLE) if begins > -math.inf else 0.0
                own = own if token == END or spelling.symbols[token] else attention[token]
                found.append(((*tokens, token), score + (1 - weight) * attention[token] + weight * own))
        running = sorted(found, key=lambda one: -one[1])[:beams]
        unended = [tokens for tokens, _ in running if tokens[-1] != END]
        if not unended or max(map(len, unended)) >= limit:
            tokens, score = running[0]
            return [token for token in tokens if token != END], score


SETTINGS = {"tokens_per_frame": 0.0, "extra_tokens": 5, "max_repeats": 0}


@pytest.mark.parametrize(("weight", "beams"), [(0.3, 1), (0.6, 1), (0.3, 3)])
def test_joint_search_finds_what_a_slow_one_does_in_any_batch(weight, beams):
    config = EngineConfig(ctc_weight=weight, beams=beams, **SETTINGS)
    model, asked = joint_model(), requests()
    found = {rows: Engine(model, END, replace(config, rows=rows)).decode(asked) for rows in (1, 8, 64)}
    for number, request in enumerate(asked):
        tokens, score = slow_joint(request, weight, beams, limit=5)
        for rows in found:
            assert found[rows][number].tokens == tokens
            if beams > 1:
                assert found[rows][number].logprob == pytest.approx(score, abs=1e-4)
    alone = Engine(model, END, replace(config, ctc_weight=0.0)).decode(asked)
    assert sum(a.tokens != b.tokens for a, b in zip(alone, found[1])) > 2, "CTC changes nothing here"


def test_the_guard_changes_no_token_of_joint_search():
    """Texts with the guard are those without it, or their beginnings."""
    config = EngineConfig(ctc_weight=0.2, max_repeats=1)
    plain = Engine(joint_model(), END, replace(config, max_repeats=0)).decode(requests())
    for found, without in zip(Engine(joint_model(), END, config).decode(requests()), plain):
        assert found.tokens == without.tokens[: len(found.tokens)]
        assert found.finished == without.finished


def test_a_scored_row_has_the_sum_of_its_joint_scores():
    config = EngineConfig(ctc_weight=0.3, **SETTINGS)
    request = replace(requests()[0], scored=True)
    found = Engine(joint_model(), END, config).decode([request])[0]
    assert found.logprob == pytest.approx(slow_joint(request, 0.3, 1, limit=5)[1], abs=1e-4)


def test_without_a_weight_ctc_is_not_computed(monkeypatch):
    model = joint_model()
    monkeypatch.setattr(model, "ctc_log_probs", lambda *_: pytest.fail("computed"), raising=True)
    Engine(model, END, EngineConfig(draft="off")).decode(requests(2))


def test_what_cannot_be_decoded_jointly_is_refused():
    config = EngineConfig(ctc_weight=0.3)
    model = small_model()
    with pytest.raises(ConfigError, match="not known how"):
        Engine(model, END, config)
    model.ctc = None
    with pytest.raises(ConfigError, match="no CTC head"):
        Engine(model, END, config)
    for weight in (-0.1, 1.5, math.nan):
        with pytest.raises(ConfigError, match="between 0"):
            Engine(joint_model(), END, EngineConfig(ctc_weight=weight))
    with pytest.raises(ValueError, match="temperature"):
        Engine(joint_model(), END, config).decode([replace(requests(1)[0], temperature=0.5)])


def test_pieces_are_spelled_by_their_characters_and_special_tokens_not_at_all(tmp_path):
    texts = ["el médico abrió la ventana", "the doctor opened every window", "the window"] * 5
    tokenizer, model = train_tokenizer(texts, ["en", "es"], 60), small_model(vocabulary=60)
    model.characters = Characters(sorted({*"".join(texts)}))
    model.ctc = torch.nn.Linear(32, 2 * model.characters.size)
    model.config = replace(model.config, ctc_vocabulary=model.characters.size)
    save_model(model, tmp_path / "model", tokenizer)
    loaded = load_model(tmp_path / "model")
    spelling = spelling_of(loaded)
    assert loaded.characters is not None
    for text in texts[:3]:
        prompt = loaded.prompt(source_lang="en", target_lang="en")
        tokens = [*prompt, *tokenizer.encode(text), tokenizer.end]
        symbols = spelling.at_start(tuple(s for token in tokens for s in spelling.symbols[token]))
        assert loaded.characters.decode(symbols) == text
