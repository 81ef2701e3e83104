"""Data and checkpoints in object storage, on a local server that speaks S3."""

import dataclasses
import io
import json
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import fsspec
import pytest

from canter.cli.main import main
from canter.corpus.remote import below, download_file, files_below, upload_file
from canter.errors import CheckpointError, ConfigError
from canter.training.config import dump_config
from canter.training.recipe import run_training
from canter.training.run.checkpoints import STATE

from ..conftest import Messages, stopping_after


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in lines(folder / "metrics.jsonl") if row["kind"] == "train"}


@pytest.fixture
def uploaded(config, bucket):
    return dataclasses.replace(config, save_every=2, upload=f"{bucket}/runs/a")


def test_a_run_whose_folder_is_gone_is_restored(config, uploaded, tmp_path):
    run_training(dataclasses.replace(config, save_every=2, output=tmp_path / "undisturbed"))
    with pytest.raises(RuntimeError, match="pulled the plug after step 5"):
        run_training(uploaded, stopping_after(5))
    while "checkpoints/step-000004/training/state.json" not in files_below(uploaded.upload):
        time.sleep(0.01)
    shutil.rmtree(uploaded.output)
    said: list[str] = []
    run_training(uploaded, Messages(said))
    assert f"{uploaded.output} has no checkpoint; restoring step-000004 from {uploaded.upload}" in said
    assert "continuing at step 4 of 8" in said
    assert losses(uploaded.output) == losses(tmp_path / "undisturbed")
    there = files_below(uploaded.upload)
    for path in uploaded.output.rglob("*"):
        name = path.relative_to(uploaded.output).as_posix()
        if path.is_file() and not name.startswith((".", "tensorboard")):
            assert there[name] == path.stat().st_size
    assert "checkpoints/step-000002/training/state.json" in there  # nothing is removed there


def test_an_interrupted_upload_is_not_restored_but_completed(uploaded):
    run_training(uploaded)
    files, last = fsspec.filesystem("s3"), f"{uploaded.upload}/checkpoints/step-000008/training"
    files.rm(f"{last}/{STATE}")
    files.rm(f"{last}/optimizers.pt")
    kept = uploaded.output.rename(uploaded.output.with_name("kept"))
    said: list[str] = []
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run_training(uploaded, stopping_after(8, said))
    assert any("restoring step-000006" in line for line in said)
    shutil.rmtree(uploaded.output)
    kept.rename(uploaded.output)
    files.pipe_file(f"{uploaded.upload}/checkpoints/step-000008/model.safetensors", b"of another number of ranks")
    run_training(uploaded)  # at its last step already
    assert {f"checkpoints/step-000008/training/{name}" for name in (STATE, "optimizers.pt")} <= {
        *files_below(uploaded.upload)
    }
    weights = "checkpoints/step-000008/model.safetensors"
    assert files.cat_file(f"{uploaded.upload}/{weights}") == (uploaded.output / weights).read_bytes()


def test_a_failed_upload_is_one_line_and_training_continues(uploaded):
    said: list[str] = []
    url = "s3://no-such-bucket/runs/a"
    done = run_training(dataclasses.replace(uploaded, upload=url), Messages(said))
    assert done.progress.step == 8
    failures = [line for line in said if "not uploaded" in line]
    assert failures
    assert all(line.startswith(f"--upload {url}: not uploaded (") and "\n" not in line for line in failures)
    assert "bucket does not exist" in failures[0]
    assert not fsspec.filesystem("s3").exists("no-such-bucket")  # a misspelt bucket is not made


