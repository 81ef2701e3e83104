"""Timestamp tokens: which ids they have, and in which order a model may write them.

R: rows of logits, V: vocabulary, S: timestamps.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from canter.text.whisper import TIMESTAMP_SECONDS, TIMESTAMPS


@dataclass(frozen=True)
class TimestampTokens:
    """Ids of the timestamps from 0 s on, 20 ms apart."""

    first: int
    last: int

    def __contains__(self, token: int) -> bool:
        return self.first <= token <= self.last

    def seconds(self, token: int) -> float:
        """Return the time that a timestamp stands for."""
        return (token - self.first) * TIMESTAMP_SECONDS


def timestamp_tokens(generation: Mapping[str, object]) -> TimestampTokens | None:
    """Return the ids of a model's timestamps: those that its settings name (OWSM), else the ids from the one after
    <|notimestamps|> on (Whisper); None for a model without timestamps."""
    first, last, without = (
        cast(int | None, generation.get(f"{name}_token_id"))
        for name in ("first_timestamp", "last_timestamp", "no_timestamps")
    )
    if first is not None and last is not None:
        return TimestampTokens(first, last)
    return None if without is None else TimestampTokens(without + 1, without + TIMESTAMPS)


@dataclass(frozen=True)
class WhisperOrder:
    """Order of Whisper's timestamps (Radford et al., 2022, section 4.5).

    A transcript begins with one within the first second; they come in pairs, except before the end; they never
    decrease; and where their probabilities together exceed that of every token of text, the next token is a timestamp.
    """

    stamps: TimestampTokens
    end: int
    latest_first: int

    def apply(self, logits: Tensor, stamped: Sequence[bool], written: Sequence[Sequence[int]]) -> None:
        """Set to -inf what may not follow in logits (R, V), in the rows that are ``stamped``; ``written`` are the
        tokens of each row so far."""
        rows = [row for row, asked in enumerate(stamped) if asked]
        if not rows:
            return
        first, vocabulary = self.stamps.first, logits.shape[1]
        size = min(self.stamps.last + 1, vocabulary) - first
        low, high, no_text, no_stamp = (np.zeros(len(rows), dtype=np.int64) for _ in range(4))
        high[:] = size
        for index, tokens in enumerate(written[row] for row in rows):
            if not tokens:
                no_text[index], high[index] = vocabulary, self.latest_first + 1
                continue
            last_is = tokens[-1] in self.stamps
            before_is = len(tokens) < 2 or tokens[-2] in self.stamps
            last = next((token - first for token in reversed(tokens) if token in self.stamps), None)
            if last is not None:
                low[index] = last if last_is and not before_is else last + 1
            if last_is and before_is:
                no_stamp[index] = 1
            elif last_is:
                no_text[index] = self.end
        device = logits.device
        part = logits[rows] if len(rows) < len(logits) else logits
        place = torch.arange(size, device=device)
        stamps, added = part[:, first : first + size], part[:, first + size :]  # pieces of an extension are text
        bounds = torch.from_numpy(np.stack([low, high])).to(device)[:, :, None]
        out = (place < bounds[0]) | (place >= bounds[1]) | torch.from_numpy(no_stamp > 0).to(device)[:, None]
        stamps.masked_fill_(out, -math.inf)
        part[:, first - 1] = -math.inf
        text = part[:, :first]
        for index in np.flatnonzero(no_text):
            text[index, : no_text[index]] = -math.inf
            added[index] = -math.inf
        likeliest = text.amax(-1)
        if added.shape[1]:
            likeliest = torch.maximum(likeliest, added.amax(-1))
        likelier = stamps.logsumexp(-1) > likeliest
        for one in (text, added):
            one.masked_fill_(likelier[:, None], -math.inf)
        if part is not logits:
            logits[rows] = part


@dataclass(frozen=True)
class EspnetOrder:
    """Order of OWSM's timestamps in ESPnet (``ScoreFilter`` of ``espnet2/bin/s2t_inference.py``).

    A transcript begins with a timestamp. Each segment of text lies between two of them, the second one later than the
    first; after a segment another one begins, not before its end, or the transcript ends. Without timestamps in the
    prompt none is written. ESPnet takes a position three tokens after any <sos> for the beginning.
    """

    stamps: TimestampTokens
    end: int
    start: int
    """Id of <sos>."""

    def apply(self, logits: Tensor, stamped: Sequence[bool], written: Sequence[Sequence[int]]) -> None:
        """Set to -inf what may not follow in logits (R, V); ``written`` are the tokens of each row so far."""
        first, last = self.stamps.first, self.stamps.last
        low = np.full(len(stamped), last - first + 1)  # the earliest timestamp that may follow, counted from the first
        text, ends = np.ones(len(stamped), dtype=bool), np.ones(len(stamped), dtype=bool)
        for row, tokens in enumerate(written):
            if not stamped[row]:
                continue
            times = [token for token in tokens if token in self.stamps]
            if not tokens or tokens[-3:-2] == [self.start]:
                low[row], text[row], ends[row] = 0, False, False
            elif len(times) % 2:
                low[row], ends[row] = times[-1] - first + 1, False
            else:  # text after a segment, which only a <sos> makes possible, has no continuation
                closed = tokens[-1] in self.stamps
                low[row], text[row], ends[row] = (tokens[-1] - first if closed else low[row]), False, closed
        allowed = torch.from_numpy(np.stack([low, text, ends])).to(logits.device)[:, :, None]
        place = torch.arange(last - first + 1, device=logits.device)
        end = logits[:, self.end].masked_fill(allowed[2, :, 0] == 0, -math.inf)
        logits[:, first : last + 1].masked_fill_(place < allowed[0], -math.inf)
        for part in (logits[:, :first], logits[:, last + 1 :]):
            part.masked_fill_(allowed[1] == 0, -math.inf)
        logits[:, self.end] = end


def timestamp_order(generation: Mapping[str, object], end: int) -> WhisperOrder | EspnetOrder | None:
    """Return the order of a model's timestamps, from its settings for decoding; None for a model without them."""
    stamps = timestamp_tokens(generation)
    if stamps is None:
        return None
    if generation.get("timestamp_rules") == "espnet":
        return EspnetOrder(stamps, end, cast(int, generation.get("decoder_start_token_id", -1)))
    latest = cast(int | None, generation.get("max_initial_timestamp_index"))
    return WhisperOrder(stamps, end, 50 if latest is None else latest)
