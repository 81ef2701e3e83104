"""Forced alignment: probabilities and times of the tokens of a given text, by the decoder and by a CTC head.

The decoder reads the given tokens instead of its own (teacher forcing), which gives the probability of each. Times come
from its cross-attention (`canter.inference.engine.alignment`), or from the most probable CTC path of the text.
B: rows, T: frames, C: CTC outputs, U: tokens, L: CTC symbols of a text, V: vocabulary, D: width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from canter.inference.engine.alignment import align
from canter.inference.engine.ctc import Spelling
from canter.models.model import SpeechModel
from canter.runtime import upload

LOGITS = 2**26  # float32 logits that are in memory at a time: 256 MiB

Span = tuple[float, float]
"""Start and end in seconds."""


@dataclass(frozen=True)
class ForcedText:
    """Probabilities, and times if asked for, of the tokens of a given text."""

    prompt: tuple[int, ...]
    """Prompt with the detected language."""
    logprobs: tuple[float, ...]
    """(U + 1,) natural-log probability of each token given those before it, and of the end token after the last."""
    spans: tuple[Span | None, ...] = ()
    """(U,) times of each token; None for a token that CTC never outputs, such as punctuation. Empty without times."""
    ctc_logprob: float | None = None
    """Natural-log probability of the most probable CTC path of the text; None where CTC gave no times."""


@dataclass(frozen=True)
class CtcPath:
    """The most probable CTC path of a text."""

    starts: np.ndarray  # (L,) first frame of each symbol
    ends: np.ndarray  # (L,) frame after the last one
    logprob: float
    """Natural-log probability of the path."""


def ctc_viterbi(
    log_probs: Tensor, frames: Sequence[int], texts: Sequence[Sequence[int]], blank: int = 0
) -> list[CtcPath | None]:
    """Return the most probable path of each text through log_probs (B, T, C), of which row b has ``frames[b]`` frames.

    A path is a blank or a repetition between symbols, with a blank between two equal ones (Graves et al., 2006). None
    stands for a text without a path, because it has more symbols than the row has frames. Rows do not influence each
    other. All states of all rows advance by a frame in one vector operation.
    """
    rows, longest = len(texts), max(map(len, texts), default=0)
    states = 2 * longest + 1  # blank, symbol, blank, symbol, ..., blank
    labels = np.full((rows, states), blank)
    for row, text in enumerate(texts):
        labels[row, 1 : 2 * len(text) : 2] = text
    skips = np.zeros((rows, states), dtype=bool)  # states that follow on the one two before
    skips[:, 3::2] = labels[:, 3::2] != labels[:, 1:-2:2]
    width = max(frames, default=0)
    index = torch.from_numpy(labels).to(log_probs.device)[:, None].expand(-1, width, -1)
    emitted = log_probs[:, :width].gather(2, index).double().cpu().numpy()  # (B, T, states)
    counts, numbers = np.array(frames), np.arange(rows)
    total = np.full((rows, states + 2), -math.inf)  # shifted by the two states that are before the first
    total[:, 2] = 0.0  # before the first frame: a path enters from the first blank by no step or one
    steps = np.zeros((width, rows, states), dtype=np.int8)
    for frame in range(width):
        ways = np.stack([total[:, 2:], total[:, 1:-1], np.where(skips, total[:, :-2], -math.inf)])
        steps[frame] = ways.argmax(0)
        new = ways.max(0) + emitted[:, frame]
        total[:, 2:] = np.where((frame < counts)[:, None], new, total[:, 2:])
    lengths = np.array([len(text) for text in texts])
    last = 2 * lengths
    before = np.maximum(last - 1, 0)
    state = np.where(total[numbers, 2 + before] > total[numbers, 2 + last], before, last)
    scores = total[numbers, 2 + state]
    visited = np.zeros((width, rows), dtype=np.int64)
    for frame in reversed(range(width)):
        visited[frame] = state
        state = np.where(frame < counts, state - steps[frame, numbers, state], state)
    found: list[CtcPath | None] = []
    for row, (count, length, score) in enumerate(zip(counts.tolist(), lengths.tolist(), scores.tolist())):
        if not math.isfinite(score):
            found.append(None)
            continue
        path, symbols = visited[:count, row], 2 * np.arange(length) + 1  # states never decrease
        found.append(CtcPath(np.searchsorted(path, symbols), np.searchsorted(path, symbols, side="right"), score))
    return found


def forced_logprobs(
    model: SpeechModel,
    states: Sequence[Tensor],
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    end: int,
) -> list[list[float]]:
    """Return natural-log probabilities (U + 1,) of the tokens of each text and of the ``end`` token after it.

    states: encoder output (T, D) of each row, projected to the decoder's width.
    """
    device = states[0].device
    inputs = [[*prompt, *text] for prompt, text in zip(prompts, texts)]
    found: list[list[float]] = [[]] * len(inputs)
    order = sorted(range(len(inputs)), key=lambda row: len(inputs[row]))
    while order:
        size = len(inputs[order[-1]])
        batch = order[-max(1, LOGITS // (size * model.vocabulary)) :]
        del order[-len(batch) :]
        padded = [inputs[row] + [model.config.decoder.pad] * (size - len(inputs[row])) for row in batch]
        encoded = pad_sequence([states[row] for row in batch], batch_first=True)
        lengths = upload([len(states[row]) for row in batch], device)
        logits = model.decoder(upload(padded, device), encoded, lengths)
        for row, scores in zip(batch, logits):
            first, targets = len(prompts[row]) - 1, upload([*texts[row], end], device)
            wanted = scores[first : first + len(targets)].float()
            chosen = wanted.gather(1, targets[:, None])[:, 0] - wanted.logsumexp(-1)
            found[row] = chosen.tolist()
    return found


def attention_spans(
    model: SpeechModel, states: Tensor, prompt: Sequence[int], text: Sequence[int], end: int, samples: int
) -> tuple[Span, ...]:
    """Return the times of the tokens of ``text`` by cross-attention; each token lasts until the next one begins.

    states: encoder output (T, D) of audio of ``samples`` samples, projected to the decoder's width.
    """
    projected = [layer.cross_attention.project(states[None]) for layer in model.decoder.blocks]
    cross = torch.stack([torch.stack([keys[0], values[0]]) for keys, values in projected])
    starts = align(model, cross, prompt, text, end, samples).starts
    return tuple(pairwise(starts))


def symbols_of(text: Sequence[int], spelling: Spelling) -> tuple[list[int], list[int]]:
    """Return the CTC symbols of a text's tokens, without separators at its start, and the token of each symbol."""
    owners = [place for place, token in enumerate(text) for _ in spelling.symbols[token]]
    symbols = spelling.at_start(tuple(symbol for token in text for symbol in spelling.symbols[token]))
    return list(symbols), owners[len(owners) - len(symbols) :]


def ctc_spans(
    path: CtcPath, symbols: Sequence[int], owners: Sequence[int], tokens: int, spelling: Spelling, seconds: float
) -> tuple[Span | None, ...]:
    """Return the times of ``tokens`` tokens, from the first to the last symbol of each, without separators; see
    `symbols_of`. ``seconds`` is the length of a CTC frame."""
    found: list[Span | None] = [None] * tokens
    for place, (symbol, owner) in enumerate(zip(symbols, owners)):
        if symbol == spelling.separator:
            continue
        begin, end = float(path.starts[place] * seconds), float(path.ends[place] * seconds)
        known = found[owner]
        found[owner] = (begin, end) if known is None else (known[0], end)
    return tuple(found)
