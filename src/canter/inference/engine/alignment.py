"""Times of tokens from cross-attention weights, by dynamic time warping.

This is the method of Whisper's word timestamps (openai/whisper, whisper/timing.py): weights of the alignment heads,
normalised over tokens, smoothed over time and averaged, and the cheapest monotonic path through them.
U: tokens, T: encoder frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from canter.inference.engine.timestamps import timestamp_tokens
from canter.models.model import SpeechModel
from canter.models.protocol import AnyModel
from canter.text import WhisperTokenizer

MEDIAN_FRAMES = 7  # width of the median filter


@dataclass(frozen=True)
class Alignment:
    """Times of the text tokens of a hypothesis, without special tokens and timestamps."""

    tokens: tuple[int, ...]
    starts: tuple[float, ...]
    """Start of each token in seconds, and the end of the text."""
    probabilities: tuple[float, ...]
    """Probability of each token, given those before."""


def align(
    model: SpeechModel,
    cross: Tensor,
    prompt: Sequence[int],
    tokens: Sequence[int],
    end: int,
    samples: int,
    adapter: int = 0,
) -> Alignment:
    """Return the times of ``tokens`` in audio of ``samples`` samples.

    cross (L, 2, H, T, K): the row's keys and values of cross-attention. adapter: its number in the model's bank. The
    heads are the model's ``alignment_heads``, by default those of the upper half of the layers, as in openai-whisper.
    """
    decoder, generation = model.decoder, model.generation
    prompt, tokens = list(prompt), list(tokens)
    no_timestamps, stamps = generation.get("no_timestamps_token_id"), timestamp_tokens(generation)
    if stamps is not None and no_timestamps is not None:
        last = end if end < stamps.first else model.vocabulary  # Whisper: ids from the end token on are special
        tokens = [token for token in tokens if token < last and token not in stamps]
        prompt += [] if no_timestamps in prompt else [no_timestamps]
    tokens = tokens[: model.config.decoder.positions - len(prompt) - 1]
    if not tokens:
        return Alignment((), (0.0,), ())
    config = model.config.decoder
    heads = generation.get("alignment_heads") or [
        (layer, head) for layer in range(config.layers // 2, config.layers) for head in range(config.heads)
    ]
    read = torch.tensor([*prompt, *tokens], device=cross.device)
    weights, logits = decoder.cross_weights(read, cross, [(layer, head) for layer, head in heads], adapter)
    first = len(prompt) - 1  # it predicts the first token
    seconds = model.frame_seconds
    frames = min(cross.shape[3], max(2, -(-samples // round(seconds * model.config.features.sample_rate))))
    matrix = weights[:, :, :frames].cpu().numpy()
    matrix /= np.maximum(matrix.sum(-1, keepdims=True), 1e-9)
    matrix = (matrix - matrix.mean(1, keepdims=True)) / (matrix.std(1, keepdims=True) + 1e-9)
    starts = path_starts(-_median(matrix).mean(0)[first:]) * seconds
    chosen = torch.tensor(tokens, device=logits.device)[:, None]
    probabilities = logits[first:-1].float().softmax(-1).gather(1, chosen)[:, 0]
    return Alignment(tuple(tokens), tuple(starts.tolist()), tuple(probabilities.tolist()))


def word_times_warning(model: AnyModel) -> str | None:
    """Return why times of words are less exact, for a Whisper whose settings name no ``alignment_heads``."""
    if not isinstance(model.tokenizer, WhisperTokenizer) or model.generation.get("alignment_heads"):
        return None
    return (
        "names no alignment_heads (in generation_config.json): times of words come from all heads of the upper half of "
        "the decoder's layers and are less exact"
    )


def _median(matrix: np.ndarray) -> np.ndarray:
    """Smooth a matrix (heads, U, T) over time, with mirrored edges."""
    half = MEDIAN_FRAMES // 2
    if matrix.shape[-1] <= half:
        return matrix
    padded = np.pad(matrix, ((0, 0), (0, 0), (half, half)), mode="reflect")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, MEDIAN_FRAMES, axis=-1), axis=-1)


def path_starts(cost: np.ndarray) -> np.ndarray:
    """Return the frame (U,) at which the cheapest path through cost (U, T) reaches each token.

    The path runs from corner to corner in steps of one token, one frame or both. Cells of an anti-diagonal depend only
    on the two before, so each is one vector operation.
    """
    rows, columns = cost.shape
    steps = np.zeros((rows + columns - 1, rows), dtype=np.int8)  # 0: both, 1: a token, 2: a frame
    before = np.full(rows + 1, np.inf)  # the diagonal before the last one, shifted by one
    last = before.copy()
    before[0] = 0.0  # predecessor of the first cell
    for diagonal in range(rows + columns - 1):
        low, high = max(0, diagonal - columns + 1), min(rows, diagonal + 1)
        here = np.arange(low, high)
        ways = np.stack([before[low:high], last[low:high], last[low + 1 : high + 1]])
        steps[diagonal, low:high] = best = np.where(
            (ways[0] < ways[1]) & (ways[0] < ways[2]), 0, np.where((ways[1] < ways[0]) & (ways[1] < ways[2]), 1, 2)
        )
        now = np.full(rows + 1, np.inf)
        now[low + 1 : high + 1] = ways[best, np.arange(high - low)] + cost[here, diagonal - here]
        before, last = last, now
    starts = np.zeros(rows, dtype=np.int64)
    row, column = rows - 1, columns - 1
    while row >= 0 and column >= 0:
        starts[row] = column
        step = steps[row + column, row]
        row, column = row - (step != 2), column - (step != 1)
    return starts
