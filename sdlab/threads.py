"""Several pieces of work at a time on a CPU, each with its share of torch's threads.

Small networks' operations are too short to be divided among threads: two images' batches in a thread each are faster
than both in two threads.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

import torch

from sdlab.runs.files import sha256_of_json


def map_in_threads(work: Callable[[Any, Callable[[], None]], Any], items: Sequence, workers: int) -> list:
    """`[work(item, go_on) for item in items]`, up to `workers` at a time; each has threads // workers of torch's.

    `work` calls `go_on` now and then: it raises once another has failed or was interrupted, so that all end soon.
    """
    stopped, failures = threading.Event(), []

    def go_on() -> None:
        if stopped.is_set():
            raise CancelledError

    def one(item):
        go_on()
        try:
            return work(item, go_on)
        except BaseException as error:
            if not stopped.is_set():
                failures.append(error)
            stopped.set()
            raise

    if workers == 1:
        return [work(item, go_on) for item in items]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads // workers)  # what the pool's threads begin with
    try:
        with ThreadPoolExecutor(workers) as pool:
            try:
                return list(pool.map(one, items))
            except BaseException as error:  # an interrupt, too
                stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                if isinstance(error, CancelledError) and failures:
                    raise failures[0] from None  # what ended it, not that it was ended
                raise
    finally:
        torch.set_num_threads(threads)


def derive_seed(*parts: int | str) -> int:
    """One seed (63 bits) from several numbers and words; streams with different parts are independent."""
    return int(sha256_of_json(parts)[:16], 16) >> 1
