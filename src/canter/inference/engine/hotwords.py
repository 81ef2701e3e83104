"""Hot words: phrases that a search prefers where the model finds them almost as probable as its own text.

Phrases are a prefix tree of tokens (shallow fusion: Zhao et al., 2019). The ``weight`` of a phrase is a number of
nats: it is written where its tokens together are at most that much less probable than the model's own choices. A phrase
that the audio does not complete has no effect: greedy search takes its tokens back, beam search its credit.

V: vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

ROOT = 0
ATTEMPTS = 4  # phrases that greedy search tries at one place, the most probable first


class HotWords:
    """Prefix tree of phrases, given as sequences of tokens."""

    def __init__(
        self,
        phrases: Iterable[Sequence[int]],
        weight: float,
        begins_word: Sequence[bool],
        at_start: Iterable[Sequence[int]] = (),
    ):
        """Build the tree.

        weight: nats, above 0. begins_word (V,): True for tokens before which a word may end. at_start: phrases for the
        start of the text only, where a tokenizer spells them without a space.
        """
        self.weight = weight
        self.children: list[dict[int, int]] = [{}]
        self.ends: set[int] = set()
        self.begins_word = torch.tensor(begins_word)
        for phrase in phrases:
            self._add(ROOT, phrase)
        self.opening = self._new()
        for phrase in at_start:
            self._add(self.opening, phrase)
        self.roots = torch.tensor(sorted(self.children[ROOT]), dtype=torch.long)
        self.credits = self._credits()
        self._on: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def _new(self) -> int:
        self.children.append({})
        return len(self.children) - 1

    def _add(self, node: int, phrase: Sequence[int]) -> None:
        for token in phrase:
            if token not in self.children[node]:
                self.children[node][token] = self._new()
            node = self.children[node][token]
        self.ends.add(node)

    def _credits(self) -> list[float]:
        """Return the credit of each node in beam search: the weight in proportion to the part of the shortest phrase
        that is written; 0 in the words that a longer phrase adds to a complete one."""
        shortest = [0] * len(self.children)  # tokens to the nearest end
        for node in range(len(self.children) - 1, -1, -1):  # children follow their parents
            left = [1 + shortest[child] for child in self.children[node].values()]
            shortest[node] = 0 if node in self.ends else min(left, default=0)
        credits = [0.0] * len(self.children)
        open_nodes = [(ROOT, 0), (self.opening, 0)]
        while open_nodes:
            parent, depth = open_nodes.pop()
            for token, node in self.children[parent].items():
                if not (parent in self.ends and self.begins_word[token]):
                    credits[node] = self.weight * (depth + 1) / (depth + 1 + shortest[node])
                    open_nodes.append((node, depth + 1))
        return credits

    def first_nodes(self, tokens: Iterable[int]) -> list[int]:
        """Return the nodes that the first tokens of phrases lead to."""
        return [self.children[ROOT][token] for token in tokens]

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return the first tokens of phrases, their credits, and ``begins_word``, on ``device``."""
        if device not in self._on:
            first = torch.tensor([self.credits[self.children[ROOT][int(token)]] for token in self.roots])
            self._on[device] = (self.roots.to(device), first.to(device), self.begins_word.to(device))
        return self._on[device]


@dataclass(frozen=True)
class Candidate:
    """Token that begins or continues a phrase. deficit: nats below the model's own choice."""

    token: int
    node: int
    deficit: float


@dataclass(frozen=True)
class _Attempt:
    """A phrase that is being written in place of the model's own text."""

    place: int
    """Number of tokens before it."""
    own: int
    """The model's own choice there, and its log probability."""
    own_logprob: float
    nodes: tuple[int, ...]
    """Nodes that the model's own text had reached there."""
    node: int
    spent: float
    """Nats by which the phrase is less probable so far than the model's own choices."""
    others: tuple[Candidate, ...]
    """Phrases to try next at the same place."""


@dataclass(frozen=True)
class Decision:
    """Next token of a row. kept: number of the row's tokens that stay; the others are taken back."""

    token: int
    logprob: float
    kept: int


