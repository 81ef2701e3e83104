"""Names that manifests and tables use for a row's audio, text and language, and the options for reading rows."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

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

    def of(self, row: Mapping[str, object], field: str) -> object:
        """Return a row's ``text``, ``lang`` or ``audio``; None where it has none."""
        chosen = getattr(self, field)
        return row.get(chosen) if chosen else first_of(row, NAMES[field])

    def check(self, names: Iterable[str], path: str, require_text: bool = False) -> None:
        """Raise ManifestError where the table at ``path`` lacks a chosen column, or any column of a required text."""
        names = list(names)
        if require_text and not self.text and not {*TEXT_NAMES, "answer"} & set(names):
            raise no_column(path, "text", names)
        for one in fields(self):
            chosen = getattr(self, one.name)
            if chosen and chosen not in names:
                raise ManifestError(f"{path} has no column {chosen!r} of {one.name}; it has {', '.join(names)}")


def no_column(path: str, field: str, names: Iterable[str]) -> ManifestError:
    """Return the error for a table in which no column of text or audio is found."""
    return ManifestError(
        f"{path} has no column of {field}; name it (--{field}-column); it has {', '.join(names)[:200]}"
    )


ANY = Columns()


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """Options for turning the rows of a source into utterances."""

    require_text: bool = True
    """Refuse rows without a text, which can only be transcribed."""
    measure_durations: bool = False
    """Read a duration that a row does not state from the header of its audio."""
    columns: Columns = ANY

    @property
    def for_fields(self) -> "ReadOptions":
        """The options for rows made by `common_fields`: their columns are resolved, their durations may be missing."""
        return ReadOptions(self.require_text, measure_durations=True)


DEFAULT_OPTIONS = ReadOptions()


def first_of(row: Mapping[str, object], names: Iterable[str]) -> object:
    """Return the first value that is not None."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def common_fields(row: Mapping[str, object], columns: Columns = ANY) -> dict[str, object]:
    """Return the fields of ``row`` under the names of a NeMo manifest; the caller adds the audio."""
    found: dict[str, object] = {field: columns.of(row, field) for field in ("text", "lang")}
    found["id"] = first_of(row, ID_NAMES)
    kept = ("duration", "offset", "channel_selector", "num_tokens", "answer", "_skipme", *OPTIONAL_TEXT[1:])
    return found | {field: row.get(field) for field in kept}
