"""Damages small files of every kind that is read, by the thousand, and reads them: a seeded fuzzer.

python tests/faults/fuzz.py --inputs 60000 --folder /tmp/fuzz

What comes out may be what was in it or a `BadInput`; of an image, whatever Pillow raises, which `read_all` catches. An input
may take `SECONDS`, and the process `MEMORY` more than it has once everything is imported. Prints a line of JSON; the
last input lies in the folder, whatever became of it.
"""

import faulthandler
import io
import json
import random
import re
import resource
import shutil
import struct
import sys
import time
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import click
import numpy as np
import torch
import yaml
from PIL import Image, features

sys.path.insert(0, str(Path(__file__).parents[1]))

from fake_run import KEY, write_run
from make_data import pictures

from sdlab.base_models import load_base_model
from sdlab.data.image_decoding import read_image
from sdlab.data.npz import read_arrays
from sdlab.data.own_npz import read_npz
from sdlab.data.saved_images import images_file, load_saved
from sdlab.errors import BadInput, brief
from sdlab.paths import PROJECT_ROOT
from sdlab.runs.files import read_hashed_json, sha256_of_file, sha256_of_json
from sdlab.runs.resume_states import TrainingPosition, load_resume_state, save_resume_state
from sdlab.runs.shards import read_shards
from sdlab.runs.stages import STAGES
from sdlab.runs.verify import is_resume_state_intact, verify
from sdlab.settings import Settings