class Boost:
    """Hot words of one row in greedy search.

    Where a phrase is at most ``weight`` nats less probable than the model's own choice, its tokens are tried. The
    attempt ends well if a word may end after the phrase; otherwise, or once the phrase has become too improbable, its
    tokens are taken back and the next phrase, or at last the model's own choice, is written in their place.
    """

    def __init__(self, words: HotWords):
        self.words = words
        self.nodes: tuple[int, ...] = (words.opening,)
        self.attempt: _Attempt | None = None

    def following(self) -> list[tuple[int, int]]:
        """Return (token, node) of the tokens, beside the first ones of phrases, whose scores `choose` needs."""
        nodes = (self.attempt.node,) if self.attempt else self.nodes
        return [pair for node in nodes for pair in self.words.children[node].items()]

    def choose(
        self, length: int, own: int, logprob: float, candidates: Sequence[Candidate], limit: bool = False
    ) -> Decision:
        """Return the next token of a row of ``length`` tokens.

        own, logprob: the model's own choice. candidates: tokens of `following` and first tokens of phrases that are at
        most ``weight`` nats less probable. limit: the row has no room for more than one token.
        """
        attempt = self.attempt
        if attempt and attempt.node in self.words.ends and bool(self.words.begins_word[own]):
            self.attempt, self.nodes = None, (attempt.node,)  # complete; a longer phrase may continue here
            attempt = None
        if attempt:
            continuing = self.words.children[attempt.node]
            here = [one for one in candidates if continuing.get(one.token) == one.node]
            best = min(here, key=lambda one: one.deficit, default=None)
            if best and attempt.spent + best.deficit <= self.words.weight and not limit:
                self.attempt = replace(attempt, node=best.node, spent=attempt.spent + best.deficit)
                return Decision(best.token, logprob - best.deficit, length)
            return self._next(attempt, attempt.others)
        others = sorted((one for one in candidates if one.token != own), key=lambda one: one.deficit)[:ATTEMPTS]
        started = _Attempt(length, own, logprob, self.nodes, ROOT, 0.0, ())
        return self._next(started, () if limit else others)

    def _next(self, attempt: _Attempt, others: Sequence[Candidate]) -> Decision:
        """Try the first of ``others``, or write the model's own choice, at the place of the attempt."""
        if others:
            best = others[0]
            self.attempt = replace(attempt, node=best.node, spent=best.deficit, others=tuple(others[1:]))
            return Decision(best.token, attempt.own_logprob - best.deficit, attempt.place)
        self.attempt = None
        reached = (self.words.children[node].get(attempt.own) for node in {*attempt.nodes, ROOT})
        self.nodes = tuple(sorted(node for node in reached if node is not None))
        return Decision(attempt.own, attempt.own_logprob, attempt.place)


@dataclass(frozen=True)
class Credit:
    """Hot words of one beam: the node that its text has reached, and the nats of the phrases that it has completed."""

    words: HotWords
    node: int
    earned: float = 0.0

    @property
    def total(self) -> float:
        """Nats that the score of the beam contains."""
        return self.earned + self.words.credits[self.node]

    def add_to(self, scores: Tensor) -> None:
        """Add the change of the credit by each next token to scores (V,)."""
        words, here = self.words, self.words.credits[self.node]
        roots, first, begins = words.on(scores.device)
        if here:
            scores -= here * ~begins if self.node in words.ends else here
        scores[roots] += first
        for token, node in words.children[self.node].items():
            again = words.credits[words.children[ROOT][token]] if token in words.children[ROOT] else 0.0
            scores[token] += words.credits[node] - again

    def after(self, token: int) -> "Credit":
        """Return the state after one more token."""
        words = self.words
        complete = self.node in words.ends and bool(words.begins_word[token])
        earned = self.earned + (words.credits[self.node] if complete else 0.0)
        node = words.children[self.node].get(token, words.children[ROOT].get(token, ROOT))
        return replace(self, node=node, earned=earned)
