"""An operating point -> synthetic images -> CAS: what the searches maximise and the tables print.

CAS (Classification Accuracy Score, Ravuri and Vinyals 2019): top-1 accuracy on real images of a classifier trained on
generated images only.
"""

import logging
import math
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from sdlab.base_models import BaseModel, choose_device, fitting, make_scheduler
from sdlab.classifier import Recipe, Score, score, train_classifier
from sdlab.files import checkpoint_sha, read_json, read_sealed, sha256_of_json, write_sealed, written_beside
from sdlab.generation import GenerationPlan, SyntheticSet, generate, real_labels, uniform_labels
from sdlab.images import ImageDataset, Split
from sdlab.run import Run
from sdlab.settings import BadInput, Settings
from sdlab.shards import read_manifest
from sdlab.threads import in_threads
from sdlab.training import derive_seed, load_checkpoint

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from sdlab.class_encoder import ClassTable
    from sdlab.pipeline import ClassConditionalStableDiffusionPipeline


@dataclass(frozen=True)
class OperatingPoint:
    """Where the method can stand: which checkpoints, how many steps, how much guidance."""

    class_encoder_epoch: int
    unet_epoch: int  # 0: the base model's own UNet
    num_inference_steps: int
    guidance_scale: float


def load_pipeline(run: Run, base: BaseModel, point: OperatingPoint) -> "ClassConditionalStableDiffusionPipeline":
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
    return ClassConditionalStableDiffusionPipeline(base.vae, for_sampling(unet, table, run.settings), table, scheduler)


def for_sampling(unet: "UNet2DConditionModel", table: "ClassTable", settings: Settings) -> "UNet2DConditionModel":
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
    run: Run, base: BaseModel, data: ImageDataset, point: OperatingPoint, seed: int, labels: Sequence[int] | None = None
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


