"""Your own images: a folder with one subfolder a class, or an npz in MedMNIST's layout -> `ImageDataset`."""

import csv
import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdlab.data.images import ImageDataset, Split
from sdlab.data.npz import read_arrays, read_npz
from sdlab.data.pictures import FORMATS, read_image, supported_formats
from sdlab.errors import BadInput, first_words, printable
from sdlab.paths import project_path
from sdlab.runs.files import atomic_write, files_below, raise_on_read_error, sha256_of_json
from sdlab.runs.progress import Progress
from sdlab.settings import Settings

SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
LAYOUT = "it needs one subfolder a class with its images, if you like below train/, val/ and test/"


@dataclass(frozen=True)
class Listing:
    """The image files below a folder: (path relative to it, class, split or "")."""

    folder: Path
    files: tuple[tuple[str, str, str], ...]
    others: tuple[str, ...]  # files whose names are not those of images, and images outside any class

    def key(self, *more) -> str:
        """Changes whenever a file is added, removed or written."""
        stats = [(self.folder / name).stat() for name, _, _ in self.files]
        return sha256_of_json([self.files, [(s.st_size, s.st_mtime_ns) for s in stats], *more])


def list_folder(folder: Path) -> Listing:
    """What stands in a folder. Raises `BadInput` where it is no set of labelled images."""
    try:
        return list_layout(folder)
    except OSError as error:
        raise BadInput(f"{folder} cannot be read ({error.strerror}): give a folder that can; {LAYOUT}.") from None


def list_layout(folder: Path) -> Listing:
    below = subfolders(folder)
    splits = [path for path in below if path.name.lower() in SPLITS]
    if splits and len(splits) < len(below):
        odd = next(path.name for path in below if path not in splits)
        raise BadInput(f"{folder} has both {splits[0].name}/ and {odd}/: {LAYOUT}, but not both.")
    if len({SPLITS[path.name.lower()] for path in splits}) < len(splits):
        raise BadInput(
            f"{folder} has {' and '.join(path.name for path in splits)}, two of which name the same split: put "
            "their images into one."
        )
    images, others = [], []
    suffixes = supported_formats()[1]
    for above, split in [(path, SPLITS[path.name.lower()]) for path in splits] or [(folder, "")]:
        loose = sorted(path for path in {*folder.iterdir(), *above.iterdir()} if path.suffix.lower() in suffixes)
        others += [f"{path.relative_to(folder).as_posix()} (in no class)" for path in loose]
        for of_class in subfolders(above):
            before = len(images)
            for path in sorted(p for p in files_below(of_class) if p.is_file() and not p.name.startswith(".")):
                name = path.relative_to(folder).as_posix()
                if path.suffix.lower() in suffixes:
                    images.append((name, of_class.name, split))
                else:
                    others.append(name)
            if len(images) == before:
                others.append(f"{of_class.relative_to(folder).as_posix()}/ (holds no image)")
    if not images:
        loose = sum(name.endswith("(in no class)") for name in others)
        files = sum(not name.endswith("(holds no image)") for name in others)
        found = (
            f"{loose} images without a class"
            if loose
            else f"{files} files, none of them an image that is read ({', '.join(FORMATS)})"
        )
        raise BadInput(f"{folder} has {found}: {LAYOUT}.")
    return Listing(folder, tuple(images), tuple(dict.fromkeys(others)))


def subfolders(folder: Path) -> list[Path]:
    """Raises `BadInput` for one whose name no table can show, or that is a link back to what holds it."""
    found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))
    for path in found:
        if printable(path.name) != path.name:
            raise BadInput(f"{folder} has the subfolder {printable(path.name)!r}: rename it, in printable UTF-8.")
        if path.is_symlink() and folder.resolve().is_relative_to(path.resolve()):
            raise BadInput(f"{path} is a link to a folder that holds it: remove it; {LAYOUT}.")
    return found


