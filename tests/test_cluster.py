"""Tasks on workers: the same bytes as in this process, whoever dies or comes late; files by content; refusals by name."""

import dataclasses
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT

from sdlab import evaluation, generation, latents
from sdlab.class_encoder import ClassTable
from sdlab.cluster.blobs import BlobCache
from sdlab.errors import BadInput
from sdlab.runs.checkpoints import epoch_folder, save_checkpoint
from sdlab.runs.run import Run
from sdlab.runs.stages import STAGES
from sdlab.sampling_config import SamplingConfig
from sdlab.settings import Settings

distributed = pytest.importorskip("distributed", reason="`make setup` installs it")
from sdlab.cluster import dask_cluster  # noqa: E402
from sdlab.cluster.worker import Outcome, kind_of_machine  # noqa: E402

CONFIG = SamplingConfig(num_inference_steps=2, guidance_scale=2.0, class_encoder_epoch=1)


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """A cache of its own; no bars."""
    monkeypatch.setenv("SDLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SDLAB_PROGRESS_FILE_ONLY", "1")
    monkeypatch.setattr(latents, "PART", 16)


def opened(settings, data, base, **changes) -> Run:
    """Stage 01 with a trained Class-Encoder."""
    settings = dataclasses.replace(settings, shard_size=5, **changes)
    run = Run(dataclasses.replace(settings, cluster="none"), STAGES["00"].stem, data, base)
    run.save_metrics("data", {})
    run.finish(run.metrics_path("data"))
    run = Run(settings, STAGES["01"].stem, data, base)
    torch.manual_seed(3)
    table = ClassTable(num_classes=3, tokens=base.tokens, width=base.width)
    torch.nn.init.normal_(table.conditions)
    save_checkpoint(table, epoch_folder(run.folder / "class_encoder", 1))
    return run