@pytest.fixture
def no_server(bucket, monkeypatch):
    """The URL of a bucket whose server has gone."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{found.getsockname()[1]}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    files = fsspec.get_filesystem_class("s3")
    files.clear_instance_cache()  # they keep the address that they were made with
    yield bucket
    files.clear_instance_cache()


def test_storage_that_cannot_be_reached(config, no_server):
    """A new run does not start, as it may have to be restored; one with a checkpoint resumes."""
    away = dataclasses.replace(config, upload=f"{no_server}/runs/a")
    with pytest.raises(
        ConfigError, match=r"--upload s3://.* cannot be read \(.* refuses the connection\), and .*run has"
    ):
        run_training(away)
    run_training(config)
    said: list[str] = []
    assert run_training(away, Messages(said)).progress.step == 8
    assert f"training resumes from {config.output}" in said[0]
    assert "not uploaded" in said[-1]


def test_what_else_the_url_may_hold(uploaded, tmp_path):
    run_training(dataclasses.replace(uploaded, steps=2))
    other = dataclasses.replace(uploaded, steps=2, seed=1, output=tmp_path / "other")
    with pytest.raises(ConfigError, match=r"holds a run of another configuration \(seed: 0 -> 1\)"):
        run_training(other)
    weights = f"{uploaded.upload}/checkpoints/step-000002/model.safetensors"
    (tmp_path / "bad").write_bytes(b"x" * files_below(uploaded.upload)["checkpoints/step-000002/model.safetensors"])
    upload_file(tmp_path / "bad", weights)
    with pytest.raises(CheckpointError, match=r"step-000002 is damaged .model.safetensors is not as it was written"):
        run_training(dataclasses.replace(uploaded, steps=2, output=tmp_path / "third"))
    with pytest.raises(ConfigError, match="--upload runs/a is not a URL"):
        dataclasses.replace(uploaded, upload="runs/a")


def test_copies_are_exact(bucket, tmp_path):
    (tmp_path / "a").write_bytes(bytes(range(256)) * 999)
    upload_file(tmp_path / "a", f"{bucket}/x/y/a")
    upload_file(tmp_path / "a", f"{bucket}/xx/b")
    assert files_below(f"{bucket}/x") == {"y/a": 255744}
    assert files_below(f"{bucket}/absent") == {}
    download_file(below(bucket, "x/y/a"), tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


def pack(target: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(target, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return target


@pytest.fixture
def data(spoken, tmp_path) -> Path:
    """Manifests with audio files, with NeMo's tars and a WebDataset, each of a part of the corpus."""
    folder = tmp_path / "data"
    (folder / "wav").mkdir(parents=True)
    rows = lines(Path(spoken.train_manifest))
    parts = rows[:10], rows[10:20], rows[20:30], rows[30:]
    audio = {row["audio_filepath"]: (Path(spoken.train_manifest).parent / row["audio_filepath"]) for row in rows}
    plain = []
    for row in parts[0]:
        source = audio[row["audio_filepath"]]
        shutil.copy(source, folder / "wav" / source.name)
        plain.append(row | {"audio_filepath": f"wav/{source.name}"})
    (folder / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    for shard in (0, 1):
        members = [(row, audio[row["audio_filepath"]]) for row in parts[1 + shard]]
        pack(folder / f"audio_{shard}.tar", {path.name: path.read_bytes() for _, path in members})
        tarred = [row | {"audio_filepath": path.name, "shard_id": shard} for row, path in members]
        (folder / f"manifest_{shard}.json").write_text("".join(json.dumps(row) + "\n" for row in tarred))
    samples: dict[str, bytes] = {}
    for number, row in enumerate(parts[3]):
        path = audio[row["audio_filepath"]]
        samples |= {f"{number:03d}{path.suffix}": path.read_bytes(), f"{number:03d}.txt": row["text"].encode()}
    pack(folder / "web.tar", samples)
    return folder


def mixture(target: Path, base: str) -> Path:
    sources = ["plain.jsonl", "manifest_{0..1}.json::" + f"{base}/" + "audio_{0..1}.tar", "web.tar"]
    target.write_text("".join(f'- path: "{base}/{one}"\n' for one in sources))
    return target


def test_training_and_transcription_from_object_storage(config, data, bucket, tmp_path, capsys):
    for path in data.rglob("*"):
        if path.is_file():
            upload_file(path, f"{bucket}/data/{path.relative_to(data).as_posix()}")
    short = dataclasses.replace(config, valid=(), steps=4)
    here = mixture(tmp_path / "here.yaml", str(data))
    run_training(dataclasses.replace(short, manifest=(here,), output=tmp_path / "here"))
    there = mixture(tmp_path / "there.yaml", f"{bucket}/data")
    remote = dataclasses.replace(short, manifest=(there,), output=tmp_path / "there", workers=1)
    (tmp_path / "config.yaml").write_text(dump_config(remote))
    command = [sys.executable, "-m", "canter", "train", str(tmp_path / "config.yaml")]
    subprocess.run(command, check=True, timeout=600, capture_output=True)  # workers have the environment of its start
    assert losses(tmp_path / "there") == losses(tmp_path / "here")
    utterances = [row["rows"] for row in lines(tmp_path / "there" / "utterances.jsonl")]
    assert utterances == [row["rows"] for row in lines(tmp_path / "here" / "utterances.jsonl")]
    shutil.rmtree(tmp_path / "here")
    found = []
    for base in (str(data), f"{bucket}/data"):
        for name in ("plain.jsonl", "manifest_1.json::" + f"{base}/audio_1.tar"):
            out = tmp_path / "out.jsonl"
            assert main(["transcribe", str(tmp_path / "there"), f"{base}/{name}", "-o", str(out)]) == 0
            found.append([(row["text"], row["pred_text"]) for row in lines(out)])
            out.unlink()
    assert found[:2] == found[2:]
    assert [len(rows) for rows in found] == [10] * 4
    capsys.readouterr()
