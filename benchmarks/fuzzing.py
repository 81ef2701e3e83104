"""Test Canter with damaged and hostile input of every kind that it reads, made by structure-aware mutations.

    python benchmarks/fuzzing.py -o FOLDER [--only manifests audio models runs requests] [--cases N] [--seed S]

A case is a pure function of area, seed and number. It fails where anything but a CanterError is raised (in the
service: an answer of 500, or none), where it takes longer than --seconds, or more memory than --mebibytes above that of
the process. Each area runs in a process of its own, which is ended and started anew where a case does not come back.
The input of a case that fails is kept in FOLDER/failures; results are appended to FOLDER/AREA-SEED.jsonl, and the same
command continues from there. --replay AREA NUMBER makes one case again and shows what it raises.

manifests: NeMo, Lhotse, Common Voice, AudioFolder, tables, hub Parquet, saved data sets, tars, mixtures, indexes and
budgets. audio: WAV, FLAC, Ogg, MP3, AIFF, AU, CAF, and with PyAV MP4, Matroska, WebM and others. models: folders of
Canter and Hugging Face, .nemo archives, tokenizers; what loads also transcribes. runs: run folders, which are loaded,
reported and resumed. requests: HTTP requests to the service, in process.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import io
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

import mutations
import numpy as np
import tyro
from mutations import VALUES, harm, spoilt_files

from canter.errors import CanterError

Files = dict[str, bytes]
RATE = 16000
PATIENCE = 3  # times its processor time that a case may wait


@dataclass(frozen=True)
class Options:
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder for undamaged input, results and the inputs that failed."""
    only: tuple[str, ...] = ()
    """Areas to run (default: all)."""
    cases: int | None = None
    """Cases of each area (default: 2,000 manifests, 1,000 audio files, 500 models, 300 runs, 1,000 requests)."""
    seed: int = 0
    seconds: float = 10.0
    """Maximum CPU seconds of a case; it may take three times as long in wall time, as on a busy machine."""
    mebibytes: int = 500
    """Maximum MiB of a case, above the memory of the process before it."""
    replay: tuple[str, int] | None = None
    """Area and number of a case to repeat; its files are kept in FOLDER/replay."""
    worker: str | None = None
    """Run the cases of this area in this process, beginning at --first; used by the parent process."""
    first: int = 0


def clip(seconds: float = 0.6, seed: int = 0) -> np.ndarray:
    """Return modulated noise (S,)."""
    chance = np.random.default_rng(seed)
    samples = round(RATE * seconds)
    rise = np.sin(np.arange(samples) / chance.uniform(300, 3000)) + 1.1
    return (chance.normal(size=samples) * rise * 0.1).astype(np.float32)


def files_below(folder: Path) -> Files:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def write_files(folder: Path, files: Files) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


class Area:
    """A kind of input: undamaged examples, how a case is made from them, and what Canter does with it."""

    name: str
    cases: int

    def prepare(self, folder: Path) -> None:
        """Write the undamaged examples to ``folder``, each to a subfolder."""
        raise NotImplementedError

    def start(self, folder: Path) -> None:
        """Read the examples that ``prepare`` wrote to ``folder``."""
        self.folder = folder
        self.examples = {path.name: files_below(path) for path in sorted(folder.iterdir()) if path.is_dir()}

    def make(self, draw: random.Random) -> tuple[str, Files]:
        """Return the kind of a case and its files."""
        kind = draw.choice(sorted(self.examples))
        return kind, spoilt_files(draw, self.examples[kind])

    def check(self, kind: str, folder: Path) -> None:
        """Let Canter read the case; a CanterError counts as refused."""
        raise NotImplementedError


