"""`import canter` as a user's program meets it: loading, transcribing one recording and many, plans, scores."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import canter
from canter.cli.main import main
from canter.models.decoder import DecoderConfig
from canter.models.fastconformer import FastConformerConfig
from canter.models.features import FeatureConfig, WhisperFeatureConfig
from canter.models.formats.checkpoint import save_model
from canter.models.model import ModelConfig, SpeechModel
from canter.models.whisper import WhisperEncoderConfig
from canter.text import WhisperTokenizer, train_tokenizer

SHARED = os.environ.get("CANTER_SHARED")
needs_shared = pytest.mark.skipif(not SHARED, reason="CANTER_SHARED names no folder with a Whisper model and speech")
SEED = 35  # of weights with which greedy texts differ from clip to clip, and with the prompt
SENTENCES = ["one two three", "four five six seven", "eight nine ten", "three one two", "the end of it all"]


def sharpened(model: SpeechModel) -> SpeechModel:
    """The model with random weights under which what it writes depends on what it hears."""
    torch.manual_seed(SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
        for layer in model.decoder.layers:
            layer.cross_attention.query.weight *= 8
            layer.cross_attention.value.weight *= 4
            layer.self_attention.query.weight *= 8
            layer.self_attention.value.weight *= 4
    return model.eval()


@pytest.fixture(scope="module")
def canary_folder(tmp_path_factory) -> Path:
    """A small Canary in English and German, saved."""
    tokenizer = train_tokenizer(SENTENCES * 20, languages=["en", "de"], vocab_size=40)
    torch.manual_seed(SEED)
    encoder = FastConformerConfig(layers=2, width=32, heads=2, feedforward=64, subsampling_channels=8, mels=16)
    decoder = DecoderConfig(layers=2, width=48, heads=4, feedforward=96, vocabulary=tokenizer.vocab_size, positions=64)
    model = sharpened(SpeechModel(ModelConfig(FeatureConfig(mels=16), encoder, decoder)))
    with torch.no_grad():
        model.decoder.head_bias[[tokenizer.special_id(token) for token in tokenizer.special]] = -1000.0
        model.decoder.head_bias[tokenizer.end] = 1.0
    return save_model(model, tmp_path_factory.mktemp("canary") / "model", tokenizer)


@pytest.fixture(scope="module")
def canary(canary_folder) -> canter.Recognizer:
    return canter.load(canary_folder, device="cpu")


@pytest.fixture(scope="module")
def whisper(whisper_bytes, tmp_path_factory) -> canter.Recognizer:
    """A small Whisper in English, Spanish and Javanese; its tokens are bytes and timestamps."""
    tokenizer = WhisperTokenizer(whisper_bytes("en", "es", "jw").to_str())
    encoder = WhisperEncoderConfig(layers=1, width=16, heads=2, feedforward=32, mels=16)
    decoder = DecoderConfig(
        layers=1, width=16, heads=2, feedforward=32, vocabulary=tokenizer.vocab_size + 1501, positions=64
    )
    torch.manual_seed(0)
    model = SpeechModel(ModelConfig(WhisperFeatureConfig(mels=16, pad_seconds=0.0), encoder, decoder)).eval()
    model.generation = {
        "no_timestamps_token_id": tokenizer.special_id("<|notimestamps|>"),
        "decoder_start_token_id": tokenizer.special_id("<|startoftranscript|>"),
    }
    return canter.load(save_model(model, tmp_path_factory.mktemp("whisper") / "model", tokenizer), device="cpu")


@pytest.fixture(scope="module")
def tiny_en() -> canter.Recognizer:
    return canter.load(Path(SHARED or "") / "models" / "whisper-tiny.en", device="cpu")


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    """(S,) float32 modulated noise at 16 kHz."""
    random = np.random.default_rng(seed)
    rise = np.sin(np.arange(round(16000 * seconds)) / random.uniform(300, 3000)) + 1.1
    return (random.normal(size=len(rise)) * rise * 0.1).clip(-1, 1).astype(np.float32)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[str]:
    """Eight WAV files of 0.4 to 2.5 s in 16 bits, the last one longer than a window of 1.5 s."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(8):
        soundfile.write(folder / f"{number}.wav", noise(0.4 + 0.3 * number, number), 16000)
    return [str(folder / f"{number}.wav") for number in range(8)]


