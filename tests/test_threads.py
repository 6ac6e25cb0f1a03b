"""Work in threads: in order, torch's threads shared and given back, one failure ends the others."""

import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest
import torch

from sdlab.cluster.executors import InThisProcess
from sdlab.threads import map_in_threads


@pytest.fixture
def four_threads():
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_results_in_order_and_threads_shared(four_threads, workers):
    found = map_in_threads(lambda item, go_on: (item, torch.get_num_threads()), range(6), workers)
    assert found == [(item, 4 // workers) for item in range(6)]
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_ends_the_others(four_threads, failing):
    """The one that fails is heard; one at work ends when it next asks; one that waits never begins."""
    began, failed, ended = threading.Event(), threading.Event(), []

    def work(item, go_on):
        if item == failing:
            began.wait(10)
            failed.set()
            raise ValueError("out of memory")
        assert item == 1 - failing, "a piece of work began after another had failed"
        began.set()
        failed.wait(10)
        try:
            for _ in range(1000):
                go_on()
                threading.Event().wait(0.01)
        except CancelledError:
            ended.append(item)
            raise

    with pytest.raises(ValueError, match="out of memory"):
        map_in_threads(work, range(5), 2)
    assert ended == [1 - failing] and torch.get_num_threads() == 4


def test_tasks_have_the_threads_of_the_executors_maker_whichever_thread_calls(four_threads):
    """A trial's thread may have begun while another trial's tasks shared torch's threads."""
    executor, found = InThisProcess("cpu"), []

    def call():
        torch.set_num_threads(1)
        executor.each(lambda *_: torch.get_num_threads(), None, [()], lambda _, n: found.append(n), lambda n: None)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(call).result()
    assert found == [4] and executor.threads == 4


def test_a_cancelled_caller_stops_at_its_next_step_and_the_next_one_works():
    """A trial failed while another one of the same search makes its set."""
    executor, stepped = InThisProcess("cpu"), threading.Event()

    def endless(experiment, call, on_progress):
        while True:
            on_progress(1)
            stepped.set()
            time.sleep(0.01)

    with ThreadPoolExecutor(2) as pool:
        callers = [pool.submit(executor.each, endless, None, [(1,)], None, lambda n: None) for _ in range(2)]
        assert stepped.wait(10)  # one runs
        time.sleep(0.2)  # and one waits for its turn
        executor.cancel()
        for caller in callers:
            with pytest.raises(CancelledError):
                caller.result(timeout=10)
    found = []
    executor.each(lambda _, n, __: n + 1, None, [(1,), (2,)], lambda call, result: found.append(result), lambda n: None)
    assert found == [2, 3]
