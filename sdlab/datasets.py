"""A name -> `ImageDataset`: real images in one form, whatever they come from."""

import difflib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sdlab.settings import BadInput, Settings


@dataclass(frozen=True)
class Split:
    """`images` uint8 (n, 3, height, width) in 0 ... 255, `labels` int64 (n,)."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ImageDataset:
    """A labelled image set with its three splits. The images have one size, the classifier's."""

    name: str
    source: str
    class_names: tuple[str, ...]
    train: Split
    val: Split
    test: Split

    def __post_init__(self):
        for name, split in self.splits.items():
            count, channels = split.images.shape[:2]
            assert split.images.dtype == np.uint8 and channels == 3 and count == len(split.labels), name
            assert split.labels.min() >= 0 and split.labels.max() < self.num_classes, name

    @property
    def splits(self) -> dict[str, Split]:
        return {"train": self.train, "val": self.val, "test": self.test}

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_size(self) -> int:
        return self.train.images.shape[-1]

    def counts(self) -> dict[str, list[int]]:
        """Images of each class in each split."""
        return {k: np.bincount(s.labels, minlength=self.num_classes).tolist() for k, s in self.splits.items()}

    def majority_share(self, split: str = "test") -> float:
        """Accuracy of always answering the commonest class: the line that a CAS has to be read against."""
        counts = np.bincount(self.splits[split].labels)
        return float(counts.max() / counts.sum())

    def fingerprint(self) -> str:
        """sha256 over all pixels and labels: what a result was made from."""
        sha = hashlib.sha256()
        for split in self.splits.values():
            sha.update(np.ascontiguousarray(split.images).tobytes() + np.ascontiguousarray(split.labels).tobytes())
        return sha.hexdigest()


def digits(settings: Settings) -> ImageDataset:
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


DATASETS: dict[str, Callable[[Settings], ImageDataset]] = {"digits": digits}


def load_dataset(settings: Settings) -> ImageDataset:
    """The data set that `settings.dataset` names, at `settings.image_size`. Raises `BadInput` for an unknown name."""
    check_name(settings)
    return at_size(DATASETS[settings.dataset](settings), settings.image_size)


def check_name(settings: Settings) -> None:
    """Raises `BadInput` for an unknown data set."""
    if settings.dataset not in DATASETS:
        near = difflib.get_close_matches(settings.dataset, DATASETS, n=1)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        raise BadInput(f"`dataset` is {settings.dataset!r}: known are {', '.join(DATASETS)}.{hint}")


def at_size(dataset: ImageDataset, size: int) -> ImageDataset:
    """The data set with its images resized to `size` pixels (bilinear, without antialiasing)."""
    if dataset.image_size == size:
        return dataset
    from sdlab.pixels import resize  # torch is slow to import, and most data sets have the classifier's size

    splits = {name: Split(resize(split.images, size), split.labels) for name, split in dataset.splits.items()}
    return ImageDataset(dataset.name, dataset.source, dataset.class_names, **splits)
