"""Which image trains, validates and tests: checks of the splits that are given, and a draw of those that are not."""

import itertools
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from sdlab.data.images import Entry
from sdlab.errors import BadInput
from sdlab.settings import Settings


def complete_splits(
    where: object, classes: Sequence[str], entries: Sequence[Entry], digests: Sequence[bytes], settings: Settings
) -> list[Entry]:
    """The entries, each with a split: those that are given stay, missing ones are drawn from the training images.

    Drawn class by class (stratified), with a fixed seed. Images of one digest stay together, so that none crosses.
    Raises `BadInput` for fewer than two classes, and for one that cannot be learned.
    """
    if len(classes) < 2:
        raise BadInput(f"{where} has readable images of one class only (`{classes[0]}`): a classifier needs two.")
    given = {entry.split or "train" for entry in entries}
    if "train" not in given:
        raise BadInput(f"{where} has images in {' and '.join(sorted(given))}, but none in train: add some.")
    shares = {"val": settings.val_share, "test": settings.test_share}
    drawn = {split: share for split, share in shares.items() if split not in given}
    groups = {name: defaultdict(list) for name in classes}  # of each class: digest -> rows of the training images
    for row, (entry, digest) in enumerate(zip(entries, digests, strict=True)):
        if entry.split in ("", "train"):
            groups[entry.class_name][digest].append(row)
    for name in classes:
        if not groups[name]:
            elsewhere = next((entry.split for entry in entries if entry.class_name == name), "no split")
            raise BadInput(
                f"The class `{name}` of {where} has images in {elsewhere}, but none in train: add some, or leave it out."
            )
        if len(groups[name]) <= len(drawn):
            raise BadInput(
                f"The class `{name}` of {where} has {len(groups[name])} different readable training images: at least "
                f"{1 + len(drawn)} are needed, one for each split that has to be made of them; a class of fewer than "
                "about 50 is rarely learned."
            )
    split_of = [entry.split or "train" for entry in entries]
    for label, name in enumerate(classes):
        order = [
            list(groups[name].values())[i] for i in np.random.default_rng([0, label]).permutation(len(groups[name]))
        ]
        for split, share in drawn.items():
            count = min(max(1, round(share * len(groups[name]))), len(order) - 1)
            for row in itertools.chain(*order[:count]):
                split_of[row] = split
            order = order[count:]
    return [entry._replace(split=split) for entry, split in zip(entries, split_of, strict=True)]
