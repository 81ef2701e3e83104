"""The length index: from arrays, saved, mapped, read again; and built from manifests."""

import gzip
import json
import pickle
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

import canter.corpus.build
from canter.corpus.build import index_sources
from canter.corpus.counting import UnitCounter
from canter.corpus.index import LengthIndex, Source, skipped_path
from canter.corpus.manifest import Utterance, write_manifest
from canter.corpus.mixture import Group
from canter.errors import ConfigError, ManifestError


class Letters:
    """A tokenizer that counts letters, and how often it was asked."""

    fingerprint = "letters"

    def __init__(self):
        self.calls = 0

    def encode(self, text, lang=None):
        self.calls += 1
        if "?" in text:
            raise ValueError("no question marks")
        return list(text) + (["lang"] if lang == "de" else [])


def rows(count, start=0, **fields):
    return [
        {"audio_filepath": f"{number}.wav", "duration": 1 + number / 8, "text": "x" * (number % 7 + 1), **fields}
        for number in range(start, start + count)
    ]


@pytest.fixture
def manifest(tmp_path):
    write_manifest(tmp_path / "m.jsonl", rows(20))
    return tmp_path / "m.jsonl"


# from arrays


def test_from_arrays_and_back(tmp_path):
    index = LengthIndex([1.0, 2.5, 3.0], [4, 5, 6], ["a", "b"], [0, 1, 1])
    index.save(tmp_path / "l.arrow")
    again = LengthIndex.open(tmp_path / "l.arrow")
    assert len(again) == 3
    np.testing.assert_array_equal(again.seconds, index.seconds)
    np.testing.assert_array_equal(again.tokens, index.tokens)
    np.testing.assert_array_equal(again.source_of, [0, 1, 1])
    assert (again.seconds.dtype, again.tokens.dtype, again.source_of.dtype) == (np.float32, np.uint16, np.uint16)
    assert [source.name for source in again.sources] == ["a", "b"]
    assert "_fingerprint" in vars(again), "it is in the header: opening must not read the columns"
    assert again.fingerprint == index.fingerprint
    np.testing.assert_allclose(again.weights, [1 / 3, 2 / 3])
    with pytest.raises(ManifestError, match="only lengths, so row 1 has no audio"):
        again.utterance(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, float("nan")], [1, 1]), "row 1: duration nan"),
        (([1.0, -2], [1, 1]), r"row 1: duration -2\.0"),
        (([1.0], [1, 2]), "must both be of shape"),
        (([], []), "integers|at least one row"),
        (([1.0], [70000]), "row 0: 70000 tokens"),
        (([1.0], [1.5]), "must be integers"),
        (([1.0], [1], ["a", "b"]), "2 sources need source_of"),
        (([1.0], [1], ["a"], [1]), "source_of must lie in"),
        (([1.0], [1], ["a"], [0, 0]), "must be of shape"),
    ],
)
def test_lengths_that_no_utterance_has(arguments, message):
    with pytest.raises(ManifestError, match=message):
        LengthIndex(*arguments)


lengths = st.lists(st.tuples(st.floats(0.01, 1000), st.integers(0, 65535), st.integers(0, 3)), min_size=1, max_size=50)


@given(lengths)
def test_any_lengths_survive_the_disk(tmp_path_factory, given_rows):
    seconds, tokens, source = (list(column) for column in zip(*given_rows, strict=True))
    index = LengthIndex(seconds, tokens, [Source("x", str(number), 1.0 + number) for number in range(4)], source)
    path = tmp_path_factory.mktemp("index") / "l.arrow"
    index.save(path)
    again = LengthIndex.open(path)
    np.testing.assert_array_equal(again.seconds, np.float32(seconds))
    np.testing.assert_array_equal(again.tokens, tokens)
    np.testing.assert_array_equal(again.source_of, source)
    assert again.sources == index.sources
    assert again.fingerprint == index.fingerprint


