"""The page in a real browser: a file and the microphone are transcribed, and the time is drawn."""

from pathlib import Path

import numpy as np
import pytest

from .chromium import Chromium, find
from .conftest import noise, running, wav

pytestmark = pytest.mark.skipif(find() is None, reason="no Chromium on this machine (apt install chromium)")

DONE = "document.getElementById('result').dataset.done === '{}'"
TEXT = "document.getElementById('text').textContent"
WIDTHS = (
    "[...document.querySelectorAll('#bar rect')].map(one => [one.dataset.stage, one.width.baseVal.value])"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("page")
    (root / "clip.wav").write_bytes(wav(noise(3.0)))
    (root / "broken.wav").write_bytes(b"no sound at all")
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
        "de",
        "en",
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
    assert browser.run("as('srt')").startswith("1\n00:00:00,000 --> 00:00:03,000\n")
    assert not browser.run("document.getElementById('wave').hidden")

    browser.choose("#file", folder / "broken.wav")
    browser.wait("!document.getElementById('problem').hidden")
    assert "broken.wav is not audio" in browser.run("document.getElementById('problem').innerText")
    browser.events = [event for event in browser.events if event["method"] != "Log.entryAdded"]  # the 400

    browser.run("document.getElementById('record').click()")
    browser.wait("document.getElementById('record-label').textContent.startsWith('Stop · 0:01')")
    browser.run("document.getElementById('record').click()")
    browser.wait(DONE.format(2))
    assert "recording.wav · 0:0" in browser.run("document.getElementById('source').textContent")
    assert browser.run(TEXT)
    assert browser.run("document.getElementById('history').children.length") == 2

    assert not browser.complaints()
    assert all(url.startswith(live.url) for url in browser.requested())  # self-contained


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
