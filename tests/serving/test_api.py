"""The interface as clients see it: the openai package, and raw requests."""

import copy
import json
import os
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import openai
import pytest
import torch
from starlette.requests import Request

from canter.corpus.manifest import Utterance
from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import EngineConfig
from canter.inference.recognizer import Recognizer
from canter.inference.recording import Transcriber
from canter.inference.transcribe import transcribe
from canter.inference.transcript.segments import Segment, Word
from canter.loading import load_model
from canter.models.lora import LoraAdapter, attach_bank, linear_layers, merge
from canter.serving.app import TranscriptionAnswer
from canter.serving.audio import Audio, Samples
from canter.serving.model import TranscriptUpdate
from canter.serving.protocol import AudioRequest
from canter.serving.scheduler import Timing

from .conftest import Running, came_about, held, noise, running, wav

SHARED = os.environ.get("CANTER_SHARED")


def client_of(live: Running, key: str = "any", **settings) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=0, **settings)


@pytest.fixture(scope="module")
def client(live):
    with client_of(live) as found:
        yield found


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory) -> dict[int, str]:
    """Transcripts of clips by the engine without a service, by seed."""
    root = tmp_path_factory.mktemp("clips")
    utterances = []
    for seed in range(6):
        (root / f"{seed}.wav").write_bytes(wav(noise(0.5 + seed / 2, seed)))
        utterances.append(Utterance(str(root / f"{seed}.wav"), 0.5 + seed / 2, text="", lang="en"))
    found = transcribe(Engine(model, model.tokenizer.end, EngineConfig()), model.tokenizer, utterances)
    assert len({item.text for item in found}) > 3
    return {seed: item.text for seed, item in enumerate(found)}


def clip(seed: int) -> tuple[str, bytes]:
    return f"{seed}.wav", wav(noise(0.5 + seed / 2, seed))


def test_json_is_what_the_engine_says(client, expected):
    for seed, text in expected.items():
        found = client.audio.transcriptions.create(model="small", file=clip(seed), language="en")
        assert found.text == text
    assert found.usage.seconds == 3


@pytest.mark.parametrize("form", ["text", "srt", "vtt"])
def test_text_formats(client, expected, form):
    found = client.audio.transcriptions.create(model="whisper-1", file=clip(4), language="en", response_format=form)
    wanted = {
        "text": expected[4] + "\n",
        "srt": f"1\n00:00:00,000 --> 00:00:02,480\n{expected[4]}\n\n",
        "vtt": f"WEBVTT\n\n00:00.000 --> 00:02.480\n{expected[4]}\n\n",
    }
    assert found == wanted[form]


def test_verbose_json(client, expected):
    found = client.audio.transcriptions.create(
        model="small", file=clip(4), language="en", response_format="verbose_json"
    )
    assert (found.text, found.language, found.duration) == (expected[4], "en", 2.5)
    (segment,) = found.segments
    assert (segment.start, segment.end, segment.text) == (0.0, 2.5, expected[4])
    assert segment.tokens


def test_stream_gives_segments_then_the_complete_text(client, expected):
    events = list(client.audio.transcriptions.create(model="small", file=clip(3), language="en", stream=True))
    assert [event.type for event in events] == ["transcript.text.delta", "transcript.text.done"]
    assert events[0].delta == events[-1].text == expected[3]
    assert {"encoder", "decoder", "features", "queue", "audio", "upload"} == set(events[-1].timing)
    assert events[-1].timing["decoder"] > 0
    assert (events[-1].language, events[-1].duration) == ("en", 2.0)
    assert events[0].language == "en"
    assert "words" not in events[0].segment


def test_stream_gives_the_times_of_words(client, expected):
    *deltas, done = client.audio.transcriptions.create(
        model="small", file=clip(4), language="en", stream=True, timestamp_granularities=["word"]
    )
    words = [word for event in deltas for word in event.segment["words"]]
    assert " ".join(word["word"] for word in words) == done.text == expected[4]
    assert all(word["start"] <= word["end"] for word in words)


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # openai's, of translations
def test_translation_and_prompt(client, expected):
    found = client.audio.translations.create(model="small", file=clip(4), extra_body={"language": "de"})
    assert isinstance(found.text, str)
    with pytest.raises(openai.BadRequestError, match="takes no 'prompt'"):
        client.audio.transcriptions.create(model="small", file=clip(1), language="en", prompt="before")


def test_words_have_times(client, expected):
    found = client.audio.transcriptions.create(
        model="small", file=clip(4), language="en", response_format="verbose_json", timestamp_granularities=["word"]
    )
    assert found.segments is None
    assert " ".join(word.word.strip() for word in found.words) == expected[4]
    times = [time for word in found.words for time in (word.start, word.end)]
    assert times == sorted(times)
    assert 0 <= times[0] <= times[-1] <= 2.6


