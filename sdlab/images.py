"""Real images in one form, whatever they come from: `ImageDataset`, and what can be said of one at a glance."""

import functools
import hashlib
import io
import math
import os
import sys
import zipfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdlab.files import reading
from sdlab.settings import UNPRINTABLE, BadInput

LONGEST_HEADER = 10_000  # bytes of an array's, as numpy has it


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
class Facts:
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

    def facts(self) -> Facts:
        return Facts(len(self.train), len(self.val), len(self.test), self.num_classes, self.image_size)

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
        return [*lines, *duplicates(self.splits), *self.remarks]


def duplicates(splits: dict[str, Split]) -> list[str]:
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


def at_size(dataset: ImageDataset, size: int) -> ImageDataset:
    """The data set with its images resized to `size` pixels (bilinear, without antialiasing)."""
    if dataset.image_size == size:
        return dataset
    from dataclasses import replace

    from sdlab.pixels import resize  # torch is slow to import, and most data sets have the classifier's size

    splits = {name: Split(resize(split.images, size), split.labels) for name, split in dataset.splits.items()}
    return replace(dataset, **splits, source_images=lambda indices, _: dataset.train.images[indices])


# --------------------------------------------------------------------------------------------------- an npz


def read_arrays(path: Path, names: Sequence[str], way_out: str) -> dict[str, np.ndarray]:
    """These arrays of an npz, whoever wrote it. Nothing is unpickled.

    All their headers are read first, and held against the sizes that the archive declares and against the memory there
    is: nothing is allocated for a file that promises what it has not. Raises `BadInput`, whose sentence ends in `way_out`.
    """
    try:
        with reading(path), zipfile.ZipFile(path) as archive:
            members = {name: archive.NameToInfo.get(f"{name}.npy") for name in names}
            if missing := [name for name, member in members.items() if member is None]:
                raise BadInput(f"{path} has no {', '.join(missing)}: {way_out}.")
            wanted, most = sum(checked_size(archive, member) for member in members.values()), memory() / 2
            if wanted > most:
                raise BadInput(
                    f"{path} holds arrays of {wanted / 1e9:.3g} GB, more than half of this machine's memory ({most / 1e9:.3g} GB): "
                    "take fewer or smaller images, or a machine with more memory."
                )
            return {name: read_array(archive, member) for name, member in members.items()}
    except BadInput:
        raise
    except Exception as error:  # whatever a damaged or hostile file makes zip, zlib, numpy or its header's parser raise
        why = f"{type(error).__name__}: {first_words(error)}"
        raise BadInput(f"{path} cannot be read as npz ({why}): {way_out}.") from None


def checked_size(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> int:
    """Bytes of an array, of which no more than its header is read. Raises `ValueError` where that and the archive differ."""
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{member.filename} is compressed in a way that numpy does not write")
    with archive.open(member) as file:
        start = io.BytesIO(file.read(LONGEST_HEADER))
    version = np.lib.format.read_magic(start)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"{member.filename} is of the version {version}")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(start)
    if dtype.hasobject:
        raise ValueError(f"{member.filename} holds pickled objects, which can run code")
    if any(length < 0 for length in shape):
        raise ValueError(f"{member.filename} has the shape {shape}")
    size = dtype.itemsize * math.prod(shape)
    if start.tell() + size != member.file_size:
        raise ValueError(
            f"{member.filename} has {member.file_size} bytes, and its header asks for {start.tell() + size}"
        )
    return size


def read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """Raises `ValueError`, or whatever zip raises at the member's last byte if its checksum is another."""
    with archive.open(member) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        if file.read(1):
            raise ValueError(f"{member.filename} is longer than its header says")
    if array.dtype.kind == "U" and array.size:  # numbers beyond all characters are an error of Python's own inside
        codes = np.ascontiguousarray(array).view(array.dtype.byteorder + "u4") if array.dtype.itemsize else np.zeros(1)
        if codes.max() > sys.maxunicode:
            raise ValueError(f"{member.filename} holds texts that are none")
    return array


def memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def first_words(said: object) -> str:
    """Of an error's message, or of what else a foreign file says: a line's beginning, printable."""
    lines = str(said).strip().splitlines() or [type(said).__name__]
    return printable(lines[0])[:100]


def printable(text: str) -> str:
    """With what breaks a line, or cannot be written, as its code."""
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)
