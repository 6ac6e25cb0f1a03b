"""Your own images: every kind of file, splits that are stratified and saved, and one sentence for what cannot work."""

import csv
import dataclasses
import os

import numpy as np
import pytest
from make_data import pictures, write_folder
from PIL import Image

from sdlab.data.datasets import dataset_facts, load_dataset
from sdlab.data.image_decoding import read_image
from sdlab.data.saved_images import images_file, save_dataset
from sdlab.errors import BadInput


def load(settings, folder, **more):
    return load_dataset(dataclasses.replace(settings, dataset=str(folder), **more))


# --------------------------------------------------------------------------------------------------- one image


def gradient() -> np.ndarray:
    """uint8 (16, 16): dark at the left, bright at the right."""
    return np.tile(np.linspace(0, 255, 16).astype(np.uint8), (16, 1))


def kinds():
    """name -> (image, how to save it)."""
    grey = Image.fromarray(gradient())
    rgb = Image.merge("RGB", (grey, grey, grey))
    sixteen = Image.fromarray(gradient().astype(np.uint16) * 257)
    palette = Image.fromarray(gradient())
    palette.putpalette([v for i in range(256) for v in (i, i, i)])
    rgba = rgb.copy()
    rgba.putalpha(255)
    return {
        "grey": (grey, "PNG"), "RGB": (rgb, "PNG"), "RGBA": (rgba, "PNG"), "grey with alpha": (rgba.convert("LA"), "PNG"),
        "palette": (palette, "PNG"), "GIF": (palette, "GIF"), "CMYK": (rgb.convert("CMYK"), "TIFF"),
        "16-bit PNG": (sixteen, "PNG"), "16-bit TIFF": (sixteen, "TIFF"), "BMP": (rgb, "BMP"),
        "32-bit that holds 16": (Image.fromarray(gradient().astype(np.int32) * 257), "TIFF"),
    }  # fmt: skip


@pytest.mark.parametrize("name", kinds())
def test_every_kind_of_image_shows_the_same_picture(tmp_path, name):
    image, form = kinds()[name]
    path = tmp_path / f"x.{form.lower()}"
    image.save(path, form)
    pixels = read_image(path, 16).pixels
    assert pixels.shape == (3, 16, 16) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - gradient()[None]).max() <= 2


def test_exif_rotation_is_applied(tmp_path):
    image, exif = Image.fromarray(gradient()).convert("RGB"), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: what was at the left is at the top
    image.save(tmp_path / "x.png", exif=exif)
    pixels = read_image(tmp_path / "x.png", 16).pixels
    assert np.array_equal(pixels[0], np.rot90(gradient(), -1))


def test_transparent_pixels_become_white(tmp_path):
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png", 8).pixels.min() == 255


def test_the_centre_square_is_taken_and_large_images_are_antialiased(tmp_path):
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = np.indices((40, 40)).sum(0)[..., None] % 2 * 255  # a checkerboard in the middle third
    Image.fromarray(wide).save(tmp_path / "x.png")
    read = read_image(tmp_path / "x.png", 10)
    assert np.abs(read.pixels[:, :, 1:-1].astype(int) - 128).max() < 3  # no checkerboard's alias
    assert read.pixels.min() > 100  # and no black borders
    assert any("not square" in trait for trait in read.traits)


def test_floating_point_pixels_are_unreadable(tmp_path):
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "x.tiff")
    with pytest.raises(ValueError, match="floating-point"):
        read_image(tmp_path / "x.tiff", 8)


# ---------------------------------------------------------------------------------------------------- a folder


def test_a_folder_is_split_70_10_20_in_every_class(settings, tmp_path):
    folder = write_folder(tmp_path / "pets", 20, ("cat", "dog", "emu"))
    write_folder(folder, 40, ("fox",))
    data = load(settings, folder)
    assert data.counts() == {"train": [14, 14, 14, 28], "val": [2, 2, 2, 4], "test": [4, 4, 4, 8]}
    assert data.class_names == ("cat", "dog", "emu", "fox") and data.name == "pets" and data.image_size == 8
    assert load(settings, folder).fingerprint() == data.fingerprint()
    assert len({name for name, _, _ in data.files}) == 100


def test_splits_that_are_there_stay(settings, tmp_path):
    folder = write_folder(tmp_path / "x", 10, split="train")
    write_folder(folder, 4, split="valid")
    write_folder(folder, 6, split="test")
    data = load(settings, folder)
    assert data.counts() == {"train": [10, 10], "val": [4, 4], "test": [6, 6]}
    assert all(name.startswith({"train": "train", "val": "valid", "test": "test"}[s]) for name, _, s in data.files)


def test_a_missing_validation_split_is_drawn_from_train(settings, tmp_path):
    folder = write_folder(write_folder(tmp_path / "x", 20, split="train"), 5, split="test")
    assert load(settings, folder).counts() == {"train": [18, 18], "val": [2, 2], "test": [5, 5]}


def test_equal_images_do_not_cross_drawn_splits(settings, tmp_path):
    folder = write_folder(tmp_path / "x", 10)
    for copy in range(3):
        for name in ("cat", "dog"):
            for path in sorted((folder / name).glob("???.png")):
                (path.parent / f"copy{copy}_{path.name}").write_bytes(path.read_bytes())
    data = load(settings, folder)
    assert not [line for line in data.findings() if "more than one split" in line]
    assert sum(len(s) for s in data.splits.values()) == 80