class Manifests(Area):
    name, cases = "manifests", 2000
    # Kind -> what is opened of its folder.
    ENTRIES: ClassVar = {
        "nemo": "train.jsonl", "nemo_gz": "train.jsonl.gz", "array": "train.json", "lhotse": "cuts.jsonl",
        "lhotse_gz": "cuts.jsonl.gz", "lhotse_folder": ".", "shar": ".", "commonvoice": "train.tsv", "audiofolder": ".",
        "csv": "train.csv", "ljspeech": ".", "kaldi": ".", "parquet": "hub.parquet", "lengths": "lengths.parquet",
        "saved": ".", "webdataset": "data.tar", "nemo_tarred": ".", "mixture": "mixture.yaml", "folder": ".",
        "index": "lengths.arrow", "budget": "budget.json",
    }  # fmt: skip

    def prepare(self, folder: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq
        import soundfile

        from canter.planning.budget import Budget

        clips = folder / "clips.audio"
        clips.mkdir(parents=True)
        sound = [io.BytesIO() for _ in range(3)]
        for number, stream in enumerate(sound):
            soundfile.write(stream, clip(0.5 + number / 10, number), RATE, format="WAV")
            (clips / f"{number}.wav").write_bytes(stream.getvalue())
        wavs = [stream.getvalue() for stream in sound]
        paths = [str(clips / f"{number}.wav") for number in range(3)]
        rows = [
            {"audio_filepath": path, "duration": 0.5 + number / 10, "text": f"text {number}", "lang": "en",
             "source_lang": "en", "target_lang": "de", "taskname": "ast", "pnc": "yes", "offset": 0.0}
            for number, path in enumerate(paths)
        ]  # fmt: skip
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        cuts = b"".join(json.dumps(self._cut(row, number)).encode() + b"\n" for number, row in enumerate(rows))
        made: dict[str, Files] = {
            "nemo": {"train.jsonl": lines},
            "nemo_gz": {"train.jsonl.gz": gzip.compress(lines)},
            "array": {"train.json": json.dumps(rows).encode()},
            "lhotse": {"cuts.jsonl": cuts},
            "lhotse_gz": {"cuts.jsonl.gz": gzip.compress(cuts)},
            "lhotse_folder": {"cuts.jsonl.gz": gzip.compress(cuts)},
            "shar": {"cuts.000000.jsonl.gz": gzip.compress(cuts), "recording.000000.tar": self._tar(
                {f"{n}.{end}": data for n, wav in enumerate(wavs) for end, data in (("wav", wav), ("json", b"{}"))})},
            "commonvoice": {"train.tsv": b"client_id\tpath\tsentence\tlocale\n" + b"".join(
                f"a\t{path}\ttext\ten\n".encode() for path in paths)},
            "audiofolder": {f"{n}.wav": wav for n, wav in enumerate(wavs)} | {"metadata.jsonl": b"".join(
                json.dumps({"file_name": f"{n}.wav", "text": "text"}).encode() + b"\n" for n in range(3))},
            "csv": {"train.csv": b"audio,text,duration\n" + "".join(f'{p},"a, b",0.5\n' for p in paths).encode()},
            "ljspeech": {f"wavs/{n}.wav": wav for n, wav in enumerate(wavs)} | {"metadata.csv": b"".join(
                f"{n}|Text {n}.|text {n}\n".encode() for n in range(3))},
            "kaldi": {"wav.scp": "".join(f"u{n} {p}\n" for n, p in enumerate(paths)).encode(),
                      "text": b"u0 a\nu1 b\nu2 c\n", "utt2dur": b"u0 0.5\nu1 0.6\nu2 0.7\n"},
            "webdataset": {"data.tar": self._tar({f"{n}.{end}": data for n, wav in enumerate(wavs) for end, data in (
                ("wav", wav), ("txt", b"text"), ("json", b'{"lang": "en"}'))})},
            "nemo_tarred": {"audio_0.tar": self._tar({f"{n}.wav": wav for n, wav in enumerate(wavs)}),
                            "tarred_audio_manifest.json": b"".join(json.dumps(
                                row | {"audio_filepath": f"{n}.wav", "shard_id": 0}).encode() + b"\n"
                                for n, row in enumerate(rows))},
            "mixture": {"train.jsonl": lines, "mixture.yaml": json.dumps([
                {"type": "group", "weight": 2, "temperature": 0.5, "tags": {"lang": "en"}, "input_cfg": [
                    {"type": "nemo", "manifest_filepath": "train.jsonl", "weight": 1}]},
                {"type": "nemo", "manifest_filepath": "train.jsonl", "weight": 3}]).encode()},
            "folder": {f"a/{n}.wav": wav for n, wav in enumerate(wavs)} | {"a/0.txt": b"text"},
        }  # fmt: skip
        for kind, files in made.items():
            write_files(folder / kind, files)
        audio = pa.array([{"bytes": wav, "path": f"{n}.wav"} for n, wav in enumerate(wavs)])
        table = pa.table({"audio": audio, "text": ["a", "b", "c"], "lang_id": [0, 1, 0]})
        for kind in ("parquet", "lengths", "saved", "index", "budget"):
            (folder / kind).mkdir()
        pq.write_table(table, folder / "parquet" / "hub.parquet")
        lengths = pa.table(
            {"duration": [0.5, 0.6], "text": ["a", "b"], "num_tokens": [1, 2], "audio_filepath": paths[:2]}
        )
        pq.write_table(lengths, folder / "lengths" / "lengths.parquet")
        saved = str(folder / "saved" / "data-00000-of-00001.arrow")
        with pa.OSFile(saved, "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "a", "_split": "train"}
        write_files(folder / "saved", {"state.json": json.dumps(state).encode(), "dataset_info.json": b"{}"})
        import canter

        canter.build_index(
            str(folder / "nemo" / "train.jsonl"), folder / "index" / "lengths.arrow", tokenizer="chars",
            prompt_tokens=1, progress=False,
        )  # fmt: skip
        Budget.from_batch_seconds(60.0).save(folder / "budget" / "budget.json")

    @staticmethod
    def _cut(row: dict[str, Any], number: int) -> dict[str, Any]:
        seconds = row["duration"]
        source = {"type": "file", "channels": [0], "source": row["audio_filepath"]}
        recording = {"id": "r", "sources": [source], "sampling_rate": RATE, "num_samples": round(RATE * seconds),
                     "duration": seconds, "channel_ids": [0]}  # fmt: skip
        said = {"id": "s", "recording_id": "r", "start": 0.0, "duration": seconds, "channel": 0, "text": row["text"],
                "language": "English", "speaker": "x", "custom": {"pnc": "no"}}  # fmt: skip
        return {"id": str(number), "start": 0.0, "duration": seconds, "channel": 0, "supervisions": [said],
                "recording": recording, "type": "MonoCut"}  # fmt: skip

    @staticmethod
    def _tar(members: Files) -> bytes:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as tar:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return stream.getvalue()

    def start(self, folder: Path) -> None:
        super().start(folder)
        del self.examples["clips.audio"]

    def make(self, draw: random.Random) -> tuple[str, Files]:
        kind = draw.choice(sorted(self.examples))
        files = self.examples[kind]
        separators = {"commonvoice": "\t", "csv": ",", "ljspeech": "|", "kaldi": " "}
        if kind in separators and draw.random() < 0.7:
            name = next(one for one in sorted(files) if one.endswith((".tsv", ".csv", ".scp")))
            return kind, files | {name: mutations.spoilt_table(draw, files[name], separators[kind])}
        if kind in ("parquet", "lengths", "saved") and draw.random() < 0.4:
            return kind, files | self._odd_table(draw, kind)
        return kind, spoilt_files(draw, files)

    @staticmethod
    def _odd_table(draw: random.Random, kind: str) -> Files:
        """Write a table whose columns have other types than a reader expects."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns: dict[str, Any] = {}
        for name in ("audio", "text", "duration", "num_tokens", "audio_filepath", "path", "lang_id", ""):
            values = [draw.choice(VALUES) for _ in range(2)]
            for array in (values, [str(one) for one in values], [{"bytes": b"x", "path": None}] * 2):
                if draw.random() < 0.4:
                    with contextlib.suppress(pa.ArrowException, ValueError, TypeError, OverflowError):
                        columns[name] = pa.array(array)
                    break
        table = pa.table(columns or {"a": [1]})
        stream = io.BytesIO()
        if kind == "saved":
            with pa.ipc.new_stream(stream, table.schema) as writer:
                writer.write_table(table)
            return {"data-00000-of-00001.arrow": stream.getvalue()}
        pq.write_table(table, stream)
        return {"hub.parquet" if kind == "parquet" else "lengths.parquet": stream.getvalue()}

    def check(self, kind: str, folder: Path) -> None:
        import canter
        from canter.corpus.mixture import leaves, read_mixture
        from canter.corpus.sources import open_source
        from canter.planning.budget import Budget

        entry = folder / self.ENTRIES[kind]
        if kind == "index":
            index = canter.LengthIndex.open(entry)
            list(index.problems)
            _ = index.skipped, index.fingerprint
        elif kind == "budget":
            Budget.load(entry)
        elif kind == "lengths":
            canter.build_index(str(entry), tokenizer="chars", prompt_tokens=1, progress=False)
        elif kind == "mixture":
            for source in leaves(read_mixture(entry)):
                with contextlib.suppress(CanterError):
                    for _ in open_source(source.path, audio=source.audio):
                        pass
        else:
            for _ in open_source(entry, measure_durations=True):
                pass


class Sounds(Area):
    name, cases = "audio", 1000
    FORMATS: ClassVar = {"wav": "PCM_16", "wav24": "PCM_24", "wavfloat": "FLOAT", "wavulaw": "ULAW", "wavex": "PCM_16",
               "flac": "PCM_16",
               "ogg": "VORBIS", "opus": "OPUS", "mp3": "MPEG_LAYER_III", "aiff": "PCM_16", "au": "PCM_16",
               "caf": "ALAC_16",
               "rf64": "PCM_16", "w64": "PCM_16"}  # fmt: skip
    NAMES: ClassVar = {"wav24": "WAV", "wavfloat": "WAV", "wavulaw": "WAV", "opus": "OGG", "wavex": "WAVEX"}
    CODED: ClassVar = {"mp4": "aac", "matroska": "aac", "webm": "libopus", "adts": "aac", "mov": "pcm_s16le",
             "avi": "mp3", "mpegts": "aac", "asf": "wmav2"}  # fmt: skip

    def prepare(self, folder: Path) -> None:
        import soundfile

        for kind, subtype in self.FORMATS.items():
            stream = io.BytesIO()
            try:
                rate = 48000 if kind == "opus" else RATE
                soundfile.write(stream, clip(1.0), rate, format=self.NAMES.get(kind, kind.upper()), subtype=subtype)
            except soundfile.LibsndfileError:
                continue
            write_files(folder / kind, {f"a.{kind}": stream.getvalue()})
        with contextlib.suppress(ImportError):
            import av

            for container, codec in self.CODED.items():
                stream = io.BytesIO()
                with contextlib.suppress(av.FFmpegError, ValueError):
                    with av.open(stream, "w", format=container) as out:
                        track: Any = out.add_stream(codec, rate=48000 if codec == "libopus" else RATE, layout="mono")
                        frame = av.AudioFrame.from_ndarray(clip(1.0)[None], format="fltp", layout="mono")
                        frame.sample_rate = RATE
                        for packet in [*track.encode(frame), *track.encode(None)]:
                            out.mux(packet)
                    write_files(folder / container, {f"a.{container}": stream.getvalue()})

    def make(self, draw: random.Random) -> tuple[str, Files]:
        kind = draw.choice(sorted(self.examples))
        (name, data), *_ = self.examples[kind].items()
        what = draw.random()
        if what < 0.5:  # headers decide most
            data = harm(draw, data[:200]) + data[200:]
        elif what < 0.9:
            data = harm(draw, data)
        else:
            (_, other), *_ = self.examples[draw.choice(sorted(self.examples))].items()
            data = data[: draw.randrange(len(data))] + other[draw.randrange(len(other)) :]
        return kind, {name if draw.random() < 0.7 else draw.choice(("a.wav", "a.mp3", "a", "a.bin")): data}

    def check(self, kind: str, folder: Path) -> None:
        from canter.corpus.audio import audio_seconds, load_audio

        (path,) = folder.iterdir()
        for read in (audio_seconds, load_audio):
            with contextlib.suppress(CanterError):
                read(str(path))
        load_audio(str(path))


@cache
def small_parts() -> tuple[Any, Any]:
    """Write a tokenizer of a few words in English and German, and a byte-level one as Whisper has."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    from canter.text import WhisperTokenizer, train_tokenizer

    words = train_tokenizer(["one two three", "four five six", "seven eight nine"] * 9, ["en", "de"], 60)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({symbol: number for number, symbol in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = ("endoftext", "startoftranscript", "en", "de", "translate", "transcribe", "startofprev", "nospeech",
             "notimestamps")  # fmt: skip
    backend.add_special_tokens([f"<|{name}|>" for name in names])
    return words, WhisperTokenizer(backend.to_str())


def small_canary(tokenizer: Any, ctc: bool = False) -> Any:
    import torch

    from canter.models.decoder import DecoderConfig
    from canter.models.fastconformer import FastConformerConfig
    from canter.models.features import FeatureConfig
    from canter.models.model import ModelConfig, SpeechModel

    torch.manual_seed(0)
    encoder = FastConformerConfig(layers=1, width=16, heads=2, feedforward=32, subsampling_channels=4, mels=16)
    decoder = DecoderConfig(layers=1, width=16, heads=2, feedforward=32, vocabulary=tokenizer.vocab_size, positions=32)
    model = SpeechModel(ModelConfig(FeatureConfig(mels=16), encoder, decoder, ctc_vocabulary=5 if ctc else 0)).eval()
    model.tokenizer = tokenizer
    return model


class Models(Area):
    name, cases = "models", 500

    def prepare(self, folder: Path) -> None:
        import torch

        from canter.models.decoder import DecoderConfig
        from canter.models.features import WhisperFeatureConfig
        from canter.models.formats.checkpoint import save_model
        from canter.models.formats.huggingface import write_hf
        from canter.models.formats.nemo import write_nemo
        from canter.models.model import ModelConfig, SpeechModel
        from canter.models.whisper import WhisperEncoderConfig
        from canter.text import Characters, SentencePieceTokenizer

        words, letters = small_parts()
        folder.mkdir(parents=True)
        canary = small_canary(words, ctc=True)
        canary.characters = Characters("abcd")
        save_model(canary, folder / "own", words)
        models: dict[str, Any] = dict.fromkeys(("en", "de"), words.models[""])
        split = SentencePieceTokenizer(words.special, models, words.prompt_format, words.defaults)
        (folder / "nemo").mkdir()
        write_nemo(small_canary(split), folder / "nemo" / "a.nemo", split)
        torch.manual_seed(0)
        encoder = WhisperEncoderConfig(layers=1, width=16, heads=2, feedforward=32, mels=16, positions=100)
        decoder = DecoderConfig(
            layers=1, width=16, heads=2, feedforward=32, vocabulary=letters.vocab_size, positions=64,
            learned_positions=True, embedding_norm=False, activation="gelu", key_bias=False, head_bias=False,
            pad=letters.pad,
        )  # fmt: skip
        whisper = SpeechModel(ModelConfig(WhisperFeatureConfig(mels=16, pad_seconds=2.0), encoder, decoder)).eval()
        whisper.generation = {
            "suppress_tokens": [1, 2], "begin_suppress_tokens": [3], "eos_token_id": letters.end,
            "alignment_heads": [[0, 1]],
            "no_timestamps_token_id": letters.special_id("<|notimestamps|>"), "max_initial_timestamp_index": 50,
            "decoder_start_token_id": letters.special_id("<|startoftranscript|>"), "lang_to_id": {"<|en|>": 258},
        }  # fmt: skip
        write_hf(whisper, folder / "whisper", letters)
        write_hf(small_canary(words), folder / "canary")
        for name in ("canter_tokenizer.json", "tokenizer.model"):
            (folder / "canary" / name).unlink()
        self._cohere(folder / "cohere", words)
        with contextlib.suppress(ImportError):
            self._moonshine(folder / "moonshine")

    @staticmethod
    def _cohere(folder: Path, words: Any) -> None:
        from canter.models.formats.huggingface import write_hf
        from canter.models.model import SpeechModel
        from canter.text import JsonTokenizer, SentencePieceTokenizer

        named = ("startofcontext", "emo:undefined", "noitn", "notimestamp", "nodiarize")
        special = (*words.special, *(f"<|{name}|>" for name in named))
        pieces = JsonTokenizer.of(SentencePieceTokenizer(special, words.models, "canary2"))
        tokenizer = JsonTokenizer(pieces.serialised, "cohere")
        config = small_canary(tokenizer).config
        decoder = replace(config.decoder, learned_positions=True, tied=False)
        features = replace(config.features, dither=1e-5, dither_by_length=True)
        model = SpeechModel(replace(config, features=features, decoder=decoder, projected=True)).eval()
        write_hf(model, folder, tokenizer)

    @staticmethod
    def _moonshine(folder: Path) -> None:
        import transformers
        from tokenizers import Tokenizer, models, pre_tokenizers

        special: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
        config = transformers.MoonshineConfig(
            **special, vocab_size=40, hidden_size=16, intermediate_size=32, encoder_num_hidden_layers=1,
            decoder_num_hidden_layers=1, encoder_num_attention_heads=2, decoder_num_attention_heads=2,
            max_position_embeddings=40,
        )  # fmt: skip
        words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{n}": n for n in range(3, 40)}
        backend = Tokenizer(models.WordLevel(words, unk_token="w3"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
        for part in (
            transformers.MoonshineForConditionalGeneration(config),
            transformers.Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True),
            transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **tokens),
        ):
            part.save_pretrained(folder)

    def check(self, kind: str, folder: Path) -> None:
        import canter
        from canter.text import load_tokenizer

        path = folder / "a.nemo" if kind == "nemo" else folder
        with contextlib.suppress(CanterError):
            load_tokenizer(path)
        model = canter.load(path, device="cpu")
        result = model.transcribe(clip(0.3), language="en" if len(model.languages) > 1 else None)
        _ = result.text, result.segments


class Runs(Area):
    name, cases = "runs", 300

    def prepare(self, folder: Path) -> None:
        import soundfile

        from canter.planning.budget import Budget

        data = folder / "data.audio"
        data.mkdir(parents=True)
        rows = []
        for number in range(12):
            soundfile.write(data / f"{number}.wav", clip(0.4 + number / 20, number), RATE)
            rows.append({"audio_filepath": f"{number}.wav", "duration": 0.4 + number / 20, "text": f"one two {number}",
                         "lang": "en"})  # fmt: skip
        (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (data / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
        Budget.from_batch_seconds(20.0).save(data / "budget.json")
        import canter

        canter.train(self._config(folder, folder / "run", 4), progress=False)

    @staticmethod
    def _config(folder: Path, output: Path, steps: int) -> Any:
        from canter.training.config import ModelShape, TrainConfig

        data = folder / "data.audio"
        return TrainConfig(
            manifest=(data / "train.jsonl",), valid=(data / "valid.jsonl",), output=output, vocab_size=60, steps=steps,
            budget=data / "budget.json", batch_seconds=4.0, workers=0, threads=1, precision="float32", valid_every=2,
            save_every=2, valid_utterances=2, allow_changes=True, track=(), device="cpu",
            model=ModelShape(encoder_layers=1, decoder_layers=1, width=16, heads=2, subsampling_channels=4, mels=16),
        )  # fmt: skip

    def start(self, folder: Path) -> None:
        super().start(folder)
        del self.examples["data.audio"]

    def check(self, kind: str, folder: Path) -> None:
        import canter
        from canter.reporting.run_report import run_report

        for read in (canter.load, run_report):
            with contextlib.suppress(CanterError):
                read(folder)
        canter.train(self._config(self.folder, folder, 5), progress=False)


class Requests(Area):
    name, cases = "requests", 1000
    PATHS = ("/v1/audio/transcriptions",) * 6 + ("/v1/audio/translations", "/v1/models", "/v1/models/small", "/health",
                                                 "/metrics", "/", "/x", "/v1/models/%00", "//",
                                                 "/v1/../health")  # fmt: skip
    FIELDS = ("model", "language", "prompt", "response_format", "temperature", "stream", "timestamp_granularities[]",
              "hotwords", "file", "x", "", "language[]", "chunking_strategy", "suppress_tokens",
              "condition_on_previous_text")  # fmt: skip
    TEXTS = ("small", "whisper-1", "en", "de", "auto", "English", "json", "text", "srt", "vtt", "verbose_json", "0",
             "0.2", "1",
             "true", "false", "word", "segment", "one two", "nan", "1e999", "-1", "2", "\ud800", "é" * 3000,
             "x" * 20000, "\0",
             "<|en|>", "../../x", "", " ", "{}", "[]", "1" * 400)  # fmt: skip
    SOUND: ClassVar = {"model": ("small", "whisper-1"), "language": ("en", "de"), "temperature": ("0", "0.2"),
             "stream": ("true", "false"),
             "response_format": ("json", "text", "srt", "vtt", "verbose_json"),
             "timestamp_granularities[]": ("segment",)}  # fmt: skip
    PART_TYPES = ("audio/wav", "text/plain; charset=punycode", "text/plain; charset=utf-16",
                  "text/plain; charset=rot13", "", "é", 'a/b; c="')  # fmt: skip
    PART_HEADERS = (*(f"\r\nContent-Type: {kind}" for kind in PART_TYPES), "\r\nContent-Transfer-Encoding: base64",
                    "\r\nX: " + "y" * 9000, "\r\nbroken", "\0")  # fmt: skip
    KINDS = ("multipart/form-data", "application/x-www-form-urlencoded", "application/json", "",
             "multipart/mixed; boundary=a",
             "multipart/form-data; boundary={}; charset=punycode", "multipart/form-data; boundary={}; charset=utf-7",
             "multipart/form-data; boundary={}; charset=idna")  # fmt: skip
    HEADERS = ("origin", "authorization", "host", "accept", "content-encoding", "expect", "transfer-encoding", "range",
               "x-forwarded-host", "cookie")  # fmt: skip
    HEADER_VALUES = ("null", "http://localhost:8000", "http://[", "Bearer é", "[::1]", "[", ":", "gzip", "chunked",
                     "é" * 100,
                     "a:b:c", "x" * 70000, "bytes=0-", "")  # fmt: skip

    def prepare(self, folder: Path) -> None:
        import soundfile

        for kind, name in (("wav", "WAV"), ("flac", "FLAC"), ("ogg", "OGG")):
            stream = io.BytesIO()
            soundfile.write(stream, clip(0.4), RATE, format=name)
            write_files(folder / kind, {f"a.{kind}": stream.getvalue()})

    def start(self, folder: Path) -> None:
        super().start(folder)
        import logging

        from canter.inference.engine.requests import EngineConfig
        from canter.serving.app import create_app
        from canter.serving.config import ServiceConfig
        from canter.serving.model import ModelSource
        from canter.serving.service import Service

        logging.disable(logging.CRITICAL)
        model = small_canary(small_parts()[0])
        config = ServiceConfig(
            max_megabytes=1.0, max_seconds=60.0, upload_timeout=5.0,
            hosts=frozenset(("localhost", "127.0.0.1")),
        )  # fmt: skip
        source = ModelSource(("small", "whisper-1"), model, EngineConfig(rows=4, frames=256))
        self.app = create_app(Service([source], config))
        self.loop = asyncio.new_event_loop()
        self.inside = self.app.router.lifespan_context(self.app)
        self.loop.run_until_complete(self.inside.__aenter__())

    def make(self, draw: random.Random) -> tuple[str, Files]:
        """Return a valid request with up to four changes."""
        ((name, data),) = self.examples[draw.choice(sorted(self.examples))].items()
        fields: list[tuple[str, bytes, str, str]] = [("file", data, f'; filename="{name}"', "")]
        for field, values in self.SOUND.items():
            if draw.random() < (0.9 if field == "language" else 0.3):
                fields.append((field, draw.choice(values).encode(), "", ""))
        boundary, method, path, query = "abc", "POST", draw.choice(self.PATHS[:7]), ""
        headers = {"host": "localhost:8000"}
        kind, ends, raw = "multipart/form-data; boundary={}", True, False
        length: str | None = ""
        for _ in range(draw.randrange(5)):
            what, place = draw.randrange(14), draw.randrange(len(fields))
            one = fields[place]
            if what == 0:
                fields[place] = (one[0], harm(draw, one[1]), *one[2:])
            elif what == 1:
                fields[place] = (one[0], draw.choice(self.TEXTS).encode("utf-8", "replace"), *one[2:])
            elif what == 2:
                fields.insert(
                    place, (draw.choice(self.FIELDS), draw.choice(self.TEXTS).encode("utf-8", "replace"), "", "")
                )
            elif what == 3:
                fields.append(one)
            elif what == 4 and len(fields) > 1:
                del fields[place]
            elif what == 5:
                fields[place] = (
                    *one[:2],
                    draw.choice(('; filename="../x"', '; filename="', "; filename*=utf-8''%ff", "")),
                    one[3],
                )
            elif what == 6:
                fields[place] = (*one[:3], draw.choice(self.PART_HEADERS))
            elif what == 7:
                boundary = draw.choice(("", "a" * 300, "é", 'a"b', "--", "a b", "\r\n"))
            elif what == 8:
                kind = draw.choice(self.KINDS)
            elif what == 9:
                headers[draw.choice(self.HEADERS)] = draw.choice(self.HEADER_VALUES)
            elif what == 10:
                length = draw.choice((None, "0", "-1", "x", str(10**12), "1" * 5000))
            elif what == 11:
                raw = True
            elif what == 12:
                ends = False
            else:
                method, path = (draw.choice(("POST", "GET", "PUT", "OPTIONS", "HEAD", "é")), draw.choice(self.PATHS))
                query = draw.choice(("", "model=x", "%ff", "a" * 5000))
        parts = [
            f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"{extra}{more}\r\n\r\n'.encode("utf-8",
                                                                                                          "replace")
            + value + b"\r\n"
            for field, value, extra, more in fields
        ]  # fmt: skip
        body = b"".join(parts) + f"--{boundary}--\r\n".encode("utf-8", "replace")
        body = harm(draw, body) if raw else body
        headers["content-type"] = kind.format(boundary)
        if length is not None:
            headers["content-length"] = length or str(len(body))
        request = {"method": method, "path": path, "headers": headers, "query": query, "ends": ends,
                   "chunks": draw.choice((1, 1, 2, 50))}  # fmt: skip
        return method, {"request.json": json.dumps(request).encode(), "body": body}

    def check(self, kind: str, folder: Path) -> None:
        request = json.loads((folder / "request.json").read_text())
        body = (folder / "body").read_bytes()
        status = self.loop.run_until_complete(asyncio.wait_for(self._ask(request, body), 60))
        if status >= 500 and status != 503:
            raise RuntimeError(f"the service answered {status}")
        if status >= 400:
            raise CanterError(f"the service answered {status}")

    async def _ask(self, request: dict[str, Any], body: bytes) -> int:
        size = -(-len(body) // request["chunks"]) or 1
        chunks = [body[start : start + size] for start in range(0, len(body), size)] or [b""]
        status: list[int] = []

        async def receive() -> dict[str, Any]:
            if not chunks:
                if not request["ends"]:
                    return {"type": "http.disconnect"}
                await asyncio.sleep(30)
                return {"type": "http.disconnect"}
            chunk = chunks.pop(0)
            return {"type": "http.request", "body": chunk, "more_body": bool(chunks) or not request["ends"]}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                status.append(message["status"])

        headers = [(name.encode(), value.encode("latin-1", "replace")) for name, value in request["headers"].items()]
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": request["method"],
            "scheme": "http",
            "path": request["path"], "raw_path": request["path"].encode(), "query_string": request["query"].encode(),
            "root_path": "", "headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000),
        }  # fmt: skip
        await self.app(scope, receive, send)
        return status[0] if status else 499


AREAS: dict[str, type[Area]] = {cls.name: cls for cls in (Manifests, Sounds, Models, Runs, Requests)}


# -- one case --


def made(area: Area, seed: int, number: int) -> tuple[str, Files]:
    """Return the kind of a case and its files; a mutation that cannot be written is drawn again."""
    for attempt in range(100):
        with contextlib.suppress(Exception):
            return area.make(random.Random(f"{seed}/{area.name}/{number}/{attempt}"))
    raise RuntimeError(f"{area.name} {number}: no mutation can be written")


@contextlib.contextmanager
def peak_memory() -> Iterator[Callable[[], float]]:
    """Context manager that yields a function for the peak of the resident memory above its start, in MiB."""

    def resident(name: str) -> int:
        with open("/proc/self/status") as file:
            return next((int(line.split()[1]) for line in file if line.startswith(name)), 0)

    if not Path("/proc/self/clear_refs").exists():
        yield lambda: 0.0
        return
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    yield lambda: max(0.0, (resident("VmHWM") - before) / 1024)


def run_case(area: Area, seed: int, number: int, folder: Path) -> dict[str, Any]:
    """Make a case, let Canter read it, remove its files, and return the result."""
    kind, files = made(area, seed, number)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_files(folder, {name: data for name, data in files.items() if "\0" not in name})
    result: dict[str, Any] = {"case": number, "kind": kind, "outcome": "read"}
    start, begun = time.perf_counter(), time.process_time()
    with peak_memory() as memory:
        try:
            area.check(kind, folder)
        except CanterError:
            result["outcome"] = "refused"
        except BaseException as error:  # a panic of a library's is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            result |= {"outcome": "failed", "error": f"{type(error).__name__}: {str(error)[:300]}",
                       "traceback": traceback.format_exc()[-4000:]}  # fmt: skip
        waited, computed = time.perf_counter() - start, time.process_time() - begun
        result |= {"seconds": round(computed, 3), "waited": round(waited, 3), "mebibytes": round(memory(), 1)}
    shutil.rmtree(folder, ignore_errors=True)
    return result


def work(options: Options) -> None:
    """Run cases in this process and print a line of JSON for each."""
    assert options.worker
    warnings.simplefilter("ignore")
    lines, quiet = os.fdopen(os.dup(1), "w", buffering=1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)  # what libraries print is no result
    area = AREAS[options.worker]()
    area.start(options.output / "sound" / area.name)
    for kind, files in area.examples.items():  # what a first call imports is no case's time
        place = options.output / "case" / area.name
        shutil.rmtree(place, ignore_errors=True)
        write_files(place, files)
        with contextlib.suppress(CanterError, OSError, KeyError):
            area.check(kind, place)
    lines.write(json.dumps({"ready": True}) + "\n")
    for number in range(options.first, options.cases or area.cases):
        lines.write(json.dumps(run_case(area, options.seed, number, options.output / "case" / area.name)) + "\n")


# -- all cases --


def prepare(options: Options, area: type[Area]) -> None:
    target = options.output / "sound" / area.name
    if not target.exists():
        half = target.with_suffix(".partial")
        shutil.rmtree(half, ignore_errors=True)
        area().prepare(half)
        if area is Manifests or area is Runs:  # whose files name each other by their places
            shutil.rmtree(half)
            area().prepare(target)
        else:
            half.rename(target)


def judge(result: dict[str, Any], options: Options) -> dict[str, Any]:
    """Return the result, as failed where the case took too much time or memory."""
    if result["outcome"] != "failed":
        limits = {"seconds": options.seconds, "waited": PATIENCE * options.seconds, "mebibytes": options.mebibytes}
        for name, most in limits.items():
            if result[name] > most:
                return result | {"outcome": "failed", "error": f"{result[name]} {name}, more than {most:g}"}
    return result


def run_area(name: str, options: Options, advance: Callable[[int], None]) -> list[dict[str, Any]]:
    """Run the remaining cases of an area in child processes, and return all results."""
    area = AREAS[name]
    prepare(options, area)
    log = options.output / f"{name}-{options.seed}.jsonl"
    results = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    count = options.cases or area.cases
    results = results[:count]
    advance(len(results))
    maker: Area | None = None
    with log.open("a", encoding="utf-8") as file:
        while len(results) < count:
            command = [sys.executable, __file__, "-o", str(options.output), "--worker", name, "--first",
                       str(len(results)),
                       "--cases", str(count), "--seed", str(options.seed)]  # fmt: skip
            environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            with open(options.output / f"{name}.stderr", "wb") as errors:
                child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment)
                lines = lines_of(child, PATIENCE * options.seconds + 5)
                if next(lines, None) is None:
                    told = (options.output / f"{name}.stderr").read_text(errors="replace")[-3000:]
                    raise SystemExit(f"{name}: the worker did not start:\n{told}")
                for line in lines:
                    result = judge(json.loads(line), options)
                    results.append(result)
                    file.write(json.dumps(result) + "\n")
                    file.flush()
                    keep_failure(options, area, result)
                    advance(1)
                code = child.poll()
                child.kill()
                child.wait()
            if len(results) < count:  # the case under way did not come back
                maker = maker or sound(options, area)
                number = len(results)
                why = (
                    f"ended its process ({code})"
                    if code is not None
                    else f"hung for {PATIENCE * options.seconds + 5:g} s"
                )
                told = (options.output / f"{name}.stderr").read_text(errors="replace")[-3000:]
                kind, _ = made(maker, options.seed, number)
                result = {"case": number, "kind": kind, "outcome": "failed", "error": why, "seconds": 0.0,
                          "waited": 0.0, "mebibytes": 0.0, "traceback": told}  # fmt: skip
                results.append(result)
                file.write(json.dumps(result) + "\n")
                keep_failure(options, area, result)
                advance(1)
    return results


def lines_of(child: subprocess.Popen[bytes], patience: float) -> Iterator[bytes]:
    """Yield a process's lines until it ends or prints nothing for ``seconds`` (at its start, ten times that)."""
    assert child.stdout
    wait = 10 * patience
    buffer = b""
    while True:
        ready, _, _ = select.select([child.stdout], [], [], wait)
        data = os.read(child.stdout.fileno(), 1 << 16) if ready else b""
        if not data:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0.2)
            return
        *whole, buffer = (buffer + data).split(b"\n")
        yield from whole
        wait = patience


@cache
def _started(folder: Path, area: type[Area]) -> Area:
    found = area()
    found.start(folder)
    return found


def sound(options: Options, area: type[Area]) -> Area:
    return _started(options.output / "sound" / area.name, area)


def keep_failure(options: Options, area: type[Area], result: dict[str, Any]) -> None:
    if result["outcome"] != "failed":
        return
    folder = options.output / "failures" / f"{area.name}-{options.seed}-{result['case']}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _, files = made(sound(options, area), options.seed, result["case"])
    write_files(folder / "files", {name: data for name, data in files.items() if "\0" not in name})
    (folder / "error.txt").write_text(f"{result['error']}\n\n{result.get('traceback', '')}", errors="replace")


def replay(options: Options) -> int:
    assert options.replay
    name, number = options.replay
    prepare(options, AREAS[name])
    area = sound(options, AREAS[name])
    kind, files = made(area, options.seed, number)
    folder = options.output / "replay"
    shutil.rmtree(folder, ignore_errors=True)
    write_files(folder, files)
    print(f"{name} {number}: {kind}, {', '.join(files)} in {folder}")
    try:
        area.check(kind, folder)
    except CanterError as error:
        print(f"{type(error).__name__}: {error}")
    return 0


def table(found: dict[str, list[dict[str, Any]]]) -> Any:
    from rich.table import Table

    shown = Table("area", "cases", "read", "refused", "failed", "slowest s", "most MiB")
    for name, results in found.items():
        count = {what: sum(one["outcome"] == what for one in results) for what in ("read", "refused", "failed")}
        slowest, largest = (max((one[what] for one in results), default=0.0) for what in ("seconds", "mebibytes"))
        shown.add_row(
            name, str(len(results)), *(str(number) for number in count.values()), f"{slowest:.2f}", f"{largest:.0f}"
        )
    return shown


def main() -> int:
    """Return the exit status: 1 where a case failed, 2 for an unknown area."""
    options = tyro.cli(Options, description=__doc__)
    options = Options(**{**vars(options), "output": options.output.resolve()})
    if unknown := [name for name in (*options.only, *(options.replay or ())[:1]) if name not in AREAS]:
        print(f"no area named {unknown[0]!r}; there are {', '.join(AREAS)}", file=sys.stderr)
        return 2
    if options.worker:
        work(options)
        return 0
    options.output.mkdir(parents=True, exist_ok=True)
    if options.replay:
        return replay(options)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    found: dict[str, list[dict[str, Any]]] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for name in options.only or AREAS:
            task = progress.add_task(name, total=options.cases or AREAS[name].cases)
            found[name] = run_area(name, options, lambda done, task=task: progress.advance(task, done))
    Console().print(table(found))
    failed = [(name, one) for name, results in found.items() for one in results if one["outcome"] == "failed"]
    kinds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for name, one in failed:
        kinds.setdefault((name, re.sub(r"\d+|/\S+", "#", one["error"])[:100]), []).append(one)
    for (name, _), ones in sorted(kinds.items(), key=lambda item: -len(item[1])):
        numbers = ", ".join(f"{one['case']} ({one['kind']})" for one in ones[:4])
        print(f"{name}: {len(ones)} x {ones[0]['error'].splitlines()[0][:160]}; {numbers}")
    if failed:
        print(f"{len(failed)} failed; their inputs are in {options.output / 'failures'}")
    return bool(failed)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
