"""The length index: duration, number of target tokens and place of every utterance.

An Arrow IPC file of one record batch, memory-mapped, 16 bytes a row (docs/corpus.md has the layout):

    seconds float32 | tokens uint16 | source uint16 | place uint64 = shard number << 40 | byte in the shard

A shard is a JSONL file of rows. The rows of a shard are neighbours, so that a window drawn in complete blocks reads its
files sequentially. Rows of formats that cannot be read line by line (gzip, tars, Arrow, tables) are written as JSONL
beside the index by `canter.corpus.build`.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from canter.corpus.columns import ANY, Columns, ReadOptions
from canter.corpus.manifest import count_problems, parse_line, utterance_from_row
from canter.corpus.remote import open_binary, refuse_special
from canter.corpus.utterance import OPTIONAL_TEXT, Problem, Utterance
from canter.errors import ManifestError
from canter.files import replacing, write_text

FORMAT = "canter-index/1"
PLACE_BITS = 40
UNREADABLE = "this line of the list cannot be read"
RANGE = re.compile(r"[_-]*(\{\d+\.\.\d+\}|_OP_\d+\.\.\d+_CL_)")  # of shards, in the name of a source
MOST_TOKENS = np.iinfo(np.uint16).max
MOST_SOURCES = np.iinfo(np.uint16).max + 1
VERIFIED_ROWS = 1_000_000  # up to which an index is verified whenever it is opened: 16 MB, some 50 ms
_SCHEMA = [("seconds", pa.float32()), ("tokens", pa.uint16()), ("source", pa.uint16()), ("place", pa.uint64())]
_TYPES = (np.float32, np.uint16, np.uint16, np.uint64)  # the same for NumPy


@dataclass(frozen=True)
class Source:
    """One source of the training mixture."""

    path: str
    name: str = ""
    weight: float | None = None
    """Weight of its draws relative to the other sources; None: its number of rows, as in one pass over all data."""
    audio: str = ""
    """Tars of a tarred NeMo manifest."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Values of language and task fields that a row leaves unset."""
    columns: Columns = ANY
    """Names of its columns of text, language and audio, where they are not customary."""

    def __post_init__(self) -> None:
        if not self.name:
            # data/an4/train.jsonl -> an4/train, and so train_{0..3}.jsonl
            *_, folder, file = ("", "", *Path(RANGE.sub("", self.path.partition("::")[0])).parts)
            object.__setattr__(self, "name", f"{folder}/{file.split('.')[0]}".strip("/") or self.path)
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise ManifestError(
                f"source {self.name}: weight {self.weight} would never be drawn; "
                "give a positive number, or leave the source out"
            )
        if isinstance(self.columns, Mapping):  # read from an index file
            object.__setattr__(self, "columns", Columns(**self.columns))
        unknown = set(self.tags) - set(OPTIONAL_TEXT)
        if unknown:
            raise ManifestError(f"source {self.name}: tag {min(unknown)!r} is none of {', '.join(OPTIONAL_TEXT)}")

    def tagged(self, row: Utterance) -> Utterance:
        """Return a row of this source, with the source's tags in the fields that it leaves unset."""
        missing = {key: value for key, value in self.tags.items() if getattr(row, key) is None}
        return replace(row, **missing) if missing else row


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows ``[start, stop)`` of the index, which are lines of the JSONL file ``path`` of ``size`` bytes.

    ``origin`` is the file from which ``path`` was written (or ``path`` itself). An empty ``path`` stands for a table of
    lengths.
    """

    path: str
    origin: str
    size: int
    source: int
    start: int
    stop: int


class LengthIndex:
    """Lengths of N utterances, in memory or memory-mapped; immutable.

    Attributes: ``seconds`` (N,) float32; ``tokens`` (N,) uint16, prompt and end token included; ``source_of`` (N,)
    uint16, position in ``sources``; ``places`` (N,) uint64 or None; ``sources``; ``shards``; ``skipped``, the number of
    rows that could not be used, by kind; ``made_with``, the tokenizer's fingerprint and the prompt's length where
    known.
    """

    def __init__(
        self,
        durations: npt.ArrayLike,
        tokens: npt.ArrayLike,
        sources: Sequence[Source | str] | None = None,
        source_of: npt.ArrayLike | None = None,
        *,
        places: np.ndarray | None = None,
        shards: Sequence[Shard] = (),
        problems: Sequence[Problem] | None = None,
        made_with: Mapping[str, object] | None = None,
    ):
        """Make an index of (N,) durations in seconds and (N,) tokens. Raises ManifestError for impossible lengths."""
        self.seconds = np.ascontiguousarray(durations, dtype=np.float32)
        self.tokens = _tokens(tokens)
        if self.seconds.ndim != 1 or self.seconds.shape != self.tokens.shape:
            raise ManifestError(
                f"durations {self.seconds.shape} and tokens {self.tokens.shape} must both be of shape (N,)"
            )
        if not len(self.seconds):
            raise ManifestError("an index needs at least one row")
        bad = ~(np.isfinite(self.seconds) & (self.seconds > 0))
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise ManifestError(f"row {row}: duration {self.seconds[row]} is not a positive number of seconds")
        named = ["all"] if sources is None else sources
        self.sources: tuple[Source, ...] = tuple(Source(s, name=s) if isinstance(s, str) else s for s in named)
        if source_of is None:
            if len(self.sources) != 1:
                raise ManifestError(f"{len(self.sources)} sources need source_of, the (N,) position of each row's")
            source_of = np.zeros(len(self.seconds), np.uint16)
        source_of = np.asarray(source_of)
        if source_of.shape != self.seconds.shape:
            raise ManifestError(f"source_of {source_of.shape} must be of shape {self.seconds.shape}")
        if len(self.sources) > MOST_SOURCES or source_of.min() < 0 or source_of.max() >= len(self.sources):
            raise ManifestError(f"source_of must lie in 0 … {len(self.sources) - 1}, below {MOST_SOURCES}")
        self.source_of = np.ascontiguousarray(source_of, dtype=np.uint16)
        self.places, self.shards = places, tuple(shards)
        self.made_with: dict[str, object] = dict(made_with or {})
        self.path: Path | None = None
        if problems is not None:
            self.problems = list(problems)
        self.skipped: dict[str, int] = count_problems(problems or ())

    _header: Mapping[str, object] = {}  # of the file that the index was opened from

    def __len__(self) -> int:
        return len(self.seconds)

    def __repr__(self) -> str:
        return f"LengthIndex({len(self):,} utterances, {len(self.sources)} sources)"

    def __reduce__(self):
        # a mapped index is pickled as its path, not as its pages
        return (LengthIndex.open, (self.path,)) if self.path else super().__reduce__()

    @cached_property
    def problems(self) -> list[Problem]:
        """Rows that could not be used, from the list beside the index."""
        if self.path is None or not skipped_path(self.path).exists():
            return []
        path = skipped_path(self.path)
        with open(path, encoding="utf-8", errors="replace") as file:
            return [_problem(line) or Problem(str(path), number, UNREADABLE) for number, line in enumerate(file, 1)]

    @property
    def fingerprint(self) -> str:
        """Hash (32 hexadecimal digits) of lengths, sources of rows and weights: everything that a plan depends on."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return self._computed_fingerprint()

    def _computed_fingerprint(self) -> str:
        digest = blake2b(FORMAT.encode(), digest_size=16)
        for column in (self.seconds, self.tokens, self.source_of):
            digest.update(column.data)
        digest.update(json.dumps([source.weight for source in self.sources]).encode())
        return digest.hexdigest()

    def verify(self) -> None:
        """Compare the fingerprint and the checksum in the index file with its content; 100 M rows take 5 s.

        Raises ManifestError where a byte has changed since the file was written.
        """
        if self.path is None:
            return
        same = self._computed_fingerprint() == self.fingerprint
        stated = self._header.get("checksum")
        if same and stated is not None:
            same = stated == _checksum(self.places, self._header)
        if not same:
            raise ManifestError(
                f"{self.path} is damaged: what it holds is not what was written; remove it and make it again "
                "(a training run does so by itself; canter index)"
            )

    @cached_property
    def rows_of(self) -> np.ndarray:
        """(sources,) int64: number of rows of each source."""
        return np.bincount(self.source_of, minlength=len(self.sources))

    @cached_property
    def weights(self) -> np.ndarray:
        """(sources,) float64 that sum to 1: fraction of the draws from each source."""
        given = [source.weight for source in self.sources]
        if len({weight is None for weight in given}) > 1:
            name = self.sources[given.index(None)].name
            raise ManifestError(f"source {name} has no weight while others have one: give all, or none")
        weights = np.array(self.rows_of if None in given else given, np.float64)
        return weights / weights.sum()

    def utterance(self, row: int) -> Utterance:
        """Read row ``row`` again from its manifest, with its source's tags in the fields that it leaves unset.

        Raises ManifestError where the manifest is missing or has changed, or the index was made from lengths only.
        """
        return self.utterance_and_fields(row)[0]

    def utterance_and_fields(self, row: int) -> tuple[Utterance, dict[str, object]]:
        """Return an utterance as `utterance` does, and all fields of its row in the manifest."""
        row = range(len(self))[row]  # accepts negative rows and raises IndexError, as a list does
        place = int(self.places[row]) if self.places is not None else 0
        shard = self.shards[place >> PLACE_BITS] if self.shards else None
        if shard is None or not shard.path:
            what = shard.origin if shard else "this index"
            raise ManifestError(f"{what} holds only lengths, so row {row} has no audio; index a manifest instead")
        stale = "index it again (canter index)"
        try:
            with open_binary(shard.path) as file:
                file.seek(place & ((1 << PLACE_BITS) - 1))
                line = file.readline()
        except OSError as error:
            raise ManifestError(f"{shard.path} cannot be read ({error.strerror}); {stale}") from None
        source = self.sources[int(self.source_of[row])]
        columns = source.columns if shard.path == shard.origin else ANY  # rows written by Canter have NeMo's names
        options = ReadOptions(measure_durations=True, columns=columns)
        fields = parse_line(line)
        found = utterance_from_row(fields, os.path.dirname(shard.path), options)
        if not isinstance(found, Utterance) or np.float32(found.duration) != self.seconds[row]:
            raise ManifestError(f"{shard.path} has changed since it was indexed (row {row}); {stale}")
        return source.tagged(found), cast("dict[str, object]", fields)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index atomically, and beside it the list of rows that could not be used."""
        path = Path(path)
        home = str(path.absolute().parent) + os.sep
        header = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "sources": [_as_stored(source) for source in self.sources],
            "shards": [
                # paths below the index's folder are stored relative to it, so that the folder can be moved
                [s.path.removeprefix(home), s.origin.removeprefix(home), s.size, s.source, s.start, s.stop]
                for s in self.shards
            ],
            "skipped": self.skipped,
            "made_with": self.made_with,
        }
        places = self.places if self.places is not None else np.zeros(len(self), np.uint64)
        header["checksum"] = _checksum(places, header)
        columns = [pa.array(column) for column in (self.seconds, self.tokens, self.source_of, places)]
        schema = pa.schema(_SCHEMA, metadata={"canter": json.dumps(header)})
        with replacing(path) as fresh:
            with pa.OSFile(os.fspath(fresh), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
                writer.write_batch(pa.record_batch(columns, schema=schema))
            write_text(skipped_path(path), (json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in self.problems))

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "LengthIndex":
        """Map an index into memory; the time depends on the number of shards, not of rows.

        Raises ManifestError where the file is missing, damaged or no index.
        """
        path = Path(path)
        again = "make it with: canter index MANIFEST -o " + path.name
        try:
            refuse_special(path)
            reader = pa.ipc.open_file(pa.memory_map(os.fspath(path)))
            header = json.loads((reader.schema.metadata or {})[b"canter"])
            if header["format"] != FORMAT or reader.schema.names != [name for name, _ in _SCHEMA]:
                raise ManifestError(f"{path} is an index of format {header['format']}, not {FORMAT}; {again}")
            # not to_numpy or to_pandas_dtype: they import pandas, which takes 0.3 s and 40 MB, or miss it
            columns = [
                np.frombuffer(column.buffers()[1], kind, len(column))
                for column, kind in zip(reader.get_batch(0).columns, _TYPES, strict=True)
            ]
        except FileNotFoundError:
            raise ManifestError(f"{path} does not exist; {again}") from None
        except ManifestError:
            raise
        except (pa.ArrowException, OSError, KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise ManifestError(f"{path} is not a length index ({error}); {again}") from None
        index = cls.__new__(cls)
        index.seconds, index.tokens, index.source_of, places = columns
        home = str(path.absolute().parent)
        try:
            index.sources = tuple(Source(**source) for source in header["sources"])
            index.places, index.path = places, path.absolute()
            index.shards = tuple(
                Shard(os.path.join(home, rows) if rows else "", os.path.join(home, origin), *rest)
                for rows, origin, *rest in header["shards"]
            )
            index.skipped, index.made_with = dict(header["skipped"]), dict(header["made_with"])
            index.__dict__["_fingerprint"] = str(header["fingerprint"])
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise ManifestError(f"{path} has a damaged header ({error!r}); {again}") from None
        index._header = header
        if len(index) <= VERIFIED_ROWS:
            index.verify()
        return index


def _as_stored(source: Source) -> dict[str, object]:
    """Return the fields of a source for the index's header, as Canter 0.1 wrote them where no column is named."""
    found = asdict(source)
    if not source.columns:
        del found["columns"]
    return found


