"""The validated utterances, and the choice of the best checkpoint."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from canter.corpus.index import LengthIndex
from canter.corpus.manifest import Utterance, read_manifest
from canter.errors import ManifestError
from canter.evaluation.wer import score_texts
from canter.models.decoder import DecoderConfig
from canter.models.features import WhisperFeatureConfig
from canter.models.model import ModelConfig, SpeechModel
from canter.models.whisper import WhisperEncoderConfig
from canter.text import train_tokenizer
from canter.training.feed.data import MicroBatches
from canter.training.recipe import run_training
from canter.training.run.checkpoints import Checkpoints
from canter.training.validation import Validator, fingerprint, translations

from .conftest import Messages


@pytest.fixture
def rows(spoken):
    found = [row for row in read_manifest(spoken.test_manifest) if isinstance(row, Utterance)]
    return sorted(found, key=lambda row: row.duration)


@pytest.fixture
def tokenizer(rows, tmp_path):
    return train_tokenizer([row.text for row in rows], {str(row.lang) for row in rows}, 60, tmp_path / "tokenizer")


def test_what_the_model_cannot_take_is_left_out_and_named(rows, tokenizer):
    torch.manual_seed(0)
    most = int(50 * rows[-1].duration) - 1  # 20 ms each: all but the longest fit
    model = SpeechModel(
        ModelConfig(
            WhisperFeatureConfig(mels=20, pad_seconds=0.0),
            WhisperEncoderConfig(1, 16, 2, 32, 20, most),
            DecoderConfig(1, 16, 2, 32, tokenizer.vocab_size, 50),
        )
    ).eval()
    assert rows[-2].duration < model.longest_seconds < rows[-1].duration
    said = []
    index = LengthIndex(np.array([row.duration for row in rows], np.float32), np.ones(len(rows), np.int64))
    data = MicroBatches(index, tokenizer, None, 16000, longest_seconds=model.longest_seconds)
    validate = Validator(rows, data, "float32", events=Messages(said))
    with torch.inference_mode():
        assert validate(model).metrics["utterances"] == len(rows) - 1
    assert len(said) == 1
    assert f"1 of {len(rows)} validation utterances cannot be used" in said[0]
    assert rows[-1].audio_filepath in said[0]
    with pytest.raises(ManifestError, match=r"its text has .* tokens with prompt and end, more than the 2"):
        Validator(rows, MicroBatches(index, tokenizer, None, 16000, most_tokens=2), "float32")


def test_a_set_is_what_is_scored(rows, tmp_path):
    whole = fingerprint(rows)
    moved = [dataclasses.replace(row, audio_filepath=f"/else{row.audio_filepath}") for row in rows]
    assert fingerprint(moved[::-1]) == whole
    assert fingerprint(rows[1:]) != whole
    assert fingerprint([dataclasses.replace(rows[0], text="other"), *rows[1:]]) != whole


@pytest.mark.parametrize(
    ("best", "now", "better"),
    [
        ({"wer": 0.2, "set": "a"}, {"wer": 0.2, "set": "a"}, True),
        ({"wer": 0.2, "set": "a"}, {"wer": 0.3, "set": "a"}, False),
        ({"wer": 0.2, "set": "a"}, {"wer": 0.3, "set": "b"}, True),
        ({"wer": 0.2}, {"wer": 0.3, "set": "b"}, False),  # as it was written once
        ({"wer": 0.2, "set": "a"}, {"wer": 0.3, "bleu": 1.0, "set": "a"}, True),
        ({"wer": 0.9, "bleu": 20.0, "set": "a"}, {"wer": 0.8, "bleu": 19.0, "set": "a"}, False),
        ({"wer": 0.8, "bleu": 19.0, "set": "a"}, {"wer": 0.9, "bleu": 20.0, "set": "a"}, True),
    ],
)
def test_the_best_is_of_one_set_and_by_bleu_where_there_is_one(tmp_path, best, now, better):
    checkpoints = Checkpoints(tmp_path, 1)
    assert checkpoints.is_best(now)
    checkpoints.set_best(1, best)
    assert checkpoints.is_best(now) == better


def test_bleu_of_languages_and_their_mean():
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
    text = "the cat sat on the mat"
    pairs = [
        (Utterance("a.wav", 1.0, text, source_lang="en", target_lang=lang), heard)
        for lang, heard in (("de", text), ("fr", "nothing of that"))
    ]
    found = translations([*pairs, (Utterance("b.wav", 1.0, text, source_lang="en", target_lang="en"), text)])
    assert found["bleu_de"] == pytest.approx(100)
    assert found["bleu"] == pytest.approx((found["bleu_de"] + found["bleu_fr"]) / 2)


def test_a_validation_row_that_cannot_be_used_is_named_and_left_out(config, tmp_path):
    """Its language, its length in seconds or tokens, or what its line holds."""
    manifest = Path(config.valid[0])
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for row in rows:
        row["audio_filepath"] = str(manifest.parent / row["audio_filepath"])
    broken = [rows[0] | {"source_lang": "kab", "text": "a"}, rows[1] | {"text": "a " * 600}, {"text": "no audio"}]
    path = tmp_path / "valid.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [broken[0], rows[2], *broken[1:], rows[3]]))
    said = []
    finished = run_training(dataclasses.replace(config, valid=(path,), steps=4), Messages(said))
    assert finished.progress.step == 4
    listed = [json.loads(line) for line in (config.output / "valid.skipped.jsonl").read_text().splitlines()]
    assert [(row["file"], row["line"]) for row in listed] == [(str(path), line) for line in (1, 3, 4)]
    assert "'kab' (Kabyle) is not a language of this model" in listed[0]["reason"]
    assert "more tokens than the model has positions for" in listed[1]["reason"]
    assert any("3 validation rows left out, listed in" in line and f"{path}:1:" in line for line in said)
    shown = (config.output / "validation" / "step-000004.jsonl").read_text().splitlines()
    assert len(shown) == 2


def test_another_validation_set_begins_a_new_best_and_transcripts_are_kept(config):
    config = dataclasses.replace(config, track=(), steps=2, valid_every=1, valid_utterances=1)
    run_training(config)
    path = config.output / "checkpoints" / "best.json"
    best = json.loads(path.read_text()) | {"wer": 0.0}  # what no other can beat
    path.write_text(json.dumps(best))
    run_training(dataclasses.replace(config, steps=3, valid_utterances=4, allow_changes=True))
    now = json.loads(path.read_text())
    assert now["set"] != best["set"]
    assert (now["checkpoint"], now["wer"] > 0) == ("step-000003", True)
    kept = sorted((config.output / "validation").iterdir())
    assert [path.name for path in kept] == ["step-000001.jsonl", "step-000002.jsonl", "step-000003.jsonl"]
    transcripts = [json.loads(line) for line in kept[-1].read_text().splitlines()]
    assert len(transcripts) == 4
    logged = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()][-1]
    assert "transcripts" not in logged
    texts = [row["text"] for row in transcripts], [row["pred_text"] for row in transcripts]
    assert score_texts(*texts, normalize="none").wer == pytest.approx(logged["wer"])