def test_long_audio_comes_in_segments(client, model, tmp_path):
    """Three parts with pauses between them, together longer than the model's window of 40 s."""
    pause = np.zeros(16000 * 2, np.float32)
    samples = np.concatenate([noise(20.0, 1), pause, noise(17.0, 2), pause, noise(18.0, 3)])
    (tmp_path / "long.wav").write_bytes(wav(samples))
    utterance = Utterance(str(tmp_path / "long.wav"), len(samples) / 16000, text="", lang="en")
    (expected,) = transcribe(Engine(model, model.tokenizer.end, EngineConfig()), model.tokenizer, [utterance])
    wishes = {"model": "small", "file": tmp_path / "long.wav", "language": "en"}
    assert client.audio.transcriptions.create(**wishes).text == expected.text
    *deltas, done = client.audio.transcriptions.create(**wishes, stream=True)
    assert len(deltas) == len(expected.segments) > 1
    assert "".join(event.delta for event in deltas) == done.text == expected.text
    assert [event.segment["start"] for event in deltas] == [one.start for one in expected.segments]
    assert [event.segment["id"] for event in deltas] == [*range(len(deltas))]


def test_temperature_draws_other_tokens(client, expected):
    found = client.audio.transcriptions.create(model="small", file=clip(5), language="en", temperature=1.0)
    assert found.text != expected[5]


def test_whisper_detects_the_language(whisper):
    """Without a language the likeliest is used, as if it had been requested."""
    with running(whisper) as live, client_of(live) as client:

        def ask(**wishes):
            return client.audio.transcriptions.create(
                model="small", file=clip(3), response_format="verbose_json", **wishes
            )

        detected = ask()
        assert detected.language in ("en", "es")
        assert ask(language=detected.language).text == detected.text
        assert detected.language_probability >= 0.5
        prompted = ask(prompt="before")  # the language is detected first, then the prompt is built
        assert (prompted.language, prompted.language_probability) == (detected.language, detected.language_probability)
        assert prompted.text == ask(prompt="before", language=detected.language).text
        assert ask(language="en", prompt="before " * 400).language == "en"
        assert client._client.get(f"{live.url}/health").json()["targets"] == ["en"]


def test_silence_is_an_empty_transcript(client, live):
    silence = ("silence.wav", wav(np.zeros(16000 * 4, np.float32)))
    found = client.audio.transcriptions.create(
        model="small", file=silence, language="en", response_format="verbose_json"
    )
    assert (found.text, found.segments, found.duration) == ("", [], 4.0)
    for form, text in (("text", "\n"), ("srt", ""), ("vtt", "WEBVTT\n\n")):
        assert (
            client.audio.transcriptions.create(model="small", file=silence, language="en", response_format=form) == text
        )
    (done,) = client.audio.transcriptions.create(model="small", file=silence, language="en", stream=True)
    assert (done.type, done.text) == ("transcript.text.done", "")
    late = ("late.wav", wav(np.r_[np.zeros(16000 * 5, np.float32), noise(2.0)]))
    found = client.audio.transcriptions.create(model="small", file=late, language="en", response_format="verbose_json")
    assert found.segments[0].start == pytest.approx(4.7, abs=0.2)


def test_a_request_sets_the_voice_activity_detector(live, client):
    """Three words with pauses of 1.2 s: together by default, divided by a request that counts such pauses as silence,
    whichever way a client sends the setting, and one chunk without a detector."""
    pause = np.zeros(round(1.2 * 16000), np.float32)
    samples = np.concatenate([noise(2.0, 1), pause, noise(1.0, 2), pause, noise(2.0, 3), np.zeros(48000, np.float32)])
    file = ("three.wav", wav(samples))

    def segments(**changes) -> list[tuple[float, float]]:
        asked = {"model": "small", "file": file, "language": "en", "response_format": "verbose_json", **changes}
        return [(one.start, one.end) for one in client.audio.transcriptions.create(**asked).segments]

    (usual,) = segments(chunking_strategy="auto")
    assert usual[1] < 8.0
    assert segments(extra_body={"vad_filter": True}) == [usual]
    assert segments(extra_body={"vad_filter": False})[0][1] == pytest.approx(len(samples) / 16000, abs=0.01)
    ours = {"type": "server_vad", "threshold": 0.5, "prefix_padding_ms": 100, "silence_duration_ms": 600}
    divided = segments(chunking_strategy=ours)
    assert [round(start, 1) for start, _ in divided] == [0.0, 3.1, 5.3]
    assert segments(extra_body={"chunking_strategy": json.dumps(ours)}) == divided
    theirs = {"speech_pad_ms": 100, "min_silence_duration_ms": 600}
    assert segments(extra_body={"vad_parameters": json.dumps(theirs), "vad_filter": True}) == divided
    assert segments(extra_body={"vad_parameters": theirs}) == divided
    assert len(segments(extra_body={"vad_parameters": {"max_speech_duration_s": 3.0}})) > 1
    without_short = segments(extra_body={"vad_parameters": {**theirs, "min_speech_duration_ms": 1500}})
    assert without_short == [divided[0], divided[2]]
    assert live.quiet()


