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

    def suppress(self, logits: Tensor, opening: bool) -> None:
        """Set suppressed tokens to -inf in logits (R, V); ``opening``: the first token after the prompt is next."""
        which = self.never_first if opening else self.never
        if len(which):
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

    B: live rows, N: maximum length of an n-gram.
    """

    def __init__(self, ngram: int, repeats: int):
        """Check n-grams of up to ``ngram`` tokens, and keep ``repeats`` repeats; 0 of either turns the guard off."""
        self.repeats = repeats
        self.sizes = np.arange(1, ngram + 1 if repeats else 1)  # (N,)
        # (B, N) the latest tokens, the newest first
        self.last = np.zeros((0, len(self.sizes)), dtype=np.int64)
        # (B, N) number of a row's latest tokens that equal the one n before: n x r where an n-gram followed itself r
        # times
        self.equal = self.last.copy()
        self.allowed = np.zeros(0)  # (B,) number of tokens that fit in the time of the row's audio
        self.counts = np.zeros(0, dtype=np.int64)  # (B,) tokens so far

    def add(self, allowed: Sequence[float]) -> None:
        """Add rows in the next slots, with the number of tokens that fit in the time of each (infinite: no guard)."""
        new = np.zeros((len(allowed), len(self.sizes)), dtype=np.int64)
        self.last, self.equal = np.concatenate([self.last, new - 1]), np.concatenate([self.equal, new])
        self.allowed = np.concatenate([self.allowed, np.array(allowed, dtype=float)])
        self.counts = np.concatenate([self.counts, np.zeros(len(allowed), dtype=np.int64)])

    def remove(self, slots: list[int]) -> None:
        """Remove rows; the last ones take their slots."""
        for slot in sorted(slots, reverse=True):
            for name in ("last", "equal", "allowed", "counts"):
                values = getattr(self, name)
                values[slot] = values[-1]
                setattr(self, name, values[:-1])

    def took(self, chosen: Sequence[int], first: int = 0) -> dict[int, int]:
        """Record the next tokens of the rows from slot ``first`` on.

        Return the slots of rows whose repeats take more tokens than fit in the time of their audio, each with the
        number of tokens to keep.
        """
        self.counts[first:] += 1
        if not len(self.sizes) or not len(chosen):
            return {}
        tokens = np.array(chosen)[:, None]
        last, equal = self.last[first:], self.equal[first:]
        equal[:] = np.where(last == tokens, equal + 1, 0)
        last[:, 1:] = last[:, :-1].copy()
        last[:, :1] = tokens
        span = equal + self.sizes
        repeating = (equal >= LEAST_REPEATS * self.sizes) & (span > self.allowed[first:, None])
        return {first + int(row): self._kept(first + int(row)) for row in np.flatnonzero(repeating.any(1))}

    def at_limit(self, slot: int) -> int:
        """Return the number of tokens to keep of a row at the limit on tokens: all, unless it has more than fit in the
        time of its audio and ends in repeats."""
        if not len(self.sizes) or self.counts[slot] < self.allowed[slot]:
            return int(self.counts[slot])
        return self._kept(slot)

    def _kept(self, slot: int) -> int:
        """Return the number of tokens up to the last repeat to keep of the shortest repeating n-gram."""
        repeating = np.flatnonzero(self.equal[slot] >= LEAST_REPEATS * self.sizes)
        if not len(repeating):
            return int(self.counts[slot])
        size = int(self.sizes[repeating[0]])
        span = int(self.equal[slot, repeating[0]]) + size
        return int(self.counts[slot]) - max(0, span - size * (self.repeats + 1))


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
    """Sum log probabilities in greedy search too."""
    tokens: list[int] = field(default_factory=list)
    logprob: float = 0.0
    """Sum of the tokens' natural-log probabilities, end token included, of beams and scored rows."""
    steps: list[float] = field(default_factory=list)
    """Log probability of each token, for scored rows of greedy search."""
    finished: bool = False
    """True once an end token has ended the row."""
    allowed: float = math.inf
    """Number of tokens that fit in the time of its audio, for `RepetitionGuard`; infinite: no guard."""
    alternatives: list[tuple[list[int], float, bool]] = field(default_factory=list)
    """Tokens, sum of log probabilities and ``finished`` of each beam, best first."""
    ctc: Tensor | None = None
    """Log probabilities of the CTC head (T, C), for joint search."""

    def __post_init__(self):
        self.draws = np.random.default_rng(self.seed) if self.temperature else None


