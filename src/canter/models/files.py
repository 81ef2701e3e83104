"""Files and folders that appear whole or not at all, and clear errors for those that cannot be read."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from canter.errors import CheckpointError


@contextmanager
def whole_folder(target: str | Path) -> Iterator[Path]:
    """Yields a new folder beside ``target`` that takes its name once the block is through, in place of a
    model folder that had it; if the block fails it is removed and ``target`` is as before.

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
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        yield fresh
        for file in fresh.rglob("*"):
            if file.is_file():
                _to_disk(file)
        fresh.chmod(0o777 & ~_umask())
        if target.exists():
            old = fresh.with_suffix(".old")
            target.rename(old)
            fresh.rename(target)
            shutil.rmtree(old)
        else:
            fresh.rename(target)
        _to_disk(target.parent)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


@contextmanager
def whole_file(target: str | Path) -> Iterator[Path]:
    """As ``whole_folder`` for one file, which replaces a file of that name."""
    target = Path(target).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    os.close(handle)
    fresh = Path(name)
    try:
        yield fresh
        _to_disk(fresh)
        fresh.chmod(0o666 & ~_umask())
        fresh.rename(target)
        _to_disk(target.parent)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def refuse_adapter(folder: Path) -> None:
    """Raise CheckpointError for a folder of PEFT's that holds an adapter without the model which it changes."""
    adapter = folder / "adapter_config.json"
    if not adapter.is_file() or any(folder.glob("model*.safetensors")):
        return
    base = None
    with suppress(CheckpointError):
        base = read_json(adapter).get("base_model_name_or_path")
    raise CheckpointError(
        f"{folder} is a PEFT adapter of {base or 'a model that it does not name'}, not a model: merge the two "
        "(merge_and_unload() in peft, then save_pretrained(FOLDER) of model and processor) and name that folder"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; CheckpointError if it is anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing; a model folder has config.json and model.safetensors"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); was it copied in full?") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, or of the shards that its ``.index.json`` lists."""
    index = path.with_name(path.name + ".index.json")
    if not path.exists() and index.exists():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        if any(Path(name).name != name for name in names):
            raise CheckpointError(f"{index} names a shard outside its folder")
        return {key: tensor for name in names for key, tensor in read_tensors(path.with_name(name)).items()}
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; copy the whole model folder") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file ({error})") from None
