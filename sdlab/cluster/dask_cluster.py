"""Tasks on a Dask cluster. Scheduling, late workers and dead ones are Dask's; files, retries and order are decided here.

One thread handles what comes back, one a machine sends files. A worker that lacks files gets them in chunks, through the
scheduler but outside its graph of tasks, so that neither ever holds a whole one. Jobs are submitted in the order of their
priority, a few at a time.
"""

import dataclasses
import functools
import heapq
import itertools
import json
import logging
import os
import queue
import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dask
import numpy as np
import torch
from safetensors.numpy import save_file

from sdlab.cluster.blobs import CHUNK, missing_files, receive
from sdlab.data import model_files
from sdlab.data.images import Split, TrainingImages
from sdlab.devices import choose_device
from sdlab.errors import BadInput, first_line
from sdlab.paths import project_path
from sdlab.runs.files import atomic_write, raise_on_read_error, sha256_of_file
from sdlab.settings import Settings

QUIET = {"logging.distributed": "critical", "logging.tornado": "critical"}
TICK = {"distributed.admin.tick.interval": "500ms"}  # of the event loops, which share the cores with the workers
dask.config.set(QUIET | TICK)  # before it is imported
import distributed  # noqa: E402

# A cable that is cut for less is waited for; Dask's own half a minute is too short for a switch that restarts.
dask.config.update_defaults({"distributed": {"comm": {"timeouts": {"tcp": "10m"}}}})

from sdlab.cluster.worker import SPLITS, Context, Images, Job, Outcome, describe, perform, wanted_files  # noqa: E402

CONNECT = 15  # seconds for the scheduler's answer
WAIT = 300  # seconds for a first worker
PATIENCE = 60  # seconds without a result, and without a worker, until the user is told
ATTEMPTS = 3  # of a job whose workers were lost
SENDINGS = 8  # of a job's files, until they are taken to drive each other out of the worker's cache
CHUNKS = 8  # on their way at a time, to all machines
LOST = (distributed.KilledWorker, distributed.CancelledError, OSError, TimeoutError, KeyError)


@dataclass(order=True)
class Entry:
    """A submitted job: the lower its priority and number, the earlier it runs."""

    priority: int
    number: int
    job: Job = field(compare=False)
    future: Future = field(compare=False, default_factory=Future)
    lost: int = field(compare=False, default=0)  # times
    sent: int = field(compare=False, default=0)  # times
    running: distributed.Future | None = field(compare=False, default=None)
    allowed: list[str] | None = field(compare=False, default=None)  # the workers that it may run on; None: any


