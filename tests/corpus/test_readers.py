"""Every format read, on real files written by its own library; the audio compared sample by sample."""

import contextlib
import csv
import gzip
import io
import json
import shutil
import tarfile
from typing import ClassVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import soundfile
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import example, given
from hypothesis import strategies as st

from canter.corpus.audio import load_audio, load_utterance
from canter.corpus.build import index_sources
from canter.corpus.columns import Columns
from canter.corpus.counting import UnitCounter
from canter.corpus.index import LengthIndex, Source
from canter.corpus.manifest import Problem, Utterance, write_manifest
from canter.corpus.mixture import read_mixture
from canter.corpus.sources import open_source, units_of
from canter.errors import AudioError, ManifestError

SECONDS = (1.0, 0.5, 2.0, 1.25, 0.75)
TEXTS = ("one", "zwei", "drei vier", "cinq", "six")


def sound(number):
    return np.random.default_rng(number).normal(0, 0.1, round(SECONDS[number] * 16000)).astype(np.float32)


def flac(number):
    file = io.BytesIO()
    soundfile.write(file, sound(number), 16000, format="FLAC")
    return file.getvalue()


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def audio(tmp_path):
    (tmp_path / "audio").mkdir()
    for number in range(5):
        (tmp_path / "audio" / f"{number}.flac").write_bytes(flac(number))
    return tmp_path / "audio"


def check(path, tmp_path, numbers=range(5)):
    """Check that `path` reads as the five utterances, directly and by an index, and return the problems."""
    found = list(open_source(path))
    rows = [row for row in found if isinstance(row, Utterance)]
    index = index_sources(path, tmp_path / "check.arrow", UnitCounter("chars"), prompt_tokens=2)
    assert len(index) == len(rows) == len(list(numbers))
    for place, (number, row) in enumerate(zip(numbers, rows, strict=True)):
        assert (row.text, row.duration) == (TEXTS[number], SECONDS[number])
        assert index.tokens[place] == 2 + len(row.text) + 1
        for one in (row, index.utterance(place)):
            samples = load_utterance(one)
            np.testing.assert_allclose(samples, sound(number), atol=1e-4)
    problems = [row for row in found if isinstance(row, Problem)]
    assert [(one.file, one.line, one.kind) for one in index.problems] == [
        (one.file, one.line, one.kind) for one in problems
    ]
    return problems


# NeMo


