"""Settings of all tests."""

import pytest
import tokenizers
from hypothesis import HealthCheck, settings
from tokenizers import decoders, models, pre_tokenizers

# a busy machine is no failure: nothing here is timed
settings.register_profile("canter", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("canter")


@pytest.fixture
def without_tf32(monkeypatch):
    """On a GPU convolutions round to TF32 unless told otherwise."""
    monkeypatch.setattr("torch.backends.cudnn.allow_tf32", False)


@pytest.fixture(scope="session")
def whisper_bytes():
    """``whisper_bytes(*languages)``: bytes and the special tokens of a Whisper of these languages, in its order."""

    def make(*languages: str) -> tokenizers.Tokenizer:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = tokenizers.Tokenizer(
            models.BPE({symbol: number for number, symbol in enumerate(alphabet)}, [])
        )
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        names = ("endoftext", "startoftranscript", *languages, "translate", "transcribe", "startofprev", "nospeech",
                 "notimestamps")  # fmt: skip
        backend.add_special_tokens([f"<|{name}|>" for name in names])
        return backend

    return make
