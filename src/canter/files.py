"""Write files and folders that appear whole or not at all, whatever happens meanwhile.

Everything that Canter keeps goes through `replacing` or `replacing_folder`: the new content is written beside its place
under a hidden name, is on the disk before it gets its name, and its name is on the disk before the call returns.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"
"""Ending of the hidden names of what is being written; before it stands the number of the process."""
_numbers = itertools.count()


@contextmanager
def replacing(target: str | os.PathLike[str], *, durable: bool = True) -> Iterator[Path]:
    """Context manager that yields the path to write to; on leaving it, what was written replaces ``target``.

    The folder is made where it is missing. Where the block raises, ``target`` is as before. ``durable=False`` does not
    wait for the disk: for what can be made again at no cost. Raises OSError, with the name of ``target``.
    """
    target = Path(target).absolute()
    fresh: Path | None = None
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(target))
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(f".{target.name[:200]}.{os.getpid()}-{next(_numbers)}{PARTIAL}")
        fresh.touch(mode=0o600, exist_ok=False)
        yield fresh
        fresh.chmod(0o666 & ~_umask())
        if durable:
            to_disk(fresh)
        fresh.replace(target)
        if durable:
            to_disk(target.parent)
    except OSError as error:
        if error.errno is not None and (
            error.filename is None or (fresh is not None and Path(os.fspath(error.filename)) == fresh)
        ):
            raise OSError(error.errno, error.strerror, os.fspath(target)) from None
        raise
    finally:
        if fresh is not None:
            fresh.unlink(missing_ok=True)


def write_text(target: str | os.PathLike[str], content: str | Iterable[str], *, durable: bool = True) -> None:
    """Write a UTF-8 text file with ``\\n`` line ends, whole or not at all; see `replacing`."""
    with replacing(target, durable=durable) as fresh, open(fresh, "w", encoding="utf-8", newline="\n") as file:
        file.writelines([content] if isinstance(content, str) else content)


def write_bytes(target: str | os.PathLike[str], content: bytes) -> None:
    """Write a file, whole or not at all; see `replacing`."""
    with replacing(target) as fresh:
        fresh.write_bytes(content)


@contextmanager
def replacing_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Context manager that yields a new folder to fill; on leaving it, that folder replaces ``target``.

    Where the block raises, ``target`` is as before. Whether a folder that exists may be replaced is for the caller to
    check. Raises OSError.
    """
    target = Path(target).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=PARTIAL, dir=target.parent))
    try:
        yield fresh
        for path in (*fresh.rglob("*"), fresh):
            to_disk(path)
        fresh.chmod(0o777 & ~_umask())
        if target.exists():
            replaced = fresh.with_suffix(".replaced")
            target.rename(replaced)
            fresh.rename(target)
            to_disk(target.parent)
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            fresh.rename(target)
            to_disk(target.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def remove_stale(folders: Iterable[Path]) -> None:
    """Remove from ``folders`` what processes that were killed have left unfinished."""
    for folder in {*folders}:
        for path in folder.glob(f".*{PARTIAL}"):
            process = path.name.removesuffix(PARTIAL).rpartition(".")[2].partition("-")[0]
            if process.isdigit() and not _is_running(int(process)):
                path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def to_disk(path: Path) -> None:
    """Have the system write a file, or the entries of a folder, to the disk; does nothing where there is none."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