def speech(corpus: str, count: int) -> list[str]:
    return [str(path) for path in sorted(Path(SHARED or "", "data", "speech", corpus).rglob("*.flac"))[:count]]


# -- the module --


def test_importing_canter_imports_no_torch_and_no_numpy():
    code = (
        "import canter, sys; canter.CanterError, dir(canter); sys.exit(not {'torch', 'numpy'}.isdisjoint(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_planning_with_the_face_imports_no_torch():
    code = (
        "import canter, sys\n"
        "plan = canter.Plan(canter.LengthIndex([1.5, 3.0], [12, 30]), canter.analytic_budget('canary-1b', 80))\n"
        "canter.PlanSampler(plan), canter.Budget\n"
        "assert canter.score('a b', 'a c').wer == 0.5\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_names_are_listed_and_all_there():
    assert dir(canter) == sorted(canter.__all__)
    assert {name for name in canter.__all__ if getattr(canter, name) is None} == set()
    for name in ("load", "Recognizer", "Transcript", "build_index", "measure_budget", "Plan", "train", "score"):
        assert name in canter.__all__
    with pytest.raises(AttributeError, match="module 'canter' has no attribute 'lod'"):
        canter.lod  # noqa: B018


# -- one recording --


def test_a_file_an_array_and_bytes_give_one_transcript(canary, clips):
    found = canary.transcribe(clips[3], language="en")
    assert isinstance(found, canter.Transcript)
    assert found.text
    assert str(found) == found.text
    assert found.duration == pytest.approx(1.3, abs=1e-4)
    assert (found.language, found.path, found.error) == ("en", clips[3], None)
    samples, _ = soundfile.read(clips[3], dtype="int16")
    with open(clips[3], "rb") as file:
        opened = canary.transcribe(file, language="en")
    stereo = np.stack([samples, samples], axis=1)
    exact = samples.astype(np.float32) / 32768
    for given in (
        samples,
        samples.astype(np.int32) << 16,
        stereo,
        exact,
        exact.astype(np.float64),
        torch.tensor(exact),
    ):
        same = canary.transcribe(given, language="en")
        assert (same.text, same.path, same.duration) == (found.text, None, found.duration)
    assert (opened.text, opened.path) == (found.text, clips[3])
    assert canary.transcribe(Path(clips[3]).read_bytes(), language="en").text == found.text
    assert canary.transcribe(Path(clips[3]), language="en").text == found.text


def test_arrays_of_another_rate_are_resampled(canary, tmp_path):
    samples = noise(1.0)[::2].copy()
    soundfile.write(tmp_path / "8.wav", samples, 8000, subtype="FLOAT")
    file = canary.transcribe(tmp_path / "8.wav", language="en")
    array = canary.transcribe(samples, sampling_rate=8000, language="en")
    assert (array.text, array.duration) == (file.text, file.duration)
    assert canary.transcribe(samples, language="en").duration == pytest.approx(0.5)


def test_a_long_recording_is_cut_and_its_length_measured(whisper):
    found = whisper.transcribe(noise(70.0), language="en", vad="none", timestamps="segment")
    assert found.duration == pytest.approx(70.0)
    assert all(segment.end <= 70.0 for segment in found.segments)
    assert found.segments[-1].end > 30.0


BAD = {
    "missing.wav": "missing.wav does not exist",
    "text.wav": "text.wav is not audio",
    "empty.wav": r"empty.wav is empty \(0 bytes\)",
}


@pytest.fixture
def bad(tmp_path, monkeypatch) -> Path:
    (tmp_path / "text.wav").write_text("this is no audio at all")
    (tmp_path / "empty.wav").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", BAD)
def test_one_bad_file_raises_what_is_wrong_with_it(canary, bad, name):
    with pytest.raises(canter.CanterError, match=BAD[name]) as caught:
        canary.transcribe(name, language="en")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 16000), np.float32), r"shape \(2, 16000\): samples go first, \(S, C\)"),
        (np.zeros((2, 2, 2), np.float32), r"shape \(2, 2, 2\) is no audio"),
        (np.zeros(0, np.float32), r"shape \(0,\) is no audio"),
        (np.zeros(100, np.uint8), "of uint8 is no audio"),
        (np.full(100, 20000.0), "reaches 20,000; float samples lie in -1 ... 1"),
        (np.full(100, np.nan), "not finite"),
        (b"not audio", "^what was given is not audio"),
        (io.StringIO("text"), "opened as text"),
        (3, "int 3 is no audio"),
        (None, "NoneType None is no audio"),
    ],
)
def test_files_that_are_not_audio_are_refused_in_one_line(canary, array, message):
    with pytest.raises(canter.CanterError, match=message):
        canary.transcribe(array, language="en")


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"language": "klingon"}, "'klingon' is not the name or code of a language; it knows de, en"),
    ({"language": "fr"}, r"'fr' \(French\) is not a language of this model; it knows de, en"),
    ({"beam_size": 0}, "beam_size is 0; it must be a whole number of at least 1"),
    ({"batch_size": 0}, "batch_size is 0"),
    ({"beam_size": 1.5}, "beam_size is 1.5"),
    ({"timestamps": "words"}, "timestamps is 'words'; it must be one of none, segment, word"),
    ({"task": "translation"}, "task is 'translation'; it must be one of transcribe, translate"),
    ({"vad": "webrtc"}, "vad is 'webrtc'; it must be one of energy, silero, none"),
    ({"max_repeats": -1}, "max_repeats is -1; it must be 0, for no limit"),
    ({"prompt": "Names", "language": "en"}, "takes no text before"),
    ({"task": "translate", "language": "de", "target_language": "fr"}, "is not a language of this model"),
    ({"hotwords": " , "}, "hot words: .* holds none"),
    ({"hotwords": ["Zürich"], "language": "en"}, "cannot spell the hot word 'Zürich'"),
    ({"hotwords": ["one"], "hotword_weight": 0.0}, "the weight of hot words is 0"),
    ({"hotwords": "no-such-file.txt"}, "no-such-file.txt cannot be read"),
    ({"nbest": 3, "beam_size": 2}, "the 3 best texts need a beam size of at least 3; it is 2"),
    ({"nbest": 0}, "nbest is 0"),
    ({"sampling_rate": -1}, "sampling_rate is -1"),
    ({"sampling_rate": 8000}, "sampling_rate is for arrays"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=[str(options) for options, _ in OPTIONS])
