"""Tables of lengths without audio, Parquet or Arrow, which can be planned with but not trained on."""

import numpy as np
import pyarrow as pa

from canter.corpus.containers import open_parquet
from canter.corpus.manifest import LONGEST_SECONDS
from canter.corpus.readers.huggingface import open_arrow
from canter.corpus.remote import absolute, suffix_of
from canter.corpus.utterance import Problem, one_line
from canter.errors import ManifestError


def table_schema(path: str) -> pa.Schema:
    """Return the columns of a Parquet or Arrow file. Raises ManifestError where it is neither."""
    return open_parquet(path).schema_arrow if suffix_of(path) == ".parquet" else open_arrow(path)[0].schema


def is_lengths(schema: pa.Schema) -> bool:
    """Return whether a table has the columns of lengths."""
    return "duration" in schema.names and bool({"num_tokens", "tokens"} & set(schema.names))


def read_lengths(
    path: str, *, prompt_tokens: int = 0, most_tokens: int = 65535
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[Problem]]:
    """Return ``(seconds (n,) float64, tokens (n,) int64, row numbers (n,) from 0, problems)`` of a table.

    Tokens are the column ``num_tokens``, or ``tokens`` (of the text) + ``prompt_tokens`` + 1 for the end token.
    """
    schema = table_schema(path)
    tokens_name = next((name for name in ("num_tokens", "tokens") if name in schema.names), None)
    if "duration" not in schema.names or tokens_name is None:
        raise ManifestError(
            f"{path} needs the columns duration (seconds) and num_tokens, or tokens; it has {', '.join(schema.names)}"
        )
    for name in ("duration", tokens_name):
        kind = schema.field(name).type
        if not (pa.types.is_integer(kind) or (name == "duration" and pa.types.is_floating(kind))):
            raise ManifestError(f"{path}: column {name} is of type {kind}, not a number")
    try:
        if suffix_of(path) == ".parquet":
            table = open_parquet(path).read(columns=["duration", tokens_name])
        else:
            table = open_arrow(path)[0].read_all().select(["duration", tokens_name])
        for name in ("duration", tokens_name):
            table[name].validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ManifestError(f"{path} is damaged ({one_line(error)})") from None
    seconds = table["duration"].cast(pa.float64()).to_numpy()
    nulls = table[tokens_name].is_null().to_numpy()
    tokens = table[tokens_name].fill_null(0).cast(pa.int64()).to_numpy()
    extra = 0 if tokens_name == "num_tokens" else prompt_tokens + 1
    problems = []
    good = (seconds > 0) & (seconds <= LONGEST_SECONDS) & ~nulls & (tokens >= 0) & (tokens + extra <= most_tokens)
    good &= tokens + extra > 0
    for row in np.flatnonzero(~good):
        if seconds[row] > 0 and seconds[row] <= LONGEST_SECONDS:
            value = "missing" if nulls[row] else tokens[row]
            reason = f"{tokens_name} out of range: {value}"
        else:
            reason = f"duration is not a positive number of seconds: {seconds[row]}"
        problems.append(Problem(absolute(path), int(row) + 1, reason))
    return seconds[good], tokens[good] + extra, np.flatnonzero(good), problems
