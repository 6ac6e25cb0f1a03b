"""A `SamplingConfig` and a seed -> shards + manifest: a synthetic set on disk that can be interrupted, extended, checked.

A set is an endless sequence of images, written in shards of a fixed size. Image i has label `labels[i % len(labels)]`
and starts from the noise of seed (set seed, i). A set of n images is the first n of the sequence, so a larger set extends
a smaller one, a search's higher rung extends the lower one, and x1 ... x10 are nested. A shard is the unit of batch, of
work and of resume: its bytes do not depend on how many others are made, by whom, or after how many interruptions.
"""

import functools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.numpy import save_file
from tqdm.auto import tqdm

from sdlab.cluster.executors import InThisProcess
from sdlab.data.images import Split
from sdlab.data.pixels import to_uint8
from sdlab.devices import raise_on_oom
from sdlab.errors import BadInput
from sdlab.runs.checkpoints import checkpoint_hashes, checkpoint_sha, epoch_folder
from sdlab.runs.experiment import Experiment
from sdlab.runs.files import (
    atomic_write,
    check_free_space,
    file_lock,
    sha256_of_file,
    sha256_of_json,
    write_hashed_json,
)
from sdlab.runs.shards import read_manifest, read_shards, shard_path
from sdlab.sampling_config import SamplingConfig, load_pipeline
from sdlab.seeds import derive_seed
from sdlab.threads import map_in_threads

if TYPE_CHECKING:  # needs diffusers, which is slow to import
    from sdlab.diffusion_pipeline import ClassConditionalStableDiffusionPipeline

SMALLEST_BATCH = 64  # on a CPU: smaller ones cost more per image


@dataclass(frozen=True, kw_only=True)
class GenerationPlan:
    """Everything that a synthetic set's bytes depend on, apart from the machine."""

    weights: str  # a hash that names VAE, UNet and Class-Encoder
    scheduler: str
    num_inference_steps: int
    guidance_scale: float
    guidance_interval: tuple[float, float]  # shares of the inference steps
    labels: tuple[int, ...]  # one period of the endless label sequence
    seed: int
    base_size: int  # pixels of the base model's images
    image_size: int  # pixels of the classifier's images, which are kept
    shard_size: int
    resizing: str = "bilinear"  # from the one to the other

    def as_dict(self) -> dict[str, Any]:
        """All of it; `resizing` only if it is not the authors', since sets older than this field go by the same key."""
        return {name: value for name, value in self.__dict__.items() if (name, value) != ("resizing", "bilinear")}

    def key(self) -> str:
        return sha256_of_json(self.as_dict())[:16]

    def labels_of(self, start: int, stop: int) -> np.ndarray:
        """Labels start ... stop - 1 of the sequence, int64."""
        return np.asarray(self.labels, np.int64)[np.arange(start, stop) % len(self.labels)]


def real_labels(labels: np.ndarray) -> tuple[int, ...]:
    """The real training labels, each class spread evenly: x k has k times the real class counts."""
    counts = np.bincount(labels)
    position = [((i + 0.5) / count, c) for c, count in enumerate(counts) for i in range(count)]
    return tuple(int(c) for _, c in sorted(position))