def test_gzipped_manifest(audio, tmp_path):
    rows = [
        {"audio_filepath": f"audio/{number}.flac", "duration": SECONDS[number], "text": TEXTS[number]}
        for number in range(5)
    ]
    text = "\n".join(json.dumps(row) for row in [*rows[:2], [], *rows[2:]])
    (tmp_path / "m.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (problem,) = check(tmp_path / "m.jsonl.gz", tmp_path)
    assert (problem.line, problem.kind) == (3, "not a JSON object")


def nemo_row(number, **fields):
    return {"audio_filepath": f"{number}.flac", "duration": SECONDS[number], "text": TEXTS[number], **fields}


@pytest.fixture
def tarred(tmp_path):
    """Tars 0 and 1, of utterances 0-2 and 3-4."""
    for shard, numbers in enumerate(([0, 1, 2], [3, 4])):
        with tarfile.open(tmp_path / f"audio_{shard}.tar", "w") as tar:
            for number in numbers:
                add(tar, f"{number}.flac", flac(number))
        rows = [nemo_row(number, shard_id=shard) for number in numbers]
        (tmp_path / "sharded_manifests").mkdir(exist_ok=True)
        write_manifest(tmp_path / "sharded_manifests" / f"manifest_{shard}.json", rows)
    return tmp_path


def test_sharded_tars_by_pattern(tarred, tmp_path):
    pattern = f"{tarred}/sharded_manifests/manifest__OP_0..1_CL_.json::{tarred}/audio_{{0..1}}.tar"
    assert check(pattern, tmp_path) == []


def test_sharded_tars_as_a_folder_keep_their_blocks(tarred, tmp_path):
    assert check(tarred, tmp_path) == []
    index = index_sources(tarred, tmp_path / "l.arrow", UnitCounter("chars"))
    assert [(shard.start, shard.stop) for shard in index.shards] == [(0, 3), (3, 5)]


def test_one_manifest_for_all_tars(tarred, tmp_path):
    rows = [nemo_row(number, shard_id=int(number > 2)) for number in range(5)]
    rows.insert(2, nemo_row(0, shard_id=7, text="no such shard"))
    rows.insert(3, nemo_row(4, shard_id=0, text="no such member"))
    rows.append(nemo_row(0, shard_id=0, offset=0.25, duration=0.5, audio_filepath="0-sub1.flac"))
    (tarred / "sharded_manifests" / "manifest_0.json").unlink()
    (tarred / "sharded_manifests" / "manifest_1.json").unlink()
    write_manifest(tarred / "tarred_audio_manifest.json", rows)
    *found, last = open_source(tarred)
    assert [row.text for row in found if isinstance(row, Utterance)] == list(TEXTS)
    problems = [(row.line, row.kind) for row in found if isinstance(row, Problem)]
    assert problems == [(3, "shard_id is not one of the 2 tars"), (4, "no such member in the tar")]
    assert isinstance(last, Utterance)
    samples = load_utterance(last)
    np.testing.assert_allclose(samples, sound(0)[4000:12000], atol=1e-4)


def test_one_manifest_over_several_tars_is_indexed_and_follows_each(tarred, tmp_path):
    for name in ("0", "1"):
        (tarred / "sharded_manifests" / f"manifest_{name}.json").unlink()
    manifest = tarred / "tarred_audio_manifest.json"
    write_manifest(manifest, [nemo_row(number, shard_id=int(number > 2)) for number in range(5)])
    for source in (tarred, f"{manifest}::{tarred}/audio__OP_0..1_CL_.tar"):
        assert check(source, tmp_path) == []
    index = index_sources(tarred, tmp_path / "l.arrow", UnitCounter("chars"))
    before = index.utterance(4).audio_filepath
    with tarfile.open(tarred / "audio_1.tar", "w") as tar:
        for number in (4, 3):
            add(tar, f"{number}.flac", flac(number))
    index = index_sources(tarred, tmp_path / "l.arrow", UnitCounter("chars"))
    assert index.utterance(4).audio_filepath != before
    np.testing.assert_allclose(load_utterance(index.utterance(4)), sound(4), atol=1e-4)


def test_unsafe_members_are_reported(tarred):
    with tarfile.open(tarred / "audio_1.tar", "a") as tar:
        add(tar, "../../evil.flac", flac(0))
        link = tarfile.TarInfo("link.flac")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    problems = [row for row in open_source(tarred) if isinstance(row, Problem)]
    assert [problem.kind for problem in problems] == ["unsafe member name", "not a regular file"]
    assert [problem.line for problem in problems] == [3, 4]
    assert {problem.file for problem in problems} == {str(tarred / "audio_1.tar")}


def test_a_lost_shard_does_not_lose_the_others(tarred, tmp_path):
    (tarred / "sharded_manifests" / "manifest_1.json").write_text("{\n")
    index = index_sources(tarred, tmp_path / "l.arrow", UnitCounter("chars"))
    assert len(index) == 3
    assert index.skipped == {"invalid JSON": 1}
    with pytest.raises(ManifestError, match="does not exist"):
        open_source(f"{tarred}/m_{{0..1}}.json")
    with pytest.raises(ManifestError, match=r"2 manifests .* but 3 tars"):
        units_of("m_{0..1}.json::a_{0..2}.tar")


# WebDataset


def test_webdataset(tmp_path):
    (tmp_path / "wds").mkdir()
    for shard, numbers in enumerate(([0, 1, 2], [3, 4])):
        with tarfile.open(tmp_path / "wds" / f"{shard}.tar", "w") as tar:
            for number in numbers:
                fields = {"text": TEXTS[number], "lang": "de"} | ({"duration": 1.0} if number == 0 else {})
                add(tar, f"d/{number}.json", json.dumps(fields).encode())
                add(tar, f"d/{number}.flac", flac(number))
            if shard == 0:
                add(tar, "d/x.txt", b"text alone")
                add(tar, "d/y.flac", b"broken")
                add(tar, "d/y.txt", b"y")
                add(tar, "d/z.flac", flac(0))
                add(tar, "d/z.txt", b"\xff")
    problems = check(tmp_path / "wds", tmp_path)
    assert [problem.kind for problem in problems] == ["no audio in the sample", "audio cannot be read", "invalid UTF-8"]
    assert next(iter(open_source(tmp_path / "wds"))).lang == "de"


def test_webdataset_segments(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        add(tar, "0.flac", flac(0))
        add(tar, "0.json", json.dumps({"text": "x", "offset": 0.25, "duration": 0.5}).encode())
    (row,) = open_source(tmp_path / "s.tar")
    np.testing.assert_allclose(load_utterance(row), sound(0)[4000:12000], atol=1e-4)


def test_webdataset_text_files_and_patterns(tmp_path):
    for shard, number in enumerate(range(5)):
        with tarfile.open(tmp_path / f"s-{shard:03d}.tar", "w") as tar:
            add(tar, f"{number}.flac", flac(number))
            add(tar, f"{number}.txt", TEXTS[number].encode() + b"\n")
    assert check(f"{tmp_path}/s-{{000..004}}.tar", tmp_path) == []


def test_compressed_and_broken_tars(tmp_path):
    with tarfile.open(tmp_path / "c.tar", "w:gz") as tar:
        add(tar, "0.flac", flac(0))
    with pytest.raises(ManifestError, match="not a plain tar"):
        list(open_source(tmp_path / "c.tar"))


@pytest.mark.parametrize("order", ["sorted", "audio last"])
def test_webdataset_members_apart_and_beside(tmp_path, order):
    """Members of a sample need not be neighbours; files that macOS and pax add are ignored."""
    with tarfile.open(tmp_path / "w.tar", "w") as tar:
        for number in range(5):
            add(tar, f"d/{number}.txt", TEXTS[number].encode())
            add(tar, f"d/._{number}.txt", b"\0\5\x16\7")
            if order == "sorted":
                add(tar, f"d/{number}.flac", flac(number))
                add(tar, f"__MACOSX/d/._{number}.flac", b"\0\5\x16\7")
                add(tar, f"PaxHeaders.7/{number}.flac", b"30 mtime=1\n")
        if order != "sorted":
            for number in reversed(range(5)):
                add(tar, f"d/{number}.flac", flac(number))
    assert check(tmp_path / "w.tar", tmp_path) == []


def test_webdataset_keys_with_dots(tmp_path):
    """Several audio files with one key are samples of their own; a lost row says what is missing."""
    with tarfile.open(tmp_path / "w.tar", "w") as tar:
        for number in range(3):
            add(tar, f"a.{number}.flac", flac(number))
            add(tar, f"a.{number}.txt", TEXTS[number].encode())
        add(tar, "a.9.txt", b"without audio")
        add(tar, "b.norm.txt", b"not this")
        add(tar, "b.flac", flac(3))
        add(tar, "b.txt", TEXTS[3].encode())
        add(tar, "c.x.flac", flac(4))
        add(tar, "c.json", json.dumps({"text": TEXTS[4]}).encode())
    (problem,) = check(tmp_path / "w.tar", tmp_path)
    assert problem.reason == "no audio in the sample: 'a.9' has txt"
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for number in (0, 1):  # the same key again
            add(tar, "a.flac", flac(number))
            add(tar, "a.txt", TEXTS[number].encode())
    assert check(tmp_path / "twice.tar", tmp_path, range(2)) == []


# Lhotse


@pytest.fixture
def cuts(audio):
    lhotse = pytest.importorskip("lhotse", reason="the extra 'lhotse' is not installed")
    found = []
    for number in range(5):
        recording = lhotse.Recording.from_file(audio / f"{number}.flac", recording_id=f"r{number}")
        cut = recording.to_cut()
        cut.supervisions = [
            lhotse.SupervisionSegment(
                id=f"s{number}",
                recording_id=recording.id,
                start=0,
                duration=recording.duration,
                text=TEXTS[number],
                language="xx",
            )
        ]
        found.append(cut)
    return lhotse.CutSet.from_cuts(found)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_lhotse_cuts(cuts, tmp_path, suffix):
    cuts.to_file(tmp_path / f"cuts.{suffix}")
    assert check(tmp_path / f"cuts.{suffix}", tmp_path) == []
    first = next(iter(open_source(tmp_path / f"cuts.{suffix}")))
    assert (first.id, first.lang) == ("r0", "xx")


def test_lhotse_cuts_that_are_no_utterance(cuts, tmp_path):
    import lhotse

    a, b, c, *_ = cuts
    window = c.truncate(offset=0.5, duration=1.0)
    window.supervisions = [lhotse.SupervisionSegment("s", "r2", 0.0, 1.0, text="inside")]
    silent = b.with_id("silent")
    silent.supervisions = []
    rows = [a.append(b), a.pad(5), a.perturb_speed(1.1), c.truncate(offset=0.5, duration=1.0), silent, window, a]
    path = tmp_path / "cuts.jsonl"
    lhotse.CutSet.from_cuts(rows).to_file(path)
    *others, last = path.read_text().splitlines()
    path.write_text("\n".join([*others, last.replace('"type": "file"', '"type": "memory"')]))
    *problems, found, memory = open_source(path)
    assert [problem.kind for problem in problems] == [
        "a MixedCut has no single audio file",
        "a MixedCut has no single audio file",
        "recording with transforms",
        "text goes beyond the cut",
        "text missing",
    ]
    assert memory.kind == "recording in a 'memory'"
    assert (found.offset, found.duration, found.text) == (0.5, 1.0, "inside")
    samples = load_utterance(found)
    np.testing.assert_array_equal(samples, window.load_audio()[0])


def test_lhotse_cuts_of_one_channel(tmp_path):
    lhotse = pytest.importorskip("lhotse", reason="the extra 'lhotse' is not installed")
    soundfile.write(tmp_path / "call.wav", np.stack([sound(0), -0.5 * sound(0), 0 * sound(0)], 1), 16000)
    recording = lhotse.Recording.from_file(tmp_path / "call.wav")
    kinds = (0, lhotse.MonoCut), (1, lhotse.MonoCut), ([0, 1, 2], lhotse.MultiCut), ([0, 2], lhotse.MultiCut)
    cuts = lhotse.CutSet.from_cuts(
        kind(f"c{number}", 0, recording.duration, channel, recording=recording, supervisions=[
            lhotse.SupervisionSegment("s", recording.id, 0, 1.0, channel, text="same text")
        ])
        for number, (channel, kind) in enumerate(kinds)
    )  # fmt: skip
    cuts.to_file(tmp_path / "cuts.jsonl")
    *rows, problem = open_source(tmp_path / "cuts.jsonl")
    for row, gain in zip(rows, (1, -0.5, 1 / 6), strict=True):
        np.testing.assert_allclose(load_utterance(row), gain * sound(0), atol=1e-4)
    assert problem.kind == "channels [0, 2] of a file with [0, 1, 2]"
    (tmp_path / "shar").mkdir()
    cuts.to_shar(tmp_path / "shar", fields={"recording": "wav"})
    for row, gain in zip(open_source(tmp_path / "shar"), (1, -0.5, 1 / 6, 0.5), strict=True):
        np.testing.assert_allclose(load_utterance(row), gain * sound(0), atol=1e-4)


def test_lhotse_windows_that_begin_with_their_file(cuts, tmp_path):
    window = next(iter(cuts)).truncate(duration=0.5)
    window.supervisions[0].duration = 0.5
    type(cuts).from_cuts([window]).to_file(tmp_path / "cuts.jsonl")
    (row,) = open_source(tmp_path / "cuts.jsonl")
    np.testing.assert_array_equal(load_utterance(row), window.load_audio()[0])


def test_lhotse_shar(cuts, tmp_path):
    (tmp_path / "shar").mkdir()
    cuts.to_shar(tmp_path / "shar", fields={"recording": "flac"}, shard_size=2)
    assert check(tmp_path / "shar", tmp_path) == []
    before = index_sources(tmp_path / "shar", tmp_path / "l.arrow", UnitCounter("chars")).utterance(0)
    tar = tmp_path / "shar" / "recording.000000.tar"
    with tarfile.open(tar) as old:
        members = [(one.name, old.extractfile(one).read()) for one in reversed(old.getmembers())]
    with tarfile.open(tar, "w") as new:
        for name, data in members:
            add(new, name, data)
    after = index_sources(tmp_path / "shar", tmp_path / "l.arrow", UnitCounter("chars")).utterance(0)
    assert after.audio_filepath != before.audio_filepath
    np.testing.assert_allclose(load_utterance(after), sound(0), atol=1e-4)
    assert [unit.kind for unit in units_of(str(tmp_path / "shar"))] == ["shar"] * 3


# Hugging Face datasets


@pytest.fixture
def datasets():
    return pytest.importorskip("datasets", reason="the extra 'hf' is not installed")


def test_huggingface_with_audio_inside(datasets, tmp_path):
    blobs = [{"bytes": flac(number), "path": f"{number}.flac"} for number in range(5)]
    rows = {"audio": blobs, "sentence": list(TEXTS), "locale": ["de"] * 5}
    dataset = datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio(16000))
    dataset.save_to_disk(tmp_path / "one")
    assert check(tmp_path / "one", tmp_path) == []
    dataset.save_to_disk(tmp_path / "two", num_shards=2)
    assert check(tmp_path / "two", tmp_path) == []
    assert next(iter(open_source(tmp_path / "two"))).lang == "de"
    datasets.DatasetDict(train=dataset, test=dataset).save_to_disk(tmp_path / "both")
    with pytest.raises(ManifestError, match=r"several splits \(test, train\); name one"):
        units_of(str(tmp_path / "both"))
    assert check(tmp_path / "both" / "train", tmp_path) == []


def test_huggingface_segments_and_ids_that_speakers_share(datasets, audio, tmp_path):
    rows = {
        "path": [str(audio / "0.flac"), str(audio / "0.flac"), str(audio / "4.flac")],
        "id": [903] * 3,
        "text": ["same sentence"] * 3,
        "offset": [0.0, 0.5, 0.0],
        "duration": [0.5, 0.5, SECONDS[4]],
    }
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "fleurs")
    found = list(open_source(tmp_path / "fleurs"))
    assert [len(load_utterance(row)) for row in found] == [8000, 8000, round(SECONDS[4] * 16000)]


