"""The synthetic set that the tables chose -> files for others: a folder of PNGs, or an npz in MedMNIST's layout.

One shard is in memory at a time, however large the set is. Imports no torch.
"""

import json
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from sdlab.errors import BadInput, brief
from sdlab.runs.files import atomic_write, read_json, write_json
from sdlab.runs.records import STAGES, stage_state
from sdlab.runs.shards import read_shards
from sdlab.settings import Settings


def export_set(settings: Settings, target: Path, images: int | None = None, progress: Callable = tqdm) -> dict:
    """Write the first `images` of the pool of notebook 05 (default: the size it chose) to `target`; what it says of itself.

    `target` is a folder to make (`000_name/000000.png`, one subfolder a class, readable as torchvision's ImageFolder;
    and `set.json`), or a file ending in .npz (`train_images` (n, h, w, 3) uint8, `train_labels` (n, 1), and `about`).

    Raises `BadInput` if `target` exists, if notebook 05 is not finished, for more images than it made, for a damaged
    shard, and where the disk has no room.
    """
    if stage_state(settings, "05").state != "done":
        raise BadInput(
            f"{settings.experiment} has no synthetic set yet: {STAGES['05'].stem} is {stage_state(settings, '05').state} "
            f"(`sdlab run {settings.experiment}`)."
        )
    about = description(settings, images)
    if target.suffix not in ("", ".npz"):
        raise BadInput(
            f"{target.name} ends in {target.suffix}: give a name ending in .npz, or one without a dot for a folder."
        )
    try:
        there = target.exists() or target.is_symlink()
    except OSError as error:
        raise BadInput(f"{brief(str(target))} can be no file here ({error.strerror}): give another name.") from None
    if there:
        raise BadInput(f"{target} exists: nothing is written over; give another name.")
    if not target.absolute().parent.is_dir():
        raise BadInput(f"There is no folder {target.absolute().parent}: make it first.")
    folder = settings.run_folder / "synthetic" / about["synthetic"]
    first = next(read_shards(folder, 1))[0]
    size = about["images"] * first[0].size
    free = shutil.disk_usage(target.absolute().parent).free
    if size > free:
        raise BadInput(
            f"The set has up to {size / 1e9:.1f} GB, and {target.absolute().parent} has {free / 1e9:.1f} GB free."
        )
    about |= dict(image_size=first.shape[-1])
    shards = read_shards(folder, about["images"])
    write = write_npz if target.suffix else write_folder
    with progress(total=about["images"], desc="export", unit="img") as bar, atomic_write(target) as beside:
        write(beside, shards, about, bar.update)
    return about


def description(settings: Settings, images: int | None) -> dict:
    """What a set says of itself: where it comes from, its classes, and how a classifier trained on the chosen one does."""
    folder = settings.run_folder
    scaling = read_json(folder / "metrics" / "scaling.json")
    made, chosen = scaling["pool"], read_json(folder / "metrics" / f"x{int(scaling['chosen'][1:]):02d}.json")
    if images is not None and not 1 <= images <= made["images"]:
        raise BadInput(f"`--images` is {images}: {STAGES['05'].stem} made {made['images']} (allowed is 1 to that).")
    real = read_json(folder / "metrics" / "real.json")
    scores = {
        name: {k: cell["test"][k] for k in ("mean", "std", "n")} for name, cell in (("chosen", chosen), ("real", real))
    }
    return dict(
        experiment=settings.experiment,
        dataset=Path(settings.dataset).name,
        base_model=Path(settings.base_model).name
        if settings.base_model.startswith((".", "/", "~"))
        else settings.base_model,
        images=images or chosen["images"],
        classes=made["classes"],
        synthetic=made["synthetic"],
        config=made["config"],
        chosen=dict(images=chosen["images"], protocol=scaling["protocol"], test_accuracy=scores),
    )


def write_folder(target: Path, shards: Iterator[tuple[np.ndarray, np.ndarray]], about: dict, made: Callable) -> None:
    """A PNG an image, named by its place in the sequence."""
    folders = [target / f"{index:03d}_{folder_name(name)}" for index, name in enumerate(about["classes"])]
    for folder in folders:
        folder.mkdir(parents=True)
    place = 0
    for images, labels in shards:
        for image, label in zip(images.transpose(0, 2, 3, 1), labels, strict=True):
            Image.fromarray(image).save(folders[label] / f"{place:06d}.png")
            place += 1
        made(len(labels))
    write_json(target / "set.json", about)


def write_npz(target: Path, shards: Iterator[tuple[np.ndarray, np.ndarray]], about: dict, made: Callable) -> None:
    """Images go into the file as they come; `about` is JSON in a text array."""
    shape, all_labels = (about["images"], about["image_size"], about["image_size"], 3), []
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("train_images.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, dict(descr="|u1", fortran_order=False, shape=shape))
            for images, labels in shards:
                member.write(np.ascontiguousarray(images.transpose(0, 2, 3, 1)).tobytes())
                all_labels.append(labels)
                made(len(labels))
        for name, array in (
            ("train_labels", np.concatenate(all_labels)[:, None]),
            ("about", np.array(json.dumps(about))),
        ):
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def folder_name(name: str) -> str:
    """A class's name as a part of a folder's."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._")[:60] or "class"
