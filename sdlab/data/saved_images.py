"""The copy of your own images that stage 00 keeps in the run's folder, so that they are read once and may move."""

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from sdlab.data.image_decoding import BIT_DEPTHS
from sdlab.data.images import Entry, ImageDataset
from sdlab.data.npz import read_arrays
from sdlab.errors import BadInput
from sdlab.paths import project_path
from sdlab.runs.files import atomic_write
from sdlab.runs.records import read_record
from sdlab.settings import Settings

EXAMPLES = 12  # training images as the base model sees them, which notebook 00 shows
ABOUT = ("name", "source", "class_names", "remarks", "origin", "bit_depth")


def own_path(settings: Settings) -> Path:
    """Where `dataset` points, if it is a path: relative to the project, or absolute."""
    return project_path(settings.dataset)


def images_file(settings: Settings) -> Path:
    return settings.run_folder / "data" / "images.npz"


def save_dataset(settings: Settings, dataset: ImageDataset) -> list[Path]:
    """Write the images and splits of a set of your own to `data/` of the run. The files written."""
    if not dataset.files:
        return []
    path = images_file(settings)
    in_order = {name: iter(split.images) for name, split in dataset.splits.items()}
    examples = range(min(EXAMPLES, len(dataset.train)) if dataset.source_images else 0)
    arrays = dict(
        images=np.stack([next(in_order[entry.split]) for entry in dataset.files]),
        files=np.array(dataset.files),
        examples=dataset.training_images(examples, settings.base_image_size),
        about=np.array(json.dumps({name: getattr(dataset, name) for name in ABOUT})),
    )
    with atomic_write(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)
    splits = path.with_name("splits.csv")
    with atomic_write(splits) as partial, partial.open("w", newline="", errors="surrogateescape") as file:
        csv.writer(file).writerows([("file", "class", "split"), *dataset.files])
    return [path, splits]


def load_saved(settings: Settings, origin: str | None = None) -> ImageDataset | None:
    """The set that `save_dataset` wrote; None if there is none, or with `origin`, if it was made of other files.

    Raises `BadInput` for a damaged file.
    """
    path = images_file(settings)
    if not path.is_file():
        return None
    way_out = f"move it away, and the images are read from {own_path(settings)} again"
    text = str(read_arrays(path, ["about"], way_out)["about"])
    try:  # the file can hold any texts, and arrays of any shape
        about = dict(json.loads(text))
        if origin not in (None, about["origin"]):
            return None
        saved, size = read_arrays(path, ["images", "files", "examples"], way_out), settings.image_size
        examples = saved["examples"]
        if saved["images"].shape != (len(saved["files"]), 3, size, size) or about["bit_depth"] not in BIT_DEPTHS:
            raise ValueError("other arrays than were written")
        about["remarks"] = tuple(about["remarks"])
        entries = [Entry(*map(str, row)) for row in saved["files"]]
        dataset = ImageDataset.from_entries(about.pop("class_names"), saved["images"], entries, **about)
    except (AssertionError, LookupError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path} is damaged: {way_out}.") from None

    def source_images(indices: Sequence[int], size: int) -> np.ndarray:
        if size != settings.base_image_size or max(indices) >= len(examples):
            raise BadInput(
                f"The original images are needed at {size} pixels, and there is nothing at {own_path(settings)}: make "
                "them available again, or give their new place as `dataset`."
            )
        return examples[list(indices)]

    return replace(dataset, source_images=source_images) if len(examples) else dataset


def load_if_gone(settings: Settings) -> ImageDataset | None:
    """The saved set, if there is nothing at the path `dataset` and stage 00 is finished with the other settings."""
    try:  # a disk that is not mounted leaves an empty folder, or links that lead nowhere
        if own_path(settings).is_file() or any(path.exists() for path in own_path(settings).iterdir()):
            return None
    except OSError:
        pass
    record = read_record(settings, "00")
    if record is None or not record.finished:
        return None
    present = settings.of_stage("00")
    if any(record.settings.get(n, getattr(Settings, n, None)) != present[n] for n in present.keys() - {"dataset"}):
        return None
    saved = load_saved(settings)
    return saved if saved and saved.fingerprint() == record.inputs.get("data") else None