@dataclass(frozen=True)
class SyntheticSet:
    """The shards of one plan in `folder`. `made_from` tells the inputs behind the plan's hash of weights."""

    folder: Path
    plan: GenerationPlan
    made_from: dict | None = None

    @property
    def manifest(self) -> dict:
        if (self.folder / "manifest.json").exists():
            return read_manifest(self.folder)
        # Without the labels, which stand in the shards: a period may be as long as the real training set.
        plan = {name: value for name, value in self.plan.as_dict().items() if name != "labels"}
        return {"key": self.plan.key(), "plan": plan, "made_from": self.made_from, "shards": {}}

    def shards_for(self, count: int) -> int:
        return -(-count // self.plan.shard_size)

    def missing(self, count: int) -> list[int]:
        """Indices of the shards that the first `count` images lack."""
        shards, wanted = self.manifest["shards"], range(self.shards_for(count))
        return [i for i in wanted if str(i) not in shards or not shard_path(self.folder, i).is_file()]

    def seconds(self, count: int) -> float:
        """Measured seconds of generating the first `count` images (denoising and decoding)."""
        shards = self.manifest["shards"]
        whole = sum(shards[str(i)]["seconds"] for i in range(self.shards_for(count)))
        return whole * count / (self.shards_for(count) * self.plan.shard_size)

    def split(self, count: int) -> Split:
        """The first `count` images and their labels, each shard checked against its hash. Raises `BadInput`."""
        images, labels = None, np.empty(count, np.int64)
        for index, (shard_images, shard_labels) in enumerate(read_shards(self.folder, count)):
            if images is None:  # filled shard by shard: never held twice
                images = np.empty((count, *shard_images.shape[1:]), np.uint8)
            first = index * self.plan.shard_size
            images[first : first + len(shard_images)] = shard_images
            labels[first : first + len(shard_labels)] = shard_labels
        hashes = self.manifest["shards"]
        shards = [(shard_path(self.folder, i), hashes[str(i)]["sha256"]) for i in range(self.shards_for(count))]
        return Split(images, labels, tuple(shards))

    def beginning(self, split: Split, count: int) -> Split:
        """The first `count` images of a longer `split`, which share its memory."""
        return Split(split.images[:count], split.labels[:count], split.shards[: self.shards_for(count)])

    def fingerprint(self, count: int) -> str:
        """One hash of the first `count` images' shards."""
        shards = self.manifest["shards"]
        return sha256_of_json([count, [shards[str(i)]["sha256"] for i in range(self.shards_for(count))]])


# --------------------------------------------------------------------------------------------- a run's sets


def plan_generation(
    run: Experiment, config: SamplingConfig, seed: int, labels: Sequence[int] | None = None
) -> GenerationPlan:
    """The plan of a set with one period of `labels`; without, 0, 1, ... C - 1: n // C images of each class, or one more."""
    settings, base = run.settings, run.base
    weights = base.sha256 | checkpoints_of(run, config)
    return GenerationPlan(
        weights=sha256_of_json([weights, base.scheduler_config]),
        scheduler=settings.scheduler,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=float(config.guidance_scale),
        guidance_interval=(settings.guidance_start, settings.guidance_stop),
        labels=tuple(range(run.data.num_classes) if labels is None else labels),
        seed=seed,
        base_size=settings.base_image_size,
        image_size=run.data.image_size,
        shard_size=settings.shard_size,
        resizing=settings.base_resizing,
    )


def checkpoints_of(run: Experiment, config: SamplingConfig) -> dict[str, str]:
    """Hashes of a config's checkpoints, by part. Raises `BadInput` for a missing one."""
    return {part: checkpoint_sha(run.folder / part, epoch) for part, epoch in trained_epochs(config).items()}


def trained_epochs(config: SamplingConfig) -> dict[str, int]:
    """The epochs of a config's checkpoints, by part; an untrained part has none."""
    epochs = {"class_encoder": config.class_encoder_epoch, "unet": config.unet_epoch}
    return {part: epoch for part, epoch in epochs.items() if epoch}


def generate_set(
    run: Experiment,
    config: SamplingConfig,
    count: int,
    seed: int,
    labels: Sequence[int] | None = None,
    desc: str = "generate",
    priority: int = 0,
) -> SyntheticSet:
    """A set of `count` images below `synthetic/`; shards that exist are not made again."""
    plan = plan_generation(run, config, seed, labels)
    made_from = dict(
        config=asdict(config),
        checkpoints=checkpoints_of(run, config),
        base_model=run.base.fingerprint(),
        labels="uniform" if labels is None else "real",
    )
    synthetic_set = SyntheticSet(run.folder / "synthetic" / plan.key(), plan, made_from)
    files = checkpoint_files(run, config)

    def make(indices: Sequence[int], *how: Callable) -> None:
        calls = [(config, plan, index) for index in indices]
        run.executor.each(make_shard, run, calls, *how, files=files, steps=plan.shard_size, priority=priority)

    try:
        return complete(synthetic_set, count, make, run.progress, desc)
    finally:
        load_pipeline_once.cache_clear()  # its UNet takes memory


def checkpoint_files(run: Experiment, config: SamplingConfig) -> list[Path]:
    """The files of a config's checkpoints."""
    folders = [epoch_folder(run.folder / part, epoch) for part, epoch in trained_epochs(config).items()]
    return [folder / name for folder in folders for name in ("manifest.json", *checkpoint_hashes(folder))]


@functools.lru_cache(maxsize=1)
def load_pipeline_once(run: Experiment, config: SamplingConfig, weights: str):
    """The pipeline for all shards of a set. A checkpoint of the same epoch that was made again has other `weights`."""
    return load_pipeline(run, config)


def make_shard(
    run: Experiment, config: SamplingConfig, plan: GenerationPlan, index: int, on_progress: Callable
) -> tuple[np.ndarray, float]:
    """The images of one shard, uint8 (shard_size, 3, h, w), and the seconds that they took. Raises `BadInput`."""
    return make_shard_with(load_pipeline_once(run, config, plan.weights), plan, index, on_progress)


def make_shard_with(pipeline, plan: GenerationPlan, index: int, on_progress: Callable) -> tuple[np.ndarray, float]:
    started, remedy = time.perf_counter(), "take a smaller `shard_size` in an experiment of its own (its images differ)"
    with raise_on_oom(f"a shard of {plan.shard_size} images of {plan.base_size} px", remedy):
        indices = range(index * plan.shard_size, (index + 1) * plan.shard_size)
        images = generate_images(pipeline, plan, indices, on_progress)
    return images, round(time.perf_counter() - started, 3)


def generate(
    pipeline: "ClassConditionalStableDiffusionPipeline",
    plan: GenerationPlan,
    root: Path,
    count: int,
    progress: Callable = tqdm,
    desc: str = "generate",
    made_from: dict | None = None,
) -> SyntheticSet:
    """The first `count` images of a plan below `root/<hash of the plan>/`, made in this process.

    `made_from` is kept in the manifest. Raises `BadInput` if disk or memory are too small.
    """

    def make(indices: Sequence[int], *how: Callable) -> None:
        InThisProcess().each(make_shard_with, pipeline, [(plan, index) for index in indices], *how)

    return complete(SyntheticSet(root / plan.key(), plan, made_from), count, make, progress, desc)


def complete(synthetic_set: SyntheticSet, count: int, make: Callable, progress: Callable, desc: str) -> SyntheticSet:
    """Make what the first `count` images lack: `make(indices, write, on_progress)` passes each shard to `write`."""
    if synthetic_set.missing(count):
        with file_lock(synthetic_set.folder / ".lock"):  # two processes may want the same set at once
            write_shards(synthetic_set, count, make, progress, desc)
    return synthetic_set


def write_shards(synthetic_set: SyntheticSet, count: int, make: Callable, progress: Callable, desc: str) -> None:
    """Under the set's lock. The manifest names a shard after it was written."""
    plan, folder, manifest = synthetic_set.plan, synthetic_set.folder, synthetic_set.manifest
    wanted, missing = synthetic_set.shards_for(count), synthetic_set.missing(count)
    check_free_space(folder, len(missing) * plan.shard_size * 3 * plan.image_size**2, f"A set of {count} images")

    def write(call: tuple, shard: tuple[np.ndarray, float]) -> None:
        index, (images, seconds) = call[-1], shard
        path, first = shard_path(folder, index), index * plan.shard_size
        with atomic_write(path) as partial:
            save_file({"images": images, "labels": plan.labels_of(first, first + plan.shard_size)}, partial)
        entry = dict(sha256=sha256_of_file(path), seconds=seconds)
        if manifest["shards"].setdefault(str(index), entry)["sha256"] != entry["sha256"]:  # a lost one, made again
            raise BadInput(
                f"{path} was made again and differs from before: device, number of threads or versions differ; earlier "
                "results of its set cannot be compared with it."
            )
        manifest["shards"] = dict(sorted(manifest["shards"].items(), key=lambda item: int(item[0])))
        write_hashed_json(folder / "manifest.json", manifest)

    done = (wanted - len(missing)) * plan.shard_size
    with progress(total=wanted * plan.shard_size, initial=done, desc=desc, unit="img") as bar:
        make(missing, write, bar.update)


def generate_images(
    pipeline, plan: GenerationPlan, indices: Sequence[int], on_progress: Callable[[int], Any] | None = None
) -> np.ndarray:
    """Images of these indices of the sequence: uint8 (n, 3, image_size, image_size).

    `on_progress(k)` is called with newly completed images; the k sum to n. On a CPU a few batches are made at a time,
    each with its share of torch's threads.
    """
    counting, completed = threading.Lock(), 0  # image-steps of all batches

    def make(batch: Sequence[int], check_cancelled: Callable[[], None]) -> np.ndarray:
        steps = 0

        def after_step() -> None:
            nonlocal completed, steps
            check_cancelled()
            steps += 1
            if on_progress is None or steps > plan.num_inference_steps:  # second-order schedulers make more
                return
            with counting:
                before, completed = completed // plan.num_inference_steps, completed + len(batch)
                on_progress(completed // plan.num_inference_steps - before)

        output = pipeline.copy_for_thread()(
            labels=plan.labels_of(batch[0], batch[-1] + 1),
            num_inference_steps=plan.num_inference_steps,
            guidance_scale=plan.guidance_scale,
            guidance_start=plan.guidance_interval[0],
            guidance_stop=plan.guidance_interval[1],
            seeds=[derive_seed(plan.seed, i) for i in batch],
            size=plan.base_size,
            output_type="pt",
            after_step=after_step,
        )
        return to_uint8(output.images, plan.image_size, plan.resizing)

    workers = count_parallel_batches(len(indices), pipeline.device)
    size = -(-len(indices) // workers)
    batches = [indices[i : i + size] for i in range(0, len(indices), size)]
    return np.concatenate(map_in_threads(make, batches, workers))


def count_parallel_batches(count: int, device: torch.device) -> int:
    """On a CPU one batch a thread, of at least `SMALLEST_BATCH` images."""
    if device.type != "cpu":
        return 1
    threads = torch.get_num_threads()
    return max(p for p in range(1, max(1, count // SMALLEST_BATCH) + 1) if threads % p == 0)
