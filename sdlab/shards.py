"""The files of a synthetic set: shards and their manifest, read one at a time and checked. Imports no torch."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from sdlab.files import read_sealed, sha256_of_file
from sdlab.settings import BadInput


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"shard_{index:05d}.safetensors"


def stored_shards(folder: Path, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The first `count` images and labels of a set, shard by shard: uint8 (n, 3, h, w), int64 (n,).

    Each shard is checked against its hash when it is reached. Raises `BadInput` for one that is missing or damaged.
    """
    manifest = read_sealed(folder / "manifest.json", "run its step again, which makes it.")
    size, shards = manifest["plan"]["shard_size"], manifest["shards"]
    for index in range(-(-count // size)):
        path = shard_path(folder, index)
        if not path.is_file() or str(index) not in shards:
            raise BadInput(f"{path} is missing: run its step again, which makes it.")
        if sha256_of_file(path) != shards[str(index)]["sha256"]:
            raise BadInput(f"{path} is truncated or altered: move it away and run its step again, which makes it anew.")
        held, left = load_file(path), count - index * size
        yield held["images"][:left], held["labels"][:left]