def test_options_that_a_model_cannot_do_are_refused_before_any_work(canary, options, message):
    with pytest.raises(canter.CanterError, match=message) as caught:
        canary.transcribe("no-such-file.wav", **options)
    assert isinstance(caught.value, ValueError)


def test_many_are_refused_at_the_call_not_at_the_first_result(canary):
    def untouched() -> Iterator[str]:
        raise AssertionError("nothing is read")
        yield ""

    with pytest.raises(canter.CanterError, match="beam_size"):
        canary.transcribe(untouched(), beam_size=0)


def test_a_model_that_needs_a_language_says_so(canary, clips):
    with pytest.raises(canter.CanterError, match="names no language, and the model knows de, en"):
        canary.transcribe(clips[0])
    assert [result.error is not None for result in canary.transcribe(clips[:2], language="auto")] == [True, True]


def test_languages_as_people_write_them(canary, whisper, clips):
    texts = {canary.transcribe(clips[3], language=one).text for one in ("de", "DE", "German", "de-AT", "deu", "ger")}
    assert len(texts) == 1
    for written in ("jv", "jw", "Javanese", "jav"):  # Whisper's token is <|jw|>
        assert whisper.transcribe(clips[0], language=written).language == "jv"
    detected = whisper.transcribe(clips[0])
    assert detected.language in ("en", "es", "jv")
    assert whisper.transcribe(clips[0], language="auto").language == detected.language


def test_translation_into_the_language_asked_for(canary, whisper, clips):
    plain = canary.transcribe(clips[4], language="de")
    english = canary.transcribe(clips[4], language="German", task="translate", target_language="English")
    assert english.text != plain.text
    assert english.language == "en"
    with pytest.raises(canter.CanterError, match="a Whisper translates only into English"):
        whisper.transcribe(clips[4], language="es", task="translate", target_language="es")