class Cluster(Executor):
    """Workers of this machine (`cluster: local`), or of the scheduler that the setting names."""

    def __init__(self, experiment: Any):
        settings = self.settings = experiment.settings
        self.shared = experiment.folder / "begun" / "shared"  # arrays that workers may ask for
        self.name = uuid.uuid4().hex  # as a sender of files
        self.sources: dict[str, Path] = {}  # sha256 -> file
        self.hashes: dict[Path, str] = {}  # file -> sha256
        self.local = start_local_workers(settings) if settings.cluster == "local" else None
        try:
            self.client = connect(settings, self.local)
            self.environment = self.kind_of_worker()
        except BaseException:
            if self.local is not None:  # else a repeated cell would start more
                self.local.close()
            raise
        self.on_cpu, self.threads = self.environment["device_type"] == "cpu", settings.cluster_threads
        self.refused: dict[str, str] = {}  # worker -> how it differs
        self.experiment = experiment
        self.lock, self.counter = threading.RLock(), itertools.count()
        self.waiting: list[Entry] = []
        self.running: dict[str, Entry] = {}  # by Dask's key
        self.ended: queue.SimpleQueue = queue.SimpleQueue()
        self.machines: dict[str, queue.SimpleQueue] = {}  # machine -> jobs whose files it lacks
        self.chunks = threading.Semaphore(CHUNKS)
        threading.Thread(target=self.handle_all, name="cluster", daemon=True).start()

    def callers(self, tasks: int) -> int:
        """How many callers of `each`, with so many tasks each, keep all workers busy."""
        return -(-self.window() // tasks)

    # ---------------------------------------------------------------------------------------- concurrent.futures

    def submit(
        self,
        function: Callable,
        experiment: Any,
        /,
        *args: Any,
        files: Iterable[Path] = (),
        threads: int = 1,
        priority: int = 0,
    ) -> Future:
        """A `Future` of `function(experiment, *args, on_progress)` on a worker. `files` lie in the experiment's folder."""
        names = tuple((path.relative_to(experiment.folder).as_posix(), self.share_file(path)) for path in files)
        args = tuple(self.share_images(arg) if isinstance(arg, Split | TrainingImages) else arg for arg in args)
        entry = Entry(priority, next(self.counter), Job(self.context, function, args, names, threads))
        with self.lock:
            heapq.heappush(self.waiting, entry)
            self.start_jobs()
        return entry.future

    def each(
        self,
        function: Callable,
        experiment: Any,
        calls: Iterable[tuple],
        finished: Callable[[tuple, Any], None],
        on_progress: Callable[[int], Any],
        at_a_time: int = 1,
        files: Iterable[Path] = (),
        steps: int = 1,
        priority: int = 0,
    ) -> None:
        """`finished(call, result)` for each call as it ends; at most two a worker wait or run. A call counts for `steps`."""
        how = dict(files=files, threads=max(1, self.threads // at_a_time), priority=priority)
        calls, pending = iter(calls), {}
        try:
            while True:
                for call in itertools.islice(calls, max(0, self.window() - len(pending))):
                    pending[self.submit(function, experiment, *call, **how)] = call
                if not pending:
                    return
                ended = wait(pending, timeout=PATIENCE, return_when=FIRST_COMPLETED).done
                if not ended:
                    self.look_for_workers()
                for future in ended:
                    finished(pending.pop(future), future.result())
                    on_progress(steps)
        finally:
            with self.lock:  # else one could be answered in between
                for future in pending:
                    future.cancel()

    def look_for_workers(self) -> None:
        """Say that there is none. Give jobs whose workers are all gone to those that came after."""
        with self.lock:
            if not (present := self.client.nthreads().keys()):
                print(f"There is no worker left: tasks wait for one to join {self.client.scheduler.address}.")
            for entry in list(self.running.values()):
                if entry.allowed and not present & set(entry.allowed):
                    entry.running.cancel()

    def cancel(self) -> None:
        """Whoever waits for a result gets `CancelledError`; what workers still do is ignored."""
        with self.lock:
            for entry in (*self.waiting, *self.running.values()):
                if not entry.future.done():
                    entry.future.set_exception(CancelledError())
            self.waiting.clear()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the workers of this machine; leave others to their scheduler."""
        for loop in (self.ended, *self.machines.values()):
            loop.put(None)
        self.client.close()
        if self.local is not None:
            self.local.close()

    # ------------------------------------------------------------------------------------------------ what comes back

    def window(self) -> int:
        return 2 * max(1, len(self.client.nthreads()))

    def start_jobs(self) -> None:
        """Submit the first of the waiting jobs, as many as there is room for."""
        room = self.window() if self.waiting else 0
        while self.waiting and len(self.running) < room:
            entry = heapq.heappop(self.waiting)
            if entry.future.set_running_or_notify_cancel():
                try:
                    self.start(entry)
                except Exception as error:
                    entry.future.set_exception(error)
                    raise

    def start(self, entry: Entry) -> None:
        """Submit a job to any worker, or to any that was not refused."""
        workers = self.client.nthreads() if self.refused else ()
        entry.allowed = [worker for worker in workers if worker not in self.refused] or None
        how = dict(pure=False, retries=0, priority=-entry.priority, workers=entry.allowed)
        entry.running = self.client.submit(perform, entry.job, **how)
        self.running[entry.running.key] = entry
        entry.running.add_done_callback(self.ended.put)

    def handle_all(self) -> None:
        while (future := self.ended.get()) is not None:
            try:
                outcome = (
                    future.result()
                )  # without the lock: if the worker is gone, Dask waits until another one is through
            except Exception as error:
                outcome = error
            with self.lock:
                self.settle(self.running.pop(future.key), self.handle, outcome)

    def settle(self, entry: Entry, handle: Callable, *args: Any) -> None:
        """Whatever becomes of a job, its future is answered and there is room for the next one."""
        try:
            if not entry.future.done():  # else it was cancelled
                handle(entry, *args)
        except BaseException as error:
            entry.future.set_exception(error)
        try:
            self.start_jobs()
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """The scheduler cannot be asked: no job that waits for it or runs would be answered."""
        said = f"The scheduler of `cluster: {self.settings.cluster}` was lost ({first_line(error)}): the same command resumes."
        for entry in (*self.waiting, *self.running.values()):
            if not entry.future.done():
                entry.future.set_exception(BadInput(said))
        self.waiting.clear()

    def handle(self, entry: Entry, outcome: Outcome | Exception) -> None:
        """Pass a result on; have missing files sent; give a lost job, or one on another kind of worker, to another worker."""
        if isinstance(outcome, Exception):
            self.start_again(entry, outcome)
        elif outcome.error is not None:
            raise outcome.error
        elif outcome.missing:
            self.check_room(entry, outcome.missing)
            self.running[entry.running.key] = entry  # it counts until the files are there
            self.ask_for_files(entry, outcome)
        elif outcome.differences:
            self.refuse(outcome.worker, outcome.differences)
            self.start(entry)
        else:
            entry.future.set_result(outcome.result)

    def start_again(self, entry: Entry, error: Exception) -> None:
        """Start a job whose worker was lost. Raises `BadInput` the third time; what is no loss is raised at once."""
        if not isinstance(error, LOST):
            raise error
        entry.lost += 1
        if entry.lost == ATTEMPTS:
            raise BadInput(
                f"Workers were lost {ATTEMPTS} times over the same task ({first_line(error)}): see their logs."
            ) from None
        self.start(entry)

    def ask_for_files(self, entry: Entry, outcome: Outcome) -> None:
        """The workers of a machine share a cache, so they get one file after another; a machine that is gone delays no other."""
        machine = outcome.worker.rpartition(":")[0]
        if machine not in self.machines:
            self.machines[machine] = queue.SimpleQueue()
            threading.Thread(target=self.send_all, args=(self.machines[machine],), name=machine, daemon=True).start()
        self.machines[machine].put((entry, outcome))

    def send_all(self, asked: queue.SimpleQueue) -> None:
        """Send files to one machine, and start the jobs that lacked them."""
        for entry, outcome in iter(asked.get, None):
            then = (self.start,)
            try:
                self.send(outcome)
            except Exception as error:
                then = (self.start_again, error)
            with self.lock:
                del self.running[entry.running.key]
                self.settle(entry, *then)

    def refuse(self, worker: str, differences: tuple[str, ...]) -> None:
        """Note a worker of another kind, which gets no more jobs. Raises `BadInput` if there is no other."""
        if worker not in self.refused:
            self.refused[worker] = ", ".join(differences)
            print(f"The worker {worker} is not used: {self.refused[worker]}. `cluster_any_worker: true` accepts it.")
        if not self.client.nthreads().keys() - self.refused.keys():
            raise BadInput(
                f"No worker of the kind that this stage began with is left; {worker} has {self.refused[worker]}."
            )

    # -------------------------------------------------------------------------------------------------------- files

    @functools.cached_property
    def context(self) -> Context:
        """The base model's files and the real images, as workers ask for them."""
        base, data = self.experiment.base, self.experiment.data
        names = [*model_files.CONFIGS, *base.sha256]
        names += [name for name in model_files.list_files(base.folder) if name.endswith(".json") and name not in names]
        files = tuple((name, self.share_file(base.folder / name, base.sha256.get(name))) for name in sorted(names))
        arrays = {
            f"{name}.{kind}": getattr(data.splits[name], kind) for name in SPLITS for kind in ("images", "labels")
        }
        dataset = self.share_arrays(data.fingerprint()[:16], arrays)
        environment = tuple(sorted(self.environment.items()))
        settings = dataclasses.replace(self.settings, storage="")  # may name a server that workers do not need
        return Context(settings, dataset, tuple(data.class_names), files, environment)

    def share_file(self, path: Path, sha256: str | None = None) -> str:
        """Files of a stage do not change, so each is hashed once."""
        if path not in self.hashes:
            self.hashes[path] = sha256 or sha256_of_file(path)
            self.sources[self.hashes[path]] = path
        return self.hashes[path]

    def share_arrays(self, name: str, arrays: dict[str, np.ndarray]) -> str:
        path = self.shared / f"{name}.safetensors"
        if not path.exists():
            with atomic_write(path) as partial:
                save_file({key: np.ascontiguousarray(value) for key, value in arrays.items()}, partial)
        return self.share_file(path)

    def share_images(self, images: Split | TrainingImages) -> Images:
        """The shards that a split was read from, or a file of its own."""
        split = images.split() if isinstance(images, TrainingImages) else images
        if split.shards:
            return Images(tuple(itertools.starmap(self.share_file, split.shards)), len(split))
        arrays = dict(images=split.images, labels=split.labels)
        return Images((self.share_arrays(split.fingerprint()[:16], arrays),), len(split))

    def check_room(self, entry: Entry, missing: Sequence[str]) -> None:
        """Raises `BadInput` if a cache that holds one of the job's files has to drop another for it."""
        entry.sent += 1
        needed = sum(self.sources[sha256].stat().st_size for sha256 in {*missing, *wanted_files(entry.job)})
        if needed > self.settings.cluster_cache_gb * 1e9 or entry.sent > SENDINGS:
            raise BadInput(
                f"A task needs {needed / 1e9:.3g} GB of files at once on its worker, where they drive each other out of the "
                f"cache: make `cluster_cache_gb` ({self.settings.cluster_cache_gb:g}) larger."
            )

    def send(self, outcome: Outcome) -> None:
        """Send files to a worker's cache, a chunk at a time, but what another worker of its machine has got meanwhile."""
        limit, worker = self.settings.cluster_cache_gb * 1e9, outcome.worker
        sender = self.name + "".join(filter(str.isalnum, worker))  # machines may share a disk
        for sha256 in self.client.run(missing_files, limit, outcome.missing, workers=[worker])[worker]:
            path = self.sources[sha256]
            with raise_on_read_error(path):
                size = path.stat().st_size
            for offset in range(0, max(size, 1), CHUNK):
                with self.chunks:
                    chunk = (sha256, offset, size, read_chunk(path, offset), sender)
                    self.client.run(receive, limit, *chunk, workers=[worker])

    def kind_of_worker(self) -> dict[str, Any]:
        """What the first worker is, which all others have to be. Raises `BadInput`."""
        how = f"`dask worker {self.client.scheduler.address} --nthreads 1`, in an environment with sdlab"
        # A task, not a call: a cluster that grows with the work starts no worker without any.
        asked = self.client.submit(describe, self.settings.device, pure=False)
        try:
            worker, kind = asked.result(timeout=WAIT)
        except TimeoutError:
            busy = (
                f"The workers of {self.settings.cluster} have been busy for {WAIT} s: wait, or start more with {how}."
            )
            none = f"No worker joined {self.settings.cluster} within {WAIT} s: start one with {how}."
            raise BadInput(busy if self.client.nthreads() else none) from None
        except Exception as error:
            raise BadInput(f"A worker of {self.settings.cluster} cannot be used: {first_line(error)}") from None
        if kind["tasks at a time"] != 1:
            raise BadInput(f"The worker {worker} does {kind['tasks at a time']} tasks at a time: start it with {how}.")
        return kind


def read_chunk(path: Path, offset: int) -> bytes:
    """Raises `BadInput`: what this machine cannot read is no fault of a worker."""
    with raise_on_read_error(path), path.open("rb") as file:
        file.seek(offset)
        return file.read(CHUNK)


def connect(settings: Settings, local: Any) -> distributed.Client:
    """A client of the cluster. Raises `BadInput` if its scheduler does not answer."""
    address = settings.cluster
    how = dict(address=local or address)
    if address.endswith(".json"):
        how = dict(scheduler_file=str(project_path(address)))
    try:
        if "scheduler_file" in how:  # Dask would wait for it
            json.loads(Path(how["scheduler_file"]).read_text(encoding="utf-8"))
        return distributed.Client(**how, timeout=CONNECT, set_as_default=False)
    except TypeError:
        raise BadInput(
            f"`cluster: {address}` needs certificates, which Dask's configuration does not name: see docs/scale.md."
        ) from None
    except (OSError, TimeoutError, ValueError) as error:
        raise BadInput(
            f"The scheduler of `cluster: {address}` does not answer ({first_line(error)}): start it with `dask scheduler`, or "
            "take `cluster: local`."
        ) from None


def start_local_workers(settings: Settings) -> distributed.SpecCluster:
    """One worker a GPU, or `workers` on a CPU. Their scheduler listens on 127.0.0.1: whoever reaches it can run code."""
    gpus = torch.cuda.device_count() if settings.device in ("auto", "cuda") and torch.cuda.is_available() else 0
    of_cpu = max(1, (os.cpu_count() or 1) // settings.cluster_threads)
    count = settings.workers or gpus or (of_cpu if choose_device(settings.device).type == "cpu" else 1)
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpus else []
    names = names if len(names) >= gpus and all(names) else list(map(str, range(gpus)))
    options = [dict(nthreads=1, host="127.0.0.1", memory_limit=0, dashboard_address=None) for _ in range(count)]
    for index, option in enumerate(options if gpus else ()):
        option |= dict(env={"CUDA_VISIBLE_DEVICES": names[index % gpus].strip()}, resources={"GPU": 1})
    for name, value in dict(LOGGING__DISTRIBUTED="critical", DISTRIBUTED__WORKER__PROFILE__ENABLED="False").items():
        dask.config.set({f"distributed.nanny.pre-spawn-environ.DASK_{name}": value})  # nobody reads their profiles
    scheduler = dict(host="127.0.0.1", port=0, dashboard_address="127.0.0.1:0")
    return distributed.SpecCluster(
        workers={i: dict(cls=distributed.Nanny, options=option) for i, option in enumerate(options)},
        scheduler=dict(cls=distributed.Scheduler, options=scheduler),
        silence_logs=logging.CRITICAL,
    )
