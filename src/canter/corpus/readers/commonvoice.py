"""Common Voice: a split's TSV, clips in ``clips/``, durations (ms) in ``clip_durations.tsv`` where it is
there."""

import os
from pathlib import Path

from canter.corpus.columns import ANY, Columns
from canter.corpus.manifest import open_manifest, utterance_from_row
from canter.corpus.utterance import NumberedFinds
from canter.errors import ManifestError


def read_commonvoice(
    path: str, *, require_text: bool = True, measure_durations: bool = False, columns: Columns = ANY
) -> NumberedFinds:
    """``train.tsv`` and its like (columns ``path``, ``sentence``, ``locale``). Tabs part fields, nothing
    is quoted.

    A clip that ``clip_durations.tsv`` does not list, or all of them without it, has its header read.
    """
    folder = Path(path).absolute().parent
    durations = _durations(folder / "clip_durations.tsv")
    with open_manifest(path) as file:
        header = file.readline().decode("utf-8-sig", errors="replace").rstrip("\r\n").split("\t")
        columns.check(header, path)
        if not {"path", "sentence"} <= set(header):
            raise ManifestError(f"{path} has no columns path and sentence; it has {', '.join(header)}")
        for number, line in enumerate(file, 2):
            if not line.strip():
                continue
            try:
                values = line.decode().rstrip("\r\n").split("\t")
            except UnicodeDecodeError as error:
                yield number, f"invalid UTF-8: {error.reason} at byte {error.start + 1} of the line"
                continue
            if len(values) != len(header):
                yield number, f"wrong number of fields: {len(values)}, not {len(header)}"
                continue
            row = dict(zip(header, values, strict=True))
            clip = row[columns.audio or "path"]
            yield (
                number,
                utterance_from_row(
                    {
                        "audio_filepath": os.path.join("clips", clip) if clip else None,
                        "text": row[columns.text or "sentence"],
                        "lang": row.get(columns.lang or "locale") or None,
                        "duration": durations.get(clip),
                    },
                    folder,
                    require_text=require_text,
                    measure_durations=True,
                ),
            )


def _durations(path: Path) -> dict[str, float]:
    if not path.exists():
        return {}
    found = {}
    with open_manifest(path) as file:
        for line in file:
            clip, _, milliseconds = line.decode("utf-8", errors="replace").rstrip("\r\n").partition("\t")
            try:
                found[clip] = float(milliseconds) / 1000
            except ValueError:
                continue  # the heading, or a torn line: the clip's own header will be read
    return found
