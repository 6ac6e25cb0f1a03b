"""Your own images: a folder with one subfolder a class, or an npz -> `ImageDataset`."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np

from sdlab.data import naming
from sdlab.data.folders import Listing, list_folder, lost_class
from sdlab.data.image_decoding import BIT_DEPTHS, INVISIBLE, DecodedImage, check_range, read_image
from sdlab.data.images import Entry, ImageDataset
from sdlab.data.own_npz import read_npz
from sdlab.data.saved_images import load_saved, own_path
from sdlab.data.splits import complete_splits
from sdlab.errors import BadInput, first_words, printable
from sdlab.runs.files import raise_on_read_error
from sdlab.runs.progress import Progress
from sdlab.settings import Settings


def load_own_images(settings: Settings) -> ImageDataset:
    """The images at the path `settings.dataset`: a folder's at the classifier's size, an npz's at its own.

    Raises `BadInput` for a set that cannot be split, or that holds nothing to learn.
    """
    path = own_path(settings)
    if path.is_dir():
        return read_folder(path, settings)
    images, entries, classes, remarks = read_npz(path)
    digests = [hashlib.blake2b(image, digest_size=16).digest() for image in images]
    entries = complete_splits(path, classes, entries, digests, settings)
    remarks += check_range(sum(np.bincount(image.ravel(), minlength=256) for image in images), path)
    names = dict(name=path.stem, source=f"file {path.name}")
    return ImageDataset.from_entries(classes, images, entries, **names, remarks=tuple(remarks))


def read_folder(folder: Path, settings: Settings) -> ImageDataset:
    """Read once an experiment: stage 00 saves the images (`save_dataset`)."""
    listing = list_folder(folder, settings.exclude)
    origin = listing.origin(settings.image_size, settings.val_share, settings.test_share)
    dataset = load_saved(settings, origin) or read_images(listing, origin, settings)
    training = [entry.file for entry in dataset.files if entry.split == "train"]

    def source_images(indices: Sequence[int], size: int) -> np.ndarray:
        return np.stack([read_image(folder / training[i], size, dataset.bit_depth).pixels for i in indices])

    return replace(dataset, source_images=source_images)


def read_images(listing: Listing, origin: str, settings: Settings) -> ImageDataset:
    """All images of a folder, at the classifier's size, in their splits."""
    pictures, bit_depth, remarks = decode_folder(listing, settings.image_size)
    classes, digests = naming.ordered(e.class_name for e in pictures), [p.digest for p in pictures.values()]
    entries = complete_splits(listing.folder, classes, [*pictures], digests, settings)
    return ImageDataset.from_entries(
        classes, np.stack([picture.pixels for picture in pictures.values()]), entries, name=listing.folder.name,
        source=f"folder {listing.folder.name}/", remarks=tuple(remarks), origin=origin, bit_depth=bit_depth,
    )  # fmt: skip


def decode_folder(listing: Listing, size: int) -> tuple[dict[Entry, DecodedImage], int, list[str]]:
    """The images of a folder that are read, the bits that its 16-bit files use, and remarks. Raises `BadInput`."""
    pictures, unreadable = decode_files(listing, listing.entries, size)
    check_readable(listing, pictures, unreadable)
    # One bit depth for the whole set: scaled image by image, equal pixels would come out unequal.
    deep = {entry: picture.peak for entry, picture in pictures.items() if picture.peak}
    bit_depth = next(bits for bits in BIT_DEPTHS if max(deep.values(), default=2**15) < 2**bits)
    if bit_depth < 16:
        pictures |= decode_files(listing, [*deep], size, bit_depth)[0]
    remarks = [*listing.remarks, *leave_out_masks(listing.folder, pictures)]
    remarks += check_range(sum(picture.histogram for picture in pictures.values()), listing.folder)
    if unreadable:
        files = [f"{entry.file} ({why})" for entry, why in unreadable.items()]
        remarks.append(f"{len(files)} unreadable files were left out: {naming.join_names(files)}.")
    traits = defaultdict(list)
    for entry, trait in ((entry, trait) for entry, picture in pictures.items() for trait in picture.traits):
        traits[trait].append(entry.file)
    remarks += [f"{len(n)} of the images: each {trait} ({naming.join_names(n, 2)})." for trait, n in traits.items()]
    return pictures, bit_depth, remarks