def test_silence_is_left_out_of_every_recording(canary):
    silence, speech = np.zeros(16000 * 3, np.float32), noise(2.0, 4)
    nothing = canary.transcribe(silence, language="en")
    assert (nothing.text, nothing.segments, nothing.duration) == ("", (), 3.0)
    late = canary.transcribe(np.r_[silence, silence, speech], language="en")
    assert late.segments[0].start == pytest.approx(5.7, abs=0.2)
    assert late.segments[-1].end == pytest.approx(8.0, abs=0.2)
    whole = canary.transcribe(np.r_[silence, silence, speech], language="en", vad="none")
    assert whole.segments[0].start == 0.0


def test_a_language_is_detected_with_its_probability_and_before_a_prompt(polyglot, spoken_tones, tmp_path):
    model = canter.Recognizer(polyglot)
    audio = spoken_tones("sss")
    found = model.transcribe(audio)
    assert found.language == "es"
    assert found.language_probability is not None
    assert 0.9 < found.language_probability <= 1.0
    prompted = model.transcribe(audio, prompt="names to expect")
    assert (prompted.language, prompted.language_probability) == ("es", found.language_probability)
    assert model.transcribe(audio, language="fr").language_probability is None
    value = json.loads(found.save(tmp_path / "a.json").read_text())
    row = json.loads(found.save(tmp_path / "a.jsonl").read_text())
    assert value["language"] == row["language"] == "es"
    assert value["language_probability"] == row["language_probability"] > 0.9
    assert model.transcribe(np.zeros(16000, np.float32)).language_probability is None


# -- many --


def test_many_give_results_in_order_bad_files_among_them(canary, clips, bad):
    alone = [canary.transcribe(clip, language="en") for clip in clips]
    given = [clips[7], "missing.wav", clips[0], "text.wav", soundfile.read(clips[3])[0], "empty.wav", *clips[1:7]]
    results = list(canary.transcribe(given, language="en"))
    assert [result.path for result in results] == [None if isinstance(one, np.ndarray) else one for one in given]
    texts = [alone[number].text for number in (7, 0, 3, 1, 2, 3, 4, 5, 6)]
    assert [result.text for result in results if result.error is None] == texts
    errors = {result.path: result.error for result in results if result.error is not None}
    assert errors.keys() == BAD.keys()
    assert all("\n" not in str(error) for error in errors.values())


def test_what_is_left_of_damaged_audio_is_transcribed(canary, clips, tmp_path):
    path = tmp_path / "a.flac"
    path.write_bytes(Path(clips[0]).read_bytes()[:-12000])
    whole = canary.transcribe(clips[0], language="en")
    for result in (canary.transcribe(path, language="en"), *canary.transcribe([path], language="en")):
        assert result.lost_seconds > 0.1
        assert abs(result.lost_seconds + result.duration - whole.duration) < 0.001
        (warning,) = result.warnings
        assert warning.startswith(f"{result.lost_seconds:.2f} s of its audio are lost")
        row = json.loads(result.save(tmp_path / "a.jsonl").read_text())
        assert (row["lost_seconds"], row["warnings"]) == (result.lost_seconds, [warning])
    assert (whole.lost_seconds, whole.warnings) == (0.0, ())


def test_recordings_are_recognised_by_their_content(canary, clips, tmp_path):
    for name in ("a.mov", "a", "a.txt", "a.jsonl"):
        path = tmp_path / name
        path.write_bytes(Path(clips[0]).read_bytes())
        assert canary.transcribe(path, language="en").text == canary.transcribe(clips[0], language="en").text
    with pytest.raises(canter.CanterError, match="no audio track 1: it has one"):
        canary.transcribe(clips[0], language="en", audio_track=1)
    with pytest.raises(canter.CanterError, match="audio_track is -1; tracks are counted from 0"):
        canary.transcribe(clips[0], language="en", audio_track=-1)


def test_results_do_not_depend_on_the_batch(canary, clips):
    texts = [[one.text for one in canary.transcribe(clips, language="en", batch_size=size)] for size in (1, 3, 64)]
    assert texts[0] == texts[1] == texts[2]
    beams = [one.text for one in canary.transcribe(clips, language="en", beam_size=3)]
    assert beams == [canary.transcribe(clip, language="en", beam_size=3).text for clip in clips]