def read_folder(folder: Path, settings: Settings) -> ImageDataset:
    """A folder's images at the classifier's size, split. Read once an experiment: step 00 keeps them (`save_dataset`).

    Raises `BadInput` for a folder that cannot be split, or that holds nothing to learn.
    """
    listing = list_folder(folder)
    key = listing.key(settings.image_size, settings.val_share, settings.test_share)
    images, files, remarks = load_saved_images(settings, key) or read_images(listing, settings)
    classes = tuple(sorted({c for _, c, _ in files}))
    splits = {}
    for split in ("train", "val", "test"):
        rows = [i for i, (_, _, s) in enumerate(files) if s == split]
        labels = np.array([classes.index(files[i][1]) for i in rows], np.int64)
        splits[split] = Split(images[rows], labels)
    training = [name for name, _, s in files if s == "train"]

    def source_images(indices: Sequence[int], size: int) -> np.ndarray:
        return np.stack([read_image(folder / training[i], size).pixels for i in indices])

    return ImageDataset(
        folder.name, f"folder {folder.name}/", classes, **splits,
        source_images=source_images, files=tuple(files), remarks=tuple(remarks),
    )  # fmt: skip


def read_images(listing: Listing, settings: Settings) -> tuple[np.ndarray, list, list[str]]:
    """Images (n, 3, size, size), their (file, class, split), and what is worth a remark."""
    pictures, unreadable, traits = {}, [], defaultdict(list)

    def attempt(entry):
        path = listing.folder / entry[0]
        try:
            with raise_on_read_error(path):  # a disk that fails for a minute must not cost an image
                return read_image(path, settings.image_size)
        except BadInput:
            raise
        except Exception as error:  # whatever a damaged or hostile file makes a decoder raise
            return f"{entry[0]} ({why_unreadable(error, listing.folder)})"

    with Progress(None, len(listing.files), "read images", "img") as bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        for entry, read in zip(listing.files, pool.map(attempt, listing.files), strict=True):
            bar.update()
            if isinstance(read, str):
                unreadable.append(read)
                continue
            pictures[entry] = read
            for trait in read.traits:
                traits[trait].append(entry[0])
    if len(unreadable) > len(pictures):
        raise BadInput(
            f"{len(unreadable)} of the {len(listing.files)} images in {listing.folder} cannot be read, as {printable(unreadable[0])[-300:]}: repair or "
            "remove them."
        )
    check_classes(listing, pictures)
    files = assign_splits(pictures, settings)
    remarks = []
    if unreadable:
        remarks.append(f"{len(unreadable)} unreadable files were left out: {join_names(unreadable)}.")
    if listing.others:
        remarks.append(f"{len(listing.others)} files or folders give no image: {join_names(listing.others)}.")
    remarks += [
        f"{len(names)} of the images: each {trait} ({join_names(names, 2)})." for trait, names in traits.items()
    ]
    return np.stack([pictures[entry].pixels for entry in pictures]), files, remarks


def check_classes(listing: Listing, pictures: dict) -> None:
    """Raises `BadInput` for fewer than two classes, or a class that cannot be learned or judged."""
    entries = list(pictures)
    classes = sorted({c for _, c, _ in entries})
    if len(classes) < 2:
        raise BadInput(
            f"{listing.folder} has readable images of one class only (`{classes[0]}`): a classifier needs two; {LAYOUT}."
        )
    given = {s for _, _, s in entries}
    if given != {""} and "train" not in given:
        raise BadInput(f"{listing.folder} has images in {' and '.join(sorted(given))}, but none in train/: {LAYOUT}.")
    for name in classes:
        splits = [s for _, c, s in entries if c == name]
        if given != {""} and "train" not in splits:
            raise BadInput(
                f"The class `{name}` of {listing.folder} has images in {splits[0]}/, but none in train/: add some, or remove it."
            )
        wanted = 1 + ("val" not in given) + ("test" not in given)
        have = len({pictures[e].digest for e in entries if e[1] == name and e[2] in ("train", "")})
        if have < wanted:
            raise BadInput(
                f"The class `{name}` of {listing.folder} has {have} different readable training images: at least {wanted} are needed, "
                "one for each split that has to be made of them; a class of fewer than about 50 is rarely learned."
            )


