"""Parity with NeMo 2.7.3 on its own archives."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import sentencepiece
import yaml

from canter.errors import CheckpointError, ConfigError
from canter.text import load_tokenizer
from canter.text.prompts import prompt_ids

SHARED = os.environ.get("CANTER_SHARED")
VARIANTS = ("a", "b", "d_switches")
needs_fixtures = pytest.mark.skipif(not SHARED, reason="CANTER_SHARED names no folder with NeMo fixtures")
# NeMo glues the words around adjacent timestamps; here each stretch of text keeps its place
GLUED = "<|0|>hello<|12|><|13|>big world<|40|>"


@pytest.fixture(params=VARIANTS)
def nemo(request):
    folder = Path(SHARED or "") / "fixtures/nemo" / request.param
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    return load_tokenizer(folder / "model.nemo"), meta


@needs_fixtures
def test_texts_and_ids(nemo):
    tokenizer, meta = nemo
    expected = meta["tokenizer"]
    for case in expected["strings"]:
        if case["text"] == GLUED:
            continue
        ids = tokenizer.encode(case["text"], case["lang"])
        assert ids == case["ids"], case["text"]
        assert [tokenizer.piece(number) for number in ids] == case["pieces"]
        assert tokenizer.decode(ids, special=True) == case["decoded"]
    assert tokenizer.vocab_size == expected["vocab_size"]
    assert {"spl_tokens": 0} | tokenizer.offsets == expected["token_id_offset"]
    assert (tokenizer.pad, tokenizer.end) == (expected["pad_id"], expected["eos_id"])
    for token, number in expected["special_head"].items():
        assert tokenizer.special_id(token) == number


@needs_fixtures
def test_prompts(nemo):
    tokenizer, meta = nemo
    assert len(meta["prompts"]) >= 6
    for name, case in meta["prompts"].items():
        (turn,) = case["turns"]
        if turn["role"] == "user":
            assert tokenizer.prompt_ids(turn["slots"]) == case["context_ids"], name
        else:
            assert prompt_ids(tokenizer, "canary2_partial", turn["slots"]) == case["context_ids"]
    assert tokenizer.prompt_ids({}) == meta["prompts"]["default"]["context_ids"]


@needs_fixtures
def test_timestamps_stay_where_they_are():
    tokenizer = load_tokenizer(Path(SHARED or "") / "fixtures/nemo/b/model.nemo")
    shown = tokenizer.decode(tokenizer.encode(GLUED, "en"), special=True)
    assert shown == "<|0|> hello<|12|><|13|> big world<|40|>"


@needs_fixtures
def test_saved_as_a_folder_it_is_the_same(nemo, tmp_path):
    tokenizer, meta = nemo
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    case = meta["tokenizer"]["strings"][1]
    assert again.encode(case["text"], case["lang"]) == case["ids"]


def test_files_that_are_not_archives_are_named(tmp_path):
    (tmp_path / "x.nemo").write_bytes(b"no tar")
    with pytest.raises(CheckpointError, match=r"x\.nemo"):
        load_tokenizer(tmp_path / "x.nemo")
    with tarfile.open(tmp_path / "y.nemo", "w"):
        pass
    with pytest.raises(CheckpointError, match="model_config"):
        load_tokenizer(tmp_path / "y.nemo")


def test_unknown_slots_and_tasks_are_named(tmp_path):
    class Vocabulary:
        languages = ("en",)

        def encode(self, text, lang=None):
            return []

        def special_id(self, token):
            return 1

    for name, slots, message in (
        ("canary3", {}, "not a prompt format"),
        ("canary", {"sauce": "x"}, "sauce: not a slot"),
        ("canary", {}, "needs source_lang"),
        ("canary", {"source_lang": "en", "target_lang": "en", "task": "sing"}, "'sing' is not a task"),
    ):
        with pytest.raises(ConfigError, match=message):
            prompt_ids(Vocabulary(), name, slots)


UNIFIED = ("<|nospeech|>", "<pad>", "<|endoftext|>", "<|startoftranscript|>", "<|pnc|>", "<|nopnc|>",
           "<|startofcontext|>", "<|itn|>", "<|noitn|>", "<|timestamp|>", "<|notimestamp|>", "<|diarize|>",
           "<|nodiarize|>", "<|emo:undefined|>", "<|en|>", "<|de|>")  # fmt: skip
TEXTS = ["the doctor opened the window", "der Arzt kam an die Tür", "a farmer carried the basket"] * 3


def unified_model(**settings) -> bytes:
    """One SentencePiece model with the special tokens among its pieces, as canary-1b-v2 has."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, model_type="bpe", vocab_size=70, bos_id=-1, eos_id=-1,
        pad_id=-1, unk_id=0, minloglevel=2, **settings,
    )  # fmt: skip
    return model.getvalue()


def unified_archive(path, model: bytes):
    config = {
        "prompt_format": "canary2",
        "prompt_defaults": [{"role": "user", "slots": {"source_lang": "<|en|>", "target_lang": "<|en|>"}}],
        "tokenizer": {"dir": "x", "type": "bpe", "model_path": "nemo:abc_tokenizer.model", "vocab_path": "nemo:v"},
    }
    with tarfile.open(path, "w") as archive:
        for name, content in (("model_config.yaml", yaml.safe_dump(config).encode()), ("abc_tokenizer.model", model)):
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("kind", ["user_defined_symbols", "control_symbols"])
def test_one_model_with_the_special_tokens_inside(tmp_path, kind):
    model = unified_model(**{kind: list(UNIFIED)})
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = load_tokenizer(unified_archive(tmp_path / "x.nemo", model))
    assert tokenizer.vocab_size == reference.vocab_size() == 70
    assert tokenizer.languages == ("en", "de")
    assert (tokenizer.pad, tokenizer.end) == (reference.piece_to_id("<pad>"), 3)
    for text in TEXTS[:3]:
        ids = tokenizer.encode(text, "de")
        assert ids == reference.encode(text)
        assert tokenizer.decode([*tokenizer.prompt_ids({}), *ids, tokenizer.end, tokenizer.pad]) == text
    assert tokenizer.encode("the door<|endoftext|>")[-1] == tokenizer.end
    prompt = ["<|startofcontext|>", "<|startoftranscript|>", "<|emo:undefined|>", "<|en|>", "<|de|>", "<|pnc|>",
              "<|noitn|>", "<|notimestamp|>", "<|nodiarize|>"]  # fmt: skip
    ids = tokenizer.prompt_ids({"target_lang": "de"})
    assert ids == [reference.piece_to_id(piece) for piece in prompt]
    assert tokenizer.decode(ids, special=True) == "".join(prompt)

    tokenizer.save(tmp_path / "folder")
    (tmp_path / "bare.model").write_bytes(model)
    for again in (load_tokenizer(tmp_path / "folder"), load_tokenizer(tmp_path / "bare.model")):
        assert again.fingerprint == tokenizer.fingerprint
        assert again.prompt_ids({"source_lang": "en", "target_lang": "de"}) == ids


def test_a_model_without_canarys_tokens_is_refused(tmp_path):
    (tmp_path / "bare.model").write_bytes(unified_model())
    with pytest.raises(CheckpointError, match=r"bare\.model: .*no special token <pad>.*canter tokenizer"):
        load_tokenizer(tmp_path / "bare.model")
    (tmp_path / "torn.model").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"torn\.model: not a SentencePiece model"):
        load_tokenizer(tmp_path / "torn.model")
    with pytest.raises(CheckpointError, match=r"x\.nemo: .*no special token"):
        load_tokenizer(unified_archive(tmp_path / "x.nemo", unified_model()))
