"""TODO runs.progress."""

import contextlib
import os
import time
from pathlib import Path

from tqdm.auto import tqdm

from sdlab.errors import BadInput
from sdlab.runs.files import write_json


class Progress:
    """How far a piece of work is, in a small file, since a kernel's bars do not reach the terminal; and a tqdm bar.

    `sdlab run` renders the file and sets SDLAB_PROGRESS_FILE_ONLY, so that no bars stand in the executed notebooks.
    """

    def __init__(self, path: Path | None, total: int, desc: str, unit: str, initial: int = 0):
        self.path, self.written, self.started = path, 0.0, time.monotonic()
        self.said = dict(desc=desc, n=initial, total=total, unit=unit, rate=0.0, time=time.time())
        self.initial = initial
        silent = bool(os.environ.get("SDLAB_PROGRESS_FILE_ONLY"))
        self.bar = None if silent else tqdm(desc=desc, total=total, initial=initial, unit=unit, leave=False)
        self.say()

    def update(self, n: int = 1) -> None:
        self.said["n"] += n
        self.said["rate"] = (self.said["n"] - self.initial) / max(time.monotonic() - self.started, 1e-9)
        if self.bar is not None:
            self.bar.update(n)
        if time.monotonic() - self.written > 0.5:
            self.say()

    def say(self) -> None:
        self.written = time.monotonic()
        self.said["time"] = time.time()
        # Only a display: a disk that is full must not stop the work for it.
        with contextlib.suppress(BadInput):
            if self.path is not None:
                write_json(self.path, self.said, lasting=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()
