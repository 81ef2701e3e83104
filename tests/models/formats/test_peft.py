"""LoRA adapters: those that peft makes, loaded here, and ours, loaded by peft, give the same logits."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from canter.cli import convert
from canter.errors import CheckpointError, ConfigError
from canter.loading import load_model, load_module
from canter.models.formats.huggingface import write_hf
from canter.models.formats.peft import read_adapter, save_adapter, their_names
from canter.models.lora import LoraAdapter, LoraLinear, attach, choose_modules, fingerprint_of, linear_layers
from canter.models.protocol import module_of

from ..conftest import small_model, small_whisper
from .test_huggingface import small_canary

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from ...integrations import small_transformers  # noqa: E402
from ...small_cohere import save_cohere  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
FAMILIES = ("whisper", "canary", "cohere_asr", "moonshine")
TARGETS = ["q_proj", "v_proj"]


def saved(family, folder):
    """Save a small random model of the family as transformers does; return it."""
    torch.manual_seed(0)
    if family == "cohere_asr":
        return save_cohere(folder)[0]
    if family in ("whisper", "canary"):
        write_hf(small_whisper() if family == "whisper" else small_canary(), folder)
        return transformers.AutoModelForSpeechSeq2Seq.from_pretrained(folder).eval()
    model, extractor = getattr(small_transformers, family)()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval().save_pretrained(folder)
    extractor.save_pretrained(folder)
    small_transformers.word_tokenizer(eos_token="</s>").save_pretrained(folder)
    return model


def inputs_of(family, model):
    torch.manual_seed(1)
    tokens = torch.randint(3, model.config.get_text_config(decoder=True).vocab_size, (2, 6))
    if family == "moonshine":
        audio = 0.1 * torch.randn(2, 16000)
        return {"input_values": audio}, tokens
    x = torch.randn(2, 400 if family == "whisper" else 120, 32)
    return {"input_features": x.transpose(1, 2) if family == "whisper" else x}, tokens


def loaded(family, folder, adapter=None):
    """Load a model; a Whisper of few positions cannot take the 30 s that a Hugging Face folder pads to."""
    return (load_module if family == "moonshine" else load_model)(folder, adapter=adapter)


@torch.no_grad()
def their_logits(model, inputs, tokens):
    return model(**inputs, decoder_input_ids=tokens, use_cache=False).logits


@torch.no_grad()
def our_logits(model, inputs, tokens):
    if model.format == "transformers":
        return their_logits(model.model, inputs, tokens)
    (x,) = inputs.values()
    x = x.transpose(1, 2) if x.shape[2] != model.config.features.mels else x
    return model.logits(*model.encode(x, torch.tensor([x.shape[1]] * len(x))), tokens)


def random_adapter(model, folder, **settings):
    """Save an adapter with random matrices as peft does; return the model with it."""
    config = peft.LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": TARGETS, **settings})
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    adapted.eval().save_pretrained(folder)
    return adapted


CASES = [(family, targets) for targets in (TARGETS, "all-linear") for family in FAMILIES]


@pytest.mark.parametrize(("family", "targets"), [*CASES, ("canary", ["pointwise_conv1", "relative_k_proj"])])
def test_an_adapter_of_peft_gives_the_same_logits_here(family, targets, tmp_path):
    theirs = saved(family, tmp_path / "base")
    inputs, tokens = inputs_of(family, theirs)
    plain = their_logits(theirs, inputs, tokens)
    adapted = random_adapter(theirs, tmp_path / "adapter", target_modules=targets)
    expected = their_logits(adapted, inputs, tokens)
    ours = loaded(family, tmp_path / "base", tmp_path / "adapter")
    assert (expected - plain).abs().max() > 0.05
    torch.testing.assert_close(our_logits(ours, inputs, tokens), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "patterns"), [*((family, ()) for family in FAMILIES), ("canary", ("pointwise_conv*", "linear_pos"))]
)
def test_our_adapter_gives_the_same_logits_in_peft(family, patterns, tmp_path):
    theirs = saved(family, tmp_path / "base")
    inputs, tokens = inputs_of(family, theirs)
    plain = their_logits(theirs, inputs, tokens)
    ours = loaded(family, tmp_path / "base")
    module = module_of(ours)
    fingerprint = fingerprint_of(module)
    chosen = choose_modules(module, patterns, (), their_names(ours), "base")
    ours.adapter = LoraAdapter(4, 8.0, 0.1, chosen, str(tmp_path / "base"), fingerprint)
    attach(module, ours.adapter, 0)
    torch.testing.assert_close(our_logits(ours, inputs, tokens), plain, atol=1e-5, rtol=1e-4)  # it changes nothing yet
    randomise(module)
    save_adapter(ours, tmp_path / "adapter")
    expected = our_logits(ours, inputs, tokens)
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert (expected - plain).abs().max() > 0.05
    torch.testing.assert_close(their_logits(adapted, inputs, tokens), expected, atol=1e-5, rtol=1e-4)
    again = loaded(family, tmp_path / "adapter")  # which names its model
    torch.testing.assert_close(our_logits(again, inputs, tokens), expected, atol=1e-5, rtol=1e-4)


def randomise(module):
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, LoraLinear):
                layer.lora_A.normal_(0, 0.2)
                layer.lora_B.normal_(0, 0.2)


def adapted_folder(tmp_path, model=None):
    """Save a small model of ours and an adapter of it; return both folders and the model with the adapter."""
    from canter.models.formats.checkpoint import save_model

    model = model or small_whisper()
    save_model(model, tmp_path / "base")
    modules = choose_modules(model, ("query", "down"), (), their_names(model), "base")
    model.adapter = LoraAdapter(2, 4.0, 0.0, modules, str(tmp_path / "base"), fingerprint_of(model))
    attach(model, model.adapter, 0)
    randomise(model)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter", model


@pytest.mark.parametrize("make", [small_whisper, small_model])
def test_merging_gives_the_same_model(make, tmp_path):
    base, adapter, model = adapted_folder(tmp_path, make())
    x, lengths = torch.randn(2, 40, 32), torch.tensor([40, 30])
    tokens = torch.randint(3, 50, (2, 5))
    with torch.no_grad():
        expected = model.logits(*model.encode(x, lengths), tokens)
        convert.run(convert.Options(adapter, tmp_path / "merged", merge=True))
        for merged in (load_model(tmp_path / "merged"), load_model(adapter), load_model(base, adapter=adapter)):
            found = merged.logits(*merged.encode(x, lengths), tokens)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        half = load_module(adapter, precision="bf16")
    whole = load_model(adapter).state_dict()
    assert torch.equal(
        half.state_dict()["decoder.layers.0.down.weight"], whole["decoder.layers.0.down.weight"].bfloat16()
    )


def test_an_adapter_is_converted_only_with_merge(tmp_path):
    base, adapter, _ = adapted_folder(tmp_path)
    with pytest.raises(ConfigError, match=r"is a LoRA adapter, which is not converted by itself; add --merge"):
        convert.run(convert.Options(adapter, tmp_path / "merged"))
    with pytest.raises(ConfigError, match=r"has no adapter to merge; leave --merge out"):
        convert.run(convert.Options(base, tmp_path / "merged", merge=True))


def test_an_adapter_of_other_weights_is_refused(tmp_path):
    base, adapter, _ = adapted_folder(tmp_path)
    file = base / "model.safetensors"
    tensors = load_file(file)
    tensors["decoder.norm.weight"] = tensors["decoder.norm.weight"] + 1e-3
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"adapter of a model with the fingerprint .* its weights were changed"):
        load_module(adapter)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors is missing"):
        load_module(adapter)
    (base / "config.json").unlink()
    base.rename(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"is an adapter, and its model is not where it was: .* --adapter"):
        load_module(adapter)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_rslora": True}, "use_rslora is true, which only peft supports; merge"),
        ({"use_dora": True}, "use_dora is true, which only peft supports"),
        ({"modules_to_save": ["proj_out"]}, 'modules_to_save is \\["proj_out"\\], which only peft supports'),
        ({"bias": "all"}, 'bias is "all", which only peft supports'),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern is .* which only peft supports"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens.*which is not a LoRA matrix of a linear layer"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_only_peft_supports_takes_one_line(settings, message, tmp_path):
    theirs = saved("whisper", tmp_path / "base")
    random_adapter(theirs, tmp_path / "adapter", **settings)
    with pytest.raises(CheckpointError, match=message) as refused:
        load_model(tmp_path / "base", adapter=tmp_path / "adapter")
    assert len(str(refused.value).splitlines()) == 1


def test_a_damaged_adapter_takes_one_line(tmp_path):
    base, adapter, _ = adapted_folder(tmp_path)
    file, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    tensors, values = load_file(file), json.loads(config.read_text())
    first = min(tensors)

    def refused(message, tensors=tensors, **changes):
        save_file(tensors, file)
        config.write_text(json.dumps(values | changes))
        with pytest.raises(CheckpointError, match=message):
            read_adapter(adapter, load_model(base))

    refused("r is 0; it must be from 1", r=0)
    refused("r is true|r is True", r=True)
    refused("lora_alpha is None; it must be a number", lora_alpha=None)
    refused(r"instead of \(3, ", r=3)
    refused("has no lora_A of", {name: x for name, x in tensors.items() if name != first})
    refused("holds no adapter", {})
    other = first.replace("decoder.layers.0", "decoder.layers.7")
    refused("no linear layer of WhisperEncoder", tensors | {other: tensors[first].clone()})
    file.write_bytes(b"\0" * 20)
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        read_adapter(adapter, load_model(base))


def test_patterns_name_layers_of_either_module():
    model = small_whisper()
    names = their_names(model)

    def chosen(*patterns, frozen=()):
        return choose_modules(model, patterns, frozen, names, "base")

    assert chosen("q_proj") == chosen("query")
    assert len(chosen("q_proj")) == 6  # two encoder layers, self- and cross-attention of two decoder layers
    assert chosen("model.decoder.*.q_proj") == chosen("decoder.layers.*.query")
    assert chosen("fc1", "encoder.layers.0.down") == chosen("up", "encoder.layers.0.fc2")
    assert len(chosen()) == len(linear_layers(model))  # all linear layers of a Whisper are attention or feed-forward
    assert not any(name.startswith("encoder.") for name in chosen(frozen=("encoder.*",)))
    with pytest.raises(ConfigError, match=r"'qproj' matches no linear layer of base; did you mean 'q_proj'\?"):
        chosen("qproj")
    with pytest.raises(ConfigError, match=r"--freeze 'decoder.embedding.\*' has no effect with --lora.rank"):
        chosen(frozen=("decoder.embedding.*",))
    conformer = small_model()
    default = choose_modules(conformer, (), (), their_names(conformer), "base")
    assert {name.rpartition(".")[2] for name in default} == {
        *("linear_q", "linear_k", "linear_v", "linear_out", "linear1", "linear2"),
        *("query", "key", "value", "out", "up", "down"),
    }


def test_dropout_follows_the_seed_and_only_in_training():
    layer = nn.Sequential(nn.Linear(8, 4))
    attach(layer, LoraAdapter(2, 4.0, 0.5, ("0",)), 0)
    randomise(layer)
    x = torch.randn(3, 8)

    def run(seed):
        torch.manual_seed(seed)
        return layer(x)

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    layer.eval()
    assert torch.equal(run(0), run(1))
    trained = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
    assert trained == ["0.lora_A", "0.lora_B"]
    again = nn.Sequential(nn.Linear(8, 4))
    attach(again, LoraAdapter(2, 4.0, 0.5, ("0",)), 0)
    assert np.abs(again[0].lora_A.detach().numpy()).max() <= 8**-0.5
    assert dataclasses.replace(LoraAdapter(2, 4.0, 0.5, ()), rank=4).scale == 1
