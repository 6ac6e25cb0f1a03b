"""Progress of a task: a small file that `sdlab run` renders, and a tqdm bar where a person watches a notebook."""

import contextlib
import os
import time
from pathlib import Path

from tqdm.auto import tqdm

from sdlab.errors import BadInput
from sdlab.runs.files import write_json


class Progress:
    """A progress bar that also writes its state to a file: a kernel's bars do not reach the terminal.

    `sdlab run` sets SDLAB_PROGRESS_FILE_ONLY, so executed notebooks contain no bars.
    """

    def __init__(self, path: Path | None, total: int | None, desc: str, unit: str, initial: int = 0, stage: str = ""):
        self.path, self.initial, self.written, self.started = path, initial, 0.0, time.monotonic()
        self.state = dict(desc=desc, n=initial, total=total, unit=unit, rate=0.0, time=time.time(), stage=stage)
        silent = bool(os.environ.get("SDLAB_PROGRESS_FILE_ONLY"))
        self.bar = None if silent else tqdm(desc=desc, total=total, initial=initial, unit=unit, leave=False)
        self.write()

    def update(self, n: int = 1) -> None:
        if self.state["total"] is not None:  # of a download it may be unknown
            n = min(n, self.state["total"] - self.state["n"])  # the last of a worker's parts may be smaller
        self.state["n"] += n
        self.state["rate"] = (self.state["n"] - self.initial) / max(time.monotonic() - self.started, 1e-9)
        if self.bar is not None:
            self.bar.update(n)
        if time.monotonic() - self.written > 0.5:
            self.write()

    def write(self) -> None:
        self.written = time.monotonic()
        self.state["time"] = time.time()
        with contextlib.suppress(BadInput):  # only a display: a full disk must not stop the work for it
            if self.path is not None:
                write_json(self.path, self.state, lasting=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()
