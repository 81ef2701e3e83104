"""Choice of the next tokens: what the model's settings forbid, greedy search, sampling, and beam search.

Rows are in slots as in the decoder's cache. B: rows, N: beams, R: rows of logits, V: vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from canter.inference.engine.ctc import Joint
from canter.inference.engine.drafts import Draft
from canter.inference.engine.hotwords import ATTEMPTS, Boost, Candidate, Credit, HotWords
from canter.inference.engine.requests import Alternative
from canter.inference.engine.timestamps import TimestampTokens, WhisperOrder, timestamp_order
from canter.models.cache import swap_out

BLOCK = 64  # logits per block in `best`
CANDIDATES = 16  # most probable tokens by attention that joint greedy search scores, beside the end token
LEAST_REPEATS = 8
"""Number of times that an n-gram follows itself at the end of a row that repeats itself endlessly."""


class Rules:
    """Constraints on the next token: suppressed tokens, and the order of timestamps."""

    def __init__(self, generation: Mapping[str, Any], end: int, device: torch.device):
        """Read the constraints from ``generation``, in the terms of Hugging Face's ``generation_config.json``."""
        self.end = end
        never, at_first = (
            torch.tensor(generation.get(name) or [], dtype=torch.long, device=device)
            for name in ("suppress_tokens", "begin_suppress_tokens")
        )
        self.never, self.never_first = never, torch.cat([never, at_first])
        self.no_timestamps: int | None = generation.get("no_timestamps_token_id")
        self.order = timestamp_order(generation, end)
        self.renormalised = isinstance(self.order, WhisperOrder)
        """True where greedy search's log probabilities are those among the allowed tokens, as in openai-whisper."""

    @property
    def timestamps(self) -> TimestampTokens | None:
        """Ids of timestamps; None for a model without them."""
        return self.order.stamps if self.order else None

    @property
    def no_speech(self) -> int | None:
        """Id of Whisper's no-speech token, which precedes <|notimestamps|>."""
        return self.no_timestamps - 1 if self.no_timestamps is not None and self.renormalised else None

    def has_timestamps(self, prompt: Sequence[int]) -> bool:
        """Return whether the model writes timestamps after this prompt."""
        return self.no_timestamps is not None and self.no_timestamps not in prompt

    def suppress(self, logits: Tensor, opening: bool, others: Sequence[Tensor | None] = ()) -> None:
        """Set suppressed tokens to -inf in logits (R, V); ``opening``: the first token after the prompt is next.

        others: for each row, the tokens to suppress there instead of the usual ones, if any.
        """
        which = self.never_first if opening else self.never
        if any(one is not None for one in others):
            at_first = which[len(self.never) :]
            for row, other in zip(logits, others, strict=True):
                row.index_fill_(0, which if other is None else torch.cat([other, at_first]), -math.inf)
        elif len(which):
            # An assignment would copy the number to the GPU and wait for it.
            logits.index_fill_(1, which, -math.inf)

    def order_timestamps(self, logits: Tensor, stamped: Sequence[bool], written: Sequence[Sequence[int]]) -> None:
        """Enforce the order of timestamps in logits (R, V) of rows whose tokens after the prompt are ``written``;
        ``stamped``: the rows with timestamps."""
        if self.order:
            self.order.apply(logits, stamped, written)


