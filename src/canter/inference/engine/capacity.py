"""How much an engine takes at once where nobody says."""

from collections.abc import Sequence
from typing import Any

import torch

# bytes of the keys and values of cross-attention on a CPU; more rows are hardly faster there
CACHED = 192 * 2**20
FEWEST, MOST, MOST_ON_GPU = 8, 64, 128  # rows of the decoder


def usual_window(model: Any) -> float:
    """Seconds of audio that a model takes in one piece: what it was trained on where it tells, else 40, and no
    more than it has positions for."""
    return min(model.generation.get("window_seconds", 40.0), model.longest_seconds)


def encoder_frames(device: torch.device) -> int:
    """Encoder frames in a batch. On a processor larger batches spend their time on memory."""
    return 16384 if device.type == "cuda" else 1024


def decoder_rows(model: Any, device: torch.device) -> int:
    """Rows that decode together. More of them read the decoder's weights less often, but each brings keys and values
    of its own for the whole window, which every step reads: on a processor a Whisper decodes no faster with 64 rows
    than with 24, in three times the memory, and a row waits longer for its turn."""
    on_gpu = device.type == "cuda"
    most = MOST_ON_GPU if on_gpu else MOST
    if "cached_decoding" not in model.supports:
        return most
    room = torch.cuda.get_device_properties(device).total_memory // 4 if on_gpu else CACHED
    decoder, weight = model.config.decoder, model.decoder.embedding.weight
    frames = model.encoder_frames(usual_window(model))
    row = 2 * decoder.layers * frames * decoder.width * weight.element_size()
    return max(FEWEST, min(most, room // row))


def encoder_batches(lengths: Sequence[float], budget: float, rows: int | None = None) -> list[list[int]]:
    """Indices of ``lengths``, longest first, cut into batches whose padded length fits ``budget`` (in the
    same unit; a single longer one stands alone) and which hold at most ``rows``."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batches: list[list[int]] = []
    for index in order:
        batch = batches[-1] if batches else None
        if batch is None or (len(batch) + 1) * lengths[batch[0]] > budget or len(batch) == rows:
            batches.append([index])
        else:
            batch.append(index)
    return batches