def test_the_fingerprint_sees_lengths_and_weights_but_no_names():
    base = LengthIndex([1.0, 2.0], [3, 4], [Source("a", weight=1.0)])
    assert LengthIndex([1.0, 2.0], [3, 4], [Source("b", weight=1.0)]).fingerprint == base.fingerprint
    assert LengthIndex([1.0, 2.0], [3, 4], [Source("a", weight=2.0)]).fingerprint != base.fingerprint
    assert LengthIndex([2.0, 1.0], [3, 4], [Source("a", weight=1.0)]).fingerprint != base.fingerprint
    assert LengthIndex([1.0, 2.0], [4, 3], [Source("a", weight=1.0)]).fingerprint != base.fingerprint


def test_at_most_sixteen_bytes_a_row(tmp_path):
    LengthIndex(np.ones(10_000), np.ones(10_000, int)).save(tmp_path / "a.arrow")
    LengthIndex(np.ones(20_000), np.ones(20_000, int)).save(tmp_path / "b.arrow")
    assert (tmp_path / "b.arrow").stat().st_size - (tmp_path / "a.arrow").stat().st_size == 160_000


def test_an_opened_index_is_mapped_read_only_and_pickled_by_path(tmp_path):
    LengthIndex(np.ones(100_000), np.ones(100_000, int)).save(tmp_path / "l.arrow")
    index = LengthIndex.open(tmp_path / "l.arrow")
    assert not index.seconds.flags.writeable
    sent = pickle.dumps(index)
    assert len(sent) < 500
    assert len(pickle.loads(sent)) == 100_000
    memory = pickle.loads(pickle.dumps(LengthIndex([1.0], [2])))
    assert memory.tokens.tolist() == [2]


def test_files_that_are_not_an_index_are_refused(tmp_path):
    with pytest.raises(ManifestError, match=r"does not exist; make it with: canter index"):
        LengthIndex.open(tmp_path / "none.arrow")
    (tmp_path / "words.arrow").write_bytes(b"words" * 100)
    with pytest.raises(ManifestError, match="is not a length index"):
        LengthIndex.open(tmp_path / "words.arrow")
    with pa.OSFile(str(tmp_path / "o.arrow"), "wb") as sink, pa.ipc.new_file(sink, pa.schema([])):
        pass
    with pytest.raises(ManifestError, match="is not a length index"):
        LengthIndex.open(tmp_path / "o.arrow")
    LengthIndex(np.ones(1000), np.ones(1000, int)).save(tmp_path / "t.arrow")
    (tmp_path / "t.arrow").write_bytes((tmp_path / "t.arrow").read_bytes()[:5000])
    with pytest.raises(ManifestError, match="is not a length index"):
        LengthIndex.open(tmp_path / "t.arrow")


def test_sources_are_checked():
    with pytest.raises(ManifestError, match=r"weight 0 would never be drawn"):
        Source("a", weight=0)
    with pytest.raises(ManifestError, match="weight nan"):
        Source("a", weight=float("nan"))
    with pytest.raises(ManifestError, match="tag 'langs'"):
        Source("a", tags={"langs": "de"})
    index = LengthIndex([1.0, 1.0], [1, 1], [Source("a", weight=1.0), Source("b")], [0, 1])
    with pytest.raises(ManifestError, match="source b has no weight"):
        _ = index.weights


# from manifests


def test_characters_and_bytes_are_counted(tmp_path):
    write_manifest(tmp_path / "m.jsonl", [{"audio_filepath": "a", "duration": 1, "text": "Grüße"}])
    for unit, count in (("chars", 5), ("bytes", 7)):
        index = index_sources(tmp_path / "m.jsonl", tmp_path / "l.arrow", UnitCounter(unit), prompt_tokens=2)
        assert index.tokens.tolist() == [2 + count + 1]
    with pytest.raises(ConfigError, match="'words' cannot be counted"):
        UnitCounter("words")


def test_every_row_is_counted_and_found_again(tmp_path, manifest):
    index = index_sources(manifest, tmp_path / "l.arrow", Letters(), prompt_tokens=3)
    assert len(index) == 20
    for number in range(20):
        row = index.utterance(number)
        assert row == Utterance(f"{tmp_path}/{number}.wav", 1 + number / 8, "x" * (number % 7 + 1))
        assert index.seconds[number] == row.duration
        assert index.tokens[number] == 3 + len(row.text) + 1
    assert index.utterance(-1) == index.utterance(19)
    with pytest.raises(IndexError):
        index.utterance(20)
    assert index.made_with == {"tokenizer": "letters", "prompt_tokens": 3}


