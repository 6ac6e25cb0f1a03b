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
from sdlab.data.images import Entry, ImageDataset
from sdlab.data.own_npz import read_npz
from sdlab.data.pictures import INVISIBLE, DecodedImage, check_range, read_image, used_bits
from sdlab.data.saved_images import load_saved, own_path
from sdlab.data.splits import complete_splits
from sdlab.errors import BadInput, first_words, printable
from sdlab.runs.files import raise_on_read_error
from sdlab.runs.progress import Progress
from sdlab.settings import Settings


def load_own_images(settings: Settings) -> ImageDataset:
    """The images at the path `settings.dataset`: a folder's at the classifier's size, an npz's at its own.

    Raises `BadInput` for what cannot be split, or holds nothing to learn.
    """
    path = own_path(settings)
    if path.is_dir():
        return read_folder(path, settings)
    images, entries, classes, remarks = read_npz(path)
    histogram = sum(np.bincount(image.ravel(), minlength=256) for image in images)
    digests = [hashlib.blake2b(image, digest_size=16).digest() for image in images]
    entries = complete_splits(path, classes, entries, digests, settings)
    remarks += check_range(histogram, path)
    return ImageDataset.from_entries(path.stem, f"file {path.name}", classes, images, entries, remarks=tuple(remarks))


def read_folder(folder: Path, settings: Settings) -> ImageDataset:
    """Read once an experiment: stage 00 keeps the images (`save_dataset`)."""
    listing = list_folder(folder, settings.exclude)
    origin = listing.origin(settings.image_size, settings.val_share, settings.test_share)
    dataset = load_saved(settings, origin) or read_images(listing, origin, settings)
    training = [entry.file for entry in dataset.files if entry.split == "train"]

    def source_images(indices: Sequence[int], size: int) -> np.ndarray:
        return np.stack([read_image(folder / training[i], size, dataset.bit_depth).pixels for i in indices])

    return replace(dataset, source_images=source_images)


def read_images(listing: Listing, origin: str, settings: Settings) -> ImageDataset:
    """All images of a folder, at the classifier's size, and their splits."""
    pictures, unreadable = decode_files(listing, listing.entries, settings.image_size)
    check_readable(listing, pictures, unreadable)
    peak = max(picture.peak for picture in pictures.values())
    bit_depth = used_bits(peak) if peak else 16
    if bit_depth < 16:  # found over the whole set: image by image, equal pixels would come out unequal
        deep = [entry for entry, picture in pictures.items() if picture.peak]
        pictures |= decode_files(listing, deep, settings.image_size, bit_depth)[0]
    remarks = [*listing.remarks, *leave_out_masks(listing.folder, pictures)]
    entries, classes = [*pictures], naming.ordered(entry.class_name for entry in pictures)
    digests = [picture.digest for picture in pictures.values()]
    entries = complete_splits(listing.folder, classes, entries, digests, settings)
    remarks += check_range(sum(picture.histogram for picture in pictures.values()), listing.folder)
    if unreadable:
        left_out = [f"{entry.file} ({why})" for entry, why in unreadable.items()]
        remarks.append(f"{len(left_out)} unreadable files were left out: {naming.join_names(left_out)}.")
    traits = defaultdict(list)
    for entry, picture in pictures.items():
        for trait in picture.traits:
            traits[trait].append(entry.file)
    remarks += [f"{len(n)} of the images: each {trait} ({naming.join_names(n, 2)})." for trait, n in traits.items()]
    return ImageDataset.from_entries(
        listing.folder.name, f"folder {listing.folder.name}/", classes,
        np.stack([picture.pixels for picture in pictures.values()]), entries,
        remarks=tuple(remarks), origin=origin, bit_depth=bit_depth,
    )  # fmt: skip


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

    with Progress(None, len(entries), "read images", "img") as bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        results = {}
        for entry, result in zip(entries, pool.map(attempt, entries), strict=True):
            bar.update()
            results[entry] = result
    unreadable = {entry: result for entry, result in results.items() if isinstance(result, str)}
    return {entry: result for entry, result in results.items() if entry not in unreadable}, unreadable


def check_readable(listing: Listing, pictures: dict[Entry, DecodedImage], unreadable: dict[Entry, str]) -> None:
    """Raises `BadInput` if most images cannot be read, or all of a class in a split."""
    if len(unreadable) > len(pictures):
        first, why = next(iter(unreadable.items()))
        raise BadInput(
            f"{len(unreadable)} of the {len(listing.entries)} images in {listing.folder} cannot be read, as "
            f"{printable(f'{first.file} ({why})')[-300:]}: repair or remove them."
        )
    readable = {entry[1:] for entry in pictures}
    for entry, why in unreadable.items():
        if entry[1:] not in readable:
            count = sum(other[1:] == entry[1:] for other in unreadable)
            raise lost_class(listing.folder, entry.class_name, count, f"{entry.file}: {why}")


def leave_out_masks(folder: Path, pictures: dict[Entry, DecodedImage]) -> list[str]:
    """Remove images of few values named like richer ones in another subfolder or format of their class; remarks.

    Raises `BadInput` for a class of masks: named so, and of few values.
    """
    groups, namesakes = defaultdict(list), defaultdict(list)
    for entry, picture in pictures.items():
        path = PurePosixPath(entry.file)
        group = (*entry[1:], path.parent, path.suffix.lower())
        groups[group].append(np.count_nonzero(picture.histogram) <= INVISIBLE)
        namesakes[*entry[1:], path.stem].append((entry, group))
    flat = {group: all(few) for group, few in groups.items()}
    for name in {name for name, *_ in flat if naming.is_companion(name)}:
        if all(few for group, few in flat.items() if group[0] == name) and not all(flat.values()):
            raise BadInput(
                f"The class `{name}` of {folder} holds images of a few values only, as masks do: leave it out by the "
                f"setting `exclude: {name}`, or rename it."
            )
    alike = [members for members in namesakes.values() if len(members) > 1]
    masks = [e for members in alike for e, g in members if flat[g] and not all(flat[g] for _, g in members)]
    for entry in masks:
        del pictures[entry]
    copies = [e.file for members in alike for e, _ in [pair for pair in members if pair[0] in pictures][1:]]
    remarks = {
        f"{len(masks)} images of a few values were left out as masks of their namesakes": [e.file for e in masks],
        f"{len(copies)} images have the name of another one of their class; if they are copies, `exclude` them": copies,
    }
    return [f"{text}: {naming.join_names(files)}." for text, files in remarks.items() if files]
