"""The chosen synthetic set and its controls -> classifiers in pairs of seeds, on real test images: `metrics/verdict.json`.

A control is what one could have done without a generator. Each has the recipe of the cells of Table 2, their seeds, and at
most as many training steps as the chosen set's classifiers (early stopping may end one sooner). Where epochs are counted,
x10 trains up to ten times as long as the real images, and a win over them means nothing next to real images that were
trained as long.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
from safetensors.numpy import load_file

from sdlab.classifier import ClassifierRecipe
from sdlab.data.images import Split
from sdlab.evaluation import (
    classifier_seeds,
    generate_pool,
    load_optimum,
    logits_path,
    train_and_score_classifiers,
)
from sdlab.latents import round_trip_training_set
from sdlab.metrics import confusion, further_scores, score_predictions, summarize
from sdlab.runs.files import read_json
from sdlab.runs.records import is_recorded
from sdlab.runs.run import Run
from sdlab.threads import map_in_order
from sdlab.verdict.intervals import paired_difference


@dataclass(frozen=True)
class Arm:
    """A training set to be compared, made when it is needed; `cell` names a cell of Table 2 that may have it already."""

    title: str
    images: int
    recipe: ClassifierRecipe
    train: Callable[[], Split]
    cell: str = ""


def score_controls(run: Run) -> dict:
    """Every arm's scores on test images, and the differences of pairs, saved in `metrics/verdict.json`."""
    path = run.metrics_path("verdict")
    if run.finished:
        return read_json(path)
    arms, executor = make_arms(run), run.executor
    callers = executor.callers(run.settings.classifier_seeds)
    answers = map_in_order(lambda name: arm_logits(run, name, arms[name]), [*arms], callers, executor.cancel)
    logits = dict(zip(arms, answers, strict=True))
    labels, ordered = run.data.test.labels, run.settings.ordered_classes
    scores = {name: describe(arms[name], of_arm, labels, ordered) for name, of_arm in logits.items()}
    right = {name: of_arm.argmax(2) == labels for name, of_arm in logits.items()}
    without_generator = [name for name in ("longer", "augmented") if name in arms]
    pairs = [("real", name) for name in arms if name != "real"]
    pairs += [(name, made) for made in ("synthetic", "both") for name in without_generator]
    differences = [
        dict(first=first, second=second) | asdict(paired_difference(right[second], right[first]))
        for first, second in pairs
    ]
    found = dict(
        chosen=arms["synthetic"].title,
        training_steps=training_steps(arms["synthetic"].recipe, arms["synthetic"].images),
        arms=scores,
        differences=differences,
        majority=run.data.majority_share(),
        protocol=run.settings.protocol,
    )
    return run.save_metrics("verdict", found)


def make_arms(run: Run) -> dict[str, Arm]:
    """The chosen set, the real images, and the controls, by name."""
    data, settings, pool = run.data, run.settings, read_json(run.metrics_path("scaling"))
    chosen, size = pool["chosen"], len(data.train)
    count = int(chosen[1:]) * size
    recipe = ClassifierRecipe.from_settings(settings)
    equal = dataclasses.replace(recipe, train_steps=training_steps(recipe, count))
    equally_long = training_steps(recipe, size) == training_steps(recipe, count)
    if equally_long:
        equal = recipe

    def synthetic() -> Split:
        optimum = load_optimum(run, "search_2")
        return generate_pool(run, optimum, count).split(count)

    def both() -> Split:
        made = synthetic()
        joined = np.empty((size + count, *made.images.shape[1:]), np.uint8)
        joined[:size], joined[size:] = data.train.images, made.images
        return Split(joined, np.concatenate([data.train.labels, made.labels]))

    arms = dict(real=Arm("real", size, recipe, lambda: data.train, "real"))
    if not equally_long:
        arms["longer"] = Arm(f"real, trained as long as {chosen}", size, equal, lambda: data.train)
    if settings.augmentation != "none":
        title = f"real with {settings.augmentation.replace('_', ' ')}"
        changed = dataclasses.replace(equal, augmentation=settings.augmentation)
        arms["augmented"] = Arm(title, size, changed, lambda: data.train)
    drawn = "round_trips" if equally_long else ""
    arms["round_trips"] = Arm("real through the VAE", size, equal, lambda: round_trip_training_set(run), drawn)
    arms["synthetic"] = Arm(chosen, count, recipe, synthetic, f"x{int(chosen[1:]):02d}")
    arms["both"] = Arm(f"real + {chosen}", size + count, equal, both)
    return arms


def training_steps(recipe: ClassifierRecipe, images: int) -> int:
    """Of a classifier that is trained to its last epoch."""
    return recipe.train_steps or recipe.epochs * math.ceil(images / recipe.batch_size)


def arm_logits(run: Run, name: str, arm: Arm) -> np.ndarray:
    """The answers of an arm's classifiers to the test images, float32 (seeds, n, C): those of Table 2's cell if it has them."""
    kept = logits_path(run, arm.cell) if arm.cell else None
    if kept is None or not is_recorded(run.settings, "05", kept):
        kept, seeds = run.work_folder / "logits" / f"{name}.safetensors", classifier_seeds(run)
        run.record_test_reading(f"verdict, {arm.title}: {len(seeds)} classifiers")
        how = dict(recipe=arm.recipe, keep_logits=kept)
        train_and_score_classifiers(run, arm.train(), seeds, ("val", "test"), arm.title, **how)
    return load_file(kept)["logits"]


def describe(arm: Arm, logits: np.ndarray, labels: np.ndarray, ordered: bool) -> dict:
    """An arm's numbers: `summarize`, and what accuracy can hide, as means over classifier seeds."""
    more = [further_scores(of_seed, labels, ordered) for of_seed in logits]
    scores = summarize([score_predictions(of_seed, labels) for of_seed in logits])
    return dict(
        title=arm.title,
        images=arm.images,
        training_steps=training_steps(arm.recipe, arm.images),
        **scores,
        **{name: mean_or_none([score[name] for score in more]) for name in more[0]},
        confusion=[[None if np.isnan(share) else float(share) for share in row] for row in confusion(logits, labels)],
    )


def mean_or_none(values: list[float | None]) -> float | None:
    return None if None in values else float(np.mean(values))
