"""Names that manifests and tables give to a row's audio, text and language, and the columns that a user chose."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from canter.corpus.utterance import OPTIONAL_TEXT
from canter.errors import ManifestError

# In the order in which they are tried; the first that holds anything is taken.
AUDIO_NAMES = (
    "audio_filepath", "audio_file", "audio", "file_name", "filename", "path", "file", "audio_path", "wav", "wav_path",
    "wav_filename", "mp3", "flac", "audio_bytes",
)  # fmt: skip
TEXT_NAMES = (
    "text", "sentence", "transcription", "transcript", "transcripts", "normalized_text", "raw_transcription", "txt",
    "wrd", "words", "utterance",
)  # fmt: skip
LANG_NAMES = ("lang", "language", "locale", "lang_id")
ID_NAMES = ("id", "utt_id", "utterance_id", "segment_id", "ID")
NAMES = {"audio": AUDIO_NAMES, "text": TEXT_NAMES, "lang": LANG_NAMES}


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns (or keys of JSON) that hold a row's text, language and audio; "" takes the first customary name."""

    text: str = ""
    lang: str = ""
    audio: str = ""

    def __bool__(self) -> bool:
        return bool(self.text or self.lang or self.audio)

    def of(self, row: Mapping[str, Any], field: str) -> Any:
        """Return a row's ``text``, ``lang`` or ``audio``; None where it has none."""
        chosen = getattr(self, field)
        return row.get(chosen) if chosen else first_of(row, NAMES[field])

    def check(self, names: Iterable[str], path: str, require_text: bool = False) -> None:
        """Raise ManifestError where the table at ``path`` lacks a column that was chosen, or one of text though it is
        required."""
        names = list(names)
        if require_text and not self.text and not {*TEXT_NAMES, "answer"} & set(names):
            raise ManifestError(
                f"{path} has no column of text; name it (--text-column); it has {', '.join(names)[:200]}"
            )
        for one in fields(self):
            chosen = getattr(self, one.name)
            if chosen and chosen not in names:
                raise ManifestError(f"{path} has no column {chosen!r} of {one.name}; it has {', '.join(names)}")


ANY = Columns()


def first_of(row: Mapping[str, Any], names: Iterable[str]) -> Any:
    """Return the first value that is not None."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def common_fields(row: Mapping[str, Any], columns: Columns = ANY) -> dict[str, Any]:
    """Return the manifest's fields of a row, whatever it calls them; the audio is left to the reader."""
    found: dict[str, Any] = {field: columns.of(row, field) for field in ("text", "lang")}
    found["id"] = first_of(row, ID_NAMES)
    kept = ("duration", "offset", "channel_selector", "num_tokens", "answer", "_skipme", *OPTIONAL_TEXT[1:])
    return found | {field: row.get(field) for field in kept}