class Search(Protocol):
    """Interface of the searches to the engine."""

    beams: int

    def add(self, rows: Sequence[Row]) -> None:
        """Add rows in the next slots."""
        ...

    def remove(self, slots: list[int]) -> None:
        """Remove rows; the last ones take their slots."""
        ...

    def inputs(self) -> list[list[int]]:
        """Return the next input tokens (B, N) of the decoder."""
        ...

    def choose(self, logits: Tensor, first: int, opening: bool) -> tuple[list[int], Tensor | None]:
        """Choose the next tokens of the rows from slot ``first`` on.

        logits: (B, 1, V) if ``opening`` (after the prompt), else (B, N, V).

        Return the slots that have ended, and the parent beam of each beam (B, N), None if each is its own.
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
        scored = bool(self.joint) or any(row.scored for row in rows)
        total = scores.logsumexp(-1) if scored and not self.rules.renormalised else None
        self.rules.suppress(scores, opening)
        self.rules.order_timestamps(scores, [row.stamped for row in rows], [row.tokens for row in rows])
        if scored and total is None:
            total = scores.logsumexp(-1)
        if self.joint and total is not None:
            chosen = self._jointly(self.joint, scores - total[:, None], rows, first)
        else:
            chosen = self._by_attention(scores, rows, total)
        ended, end = [], self.rules.end
        repeating = self.guard.took(chosen, first)
        for slot, (row, token) in enumerate(zip(rows, chosen), first):
            if token == end:
                row.finished = True
            else:
                row.tokens.append(token)
            if row.finished:
                ended.append(slot)
            elif slot in repeating or len(row.tokens) >= row.limit:
                kept = repeating.get(slot, self.guard.at_limit(slot))
                row.logprob -= sum(row.steps[kept:])
                del row.tokens[kept:]
                ended.append(slot)
        return ended, None

    def _by_attention(self, scores: Tensor, rows: Sequence[Row], total: Tensor | None) -> list[int]:
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

    def _jointly(self, joint: Joint, scores: Tensor, rows: Sequence[Row], first: int) -> list[int]:
        attention, tokens = candidates(scores, CANDIDATES, self.rules.end)
        before = attention.new_zeros(len(rows), 1, dtype=torch.float64)
        sums, numbers = joint.scores(attention[:, None], tokens[:, None], before, first, wanted=1)
        values, places = sums[:, 0].max(-1, keepdim=True)
        joint.scorer.choose(first, numbers[:, 0].gather(1, places)[:, 0])
        chosen = tokens.gather(1, places)[:, 0].tolist()
        for row, value in zip(rows, values[:, 0].tolist()):
            if row.scored:
                row.logprob += value
                row.steps.append(value)
        return chosen


@dataclass
class _Beams:
    """Beams of one row."""

    scores: np.ndarray  # (N,) sums of log probabilities
    tokens: list[list[int]]
    ended: list[bool]
    done: list[tuple[float, float, list[int], bool]] = field(default_factory=list)
    """Finished hypotheses, best first: score, sum of log probabilities, tokens, and True for one with an end token."""


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
        total = scores.logsumexp(-1)  # before the rules, as in `transformers`
        if scores.data_ptr() == logits.data_ptr():
            scores = scores.clone()
        self.rules.suppress(scores, opening)
        stamped = [row.stamped for row in rows for _ in range(width)]
        self.rules.order_timestamps(scores, stamped, [tokens for beams in states for tokens in beams.tokens[:width]])
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
        for index, (row, beams) in enumerate(zip(rows, states)):
            if row.temperature:
                part = scores[index * width : (index + 1) * width]
                parents[index] = self._draw(row, beams, part, total[index * width : (index + 1) * width])
            else:
                parents[index] = self._extend(row, beams, sums[index], choices[index])
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
        """Return joint scores of candidates (B, N, K), best first per beam, the candidates and their numbers."""
        states, width = self.state[first:], tokens.shape[1]
        ended = torch.tensor([beams.ended[:width] for beams in states], device=tokens.device)
        attention = attention.masked_fill(ended[:, :, None], -math.inf)
        before = torch.from_numpy(np.stack([beams.scores[:width] for beams in states])).to(tokens.device)
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
        for row, beams in enumerate(states):
            for beam, (parent, tokens, ended) in enumerate(zip(parents[row], beams.tokens, beams.ended)):
                if tokens and not ended:
                    place = np.flatnonzero(choices[row, parent] == tokens[-1])
                    picked[row, beam] = numbers[row, parent, place[0]] if len(place) else -1
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

    def _refill(self, row: Row, beams: _Beams, sums: np.ndarray, choices: np.ndarray) -> list[int]:
        n, length = self.beams, max(map(len, beams.tokens)) + 1
        totals = beams.scores[: len(sums), None] + sums + self.length_penalty
        totals[np.array(beams.ended[: len(sums)])] = -math.inf
        order = np.argsort(-totals.ravel(), kind="stable")[:n]
        parents, scores, written = [], [], []
        for place in order.tolist():
            parent, token, total = place // sums.shape[1], int(choices.flat[place]), float(totals.flat[place])
            by_end = token == self.rules.end
            tokens = beams.tokens[parent] if by_end else [*beams.tokens[parent], token]
            if total == -math.inf:
                break
            if by_end or length >= row.limit:
                beams.done.append((total, total, tokens, by_end))
            else:
                parents.append(parent)
                scores.append(total)
                written.append(tokens)
        if not parents or self._hopeless(beams.done, length - 1 - row.prompt):
            best_first = sorted(beams.done, key=lambda one: -one[0])[:n]
            row.alternatives = [(tokens, total, by_end) for _, total, tokens, by_end in best_first]
        missing = n - len(parents)
        beams.scores, beams.tokens = np.array(scores + [-math.inf] * missing), written + [[] for _ in range(missing)]
        beams.ended = [False] * len(parents) + [True] * missing
        return parents + [0] * missing

    def _hopeless(self, done: Sequence[tuple[float, float, list[int], bool]], longest: int) -> bool:
        """Return whether the finished hypotheses of ``longest`` tokens, end token included, and of the lengths before
        are far worse than the best; ESPnet looks as many tokens back as the prompt is long."""
        top = max((score for score, *_ in done), default=0.0)
        lengths = range(longest, longest - END_LENGTHS, -1)
        found = [[score for score, _, tokens, _ in done if len(tokens) + 1 == length] for length in lengths]
        return all(scores and max(scores) - top < -END_MARGIN for scores in found)

    def _draw(self, row: Row, beams: _Beams, logits: Tensor, total: Tensor) -> list[int]:
        n = self.beams
        tokens = drawn(logits[0], row, n) if len(logits) == 1 else np.array([drawn(one, row)[0] for one in logits])
        parents = range(n) if len(logits) > 1 else [0] * n
        gained = (logits[list(parents), tokens.tolist()] - total[list(parents)]).cpu().numpy()
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
