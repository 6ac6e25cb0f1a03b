"""Checkpoint + plan -> shards + manifest: a synthetic set on disk that can be cut short, extended and checked.

A set is an endless sequence of images, written in shards of a fixed size. Image i has label `labels[i % len(labels)]`
and starts from the noise of seed (set seed, i). A set of n images is the sequence's first n, so a larger set extends
a smaller one, a search's higher rung extends the lower, and x1 ... x10 are nested. A shard is the unit of batch, of
work and of resume: its bytes do not depend on how many others are made, by whom, or after how many interruptions.
"""

import hashlib
import json
import logging
import os
import shutil
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

from sdlab.base_models import BaseModel, make_scheduler
from sdlab.data.images import ImageDataset, Split
from sdlab.data.pixels import to_uint8
from sdlab.devices import raise_on_oom
from sdlab.errors import BadInput
from sdlab.runs.checkpoints import checkpoint_sha, load_checkpoint
from sdlab.runs.files import (
    atomic_write,
    check_free_space,
    file_lock,
    sha256_of_file,
    sha256_of_json,
    write_hashed_json,
)
from sdlab.runs.run import Run
from sdlab.runs.shards import read_manifest, read_shards, shard_path
from sdlab.settings import Settings
from sdlab.threads import derive_seed, map_in_threads

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from sdlab.class_encoder import ClassTable
    from sdlab.pipeline import ClassConditionalStableDiffusionPipeline


SMALLEST_BATCH = 64


@dataclass(frozen=True)
class GenerationPlan:
    """All that a synthetic set's bytes depend on, the machine apart."""

    weights: str  # a hash that names VAE, UNet and Class-Encoder
    scheduler: str
    num_inference_steps: int
    guidance_scale: float
    guidance_interval: tuple[float, float]  # shares of the steps
    labels: tuple[int, ...]  # one period of the endless label sequence
    seed: int
    base_size: int  # pixels the base model makes
    image_size: int  # pixels kept: the classifier's
    shard_size: int

    def key(self) -> str:
        return sha256_of_json(self.__dict__)[:16]

    def labels_of(self, start: int, stop: int) -> np.ndarray:
        return np.asarray(self.labels, np.int64)[np.arange(start, stop) % len(self.labels)]


def uniform_labels(num_classes: int) -> tuple[int, ...]:
    """0, 1, ... C - 1, again and again: n images have n // C of each class, the remainder going to the first classes."""
    return tuple(range(num_classes))


def real_labels(labels: np.ndarray) -> tuple[int, ...]:
    """The real training labels, in an order that spreads each class evenly: x k has k times the real class counts."""
    counts = np.bincount(labels)
    position = [((i + 0.5) / count, c) for c, count in enumerate(counts) for i in range(count)]
    return tuple(int(c) for _, c in sorted(position))


