"""A folder of audio and video files, each with its text in a ``.txt`` of the same name."""

import os
from pathlib import Path

from canter.corpus.columns import ReadOptions
from canter.corpus.manifest import utterance_from_row
from canter.corpus.media import media_in
from canter.corpus.remote import refuse_special
from canter.corpus.utterance import NumberedRows, Problem
from canter.errors import ManifestError


def read_media_folder(path: str, options: ReadOptions) -> NumberedRows:
    """Yield every audio and video file below ``path``, with its length, and one Problem that counts the other files.

    A ``.txt`` is needed only where the options require a text.
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
        if missing and options.require_text:
            yield number, Problem(audio, 1, f"text missing: there is no {beside.name} beside it")
            continue
        row = utterance_from_row({"audio_filepath": audio, "text": text}, "", options.for_fields)
        if row is not None:
            yield number, Problem(audio, 1, row) if isinstance(row, str) else row
    unused = [one for one in others if one not in texts]
    if unused:
        files = f"{len(unused):,} files, the first" if len(unused) > 1 else "1 file,"
        yield number + 1, Problem(path, 0, f"no audio or video: {files} {os.path.relpath(unused[0], path)}")
