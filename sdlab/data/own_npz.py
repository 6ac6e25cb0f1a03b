"""An npz of your own, named as MedMNIST, Keras or most people do. Another one is refused with the numpy that mends it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sdlab.data import naming
from sdlab.data.images import Entry, to_nchw
from sdlab.data.npz import array_names, read_arrays
from sdlab.data.pictures import INVISIBLE, used_bits
from sdlab.errors import BadInput, first_words, printable

LAYOUT = (
    "it needs train_images, uint8 (n, h, w[, 3]), and train_labels (n[, 1]), and may have the same of val and test; "
    "x_train and y_train will do"
)
KINDS = dict.fromkeys(("images", "image", "x", "imgs", "img", "pixels"), "images")
KINDS |= dict.fromkeys(("labels", "label", "y", "targets", "target"), "labels")
CLASS_NAMES = ("class_names", "label_names", "classes")


def read_npz(path: Path) -> tuple[np.ndarray, list[Entry], list[str], list[str]]:
    """Images uint8 (n, 3, h, w), their entries, the class names in the order of their labels, and remarks.

    Raises `BadInput` for any other file, with a line of numpy that mends it where there is one.
    """
    present = array_names(path, LAYOUT)
    pairs = find_pairs(path, present)
    named = [name for name in CLASS_NAMES if name in present][:1]
    arrays = read_arrays(path, [*(name for pair in pairs.values() for name in pair), *named], LAYOUT)
    images, labels = ({pair[i]: arrays[pair[i]] for pair in pairs.values()} for i in (0, 1))
    for (name, of_split), (other, answers) in zip(images.items(), labels.items(), strict=True):
        if not of_split.size:
            raise BadInput(f"{path} holds {name} of {of_split.shape}, which are none: {LAYOUT}.")
        if not answers.ndim or len(answers) != len(of_split):
            raise BadInput(
                f"{path} holds {other} of {answers.shape} for {len(of_split)} images: one label an image is needed."
            )
    changes = image_changes(path, images)
    numbers, classes = read_labels(path, labels, arrays[named[0]] if named else None, changes)
    if changes:
        raise BadInput(mending(path, arrays, changes))
    sizes = {array.shape[1:3] for array in images.values()}
    if len(sizes) > 1 or len(set(*sizes)) > 1:
        raise BadInput(f"{path} holds images of {sorted(sizes)} pixels: all have to be square and of one size.")
    entries = [
        Entry(f"{name}[{row}]", classes[label], split)
        for split, (name, other) in pairs.items()
        for row, label in enumerate(numbers[other])
    ]
    unread = [name for name in present if name not in arrays]
    remarks = [f"{len(unread)} other arrays are not read: {naming.join_names(unread)}."] if unread else []
    return np.concatenate([to_nchw(images.pop(name)) for name in [*images]]), entries, classes, remarks


def find_pairs(path: Path, present: Sequence[str]) -> dict[str, list[str]]:
    """Split ("" if the file has none) -> the names of its images and of its labels. Raises `BadInput`."""
    roles = {"train": {}, "val": {}, "test": {}, "": {}}
    for name in present:
        split, rest = naming.split_of(name)
        kinds = {KINDS[word] for word in rest if word in KINDS} or {"images" for word in rest if word == "data"}
        if len(kinds) == 1 and all(word in KINDS or naming.is_filler(word) for word in rest):
            other = roles[split].setdefault(*kinds, name)
            if other != name:
                raise BadInput(f"{path} has {other} and {name}, which name the same: leave one out; {LAYOUT}.")
    if roles["train"] or len(roles[""]) < 2:
        del roles[""]
    else:
        del roles["train"]
    pairs = {
        s: [of.get(kind, f"{s}_{kind}".strip("_")) for kind in ("images", "labels")]
        for s, of in roles.items()
        if of or s == "train"
    }
    if missing := [name for pair in pairs.values() for name in pair if name not in present]:
        raise BadInput(f"{path} has no {', '.join(missing)}: {LAYOUT}.")
    return pairs


def image_changes(path: Path, images: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Array -> the numpy that makes uint8 (n, h, w[, 3]) in 0 ... 255 of `z[k]`, for those that are something else.

    Raises `BadInput` for what no line of numpy can mend without knowing more. One scale is found for all arrays.
    """
    changes = {}
    for name, array in images.items():
        axis = next((axis for axis in (3, 1) if array.ndim == 4 and array.shape[axis] in (1, 3, 4)), None)
        if array.dtype.kind not in "buif" or (axis is None and array.ndim != 3):
            raise BadInput(f"{path} holds {name} of {first_words(array.dtype)} {array.shape}: {LAYOUT}.")
        changes[name] = "z[k].transpose(0, 2, 3, 1)" if axis == 1 else "z[k]"
        if axis and array.shape[axis] == 4:
            changes[name] += "[..., :3]"
    unscaled = {name: array for name, array in images.items() if array.dtype != np.uint8} or images
    low, high = (float(function([function(array) for array in unscaled.values()])) for function in (np.min, np.max))
    if unscaled is not images or high - low <= INVISIBLE:
        if not high > low or not np.isfinite(high - low):
            raise BadInput(f"{path} holds pixels from {low:g} to {high:g}, which show nothing: {LAYOUT}.")
        whole = all(array.dtype.kind != "f" for array in unscaled.values())
        changes |= {name: f"np.round({scaled(changes[name], low, high, whole)}).astype(np.uint8)" for name in unscaled}
    return {name: change for name, change in changes.items() if change != "z[k]"}


