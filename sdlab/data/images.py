"""Real images in one form, whatever they come from: `ImageDataset`, and what can be said of one at a glance."""

import functools
import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Split:
    """`images` uint8 (n, 3, height, width) in 0 ... 255, `labels` int64 (n,)."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """sha256 over pixels and labels."""
        sha = hashlib.sha256()
        for array in (self.images, self.labels):
            sha.update(np.ascontiguousarray(array))
        return sha.hexdigest()


@dataclass(frozen=True)
class DatasetFacts:
    """What a plan has to know of a data set, whose files need not be there yet: images of each split, classes, pixels."""

    train: int
    val: int
    test: int
    num_classes: int
    image_size: int


@dataclass(frozen=True)
class ImageDataset:
    """A labelled image set with its three splits. The images have one size, the classifier's.

    `source_images(indices, size)` gives training images as they come: uint8 (n, 3, h, w), at a size of their own or at
    `size`; the base model sees these. Without it, it sees the classifier's.
    """

    name: str
    source: str
    class_names: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    source_images: Callable[[Sequence[int], int], np.ndarray] | None = None
    files: tuple[tuple[str, str, str], ...] = ()  # of a folder: (file, class, split)
    remarks: tuple[str, ...] = ()  # what its reader noticed

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

    def facts(self) -> DatasetFacts:
        return DatasetFacts(len(self.train), len(self.val), len(self.test), self.num_classes, self.image_size)

    def counts(self) -> dict[str, list[int]]:
        """Images of each class in each split."""
        return {k: np.bincount(s.labels, minlength=self.num_classes).tolist() for k, s in self.splits.items()}

    def majority_share(self, split: str = "test") -> float:
        """Accuracy of always answering the commonest class: the line that a CAS has to be read against."""
        counts = np.bincount(self.splits[split].labels)
        return float(counts.max() / counts.sum())

    def fingerprint(self) -> str:
        """sha256 over all pixels and labels: what a result was made from."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        sha = hashlib.sha256()
        for split in self.splits.values():
            sha.update(np.ascontiguousarray(split.images).tobytes() + np.ascontiguousarray(split.labels).tobytes())
        return sha.hexdigest()

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
        """What one should know before spending time on this set: counts, imbalance, duplicates. A sentence each."""
        counts = self.counts()["train"]
        sizes = " / ".join(str(len(split)) for split in self.splits.values())
        lines = [f"{sizes} images (train / val / test) of {self.num_classes} classes."]
        most, least = int(np.argmax(counts)), int(np.argmin(counts))
        if counts[most] > 2 * counts[least]:
            lines.append(
                f"Imbalanced: {counts[most]} training images of `{self.class_names[most]}`, {counts[least]} of "
                f"`{self.class_names[least]}`; always answering the commonest class scores {self.majority_share():.1%}."
            )
        lines += [
            f"No image of `{name}` in {split}: its recall there is unknown."
            for split, of_class in self.counts().items()
            for name, count in zip(self.class_names, of_class, strict=True)
            if not count
        ]
        return [*lines, *find_duplicates(self.splits), *self.remarks]


def find_duplicates(splits: dict[str, Split]) -> list[str]:
    """Images that stand in more than one split, or under more than one label: a sentence each, if there are any."""
    seen = defaultdict(list)  # pixels -> where
    for name, split in splits.items():
        for image, label in zip(split.images, split.labels, strict=True):
            seen[hashlib.blake2b(np.ascontiguousarray(image), digest_size=16).digest()].append((name, int(label)))
    crossing = [places for places in seen.values() if len({name for name, _ in places}) > 1]
    unclear = sum(len({label for _, label in places}) > 1 for places in seen.values())
    lines = []
    if crossing:
        in_test = sum(any(name == "test" for name, _ in places) for places in crossing)
        lines.append(
            f"{len(crossing)} images stand, pixel for pixel, in more than one split ({in_test} of them in test)."
        )
    if unclear:
        lines.append(f"{unclear} images stand under more than one label.")
    return lines
