"""An npz of your own, named as in MedMNIST or Keras. Any other is refused with the line of numpy that mends it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sdlab.data import naming
from sdlab.data.image_decoding import BIT_DEPTHS, INVISIBLE
from sdlab.data.images import Entry, to_nchw
from sdlab.data.npz import array_names, read_arrays
from sdlab.errors import BadInput, first_words, printable

LAYOUT = (
    "it needs train_images, uint8 (n, h, w[, 3]), and train_labels (n[, 1]), and may have the same of val and test; "
    "x_train and y_train will do"
)
KINDS = dict.fromkeys(("images", "image", "x", "imgs", "img", "pixels"), "images")
KINDS |= dict.fromkeys(("labels", "label", "y", "targets", "target"), "labels")
RANGES = ((0.0, 1.0), (-1.0, 1.0), *((0.0, 2.0**bits - 1) for bits in BIT_DEPTHS))  # that pixels are usually given in
CLASS_NAMES = "class_names"  # in the order of the labels, if there is one


def read_npz(path: Path) -> tuple[np.ndarray, list[Entry], list[str], list[str]]:
    """Images uint8 (n, 3, h, w), their entries, the class names in the order of their labels, and remarks.

    Raises `BadInput` for any other file, with a line of numpy that mends it where there is one.
    """
    present = array_names(path, LAYOUT)
    pairs = find_pairs(path, present)
    arrays = read_arrays(
        path, [n for n in present if n == CLASS_NAMES or any(n in pair for pair in pairs.values())], LAYOUT
    )
    images, labels = ({pair[i]: arrays[pair[i]] for pair in pairs.values()} for i in (0, 1))
    for name, label in pairs.values():
        if not arrays[name].size:
            raise BadInput(f"{path} holds {name} of {arrays[name].shape}, which are none: {LAYOUT}.")
        if arrays[label].shape[:1] != arrays[name].shape[:1]:
            raise bad_labels(path, label, arrays[label])
    changes = image_changes(path, images)
    numbers, classes = read_labels(path, labels, arrays.get(CLASS_NAMES), changes)
    if changes:
        raise BadInput(mending(path, arrays, changes))
    sizes = {array.shape[1:3] for array in images.values()}
    if len(sizes) > 1 or len(set(*sizes)) > 1:
        raise BadInput(f"{path} holds images of {sorted(sizes)} pixels: all have to be square and of one size.")
    entries = [
        Entry(f"{name}[{row}]", classes[number], split)
        for split, (name, label) in pairs.items()
        for row, number in enumerate(numbers[label])
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
    del roles["" if roles["train"] or len(roles[""]) < 2 else "train"]
    pairs = {
        split: [names.get(kind, f"{split}_{kind}".strip("_")) for kind in ("images", "labels")]
        for split, names in roles.items()
        if names or split == "train"
    }
    if missing := [name for pair in pairs.values() for name in pair if name not in present]:
        raise BadInput(f"{path} has no {', '.join(missing)}: {LAYOUT}.")
    return pairs


def image_changes(path: Path, images: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Array -> the numpy that makes uint8 (n, h, w[, 3]) in 0 ... 255 of `z[k]`, for arrays that are something else.

    Raises `BadInput` for what no line can mend without knowing more. One scale is found for all arrays.
    """
    changes = {}
    for name, array in images.items():
        axis = next((axis for axis in (3, 1) if array.ndim == 4 and array.shape[axis] in (1, 3, 4)), None)
        if array.dtype.kind not in "buif" or (axis is None and array.ndim != 3):
            raise BadInput(f"{path} holds {name} of {first_words(array.dtype)} {array.shape}: {LAYOUT}.")
        changes[name] = "z[k].transpose(0, 2, 3, 1)" if axis == 1 else "z[k]"
        changes[name] += "[..., :3]" if axis and array.shape[axis] == 4 else ""
    unscaled = [name for name in images if images[name].dtype != np.uint8]
    low, high = (float(of([of(images[name]) for name in unscaled or images])) for of in (np.min, np.max))
    if unscaled or high - low <= INVISIBLE:
        if not 0 < high - low < np.inf:
            raise BadInput(f"{path} holds pixels from {low:g} to {high:g}, which show nothing: {LAYOUT}.")
        usual = [(a, b) for a, b in RANGES if a <= low and high <= b and 16 * (high - low) > b - a]
        start, end = (usual or [(low, high)])[0]
        for name in unscaled or images:
            changes[name] = f"np.round(({changes[name]} - {start!r}) * {255 / (end - start)!r}).astype(np.uint8)"
    return {name: change for name, change in changes.items() if change != "z[k]"}


