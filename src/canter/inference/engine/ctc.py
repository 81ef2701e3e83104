"""Decoding with a CTC head: greedy outputs, and prefix scores for joint CTC/attention decoding.

B: utterances, T: CTC frames, C: CTC outputs, V: vocabulary of the decoder, S: slots, N: beams, M: hypotheses scored.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from canter.errors import ConfigError
from canter.inference.engine.timestamps import timestamp_tokens
from canter.models.cache import swap_out
from canter.models.model import SpeechModel

IMPOSSIBLE = -1000.0
"""Minimum log probability of a token, so that tokens which CTC excludes stay comparable by their attention scores."""
DECAY = 60.0
"""Forward variables this far below their maximum, in nats, are omitted."""
LOOK_AHEAD = 16  # frames that a window first grows by when a symbol is appended
PADDING = -1e7  # log probability of every output after an utterance's last frame
PROMPT_FRAMES = 3
"""ESPnet's prefix scores count the tokens after <sos> in OWSM's prompt as if each took a frame of the audio."""
RULED_OUT = PADDING / 2  # below the log probability of every alignment of real frames


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
    """Map from tokens of the decoder to sequences of CTC outputs.

    With a CTC head over the decoder's tokens every token maps to itself, with one over characters to its characters.
    Tokens that CTC never outputs (language, task, timestamps) map to an empty sequence.
    """

    symbols: Sequence[tuple[int, ...]]
    """CTC outputs of each of the V tokens."""
    blank: int = 0
    separator: int | None = None
    """Output that no text begins with, such as the space; it is dropped at the start of a hypothesis."""
    silent_frames: int = 0
    """Frames at the start of the audio in which no text begins."""

    def at_start(self, symbols: tuple[int, ...]) -> tuple[int, ...]:
        """Return ``symbols`` without separators at the start."""
        first = next((n for n, symbol in enumerate(symbols) if symbol != self.separator), len(symbols))
        return symbols[first:]


def spelling_of(model: SpeechModel, option: str = "--ctc-weight") -> Spelling:
    """Return the spelling of the model's tokens in outputs of its CTC head.

    Raises ConfigError that names the ``option`` which needs the head where the model has none, or the meaning of its
    outputs is unknown.
    """
    if model.ctc is None:
        raise ConfigError(f"{option}: this model has no CTC head; leave the option out")
    tokenizer, characters = model.tokenizer, model.characters
    if characters is None and model.config.ctc_vocabulary == model.vocabulary:
        stamps = timestamp_tokens(model.generation) or ()
        silent = PROMPT_FRAMES if model.generation.get("beam_search") == "espnet" else 0
        return Spelling(
            [() if token in stamps else (token,) for token in range(model.vocabulary)], silent_frames=silent
        )
    if characters is None or not hasattr(tokenizer, "piece"):
        raise ConfigError(
            f"{option}: it is not known how this model's CTC head spells its tokens (a run's checkpoint has "
            "characters.json and a SentencePiece tokenizer); leave the option out"
        )
    texts = [tokenizer.piece(token).replace("▁", " ") for token in range(model.vocabulary)]
    is_text = [bool(not text.strip() or tokenizer.decode([token])) for token, text in enumerate(texts)]
    symbols = [tuple(characters.encode(text)) if written else () for text, written in zip(texts, is_text)]
    return Spelling(symbols, separator=next(iter(characters.encode(" ")), None))


class PrefixScorer:
    """CTC prefix scores of tokens: log P(text begins with hypothesis and token) - log P(text begins with hypothesis)
    (Watanabe et al., 2017, equation 13); for the end token, log P(text is the hypothesis) in place of the first term.

    The scorer holds rows in slots like the decoder's cache, N hypotheses in each, as forward variables over all
    alignments (Graves et al., 2006), one for those that end in the last symbol and one for the blank. Both follow
    x[t + 1] = p[t] (x[t] + f[t]), which a cumulative sum solves for all t at once. They are kept in a window of W
    frames, outside of which they are `DECAY` below their maximum. So the cost of a token depends on its number of
    symbols and on the certainty of CTC, not on the length of the audio. A row's scores do not depend on other rows.
    """

    def __init__(self, spelling: Spelling, end: int, beams: int, device: torch.device):
        self.end, self.beams, self.device = end, beams, device
        self.blank, self.silent_frames = spelling.blank, spelling.silent_frames
        starts = [spelling.at_start(symbols) for symbols in spelling.symbols]
        longest = max(map(len, spelling.symbols), default=0)
        table = [[*symbols, *[-1] * (longest - len(symbols))] for symbols in (*starts, *spelling.symbols)]
        # (2, V, longest): at the start of a hypothesis, and later; -1 after the last symbol
        self.symbols = torch.tensor(table, device=device).view(2, len(starts), longest)
        self.is_blank = torch.tensor([self.blank in symbols for symbols in spelling.symbols], device=device)
        self.silent = torch.tensor([not symbols for symbols in spelling.symbols], device=device)
        self.silent[end] = False
        self.log_probs = torch.zeros(0, 1, 0, device=device)  # (S, C, T)
        self.frames = torch.zeros(0, dtype=torch.long, device=device)  # (S,)
        self.live = _Hypotheses.empty(0, device)  # S x N
        self.scored: list[_Hypotheses] = []

    def add(self, log_probs: Sequence[Tensor]) -> None:
        """Add rows of log probabilities (T, C) in the next slots, with empty hypotheses."""
        old, n = self.log_probs, self.beams
        frames = torch.tensor([len(row) for row in log_probs], device=self.device)
        self.frames = torch.cat([self.frames, frames])
        first, size = len(old), len(self.frames)
        width = int(self.frames.max())
        self.log_probs = torch.full((size, log_probs[0].shape[1], width), PADDING, device=self.device)
        self.log_probs[:first, :, : min(width, old.shape[2])] = old[:, :, :width]
        for slot, row in enumerate(log_probs, first):
            self.log_probs[slot, :, : len(row)] = row.T
        pause = self.log_probs[first:, self.blank].double().cumsum(-1)
        pause = F.pad(pause, (1, 0)).repeat_interleave(n, 0)  # (N x rows, T + 1): the blank so far
        empty = _Hypotheses.empty(len(pause), self.device)
        pause[:, : self.silent_frames] = -math.inf
        empty.forward = torch.stack([torch.full_like(pause, -math.inf), pause])
        empty.trim()
        self.live = _Hypotheses.cat([self.live, empty])

    def remove(self, slots: Sequence[int]) -> None:
        """Remove rows; the last ones take their slots, as in the cache."""
        order = list(range(len(self.frames)))
        swap_out(order, slots)
        kept = torch.tensor(order, dtype=torch.long, device=self.device)
        each = (kept[:, None] * self.beams + torch.arange(self.beams, device=self.device)).flatten()
        self.log_probs, self.frames, self.live = self.log_probs[kept], self.frames[kept], self.live.take(each)

    def score(self, hypotheses: Tensor, tokens: Tensor) -> Tensor:
        """Return log probabilities (M,), float64, of ``tokens`` (M,) after ``hypotheses`` (M,).

        Hypotheses are numbered slot x N + beam. Calls add up: `choose` numbers what was scored since the last one.
        """
        before = self.live.take(hypotheses)
        rows = torch.div(hypotheses, self.beams, rounding_mode="floor")
        symbols = self.symbols[(before.last >= 0).long(), tokens]  # (M, longest)
        ends = tokens == self.end
        lengths = (symbols >= 0).sum(1).masked_fill(ends, 0)
        order = lengths.argsort(descending=True, stable=True)  # longest first
        counts = (lengths[:, None] > torch.arange(symbols.shape[1], device=self.device)).sum(0).tolist()
        done: list[_Hypotheses] = []
        now, rows_now, symbols = before.take(order), rows[order], symbols[order]
        for place, count in enumerate([*counts, 0]):
            if count < len(now.last):
                done.append(now.slice(count, None))
                now = now.slice(0, count)
            if not count:
                break
            rows_now = rows_now[:count]
            now = self._append(now, rows_now, symbols[:count, place])
        found = _Hypotheses.cat(done[::-1]).take(order.argsort())
        self.scored.append(found)
        after = torch.where(ends, before.complete(self.frames[rows]), found.prefix)
        scores = (after - before.prefix).masked_fill(before.prefix < RULED_OUT, 0.0)  # no alignment is left
        return scores.clamp(min=IMPOSSIBLE).masked_fill(self.is_blank[tokens], -math.inf)

    def _append(self, now: "_Hypotheses", rows: Tensor, symbols: Tensor) -> "_Hypotheses":
        """Return the hypotheses of ``rows`` (M,) with one more of ``symbols`` (M,)."""
        label, pause = now.forward
        # an alignment that repeats a symbol passes through a blank
        begun = torch.logaddexp(pause, label.masked_fill((now.last == symbols)[:, None], -math.inf))
        longest = self.log_probs.shape[2]
        more = LOOK_AHEAD
        while True:
            begun = F.pad(begun, (0, more), value=-math.inf)
            frames = now.begin[:, None] + torch.arange(begun.shape[1], device=self.device)
            outside = frames >= longest
            frames = frames.clamp(max=max(0, longest - 1))
            emitted = self._log_probs(rows, symbols, frames, outside)
            label = _accumulate(begun, emitted)
            pause = _accumulate(F.pad(label, (1, -1), value=-math.inf), self._log_probs(rows, None, frames, outside))
            found = _Hypotheses(torch.stack([label, pause]), (begun + emitted).logsumexp(-1), symbols, now.begin + 1)
            over = found.begin + label.shape[1] > self.frames[rows]
            if bool((over | found.decayed()).all()):
                found.trim()
                return found
            more *= 2

    def _log_probs(self, rows: Tensor, symbols: Tensor | None, frames: Tensor, outside: Tensor) -> Tensor:
        """Return log probabilities (M, W) of each row's symbol, by default the blank, in its ``frames`` (M, W)."""
        values = self.log_probs[rows, self.blank if symbols is None else symbols]  # (M, T)
        return values.gather(1, frames).double().masked_fill(outside, PADDING)

    def choose(self, first: int, picked: Tensor) -> None:
        """Extend the hypotheses of the rows from slot ``first`` on by candidates scored since the last call.

        ``picked`` (rows x N,): numbers of the candidates in the order of their scoring; -1 keeps a hypothesis as it is.
        """
        before = len(self.live.last)
        everything = _Hypotheses.cat([self.live, *self.scored])
        self.scored.clear()
        places = torch.arange(before, device=self.device)
        moved = (picked >= 0).nonzero()[:, 0]
        places[moved + first * self.beams] = picked[moved] + before
        self.live = everything.take(places)
        self.live.narrow()


