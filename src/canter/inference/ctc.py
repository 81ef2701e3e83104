"""Outputs of the CTC head.

B: utterances, T: frames, V: outputs.
"""

from torch import Tensor


def ctc_greedy(log_probs: Tensor, lengths: Tensor) -> list[list[int]]:
    """log_probs (B, T, V), lengths (B,) -> the best output of every frame, repeats collapsed, blanks (0)
    dropped."""
    best = log_probs.argmax(-1).cpu().numpy()
    new = best != 0
    new[:, 1:] &= best[:, 1:] != best[:, :-1]
    return [row[:size][kept[:size]].tolist() for row, kept, size in zip(best, new, lengths.tolist())]
