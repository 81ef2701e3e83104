"""Results for the hub: its own library reads what is written."""

import datetime

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries

from canter.errors import ConfigError
from canter.evaluation.hub_results import Benchmark, write_result
from canter.evaluation.wer import score_texts

DATE = datetime.date(2026, 11, 30)


def test_the_hubs_library_reads_the_result(tmp_path):
    score = score_texts(["the doctor opened it", "a window"], ["the doctor opened", "a window"])
    benchmark = Benchmark.of("hf-audio/open-asr-leaderboard:librispeech_clean")
    file = write_result(tmp_path, benchmark.result(score, "leaderboard", DATE))
    assert file.parent == tmp_path / ".eval_results"
    values = yaml.safe_load(file.read_text())
    (entry,) = parse_eval_result_entries(values)
    assert (entry.dataset_id, entry.task_id) == ("hf-audio/open-asr-leaderboard", "librispeech_clean")
    assert entry.value == 16.67
    assert entry.date == "2026-11-30"
    assert entry.notes == "WER in %, 2 utterances of 6 words, 'canter score --normalize leaderboard'"
    assert isinstance(values[0]["date"], str)


def test_a_task_has_one_file_and_others_have_their_own(tmp_path):
    score = score_texts(["one two"], ["one two"])
    for name in ("a/b:x", "a/b:x", "a/b:y", "a/b"):
        write_result(tmp_path, Benchmark.of(name).result(score, "standard", DATE))
    files = sorted(path.name for path in (tmp_path / ".eval_results").iterdir())
    assert files == ["a--b--default.yaml", "a--b--x.yaml", "a--b--y.yaml"]


@pytest.mark.parametrize("name", ["librispeech", "a/b:", "../b:x", "a/b:../../x", "a/b:x y", "a/b/c:x"])
def test_other_names_are_refused(name):
    with pytest.raises(ConfigError, match="is not DATASET:TASK of the Hugging Face hub"):
        Benchmark.of(name)


def test_without_words_there_is_nothing_to_publish():
    with pytest.raises(ConfigError, match="no WER to publish"):
        Benchmark("a/b").result(score_texts([""], ["one"]), "standard", DATE)