def test_channels_are_merged_in_order_of_time(client, live):
    """A call of two people: each channel by itself gives the segments that both together give, in every answer."""
    samples = np.zeros((16000 * 100, 2), np.float32)
    for turn in range(5):
        clip = noise(2.0, turn)
        samples[turn * 320_000 : turn * 320_000 + len(clip), turn % 2] = clip
    asked = {"model": "small", "file": ("call.wav", wav(samples)), "language": "en"}

    def create(channel: str, **changes):
        return client.audio.transcriptions.create(**asked, **changes, extra_body={"channel": channel})

    both = create("each", response_format="verbose_json")
    assert (both.duration, both.usage.seconds) == (100.0, 100)
    assert [one.channel for one in both.segments] == [0, 1, 0, 1, 0]
    assert [one.start for one in both.segments] == sorted(one.start for one in both.segments)
    for channel in (0, 1):
        one = create(str(channel), response_format="verbose_json")
        assert not hasattr(one.segments[0], "channel")
        part = [segment for segment in both.segments if segment.channel == channel]
        assert [(a.start, a.end, a.text.strip()) for a in part] == [
            (b.start, b.end, b.text.strip()) for b in one.segments
        ]
    *deltas, done = create("each", stream=True)
    assert [event.segment["channel"] for event in deltas] == [0, 1, 0, 1, 0]
    assert "".join(event.delta for event in deltas) == done.text == both.text == create("each").text
    lines = create("each", response_format="text").splitlines()
    assert [line[:12] for line in lines] == [f"[channel {turn % 2}] " for turn in range(5)]
    assert {"<v Channel 0>", "<v Channel 1>"} <= {*re.findall("<.*?>", create("each", response_format="vtt"))}
    assert create("mix").text == client.audio.transcriptions.create(**asked).text
    assert live.quiet()


def test_a_request_names_languages_and_clips(polyglot, spoken_tones):
    """English, then Spanish after 4 s; French is never found unless it is one of two."""
    file = ("two.wav", wav(spoken_tones("ee  ss", pause=0.3)))
    with running(polyglot) as live, client_of(live) as client:

        def language(**extra) -> str:
            asked = {"model": "small", "file": file, "response_format": "verbose_json"}
            return client.audio.transcriptions.create(**asked, extra_body=extra).language

        assert language(clip_timestamps="0,2.6") == "en"
        assert language(clip_timestamps=[5.2]) == "es"
        assert language(clip_timestamps="0,2.6", languages=["fr", "es"]) in ("fr", "es")
        assert language(clip_timestamps="0,2.6", languages="es") == "es"
        with pytest.raises(openai.BadRequestError, match="'languages' several: leave one out"):
            language(language="en", languages=["en", "es"])
        assert language(hallucination_silence_threshold=1.0, clip_timestamps="0,2.6") == "en"


def test_all_channels_count_for_the_limit(model):
    samples = np.zeros((16000 * 4, 2), np.float32)
    with running(model, max_seconds=5.0) as live, client_of(live) as client:
        asked = {"model": "small", "file": ("call.wav", wav(samples)), "language": "en"}
        assert client.audio.transcriptions.create(**asked).text == ""
        with pytest.raises(openai.BadRequestError, match="is 4 s long on each of 2 channels, over the limit of 5 s"):
            client.audio.transcriptions.create(**asked, extra_body={"channel": "each"})


def test_languages_are_weighed_and_distinguished(polyglot, spoken_tones):
    """A recording in two languages is decoded in both.

    `verbose_json` and the stream return the longer one with its probability, and a prompt does not change that.
    """
    audio = ("tones.wav", wav(spoken_tones("eeeessssss")))
    with running(polyglot) as live, client_of(live) as client:
        found = client.audio.transcriptions.create(model="small", file=audio, response_format="verbose_json")
        assert found.language == "es"
        assert 0.5 < found.language_probability < 0.9
        assert found.text.startswith("e")
        assert found.text.endswith("s")
        assert any(one.start == pytest.approx(5.05, abs=0.2) for one in found.segments)
        prompted = client.audio.transcriptions.create(
            model="small", file=audio, response_format="verbose_json", prompt="names"
        )
        assert (prompted.language, prompted.language_probability) == ("es", found.language_probability)
        *_, done = client.audio.transcriptions.create(model="small", file=audio, stream=True)
        assert (done.language, done.language_probability) == ("es", found.language_probability)
        named = client.audio.transcriptions.create(
            model="small", file=audio, response_format="verbose_json", language="en"
        )
        assert (named.language, hasattr(named, "language_probability")) == ("en", False)


