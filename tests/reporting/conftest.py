"""Made-up metrics for the reports' tests."""

import math

import pytest


@pytest.fixture
def metrics() -> list[dict]:
    """60 train rows, and a valid row every 20 steps."""
    rows: list[dict] = []
    for step in range(1, 61):
        batch = 1 + step % 7
        row = {"kind": "train", "step": step, "epoch": 0, "time": 1e9 + step, "learning_rate": 1e-3}
        row |= {"loss": 5 * math.exp(-step / 30), "loss_ctc": 1.0, "loss_attention": 2.0}
        row |= {"seconds": 0.5, "data_wait_seconds": 0.05, "audio_seconds": 20.0, "padding": 0.2}
        row |= {"utterances": batch, "batch": batch, "frames_max": 200 // batch, "tokens_max": 60 // batch}
        rows.append(row)
        if step % 20 == 0:
            examples = [{"text": "the cat sat", "pred_text": "the <b>bat</b> sat", "lang": "en"}]
            row = {"kind": "valid", "step": step, "time": 1e9 + step, "loss": 1.0, "examples": examples}
            rows.append(row | {"wer": 1 / step, "cer": 0.5 / step, "rtfx": 50.0})
    return rows
