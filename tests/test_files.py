"""Files and folders appear completely or not at all, whatever happens meanwhile."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from canter.files import PARTIAL, remove_stale, replacing, replacing_folder, write_bytes, write_text


def test_writes_replace_files_and_make_folders(tmp_path):
    target = tmp_path / "new" / "a.txt"
    for content in ("first", ["sec", "ond\n"]):
        write_text(target, content)
        assert target.read_text() == "".join(content)
    write_bytes(target, b"\x00\xff")
    assert target.read_bytes() == b"\x00\xff"
    assert list(target.parent.iterdir()) == [target]


def test_files_get_the_permissions_of_ordinary_files(tmp_path):
    (tmp_path / "ordinary").touch()
    (tmp_path / "folder").mkdir()
    write_text(tmp_path / "a", "x")
    with replacing_folder(tmp_path / "b"):
        pass
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
    assert (tmp_path / "b").stat().st_mode == (tmp_path / "folder").stat().st_mode


@pytest.mark.parametrize("durable", [True, False])
def test_a_failure_leaves_the_file_as_it_was(tmp_path, durable):
    target = tmp_path / "a.txt"
    write_text(target, "before")

    def fail() -> None:
        with replacing(target, durable=durable) as fresh:
            fresh.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]


def test_a_failure_leaves_the_folder_as_it_was(tmp_path):
    target = tmp_path / "model"
    with replacing_folder(target) as fresh:
        (fresh / "one").write_text("1")

    def fail() -> None:
        with replacing_folder(target) as fresh:
            (fresh / "two").write_text("2")
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert [path.name for path in target.iterdir()] == ["one"]
    with replacing_folder(target) as fresh:
        (fresh / "three").mkdir()
        (fresh / "three" / "3").write_text("3")
    assert [path.name for path in target.iterdir()] == ["three"]
    assert list(tmp_path.iterdir()) == [target]


def test_an_error_names_the_file_that_was_wanted(tmp_path):
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "below", tmp_path):
        with pytest.raises(OSError, match=r".") as caught:
            write_text(target, "x")
        assert str(tmp_path) in str(caught.value.filename)
        assert PARTIAL not in str(caught.value)


def test_many_writers_of_one_file_leave_one_of_their_contents(tmp_path):
    target = tmp_path / "a.txt"
    code = (
        "import sys; from canter.files import write_text\n"
        "for _ in range(20): write_text(sys.argv[1], sys.argv[2] * 9999)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(target), letter]) for letter in "abc"]
    assert [one.wait() for one in writers] == [0, 0, 0]
    assert target.read_text() in [letter * 9999 for letter in "abc"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_killed_writer_leaves_the_file_complete(tmp_path):
    target = tmp_path / "a.txt"
    write_text(target, "before")
    code = (
        "import sys, time; from canter.files import replacing\n"
        "with replacing(sys.argv[1]) as fresh:\n    fresh.write_text('half'); print('.', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.read(1)
        writer.send_signal(signal.SIGKILL)
    assert target.read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 2
    remove_stale([tmp_path])
    assert list(tmp_path.iterdir()) == [target]


def test_only_what_killed_processes_left_is_removed(tmp_path):
    """Files that a running process writes, and files of other programs, are kept."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    stale = tmp_path / f".a.srt.{ended.pid}-0{PARTIAL}"
    kept = [
        tmp_path / f".a.srt.{os.getpid()}-0{PARTIAL}",
        tmp_path / f".a{PARTIAL}",
        tmp_path / f"a.{ended.pid}-0{PARTIAL}",
    ]
    for path in (stale, *kept):
        path.write_text("half")
    remove_stale([tmp_path, tmp_path / "absent"])
    assert not stale.exists()
    assert all(path.exists() for path in kept)


def test_durable_writes_reach_the_disk(tmp_path, monkeypatch):
    synced: list[Path] = []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (synced.append(Path(os.readlink(f"/proc/self/fd/{handle}"))), fsync(handle))
    )
    write_text(tmp_path / "a", "x")
    assert synced[-1] == tmp_path
    assert synced[0].name.startswith(".a.")
    synced.clear()
    write_text(tmp_path / "b", "x", durable=False)
    assert not synced
