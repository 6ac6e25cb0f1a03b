"""Data sets by name: CIFAR through torchvision, MedMNIST by medmnist's table of files, scikit-learn's digits."""

import functools
import importlib.util
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from sdlab.data.downloads import check_folder, check_md5, fetch
from sdlab.data.images import DatasetFacts, ImageDataset, Split, to_nchw
from sdlab.data.npz import read_arrays
from sdlab.errors import BadInput

CIFAR = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}
CIFAR_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}  # torchvision's
CIFAR_FACTS = {name: DatasetFacts(40_000, 10_000, 10_000, int(name[5:]), 32) for name in CIFAR}
SPLITS = ("train", "val", "test")


def digits() -> ImageDataset:
    """1,797 scans of handwritten digits, 8 x 8 pixels of 17 greys (UCI, Alpaydin and Kaynak 1998).

    The splits are fixed and stratified: 1000 train, 297 val, 500 test.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans, labels = load_digits(return_X_y=True)
    images = to_nchw(np.round(scans.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8))
    rest, test = train_test_split(np.arange(len(labels)), test_size=500, stratify=labels, random_state=0)
    train, val = train_test_split(rest, test_size=297, stratify=labels[rest], random_state=0)
    splits = (Split(images[np.sort(rows)], labels[np.sort(rows)].astype(np.int64)) for rows in (train, val, test))
    return ImageDataset("digits", "scikit-learn load_digits (UCI optdigits)", tuple("0123456789"), *splits)


def cifar(name: str, data_root: Path, kind: Any = None, validation: int = 10_000) -> ImageDataset:
    """CIFAR as the authors split it: the last 10,000 training images validate.

    `kind` is torchvision's class, which knows the files, their MD5s and the address. The files are pickles: they are
    unpickled only after every MD5 was right. Raises `BadInput` for files that are missing or not the official ones.
    """
    if kind is None:
        import torchvision.datasets  # seconds: only where CIFAR is asked for

        kind = getattr(torchvision.datasets, CIFAR[name])
    folder = data_root / kind.base_folder
    if not folder.exists():
        fetch(kind.url, data_root / kind.filename, kind.tgz_md5, name)
        check_folder(data_root)
        unpack(data_root / kind.filename, folder)
    remedy = f"move {folder} away, and it is made again from {kind.filename} ({kind.url})"
    for member, md5 in (*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])):
        if not (folder / member).is_file():
            raise BadInput(f"{folder / member} of {name} is missing: {remedy}.")
        check_md5(folder / member, md5, name, remedy)
    train, test = kind(data_root, train=True), kind(data_root, train=False)
    images, labels = to_nchw(train.data), np.array(train.targets, np.int64)
    return ImageDataset(
        name,
        f"torchvision {CIFAR[name]} ({kind.url}), {len(labels) - validation:,} of {len(labels):,} training images, the rest "
        "for validation",
        tuple(train.classes),
        Split(images[:-validation], labels[:-validation]),
        Split(images[-validation:], labels[-validation:]),
        Split(to_nchw(test.data), np.array(test.targets, np.int64)),
    )


def unpack(archive: Path, folder: Path) -> None:
    """Extract `folder` from the archive; it is renamed into place when it is whole."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
        try:
            (Path(scratch) / folder.name).rename(folder)
        except OSError:
            if not folder.is_dir():  # else another run unpacked the same meanwhile
                raise


@functools.cache
def medmnist_table() -> dict[str, dict]:
    """medmnist's INFO of its two-dimensional sets with one label an image: address, MD5, counts, names, licence.

    Read from its info.py alone: importing the package takes seconds, for classes that are not needed here.
    """
    package = importlib.util.find_spec("medmnist").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("sdlab_medmnist_info", Path(package) / "info.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    several = "multi-label, binary-class"
    return {name: info for name, info in module.INFO.items() if "3d" not in name and info["task"] != several}


def medmnist(name: str, data_root: Path, table: dict | None = None) -> ImageDataset:
    """A MedMNIST set at 28 pixels with its own splits. Raises `BadInput` for any file but the official one."""
    info, path = (table or medmnist_table())[name], data_root / f"{name}.npz"
    fetch(info["url"], path, info["MD5"], name)
    arrays = read_arrays(path, [f"{s}_{kind}" for s in SPLITS for kind in ("images", "labels")], "move it away")
    expected = {s: info["n_samples"][s] for s in SPLITS}
    counts = {s: len(arrays[f"{s}_labels"]) for s in SPLITS}
    if counts != expected:
        raise BadInput(f"{path} has {counts} images, but {name} has {expected}: move it away.")
    source = f"MedMNIST v2 {info['python_class']}, 28 px ({info['url']}; {info['license']})"
    classes = tuple(info["label"][str(label)] for label in range(len(info["label"])))
    splits = (Split(to_nchw(arrays[f"{s}_images"]), arrays[f"{s}_labels"].ravel().astype(np.int64)) for s in SPLITS)
    return ImageDataset(name, source, classes, *splits)


def known_names() -> list[str]:
    return ["digits", *CIFAR, *medmnist_table()]


def load_named(name: str, data_root: Path) -> ImageDataset:
    """One of the known data sets, at its own size; fetched if it is missing. Raises `BadInput`."""
    if name == "digits":
        return digits()
    return cifar(name, data_root) if name in CIFAR else medmnist(name, data_root)


def is_here(name: str, data_root: Path) -> bool:
    """Whether nothing has to be fetched."""
    return name == "digits" or (data_root / CIFAR_FOLDERS.get(name, f"{name}.npz")).exists()


def named_facts(name: str) -> DatasetFacts | None:
    """The published counts of a data set that may not be here yet; None for digits and one's own images."""
    if info := medmnist_table().get(name):
        return DatasetFacts(*(info["n_samples"][s] for s in SPLITS), len(info["label"]), 28)
    return CIFAR_FACTS.get(name)