def test_a_queue_without_end_is_read_a_little_ahead(canary):
    taken = 0

    def endless() -> Iterator[np.ndarray]:
        nonlocal taken
        while True:
            taken += 1
            yield noise(0.3 + 0.1 * (taken % 5), taken)

    results = canary.transcribe(endless(), language="en", batch_size=4)
    for number in range(1, 61):
        found = next(results)
        assert found.duration == pytest.approx(0.3 + 0.1 * (number % 5), abs=1e-4)
    assert 60 <= taken <= 60 + 5 * 16
    results.close()  # type: ignore[attr-defined]


def test_manifests_and_folders_among_many_are_what_they_hold(canary, clips, tmp_path, bad):
    rows = [
        {"audio_filepath": clips[3], "duration": 1.3, "lang": "German"},
        {"audio_filepath": clips[4], "offset": 0.5, "duration": 1.0},
        {"audio_filepath": clips[5], "duration": 1.9, "lang": "fr"},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(canter.CanterError, match=r"train.jsonl is a manifest, not one recording; .*transcribe\(\["):
        canary.transcribe("train.jsonl", language="en")
    with pytest.raises(canter.CanterError, match="is a folder, not one recording"):
        canary.transcribe(Path(clips[0]).parent, language="en")
    german = canary.transcribe(clips[3], language="de")
    results = list(canary.transcribe(["train.jsonl", Path(clips[0]).parent, "no.jsonl"], language="en"))
    assert [result.path for result in results] == [*clips[3:6], *clips, "no.jsonl"]
    assert (results[0].text, results[0].language) == (german.text, "de")
    assert results[1].duration == pytest.approx(1.0)
    assert all(segment.start >= 0.5 and segment.end <= 1.5 for segment in results[1].segments)
    assert "fr" in (results[2].error or "")
    assert "no.jsonl does not exist" in (results[-1].error or "")
    assert [result.text for result in results[3:-1]] == [one.text for one in canary.transcribe(clips, language="en")]


def test_the_command_and_the_face_write_the_same(canary, canary_folder, clips, tmp_path):
    for suffix in (".txt", ".srt", ".vtt", ".tsv", ".json"):
        command = tmp_path / f"command{suffix}"
        assert main(["transcribe", str(canary_folder), clips[5], "--language", "en", "-o", str(command)]) == 0
        times = "word" if suffix in (".srt", ".vtt") else "segment"
        face = canary.transcribe(clips[5], language="en", timestamps=times).save(tmp_path / f"face{suffix}")
        assert face.read_text() == command.read_text()
    row = json.loads(canary.transcribe(clips[5], language="en").save(tmp_path / "a.jsonl").read_text())
    assert row["audio_filepath"] == clips[5]
    assert row["duration"] == pytest.approx(1.9)
    with pytest.raises(canter.CanterError, match=r"a.doc: the suffix is none of .jsonl, .txt"):
        canary.transcribe(clips[5], language="en").save(tmp_path / "a.doc")


def test_subtitles_are_shaped_as_the_command_shapes_them(canary, canary_folder, clips, tmp_path):
    command = tmp_path / "command.srt"
    given = ["--language", "en", "--max-line-width", "12", "--max-line-count", "1", "-o", str(command)]
    assert main(["transcribe", str(canary_folder), clips[5], *given]) == 0
    found = canary.transcribe(clips[5], language="en", timestamps="word")
    assert found.save(tmp_path / "face.srt", max_line_width=12, max_line_count=1).read_text() == command.read_text()
    with pytest.raises(canter.CanterError, match=r"options of \.srt and \.vtt"):
        found.save(tmp_path / "face.txt", max_line_width=12)
    with pytest.raises(canter.CanterError, match="timestamps='word'"):
        canary.transcribe(clips[5], language="en").save(tmp_path / "face.srt", highlight_words=True)
    with pytest.raises(canter.CanterError, match="max line width 0"):
        found.save(tmp_path / "face.srt", max_line_width=0)


def test_a_model_is_saved_completely(canary, clips, tmp_path):
    again = canter.load(canary.save(tmp_path / "copy"))
    assert again.transcribe(clips[0], language="en").text == canary.transcribe(clips[0], language="en").text
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(canter.CanterError, match="notes"):
        canary.save(tmp_path / "notes")
    assert (tmp_path / "notes" / "mine.txt").read_text() == "mine"


def test_an_engine_is_made_once_for_the_same_settings(canary, clips):
    for _ in range(3):
        canary.transcribe(clips[0], language="en", batch_size=7)
    assert len([config for config, _ in canary._engines if config.rows == 7]) == 1


@needs_shared
def test_words_have_times_and_texts(tiny_en):
    (clip,) = speech("librivox_mini", 1)
    found = tiny_en.transcribe(clip, timestamps="word")
    words = found.words
    assert " ".join(word.text for word in words) == found.text
    assert all(word.start <= word.end <= found.duration for word in words)
    assert [word.start for word in words] == sorted(word.start for word in words)
    assert [word for segment in found.segments for word in segment.words] == list(words)
    assert found.language == "en"
    for wrong in ({"language": "de"}, {"task": "translate"}):
        with pytest.raises(canter.CanterError, match=r"it knows en|knows only one language"):
            tiny_en.transcribe(clip, **wrong)


def test_tokens_and_alternatives_have_log_probabilities(canary, clips, tmp_path):
    options = {"language": "en", "beam_size": 4, "nbest": 3, "logprobs": True}
    found = list(canary.transcribe(clips, **options))
    for one in found:
        assert "".join(token.text for token in one.logprobs).strip() == one.text
        (best,) = one.nbest
        assert (best.start, best.end) == (0.0, pytest.approx(one.duration, abs=0.01))
        assert len(best.hypotheses) == 3
        assert best.hypotheses[0][0] == one.text
        tokens = sum(token.logprob for token in one.logprobs)
        assert best.hypotheses[0][1] <= tokens + 1e-4  # the end token is counted too
    assert len({one.nbest[0].hypotheses[0][1] for one in found}) > 1
    alone = [canary.transcribe(clip, **options) for clip in clips]
    assert [[text for text, _ in one.nbest[0].hypotheses] for one in alone] == [
        [text for text, _ in one.nbest[0].hypotheses] for one in found
    ]
    row = json.loads(found[0].save(tmp_path / "one.jsonl").read_text())
    assert [entry["token"] for entry in row["logprobs"]] == [token.text for token in found[0].logprobs]
    assert [entry["text"] for entry in row["nbest"][0]["hypotheses"]] == [t for t, _ in found[0].nbest[0].hypotheses]
    value = json.loads(found[0].save(tmp_path / "one.json").read_text())
    assert value["segments"][0]["logprobs"] == row["logprobs"]
    assert value["nbest"] == row["nbest"]
    assert not canary.transcribe(clips[0], language="en").logprobs


@needs_shared
def test_tokens_of_long_recordings_are_those_of_the_text(tiny_en):
    """In overlapping chunks, tokens are left out with their words."""
    parts = [soundfile.read(path, dtype="float32")[0] for path in speech("librivox_mini", 6)]
    found = tiny_en.transcribe(np.concatenate(parts), logprobs=True, vad="none", timestamps="word")
    assert found.duration > 30
    for segment in found.segments:
        assert "".join(token.text for token in segment.token_scores).strip() == segment.text
        assert all(token.logprob <= 0 for token in segment.token_scores)


@needs_shared
def test_hot_words_are_preferred_where_they_are_said(tiny_en):
    clip = speech("librivox_mini", 1)[0]
    usual = tiny_en.transcribe(clip)
    assert "flower-fattened" in usual.text
    wanted = tiny_en.transcribe(clip, hotwords=["flour", "fattened", "Ploughshare"])
    assert "flour" in wanted.text
    assert "Ploughshare" not in wanted.text
    assert tiny_en.transcribe(clip, hotwords="Zanzibar, ploughshare, Timbuktu").text == usual.text
    files = speech("an4", 4)
    together = [result.text for result in tiny_en.transcribe([clip, *files], hotwords="flour, fattened")]
    assert together == [tiny_en.transcribe(one, hotwords="flour, fattened").text for one in (clip, *files)]


@needs_shared
def test_real_speech_is_transcribed_as_by_the_command(tiny_en, tmp_path, capsys):
    files = speech("an4", 3)
    out = tmp_path / "out.jsonl"
    model = str(Path(SHARED or "") / "models" / "whisper-tiny.en")
    assert main(["transcribe", model, *files, "-o", str(out), "--device", "cpu"]) == 0
    texts = [json.loads(line)["pred_text"] for line in out.read_text().splitlines()]
    assert [result.text for result in tiny_en.transcribe(iter(files))] == texts


# -- plans, training, scores --


@pytest.fixture(scope="module")
def manifest(clips) -> Path:
    path = Path(clips[0]).parent.parent / "api-train.jsonl"
    rows = [{"audio_filepath": clip, "text": SENTENCES[n % 5], "lang": "en"} for n, clip in enumerate(clips)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))  # no durations: they are measured
    return path


