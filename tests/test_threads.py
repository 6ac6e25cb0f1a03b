"""Work in threads: in order, torch's threads shared and given back, one failure ends the others."""

import threading
from concurrent.futures import CancelledError

import pytest
import torch

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
