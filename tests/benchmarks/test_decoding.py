"""The benchmarks of hot words and of several adapters run at toy size, and count what they say they count."""

import json
import sys
from pathlib import Path

import pytest
import soundfile

from canter.models.formats.checkpoint import save_model
from canter.text import train_tokenizer

from ..inference.conftest import noises, small_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
try:
    import adapters
    import hotwords
finally:
    sys.path.remove(str(BENCHMARKS))

SENTENCES = ["one two three", "four five six seven", "eight nine ten", "three one two", "the end of it all"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Canary, and a manifest of three clips beside it."""
    path = tmp_path_factory.mktemp("decoding")
    tokenizer = train_tokenizer(SENTENCES * 20, languages=["en"], vocab_size=40)
    save_model(small_model(vocabulary=tokenizer.vocab_size), path / "model", tokenizer)
    rows = []
    for number, clip in enumerate(noises(3)):
        soundfile.write(path / f"{number}.wav", clip, 16000)
        text = SENTENCES[number]
        rows.append({"audio_filepath": f"{number}.wav", "duration": len(clip) / 16000, "text": text, "lang": "en"})
    (path / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_adapters_are_compared_in_turns(folder, capsys):
    adapters.main(
        adapters.Options(folder / "model", folder / "clips.jsonl", adapters=2, repeats=1, json=folder / "adapters.json")
    )
    found = json.loads((folder / "adapters.json").read_text())
    assert [*found["arms"]] == ["no adapter", "one, merged", "bank, none taken", "bank of 2, in turns"]
    assert all(one["seconds"][0] > one["decoder_seconds"][0] > 0 for one in found["arms"].values())
    assert "no adapter" in capsys.readouterr().out


def test_rare_words_are_those_of_several_pieces():
    class Letters:
        def encode(self, text: str) -> list[str]:
            return [part for part in text.replace("zebra", "ze bra").split(" ") if part]

    assert hotwords.rare_words(["a Zebra or zebra", "ZEBRA plain"], Letters(), 2) == {"zebra": "zebra"}


def test_recall_counts_rare_words_only():
    references, texts = ["a zebra ran", "a zebra slept", "all is well"], ["a zebra ran", "a sebra slept", "all is ill"]
    found = hotwords.recall_and_errors(references, texts, {"zebra"})
    assert (found["said"], found["recall"]) == (2, 0.5)
    assert found["wer"] == pytest.approx(2 / 9)
    assert found["wer_without"] == pytest.approx(1 / 3)