@dataclass
class _Hypotheses:
    """Forward variables of M hypotheses, each in its own window of W frames; index ``begin`` + w is the number of
    frames in an alignment."""

    forward: Tensor  # (2, M, W): alignments that end in the last symbol, in the blank
    prefix: Tensor  # (M,) log P(text begins so)
    last: Tensor  # (M,) last symbol; -1: none
    begin: Tensor  # (M,)

    @classmethod
    def empty(cls, size: int, device: torch.device) -> "_Hypotheses":
        numbers = torch.zeros(size, dtype=torch.long, device=device)
        values = torch.zeros(2, size, 1, dtype=torch.float64, device=device)
        return cls(values, values[0, :, 0].clone(), numbers - 1, numbers)

    @classmethod
    def cat(cls, parts: "Sequence[_Hypotheses]") -> "_Hypotheses":
        width = max(part.forward.shape[2] for part in parts)
        forward = [F.pad(p.forward, (0, width - p.forward.shape[2]), value=-math.inf) for p in parts]
        others = ([getattr(part, name) for part in parts] for name in ("prefix", "last", "begin"))
        return cls(torch.cat(forward, 1), *map(torch.cat, others))

    def take(self, rows: Tensor) -> "_Hypotheses":
        return _Hypotheses(self.forward[:, rows], self.prefix[rows], self.last[rows], self.begin[rows])

    def slice(self, start: int, stop: int | None) -> "_Hypotheses":
        part = slice(start, stop)
        return _Hypotheses(self.forward[:, part], self.prefix[part], self.last[part], self.begin[part])

    def _near(self) -> Tensor:
        """Return a mask (M, W) of the forward variables near their maximum."""
        highest = self.forward.amax(0)
        return highest > highest.amax(1, keepdim=True) - DECAY

    def decayed(self) -> Tensor:
        """Return a mask (M,) of windows whose last frame is far below the maximum."""
        return ~self._near()[:, -1]

    def trim(self) -> None:
        """Trim all windows to the frames near their maxima."""
        near, width = self._near(), self.forward.shape[2]
        places = torch.arange(width, device=near.device)
        first = torch.where(near, places, width).amin(1)
        first = first.masked_fill(first == width, 0)
        last = torch.where(near, places, 0).amax(1)
        size = int((last - first).max()) + 1 if len(first) else 1
        index = first[:, None] + places[:size]
        beyond = index >= width
        index = index.clamp(max=width - 1).expand(2, -1, -1)
        self.forward = self.forward.gather(2, index).masked_fill(beyond, -math.inf)
        self.begin = self.begin + first

    def narrow(self) -> None:
        """Drop frames that are in no window."""
        used = self._near().any(0).nonzero()
        self.forward = self.forward[:, :, : int(used.max()) + 1 if len(used) else 1]

    def complete(self, frames: Tensor) -> Tensor:
        """Return log P(text is the hypothesis) (M,) of audio of ``frames`` (M,)."""
        place, width = frames - self.begin, self.forward.shape[2]
        total = self.forward.gather(2, place.clamp(0, width - 1).expand(2, -1)[:, :, None])[:, :, 0]
        return torch.logaddexp(*total).masked_fill((place < 0) | (place >= width), -math.inf)


