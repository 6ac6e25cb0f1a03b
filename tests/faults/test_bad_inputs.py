"""Whatever a user can give wrong gets one sentence that names the thing and the way out, and leaves every file as it was.

Each row is the real command line. Notebooks run in this process, which spares a kernel's seconds; two rows start one.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import re
import shutil
import signal
import tempfile
import zipfile
import zlib
from dataclasses import dataclass

import in_process  # noqa: F401  (registers papermill's engine)
import numpy as np
import papermill
import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import BIN, SMOKE, command, shut_to_this_process
from fake_run import write_run
from make_data import write_folder
from PIL import Image
from safetensors.numpy import load_file, save_file
from test_own_images import arrays

from sdlab.runs.stages import STAGES
from sdlab.settings import Settings
from sdlab.tools.cli import cli

SECONDS, LONGEST = 30, 700  # of a row, and characters of a sentence


class World:
    """The folder of one test: a parameter file, and everything that it names."""

    def __init__(self, folder, base_folder):
        self.path, self.base_folder = folder, base_folder
        self.file = folder / "given.yaml"
        self.given = yaml.safe_load(SMOKE.read_text())
        self.given |= {name: str(folder / name) for name in ("runs_root", "reports_root", "data_root")}

    def parameters(self, **more):
        self.given |= more
        self.file.write_text(yaml.safe_dump({k: v for k, v in self.given.items() if v is not None}))

    def base(self):
        """A copy of a whole base model."""
        self.parameters(base_model=str(self.path / "base"), base_image_size=16)
        return shutil.copytree(self.base_folder, self.path / "base")

    def run(self):
        """A finished run."""
        self.parameters()
        return write_run(Settings.from_file(self.file))

    def listing(self):
        """Every file with its hash, every folder and every link."""
        found = {}
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path).as_posix()
            if path.is_symlink():
                found[name] = str(path.readlink())
            else:
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        return found


@dataclass(frozen=True)
class Row:
    name: str
    make: object  # of a World: makes what is wrong
    says: str  # the sentence, as a regular expression: the thing and the way out
    arguments: tuple = ("run", "{file}")
    code: int = 1  # 2: click's own errors, which begin with how the command is used
    kernel: bool = False  # in a process and a kernel of its own
    shut: bool = False  # what `make` gives is shut to this process


# ------------------------------------------------------------------------------------------------ parameters


def parameters(name, says, **more):
    return Row(f"parameter: {name}", lambda world: world.parameters(**more), says)


PARAMETERS = [
    parameters("unknown", r"`unet_epoch` is not a setting.* [dD]id you mean `unet_epochs`", unet_epoch=3),
    parameters("unknown, like nothing", r"`zzz` is not a setting: `sdlab settings` lists them", zzz=3),
    parameters("no experiment", r"name no `experiment`: a parameter file begins with `experiment", experiment=None),
    parameters("no dataset", r"name no `dataset`: a parameter file begins with `dataset", dataset=None),
    parameters("text for a number", r"`unet_learning_rate` is '1e-4' .* Write 0.0001 without", unet_learning_rate="1e-4"),
    parameters("text for a whole number", r"`seed` is '1e3' .* Write 1000 without quotes", seed="1e3"),
    parameters("fraction", r"`unet_epochs` is 2.5 .* has to be a whole number", unet_epochs=2.5),
    parameters("truth for a number", r"`unet_epochs` is True .* has to be a whole number", unet_epochs=True),
    parameters("number for a truth", r"`compile_unet` is 1 .* has to be true or false", compile_unet=1),
    parameters("list", r"`seed` is \[1, 2\] \(list\), but it has to be a whole number", seed=[1, 2]),
    parameters("long list", r"`seed` is \[0, 1, 2, .*\.\.\.\] \(list\), but it has to be", seed=list(range(3000))),
    parameters("dict for a text", r"`dataset` is \{'a': 1\} \(dict\), but it has to be a text", dataset={"a": 1}),
    parameters("negative", r"`seed` is -1: allowed is 0 to", seed=-1),
    parameters("zero", r"`search_min_inference_steps` is 0: allowed is 1 to 999", search_min_inference_steps=0),
    parameters("nan", r"`weight_decay` is nan, but it has to be finite", weight_decay=float("nan")),
    parameters("infinite", r"`max_grad_norm` is inf, but it has to be finite", max_grad_norm=float("inf")),
    parameters("huge", r"`unet_epochs` is 1000\S*: allowed is 1 to 2147483647", unet_epochs=10**30),
    parameters("huge for a fraction", r"`weight_decay` is inf, but it has to be finite", weight_decay=10**400),
    parameters("threads of a city", r"`num_threads` is 100000: allowed is 0 to 1024", num_threads=100_000),
    parameters("too large", r"`guidance_stop` is 1.5: allowed is 0.0 to 1.0", guidance_stop=1.5),
    parameters("choice", r"`protocol` is 'seald': allowed are .* Did you mean `sealed`", protocol="seald"),
    parameters("ragged rungs", r"scored at 30 images, .* choose `search_first_images`", search_first_images=30),
    parameters("rungs upside down", r"`search_first_images` is 60, more than `search_images`", search_first_images=60),
    parameters("epochs not trained", r"`search_1_min_epoch` .* will be epochs 1 to 2", search_1_max_epoch=9),
    parameters("guidance upside down", r"`guidance_start` is 0.9, above `guidance_stop`", guidance_start=0.9, guidance_stop=0.1),
    parameters("too few steps", r"`classifier_train_steps` is 1, fewer than the 2 validations", classifier_train_steps=1),
    parameters("experiment that is a path", r"`experiment` is '\.\.': it names a folder; use", experiment=".."),
    parameters("experiment with a slash", r"`experiment` is 'a/b': it names a folder; use", experiment="a/b"),
    parameters("experiment of 300 letters", r"`experiment` has 300 characters .*'xx.* at most 100 are allowed", experiment="x" * 300),
    parameters("two lines", r"`dataset` is 'a\\nb', which holds the character '\\n': give", dataset="a\nb"),
    parameters("zero byte", r"`runs_root` is .* holds the character '\\x00': give", runs_root="a\0b"),
    parameters("half a character", r"`reports_root` is .* holds the character '\\ud800': give", reports_root="a\ud800"),
    parameters("text of 5,000 letters", r"`dataset` has 5000 characters .*'xx.*: at most 1000 are allowed", dataset="x" * 5000),
    parameters("path of 400 letters", r"`dataset` is 'xx.*cannot be a path here \(File name too long\): give another", dataset="x" * 400),
    parameters("nobody's home", r"`data_root` is '~nobody-at-all/x', which cannot be a path .*: give another", data_root="~nobody-at-all/x"),
    parameters("unknown data set", r"`dataset` is 'digit', neither .* Did you mean `digits`", dataset="digit"),
    parameters("empty data set", r"`dataset` is empty: name a folder, an npz, or one of", dataset=" "),
    parameters("scheduler", r"`scheduler` is 'DDIM': it has to be the class name of a diffusers scheduler", scheduler="DDIM"),
    parameters("odd base size", r"`base_image_size` is 36: .* has to be a multiple of", base_image_size=36),
    parameters("device", r"`device` is 'tpu', which this machine does not have: .*`auto` takes the best", device="tpu"),
    parameters("device's number", r"`device` is 'cuda:99', which this machine does not have", device="cuda:99"),
]  # fmt: skip


def root_that_is_a_file(world):
    (world.path / "runs_root").write_text("mine")
    world.parameters()


def run_that_is_a_file(world):
    (world.path / "runs_root").mkdir()
    (world.path / "runs_root" / "smoke").write_text("mine")
    world.parameters()


def ring_of_links(world):
    (world.path / "ring").symlink_to(world.path / "ring")
    world.parameters(dataset=str(world.path / "ring"))


PARAMETERS += [
    Row(
        "parameter: root that is a file",
        root_that_is_a_file,
        r"`runs_root` is .*runs_root is not a folder: move it away",
    ),
    Row(
        "parameter: run that is a file",
        run_that_is_a_file,
        r"`runs_root` is .*runs_root/smoke is not a folder: move it",
    ),
    Row("parameter: ring of links", ring_of_links, r"`dataset` is .*ring'?, .*(can be no path|neither a known name)"),
]


# ----------------------------------------------------------------------------------------------------- YAML


def yaml_file(name, says, content):
    content = content if isinstance(content, bytes) else content.encode()
    return Row(f"YAML: {name}", lambda world: world.file.write_bytes(content), says)


START = "experiment: x\ndataset: digits\n"
LAUGHS = "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30))
MERGED = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 30))
YAML = [
    yaml_file("empty", r"given.yaml holds no settings: it needs lines", ""),
    yaml_file("list", r"given.yaml holds no settings: it needs lines", "- a\n- b\n"),
    yaml_file("number", r"given.yaml holds no settings: it needs lines", "7\n"),
    yaml_file("nothing", r"`weight_decay` is None \(NoneType\), but it has to be a number", START + "weight_decay:\n"),
    yaml_file("unclosed", r"given.yaml is not valid YAML at line 4: it holds lines of", START + "seed: [1\n"),
    yaml_file("tab", r"given.yaml is not valid YAML at line 3: it holds lines of", START + "\tseed: 1\n"),
    yaml_file("code", r"given.yaml is not valid YAML at line 3: it holds", START + "seed: !!python/object/apply:os.system ['touch x']\n"),
    yaml_file("name given twice", r"given.yaml is not valid YAML at line 4 \('seed' is given twice\)", START + "seed: 1\nseed: 2\n"),
    yaml_file("a billion laughs", r"given.yaml is not valid YAML at line 2 \(aliases, such as \*name, are not read\)", LAUGHS),
    yaml_file("a billion merges", r"given.yaml is not valid YAML at line 2 \(aliases, such as \*name, are not read\)", MERGED),
    yaml_file("list in itself", r"given.yaml is not valid YAML at line 3 \(aliases", START + "seed: &a [*a]\n"),
    yaml_file("deep", r"given.yaml is not valid YAML: it holds lines of", START + "seed: " + "[" * 20_000),
    yaml_file("30th of February", r"given.yaml is not valid YAML: it holds lines of", START + "seed: 2001-02-30\n"),
    yaml_file("number of 5,000 digits", r"given.yaml is not valid YAML: it holds lines of", START + f"seed: {'9' * 5000}\n"),
    yaml_file("number of 5,000 hexadecimal digits", r"`seed` is too long to be shown: allowed is 0 to", START + f"seed: 0x{'f' * 5000}\n"),
    yaml_file("date", r"`seed` is datetime.date\(2001, 2, 3\) \(date\), but it has to be a whole", START + "seed: 2001-02-03\n"),
    yaml_file("list for a name", r"given.yaml is not valid YAML at line 3: it holds", START + "? [a]\n: 1\n"),
    yaml_file("number for a name", r"`7` is not a setting: `sdlab settings` lists", START + "7: 1\n"),
    yaml_file("name of two lines", r"`'a\\nb'` is not a setting: `sdlab settings`", START + '"a\\nb": 1\n'),
    yaml_file("name of 10,000 letters", r"`'x+\.\.\.x+'` is not a setting", START + f"? {'x' * 10_000}\n: 1\n"),
    yaml_file("two documents", r"given.yaml is not valid YAML at line 3: it holds", START + "---\nseed: 1\n"),
    yaml_file("zero bytes", r"given.yaml is not valid YAML.*: it holds lines of", START + "seed: \0\n"),
    yaml_file("no UTF-8", r"given.yaml is no UTF-8 text: save it as UTF-8", START.encode() + b"storage: caf\xe9\n"),
    yaml_file("UTF-16", r"given.yaml is no UTF-8 text: save it as UTF-8", START.encode("utf-16")),
    yaml_file("binary", r"given.yaml is (no UTF-8 text|not valid YAML)", bytes(range(256)) * 10),
    yaml_file("megabytes", r"given.yaml has [\d,]+ bytes: .* 100,000 bytes at most", START + "# comment\n" * 200_000),
]  # fmt: skip


# --------------------------------------------------------------------------------------------------- folders


def folder(name, says, make, **kinds):
    def made(world):
        mine = world.path / "mine"
        mine.mkdir()
        make(mine)
        world.parameters(dataset=str(mine))

    return Row(f"folder: {name}", made, says, **kinds)


def all_images(change):
    """A folder of two classes whose images are all changed alike."""

    def make(mine):
        for path in sorted(write_folder(mine, 6).rglob("*.png")):
            change(path)

    return make


def mixed(mine):
    write_folder(write_folder(mine, 6), 6, split="train")


def loop_of_folders(mine):
    (write_folder(mine, 6) / "loop").symlink_to(mine)


def odd_class(mine):
    (write_folder(mine, 6) / "cat").rename(mine / "a\nb")


def lost_class(mine):
    (write_folder(mine, 6) / "emu").mkdir()
    for number in range(2):
        (mine / "emu" / f"{number}.heic").write_bytes(b"\0\0\0\x18ftypheic")


FOLDERS = [
    folder("empty", r"mine has 0 files, none of them an image that is read \(PNG, .*\): give a folder with one subfolder per class", lambda f: None),
    folder("no images", r"mine has 2 files, none of them an image that is read \(PNG, .*\): give a folder", all_images(lambda p: p.rename(p.with_suffix(".txt")) if "000" in p.name else p.unlink())),
    folder("images without a class", r"mine has 1 images in no class .*: give a folder with one subfolder per class", lambda f: Image.new("RGB", (9, 9)).save(f / "x.png")),
    folder("one class", r"mine has readable images of one class only \(`cat`\): a classifier needs two", lambda f: write_folder(f, 9, ("cat",))),
    folder("an empty class", r"mine has readable images of one class only .*: a classifier needs two", lambda f: (write_folder(f, 9, ("cat",)) / "dog").mkdir()),
    folder("one image a class", r"class `cat` of .*mine has 1 different .*: at least 3 are needed", lambda f: write_folder(f, 1)),
    folder("equal images", r"class `cat` of .*mine has 1 different .*: at least 3", all_images(lambda p: Image.linear_gradient("L").save(p))),
    folder("classes and splits", r"mine has train, read as splits, and next to them cat, dog, .*: rename what is misunderstood, or leave out .*`exclude: cat`", mixed),
    folder("two validation splits", r"mine has val, valid, of which two name the same split: put their images into one", lambda f: (write_folder(f, 6, split="val"), write_folder(f, 6, split="valid"))),
    folder("no train", r"mine has images in test, but none in train: add some", lambda f: write_folder(f, 6, split="test")),
    folder("a class not in train", r"class `emu` of .*mine has images in test, but none in train: add some", lambda f: (write_folder(f, 9, split="train"), write_folder(f, 9, ("emu",), "test"))),
    folder("a loop of links", r"mine/loop is a link to a folder that holds it, .*: remove it", loop_of_folders),
    folder("a class of two lines", r"mine has the subfolder 'a\\+nb': rename it", odd_class),
    folder("a class of which nothing is read", r"class `emu` of .*mine has 2 files and no image that can be read \(emu/0.heic is none of .*: convert.*`exclude: emu`", lost_class),
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------- images


def bomb(path):
    """A PNG that promises 30,000 x 30,000 pixels."""
    content = bytearray(path.read_bytes())
    content[16:24] = (30_000).to_bytes(4, "big") * 2
    path.write_bytes(content[:29] + b"\0" * 4 + content[33:])


def with_crc(path):
    """The same, its checksum right."""
    bomb(path)
    content = bytearray(path.read_bytes())
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)


def truncated_jpeg(path):
    Image.open(path).save(path.with_suffix(".jpg"))
    path.unlink()
    path = path.with_suffix(".jpg")
    path.write_bytes(path.read_bytes()[:300])


def postscript(path):
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")


def as_file(suffix, values):
    def change(path):
        Image.fromarray(values).save(path.with_suffix(suffix))
        path.unlink()

    return change


def images(name, says, change):
    return folder(
        f"images: {name}",
        r"12 of the 12 images in .*mine cannot be read, as " + says + ".*: repair or remove",
        all_images(change),
    )


IMAGES = [
    images("text", r"cat/000.png \(cannot identify", lambda p: p.write_text("hello")),
    images("empty", r"cat/000.png \(cannot identify", lambda p: p.write_bytes(b"")),
    images("cut", r"cat/000.png \(", lambda p: p.write_bytes(p.read_bytes()[:100])),
    images("zeros in the middle", r"cat/000.png \(", lambda p: p.write_bytes(p.read_bytes()[:60] + bytes(200) + p.read_bytes()[260:])),
    images("truncated JPEG", r"cat/000.jpg \(", truncated_jpeg),
    images("bomb", r"cat/000.png \(.*(pixels|identify)", with_crc),
    images("bomb with a wrong checksum", r"cat/000.png \(", bomb),
    images("PostScript under another name", r"cat/000.png \(cannot identify", postscript),
    images("floating point", r"cat/000.tiff \(its pixels are floating-point", as_file(".tiff", np.ones((9, 9), np.float32))),
    images("beyond 16 bits", r"cat/000.tiff \(its pixels run from 70000 to 70000", as_file(".tiff", np.full((9, 9), 70_000, np.int32))),
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------ npz


def npz(name, says, make, **kinds):
    def made(world):
        make(world.path / "mine.npz")
        world.parameters(dataset=str(world.path / "mine.npz"))

    return Row(f"npz: {name}", made, says, **kinds)


def with_arrays(**more):
    return lambda path: np.savez(path, **{k: v for k, v in arrays(**more).items() if v is not None})


def npy(array=None, header=None):
    """The bytes of an array, or of a header alone."""
    file = io.BytesIO()
    if header is None:
        np.lib.format.write_array(file, array)
    else:
        np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


def with_member(content, declared=None, method=zipfile.ZIP_DEFLATED):
    """An npz whose training images are these bytes, and said to be `declared` many."""

    def make(path):
        with zipfile.ZipFile(path, "w", method) as archive:
            for key, array in arrays().items():
                archive.writestr(f"{key}.npy", content if key == "train_images" else npy(array))
            if declared:
                archive.NameToInfo["train_images.npy"].file_size = declared

    return make


def changed(change):
    def make(path):
        with_arrays()(path)
        path.write_bytes(change(bytearray(path.read_bytes())))

    return make


def flipped(content):
    content[len(content) // 3] ^= 1
    return content


HUGE = dict(descr="|u1", fortran_order=False, shape=(10**9, 28, 28, 3))
NPZ = [
    npz("empty", r"mine.npz cannot be read as npz \(BadZipFile: .*\): it needs train_images", lambda p: p.write_bytes(b"")),
    npz("no archive", r"mine.npz cannot be read as npz \(BadZipFile: .*\): it needs train_images", lambda p: p.write_bytes(b"PK no zip")),
    npz("a plain array", r"mine.npz cannot be read as npz \(BadZipFile", lambda p: p.write_bytes(npy(np.zeros(3)))),
    npz("truncated", r"mine.npz cannot be read as npz", changed(lambda c: c[: len(c) // 2])),
    npz("a flipped bit", r"mine.npz cannot be read as npz .*CRC", changed(flipped)),
    npz("objects", r"mine.npz cannot be read as npz .*pickled objects, which can run code\): it needs", with_arrays(test_images=np.array([{}] * 30, object)), kernel=True),
    npz("missing keys", r"mine.npz has no val_labels: it needs", with_arrays(val_labels=None)),
    npz("no array in it", r"mine.npz cannot be read as npz .*: it needs", with_member(b"hello")),
    npz("a header without its array", r"mine.npz .*has \d+ bytes, and its header asks for 2352\d+\): it needs", with_member(npy(header=HUGE))),
    npz("terabytes, as declared", r"mine.npz holds arrays of 2.35e\+03 GB, more than half of this machine's memory .*: take fewer", with_member(npy(header=HUGE), len(npy(header=HUGE)) + 2352 * 10**9)),
    npz("an overflowing shape", r"mine.npz cannot be read as npz .*header asks for", with_member(npy(header=HUGE | dict(shape=(2**62, 2**62, 4))))),
    npz("a negative shape", r"mine.npz cannot be read as npz .*has the shape \(-1, 28\)", with_member(npy(header=HUGE | dict(shape=(-1, 28))))),
    npz("a header of megabytes", r"mine.npz cannot be read as npz .*: it needs", with_member(b"\x93NUMPY\x02\x00" + (2**31).to_bytes(4, "little") + b"{" * 2**21)),
    npz("another compression", r"mine.npz cannot be read as npz .*compressed in a way that numpy does not", with_member(npy(arrays()["train_images"]), method=zipfile.ZIP_LZMA)),
    npz("four channels", r"mine.npz holds train_images of uint8 \(30, 12, 12, 4\), .*: this line writes an npz that is read: `.*`", with_arrays(train_images=np.zeros((30, 12, 12, 4), np.uint8))),
    npz("volumes", r"mine.npz holds train_images of uint8 \(30, 12, 12, 12\): it needs", with_arrays(train_images=np.zeros((30, 12, 12, 12), np.uint8))),
    npz("floats", r"mine.npz holds train_images of float32 \(30, 12, 12\), 0 ... 1: this line writes an npz that is read: `import numpy as np; .*`", with_arrays(train_images=(arrays()["train_images"][..., 0] > 99).astype(np.float32))),
    npz("no pixels", r"mine.npz holds train_images of \(30, 0, 0\), which are none: it needs", with_arrays(train_images=np.zeros((30, 0, 0), np.uint8))),
    npz("no images", r"mine.npz holds val_images of \(0, 12, 12\), which are none: it needs", with_arrays(val_images=np.zeros((0, 12, 12), np.uint8), val_labels=np.zeros(0, int))),
    npz("not square", r"mine.npz holds images of \[\(9, 12\)\] pixels: all have to be square", with_arrays(**{f"{s}_images": (np.arange(3240) % 251).astype(np.uint8).reshape(30, 9, 12) for s in ("train", "val", "test")})),
    npz("two sizes", r"mine.npz holds images of .* pixels: all have to be square and of one size", with_arrays(val_images=np.zeros((30, 9, 9), np.uint8))),
    npz("several labels an image", r"mine.npz holds train_labels of int64 \(30, 5\): one label an image", with_arrays(train_labels=np.zeros((30, 5), int))),
    npz("labels of too few", r"mine.npz holds train_labels of int64 \(29,\): one label an image", with_arrays(train_labels=np.zeros(29, int))),
    npz("a single number", r"mine.npz holds train_labels of int64 \(\): one label an image", with_arrays(train_labels=np.array(3))),
    npz("fractions", r"mine.npz holds test_labels of float64 .*: one label an image is needed, a whole number", with_arrays(test_labels=np.full(30, 0.5))),
    npz("negative labels", r"mine.npz holds train_labels of int64 \(30,\), -1 ... 1: this line writes an npz that is read", with_arrays(train_labels=np.arange(30) % 3 - 1, val_labels=np.zeros(30, int), test_labels=np.zeros(30, int))),
    npz("a gap", r"mine.npz holds train_labels of int64 .*: this line writes an npz that is read: `.*np.searchsorted", with_arrays(test_labels=np.full(30, 9))),
    npz("a label for every image", r"mine.npz has the labels \[0, .*\]: they have to be", with_arrays(train_labels=np.arange(30) * 10**12)),
    npz("a class not in train", r"class `2` of .*mine.npz has images in val, but none in train: add some, or leave", with_arrays(train_labels=np.arange(30) % 2)),
    Row("npz: under another name", lambda w: w.parameters(dataset=str(SMOKE)), r"`dataset` is the file .*smoke.yaml: a file has to be an npz with images and labels; else give a folder"),
]  # fmt: skip


# -------------------------------------------------------------------------------------------------- base models

UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"


def base(name, says, make, **kinds):
    return Row(f"base model: {name}", lambda world: make(world.base()), says, **kinds)


def config(name, **change):
    def make(folder):
        path = folder / name
        kept = json.loads(path.read_text()) | change
        path.write_text(json.dumps({k: v for k, v in kept.items() if v is not None}))

    return make


def weights(name, change):
    def make(folder):
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name)

    return make


def index(weight_map):
    def make(folder):
        (folder / UNET).unlink()
        (folder / f"{UNET}.index.json").write_text(json.dumps(weight_map))

    return make


def not_a_number(tensors):
    tensors["conv_in.weight"][0, 0, 0, 0] = np.nan


def wider(tensors):
    for name in [name for name in tensors if name.endswith("attn2.to_k.weight")]:
        tensors[name] = np.zeros((len(tensors[name]), 99), np.float32)


BASE = [
    base("no UNet", r"base/ in .* cannot be used: there is no unet/diffusion_pytorch_model.safetensors, whole, sharded or", lambda f: (f / UNET).unlink(), kernel=True),
    base("no unet folder", r"base model folder .*base has no readable unet/config.json: it needs unet/", lambda f: shutil.rmtree(f / "unet")),
    base("no scheduler", r"no readable scheduler/scheduler_config.json: it needs unet/, vae/, scheduler/", lambda f: shutil.rmtree(f / "scheduler")),
    base("no text encoder", r"no readable text_encoder/config.json: it needs .* the number of tokens", lambda f: shutil.rmtree(f / "text_encoder")),
    base("pickled weights", r"pickled weights \(unet/diffusion_pytorch_model.bin\) are not read, since they can run code", lambda f: (f / UNET).rename((f / UNET).with_suffix(".bin"))),
    base("truncated weights", r"cannot be loaded from .*unet/\S+.safetensors \(.*\): take a whole copy", lambda f: (f / UNET).write_bytes((f / UNET).read_bytes()[:-100])),
    base("empty weights", r"cannot be loaded from .*vae/\S+.safetensors \(.*\): take a whole copy", lambda f: (f / VAE).write_bytes(b"")),
    base("a header of exabytes", r"cannot be loaded from .*vae/\S+.safetensors \(.*\): take a whole copy", lambda f: (f / VAE).write_bytes(b"\xff" * 8 + (f / VAE).read_bytes()[8:])),
    base("weights of another width", r"cross_attention_dim 12, and \S+ is of \(\d+, 99\); take both from one copy", weights(UNET, wider)),
    base("weights of other channels", r"config.json asks for encoder.conv_in.weight of \(8, 3\), and the weights have \(9, 3\); take", weights(VAE, lambda t: t.update({"encoder.conv_in.weight": np.zeros((9, 3, 3, 3), np.float32)}))),
    base("weights that lack one", r"1 missing keys, such as conv_in.weight: config and weights belong to different models", weights(UNET, lambda t: t.pop("conv_in.weight"))),
    base("weights that are not finite", r"1 tensors, such as conv_in.weight, hold numbers that are not finite", weights(UNET, not_a_number)),
    base("config that is no JSON", r"no readable unet/config.json: it needs", lambda f: (f / "unet/config.json").write_text("{")),
    base("config that is a list", r"no readable vae/config.json: it needs", lambda f: (f / "vae/config.json").write_text("[1]")),
    base("deep config", r"no readable vae/config.json: it needs", lambda f: (f / "vae/config.json").write_text("[" * 10**6)),
    base("config that is a pipe", r"no readable vae/config.json: it needs", lambda f: ((f / "vae/config.json").unlink(), os.mkfifo(f / "vae/config.json"))),
    base("config of megabytes", r"no readable vae/config.json: it needs", lambda f: (f / "vae/config.json").write_text(" " * 2**25)),
    base("UNet of XL", r"its UNet has addition_embed_type = 'text_time': it needs more than a class \(as SDXL", config("unet/config.json", addition_embed_type="text_time")),
    base("UNet of another kind", r"it has a UNet3DConditionModel where a UNet2DConditionModel is needed", config("unet/config.json", _class_name="UNet3DConditionModel")),
    base("UNet for inpainting", r"its UNet takes 9 channels .* they have to be equal", config("unet/config.json", in_channels=9)),
    base("UNet without blocks", r"UNet2DConditionModel names no block_out_channels: take a whole copy", config("unet/config.json", block_out_channels=None)),
    base("UNet of giant blocks", r"the block_out_channels of its UNet is \[1000000000\]: allowed is", config("unet/config.json", block_out_channels=[10**9])),
    base("UNet of giant depth", r"the layers_per_block of its UNet is 1000000000: allowed is", config("unet/config.json", layers_per_block=10**9)),
    base("UNet of more layers than weights", r"asks for \d+ layers, and the weights have \d+ tensors; take both", config("unet/config.json", layers_per_block=64, block_out_channels=[16] * 16)),
    base("UNet of giant transformers", r"the transformer_layers_per_block of its UNet is 1000000000: allowed", config("unet/config.json", transformer_layers_per_block=10**9)),
    base("UNet of a text's channels", r"the in_channels of its UNet is 'four': allowed is a whole", config("unet/config.json", in_channels="four")),
    base("UNet of listed channels", r"the in_channels of its UNet is \[4\]: allowed is a whole", config("unet/config.json", in_channels=[4])),
    base("noise of an unknown schedule", r"`scheduler` is 'DDIMScheduler', which cannot sample from this base model .*: choose another range", config("scheduler/scheduler_config.json", beta_schedule="none")),
    Row("base model: scheduler for others", lambda w: (w.base(), w.parameters(scheduler="FlowMatchEulerDiscreteScheduler")), r"`scheduler` is 'FlowMatch\w+', which cannot sample from this base model .*: choose another range"),
    base("UNet of two widths", r"its UNet's cross_attention_dim is \[12, 24\]: one whole number", config("unet/config.json", cross_attention_dim=[12, 24])),
    base("VAE of nested channels", r"the block_out_channels of its VAE is \[\[\[.*: allowed is a whole number", config("vae/config.json", block_out_channels=[[[8]]])),
    base("VAE that shifts", r"its VAE shifts latents \(shift_factor\), which Stable Diffusion 1 and 2 do not", config("vae/config.json", shift_factor=0.1)),
    base("VAE scaled by a text", r"the scaling_factor of its VAE is 'big': a positive number is needed", config("vae/config.json", scaling_factor="big")),
    base("a trillion timesteps", r"the num_train_timesteps of its scheduler is 1000000000000: allowed is a whole number from 1 to", config("scheduler/scheduler_config.json", num_train_timesteps=10**12)),
    base("noise below zero", r"the beta_end of its scheduler is -1: a positive number is needed", config("scheduler/scheduler_config.json", beta_end=-1)),
    base("another prediction", r"it predicts sample: epsilon and v_prediction are known", config("scheduler/scheduler_config.json", prediction_type="sample")),
    base("prediction that is a list", r"it predicts \['x'\]: epsilon and v_prediction are known", config("scheduler/scheduler_config.json", prediction_type=["x"])),
    base("a billion tokens", r"the max_position_embeddings of its text encoder is 1000000000: allowed is", config("text_encoder/config.json", max_position_embeddings=10**9)),
    base("no tokens", r"no max_position_embeddings, the number of tokens: take a whole copy", config("text_encoder/config.json", max_position_embeddings=None)),
    base("index that points elsewhere", r"index.json names '../../secret.safetensors': shards have to be in the same folder", index({"weight_map": {"conv_in.weight": "../../secret.safetensors"}})),
    base("index of a missing shard", r"unet/x.safetensors is missing, which \S+index.json names", index({"weight_map": {"conv_in.weight": "x.safetensors"}})),
    base("index of numbers", r"index.json names 7: shards have to be in the same folder", index({"weight_map": {"conv_in.weight": 7}})),
    base("index without a map", r"index.json has no weight_map: take a whole copy", index({"weight_map": [1]})),
    base("index that is a list", r"no readable \S+index.json: it needs", index([1])),
    parameters("base model unknown", r"`base_model` is 'tiney': it has to be `tiny`, a diffusers folder that exists, or a hub id", base_model="tiney"),
    parameters("base model above", r"`base_model` is '../nowhere': it has to be `tiny`", base_model="../nowhere"),
    parameters("hub id without a revision", r"`base_model_revision` is '' for a/b: give the 40 digits of a commit", base_model="a/b"),
    parameters("hub id with a short revision", r"`base_model_revision` is '133a221' for a/b: give the 40 digits", base_model="a/b", base_model_revision="133a221"),
    parameters("hub id that is not here", r"a/b at revision 0+ is not on this machine .*: check name and network, or give a diffusers folder", base_model="a/b", base_model_revision="0" * 40),
    parameters("hub id that is none", r"`base_model` is 'a--b/..c'.*(hub id|has to be)", base_model="a--b/..c", base_model_revision="0" * 40),
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------ storage


def storage(name, says, url):
    return parameters(
        f"storage {name}", r"The storage " + says + r".*: check the `storage` setting; empty means SQLite", storage=url
    )


STORAGE = [
    storage("garbage", r"garbage cannot be opened \(.*\)", "garbage"),
    storage("of an unknown kind", r"oracel://x cannot be opened", "oracel://x"),
    storage("without its driver", r"mysql://root@127.0.0.1/x cannot be opened \(its driver is not installed", "mysql://root@127.0.0.1/x"),
    storage("with braces", r"postgresql://a\{b@127.0.0.1:1/x cannot be opened \(Optuna formats text in braces: write %7B", "postgresql://a{b@127.0.0.1:1/x"),
    storage("with a password", r"postgresql://me:\*\*\*@127.0.0.1:1/x cannot be opened", "postgresql://me:secret@127.0.0.1:1/x"),
    storage("in a missing folder", r"sqlite:////nowhere/x.db cannot be opened \(there is no folder /nowhere", "sqlite:////nowhere/x.db"),
    storage("with a port that is none", r"postgresql://127.0.0.1:port/x cannot be opened", "postgresql://127.0.0.1:port/x"),
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------ arguments


def plain(world):
    world.parameters()


def cli_row(name, says, *arguments, make=plain, **kinds):
    return Row(f"arguments: {name}", make, says, arguments, **kinds)


def finished(change=lambda folder: None):
    def make(world):
        change(world.run())
        (world.path / "there").mkdir()

    return make


def damaged_record(folder):
    path = folder / "records" / "03.json"
    path.write_text(path.read_text().replace("unet", "tenu", 1))


RUN = "{path}/runs_root/smoke"
ARGUMENTS = [
    cli_row("unknown command", r"No such command 'rum'", "rum", code=2),
    cli_row("unknown option", r"No such option '?--untill'?", "run", "{file}", "--untill", "03", code=2),
    cli_row("no experiment", r"Missing argument 'EXPERIMENT'", "run", code=2),
    cli_row("-p without a value", r"Option '-p' requires 2 arguments", "run", "{file}", "-p", "seed", code=2),
    cli_row("--until 99", r"`--until` is '99': notebooks are 00, 01", "run", "{file}", "--until", "99"),
    cli_row("--redo 99", r"`--redo` is '99': notebooks are 00, 01", "run", "{file}", "--redo", "99"),
    cli_row("unknown experiment", r"no parameter file for `digitz`: give .* Did you mean `digits`", "run", "digitz"),
    cli_row("empty experiment", r"no parameter file for ``: give the path of one, or a name in params/", "run", ""),
    cli_row("experiment of 5,000 letters", r"no parameter file for `'x+\.\.\.x+'`: give", "run", "x" * 5000),
    cli_row("experiment that is a folder", r"no parameter file for `\S+`: give the path of one", "status", "{path}"),
    cli_row("-p of an unknown name", r"`unet_epoch` is not a setting.* [dD]id you mean `unet_epochs`", "run", "{file}", "-p", "unet_epoch", "3"),
    cli_row("-p that is no YAML", r"value of -p seed is '\[1', which YAML cannot read: put it in quotes", "run", "{file}", "-p", "seed", "[1"),
    cli_row("-p of the 30th of February", r"value of -p seed is '2001-02-30', which YAML cannot read", "run", "{file}", "-p", "seed", "2001-02-30"),
    cli_row("-p without sense", r"`seed` is None \(NoneType\), but it has to be a whole number", "run", "{file}", "-p", "seed", ""),
    cli_row("-p of an experiment above", r"`experiment` is '\.\.': it names a folder", "run", "{file}", "-p", "experiment", ".."),
    cli_row("verify of nothing", r"no parameter file for `nowhere`: give the path", "verify", "nowhere"),
    cli_row("verify of a folder that is no run", r"there is no experiment's folder: it has no settings.yaml: \w+", "verify", "{path}/there", make=finished()),
    cli_row("verify before a run", r"no experiment folder .*smoke: `sdlab run smoke` makes it", "verify", "{file}"),
    cli_row("verify of a run without settings", r"settings.yaml holds no settings: it needs lines", "verify", RUN, make=finished(lambda f: (f / "settings.yaml").write_text("- a"))),
    cli_row("repair before a run", r"no experiment folder .*smoke: `sdlab run smoke` makes it", "repair", "{file}", "metrics/x01.json"),
    cli_row("repair of what is fine", r"`metrics/x01.json` is not among what is wrong .*: nothing was done", "repair", "{file}", "metrics/x01.json", make=finished()),
    cli_row("repair above", r"`../smoke` is not among what is wrong .*: nothing was done", "repair", "{file}", "../smoke", make=finished()),
    cli_row("status of a damaged record", r"records/03.json is damaged .*: move it away and run its stage again", "status", "{file}", make=finished(damaged_record)),
    cli_row("run of a damaged record", r"records/03.json is damaged .*: move it away and run its stage again", "run", "{file}", make=finished(damaged_record)),
    cli_row("run with other settings", r"03_fine_tuning is stale .*unet_epochs 2 -> 3\): undo the change, or", "run", "{file}", "-p", "unet_epochs", "3", make=finished()),
    cli_row("export before a run", r"smoke has no synthetic set yet: 05_scaling is not run \(`sdlab run smoke`\)", "export", "{file}", "{path}/out"),
    cli_row("export of none", r"`--images` is 0: 05_scaling made 8 \(allowed is 1 to that\)", "export", "{file}", "{path}/out", "--images", "0", make=finished()),
    cli_row("export of more than there are", r"`--images` is 9: 05_scaling made 8 \(allowed", "export", "{file}", "{path}/out", "--images", "9", make=finished()),
    cli_row("export of a word", r"Invalid value for '--images': 'all' is not a valid integer", "export", "{file}", "out", "--images", "all", code=2),
    cli_row("export to what is there", r"there exists: nothing is overwritten; give another name", "export", "{file}", "{path}/there", make=finished()),
    cli_row("export to a zip", r"out.zip ends in .zip: give a name ending in .npz, or one without a dot", "export", "{file}", "{path}/out.zip", make=finished()),
    cli_row("export to nowhere", r"There is no folder .*nowhere: make it first", "export", "{file}", "{path}/nowhere/out", make=finished()),
    cli_row("export to a long name", r"xxx' can be no file here \(File name too long\): give another name", "export", "{file}", "{path}/" + "x" * 300, make=finished()),
    cli_row("export of damaged shards", r"shard_00000.safetensors is truncated or altered: move it away and run", "export", "{file}", "{path}/out", make=finished(lambda f: next(f.glob("synthetic/*/shard_00000*")).write_bytes(b"x"))),
    cli_row("dashboard without a search", r"smoke has no search yet: run 02_first_search first", "dashboard", "{file}"),
    cli_row("dashboard of a storage that is none", r"storage garbage cannot be opened .*: check the `storage` setting", "dashboard", "{file}", "-p", "storage", "garbage"),
    cli_row("dashboard at a word", r"Invalid value for '--port': 'web' is not a valid integer", "dashboard", "{file}", "--port", "web", code=2),
    cli_row("plan of an unknown data set", r"`dataset` is 'digit', neither .* Did you mean `digits`", "plan", "{file}", "-p", "dataset", "digit"),
    cli_row("unknown setting", r"`unet_epoch` is not a setting.* [dD]id you mean `unet_epochs`", "settings", "unet_epoch"),
    cli_row("setting like nothing", r"`zzz` is not a setting. `sdlab settings` lists", "settings", "zzz"),
]  # fmt: skip


# -------------------------------------------------------------------------------------------- another's files


def shut(name, says, make, *arguments, **kinds):
    """`make` gives what may be neither read nor written."""
    return Row(f"another's: {name}", make, says, arguments or ("run", "{file}"), shut=True, **kinds)


def of_mine(name):
    def make(world):
        mine = write_folder(world.path / "mine", 6)
        world.parameters(dataset=str(mine))
        return mine / name

    return make


def of_npz(world):
    with_arrays()(world.path / "mine.npz")
    world.parameters(dataset=str(world.path / "mine.npz"))
    return world.path / "mine.npz"


def of_run(name):
    return lambda world: next(world.run().glob(name)) if name else world.run()


def of_world(name, *folders):
    def make(world):
        world.parameters()
        for folder in folders:
            (world.path / folder).mkdir()
        return world.path / name

    return make


DENIED = r" \(Permission denied\): mend that, and give the same command"
OTHERS = [
    shut("parameter file", r"given.yaml cannot be read \(Permission denied\): give a readable one", of_world("given.yaml")),
    shut("folder of images", r"mine cannot be read" + DENIED, of_mine("")),
    shut("class", r"mine/cat cannot be read" + DENIED, of_mine("cat")),
    shut("image", r"mine/cat/000.png cannot be read" + DENIED, of_mine("cat/000.png")),
    shut("npz", r"mine.npz cannot be read" + DENIED, of_npz),
    shut("base model", r"base has no readable unet/config.json: it needs", lambda w: w.base()),
    shut("UNet's folder", r"base has no readable unet/config.json: it needs", lambda w: w.base() / "unet"),
    shut("UNet", r"unet/\S+.safetensors cannot be read" + DENIED, lambda w: w.base() / UNET),
    shut("config", r"base has no readable vae/config.json: it needs", lambda w: w.base() / "vae/config.json"),
    shut("folder of runs", r"runs_root/smoke/\S+ cannot be read or written" + DENIED, of_world("runs_root", "runs_root")),
    shut("run", r"runs_root/smoke/\S+ cannot be read or written" + DENIED, of_run("")),
    shut("run, status", r"runs_root/smoke/\S+ cannot be read or written" + DENIED, of_run(""), "status", "{file}"),
    shut("run, verify", r"runs_root/smoke cannot be read" + DENIED, of_run(""), "verify", "{file}"),
    shut("run, verify by its path", r"smoke/settings.yaml cannot be read or written" + DENIED, of_run(""), "verify", RUN),
    shut("run, dashboard", r"smoke/searches.db cannot be read or written" + DENIED, of_run(""), "dashboard", "{file}"),
    shut("settings of a run", r"smoke/settings.yaml cannot be read \(Permission denied\): give a readable one", of_run("settings.yaml"), "verify", RUN),
    shut("record", r"records/03.json cannot be read" + DENIED, of_run("records/03.json")),
    shut("record, status", r"records/03.json cannot be read" + DENIED, of_run("records/03.json"), "status", "{file}"),
    shut("records", r"records/00.json cannot be read or written" + DENIED, of_run("records"), "status", "{file}"),
    shut("record, verify", r"records/03.json cannot be read" + DENIED, of_run("records/03.json"), "verify", "{file}"),
    shut("shard, export", r"shard_00000.safetensors cannot be read" + DENIED, of_run("synthetic/*/shard_00000*"), "export", "{file}", "{path}/out"),
    shut("shard, verify", r"shard_00000.safetensors cannot be read" + DENIED, of_run("synthetic/*/shard_00000*"), "verify", "{file}"),
    shut("manifest, verify", r"manifest.json cannot be read" + DENIED, of_run("synthetic/*/manifest.json"), "verify", "{file}"),
    shut("checkpoint, verify", r"unet/epoch_01 cannot be read" + DENIED, of_run("unet/epoch_01"), "verify", "{file}"),
    shut("metrics, verify", r"metrics/search_1.json cannot be read" + DENIED, of_run("metrics/search_1.json"), "verify", "{file}"),
    shut("database, verify", r"searches.db cannot be read" + DENIED, of_run("searches.db"), "verify", "{file}"),
    shut("database, dashboard", r"searches.db cannot be opened \(Permission denied\): check the `storage` setting", of_run("searches.db"), "dashboard", "{file}"),
    shut("folder to export to", r"mine/out' can be no file here \(Permission denied\): give another name", lambda w: (w.run(), (w.path / "mine").mkdir(), w.path / "mine")[-1], "export", "{file}", "{path}/mine/out"),
    shut("run, --redo", r"records/00.json cannot be read or written" + DENIED, of_run(""), "run", "{file}", "--redo", "05"),
    shut("set, repair", r"smoke/synthetic cannot be read" + DENIED, of_run("synthetic"), "repair", "{file}", "synthetic/0123456789abcdef"),
]  # fmt: skip


ROWS = [*PARAMETERS, *YAML, *FOLDERS, *IMAGES, *NPZ, *BASE, *STORAGE, *ARGUMENTS, *OTHERS]


# -------------------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module", autouse=True)
def imported():
    """The slow imports of the first row of each kind, which say nothing about that row."""
    import diffusers

    import sdlab.search
    import sdlab.tools.planning  # noqa: F401

    _ = diffusers.AutoencoderKL, diffusers.UNet2DConditionModel, diffusers.DDIMScheduler  # loaded when named


@pytest.fixture
def world(tmp_path, base_folder, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("SDLAB_PROGRESS_FILE_ONLY", "1")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("elsewhere")))  # locks, notebooks at work
    monkeypatch.setattr(os, "execv", None)  # what the dashboard becomes
    in_this_process = functools.partial(papermill.execute_notebook, engine_name="in-process")
    monkeypatch.setattr(papermill, "execute_notebook", in_this_process)
    return World(tmp_path, base_folder)


@pytest.fixture(autouse=True)
def no_hang():
    def too_long(*_):
        raise TimeoutError(f"more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def given(row, world):
    """Exit code and stderr of a row's command."""
    arguments = [part.format(file=world.file, path=world.path) for part in row.arguments]
    if row.kernel:
        done = command(BIN / "sdlab", *arguments)
        return done.returncode, done.stdout, done.stderr
    done = CliRunner().invoke(cli, arguments)
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS])
def test_a_bad_input_gets_one_sentence_and_leaves_everything_as_it_was(row, world):
    made = row.make(world)
    before = world.listing()
    with shut_to_this_process(made) if row.shut else contextlib.nullcontext():
        code, out, err = given(row, world)
    assert code == row.code, (out, err)
    *usage, sentence = err.removesuffix("\n").split("\n")
    assert sentence.startswith("Error: ") and re.search(row.says, sentence), err
    assert not usage or row.code == 2, err
    assert "Traceback" not in out + err and "should not have happened" not in err and len(sentence) < LONGEST
    assert world.listing() == before