def decode_files(
    listing: Listing, entries: Sequence[Entry], size: int, bit_depth: int = 16
) -> tuple[dict[Entry, DecodedImage], dict[Entry, str]]:
    """The images that can be read, and why the others cannot. Raises `BadInput` for a disk that fails."""

    def attempt(entry: Entry) -> DecodedImage | str:
        path = listing.folder / entry.file
        if entry.file in listing.dead:
            return listing.dead[entry.file]
        try:
            with raise_on_read_error(path):  # a disk that fails for a minute must not cost an image
                return read_image(path, size, bit_depth)
        except BadInput:
            raise
        except Exception as error:  # whatever a damaged or hostile file makes a decoder raise
            return first_words(str(error).replace(f"{listing.folder}/", "") or type(error).__name__)

    pictures, unreadable = {}, {}
    with Progress(None, len(entries), "read images", "img") as bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        for entry, result in zip(entries, pool.map(attempt, entries), strict=True):
            bar.update()
            (unreadable if isinstance(result, str) else pictures)[entry] = result
    return pictures, unreadable


def check_readable(listing: Listing, pictures: dict[Entry, DecodedImage], unreadable: dict[Entry, str]) -> None:
    """Raises `BadInput` if most images cannot be read, or all of a class in a split."""
    readable = {entry[1:] for entry in pictures}
    for entry, why in unreadable.items():
        if len(unreadable) > len(pictures):
            raise BadInput(
                f"{len(unreadable)} of the {len(listing.entries)} images in {listing.folder} cannot be read, as "
                f"{printable(f'{entry.file} ({why})')[-300:]}: repair or remove them."
            )
        if entry[1:] not in readable:
            count = sum(other[1:] == entry[1:] for other in unreadable)
            raise lost_class(listing.folder, entry.class_name, count, f"{entry.file}: {why}")


def leave_out_masks(folder: Path, pictures: dict[Entry, DecodedImage]) -> list[str]:
    """Remove images of few values that have the name of a richer one in another subfolder or format; remarks.

    Raises `BadInput` for a class of masks: named so, and of few values.
    """
    is_flat, namesakes = {}, defaultdict(dict)  # whether all images of a subfolder and format have few values
    for entry, picture in pictures.items():
        path = PurePosixPath(entry.file)
        group = (entry.class_name, entry.split, path.parent, path.suffix.lower())
        is_flat[group] = is_flat.get(group, True) and np.count_nonzero(picture.histogram) <= INVISIBLE
        namesakes[entry.class_name, entry.split, path.stem][entry] = group
    for name in sorted({name for name, *_ in is_flat if naming.is_companion(name)}):
        if all(flat for group, flat in is_flat.items() if group[0] == name) and not all(is_flat.values()):
            raise BadInput(
                f"The class `{name}` of {folder} holds images of a few values only, as masks do: leave it out by the "
                f"setting `exclude: {name}`, or rename it."
            )
    masks, copies = [], []
    for group_of in namesakes.values():
        rich = [entry for entry in group_of if not is_flat[group_of[entry]]]
        masks += [entry for entry in group_of if rich and entry not in rich]
        copies += (rich or [*group_of])[1:]
    for entry in masks:
        del pictures[entry]
    remarks = {"were left out as masks: they have few values, and the name of another": masks,
               "have the name of another: if they are copies, leave them out by `exclude`": copies}  # fmt: skip
    return [f"{len(e)} images {why}: {naming.join_names(file for file, *_ in e)}." for why, e in remarks.items() if e]
