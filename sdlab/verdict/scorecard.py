"""Any labelled images, and the real ones that they stand for -> one scorecard: use, likeness, labels, copies, balance.

Likeness is measured to half of the real images that nobody trained on (validation and test), in the features of a named
network. The other half stands next to it: a perfect generator would have its numbers. (Not the training images: the judge
has seen them.)
"""

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from sdlab.classifier import ClassifierRecipe
from sdlab.data.images import ImageDataset, Split, spread
from sdlab.errors import BadInput
from sdlab.evaluation import classifier_seeds, train_and_score_classifiers
from sdlab.metrics import further_scores, summarize
from sdlab.runs.experiment import Experiment
from sdlab.verdict.any_set import LabelledSet
from sdlab.verdict.collapse import judge_images
from sdlab.verdict.controls import mean_or_none, training_steps
from sdlab.verdict.copies import find_copies
from sdlab.verdict.fidelity import DENSITY_NEIGHBOURS, compare_features
from sdlab.verdict.intervals import paired_difference
from sdlab.verdict.judge import load_judge

FEATURES = 10_000  # images of a set whose features are compared
FEWEST = 4 * (DENSITY_NEIGHBOURS + 1)


def score_set(
    run: Experiment, labelled: LabelledSet, name: str, network: Callable | None = None, network_name: str = ""
) -> dict:
    """The scorecard of a set, whose images have the size of the run's data. `network` gives features of uint8 images
    (n, 3, h, w); by default the judge's. Raises `BadInput` for too few images.
    """
    data, made = run.data, labelled.split
    check_enough(name, len(made), data)
    held_out = np.concatenate([data.val.images, data.test.images])
    judge = load_judge(run)
    mixed = np.random.default_rng(run.settings.seed).permutation(len(held_out))
    reference, others = held_out[mixed[::2]][:FEATURES], held_out[mixed[1::2]][:FEATURES]
    features = network or scaled(judge.features, held_out[:FEATURES])
    # As many of both: neighbourhoods shrink as sets grow.
    compared = {"this set": made.images[spread(len(made), len(others))], "other real images": others[: len(made)]}
    reference = features(reference)
    alarm = judge_images(judge, made, data)
    return dict(
        about=dict(
            set=name,
            images=len(made),
            real=data.name,
            real_source=data.source,
            classes=list(data.class_names),
            image_size=data.image_size,
            network=network_name or f"a ResNet20 of {judge.filters} filters that was trained on {data.name}",
            matched=labelled.matched,
            findings=list(labelled.remarks),
        ),
        utility=utility(run, made),
        likeness={who: compare_features(features(images), reference) for who, images in compared.items()},
        labels=dict(
            fidelity=alarm.label_fidelity,
            real=alarm.real_fidelity,
            chance=alarm.chance,
            diversity=alarm.diversity,
            collapse=alarm.reasons,
        ),
        copies=find_copies(made, data),
        balance=dict(made=np.bincount(made.labels, minlength=data.num_classes).tolist(), real=data.counts()["train"]),
    )


def check_enough(name: str, images: int, data: ImageDataset) -> None:
    """Raises `BadInput` for a set, or real images, of too few images for neighbourhoods."""
    for what, count in ((name, images), (f"validation and test of {data.name}", len(data.val) + len(data.test))):
        if count < FEWEST:
            raise BadInput(f"{what} has {count} images: at least {FEWEST} are needed for a scorecard.")


def scaled(features: Callable, images: np.ndarray) -> Callable:
    """Features whose mean square is 1 for these images: a classifier's have a scale of their own, and KID depends on it."""
    scale = float(np.sqrt((features(images) ** 2).mean())) or 1.0
    return lambda given: features(given) / scale


def utility(run: Experiment, made: Split) -> dict:
    """Classifiers trained on the set and on the real training images, in pairs of seeds, on real test images."""
    data, seeds, logits, scores = run.data, classifier_seeds(run), {}, {}
    recipe = ClassifierRecipe.from_settings(run.settings)
    recipe = dataclasses.replace(recipe, train_steps=training_steps(recipe, max(len(made), len(data.train))))
    with tempfile.TemporaryDirectory() as folder:
        for name, train in (("made", made), ("real", data.train)):
            kept = Path(folder) / f"{name}.safetensors"
            scores[name] = train_and_score_classifiers(
                run, train, seeds, ("test",), name, recipe=recipe, keep_logits=kept
            )["test"]
            logits[name] = load_file(kept)["logits"]
    right = {name: answers.argmax(2) == data.test.labels for name, answers in logits.items()}
    more = {
        name: [further_scores(of_seed, data.test.labels, run.settings.ordered_classes) for of_seed in answers]
        for name, answers in logits.items()
    }
    means = {name: {key: mean_or_none([m[key] for m in found]) for key in found[0]} for name, found in more.items()}
    return dict(
        made=summarize(scores["made"]) | means["made"],
        real=summarize(scores["real"]) | means["real"],
        difference=asdict(paired_difference(right["made"], right["real"])),
        majority=data.majority_share(),
    )