def read_labels(
    path: Path, labels: Mapping[str, np.ndarray], names: np.ndarray | None, changes: dict[str, str]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Array -> labels (n,), and the class names; `changes` grows by the numpy that makes 0, 1, ... of other labels."""
    if all(array.dtype.kind in "US" and array.size == len(array) for array in labels.values()):
        texts = {name: as_names(path, name, array) for name, array in labels.items()}
        classes = naming.ordered(text for of_array in texts.values() for text in of_array)
        naming.check_twins(classes, path)
        label_of = {text: label for label, text in enumerate(classes)}
        return {name: np.array([*map(label_of.get, of_array)]) for name, of_array in texts.items()}, classes
    numbers, mended = {}, {}
    for name, array in labels.items():
        mended[name], values = "z[k]", array
        wide = array.ndim == 2 and array.shape[1] > 1 and array.dtype.kind in "buif"
        if wide and np.isin(array, (0, 1)).all() and (array.sum(1) == 1).all():  # one-hot
            mended[name], values = "z[k].argmax(1)", array.argmax(1)
        if values.dtype.kind not in "buif" or values.size != len(values) or not (values % 1 == 0).all():
            raise bad_labels(path, name, array)
        numbers[name] = values.reshape(-1)
    present = np.unique(np.concatenate([*numbers.values()]))
    classes = [str(label) for label in range(len(present))] if names is None else as_names(path, CLASS_NAMES, names)
    if present.dtype.kind not in "iu" or present[0] < 0 or present[-1] >= len(classes):
        if len(present) != len(classes) or 3 * len(present) > sum(map(len, numbers.values())):
            raise BadInput(f"{path} has the labels {present[:12].tolist()}: they have to be 0, 1, ... without a gap.")
        every = f"np.unique(np.concatenate([np.ravel(z[k]) for k in {(*labels,)}]))"
        mended = {name: f"np.searchsorted({every}, {change})" for name, change in mended.items()}
    changes |= {name: change for name, change in mended.items() if change != "z[k]"}
    return numbers, classes


def bad_labels(path: Path, name: str, array: np.ndarray) -> BadInput:
    held = f"{first_words(array.dtype)} {array.shape}"
    return BadInput(f"{path} holds {name} of {held}: one label an image is needed, a whole number or a name.")


def as_names(path: Path, name: str, array: np.ndarray) -> list[str]:
    """The texts of an array, in one Unicode form. Raises `BadInput` for texts that cannot name a class."""
    try:
        texts = [text.decode() if isinstance(text, bytes) else str(text) for text in array.reshape(-1).tolist()]
    except UnicodeDecodeError:
        texts = [""]
    if array.dtype.kind not in "US" or not all(text.strip() and printable(text) == text for text in texts):
        raise BadInput(f"{path} holds {name}, which has to be names of classes, in printable Unicode.")
    return [naming.composed(text) for text in texts]


def mending(path: Path, arrays: Mapping[str, np.ndarray], changes: Mapping[str, str]) -> str:
    """The sentence about arrays that one line of numpy turns into those that are read."""
    same = {change: tuple(name for name in changes if changes[name] == change) for change in changes.values()}
    first = {names[0]: arrays[names[0]] for names in same.values()}
    held = ", ".join(f"{name} of {a.dtype} {a.shape}, {a.min():.4g} ... {a.max():.4g}" for name, a in first.items())
    new = " | ".join(f"{{k: {change} for k in {names}}}" for change, names in same.items())
    mended = str(path.with_name(f"{path.stem}_mended.npz"))
    line = f"import numpy as np; z = np.load({str(path)!r}); np.savez({mended!r}, **(dict(z) | {new}))"
    return f"{path.name} holds {held}: this line writes an npz that is read: `{line}`"
