"""An utterance, and a row that cannot be used: what every reader yields and every later stage takes."""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

from canter.redaction import redacted

OPTIONAL_TEXT = ("lang", "source_lang", "target_lang", "taskname", "pnc")


@dataclass(frozen=True, slots=True)
class Utterance:
    """A segment of speech and its transcript.

    ``audio_filepath`` is an absolute path, a URL, or a member of a container (`canter.corpus.containers`). ``duration``
    and ``offset`` are seconds; with an ``offset``, even 0, the utterance is that segment of the file, without one
    (None) it is the complete file. ``channel_selector`` is the channel to read, from 0; None averages all channels.
    ``num_tokens`` is the length of the target, prompt and end token included, where the manifest states it.
    """

    audio_filepath: str
    duration: float
    text: str
    offset: float | None = None
    lang: str | None = None
    source_lang: str | None = None
    target_lang: str | None = None
    taskname: str | None = None
    pnc: str | None = None
    num_tokens: int | None = None
    id: str | None = None
    channel_selector: int | None = None

    @property
    def text_lang(self) -> str | None:
        """The language of the text: the target's, for a translation."""
        return self.target_lang or self.lang or self.source_lang

    @property
    def identity(self) -> int:
        """64 bits that are equal for rows of the same audio, text, languages, task and ``id``.

        An id does not suffice: in many corpora it is the sentence's or the speaker's.
        """
        key = (
            self.id, self.audio_filepath, self.offset or 0.0, self.duration, self.channel_selector, self.text,
            self.source_lang, self.target_lang, self.taskname, self.pnc,
        )  # fmt: skip
        return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True)
class Problem:
    """A row that cannot be used. ``line`` counts from 1; in a container it is the number of the member or row."""

    file: str
    line: int
    reason: str

    def __post_init__(self) -> None:
        for name in ("file", "reason"):  # half a surrogate pair cannot be written to a file or a terminal
            value = redacted(getattr(self, name))
            if not value.isascii():
                value = value.encode("utf-8", "backslashreplace").decode()
            object.__setattr__(self, name, value)

    @property
    def kind(self) -> str:
        """The reason up to its first colon, by which problems are counted."""
        return self.reason.partition(":")[0]

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


Rows = Iterator[Utterance | Problem]
Found = Utterance | Problem | str | None  # str: the reason why a row cannot be used; None: a row to skip (_skipme)
NumberedRows = Iterator[tuple[int, Found]]  # what readers yield: the number of the line, member or row, and the row
DUPLICATE = "duplicate: the same audio, text and id as an earlier row; to repeat data use weights"


def one_line(error: BaseException) -> str:
    """Return an error's message on one line, shortened to 200 characters."""
    return " ".join(str(error).split())[:200]
