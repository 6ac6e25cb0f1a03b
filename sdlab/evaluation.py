"""A `SamplingConfig` -> synthetic images -> CAS: the value that the searches maximise and the tables print.

    CAS = (1/n) sum_i [argmax f(x_i) = y_i]   over real images (x_i, y_i), f trained on generated images only

the Classification Accuracy Score of Ravuri and Vinyals 2019 (docs/method.md, item 22). `metrics.py` has all metrics.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from sdlab.classifier import ClassifierRecipe, predict, train_classifier
from sdlab.data.images import Split
from sdlab.devices import choose_device, raise_on_oom
from sdlab.generation import SyntheticSet, generate_set, plan_generation, real_labels
from sdlab.latents import mean_error, resizing_error, round_trip_training_set
from sdlab.metrics import METRICS, Score, score_predictions, summarize
from sdlab.runs.experiment import Experiment
from sdlab.runs.files import atomic_write, read_hashed_json, read_json, sha256_of_json, write_hashed_json
from sdlab.runs.run import Run
from sdlab.sampling_config import SamplingConfig
from sdlab.seeds import derive_seed
from sdlab.threads import map_in_order


def train_and_score_classifiers(
    run: Experiment,
    train: Split,
    seeds: Sequence[int],
    splits: Sequence[str],
    desc: str = "classifier",
    searching: bool = False,
    priority: int = 0,
    recipe: ClassifierRecipe | None = None,
    keep_logits: Path | None = None,
) -> dict[str, list[Score]]:
    """Train one classifier per seed on `train` and score each on real images: split -> a `Score` per seed.

    `recipe` is the settings' unless another one is given. `keep_logits` is a file for the answers to test images (`logits_path`).
    On a CPU as many train at a time as torch has threads, which they share. The scores of each are cached in the run's
    work folder under a hash of everything they depend on, so an interrupted run finds them.
    Raises `BadInput` if the memory does not hold a classifier's training.
    """
    executor, recipe = run.executor, recipe or ClassifierRecipe.from_settings(run.settings, searching)
    # The number at a time is kept even when some scores are cached: the thread count changes the last bits.
    at_a_time = min(len(seeds), executor.threads) if executor.on_cpu else 1
    cache = run.work_folder and run.work_folder / "classifiers"
    made_from = [train.fingerprint(), run.data.fingerprint(), asdict(recipe), list(splits), METRICS] if cache else []
    files = {seed: cache / f"{sha256_of_json([*made_from, seed])[:16]}.json" if cache else None for seed in seeds}
    scores, logits = {}, {}
    for seed, file in files.items():
        if file and file.exists() and (keep_logits is None or file.with_suffix(".safetensors").exists()):
            scores[seed] = [Score.from_json(s) for s in read_hashed_json(file)["scores"]]
            logits[seed] = load_file(file.with_suffix(".safetensors"))["logits"] if keep_logits else None
    missing = [seed for seed in seeds if seed not in scores]

    def keep(call: tuple, result: tuple[list[Score], np.ndarray | None]) -> None:
        seed = call[1]
        scores[seed], logits[seed] = result
        if cache and keep_logits:
            save_arrays(files[seed].with_suffix(".safetensors"), logits=logits[seed])
        if cache:
            write_hashed_json(files[seed], dict(seed=seed, scores=[asdict(s) for s in scores[seed]]))

    desc = f"{desc}: {len(seeds)} classifier{'s' if len(seeds) > 1 else ''}"
    done = (len(seeds) - len(missing)) * recipe.epochs
    with run.progress(total=len(seeds) * recipe.epochs, initial=done, desc=desc, unit="epoch") as bar:
        calls = [(train, seed, recipe, tuple(splits)) for seed in missing]
        executor.each(train_and_score, run, calls, keep, bar.update, at_a_time, steps=recipe.epochs, priority=priority)
    if keep_logits:
        save_arrays(keep_logits, logits=np.stack([logits[seed] for seed in seeds]), labels=run.data.test.labels)
    return {split: [scores[seed][i] for seed in seeds] for i, split in enumerate(splits)}


def train_and_score(
    run: Experiment, train: Split, seed: int, recipe: ClassifierRecipe, splits: Sequence[str], on_progress: Callable
) -> tuple[list[Score], np.ndarray | None]:
    """Train one classifier, and score it on each of the real `splits`; with its logits of test images, float32 (n, C).

    Raises `BadInput` if the memory is too small.
    """
    data, device = run.data, choose_device(run.settings.device)
    remedy = "take a smaller `classifier_batch_size` in an experiment of its own"
    with raise_on_oom(f"a classifier's training step of {recipe.batch_size} images", remedy):
        trained = train_classifier(train, data.val, data.num_classes, recipe, seed, device, on_progress)
        logits = {name: predict(trained.model, data.splits[name]) for name in splits}
    scores = [score_predictions(logits[name], data.splits[name].labels) for name in splits]
    return scores, logits.get("test")


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    with atomic_write(path) as partial:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, partial)


def deciding_split(protocol: str) -> str:
    """The real images that decisions see. `sealed`: validation; `paper`: the test set (docs/method.md, item 3)."""
    return {"sealed": "val", "paper": "test"}[protocol]


# ------------------------------------------------------------------------------------------- what the VAE costs


def score_ceiling(run: Run) -> dict | None:
    """What the base model's VAE costs, before anything is generated: saved in `metrics/ceiling.json`.

    Classifiers trained on round trips of the real training images through the VAE, next to classifiers trained on the real
    ones, in pairs that share a seed, on the deciding split. Nothing that the UNet learns can win back what the VAE loses.
    A finished stage shows what it has measured: None if that was nothing.
    """
    path, settings = run.metrics_path("ceiling"), run.settings
    recipe, split = asdict(ClassifierRecipe.from_settings(settings)), deciding_split(settings.protocol)
    how = dict(split=split, recipe=recipe, seeds=(seeds := classifier_seeds(run)))
    if path.exists() and (run.finished or how.items() <= read_json(path).items()):
        return read_json(path)
    if run.finished:
        return None
    drawn = round_trip_training_set(run)
    if split == "test":
        run.record_test_reading(
            f"what the VAE costs: {2 * len(seeds)} classifiers; the paper's protocol reads the test set"
        )
    of_real, of_drawn = (
        train_and_score_classifiers(run, train, seeds, [split], title)[split]
        for train, title in ((run.data.train, "real"), (drawn, "round trips"))
    )
    costs = [real.accuracy - less.accuracy for real, less in zip(of_real, of_drawn, strict=True)]
    deviation = float(np.std(costs, ddof=1)) if len(costs) > 1 else None
    return run.save_metrics(
        "ceiling",
        how
        | dict(
            real=summarize(of_real),
            round_trips=summarize(of_drawn),
            cost=float(np.mean(costs)),
            standard_error=None if deviation is None else deviation / math.sqrt(len(costs)),
            error=mean_error(drawn.images, run.data.train.images),
            resizing_error=resizing_error(run.data, settings.base_image_size, settings.base_resizing),
            base_image_size=settings.base_image_size,
        ),
    )


def score_round_trips(run: Run) -> dict | None:
    """The round trips' accuracy on test images: a cell next to those of Table 2. None if a finished stage has none."""
    path = run.metrics_path("round_trips")
    if path.exists() or run.finished:
        return read_json(path) if path.exists() else None
    train, title = round_trip_training_set(run), "round trips through the VAE"
    return score_training_set(run, train, "round_trips", title, logits_path(run, "round_trips"))


