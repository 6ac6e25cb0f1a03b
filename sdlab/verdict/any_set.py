"""A folder of classes, an npz, or a finished experiment -> its labelled images, in the labels of the real ones."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from sdlab.data.folders import list_folder
from sdlab.data.images import ImageDataset, Split
from sdlab.data.naming import join_names
from sdlab.data.own_images import decode_folder
from sdlab.data.own_npz import read_npz
from sdlab.errors import BadInput
from sdlab.runs.export import description, folder_name
from sdlab.runs.shards import read_shards
from sdlab.runs.stages import STAGES, State, stage_state
from sdlab.settings import Settings

PART = 1000  # images that are resized at once


@dataclass(frozen=True)
class LabelledSet:
    """Images and their real labels; how the classes were matched, and what is to be said about the files."""

    split: Split
    matched: str
    remarks: tuple[str, ...] = ()


def read_set(path: Path, real: ImageDataset, exclude: str = "") -> LabelledSet:
    """All images of a folder or an npz, whatever its splits are, at the size of `real`, with antialiasing. Raises `BadInput`."""
    if path.is_dir():
        pictures, _, remarks = decode_folder(list_folder(path, exclude), real.image_size)
        images = np.stack([picture.pixels for picture in pictures.values()])
        entries = [*pictures]
    elif path.suffix.lower() == ".npz":
        images, entries, _, remarks = read_npz(path)
        images = in_parts(images, real.image_size)
    else:
        raise BadInput(f"{path} is neither a folder of classes nor an npz: give one of these.")
    names = [entry.class_name for entry in entries]
    label_of, matched = match_classes(path, sorted(set(names)), real)
    return LabelledSet(Split(images, np.array([label_of[name] for name in names], np.int64)), matched, tuple(remarks))


def in_parts(images: np.ndarray, size: int) -> np.ndarray:
    """uint8 (n, 3, h, w) -> uint8 (n, 3, size, size), as files of a folder are: bilinear with antialiasing."""
    if images.shape[-1] == size:
        return images
    resized = np.empty((len(images), 3, size, size), np.uint8)
    for start in range(0, len(images), PART):
        part = torch.from_numpy(images[start : start + PART]).float()
        part = F.interpolate(part, size=(size, size), mode="bilinear", antialias=True)
        resized[start : start + PART] = part.round().clamp(0, 255).byte().numpy()
    return resized


def match_classes(path: Path | str, names: Sequence[str], real: ImageDataset) -> tuple[dict[str, int], str]:
    """The real label of each class of a set, and how it was found: by its name, by the folder's name that `sdlab export`
    gives it, or as a number, if all are numbers of labels. Raises `BadInput`.
    """
    label_of = {f"{label:03d}_{folder_name(name)}": label for label, name in enumerate(real.class_names)}
    label_of |= {name: label for label, name in enumerate(real.class_names)}
    if all(name in label_of for name in names):
        return label_of, "by name"
    if all(re.fullmatch(r"\d{1,9}", name) and int(name) < real.num_classes for name in names):
        return {name: int(name) for name in names}, "by number"
    unknown = [name for name in names if name not in label_of]
    raise BadInput(
        f"{path} has the classes {join_names(unknown)}, which {real.name} does not have (it has {join_names(real.class_names)}): "
        "rename them, leave them out by --exclude, or name another set by --against."
    )


def chosen_set(settings: Settings, real: ImageDataset) -> LabelledSet:
    """The synthetic set that a finished experiment chose. Raises `BadInput`."""
    if (state := stage_state(settings, "05").state) != State.DONE:
        raise BadInput(
            f"{settings.experiment} has no synthetic set yet: {STAGES['05'].stem} is {state} (`sdlab run {settings.experiment}`)."
        )
    about = description(settings, None)
    label_of, matched = match_classes(settings.experiment, about["classes"], real)
    shards = read_shards(settings.run_folder / "synthetic" / about["synthetic"], about["images"])
    images, labels = map(np.concatenate, zip(*shards, strict=True))
    if images.shape[-1] != real.image_size:
        raise BadInput(
            f"The set of {settings.experiment} has images of {images.shape[-1]} px, {real.name} of {real.image_size} px: score it "
            "against an experiment of its own size."
        )
    return LabelledSet(Split(images, np.array([label_of[name] for name in about["classes"]])[labels]), matched)
