"""What the readers of foreign formats share: the names that other houses give to the same things."""

from collections.abc import Mapping
from typing import Any

from canter.corpus.utterance import OPTIONAL_TEXT

AUDIO_SUFFIXES = frozenset(
    [
        ".wav",
        ".flac",
        ".mp3",
        ".ogg",
        ".oga",
        ".opus",
        ".m4a",
        ".mp4",
        ".aac",
        ".webm",
        ".wma",
        ".aif",
        ".aiff",
        ".au",
        ".caf",
        ".w64",
        ".sph",
        ".nist",
        ".mkv",
        ".mka",
        ".mov",
        ".avi",
        ".m4v",
        ".m4b",
        ".mpg",
        ".mpeg",
        ".ts",
        ".mts",
        ".3gp",
        ".flv",
        ".wmv",
        ".amr",
        ".mp2",
        ".mpga",
        ".ac3",
        ".eac3",
        ".dts",
        ".m2ts",
        ".m4r",
        ".3g2",
        ".ogv",
        ".spx",
        ".ape",
        ".wv",
        ".tta",
        ".rm",
        ".ra",
        ".mxf",
        ".rf64",
        ".bwf",
        ".snd",
    ]
)
TEXT_NAMES = ("text", "sentence", "transcription", "transcript", "transcripts", "normalized_text", "txt")
LANG_NAMES = ("lang", "language", "locale", "lang_id")
ID_NAMES = ("id", "utt_id", "utterance_id", "segment_id")


def common_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest fields of a foreign row, whatever it calls them (the first name that holds anything)."""
    found: dict[str, Any] = {}
    for field, names in (("text", TEXT_NAMES), ("lang", LANG_NAMES), ("id", ID_NAMES)):
        found[field] = next((row[name] for name in names if row.get(name) is not None), None)
    for field in ("duration", "offset", "channel_selector", "num_tokens", "_skipme", *OPTIONAL_TEXT[1:]):
        found[field] = row.get(field)
    return found