def assign_splits(pictures: dict, settings: Settings) -> list[tuple[str, str, str]]:
    """(file, class, split) in the order of `pictures`: splits that stand in the folder stay, the others are drawn.

    Drawn class by class (stratified), with a fixed seed, and equal images of a class together, so that none crosses.
    """
    given = {s for _, _, s in pictures}
    drawn = [("val", settings.val_share), ("test", settings.test_share)]
    drawn = [(split, share) for split, share in drawn if split not in given]
    split_of = {entry: entry[2] or "train" for entry in pictures}
    for index, name in enumerate(sorted({c for _, c, _ in pictures})):
        groups = defaultdict(list)  # equal images
        for entry, picture in pictures.items():
            if entry[1] == name and split_of[entry] == "train":
                groups[picture.digest].append(entry)
        order = [list(groups.values())[i] for i in np.random.default_rng([0, index]).permutation(len(groups))]
        for split, share in drawn:
            count = min(max(1, round(share * len(groups))), len(order) - 1)
            for group in order[:count]:
                split_of |= dict.fromkeys(group, split)
            order = order[count:]
    return [(name, c, split_of[name, c, s]) for name, c, s in pictures]


def join_names(names: Sequence[str], count: int = 5) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(map(printable, names[:count])) + more


def why_unreadable(error: Exception, folder: Path) -> str:
    """An error's first words, without the machine's path in them."""
    return first_words(str(error).replace(f"{folder}/", "") or type(error).__name__)


def images_file(settings: Settings) -> Path:
    return settings.run_folder / "data" / "images.npz"


def save_dataset(settings: Settings, dataset: ImageDataset) -> list[Path]:
    """Of a folder: its images and splits, so that later notebooks need not read it again. The files written."""
    if not dataset.files:
        return []
    path, listing = images_file(settings), list_folder(own_path(settings))
    splits = path.with_name("splits.csv")
    at = {name: iter(split.images) for name, split in dataset.splits.items()}
    images = np.stack([next(at[split]) for _, _, split in dataset.files])
    key = listing.key(settings.image_size, settings.val_share, settings.test_share)
    with atomic_write(path) as beside, beside.open("wb") as file:
        np.savez(
            file, images=images, files=np.array(dataset.files), remarks=np.array(dataset.remarks, "U"), made_from=key
        )
    with atomic_write(splits) as beside, beside.open("w", newline="", errors="surrogateescape") as file:
        csv.writer(file).writerows([("file", "class", "split"), *dataset.files])
    return [path, splits]


def load_saved_images(settings: Settings, key: str) -> tuple[np.ndarray, list, list[str]] | None:
    """What `save_dataset` wrote, if the folder has not changed since."""
    path = images_file(settings)
    if not path.is_file():
        return None
    way_out = f"move it away, and the images are read from {own_path(settings)} again"
    if str(read_arrays(path, ["made_from"], way_out)["made_from"]) != key:
        return None
    kept = read_arrays(path, ["images", "files", "remarks"], way_out)
    try:
        images, files = kept["images"], kept["files"]
        shape = (len(files), 3, settings.image_size, settings.image_size)
        if images.dtype != np.uint8 or images.shape != shape or files.shape[1:] != (3,):
            raise BadInput("other arrays than were written")
        return images, [tuple(map(str, row)) for row in files], list(map(str, kept["remarks"]))
    except (BadInput, TypeError, ValueError):  # its arrays can be of any shape, and texts of any bytes
        raise BadInput(f"{path} is damaged: {way_out}.") from None


def own_path(settings: Settings) -> Path:
    """Where `dataset` points, if it is a path: relative to the project, or absolute."""
    return project_path(settings.dataset)


def load_own_images(settings: Settings) -> ImageDataset:
    """The images at the path `settings.dataset`. Raises `BadInput`."""
    path = own_path(settings)
    if path.is_dir():
        return read_folder(path, settings)
    splits = read_npz(path)
    labels = np.concatenate([split.labels for split in splits.values()])
    classes = sorted(set(labels.tolist()))
    if len(classes) < 2 or classes != list(range(len(classes))):
        raise BadInput(f"{path} has the labels {classes[:12]}: they have to be 0, 1, ... without a gap, two at least.")
    if absent := sorted(set(classes) - set(splits["train"].labels.tolist())):
        raise BadInput(
            f"{path} has no training images of the classes {absent[:12]}: add some, or leave these classes out."
        )
    return ImageDataset(path.stem, f"file {path.name}", tuple(map(str, classes)), **splits)