def test_from_a_manifest_to_a_plan(canary, manifest, tmp_path):
    index = canter.build_index(manifest, tokenizer=canary.tokenizer, progress=False)
    assert isinstance(index, canter.LengthIndex)
    assert index.seconds[3] == pytest.approx(1.3, abs=1e-3)
    assert index.made_with["prompt_tokens"] == 5
    assert index.tokens[0] == 5 + len(canary.tokenizer.encode(SENTENCES[0])) + 1
    kept = canter.build_index([str(manifest)], tmp_path / "lengths.arrow", tokenizer="chars", progress=False)
    assert canter.LengthIndex.open(tmp_path / "lengths.arrow").fingerprint == kept.fingerprint
    plan = canter.Plan(index, canter.Budget.from_batch_seconds(4.0), micro_batches_per_step=2)
    rows = sorted(int(row) for step in plan for batch in step for row in batch)
    assert rows == list(range(8))
    assert sum(map(len, canter.PlanSampler(plan))) == 8
    assert canter.analytic_budget("canary-1b", 80).limit_bytes > 0


def test_a_budget_is_measured_and_leaves_the_model_as_it_was(canary, manifest):
    index = canter.build_index(manifest, tokenizer=canary.tokenizer, progress=False)
    before = {name: tensor.clone() for name, tensor in canary.module.state_dict().items()}
    budget = canter.measure_budget(canary, index, probes=6, minutes=0.05, limit_gib=1.0, progress=False)
    assert isinstance(budget, canter.Budget)
    assert budget.measured_on["precision"] == "float32"
    assert budget.max_batch(25, 12) > 1
    after = canary.module.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not canary.module.training
    assert len(canter.Plan(index, budget)) >= 1


