"""Models of transformers' architectures through the commands: tune, train, resume, transcribe, info."""

import copy
import itertools
import json
import shutil
import sys

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

import canter
from canter.cli.main import main
from canter.corpus.index import LengthIndex
from canter.corpus.manifest import write_manifest
from canter.errors import AudioError
from canter.planning.budget import Budget

transformers = pytest.importorskip("transformers")

from canter.integrations.transformers import TransformersModel  # noqa: E402

from .small_transformers import START, built, clips, make, word_tokenizer  # noqa: E402

SECONDS = (1.3, 2.0, 0.6, 1.1, 0.9, 1.7)
LANGUAGES = {"eng": 4, "deu": 5}


def saved(family, folder):
    """A folder as transformers writes it, of random weights."""
    model, extractor = copy.deepcopy(built(family).model), built(family).extractor
    if family == "seamless":
        model.generation_config.text_decoder_lang_to_code_id = LANGUAGES
        model.generation_config._from_model_config = False  # as in their released folder: it is read as it is
    tokenizer = word_tokenizer(pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    for part in (model, extractor, tokenizer):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A manifest of six clips, and a budget."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = []
    for number, audio in enumerate(clips(SECONDS)):
        soundfile.write(folder / f"{number}.wav", audio, 16000)
        text = " ".join(f"w{7 + (number + place) % 20}" for place in range(2 + number % 3))
        rows.append(
            {
                "audio_filepath": f"{number}.wav",
                "duration": SECONDS[number],
                "text": text,
                "lang": "deu" if number % 2 else "eng",
            }
        )
    write_manifest(folder / "train.jsonl", rows)
    Budget.from_batch_seconds(60.0).save(folder / "budget.json")
    return folder


def command(corpus, init, output, *more):
    data = str(corpus / "train.jsonl")
    return main(
        ["train", "--manifest", data, "--valid", data, "--init", str(init), "--output", str(output), "--budget",
         str(corpus / "budget.json"), "--loss.ctc-weight", "0", "--loss.ctc-warmup", "0", "--optimizer.name", "adamw",
         "--batch-seconds", "3", "--steps", "4", "--valid-every", "2", "--valid-utterances", "2",
         "--workers", "0", "--threads", "1",
         "--precision", "float32", *more]
    )  # fmt: skip


def losses(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize("family", ["moonshine", "speech_to_text", "seamless"])
def test_trained_resumed_and_transcribed(family, corpus, tmp_path, capsys):
    """Speech2Text has dropout, SeamlessM4T masks that NumPy draws: both follow the run's seed."""
    init, run = saved(family, tmp_path / "init"), tmp_path / "run"
    assert command(corpus, init, run, "--augment.speed", "0.9", "1.1", "--optimizer.ema", "0.5") == 0
    newest = run / "checkpoints" / "step-000004"
    first, weights = losses(run), load_file(newest / "model.safetensors")
    assert [step for step, _ in first] == [1, 2, 3, 4]
    before = load_file(init / "model.safetensors")
    assert weights.keys() == before.keys()
    assert any(not torch.equal(x, before[name]) for name, x in weights.items())

    shutil.rmtree(newest)  # as if the run had been killed before it was written
    (run / "checkpoints" / "best.json").unlink()
    shutil.rmtree(init)
    assert command(corpus, init, run, "--augment.speed", "0.9", "1.1", "--optimizer.ema", "0.5") == 0
    assert "continuing at step 2 of 4" in " ".join(capsys.readouterr().err.split())
    assert losses(run) == first
    again = load_file(newest / "model.safetensors")
    assert all(torch.equal(x, again[name]) for name, x in weights.items())

    ours = TransformersModel.from_pretrained(newest)
    theirs = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(newest)
    assert all(torch.equal(x, ours.model.state_dict()[name]) for name, x in theirs.state_dict().items())
    data = str(corpus / "train.jsonl")
    assert main(["transcribe", str(run), data, "--output", str(tmp_path / "x.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    best = json.loads((run / "checkpoints" / "best.json").read_text())["checkpoint"]
    ours = TransformersModel.from_pretrained(run / "checkpoints" / best)
    audio = [soundfile.read(corpus / f"{number}.wav", dtype="float32")[0] for number in range(6)]
    prompts = [[START, LANGUAGES[row["lang"]]] if family == "seamless" else [START] for row in rows]
    expected = [ours.tokenizer.decode(tokens) for tokens in ours.transcribe(audio, prompts)]
    assert [row["pred_text"] for row in rows] == expected
    assert len({*expected}) > 1
    if family == "moonshine":
        assert main(["report", str(run)]) == 0


def test_an_adapter_is_trained_resumed_merged_and_loaded(corpus, tmp_path, capsys):
    init, run = saved("moonshine", tmp_path / "init"), tmp_path / "run"
    lora = ("--lora.rank", "2", "--lora.targets", "q_proj", "fc?", "--optimizer.learning-rate", "0.01")
    assert command(corpus, init, run, *lora) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "LoRA of rank 2 on 14 linear layers (" in said, said[said.find("LoRA of") :][:200]
    newest = run / "checkpoints" / "step-000004"
    first, weights = losses(run), load_file(newest / "adapter_model.safetensors")
    assert {name.rpartition("_")[0] for name in weights} >= {"base_model.model.model.encoder.layers.0.mlp.fc1.lora"}
    shutil.rmtree(newest)
    (run / "checkpoints" / "best.json").unlink()
    assert command(corpus, init, run, *lora) == 0
    assert losses(run) == first
    again = load_file(newest / "adapter_model.safetensors")
    assert all(torch.equal(x, again[name]) for name, x in weights.items())
    assert main(["convert", str(newest), str(tmp_path / "merged"), "--merge", "--format", "huggingface"]) == 0
    texts = []
    data = str(corpus / "train.jsonl")
    for number, arguments in enumerate(([str(tmp_path / "merged")], [str(newest)], [str(init), "--adapter", str(run)])):
        output = tmp_path / f"{number}.jsonl"
        assert main(["transcribe", arguments[0], data, *arguments[1:], "--output", str(output)]) == 0
        texts.append([json.loads(line)["pred_text"] for line in output.read_text().splitlines()])
    assert texts[0] == texts[1]
    best = json.loads((run / "checkpoints" / "best.json").read_text())["checkpoint"]
    assert texts[2] == texts[1] or best != "step-000004"


@pytest.fixture(scope="module")
def moonshine(tmp_path_factory):
    return saved("moonshine", tmp_path_factory.mktemp("models") / "moonshine")


def test_long_audio_is_cut_and_timed(moonshine, tmp_path):
    audio = np.concatenate([np.concatenate([clip, np.zeros(8000, np.float32)]) for clip in clips(SECONDS)])
    soundfile.write(tmp_path / "long.wav", audio, 16000)
    arguments = ["transcribe", str(moonshine), str(tmp_path / "long.wav"), "--chunk-seconds", "3"]
    assert main([*arguments, "--output", str(tmp_path / "x.json")]) == 0
    segments = json.loads((tmp_path / "x.json").read_text())["segments"]
    assert len(segments) >= 3
    bounds = [(segment["start"], segment["end"]) for segment in segments]
    assert all(0 < end - start <= 3.01 for start, end in bounds)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(bounds))
    # without pauses to cut in, windows follow one another: nothing could join what overlaps
    assert main([*arguments, "--vad", "none", "--output", str(tmp_path / "y.json")]) == 0
    starts = [segment["start"] for segment in json.loads((tmp_path / "y.json").read_text())["segments"]]
    assert starts == pytest.approx([3.0 * number for number in range(len(starts))], abs=0.02)
    assert len(starts) == -(-len(audio) // 48000)


@pytest.fixture(scope="module")
def speech_to_text(tmp_path_factory):
    return saved("speech_to_text", tmp_path_factory.mktemp("models") / "speech_to_text")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A folder with two sound clips, and one that is shorter than the window of Speech2Text's filterbank."""
    folder = tmp_path_factory.mktemp("mixed")
    for name, clip in zip(("a", "short", "z"), clips([1.0, 0.005, 0.7])):
        soundfile.write(folder / f"{name}.wav", clip, 16000)
    return folder


def test_a_file_that_the_library_cannot_take_fails_by_itself(speech_to_text, mixed, tmp_path, capsys):
    out = tmp_path / "x.jsonl"
    assert main(["transcribe", str(speech_to_text), str(mixed), "--output", str(out)]) == 1
    rows = {row["audio_filepath"]: row for row in map(json.loads, out.read_text().splitlines())}
    texts = {name: rows[str(mixed / f"{name}.wav")].get("pred_text") for name in ("a", "short", "z")}
    assert texts["a"]
    assert texts["z"]
    assert "pred_text" not in rows[str(mixed / "short.wav")]
    assert "2 of 3 transcribed; 1 failed" in (said := capsys.readouterr().err)
    assert f"{mixed / 'short.wav'}: transformers Speech2TextForConditionalGeneration fails on 0.01 s" in said
    results = list(canter.load(str(speech_to_text)).transcribe([mixed]))
    assert [result.text or None for result in results] == [texts["a"], None, texts["z"]]
    assert [result.error is None for result in results] == [True, False, True]
    with pytest.raises(AudioError, match=r"fails on 0.01 s of this audio"):
        canter.load(str(speech_to_text)).transcribe(mixed / "short.wav")


def test_validation_counts_what_the_library_cannot_take_as_empty(speech_to_text, mixed, corpus, tmp_path, capsys):
    rows = [(str(mixed / "a.wav"), 1.0), (str(mixed / "short.wav"), 0.005)]
    write_manifest(
        tmp_path / "valid.jsonl",
        [{"audio_filepath": path, "duration": seconds, "text": "w7 w8"} for path, seconds in rows],
    )
    more = ["--valid", str(tmp_path / "valid.jsonl"), "--steps", "2"]
    assert command(corpus, speech_to_text, tmp_path / "run", *more) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "1 validation utterances count as empty transcripts: transformers Speech2Text" in said


def test_bench(speech_to_text, mixed, tmp_path, capsys):
    out = tmp_path / "bench.json"
    options = ["--repeats", "1", "--latency-utterances", "1", "--beam-size", "2", "--output", str(out)]
    assert main(["bench", str(speech_to_text), "--audio", str(mixed), *options]) == 0
    assert "left out: transformers Speech2TextForConditionalGeneration fails on" in capsys.readouterr().err
    found = json.loads(out.read_text())
    assert (found["clips"], found["left_out"]) == (2, 1)
    assert list(found["systems"]) == ["canter float32", "canter float32, 2 beams"]
    assert main(["bench", str(speech_to_text), "--utterances", "1", "--repeats", "1"]) == 0


def test_info_says_what_the_model_supports(moonshine, capsys):
    assert main(["info", str(moonshine), "--json"]) == 0
    supports = json.loads(capsys.readouterr().out)["supports"]
    assert supports["serve"] is supports["bench"] is True
    assert supports["convert"] is supports["--timestamps word"] is False
    assert main(["info", str(moonshine)]) == 0
    works, lacks = capsys.readouterr().out.splitlines()[-2:]
    assert works.removeprefix("supports: ").split(", ") == [name for name, value in supports.items() if value]
    assert lacks.removeprefix("not: ").split(", ") == [name for name, value in supports.items() if not value]


def test_beams(moonshine, corpus, tmp_path, capsys):
    assert main(["transcribe", str(moonshine), str(corpus / "2.wav"), "--beam-size", "3"]) == 0
    model = TransformersModel.from_pretrained(moonshine)
    audio = soundfile.read(corpus / "2.wav", dtype="float32")[0]
    expected = model.transcribe([audio], num_beams=3, length_penalty=0.0)[0]
    assert capsys.readouterr().out.strip() == model.tokenizer.decode(expected)


def test_tune_and_info(moonshine, corpus, tmp_path, capsys):
    budget, lengths = tmp_path / "budget.json", tmp_path / "lengths.arrow"
    LengthIndex(np.linspace(0.5, 2, 40).astype(np.float32), np.arange(40) % 8 + 3).save(lengths)
    options = ["--index", str(lengths), "--probes", "6", "--threads", "1", "--memory", "500MB"]
    assert main(["tune", str(moonshine), *options, "-o", str(budget)]) == 0
    measured = Budget.load(budget).measured_on
    assert measured["model_shape"].startswith("transformers MoonshineForConditionalGeneration, ")
    assert Budget.load(budget).frame_seconds == pytest.approx(0.024, rel=1e-2)
    assert main(["info", str(moonshine), "--seconds", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    model = TransformersModel.from_pretrained(moonshine)
    parts = told["parameters"]
    assert parts["total"] == sum(p.numel() for p in model.parameters()) == sum(parts.values()) - parts["total"]
    assert told["config"]["encoder"] == {"kind": "MoonshineEncoder", "layers": 2, "width": 16}
    assert told["utterance"]["frames"] == model.exact_frames(2.0)
    assert told["utterance"]["encoder_flops"] > told["utterance"]["decoder_flops"] > 0
    assert told["utterance"]["training_bytes"] > 0
    assert told["utterance"]["cache_values"] == 2 * 2 * 16 * (model.exact_frames(2.0) + 8)
    assert main(["info", str(moonshine)]) == 0
    assert "MoonshineDecoder" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--loss.ctc-weight", "0.3"], "no CTC head"),
        (["--augment.time-masks", "2"], "--augment masks: --init"),
        (["--compile"], "--compile: --init"),
        (["--pad-seconds", "0"], "--pad-seconds: --init"),
        (["--parallel", "shard"], "--parallel shard: --init"),
    ],
)
def test_what_training_has_nothing_for_takes_one_line(moonshine, corpus, tmp_path, capsys, more, says):
    assert command(corpus, moonshine, tmp_path / "run", *more) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert says in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["transcribe", "{model}", "{clip}", "--timestamps", "word"], "--timestamps word"),
        (["transcribe", "{model}", "{clip}", "--precision", "int8"], "--precision int8"),
        (["transcribe", "{model}", "{clip}", "--ctc-weight", "0.3"], "--ctc-weight: "),
        (["transcribe", "{model}", "{clip}", "--max-repeats", "1"], "--max-repeats: "),
        (["transcribe", "{model}", "{clip}", "--prompt", "w7"], "this model takes no text before what it transcribes"),
        (["transcribe", "{model}", "{clip}", "--task", "translate"], "cannot translate"),
        (["serve", "{model}", "--port", "0", "--precision", "int8"], "--precision int8: "),
        (["serve", "{model}", "--port", "0", "--max-repeats", "1"], "--max-repeats: "),
        (["bench", "{model}", "--precision", "int8"], "--precision int8: "),
        (["bench", "{model}", "--against", "transformers"], "--against: "),
        (["reshape", "{model}", "-o", "{tmp}/x", "--decoder-layers", "1"], "model_type is 'moonshine'"),
        (["convert", "{model}", "{tmp}/x"], "model_type is 'moonshine'"),
        (["convert", "{model}", "{tmp}/x.nemo"], "cannot be converted, reshaped or extended"),
        (["tune", "{model}", "--compile", "-o", "{tmp}/b.json"], "--compile: "),
    ],
)
def test_what_other_commands_have_nothing_for_takes_one_line(moonshine, corpus, tmp_path, capsys, arguments, says):
    filled = [part.format(model=moonshine, clip=corpus / "0.wav", tmp=tmp_path) for part in arguments]
    assert main(filled) == 1
    said = capsys.readouterr().err
    assert says in said
    assert "Traceback" not in said
    assert not any(tmp_path.iterdir())


def test_languages_must_be_the_models(corpus, tmp_path, capsys):
    init = saved("seamless", tmp_path / "init")
    assert main(["transcribe", str(init), str(corpus / "0.wav")]) == 1
    assert "names no language, and the model knows deu, eng" in capsys.readouterr().err
    assert main(["transcribe", str(init), str(corpus / "0.wav"), "--language", "fra"]) == 1
    assert "'fra' (French) is not a language of this model; it knows deu, eng" in capsys.readouterr().err
    rows = [json.loads(line) for line in (corpus / "train.jsonl").read_text().splitlines()]
    silent = [{**row, "audio_filepath": str(corpus / row["audio_filepath"])} for row in rows]
    for row in silent:
        del row["lang"]
    write_manifest(tmp_path / "train.jsonl", silent)
    more = ["--manifest", str(tmp_path / "train.jsonl")]
    assert command(corpus, init, tmp_path / "run", *more) == 1
    assert "names no language, and the model writes deu, eng" in capsys.readouterr().err


def test_without_transformers(moonshine, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["info", str(moonshine)]) == 1
    assert "needs transformers, which is not installed: pip install 'canter[hf]'" in capsys.readouterr().err


def test_damaged_folders(moonshine, tmp_path):
    from canter.errors import CheckpointError

    def copy(name):
        return shutil.copytree(moonshine, tmp_path / name)

    without = copy("without")
    weights = load_file(without / "model.safetensors")
    del weights["model.encoder.layers.0.self_attn.q_proj.weight"]
    save_file(weights, without / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 missing: model.encoder.layers.0.self_attn.q_proj.weight"):
        TransformersModel.from_pretrained(without)
    cut = copy("cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        TransformersModel.from_pretrained(cut)
    pickled = copy("pickled")
    (pickled / "model.safetensors").unlink()
    torch.save(weights, pickled / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing; .*pickled weights are not read"):
        TransformersModel.from_pretrained(pickled)


def test_a_save_that_fails_leaves_nothing(moonshine, tmp_path, monkeypatch):
    model = TransformersModel.from_pretrained(moonshine)

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(type(model.extractor), "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        model.save(tmp_path / "x")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["moonshine", "speech_to_text", "seamless", "canary", "whisper"])
def test_activations_recomputed_give_the_same_gradient(family):
    model = TransformersModel(*make(family)).train()
    audio = torch.from_numpy(np.stack(clips([1.0, 1.0])))

    def gradient():
        torch.manual_seed(0)
        features = model.features(audio, torch.tensor([16000, 16000]))
        logits = model.model(
            **dict(zip((model.model.main_input_name, "attention_mask"), features)),
            decoder_input_ids=torch.full((2, 4), 7),
            use_cache=False,
        ).logits
        model.zero_grad()
        logits.square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradient()
    model.recompute_activations()
    assert model.recomputes == model.model.supports_gradient_checkpointing
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradient(), plain, strict=True))
    model.recompute_activations(False)
    assert not model.recomputes