def test_num_tokens_needs_no_tokenizer(tmp_path):
    write_manifest(tmp_path / "m.jsonl", rows(3, num_tokens=17))
    assert index_sources(tmp_path / "m.jsonl", tmp_path / "l.arrow").tokens.tolist() == [17] * 3
    write_manifest(tmp_path / "n.jsonl", rows(3))
    with pytest.raises(ManifestError, match="num_tokens missing: name a tokenizer"):
        index_sources(tmp_path / "n.jsonl", tmp_path / "l.arrow")


def test_bad_rows_are_counted_listed_and_kept_beside_the_index(tmp_path, manifest):
    bad = [{"audio_filepath": "a", "duration": -1, "text": "x"}, {"audio_filepath": "b", "duration": 2, "text": "?"}]
    with open(manifest, "a") as file:
        file.write("{\n" + "".join(json.dumps(row) + "\n" for row in [*bad, rows(1)[0]]))
        file.write(json.dumps({"audio_filepath": "c", "duration": 1, "text": "y" * 70_000}))
    index = index_sources(manifest, tmp_path / "l.arrow", Letters())
    assert len(index) == 20
    told = {
        "invalid JSON": 21,
        "duration is negative": 22,
        "text cannot be tokenised": 23,
        "duplicate": 24,
        "text is too long": 25,
    }
    assert {problem.kind: problem.line for problem in index.problems} == told
    assert index.skipped == dict.fromkeys(told, 1)
    assert len(skipped_path(tmp_path / "l.arrow").read_text().splitlines()) == 5


def test_sources_without_a_usable_row_say_why(tmp_path, manifest):
    (tmp_path / "bad.jsonl").write_text("{\n[]\n")
    with pytest.raises(ManifestError, match=r"bad\.jsonl has no usable row:\n.*bad\.jsonl:1: invalid JSON"):
        index_sources([manifest, tmp_path / "bad.jsonl"], tmp_path / "l.arrow", Letters())
    with pytest.raises(ManifestError, match="does not exist"):
        index_sources(tmp_path / "none.jsonl", tmp_path / "l.arrow", Letters())
    with pytest.raises(ManifestError, match="nothing to index"):
        index_sources([], tmp_path / "l.arrow", Letters())