def test_training_goes_through_the_face(canary_folder, manifest, tmp_path):
    rows = [json.loads(line) | {"duration": 0.4 + 0.3 * n} for n, line in enumerate(manifest.read_text().splitlines())]
    manifest = tmp_path / "train.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = canter.TrainConfig(
        manifest=[str(manifest)],
        init=str(canary_folder),
        output=str(tmp_path / "run"),
        steps=2,
        device="cpu",
        threads=1,
        precision="float32",
        track=(),
        workers=0,
    )
    assert config.manifest == (manifest,)
    folder = canter.train(config, progress=False)
    assert folder == tmp_path / "run"
    trained = canter.load(folder, device="cpu")
    assert trained.transcribe(noise(1.0), language="en").error is None


def test_scores_take_one_text_or_many():
    assert canter.score("the cat sat", "the cat sit").wer == pytest.approx(1 / 3)
    both = canter.score(["the cat sat", "ein Hund"], ["the cat sat", "ein Hut"], ["en-US", "German"])
    assert both.wer == pytest.approx(1 / 5)
    assert set(both.languages) == {"en", "de"}
    assert canter.score(["a b"], ["a b"], "English").wer == 0
    with pytest.raises(ValueError, match="equally many"):
        canter.score(["a"], ["a", "b"])


def test_joint_decoding_is_refused_without_a_ctc_head(canary, clips):
    for weight, said in ((0.3, "no CTC head"), (1.4, "between 0")):
        with pytest.raises(canter.CanterError, match=said):
            canary.transcribe(clips[0], language="en", ctc_weight=weight)
