"""The lock of an experiment's folder: one process at a time, and the next one is told who holds it."""

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import ClassVar

from sdlab.errors import BadInput
from sdlab.runs.files import raise_on_write_error


class Lock:
    """Held by one process at a time; the system releases it when that process ends, however it ends.

    Its own process may take it again: a notebook's cell can be run twice. `note` names the last holder if that process
    ended without releasing it. Raises `BadInput` that names the present holder.
    """

    held: ClassVar[dict[Path, "Lock"]] = {}
    PATIENCE: ClassVar[float] = 5.0  # seconds: a kernel whose `sdlab run` was killed ends itself within one or two

    def __init__(self, path: Path, folder: Path, purpose: str):
        if path in Lock.held:
            Lock.held[path].release()
        self.path = path
        with raise_on_write_error(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("a+")
        until = time.monotonic() + Lock.PATIENCE
        while not self.try_lock():
            if time.monotonic() > until:
                holder = self.holder() or "another process"
                self.file.close()
                raise BadInput(
                    f"The experiment folder {folder} is in use by {holder}: wait for it, stop it, "
                    "or give this run another `experiment` name."
                )
            time.sleep(0.1)
        last = self.holder()
        self.note = f"{folder} was last in use by {last}, which ended without a word: resuming." if last else ""
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        with raise_on_write_error(path):
            self.file.truncate(0)
            self.file.write(f"{purpose} (process {os.getpid()} on {socket.gethostname()}, since {since})")
            self.file.flush()
        Lock.held[path] = self

    def try_lock(self) -> bool:
        try:
            with raise_on_write_error(self.path):
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def holder(self) -> str:
        """The text that the last holder wrote; empty if it released the lock."""
        self.file.seek(0)
        return self.file.read().strip()

    def release(self) -> None:
        if Lock.held.get(self.path) is self:
            del Lock.held[self.path]
            self.file.truncate(0)
            self.file.close()