def test_a_large_file_is_read_in_parts_with_the_same_result(tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    write_manifest(path, rows(200))
    lines = path.read_text().splitlines(keepends=True)
    lines[50:50] = ["\n", "{\n", "\n"]
    lines += ["\n", lines[3]]
    path.write_text("".join(lines))
    whole = index_sources(path, tmp_path / "whole.arrow", Letters())
    monkeypatch.setattr(canter.corpus.build, "PART_BYTES", 500)
    parts = index_sources(path, tmp_path / "parts.arrow", Letters())
    assert len(list((tmp_path / "parts.arrow.parts").glob("*.npz"))) > 10
    for name in ("seconds", "tokens", "places", "problems", "skipped", "shards", "fingerprint"):
        np.testing.assert_equal(getattr(parts, name), getattr(whole, name))
    assert [problem.line for problem in parts.problems] == [52, 205]
    assert parts.utterance(150).audio_filepath == f"{tmp_path}/150.wav"


def test_parts_already_read_are_not_read_again(tmp_path):
    for name in "abc":
        write_manifest(tmp_path / f"{name}.jsonl", rows(5, start=5 * ord(name)))
    paths = [tmp_path / f"{name}.jsonl" for name in "abc"]
    tokenizer = Letters()
    index_sources(paths[:2], tmp_path / "l.arrow", tokenizer)
    assert tokenizer.calls == 10
    index = index_sources(paths, tmp_path / "l.arrow", tokenizer)
    assert tokenizer.calls == 15, "only the new source"
    assert len(index) == 15
    index_sources(paths, tmp_path / "l.arrow", tokenizer, prompt_tokens=1)
    assert tokenizer.calls == 30, "another prompt is another count"
    write_manifest(paths[0], rows(6))
    index_sources(paths, tmp_path / "l.arrow", tokenizer, prompt_tokens=1)
    assert tokenizer.calls == 36, "a changed file is read again"
    assert len(list((tmp_path / "l.arrow.parts").iterdir())) == 3, "parts of no further use are removed"


def test_nothing_but_parts_is_removed_and_no_other_index_has_them(tmp_path, manifest):
    write_manifest(tmp_path / "n.jsonl.gz", rows(3))
    (tmp_path / "n.jsonl.gz").write_bytes(gzip.compress((tmp_path / "n.jsonl.gz").read_bytes()))
    first = index_sources(tmp_path / "n.jsonl.gz", tmp_path / "x", Letters())
    (tmp_path / "x.arrow.parts").mkdir()
    (tmp_path / "x.arrow.parts" / "notes.txt").write_text("not ours")
    index_sources(manifest, tmp_path / "x.arrow", Letters())
    assert (tmp_path / "x.arrow.parts" / "notes.txt").exists()
    assert first.utterance(2).audio_filepath == f"{tmp_path}/2.wav"


def test_an_interrupted_build_resumes(tmp_path):
    for name in "abc":
        write_manifest(tmp_path / f"{name}.jsonl", rows(5, start=5 * ord(name)))

    class Interrupted(Letters):
        def encode(self, text, lang=None):
            if self.calls == 12:
                raise KeyboardInterrupt
            return super().encode(text, lang)

    paths = [tmp_path / f"{name}.jsonl" for name in "abc"]
    with pytest.raises(KeyboardInterrupt):
        index_sources(paths, tmp_path / "l.arrow", Interrupted())
    tokenizer = Letters()
    index = index_sources(paths, tmp_path / "l.arrow", tokenizer)
    assert tokenizer.calls == 5
    assert len(index) == 15


def test_workers_agree_with_one_process(tmp_path):
    for name in "ab":
        write_manifest(tmp_path / f"{name}.jsonl", rows(50, start=5 * ord(name)))
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    one = index_sources(paths, tmp_path / "one.arrow", UnitCounter("bytes"))
    two = index_sources(paths, tmp_path / "two.arrow", UnitCounter("bytes"), workers=2)
    assert one.fingerprint == two.fingerprint
    np.testing.assert_array_equal(one.places, two.places)


def test_a_changed_or_lost_manifest_is_noticed(tmp_path, manifest):
    index = index_sources(manifest, tmp_path / "l.arrow", Letters())
    text = manifest.read_text()
    manifest.write_text(text[:-40])
    with pytest.raises(ManifestError, match=r"has changed since it was indexed \(row 19\)"):
        index.utterance(19)
    manifest.write_text(text.replace('"duration": 1.0', '"duration": 9.0'))
    with pytest.raises(ManifestError, match="has changed"):
        index.utterance(0)
    manifest.unlink()
    with pytest.raises(ManifestError, match="cannot be read"):
        index.utterance(0)


def test_a_folder_with_its_index_can_move(tmp_path):
    (tmp_path / "old").mkdir()
    write_manifest(tmp_path / "old" / "m.jsonl", rows(3))
    index_sources(tmp_path / "old" / "m.jsonl", tmp_path / "old" / "l.arrow", Letters())
    (tmp_path / "old").rename(tmp_path / "new")
    assert LengthIndex.open(tmp_path / "new" / "l.arrow").utterance(2).audio_filepath == f"{tmp_path}/new/2.wav"


def test_tags_stand_in_for_missing_fields_and_count(tmp_path, manifest):
    write_manifest(tmp_path / "n.jsonl", rows(2, lang="en"))
    sources = [Source(str(manifest), tags={"lang": "de"}), Source(str(tmp_path / "n.jsonl"), tags={"lang": "de"})]
    index = index_sources(sources, tmp_path / "l.arrow", Letters())
    assert index.utterance(0).lang == "de"
    assert index.utterance(20).lang == "en"
    assert index.tokens[0] == 1 + 1 + 1
    assert index.tokens[20] == 1 + 1


def test_groups_become_weights(tmp_path):
    sources = []
    for name, count in (("a", 10), ("b", 30), ("c", 60)):
        write_manifest(tmp_path / f"{name}.jsonl", rows(count))
        sources.append(Source(str(tmp_path / f"{name}.jsonl")))
    natural = index_sources(sources, tmp_path / "l.arrow", Letters())
    np.testing.assert_allclose(natural.weights, [0.1, 0.3, 0.6])
    a, b, c = sources
    nested = Group([Group([a, b], weight=3.0), replace(c, weight=1.0)])
    np.testing.assert_allclose(index_sources(nested, tmp_path / "l.arrow", Letters()).weights, [3 / 16, 9 / 16, 1 / 4])
    flat = Group(sources, temperature=0.0)
    np.testing.assert_allclose(index_sources(flat, tmp_path / "l.arrow", Letters()).weights, [1 / 3] * 3)
    half = index_sources(Group(sources, temperature=0.5), tmp_path / "l.arrow", Letters()).weights
    np.testing.assert_allclose(half, np.sqrt([1, 3, 6]) / np.sqrt([1, 3, 6]).sum())


def test_durations_can_be_measured(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(24000), 16000)
    lines = [{"audio_filepath": name, "text": "x"} for name in ("a.wav", "b.wav")]
    write_manifest(tmp_path / "m.jsonl", lines)
    with pytest.raises(ManifestError, match="duration missing: give it in seconds, or let --measure-durations"):
        index_sources(tmp_path / "m.jsonl", tmp_path / "l.arrow", Letters())
    index = index_sources(tmp_path / "m.jsonl", tmp_path / "l.arrow", Letters(), measure_durations=True)
    assert index.seconds.tolist() == [1.5]
    assert index.skipped == {"audio cannot be read": 1}
    assert index.utterance(0).duration == 1.5


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/data/an4/train.jsonl", "an4/train"),
        ("/data/an4/train_{0..3}.jsonl", "an4/train"),
        ("/data/m__OP_0..2_CL_.json::/data/a__OP_0..2_CL_.tar", "data/m"),
        ("train.jsonl.gz", "train"),
    ],
)
def test_a_source_is_named_after_its_path(path, name):
    assert Source(path).name == name


