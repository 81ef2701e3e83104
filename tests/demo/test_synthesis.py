import hashlib
import json
import sys

import numpy as np
import pytest
import soundfile

from canter.demo import sentences, synthesis
from canter.demo.sentences import GRAMMARS, is_test_text, reference_text
from canter.demo.synthesis import plan_part, synthesise, voices
from canter.errors import CanterError
from canter.events import Events


def rows(manifest):
    return [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]


def digests(folder):
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    pytest.importorskip("espeakng_loader")
    return synthesise(tmp_path_factory.mktemp("small") / "corpus", utterances=70, test_utterances=12, workers=2)


def test_languages_share_no_word_and_have_enough():
    english, spanish = (GRAMMARS[language].vocabulary for language in ("en", "es"))
    assert not english & spanish
    assert len(english) >= 55
    assert len(spanish) >= 55


@pytest.mark.parametrize("language", GRAMMARS)
def test_sentences_are_normalised_and_of_the_vocabulary(language):
    grammar = GRAMMARS[language]
    rng = np.random.default_rng(3)
    lengths = []
    for _ in range(2000):
        text = reference_text(grammar.sentence(rng))
        assert text == text.lower().strip()
        assert set(text.split()) <= grammar.vocabulary
        lengths.append(len(text.split()))
    assert min(lengths) == 1
    assert sentences.MAX_WORDS <= max(lengths) < sentences.MAX_WORDS + 16
    assert np.median(lengths) < np.mean(lengths)  # a long tail


def test_no_test_text_is_ever_in_training():
    train = {one.text for seed in (0, 1) for one in plan_part("train", 3000, seed)}
    test = [one.text for one in plan_part("test", 200, 0)]
    assert len(set(test)) == 200
    assert not train & set(test)
    assert not any(map(is_test_text, train))
    assert len({word for text in test for word in text.split()}) >= 100


def test_a_third_of_the_test_voices_is_unseen():
    train, test = list(plan_part("train", 3000, 0)), list(plan_part("test", 201, 0))
    trained = {(one.voice.variant, one.voice.language) for one in train}
    unseen = [one for one in test if not one.seen]
    assert len(unseen) == 67
    assert not {(one.voice.variant, one.voice.language) for one in unseen} & trained
    assert {one.voice for one in test if one.seen} <= set(voices("en", unseen=False) + voices("es", unseen=False))
    assert len({one.voice for one in train}) >= 60
    assert len(voices("en", unseen=True) + voices("es", unseen=True)) >= 30


def test_a_larger_corpus_begins_with_the_smaller():
    assert list(plan_part("test", 30, 5)) == list(plan_part("test", 60, 5))[:30]


def test_manifest_and_audio_agree(small):
    for manifest, count in ((small.train_manifest, 70), (small.test_manifest, 12)):
        found = rows(manifest)
        assert len(found) == count
        for row in found:
            samples, rate = soundfile.read(manifest.parent / row["audio_filepath"], dtype="int16")
            assert rate == 16000
            assert samples.ndim == 1
            assert len(samples) / rate == pytest.approx(row["duration"], abs=1e-4)
            assert np.abs(samples.astype(float)).max() > 1000
            assert row["lang"] == row["source_lang"] == row["target_lang"]
            assert row["speaker"].startswith(row["lang"])
    assert not list(small.train_manifest.parent.rglob("*.partial"))


class Watching(Events[object]):
    """Notes how many batches are to be spoken, and interrupts after ``most`` of them."""

    def __init__(self, most: int | None = None):
        self.most, self.batches = most, 0

    def progress(self, items, name):
        self.batches = len(items)
        for number, item in enumerate(items):
            if number == self.most:
                raise KeyboardInterrupt
            yield item


def test_interrupted_and_other_workers_give_the_same_bytes(small, tmp_path):
    sizes = {"utterances": 70, "test_utterances": 12, "workers": 1}
    with pytest.raises(KeyboardInterrupt):
        synthesise(tmp_path / "corpus", **sizes, events=Watching(most=1))
    assert not (tmp_path / "corpus/train.jsonl").exists()
    resumed = Watching()
    synthesise(tmp_path / "corpus", **sizes, events=resumed)
    assert resumed.batches < 3  # what the interrupted run finished was not spoken again
    assert digests(tmp_path / "corpus") == digests(small.train_manifest.parent)


def test_a_damaged_file_is_spoken_again(small, tmp_path):
    before = digests(small.train_manifest.parent)
    (small.train_manifest.parent / "train/000003.flac").write_bytes(b"")
    synthesise(small.train_manifest.parent, utterances=70, test_utterances=12, workers=1)
    assert digests(small.train_manifest.parent) == before


def test_another_corpus_in_the_folder_is_refused(small, tmp_path):
    with pytest.raises(CanterError, match="another corpus"):
        synthesise(small.train_manifest.parent, utterances=2, test_utterances=1, seed=1)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(CanterError, match="not empty"):
        synthesise(tmp_path, utterances=2, test_utterances=1)


def test_without_the_library_the_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    monkeypatch.setattr(synthesis, "espeak", synthesis.espeak.__wrapped__)
    with pytest.raises(CanterError, match=r"pip install 'canter\[demo\]'"):
        synthesise(tmp_path / "corpus", utterances=2, test_utterances=1)
