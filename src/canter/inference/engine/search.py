"""How the next tokens are chosen: greedily (or drawn at a temperature), or by beam search.

Rows sit in slots as in the decoder's cache. B: rows, N: beams, V: vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from canter.inference.engine.ctc import Joint
from canter.inference.engine.repetition import RepetitionGuard
from canter.inference.engine.rules import Rules
from canter.models.cache import swap_out

BLOCK = 64  # of logits, when the best of many are looked for
CANDIDATES = 16  # tokens, the likeliest by attention and the end token, that joint greedy search chooses from


@dataclass
class Row:
    """A live row, as far as choosing tokens is concerned."""

    limit: int
    """Tokens it may have, the end token included or not."""
    temperature: float = 0.0
    """0: the best token; else drawn from softmax(logits / temperature)."""
    stamped: bool = False
    """Whether timestamps are ruled."""
    seed: int = 0
    prompt: int = 0
    """Tokens of the prompt."""
    scored: bool = False
    """Whether a greedy search sums up log probabilities too."""
    tokens: list[int] = field(default_factory=list)
    logprob: float = 0.0
    """Sum of the tokens' natural-log probabilities, the end token's included, where they were asked for."""
    steps: list[float] = field(default_factory=list)
    """Log probability of each token, for scored rows of greedy search."""
    finished: bool = False
    """Whether an end token ended it."""
    allowed: float = math.inf
    """Tokens that its audio has time for; one that runs in circles for longer ends. Infinite: it is not guarded."""
    alternatives: list[tuple[list[int], float, bool]] = field(default_factory=list)
    """Of beams: tokens, sum of log probabilities, and whether finished, best first."""
    ctc: Tensor | None = None
    """Log probabilities of the CTC head (T, C), for joint search."""

    def __post_init__(self):
        self.draws = np.random.default_rng(self.seed) if self.temperature else None


class Search(Protocol):
    """What the engine needs of a search."""

    beams: int

    def add(self, rows: Sequence[Row]) -> None:
        """New rows, in the next slots."""
        ...

    def remove(self, slots: list[int]) -> None:
        """Rows leave, the last ones take their slots."""
        ...

    def inputs(self) -> list[list[int]]:
        """The tokens (B, N) that the decoder reads next."""
        ...

    def choose(self, logits: Tensor, first: int, opening: bool) -> tuple[list[int], Tensor | None]:
        """logits of the rows from slot ``first`` on, (B, 1, V) if ``opening``, else (B, N, V) -> the slots
        that have ended, and which beam each goes on from (B, N), None if each from itself."""
        ...


def drawn(logits: Tensor, row: Row, count: int = 1) -> np.ndarray:
    """``count`` tokens drawn from logits (V,) at the row's temperature, by its own random numbers."""
    assert row.draws is not None
    shares = (logits.float() / row.temperature).softmax(-1).double().cumsum(-1)
    points = torch.from_numpy(row.draws.random(count)).to(shares.device) * shares[-1]
    return torch.searchsorted(shares, points, right=True).clamp(max=len(logits) - 1).cpu().numpy()


