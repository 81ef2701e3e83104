"""Equal to the real NeMo on its own archives, and safe with archives that are not what they seem."""

import hashlib
import io
import json
import tarfile
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file

import canter
from canter.errors import CheckpointError
from canter.models.batch import Batch
from canter.models.decoder import DecoderConfig
from canter.models.features import length_mask
from canter.models.formats.nemo import NAMES, opened, special_tokens_model, write_nemo
from canter.text import SentencePieceTokenizer, train_tokenizer

from ..conftest import small_model, small_whisper

VARIANTS = ("a", "b", "d_switches")


@pytest.fixture(scope="module", params=VARIANTS)
def nemo(request, shared):
    """model, arrays and meta of one fixture."""
    folder = shared / "fixtures" / "nemo" / request.param
    meta = json.loads((folder / "meta.json").read_text())
    return canter.load_model(folder / "model.nemo"), load_file(folder / "arrays.safetensors"), meta


def assert_equal_where_valid(ours, theirs, lengths, tolerance):
    """(B, N, D) of both; theirs may be wider."""
    difference = (ours - theirs[:, : ours.shape[1]]).abs() * length_mask(lengths, ours.shape[1])[:, :, None]
    assert difference.max() < tolerance


def test_features(nemo):
    model, arrays, _ = nemo
    features, lengths = model.features(arrays["audio"], arrays["audio_len"])
    assert torch.equal(lengths, arrays["features_len"])
    # In silent bins the logarithm shows the rounding of the transform, which differs from processor to processor:
    # there NeMo's own values are 3.5e-4 from those in float64.
    theirs = arrays["features"].transpose(1, 2)
    assert_equal_where_valid(features, theirs, lengths, 1e-3)
    valid = length_mask(lengths, features.shape[1])
    apart = (features - theirs[:, : features.shape[1]])[valid].abs() > 1e-4
    assert apart.float().mean() < 1e-3


@torch.no_grad()
def test_encoder_layers(nemo):
    model, arrays, _ = nemo
    seen = {}
    for name, module in model.encoder.named_modules():
        if name == "pre_encode" or (name.startswith("layers.") and name.count(".") == 1):
            module.register_forward_hook(lambda _, args, output, name=name: seen.update({name: output}))
    features = arrays["features"].transpose(1, 2)
    encoded, lengths = model.encode(features, arrays["features_len"])
    assert torch.equal(lengths, arrays["encoded_len"])
    assert_equal_where_valid(seen["pre_encode"][0], arrays["mid.pre_encode"], lengths, 1e-4)
    for index in range(model.config.encoder.layers):
        ours = seen[f"layers.{index}"]
        assert_equal_where_valid(ours, arrays[f"mid.enc_layer{index}"], lengths, 1e-4)
    assert_equal_where_valid(encoded, arrays["encoded"].transpose(1, 2), lengths, 1e-4)
    assert_equal_where_valid(model.projection(encoded), arrays["enc_states"], lengths, 1e-4)


@torch.no_grad()
def test_log_probs(nemo):
    model, arrays, _ = nemo
    encoded, lengths = model.encode(*model.features(arrays["audio"], arrays["audio_len"]))
    ours = model.log_probs(encoded, lengths, arrays["tf.input_ids"])
    assert_equal_where_valid(ours, arrays["tf.log_probs"], arrays["tf.input_len"], 2e-4)
    ours = model.log_probs(encoded, lengths, arrays["tf_random.input_ids"])
    assert (ours - arrays["tf_random.log_probs"]).abs().max() < 2e-4