def test_it_says_what_it_found(settings, tmp_path):
    folder = write_folder(write_folder(tmp_path / "x", 20, ("cat",), "train", size=24), 8, ("dog",), "train")
    write_folder(write_folder(folder, 4, split="test"), 4, split="val")
    (folder / "test/cat/again.png").write_bytes((folder / "train/cat/000.png").read_bytes())
    (folder / "train/dog/broken.png").write_bytes(b"\x89PNG no more")
    (folder / "train/dog/cut.png").write_bytes((folder / "train/dog/001.png").read_bytes()[:200])
    (folder / "train/dog/notes.txt").write_text("hello")
    (folder / "train/emu").mkdir()
    Image.new("RGB", (30, 20)).save(folder / "train/dog/wide.png")
    said = "\n".join(load(settings, folder).findings())
    assert "29 / 8 / 9 images" in said
    assert "Imbalanced: 20 training images of `cat`, 9 of `dog`" in said
    assert "1 images are, pixel for pixel, in more than one split (1 of them in test)" in said
    assert "2 unreadable files were left out: train/dog/broken.png (" in said and "train/dog/cut.png (" in said
    assert "2 files or folders give no image: train/dog/notes.txt, train/emu/ (is empty)" in said
    assert "1 of the images: each is not square" in said and "train/dog/wide.png" in said
    assert str(tmp_path) not in said  # findings are published with the notebooks


def test_loose_images_are_named(settings, tmp_path):
    folder = write_folder(tmp_path / "x", 10)
    Image.new("RGB", (9, 9)).save(folder / "loose.png")
    assert "loose.png (in no class)" in "\n".join(load(settings, folder).findings())


def test_file_names_that_are_no_utf8_or_hold_quotes_are_kept(settings, tmp_path):
    folder = write_folder(tmp_path / "x", 10)
    for index, name in enumerate((b"caf\xe9.png", b'a"b,c.png')):
        (folder / "cat" / f"{index:03d}.png").rename(folder / "cat" / os.fsdecode(name))
    ours = dataclasses.replace(settings, dataset=str(folder))
    data = load_dataset(ours)
    save_dataset(ours, data)
    with images_file(ours).with_name("splits.csv").open(newline="", errors="surrogateescape") as file:
        assert sorted(map(tuple, list(csv.reader(file))[1:])) == sorted(data.files)
    assert load_dataset(ours).fingerprint() == data.fingerprint()


def test_a_damaged_copy_in_the_runs_folder_is_named(settings, tmp_path):
    ours = dataclasses.replace(settings, dataset=str(write_folder(tmp_path / "x", 10)))
    save_dataset(ours, load_dataset(ours))
    images_file(ours).write_bytes(images_file(ours).read_bytes()[:500])
    with pytest.raises(BadInput, match=r"images.npz cannot be read as npz .*: move it away"):
        load_dataset(ours)


def test_an_image_too_large_to_read_safely_is_unreadable(settings, tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "x", 10)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)
    Image.new("RGB", (31, 31)).save(folder / "cat" / "large.png")
    assert "cat/large.png (it has 31 x 31 pixels, more than 900)" in "\n".join(load(settings, folder).findings())


@pytest.mark.parametrize("size", [28, 32, 64])
def test_the_base_model_sees_the_files_and_not_the_classifiers_small_images(settings, tmp_path, size):
    folder = write_folder(tmp_path / "x", 10, size=100)
    data = load(settings, folder, image_size=size)
    assert data.image_size == size
    seen = data.training_images(range(3), 128)
    name = next(name for name, _, split in data.files if split == "train")
    assert seen.shape == (3, 3, 128, 128) and np.array_equal(seen[0], read_image(folder / name, 128).pixels)


def test_what_step_00_keeps_is_read_instead_of_the_files(settings, tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "x, y", 10)
    ours = dataclasses.replace(settings, dataset=str(folder))
    data = load_dataset(ours)
    save_dataset(ours, data)
    monkeypatch.setattr("sdlab.data.own_images.read_image", None)  # would fail if it read a file
    again = load_dataset(ours)
    assert again.fingerprint() == data.fingerprint() and again.findings() == data.findings()
    with images_file(ours).with_name("splits.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["file", "class", "split"] and sorted(map(tuple, rows[1:])) == sorted(data.files)
    monkeypatch.undo()
    (folder / "cat/000.png").unlink()
    assert load_dataset(ours).fingerprint() != data.fingerprint()  # a folder that changed is read anew


# ------------------------------------------------------------------------------------------------------ an npz


def arrays(**more):
    labels = np.arange(30) % 3
    given = {f"{s}_images": pictures(labels, 12, seed) for seed, s in enumerate(("train", "val", "test"))}
    return given | {f"{s}_labels": labels[:, None] for s in ("train", "val", "test")} | more


def test_an_npz_in_medmnists_layout(settings, tmp_path):
    """Grey or RGB; at the classifier's size for the classifier, at its own for the base model."""
    np.savez(tmp_path / "mine.npz", **arrays(train_images=arrays()["train_images"][..., 0]))
    data = load(settings, tmp_path / "mine.npz")
    assert data.name == "mine" and data.num_classes == 3 and data.image_size == 8
    native = data.training_images([4], 64)
    assert native.shape == (1, 3, 12, 12) and np.array_equal(native[0, 0], arrays()["train_images"][4, ..., 0])
    facts = dataset_facts(dataclasses.replace(settings, dataset=str(tmp_path / "mine.npz")))
    assert (facts.train, facts.val, facts.test, facts.num_classes) == (30, 30, 30, 3)
