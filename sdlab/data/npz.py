"""Arrays of an npz from anywhere: nothing is unpickled, and no more memory is allocated than the file holds."""

import contextlib
import io
import math
import os
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from sdlab.errors import BadInput, first_words
from sdlab.runs.files import raise_on_read_error

LONGEST_HEADER = 10_000  # bytes of an array's header, numpy's own limit


@contextlib.contextmanager
def open_npz(path: Path, way_out: str) -> Iterator[zipfile.ZipFile]:
    """The archive. Any error that a damaged or hostile file causes becomes a `BadInput` that ends in `way_out`."""
    try:
        with raise_on_read_error(path), zipfile.ZipFile(path) as archive:
            yield archive
    except BadInput:
        raise
    except Exception as error:  # of zip, zlib, numpy or its header's parser
        why = f"{type(error).__name__}: {first_words(error)}"
        raise BadInput(f"{path} cannot be read as npz ({why}): {way_out}.") from None


def array_names(path: Path, way_out: str) -> list[str]:
    """Raises `BadInput` for a file that is no npz."""
    with open_npz(path, way_out) as archive:
        return [name.removesuffix(".npy") for name in archive.NameToInfo if name.endswith(".npy")]


def read_arrays(path: Path, names: Sequence[str], way_out: str) -> dict[str, np.ndarray]:
    """These arrays of an npz.

    All headers are read first, and compared with the sizes that the archive declares and with this machine's memory.
    Raises `BadInput`, whose sentence ends in `way_out`.
    """
    with open_npz(path, way_out) as archive:
        members = {name: archive.NameToInfo.get(f"{name}.npy") for name in names}
        if missing := [name for name, member in members.items() if member is None]:
            raise BadInput(f"{path} has no {', '.join(missing)}: {way_out}.")
        wanted = sum(declared_size(archive, member) for member in members.values())
        most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
        if wanted > most:
            raise BadInput(
                f"{path} holds arrays of {wanted / 1e9:.3g} GB, more than half of this machine's memory "
                f"({most / 1e9:.3g} GB): take fewer or smaller images, or a machine with more memory."
            )
        return {name: read_array(archive, member) for name, member in members.items()}


def declared_size(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> int:
    """Bytes of an array; only its header is read. Raises `ValueError` where header and archive disagree."""
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
    """Raises `ValueError`, or what zip raises at the member's last byte if its checksum is wrong."""
    with archive.open(member) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        if file.read(1):
            raise ValueError(f"{member.filename} is longer than its header says")
    if array.dtype.kind == "U" and array.size:  # Python itself fails later on numbers beyond all characters
        codes = np.ascontiguousarray(array).view(array.dtype.byteorder + "u4") if array.dtype.itemsize else np.zeros(1)
        if codes.max() > sys.maxunicode:
            raise ValueError(f"{member.filename} holds texts that are none")
    return array