def batch_of(arrays, prompt_bears_loss: bool) -> Batch:
    lengths = arrays["ds.prompted_transcript_lens"]
    none = torch.zeros(len(lengths), dtype=torch.long)
    return Batch(
        audio=arrays["audio"],
        audio_lengths=arrays["audio_len"],
        tokens=arrays["ds.prompted_transcript"],
        token_lengths=lengths,
        prompt_lengths=none + 1 if prompt_bears_loss else arrays["ds.prompt_lens"],
        characters=none[:, None],
        character_lengths=none,
        rows=none,
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("masked", [False, True])
def test_loss(nemo, smoothing, masked):
    model, arrays, meta = nemo
    loss = model.loss(batch_of(arrays, prompt_bears_loss=not masked), label_smoothing=smoothing)
    expected = meta["loss"][f"ls{smoothing}{'_prompt_masked' if masked else ''}"]
    assert (loss.attention / loss.attention_count).item() == pytest.approx(expected, rel=1e-5)


def test_gradients(nemo):
    model, arrays, meta = nemo
    model.zero_grad()
    loss = model.loss(batch_of(arrays, prompt_bears_loss=True), label_smoothing=0.1)
    (loss.attention / loss.attention_count).backward()
    ours = {NAMES.name(name): parameter.grad for name, parameter in model.named_parameters()}

    total = meta["grad_l2_total"]
    for name, norm in meta["grad_l2"].items():
        assert ours[name].norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-6 * total), name
    for name in (name for name in arrays if name.startswith("grad.")):
        gradient = ours[name.removeprefix("grad.")]
        assert (gradient - arrays[name]).abs().max() < 1e-3 * arrays[name].abs().max(), name


def archive(path, members):
    """A tar of ``members``: name -> bytes, or a TarInfo to be put in as it is."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content
                tar.addfile(info)
    return path


class Exploit:
    def __reduce__(self):
        return print, ("code of the archive was run",)


def test_no_archive(tmp_path):
    (tmp_path / "x.nemo").write_bytes(b"not a tar" * 1000)
    with pytest.raises(CheckpointError, match=r"not a \.nemo archive"):
        canter.load_model(tmp_path / "x.nemo")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"../model_config.yaml": b"a: 1"}, "leads out of the archive"),
        ({"/etc/x": b"a: 1"}, "leads out of the archive"),
        ({"model_config.yaml": (tarfile.SYMTYPE, "/etc/passwd")}, "link or a device"),
        ({"model_config.yaml": (tarfile.LNKTYPE, "x")}, "link or a device"),
        ({f"{i}": b"" for i in range(1001)}, "1000 files"),
        ({"README": b"hello"}, r"no model_config.yaml; it holds README"),
        ({"model_config.yaml": b"a: [1"}, "not YAML"),
        ({"model_config.yaml": b"- 1"}, "not a mapping"),
        ({"model_config.yaml": b"encoder: {subsampling: stacking}"}, "encoder.subsampling is 'stacking'"),
        ({"model_config.yaml": b"preprocessor: {features: 80}"}, "lacks 'sample_rate'"),
    ],
)
def test_refused_archives(tmp_path, members, message):
    with pytest.raises(CheckpointError, match=message):
        canter.load_model(archive(tmp_path / "x.nemo", members))


def test_bomb(tmp_path):
    path = tmp_path / "x.nemo"
    with tarfile.open(path, "w:gz", compresslevel=9) as tar:
        info = tarfile.TarInfo("model_config.yaml")
        info.size = 2**27
        tar.addfile(info, io.BytesIO(bytes(info.size)))
    with pytest.raises(CheckpointError, match="unpacks to more than"):
        canter.load_model(path)


def weights_replaced(shared, path, change):
    """A real archive whose weights went through ``change``: bytes -> bytes."""
    with tarfile.open(shared / "fixtures" / "nemo" / "a" / "model.nemo") as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar if m.isreg()}
    members["./model_weights.ckpt"] = change(members["./model_weights.ckpt"])
    return archive(path, members)


def test_code_in_weights_is_not_run(shared, tmp_path, capsys):
    def exploit(_):
        stream = io.BytesIO()
        torch.save({"weight": Exploit()}, stream)
        return stream.getvalue()

    with pytest.raises(CheckpointError, match="could run code; refused"):
        canter.load_model(weights_replaced(shared, tmp_path / "x.nemo", exploit))
    assert capsys.readouterr().out == ""


def test_truncated_weights(shared, tmp_path):
    with pytest.raises(CheckpointError, match="truncated or malformed"):
        canter.load_model(weights_replaced(shared, tmp_path / "x.nemo", lambda data: data[: len(data) // 2]))
    whole = (shared / "fixtures" / "nemo" / "a" / "model.nemo").read_bytes()
    (tmp_path / "y.nemo").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(CheckpointError, match=r"truncated|has no"):
        canter.load_model(tmp_path / "y.nemo")


def test_missing_tensor(shared, tmp_path):
    def without_bias(data):
        tensors = torch.load(io.BytesIO(data), weights_only=True)
        del tensors["encoder.pre_encode.out.bias"]
        stream = io.BytesIO()
        torch.save(tensors, stream)
        return stream.getvalue()

    with pytest.raises(CheckpointError, match=r"missing: encoder.pre_encode.out.bias"):
        canter.load_model(weights_replaced(shared, tmp_path / "x.nemo", without_bias))


def test_tokenizer_is_attached(nemo):
    model, _, meta = nemo
    assert model.tokenizer.pad == 2
    for case in meta["prompts"]:
        assert model.tokenizer is not None, case


def leaves(value, path=()):
    """Yield every setting of a configuration with its path; names of files without their hash."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, (*path, name))
    else:
        yield path, value.split("_", 1)[1] if str(value).startswith("nemo:") else value