@pytest.mark.parametrize("seed", range(12))
def test_a_changed_byte_is_found_wherever_it_is(tmp_path, seed):
    """If the file is not an index any more, the opened one keeps the values that were written."""
    path = tmp_path / "lengths.arrow"
    random = np.random.default_rng(seed)
    sources = [Source("a.jsonl", tags={"lang": "de"}), Source("b.jsonl")]
    written = LengthIndex(
        random.random(50) + 1,
        random.integers(1, 90, 50),
        sources,
        random.integers(0, 2, 50),
        places=random.integers(0, 2**40, 50).astype(np.uint64),
    )
    written.save(path)
    content = path.read_bytes()
    again = LengthIndex.open(path)
    assert again.fingerprint == written.fingerprint
    for at in random.integers(0, len(content), 40):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << int(random.integers(8))]) + content[at + 1 :])
        try:
            found = LengthIndex.open(path)
        except ManifestError as error:
            assert str(path) in str(error)  # noqa: PT017 - not every byte matters
            continue
        assert found.sources == again.sources
        for column in ("seconds", "tokens", "source_of", "places"):
            assert np.array_equal(getattr(found, column), getattr(written, column)), (column, at)


def test_large_indexes_are_verified_when_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("canter.corpus.index.VERIFIED_ROWS", 10)
    path = tmp_path / "lengths.arrow"
    LengthIndex(np.full(20, 1.5), np.full(20, 7)).save(path)
    content = path.read_bytes()
    at = content.index(np.full(4, 1.5, np.float32).tobytes())
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(ManifestError, match=r"lengths.arrow is damaged: what it holds is not what was written"):
        LengthIndex.open(path).verify()
