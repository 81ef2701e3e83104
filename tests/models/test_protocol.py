"""Every model offers the interface of `AnyModel`, and the tables of docs/models.md are those of the code."""

import typing
from dataclasses import fields, replace
from pathlib import Path

import pytest

from canter.cli.convert import Options
from canter.errors import CheckpointError, ConfigError
from canter.loading import FORMATS, save_module
from canter.models.abilities import NEEDS, abilities
from canter.models.decoder import DecoderConfig
from canter.models.features import EspnetFeatureConfig
from canter.models.formats.seamless import read_seamless
from canter.models.model import ENCODERS, SUPPORTED, SpeechModel, part_kind
from canter.models.protocol import AnyModel, Capability, check_support, module_of
from canter.text import WhisperTokenizer, train_tokenizer
from canter.text.owsm import NEEDED, OwsmTokenizer

from .conftest import small_model, small_whisper

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
TEXT = ["one two three four five"] * 20
MEMBERS = sorted(name for name in {*dir(AnyModel), *AnyModel.__annotations__} if not name.startswith("_"))


def test_canters_model_offers_all_of_it():
    model: AnyModel = small_model()
    assert [name for name in MEMBERS if not hasattr(model, name)] == []
    assert model.layers()["encoder"]["kind"] == "fastconformer"
    assert sum(model.parts().values()) == sum(weight.numel() for weight in module_of(model).parameters())
    assert model.cost(1.0, 5).tokens == 5


def test_a_model_of_transformers_offers_all_of_it():
    pytest.importorskip("transformers")
    from ..integrations.small_transformers import built

    model: AnyModel = built("moonshine")
    assert [name for name in MEMBERS if not hasattr(model, name)] == []
    with pytest.raises(ConfigError, match="--compile: here is a model of another library"):
        check_support(model, {"--compile": "compile"}, "here")
    check_support(small_model(), {"--compile": "compile"}, "here")


def test_the_page_lists_every_format():
    for name, kept in FORMATS.items():
        assert f"| `{name}` | {kept.files}" in PAGE


def sample(kind: str, folder: Path, whisper_bytes) -> SpeechModel:
    """Return a small model with an encoder of this kind, a tokenizer, and a CTC head where its layout has one."""
    if kind == "w2v_bert":
        from .formats.small_seamless import save_theirs, small_theirs, small_tokenizer

        return read_seamless(save_theirs(small_theirs(), folder / "seamless", small_tokenizer()))
    if kind == "whisper":
        tokenizer = WhisperTokenizer(whisper_bytes("en", "de").to_str())
        model = small_whisper(tokenizer.vocab_size)
        model.tokenizer = tokenizer
        return model
    sizes = {"layers": 1, "width": 16, "heads": 2, "feedforward": 32, "mels": 32, "subsampling_channels": 4}
    known = {field.name for field in fields(ENCODERS[kind])}
    encoder = ENCODERS[kind](**{name: size for name, size in sizes.items() if name in known})
    decoder = DecoderConfig(layers=1, width=16, heads=2, feedforward=32, vocabulary=40, positions=64)
    if kind != "e_branchformer":
        model = small_model(encoder=encoder, decoder=decoder)
        model.tokenizer = train_tokenizer(TEXT, languages=["en"], vocab_size=40)
        return model
    pieces = train_tokenizer(TEXT, languages=["en"], vocab_size=40).models[""]
    times = [f"<{step * 0.02:.2f}>" for step in range(1501)]
    tokenizer = OwsmTokenizer([*NEEDED[:4], "<eng>", "<deu>", *NEEDED[4:6], *times, "▁", *NEEDED[8:]], pieces)
    size = tokenizer.vocab_size
    decoder = replace(decoder, vocabulary=size, tied=False)
    features = EspnetFeatureConfig(mels=32)
    model = small_model(features=features, encoder=encoder, decoder=decoder, ctc_vocabulary=size, ctc_upsampling=1)
    model.tokenizer = tokenizer
    return model


def holds(model: SpeechModel, form: str, folder: Path) -> bool:
    try:
        save_module(model, folder / f"{part_kind(model.config.encoder)}-{form}", form=form)
    except CheckpointError:
        return False
    return True


@pytest.mark.filterwarnings("ignore:.*auxiliary CTC head")
def test_the_page_says_what_models_support(tmp_path, whisper_bytes):
    """The table, of the registered encoders and the adapter: on a difference, copy the one that this test shows."""
    pytest.importorskip("transformers")
    from canter.integrations.transformers import TransformersModel

    from ..integrations.small_transformers import built, word_tokenizer

    adapted = built("moonshine")
    theirs = TransformersModel(adapted.model, adapted.extractor, word_tokenizer(eos_token="</s>"))
    models = {kind: sample(kind, tmp_path, whisper_bytes) for kind in ENCODERS}
    columns = {f"`{kind}`": abilities(model, native=True) for kind, model in models.items()}
    columns["transformers"] = abilities(theirs, native=FORMATS["transformers"].native)
    names = list(columns["transformers"])
    for form in typing.get_args(typing.get_type_hints(Options)["format"])[1:]:  # after "auto"
        names.append(f"convert --format {form}")
        for kind, model in models.items():
            columns[f"`{kind}`"][names[-1]] = holds(model, form, tmp_path)
        columns["transformers"][names[-1]] = False
    rows = [["", *columns], ["---"] * (len(columns) + 1)]
    rows += [
        [f"`{name}`" if "--" in name or " " not in name else name]
        + ["yes" if column[name] else "no" for column in columns.values()]
        for name in names
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    assert table in PAGE, table


def test_every_capability_has_a_row():
    assert {*NEEDS.values()} == {*typing.get_args(Capability)}
    assert SpeechModel.supports.fget(small_model()) == SUPPORTED
