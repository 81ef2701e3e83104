"""One JSON value as a manifest: an array of rows or of Lhotse cuts, or SpeechBrain's object of rows by name."""

import json
import zlib

from canter.corpus.columns import ReadOptions, common_fields, first_of
from canter.corpus.manifest import open_manifest, shown, utterance_from_row
from canter.corpus.readers.lhotse import is_cut, utterance_from_cut
from canter.corpus.readers.tables import unresolved
from canter.corpus.remote import folder_of
from canter.corpus.utterance import NumberedRows
from canter.errors import ManifestError

MOST_BYTES = 256 << 20  # which take about ten times as much memory


def read_document(path: str, options: ReadOptions) -> NumberedRows:
    """Yield the rows of a JSON array, or of an object of objects; rows count from 1."""
    value = _load(path)
    base = folder_of(path)
    if isinstance(value, dict):
        for number, (name, row) in enumerate(value.items(), 1):
            if not isinstance(row, dict):
                yield number, f"not a JSON object: {shown(row)}"
                continue
            fields = common_fields(row, options.columns)
            fields["id"] = fields["id"] or name
            fields["audio_filepath"] = where = options.columns.of(row, "audio")
            fields["duration"] = first_of(row, ("duration", "length"))  # seconds in SpeechBrain
            yield number, unresolved(where) or utterance_from_row(fields, base, options.for_fields)
        return
    for number, row in enumerate(value, 1):
        read = utterance_from_cut if is_cut(row) else utterance_from_row
        yield number, read(row, base, options)


def is_document(path: str) -> bool:
    """Return whether a file is one JSON value: an array, or an object that its first line does not end."""
    try:
        with open_manifest(path) as file:
            first = b""
            while not first.strip():
                first = file.readline(1 << 20)
                if not first:
                    return False
    except (OSError, EOFError, ValueError, zlib.error):
        return False
    first = first.removeprefix(b"\xef\xbb\xbf").strip()
    if not first.startswith((b"[", b"{")):
        return False
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):  # it continues in the next line, or is a damaged line of JSONL
        return first.startswith(b"[") or (first == b"{" and path.removesuffix(".gz").endswith(".json"))
    if isinstance(value, dict):
        return len(value) > 0 and all(isinstance(one, dict) for one in value.values())
    return any(isinstance(one, dict) for one in value)


def _load(path: str) -> list[object] | dict[str, object]:
    with open_manifest(path) as file:
        try:
            data = file.read(MOST_BYTES + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise ManifestError(f"{path} is damaged ({error})") from None
    if len(data) > MOST_BYTES:
        raise ManifestError(
            f"{path} is a JSON array of over {MOST_BYTES >> 20} MiB; write a row on each line: jq -c '.[]'"
        )
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path} is not valid JSON: {str(error)[:120]}") from None
    if not isinstance(value, list | dict):
        raise ManifestError(f"{path} is neither a JSON array nor an object of rows")
    return value
