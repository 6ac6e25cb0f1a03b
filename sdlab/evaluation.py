"""An operating point -> synthetic images -> CAS: what the searches maximise and the tables print.

CAS (Classification Accuracy Score, Ravuri and Vinyals 2019): top-1 accuracy on real images of a classifier trained on
generated images only.
"""

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from sdlab.base_models import BaseModel
from sdlab.classifier import ClassifierRecipe, Score, score, train_classifier
from sdlab.data.images import ImageDataset, Split
from sdlab.devices import choose_device, raise_on_oom
from sdlab.generation import SamplingConfig, SyntheticSet, generate_set, plan_generation, real_labels
from sdlab.runs.files import read_hashed_json, read_json, sha256_of_json, write_hashed_json
from sdlab.runs.run import Run
from sdlab.settings import Settings
from sdlab.threads import derive_seed, map_in_threads


def train_and_score_classifiers(
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
    recipe = ClassifierRecipe.of(settings, searching)
    device = choose_device(settings.device)
    workers = min(len(seeds), torch.get_num_threads()) if device.type == "cpu" else 1
    counting = threading.Lock()
    made_from = [train.fingerprint(), data.fingerprint(), asdict(recipe), list(splits)] if kept else []
    files = [kept / f"{sha256_of_json([*made_from, seed])[:16]}.json" if kept else None for seed in seeds]
    found = [[Score.of(s) for s in read_hashed_json(f)["scores"]] if f and f.exists() else None for f in files]
    missing = [i for i, scores in enumerate(found) if scores is None]

    def train_one(i: int, go_on: Callable[[], None]) -> None:
        def after_epoch() -> None:
            go_on()
            with counting:
                bar.update()

        with raise_on_oom(f"a classifier's step of {recipe.batch_size} images", smaller):
            trained = train_classifier(train, data.val, data.num_classes, recipe, seeds[i], device, after_epoch)
            found[i] = [score(trained.model, data.splits[name]) for name in splits]
        if kept:
            write_hashed_json(files[i], dict(seed=seeds[i], scores=[asdict(s) for s in found[i]]))

    smaller = "take a smaller `classifier_batch_size` in an experiment of its own"
    desc = f"{desc}: {len(seeds)} classifier{'s' if len(seeds) > 1 else ''}"
    done = (len(seeds) - len(missing)) * recipe.epochs
    with progress(total=len(seeds) * recipe.epochs, initial=done, desc=desc, unit="epoch") as bar:
        map_in_threads(
            train_one, missing, workers
        )  # as many at a time as without those that were found: the same bytes
    return dict(zip(splits, map(list, zip(*found, strict=True)), strict=True))


def summarize(scores: Sequence[Score]) -> dict:
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


def score_training_set(run: Run, train: Split, data: ImageDataset, name: str, title: str, **more: Any) -> dict:
    """A cell of a table: several classifiers on one training set, read on the test set; kept in `metrics/<name>.json`."""
    settings = run.settings
    seeds = [derive_seed(settings.seed, "classifier", i) for i in range(settings.classifier_seeds)]
    run.note_test_reading(f"{title}: {len(seeds)} classifiers")
    scores = train_and_score_classifiers(
        train, data, settings, seeds, ("val", "test"), run.progress, title, kept=run.begun / "classifiers"
    )
    cell = dict(title=title, images=len(train), **more, val=summarize(scores["val"]), test=summarize(scores["test"]))
    return run.keep(name, cell)


def score_sampling_config(
    run: Run, base: BaseModel, data: ImageDataset, point: SamplingConfig, name: str, title: str
) -> dict:
    """One cell of Table 1: fresh noise, several classifier seeds.

    The noise is the same for all cells (a paired comparison) and never that of a search.
    """
    if run.metrics(name).exists():
        return read_json(run.metrics(name))
    count = run.settings.search_images
    made = generate_set(run, base, data, point, count, derive_seed(run.settings.seed, "table 1"), desc=title)
    seconds = made.seconds(count)
    return score_training_set(
        run, made.split(count), data, name, title,
        point=asdict(point),
        synthetic=made.folder.name,
        fingerprint=made.fingerprint(count),
        generation_seconds=round(seconds, 2),
        seconds_per_image_step=seconds / count / point.num_inference_steps,
    )  # fmt: skip


def score_scaling(run: Run, base: BaseModel, data: ImageDataset, point: SamplingConfig) -> list[dict]:
    """Table 2: real, x1 ... x10 of the real training set's size, nested in one pool with its class distribution."""
    size, most = len(data.train), run.settings.scaling_max
    pool, cells = None, []
    for k in range(most + 1):
        name, title = ("real", "real") if k == 0 else (f"x{k:02d}", f"x{k}")
        if run.metrics(name).exists():
            cells.append(read_json(run.metrics(name)))
            continue
        if k and pool is None:
            pool = generate_pool(run, base, data, point, most * size)
        cells.append(score_training_set(run, pool.split(k * size) if k else data.train, data, name, title))
    return cells


def generate_pool(run: Run, base: BaseModel, data: ImageDataset, point: SamplingConfig, count: int) -> SyntheticSet:
    """The first `count` images of the set that Table 2 is filled from."""
    return generate_set(run, base, data, point, count, pool_seed(run), real_labels(data.train.labels), desc="pool")


def pool_seed(run: Run) -> int:
    return derive_seed(run.settings.seed, "table 2")


def scaling_record(run: Run, base: BaseModel, data: ImageDataset, point: SamplingConfig, chosen: dict) -> dict:
    """What notebook 05 leaves: the chosen size, by which protocol, and where the pool is."""
    plan = plan_generation(run, base, data, point, pool_seed(run), real_labels(data.train.labels))
    images = run.settings.scaling_max * len(data.train)
    pool = dict(synthetic=plan.key(), images=images, classes=list(data.class_names), point=asdict(point))
    return dict(chosen=chosen["title"], protocol=run.settings.protocol, pool=pool)


def deciding_split(protocol: str) -> str:
    """Which real images decide. `sealed`: validation data; `paper`: the test set (METHOD, item 3)."""
    return {"sealed": "val", "paper": "test"}[protocol]


def choose_size(cells: Sequence[dict], protocol: str) -> dict:
    """The synthetic set to use: best on validation data (sealed), or on the test set (paper)."""
    split = deciding_split(protocol)
    return max((cell for cell in cells if cell["title"] != "real"), key=lambda cell: cell[split]["mean"])


def load_optimum(run: Run, search: str) -> SamplingConfig:
    """The optimum of a finished search (`search_1` or `search_2`). Raises `BadInput` if it was never run."""
    return SamplingConfig(**read_json(run.metrics(search), "run its notebook first.")["best"]["point"])