SECONDS, MEMORY = 5, 2 * 2**30
INTERESTING = (0, 1, 2, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


# ----------------------------------------------------------------------------------------------------- damage


def flip(content, rng):
    for _ in range(rng.randint(1, 8)):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def cut(content, rng):
    del content[rng.randrange(len(content)) :]


def twice(content, rng):
    start = rng.randrange(len(content))
    content[start:start] = content[start : start + rng.randint(1, 400)]


def drop(content, rng):
    start = rng.randrange(len(content))
    del content[start : start + rng.randint(1, 400)]


def number(content, rng):
    """A huge or odd number over some bytes, mostly near the beginning or the end, where formats keep theirs."""
    width = rng.choice("BHIQ")
    size = struct.calcsize(width)
    at = rng.choice((rng.randrange(len(content)), rng.randrange(min(200, len(content))), -rng.randint(1, 100)))
    value = rng.choice(INTERESTING) % 2 ** (8 * size)
    content[at : at + size if at >= 0 else (at + size or None)] = struct.pack(rng.choice("<>") + width, value)


def digits(content, rng):
    """Another number, written out."""
    if found := list(re.finditer(rb"\d+", content[:5000])):
        place = rng.choice(found)
        new = str(rng.choice((*INTERESTING, -1, 10**30, "1e999", "9" * 5000))).encode()
        content[place.start() : place.end()] = new


def noise(content, rng):
    start = rng.randrange(len(content))
    content[start : start + rng.randint(1, 50)] = rng.randbytes(rng.randint(1, 50))


def word(content, rng):
    """One word in another's place."""
    if words := list(re.finditer(rb"[A-Za-z_.]+|-?\d+|[\[\]{}\",:]", content[:5000])):
        place, other = rng.choice(words), rng.choice(words)
        content[place.start() : place.end()] = other[0]


DAMAGES = (flip, flip, cut, twice, drop, number, number, number, digits, noise)
OF_TEXTS = (digits, digits, digits, word, word, word, flip, drop, twice, cut)


class Whole(random.Random):
    """Damages nothing: what was not damaged has to be read."""


def damaged(content, rng, damages=DAMAGES):
    if isinstance(rng, Whole):
        return content
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        if content:
            rng.choice(damages)(content, rng)
    return bytes(content)


def with_right_checksums(png):
    """A PNG whose chunks are as they were damaged, and their checksums those of what they hold now."""
    out, at = bytearray(png[:8]), 8
    while at + 12 <= len(png):
        size = int.from_bytes(png[at : at + 4], "big")
        chunk = png[at + 4 : at + 8 + size]
        out += png[at : at + 4] + chunk + zlib.crc32(chunk).to_bytes(4, "big")
        at += 12 + size
    return bytes(out)


# ------------------------------------------------------------------------------------------------------ corpus


def saved(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def image_corpus():
    """name -> bytes: every format that is read, in several of its kinds."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(pictures(np.zeros(1, int), 24)[0])
    smooth = rgb.resize((40, 30))
    palette, grey, alpha = rgb.quantize(16), rgb.convert("L"), rgb.convert("RGBA")
    sixteen = Image.fromarray(rng.integers(0, 2**16, (20, 20)).astype(np.uint16))
    frames = [Image.fromarray(rng.integers(0, 256, (16, 16)).astype(np.uint8)) for _ in range(3)]
    several = dict(save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    made = {
        "rgb.png": saved(rgb, "PNG"), "palette.png": saved(palette, "PNG", transparency=3), "16.png": saved(sixteen, "PNG"),
        "alpha.png": saved(alpha, "PNG"), "frames.png": saved(frames[0], "PNG", **several), "exif.png": saved(rgb, "PNG", exif=exif),
        "a.jpg": saved(smooth, "JPEG"), "progressive.jpg": saved(smooth, "JPEG", progressive=True, exif=exif),
        "cmyk.jpg": saved(smooth.convert("CMYK"), "JPEG"), "a.mpo": saved(rgb, "MPO", save_all=True, append_images=[rgb]),
        "a.gif": saved(palette, "GIF"), "frames.gif": saved(frames[0], "GIF", **several), "grey.gif": saved(grey, "GIF"),
        "raw.tiff": saved(rgb, "TIFF"), "16.tiff": saved(sixteen, "TIFF"), "frames.tiff": saved(frames[0], "TIFF", **several),
        "lzw.tiff": saved(rgb, "TIFF", compression="tiff_lzw"), "deflate.tiff": saved(rgb, "TIFF", compression="tiff_adobe_deflate"),
        "jpeg.tiff": saved(rgb, "TIFF", compression="jpeg"), "g4.tiff": saved(rgb.convert("1"), "TIFF", compression="group4"),
        "a.bmp": saved(rgb, "BMP"), "palette.bmp": saved(palette, "BMP"), "a.ppm": saved(rgb, "PPM"), "plain.ppm": b"P3\n3 2\n255\n" + b"1 2 3 " * 6,
        "lossy.webp": saved(smooth, "WEBP"), "lossless.webp": saved(alpha, "WEBP", lossless=True), "frames.webp": saved(frames[0], "WEBP", **several),
    }  # fmt: skip
    if features.check("jpg_2000"):
        made["a.jp2"] = saved(rgb, "JPEG2000")
    if features.check("avif"):
        made["a.avif"] = saved(smooth, "AVIF")
    return made


def npz_corpus():
    """name -> array."""
    labels = np.arange(12) % 3
    given = {f"{s}_images": pictures(labels, 9, seed) for seed, s in enumerate(("train", "val", "test"))}
    return given | {f"{s}_labels": labels[:, None] for s in ("train", "val", "test")}


def as_npz(arrays, compressed):
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **arrays)
    return file.getvalue()


def member_damaged(arrays, rng):
    """An npz, whole, one of whose arrays is damaged."""
    file, chosen = io.BytesIO(), rng.choice(list(arrays))
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, array)
            content = member.getvalue()
            archive.writestr(f"{name}.npy", damaged(content, rng) if name == chosen else content)
    return file.getvalue()


class Target:
    """A folder with one of everything, and for each kind how it is damaged and read."""

    def __init__(self, folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.folder, self.images, self.arrays = folder, image_corpus(), npz_corpus()
        given = yaml.safe_load((PROJECT_ROOT / "tests" / "smoke.yaml").read_text())
        given |= dict(
            runs_root=str(folder / "runs"), reports_root=str(folder / "reports"), base_model=str(folder / "base")
        )
        self.given = yaml.safe_dump(given).encode()
        self.settings = Settings.from_mapping(given)
        self.run = write_run(self.settings)
        self.set = self.run / "synthetic" / KEY
        self.shard, self.manifest = (
            self.set / "shard_00000.safetensors",
            json.loads((self.set / "manifest.json").read_text()),
        )
        self.write_kept_images()
        self.write_resume_state()
        shutil.copytree(PROJECT_ROOT / "sdlab" / "tiny", folder / "base")
        self.kinds = {
            "npz": self.npz, "npz, one array": self.npz_member, "kept images": self.kept, "image": self.image,
            "PNG, right checksums": self.png, "shard": self.a_shard, "manifest": self.a_manifest, "record": self.record,
            "resume state": self.resume_state, "parameter file": self.parameters, "base model's config": self.config,
        }  # fmt: skip
        self.originals = {}

    def write_kept_images(self):
        images = self.arrays["train_images"].transpose(0, 3, 1, 2)[:, :, :8, :8]
        files = np.array([(f"cat/{i}.png", "cat", ("train", "val", "test")[i % 3]) for i in range(len(images))])
        about = dict(name="x", source="x", class_names=["cat"], remarks=["x"], origin="key", bit_depth=16)
        self.kept_arrays = dict(images=images, files=files, examples=images[:3], about=np.array(json.dumps(about)))
        images_file(self.settings).parent.mkdir(parents=True, exist_ok=True)

    def write_resume_state(self):
        self.model = torch.nn.Linear(3, 2)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.model(torch.ones(1, 3)).sum().backward()
        self.optimizer.step()
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.state = self.folder / "resume.safetensors"
        at = TrainingPosition(1, 1, torch.Generator().get_state(), [torch.tensor(1.0)], 1.0)
        save_resume_state(self.state, "lineage", at, self.model, self.optimizer, self.scaler)

    def restored(self, path):
        """The file as it was before it was damaged first."""
        return self.originals.setdefault(path, path.read_bytes())

    # Each writes a damaged file and gives what reads it.

    def npz(self, rng):
        path = self.folder / "x.npz"
        path.write_bytes(damaged(as_npz(self.arrays, rng.random() < 0.5), rng))
        return lambda: read_npz(path)

    def npz_member(self, rng):
        path = self.folder / "x.npz"
        path.write_bytes(member_damaged(self.arrays, rng))
        return lambda: (read_npz(path), read_arrays(path, list(self.arrays), "it is no matter"))

    def kept(self, rng):
        path = images_file(self.settings)
        made = (
            member_damaged(self.kept_arrays, rng)
            if rng.random() < 0.7
            else damaged(as_npz(self.kept_arrays, False), rng)
        )
        path.write_bytes(made)
        return lambda: load_saved(self.settings, "key")

    def image(self, rng):
        name = rng.choice(list(self.images))
        path = self.folder / f"x{Path(name).suffix}"
        path.write_bytes(damaged(self.images[name], rng))
        return lambda: read_image(path, 16)

    def png(self, rng):
        name = rng.choice([name for name in self.images if name.endswith(".png")])
        path = self.folder / "x.png"
        path.write_bytes(with_right_checksums(damaged(self.images[name], rng)))
        return lambda: read_image(path, 16)

    def a_shard(self, rng):
        """Whose hash the manifest has: what was exchanged together with it."""
        path = self.shard
        path.write_bytes(damaged(self.restored(path), rng))
        manifest = json.loads(json.dumps(self.manifest))
        manifest["shards"]["0"]["sha256"] = sha256_of_file(path)
        self.seal(self.set / "manifest.json", manifest)
        return lambda: list(read_shards(self.set, 8))

    def seal(self, path, value):
        value = {k: v for k, v in value.items() if k != "sha256"}
        path.write_text(json.dumps(value | dict(sha256=sha256_of_json(value)), indent=1) + "\n")

    def a_manifest(self, rng):
        """Sealed anew where it is JSON still."""
        self.shard.write_bytes(self.restored(self.shard))
        return self.sealed(self.set / "manifest.json", rng, lambda: list(read_shards(self.set, 8)))

    def record(self, rng):
        path = self.run / "records" / f"{rng.choice(list(STAGES))}.json"
        return self.sealed(path, rng, lambda: (read_hashed_json(path), verify(self.settings)))

    def sealed(self, path, rng, read):
        original = self.restored(path)
        path.write_bytes(damaged(original, rng, OF_TEXTS))
        try:
            value = json.loads(path.read_text())
            if isinstance(value, dict):
                self.seal(path, value)
        except (ValueError, RecursionError):
            pass

        def and_restore():
            try:
                read()
            finally:
                path.write_bytes(original)

        return and_restore

    def resume_state(self, rng):
        path = self.folder / "damaged.safetensors"
        path.write_bytes(damaged(self.restored(self.state), rng))
        return lambda: (
            is_resume_state_intact(path), load_resume_state(path, "lineage", self.model, self.optimizer, self.scaler)
        )  # fmt: skip

    def parameters(self, rng):
        path = self.folder / "x.yaml"
        path.write_bytes(damaged(self.given, rng, OF_TEXTS))
        return lambda: Settings.from_file(path)

    def config(self, rng):
        path = (
            self.folder
            / "base"
            / rng.choice(
                ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json", "text_encoder/config.json")
            )
        )
        original = self.restored(path)
        path.write_bytes(damaged(original, rng, OF_TEXTS))

        def read():
            try:
                load_base_model(self.settings)
            finally:
                path.write_bytes(original)

        return read


def memory():
    """Bytes of address space that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), required=True)
