"""Small files in the true formats: CIFAR's batches and archive, MedMNIST's npz, folders of images."""

import hashlib
import pickle
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = {"cifar10": 10, "cifar100": 100}


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def pictures(labels: np.ndarray, size: int, seed: int = 0) -> np.ndarray:
    """uint8 (n, size, size, 3): noise with a bright bar whose place tells the class."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 120, (len(labels), size, size, 3))
    for image, label in zip(images, labels, strict=True):
        image[:, label % size, label // size] += 120
    return images.astype(np.uint8)


def write_cifar(root: Path, name: str, per_batch: int = 40):
    """The extracted folder and its archive below `root`; torchvision's class with the MD5s and names of these files."""
    import torchvision.datasets

    official = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    folder = root / official.base_folder
    folder.mkdir(parents=True)
    key, count = ("labels", 10) if name == "cifar10" else ("fine_labels", 100)
    lists = {"train_list": [], "test_list": []}
    for which, entries in lists.items():
        for index, (file, _) in enumerate(getattr(official, which)):
            labels = np.arange(per_batch if name == "cifar10" or which == "test_list" else 2 * per_batch) % count
            flat = pictures(labels, 32, seed=index + len(which)).transpose(0, 3, 1, 2).reshape(len(labels), -1)
            (folder / file).write_bytes(pickle.dumps({"data": flat, key: labels.tolist()}))
            entries.append([file, md5(folder / file)])
    meta = dict(official.meta)
    (folder / meta["filename"]).write_bytes(pickle.dumps({meta["key"]: [f"class {c}" for c in range(count)]}))
    meta["md5"] = md5(folder / meta["filename"])
    archive = root / official.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, official.base_folder)
    return type(official.__name__, (official,), dict(lists, meta=meta, tgz_md5=md5(archive)))


def write_medmnist(root: Path, name: str, counts=(60, 20, 30), official: dict | None = None) -> dict:
    """`name`.npz below `root`; medmnist's own entry with the MD5 and counts of this file.

    The images are made, or the first ones of each class of the `official` splits, the classes in turn.
    """
    from sdlab.data.named_datasets import medmnist_table

    info = dict(medmnist_table()[name])
    root.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for seed, (split, count) in enumerate(zip(("train", "val", "test"), counts, strict=True)):
        labels = np.arange(count) % len(info["label"])
        images = pictures(labels, 28, seed)
        if official:
            kept = official[split].labels
            earlier = [np.count_nonzero(kept[:place] == label) for place, label in enumerate(kept)]  # of the same class
            chosen = np.lexsort((kept, earlier))[:count]
            images, labels = official[split].images[chosen].transpose(0, 2, 3, 1), kept[chosen]
        arrays[f"{split}_images"] = images
        arrays[f"{split}_labels"] = labels[:, None].astype(np.uint8)
    np.savez_compressed(root / f"{name}.npz", **arrays)
    return info | dict(
        MD5=md5(root / f"{name}.npz"), n_samples=dict(zip(("train", "val", "test"), counts, strict=True))
    )


def write_folder(root: Path, per_class: int = 10, classes=("cat", "dog"), split: str = "", size: int = 20) -> Path:
    """A subfolder a class with PNGs."""
    for label, name in enumerate(classes):
        folder = root / split / name
        folder.mkdir(parents=True, exist_ok=True)
        seed = sum(map(ord, split + name))
        for index, image in enumerate(pictures(np.full(per_class, label), size, seed)):
            Image.fromarray(image).save(folder / f"{index:03d}.png")
    return root