def make_set(
    run: Run,
    base: BaseModel,
    data: ImageDataset,
    point: OperatingPoint,
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


def remake(settings: Settings, key: str) -> None:
    """Make the missing shards of a set that its manifest names. Raises `BadInput` if it was made from something else.

    Opens no step: what is made is what was there, byte for byte, or is refused by its hash.
    """
    from types import SimpleNamespace

    from sdlab.base_models import load_base_model
    from sdlab.datasets import load_dataset

    folder = settings.run_folder / "synthetic" / key
    manifest = read_manifest(folder)
    data, base = load_dataset(settings), load_base_model(settings)
    run = SimpleNamespace(settings=settings, folder=settings.run_folder, progress=tqdm)
    point = OperatingPoint(**manifest["made_from"]["point"])
    labels = real_labels(data.train.labels) if manifest["made_from"]["labels"] == "real" else None
    plan = plan_generation(run, base, data, point, manifest["plan"]["seed"], labels)
    if plan.key() != key:
        raise BadInput(
            f"{folder} was made from other weights, data or settings than are there now: its shards cannot be made again."
        )
    generate(
        load_pipeline(run, base, point), plan, folder.parent, len(manifest["shards"]) * plan.shard_size, desc="repair"
    )


# ---------------------------------------------------------------------------------------------------- scores


def judge(
    train: Split,
    data: ImageDataset,
    settings: Settings,
    seeds: Sequence[int],
    splits: Sequence[str],
    progress: Callable = tqdm,
    desc: str = "classifier",
    searching: bool = False,
    kept: Path | None = None,
) -> dict[str, list[Score]]:
    """Train one classifier a seed on `train` and score each on real images: split -> a `Score` a seed.

    On a CPU as many at a time as torch has threads, which they share. Each one's scores are kept in the folder `kept` as
    soon as it is trained, under a hash of all that they depend on, and are read there by a run that was cut.
    Raises `BadInput` if the memory does not hold a classifier's training.
    """
    recipe = Recipe.of(settings, searching)
    device = choose_device(settings.device)
    workers = min(len(seeds), torch.get_num_threads()) if device.type == "cpu" else 1
    counting = threading.Lock()
    made_from = [train.fingerprint(), data.fingerprint(), asdict(recipe), list(splits)] if kept else []
    files = [kept / f"{sha256_of_json([*made_from, seed])[:16]}.json" if kept else None for seed in seeds]
    found = [[Score.of(s) for s in read_sealed(f)["scores"]] if f and f.exists() else None for f in files]
    missing = [i for i, scores in enumerate(found) if scores is None]

    def train_one(i: int, go_on: Callable[[], None]) -> None:
        def after_epoch() -> None:
            go_on()
            with counting:
                bar.update()

        with fitting(f"a classifier's step of {recipe.batch_size} images", smaller):
            trained = train_classifier(train, data.val, data.num_classes, recipe, seeds[i], device, after_epoch)
            found[i] = [score(trained.model, data.splits[name]) for name in splits]
        if kept:
            write_sealed(files[i], dict(seed=seeds[i], scores=[asdict(s) for s in found[i]]))

    smaller = "take a smaller `classifier_batch_size` in an experiment of its own"
    desc = f"{desc}: {len(seeds)} classifier{'s' if len(seeds) > 1 else ''}"
    done = (len(seeds) - len(missing)) * recipe.epochs
    with progress(total=len(seeds) * recipe.epochs, initial=done, desc=desc, unit="epoch") as bar:
        in_threads(train_one, missing, workers)  # as many at a time as without those that were found: the same bytes
    return dict(zip(splits, map(list, zip(*found, strict=True)), strict=True))


def summary(scores: Sequence[Score]) -> dict:
    """Mean and deviation over classifier seeds, in shares of 1, ready for JSON."""
    accuracy = np.array([s.accuracy for s in scores])
    recall = np.array([s.recall for s in scores])
    return dict(
        accuracy=accuracy.tolist(),
        mean=float(accuracy.mean()),
        std=float(accuracy.std(ddof=1)) if len(accuracy) > 1 else None,
        standard_error=math.sqrt(accuracy.mean() * (1 - accuracy.mean()) / scores[0].n),
        top5=float(np.mean([s.top5 for s in scores])),
        balanced=float(np.mean([s.balanced for s in scores])),
        recall=[None if np.isnan(r) else float(r) for r in recall.mean(0)],
        n=scores[0].n,
    )


def score_cell(run: Run, train: Split, data: ImageDataset, name: str, title: str, **more: Any) -> dict:
    """A cell of a table: several classifiers on one training set, read on the test set; kept in `metrics/<name>.json`."""
    settings = run.settings
    seeds = [derive_seed(settings.seed, "classifier", i) for i in range(settings.classifier_seeds)]
    run.note_test_reading(f"{title}: {len(seeds)} classifiers")
    scores = judge(train, data, settings, seeds, ("val", "test"), run.progress, title, kept=run.begun / "classifiers")
    cell = dict(title=title, images=len(train), **more, val=summary(scores["val"]), test=summary(scores["test"]))
    return run.keep(name, cell)


def score_point(run: Run, base: BaseModel, data: ImageDataset, point: OperatingPoint, name: str, title: str) -> dict:
    """One cell of Table 1: fresh noise, several classifier seeds.

    The noise is the same for all cells (a paired comparison) and never that of a search.
    """
    if run.metrics(name).exists():
        return read_json(run.metrics(name))
    count = run.settings.search_images
    made = make_set(run, base, data, point, count, derive_seed(run.settings.seed, "table 1"), desc=title)
    seconds = made.seconds(count)
    return score_cell(
        run, made.split(count), data, name, title,
        point=asdict(point),
        synthetic=made.folder.name,
        fingerprint=made.fingerprint(count),
        generation_seconds=round(seconds, 2),
        seconds_per_image_step=seconds / count / point.num_inference_steps,
    )  # fmt: skip


def scale_up(run: Run, base: BaseModel, data: ImageDataset, point: OperatingPoint) -> list[dict]:
    """Table 2: real, x1 ... x10 of the real training set's size, nested in one pool with its class distribution."""
    size, most = len(data.train), run.settings.scaling_max
    pool, cells = None, []
    for k in range(most + 1):
        name, title = ("real", "real") if k == 0 else (f"x{k:02d}", f"x{k}")
        if run.metrics(name).exists():
            cells.append(read_json(run.metrics(name)))
            continue
        if k and pool is None:
            pool = make_pool(run, base, data, point, most * size)
        cells.append(score_cell(run, pool.split(k * size) if k else data.train, data, name, title))
    return cells


def make_pool(run: Run, base: BaseModel, data: ImageDataset, point: OperatingPoint, count: int) -> SyntheticSet:
    """The first `count` images of the set that Table 2 is filled from."""
    return make_set(run, base, data, point, count, pool_seed(run), real_labels(data.train.labels), desc="pool")


def pool_seed(run: Run) -> int:
    return derive_seed(run.settings.seed, "table 2")


def scaling_record(run: Run, base: BaseModel, data: ImageDataset, point: OperatingPoint, chosen: dict) -> dict:
    """What notebook 05 leaves: the chosen size, by which protocol, and where the pool is."""
    plan = plan_generation(run, base, data, point, pool_seed(run), real_labels(data.train.labels))
    images = run.settings.scaling_max * len(data.train)
    pool = dict(synthetic=plan.key(), images=images, classes=list(data.class_names), point=asdict(point))
    return dict(chosen=chosen["title"], protocol=run.settings.protocol, pool=pool)


def deciding_split(protocol: str) -> str:
    """Which real images decide. `sealed`: validation data; `paper`: the test set (METHOD, item 3)."""
    return {"sealed": "val", "paper": "test"}[protocol]


def best_scale(cells: Sequence[dict], protocol: str) -> dict:
    """The synthetic set to use: best on validation data (sealed), or on the test set (paper)."""
    split = deciding_split(protocol)
    return max((cell for cell in cells if cell["title"] != "real"), key=lambda cell: cell[split]["mean"])


def found_point(run: Run, search: str) -> OperatingPoint:
    """The optimum of a finished search (`search_1` or `search_2`). Raises `BadInput` if it was never run."""
    return OperatingPoint(**read_json(run.metrics(search), "run its notebook first.")["best"]["point"])


def sheet(split: Split, path: Path) -> Path:
    """A picture of up to 50 images, ten a row, each pixel drawn 4 x 4: PNG."""
    images = split.images[:50]
    columns = min(10, len(images))
    rows = len(images) // columns
    tiles = images[: rows * columns].reshape(rows, columns, *images.shape[1:]).transpose(0, 3, 1, 4, 2)
    picture = np.ascontiguousarray(tiles).reshape(rows * images.shape[2], columns * images.shape[3], 3)
    image = Image.fromarray(picture)
    with written_beside(path) as beside:
        image.resize((image.width * 4, image.height * 4), Image.Resampling.NEAREST).save(beside, "PNG")
    return path