def _problem(line: str) -> Problem | None:
    """Return the problem on a line of the list, None for a damaged line."""
    try:
        problem = Problem(**json.loads(line))
    except (ValueError, TypeError):
        return None
    return problem if isinstance(problem.file, str) and isinstance(problem.reason, str) else None


def skipped_path(index_path: str | os.PathLike[str]) -> Path:
    """Return the list of rows that could not be used: ``lengths.arrow`` -> ``lengths.skipped.jsonl``."""
    return Path(index_path).with_suffix(".skipped.jsonl")


def _checksum(places: np.ndarray | None, header: Mapping[str, object]) -> str:
    """Return a hash (32 hexadecimal digits) of what the fingerprint does not cover: the rows' places and the header."""
    stated = {name: value for name, value in header.items() if name != "checksum"}
    digest = blake2b(json.dumps(stated, sort_keys=True).encode(), digest_size=16)
    if places is not None:
        digest.update(np.ascontiguousarray(places).data)
    return digest.hexdigest()


def _tokens(tokens: npt.ArrayLike) -> np.ndarray:
    tokens = np.asarray(tokens)
    if tokens.dtype.kind not in "iu":
        raise ManifestError(f"tokens must be integers, not {tokens.dtype}")
    if tokens.size and (tokens.min() < 0 or tokens.max() > MOST_TOKENS):
        row = int(np.flatnonzero((tokens < 0) | (tokens > MOST_TOKENS))[0])
        raise ManifestError(f"row {row}: {tokens[row]} tokens; an index holds 0 to {MOST_TOKENS}")
    return np.ascontiguousarray(tokens, dtype=np.uint16)
