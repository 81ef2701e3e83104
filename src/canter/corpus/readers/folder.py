"""A folder of audio and video files, each with its text in a ``.txt`` of the same name."""

import os
from pathlib import Path

from canter.corpus.columns import ANY, Columns
from canter.corpus.manifest import utterance_from_row
from canter.corpus.media import media_in
from canter.corpus.remote import refuse_special
from canter.corpus.utterance import NumberedFinds, Problem
from canter.errors import ManifestError


def audio_files(folder: str) -> list[str]:
    """Return all audio and video files below a folder, recognised by their content, in the order of their paths."""
    return media_in(folder)[0]


def read_folder(
    path: str, *, require_text: bool = True, measure_durations: bool = False, columns: Columns = ANY
) -> NumberedFinds:
    """Yield every audio and video file below ``path``, with its length, and one Problem that counts the other files.

    Without ``require_text`` no ``.txt`` is needed.
    """
    if not os.path.isdir(path):
        raise ManifestError(f"{path} is not a folder")
    found, others = media_in(os.path.abspath(path))
    number = 0
    texts = set[str]()
    for number, audio in enumerate(found, 1):
        beside = Path(audio).with_suffix(".txt")
        texts.add(str(beside))
        text, missing = None, str(beside) == audio  # a recording may have any name
        try:
            if not missing:
                refuse_special(beside)
                text = beside.read_text(encoding="utf-8").strip()
        except UnicodeDecodeError as error:
            yield number, Problem(str(beside), 1, f"invalid UTF-8: {error.reason} at byte {error.start + 1}")
            continue
        except OSError:
            missing = True
        if missing and require_text:
            yield number, Problem(audio, 1, f"text missing: there is no {beside.name} beside it")
            continue
        row = utterance_from_row(
            {"audio_filepath": audio, "text": text}, "", require_text=require_text, measure_durations=True
        )
        if row is not None:
            yield number, Problem(audio, 1, row) if isinstance(row, str) else row
    left = [one for one in others if one not in texts]
    if left:
        files = f"{len(left):,} files, the first" if len(left) > 1 else "1 file,"
        yield number + 1, Problem(path, 0, f"no audio or video: {files} {os.path.relpath(left[0], path)}")
