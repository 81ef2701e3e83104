"""Files of model folders: replaced as a unit, and read with a clear error for what is damaged."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from canter.errors import CheckpointError
from canter.files import replacing_folder
from canter.models.formats.torchfile import load_tensors
from canter.untrusted import MOST_JSON_BYTES, is_file_name, read_json_value

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Files with weights of Hugging Face folders, in the order in which they are preferred; either may be sharded."""
MOST_HEADER_BYTES = 4 * 2**20
"""Header of a safetensors file; 10,000 tensors take about 1 MiB."""

Settings = dict[str, Any]
"""A JSON object or YAML mapping of settings, of which nothing is known until it is checked."""


@contextmanager
def replacing_model(target: str | Path) -> Iterator[Path]:
    """Context manager that yields a new folder; on leaving it, that replaces ``target``, see `replacing_folder`.

    Raises CheckpointError where ``target`` is a file, a folder of something else, or a model folder with folders
    in it, which no model has: that is not ours to replace.
    """
    target = Path(target).absolute()
    if target.exists():
        inside = list(target.iterdir()) if target.is_dir() else [target]
        weights = any(path.suffix in (".safetensors", ".bin") for path in inside)
        if inside and not (weights and (target / "config.json").is_file()):
            raise CheckpointError(f"{target} exists and is not a model folder; choose another name")
        folders = ", ".join(sorted(path.name for path in inside if path.is_dir()))
        if folders:
            raise CheckpointError(
                f"{target} holds more than a model ({folders}) and is not replaced; choose another name"
            )
    with replacing_folder(target) as fresh:
        yield fresh


def read_json(path: Path, most: int = MOST_JSON_BYTES) -> Settings:
    """Return a JSON object; CheckpointError if it is anything else, or beyond the limits of `canter.untrusted`."""
    try:
        value = read_json_value(path, most=most)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; a model folder has config.json and model.safetensors") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def weights_file(folder: Path) -> Path:
    """Return the file with the weights of a Hugging Face folder, which may be there as shards only.

    Where there is none, it is the one that a folder should have.
    """
    kept = (name for name in WEIGHTS if any(os.path.lexists(folder / f"{name}{end}") for end in ("", ".index.json")))
    return folder / next(kept, WEIGHTS[0])


def shard_names(index: object, source: str | Path) -> list[str]:
    """Return the files that a ``.safetensors.index.json`` or ``.bin.index.json`` lists, sorted.

    Raises CheckpointError for anything but such an index, and for a shard outside its folder or of another kind.
    """
    weights = index.get("weight_map") if isinstance(index, dict) else None
    suffix = ".bin" if str(source).endswith(".bin.index.json") else ".safetensors"
    if not isinstance(weights, dict) or not weights:
        raise CheckpointError(f"{source} has no weight_map; copy the model folder again")
    for name in weights.values():
        if not is_file_name(name):
            raise CheckpointError(f"{source} names a shard outside its folder, {name!r:.80}; refused")
        if not name.endswith(suffix) or any(character in name for character in "*?["):
            raise CheckpointError(f"{source} names {name!r:.80}, which is no name of a {suffix[1:]} file; refused")
    return sorted(set(weights.values()))


def tensor_files(path: Path) -> list[Path]:
    """Return ``path``, or the shards that its ``.index.json`` lists where there is no such file."""
    index = path.with_name(path.name + ".index.json")
    if os.path.lexists(path) or not index.exists():
        return [path]
    return [path.with_name(name) for name in shard_names(read_json(index), index)]


def stored_bytes(path: Path) -> int:
    """Return the size of a file of tensors or of all its shards; what is missing counts nothing."""
    return sum(file.stat().st_size for file in tensor_files(path) if file.exists())


def read_tensors(path: Path, without: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file or a ``.bin`` of torch, or of the shards that its ``.index.json`` lists.

    Those whose names start with one of ``without`` are left out. Raises CheckpointError for a file that is missing,
    truncated, whose header is not what its size says, or whose pickle holds anything but tensors.
    """
    tensors: dict[str, Tensor] = {}
    for file in tensor_files(path):
        try:
            if file.suffix == ".bin":
                tensors |= {name: x for name, x in _read_torch(file).items() if not name.startswith(without)}
                continue
            check_safetensors(file)
            with safe_open(file, "pt") as stored:
                kept = [name for name in stored.keys() if not name.startswith(without)]  # noqa: SIM118
                tensors |= {name: stored.get_tensor(name) for name in kept}
        except FileNotFoundError:
            raise CheckpointError(f"{file} is missing; copy the whole model folder") from None
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{file} is truncated or not a safetensors file ({error})") from None
    return tensors


def _read_torch(path: Path) -> dict[str, Tensor]:
    if not stat.S_ISREG(path.stat().st_mode):
        raise CheckpointError(f"{path} is not a regular file")
    with open(path, "rb") as file:
        return load_tensors(file, str(path))


def check_safetensors(path: Path) -> None:
    """Check the kind of a safetensors file and the length of its header, which is parsed at once.

    Raises CheckpointError, and FileNotFoundError where there is no such file.
    """
    size = path.stat()
    if not stat.S_ISREG(size.st_mode):
        raise CheckpointError(f"{path} is not a regular file")
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if not 2 <= header <= min(size.st_size - 8, MOST_HEADER_BYTES):
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file (a header of {header:,} bytes in a file of "
            f"{size.st_size:,})"
        )
