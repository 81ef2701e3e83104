"""A headless Chromium, driven through its pipe (DevTools protocol, messages that end with a zero byte)."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find() -> str | None:
    """Return the path of the browser, None if it is not installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Chromium:
    """One page in its own browser; ``microphone`` is a WAV file that stands for the microphone."""

    def __init__(self, program: str, profile: Path, microphone: Path | None = None):
        into_child, self._out = os.pipe()
        self._in, from_child = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                 "--mute-audio", "--disable-background-networking", "--disable-component-update",
                 "--autoplay-policy=no-user-gesture-required", "--remote-debugging-pipe",
                 f"--user-data-dir={profile}", "--window-size=1000,1400"]  # fmt: skip
        if microphone:
            flags += ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
                      f"--use-file-for-fake-audio-capture={microphone}"]  # fmt: skip

        # Chromium reads file descriptor 3 and writes 4; the pair is moved out of the way of those first.
        command = 'exec 8<&"$1" 9>&"$2"; shift 2; exec "$@" 3<&8 4>&9'
        self.process = subprocess.Popen(
            ["bash", "-c", command, "-", str(into_child), str(from_child), program, *flags, "about:blank"],
            pass_fds=(into_child, from_child),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(into_child)
        os.close(from_child)
        self._rest, self._number = b"", 0
        self.events: list[dict[str, Any]] = []
        self.session: str | None = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "DOM", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Return the result of a command. Raise RuntimeError with the browser's message if it fails."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive(1800.0)  # a busy machine; a browser that has ended is noticed at once
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self.events.append(answer)

    def _receive(self, seconds: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            if not select.select([self._in], [], [], seconds)[0]:
                raise TimeoutError("the browser does not answer")
            data = os.read(self._in, 1 << 16)
            if not data:
                raise RuntimeError("the browser has ended")
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def open(self, url: str) -> None:
        """Open a page, and forget requests and errors of earlier pages."""
        self.send("Page.navigate", url="about:blank")
        self.wait("document.readyState === 'complete'")
        self.events.clear()
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """Return the awaited value of a JavaScript expression."""
        answer = self.send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"].get("description", "a script failed"))
        return answer["result"].get("value")

    def wait(self, script: str, looks: int = 400) -> None:
        """Wait until the expression is true.

        Attempts are counted instead of time: a machine that stalls does not give the browser that time.
        """
        for _ in range(looks):
            if self.run(script):
                return
            time.sleep(0.05)
        raise TimeoutError(f"never true: {script}; the page says {self.run('document.body.innerText')!r}")

    def choose(self, selector: str, file: Path) -> None:
        """Put a file into an ``<input type=file>``."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def complaints(self) -> list[str]:
        """Errors that the console and the page's scripts reported."""
        found = []
        for event in self.events:
            if event["method"] == "Runtime.exceptionThrown":
                found.append(json.dumps(event["params"]["exceptionDetails"])[:500])
            elif event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
                found.append(event["params"]["entry"]["text"])
        return found

    def requested(self) -> list[str]:
        """Addresses that the page requested."""
        asked = [event["params"]["request"]["url"] for event in self.events if "request" in event["params"]]
        return [url for url in asked if not url.startswith(("data:", "blob:"))]

    def picture(self, file: Path) -> None:
        """Return the page as PNG."""
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._in)
        os.close(self._out)