def test_cues_of_the_service_end_where_sentences_do():
    """A single segment of forty seconds from a Canary is split into cues; markup is escaped."""
    text = "It is said that 1 < 2 & 3 > 2. " + "This is a sentence of some words, and it goes on. " * 6
    update = TranscriptUpdate([Segment(0.0, 40.0, text.strip())], "en", Timing())
    for form in ("srt", "vtt"):
        with closing(Audio([], Samples(), 40.0, 0.0)) as audio:
            result = TranscriptionAnswer(audio, AudioRequest("transcribe", "en", response_format=form))
            result.add(update)
            body = result.response("en").body.decode()
        cues = body.removeprefix("WEBVTT\n\n").strip().split("\n\n")
        assert len(cues) > 6
        assert all(cue.rstrip().endswith((".", ",")) for cue in cues)
        assert ("1 &lt; 2 &amp; 3 &gt; 2." in body) == (form == "vtt")


def test_numbers_that_json_does_not_have():
    words = (Word(0.0, 1.0, " one", float("nan")),)
    segment = Segment(0.0, 1.0, "one", words=words, avg_logprob=float("-inf"))
    fields = AudioRequest("transcribe", "en", response_format="verbose_json", granularities=("word", "segment"))
    with closing(Audio([], Samples(), 1.0, 0.0)) as audio:
        result = TranscriptionAnswer(audio, fields)
        result.add(TranscriptUpdate([segment], "en", Timing()))
        answer = result.response("en")
    value = json.loads(answer.body, parse_constant=lambda name: pytest.fail(name))
    assert value["segments"][0]["avg_logprob"] is None
    assert value["words"] == [{"word": "one", "start": 0.0, "end": 1.0}]


@pytest.mark.parametrize("text", ["one two three ", "日本語"])
def test_of_a_long_prompt_the_end_counts(whisper, monkeypatch, text):
    """The end of a long prompt counts, with or without spaces; it is tokenised once, and only what could fit."""
    seen, tokenizer = [], whisper.tokenizer
    listener, encode = Transcriber(Engine(whisper, tokenizer.end), tokenizer), tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda given: seen.append(len(given)) or encode(given))
    slots = {"source_lang": "en", "target_lang": "en"}
    bare, found = listener.prompt(slots, ""), listener.prompt(slots, text * 10_000)
    assert len(seen) == 1
    assert seen[0] < 2000
    assert len(found) == 64  # half of the positions
    assert found[0] == tokenizer.special_id("<|startofprev|>")
    assert found[-len(bare) :] == bare
    assert found[1 : -len(bare)] == encode((text * 100).strip())[-(63 - len(bare)) :]
    whole = listener.prompt(slots, "one two")
    assert whole == [found[0], *encode(" one two"), *bare]


def test_models(client):
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("whisper-1").id == "small"
    with pytest.raises(openai.NotFoundError, match="there is no model 'x'"):
        client.models.retrieve("x")