# Settings that NeMo does not need to restore: the folder from which a tokenizer came, what only training reads, and
# the heads of an encoder of no layers.
FREE = ("nemo_version", "label_smoothing", "use_loss_mask_for_prompt", "dir", "decoding", "prompt_defaults")


@pytest.mark.parametrize("variant", VARIANTS)
def test_written_archive_has_all_that_nemo_restores(shared, tmp_path, variant):
    """NeMo 2.7.3 opened archives of this structure (docs/models.md): its members and settings, one at a time."""
    original = shared / "fixtures" / "nemo" / variant / "model.nemo"
    write_nemo(canter.load_model(original), tmp_path / "x.nemo")
    with opened(original) as old, opened(tmp_path / "x.nemo") as new:
        kinds = [sorted(name.split("_", 1)[-1] for name in archive.members) for archive in (old, new)]
        assert kinds[0] == kinds[1]
        expected, found = dict(leaves(old.config())), dict(leaves(new.config()))
        files = {name: archive.read(name, 2**24) for archive in (old, new) for name in archive.members}
        for path, value in expected.items():
            if path[-1] not in FREE and path[0] not in FREE and path != ("transf_encoder", "num_attention_heads"):
                assert found[path] == value, path
        assert new.config()["prompt_defaults"] == old.config()["prompt_defaults"][:1]  # the user's turn
        for lang, named in new.config()["tokenizer"]["langs"].items():
            theirs = old.config()["tokenizer"]["langs"][lang]
            for setting in ("model_path", "vocab_path", "spe_tokenizer_vocab"):
                ours = files[named[setting].removeprefix("nemo:")]
                assert named[setting] == f"nemo:{hashlib.md5(ours).hexdigest()}_{named[setting].split('_', 1)[1]}"
                if lang != "spl_tokens":  # written again from the tokens, without the scores of a training
                    assert ours == files[theirs[setting].removeprefix("nemo:")], (lang, setting)


def test_vocabulary_is_rounded_up_as_in_nemo(tmp_path):
    """NeMo makes 8 * ceil(tokenizer / 8) outputs; those without a token get no probability."""
    model = small_model(ctc_vocabulary=0)
    model.tokenizer = train_tokenizer(["one two three four five"] * 20, languages=["en"], vocab_size=37)
    with pytest.raises(CheckpointError, match="has 50 ids, and NeMo's Canary 40 with a tokenizer of 37"):
        write_nemo(model, tmp_path / "x.nemo")
    config = replace(model.config, decoder=replace(model.config.decoder, vocabulary=37))
    model = small_model(decoder=config.decoder, ctc_vocabulary=0)
    model.tokenizer = train_tokenizer(["one two three four five"] * 20, languages=["en"], vocab_size=37)
    again = canter.load_model(write_nemo(model, tmp_path / "x.nemo"))
    assert again.vocabulary == 40
    encoded, ids = torch.randn(1, 6, 24), torch.randint(0, 37, (1, 5))
    ours = model.log_probs(encoded, torch.tensor([6]), ids)
    theirs = again.log_probs(encoded, torch.tensor([6]), ids)
    assert (ours - theirs[..., :37]).abs().max() < 1e-5
    assert theirs[..., 37:].max() < -50