def test_a_gpu_whose_name_says_no_cuda_is_no_cpu(monkeypatch):
    monkeypatch.setattr("sdlab.cluster.worker.choose_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr("sdlab.cluster.worker.environment", lambda _: dict(device="NVIDIA H200"))
    assert kind_of_machine.__wrapped__("auto")["device_type"] == "cuda"


def results(run, images=30) -> dict:
    """What workers compute: latents, a set's shards, the scores of classifiers on it and on real images."""
    try:
        latents.encode_training_set(run)
        drawn = latents.round_trip_training_set(run).fingerprint()
        synthetic_set = generation.generate_set(run, CONFIG, images, seed=5)
        scores = evaluation.train_and_score_classifiers(run, synthetic_set.split(images), [1, 2, 3], ["val", "test"])
        real = evaluation.train_and_score_classifiers(run, run.data.train, [4], ["val"])
        encoded = hashlib.sha256((run.folder / "latents" / "train.npz").read_bytes()).hexdigest()
        return dict(latents=encoded, drawn=drawn, shards=synthetic_set.fingerprint(images), scores=scores, real=real)
    finally:
        run.executor.shutdown()
        run.lock.release()


KEPT = {}  # what this process makes of the base model of all tests


@pytest.fixture
def here(settings, data, base, tmp_path):
    if not KEPT:
        KEPT.update(results(opened(dataclasses.replace(settings, runs_root=str(tmp_path / "here")), data, base)))
    return KEPT


@pytest.fixture
def scheduler(tmp_path):
    """A scheduler of its own, and a function that starts a worker for it, as a user would."""
    processes = []

    def start(*arguments, cache=tmp_path / "cache"):
        command = [sys.executable, "-m", "dask", *map(str, arguments)]
        log = (tmp_path / f"{arguments[0]}_{len(processes)}.log").open("w")
        process = subprocess.Popen(command, env=ENVIRONMENT | {"SDLAB_CACHE": str(cache)}, stdout=log, stderr=log)
        processes.append(process)
        return process

    file = tmp_path / "scheduler.json"
    start("scheduler", "--host", "127.0.0.1", "--port", 0, "--no-dashboard", "--scheduler-file", file)
    while not (file.exists() and file.read_text().strip()):
        time.sleep(0.1)
    worker = (
        "worker",
        "--scheduler-file",
        file,
        "--host",
        "127.0.0.1",
        "--no-dashboard",
        "--local-directory",
        tmp_path,
    )
    yield str(file), lambda *more, **how: start(*worker, *(more or ("--nthreads", 1, "--no-nanny")), **how)
    for process in reversed(processes):
        process.kill()
        process.wait()


def test_local_workers_make_the_same_bytes(settings, data, base, here, tmp_path):
    """Their base model is not where the settings say: it comes from the driver, once."""
    run = opened(settings, data, base, cluster="local", workers=2)
    (Path(settings.base_model)).rename(tmp_path / "moved")
    try:
        run.base = dataclasses.replace(base, folder=tmp_path / "moved")
        assert results(run) == here
    finally:
        (tmp_path / "moved").rename(settings.base_model)
    assert run.record.environment["worker_threads"] == 1 and run.record.environment["worker_device"]
    weights = sorted(base.sha256.values())
    assert sorted(p.name for p in (tmp_path / "cache").iterdir() if p.name in weights) == weights


def test_a_worker_that_dies_and_one_that_comes_late_change_nothing(settings, data, base, here, scheduler, monkeypatch):
    """No shard is made twice but those that the dead worker held: here none is lost after it arrived."""
    file, start_worker = scheduler
    first = start_worker()
    run = opened(settings, data, base, cluster=file)
    made = []
    write = generation.write_hashed_json

    def after_a_shard(path, content):
        write(path, content)
        made.append(path)
        if len(made) == 2:
            start_worker()
            first.kill()

    monkeypatch.setattr(generation, "write_hashed_json", after_a_shard)
    assert results(run) == here and len(made) == 6


def test_a_worker_of_another_kind_is_refused_by_name(settings, data, base, scheduler, capsys):
    file, start_worker = scheduler
    start_worker("--nthreads", 2, "--no-nanny")
    with pytest.raises(
        BadInput, match=r"The worker tcp://\S+ does 2 tasks at a time: start it with `dask worker .* --nthreads 1`"
    ):
        opened(settings, data, base, cluster=file)


def test_a_late_worker_of_another_kind_gets_no_tasks(settings, data, base, here, scheduler, capsys):
    file, start_worker = scheduler
    start_worker()
    run = opened(settings, data, base, cluster=file)
    start_worker("--nthreads", 2, "--no-nanny")
    run.executor.client.wait_for_workers(2)
    assert results(run) == here
    said = capsys.readouterr().out
    assert said.count("is not used: tasks at a time 2 instead of 1. `cluster_any_worker: true` accepts it.") == 1


def test_a_cluster_that_grows_with_the_work_starts_its_first_worker(settings, data, base):
    """As those of Slurm and Kubernetes do: without work they have none."""
    with distributed.LocalCluster(0, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0") as grows:
        grows.adapt(minimum=0, maximum=1, interval="100ms")
        run = opened(settings, data, base, cluster=grows.scheduler_address)
        assert run.record.environment["worker_threads"] == 1
        assert run.executor.submit(sleep_for, run, 0.0).result(timeout=60) == 0.0
        run.executor.shutdown()
        run.lock.release()


@pytest.mark.parametrize(
    ("cluster", "said"),
    [
        ("tcp://127.0.0.1:1", r"The scheduler of `cluster: tcp://127.0.0.1:1` does not answer .*`dask scheduler`"),
        ("nothing.json", r"The scheduler of `cluster: nothing.json` does not answer"),
        ("tls://127.0.0.1:1", r"`cluster: tls://127.0.0.1:1` needs certificates"),
    ],
)
def test_a_scheduler_that_does_not_answer_is_named_before_anything_is_written(
    settings, data, base, monkeypatch, cluster, said
):
    monkeypatch.setattr(dask_cluster, "CONNECT", 0.5)
    with pytest.raises(BadInput, match=said):
        opened(settings, data, base, cluster=cluster)
    assert not (settings.run_folder / "records" / "01.json").exists()


def test_without_dask_there_is_one_sentence(settings, data, base, monkeypatch):
    monkeypatch.setitem(sys.modules, "sdlab.cluster.dask_cluster", None)
    with pytest.raises(BadInput, match=r"`cluster` is 'local', which needs Dask .*\[cluster\]"):
        opened(settings, data, base, cluster="local")


# ---------------------------------------------------------------------------------------------------------- files


def receive_all(cache, content, chunk=10):
    name = hashlib.sha256(content).hexdigest()
    for offset in range(0, len(content), chunk):
        cache.receive(name, offset, len(content), content[offset : offset + chunk])
    return name


def test_the_cache_keeps_its_limit_and_what_was_used_last(tmp_path):
    cache = BlobCache(250, tmp_path)
    names = []
    for index in range(3):
        names.append(receive_all(cache, bytes([index]) * 100))
        if len(names) == 2:
            os.utime(cache.path(names[1]), (1, 1))  # used long before the first one
    assert cache.find(names[0]) and cache.find(names[1]) is None and cache.find(names[2])
    larger = receive_all(cache, b"x" * 300)  # than the limit: it is needed now
    assert [path.name for path in tmp_path.iterdir()] == [larger]


def test_the_cache_leaves_what_is_not_its_own(tmp_path):
    """$SDLAB_CACHE may name a folder that holds other things."""
    (tmp_path / "thesis.tex").write_bytes(b"x" * 1000)
    (tmp_path / "photos").mkdir()
    os.utime(tmp_path / "thesis.tex", (1, 1))
    cache = BlobCache(150, tmp_path)
    first, second = receive_all(cache, b"a" * 100), receive_all(cache, b"b" * 100)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["photos", second, "thesis.tex"]) and first


def test_two_senders_of_one_file_do_not_meet(tmp_path):
    cache, content = BlobCache(1e9, tmp_path), bytes(range(100))
    name = hashlib.sha256(content).hexdigest()
    cache.receive(name, 0, 100, content[:50], "one")
    cache.receive(name, 0, 100, content[:10], "two")
    cache.receive(name, 50, 100, content[50:], "one")
    assert cache.find(name).read_bytes() == content
    cache.receive(name, 10, 100, content[10:], "two")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_cache_too_small_for_one_task_is_refused(settings, data, base):
    """Else each of its files would drive out another one without end."""
    run = opened(settings, data, base, cluster="local", workers=1, cluster_cache_gb=0.1)
    object.__setattr__(run.executor.settings, "cluster_cache_gb", 1e-6)
    with pytest.raises(BadInput, match=r"needs .* GB of files at once .* make `cluster_cache_gb` \(1e-06\) larger"):
        results(run)


def test_the_first_stage_names_a_scheduler_that_does_not_answer_before_it_writes(settings, data, base, monkeypatch):
    """It scores classifiers, too."""
    monkeypatch.setattr(dask_cluster, "CONNECT", 0.5)
    with pytest.raises(BadInput, match="does not answer"):
        Run(dataclasses.replace(settings, cluster="tcp://127.0.0.1:1"), STAGES["00"].stem, data, base)
    assert not (settings.run_folder / "records" / "00.json").exists()


def test_a_checkpoint_that_was_made_again_is_loaded_again(settings, data, base):
    """The same epoch and experiment, as on a worker that outlives a stage: it makes shards only, and keeps the last UNet."""
    run, shards = opened(settings, data, base), []
    for deviation in (1.0, 2.0):
        table = ClassTable(num_classes=3, tokens=base.tokens, width=base.width)
        torch.nn.init.normal_(table.conditions, std=deviation)
        shutil.rmtree(epoch_folder(run.folder / "class_encoder", 1))
        save_checkpoint(table, epoch_folder(run.folder / "class_encoder", 1))
        plan = generation.plan_generation(run, CONFIG, seed=5)
        shards.append(generation.make_shard(run, CONFIG, plan, 0, lambda *_: None)[0])
    assert not np.array_equal(*shards)
    generation.load_pipeline_once.cache_clear()


def test_files_that_never_stay_are_not_sent_without_end(settings, data, base):
    run = opened(settings, data, base, cluster="local", workers=1)
    run.executor.send = lambda outcome: None
    with pytest.raises(BadInput, match="they drive each other out of the cache"):
        results(run)


def test_a_result_that_dask_waits_for_stops_nobody(settings, data, base):
    """Its worker was lost after it had finished: Dask makes it again before it answers."""
    run = opened(settings, data, base, cluster="local", workers=1)
    executor, may_answer = run.executor, threading.Event()
    answer = SimpleNamespace(key="slow", result=lambda: may_answer.wait(60) and Outcome("", result="at last"))
    entry = dask_cluster.Entry(0, -1, None, running=answer)
    executor.running["slow"] = entry
    executor.ended.put(answer)
    started = time.monotonic()
    other = executor.submit(sleep_for, run, 0.0)  # would wait for the lock
    executor.look_for_workers()
    assert time.monotonic() - started < 10 and not other.done()
    may_answer.set()
    assert (entry.future.result(timeout=60), other.result(timeout=60)) == ("at last", 0.0)
    executor.shutdown()
    run.lock.release()


@pytest.mark.parametrize(
    ("visible", "found"), [("2,3", ["2", "3", "2"]), ("", ["0", "1", "0"]), ("GPU-a", ["0", "1", "0"])]
)
def test_local_workers_get_the_gpus_that_the_driver_may_use(monkeypatch, visible, found):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(distributed, "SpecCluster", lambda workers, **_: workers)
    started = dask_cluster.start_local_workers(Settings(experiment="x", dataset="digits", workers=3))
    assert [worker["options"]["env"]["CUDA_VISIBLE_DEVICES"] for worker in started.values()] == found
    assert len(dask_cluster.start_local_workers(Settings(experiment="x", dataset="digits", device="cuda:1"))) == 1


def test_content_that_is_not_what_its_name_says_is_refused(tmp_path):
    cache = BlobCache(1e9, tmp_path)
    with pytest.raises(BadInput, match="arrived with another content"):
        cache.receive("0" * 64, 0, 3, b"abc")
    assert cache.find("0" * 64) is None and not list(tmp_path.iterdir())


def largest_memory(pid) -> int:
    """Bytes that a process has held at most."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_a_large_file_passes_through_without_being_held(settings, data, base, scheduler, tmp_path):
    """500 MB to three workers of three machines: neither the driver nor the scheduler grows by more than some chunks."""
    file, start_worker = scheduler
    for index in range(3):
        start_worker(cache=tmp_path / f"cache_{index}")
    run = opened(settings, data, base, cluster=file)
    large, executor = tmp_path / "large", run.executor
    with large.open("wb") as content:
        for _ in range(125):
            content.write(os.urandom(4_000_000))
    sha256 = executor.share_file(large)
    executor.client.wait_for_workers(3)
    scheduler_pid = executor.client.run_on_scheduler(os.getpid)
    before = [largest_memory(pid) for pid in (os.getpid(), scheduler_pid)]
    for worker in executor.client.nthreads():
        executor.send(Outcome(worker, missing=(sha256,)))
    grown = [largest_memory(pid) - was for pid, was in zip((os.getpid(), scheduler_pid), before, strict=True)]
    executor.shutdown()
    run.lock.release()
    assert [(tmp_path / f"cache_{i}" / sha256).stat().st_size for i in range(3)] == [500_000_000] * 3
    assert max(grown) < 150e6, grown


# ------------------------------------------------------------------------------------------------------ interruptions

SCRIPT = """
import os, sys, time
from types import SimpleNamespace
from pathlib import Path
from sdlab.cluster.dask_cluster import start_local_workers
from sdlab.settings import Settings
if __name__ == "__main__":
    cluster = start_local_workers(Settings(experiment="x", dataset="digits", workers=2, device="cpu"))
    from distributed import Client
    client = Client(cluster)
    client.wait_for_workers(2)
    busy = [client.submit(time.sleep, 60, pure=False) for _ in range(4)]
    print(*client.run(os.getpid).values(), flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_local_workers_end_with_their_driver(tmp_path, how):
    """Within ten seconds, busy or not."""
    (tmp_path / "driver.py").write_text(SCRIPT)
    driver = subprocess.Popen(
        [sys.executable, tmp_path / "driver.py"], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    workers = list(map(int, driver.stdout.readline().split()))
    assert len(workers) == 2
    driver.send_signal(how)
    until = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < until:
        time.sleep(0.1)
    left = [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    driver.kill()
    driver.wait()
    assert not left


def test_neither_a_cancelled_caller_nor_a_tasks_error_stops_the_workers(settings, data, base):
    """A trial failed, or the user stopped the cell: nobody waits for what workers still do, and they serve the next call.
    An error of a task is the driver's."""
    run = opened(settings, data, base, cluster="local", workers=1)
    future = run.executor.submit(sleep_for, run, 2.0)
    time.sleep(0.2)
    run.executor.cancel()
    with pytest.raises(CancelledError):
        future.result(timeout=1)
    assert run.executor.submit(sleep_for, run, 0.0).result(timeout=60) == 0.0
    for kind in (FileNotFoundError, KeyError, ValueError):  # not taken for a lost worker
        with pytest.raises(kind, match="of a task"):
            run.executor.submit(fail_with, run, kind).result(timeout=60)
    (epoch_folder(run.folder / "class_encoder", 1) / "config.json").write_text("{}")
    with pytest.raises(BadInput, match=r"is damaged: config\.json"):
        results(run)


def sleep_for(run, seconds, on_progress) -> float:
    time.sleep(seconds)
    return seconds


def fail_with(run, kind, on_progress):
    raise kind("of a task")


def test_a_file_on_its_way_delays_no_other_job_and_a_jobs_files_replace_the_last_ones(settings, data, base, tmp_path):
    run = opened(settings, data, base, cluster="local", workers=1)
    executor, may_send = run.executor, threading.Event()
    assert executor.submit(files_of, run).result(timeout=60) == []
    send = executor.send
    executor.send = lambda outcome: (may_send.wait(), send(outcome))
    for name in "ab":
        (run.folder / name).write_text(name)
    first = executor.submit(files_of, run, files=[run.folder / "a"])
    assert executor.submit(files_of, run).result(timeout=60) == [] and not first.done()
    may_send.set()
    assert first.result(timeout=60) == ["a"]
    assert executor.submit(files_of, run, files=[run.folder / "b"]).result(timeout=60) == ["b"]
    assert len({path.read_text() for path in (tmp_path / "cache").iterdir() if path.stat().st_size == 1}) == 2
    executor.shutdown()
    run.lock.release()


def files_of(run, on_progress) -> list[str]:
    return sorted(path.name for path in run.folder.iterdir()) if run.folder.exists() else []
