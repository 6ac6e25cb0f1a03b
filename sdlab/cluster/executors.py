"""Where the tasks of a stage run: in this process, on workers of this machine, or on a Dask cluster. Imports no Dask.

A task is a function of an `Experiment` and small values: one shard of a set, one classifier, one part of the latents. At an
equal number of threads it returns the same bytes everywhere. Only the caller writes files.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Executor, Future
from typing import Any

import torch

from sdlab.devices import choose_device
from sdlab.threads import map_in_threads


class InThisProcess(Executor):
    """Threads of this process. One caller's tasks at a time: the number of torch's threads is the process's."""

    alone = threading.RLock()

    def __init__(self, device: str = "auto"):
        self.device, self.cancelled = device, threading.Event()
        self.threads = torch.get_num_threads()  # of the thread that makes it: another may begin while tasks share them

    @property
    def on_cpu(self) -> bool:
        return choose_device(self.device).type == "cpu"

    def callers(self, tasks: int) -> int:
        """How many callers of `each`, with so many tasks each, use all of it: here one does."""
        return 1

    def submit(self, function: Callable, /, *args: Any, **kwargs: Any) -> Future:
        """Call it now, in this thread."""
        future = Future()
        future.set_result(function(*args, **kwargs))
        return future

    def cancel(self) -> None:
        """Callers that run or wait get `CancelledError` at their task's next step."""
        self.cancelled.set()
        self.cancelled = threading.Event()  # later callers are not meant

    def each(
        self,
        function: Callable,
        experiment: Any,
        calls: Sequence[tuple],
        finished: Callable[[tuple, Any], None],
        on_progress: Callable[[int], Any],
        at_a_time: int = 1,
        **_: Any,
    ) -> None:
        """`finished(call, function(experiment, *call, on_progress))` for each call, `at_a_time` in threads."""
        counting, cancelled = threading.Lock(), self.cancelled

        def run_task(call: tuple, check_cancelled: Callable[[], None]) -> None:
            def check() -> None:
                check_cancelled()
                if cancelled.is_set():
                    raise CancelledError

            def progressed(n: int = 1) -> None:
                check()
                with counting:
                    on_progress(n)

            check()
            finished(call, function(experiment, *call, progressed))

        with self.alone:  # trials that run at a time take turns
            torch.set_num_threads(self.threads)
            map_in_threads(run_task, calls, at_a_time)
