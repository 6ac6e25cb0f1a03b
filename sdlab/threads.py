"""Several tasks at a time on a CPU, each with its share of torch's threads.

The operations of small networks are too short to be divided among threads: two batches in one thread each are faster
than one after the other in two threads.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from typing import Any

import torch


def map_in_threads(task: Callable[[Any, Callable[[], None]], Any], items: Sequence, workers: int) -> list:
    """`[task(item, check_cancelled) for item in items]`, up to `workers` at a time; each has threads // workers of torch's.

    A task calls `check_cancelled` now and then: it raises once another task failed or was interrupted, so all end soon.
    """
    cancelled, failures = threading.Event(), []

    def check_cancelled() -> None:
        if cancelled.is_set():
            raise CancelledError

    def run_task(item):
        check_cancelled()
        try:
            return task(item, check_cancelled)
        except BaseException as error:
            if not cancelled.is_set():
                failures.append(error)
            cancelled.set()
            raise

    if workers == 1:
        return [task(item, check_cancelled) for item in items]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads // workers)  # the pool's threads start with this number
    try:
        with ThreadPoolExecutor(workers) as pool:
            try:
                return list(pool.map(run_task, items))
            except BaseException as error:  # including an interrupt
                cancelled.set()
                pool.shutdown(wait=False, cancel_futures=True)
                if isinstance(error, CancelledError) and failures:
                    raise failures[0] from None  # the cause, not the cancellation it led to
                raise
    finally:
        torch.set_num_threads(threads)


def map_in_order(task: Callable[[Any], Any], items: Sequence, parallel: int, stop: Callable[[], None]) -> list:
    """`[task(item) for item in items]`, the first ones first, `parallel` at a time. The first failure stops all."""
    if parallel == 1:
        return [task(item) for item in items]
    with ThreadPoolExecutor(parallel) as pool:
        futures = [pool.submit(task, item) for item in items]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]
