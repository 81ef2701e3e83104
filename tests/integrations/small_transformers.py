"""Small random speech models of transformers, a tokenizer of words for them, and clips."""

from functools import cache

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

transformers = pytest.importorskip("transformers")

from canter.integrations.transformers import TransformersModel  # noqa: E402

VOCABULARY, START, END, PAD = 60, 1, 2, 0
COMMON = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END}
SPECIAL = {**COMMON, "decoder_start_token_id": START}
FAMILIES = ("whisper", "speech_to_text", "moonshine", "seamless", "canary")


def whisper():
    config = transformers.WhisperConfig(
        **SPECIAL, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=20,
        max_source_positions=200, max_target_positions=40, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config), transformers.WhisperFeatureExtractor(
        20, chunk_length=4
    )


def speech_to_text():
    config = transformers.Speech2TextConfig(
        **SPECIAL, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, input_feat_per_channel=20,
        conv_channels=16, max_target_positions=40,
    )  # fmt: skip
    extractor = transformers.Speech2TextFeatureExtractor(feature_size=20, num_mel_bins=20)
    return transformers.Speech2TextForConditionalGeneration(config), extractor


def moonshine():
    config = transformers.MoonshineConfig(
        **SPECIAL, hidden_size=16, intermediate_size=32, encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=2, encoder_num_attention_heads=2, decoder_num_attention_heads=2,
        max_position_embeddings=40,
    )  # fmt: skip
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True)
    return transformers.MoonshineForConditionalGeneration(config), extractor


def seamless():
    """The first version, which has no modules of ours."""
    config = transformers.SeamlessM4TConfig(
        **SPECIAL, hidden_size=16, speech_encoder_layers=2, speech_encoder_attention_heads=2,
        speech_encoder_intermediate_size=32, feature_projection_input_dim=40, decoder_layers=2,
        decoder_attention_heads=2, decoder_ffn_dim=32, encoder_layers=1, encoder_attention_heads=2,
        encoder_ffn_dim=32, t2u_encoder_layers=1, t2u_decoder_layers=1, max_position_embeddings=40,
        conv_depthwise_kernel_size=5,
    )  # fmt: skip
    extractor = transformers.SeamlessM4TFeatureExtractor(feature_size=20, num_mel_bins=20)
    return transformers.SeamlessM4TForSpeechToText(config), extractor


def speecht5():
    config = transformers.SpeechT5Config(
        **SPECIAL, hidden_size=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, conv_dim=(16,) * 7,
        max_text_positions=40, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    return transformers.SpeechT5ForSpeechToText(config), transformers.SpeechT5FeatureExtractor()


def canary():
    config = transformers.CanaryConfig(
        encoder_config={
            "model_type": "parakeet_encoder", "hidden_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "intermediate_size": 32, "num_mel_bins": 32,
            "subsampling_conv_channels": 8, "max_position_embeddings": 500,
        },
        decoder_config={
            **COMMON, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 40,
        },
        **SPECIAL,
    )  # fmt: skip
    extractor = transformers.ParakeetFeatureExtractor(feature_size=32)
    return transformers.CanaryForConditionalGeneration(config), extractor


def make(family: str):
    """(model, feature extractor) of random weights."""
    return globals()[family]()


@cache
def built(family: str) -> TransformersModel:
    torch.manual_seed(0)
    model, extractor = make(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return TransformersModel(model.eval(), extractor)


def clips(seconds, seed=0):
    """Return clips of modulated noise with the given lengths in seconds."""
    random = np.random.default_rng(seed)
    found = []
    for length in seconds:
        samples = round(16000 * length)
        rise = np.sin(np.arange(samples) / random.uniform(300, 3000)) + 1.1
        found.append((random.normal(size=samples) * rise * 0.1).astype(np.float32))
    return found


def word_tokenizer(**special):
    words = {"<pad>": PAD, "<s>": START, "</s>": END} | {f"w{n}": n for n in range(3, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
