import json

import pytest
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="accelerate is not installed")
torch = pytest.importorskip("torch")


@pytest.fixture
def start(tmp_path, whisper_bytes):
    """The folder of a small Whisper of transformers: bytes, and the special tokens of one language."""
    backend = whisper_bytes("en")
    end, start = (backend.token_to_id(f"<|{name}|>") for name in ("endoftext", "startoftranscript"))
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|endoftext|>")
    tokenizer = transformers.WhisperTokenizerFast(tokenizer_object=backend, **special)
    extractor = transformers.WhisperFeatureExtractor(20)
    transformers.WhisperProcessor(extractor, tokenizer).save_pretrained(tmp_path / "start")
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=300, pad_token_id=end, bos_token_id=end, eos_token_id=end, decoder_start_token_id=start,
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=20, max_target_positions=40, suppress_tokens=None,
        begin_suppress_tokens=None, dropout=0.1,
    )  # fmt: skip
    transformers.WhisperForConditionalGeneration(config).save_pretrained(tmp_path / "start")
    return tmp_path / "start"


def test_resumes_where_it_stopped(run, start, manifest, tmp_path):
    def model(name, steps):
        given = ["--model", start, "--manifest", manifest, "--output", tmp_path / name, "--batch-seconds", 30]
        run("finetune_whisper.py", *given, "--steps", steps, "--save-every", 3, "--micro-batches", 2)
        return load_file(tmp_path / name / "model" / "model.safetensors")

    model("cut", 3)
    model("cut", 5)
    states = sorted((tmp_path / "cut").glob("checkpoint-*/trainer_state.json"))
    history = json.loads(states[-1].read_text())["log_history"]
    assert [row["step"] for row in history if "loss" in row] == [1, 2, 3, 4, 5]
    transformers.WhisperProcessor.from_pretrained(tmp_path / "cut" / "model")
    trained = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "cut" / "model")
    before = load_file(start / "model.safetensors")
    assert not torch.equal(trained.model.decoder.embed_tokens.weight, before["model.decoder.embed_tokens.weight"])