# ----------------------------------------------------------------------------------------- cells of the tables


def classifier_seeds(run: Experiment) -> list[int]:
    """Those of every cell, so that cells can be compared in pairs."""
    return [derive_seed(run.settings.seed, "classifier", i) for i in range(run.settings.classifier_seeds)]


def logits_path(run: Experiment, name: str) -> Path:
    """The answers of a cell's classifiers to the test images: logits, float32 (seeds, n, C), and labels (n,)."""
    return run.folder / "logits" / f"{name}.safetensors"


def score_training_set(
    run: Run, train: Split, name: str, title: str, keep_logits: Path | None = None, priority: int = 0, **more: Any
) -> dict:
    """A cell of a table: several classifiers on one training set, scored on the test set; saved in `metrics/<name>.json`."""
    seeds = classifier_seeds(run)
    run.record_test_reading(f"{title}: {len(seeds)} classifiers")
    scores = train_and_score_classifiers(
        run, train, seeds, ("val", "test"), title, priority=priority, keep_logits=keep_logits
    )
    cell = dict(title=title, images=len(train), **more, val=summarize(scores["val"]), test=summarize(scores["test"]))
    return run.save_metrics(name, cell)


def score(run: Run, config: SamplingConfig, name: str) -> dict:
    """A cell of Table 1, `after_1` ... `after_4`: fresh noise, several classifiers.

    The noise is the same for all cells (a paired comparison) and never that of a search.
    """
    if run.metrics_path(name).exists():
        return read_json(run.metrics_path(name))
    synthetic_set, count = table_1_set(run, config), run.settings.search_images
    seconds = synthetic_set.seconds(count)
    return score_training_set(
        run, synthetic_set.split(count), name, name.replace("_", " ").capitalize(),
        config=asdict(config),
        synthetic=synthetic_set.folder.name,
        fingerprint=synthetic_set.fingerprint(count),
        generation_seconds=round(seconds, 2),
        seconds_per_image_step=seconds / count / config.num_inference_steps,
    )  # fmt: skip


