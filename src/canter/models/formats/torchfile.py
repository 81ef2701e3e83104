"""Tensors of a ``torch.save`` file from an untrusted source; its unpacked size is checked before torch reads it."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import zipfile
from typing import IO

import torch

from canter.errors import CheckpointError

MOST_PICKLE_BYTES = 16 * 2**20
MOST_OPERATIONS = 500_000
"""Opcodes of the pickle that names a model's tensors; 2,000 tensors take about 90,000."""
MOST_RECORDS = 50_000
_MODULES = {"torch._utils": ("_rebuild_tensor_v2", "_rebuild_parameter"), "collections": ("OrderedDict",)}
_CODE = "holds objects other than tensors, which could run code"


def load_tensors(file: IO[bytes], source: str) -> dict[str, torch.Tensor]:
    """Return the state dict that ``torch.save`` wrote to ``file``, as plain tensors on the CPU.

    Raises CheckpointError as `load_saved` does, and for anything but a mapping from names to tensors.
    """
    tensors = load_saved(file, source)
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.is_meta
        for name, tensor in tensors.items()
    ):
        raise CheckpointError(f"{source} is not a mapping from names to tensors")
    return {name: tensor.detach() for name, tensor in tensors.items()}


def load_saved(file: IO[bytes], source: str, operations: int = MOST_OPERATIONS) -> object:
    """Return what ``torch.save`` wrote to ``file``: tensors on the CPU, numbers and texts, in lists and mappings.

    Raises CheckpointError for records that are compressed (torch.save stores them uncompressed), a pickle that calls
    anything but functions that rebuild tensors or has more than ``operations`` opcodes, and a truncated file.
    """
    try:
        _check(file, source, operations)
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError:
        raise CheckpointError(f"{source} {_CODE}; refused") from None
    # zipfile, pickletools and torch document no list of what they raise for damaged bytes
    except Exception as error:
        told = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{source} is truncated or malformed ({told})") from None


def _check(file: IO[bytes], source: str, operations: int) -> None:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    with zipfile.ZipFile(file) as records:
        held = records.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in held):
            raise CheckpointError(f"{source} holds compressed records, which torch.save does not write; refused")
        if len(held) > MOST_RECORDS or sum(record.file_size for record in held) > size:
            raise CheckpointError(f"{source} unpacks to more than its own {size:,} bytes; refused")
        pickles = [record for record in held if record.filename.endswith("data.pkl")]
        for record in pickles:
            if record.file_size > MOST_PICKLE_BYTES:
                raise CheckpointError(
                    f"{source}: its list of tensors has {record.file_size:,} bytes, more than the "
                    f"{MOST_PICKLE_BYTES:,} that are read"
                )
            if not _plain(records.read(record), operations):
                raise CheckpointError(f"{source} {_CODE}; refused")


def _plain(pickled: bytes, operations: int) -> bool:
    """Return whether a pickle is short and names only storages and the functions that rebuild tensors from them."""
    for count, (code, argument, _) in enumerate(pickletools.genops(io.BytesIO(pickled))):
        if count > operations:
            return False
        if code.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            storage = module == "torch" and name.endswith("Storage") and name.isidentifier()
            if not storage and name not in _MODULES.get(module, ()):
                return False
        elif code.name in _FORBIDDEN:
            return False
    return True


# Opcodes that name or construct something without a GLOBAL, or set bytes aside; torch.save writes none of them.
_FORBIDDEN = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "BYTEARRAY8", "BINBYTES",
              "BINBYTES8", "SHORT_BINBYTES", "NEXT_BUFFER", "FRAME"}  # fmt: skip
