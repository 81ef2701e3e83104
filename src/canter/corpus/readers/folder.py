"""A folder of audio files, each with its text in a ``.txt`` of the same name."""

import os
from pathlib import Path

from canter.corpus.manifest import utterance_from_row
from canter.corpus.readers.common import AUDIO_SUFFIXES
from canter.corpus.remote import refuse_special
from canter.corpus.utterance import NumberedFinds, Problem
from canter.errors import ManifestError


def audio_files(folder: str) -> list[str]:
    """All audio files below a folder, by suffix, in the order of their paths."""
    return sorted(
        os.path.join(root, name)
        for root, _, names in os.walk(folder)
        for name in names
        if os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES and not name.startswith(".")
    )


def read_folder(path: str, *, require_text: bool = True, measure_durations: bool = False) -> NumberedFinds:
    """Every audio file below ``path``; durations from the headers. Without ``require_text`` no ``.txt``
    is needed."""
    if not os.path.isdir(path):
        raise ManifestError(f"{path} is not a folder")
    for number, audio in enumerate(audio_files(os.path.abspath(path)), 1):
        beside = Path(audio).with_suffix(".txt")
        text = None
        try:
            refuse_special(beside)
            text = beside.read_text(encoding="utf-8").strip()
        except UnicodeDecodeError as error:
            yield number, Problem(str(beside), 1, f"invalid UTF-8: {error.reason} at byte {error.start + 1}")
            continue
        except OSError:
            if require_text:
                yield number, Problem(audio, 1, f"text missing: there is no {beside.name} beside it")
                continue
        found = utterance_from_row(
            {"audio_filepath": audio, "text": text}, "", require_text=require_text, measure_durations=True
        )
        if found is not None:
            yield number, Problem(audio, 1, found) if isinstance(found, str) else found
