"""Training data as it lies: read in place, its columns named, and rows that cannot be used left out by name."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from canter.corpus.manifest import Utterance, read_manifest
from canter.errors import ManifestError
from canter.training.config import load_config
from canter.training.feed.corpus import usable_rows, validation_rows
from canter.training.recipe import run_training

from ..conftest import Messages


@pytest.fixture(scope="session")
def hub(spoken, tmp_path_factory):
    """The spoken corpus as Parquet of the Hub in two shards, with columns of other names, and a language that no
    tokenizer of it knows."""
    folder = tmp_path_factory.mktemp("hub")
    rows = [row for row in read_manifest(spoken.train_manifest) if isinstance(row, Utterance)]
    table = pa.Table.from_pylist(
        [
            {
                "speech": {"bytes": Path(row.audio_filepath).read_bytes(), "path": f"{number}.wav"},
                "said": row.text,
                "tongue": "kab" if number == 3 else row.text_lang,
            }
            for number, row in enumerate(rows)
        ]
    )
    for shard in range(2):
        part = table.slice(shard * len(rows) // 2, len(rows) // 2)
        path = folder / "data" / f"train-{shard:05d}-of-00002.parquet"
        path.parent.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(part, path, row_group_size=10)
    return folder


def test_a_run_reads_parquet_in_place(config, hub, spoken, tmp_path):
    said = []
    # the tokenizer of a run whose data has no row in Kabyle
    before = run_training(dataclasses.replace(config, steps=1, valid=())).prepared
    config = dataclasses.replace(
        config,
        manifest=(hub,),
        valid=(hub / "data" / "train-00001-of-00002.parquet",),
        output=tmp_path / "other",
        tokenizer=before.run.folder / "tokenizer",
        text_column="said",
        language_column="tongue",
        audio_column="speech",
        steps=4,
    )
    finished = run_training(config, Messages(said))
    index = finished.prepared.data.index
    assert finished.progress.step == 4
    assert len(index) == len(before.data.index) - 1
    assert np.isin(index.tokens, before.data.index.tokens).all()
    (problem,) = index.problems
    assert (problem.file, problem.line) == (str(hub / "data" / "train-00000-of-00002.parquet"), 4)
    assert "'kab' (Kabyle) is not a language of this model" in problem.reason
    assert any("1 rows left out, listed in" in line and "train-00000-of-00002.parquet:4" in line for line in said)
    assert not (config.output / "skipped.jsonl").exists()
    assert index.utterance(0).audio_filepath.startswith(f"{hub}/data/train-00000-of-00002.parquet::0.wav@")
    assert load_config(config.output / "config.yaml").text_column == "said"
    copied = sum(one.stat().st_size for one in (config.output / "lengths.arrow.parts").iterdir())
    assert copied < 40_000


def test_validation_rows_are_proven_before_training(spoken, config, tmp_path):
    rows = [json.loads(line) for line in Path(spoken.test_manifest).read_text().splitlines()]
    path = tmp_path / "valid.jsonl"
    path.write_text("".join(json.dumps(row | {"lang": "kab"}) + "\n" for row in rows))

    class English:
        def prompt(self, utterance):
            if utterance.lang == "kab":
                raise ValueError("kab is not a language")
            return [1]

        def encode(self, text, lang=None):
            return list(text.encode())

    config = dataclasses.replace(config, valid=(path,))
    with pytest.raises(
        ManifestError, match=r"--valid has no usable row:\n.*valid\.jsonl:1: prompt cannot be made: kab"
    ):
        usable_rows(validation_rows(config), English(), 30.0, 448)
    config = dataclasses.replace(config, valid=(spoken.test_manifest, path))
    usable, problems = usable_rows(validation_rows(config), English(), 30.0, 448)
    assert len(usable) == len(problems) == len(rows)
    usable, problems = usable_rows(validation_rows(config), English(), usable[0].duration, 448)
    assert any(one.reason.startswith("longer than the model takes") for one in problems)
