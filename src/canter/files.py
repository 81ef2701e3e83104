"""Atomic writes of files and folders.

All files that Canter keeps are written by `replacing` or `replacing_folder`: the new content is written under a hidden
name in the same folder, synchronised to the disk, and renamed; the rename is on the disk before the call returns.
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
"""Ending of the hidden names of unfinished files, after the number of the process."""
_numbers = itertools.count()


@contextmanager
def replacing(target: str | os.PathLike[str], *, durable: bool = True) -> Iterator[Path]:
    """Context manager that yields a path to write to, and on exit renames it to ``target``.

    A missing folder is created. If the block raises, ``target`` is unchanged. ``durable=False`` does not wait for the
    disk, for files that are cheap to make again. Raises OSError with the name of ``target``.
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
    """Write a UTF-8 text file with line feeds as line ends atomically; see `replacing`."""
    with replacing(target, durable=durable) as fresh, open(fresh, "w", encoding="utf-8", newline="\n") as file:
        file.writelines([content] if isinstance(content, str) else content)


def write_bytes(target: str | os.PathLike[str], content: bytes) -> None:
    """Write a file atomically; see `replacing`."""
    with replacing(target) as fresh:
        fresh.write_bytes(content)


@contextmanager
def replacing_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Context manager that yields a new folder to fill, and on exit renames it to ``target``.

    If the block raises, ``target`` is unchanged. The caller checks that an existing folder may be replaced. Raises
    OSError.
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
    """Remove unfinished files of killed processes from ``folders``."""
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
    """Synchronise a file, or the entries of a folder, to the disk; a missing path is ignored."""
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