def test_huggingface_with_paths(datasets, audio, tmp_path):
    rows = {"path": [str(audio / f"{number}.flac") for number in range(5)], "text": list(TEXTS)}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "paths")
    assert check(tmp_path / "paths", tmp_path) == []
    datasets.Dataset.from_dict({"text": list(TEXTS)}).save_to_disk(tmp_path / "none")
    with pytest.raises(ManifestError, match=r"no column of audio; name it .--audio-column.; it has text"):
        list(open_source(tmp_path / "none"))
    (tmp_path / "none" / "state.json").write_text("{}")
    with pytest.raises(ManifestError, match="does not list"):
        list(open_source(tmp_path / "none"))


# Common Voice


def test_common_voice(audio, tmp_path):
    audio.rename(tmp_path / "clips")
    rows = [f"client\t{number}.flac\t{TEXTS[number]}\tde" for number in range(5)]
    rows[2:2] = ["client\tmissing.flac\tnothing there\tde", "client\tshort line"]
    (tmp_path / "train.tsv").write_text("client_id\tpath\tsentence\tlocale\n" + "\n".join(rows) + "\n")
    problems = check(tmp_path / "train.tsv", tmp_path)
    assert [(one.line, one.kind) for one in problems] == [(4, "audio cannot be read"), (5, "wrong number of fields")]
    listed = "".join(f"{number}.flac\t{SECONDS[number] * 1000:.0f}\n" for number in range(5))
    (tmp_path / "clip_durations.tsv").write_text("clip\tduration[ms]\nmissing.flac\t1000\n" + listed)
    found = list(open_source(tmp_path / "train.tsv"))
    assert [row.duration for row in found if isinstance(row, Utterance)] == [1.0, 0.5, 1.0, 2.0, 1.25, 0.75]
    assert [unit.path for unit in units_of(str(tmp_path))] == [str(tmp_path / "train.tsv")]
    (tmp_path / "other.tsv").write_text("a\tb\n1\t2\n")
    with pytest.raises(ManifestError, match=r"no column of audio; name it .--audio-column.; it has a, b"):
        list(open_source(tmp_path / "other.tsv"))