def best(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """logits (R, V) -> values and indices (R, count) of the largest, largest first.

    As ``topk``, in two passes: the largest of all are within the ``count`` blocks whose own largest are.
    """
    rows, size = logits.shape
    blocks = size // BLOCK
    if blocks <= 2 * count:
        return logits.topk(count, dim=-1)
    whole = logits[:, : blocks * BLOCK].view(rows, blocks, BLOCK)
    chosen = whole.amax(-1).topk(count, dim=-1).indices
    values = whole.gather(1, chosen[:, :, None].expand(-1, -1, BLOCK)).flatten(1)
    places = (chosen[:, :, None] * BLOCK + torch.arange(BLOCK, device=logits.device)).flatten(1)
    rest = torch.arange(blocks * BLOCK, size, device=logits.device).expand(rows, -1)
    values, places = torch.cat([values, logits[:, blocks * BLOCK :]], 1), torch.cat([places, rest], 1)
    values, within = values.topk(count, dim=-1)
    return values, places.gather(1, within)


def candidates(logits: Tensor, count: int, end: int) -> tuple[Tensor, Tensor]:
    """Return values and indices (R, count + 1) of the largest of logits (R, V), and of the end token in any case."""
    values, tokens = best(logits, min(count, logits.shape[1]))
    values = values.masked_fill(tokens == end, -math.inf)  # which stands in the last column
    ends = torch.full_like(tokens[:, :1], end)
    return torch.cat([values, logits[:, end, None]], 1), torch.cat([tokens, ends], 1)


class Greedy:
    """The best token that the rules allow, or one drawn; with ``joint``, by CTC and attention. The guard ends rows that
    run in circles."""

    beams = 1

    def __init__(self, rules: Rules, guard: RepetitionGuard, joint: Joint | None = None):
        self.rules, self.guard, self.joint = rules, guard, joint
        self.rows: list[Row] = []

    def add(self, rows: Sequence[Row]) -> None:
        self.rows += rows
        self.guard.add([row.allowed for row in rows])
        if self.joint:
            self.joint.scorer.add([row.ctc for row in rows if row.ctc is not None])

    def remove(self, slots: list[int]) -> None:
        self.guard.remove(slots)
        swap_out(self.rows, slots)
        if self.joint:
            self.joint.scorer.remove(slots)

    def inputs(self) -> list[list[int]]:
        return [[row.tokens[-1]] for row in self.rows]

    def choose(self, logits: Tensor, first: int, opening: bool) -> tuple[list[int], Tensor | None]:
        scores, rows = logits[:, 0].float(), self.rows[first:]
        self.rules.suppress(scores, opening)
        stamped = [index for index, row in enumerate(rows) if row.stamped]
        if stamped:
            self.rules.order_timestamps(scores, stamped, [rows[index].tokens for index in stamped])
        chosen = self._jointly(scores, rows, first) if self.joint else self._by_attention(scores, rows)
        ended, end = [], self.rules.end
        circling = self.guard.took(chosen, first)
        for slot, (row, token) in enumerate(zip(rows, chosen), first):
            if token == end:
                row.finished = True
            else:
                row.tokens.append(token)
            if row.finished:
                ended.append(slot)
            elif slot in circling or len(row.tokens) >= row.limit:
                kept = circling.get(slot, self.guard.at_limit(slot))
                row.logprob -= sum(row.steps[kept:])
                del row.tokens[kept:]
                ended.append(slot)
        return ended, None

    def _by_attention(self, scores: Tensor, rows: Sequence[Row]) -> list[int]:
        total = scores.logsumexp(-1) if any(row.scored for row in rows) else None
        chosen = scores.argmax(-1).tolist()
        for index, row in enumerate(rows):
            if row.temperature:
                chosen[index] = int(drawn(scores[index], row)[0])
        if total is not None:
            picked = scores.gather(1, torch.tensor(chosen, device=scores.device)[:, None])[:, 0]
            for row, logprob in zip(rows, (picked - total).tolist()):
                row.logprob += logprob
                row.steps.append(logprob)
        return chosen

    def _jointly(self, scores: Tensor, rows: Sequence[Row], first: int) -> list[int]:
        assert self.joint
        scores = scores.log_softmax(-1)
        attention, tokens = candidates(scores, CANDIDATES, self.rules.end)
        before = attention.new_zeros(len(rows), 1, dtype=torch.float64)
        joint, numbers = self.joint.scores(attention[:, None], tokens[:, None], before, first, wanted=1)
        values, places = joint[:, 0].max(-1, keepdim=True)
        self.joint.scorer.choose(first, numbers[:, 0].gather(1, places)[:, 0])
        chosen = tokens.gather(1, places)[:, 0].tolist()
        for row, value in zip(rows, values[:, 0].tolist()):
            if row.scored:
                row.logprob += value
                row.steps.append(value)
        return chosen


@dataclass
class _Beams:
    """The beams of one row."""

    scores: np.ndarray  # (N,) sums of log probabilities
    tokens: list[list[int]]
    ended: list[bool]
    done: list[tuple[float, float, list[int], bool]] = field(default_factory=list)
    """Set aside, best first: score, sum of log probabilities, tokens, whether an end token ended it."""


class BeamSearch:
    """The N best continuations at every step.

    ``in_place=False`` is the search of `transformers`: finished hypotheses are set aside, N others run on,
    scores are divided by (tokens ** length_penalty), end token counted; it ends when the best that runs
    could not enter the N finished ones at its present length, or with ``early_stopping`` as soon as there
    are N. ``in_place=True`` is NeMo's: a finished hypothesis keeps its place among the N, scores are divided
    by ((5 + length) / 6) ** length_penalty, prompt counted (Wu et al., 2016), it ends when all have ended.

    Rows with a temperature draw N hypotheses independently and keep the likeliest a token. With ``joint``, scores are
    those of CTC and attention, of the 2N tokens of each beam that attention finds likeliest and of the end token.
    """

    def __init__(
        self,
        rules: Rules,
        beams: int,
        length_penalty: float,
        early_stopping: bool,
        in_place: bool,
        pad: int,
        joint: Joint | None = None,
    ):
        self.rules, self.beams, self.pad, self.joint = rules, beams, pad, joint
        self.length_penalty, self.early_stopping, self.in_place = length_penalty, early_stopping, in_place
        self.rows: list[Row] = []
        self.state: list[_Beams] = []

    def add(self, rows: Sequence[Row]) -> None:
        self.rows += rows
        n = self.beams
        self.state += [_Beams(np.zeros(n), [[] for _ in range(n)], [False] * n) for _ in rows]
        if self.joint:
            self.joint.scorer.add([row.ctc for row in rows if row.ctc is not None])

    def remove(self, slots: list[int]) -> None:
        swap_out(self.rows, slots)
        swap_out(self.state, slots)
        if self.joint:
            self.joint.scorer.remove(slots)

    def inputs(self) -> list[list[int]]:
        return [
            [self.pad if ended else tokens[-1] for tokens, ended in zip(beams.tokens, beams.ended)]
            for beams in self.state
        ]

    def choose(self, logits: Tensor, first: int, opening: bool) -> tuple[list[int], Tensor | None]:
        n, rows = self.beams, self.rows[first:]
        states = self.state[first:]
        width = logits.shape[1]  # beams that the decoder computed
        scores = logits.flatten(0, 1).float()  # (B * width, V)
        total = scores.logsumexp(-1)  # before the rules, as `transformers` has it
        if scores.data_ptr() == logits.data_ptr():
            scores = scores.clone()
        self.rules.suppress(scores, opening)
        stamped = [i * width + beam for i, row in enumerate(rows) if row.stamped for beam in range(width)]
        if stamped:
            written = [states[i // width].tokens[i % width] for i in stamped]
            self.rules.order_timestamps(scores, stamped, written)
        shape = (len(rows), width, -1)
        numbers = None
        if self.joint:
            values, tokens = candidates(scores, 2 * n, self.rules.end)
            attention = (values - total[:, None]).view(shape)
            sums, choices, numbers = self._jointly(self.joint, attention, tokens.view(shape), first)
        else:
            values, tokens = best(scores, 2 * n)  # of each beam; the best of all are among them
            sums = (values - total[:, None]).cpu().double().numpy().reshape(shape)
            choices = tokens.cpu().numpy().reshape(shape)
        parents = np.tile(np.arange(n), (len(rows), 1))
        ended = []
        for index, (row, beams) in enumerate(zip(rows, states)):
            if row.temperature:
                part = scores[index * width : (index + 1) * width]
                parents[index] = self._draw(row, beams, part, total[index * width : (index + 1) * width])
            elif self.in_place:
                parents[index] = self._keep_places(row, beams, sums[index], choices[index])
            else:
                parents[index] = self._set_aside(row, beams, sums[index], choices[index])
            if row.alternatives:
                row.tokens, row.logprob, row.finished = row.alternatives[0]
                ended.append(first + index)
        if self.joint and numbers is not None:
            picked = self._picked(states, parents, choices, numbers)
            self.joint.scorer.choose(first, torch.from_numpy(picked).to(logits.device))
        same = opening or (parents == np.arange(n)).all()
        return ended, None if same else torch.from_numpy(parents).to(logits.device)

    def _jointly(
        self, joint: Joint, attention: Tensor, tokens: Tensor, first: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return joint scores of candidates (B, N, K), best first for each beam, the candidates and their numbers."""
        states, width = self.state[first:], tokens.shape[1]
        ended = torch.tensor([beams.ended[:width] for beams in states], device=tokens.device)
        attention = attention.masked_fill(ended[:, :, None], -math.inf)
        before = torch.from_numpy(np.stack([beams.scores[:width] for beams in states])).to(tokens.device)
        wanted = self.beams if self.in_place else 2 * self.beams
        totals, numbers = joint.scores(attention, tokens, before, first, wanted)
        sums = (totals - before[:, :, None]).cpu().numpy()
        order = np.argsort(-sums, axis=-1, kind="stable")
        choices, numbered = tokens.cpu().numpy(), numbers.cpu().numpy()
        sums = np.take_along_axis(sums, order, -1)
        return sums, np.take_along_axis(choices, order, -1), np.take_along_axis(numbered, order, -1)

    def _picked(
        self, states: Sequence[_Beams], parents: np.ndarray, choices: np.ndarray, numbers: np.ndarray
    ) -> np.ndarray:
        """Return the number (B x N,) of the candidate that each live beam took; -1 for beams that have ended."""
        picked = np.full(parents.shape, -1)
        for row, beams in enumerate(states):
            for beam, (parent, tokens, ended) in enumerate(zip(parents[row], beams.tokens, beams.ended)):
                if tokens and not ended:
                    place = np.flatnonzero(choices[row, parent] == tokens[-1])
                    picked[row, beam] = numbers[row, parent, place[0]] if len(place) else -1
        return picked.ravel()

    def _normaliser(self, tokens: int, prompt: int) -> float:
        if self.in_place:
            return ((5 + prompt + tokens) / 6) ** self.length_penalty
        return tokens**self.length_penalty

    def _set_aside(self, row: Row, beams: _Beams, sums: np.ndarray, choices: np.ndarray) -> list[int]:
        n, length = self.beams, len(beams.tokens[0]) + 1
        totals = (beams.scores[: len(sums), None] + sums).ravel()
        order = np.argsort(-totals, kind="stable")[: 2 * n]
        at_limit = length >= row.limit
        parents, scores, written = [], [], []
        for rank, place in enumerate(order):
            parent, token = int(place) // sums.shape[1], int(choices.flat[place])
            tokens, by_end = beams.tokens[parent], token == self.rules.end
            if not by_end and not at_limit:
                if len(parents) < n:
                    parents.append(parent)
                    scores.append(totals[place])
                    written.append([*tokens, token])
            elif rank < n and not (self.early_stopping and len(beams.done) >= n):
                total = float(totals[place])
                score = total / self._normaliser(length, 0)
                beams.done.append((score, total, tokens if by_end else [*tokens, token], by_end))
        beams.done = sorted(beams.done, key=lambda one: -one[0])[:n]
        enough = len(beams.done) == n and (
            at_limit or self.early_stopping or scores[0] / self._normaliser(length, 0) <= beams.done[-1][0]
        )
        if enough or at_limit:
            row.alternatives = [(tokens, total, by_end) for _, total, tokens, by_end in beams.done]
            return list(range(n))
        beams.scores, beams.tokens = np.array(scores), written
        return parents

    def _keep_places(self, row: Row, beams: _Beams, sums: np.ndarray, choices: np.ndarray) -> list[int]:
        n, candidates = self.beams, []
        for parent in range(len(sums)):
            tokens, before = beams.tokens[parent], beams.scores[parent]
            if beams.ended[parent]:
                key = before / self._normaliser(len(tokens) + 1, row.prompt)
                candidates.append((key, before, tokens, True, parent))
                continue
            for total, token in zip(before + sums[parent, :n], choices[parent, :n]):
                by_end = int(token) == self.rules.end
                key = total / self._normaliser(len(tokens) + 1, row.prompt)
                candidates.append((key, total, tokens if by_end else [*tokens, int(token)], by_end, parent))
        candidates.sort(key=lambda one: -one[0])
        kept = candidates[:n]
        beams.scores = np.array([total for _, total, *_ in kept])
        beams.tokens = [tokens for _, _, tokens, *_ in kept]
        beams.ended = [by_end for *_, by_end, _ in kept]
        longest = max((len(t) for t, by_end in zip(beams.tokens, beams.ended) if not by_end), default=0)
        if all(beams.ended) or longest >= row.limit:
            row.alternatives = [(tokens, total, by_end) for _, total, tokens, by_end, _ in kept]
        return [parent for *_, parent in kept]

    def _draw(self, row: Row, beams: _Beams, logits: Tensor, total: Tensor) -> list[int]:
        n = self.beams
        tokens = drawn(logits[0], row, n) if len(logits) == 1 else np.array([drawn(one, row)[0] for one in logits])
        which = range(n) if len(logits) > 1 else [0] * n
        gained = (logits[list(which), tokens.tolist()] - total[list(which)]).cpu().numpy()
        for beam, token in enumerate(tokens.tolist()):
            if beams.ended[beam]:
                continue
            beams.scores[beam] += gained[beam]
            if token == self.rules.end:
                beams.ended[beam] = True
            else:
                beams.tokens[beam].append(token)
        if all(beams.ended) or max(map(len, beams.tokens)) >= row.limit:
            found = zip(beams.tokens, beams.scores.tolist(), beams.ended)
            row.alternatives = sorted(found, key=lambda one: -one[1] / (len(one[0]) + 1))
        return list(range(n))
