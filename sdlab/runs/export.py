"""The synthetic set that the tables chose -> files for others: a folder of PNGs, or an npz in MedMNIST's layout.

One shard is in memory at a time, however large the set is. Imports no torch.
"""

import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from sdlab.errors import BadInput, brief
from sdlab.runs.files import atomic_write, check_free_space, read_json, write_json
from sdlab.runs.privacy import check_release, privacy_of
from sdlab.runs.shards import read_shards
from sdlab.runs.stages import STAGES, State, stage_state
from sdlab.settings import Settings

Shards = Iterator[tuple[np.ndarray, np.ndarray]]


def export_set(settings: Settings, target: Path, images: int | None = None, progress: Callable = tqdm) -> dict:
    """Write the first `images` of notebook 05's pool (default: the size it chose) to `target`; returns its description.

    `target` is a new folder (`000_name/000000.png`, one subfolder a class, readable as torchvision's ImageFolder; and
    `set.json`), or a new file ending in .npz (`train_images` (n, h, w, 3) uint8, `train_labels` (n, 1), and `about`).

    Raises `BadInput` if `target` exists, if notebook 05 is not finished, for more images than it made, for a set whose audit
    found more than `privacy_limit` allows, for a damaged shard, and for a full disk.
    """
    if (state := stage_state(settings, "05").state) != State.DONE:
        raise BadInput(
            f"{settings.experiment} has no synthetic set yet: {STAGES['05'].stem} is {state} "
            f"(`sdlab run {settings.experiment}`)."
        )
    about = description(settings, images)
    about = check_release(about | dict(privacy=privacy_of(settings)), ("set",), settings.privacy_limit)
    return write_set(settings.run_folder / "synthetic" / about["synthetic"], about, target, progress)


def write_set(folder: Path, about: dict, target: Path, progress: Callable = tqdm) -> dict:
    """Write the first `about["images"]` of the shards in `folder` to `target`; returns the completed description."""
    check_target(target)
    first = next(read_shards(folder, 1))[0]
    check_free_space(target, about["images"] * first[0].size, "The set")
    about |= dict(image_size=first.shape[-1])
    shards = read_shards(folder, about["images"])
    write = write_npz if target.suffix else write_folder
    with progress(total=about["images"], desc="export", unit="img") as bar, atomic_write(target) as temporary:
        write(temporary, shards, about, bar.update)
    return about


def check_target(target: Path) -> None:
    """Raises `BadInput` for a name that is taken, impossible, or neither a folder's nor an npz's."""
    if target.suffix not in ("", ".npz"):
        raise BadInput(
            f"{target.name} ends in {target.suffix}: give a name ending in .npz, or one without a dot for a folder."
        )
    try:
        exists = target.exists() or target.is_symlink()
    except OSError as error:
        raise BadInput(f"{brief(str(target))} can be no file here ({error.strerror}): give another name.") from None
    if exists:
        raise BadInput(f"{target} exists: nothing is overwritten; give another name.")
    if not target.absolute().parent.is_dir():
        raise BadInput(f"There is no folder {target.absolute().parent}: make it first.")


def check_images(images: int | None, made: int) -> None:
    """Raises `BadInput` for a number of images that a pool does not have."""
    if images is not None and not 1 <= images <= made:
        raise BadInput(f"`--images` is {images}: {STAGES['05'].stem} made {made} (allowed is 1 to that).")


def description(settings: Settings, images: int | None) -> dict:
    """Where a set comes from, its classes, and how well a classifier does that was trained on the chosen size."""
    metrics = settings.run_folder / "metrics"
    scaling = read_json(metrics / "scaling.json")
    pool, chosen = scaling["pool"], read_json(metrics / f"x{int(scaling['chosen'][1:]):02d}.json")
    check_images(images, pool["images"])
    cells = dict(chosen=chosen, real=read_json(metrics / "real.json"))
    scores = {name: {key: cell["test"][key] for key in ("mean", "std", "n")} for name, cell in cells.items()}
    base_model = settings.base_model
    if base_model.startswith((".", "/", "~")):  # a path of this machine
        base_model = Path(base_model).name
    return dict(
        experiment=settings.experiment,
        dataset=Path(settings.dataset).name,
        base_model=base_model,
        images=images or chosen["images"],
        classes=pool["classes"],
        synthetic=pool["synthetic"],
        config=pool["config"],
        chosen=dict(images=chosen["images"], protocol=scaling["protocol"], test_accuracy=scores),
    )


def write_folder(target: Path, shards: Shards, about: dict, on_progress: Callable[[int], object]) -> None:
    """One PNG an image, numbered by its place in the set."""
    folders = [target / f"{label:03d}_{folder_name(name)}" for label, name in enumerate(about["classes"])]
    for folder in folders:
        folder.mkdir(parents=True)
    number = 0
    for images, labels in shards:
        for image, label in zip(images.transpose(0, 2, 3, 1), labels, strict=True):
            Image.fromarray(image).save(folders[label] / f"{number:06d}.png")
            number += 1
        on_progress(len(labels))
    write_json(target / "set.json", about)


def write_npz(target: Path, shards: Shards, about: dict, on_progress: Callable[[int], object]) -> None:
    """Images are written shard by shard; `about` is JSON in a text array."""
    shape, all_labels = (about["images"], about["image_size"], about["image_size"], 3), []
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("train_images.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, dict(descr="|u1", fortran_order=False, shape=shape))
            for images, labels in shards:
                member.write(np.ascontiguousarray(images.transpose(0, 2, 3, 1)).tobytes())
                all_labels.append(labels)
                on_progress(len(labels))
        arrays = dict(train_labels=np.concatenate(all_labels)[:, None], class_names=np.array(about["classes"]))
        arrays["about"] = np.array(json.dumps(about))
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def folder_name(name: str) -> str:
    """A class's name as a part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._")[:60] or "class"
