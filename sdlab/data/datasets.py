"""A name, a folder or a file -> `ImageDataset`: real images in one form, wherever they come from."""

import sys
from dataclasses import replace
from pathlib import Path

from sdlab.data.images import DatasetFacts, ImageDataset, Split
from sdlab.data.official import is_here, known_names, load_official, official_facts
from sdlab.data.own_images import load_own_images
from sdlab.data.saved_images import load_if_gone, own_path
from sdlab.errors import BadInput, did_you_mean
from sdlab.runs.files import raise_on_read_error
from sdlab.settings import PROJECT_ROOT, Settings


def load_dataset(settings: Settings) -> ImageDataset:
    """The data set that `settings.dataset` names, at `settings.image_size`; an official one is fetched if missing.

    Their content names one's own images, not their path: where they are gone (moved, or a disk that is not mounted)
    after stage 00 is finished, its copy is used. Raises `BadInput` for an unknown name, and for files that are missing,
    damaged or of another kind.
    """
    if settings.dataset in known_names():
        check_exclude(settings)
        return resize_dataset(load_official(settings.dataset, data_root(settings)), settings.image_size)
    if saved := load_if_gone(settings):
        print(f"There is nothing at {own_path(settings)}: the copy of stage 00 is used.", file=sys.stderr)
        return saved
    check_path(settings)
    return resize_dataset(load_own_images(settings), settings.image_size)


def fetch_dataset(settings: Settings) -> None:
    """Fetch what is missing of an official data set, with a bar, before any notebook starts. Raises `BadInput`."""
    if settings.dataset in known_names():
        check_exclude(settings)
        if not is_here(settings.dataset, data_root(settings)):
            load_official(settings.dataset, data_root(settings))
    elif not load_if_gone(settings):
        check_path(settings)


def dataset_facts(settings: Settings) -> DatasetFacts:
    """Counts and classes, without fetching anything: all that a plan needs. Own images are read for it."""
    return official_facts(settings.dataset) or load_dataset(settings).facts()


def data_root(settings: Settings) -> Path:
    return PROJECT_ROOT / Path(settings.data_root).expanduser()


def resize_dataset(dataset: ImageDataset, size: int) -> ImageDataset:
    """The data set with its images resized to `size` pixels (bilinear, without antialiasing)."""
    if dataset.image_size == size:
        return dataset
    from sdlab.data.pixels import resize  # torch is slow to import, and most data sets have the classifier's size

    splits = {name: Split(resize(split.images, size), split.labels) for name, split in dataset.splits.items()}
    return replace(dataset, **splits, source_images=lambda indices, _: dataset.train.images[indices])


def check_path(settings: Settings) -> None:
    """Raises `BadInput` for a `dataset` that is neither a known name nor a folder or npz that exists."""
    names, path = ", ".join(known_names()), own_path(settings)
    if not settings.dataset.strip():
        raise BadInput(f"`dataset` is empty: name a folder, an npz, or one of {names}.")
    with raise_on_read_error(path):
        is_file, is_folder = path.is_file(), path.is_dir()
    if is_file and path.suffix.lower() != ".npz":
        raise BadInput(
            f"`dataset` is the file {path}: a file has to be an npz with images and labels; else give a folder."
        )
    if is_file:
        check_exclude(settings)
    if not is_file and not is_folder:
        raise BadInput(
            f"`dataset` is {settings.dataset!r}, neither a known name nor a path that exists ({path}): known are {names}."
            f"{did_you_mean(settings.dataset, known_names())}"
        )


def check_exclude(settings: Settings) -> None:
    """Raises `BadInput` for `exclude` where no folder is read."""
    if settings.exclude:
        raise BadInput(
            f"`exclude` is {settings.exclude!r}, but `dataset` is {settings.dataset}: files are left out of folders only."
        )
