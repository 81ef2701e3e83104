"""What a model's generation settings forbid: suppressed tokens and Whisper's order of timestamps.

R: rows of logits, V: vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Rules:
    """Writes -inf where a token may not come next.

    With timestamps (Radford et al., 2022, section 4.5): a transcript begins with one, of at most the first
    second; they come in pairs, or one before the end; they never go back; and where all of them together
    are likelier than any single token of text, one of them comes.
    """

    def __init__(self, generation: Mapping[str, Any], end: int, device: torch.device):
        """``generation``: Hugging Face's ``generation_config.json``; what it does not name does not apply."""
        self.end = end
        never, at_first = (
            torch.tensor(generation.get(name) or [], dtype=torch.long, device=device)
            for name in ("suppress_tokens", "begin_suppress_tokens")
        )
        self.never, self.never_first = never, torch.cat([never, at_first])
        self.no_timestamps: int | None = generation.get("no_timestamps_token_id")
        most = generation.get("max_initial_timestamp_index")
        self.latest_first = 50 if most is None else int(most)

    @property
    def no_speech(self) -> int | None:
        """Id of the token that says that nobody speaks, which precedes <|notimestamps|>."""
        return None if self.no_timestamps is None else self.no_timestamps - 1

    @property
    def first_timestamp(self) -> int:
        """Id of <|0.00|>."""
        assert self.no_timestamps is not None
        return self.no_timestamps + 1

    def has_timestamps(self, prompt: Sequence[int]) -> bool:
        """Whether what follows this prompt is ruled by timestamps."""
        return self.no_timestamps is not None and self.no_timestamps not in prompt

    def suppress(self, logits: Tensor, opening: bool) -> None:
        """logits (R, V); ``opening``: of the first token after the prompt."""
        which = self.never_first if opening else self.never
        if len(which):
            # not by assignment, which would copy the number to a GPU and wait for that
            logits.index_fill_(1, which, -math.inf)

    def order_timestamps(self, logits: Tensor, rows: Sequence[int], written: Sequence[Sequence[int]]) -> None:
        """Of logits (R, V) the ``rows``, whose tokens since the prompt are ``written``."""
        first = self.first_timestamp
        size = logits.shape[1] - first
        low, high, no_text, no_stamp = (np.zeros(len(rows), dtype=np.int64) for _ in range(4))
        high[:] = size
        for index, tokens in enumerate(written):
            if not tokens:
                no_text[index], high[index] = logits.shape[1], self.latest_first + 1
                continue
            last_is = tokens[-1] >= first
            before_is = len(tokens) < 2 or tokens[-2] >= first
            last = next((token - first for token in reversed(tokens) if token >= first), None)
            if last is not None:
                low[index] = last if last_is and not before_is else last + 1
            if last_is and before_is:
                no_stamp[index] = 1
            elif last_is:
                no_text[index] = self.end
        device = logits.device
        part = logits[list(rows)] if len(rows) < len(logits) else logits
        place = torch.arange(size, device=device)
        stamps = part[:, first:]
        bounds = torch.from_numpy(np.stack([low, high])).to(device)[:, :, None]
        out = (place < bounds[0]) | (place >= bounds[1]) | torch.from_numpy(no_stamp > 0).to(device)[:, None]
        stamps.masked_fill_(out, -math.inf)
        part[:, first - 1] = -math.inf
        text = part[:, :first]
        for index in np.flatnonzero(no_text):
            text[index, : no_text[index]] = -math.inf
        likelier = stamps.logsumexp(-1) > text.amax(-1)
        text.masked_fill_(likelier[:, None], -math.inf)
        if part is not logits:
            logits[list(rows)] = part
