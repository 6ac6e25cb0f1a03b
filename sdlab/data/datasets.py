"""A name, a folder or a file -> `ImageDataset`: real images in one form, wherever they come from."""

import sys
from dataclasses import replace
from pathlib import Path

from sdlab.data.images import DatasetFacts, ImageDataset, Split
from sdlab.data.named_datasets import is_here, known_names, load_named, named_facts
from sdlab.data.own_images import load_own_images
from sdlab.data.saved_images import load_if_gone, own_path
from sdlab.errors import BadInput, did_you_mean
from sdlab.paths import project_path
from sdlab.runs.files import raise_on_read_error
from sdlab.settings import Settings


def load_dataset(settings: Settings) -> ImageDataset:
    """The data set that `settings.dataset` names, at `settings.image_size`; an official one is fetched if missing.

    Content names a set of your own, not its path: where it is gone (moved, or on a disk that is not mounted) after
    stage 00 is finished, that stage's copy is used. Raises `BadInput` for an unknown name, and for files that are
    missing, damaged or of another kind.
    """
    if saved := find_dataset(settings):
        print(f"There is nothing at {own_path(settings)}: the copy of stage 00 is used.", file=sys.stderr)
        return saved
    official = settings.dataset in known_names()
    dataset = load_named(settings.dataset, data_root(settings)) if official else load_own_images(settings)
    return resize_dataset(dataset, settings.image_size)


def fetch_dataset(settings: Settings) -> None:
    """Fetch what is missing of an official data set, with a bar, before any notebook starts. Raises `BadInput`."""
    find_dataset(settings)
    if settings.dataset in known_names() and not is_here(settings.dataset, data_root(settings)):
        load_named(settings.dataset, data_root(settings))


def dataset_facts(settings: Settings) -> DatasetFacts:
    """Counts and classes, without fetching anything: all that a plan needs. Own images are read for it."""
    return named_facts(settings.dataset) or load_dataset(settings).facts()


def data_root(settings: Settings) -> Path:
    return project_path(settings.data_root)


def resize_dataset(dataset: ImageDataset, size: int) -> ImageDataset:
    """The data set with its images resized to `size` pixels (bilinear, without antialiasing)."""
    if dataset.image_size == size:
        return dataset
    from sdlab.data.pixels import resize  # torch is slow to import, and most data sets have the classifier's size

    splits = {name: Split(resize(split.images, size), split.labels) for name, split in dataset.splits.items()}
    return replace(dataset, **splits, source_images=lambda indices, _: dataset.train.images[indices])


def find_dataset(settings: Settings) -> ImageDataset | None:
    """The copy of stage 00, if a set of your own is gone; else None.

    Raises `BadInput` for a `dataset` that is neither a known name nor a folder or npz that exists.
    """
    names, path, is_folder, is_file = known_names(), own_path(settings), False, False
    if settings.dataset not in names:
        if saved := load_if_gone(settings):
            return saved
        with raise_on_read_error(path):
            is_folder, is_file = path.is_dir(), path.is_file()
        if not settings.dataset.strip():
            raise BadInput(f"`dataset` is empty: name a folder, an npz, or one of {', '.join(names)}.")
        if not (is_folder or is_file):
            raise BadInput(
                f"`dataset` is {settings.dataset!r}, neither a known name nor a path that exists ({path}): known are "
                f"{', '.join(names)}.{did_you_mean(settings.dataset, names)}"
            )
    if is_file and path.suffix.lower() != ".npz":
        raise BadInput(
            f"`dataset` is the file {path}: a file has to be an npz with images and labels; else give a folder."
        )
    if settings.exclude and not is_folder:
        raise BadInput(
            f"`exclude` is {settings.exclude!r}, but `dataset` ({settings.dataset}) is no folder: remove it."
        )
    return None
