"""What a worker does: look for a job's files, rebuild its experiment from them, call its function.

A worker sees no folder of the driver. It knows files by their content: from its cache, a base model also from where the
settings say, else from the driver, which sends what `perform` reports as missing.
"""

import functools
import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from distributed import get_worker
from safetensors.numpy import load_file

from sdlab.cluster.blobs import BlobCache, missing_files
from sdlab.data.images import ImageDataset, Split
from sdlab.data.model_files import base_model_folder
from sdlab.devices import choose_device
from sdlab.errors import BadInput
from sdlab.runs.experiment import Experiment
from sdlab.runs.files import sha256_of_file, sha256_of_json
from sdlab.runs.records import environment
from sdlab.settings import Settings

Files = tuple[tuple[str, str], ...]  # (path below a folder, sha256)
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Context:
    """What all jobs of a stage share; files by their sha256."""

    settings: Settings
    dataset: str
    class_names: tuple[str, ...]
    base: Files
    environment: tuple[tuple[str, Any], ...]  # of the first worker; another one's results could differ in the last bits

    @functools.cached_property
    def key(self) -> str:
        return sha256_of_json([self.settings.as_dict(), self.dataset, self.base])[:16]


@dataclass(frozen=True)
class Images:
    """A `Split` as files with `images` and `labels`; the first `count` of them are meant."""

    files: tuple[str, ...]
    count: int


@dataclass(frozen=True)
class Job:
    """One call `function(experiment, *args, on_progress)` with so many of torch's threads."""

    context: Context
    function: Callable
    args: tuple
    files: Files  # of the experiment's folder
    threads: int


@dataclass(frozen=True)
class Outcome:
    """A result, or the job's own error; or the files that the worker lacks; or how it is another kind of worker."""

    worker: str
    result: Any = None
    error: Exception | None = None  # of a kind that a lost worker would leave as well
    missing: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()


def perform(job: Job) -> Outcome:
    """Do a job, or say what stands against it on this worker."""
    import torch

    context, address = job.context, get_worker().address
    if found := differences(context):
        return Outcome(address, differences=found)
    cache = BlobCache(context.settings.cluster_cache_gb * 1e9)
    wanted = wanted_files(job)
    if not has_own_base(context):
        wanted += [sha256 for _, sha256 in context.base]
    if missing := missing_files(cache.limit, wanted):
        return Outcome(address, missing=missing)
    try:
        experiment = rebuild(context, cache)
        place(job.files, experiment.folder, cache)
        args = [read_images(arg, cache) if isinstance(arg, Images) else arg for arg in job.args]
    except FileNotFoundError:  # another worker of this machine needed the room meanwhile
        return Outcome(address, missing=missing_files(cache.limit, wanted) or tuple(wanted))
    torch.set_num_threads(job.threads)
    try:
        return Outcome(address, job.function(experiment, *args, lambda *_: None))
    except (OSError, LookupError) as error:
        return Outcome(address, error=error)


def wanted_files(job: Job) -> list[str]:
    """The files that a worker needs for a job, besides the base model."""
    shards = [sha256 for arg in job.args if isinstance(arg, Images) for sha256 in arg.files]
    return [job.context.dataset, *(sha256 for _, sha256 in job.files), *shards]


# ---------------------------------------------------------------------------------------------- kinds of workers


def describe(device: str) -> tuple[str, dict[str, Any]]:
    """This worker's address, and what its last bits depend on: versions, code, device. Raises `BadInput` without the device."""
    worker = get_worker()
    return worker.address, kind_of_machine(device) | {"tasks at a time": worker.state.nthreads}


@functools.cache
def kind_of_machine(device: str) -> dict[str, Any]:
    kind, code = environment(SimpleNamespace(device=choose_device(device))), hashlib.sha256()
    kind.pop("threads", None)  # a job sets them
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(path.read_bytes())
    return kind | dict(device_type=choose_device(device).type, sdlab=code.hexdigest()[:12])


def differences(context: Context) -> tuple[str, ...]:
    """How this worker is another kind than the first; with `cluster_any_worker`, only in what would break its tasks."""
    _, here = describe(context.settings.device)
    names = {"tasks at a time"} if context.settings.cluster_any_worker else {name for name, _ in context.environment}
    return tuple(
        f"{name} {here.get(name)} instead of {wanted}"
        for name, wanted in context.environment
        if name in names and here.get(name) != wanted
    )


# ------------------------------------------------------------------------------------------- what a job works with


@functools.lru_cache(maxsize=1)
def has_own_base(context: Context) -> bool:
    """True if the settings' base model is on this machine, or can be fetched, with the driver's content."""
    try:
        folder, _ = base_model_folder(context.settings)
        return all(sha256_of_file(folder / name) == sha256 for name, sha256 in context.base)
    except BadInput:
        return False


@functools.lru_cache(maxsize=1)
def rebuild(context: Context, cache: BlobCache) -> Experiment:
    """The experiment of a context, in a folder of this worker's own."""
    from sdlab.base_models import load_base_model

    own = Path(get_worker().local_directory)
    for former in own.glob("sdlab-*"):  # of another stage: its files would outlast the cache's limit
        shutil.rmtree(former, ignore_errors=True)
    folder = own / f"sdlab-{context.key}"
    settings = replace(context.settings, cluster="none", runs_root=str(folder / "runs"))
    if not has_own_base(context):
        place(context.base, folder / "base", cache)
        settings = replace(settings, base_model=str(folder / "base"))
    arrays = load_file(cache.path(context.dataset))
    splits = {name: Split(arrays[f"{name}.images"], arrays[f"{name}.labels"]) for name in SPLITS}
    data = ImageDataset(settings.dataset, "", context.class_names, **splits)
    return Experiment(settings, data, load_base_model(settings))


placed: dict[Path, str] = {}  # file of this process -> sha256: a checkpoint of gigabytes is not hashed for each shard


def place(files: Files, folder: Path, cache: BlobCache) -> None:
    """Put files from the cache where the package expects them, instead of earlier ones. Linked, or copied to another disk."""
    wanted = {folder / name for name, _ in files}
    for path in [path for path in placed if wanted and path.is_relative_to(folder) and path not in wanted]:
        path.unlink(missing_ok=True)
        del placed[path]
    for name, sha256 in files:
        path = folder / name
        if placed.get(path) == sha256 and path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        try:
            os.link(cache.path(sha256), path)
        except OSError:
            shutil.copyfile(cache.path(sha256), path)
        placed[path] = sha256


def read_images(images: Images, cache: BlobCache) -> Split:
    parts = [load_file(cache.path(sha256)) for sha256 in images.files]
    joined = {name: np.concatenate([part[name] for part in parts])[: images.count] for name in ("images", "labels")}
    return Split(**joined)
