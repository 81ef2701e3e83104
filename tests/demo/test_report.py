"""The page of the demo, complete and in parts."""

import numpy as np
import pytest

from canter.demo.report import demo_report

RNG = np.random.default_rng(0)


def strategy(padded: float, hours: float, speedup: float) -> dict:
    return {
        "padded_audio": padded, "padded_tokens": padded, "padded_compute": padded, "mean_batch": 8.0,
        "memory_filled": 0.9, "steps": 40, "epoch_hours": hours, "mixing_pool": float("inf"),
        "speedup": speedup,
    }  # fmt: skip


@pytest.fixture
def summary(metrics) -> dict:
    shift = [
        {"shape": shape, "cache": cache, "seconds": 20 / speedup, "rtfx": 10 * speedup, "speedup": speedup,
         "parameters": 3.7e6, "encoder_seconds": 1.0, "decoder_seconds": 20 / speedup - 1}
        for shape, cache, speedup in (("4/6", "none", 1.0), ("4/6", "full", 2.5), ("7/2", "full", 4.25))
    ]  # fmt: skip
    return {
        "corpus": {"utterances": 3000, "audio_hours": 3.5, "voices": 30, "unseen_voices": 9, "words": 128,
                   "languages": ["en", "de"], "lengths": RNG.uniform(1, 18, (200, 2)).tolist()},
        "strategies": {"random": strategy(0.5, 0.5, 1.0), "balanced": strategy(0.02, 0.25, 2.0)},
        "training": metrics, "train_seconds": 421.0, "parameters": 3.7e6,
        "trained_padding": 0.031, "room_for_longest": 20,
        "measured_speed": {"audio_seconds_a_second": {"random": 50.0, "balanced": 90.0}, "speedup": 1.8,
                           "predicted": 1.7, "steps": 9, "room_for_longest": 4},
        "wer": 0.117, "attention_wer": 0.131, "ctc_weight": 0.3, "cer": 0.05,
        "wer_seen": 0.09, "wer_unseen": 0.16, "ctc_wer": 0.14, "rtfx": 180.0,
        "wer_by_language": {"en": 0.1, "de": 0.13},
        "examples": [{"voice": "f3", "lang": "de", "text": "der <hund> bellt", "pred_text": "der mund"}],
        "decoder_shift": {f"{row['shape']} {row['cache']}": row for row in shift},
        "machine": {"cores": 2}, "times": {"synthesis": 40.0, "training": 421.0},
    }  # fmt: skip


def test_complete_page(summary):
    page = demo_report(summary)
    for told in (
        "3,000 utterances, 3.5 hours of speech", "7 min 1 s", 'class="value">2.0%<',
        'class="value">1.8×<', 'class="value">11.7%<', "of the compute, predicted", "measured; predicted 1.7×",
        "holds 20 of the longest", "9 batches of each", "3.1% of the audio computed was padding", "13.1%",
        'class="value">4.2×<',
        "What padding is", "One epoch", "English, German", "other voices", "16.0%", "German · f3",
        "der &lt;hund&gt; bellt", "RTFx 25",
        "2.50×", "the baseline", "keys and values cached", "7 min 41 s from start", "synthesis", "∞",
    ):  # fmt: skip
        assert told in page, told
    assert '<tr class="best"><td class="text">balanced</td>' in page
    assert page.count('class="cell best"') == 1


@pytest.mark.parametrize(
    ("part", "title"),
    [
        ("corpus", "The corpus"),
        ("strategies", "Batching strategies"),
        ("training", "Training"),
        ("decoder_shift", "Deep and shallow decoders"),
        ("times", "Times"),
        ("machine", "The machine"),
    ],
)
def test_a_missing_part_leaves_out_its_section(summary, part, title):
    assert f"<h2>{title}</h2>" in demo_report(summary)
    del summary[part]
    assert f"<h2>{title}</h2>" not in demo_report(summary)


def test_quick_demo_without_figures_of_merit():
    assert "From a manifest" in demo_report({})
    assert "random" in demo_report({"strategies": {"random": {"mean_batch": 3.0}}})
    assert "1 s from start" in demo_report({"times": {"report": 1.0}})
    assert "2 s from start" in demo_report({"times": {"report": 1.0, "total": 2.0}})


def test_without_a_measured_speed_the_predicted_one_is_called_so(summary):
    del summary["measured_speed"]
    page = demo_report(summary)
    assert 'class="value">2.0×<' in page
    assert "than random, predicted by the budget" in page
