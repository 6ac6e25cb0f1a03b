"""Folders and npz as people have them: read as they are meant, and said so, or refused with the way out.

Rebuilt small from public reports. Each row is one kind of input; neighbouring rows are variations of one report.
"""

import contextlib
import dataclasses
import os
import re
import unicodedata

import numpy as np
import pytest
from conftest import record_of
from PIL import Image

from sdlab.data.datasets import dataset_facts, fetch_dataset, load_dataset
from sdlab.data.saved_images import save_dataset
from sdlab.errors import BadInput
from sdlab.runs.files import write_hashed_json
from sdlab.runs.records import record_path

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
TWO = ("cat", "dog")


def picture(label, index=0, size=16):
    """uint8 (size, size, 3): noise with a bright bar whose place is the class; different for every (label, index)."""
    pixels = np.random.default_rng([label, index]).integers(0, 100, (size, size, 3)).astype(np.uint8)
    pixels[:, 2 * (label % 8) : 2 * (label % 8) + 2] += 120
    return pixels


def mask(label, index=0):
    """uint8 (16, 16) of 0 and 255."""
    return (picture(label, index)[..., 0] > 90).astype(np.uint8) * 255


def deep(factor):
    """uint16 (16, 16): a grey picture whose values are multiplied."""
    return lambda label, index: picture(label, index)[..., 0].astype(np.uint16) * factor


def images(folder, *names, of=picture, count=6, start=0, file="{:03d}.png"):
    """A subfolder a name, with images of the class that its place among the names gives."""
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(start, start + count):
            Image.fromarray(of(label, index)).save(folder / name / file.format(index))
    return folder


def splits(*names, classes=TWO):
    """Of a folder: these splits with these classes, 10 images a class in the first split, 6 in the others."""
    return lambda f: [
        images(f / name, *classes, count=6 if i else 10, start=100 * i) and None for i, name in enumerate(names)
    ]


def cat_and_dog(*more, classes=TWO):
    """Of a folder: classes, and more that is done to it."""
    return lambda f: (images(f, *classes), [change(f) for change in more])


def add(*names, **kinds):
    return lambda f: images(f, *names, **kinds)