class RepetitionGuard:
    """Guard that ends rows which repeat an n-gram endlessly; it replaces no token.

    A model may repeat the same words until the limit on tokens, given audio unlike its training data. People repeat
    themselves too (digits, "no no no", laughter), so a row ends only if its repeats also take more tokens than its
    audio has time for. Its text is truncated after a few repeats, and is the beginning of the unguarded text.
    """

    def __init__(self, ngram: int, repeats: int):
        """Check n-grams of up to ``ngram`` tokens, and keep ``repeats`` repeats; 0 of either turns the guard off."""
        self.repeats, self.longest = repeats, ngram if repeats else 0

    def kept(self, tokens: Sequence[int], allowed: float, at_limit: bool) -> int | None:
        """Return the number of tokens to keep of a row that is to end here; None: it may continue.

        allowed: number of tokens that fit in the time of its audio. at_limit: the row is at the limit on tokens, and
        keeps all of them, unless these are more than ``allowed`` and end in repeats.
        """
        count, found = len(tokens), list[tuple[int, int]]()
        if count > allowed or (at_limit and count == allowed):
            found = self._repeats(tokens)
        if not at_limit and not any(span > allowed for _, span in found):
            return None
        size, span = found[0] if found else (0, 0)
        return count - max(0, span - size * (self.repeats + 1))

    def _repeats(self, tokens: Sequence[int]) -> list[tuple[int, int]]:
        """Return the length of each n-gram that repeats itself at the end, shortest first, and the number of tokens of
        all its repeats."""
        ids, found = np.array(tokens), list[tuple[int, int]]()
        for size in range(1, min(self.longest, len(ids) // (LEAST_REPEATS + 1)) + 1):
            other = np.flatnonzero(ids[:-size] != ids[size:])
            equal = len(ids) - size - (int(other[-1]) + 1 if len(other) else 0)
            if equal >= LEAST_REPEATS * size:
                found.append((size, equal + size))
        return found


@dataclass
class Row:
    """State of a live row in the search."""

    limit: int
    """Maximum number of tokens."""
    temperature: float = 0.0
    """0: the most probable token; else tokens are drawn from softmax(logits / temperature)."""
    stamped: bool = False
    """Enforce the order of timestamps."""
    seed: int = 0
    prompt: int = 0
    """Number of tokens in the prompt."""
    scored: bool = False
    """Compute log probabilities in greedy search too."""
    tokens: list[int] = field(default_factory=list)
    logprob: float = 0.0
    """Sum of the tokens' natural-log probabilities, end token included, of beams and scored rows."""
    logprobs: list[float] = field(default_factory=list)
    """Natural-log probability of each token, of beams and scored rows; in greedy search then of the end token."""
    finished: bool = False
    """True once an end token has ended the row."""
    allowed: float = math.inf
    """Number of tokens that fit in the time of its audio, for `RepetitionGuard`; infinite: no guard."""
    alternatives: list[Alternative] = field(default_factory=list)
    """Finished beams, best first."""
    ctc: Tensor | None = None
    """Log probabilities of the CTC head (T, C), for joint search."""
    hotwords: HotWords | None = None
    """Phrases to prefer; rows with a temperature do not."""
    draft: Draft | None = None
    """Draft of its text; None for rows with a temperature or hot words."""
    never: Tensor | None = None
    """Ids of tokens to suppress instead of the usual ones."""

    def __post_init__(self):
        self.drafted: list[int] = []  # tokens of the draft in the present step
        self.draws = np.random.default_rng(self.seed) if self.temperature else None
        self.boost = Boost(self.hotwords) if self.hotwords and not self.temperature else None


@dataclass
class Choice:
    """Choice of a search in one step."""

    ended: list[int]
    """Slots that have ended."""
    parents: Tensor | None = None
    """Parent beam of each beam (B, N); None if each is its own."""
    taken_back: dict[int, int] = field(default_factory=dict)
    """Number of tokens in the cache that a row takes back, by slot."""
    drafted: int = 0
    """Number of drafted tokens among the inputs."""
    accepted: int = 0
    """Number of these that are the rows' text."""
    rejected: int = 0
    """Number of rows with another one."""


class Search(Protocol):
    """Interface of the searches to the engine."""

    beams: int

    def add(self, rows: Sequence[Row]) -> None:
        """Add rows in the next slots."""
        ...

    def remove(self, slots: list[int]) -> None:
        """Remove rows; the last ones take their slots."""
        ...

    def inputs(self, width: int = 1) -> list[list[int]]:
        """Return the next input tokens (B, N) of the decoder; in greedy search (B, K), ``width`` of each row."""
        ...

    def choose(self, logits: Tensor, first: int, opening: bool) -> Choice:
        """Choose the next tokens of the rows from slot ``first`` on.

        logits: (B, 1, V) if ``opening`` (after the prompt), else (B, N, V) for the latest `inputs`.
        """
        ...


def drawn(logits: Tensor, row: Row, count: int = 1) -> np.ndarray:
    """Draw ``count`` tokens from logits (V,) at the row's temperature, by random numbers of the row."""
    assert row.draws is not None
    cumulated = (logits.float() / row.temperature).softmax(-1).double().cumsum(-1)
    points = torch.from_numpy(row.draws.random(count)).to(cumulated.device) * cumulated[-1]
    return torch.searchsorted(cumulated, points, right=True).clamp(max=len(logits) - 1).cpu().numpy()


def best(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return values and indices (R, count) of the largest of logits (R, V), largest first.

    This is ``topk`` in two passes: the largest values lie in the ``count`` blocks with the largest maxima.
    """
    rows, size = logits.shape
    blocks = size // BLOCK
    if blocks <= 2 * count:
        return logits.topk(count, dim=-1)
    blocked = logits[:, : blocks * BLOCK].view(rows, blocks, BLOCK)
    chosen = blocked.amax(-1).topk(count, dim=-1).indices
    values = blocked.gather(1, chosen[:, :, None].expand(-1, -1, BLOCK)).flatten(1)
    places = (chosen[:, :, None] * BLOCK + torch.arange(BLOCK, device=logits.device)).flatten(1)
    remaining = torch.arange(blocks * BLOCK, size, device=logits.device).expand(rows, -1)
    values, places = torch.cat([values, logits[:, blocks * BLOCK :]], 1), torch.cat([places, remaining], 1)
    values, within = values.topk(count, dim=-1)
    return values, places.gather(1, within)


def candidates(logits: Tensor, count: int, end: int) -> tuple[Tensor, Tensor]:
    """Return values and indices (R, count + 1) of the largest of logits (R, V), and of the end token in the last
    column."""
    values, tokens = best(logits, min(count, logits.shape[1]))
    values = values.masked_fill(tokens == end, -math.inf)
    ends = torch.full_like(tokens[:, :1], end)
    return torch.cat([values, logits[:, end, None]], 1), torch.cat([tokens, ends], 1)


class Greedy:
    """The best token that the rules allow, or one drawn; with ``joint``, by CTC and attention. The guard ends rows that
    run in circles. A step of K tokens a row checks drafts; the text does not depend on them.

    K: tokens of a row in a step, its last one and drafted ones.
    """

    beams = 1

    def __init__(self, rules: Rules, guard: RepetitionGuard, pad: int = 0, joint: Joint | None = None):
        self.rules, self.guard, self.pad, self.joint = rules, guard, pad, joint
        self.rows: list[Row] = []

    def add(self, rows: Sequence[Row]) -> None:
        self.rows += rows
        if self.joint:
            self.joint.scorer.add([row.ctc for row in rows if row.ctc is not None])

    def remove(self, slots: list[int]) -> None:
        swap_out(self.rows, slots)
        if self.joint:
            self.joint.scorer.remove(slots)

    def inputs(self, width: int = 1) -> list[list[int]]:
        for row in self.rows:
            room = min(width, row.limit - len(row.tokens)) - 1
            row.drafted = row.draft.following(room) if row.draft and room > 0 else []
        return [[row.tokens[-1], *row.drafted, *[self.pad] * (width - 1 - len(row.drafted))] for row in self.rows]

    def choose(self, logits: Tensor, first: int, opening: bool) -> Choice:
        rows, width = self.rows[first:], logits.shape[1]
        drafted = [[] if opening else row.drafted for row in rows]
        scores = logits.flatten(0, 1).float()  # (B * K, V)
        scored = bool(self.joint) or any(row.scored for row in rows)
        total = scores.logsumexp(-1) if scored and not self.rules.renormalised else None
        self.rules.suppress(scores, opening, [row.never for row in rows for _ in range(width)])
        if self.rules.order:
            stamped = [row.stamped for row in rows for _ in range(width)]
            written = [row.tokens + some[:n] for row, some in zip(rows, drafted) for n in range(width)]
            self.rules.order_timestamps(scores, stamped, written)
        if scored and total is None:
            total = scores.logsumexp(-1)
        taken_back: dict[int, int] = {}
        if self.joint and total is not None:
            chosen, logprobs = self._jointly(self.joint, scores - total[:, None], rows, first)
        else:
            chosen, logprobs = self._by_attention(scores, rows, total)
            if any(row.boost for row in rows):
                taken_back = self._prefer_hotwords(scores[::width], rows, chosen, logprobs, first)
        found = [_agreed(some, guess) for some, guess in zip(chosen, drafted)]
        ended = self._write(found, logprobs, first)
        for slot, (row, tokens, guess) in enumerate(zip(rows, found, drafted), first):
            if row.draft:
                row.draft.took(tokens, len(guess))
            if width > len(tokens):
                taken_back[slot] = taken_back.get(slot, 0) + width - len(tokens)
        accepted = sum(map(len, found)) - len(rows)
        rejected = sum(len(tokens) <= len(guess) for tokens, guess in zip(found, drafted))
        return Choice(ended, None, taken_back, sum(map(len, drafted)), accepted, rejected)

    def _write(self, found: Sequence[Sequence[int]], logprobs: Sequence[Sequence[float]], first: int) -> list[int]:
        """Append to each row from slot ``first`` on its next tokens, until it ends; return the slots that have
        ended."""
        ended: list[int] = []
        for slot, (tokens, scores) in enumerate(zip(found, logprobs), first):
            row = self.rows[slot]
            for token, logprob in zip(tokens, scores):
                if row.scored:
                    row.logprobs.append(logprob)
                if token == self.rules.end:
                    row.finished = True
                    break
                row.tokens.append(token)
                kept = self.guard.kept(row.tokens, row.allowed, len(row.tokens) >= row.limit)
                if kept is not None:
                    del row.tokens[kept:], row.logprobs[kept:]
                    break
            else:
                continue
            ended.append(slot)
            row.logprob = sum(row.logprobs)
        return ended

    def _by_attention(
        self, scores: Tensor, rows: Sequence[Row], total: Tensor | None
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Return the K most probable tokens of each row, or a drawn one, and their log probabilities (0 if no row is
        scored)."""
        chosen = scores.argmax(-1)
        width = len(chosen) // len(rows)
        for index, row in enumerate(rows):
            if row.temperature:
                chosen[index * width] = int(drawn(scores[index * width], row)[0])
        tokens = chosen.view(-1, width).tolist()
        if total is None:
            return tokens, [[0.0] * width for _ in rows]
        picked = scores.gather(1, chosen[:, None])[:, 0]
        return tokens, (picked - total).view(-1, width).tolist()

    def _prefer_hotwords(
        self, scores: Tensor, rows: Sequence[Row], chosen: list[list[int]], logprobs: list[list[float]], first: int
    ) -> dict[int, int]:
        """Replace the first choices of rows by their hot words, where these are probable enough.

        Return the number of tokens that rows take back, by slot.
        """
        taken_back: dict[int, int] = {}
        for index, candidates in self._candidates(scores, rows).items():
            row, slot = rows[index], first + index
            assert row.boost
            length = len(row.tokens)
            at_limit = length + 1 >= row.limit
            decision = row.boost.choose(length, chosen[index][0], logprobs[index][0], candidates, at_limit)
            chosen[index], logprobs[index] = [decision.token], [decision.logprob]
            if decision.kept < length:
                taken_back[slot] = length - decision.kept
                del row.tokens[decision.kept :], row.logprobs[decision.kept :]
        return taken_back

    def _candidates(self, scores: Tensor, rows: Sequence[Row]) -> dict[int, list[Candidate]]:
        """Return, by row with hot words, the tokens that begin or continue one and are probable enough."""
        boosted = {index: row.boost for index, row in enumerate(rows) if row.boost}
        found: dict[int, list[Candidate]] = {}
        for words in {boost.words for boost in boosted.values()}:
            same = [index for index, boost in boosted.items() if boost.words is words]
            here = scores[same]
            here = here.amax(1, keepdim=True) - here  # nats below the model's own choice
            roots = words.on(scores.device)[0]
            first = here[:, roots].topk(min(ATTEMPTS, len(roots)), largest=False)
            tokens, gaps = roots[first.indices].tolist(), first.values.tolist()
            following = [boosted[index].following() for index in same]
            wanted = [(place, token) for place, pairs in enumerate(following) for token, _ in pairs]
            others = iter(here[tuple(zip(*wanted))].tolist() if wanted else ())
            for place, index in enumerate(same):
                some = [Candidate(*one) for one in zip(tokens[place], words.first_nodes(tokens[place]), gaps[place])]
                some += [Candidate(token, node, next(others)) for token, node in following[place]]
                found[index] = [one for one in some if one.deficit <= words.weight]
        return found

    def _jointly(
        self, joint: Joint, scores: Tensor, rows: Sequence[Row], first: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        attention, tokens = candidates(scores, CANDIDATES, self.rules.end)
        before = attention.new_zeros(len(rows), 1, dtype=torch.float64)
        sums, numbers = joint.scores(attention[:, None], tokens[:, None], before, first, wanted=1)
        values, places = sums[:, 0].max(-1, keepdim=True)
        joint.scorer.choose(first, numbers[:, 0].gather(1, places)[:, 0])
        return tokens.gather(1, places).tolist(), values.tolist()


def _agreed(chosen: Sequence[int], drafted: Sequence[int]) -> list[int]:
    """Return the choices that follow one from another: up to the first that differs from the draft."""
    count = next((n for n, (one, other) in enumerate(zip(chosen, drafted)) if one != other), len(drafted))
    return list(chosen[: count + 1])


@dataclass(frozen=True)
class _Beam:
    """Hypothesis of a beam search."""

    score: float = 0.0
    """Sum of log probabilities, and of what hot words and length penalties add."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Log probability of each token, and of the end token."""
    ended: bool = False
    credit: Credit | None = None

    def after(self, token: int, score: float, end: int, bonus: float = 0.0) -> "_Beam":
        """Return the hypothesis with one more token and a new score, which contains ``bonus`` for the token."""
        credit, gained = None, score - self.score - bonus
        if self.credit:
            credit = self.credit.after(token)
            gained -= credit.total - self.credit.total
        tokens = self.tokens if token == end else [*self.tokens, token]
        return _Beam(score, tokens, [*self.logprobs, gained], token == end, credit)

    def alternative(self) -> Alternative:
        logprob = self.score - (self.credit.total if self.credit else 0.0)
        return Alternative(tuple(self.tokens), logprob, self.ended, tuple(self.logprobs))


@dataclass
class _Beams:
    """Beams of one row."""

    live: list[_Beam]
    """N hypotheses that the decoder extends; in NeMo's and ESPnet's search some may have ended."""
    done: list[tuple[float, _Beam]] = field(default_factory=list)
    """Finished hypotheses that were set aside, and their scores by length, best first."""


BeamStyle = Literal["nemo", "huggingface", "espnet"]
"""Library whose beam search is computed."""
PRE_BEAM = 1.5  # tokens per beam that ESPnet's joint search scores with CTC, as a multiple of the beam size
END_LENGTHS, END_MARGIN = 3, 10.0
"""ESPnet's search stops once the best finished hypothesis of each of END_LENGTHS lengths in a row is END_MARGIN nats
worse than the best of all (Watanabe et al., 2017, equation 50)."""


class BeamSearch:
    """Beam search: the N best hypotheses at every step.

    The style "huggingface" is the search of `transformers`: finished hypotheses are set aside while N others continue,
    and scores are divided by (tokens ** length_penalty), end token counted. The row ends when the best live beam could
    not enter the N finished ones at its present length, or with ``early_stopping`` as soon as N are finished.
    "nemo": a finished hypothesis keeps its place among the N, and scores are divided by
    ((5 + length) / 6) ** length_penalty, prompt counted (Wu et al., 2016). The row ends when all have ended.
    "espnet": hypotheses among the N best that finish are set aside, those that are left are extended to N again, and
    every token adds ``length_penalty`` to the score. The row ends when all N finish at once, or when further ones have
    become hopeless.

    Rows with a temperature draw N hypotheses independently and are sorted by mean log probability. With ``joint``,
    scores combine CTC and attention, for the most probable tokens of each beam by attention (2N; ESPnet: 1.5 N) and the
    end token.
    """

    def __init__(
        self,
        rules: Rules,
        beams: int,
        length_penalty: float,
        early_stopping: bool,
        style: BeamStyle,
        pad: int,
        joint: Joint | None = None,
    ):
        self.rules, self.beams, self.pad, self.joint = rules, beams, pad, joint
        self.length_penalty, self.early_stopping, self.style = length_penalty, early_stopping, style
        self.rows: list[Row] = []
        self.state: list[_Beams] = []

    def add(self, rows: Sequence[Row]) -> None:
        self.rows += rows
        for row in rows:
            credit = Credit(row.hotwords, row.hotwords.opening) if row.hotwords and not row.temperature else None
            self.state.append(_Beams([_Beam(credit=credit)] * self.beams))
        if self.joint:
            self.joint.scorer.add([row.ctc for row in rows if row.ctc is not None])

    def remove(self, slots: list[int]) -> None:
        swap_out(self.rows, slots)
        swap_out(self.state, slots)
        if self.joint:
            self.joint.scorer.remove(slots)

    def inputs(self, width: int = 1) -> list[list[int]]:
        return [[self.pad if beam.ended else beam.tokens[-1] for beam in beams.live] for beams in self.state]

    def choose(self, logits: Tensor, first: int, opening: bool) -> Choice:
        n, rows = self.beams, self.rows[first:]
        states = self.state[first:]
        width = logits.shape[1]  # beams that the decoder computed
        scores = logits.flatten(0, 1).float()  # (B * width, V)
        total = scores.logsumexp(-1)  # before the rules, as in `transformers`
        if scores.data_ptr() == logits.data_ptr():
            scores = scores.clone()
        self.rules.suppress(scores, opening, [row.never for row in rows for _ in range(width)])
        stamped = [row.stamped for row in rows for _ in range(width)]
        beams = [beam for state in states for beam in state.live[:width]]
        self.rules.order_timestamps(scores, stamped, [beam.tokens for beam in beams])
        for place, beam in enumerate(beams):
            if beam.credit and not beam.ended:
                beam.credit.add_to(scores[place])
        shape = (len(rows), width, -1)
        numbers = None
        if self.joint:
            most = int(PRE_BEAM * n) if self.style == "espnet" else 2 * n
            values, tokens = candidates(scores, most, self.rules.end)
            attention = (values - total[:, None]).view(shape)
            sums, choices, numbers = self._jointly(self.joint, attention, tokens.view(shape), first)
        else:
            values, tokens = best(scores, 2 * n)  # per beam; they include the best of the row
            sums = (values - total[:, None]).cpu().double().numpy().reshape(shape)
            choices = tokens.cpu().numpy().reshape(shape)
        parents = np.tile(np.arange(n), (len(rows), 1))
        ended = []
        for index, (row, state) in enumerate(zip(rows, states)):
            if row.temperature:
                part = scores[index * width : (index + 1) * width]
                parents[index] = self._draw(row, state, part, total[index * width : (index + 1) * width])
            else:
                parents[index] = self._extend(row, state, sums[index], choices[index])
            if row.alternatives:
                found = row.alternatives[0]
                row.tokens, row.logprobs = list(found.tokens), list(found.logprobs)
                row.logprob, row.finished = found.logprob, found.finished
                ended.append(first + index)
        if self.joint and numbers is not None:
            picked = self._picked(states, parents, choices, numbers)
            self.joint.scorer.choose(first, torch.from_numpy(picked).to(logits.device))
        same = opening or (parents == np.arange(n)).all()
        return Choice(ended, None if same else torch.from_numpy(parents).to(logits.device))

    def _jointly(
        self, joint: Joint, attention: Tensor, tokens: Tensor, first: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return joint scores of candidates (B, N, K), best first per beam, the candidates and their numbers."""
        live = [state.live[: tokens.shape[1]] for state in self.state[first:]]
        ended = torch.tensor([[beam.ended for beam in beams] for beams in live], device=tokens.device)
        attention = attention.masked_fill(ended[:, :, None], -math.inf)
        scores = [[beam.score for beam in beams] for beams in live]
        before = torch.tensor(scores, dtype=torch.float64, device=tokens.device)
        wanted = 2 * self.beams if self.style == "huggingface" else self.beams
        totals, numbers = joint.scores(attention, tokens, before, first, wanted)
        sums = (totals - before[:, :, None]).cpu().numpy()
        order = np.argsort(-sums, axis=-1, kind="stable")
        choices, numbered = tokens.cpu().numpy(), numbers.cpu().numpy()
        sums = np.take_along_axis(sums, order, -1)
        return sums, np.take_along_axis(choices, order, -1), np.take_along_axis(numbered, order, -1)

    def _picked(
        self, states: Sequence[_Beams], parents: np.ndarray, choices: np.ndarray, numbers: np.ndarray
    ) -> np.ndarray:
        """Return the number (B x N,) of the chosen candidate of each beam; -1 for beams that have ended."""
        picked = np.full(parents.shape, -1)
        for row, state in enumerate(states):
            for place, (parent, beam) in enumerate(zip(parents[row], state.live)):
                if beam.tokens and not beam.ended:
                    found = np.flatnonzero(choices[row, parent] == beam.tokens[-1])
                    picked[row, place] = numbers[row, parent, found[0]] if len(found) else -1
        return picked.ravel()

    def _extend(self, row: Row, beams: _Beams, sums: np.ndarray, choices: np.ndarray) -> list[int]:
        """Extend the beams of a row by candidates (N, K), best first, and return their parents."""
        if self.style == "nemo":
            return self._keep_places(row, beams, sums, choices)
        if self.style == "espnet":
            return self._refill(row, beams, sums, choices)
        return self._set_aside(row, beams, sums, choices)

    def _normaliser(self, tokens: int, prompt: int) -> float:
        if self.style == "nemo":
            return ((5 + prompt + tokens) / 6) ** self.length_penalty
        return tokens**self.length_penalty

    def _totals(self, beams: _Beams, sums: np.ndarray) -> np.ndarray:
        """Return the scores (N, K) of beams with each of their candidates."""
        return np.array([beam.score for beam in beams.live[: len(sums)]])[:, None] + sums

    def _set_aside(self, row: Row, beams: _Beams, sums: np.ndarray, choices: np.ndarray) -> list[int]:
        n, length = self.beams, len(beams.live[0].tokens) + 1
        totals = self._totals(beams, sums).ravel()
        order = np.argsort(-totals, kind="stable")[: 2 * n]
        at_limit = length >= row.limit
        parents: list[int] = []
        live: list[_Beam] = []
        for rank, place in enumerate(order.tolist()):
            parent, token, total = place // sums.shape[1], int(choices.flat[place]), float(totals[place])
            if token != self.rules.end and not at_limit:
                if len(parents) < n:
                    parents.append(parent)
                    live.append(beams.live[parent].after(token, total, self.rules.end))
            elif rank < n and not (self.early_stopping and len(beams.done) >= n):
                beam = beams.live[parent].after(token, total, self.rules.end)
                beams.done.append((total / self._normaliser(length, 0), beam))
        beams.done = sorted(beams.done, key=lambda one: -one[0])[:n]
        enough = len(beams.done) == n and (
            at_limit or self.early_stopping or live[0].score / self._normaliser(length, 0) <= beams.done[-1][0]
        )
        if enough or at_limit:
            row.alternatives = [beam.alternative() for _, beam in beams.done]
            return list(range(n))
        beams.live = live
        return parents

    def _keep_places(self, row: Row, beams: _Beams, sums: np.ndarray, choices: np.ndarray) -> list[int]:
        n, totals = self.beams, self._totals(beams, sums)
        found: list[tuple[float, int, int | None, float]] = []  # key, parent, token (None: it has ended), and score
        for parent in range(len(sums)):
            before = beams.live[parent]
            normaliser = self._normaliser(len(before.tokens) + 1, row.prompt)
            if before.ended:
                found.append((before.score / normaliser, parent, None, before.score))
                continue
            for total, token in zip(totals[parent, :n].tolist(), choices[parent, :n].tolist()):
                found.append((total / normaliser, parent, token, total))
        kept = sorted(found, key=lambda one: -one[0])[:n]
        old = beams.live
        beams.live = [
            old[parent] if token is None else old[parent].after(token, total, self.rules.end)
            for _, parent, token, total in kept
        ]
        longest = max((len(beam.tokens) for beam in beams.live if not beam.ended), default=0)
        if all(beam.ended for beam in beams.live) or longest >= row.limit:
            row.alternatives = [beam.alternative() for beam in beams.live]
        return [parent for _, parent, _, _ in kept]

    def _refill(self, row: Row, beams: _Beams, sums: np.ndarray, choices: np.ndarray) -> list[int]:
        n, length = self.beams, max(len(beam.tokens) for beam in beams.live) + 1
        totals = self._totals(beams, sums) + self.length_penalty
        totals[[place for place, beam in enumerate(beams.live[: len(sums)]) if beam.ended]] = -math.inf
        order = np.argsort(-totals.ravel(), kind="stable")[:n]
        parents: list[int] = []
        live: list[_Beam] = []
        for place in order.tolist():
            parent, token, total = place // sums.shape[1], int(choices.flat[place]), float(totals.flat[place])
            if total == -math.inf:
                break
            beam = beams.live[parent].after(token, total, self.rules.end, self.length_penalty)
            if beam.ended or length >= row.limit:
                beams.done.append((total, beam))
            else:
                parents.append(parent)
                live.append(beam)
        if not parents or self._hopeless(beams.done, length - 1 - row.prompt):
            best_first = sorted(beams.done, key=lambda one: -one[0])[:n]
            row.alternatives = [beam.alternative() for _, beam in best_first]
        missing = n - len(parents)
        beams.live = live + [_Beam(-math.inf, ended=True)] * missing
        return parents + [0] * missing

    def _hopeless(self, done: Sequence[tuple[float, _Beam]], longest: int) -> bool:
        """Return whether the finished hypotheses of ``longest`` tokens, end token included, and of the lengths before
        are far worse than the best; ESPnet looks as many tokens back as the prompt is long."""
        top = max((score for score, _ in done), default=0.0)
        lengths = range(longest, longest - END_LENGTHS, -1)
        found = [[score for score, beam in done if len(beam.tokens) + 1 == length] for length in lengths]
        return all(scores and max(scores) - top < -END_MARGIN for scores in found)

    def _draw(self, row: Row, beams: _Beams, logits: Tensor, total: Tensor) -> list[int]:
        n = self.beams
        tokens = drawn(logits[0], row, n) if len(logits) == 1 else np.array([drawn(one, row)[0] for one in logits])
        parents = range(n) if len(logits) > 1 else [0] * n
        gained = (logits[list(parents), tokens.tolist()] - total[list(parents)]).cpu().double().tolist()
        beams.live = [
            beam if beam.ended else beam.after(token, beam.score + gain, self.rules.end)
            for beam, token, gain in zip(beams.live, tokens.tolist(), gained)
        ]
        if all(beam.ended for beam in beams.live) or max(len(beam.tokens) for beam in beams.live) >= row.limit:
            order = sorted(beams.live, key=lambda one: -one.score / (len(one.tokens) + 1))
            row.alternatives = [beam.alternative() for beam in order]
        return list(range(n))