# folders


def test_folder_of_audio(audio, tmp_path):
    for number in range(5):
        (audio / f"{number}.txt").write_text(TEXTS[number] + "\n")
    assert check(audio, tmp_path) == []
    (audio / "3.txt").unlink()
    (audio / "4.flac").write_bytes(b"")
    problems = check(audio, tmp_path, range(3))
    assert [problem.kind for problem in problems] == ["text missing", "audio cannot be read"]
    assert problems[1].file == str(audio / "4.flac")
    rows = list(open_source(audio, require_text=False))
    assert [row.text for row in rows if isinstance(row, Utterance)] == [*TEXTS[:3], ""]


def test_folders_without_data(tmp_path):
    with pytest.raises(ManifestError, match="holds nothing that Canter reads"):
        units_of(str(tmp_path))
    for name in "ab":
        write_manifest(tmp_path / f"{name}.jsonl", [nemo_row(0)])
    with pytest.raises(ManifestError, match=r"several manifests \(a\.jsonl, b\.jsonl\); name one"):
        units_of(str(tmp_path))
    (tmp_path / "x.wav").write_bytes(b"")
    with pytest.raises(ManifestError, match="is audio, not a manifest"):
        units_of(str(tmp_path / "x.wav"))


# lengths alone


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_tables_of_lengths(tmp_path, suffix):
    table = pa.table({"duration": [1.0, 2.0, float("nan"), None, 3.0, 4.0], "tokens": [5, 0, 1, 1, None, -2]})
    path = tmp_path / f"l.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    index = index_sources(path, tmp_path / "i.arrow", prompt_tokens=3)
    assert index.seconds.tolist() == [1.0, 2.0]
    assert index.tokens.tolist() == [9, 4]
    told = [(problem.file, problem.line, problem.kind) for problem in index.problems]
    kinds = ["duration is not a positive number of seconds"] * 2 + ["tokens out of range"] * 2
    assert told == [(str(path), line, kind) for line, kind in zip((3, 4, 5, 6), kinds, strict=True)]
    with pytest.raises(ManifestError, match="only lengths, so row"):
        index.utterance(0)
    with pytest.raises(ManifestError, match="has no audio"):
        open_source(path)


def test_tables_with_num_tokens_count_as_they_stand(tmp_path):
    pyarrow.parquet.write_table(pa.table({"duration": [1.0, 1.0], "num_tokens": [5, 5]}), tmp_path / "l.parquet")
    index = index_sources(tmp_path / "l.parquet", tmp_path / "i.arrow", prompt_tokens=3)
    assert index.tokens.tolist() == [5, 5], "and equal lengths are not taken for duplicates"


def test_tables_without_lengths(tmp_path):
    pyarrow.parquet.write_table(pa.table({"duration": [1.0]}), tmp_path / "d.parquet")
    with pytest.raises(ManifestError, match=r"nor lengths to plan with, duration .* it has duration"):
        index_sources(tmp_path / "d.parquet", tmp_path / "i.arrow")
    pyarrow.parquet.write_table(pa.table({"duration": ["a"], "tokens": [1]}), tmp_path / "s.parquet")
    with pytest.raises(ManifestError, match="column duration is of type string"):
        index_sources(tmp_path / "s.parquet", tmp_path / "i.arrow")
    (tmp_path / "x.parquet").write_bytes(b"words")
    with pytest.raises(ManifestError, match="is not a Parquet file"):
        index_sources(tmp_path / "x.parquet", tmp_path / "i.arrow")
    (tmp_path / "x.arrow").write_bytes(b"words")
    with pytest.raises(ManifestError, match="is not an Arrow file"):
        index_sources(tmp_path / "x.arrow", tmp_path / "i.arrow")


# URLs


class Ranges(MemoryFileSystem):
    """Object storage in memory, which remembers what was asked of it."""

    protocol = "ranges"
    asked: ClassVar[list[tuple]] = []

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("ranges://", "memory://"))

    def cat_file(self, path, start=None, end=None, **kwargs):
        self.asked.append((start, end))
        return super().cat_file(path, start=start, end=end, **kwargs)