def test_debug_shows_where_it_came_from(world):
    world.parameters(unet_epochs=0)
    done = command(BIN / "sdlab", "--debug", "run", world.file)
    assert done.returncode == 1 and "Traceback" in done.stderr and "`unet_epochs` is 0: allowed is" in done.stderr


@pytest.mark.parametrize(
    "change", [lambda c: b"\xef\xbb\xbf" + c, lambda c: c.replace(b"\n", b"\r\n"), lambda c: c.rstrip(b"\n")]
)
def test_what_an_editor_does_to_a_parameter_file_is_no_bad_input(world, change):
    """A byte order mark, the line ends of Windows, none at the end."""
    world.parameters()
    world.file.write_bytes(change(world.file.read_bytes()))
    done = CliRunner().invoke(cli, ["status", str(world.file)])
    assert done.exit_code == 0 and done.stdout.count("not run") == len(STAGES)


def test_no_image_starts_a_program(world, monkeypatch):
    """PostScript would go to Ghostscript, whatever the file is called."""
    programs = world.path / "programs"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {world.path}/ran\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    mine = write_folder(world.path / "mine", 6)
    for name in ("x.eps", "x.ps", "x.png"):
        postscript(mine / "cat" / name)
    world.parameters(dataset=str(mine), base_model="none")
    done = CliRunner().invoke(cli, ["plan", str(world.file)])
    assert done.exit_code == 1 and "`base_model` is 'none'" in done.stderr and not (world.path / "ran").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has one")
def test_a_gpu_that_is_not_there(world):
    world.parameters(device="cuda")
    done = CliRunner().invoke(cli, ["run", str(world.file)])
    assert done.exit_code == 1 and "`device` is 'cuda', which this machine does not have" in done.stderr
    assert not (world.path / "runs_root").exists()


def test_there_are_enough_of_every_kind():
    assert len(ROWS) >= 240 and sum(row.kernel for row in ROWS) == 2
    assert len({row.name for row in ROWS}) == len(ROWS)