def table_1_set(run: Run, config: SamplingConfig) -> SyntheticSet:
    """The synthetic set behind a cell of Table 1."""
    seed = derive_seed(run.settings.seed, "table 1")
    return generate_set(run, config, run.settings.search_images, seed, desc="table 1")


def score_scaling(run: Run, config: SamplingConfig) -> list[dict]:
    """Table 2: real, then x1 ... x10 of the real training set's size, nested in one pool with its class distribution."""
    size, largest = len(run.data.train), run.settings.scaling_max
    names = ["real", *(f"x{k:02d}" for k in range(1, largest + 1))]
    if all(run.metrics_path(name).exists() for name in names):
        return load_cells(run, *names)
    pool = generate_pool(run, config, largest * size)
    missing = [k for k in range(1, largest + 1) if not run.metrics_path(names[k]).exists()]
    images = pool.split(max(missing) * size) if missing else None  # once: several cells may be scored at a time

    def score_cell(k: int) -> dict:
        if run.metrics_path(names[k]).exists():
            return read_json(run.metrics_path(names[k]))
        train, title = (pool.beginning(images, k * size), f"x{k}") if k else (run.data.train, "real")
        return score_training_set(run, train, names[k], title, logits_path(run, names[k]), priority=k)

    executor = run.executor
    return map_in_order(
        score_cell, range(largest + 1), executor.callers(run.settings.classifier_seeds), executor.cancel
    )


def generate_pool(run: Run, config: SamplingConfig, count: int) -> SyntheticSet:
    """The first `count` images of the set that Table 2 is filled from."""
    return generate_set(run, config, count, pool_seed(run), real_labels(run.data.train.labels), desc="pool")


def pool_seed(run: Run) -> int:
    return derive_seed(run.settings.seed, "table 2")


def choose_size(run: Run, cells: Sequence[dict], config: SamplingConfig) -> dict:
    """The cell of the best synthetic set by the deciding split, saved with the pool's place in `metrics/scaling.json`."""
    protocol, data = run.settings.protocol, run.data
    synthetic = [cell for cell in cells if cell["title"] != "real"]
    chosen = max(synthetic, key=lambda cell: cell[deciding_split(protocol)]["mean"])
    plan = plan_generation(run, config, pool_seed(run), real_labels(data.train.labels))
    images = run.settings.scaling_max * len(data.train)
    pool = dict(synthetic=plan.key(), images=images, classes=list(data.class_names), config=asdict(config))
    run.save_metrics("scaling", dict(chosen=chosen["title"], protocol=protocol, pool=pool))
    return chosen


def load_cells(run: Experiment, *names: str) -> list[dict]:
    """Saved cells, such as `after_1`. Raises `BadInput` for one that was never scored."""
    return [read_json(run.metrics_path(name), "run its notebook first.") for name in names]


def load_optimum(run: Experiment, search: str) -> SamplingConfig:
    """The optimum of a finished search (`search_1` or `search_2`). Raises `BadInput` if it was never run."""
    return SamplingConfig(**read_json(run.metrics_path(search), "run its notebook first.")["best"]["config"])
