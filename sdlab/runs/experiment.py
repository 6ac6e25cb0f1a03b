"""An experiment's settings, folder, data and base model: what functions of the method compute with. Imports no torch."""

import functools
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from sdlab.settings import Settings


class Experiment:
    """An experiment's settings and folder, with the data set and the base model that its stages compute with.

    Functions that only read or make files of the folder take this; those that belong to one stage take a `Run`.
    """

    progress = staticmethod(tqdm)
    work_folder: Path | None = None  # cache of an unfinished stage
    peak_memory = 0  # bytes that a training's processes have held, each at most

    @functools.cached_property
    def executor(self) -> Executor:
        """Where tasks run: in this process. A `Run` follows the setting `cluster`."""
        from sdlab.cluster.executors import InThisProcess  # imports torch

        return InThisProcess(self.settings.device)

    @functools.cached_property
    def processes(self) -> Any:
        """Those that train: this one. Under torchrun, each has its own."""
        from sdlab.cluster.processes import OneProcess  # imports torch

        return OneProcess(self.settings.micro_batch_size)

    def __init__(self, settings: Settings, data: Any = None, base: Any = None):
        self.settings, self.data, self.base, self.folder = settings, data, base, settings.run_folder

    def metrics_path(self, name: str) -> Path:
        """The file of a result: `metrics/<name>.json`."""
        return self.folder / "metrics" / f"{name}.json"
