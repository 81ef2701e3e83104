"""Utterances that a model cannot take are in no batch and are listed; those found while reading are skipped."""

import dataclasses
import json
import math

import numpy as np
import pytest
import soundfile

from canter.corpus.index import LengthIndex
from canter.corpus.manifest import Utterance
from canter.errors import AudioError
from canter.text import train_tokenizer
from canter.training.feed.data import MicroBatches
from canter.training.recipe import run_training


def test_audio_and_text_beyond_the_models(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).normal(0, 0.1, 32000), 16000)
    utterance = Utterance(str(tmp_path / "a.wav"), 2.0, text="one two three four", lang="en")
    tokenizer = train_tokenizer([utterance.text] * 3, {"en"}, 40, tmp_path / "tokenizer")
    index = LengthIndex(np.array([2.0], np.float32), np.array([10]))

    def example(speed=1.0, **most):
        return MicroBatches(index, tokenizer, None, 16000, **most).example(utterance, speed=speed)

    whole = example(longest_seconds=2.0, most_tokens=len(example().tokens))
    assert len(whole.audio) == 32000
    with pytest.raises(AudioError, match=r"a.wav: 2.50 s are more than the 2.1 s that the model takes; cut it"):
        example(speed=0.8, longest_seconds=2.1)
    with pytest.raises(AudioError, match=rf"a.wav: its text has {len(whole.tokens)} tokens .* more than the 5 "):
        example(most_tokens=5, longest_seconds=math.inf)


def test_a_run_leaves_them_out_of_its_plan_and_names_them(config):
    before = run_training(dataclasses.replace(config, steps=1, valid=()))
    positions = int(np.median(before.prepared.data.index.tokens))
    shape, folder = dataclasses.replace(config.model, positions=positions), config.output.with_name("other")
    config = dataclasses.replace(config, output=folder)
    finished = run_training(dataclasses.replace(config, model=shape, steps=4, valid=()))
    assert finished.progress.step == 4
    index = finished.prepared.data.index
    left_out = [json.loads(line) for line in (config.output / "left_out.jsonl").read_text().splitlines()]
    assert {row["line"] for row in left_out} == set(np.flatnonzero(index.tokens > positions).tolist())
    assert all("more tokens than the model has positions for: " in row["reason"] for row in left_out)
    assert left_out
    taken = (config.output / "utterances.jsonl").read_text()
    rows = {row for line in taken.splitlines() for part in json.loads(line)["rows"] for row in part}
    assert not rows & {row["line"] for row in left_out}
    assert not (config.output / "skipped.jsonl").exists()  # none is read in vain
