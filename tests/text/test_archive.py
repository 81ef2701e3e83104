"""Forged archives are refused at once by every reader."""

import gzip
import io
import tarfile

import pytest

import canter
from canter.errors import CheckpointError
from canter.text import load_tokenizer
from canter.text.archive import Archive, open_archive

CONFIG = b"a: 1\n"
LOADERS = (canter.load_model, load_tokenizer)  # imported here, before a test limits the memory


def header(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf()


def block(data: bytes) -> bytes:
    return data.ljust(-(-len(data) // 512) * 512, b"\0")


def member(name: str, data: bytes = CONFIG) -> bytes:
    return header(name, size=len(data)) + block(data)


def pax(text: bytes) -> bytes:
    """A header that says more of the next member: lines of ``LENGTH KEY=VALUE``."""
    line = next(b"%d %s\n" % (n, text) for n in range(100) if len(b"%d %s\n" % (n, text)) == n)
    return header("x", tarfile.XHDTYPE, len(line)) + block(line)


def negative() -> bytes:
    data = bytearray(header("model_config.yaml"))
    data[124:136] = b"\xff" * 10 + b"\xfe\x00"
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data)
    return bytes(data)


HOSTILE = {
    "a PAX header of 300 MiB": (gzip.compress(header("x", tarfile.XHDTYPE, 300 * 2**20) + bytes(2**20)), "314,572,800"),
    "a long name": (header("x", tarfile.GNUTYPE_LONGNAME, 2**21) + bytes(2**21), "header of 2,097,152 bytes"),
    "PAX headers without end": (pax(b"a=b") * 5000 + member("a"), "recursion"),
    "a size below 0": (negative() + bytes(1024), "negative size"),
    "a PAX size below 0": (pax(b"size=-512") + header("a") * 3, "claims -512 bytes"),
    "a size beyond the file": (header("model_config.yaml", size=10**9) + b"a: 1", "claims 1,000,000,000 bytes"),
    "a sparse file": (header("model_config.yaml", tarfile.GNUTYPE_SPARSE), "link or a device"),
    "a PAX sparse file": (pax(b"GNU.sparse.size=1000") + pax(b"GNU.sparse.numblocks=0") + member("a"), "sparse"),
    "a symbolic link": (header("model_config.yaml", tarfile.SYMTYPE), "link or a device"),
    "a hard link": (header("model_config.yaml", tarfile.LNKTYPE), "link or a device"),
    "a device": (header("model_config.yaml", tarfile.CHRTYPE), "link or a device"),
    "a pipe": (header("model_config.yaml", tarfile.FIFOTYPE), "link or a device"),
    "an unknown type": (header("model_config.yaml", b"Z"), "link or a device"),
    "a way out": (member("../../etc/cron.d/x"), "leads out of the archive"),
    "an absolute name": (member("/etc/cron.d/x"), "leads out of the archive"),
    "a PAX way out": (pax(b"path=../../x") + member("a"), "leads out of the archive"),
    "100,000 folders": (gzip.compress(b"".join(header("d", tarfile.DIRTYPE) for _ in range(100_000))), "1000 files"),
    "200 MB of zeros": (gzip.compress(bytes(200_000_000), 1), "unpacks to more than 67108864"),
    "damaged gzip": (gzip.compress(member("a") * 100)[:-200], "truncated"),
    "bytes": (b"\x1f\x8b" + bytes(range(256)), "truncated"),
    "a text": (b"no tar" * 1000, "not a .nemo archive"),
    "nothing": (b"", "not a .nemo archive"),
    "a large configuration": (member("model_config.yaml", b"a: 1\n" * 400_000), "more than the 1,048,576"),
    "no mapping": (member("model_config.yaml", b"- 1"), "not a mapping"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_refused_by_model_and_tokenizer_alike(tmp_path, name, within_200_mib):
    data, message = HOSTILE[name]
    (tmp_path / "x.nemo").write_bytes(data)
    for load in LOADERS:
        with pytest.raises(CheckpointError, match=message) as refused:
            load(tmp_path / "x.nemo")
        assert str(refused.value).startswith(f"{tmp_path}/x.nemo")


def test_the_tokenizer_is_bounded(tmp_path):
    config = b"tokenizer: {langs: {spl_tokens: {model_path: 'nemo:a'}, en: {model_path: 'nemo:b'}}}"
    big = member("model_config.yaml", config) + member("a", b"x") + member("b", bytes(5 * 2**20))
    (tmp_path / "x.nemo").write_bytes(big)
    with pytest.raises(CheckpointError, match="b has 5,242,880 bytes, more than the 4,194,304"):
        load_tokenizer(tmp_path / "x.nemo")
    langs = ", ".join(f"l{n}: {{model_path: 'nemo:a'}}" for n in range(100))
    config = f"tokenizer: {{langs: {{spl_tokens: {{model_path: 'nemo:a'}}, {langs}}}}}".encode()
    (tmp_path / "y.nemo").write_bytes(member("model_config.yaml", config) + member("a", bytes(2**20)))
    with pytest.raises(CheckpointError, match="more than 8,388,608 bytes"):
        load_tokenizer(tmp_path / "y.nemo")


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["tar", "tar.gz"])
def test_members_are_read_by_name(tmp_path, pack):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("./model_config.yaml", "./" + "long/" * 40 + "é"):
            info = tarfile.TarInfo(name)
            info.size = len(CONFIG)
            tar.addfile(info, io.BytesIO(CONFIG))
    (tmp_path / "x.nemo").write_bytes(pack(stream.getvalue()))
    with open_archive(tmp_path / "x.nemo", Archive) as archive:
        assert archive.config() == {"a": 1}
        assert archive.read("long/" * 40 + "é", 5) == CONFIG
        with pytest.raises(CheckpointError, match="more than the 4 that are read"):
            archive.read("model_config.yaml", 4)
        with pytest.raises(CheckpointError, match="has no b; it holds long/"):
            archive.open("b")