@pytest.fixture
def bucket(tmp_path):
    """A function that moves all files of the temporary folder there, and gives its URL."""
    fsspec.register_implementation("ranges", Ranges, clobber=True)
    files = fsspec.filesystem("ranges")

    def move():
        files.put(f"{tmp_path}/", "/bucket/", recursive=True)
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        Ranges.asked.clear()
        return "ranges://bucket"

    yield move
    files.rm("/bucket", recursive=True)


@pytest.mark.parametrize("name", ["m.jsonl", "m.jsonl.gz"])
def test_manifests_at_urls(audio, tmp_path, bucket, name):
    rows = "".join(
        json.dumps({"audio_filepath": f"../x/../audio/{n}.flac", "duration": SECONDS[n], "text": TEXTS[n]}) + "\n"
        for n in range(5)
    ).encode()
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / name).write_bytes(gzip.compress(rows) if name.endswith("gz") else rows)
    url = f"{bucket()}/lists/{name}"
    assert not check(url, tmp_path)
    first = rows.splitlines(keepends=True)[0]
    fsspec.filesystem("ranges").pipe(url, gzip.compress(first) if name.endswith("gz") else first)
    assert not check(url, tmp_path, [0])  # another file by now


def test_tars_at_urls_are_read_by_range(tarred, tmp_path, bucket):
    home = bucket()
    pattern = f"{home}/sharded_manifests/manifest_{{0..1}}.json::{home}/audio_{{0..1}}.tar"
    assert not check(pattern, tmp_path)
    assert len(Ranges.asked) == 10
    assert all(end - start <= len(flac(2)) for start, end in Ranges.asked)
    np.testing.assert_allclose(load_audio(f"{home}/audio_1.tar::4.flac"), sound(4), atol=1e-4)
    (tmp_path / "mix.yaml").write_text(
        f"- manifest_filepath: {home}/sharded_manifests/manifest_{{0..1}}.json\n"
        f"  tarred_audio_filepaths: {home}/audio_{{0..1}}.tar\n"
    )
    assert len(index_sources(read_mixture(tmp_path / "mix.yaml"), tmp_path / "mix.arrow", UnitCounter("chars"))) == 5


def test_webdataset_at_a_url(tmp_path, bucket):
    with tarfile.open(tmp_path / "w.tar", "w") as tar:
        for number in range(5):
            add(tar, f"{number}.flac", flac(number))
            add(tar, f"{number}.txt", TEXTS[number].encode())
    assert not check(f"{bucket()}/w.tar", tmp_path)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://none.jsonl", "memory://none.jsonl does not exist"),
        ("memory://none.tar", "memory://none.tar does not exist"),
        ("memory://none.parquet", "memory://none.parquet does not exist"),
        ("memory://none.arrow", "copy it to a disk"),
        ("memory://none/*.parquet", "memory://none/\\*.parquet matches no file"),
        ("nonsense://none.jsonl", "nonsense://none.jsonl cannot be read: .*[Pp]rotocol"),
        ("nonsense://none.tar", "nonsense://none.tar cannot be read: .*[Pp]rotocol"),
    ],
)
def test_urls_that_cannot_be_read(tmp_path, url, message):
    with pytest.raises(ManifestError, match=message):
        list(open_source(url))
    with pytest.raises(ManifestError, match=message):
        index_sources(url, tmp_path / "i.arrow", UnitCounter("chars"))


# Parquet as the Hub has it