def scaled(pixels: str, low: float, high: float, whole: bool) -> str:
    """The numpy that brings pixels to 0 ... 255, by what their lowest and highest value say of their range."""
    if low >= 0 and high <= 1:
        return f"{pixels} * 255"
    if not whole and low >= -1 and high <= 1:
        return f"({pixels} + 1) * 127.5"
    if whole and low >= 0 and 255 < high < 2**16:
        return f"{pixels} * (255 / {2 ** used_bits(high) - 1})"
    if low >= 0 and high <= 255 and high - low > INVISIBLE:
        return pixels
    return f"({pixels} - {low!r}) * (255 / {high - low!r})"


def read_labels(
    path: Path, labels: Mapping[str, np.ndarray], names: np.ndarray | None, changes: dict[str, str]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Array -> labels int64 (n,), and the class names; `changes` grows by the numpy that mends labels."""
    if all(array.dtype.kind in "US" and array.size == len(array) for array in labels.values()):
        texts = {name: as_names(path, name, array) for name, array in labels.items()}
        classes = naming.ordered(name for of_split in texts.values() for name in of_split)
        naming.check_twins(classes, path)
        label_of = {name: label for label, name in enumerate(classes)}
        return {name: np.array([label_of[text] for text in of_split]) for name, of_split in texts.items()}, classes
    numbers, mended = {}, {}
    for name, array in labels.items():
        mended[name], values = "z[k]", array
        if array.ndim == 2 and array.shape[1] > 1 and array.dtype.kind in "buif" and is_one_hot(array):
            mended[name], values = "z[k].argmax(1)", array.argmax(1)
        if values.dtype.kind == "b" or (
            values.dtype.kind == "f" and (abs(values) < 2**53).all() and not (values % 1).any()
        ):
            mended[name], values = f"{mended[name]}.astype(int)", values.astype(int)
        if values.dtype.kind not in "iu" or values.size != len(values):
            raise BadInput(
                f"{path} holds {name} of {first_words(array.dtype)} {array.shape}: one label an image is needed, a whole number or a name."
            )
        numbers[name] = values.reshape(-1).astype(np.int64)
    present = np.unique(np.concatenate([*numbers.values()]))
    classes = [str(label) for label in range(len(present))] if names is None else as_names(path, "class_names", names)
    if present[0] < 0 or present[-1] >= len(classes):
        if len(present) > sum(map(len, numbers.values())) / 2 or (names is not None and present[0] != 1):
            raise BadInput(f"{path} has the labels {present[:12].tolist()}: they have to be 0, 1, ... without a gap.")
        every = f"np.unique(np.concatenate([np.ravel(z[k]) for k in {(*labels,)}]))"
        for name, label in mended.items():
            mended[name] = (
                f"{label} - 1"
                if present[0] == 1 and present[-1] == len(present)
                else f"np.searchsorted({every}, {label})"
            )
    changes |= {name: change for name, change in mended.items() if change != "z[k]"}
    return numbers, classes


def is_one_hot(array: np.ndarray) -> bool:
    return bool(((array == 0) | (array == 1)).all() and (array.sum(1) == 1).all())


def as_names(path: Path, name: str, array: np.ndarray) -> list[str]:
    """The texts of an array, in one Unicode form. Raises `BadInput` for what cannot name a class."""
    try:
        texts = [text.decode() if isinstance(text, bytes) else str(text) for text in array.reshape(-1).tolist()]
    except UnicodeDecodeError:
        texts = [""]
    if array.dtype.kind not in "US" or not all(text.strip() and printable(text) == text for text in texts):
        raise BadInput(f"{path} holds {name}, which has to be names of classes, in printable Unicode.")
    return [naming.composed(text) for text in texts]


def mending(path: Path, arrays: Mapping[str, np.ndarray], changes: Mapping[str, str]) -> str:
    """The sentence of arrays that one line of numpy turns into those that are read."""
    groups = {}
    for name, change in changes.items():
        groups.setdefault(change, []).append(name)
    first = [(names[0], arrays[names[0]]) for names in groups.values()]
    held = ", ".join(f"{name} of {a.dtype} {a.shape}, {a.min():.4g} ... {a.max():.4g}" for name, a in first)
    mended = path.with_name(f"{path.stem}_mended.npz")
    new = " | ".join(f"{{k: {change} for k in {(*names,)}}}" for change, names in groups.items())
    line = f"import numpy as np; z = np.load({str(path)!r}); np.savez({str(mended)!r}, **(dict(z) | {new}))"
    return f"{path.name} holds {held}: write an npz that is read, by `{line}`, and give that as `dataset`."