@pytest.mark.parametrize(
    ("changes", "error", "message", "param"),
    [
        ({"model": "large"}, openai.NotFoundError, "there is no model 'large'", "model"),
        (
            {"language": "xx"},
            openai.BadRequestError,
            "'xx' is not a language of this model; it knows de, en",
            "language",
        ),
        ({"language": "English!"}, openai.BadRequestError, "'English!' is not the name or code of", "language"),
        ({"language": ""}, openai.BadRequestError, "needs the language of the audio", "language"),
        ({"response_format": "xml"}, openai.BadRequestError, "'xml' is not one of json", "response_format"),
        ({"temperature": 7}, openai.BadRequestError, "not a number from 0 to 1", "temperature"),
        ({"include": ["words"]}, openai.BadRequestError, "'words' is not logprobs", "include[]"),
        (
            {"include": ["logprobs"], "response_format": "text"},
            openai.BadRequestError,
            "need response_format",
            "include[]",
        ),
        (
            {"extra_body": {"beam_size": 6}},
            openai.BadRequestError,
            "beam_size '6' is not a number from 1 to 5",
            "beam_size",
        ),
        ({"extra_body": {"beam_size": 1.5}}, openai.BadRequestError, "not a whole number", "beam_size"),
        ({"extra_body": {"hotwords": "Zürich"}}, openai.BadRequestError, "cannot spell the hot word", "hotwords"),
        ({"extra_body": {"hotwords": "..."}}, openai.BadRequestError, "neither letters nor digits", "hotwords"),
        (
            {"extra_body": {"hotwords": "a", "hotword_weight": 0}},
            openai.BadRequestError,
            "from 0.01 to 100",
            "hotword_weight",
        ),
        (
            {"extra_body": {"top_p": 0.9}},
            openai.BadRequestError,
            "which this service cannot do; leave it out or give 1",
            "top_p",
        ),
        ({"extra_body": {"seed": 3}}, openai.BadRequestError, "'seed' is not a field", "seed"),
        ({"stream": True, "response_format": "verbose_json"}, openai.BadRequestError, "use json or text", None),
        ({"extra_body": {"colour": "red"}}, openai.BadRequestError, "'colour' is not a field", "colour"),
        ({"extra_body": {"to_language": "de"}}, openai.BadRequestError, "translations", "to_language"),
        ({"chunking_strategy": {"type": "vad"}}, openai.BadRequestError, "of type server_vad", "chunking_strategy"),
        ({"extra_body": {"chunking_strategy": "x"}}, openai.BadRequestError, "not a JSON object", "chunking_strategy"),
        (
            {"chunking_strategy": {"type": "server_vad", "silence_duration_ms": -1}},
            openai.BadRequestError,
            "silence_duration_ms is -0.001; it must be 0 or more seconds",
            "chunking_strategy",
        ),
        (
            {"extra_body": {"vad_parameters": {"threshold": 1.5}}},
            openai.BadRequestError,
            "vad_parameters: threshold is 1.5; it must lie between",
            "vad_parameters",
        ),
        (
            {"extra_body": {"vad_parameters": '{"neg_threshold": 0.2}'}},
            openai.BadRequestError,
            "'neg_threshold' is not one of threshold, min_speech_duration_ms",
            "vad_parameters",
        ),
        (
            {"extra_body": {"vad_parameters": '{"threshold": "high"}'}},
            openai.BadRequestError,
            "threshold 'high' is not a number",
            "vad_parameters",
        ),
        (
            {"extra_body": {"vad_filter": False, "vad_parameters": {"threshold": 0.4}}},
            openai.BadRequestError,
            "means nothing without vad_filter",
            "vad_parameters",
        ),
        (
            {"extra_body": {"channel": 1}},
            openai.BadRequestError,
            "1.wav has no channel 1: it has 1, counted",
            "channel",
        ),
        (
            {"language": "", "extra_body": {"languages": ["en", "de"]}},
            openai.BadRequestError,
            "cannot detect which of",
            "languages",
        ),
        ({"extra_body": {"clip_timestamps": "5,3"}}, openai.BadRequestError, "must be increasing", "clip_timestamps"),
        ({"extra_body": {"clip_timestamps": "a"}}, openai.BadRequestError, "are not seconds", "clip_timestamps"),
        (
            {"extra_body": {"hallucination_silence_threshold": "x"}},
            openai.BadRequestError,
            "'x' is not a number",
            "hallucination_silence_threshold",
        ),
        (
            {"extra_body": {"condition_on_previous_text": True}},
            openai.BadRequestError,
            "takes no text before what it transcribes; leave condition_on_previous_text out",
            "condition_on_previous_text",
        ),
        ({"extra_body": {"suppress_tokens": "-1,x"}}, openai.BadRequestError, "'-1,x' are not ids", "suppress_tokens"),
        ({"extra_body": {"suppress_tokens": [4000]}}, openai.BadRequestError, "4000 is no token", "suppress_tokens"),
        ({"extra_body": {"channel": "left"}}, openai.BadRequestError, "must be each, mix, or the number", "channel"),
        ({"extra_body": {"vad_filter": "maybe"}}, openai.BadRequestError, "'maybe' is not one of", "vad_filter"),
        ({"timestamp_granularities": ["word"]}, openai.BadRequestError, "need response_format verbose_json", None),
    ],
)
def test_what_cannot_be_done_is_said(client, live, changes, error, message, param):
    wishes = {"model": "small", "file": clip(1), "language": "en", **changes}
    with pytest.raises(error, match=message) as raised:
        client.audio.transcriptions.create(**wishes)
    assert param is None or raised.value.body["param"] == param
    assert live.quiet()