@click.option("--inputs", default=1200, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--only", multiple=True, help="These kinds alone.")
def main(folder: Path, inputs: int, seed: int, only: tuple[str, ...]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    target = Target(folder)
    resource.setrlimit(resource.RLIMIT_AS, (memory() + MEMORY, resource.RLIM_INFINITY))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kinds = list(only or target.kinds)
    for kind in kinds:
        target.kinds[kind](Whole(0))()
    counts, failures, slowest, began = Counter(), {}, (0.0, ""), time.monotonic()
    for index in range(inputs):
        kind = kinds[index % len(kinds)]
        name = f"{seed} {kind} {index}"
        read = target.kinds[kind](random.Random(name))
        faulthandler.dump_traceback_later(4 * SECONDS, exit=True)  # says where it hangs, in C too
        started = time.monotonic()
        try:
            read()
            counts[f"{kind}: read"] += 1
        except BadInput as error:
            counts[f"{kind}: refused"] += 1
            if "\n" in str(error):
                failures.setdefault(f"{kind}: more than a line", f"{name}: {brief(str(error))}")
        except Exception as error:
            said = f"{kind}: {type(error).__name__}"
            counts[said] += 1
            if target.kinds[kind] not in (target.image, target.png):
                failures.setdefault(said, f"{name}: {brief(str(error))}")
        finally:
            faulthandler.cancel_dump_traceback_later()
        slowest = max(slowest, (time.monotonic() - started, name))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    said = dict(inputs=inputs, seconds=round(time.monotonic() - began, 1), slowest=slowest, grown_bytes=grown)
    print(json.dumps(said | dict(failures=failures, counts=dict(sorted(counts.items())))))


if __name__ == "__main__":
    main()
