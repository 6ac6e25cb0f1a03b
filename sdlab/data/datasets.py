"""A name, a folder or a file -> `ImageDataset`: real images in one form, whatever they come from."""

import difflib
from dataclasses import replace
from pathlib import Path

import numpy as np

from sdlab.data.images import DatasetFacts, ImageDataset, Split
from sdlab.data.official import CIFAR, CIFAR_FACTS, CIFAR_FOLDERS, cifar, medmnist, medmnist_facts, medmnist_table
from sdlab.data.own_images import load_own_images, own_path
from sdlab.errors import BadInput
from sdlab.paths import project_path
from sdlab.settings import Settings


def digits() -> ImageDataset:
    """scikit-learn's digits: 1,797 scans of handwritten digits, 8 x 8 pixels of 17 greys (UCI, Alpaydin and Kaynak 1998).

    Splits are fixed and stratified: 1000 train, 297 val, 500 test.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans, labels = load_digits(return_X_y=True)
    grey = np.round(scans.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    images, labels = np.repeat(grey, 3, axis=1), labels.astype(np.int64)
    rest, test = train_test_split(np.arange(len(labels)), test_size=500, stratify=labels, random_state=0)
    train, val = train_test_split(rest, test_size=297, stratify=labels[rest], random_state=0)
    splits = {
        name: Split(images[np.sort(i)], labels[np.sort(i)])
        for name, i in (("train", train), ("val", val), ("test", test))
    }
    return ImageDataset("digits", "scikit-learn load_digits (UCI optdigits)", tuple("0123456789"), **splits)


def load_named(name: str, data_root: Path) -> ImageDataset:
    """One of the known data sets, at its own size."""
    if name == "digits":
        return digits()
    return cifar(name, data_root) if name in CIFAR else medmnist(name, data_root)


def known_names() -> list[str]:
    return ["digits", *CIFAR, *medmnist_table()]


def load_dataset(settings: Settings) -> ImageDataset:
    """The data set that `settings.dataset` names, at `settings.image_size`; fetched if it is missing.

    Raises `BadInput` for an unknown name, and for files that are missing, damaged or not what they should be.
    """
    check_name(settings)
    if settings.dataset not in known_names():
        return resize_dataset(load_own_images(settings), settings.image_size)
    data_root = project_path(settings.data_root)
    return resize_dataset(load_named(settings.dataset, data_root), settings.image_size)


def fetch_dataset(settings: Settings) -> None:
    """Fetch what is missing of an official data set, with a bar, before any notebook starts. Raises `BadInput`."""
    check_name(settings)
    data_root = project_path(settings.data_root)
    missing = not (data_root / f"{settings.dataset}.npz").exists() if settings.dataset in medmnist_table() else False
    if settings.dataset in CIFAR:
        missing = not (data_root / CIFAR_FOLDERS[settings.dataset]).exists()
    if missing:
        load_named(settings.dataset, data_root)


def dataset_facts(settings: Settings) -> DatasetFacts:
    """Counts and classes, without fetching anything: what a plan has to know. Own images are read for it."""
    check_name(settings)
    name = settings.dataset
    if name in CIFAR:
        return CIFAR_FACTS[name]
    if name in medmnist_table():
        return medmnist_facts(name)
    return load_dataset(settings).facts()


def resize_dataset(dataset: ImageDataset, size: int) -> ImageDataset:
    """The data set with its images resized to `size` pixels (bilinear, without antialiasing)."""
    if dataset.image_size == size:
        return dataset
    from sdlab.data.pixels import resize  # torch is slow to import, and most data sets have the classifier's size

    splits = {name: Split(resize(split.images, size), split.labels) for name, split in dataset.splits.items()}
    return replace(dataset, **splits, source_images=lambda indices, _: dataset.train.images[indices])


def check_name(settings: Settings) -> None:
    """Raises `BadInput` for a data set that is neither known nor a folder or file that exists."""
    names = known_names()
    if settings.dataset in names:
        return
    if not settings.dataset.strip():
        raise BadInput(f"`dataset` is empty: name a folder, an npz, or one of {', '.join(names)}.")
    path = own_path(settings)
    if path.is_dir() or (path.is_file() and path.suffix.lower() == ".npz"):
        return
    near = difflib.get_close_matches(settings.dataset, names, n=1)
    hint = f" Did you mean `{near[0]}`?" if near else ""
    if path.is_file():
        raise BadInput(
            f"`dataset` is the file {path}: a file has to be an npz in MedMNIST's layout; else give a folder."
        )
    raise BadInput(
        f"`dataset` is {settings.dataset!r}, neither a known name nor a path that exists ({path}): known are {', '.join(names)}.{hint}"
    )
