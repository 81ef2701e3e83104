"""The files that the guides expect of a reader: recordings, tables, manifests and models, all small."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from canter.models.decoder import DecoderConfig
from canter.models.fastconformer import FastConformerConfig
from canter.models.features import FeatureConfig, WhisperFeatureConfig
from canter.models.formats.huggingface import write_hf
from canter.models.formats.nemo import write_nemo
from canter.models.model import ModelConfig, SpeechModel
from canter.models.whisper import WhisperEncoderConfig
from canter.text import WhisperTokenizer, train_tokenizer
from canter.text.sentencepiece import SentencePieceTokenizer

# Public domain: LibriVox (Sense and Sensibility) and LJ Speech.
CLIPS = {
    "sense_0880": "he was not an ill disposed young man",
    "sense_0930": "he might even have been made amiable himself",
    "lj_011_0202": "The uncle claimed her. The husband resisted.",
}
RATE = 16000


def clip(name: str) -> np.ndarray:
    samples, rate = soundfile.read(Path(__file__).parent / "clips" / f"{name}.flac", dtype="float32")
    assert rate == RATE
    return samples


def write_video(path: Path, samples: np.ndarray, codec: str) -> None:
    """Write a grey picture at 5 frames a second, with the samples as its audio."""
    import av

    with av.open(str(path), "w") as file:
        picture = file.add_stream("mpeg4", rate=5)
        picture.width, picture.height, picture.pix_fmt = 64, 48, "yuv420p"
        sound = file.add_stream(codec, rate=48000 if codec == "libopus" else RATE, layout="mono")
        for _ in range(int(len(samples) / RATE * 5)):
            grey = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 128, np.uint8), format="rgb24")
            file.mux(picture.encode(grey))
        file.mux(picture.encode())
        frame = av.AudioFrame.from_ndarray((samples[None] * 32767).astype(np.int16), format="s16", layout="mono")
        frame.sample_rate = RATE
        resampler = av.AudioResampler(sound.format.name, "mono", sound.rate, frame_size=sound.frame_size)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            file.mux(sound.encode(part))
        file.mux(sound.encode())


@pytest.fixture(scope="session")
def small_whisper(tmp_path_factory, whisper_bytes) -> Path:
    """A random English Whisper as a Hugging Face folder, which pads to 30 s as the real ones do."""
    tokenizer = WhisperTokenizer(whisper_bytes("en").to_str())
    torch.manual_seed(0)
    decoder = DecoderConfig(
        layers=1,
        width=32,
        heads=2,
        feedforward=48,
        vocabulary=tokenizer.vocab_size,
        positions=64,  # with random weights a text ends where the positions do
        learned_positions=True,
        embedding_norm=False,
        activation="gelu",
        key_bias=False,
        head_bias=False,
    )
    encoder = WhisperEncoderConfig(layers=1, width=32, heads=2, feedforward=48, mels=80, positions=1500)
    model = SpeechModel(ModelConfig(WhisperFeatureConfig(), encoder, decoder)).eval()
    model.generation = {**tokenizer.generation(), "alignment_heads": [[0, 0], [0, 1]]}
    return write_hf(model, tmp_path_factory.mktemp("whisper") / "whisper-tiny.en", tokenizer)


@pytest.fixture(scope="session")
def small_canary(tmp_path_factory) -> Path:
    """A random Canary in English and German as a .nemo archive."""
    shared = train_tokenizer([text.lower() for text in CLIPS.values()] * 20, ["en", "de"], vocab_size=60)
    models = dict.fromkeys(("en", "de"), shared.models[""])
    tokenizer = SentencePieceTokenizer(shared.special, models, shared.prompt_format, shared.defaults)
    torch.manual_seed(0)
    encoder = FastConformerConfig(layers=1, width=32, heads=2, feedforward=64, subsampling_channels=8, mels=32)
    decoder = DecoderConfig(layers=1, width=32, heads=2, feedforward=64, vocabulary=tokenizer.vocab_size, positions=256)
    model = SpeechModel(ModelConfig(FeatureConfig(mels=32), encoder, decoder)).eval()
    return write_nemo(model, tmp_path_factory.mktemp("canary") / "canary.nemo", tokenizer)


def hub_cache(folder: Path, name: str, model: Path) -> Path:
    """Lay out a model's folder like the Hugging Face cache, and return the value of HF_HUB_CACHE."""
    revision = "0" * 40
    place = folder / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(revision)
    shutil.copytree(model, place / "snapshots" / revision)
    return folder


@pytest.fixture(scope="session")
def small_hub(tmp_path_factory, small_whisper) -> Path:
    return hub_cache(tmp_path_factory.mktemp("small-hub"), "openai/whisper-tiny.en", small_whisper)


@pytest.fixture(scope="session")
def real_hub(tmp_path_factory) -> Path:
    shared = os.environ.get("CANTER_SHARED")
    if not shared:
        pytest.skip("CANTER_SHARED does not name the folder of shared models")
    model = Path(shared) / "models" / "whisper-tiny.en"
    return hub_cache(tmp_path_factory.mktemp("real-hub"), "openai/whisper-tiny.en", model)


def write_manifest(path: Path, names: list[str], speeds: list[float]) -> None:
    """Write a NeMo manifest with a clip for each pair of name and speed, and the clips next to it."""
    (path.parent / "wav").mkdir(exist_ok=True)
    with path.open("w") as file:
        for name in names:
            for speed in speeds:
                audio = path.parent / "wav" / f"{path.stem}_{name}_{speed:.2f}.wav"
                samples = clip(name)
                soundfile.write(audio, samples, round(RATE * speed))
                row = {
                    "audio_filepath": f"wav/{audio.name}",
                    "duration": round(len(samples) / round(RATE * speed), 4),
                    "text": CLIPS[name].lower(),
                    "lang": "en",
                }
                file.write(json.dumps(row) + "\n")


def write_common_voice(folder: Path) -> None:
    """Write train, dev and test tables in the layout of a release, with MP3 clips."""
    names = (
        "client_id path sentence_id sentence sentence_domain up_votes down_votes age gender accents variant locale "
        "segment"
    )
    (folder / "clips").mkdir(parents=True)
    durations = ["clip\tduration[ms]"]
    for part, speeds in {"train": [0.9, 1.0, 1.1, 1.2], "dev": [0.95], "test": [1.05]}.items():
        lines = ["\t".join(names.split())]
        for number, (name, text) in enumerate(CLIPS.items()):
            for speed in speeds:
                file = f"common_voice_en_{part}_{number}_{round(100 * speed)}.mp3"
                samples = clip(name)
                length = int(len(samples) / speed)
                samples = np.interp(np.linspace(0, len(samples) - 1, length), np.arange(len(samples)), samples)
                soundfile.write(folder / "clips" / file, samples, RATE, format="MP3")
                durations.append(f"{file}\t{round(1000 * length / RATE)}")
                lines.append("\t".join([f"{number:064x}", file, "0", text, "", "2", "0", "", "", "", "", "en", ""]))
        (folder / f"{part}.tsv").write_text("\n".join(lines) + "\n")
    (folder / "clip_durations.tsv").write_text("\n".join(durations) + "\n")
