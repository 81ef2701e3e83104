"""The page in a real browser: a file and the microphone are transcribed, segments play, and the stages are drawn."""

import json
from pathlib import Path

import numpy as np
import openai
import pytest

from canter.serving.model import ModelSource

from .chromium import Chromium, find
from .conftest import noise, running, wav

pytestmark = pytest.mark.skipif(find() is None, reason="no Chromium on this machine (apt install chromium)")

DONE = "document.getElementById('result').dataset.done === '{}'"
TEXT = "document.getElementById('text').textContent"
FACTS = "[...document.querySelectorAll('#facts li')].map(one => one.textContent)"
CLICK = "document.querySelector('#text {}').click(); "
PLAYING = "[current, player.paused, $('text').querySelector('.now') === $('text').children[current]]"
WIDTHS = "[...document.querySelectorAll('#bar rect')].map(one => [one.dataset.stage, one.width.baseVal.value])"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("page")
    (root / "clip.wav").write_bytes(wav(noise(3.0)))
    (root / "broken.wav").write_bytes(b"no sound at all")
    pause = np.zeros(16000 * 2, np.float32)  # three segments, longer together than the model's window of 40 s
    talks = np.concatenate([noise(20.0, 1), pause, noise(17.0, 2), pause, noise(18.0, 3)])
    (root / "talks.wav").write_bytes(wav(talks))
    (root / "microphone.wav").write_bytes(wav(np.repeat(noise(10.0), 3), 48000))
    return root


@pytest.fixture(scope="module")
def browser(folder):
    found = Chromium(str(find()), folder / "profile", folder / "microphone.wav")
    yield found
    found.close()


def test_file_microphone_and_errors(browser, folder, live):
    browser.open(live.url)
    browser.wait("document.getElementById('model').textContent === 'small'")
    assert browser.run("[...document.getElementById('language').options].map(one => one.value)") == [
        "en",  # by name
        "de",
    ]
    browser.run("document.getElementById('language').value = 'en'")

    browser.choose("#file", folder / "clip.wav")
    browser.wait(DONE.format(1))
    assert browser.run(TEXT)
    widths = dict(browser.run(WIDTHS))
    assert [*widths] == ["upload", "audio", "queue", "features", "encoder", "decoder", "other"]
    assert sum(widths.values()) == pytest.approx(1000, abs=1)
    assert widths["encoder"] > 0
    assert widths["decoder"] > 0
    assert "Decoder" in browser.run("document.getElementById('legend').innerText")
    assert "3.0 s of audio" in browser.run("document.getElementById('rtfx').textContent")
    assert browser.run(FACTS) == ["Language English", "Duration 3.0 s", "Segments 1"]
    assert browser.run("as('srt')").startswith("1\n00:00:00,000 --> 00:00:02,96")
    assert not browser.run("document.getElementById('wave').hidden")

    browser.choose("#file", folder / "broken.wav")
    browser.wait("!document.getElementById('problem').hidden")
    assert "broken.wav is not audio" in browser.run("document.getElementById('problem').innerText")
    browser.events = [event for event in browser.events if event["method"] != "Log.entryAdded"]  # the 400

    browser.run("document.getElementById('record').click()")
    browser.wait("/^Stop · 0:(0[1-9]|[1-5])/.test(document.getElementById('record-label').textContent)")
    browser.run("document.getElementById('record').click()")
    browser.wait(DONE.format(2))
    assert browser.run("document.getElementById('source').textContent") == "recording.wav"
    assert browser.run(TEXT)
    assert browser.run(CLICK.format("li") + PLAYING) == [0, False, True]
    browser.run("player.pause()")
    assert browser.run("document.getElementById('history').children.length") == 2

    assert not browser.complaints()
    assert all(url.startswith(live.url) for url in browser.requested())  # self-contained


def press(browser, key: str) -> None:
    """Press a key."""
    for kind in ("rawKeyDown", "keyUp"):
        browser.send("Input.dispatchKeyEvent", type=kind, key=key, code="Space" if key == " " else key)


def test_segments_and_words_play_and_can_be_walked_by_keyboard(browser, folder, live):
    browser.open(live.url)
    browser.wait("document.getElementById('model').textContent === 'small'")
    browser.run("document.getElementById('language').value = 'en'")
    browser.run("seen = 0; new MutationObserver(() => { if ($('text').className) seen = segments.length; })"
                ".observe($('text'), {childList: true})")  # fmt: skip
    browser.choose("#file", folder / "talks.wav")
    browser.wait(DONE.format(1), 1200)
    count = browser.run("segments.length")
    assert count > 1
    assert browser.run("seen") == count  # each was shown while the stream went on
    assert browser.run(FACTS) == ["Language English", "Duration 59.0 s", f"Segments {count}"]
    assert browser.run("[...document.querySelectorAll('#text p')].map(one => one.textContent)") == browser.run(
        "segments.map(one => one.text)"
    )

    at, playing = browser.run(CLICK.format("li:nth-child(2) .at") + "[player.currentTime, " + PLAYING + "]")
    assert at == pytest.approx(browser.run("segments[1].start"), abs=0.2)
    assert playing == [1, False, True]
    later = "(word, place, all) => place && all[place + 1]?.start > word.start + 0.1"
    place = browser.run(f"segments[1].words.findIndex({later})")
    assert place > 0
    word = f"li:nth-child(2) p span:nth-child({place + 1})"
    at, now = browser.run(
        CLICK.format(word) + f"[player.currentTime, document.querySelector('#text {word}').className]"
    )
    assert at == pytest.approx(browser.run(f"segments[1].words[{place}].start"), abs=0.2)
    assert now == "now"

    browser.run("player.pause(); document.activeElement.blur()")
    press(browser, " ")
    assert not browser.run("player.paused")
    press(browser, " ")
    assert browser.run("player.paused")
    browser.run("player.currentTime = segments[0].start; document.querySelector('#text .at').focus()")
    press(browser, "ArrowDown")
    assert browser.run("[player.currentTime, current, document.activeElement.textContent]") == [
        browser.run("segments[1].start"),
        1,
        browser.run("clock(segments[1].start)"),
    ]
    press(browser, "ArrowRight")
    assert browser.run("player.currentTime") == pytest.approx(browser.run("segments[1].words[1].start"), abs=1e-4)
    browser.run("player.currentTime = segments[1].start")
    press(browser, "ArrowUp")
    assert browser.run("current") == 0
    assert browser.run("document.querySelectorAll('#text [tabindex=\"0\"]').length") == 1
    assert not browser.complaints()


