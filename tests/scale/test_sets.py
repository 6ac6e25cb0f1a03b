"""A synthetic set on 1, 2 and 3 workers; one of three is killed half-way, another joins late: the same bytes, and little
is made twice."""

import dataclasses
from collections import Counter

import pytest
from test_cluster import CONFIG, opened, places, scheduler

from sdlab import generation
from sdlab.runs.shards import shard_path

pytestmark = pytest.mark.scale
__all__ = ["places", "scheduler"]  # fixtures
IMAGES, SHARDS = 200, 40


def begun_again(dask_scheduler) -> int:
    """How many jobs were given to a worker once more."""
    begun = Counter(key for key, _, state, *_ in dask_scheduler.transition_log if state == "processing")
    return sum(begun.values()) - len(begun)


@pytest.fixture
def make_set(settings, data, base, tmp_path):
    """The shards of a set made as `cluster` says, and how many jobs were begun again."""

    def make(name: str, cluster: str, workers: int = 0) -> tuple[list[bytes], int]:
        run = opened(dataclasses.replace(settings, runs_root=str(tmp_path / name)), data, base, cluster=cluster)
        try:
            if workers:
                run.executor.client.wait_for_workers(workers, timeout=120)
            made = generation.generate_set(run, CONFIG, IMAGES, seed=5)
            again = run.executor.client.run_on_scheduler(begun_again) if workers else 0
            return [shard_path(made.folder, i).read_bytes() for i in range(SHARDS)], again
        finally:
            run.executor.shutdown()
            run.lock.release()

    return make


def test_any_number_of_workers_makes_the_same_set(make_set, scheduler):
    file, start_worker = scheduler
    here, _ = make_set("here", "none")
    for workers in (1, 2, 3):
        start_worker()
        assert make_set(f"on {workers}", file, workers) == (here, 0)


def test_one_of_three_dies_half_way_and_one_comes_late(make_set, scheduler, monkeypatch):
    """Made twice: at most what the dead worker held, the job that it did and one that it had ready."""
    file, start_worker = scheduler
    here, _ = make_set("here", "none")
    workers, written, write = [start_worker() for _ in range(3)], [], generation.write_hashed_json

    def half_way(path, content):
        write(path, content)
        written.append(path)
        if len(written) == SHARDS // 2:
            workers[0].kill()
            start_worker()

    monkeypatch.setattr(generation, "write_hashed_json", half_way)
    there, again = make_set("there", file, 3)
    assert there == here and len(written) == SHARDS and again <= 2
    print(f"begun again: {again}")
