"""Weights in pickles and zips that could run code or grow without limit are refused before torch sees them."""

import collections
import io
import pickle
import struct
import zipfile

import pytest
import torch

from canter.errors import CheckpointError
from canter.models.formats.torchfile import load_saved, load_tensors


def saved(value) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3), "c": torch.ones(4, dtype=torch.bfloat16)}


def rewritten(pickled: bytes | None = None, compression: int = zipfile.ZIP_STORED, more: bytes = b"") -> bytes:
    """The file of STATE with another pickle, compressed records, or one more record."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(STATE))) as old, zipfile.ZipFile(stream, "w", compression) as new:
        for record in old.infolist():
            data = old.read(record)
            if pickled is not None and record.filename.endswith("data.pkl"):
                data = pickled
            new.writestr(record.filename, data)
        if more:
            new.writestr("archive/data/99", more)
    return stream.getvalue()


class Runs:
    def __reduce__(self):
        return open, ("/tmp/canter-code-was-run", "w")


CODE = "could run code; refused"
HOSTILE = {
    "deflated tensors": (rewritten(compression=zipfile.ZIP_DEFLATED, more=bytes(10**8)), "compressed records"),
    "code": (rewritten(pickle.dumps({"a": Runs()}, protocol=2)), CODE),
    "code, by a string": (rewritten(b"cos\nsystem\n(S'true'\ntR."), CODE),
    "code, by INST": (rewritten(b"(S'true'\nios\nsystem\n."), CODE),
    "code, protocol 4": (rewritten(pickle.dumps({"a": Runs()}, protocol=4)), CODE),
    "a bytearray of 2 GB": (rewritten(b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R."), CODE),
    "a bytearray of 10 GB": (rewritten(b"\x80\x05\x96" + struct.pack("<Q", 10**10) + b"x."), "malformed"),
    "a tensor of 8 GB": (rewritten(b"\x80\x02ctorch\nTensor\nJ\xff\xff\xff\x7f\x85R."), CODE),
    "bytes": (rewritten(b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x06\x00\x00\x00latin1\x86R."), CODE),
    "a memo of 16 GB": (rewritten(b"\x80\x02}r\xff\xff\xff\x7fK\x01."), "not a mapping"),
    "a pickle of 18 MB": (rewritten(b"\x80\x02" + b"}0" * 9_000_000 + b"}."), "18,000,004 bytes"),
    "a million opcodes": (rewritten(b"\x80\x02" + b"}0" * 500_000 + b"}."), CODE),
    "a list": (saved([torch.ones(1)]), "not a mapping"),
    "numbers": (saved({"a": 1}), "not a mapping"),
    "names that are no texts": (saved({1: torch.ones(1)}), "not a mapping"),
    "no zip": (b"PK\x03\x04" + bytes(1000), "malformed"),
    "half a zip": (saved(STATE)[:700], "malformed"),
    "no pickle": (rewritten(b""), "malformed"),
    "a storage that is too short": (saved(STATE).replace(b"K\x06tq", b"K\x60tq"), "malformed"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_refused(name, within_200_mib):
    data, message = HOSTILE[name]
    with pytest.raises(CheckpointError, match=message) as refused:
        load_tensors(io.BytesIO(data), "x.nemo: weights")
    assert str(refused.value).startswith("x.nemo: weights")


def test_records_that_overlap_are_counted(within_200_mib):
    """A zip whose directory names one record a thousand times over."""
    data = rewritten(more=bytes(2**20))
    with zipfile.ZipFile(io.BytesIO(data)) as records:
        start, directory = records.start_dir, records.infolist()
    entries = data[start : data.rindex(b"PK\x05\x06")]
    last = entries[entries.rindex(b"PK\x01\x02") :]
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, len(directory) + 999, len(directory) + 999,
                      len(entries) + 999 * len(last), start, 0)  # fmt: skip
    with pytest.raises(CheckpointError, match="unpacks to more than its own"):
        load_tensors(io.BytesIO(data[:start] + entries + last * 999 + end), "x")


def test_state_dicts_are_read():
    state = collections.OrderedDict(STATE)
    state["a.again"] = state["a.weight"][:, 1:]
    state["p"] = torch.nn.Parameter(torch.zeros(2))
    state._metadata = {"": {"version": 1}}
    read = load_tensors(io.BytesIO(saved(state)), "x")
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], tensor) and not read[name].requires_grad for name, tensor in state.items())
    module = torch.nn.BatchNorm1d(3)
    assert load_tensors(io.BytesIO(saved(module.state_dict())), "x").keys() == module.state_dict().keys()


def test_training_states_are_read():
    moments = {"step": torch.tensor(1.0), "exp_avg": torch.arange(6.0)}
    group = {"lr": 1e-3, "betas": (0.9, 0.95), "params": [0], "fused": None}
    state = [{"state": {0: moments}, "param_groups": [group]}, {"name": "é", "seen": {3}}]
    with pytest.raises(CheckpointError, match=CODE):  # a set is nothing that we write
        load_saved(io.BytesIO(saved(state)), "x")
    del state[1]["seen"]
    read = load_saved(io.BytesIO(saved(state)), "x")
    assert read[1] == state[1]
    assert read[0]["param_groups"] == [group]
    assert torch.equal(read[0]["state"][0]["exp_avg"], moments["exp_avg"])
