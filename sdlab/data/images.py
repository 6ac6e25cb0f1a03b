"""Real images in one form, wherever they come from: `Split`, `ImageDataset`, and what is worth knowing about a set."""

import functools
import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Entry(NamedTuple):
    """One of your own images: its file (or `array[index]`), its class, its split ("" before one is drawn)."""

    file: str
    class_name: str
    split: str


@dataclass(frozen=True)
class Split:
    """`images` uint8 (n, 3, height, width) in 0 ... 255, `labels` int64 (n,)."""

    images: np.ndarray
    labels: np.ndarray
    shards: tuple[tuple[Path, str], ...] = ()  # of a synthetic set: the files that these begin, and their sha256

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """sha256 over pixels and labels."""
        return sha256_of_arrays(self.images, self.labels)


def spread(count: int, most: int) -> np.ndarray:
    """At most `most` of `count` indices, evenly spread over all."""
    return np.linspace(0, count - 1, min(most, count)).astype(int)


def sha256_of_arrays(*arrays: np.ndarray) -> str:
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(np.ascontiguousarray(array))
    return sha.hexdigest()


def to_nchw(images: np.ndarray) -> np.ndarray:
    """(n, h, w), (n, h, w, 1) or (n, h, w, 3) -> (n, 3, h, w); grey is repeated."""
    images = images[..., None] if images.ndim == 3 else images
    images = np.repeat(images, 3, 3) if images.shape[3] == 1 else images
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


@dataclass(frozen=True)
class DatasetFacts:
    """All that a plan needs of a data set, whose files may not be here yet: images of each split, classes, pixels."""

    train: int
    val: int
    test: int
    num_classes: int
    image_size: int
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageDataset:
    """A labelled image set with its three splits. The images have one size, the classifier's.

    `source_images(indices, size)` returns training images for the base model: uint8 (n, 3, h, w), at a size of their
    own or at `size`. Without it, the base model sees the classifier's images.
    """

    name: str
    source: str
    class_names: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    source_images: Callable[[Sequence[int], int], np.ndarray] | None = None
    files: tuple[Entry, ...] = ()  # of your own images
    remarks: tuple[str, ...] = ()  # what was left out or scaled
    origin: str = ""  # of a folder: a hash of its files' names, sizes and times
    bit_depth: int = 16  # of a folder: the bits that its 16-bit files use

    def __post_init__(self):
        for name, split in self.splits.items():
            count, channels = split.images.shape[:2]
            assert split.images.dtype == np.uint8 and channels == 3 and count == len(split.labels), name
            assert split.labels.min() >= 0 and split.labels.max() < self.num_classes, name

    @classmethod
    def from_entries(cls, classes: Sequence[str], images: np.ndarray, entries: Sequence[Entry], **more):
        """A set of your own: `images` uint8 (n, 3, h, w), and an entry for each."""
        label_of, splits = {name: label for label, name in enumerate(classes)}, {}
        for split in ("train", "val", "test"):
            rows = [row for row, entry in enumerate(entries) if entry.split == split]
            splits[split] = Split(images[rows], np.array([label_of[entries[row].class_name] for row in rows], np.int64))
        return cls(class_names=tuple(classes), files=tuple(entries), **splits, **more)

    @property
    def splits(self) -> dict[str, Split]:
        return {"train": self.train, "val": self.val, "test": self.test}

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_size(self) -> int:
        return self.train.images.shape[-1]

    def facts(self) -> DatasetFacts:
        return DatasetFacts(*map(len, self.splits.values()), self.num_classes, self.image_size, self.remarks)

    def counts(self) -> dict[str, list[int]]:
        """Images of each class in each split."""
        return {k: np.bincount(s.labels, minlength=self.num_classes).tolist() for k, s in self.splits.items()}

    def majority_share(self, split: str = "test") -> float:
        """Accuracy of always answering the most frequent class: a CAS has to be compared with it."""
        counts = np.bincount(self.splits[split].labels)
        return float(counts.max() / counts.sum())

    def fingerprint(self) -> str:
        """sha256 over all pixels and labels: it names the content that a result was made from."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        return sha256_of_arrays(*(array for split in self.splits.values() for array in (split.images, split.labels)))

    def summary(self) -> dict:
        """What notebook 00 shows and records, and the tables print."""
        return dict(
            name=self.name,
            source=self.source,
            findings=self.findings(),
            classes=list(self.class_names),
            counts=self.counts(),
            fingerprint=self.fingerprint(),
            majority_share_test=self.majority_share("test"),
            majority_share_val=self.majority_share("val"),
        )

    def training_images(self, indices: Sequence[int], size: int) -> np.ndarray:
        """Training images for the base model: uint8 (n, 3, h, w), of their own size or of `size`."""
        return self.train.images[indices] if self.source_images is None else self.source_images(indices, size)

    def findings(self) -> list[str]:
        """Counts, imbalance, duplicates, and the reader's remarks: a sentence each, to be read before time is spent."""
        counts = self.counts()["train"]
        sizes = " / ".join(str(len(split)) for split in self.splits.values())
        lines = [f"{sizes} images (train / val / test) of {self.num_classes} classes."]
        most, least = int(np.argmax(counts)), int(np.argmin(counts))
        if counts[most] > 2 * counts[least]:
            lines.append(
                f"Imbalanced: {counts[most]} training images of `{self.class_names[most]}`, {counts[least]} of "
                f"`{self.class_names[least]}`; always answering the most frequent class scores {self.majority_share():.1%}."
            )
        lines += [
            f"No image of `{name}` in {split}: its recall there is unknown."
            for split, of_class in self.counts().items()
            for name, count in zip(self.class_names, of_class, strict=True)
            if not count
        ]
        return [*lines, *find_duplicates(self.splits), *self.remarks]


@dataclass(frozen=True)
class TrainingImages:
    """Some of a set's training images, for the base model, read when they are needed."""

    data: ImageDataset
    indices: range
    size: int

    def read(self, indices: range) -> np.ndarray:
        """uint8 (n, 3, h, w) of these indices of the whole set."""
        return self.data.training_images(indices, self.size)

    def split(self) -> Split:
        return Split(self.read(self.indices), self.data.train.labels[self.indices])


def find_duplicates(splits: dict[str, Split]) -> list[str]:
    """Images that are in more than one split, or under more than one label: a sentence each, if there are any."""
    seen = defaultdict(set)  # pixels -> where
    for name, split in splits.items():
        for image, label in zip(split.images, split.labels, strict=True):
            seen[hashlib.blake2b(np.ascontiguousarray(image), digest_size=16).digest()].add((name, int(label)))
    crossing = [places for places in seen.values() if len({name for name, _ in places}) > 1]
    in_test = sum(any(name == "test" for name, _ in places) for places in crossing)
    unclear = sum(len({label for _, label in places}) > 1 for places in seen.values())
    found = {
        f"{len(crossing)} images are, pixel for pixel, in more than one split ({in_test} of them in test).": crossing,
        f"{unclear} images are under more than one label.": unclear,
    }
    return [sentence for sentence, count in found.items() if count]
