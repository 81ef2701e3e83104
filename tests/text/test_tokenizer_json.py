"""A tokenizer.json made of SentencePiece models: transformers makes the same ids, texts and prompts of it."""

import io
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from canter.errors import CheckpointError, ConfigError
from canter.text import JsonTokenizer, SentencePieceTokenizer, load_tokenizer, train_tokenizer

transformers = pytest.importorskip("transformers")

SHARED = os.environ.get("CANTER_SHARED")
PAGES = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
SPECIAL = (
    "<|nospeech|>", "<pad>", "<|endoftext|>", "<|startoftranscript|>", "<|pnc|>", "<|nopnc|>", "<|startofcontext|>",
    "<|itn|>", "<|noitn|>", "<|timestamp|>", "<|notimestamp|>", "<|diarize|>", "<|nodiarize|>", "<|emo:undefined|>",
    "<|en|>", "<|de|>",
)  # fmt: skip
ODD = (
    "", " ", "  a  b ", "Die Tür   öffnete sich\tund\nweg", "ﬁne ½ Ａ 東京 日本語", "e\u0301te\u0301 a\u0302\u0301",
    "xxx xxxx yyyyy", "▁odd▁one", "a\u00a0b\u3000c", "🙂 ok🙂🙂", '1,234.5!? (x) "quoted"',
)  # fmt: skip


def corpus() -> list[str]:
    """Lines of the documentation, and a few in other languages."""
    pages = (page.read_text(encoding="utf-8").splitlines()[:60] for page in PAGES)
    lines = [line for page in pages for line in page if line.strip() and not line.startswith("|")]
    others = ["der Arzt kam an die Tür und sah die Straße", "el médico compró la naranja", "Tiếng Việt rất đẹp"]
    return [line for line in lines if "<|" not in line and "<pad>" not in line] + 30 * others


TRAINED = train_tokenizer(corpus(), ["en", "de"], 700)


def single(kind: str, **settings) -> SentencePieceTokenizer:
    """One SentencePiece model with the special tokens among its pieces, as canary-1b-v2 has."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, model_type=kind, vocab_size=700, bos_id=-1, eos_id=-1,
        pad_id=-1, unk_id=0, minloglevel=2, character_coverage=0.999, **settings,
    )  # fmt: skip
    return SentencePieceTokenizer.of_model(model.getvalue())


MAKERS = {
    "trained": lambda: TRAINED,
    "bpe": lambda: single("bpe", user_defined_symbols=list(SPECIAL)),
    "bpe, bytes": lambda: single("bpe", control_symbols=list(SPECIAL), byte_fallback=True),
    "unigram": lambda: single("unigram", control_symbols=list(SPECIAL)),
    "unigram, as it is": lambda: single(
        "unigram",
        user_defined_symbols=list(SPECIAL),
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    ),
}
if SHARED:
    for name in ("a", "b", "d_switches"):
        place = Path(SHARED) / "fixtures" / "nemo" / name / "model.nemo"
        MAKERS[f"NeMo's aggregate {name}"] = lambda place=place: load_tokenizer(place)


@pytest.fixture(scope="module", params=MAKERS)
def pair(request, tmp_path_factory):
    """A tokenizer, and the folder of its tokenizer.json."""
    folder = tmp_path_factory.mktemp("tokenizer")
    ours = MAKERS[request.param]()
    if len(ours.models) > 1:
        with pytest.warns(UserWarning, match="encodes text with the vocabulary of 'en' only"):
            JsonTokenizer.of(ours).save(folder)
    else:
        JsonTokenizer.of(ours).save(folder)
    return ours, folder


def test_transformers_encodes_and_decodes_alike(pair, request):
    ours, folder = pair
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert (theirs.pad_token_id, theirs.eos_token_id, len(theirs)) == (ours.pad, ours.end, ours.vocab_size)
    for text in (*ODD, *corpus()):
        ids, found = ours.encode(text, "en"), theirs(text, add_special_tokens=False).input_ids
        # Of two orders of the same pieces (":" and "::" in ":::"), which are equally probable, each may be chosen.
        assert found == ids or ("unigram" in request.node.name and sorted(found) == sorted(ids)), text
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
    chance = random.Random(0)
    for _ in range(200):
        ids = [chance.randrange(ours.vocab_size) for _ in range(12)]
        assert theirs.decode(ids, skip_special_tokens=True).strip() == ours.decode(ids)
    assert theirs("a" * 5000, truncation=False).input_ids == ours.encode("a" * 5000, "en")


def test_read_again_it_is_the_same(pair):
    ours, folder = pair
    again = load_tokenizer(folder)
    assert isinstance(again, JsonTokenizer)
    assert again.languages == ours.languages
    assert (again.pad, again.end, again.vocab_size) == (ours.pad, ours.end, ours.vocab_size)
    assert pickle.loads(pickle.dumps(again)).fingerprint == again.fingerprint
    slots = {"source_lang": "de", "target_lang": "en", "pnc": "no"}
    assert again.prompt_ids(slots) == ours.prompt_ids(slots)
    ids = [*ours.prompt_ids(slots), *ours.encode("the door", "en"), ours.end]
    for text in ("the door", "the door<|endoftext|>", "<|3|> the door <|12|>"):
        assert again.encode(text) == ours.encode(text, "en")
    assert again.decode(ids) == ours.decode(ids) == "the door"
    assert again.decode(ids, special=True) == ours.decode(ids, special=True)
    assert [again.piece(number) for number in range(again.vocab_size)] == [
        ours.piece(number) for number in range(ours.vocab_size)
    ]
    with pytest.raises(ValueError, match="not in the vocabulary"):
        again.piece(ours.vocab_size)
    with pytest.raises(ConfigError, match="not a language of this model"):
        again.prompt_ids({"source_lang": "xx", "target_lang": "en"})


@given(st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=12))
def test_any_text_of_one_vocabulary(text):
    theirs = JsonTokenizer.of(TRAINED)
    assert theirs.decode(theirs.encode(text)) == TRAINED.decode(TRAINED.encode(text))


@pytest.mark.parametrize("punctuation", [True, False])
def test_the_processor_makes_the_same_prompt(pair, punctuation):
    ours, folder = pair
    transformers.ParakeetFeatureExtractor(feature_size=32).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "canary"}')
    processor = transformers.AutoProcessor.from_pretrained(folder)
    assert type(processor).__name__ == "CanaryProcessor"
    audio = np.zeros(16000, np.float32)
    inputs = processor.apply_transcription_request(
        [audio, audio], source_language=["en", "German"], target_language=["en", "en"], punctuation=punctuation
    )
    slots = {"target_lang": "en", "pnc": "yes" if punctuation else "no"}
    expected = [
        ours.prompt_ids({**slots, "source_lang": "en", "task": "asr"}),
        ours.prompt_ids({**slots, "source_lang": "de", "task": "ast"}),
    ]
    assert inputs.decoder_input_ids.tolist() == expected
    text = {"role": "assistant", "content": [{"type": "text", "text": "the door"}]}
    part = {"type": "text", "source_language": "de", "target_language": "en", "punctuation": punctuation}
    whole = processor.apply_chat_template([[{"role": "user", "content": [part]}, text]], tokenize=False)
    ids = processor.tokenizer(whole, add_special_tokens=False).input_ids
    assert ids == [[*expected[1], *ours.encode("the door", "en"), ours.end]]


def test_models_that_are_neither_bpe_nor_unigram_are_refused():
    with pytest.raises(CheckpointError, match="BPE and unigram"):
        JsonTokenizer.of(single("char", control_symbols=list(SPECIAL), hard_vocab_limit=False))