class Joint:
    """Joint CTC/attention scores (Hori et al., 2017): (1 - w) log p_attention + w log p_CTC.

    Tokens that spell nothing are scored by attention only. As log p_CTC is never positive, (1 - w) log p_attention is
    an upper bound of a candidate's score: once the best are known, candidates with a lower bound need no CTC score.
    """

    def __init__(self, scorer: PrefixScorer, weight: float):
        self.scorer, self.weight = scorer, weight

    def scores(
        self, attention: Tensor, tokens: Tensor, before: Tensor, first: int, wanted: int
    ) -> tuple[Tensor, Tensor]:
        """Score candidates after hypotheses of the rows from slot ``first`` on.

        attention: log probabilities of ``tokens``, both (B, N, K); before: joint scores (B, N) of the hypotheses.

        Return joint scores (B, N, K), float64, exact for the ``wanted`` best of each row, and -inf or exact for the
        others; and the candidates' numbers for `PrefixScorer.choose`, -1 where CTC did not score them.
        """
        rows, beams, _ = tokens.shape
        bound = attention.double() * (1 - self.weight)
        bound = bound.masked_fill(attention == -math.inf, -math.inf)
        bounds = (before[:, :, None] + bound).flatten(1)  # (B, N x K)
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
            asked_tokens = tokens.flatten()[places]
            found = self.scorer.score(hypotheses[places], asked_tokens)
            found = torch.where(self.scorer.silent[asked_tokens], attention.flatten()[places].double(), found)
            joint.view(-1)[places] = bounds.flatten()[places] + self.weight * found
            numbers.view(-1)[places] = asked + torch.arange(len(places), device=tokens.device)
            asked += len(places)
            threshold = joint.gather(1, leading).amin(1, keepdim=True)
        return joint.view_as(bound), numbers.view_as(tokens)


def _accumulate(begun: Tensor, emitted: Tensor) -> Tensor:
    """Solve x[t + 1] = emitted[t] + logaddexp(x[t], begun[t]), x[0] = -inf, for (M, W) -> x[1:] (M, W)."""
    total = emitted.cumsum(-1)
    return (begun - (total - emitted)).logcumsumexp(-1) + total
