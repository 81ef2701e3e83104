"""The CTC head in decoding: greedy outputs, and scores of prefixes for joint CTC/attention decoding.

B: utterances, T: CTC frames, C: CTC outputs, V: vocabulary of the decoder, S: slots, N: beams, M: hypotheses scored.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from canter.errors import ConfigError
from canter.models.cache import swap_out
from canter.models.model import SpeechModel

IMPOSSIBLE = -1000.0
"""Least log probability of a token. What CTC rules out stays comparable by its attention score."""
PADDING = -1e7  # log probability of a symbol in a frame after the utterance's last
RULED_OUT = PADDING / 2  # no alignment of frames that exist is as unlikely


def ctc_greedy(log_probs: Tensor, lengths: Tensor) -> list[list[int]]:
    """Return the best output of every frame, repeats collapsed, blanks (0) dropped.

    log_probs (B, T, C), lengths (B,).
    """
    best = log_probs.argmax(-1).cpu().numpy()
    new = best != 0
    new[:, 1:] &= best[:, 1:] != best[:, :-1]
    return [row[:size][kept[:size]].tolist() for row, kept, size in zip(best, new, lengths.tolist())]


@dataclass(frozen=True)
class Spelling:
    """Map each token of the decoder to the CTC outputs that it stands for.

    A CTC head over the decoder's own tokens spells every token as itself; one over characters spells a piece as its
    characters. Tokens that CTC never outputs (language, task, timestamps) spell nothing.
    """

    symbols: Sequence[tuple[int, ...]]
    """The outputs of each of the V tokens."""
    blank: int = 0
    separator: int | None = None
    """An output that no text begins with, such as the space: left out at the start of a hypothesis."""

    def at_start(self, symbols: tuple[int, ...]) -> tuple[int, ...]:
        """Return ``symbols`` as a hypothesis begins with them."""
        first = next((n for n, symbol in enumerate(symbols) if symbol != self.separator), len(symbols))
        return symbols[first:]


def spelling_of(model: SpeechModel) -> Spelling:
    """Return how the model's tokens are spelled by its CTC head.

    Raises ConfigError where the model has no CTC head, or it is not known what the head's outputs mean.
    """
    if model.ctc is None:
        raise ConfigError("--ctc-weight: this model has no CTC head; leave the option out")
    tokenizer, characters = model.tokenizer, model.characters
    if characters is None or not hasattr(tokenizer, "piece"):
        raise ConfigError(
            "--ctc-weight: it is not known how this model's CTC head spells its tokens (a run's checkpoint has "
            "characters.json and a SentencePiece tokenizer); leave the option out"
        )
    texts = [tokenizer.piece(token).replace("▁", " ") for token in range(model.vocabulary)]
    spoken = [bool(not text.strip() or tokenizer.decode([token])) for token, text in enumerate(texts)]
    symbols = [tuple(characters.encode(text)) if says else () for text, says in zip(texts, spoken)]
    return Spelling(symbols, separator=next(iter(characters.encode(" ")), None))


class PrefixScorer:
    """Score tokens by CTC: log of the probability that the text begins with hypothesis and token, over that of the
    hypothesis (Watanabe et al., 2017, equation 13); for the end token, that the hypothesis is the whole text.

    The scorer holds rows in slots like the decoder's cache, N hypotheses in each, as forward variables over all
    alignments (Graves et al., 2006): of those that end in the last symbol, and in the blank. Both follow
    x[t] = p[t] (x[t-1] + f[t-1]), which is solved for all t at once by a cumulative sum, so a token costs a few
    operations for each of its symbols, whatever the number of frames. A row's scores do not depend on other rows.
    """

    def __init__(self, spelling: Spelling, end: int, beams: int, device: torch.device):
        self.end, self.beams, self.device = end, beams, device
        self.blank = spelling.blank
        starts = [spelling.at_start(symbols) for symbols in spelling.symbols]
        longest = max(map(len, spelling.symbols), default=0)
        table = [[*symbols, *[-1] * (longest - len(symbols))] for symbols in (*starts, *spelling.symbols)]
        # (2, V, longest): at the start of a hypothesis, and later; -1 after the last symbol
        self.symbols = torch.tensor(table, device=device).view(2, len(starts), longest)
        self.frames: list[int] = []  # of live rows
        self.log_probs = torch.zeros(0, 1, 0, device=device)  # (S, C, T)
        # (2, S x N, T + 1): alignments up to each frame that end in the last symbol, in the blank; first of none
        self.forward = torch.zeros(2, 0, 1, dtype=torch.float64, device=device)
        self.prefix = torch.zeros(0, dtype=torch.float64, device=device)  # (S x N,) log P(text begins so)
        self.last = torch.zeros(0, dtype=torch.long, device=device)  # (S x N,) last symbol, -1: none
        self.candidates: list[tuple[Tensor, Tensor, Tensor]] = []  # forward, prefix, last of what was scored

    def add(self, log_probs: Sequence[Tensor]) -> None:
        """Add rows of log probabilities (T, C) in the next slots, with empty hypotheses."""
        first, n = len(self.frames), self.beams
        self.frames += [len(row) for row in log_probs]
        width = max(self.frames) + 1  # at least one frame of padding, in which only the blank is possible
        self._resize(len(self.frames), log_probs[0].shape[1], width)
        for slot, row in enumerate(log_probs, first):
            self.log_probs[slot] = PADDING
            self.log_probs[slot, self.blank] = 0.0
            self.log_probs[slot, :, : len(row)] = row.T
        blanks = self.log_probs[first:, self.blank].double().cumsum(-1).repeat_interleave(n, 0)
        new = slice(first * n, None)
        self.forward[0, new] = -math.inf
        self.forward[1, new, 0] = 0.0
        self.forward[1, new, 1:] = blanks
        self.prefix[new] = 0.0
        self.last[new] = -1

    def remove(self, slots: Sequence[int]) -> None:
        """Remove rows; the last ones take their slots, as in the cache."""
        order = list(range(len(self.frames)))
        swap_out(order, slots)
        swap_out(self.frames, slots)
        width = max(self.frames, default=0) + 1
        kept = torch.tensor(order, dtype=torch.long, device=self.device)
        each = (kept[:, None] * self.beams + torch.arange(self.beams, device=self.device)).flatten()
        self.log_probs = self.log_probs[kept, :, :width]
        self.forward = self.forward[:, each, : width + 1]
        self.prefix, self.last = self.prefix[each], self.last[each]

    def _resize(self, slots: int, outputs: int, width: int) -> None:
        """Make room for rows and frames; live rows get frames of padding."""
        old, n = self.log_probs, self.beams
        rows, frames = len(old), old.shape[2]
        self.log_probs = torch.full((slots, outputs, width), PADDING, device=self.device)
        self.log_probs[:, self.blank] = 0.0
        self.log_probs[:rows, :, :frames] = old
        forward = self.forward
        self.forward = forward.new_full((2, slots * n, width + 1), -math.inf)
        self.forward[:, : rows * n, : frames + 1] = forward
        if rows:  # the last frame was padding already
            self.forward[1, : rows * n, frames + 1 :] = forward[1, :, -1:]
        self.prefix = torch.cat([self.prefix, self.prefix.new_zeros((slots - rows) * n)])
        self.last = torch.cat([self.last, self.last.new_full(((slots - rows) * n,), -1)])

    def score(self, hypotheses: Tensor, tokens: Tensor) -> Tensor:
        """Return log probabilities (M,), float64, of ``tokens`` (M,) after ``hypotheses`` (M,).

        Hypotheses are numbered slot x N + beam. Calls add up: `choose` numbers what was scored since the last one.
        """
        forward, prefix, last = self.forward[:, hypotheses], self.prefix[hypotheses], self.last[hypotheses]
        before = prefix.clone()  # what follows writes to the others
        symbols = self.symbols[(last >= 0).long(), tokens]  # (M, longest)
        rows = torch.div(hypotheses, self.beams, rounding_mode="floor")
        lengths = (symbols >= 0).sum(1)
        ends = tokens == self.end
        lengths = lengths.masked_fill(ends, 0)
        order = None
        if len(lengths) > 1:  # longest first, so that those still to be spelled are a slice
            order = lengths.argsort(descending=True)
            forward, prefix, last = forward[:, order], prefix[order], last[order]
            symbols, rows = symbols[order], rows[order]
        counts = (lengths[:, None] > torch.arange(symbols.shape[1], device=self.device)).sum(0).tolist()
        for place, count in enumerate(counts):
            if not count:
                break
            part = slice(0, count)
            found = self._append(forward[:, part], last[part], rows[part], symbols[part, place])
            forward[:, part], prefix[part] = found
            last[part] = symbols[part, place]
        if order is not None:
            back = order.argsort()
            forward, prefix, last = forward[:, back], prefix[back], last[back]
        prefix = torch.where(ends, forward[1, :, -1], prefix)
        self.candidates.append((forward, prefix, last))
        scores = (prefix - before).masked_fill(before < RULED_OUT, 0.0)  # CTC has ruled out everything
        return scores.clamp(min=IMPOSSIBLE)

    def _append(self, forward: Tensor, last: Tensor, rows: Tensor, symbols: Tensor) -> tuple[Tensor, Tensor]:
        """Append ``symbols`` (M,) to hypotheses -> forward variables (2, M, T + 1), prefix probabilities (M,)."""
        own = self.log_probs[rows, symbols].double()  # (M, T)
        blank = self.log_probs[rows, self.blank].double()
        label, pause = forward[0, :, :-1], forward[1, :, :-1]
        # an alignment that repeats a symbol passes through a blank
        begun = torch.logaddexp(pause, label.masked_fill((last == symbols)[:, None], -math.inf))
        prefix = (begun + own).logsumexp(-1)
        label = _accumulate(begun, own)
        pause = _accumulate(label[:, :-1], blank)
        return torch.stack([label, pause]), prefix

    def choose(self, first: int, picked: Tensor) -> None:
        """Move hypotheses on to what was scored since the last call: those of the rows from slot ``first`` on.

        ``picked`` (rows x N,) numbers the candidates in the order they were scored; -1 leaves a hypothesis as it is.
        """
        forward, prefix, last = zip(*self.candidates)
        forward, prefix, last = torch.cat(forward, 1), torch.cat(prefix), torch.cat(last)
        self.candidates.clear()
        moved = (picked >= 0).nonzero()[:, 0]
        chosen, places = picked[moved], moved + first * self.beams
        self.forward[:, places] = forward[:, chosen]
        self.prefix[places], self.last[places] = prefix[chosen], last[chosen]


class Joint:
    """Joint CTC/attention scores (Hori et al., 2017): (1 - w) log p_attention + w log p_CTC, of the candidates that may
    be among the best.

    As log p_CTC is never positive, (1 - w) log p_attention bounds a candidate's score: once the best are known, those
    whose bound is lower need no CTC score.
    """

    def __init__(self, scorer: PrefixScorer, weight: float):
        self.scorer, self.weight = scorer, weight

    def scores(
        self, attention: Tensor, tokens: Tensor, before: Tensor, first: int, wanted: int
    ) -> tuple[Tensor, Tensor]:
        """Score candidates after hypotheses of the rows from slot ``first`` on.

        attention (B, N, K) log probabilities of ``tokens`` (B, N, K), ``before`` (B, N) joint scores of the hypotheses
        -> joint scores (B, N, K), float64, exact for the ``wanted`` best of each row, and -inf or exact for the others;
        and the candidates' numbers for `PrefixScorer.choose`, -1 where CTC was not asked.
        """
        rows, beams, _ = tokens.shape
        own = attention.double() * (1 - self.weight)
        own = own.masked_fill(attention == -math.inf, -math.inf)
        bounds = (before[:, :, None] + own).flatten(1)  # (B, N x K)
        slots = torch.arange(first, first + rows, device=tokens.device)[:, None, None]
        numbered = slots * self.scorer.beams + torch.arange(beams, device=tokens.device)[:, None]
        hypotheses = numbered.expand_as(tokens).flatten()
        joint = torch.full_like(bounds, -math.inf)
        numbers = torch.full_like(bounds, -1, dtype=torch.long)
        asked = 0
        leading = bounds.topk(min(wanted, bounds.shape[1]), dim=1).indices
        threshold = torch.full_like(bounds[:, :1], -math.inf)
        for turn in range(2):
            due = torch.zeros_like(bounds, dtype=torch.bool)
            due = due.scatter_(1, leading, True) if turn == 0 else (bounds > threshold) & (numbers < 0)
            places = (due & (bounds > -math.inf)).flatten().nonzero()[:, 0]
            if not len(places):
                break
            found = self.scorer.score(hypotheses[places], tokens.flatten()[places])
            joint.view(-1)[places] = bounds.flatten()[places] + self.weight * found
            numbers.view(-1)[places] = asked + torch.arange(len(places), device=tokens.device)
            asked += len(places)
            threshold = joint.gather(1, leading).amin(1, keepdim=True)
        return joint.view_as(own), numbers.view_as(tokens)


def _accumulate(begun: Tensor, own: Tensor) -> Tensor:
    """Solve x[t] = own[t] + logaddexp(x[t-1], begun[t-1]) for (M, T) -> x (M, T + 1), the first of them -inf."""
    total = own.cumsum(-1)
    before = total - own
    found = (begun - before).logcumsumexp(-1) + total
    return torch.nn.functional.pad(found, (1, 0), value=-math.inf)
