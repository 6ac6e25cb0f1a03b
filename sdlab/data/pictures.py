"""TODO data.pictures."""

import contextlib
import functools
import hashlib
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# What is opened: formats that Pillow decodes itself. Others call programs (EPS: Ghostscript), or are rarely met and tested.
FORMATS = ("PNG", "JPEG", "MPO", "BMP", "DIB", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF")
LARGE_IMAGE = 2**24  # pixels from which on images are decoded one at a time: a folder of bombs must not fill the memory
ONE_LARGE_IMAGE = threading.Lock()


@dataclass(frozen=True)
class DecodedImage:
    """A file as it was read. `pixels` uint8 (3, size, size); `digest` of all its pixels; `traits` worth a remark."""

    pixels: np.ndarray
    digest: bytes
    traits: tuple[str, ...]


@functools.cache
def supported_formats() -> tuple[tuple[str, ...], frozenset[str]]:
    """Those of `FORMATS` that this Pillow has, and their files' suffixes."""
    Image.init()
    here = tuple(name for name in FORMATS if name in Image.OPEN)
    suffixes = Image.registered_extensions().items()
    return here, frozenset(suffix for suffix, name in suffixes if name in (*here, "MPO"))  # that is opened as JPEG


def read_image(path: Path, size: int) -> DecodedImage:
    """An image of one of `FORMATS`, upright, in RGB: its centre square, resized with antialiasing.

    Transparent pixels become white, 16 bits are scaled to 8 over their whole range. Raises whatever Pillow raises.
    """
    with Image.open(path, formats=supported_formats()[0]) as opened:
        pixels = opened.width * opened.height
        if pixels > Image.MAX_IMAGE_PIXELS:  # Pillow itself would only warn
            raise ValueError(f"it has {opened.width} x {opened.height} pixels, more than {Image.MAX_IMAGE_PIXELS:,}")
        with ONE_LARGE_IMAGE if pixels > LARGE_IMAGE else contextlib.nullcontext():
            return decode(opened, size)


def decode(opened: Image.Image, size: int) -> DecodedImage:
    # Not `n_frames`, which walks through all of them.
    traits = ["has several frames, of which the first is used"] if getattr(opened, "is_animated", False) else []
    image = ImageOps.exif_transpose(opened)
    image.load()
    if image.mode.startswith("I"):
        traits.append("has 16-bit pixels, scaled from 0 ... 65535 to 0 ... 255")
    rgb = to_rgb(image)
    if rgb.width != rgb.height:
        traits.append("is not square, so its centre square is used")
    if min(rgb.size) < size:
        traits.append("is smaller than what it is resized to")
    digest = hashlib.blake2b(rgb.tobytes() + repr(rgb.size).encode(), digest_size=16).digest()
    fitted = ImageOps.fit(rgb, (size, size), Image.Resampling.BILINEAR)
    return DecodedImage(np.asarray(fitted).transpose(2, 0, 1), digest, tuple(traits))


def to_rgb(image: Image.Image) -> Image.Image:
    """Grey, palette, CMYK, 16-bit, transparent ... -> RGB. Raises `ValueError` for pixels without a known range."""
    if image.mode.startswith("I"):  # I;16 and its kin, or I: 32 bits that hold 16
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"its pixels run from {values.min()} to {values.max()}, beyond 16 bits")
        values = values.astype(np.float32)  # exact up to 2**24, and no multiple of 257 has a half
        return Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range is not known")
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
