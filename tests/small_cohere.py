"""Small random Cohere Transcribe models, as transformers saves them."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

transformers = pytest.importorskip("transformers")

TOKENS = (
    "<unk>", "<|nospeech|>", "<pad>", "<|endoftext|>", "<|startoftranscript|>", "<|pnc|>", "<|nopnc|>",
    "<|startofcontext|>", "<|itn|>", "<|noitn|>", "<|timestamp|>", "<|notimestamp|>", "<|diarize|>", "<|nodiarize|>",
    "<|spkchange|>", "<|emo:undefined|>", "<|ar|>", "<|de|>", "<|en|>", "<|fr|>", "<|ja|>",
)  # fmt: skip
TEXTS = ["the doctor opened the window", "der Arzt kam an die Tür", "a farmer carried the basket"] * 5
VOCABULARY = 150


def cohere_tokenizer():
    """A BPE vocabulary with the special tokens that transformers' processor names in its prompt."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=list(TOKENS), show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    return transformers.TokenizersBackend(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<|endoftext|>",
        bos_token="<|startoftranscript|>",
        extra_special_tokens=[token for token in TOKENS if token.startswith("<|")],
    )


def save_cohere(folder: Path, encoder_width: int = 32, positions: int = 64, **decoder):
    """Save a model and processor in ``folder``; return both."""
    torch.manual_seed(0)
    tokenizer = cohere_tokenizer()
    encoder = {
        "model_type": "parakeet_encoder", "hidden_size": encoder_width, "num_hidden_layers": 2,
        "num_attention_heads": 4, "intermediate_size": 48, "num_mel_bins": 32, "subsampling_conv_channels": 8,
        "conv_kernel_size": 9,
    }  # fmt: skip
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.CohereAsrConfig(
        encoder_config=encoder,
        vocab_size=VOCABULARY,
        max_position_embeddings=positions,
        decoder_start_token_id=tokenizer.convert_tokens_to_ids("▁"),
        **{**shape, **decoder},
    )
    model = transformers.CohereAsrForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    processor = transformers.CohereAsrProcessor(transformers.CohereAsrFeatureExtractor(feature_size=32), tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor
