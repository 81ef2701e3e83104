"""An utterance, and a row that is none: what every reader yields and every later stage takes."""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

from canter.redaction import redacted

OPTIONAL_TEXT = ("lang", "source_lang", "target_lang", "taskname", "pnc")


@dataclass(frozen=True, slots=True)
class Utterance:
    """One stretch of speech and what was said in it.

    ``audio_filepath`` is an absolute path, a URL, or a member of a container,
    ``shard.tar::name.flac@START+BYTES`` (see `canter.corpus.audio`). ``duration`` and ``offset`` are
    seconds; with an ``offset``, 0 too, the utterance is that stretch of the file, without one (None) the whole
    file. ``channel_selector`` is the one channel to be heard, from 0; None stands for the average of all.
    ``num_tokens`` is the length of the target, prompt and end token included, where the manifest already knows
    it.
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
        """The language in which the text is written: of a translation, the target's."""
        return self.target_lang or self.lang or self.source_lang

    @property
    def identity(self) -> int:
        """64 bits that two rows share when they are the same utterance: the same audio, text and ``id``. An id
        alone is not enough: many corpora's is the sentence's or the speaker's."""
        key = (
            self.id, self.audio_filepath, self.offset or 0.0, self.duration, self.channel_selector, self.text,
            self.source_lang, self.target_lang, self.taskname, self.pnc,
        )  # fmt: skip
        return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True)
class Problem:
    """A row that cannot be used. ``line`` counts from 1; in a container it is the number of the member or
    row."""

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
        """What problems are counted by: the reason up to its first colon."""
        return self.reason.partition(":")[0]

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


Rows = Iterator[Utterance | Problem]
Found = Utterance | Problem | str | None  # str: why it is no utterance; None: passed over on request
NumberedFinds = Iterator[tuple[int, Found]]  # what readers yield: the line, or the like, and what it holds
DUPLICATE = "duplicate: the same audio, text and id as an earlier row; to repeat data use weights"
