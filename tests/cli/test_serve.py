"""`canter serve` as a program: its messages, how it ends, and settings that it refuses."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")

import torch

from canter.cli.main import main
from canter.cli.serve import SPINS, adapters_of_models
from canter.errors import ConfigError
from canter.models.decoder import DecoderConfig
from canter.models.fastconformer import FastConformerConfig
from canter.models.features import FeatureConfig
from canter.models.formats.checkpoint import save_model
from canter.models.model import ModelConfig, SpeechModel
from canter.serving.config import ServiceConfig
from canter.serving.model import ModelSource, load_in_thread
from canter.text import train_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    tokenizer = train_tokenizer(["one two three", "four five"] * 20, languages=["en"], vocab_size=30)
    torch.manual_seed(0)
    encoder = FastConformerConfig(layers=1, width=16, heads=2, feedforward=32, subsampling_channels=4, mels=16)
    decoder = DecoderConfig(layers=1, width=16, heads=2, feedforward=32, vocabulary=tokenizer.vocab_size, positions=64)
    model = SpeechModel(ModelConfig(FeatureConfig(mels=16), encoder, decoder))
    return save_model(model, tmp_path_factory.mktemp("serve") / "little", tokenizer)


def started(folder: Path, *arguments: str) -> tuple[subprocess.Popen, str, str]:
    """Return the process, its address, and its first line."""
    process = subprocess.Popen(
        [sys.executable, "-m", "canter", "serve", str(folder), *arguments, "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    found = re.search(r"http://\S+:\d+/", line)
    assert found, line + process.stderr.read()
    return process, found[0], line


@pytest.mark.parametrize(
    ("host", "how", "code"), [("127.0.0.1", signal.SIGINT, 0), ("0.0.0.0", signal.SIGTERM, -signal.SIGTERM)]
)
def test_serves_until_a_signal(folder, host, how, code):
    """The service is for this machine only by default; otherwise it warns that any client may use it."""
    process, url, line = started(folder, *([] if host == "127.0.0.1" else ["--host", host]))
    assert process.stderr is not None
    try:
        assert line.startswith(f"little on http://{host}:")
        health = {}
        for _ in range(100):
            try:
                health = json.load(urlopen(f"{url}health", timeout=1800))
                break
            except OSError:
                continue
        assert health["model"] == "little"
    finally:
        process.send_signal(how)
        # not communicate(): it would lose what came together with the first line
        with process.stderr:
            said = process.stderr.read()
    assert process.wait(timeout=1800) == code
    assert "Traceback" not in said
    assert ("any client may use this address" in said) == (host == "0.0.0.0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "absent does not exist"),
        (["MODEL", "--port", "TAKEN"], "choose another --host or --port"),
        (["MODEL", "--port", "70000"], "choose another --host or --port"),
        (["MODEL", "--host", "192.0.2.1"], "choose another --host"),
        (["MODEL", "--language", "xx"], "--language: 'xx' is not a language of this model; it knows en"),
        (["MODEL", "--max-requests", "0"], "--max-requests is 0"),
        (["MODEL", "--max-repeats", "-1"], "--max-repeats -1: give 0 (no limit) or more"),
        (["MODEL", "--adapter", "a", "b"], "--adapter a b: name each of several adapters once"),
        (["MODEL", "--adapter", "a=x", "b"], "name each of several adapters once"),
        (["MODEL", "--adapter", "a=x", "a=y"], "name each of several adapters once"),
        (["MODEL", "--name", "a", "--adapter", "a=x"], "--adapter a: that is a name of the model itself"),
        (["MODEL", "--adapter", "a=absent"], "adapter absent"),
        (["MODEL", "--device", "cuda"], "no GPU is available"),
        ([], "name at least one model"),
        (["MODEL", "other=MODEL", "--name", "a"], "--name is for one model; give several models names as in NAME="),
        (["MODEL", "MODEL"], "'little' would name two models or adapters"),
        (["MODEL", "other=absent"], "absent does not exist"),
        (["MODEL", "other=MODEL", "--adapter", "x"], "--adapter x: several models are served; name it as in"),
        (["MODEL", "other=MODEL", "--adapter", "a=lora"], "trained on somewhere/else, which is none of the models"),
        (["MODEL", "other=MODEL", "--adapter", "a=ours"], "which is several of the models here; say which it changes"),
        (["MODEL", "--memory", "1kB"], "little takes 4 MiB, caches of 64 rows included, more than the 0 MiB of"),
        (["MODEL", "--adapter", "a=x", "a@little=y"], "'a' names another adapter of that model too"),
        (["MODEL", "--memory", "much"], "--memory is 'much'; give a size such as 80GiB"),
        (["MODEL", "--api-keys", "absent.txt"], "cannot be read"),
        (["MODEL", "--api-keys", "empty.txt"], "holds no key"),
    ],
)
def test_misuse_is_one_line(folder, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n\n")
    for name, base in (("lora", "somewhere/else"), ("ours", str(folder))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        names = {"MODEL": str(folder), "TAKEN": str(taken.getsockname()[1])}
        if "--port" not in arguments:
            arguments = [*arguments, "--port", "0"]
        for name, value in names.items():
            arguments = [re.sub(rf"\b{name}\b", value, argument) for argument in arguments]
        assert main(["serve", *arguments]) == 1
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.startswith("canter: ")
    assert errors.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="torch has GNU's OpenMP there")
def test_threads_look_out_for_a_moment():
    """OpenMP prints its settings when it is loaded; the command sets this one."""
    names = {*os.environ} - {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    environment = {**{name: os.environ[name] for name in names}, "OMP_DISPLAY_ENV": "VERBOSE"}
    command = [sys.executable, "-m", "canter", "serve", "absent"]
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert f"GOMP_SPINCOUNT = '{SPINS}'" in done.stderr


@pytest.mark.parametrize("own", [{"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "PASSIVE"}])
def test_how_threads_wait_is_left_to_the_user(monkeypatch, own):
    monkeypatch.setattr(os, "environ", dict(own))
    assert main(["serve", "absent"]) == 1
    assert os.environ == own


@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads in /proc")
def test_loading_leaves_no_threads(folder):
    """OpenMP's threads sleep instead of spinning while there are more of them than cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # which makes a thread of another kind
    before = {*os.listdir("/proc/self/task")}
    try:
        load_in_thread(ModelSource(("little",), folder, device="cpu"), ServiceConfig()).result().close()
    finally:
        torch.set_num_threads(threads)
    for _ in range(30_000):  # they end a moment after the thread whose they are
        left = {*os.listdir("/proc/self/task")} - before
        if not left:
            break
        time.sleep(0.01)
    assert not left


