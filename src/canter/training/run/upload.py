"""Copy of a run in object storage: checkpoints are uploaded while training continues, and restored on a new machine.

The URL gets the files of the run folder under the same names. ``training/state.json`` of a checkpoint comes last, so
that a checkpoint with it is complete, whenever the upload was interrupted. Nothing is ever removed there.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Never

from canter.corpus.remote import below, download_file, files_below, upload_file
from canter.errors import CheckpointError, ConfigError
from canter.events import QUIET, Events
from canter.files import replacing, replacing_folder
from canter.redaction import redacted
from canter.training.config import TrainConfig, changes, load_run_config, rooted
from canter.training.run.checkpoints import BEST, CARD, CONFIG, NAME, STATE, Checkpoints, damage

CHECKPOINTS = "checkpoints"
LAST = f"training/{STATE}"  # file of a checkpoint that is uploaded last
NOT_COPIED = ("tensorboard", ".cache", "lengths.arrow.parts", CHECKPOINTS)


class Uploads:
    """Upload of a run folder to ``url`` in the background. A failure is a message, and never stops the training."""

    def __init__(self, folder: Path, url: str, events: Events[Never] = QUIET):
        self.folder, self.url, self.events = folder, url, events
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self.lock = threading.Lock()
        self.pending: list[Future[None]] = []
        self.sent: dict[Path, tuple[int, int]] = {}  # size and time of modification of each file when it was uploaded

    def start(self) -> None:
        """Upload everything that is not there yet, after the last checkpoint was written."""
        with self.lock:
            self.pending = [one for one in self.pending if not one.done()]
            if len(self.pending) < 2:  # one that waits will find this checkpoint too
                self.pending.append(self.thread.submit(self._try))

    def finish(self) -> None:
        """Upload everything that is not there yet, and return when that is done or has failed."""
        self.start()
        for one in [*self.pending]:
            one.result()

    def _try(self) -> None:
        try:
            self._upload()
        except (OSError, ConfigError) as error:
            reason = " ".join(str(error).split())[:300]
            self.events.message(
                f"--upload {redacted(self.url)}: not uploaded ({redacted(reason)}); training continues, and the next "
                "checkpoint tries again"
            )

    def _upload(self) -> None:
        there = files_below(self.url)
        for checkpoint in Checkpoints(self.folder / CHECKPOINTS, 1).complete():
            name = f"{CHECKPOINTS}/{checkpoint.name}"
            if f"{name}/{LAST}" in there:
                continue
            files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
            for path in sorted(files, key=lambda path: path.relative_to(checkpoint).as_posix() == LAST):
                try:
                    self._send(path)
                except FileNotFoundError:
                    if checkpoint.exists():
                        raise
                    break  # newer checkpoints have replaced it meanwhile
        for path in self._other_files():
            self._send(path)

    def _send(self, path: Path) -> None:
        """Upload a file that this process has not uploaded as it is now.

        A file that an earlier process uploaded does not count: on another number of ranks, the same step has other
        bits in files of the same size.
        """
        state = path.stat()
        if self.sent.get(path) != (state.st_size, state.st_mtime_ns):
            upload_file(path, below(self.url, path.relative_to(self.folder).as_posix()))
            self.sent[path] = state.st_size, state.st_mtime_ns

    def _other_files(self) -> list[Path]:
        """Return the files of the run beside its checkpoints, and best.json."""
        found = [path for path in self.folder.iterdir() if path.name not in NOT_COPIED and path.name[0] != "."]
        files = [path for one in found for path in ([one] if one.is_file() else sorted(one.rglob("*")))]
        checkpoints = self.folder / CHECKPOINTS  # a card is written after its checkpoint was uploaded
        late = (checkpoints / BEST, *sorted(checkpoints.glob(f"step-*/{CARD}")))
        return [path for path in (*files, *late) if path.is_file() and not path.name.startswith(".")]


def restore_upload(config: TrainConfig, events: Events[Never] = QUIET) -> None:
    """Download the run at ``config.upload`` into ``config.output``, unless that has a checkpoint or the URL has none.

    Only the newest complete checkpoint and the best are downloaded. Raises ConfigError if the URL holds a run of
    another configuration, or cannot be read and the folder has no checkpoint, and CheckpointError if the newest
    checkpoint there is damaged.
    """
    folder, url = config.output, config.upload
    if url is None:
        return
    try:
        there = files_below(url)
        if CONFIG in there and not config.allow_changes:
            _refuse_other_run(config, url)
        if Checkpoints(folder / CHECKPOINTS, 1).complete():
            return
        names = [PurePosixPath(file).parts[1] for file in there if file.startswith(f"{CHECKPOINTS}/step-")]
        complete = sorted(
            {name for name in names if NAME.fullmatch(name) and f"{CHECKPOINTS}/{name}/{LAST}" in there},
            key=lambda name: int(name[5:]),
        )
        if not complete:
            return
        events.message(f"{folder} has no checkpoint; restoring {complete[-1]} from {redacted(url)}")
        for file in there:
            if not file.startswith(f"{CHECKPOINTS}/step-"):
                with replacing(folder / file) as fresh:
                    download_file(below(url, file), fresh)
        best = Checkpoints(folder / CHECKPOINTS, 1).best()
        marked = best["checkpoint"] if best else ""
        for name in [*(one for one in complete[:-1] if one == marked), complete[-1]]:
            _download_checkpoint(folder, url, name, there)
    except OSError as error:
        unread = f"--upload {redacted(url)} cannot be read ({redacted(' '.join(str(error).split())[:300])})"
        if not Checkpoints(folder / CHECKPOINTS, 1).complete():
            raise ConfigError(f"{unread}, and {folder} has no checkpoint; correct it, or leave it out") from None
        events.message(f"{unread}; training resumes from {folder}")


def _refuse_other_run(config: TrainConfig, url: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        download_file(below(url, CONFIG), Path(folder) / CONFIG)
        theirs = load_run_config(Path(folder) / CONFIG)
    changed = [f"{name}: {before} -> {now}" for name, before, now in changes(rooted(config), rooted(theirs))]
    if changed:
        raise ConfigError(
            f"--upload {redacted(url)} holds a run of another configuration ({'; '.join(changed)}); choose another "
            "URL, set these as they were, or use the new ones with --allow-changes"
        )


def _download_checkpoint(folder: Path, url: str, name: str, there: Mapping[str, int]) -> None:
    inside = f"{CHECKPOINTS}/{name}/"
    with replacing_folder(folder / CHECKPOINTS / name) as fresh:
        for file in there:
            if file.startswith(inside):
                target = fresh / file.removeprefix(inside)
                target.parent.mkdir(parents=True, exist_ok=True)
                download_file(below(url, file), target)
        if problem := damage(fresh):
            raise CheckpointError(
                f"{redacted(below(url, inside))} is damaged ({problem}); remove it there, and the same command "
                "restores the one before it"
            )