def write(name, content=b"x"):
    def make(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return make


def link(name, target="/mnt/not_mounted/x"):
    def make(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(str(target).format(folder))

    return make


def every(pattern, change):
    """Of a folder: the same to all these files, given from the folder."""
    return lambda f: [change(path.relative_to(f))(f) for path in sorted(f.glob(pattern))]


def load(settings, path, **more):
    return load_dataset(dataclasses.replace(settings, dataset=str(path), image_size=16, **more))


# ------------------------------------------------------------------------------------------------- folders, read

PLAIN = [12, 12]  # images of cat and of dog, in all splits together
SPLITS = {"train": [10, 10], "test": [6, 6]}  # before validation images are drawn
READ = {  # name -> (what makes the folder, images a class, what is said)
    **{
        f"splits {names}": (splits(*names), [10 + 6 * (len(names) - 1)] * 2, None)
        for names in (
            ("training_set", "test_set"), ("train_images", "test_images"), ("Training", "Testing"), ("train", "dev", "test"),
            ("TRAIN", "VALID", "TEST"), ("trainset", "valset", "testset"), ("TrainImages", "ValidationImages", "TestImages"),
            ("train-data", "eval-data"), ("01_train", "02_val", "03_test"), ("asl_alphabet_train", "asl_alphabet_test"),
            ("training", "validation", "evaluation"), ("images train", "images holdout"),
            ("seg_train/seg_train", "seg_test/seg_test"), ("train/images", "test/images"),
        )
    },
    "a class called train": (add("bus", "car", "train"), [6] * 3, r"train/ is read as a class, as bus, car next to it"),
    "a class called train in splits": (splits("train", "test", classes=("bus", "train")), [16, 16], None),
    "a table next to the splits": (lambda f: (splits("train", "test")(f), write("labels.csv")(f)), [16, 16], None),
    **{
        f"left by a system: {name}": (
            cat_and_dog(add(name, f"cat/{name}", f"cat/more/{name}", start=50), classes=TWO), [6, 6],
            rf"3 hidden or system files or folders were left out: .*cat/more/{re.escape(name)}"
        )
        for name in (".ipynb_checkpoints", "@eaDir", "__MACOSX", "$RECYCLE.BIN", "System Volume Information", "lost+found",
                     "#recycle", ".thumbnails", ".Trash-1000")
    },
    "left by a system: files": (
        cat_and_dog(write("cat/Thumbs.db"), write(".DS_Store"), write("dog/._000.png")), [6, 6], r"3 hidden or system files"
    ),
    "masks in a folder": (lambda f: (add("A/images", "B/images")(f), add("A/masks", "B/masks", of=mask)(f)), [6, 6], r"12 masks.* named like images next to them: A/masks/000.png"),
    "masks below the images": (cat_and_dog(add("cat/Mask", of=mask)), [6, 6], r"6 masks"),
    "masks of another format": (cat_and_dog(add("cat/ground truth", of=mask, file="{:03d}.bmp")), [6, 6], r"6 masks"),
    "masks with many values": (cat_and_dog(add("cat/segmentation", start=0, of=lambda c, i: picture(c, i + 50))), [6, 6], r"6 masks"),
    "masks with a suffix": (cat_and_dog(add("cat", of=mask, file="{:03d}_mask.png")), [6, 6], r"6 masks"),
    "masks with a prefix": (lambda f: (add("A/img", "B/img", file="img_{}.png")(f), add("A/seg", "B/seg", of=mask, file="seg_{}.png")(f)), [6, 6], r"12 masks"),
    "masks, several of an image": (cat_and_dog(add("dog", of=mask, file="{:03d}_mask_1.png"), add("dog", of=mask, file="{:03d}_mask.png")), [6, 6], r"12 masks"),
    "masks under no usual name": (cat_and_dog(add("cat/b", of=mask)), [6, 6], r"6 images were left out as masks: they have few values"),
    "masks that only the format tells": (cat_and_dog(add("cat", of=mask, file="{:03d}.bmp")), [6, 6], r"6 images were left out as masks"),
    "thumbnails in a folder": (cat_and_dog(add("cat/thumbs", of=lambda c, i: picture(c, i)[::2, ::2])), [6, 6], r"6 masks, annotations or thumb"),
    "copies under no usual name": (cat_and_dog(add("cat/b", of=lambda c, i: picture(c, i + 50))), [12, 6], r"6 images have the name of another: if they are copies"),
    "faces with masks": (add("with_mask", "without_mask"), [6, 6], None),
    "drawings in black and white": (add("cat", "dog", of=mask), [6, 6], r"The images use 2 of 256 values"),
    "links that lead nowhere": (cat_and_dog(*(link(f"cat/{i:03d}.png") for i in range(3))), [3, 6], r"3 unreadable files were left out: cat/000.png \(a link that leads nowhere\)"),
    "a linked folder that is gone": (cat_and_dog(link("cat/more")), [6, 6], r"1 files or folders give no image: cat/more \(a link that leads"),
    "a linked folder": (lambda f: (cat_and_dog()(f), images(f.parent / "elsewhere", "dogs", start=50), link("dog/more", "../../elsewhere/dogs")(f)), [6, 12], None),
    "a pipe": (cat_and_dog(lambda f: os.mkfifo(f / "cat" / "pipe.png")), [6, 6], r"cat/pipe.png \(a pipe or device\)"),
    "an empty class": (cat_and_dog(lambda f: (f / "emu/deep").mkdir(parents=True)), [6, 6], r"1 files or folders give no image: emu/ \(is empty\)"),
    "a class of hidden files": (cat_and_dog(write("emu/.DS_Store")), [6, 6], r"emu/ \(is empty\)"),
    "one subfolder each": (add("cat/raw", "dog/raw"), [6, 6], None),
    "numbers": (add(*map(str, range(12)), count=4), [4] * 12, None),
    "one name in two forms, a split each": (lambda f: (images(f / "train", DECOMPOSED, "dog"), images(f / "test", COMPOSED, "dog", start=9)), [12, 12], None),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_a_folder_is_read_as_it_is_meant(settings, tmp_path, name):
    make, counts, said = READ[name]
    make(tmp_path / "mine")
    data = load(settings, tmp_path / "mine")
    assert np.sum([*data.counts().values()], axis=0).tolist() == counts
    assert re.search(said, "\n".join(data.findings())) if said else not data.remarks, data.remarks
    assert str(tmp_path) not in "\n".join(data.findings())  # findings are published with the notebooks


@pytest.mark.parametrize(
    ("names", "ordered"),
    [
        (map(str, range(12)), [*map(str, range(12))]),
        (["10", "2", "-1"], ["-1", "2", "10"]),
        (["b", "10", "2"], ["10", "2", "b"]),
    ],
)
def test_names_that_are_all_whole_numbers_are_ordered_as_numbers(settings, tmp_path, names, ordered):
    assert [*load(settings, images(tmp_path / "mine", *names)).class_names] == ordered


# ---------------------------------------------------------------------------------------------- folders, refused


def billion_links(folder):
    """Eight folders, each with ten links to the one before: a hundred million paths to one image."""
    images(folder, *TWO)
    for level in range(1, 9):
        (folder.parent / f"level{level}").mkdir()
        for number in range(10):
            target = folder.parent / f"level{level - 1}" if level > 1 else folder / "dog"
            (folder.parent / f"level{level}" / str(number)).symlink_to(target)
    (folder / "cat" / "more").symlink_to(folder.parent / "level8")


REFUSED = {  # name -> (what makes the folder, what is said)
    "splits under other names": (splits("lernen", "pruefen"), r"lernen, pruefen, which hold no images but the same subfolders \(cat, dog\): splits have to be named train"),
    "splits under other names, uneven": (lambda f: (images(f / "a", "cat", "dog", "emu"), images(f / "b", *TWO)), r"a, b, which hold no images but the same subfolders"),
    "folds": (splits("fold1", "fold2", "fold3"), r"which hold no images but the same subfolders"),
    "splits inside the classes": (lambda f: images(f, "cat/train", "cat/test", "dog/train"), r"cat, dog, which hold no images but the same subfolders \(train\): splits .* outside the classes"),
    "a split next to others": (splits("train", "test", "unlabelled"), r"test, train, read as splits, and next to them unlabelled, .*`exclude: unlabelled`"),
    "annotations next to splits": (lambda f: (splits("train", "test")(f), write("annotations/x.xml")(f)), r"`exclude: annotations`"),
    "a prediction set next to splits": (lambda f: (splits("seg_train", "seg_test")(f), images(f, "seg_pred")), r"`exclude: seg_pred`"),
    "two of one split": (splits("train", "val", "valid"), r"train, val, valid, of which two name the same split"),
    "classes called valid and invalid": (add("valid", "invalid"), r"valid, read as splits, and next to them invalid, which names no split: rename"),
    "splits without classes": (add("train", "test"), r"12 images in no class .*: give a folder with one subfolder per class"),
    "one level too deep": (add("pets/cat", "pets/dog"), r"one class only; if its classes or splits are cat, dog, give .*mine/pets as `dataset`"),
    "two levels too deep": (add("a/b/cat", "a/b/dog"), r"give .*mine/a/b as `dataset`"),
    "splits one level too deep": (lambda f: (splits("pets/train", "pets/test")(f), write("readme.txt")(f)), r"give .*mine/pets as `dataset`"),
    "one level too high": (lambda f: images(f.parent, "mine"), r"6 images in no class \(if they are one, give its parent folder\)"),
    "images and masks, each with the classes": (lambda f: (images(f / "images", *TWO), images(f / "masks", *TWO, of=mask)), r"images, masks, which hold no images but the same subfolders"),
    "a class of masks": (cat_and_dog(add("masks", of=mask)), r"class `masks` of .* a few values only, as masks do: leave it out by the setting `exclude: masks`"),
    "HEIC": (cat_and_dog(*(write(f"emu/{i}.HEIC") for i in range(9))), r"class `emu` of .* has 9 files and no image .*emu/0.HEIC is none of PNG, .*: convert.*`exclude: emu`"),
    "no suffix": (cat_and_dog(write("emu/000")), r"class `emu` of .* has 1 files and no image .*emu/000 is none of PNG"),
    "notes only": (cat_and_dog(write("docs/notes.txt")), r"class `docs` of .* `exclude: docs`"),
    "cut files": (cat_and_dog(add("emu"), every("emu/*", lambda p: lambda f: (f / p).write_bytes((f / p).read_bytes()[:60]))), r"class `emu` .* no image that can be read \(emu/000.png: .*\): convert.*`exclude: emu`"),
    "cut files of a split": (lambda f: (splits("train", "test")(f), every("test/dog/*", write)(f)), r"class `dog` .* has 6 files and no image .*test/dog/100.png: cannot identify"),
    "a class of links that lead nowhere": (cat_and_dog(add("emu"), every("emu/*", link)), r"class `emu` .* \(emu/000.png: a link that leads nowhere\): .*`exclude: emu`"),
    "a linked class that is gone": (cat_and_dog(link("emu")), r"mine/emu is a link that leads nowhere, where a class is expected: .*`exclude: emu`"),
    "a linked split that is gone": (lambda f: (splits("train", "test")(f), link("val")(f)), r"mine/val is a link that leads nowhere"),
    "a ring": (cat_and_dog(link("cat/up", "..")), r"mine/cat/up is a link to a folder that holds it, or"),
    "a ring of two": (cat_and_dog(link("cat/a", "{}/dog"), link("dog/b", "{}/cat")), r"cat/a/b is a link to a folder that holds it"),
    "a link to everything": (cat_and_dog(link("cat/all", "/")), r"mine/cat/all is a link to a folder that holds it"),
    "a billion links": (billion_links, r"cat/more/0/.* is a link to a folder that holds it, or that is linked over and over"),
    "twins by case": (add("Cat", "cat", "dog"), r"has the classes 'Cat' and 'cat', which differ only in case"),
    "twins by case, a split each": (lambda f: (images(f / "train", "Cat", "dog"), images(f / "test", "cat", "dog")), r"has the classes '[Cc]at' and '[Cc]at', which"),
    "twins by form": (add(DECOMPOSED, COMPOSED, "tea"), r"has the classes 'cafe\\u0301' and 'caf\\xe9', which differ only in"),
    "twins by space": (add("cat", "cat ", "dog"), r"has the classes 'cat' and 'cat ', which"),
    "twins by nothing that shows": (add("cat", "cat\u200b", "dog"), r"has the classes 'cat' and 'cat\\u200b', which"),
    "dark": (add(*TWO, of=lambda c, i: picture(c, i) // 20), r"pixels of .*mine run from 0 to 10, where 0 ... 255 are expected"),
    "zero and one": (add(*TWO, of=lambda c, i: mask(c, i) // 255), r"pixels of .*mine run from 0 to 1, where"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_of_doubtful_meaning_gets_one_sentence(settings, tmp_path, name):
    make, said = REFUSED[name]
    make(tmp_path / "mine")
    with pytest.raises(BadInput, match=said) as refused:
        load(settings, tmp_path / "mine")
    assert "\n" not in str(refused.value) and not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------------------------ exclude


@pytest.mark.parametrize(
    ("exclude", "counts", "said"),
    [
        ("emu, hot dog", [6, 6, 6], "2 files or folders were left out by `exclude`: emu, hot dog"),
        ('"a, b", emu,', [6, 6, 6], "2 files"),
        ("hot dog/00[0-2].png, [ae]*", [6, 6, 3], "5 files"),
        ("*/000.png", [5, 5, 5, 5, 5], "5 files"),
        (f"{COMPOSED}, emu/", [6, 6, 6, 6], "2 files"),
    ],
)
def test_exclude_leaves_out_names_and_patterns(settings, tmp_path, exclude, counts, said):
    mine = images(tmp_path / "mine", "cat", "dog", "hot dog", "emu", "a, b")
    if COMPOSED in exclude:
        images(mine, DECOMPOSED)
    data = load(settings, mine, exclude=exclude)
    assert np.sum([*data.counts().values()], axis=0).tolist() == counts
    assert said in "\n".join(data.remarks)


def test_an_exclude_that_leaves_nothing_out_is_refused(settings, tmp_path):
    np.savez(tmp_path / "mine.npz", **arrays())
    images(tmp_path / "mine", *TWO)
    with pytest.raises(
        BadInput, match=r"`exclude` names 'emus', which matches nothing in .*mine: correct or remove it"
    ):
        load(settings, tmp_path / "mine", exclude="cat, emus")
    for path in (tmp_path / "mine.npz", "digits"):
        with pytest.raises(BadInput, match=r"`exclude` is 'cat', but `dataset` .* is no folder: remove it"):
            load(settings, path, exclude="cat")


# -------------------------------------------------------------------------------------------------------- depth


@pytest.mark.parametrize(("factor", "bits"), [(1, 8), (4, 10), (16, 12), (64, 14), (257, 16)])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_files_are_scaled_by_the_bits_that_the_whole_set_uses(settings, tmp_path, factor, bits, suffix):
    mine = images(tmp_path / "mine", *TWO, of=deep(factor), file=f"{{}}.{suffix}")
    Image.fromarray(np.full((16, 16), 3, np.uint16)).save(mine / "cat" / "dark.png")  # never an image at a time
    data = load(settings, mine)
    scale = 255 / (2**bits - 1)
    for name, _, split in data.files:
        original = np.asarray(Image.open(mine / name)) * scale
        row = [file for file, _, s in data.files if s == split].index(name)
        assert np.abs(data.splits[split].images[row] - original).max() <= 0.5
    assert f"13 of the images: each has 16-bit pixels, scaled from 0 ... {2**bits - 1} to 0 ... 255" in "\n".join(
        data.remarks
    )
    first = data.training_images([0], 16)[0]
    assert np.array_equal(first, data.train.images[0])  # the base model sees the same scale


def test_a_set_of_little_contrast_is_read_and_said(settings, tmp_path):
    dim = images(tmp_path / "dim", *TWO, of=lambda c, i: picture(c, i) // 6)
    hot = images(
        tmp_path / "hot", *TWO, of=lambda c, i: np.where(np.arange(256).reshape(16, 16) == i, 65535, deep(16)(c, i))
    )
    assert "99.8 % of all pixels are within 0 ... 36 of 0 ... 255" in "\n".join(load(settings, dim).findings())
    assert "The images use 16 of 256 values" in "\n".join(load(settings, hot).findings())


# ---------------------------------------------------------------------------------------------------------- npz


def arrays(
    images=lambda a: a,
    labels=lambda a: a,
    names=("train_images", "train_labels", "val_images", "val_labels", "test_images", "test_labels"),
):
    """24 / 8 / 8 images of three classes in MedMNIST's layout, changed by the two functions, under these names."""
    made = []
    for place, count in enumerate((24, 9, 9)[: len(names) // 2]):
        label = np.arange(count) % 3
        made += [images(np.stack([picture(c, 1000 * place + i) for i, c in enumerate(label)])), labels(label[:, None])]
    return dict(zip(names, made, strict=True))


NPZ = {  # name -> (arrays, the classes, what is said)
    "one channel": (arrays(lambda a: a[..., :1]), "012", None),
    "names for labels": (arrays(labels=lambda a: np.array(["emu", "cat", "dog"])[a[:, 0]]), ("cat", "dog", "emu"), None),
    "bytes for labels": (arrays(labels=lambda a: np.array([b"10", b"9", b"8"])[a]), ("8", "9", "10"), None),
    "class names": (arrays() | dict(class_names=np.array(["emu", "cat", "dog"])), ("emu", "cat", "dog"), None),
    "no validation": (arrays(names=("train_images", "train_labels", "test_images", "test_labels")), "012", None),
    "Keras": (arrays(names=("x_train", "y_train", "x_test", "y_test")), "012", None),
    "Keras, more": (arrays(names=("X_train", "Y_train", "X_valid", "Y_valid", "X_test", "Y_test")), "012", None),
    "no split": (arrays(names=("images", "labels")), "012", None),
    "data and targets": (arrays(names=("train_data", "train_targets", "test_data", "test_targets")), "012", None),
    "more arrays": (arrays() | dict(about=np.array("x"), ids=np.arange(3)), "012", r"2 other arrays are not read: about, ids"),
    "dim": (arrays(lambda a: a // 6), "012", r"99.8 % of all pixels are within 0 ... 36"),
}  # fmt: skip


@pytest.mark.parametrize("name", NPZ)
def test_an_npz_is_read_as_it_is_meant(settings, tmp_path, name):
    given, classes, said = NPZ[name]
    np.savez(tmp_path / "mine.npz", **given)
    data = load(settings, tmp_path / "mine.npz")
    assert data.class_names == tuple(classes) and min(map(len, data.splits.values())) >= 3
    total = sum(len(array) for key, array in given.items() if array.ndim > 2)
    assert sum(map(len, data.splits.values())) == total == len(set(data.files))
    assert re.search(said, "\n".join(data.findings())) if said else not data.remarks
    for split, rows in data.splits.items():  # pixels and class names stay together
        for image, label, (file, class_name, _) in zip(
            rows.images, rows.labels, [e for e in data.files if e.split == split], strict=True
        ):
            array, index = file.rstrip("]").split("[")
            assert np.array_equal(image, np.broadcast_to(given[array][int(index)], (16, 16, 3)).transpose(2, 0, 1))
            assert data.class_names[label] == class_name


def ones(a):
    return (a > 90).astype(np.uint8)


MENDED = {  # name -> (arrays, how exact the mended pixels are, the arrays that are meant)
    "channels first": (arrays(lambda a: a.transpose(0, 3, 1, 2)), 0, arrays()),
    "channels first, one": (arrays(lambda a: a[..., :1].transpose(0, 3, 1, 2)), 0, arrays(lambda a: a[..., :1])),
    "four channels": (arrays(lambda a: a[..., [0, 1, 2, 0]]), 0, arrays()),
    "floats to 1": (arrays(lambda a: (a / 255).astype(np.float32)), 0, arrays()),
    "floats to 255": (arrays(lambda a: a.astype(np.float64)), 0, arrays()),
    "floats from -1 to 1, channels first": (arrays(lambda a: (a / 127.5 - 1).astype(np.float32).transpose(0, 3, 1, 2)), 0, arrays()),
    "floats, standardised": (arrays(lambda a: ((a - 80.0) / 60).astype(np.float16)), 1, arrays(lambda a: np.round(a * (255 / 219)))),
    "uint16": (arrays(lambda a: a.astype(np.uint16) * 257), 0, arrays()),
    "uint16 of 12 bits": (arrays(lambda a: a.astype(np.uint16) * 16), 1, arrays()),
    "int64": (arrays(lambda a: a.astype(np.int64)), 0, arrays()),
    "int8": (arrays(lambda a: (a.astype(int) - 128).astype(np.int8)), 1, arrays(lambda a: np.round(a * (255 / 219)))),
    "booleans": (arrays(lambda a: a > 90), 0, arrays(lambda a: ones(a) * 255)),
    "zero and one": (arrays(ones), 0, arrays(lambda a: ones(a) * 255)),
    "zero and one, as int32": (arrays(lambda a: ones(a).astype(np.int32)), 0, arrays(lambda a: ones(a) * 255)),
    "one-hot": (arrays(labels=lambda a: np.eye(3)[a[:, 0]]), 0, arrays()),
    "labels from 1": (arrays(labels=lambda a: (a + 1).astype(np.uint8)), 0, arrays()),
    "labels with gaps": (arrays(labels=lambda a: np.array([-1, 5, 40])[a]), 0, arrays()),
    "labels as floats": (arrays(labels=lambda a: a.astype(np.float32)), 0, arrays()),
    "all at once": (arrays(lambda a: (a / 255).transpose(0, 3, 1, 2), lambda a: a[:, 0] + 1.0, ("x_train", "y_train", "x_test", "y_test")), 0, arrays(names=("x_train", "y_train", "x_test", "y_test"))),
}  # fmt: skip


@pytest.mark.parametrize("name", MENDED)
def test_an_npz_that_a_line_of_numpy_mends_is_refused_with_that_line(settings, tmp_path, name):
    given, exact, meant = MENDED[name]
    np.savez(tmp_path / "it's mine.npz", **given)
    with pytest.raises(
        BadInput, match=r"^it's mine.npz holds .*: this line writes an npz that is read: `.*`$"
    ) as refused:
        load(settings, tmp_path / "it's mine.npz")
    exec(str(refused.value).split("`")[1], {})
    np.savez(tmp_path / "meant.npz", **{k: v.astype(np.uint8) if v.ndim > 2 else v for k, v in meant.items()})
    data, expected = load(settings, tmp_path / "it's mine_mended.npz"), load(settings, tmp_path / "meant.npz")
    for split, other in zip(data.splits.values(), expected.splits.values(), strict=True):
        assert np.array_equal(split.labels, other.labels)
        assert np.abs(split.images.astype(int) - other.images).max() <= exact


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (arrays() | dict(X_train=np.zeros(1)), r"has train_images and X_train, which name the same: leave one out"),
        (arrays(names=("val_images", "val_labels", "test_images", "test_labels")), r"has no train_images, train_labels: it needs"),
        (arrays() | dict(class_names=np.array(["cat", "dog"])), r"has the labels \[0, 1, 2\]: they have to be 0, 1"),
        (arrays() | dict(class_names=np.arange(3)), r"holds class_names, which has to be names of classes"),
        (arrays(labels=lambda a: np.array(["cat", "dog", "a\nb"])[a]), r"holds train_labels, which has to be names of classes"),
        (arrays(labels=lambda a: np.array(["cat", "Cat", "dog"])[a]), r"has the classes 'Cat' and 'cat', which differ only"),
        (arrays(labels=lambda a: np.full((len(a), 3), 1)), r"holds train_labels of int64 \(24, 3\): one label an image is needed"),
        (arrays(labels=lambda a: a / 2), r"holds train_labels of float64 \(24, 1\): one label an image"),
        (arrays(lambda a: np.full(a.shape, np.nan)), r"holds pixels from nan to nan, which show nothing: it needs"),
        (arrays(lambda a: a * 0), r"holds pixels from 0 to 0, which show nothing"),
        (arrays(lambda a: a[..., :2]), r"holds train_images of uint8 \(24, 16, 16, 2\): it needs"),
        (arrays(lambda a: a.astype("U3")), r"holds train_images of <U3 \(24, 16, 16, 3\): it needs"),
    ],
)  # fmt: skip
def test_an_npz_of_doubtful_meaning_gets_one_sentence(settings, tmp_path, given, said):
    np.savez(tmp_path / "mine.npz", **given)
    with pytest.raises(BadInput, match=said) as refused:
        load(settings, tmp_path / "mine.npz")
    assert "\n" not in str(refused.value)


# ------------------------------------------------------------------------------------------------ moved and gone


def saved(settings, path):
    """These settings, and the set that a finished stage 00 saw and saved."""
    ours = dataclasses.replace(settings, dataset=str(path))
    data = load_dataset(ours)
    save_dataset(ours, data)
    write_hashed_json(
        record_path(ours, "00"),
        record_of(settings=ours.of_stage("00"), inputs=dict(data=data.fingerprint(), base_model="x")),
    )
    return ours, data


@pytest.mark.parametrize("kind", ["folder", "npz", "npz of the classifier's size"])
def test_content_names_a_data_set_and_not_its_path(settings, tmp_path, kind, capsys):
    path = tmp_path / "mine"
    if kind == "folder":
        images(path, *TWO)
    else:
        size = 8 if "size" in kind else 16
        np.savez(path := tmp_path / "mine.npz", **arrays(lambda a: a[:, :size, :size]))
    ours, data = saved(settings, path)
    seen = data.training_images(range(2), ours.base_image_size)
    moved = path.rename(path.with_name(f"moved{path.suffix}"))
    there = dataclasses.replace(ours, dataset=str(moved))
    assert load_dataset(there).fingerprint() == data.fingerprint()  # the same content at another path
    for settings in (ours, dataclasses.replace(ours, dataset="/mnt/not_mounted/mine")):
        fetch_dataset(settings)
        gone = load_dataset(settings)
        assert "the copy of stage 00 is used" in capsys.readouterr().err
        assert gone.fingerprint() == data.fingerprint() and gone.findings() == data.findings()
        assert gone.class_names == data.class_names and gone.files == data.files and gone.name == "mine"
        assert np.array_equal(gone.training_images(range(2), ours.base_image_size), seen)  # which notebook 00 shows
        last = [len(data.train) - 1]
        with (
            pytest.raises(BadInput, match=r"original images are needed at 64 pixels.*give their new place")
            if "size" not in kind
            else contextlib.nullcontext()
        ):
            gone.training_images(last, 64)
    if kind == "folder":
        path.mkdir()  # where a disk is not mounted
        assert load_dataset(ours).fingerprint() == data.fingerprint()
        path.rmdir()
    for other in (dict(image_size=16), dict(experiment="another"), dict(val_share=0.2)):
        with pytest.raises(BadInput, match=r"`dataset` is .* nor a path that exists"):
            load_dataset(dataclasses.replace(ours, **other))
        with pytest.raises(BadInput, match=r"`dataset` is .* nor a path that exists"):
            fetch_dataset(dataclasses.replace(ours, **other))


def test_a_folder_with_other_content_is_read_whatever_stage_00_saved(settings, tmp_path):
    ours, _ = saved(settings, images(tmp_path / "mine", *TWO))
    images(tmp_path / "mine", "emu")
    assert load_dataset(ours).num_classes == 3 and dataset_facts(ours).num_classes == 3
