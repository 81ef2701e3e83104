"""Small random SeamlessM4T v2 models of transformers, with a tokenizer in their formats."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import sentencepiece
import torch

from canter.text.seamless import SeamlessTokenizer

transformers = pytest.importorskip("transformers")

LANGUAGES = ("arb", "cmn", "cmn_Hant", "deu", "eng", "fra")
TEXTS = (
    "yes go no help stop rubout erase start enter repeat",
    "one two three four five six seven eight nine ten",
    "das ist ein Test der deutschen Sprache",
    "où êtes-vous? l'école, ça va",
    "你好世界",
    "Hello, World! It's 10 o'clock.",
)
SHAPES = {
    "plain": {},
    "other sizes": {
        "hidden_size": 24, "speech_encoder_layers": 3, "speech_encoder_attention_heads": 3,
        "decoder_attention_heads": 2, "conv_depthwise_kernel_size": 3, "left_max_position_embeddings": 5,
        "right_max_position_embeddings": 2, "adaptor_kernel_size": 5, "adaptor_stride": 5,
        "feature_projection_input_dim": 40,
    },
    "chunks of attention": {"speech_encoder_chunk_size": 30, "speech_encoder_left_chunk_num": 1},
}  # fmt: skip


def sentencepiece_model(symbols: Sequence[str], size: int = 200) -> bytes:
    """Return a serialised BPE of ``size`` pieces, some of them given."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 5), model_writer=out, model_type="bpe", vocab_size=size, hard_vocab_limit=False,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, character_coverage=1.0, minloglevel=2,
        user_defined_symbols=list(symbols),
    )  # fmt: skip
    return out.getvalue()


def small_tokenizer(symbols: Sequence[str] = ()) -> SeamlessTokenizer:
    """Return a tokenizer of a SentencePiece model and language tokens after its pieces."""
    model = sentencepiece_model(symbols)
    first = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size() + 1
    return SeamlessTokenizer(model, {f"__{name}__": first + number for number, name in enumerate(LANGUAGES)})


def small_theirs(complete: bool = False, seed: int = 0, **changes):
    """Return a random model of transformers, ``complete`` or for speech to text only."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 207, "hidden_size": 32, "speech_encoder_layers": 2, "speech_encoder_attention_heads": 4,
        "speech_encoder_intermediate_size": 48, "decoder_layers": 2, "decoder_attention_heads": 4,
        "decoder_ffn_dim": 48, "conv_depthwise_kernel_size": 5, "max_position_embeddings": 300, "encoder_layers": 1,
        "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "t2u_encoder_layers": 1, "t2u_decoder_layers": 1,
        "t2u_encoder_attention_heads": 2, "t2u_decoder_attention_heads": 2, "t2u_encoder_ffn_dim": 16,
        "t2u_decoder_ffn_dim": 16, "t2u_vocab_size": 20, "char_vocab_size": 20, "unit_hifi_gan_vocab_size": 20,
        "unit_embed_dim": 8, "lang_embed_dim": 8, "spkr_embed_dim": 8, "upsample_initial_channel": 32,
        "speech_encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0,
    }  # fmt: skip
    cls = transformers.SeamlessM4Tv2Model if complete else transformers.SeamlessM4Tv2ForSpeechToText
    model = cls(transformers.SeamlessM4Tv2Config(**{**settings, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed" not in name and "shared" not in name:  # padding's embedding stays zero
                strength = 1.5 if "cross_attention.v_proj" in name else 0.3  # so that texts depend on the audio
                parameter.add_(strength * torch.randn_like(parameter))
        model.get_input_embeddings().weight.mul_(5)  # so that tokens differ in probability
    return model.eval()


def save_theirs(model, folder: Path, tokenizer: SeamlessTokenizer, mels: int = 80, **saving) -> Path:
    """Write the folder that transformers would, and return it: generation settings list the texts of all tokens."""
    ids = tokenizer.language_ids
    settings = model.generation_config
    for name, value in {
        "text_decoder_lang_to_code_id": ids, "t2u_lang_code_to_id": {"eng": 1}, "vocoder_lang_code_to_id": {"eng": 1},
        "id_to_text": {str(number): token for token, number in tokenizer.ids.items()}, "char_to_id": {"a": 1},
        "max_new_tokens": 256, "decoder_start_token_id": 3, "eos_token_id": 3, "pad_token_id": 0,
    }.items():  # fmt: skip
        setattr(settings, name, value)
    model.save_pretrained(folder, **saving)
    transformers.SeamlessM4TFeatureExtractor(feature_size=mels, num_mel_bins=mels).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def changed_config(folder: Path, **changes) -> None:
    """Change settings of the folder's ``config.json``."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
