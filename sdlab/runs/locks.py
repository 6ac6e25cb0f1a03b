"""TODO runs.locks."""

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import ClassVar

from sdlab.errors import BadInput
from sdlab.runs.files import raise_on_write_error
from sdlab.runs.records import now


class Lock:
    """Held by one process at a time; the system releases it when that process ends, however it ends.

    The process that holds it may take it again: a notebook's cell can be run twice. `note` says from whom it was taken
    over, if that process ended without letting it go. Raises `BadInput` that names the holder.
    """

    held: ClassVar[dict[Path, "Lock"]] = {}
    PATIENCE: ClassVar[float] = 5.0  # seconds: a kernel whose `sdlab run` was killed ends itself within one or two

    def __init__(self, path: Path, folder: Path, what: str):
        if path in Lock.held:
            Lock.held[path].release()
        self.path = path
        with raise_on_write_error(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("a+")
        until = time.monotonic() + Lock.PATIENCE
        while not self.taken():
            if time.monotonic() > until:
                holder = self.said() or "another process"
                self.file.close()
                raise BadInput(
                    f"The experiment folder {folder} is in use by {holder}: wait for it, stop it, "
                    "or give this run another `experiment` name."
                )
            time.sleep(0.1)
        before = self.said()
        self.note = f"{folder} was last in use by {before}, which ended without a word: going on from what it left."
        if not before:
            self.note = ""
        with raise_on_write_error(path):
            self.file.truncate(0)
            self.file.write(f"{what} (process {os.getpid()} on {socket.gethostname()}, since {now()})")
            self.file.flush()
        Lock.held[path] = self

    def taken(self) -> bool:
        try:
            with raise_on_write_error(self.path):
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def said(self) -> str:
        """What the last holder wrote, unless it let the lock go."""
        self.file.seek(0)
        return self.file.read().strip()

    def release(self) -> None:
        if Lock.held.get(self.path) is self:
            del Lock.held[self.path]
            self.file.truncate(0)
            self.file.close()
