"""The benchmarks of decoding, run small."""

import importlib
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch

from canter.models.model import SpeechModel

from ..inference.conftest import noises, small_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Imports a benchmark by name, as when it is run."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def lengths(tmp_path) -> Path:
    """A table of 40 utterances."""
    rng = np.random.default_rng(0)
    seconds = rng.uniform(0.5, 3, 40).astype(np.float32)
    table = pa.table({"duration": seconds, "tokens": rng.integers(1, 20, 40)})
    parquet.write_table(table, tmp_path / "some.parquet")
    return tmp_path / "some.parquet"


def test_gpu_inference_runs_small_without_a_gpu(script, tmp_path):
    pytest.importorskip("transformers")
    gpu_inference = script("gpu_inference")
    gpu_inference.run(gpu_inference.Options(smoke=True, json=tmp_path / "x"))
    result = json.loads((tmp_path / "x").read_text())
    assert not result["left_out"]
    engines = {(row["model"], row["engine"]): row for row in result["engines"]}
    models = {model for model, _ in engines}
    assert len(models) == 4
    assert {model for model, engine in engines if engine == "canter"} == models
    assert {model for model, engine in engines if engine == "transformers"} == models - {"owsm medium"}
    assert {row["model"] for row in result["steps"]} == models
    for row in engines.values():
        assert row["rtfx"] > 0
        assert row.get("useful_rows", 1.0) > 0.5
    assert all(row["of_floor"] > 0 for row in result["steps"])
    assert [(row["shape"], row["way"]) for row in result["ways"]] == [
        (shape, way) for shape in ("2/2", "3/1") for way in ("released", "engine")
    ]


def test_owsm_runs_small_beside_espnet(script, tmp_path):
    pytest.importorskip("espnet2")
    owsm = script("owsm")
    owsm.run(owsm.Options(smoke=True, json=tmp_path / "x"))
    result = json.loads((tmp_path / "x").read_text())
    for rows in (result["queue"], result["single"]):
        espnet, padded, unpadded = rows.values()
        assert padded["same_tokens"] == 1.0
        assert espnet["tokens"] == padded["tokens"] == unpadded["tokens"] > 0
        assert unpadded["times_espnet"] > 0


def test_owsm_ends_texts_at_their_limits(script, tmp_path):
    owsm = script("owsm")
    options = owsm.Options(layers=(1, 1), width=64, vocabulary=300)
    model = owsm.build(options, tmp_path / "espnet")
    prompt = tuple(model.tokenizer.prompt_ids({"source_lang": "en"}))
    random = np.random.default_rng(0)
    clips = [owsm.Clip(random.normal(size=8000 * n).astype(np.float32), 0.5 * n, prompt) for n in (3, 2, 1)]
    found = {beams: owsm.CanterQueue(model, 2, beams)(clips, [9, 4, 6]) for beams in (1, 3)}
    assert [[len(tokens) for tokens in texts] for texts in found.values()] == [[9, 4, 6]] * 2
    assert len({tuple(tokens[:4]) for tokens in found[1]}) > 1


def test_slots_stay_full(script, lengths, tmp_path):
    decoding = script("decoding")
    decoding.run(decoding.Options((lengths,), rows=(4,), repeats=1, json=tmp_path / "x"))
    result = json.loads((tmp_path / "x").read_text())
    row = result["queues"][0]
    table = parquet.read_table(lengths)
    assert row["utterances"] == 40
    assert row["tokens"] == sum(table["tokens"].to_pylist()) + 40
    assert row["useful_rows"] == 1.0
    assert row["mean_live_share"] > 0.8
    assert row["batches_by_audio_useful_rows"] < row["batches_by_true_tokens_useful_rows"] < 1
    assert len(result["shift"]) == 9


def test_the_2_x_2(script, lengths, tmp_path):
    decoder_shift = script("decoder_shift")
    options = decoder_shift.Options(
        ("2/2", "3/1"), 16, lengths, clips=4, rows=2, batch=2, repeats=1, threads=1, json=tmp_path / "x"
    )
    decoder_shift.run(options)
    result = json.loads((tmp_path / "x").read_text())
    assert [(row["shape"], row["way"]) for row in result["rows"]] == [
        (shape, way) for shape in ("2/2", "3/1") for way in ("released", "engine")
    ]
    assert result["lengths"] == "some.parquet"


@pytest.mark.skipif(not os.environ.get("CANTER_SHARED"), reason="CANTER_SHARED names no folder with speech")
def test_identity_of_a_few_clips(script, tmp_path):
    pytest.importorskip("transformers")
    identity = script("identity")
    manifest = Path(os.environ["CANTER_SHARED"]) / "data/speech/an4/manifest.jsonl"
    options = identity.Options(
        manifests=(manifest,), most=2, batches=(1, 2), precisions=(), slow_every=2, json=tmp_path / "x"
    )
    assert identity.run(options) == 0
    result = json.loads((tmp_path / "x").read_text())
    assert result["clips"] == 2
    assert result["float32"]["batch_2"]["differing"] == result["float32"]["transformers"]["differing"] == 0
    assert result["beam_5"]["largest_difference_of_scores"] < 1e-4


def test_both_ways_decode_the_same_queue(script):
    """Rows have the lengths given; the released way waits for the longest of a batch, the engine does not."""
    models = {"1/3": small_model(1, 3), "3/1": small_model(3, 1)}
    clips, tokens = noises(9), [2, 30, 3, 4, 2, 25, 3, 2, 4]
    rows = script("decoder_shift").measure_ways(models, clips, tokens, repeats=1, rows=4, batch=9)
    assert [(row.shape, row.way) for row in rows] == [
        (shape, way) for shape in models for way in ("released", "engine")
    ]
    for row in rows:
        assert row.useful_rows == (pytest.approx(sum(tokens) / (9 * 30)) if row.way == "released" else 1.0)
        assert row.encoder_seconds + row.decoder_seconds <= row.seconds
        assert row.rtfx == pytest.approx(sum(map(len, clips)) / 16000 / row.seconds)


def test_matched_shapes_have_the_parameters_of_the_first(script):
    decoder_shift = script("decoder_shift")
    canary_config = decoder_shift.canary_config

    def size(encoder: int, decoder: int) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in SpeechModel(canary_config(encoder, decoder, 128)).parameters())

    layer = size(2, 1) - size(1, 1)
    for decoder in (4, 24):
        matched = decoder_shift.matched_encoder_layers(24, 24, decoder, 128)
        assert abs(size(matched, decoder) - size(24, 24)) <= layer / 2
    with torch.device("meta"):
        flash = SpeechModel(canary_config(32, 4))
    assert sum(p.numel() for p in flash.parameters()) == pytest.approx(883e6, rel=0.02)  # canary-1b-flash
