"""TODO data.npz."""

import io
import math
import os
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sdlab.data.images import Split
from sdlab.errors import BadInput, first_words
from sdlab.runs.files import raise_on_read_error

LONGEST_HEADER = 10_000  # bytes of an array's, as numpy has it


def read_arrays(path: Path, names: Sequence[str], way_out: str) -> dict[str, np.ndarray]:
    """These arrays of an npz, whoever wrote it. Nothing is unpickled.

    All their headers are read first, and held against the sizes that the archive declares and against the memory there
    is: nothing is allocated for a file that promises what it has not. Raises `BadInput`, whose sentence ends in `way_out`.
    """
    try:
        with raise_on_read_error(path), zipfile.ZipFile(path) as archive:
            members = {name: archive.NameToInfo.get(f"{name}.npy") for name in names}
            if missing := [name for name, member in members.items() if member is None]:
                raise BadInput(f"{path} has no {', '.join(missing)}: {way_out}.")
            wanted, most = sum(declared_size(archive, member) for member in members.values()), total_memory() / 2
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


def declared_size(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> int:
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


def total_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def as_split(images: np.ndarray, labels) -> tuple[np.ndarray, np.ndarray]:
    """(n, h, w[, 3]) uint8 and labels (n,) or (n, 1) -> images (n, 3, h, w), labels int64 (n,)."""
    grey = images.ndim == 3
    images = np.repeat(images[:, None], 3, axis=1) if grey else np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return images, np.asarray(labels).reshape(-1).astype(np.int64)


def read_npz(path: Path) -> dict[str, Split]:
    """The three splits of a file in MedMNIST's layout: `train_images` (n, h, w[, 3]) uint8, `train_labels` (n[, 1]), and so on.

    Raises `BadInput` for any other file. Nothing is unpickled.
    """
    layout = (
        "it needs train_images, train_labels, and the same of val and test: uint8 (n, h, w[, 3]) and labels (n[, 1])"
    )
    kept = read_arrays(path, [f"{s}_{what}" for s in ("train", "val", "test") for what in ("images", "labels")], layout)
    splits = {}
    for s in ("train", "val", "test"):
        images, labels = kept.pop(f"{s}_images"), kept.pop(f"{s}_labels")
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
            raise BadInput(f"{path} holds {s}_images of {first_words(images.dtype)} {images.shape}: {layout}.")
        if labels.dtype.kind not in "iu" or not labels.ndim or labels.size != len(images) or len(labels) != len(images):
            raise BadInput(
                f"{path} holds {s}_labels of {first_words(labels.dtype)} {labels.shape} for {len(images)} images: one label an image "
                "is needed, a whole number."
            )
        if not images.size:
            raise BadInput(f"{path} holds {s}_images of {images.shape}, which are none: {layout}.")
        splits[s] = Split(*as_split(images, labels))
    sizes = {split.images.shape[2:] for split in splits.values()}
    if len(sizes) > 1 or len(set(*sizes)) > 1:
        raise BadInput(f"{path} holds images of {sorted(sizes)} pixels: all have to be square and of one size.")
    return splits
