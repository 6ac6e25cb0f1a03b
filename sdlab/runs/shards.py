"""The files of a synthetic set: shards and their manifest, read one at a time and checked. Imports no torch."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from sdlab.errors import BadInput
from sdlab.runs.files import check_fields, read_hashed_json, sha256_of_file


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"shard_{index:05d}.safetensors"


def read_manifest(folder: Path) -> dict:
    """A set's manifest. Raises `BadInput` if it is missing, or not what was written."""
    path = folder / "manifest.json"
    manifest = read_hashed_json(path, "run its step again, which makes it.")
    check_fields(manifest, dict(key=str, plan=dict, made_from=dict | None, shards=dict), path)
    check_fields(manifest["plan"], dict(shard_size=int, seed=int), path)
    if manifest["made_from"]:
        made_from = check_fields(manifest["made_from"], dict(config=dict, checkpoints=dict, labels=str), path)
        check_fields(made_from["config"], dict(class_encoder_epoch=int, unet_epoch=int), path)
        if not made_from["checkpoints"].keys() <= {"class_encoder", "unet"}:
            raise BadInput(f"{path} is damaged (its checkpoints are of no part): move it away and run its step again.")
    for index, noted in manifest["shards"].items():
        check_fields(noted, dict(sha256=str, seconds=float | int), path)
        if not index.isdecimal() or manifest["plan"]["shard_size"] < 1:
            raise BadInput(f"{path} is damaged (it has a shard {index!r}): move it away and run its step again.")
    return manifest


def read_shards(folder: Path, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The first `count` images and labels of a set, shard by shard: uint8 (n, 3, h, w), int64 (n,).

    Each shard is checked against its hash when it is reached. Raises `BadInput` for one that is missing or damaged.
    """
    manifest = read_manifest(folder)
    size, shards = manifest["plan"]["shard_size"], manifest["shards"]
    for index in range(-(-count // size)):
        path = shard_path(folder, index)
        if not path.is_file() or str(index) not in shards:
            raise BadInput(f"{path} is missing: run its step again, which makes it.")
        if sha256_of_file(path) != shards[str(index)]["sha256"]:
            raise BadInput(f"{path} is truncated or altered: move it away and run its step again, which makes it anew.")
        try:
            held, left = load_file(path), count - index * size
            images, labels = held["images"], held["labels"]
            if images.dtype != np.uint8 or images.shape[:2] != (len(labels), 3) or images.ndim != 4 or labels.ndim != 1:
                raise ValueError(f"images {images.shape} of {images.dtype}")
        except Exception as error:  # a manifest may name anything
            raise BadInput(
                f"{path} holds no images and labels ({error}): move its folder away and run its step again."
            ) from None
        yield images[:left], labels[:left]