@dataclass(frozen=True)
class SyntheticSet:
    """The shards made so far of one plan, in `folder`. `made_from` says for a reader what the plan's hash of weights means."""

    folder: Path
    plan: GenerationPlan
    made_from: dict | None = None

    @property
    def manifest(self) -> dict:
        path = self.folder / "manifest.json"
        # The labels stand in the shards: a period may be as long as the real training set.
        plan = {name: value for name, value in self.plan.__dict__.items() if name != "labels"}
        begun = {"key": self.plan.key(), "plan": plan, "made_from": self.made_from, "shards": {}}
        return read_manifest(self.folder) if path.exists() else begun

    def shard(self, index: int) -> Path:
        return shard_path(self.folder, index)

    def shards_for(self, count: int) -> int:
        return -(-count // self.plan.shard_size)

    def missing(self, count: int) -> list[int]:
        """Which shards of the first `count` images are not there."""
        shards = self.manifest["shards"]
        return [i for i in range(self.shards_for(count)) if str(i) not in shards or not self.shard(i).is_file()]

    def seconds(self, count: int) -> float:
        """Clocked seconds of generating the first `count` images (denoising and decoding)."""
        shards = self.manifest["shards"]
        whole = sum(shards[str(i)]["seconds"] for i in range(self.shards_for(count)))
        return whole * count / (self.shards_for(count) * self.plan.shard_size)

    def split(self, count: int) -> Split:
        """The first `count` images, each shard checked against its hash. Raises `BadInput` for a damaged one."""
        images = None
        for index, (part, _) in enumerate(read_shards(self.folder, count)):
            if images is None:  # filled as the shards come: never held twice
                images = np.empty((count, *part.shape[1:]), np.uint8)
            images[index * self.plan.shard_size :][: len(part)] = part
        return Split(images, self.plan.labels_of(0, count))

    def fingerprint(self, count: int) -> str:
        """One hash for the first `count` images' shards."""
        shards = self.manifest["shards"]
        hashes = [shards[str(i)]["sha256"] for i in range(self.shards_for(count))]
        return hashlib.sha256(json.dumps([count, hashes]).encode()).hexdigest()


if TYPE_CHECKING:
    from sdlab.generation import GenerationPlan


def generate(
    pipeline: "ClassConditionalStableDiffusionPipeline",
    plan: GenerationPlan,
    root: Path,
    count: int,
    progress: Callable = tqdm,
    desc: str = "generate",
    made_from: dict | None = None,
) -> SyntheticSet:
    """Make what is missing of the first `count` images under `root/<hash of the plan>/`.

    A shard that is there is not made again; one whose bytes are not those of the manifest is refused by name when read.
    `made_from` is kept in the manifest. Raises `BadInput` if disk or memory are too small.
    """
    made = SyntheticSet(root / plan.key(), plan, made_from)
    if made.missing(count):
        with file_lock(made.folder / ".lock"):  # two trials of one point may be at work at once, in two processes
            make_missing(pipeline, made, count, progress, desc)
    return made


def make_missing(
    pipeline: "ClassConditionalStableDiffusionPipeline", made: SyntheticSet, count: int, progress: Callable, desc: str
) -> None:
    """`generate`, once nobody else is at it."""
    plan, manifest, wanted = made.plan, made.manifest, made.shards_for(count)
    missing = made.missing(count)
    smaller = "take a smaller `shard_size` in an experiment of its own (its images are others)"
    done = (wanted - len(missing)) * plan.shard_size
    check_free_space(made.folder, len(missing) * plan.shard_size * 3 * plan.image_size**2, f"A set of {count} images")
    with progress(total=wanted * plan.shard_size, initial=done, desc=desc, unit="img") as bar:
        for index in missing:
            first = index * plan.shard_size
            started = time.perf_counter()
            with raise_on_oom(f"a shard of {plan.shard_size} images of {plan.base_size} px at once", smaller):
                images = generate_images(pipeline, plan, range(first, first + plan.shard_size), bar.update)
            seconds = time.perf_counter() - started
            with atomic_write(made.shard(index)) as beside:
                save_file({"images": images, "labels": plan.labels_of(first, first + plan.shard_size)}, beside)
            entry = dict(sha256=sha256_of_file(made.shard(index)), seconds=round(seconds, 3))
            if (
                manifest["shards"].setdefault(str(index), entry)["sha256"] != entry["sha256"]
            ):  # it was lost: the same again
                raise BadInput(
                    f"{made.shard(index)} was made anew and is not what it was: device, number of threads or versions differ; what "
                    "was made of its set before cannot be compared with it."
                )
            manifest["shards"] = dict(sorted(manifest["shards"].items(), key=lambda item: int(item[0])))
            write_hashed_json(made.folder / "manifest.json", manifest)


def generate_images(
    pipeline, plan: GenerationPlan, indices: Sequence[int], made: Callable[[int], Any] | None = None
) -> np.ndarray:
    """Images of these places in the sequence: uint8 (n, 3, image_size, image_size).

    `made` hears how many more images' worth of denoising is done, n in all. On a CPU they are made in a few parts at a
    time, each with its share of torch's threads.
    """
    counting, steps = threading.Lock(), 0

    def make(part: Sequence[int], go_on: Callable[[], None]) -> np.ndarray:
        def after_step() -> None:
            nonlocal steps, mine
            go_on()
            mine += 1
            if made is None or mine > plan.num_inference_steps:  # second-order schedulers make more
                return
            with counting:
                before, steps = steps // plan.num_inference_steps, steps + len(part)
                made(steps // plan.num_inference_steps - before)

        mine = 0
        output = pipeline.copy_for_thread()(
            labels=plan.labels_of(part[0], part[-1] + 1),
            num_inference_steps=plan.num_inference_steps,
            guidance_scale=plan.guidance_scale,
            guidance_start=plan.guidance_interval[0],
            guidance_stop=plan.guidance_interval[1],
            seeds=[derive_seed(plan.seed, i) for i in part],
            size=plan.base_size,
            output_type="pt",
            after_step=after_step,
        )
        return to_uint8(output.images, plan.image_size)

    workers = count_parallel_batches(len(indices), pipeline.device)
    parts = [indices[i : i + -(-len(indices) // workers)] for i in range(0, len(indices), -(-len(indices) // workers))]
    return np.concatenate(map_in_threads(make, parts, workers))


def count_parallel_batches(count: int, device: torch.device) -> int:
    """On a CPU one part a thread, of at least `SMALLEST_BATCH` images: smaller batches cost more an image."""
    if device.type != "cpu":
        return 1
    threads = torch.get_num_threads()
    return max(p for p in range(1, max(1, count // SMALLEST_BATCH) + 1) if threads % p == 0)


@dataclass(frozen=True)
class SamplingConfig:
    """Where the method can stand: which checkpoints, how many steps, how much guidance."""

    class_encoder_epoch: int
    unet_epoch: int  # 0: the base model's own UNet
    num_inference_steps: int
    guidance_scale: float


def load_pipeline(run: Run, base: BaseModel, point: SamplingConfig) -> "ClassConditionalStableDiffusionPipeline":
    """The pipeline of an operating point's checkpoints. Raises `BadInput` for one that is missing or damaged."""
    from diffusers import UNet2DConditionModel  # slow to import

    from sdlab.class_encoder import ClassTable
    from sdlab.pipeline import ClassConditionalStableDiffusionPipeline

    device = base.device
    table = load_checkpoint(ClassTable, run.folder / "class_encoder", point.class_encoder_epoch, device)
    if point.unet_epoch:
        unet = load_checkpoint(UNet2DConditionModel, run.folder / "unet", point.unet_epoch, device, base.dtype)
    else:
        unet = base.unet
    scheduler = make_scheduler(run.settings.scheduler, base.scheduler_config)
    return ClassConditionalStableDiffusionPipeline(base.vae, prepare_unet(unet, table, run.settings), table, scheduler)


def prepare_unet(unet: "UNet2DConditionModel", table: "ClassTable", settings: Settings) -> "UNet2DConditionModel":
    """The UNet as bulk generation uses it: the classes' keys and values projected once; on a GPU channels_last; compiled
    where `compile_unet` says so. Raises `BadInput` if there is no compiler for that."""
    from sdlab.class_encoder import with_projected_conditions

    unet = with_projected_conditions(unet, table.table())
    if unet.device.type == "cuda":
        unet = unet.to(memory_format=torch.channels_last)
    if settings.compile_unet:
        if not any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++")):
            raise BadInput(
                "`compile_unet` is true, and there is no C++ compiler (g++ or clang++) here: install one, or leave it out."
            )
        if unet.device.type == "cpu":  # else it is said that a CUDA toolkit has no GPU
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        unet.compile(dynamic=False)
    return unet


def plan_generation(
    run: Run, base: BaseModel, data: ImageDataset, point: SamplingConfig, seed: int, labels: Sequence[int] | None = None
) -> GenerationPlan:
    """The plan of a set at this point: class-uniform, or with one period of `labels`."""
    weights = dict(base.sha256, class_encoder=checkpoint_sha(run.folder / "class_encoder", point.class_encoder_epoch))
    if point.unet_epoch:
        weights["unet"] = checkpoint_sha(run.folder / "unet", point.unet_epoch)
    return GenerationPlan(
        weights=sha256_of_json([weights, base.scheduler_config]),
        scheduler=run.settings.scheduler,
        num_inference_steps=point.num_inference_steps,
        guidance_scale=float(point.guidance_scale),
        guidance_interval=(run.settings.guidance_start, run.settings.guidance_stop),
        labels=tuple(labels) if labels is not None else uniform_labels(data.num_classes),
        seed=seed,
        base_size=run.settings.base_image_size,
        image_size=data.image_size,
        shard_size=run.settings.shard_size,
    )


def generate_set(
    run: Run,
    base: BaseModel,
    data: ImageDataset,
    point: SamplingConfig,
    count: int,
    seed: int,
    labels: Sequence[int] | None = None,
    desc: str = "generate",
) -> SyntheticSet:
    """Generate (what is missing of) a set of `count` images at an operating point under `synthetic/`."""
    plan = plan_generation(run, base, data, point, seed, labels)
    made_from = dict(
        point=asdict(point),
        checkpoints={
            name: checkpoint_sha(run.folder / name, epoch)
            for name, epoch in (("class_encoder", point.class_encoder_epoch), ("unet", point.unet_epoch))
            if epoch
        },
        base_model=base.fingerprint(),
        labels="uniform" if labels is None else "real",
    )
    pipeline = load_pipeline(run, base, point)
    return generate(pipeline, plan, run.folder / "synthetic", count, run.progress, desc, made_from)


def regenerate_shards(settings: Settings, key: str) -> None:
    """Make the missing shards of a set that its manifest names. Raises `BadInput` if it was made from something else.

    Opens no step: what is made is what was there, byte for byte, or is refused by its hash.
    """
    from types import SimpleNamespace

    from sdlab.base_models import load_base_model
    from sdlab.data.datasets import load_dataset

    folder = settings.run_folder / "synthetic" / key
    manifest = read_manifest(folder)
    data, base = load_dataset(settings), load_base_model(settings)
    run = SimpleNamespace(settings=settings, folder=settings.run_folder, progress=tqdm)
    point = SamplingConfig(**manifest["made_from"]["point"])
    labels = real_labels(data.train.labels) if manifest["made_from"]["labels"] == "real" else None
    plan = plan_generation(run, base, data, point, manifest["plan"]["seed"], labels)
    if plan.key() != key:
        raise BadInput(
            f"{folder} was made from other weights, data or settings than are there now: its shards cannot be made again."
        )
    generate(
        load_pipeline(run, base, point), plan, folder.parent, len(manifest["shards"]) * plan.shard_size, desc="repair"
    )
