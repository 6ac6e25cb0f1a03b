"""A folder of classes, an npz, or a finished experiment -> its labelled images, in the labels of the real ones."""

import dataclasses
import re
from pathlib import Path

import numpy as np

from sdlab.data.datasets import load_dataset, resize_dataset
from sdlab.data.images import ImageDataset, Split
from sdlab.data.naming import join_names
from sdlab.errors import BadInput
from sdlab.runs.export import description, folder_name
from sdlab.runs.shards import read_shards
from sdlab.runs.stages import STAGES, State, stage_state
from sdlab.settings import Settings


def read_set(path: Path, real: ImageDataset, settings: Settings) -> Split:
    """All images of a folder or an npz, whatever its splits are, resized to those of `real`. Raises `BadInput`."""
    theirs = dataclasses.replace(
        settings, experiment=f"set-{settings.experiment}", dataset=str(path.resolve()), exclude=""
    )
    found = resize_dataset(load_dataset(theirs), real.image_size)
    images, labels = (
        np.concatenate([getattr(split, what) for split in found.splits.values()]) for what in ("images", "labels")
    )
    return Split(images, match_classes(path, found.class_names, real)[labels])


def match_classes(path: Path, names: tuple[str, ...], real: ImageDataset) -> np.ndarray:
    """The real label of each class of a set: by its name, by the folder's name that `sdlab export` gives it, or by number if a
    set has numbers only, and as many. Raises `BadInput`.
    """
    label_of = {name: label for label, name in enumerate(real.class_names)}
    label_of |= {f"{label:03d}_{folder_name(name)}": label for label, name in enumerate(real.class_names)}
    if all(name in label_of for name in names):
        return np.array([label_of[name] for name in names])
    if len(names) == real.num_classes and all(re.fullmatch(r"\d+", name) for name in names):
        return np.arange(len(names))
    unknown = [name for name in names if name not in label_of]
    raise BadInput(
        f"{path} has the classes {join_names(unknown)}, which {real.name} does not have (it has {join_names(real.class_names)}): "
        "rename them, or name another set by --against."
    )


def chosen_set(settings: Settings) -> Split:
    """The synthetic set that a finished experiment chose. Raises `BadInput`."""
    if (state := stage_state(settings, "05").state) != State.DONE:
        raise BadInput(
            f"{settings.experiment} has no synthetic set yet: {STAGES['05'].stem} is {state} (`sdlab run {settings.experiment}`)."
        )
    about = description(settings, None)
    shards = read_shards(settings.run_folder / "synthetic" / about["synthetic"], about["images"])
    return Split(*map(np.concatenate, zip(*shards, strict=True)))