def test_downloads_are_what_the_service_writes(browser, folder, live):
    browser.open(live.url)
    browser.wait("document.getElementById('model').textContent === 'small'")
    browser.run("document.getElementById('language').value = 'en'")
    browser.choose("#file", folder / "clip.wav")
    browser.wait(DONE.format(1))
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="any", max_retries=0) as client:
        for kind, form in (("srt", "srt"), ("vtt", "vtt"), ("txt", "text")):
            text = client.audio.transcriptions.create(
                model="small", file=folder / "clip.wav", language="en", response_format=form
            )
            assert browser.run(f"as('{kind}')") == text
    assert (
        browser.run(
            "new Promise(done => { HTMLAnchorElement.prototype.click = function () { done(this.download); }; "
            "document.querySelector('[data-save=vtt]').click(); })"
        )
        == "clip.vtt"
    )


def test_a_whisper_detects_the_language_and_the_page_names_it(browser, folder, whisper):
    with running(whisper) as live:
        browser.open(live.url)
        browser.wait("document.getElementById('language').options.length > 0")
        options = "[...document.getElementById('language').options].map(one => one.text)"
        assert browser.run(options) == ["Detect", "English", "Spanish"]
        assert browser.run("document.getElementById('language').value") == ""
        browser.choose("#file", folder / "clip.wav")
        browser.wait(DONE.format(1))
        assert browser.run(FACTS)[0] in ("Detected language English", "Detected language Spanish")


def test_errors_are_one_line(browser, folder, live):
    browser.open(live.url)
    browser.wait("document.getElementById('model').textContent === 'small'")
    shown = "document.querySelector('#problem p').textContent"
    for status, body, told in (
        (502, "<html>\n<h1>Bad gateway</h1>", "The service answered 502"),
        (400, '{"error": {"message": "two\\nlines"}}', "two lines"),
        (200, 'data: {"type": "transcript.text.delta", "segment": {"start": 0, "end": 1, "text": "a"}}\n\n',
         "The connection failed"),
        (200, 'data: {"error": {"message": "not finished in time"}}\n\n', "not finished in time"),
    ):  # fmt: skip
        browser.run("$('problem').hidden = true; asked = fetch; window.fetch = async (url, options) => "
                    f"options ? new Response({json.dumps(body)}, {{status: {status}}}) : asked(url)")  # fmt: skip
        browser.choose("#file", folder / "clip.wav")
        browser.wait("!document.getElementById('problem').hidden")
        browser.run("window.fetch = asked")
        assert told in browser.run(shown)
        assert "\n" not in browser.run(shown)


def test_api_key(browser, folder, model):
    with running(model, keys=frozenset({"sesame"})) as live:
        browser.open(live.url)
        browser.wait("!document.getElementById('key-box').hidden")
        browser.run("document.getElementById('language').value = 'en'")
        browser.choose("#file", folder / "clip.wav")
        browser.wait("document.getElementById('problem').innerText.includes('API key')")
        browser.run("document.getElementById('key').value = 'sesame'")
        browser.choose("#file", folder / "clip.wav")
        browser.wait(DONE.format(1))
        assert browser.run("document.getElementById('problem').hidden")


def test_one_of_several_models_is_chosen(browser, folder, model, whisper):
    """The languages are those of the chosen model, which gets the audio."""
    sources = [ModelSource((name,), one) for name, one in (("canary", model), ("whisper", whisper))]
    with running(*sources) as live:
        browser.open(live.url)
        browser.wait("document.getElementById('choice').options.length === 2")
        assert not browser.run("document.getElementById('model-box').hidden")
        languages = "[...document.getElementById('language').options].map(one => one.text)"
        for number, (name, known) in enumerate(
            {"canary": ["English", "German"], "whisper": ["Detect", "English", "Spanish"]}.items(), 1
        ):
            browser.run(f"$('choice').value = '{name}'; $('choice').dispatchEvent(new Event('change'))")
            assert browser.run("[$('model').textContent, document.title]") == [name, f"{name} · Canter"]
            assert browser.run(languages) == known
            browser.run("document.getElementById('language').value = 'en'")
            browser.choose("#file", folder / "clip.wav")
            browser.wait(DONE.format(number))
        for name in ("canary", "whisper"):
            assert f'canter_audio_seconds_total{{model="{name}"}} 3.0' in live.service.metrics.text().decode()
        assert not browser.complaints()
