"""The files of a synthetic set: its manifest, and its shards, read one at a time and checked. Imports no torch."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from sdlab.errors import BadInput, brief
from sdlab.runs.files import MOVE_AWAY, check_fields, read_hashed_json, sha256_of_file


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"shard_{index:05d}.safetensors"


def read_manifest(folder: Path) -> dict:
    """A set's manifest. Raises `BadInput` if it is missing or was altered."""
    path = folder / "manifest.json"
    manifest = read_hashed_json(path, "run its stage again, which makes it.")
    check_fields(manifest, dict(key=str, plan=dict, made_from=dict | None, shards=dict), path)
    check_fields(manifest["plan"], dict(shard_size=int, seed=int), path)
    if manifest["made_from"]:
        made_from = check_fields(manifest["made_from"], dict(config=dict, checkpoints=dict, labels=str), path)
        check_fields(made_from["config"], dict(class_encoder_epoch=int, unet_epoch=int), path)
        if unknown := made_from["checkpoints"].keys() - {"class_encoder", "unet"}:
            raise BadInput(
                f"{path} is damaged (unknown checkpoint kind {brief(min(unknown))}; expected class_encoder or unet): {MOVE_AWAY}."
            )
    for index, shard in manifest["shards"].items():
        check_fields(shard, dict(sha256=str, seconds=float | int), path)
        if not index.isdecimal() or manifest["plan"]["shard_size"] < 1:
            raise BadInput(f"{path} is damaged (it has a shard {brief(index)}): {MOVE_AWAY}.")
    return manifest


def read_shards(folder: Path, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The first `count` images and labels of a set, shard by shard: uint8 (n, 3, h, w), int64 (n,).

    Each shard is checked against its hash. Raises `BadInput` for one that is missing or damaged.
    """
    manifest = read_manifest(folder)
    size, shards = manifest["plan"]["shard_size"], manifest["shards"]
    for index in range(-(-count // size)):
        path = shard_path(folder, index)
        if not path.is_file() or str(index) not in shards:
            raise BadInput(f"{path} is missing: run its stage again, which makes it.")
        if sha256_of_file(path) != shards[str(index)]["sha256"]:
            raise BadInput(f"{path} is truncated or altered: {MOVE_AWAY}, which makes it again.")
        try:
            shard, left = load_file(path), count - index * size
            images, labels = shard["images"], shard["labels"]
            if images.dtype != np.uint8 or images.shape[:2] != (len(labels), 3) or images.ndim != 4 or labels.ndim != 1:
                raise ValueError(f"images {images.shape} of {images.dtype}")
        except Exception as error:  # a manifest may name anything
            raise BadInput(
                f"{path} holds no images and labels ({error}): move its folder away and run its stage again."
            ) from None
        yield images[:left], labels[:left]