def test_health_metrics_and_unknown_paths(client, live):
    get = client._client.get
    health = get(f"{live.url}/health").json()
    assert health["status"] == "ok"
    assert health["languages"] == health["targets"] == ["de", "en"]
    assert (health["detects"], health["words"]) == (False, True)
    client.audio.transcriptions.create(model="small", file=clip(1), language="en")
    text = get(f"{live.url}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['canter_requests_total{endpoint="/v1/audio/transcriptions",model="small",status="200"}']) >= 1
    assert float(values['canter_audio_seconds_total{model="small"}']) >= 1.0
    assert float(values['canter_stage_seconds_total{model="small",stage="decoder"}']) > 0
    assert float(values["canter_requests_inside"]) == float(values["canter_pieces_waiting"]) == 0
    assert "process_resident_memory_bytes" in values
    nothing = get(f"{live.url}/v2/x")
    assert (nothing.status_code, "nothing at /v2/x" in nothing.json()["error"]["message"]) == (404, True)
    assert get(f"{live.url}/v1/audio/transcriptions").status_code == 405
    schema = get(f"{live.url}/openapi.json").json()
    form = schema["paths"]["/v1/audio/transcriptions"]["post"]["requestBody"]["content"]
    assert "multipart/form-data" in form


def test_server_timing_tells_where_the_time_went(client, live):
    files = {"file": clip(2), "language": (None, "en")}
    answer = client._client.post(f"{live.url}/v1/audio/transcriptions", files=files)
    parts = dict(part.split(";dur=") for part in answer.headers["server-timing"].split(", "))
    assert [*parts] == ["upload", "audio", "queue", "features", "encoder", "decoder"]
    assert sum(map(float, parts.values())) <= answer.elapsed.total_seconds() * 1000


def test_paths_that_clients_think_of_are_counted_together(model):
    with running(model, keys=frozenset({"sesame"})) as live, client_of(live) as client:
        for number in range(3):
            answer = client._client.post(f"{live.url}/v1/audio/{number}")
            assert answer.status_code == 401
        client._client.get(f"{live.url}/health")  # an answer is on its way before it is counted
        text = live.service.metrics.text().decode()
        assert 'canter_requests_total{endpoint="other",model="",status="401"} 3.0' in text
        assert "/v1/audio/" not in text


def test_the_path_that_is_asked_for_decides_on_the_key(model, monkeypatch):
    """The path decides, not the URL, which some versions of Starlette derive from a Host header like
    ``localhost:/health?``."""
    monkeypatch.setattr(Request, "url", property(lambda self: SimpleNamespace(path="/health")))
    with running(model, keys=frozenset({"sesame"})) as live, client_of(live) as client:
        assert client._client.get(f"{live.url}/metrics").status_code == 401


def test_api_keys(model):
    with running(model, keys=frozenset({"sesame", "open"})) as live:
        with client_of(live, "sesame") as client:
            assert client.audio.transcriptions.create(model="small", file=clip(1), language="en").text
            get = client._client.get
            assert get(f"{live.url}/health").status_code == get(f"{live.url}/").status_code == 200
            assert get(f"{live.url}/metrics").status_code == 401
            assert get(f"{live.url}/metrics", headers={"authorization": "Bearer open"}).status_code == 200
        with client_of(live, "sesam") as client, pytest.raises(openai.AuthenticationError, match="API key"):
            client.audio.transcriptions.create(model="small", file=clip(1), language="en")


def test_other_sites_and_names_are_refused(model):
    with running(model, hosts=frozenset({"127.0.0.1", "localhost"})) as live, client_of(live) as client:
        get = client._client.get
        assert get(f"{live.url}/health").status_code == 200
        assert get(f"{live.url}/health", headers={"host": "evil.example"}).status_code == 403
        assert get(f"{live.url}/health", headers={"origin": "http://evil.example"}).status_code == 403
        assert get(f"{live.url}/health", headers={"origin": "http://["}).status_code == 403
        assert get(f"{live.url}/health", headers={"origin": live.url}).status_code == 200


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # openai's, of translations
@pytest.mark.skipif(not SHARED, reason="CANTER_SHARED names no folder with Whisper and speech")
def test_whisper_with_the_openai_client():
    """Two clips at once give the same text as the engine; an English model refuses what it cannot do."""
    from concurrent.futures import ThreadPoolExecutor

    folder = Path(str(SHARED))
    lines = (folder / "data/speech/librivox_mini/manifest.jsonl").read_text().splitlines()
    rows = sorted(map(json.loads, lines), key=lambda row: row["duration"])[:2]
    paths = [folder / "data/speech/librivox_mini" / row["audio_filepath"] for row in rows]
    whisper = load_model(folder / "models/whisper-tiny.en")
    utterances = [Utterance(str(path), row["duration"], text="", lang="en") for path, row in zip(paths, rows)]
    engine = Engine(whisper, whisper.tokenizer.end, EngineConfig())
    expected = [found.text for found in transcribe(engine, whisper.tokenizer, utterances)]
    with running(whisper) as live, client_of(live) as client, ThreadPoolExecutor(2) as pool:

        def ask(path: Path) -> str:
            return client.audio.transcriptions.create(model="whisper-1", file=path).text

        assert list(pool.map(ask, paths)) == expected
        with pytest.raises(openai.BadRequestError, match="does not translate"):
            client.audio.translations.create(model="whisper-1", file=paths[0])
        with pytest.raises(
            openai.BadRequestError, match=r"'de' \(German\) is not a language of this model; it knows en"
        ):
            client.audio.transcriptions.create(model="whisper-1", file=paths[0], language="de")


def test_log_probabilities_as_openai_returns_them(client, expected):
    asked = {"model": "small", "file": clip(5), "language": "en", "include": ["logprobs"]}
    found = client.audio.transcriptions.create(**asked)
    assert found.text == expected[5]
    assert "".join(one.token for one in found.logprobs).strip() == found.text
    assert all(one.logprob <= 0 for one in found.logprobs)
    assert b"".join(bytes(map(int, one.bytes)) for one in found.logprobs).decode().strip() == found.text
    *deltas, done = client.audio.transcriptions.create(**asked, stream=True)
    assert [one.token for event in deltas for one in event.logprobs] == [one.token for one in found.logprobs]
    assert [one.logprob for one in done.logprobs] == [one.logprob for one in found.logprobs]
    verbose = client.audio.transcriptions.create(**asked, response_format="verbose_json")
    assert [one["token"] for one in verbose.segments[0].logprobs] == [one.token for one in found.logprobs]
    assert client.audio.transcriptions.create(model="small", file=clip(5), language="en").logprobs is None


def test_beams_hot_words_and_the_guard_are_fields_of_a_request(model, client, expected):
    """Each answer is that of the same settings in Python, whatever is decoded beside it."""
    recognizer = Recognizer(model, "small")

    def asked(**more) -> str:
        return client.audio.transcriptions.create(model="small", file=clip(5), language="en", extra_body=more).text

    def in_python(**more) -> str:
        return recognizer.transcribe(clip(5)[1], language="en", **more).text

    assert client.audio.transcriptions.create(model="small", file=clip(5), language="en").text == expected[5]
    words = {"hotwords": "four, eight", "hotword_weight": 20.0}
    wanted = {
        "beams": ({"beam_size": 3}, {"beam_size": 3}),
        "words": (words, words),
        "both": ({"beam_size": 3, **words}, {"beam_size": 3, **words}),
        "unguarded": ({"repetition_guard": False}, {"max_repeats": 0}),
    }
    with ThreadPoolExecutor(len(wanted)) as pool:
        found = dict(zip(wanted, pool.map(lambda one: asked(**one[0]), wanted.values())))
    assert found == {name: in_python(**python) for name, (_, python) in wanted.items()}
    assert found["words"] != expected[5]
    assert asked(n=1, top_p=1.0, patience="1.0", stream_include_usage=True, without_timestamps="true") == expected[5]


def test_requests_suppress_tokens_of_their_own(model, client, expected):
    """Each row of a batch has its own set, in greedy and in beam search; the answers are those of Python."""
    recognizer = Recognizer(model, "small")
    common = model.tokenizer.encode(expected[5])[:2]
    text = ",".join(map(str, common))
    wanted: dict[str, tuple[dict, dict]] = {
        "usual": ({}, {}),
        "-1": ({"suppress_tokens": "-1"}, {}),
        "text": ({"suppress_tokens": text}, {"suppress_tokens": common}),
        "json": ({"suppress_tokens": f"[-1,{text}]"}, {"suppress_tokens": [-1, *common]}),
        "list": ({"suppress_tokens": common, "beam_size": 3}, {"suppress_tokens": common, "beam_size": 3}),
        "none": ({"suppress_tokens": "", "beam_size": 3}, {"suppress_tokens": (), "beam_size": 3}),
        "most": ({"suppress_tokens": ",".join(map(str, range(5, 30)))}, {"suppress_tokens": [*range(5, 30)]}),
    }

    def asked(fields: dict) -> str:
        return client.audio.transcriptions.create(model="small", file=clip(5), language="en", extra_body=fields).text

    with ThreadPoolExecutor(len(wanted)) as pool:
        found = dict(zip(wanted, pool.map(lambda one: asked(one[0]), wanted.values())))
    assert found == {
        name: recognizer.transcribe(clip(5)[1], language="en", **options).text for name, (_, options) in wanted.items()
    }
    assert found["usual"] == found["-1"] == expected[5]
    assert len({*found.values()}) >= 4


@pytest.mark.parametrize("channel", ["mix", "each"])
def test_a_request_decodes_with_the_text_before_in_its_prompt(whisper, channel):
    """Chunk by chunk, as in Python, beside a request whose chunks are decoded at once; each channel by itself."""
    pause = np.zeros(16000 * 2, np.float32)
    parts = [np.concatenate([noise(16.0, seed), pause, noise(14.0, seed + 1)]) for seed in (0, 2)]
    audio = wav(np.stack(parts, 1))
    recognizer = Recognizer(whisper, "small")

    def in_python(**more) -> str:
        return recognizer.transcribe(audio, language="en", channel=channel, **more).text

    with running(whisper, rows=4) as live, client_of(live) as client:

        def asked(stream: bool = False, **more):
            extra = {"channel": channel, **more}
            return client.audio.transcriptions.create(
                model="small", file=("a.wav", audio), language="en", stream=stream, extra_body=extra
            )

        with ThreadPoolExecutor(3) as pool:
            plain, after, prompted = (
                pool.submit(asked, condition_on_previous_text=condition, prompt=prompt)
                for condition, prompt in ((False, ""), (True, ""), (True, "one two"))
            )
        assert after.result().text == in_python(condition_on_previous_text=True)
        assert prompted.result().text == in_python(condition_on_previous_text=True, prompt="one two")
        assert len({one.result().text for one in (plain, after, prompted)}) == 3
        *deltas, done = asked(stream=True, condition_on_previous_text=True)
        assert len({round(event.segment["start"]) for event in deltas}) > 1
        assert done.type == "transcript.text.done"
        assert live.quiet()


def test_pages_of_allowed_origins_may_call(model):
    site, other = "https://example.org", "https://other.example"
    preflight = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    key = {"authorization": "Bearer key"}
    with running(model, origins=frozenset({site}), keys=frozenset({"key"})) as live, client_of(live) as client:
        plain, url = client._client, f"{live.url}/v1/models"
        allowed = plain.options(url, headers={"origin": site, **preflight})
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, site)
        assert plain.options(url, headers={"origin": other, **preflight}).status_code == 400
        answer = plain.get(url, headers={"origin": site, **key})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, site)
        assert plain.get(url, headers={"origin": site}).status_code == 401
        refused = plain.get(url, headers={"origin": other, **key})
        assert refused.status_code == 403
        assert "--allowed-origins https://other.example" in refused.text