@pytest.mark.parametrize("variant", VARIANTS)
def test_written_archive(shared, tmp_path, variant):
    """Names, shapes and values of the original's state dict, and the same model and tokenizer read back."""
    original = shared / "fixtures" / "nemo" / variant / "model.nemo"
    model = canter.load_model(original)
    write_nemo(model, tmp_path / "x.nemo")
    with opened(original) as old, opened(tmp_path / "x.nemo") as new:
        theirs, ours = old.weights(), new.weights()
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            # the sine of an angle of hundreds has its last digits from the processor
            atol = 1e-5 if name.endswith("pos_enc") else 1e-6
            assert torch.allclose(ours[name], tensor, atol=atol), name
        keys = set(old.config()) - {"nemo_version"}
        assert keys == set(new.config())
        for part in ("preprocessor", "encoder", "transf_decoder", "head"):
            expected, found = old.config()[part], new.config()[part]
            assert {**found, **expected} == found
    again = canter.load_model(tmp_path / "x.nemo")
    assert again.config == model.config
    assert again.tokenizer.fingerprint == model.tokenizer.fingerprint
    assert not list(tmp_path.glob(".*"))


def test_archive_with_one_tokenizer_for_all_languages(shared, tmp_path):
    """canary-1b-v2's layout: no aggregate, one SentencePiece model with the special tokens inside."""
    tokens = "<unk> <|nospeech|> <pad> <|endoftext|> <|startofcontext|> <|startoftranscript|> <|emo:undefined|>"
    tokens = (*tokens.split(), *(f"<|{x}|>" for x in ["en", "de", "pnc", "noitn", "notimestamp", "nodiarize"]))
    with tarfile.open(shared / "fixtures" / "nemo" / "b" / "model.nemo") as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar if m.isreg()}
    config = yaml.safe_load(members["./model_config.yaml"])
    config["tokenizer"] = {"dir": "tokenizers", "type": "bpe", "model_path": "nemo:one.model"}
    members["./model_config.yaml"] = yaml.safe_dump(config).encode()
    members["./one.model"] = special_tokens_model(tokens)
    model = canter.load_model(archive(tmp_path / "v2.nemo", members))
    assert (model.tokenizer.pad, model.tokenizer.end, model.tokenizer.vocab_size) == (2, 3, len(tokens))
    assert model.prompt(source_lang="en", target_lang="de") == list(range(4, 13))


def test_one_tokenizer_for_all_languages_is_written(tmp_path):
    tokens = "<unk> <|nospeech|> <pad> <|endoftext|> <|startofcontext|> <|startoftranscript|> <|emo:undefined|>"
    names = ("en", "de", "pnc", "noitn", "notimestamp", "nodiarize", "nopnc", "itn", "timestamp")
    tokens = (*tokens.split(), *(f"<|{name}|>" for name in names))
    one = special_tokens_model(tokens)
    decoder = DecoderConfig(layers=2, width=32, heads=4, feedforward=64, vocabulary=len(tokens), positions=64, pad=0)
    model = small_model(decoder=decoder, ctc_vocabulary=0)
    model.tokenizer = SentencePieceTokenizer.of_model(one)
    write_nemo(model, tmp_path / "x.nemo")
    again = canter.load_model(tmp_path / "x.nemo")
    assert again.tokenizer.fingerprint == model.tokenizer.fingerprint
    assert again.tokenizer.prompt_format == "canary2"
    assert again.prompt(source_lang="en", target_lang="de") == list(range(4, 13))
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())
    with opened(tmp_path / "x.nemo") as new:
        section = new.config()["tokenizer"]
        assert section["custom_tokenizer"]["_target_"].endswith(".CanaryBPETokenizer")
        assert new.read(section["model_path"].removeprefix("nemo:"), 10**6) == one
        for name in ("vocab_path", "spe_tokenizer_vocab"):
            assert section[name].removeprefix("nemo:") in new.members  # NeMo restores nothing without them


def test_what_nemo_lacks_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="FastConformer encoder"):
        write_nemo(small_whisper(), tmp_path / "x.nemo")
    with pytest.raises(CheckpointError, match="no tokenizer"):
        write_nemo(small_model(), tmp_path / "x.nemo")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_what_was_there(shared, tmp_path, monkeypatch):
    model = canter.load_model(shared / "fixtures" / "nemo" / "b" / "model.nemo")
    write_nemo(model, tmp_path / "x.nemo")
    before = (tmp_path / "x.nemo").read_bytes()

    def full(path):
        raise OSError("No space left on device")

    monkeypatch.setattr("canter.files.to_disk", full)
    for target in ("x.nemo", "new.nemo"):
        with pytest.raises(OSError, match="No space left"):
            write_nemo(model, tmp_path / target)
    assert [path.name for path in tmp_path.iterdir()] == ["x.nemo"]
    assert (tmp_path / "x.nemo").read_bytes() == before
