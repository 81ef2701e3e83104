"""Processes and files of tests in several folders."""

import fcntl
import json
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest


def gone(group: int) -> bool:
    """Return whether all processes of the group have ended."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@contextmanager
def leased(path: Path) -> Iterator[None]:
    """A process that opens the file waits until the block ends, because its lease is not given up."""
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    try:
        with open(path, "rb+") as file:
            try:
                fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            except OSError as error:
                pytest.skip(f"no leases on this file system: {error}")
            yield
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    finally:
        signal.signal(signal.SIGIO, before)


def write_token_lists(source: Path, folder: Path, languages: Sequence[str] = ()) -> dict[str, int]:
    """Write the tokens of an English-only ``tokenizer.json`` as older Whispers have them: ``vocab.json``,
    ``merges.txt``, ``added_tokens.json`` and ``special_tokens_map.json``. Return the added tokens.

    With ``languages`` they are those of a multilingual Whisper, in its order.
    """
    values = json.loads(source.read_text())
    vocabulary = values["model"]["vocab"]
    added = {one["content"]: one["id"] for one in values["added_tokens"] if one["content"] not in vocabulary}
    if languages:
        end = vocabulary.pop("<|endoftext|>")
        vocabulary[""] = end
        names = ("endoftext", "startoftranscript", *languages, "translate", "transcribe", "startoflm", "startofprev",
                 "nospeech", "notimestamps", *(f"{0.02 * step:.2f}" for step in range(1501)))  # fmt: skip
        added = {f"<|{name}|>": end + 1 + place for place, name in enumerate(names)}
    merges = [" ".join(pair) for pair in values["model"]["merges"]]
    specials = {f"{name}_token": "<|endoftext|>" for name in ("bos", "eos", "pad", "unk")}
    specials["additional_special_tokens"] = [name for name in added if not name[2].isdigit()]
    for name, content in (("vocab", vocabulary), ("added_tokens", added), ("special_tokens_map", specials)):
        (folder / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return added