def test_an_adapter_finds_the_model_that_it_was_trained_on(tmp_path):
    """By path, hub name, or the only model whose last part is the same; or by the name that is given with it."""
    models = [("runs/first", ("first", "whisper-1")), ("openai/whisper-tiny", ("tiny", "openai/whisper-tiny"))]
    checkpoints = [tmp_path / "runs/first/checkpoints/step-10", tmp_path / "cache/whisper-tiny"]

    def adapter(name: str, base: str | None) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        return folder

    given = {
        "a": adapter("by-path", str(checkpoints[0])),
        "b": adapter("by-hub-name", "openai/whisper-tiny"),
        "c": adapter("moved", "/elsewhere/whisper-tiny"),
        "d@first": adapter("stated", "openai/whisper-tiny"),
        "e@tiny": adapter("unknown", None),
    }
    assert adapters_of_models(given, models, checkpoints) == [
        {"a": given["a"], "d": given["d@first"]},
        {"b": given["b"], "c": given["c"], "e": given["e@tiny"]},
    ]
    assert adapters_of_models({"x": given["c"]}, models[:1], checkpoints[:1]) == [{"x": given["c"]}]
    with pytest.raises(ConfigError, match=r"a model that it does not name, which is none.* one of first, tiny"):
        adapters_of_models({"e": given["e@tiny"]}, models, checkpoints)


def test_several_models_and_which_are_loaded(folder):
    process, url, line = started(folder, f"other={folder}", "--memory", "6MiB")
    assert process.stderr is not None
    try:
        assert line.startswith("little, other on http://127.0.0.1:")
        told = process.stderr.readline()
        assert told == "canter: 4 MiB of 6 MiB of memory are for little (4 MiB); loaded on demand: other (4 MiB)\n"
        data = json.load(urlopen(f"{url}v1/models", timeout=1800))["data"]
        assert [one["id"] for one in data] == ["little", "other"]
    finally:
        process.send_signal(signal.SIGINT)
        with process.stderr:
            said = process.stderr.read()
    assert (process.wait(timeout=1800), said) == (0, "")


SLOW_LOADING = """
import sys, time
import canter.loading
from canter.cli.main import main

def load_module(*_, **__):
    print("loading", file=sys.stderr, flush=True)
    time.sleep(3600)

canter.loading.load_module = load_module
sys.exit(main(sys.argv[1:]))
"""


def test_it_can_be_interrupted_while_the_model_loads(folder):
    """Ctrl-C ends the process at once, although the loading thread cannot be stopped."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_LOADING, "serve", str(folder), "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    with process.stderr:
        assert process.stderr.readline() == "loading\n"
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.wait(timeout=1800) == 130
    assert said == "canter: interrupted while the model was loading\n"