def hub_table(numbers=range(5), **columns):
    """A data set's table, with the schema that `datasets` writes into Parquet."""
    audio = [{"bytes": flac(number), "path": f"{number}.flac"} for number in numbers]
    features = {"audio": {"_type": "Audio"}, "lang_id": {"names": ["en_us", "de_de"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    texts = [TEXTS[number] for number in numbers]
    table = pa.table({"audio": audio, "sentence": texts, "lang_id": [1] * len(texts), **columns})
    return table.replace_schema_metadata(metadata)


@pytest.mark.parametrize("compression", ["snappy", "none", "zstd"])
@pytest.mark.parametrize("group", [1, 2, 5])
def test_parquet_is_read_in_place(tmp_path, compression, group):
    pyarrow.parquet.write_table(hub_table(), tmp_path / "hub.parquet", compression=compression, row_group_size=group)
    before = sorted(tmp_path.rglob("*"))
    assert check(tmp_path / "hub.parquet", tmp_path) == []
    index = LengthIndex.open(tmp_path / "check.arrow")
    assert {index.utterance(row).lang for row in range(5)} == {"de_de"}
    for row in (4, 0, 3, 3, 1):  # in any order
        np.testing.assert_allclose(load_utterance(index.utterance(row)), sound(row), atol=1e-4)
    written = sum(one.stat().st_size for one in set(tmp_path.rglob("*")) - set(before) if one.is_file())
    assert written < len(flac(0)) / 2  # no audio is copied


def test_parquet_written_by_datasets(datasets, tmp_path):
    rows = {
        "audio": [{"bytes": flac(number), "path": f"{number}.flac"} for number in range(5)],
        "transcription": list(TEXTS),
        "lang_id": [0, 1, 0, 1, 0],
    }
    dataset = datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio(16000))
    dataset = dataset.cast_column("lang_id", datasets.ClassLabel(names=["en_us", "fr_fr"]))
    dataset = dataset.cast_column("transcription", datasets.Value("large_string"))
    dataset.to_parquet(str(tmp_path / "hub.parquet"))
    dataset.save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "hub.parquet", tmp_path / "saved"):
        assert check(path, tmp_path) == []
        assert [row.lang for row in open_source(path)] == ["en_us", "fr_fr", "en_us", "fr_fr", "en_us"]


@pytest.mark.parametrize("folder", ["", "data"])
def test_folders_of_parquet_shards_and_splits(tmp_path, folder):
    home = tmp_path / "set"
    (home / folder).mkdir(parents=True)
    (home / "README.md").write_text("a data set")
    for shard, numbers in enumerate(([0, 1], [2, 3], [4])):
        name = f"train-{shard:05d}-of-00003.parquet"
        pyarrow.parquet.write_table(hub_table(numbers), home / folder / name)
    assert check(home, tmp_path) == []
    pyarrow.parquet.write_table(hub_table([0]), home / folder / "test-00000-of-00001.parquet")
    with pytest.raises(ManifestError, match=r"several splits \(.*test, .*train\); name one by its files: '") as told:
        units_of(str(home))
    pattern = str(told.value).split("'")[1]
    assert check(pattern, tmp_path) == []
    for file in (home / folder).glob("train-*"):  # as the Hub converts data sets
        split = tmp_path / "converted" / "default" / "train"
        split.mkdir(parents=True, exist_ok=True)
        file.rename(split / f"{int(file.name[6:11]):04d}.parquet")
    assert check(tmp_path / "converted", tmp_path) == []
    shutil.copytree(split, split.with_name("test"))
    with pytest.raises(ManifestError, match="several splits") as told:
        units_of(str(tmp_path / "converted"))
    assert check(str(told.value).split("'")[1], tmp_path) == []
    with pytest.raises(ManifestError, match="matches no file"):
        units_of(str(home / "nothing*.parquet"))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_tables_of_paths(audio, tmp_path, kind, suffix):
    paths = pa.array([f"audio/{number}.flac" for number in range(5)])
    paths = paths.dictionary_encode() if pa.types.is_dictionary(kind) else paths.cast(kind)
    table = pa.table({"path": paths, "text": list(TEXTS), "duration": list(SECONDS)})
    if suffix == "parquet":
        pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    else:
        with pa.OSFile(str(tmp_path / "p.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    assert check(tmp_path / f"p.{suffix}", tmp_path) == []


def test_parquet_with_some_audio_inside(audio, tmp_path):
    """Bytes, or else a path beside the table; a row without either is named."""
    rows = [
        {"bytes": flac(0), "path": None},
        {"bytes": None, "path": "audio/1.flac"},
        {"bytes": flac(2), "path": "x/2.flac"},
        {"bytes": None, "path": None},
        None,
        {"bytes": b"no audio", "path": "z.flac"},
        {"bytes": flac(3), "path": ""},
        {"bytes": flac(4), "path": "4.flac"},
    ]
    texts = [*TEXTS[:3], "a", "b", "c", *TEXTS[3:]]
    pyarrow.parquet.write_table(pa.table({"audio": rows, "text": texts}), tmp_path / "h.parquet", row_group_size=3)
    problems = check(tmp_path / "h.parquet", tmp_path)
    assert [(one.line, one.kind) for one in problems] == [
        (4, "audio_filepath missing"), (5, "audio_filepath missing"), (6, "audio cannot be read"),
    ]  # fmt: skip


def test_parquet_at_a_url(tmp_path, bucket):
    for shard, numbers in enumerate(([0, 1, 2], [3, 4])):
        pyarrow.parquet.write_table(
            hub_table(numbers, duration=[SECONDS[number] for number in numbers]),
            tmp_path / f"train-{shard:05d}-of-00002.parquet",
            row_group_size=1,
        )
    home = bucket()
    assert check(f"{home}/train-*.parquet", tmp_path) == []
    assert check(f"{home}/train-{{00000..00001}}-of-00002.parquet", tmp_path) == []


def test_damaged_parquet(tmp_path):
    path = tmp_path / "h.parquet"
    pyarrow.parquet.write_table(hub_table(), path, row_group_size=1, compression="none")
    good = list(open_source(path))
    whole = path.read_bytes()
    for start in range(4, len(whole), 2999):
        path.write_bytes(whole[:start] + bytes(64) + whole[start + 64 :])
        try:
            found = list(open_source(path))
            for row in found:
                if isinstance(row, Utterance):
                    load_utterance(row)
        except (ManifestError, AudioError):
            continue
        assert len(found) >= 4
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ManifestError, match="not a Parquet file"):
        list(open_source(path))
    with pytest.raises(AudioError, match="not a Parquet file"):
        load_utterance(good[0])
    path.write_bytes(whole)
    for place in ("audio.bytes:5:0", "audio.bytes:0:9", "sentence.bytes:0:0", "text:0:0"):
        with pytest.raises(AudioError, match="has changed or is damaged"):
            load_audio(f"{path}::x@{place}")


# Columns


def test_columns_can_be_named(audio, tmp_path):
    """Column names work in a table, in JSON and in a mixture, for one utterance and for the index."""
    rows = [
        {"wav_on_disk": f"audio/{n}.flac", "text": "not this", "normalised": TEXTS[n], "tongue": "de"} for n in range(5)
    ]
    columns = Columns("normalised", "tongue", "wav_on_disk")
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    (tmp_path / "t.csv").write_text(
        "\n".join([",".join(rows[0]), *(",".join(row.values()) for row in rows)]), encoding="utf-8"
    )
    write_manifest(tmp_path / "t.jsonl", rows)
    (tmp_path / "t.json").write_text(json.dumps(rows, indent=1))
    for name in ("t.parquet", "t.csv", "t.jsonl", "t.json"):
        path = tmp_path / name
        found = list(open_source(path, columns=columns))
        assert [(row.text, row.lang) for row in found] == [(text, "de") for text in TEXTS]
        index = index_sources([Source(str(path), columns=columns)], tmp_path / "i.arrow", UnitCounter("chars"))
        index = LengthIndex.open(tmp_path / "i.arrow")
        assert [index.utterance(row).text for row in range(5)] == list(TEXTS)
        (tmp_path / "mix.yaml").write_text(
            f"- {{path: {name}, text_column: normalised, lang_column: tongue, audio_column: wav_on_disk}}\n"
        )
        assert len(index_sources(read_mixture(tmp_path / "mix.yaml"), tmp_path / "m.arrow", UnitCounter("chars"))) == 5
    for name in ("t.parquet", "t.csv"):
        with pytest.raises(ManifestError, match="has no column 'words' of text; it has wav_on_disk, text"):
            list(open_source(tmp_path / name, columns=Columns(text="words", audio="wav_on_disk")))


# Tables, lists and folders of other recipes


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_audiofolder(audio, tmp_path, suffix):
    """`metadata.csv` and its like beside the audio, and one split of several."""
    rows = [{"file_name": f"{number}.flac", "transcription": TEXTS[number]} for number in range(5)]
    split = tmp_path / "set" / "train"
    split.parent.mkdir()
    audio.rename(split)
    if suffix == "jsonl":
        write_manifest(split / "metadata.jsonl", rows)
    else:
        mark = "," if suffix == "csv" else "\t"
        lines = [mark.join(rows[0]), *(mark.join(row.values()) for row in rows)]
        (split / f"metadata.{suffix}").write_text("\r\n".join(lines) + "\r\n")
    assert check(split, tmp_path) == []
    if suffix != "tsv":
        assert check(split.parent, tmp_path) == []
        shutil.copytree(split, split.parent / "test")
        with pytest.raises(ManifestError, match=r"several splits \(test, train\); name one"):
            units_of(str(split.parent))


def test_csv_with_quotes_and_broken_records(audio, tmp_path):
    lines = [
        b"\xef\xbb\xbfID,duration,wav,wrd,offset",
        b"a,1.0,audio/0.flac,one,",
        b'b,,audio/1.flac,"zwei",',
        b"c,2.0,audio/2.flac",
        b"d,2.0,audio/2.flac,\xff,",
        b'e,2.0,audio/2.flac,"two ""quoted"", lines\nhere",0',
        b"f,2.0,$data_root/2.flac,six,",
        b"g,long,audio/2.flac,six,",
    ]
    (tmp_path / "t.csv").write_bytes(b"\n".join(lines))
    found = list(open_source(tmp_path / "t.csv"))
    rows = [row for row in found if isinstance(row, Utterance)]
    assert [(row.id, row.text, row.duration, row.offset) for row in rows] == [
        ("a", "one", 1.0, None),
        ("b", "zwei", 0.5, None),
        ("e", 'two "quoted", lines\nhere', 2.0, 0),
    ]
    assert [(one.line, one.kind) for one in found if isinstance(one, Problem)] == [
        (4, "wrong number of fields"),
        (5, "invalid UTF-8"),
        (8, "path with a placeholder"),
        (9, "duration is not a number"),
    ]
    (tmp_path / "q.tsv").write_text('file\ttext\naudio/0.flac\t"Yes" he said\naudio/1.flac\t"a ""b"""\n')
    assert [row.text for row in open_source(tmp_path / "q.tsv")] == ['"Yes" he said', 'a "b"']


@given(
    st.lists(
        st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=12), min_size=3, max_size=3),
        min_size=1, max_size=5,
    ),
    st.sampled_from(",;"),
)  # fmt: skip
def test_csv_of_any_texts_comes_back(tmp_path_factory, records, delimiter):
    folder = tmp_path_factory.mktemp("csv")
    with open(folder / "t.csv", "w", newline="", encoding="utf-8", errors="replace") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["audio", "text", "duration"])
        writer.writerows((f"{n}.wav{one[0]}", one[1], "1.5") for n, one in enumerate(records))
    with contextlib.suppress(ManifestError):  # no record has a text
        found = list(open_source(folder / "t.csv", require_text=False))
        assert len(found) == len(records)
        for row, (_, text, _) in zip(found, records, strict=True):
            assert isinstance(row, Problem) or row.text == text