def test_requests_inside_are_answered_before_the_service_ends(model, expected):
    with (
        running(model) as live,
        ThreadPoolExecutor(1) as pool,
        client_of(live) as client,
        held(live.model.engine) as go_on,
    ):
        answer = pool.submit(client.audio.transcriptions.create, model="small", file=clip(5), language="en")
        assert came_about(lambda: live.model.scheduler.inside == 1)
        live.server.should_exit = True

        def refused() -> bool:
            try:
                socket.create_connection(("127.0.0.1", live.port)).close()
            except ConnectionRefusedError:
                return True
            return False

        assert came_about(refused)
        go_on()
        assert answer.result().text == expected[5]


def test_requests_of_several_adapters_share_a_batch(model, client, tmp_path):
    """Each answer is that of a service whose model has that adapter merged."""
    layers = {name: layer for name, layer in linear_layers(model).items() if "decoder" in name}
    adapters = {}
    for seed, name in enumerate(("medical", "legal")):
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for layer_name, layer in layers.items():
            tensors[f"{layer_name}.lora_A"] = torch.randn(2, layer.in_features, generator=generator) * 0.3
            tensors[f"{layer_name}.lora_B"] = torch.randn(layer.out_features, 2, generator=generator) * 0.3
        adapters[name] = LoraAdapter(2, 4.0, 0.0, tuple(layers)), tensors
    together = copy.deepcopy(model)
    together.set_bank(attach_bank(together, adapters, {name: name for name in adapters}))
    merged = {"small": copy.deepcopy(model)}
    for name, (adapter, tensors) in adapters.items():
        merged[name] = copy.deepcopy(model)
        merge(merged[name], adapter, tensors)
    expected = {}
    for name, one in merged.items():
        with running(one, language="en") as live:
            answers = [client_of(live).audio.transcriptions.create(model="small", file=clip(n)) for n in range(4)]
            expected[name] = [answer.text for answer in answers]
    assert len({tuple(texts) for texts in expected.values()}) == 3
    with running(together, language="en") as live:
        ours = client_of(live)
        assert [one.id for one in ours.models.list()] == ["small", "medical", "legal"]
        assert ours.models.retrieve("legal").id == "legal"
        asked = [(name, n) for n in range(4) for name in expected]
        with ThreadPoolExecutor(len(asked)) as pool:
            found = list(
                pool.map(lambda one: ours.audio.transcriptions.create(model=one[0], file=clip(one[1])).text, asked)
            )
        assert found == [expected[name][n] for name, n in asked]
        with pytest.raises(openai.NotFoundError, match="there is no model 'other' here, only 'small', 'medical'"):
            ours.audio.transcriptions.create(model="other", file=clip(0))
