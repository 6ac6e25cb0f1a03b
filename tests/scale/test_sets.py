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


@pytest.fixture
def make_set(settings, data, base, tmp_path):
    """The shards of a set made as `cluster` says; the jobs that were begun again; those that lost workers held."""

    def ask_scheduler(dask_scheduler) -> tuple[int, int]:  # sent by value: the scheduler has no tests
        begun = Counter(key for key, _, state, *_ in dask_scheduler.transition_log if state == "processing")
        lost = [event for _, event in dask_scheduler.get_events("all") if event["action"] == "remove-worker"]
        held = sum(len(event["processing-tasks"]) + len(event["lost-computed-tasks"]) for event in lost)
        return sum(begun.values()) - len(begun), held

    def make(name: str, cluster: str, workers: int = 0) -> tuple[list[bytes], int, int]:
        run = opened(dataclasses.replace(settings, runs_root=str(tmp_path / name)), data, base, cluster=cluster)
        try:
            if workers:
                run.executor.client.wait_for_workers(workers, timeout=120)
            made = generation.generate_set(run, CONFIG, IMAGES, seed=5)
            again, held = run.executor.client.run_on_scheduler(ask_scheduler) if workers else (0, 0)
            return [shard_path(made.folder, i).read_bytes() for i in range(SHARDS)], again, held
        finally:
            run.executor.shutdown()
            run.lock.release()

    return make


def test_any_number_of_workers_makes_the_same_set(make_set, scheduler):
    file, start_worker = scheduler
    here = make_set("here", "none")
    for workers in (1, 2, 3):
        start_worker()
        assert make_set(f"on {workers}", file, workers) == here


def test_one_of_three_dies_half_way_and_one_comes_late(make_set, scheduler, monkeypatch):
    """Made twice: at most what the dead worker held: jobs that it had, and results that nobody had fetched yet."""
    file, start_worker = scheduler
    here, *_ = make_set("here", "none")
    workers, written, write = [start_worker() for _ in range(3)], [], generation.write_hashed_json

    def half_way(path, content):
        write(path, content)
        written.append(path)
        if len(written) == SHARDS // 2:
            workers[0].kill()
            start_worker()

    monkeypatch.setattr(generation, "write_hashed_json", half_way)
    there, again, held = make_set("there", file, 3)
    assert there == here and len(written) == SHARDS
    assert again <= held <= 6, (again, held)  # six are under way at a time
    print(f"begun again: {again} of {held}")