@given(st.binary(max_size=300))
@example(b"audio\ttext\ra\tb\r")
def test_no_bytes_of_a_table_raise(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("any")
    for name in ("t.csv", "u.csv", "t.tsv", "t.txt", "t.json", "t.parquet"):
        (folder / name).write_bytes(b"audio,text\n" + data if name == "t.csv" else data)
        with contextlib.suppress(ManifestError):
            list(open_source(folder / name))


def test_ljspeech(audio, tmp_path):
    (tmp_path / "wavs").mkdir()
    for number in range(5):
        soundfile.write(tmp_path / "wavs" / f"LJ-{number}.wav", sound(number), 16000, subtype="FLOAT")
    lines = [f'LJ-{number}|Text {number}, "quoted|{TEXTS[number]}\n' for number in range(5)]
    (tmp_path / "metadata.csv").write_text("".join(lines))
    assert check(tmp_path, tmp_path) == []
    assert check(tmp_path / "metadata.csv", tmp_path) == []
    first = next(iter(open_source(tmp_path, columns=Columns(text="text"))))
    assert (first.id, first.text) == ("LJ-0", 'Text 0, "quoted')
    (tmp_path / "filelist.txt").write_text("".join(f"audio/{n}.flac|{TEXTS[n]}\n" for n in range(5)))
    assert check(tmp_path / "filelist.txt", tmp_path) == []


def test_kaldi(audio, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    scp = [f"u{number} {audio}/{number}.flac\n" for number in range(5)]
    (folder / "wav.scp").write_text("".join(scp))
    (folder / "text").write_text("".join(f"u{number}  {TEXTS[number]}\n" for number in range(5)))
    (folder / "utt2spk").write_text("".join(f"u{number} s\n" for number in range(5)))
    assert check(folder, tmp_path) == []
    assert check(folder / "wav.scp", tmp_path) == []
    (folder / "reco2dur").write_text("".join(f"u{number} {SECONDS[number]}\n" for number in range(5)))
    (folder / "utt2lang").write_text("u0 de\n")
    assert check(folder, tmp_path) == []
    assert next(iter(open_source(folder))).lang == "de"


def test_kaldi_segments_and_missing_files(audio, tmp_path):
    run = tmp_path / "executed"
    (tmp_path / "wav.scp").write_text(
        f"a audio/0.flac\nb touch {run} |\nc raw.ark:1234\nd | touch {run}\ne audio/2.flac\n"
    )
    (tmp_path / "segments").write_text(
        "a1 a 0.25 0.75\na2 a 0.5 -1\nb1 b 0 1\nc1 c 0 1\nd1 d 0 1\ne1 e x 1\nf1 f 0 1\na3 a 0 0.5\n"
    )
    (tmp_path / "text").write_text("a1 one\na2 two\nb1 x\nc1 x\nd1 x\ne1 x\nf1 x\n")
    found = list(open_source(tmp_path))
    rows = [row for row in found if isinstance(row, Utterance)]
    assert [(row.id, row.text, row.offset, row.duration) for row in rows] == [
        ("a1", "one", 0.25, 0.5), ("a2", "two", 0.5, 0.5),
    ]  # fmt: skip
    np.testing.assert_allclose(load_utterance(rows[0]), sound(0)[4000:12000], atol=1e-4)
    assert [(one.line, one.kind) for one in found if isinstance(one, Problem)] == [
        (3, "wav.scp names a command"),
        (4, "audio in a Kaldi archive"),
        (5, "wav.scp names a command"),
        (6, "segment without start and end in seconds"),
        (7, "no such recording in wav.scp"),
        (8, "text missing (a3)"),
    ]
    assert not run.exists()


@pytest.mark.parametrize("indent", [None, 2])
def test_one_json_array(cuts, audio, tmp_path, indent):
    rows = [nemo_row(number) | {"audio_filepath": f"audio/{number}.flac"} for number in range(5)]
    (tmp_path / "rows.json").write_text(json.dumps([*rows, 7], indent=indent))
    (problem,) = check(tmp_path / "rows.json", tmp_path)
    assert (problem.line, problem.kind) == (6, "not a JSON object")
    (tmp_path / "cuts.json").write_text(json.dumps([cut.to_dict() for cut in cuts], indent=indent))
    assert check(tmp_path / "cuts.json", tmp_path) == []
    speechbrain = {f"u{n}": {"wav": f"audio/{n}.flac", "length": SECONDS[n], "words": TEXTS[n]} for n in range(5)}
    (tmp_path / "brain.json").write_text(json.dumps(speechbrain, indent=indent))
    assert check(tmp_path / "brain.json", tmp_path) == []
    assert next(iter(open_source(tmp_path / "brain.json"))).id == "u0"
    (tmp_path / "torn.json").write_text(json.dumps(rows, indent=2)[:-30])
    with pytest.raises(ManifestError, match=r"torn\.json is not valid JSON"):
        list(open_source(tmp_path / "torn.json"))


def test_lhotse_supervisions_are_joined_in_order_of_time(cuts, tmp_path):
    (cut, *_) = cuts
    rows = cut.to_dict()
    (one,) = rows["supervisions"]
    spans = [(0.6, "third"), (0.0, "first"), (0.3, "second")]
    rows["supervisions"] = [one | {"start": start, "duration": 0.3, "text": text} for start, text in spans]
    (tmp_path / "cuts.jsonl").write_text(json.dumps(rows))
    assert [row.text for row in open_source(tmp_path / "cuts.jsonl")] == ["first second third"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("type", "\ud800"), ("id", 10**4000), ("id", ["\ud800"]), ("channel", {}), ("channel", [[]]),
        ("duration", 10**400), ("start", "\ud800"), ("supervisions", [7]), ("supervisions", [{"start": 10**400}]),
        ("supervisions", [{"text": "\ud800", "custom": []}]), ("custom", {"lang": {"a": 1}}),
        ("recording", {"sources": [{}]}),
    ],
    ids=map(str, range(12)),
)  # fmt: skip
def test_a_cut_of_anything_is_one_problem(tmp_path, field, value):
    source = {"type": "file", "channels": [0, 1], "source": "a.wav"}
    good = {
        "id": "good", "start": 0, "duration": 1.0, "channel": 0, "type": "MonoCut",
        "supervisions": [{"start": 0, "duration": 1.0, "text": "hi"}],
        "recording": {"id": "r", "sources": [source], "sampling_rate": 16000, "num_samples": 16000},
    }  # fmt: skip
    text = "\n".join(json.dumps(one) for one in (good | {field: value}, good))
    (tmp_path / "cuts.jsonl").write_text(text)
    index = index_sources(tmp_path / "cuts.jsonl", tmp_path / "i.arrow", UnitCounter("chars"))
    assert index.utterance(len(index) - 1).id == "good"
    assert all(problem.line == 1 for problem in index.problems)
    assert len(LengthIndex.open(tmp_path / "i.arrow").problems) == len(index.problems) == 2 - len(index)


def test_canarys_answer_is_the_text_of_a_translation(tmp_path):
    def text(**fields):
        row = {"audio_filepath": "a.wav", "duration": 1.0, "source_lang": "en", "target_lang": "de", **fields}
        write_manifest(tmp_path / "m.jsonl", [row])
        return next(iter(open_source(tmp_path / "m.jsonl", require_text=False))).text

    assert text(text="yes", answer="ja", taskname="s2t_translation") == "ja"
    assert text(text="yes", answer="ja", taskname="ast") == "ja"
    assert text(text="yes", answer="ja") == "ja"  # its languages differ
    assert text(text="yes", answer="ja", source_lang=None) == "yes"
    assert text(text="ja", taskname="ast") == "ja"
    assert text(text="yes", answer="Yes.", taskname="asr", target_lang="en") == "yes"
    assert text(answer="Yes.", taskname="asr", target_lang="en") == "Yes."
    assert text(text="yes", answer="na", taskname="ast") == "yes"  # to be transcribed


def test_tables_without_a_column_of_text_name_what_they_have(audio, tmp_path):
    rows = [{"file": f"audio/{n}.flac", "said": TEXTS[n]} for n in range(5)]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    (tmp_path / "t.csv").write_text("file,said\n" + "".join(f"audio/{n}.flac,{TEXTS[n]}\n" for n in range(5)))
    for name in ("t.parquet", "t.csv"):
        with pytest.raises(ManifestError, match=r"has no column of text; name it .--text-column.; it has file, said"):
            index_sources(tmp_path / name, tmp_path / "i.arrow", UnitCounter("chars"))
        found = list(open_source(tmp_path / name, require_text=False))
        assert [row.duration for row in found] == list(SECONDS)
        assert [row.text for row in open_source(tmp_path / name, columns=Columns(text="said"))] == list(TEXTS)


def test_queries_of_urls_are_no_suffix(tmp_path, bucket):
    pyarrow.parquet.write_table(hub_table(), tmp_path / "h.parquet?token=a.b")
    pyarrow.parquet.write_table(pa.table({"duration": [1.0], "tokens": [3]}), tmp_path / "l.parquet?token=a.b")
    home = bucket()
    assert check(f"{home}/h.parquet?token=a.b", tmp_path) == []
    assert len(index_sources(f"{home}/l.parquet?token=a.b", tmp_path / "i.arrow")) == 1
