"""One image file of any kind -> upright RGB pixels; and whether a set's pixels use the range that they have."""

import contextlib
import functools
import hashlib
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from sdlab.errors import BadInput

# Formats that Pillow decodes itself. Others start programs (EPS: Ghostscript), or are rarely met and tested.
FORMATS = ("PNG", "JPEG", "MPO", "BMP", "DIB", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF")
LARGE_IMAGE = 2**24  # pixels from which on images are decoded one at a time: a folder of bombs must not fill the memory
ONE_LARGE_IMAGE = threading.Lock()
BIT_DEPTHS = (8, 10, 12, 14, 16)  # of cameras and scanners
INVISIBLE, NARROW = 16, 64  # of 256 values: a set within so few shows nothing, or little


@dataclass(frozen=True)
class DecodedImage:
    """A file as it was read. `pixels` uint8 (3, size, size); of all its pixels before resizing: `digest`, and
    `histogram` (256,); `traits` worth a remark; `peak`, the highest value of a 16-bit file, else 0.
    """

    pixels: np.ndarray
    digest: bytes
    histogram: np.ndarray
    traits: tuple[str, ...]
    peak: int


@functools.cache
def supported_formats() -> tuple[tuple[str, ...], frozenset[str]]:
    """Those of `FORMATS` that this Pillow has, and the suffixes of their files."""
    Image.init()
    here = tuple(name for name in FORMATS if name in Image.OPEN)
    suffixes = Image.registered_extensions().items()
    return here, frozenset(suffix for suffix, name in suffixes if name in (*here, "MPO"))  # MPO is opened as JPEG


def read_image(path: Path, size: int, bit_depth: int = 16) -> DecodedImage:
    """An image of one of `FORMATS`, upright, in RGB: its centre square, resized with antialiasing.

    Transparent pixels become white. `bit_depth` is what the whole set uses of the 16 bits of a 16-bit file. Raises
    whatever Pillow raises.
    """
    with Image.open(path, formats=supported_formats()[0]) as opened:
        pixels = opened.width * opened.height
        if pixels > Image.MAX_IMAGE_PIXELS:  # Pillow itself would only warn
            raise ValueError(f"it has {opened.width} x {opened.height} pixels, more than {Image.MAX_IMAGE_PIXELS:,}")
        with ONE_LARGE_IMAGE if pixels > LARGE_IMAGE else contextlib.nullcontext():
            return decode(opened, size, bit_depth)


def decode(opened: Image.Image, size: int, bit_depth: int) -> DecodedImage:
    # Not `n_frames`, which walks through all of them.
    traits = ["has several frames, of which the first is used"] if getattr(opened, "is_animated", False) else []
    image = ImageOps.exif_transpose(opened)  # EXIF's orientation: cameras store a turned image and how to turn it
    image.load()
    peak = 0
    if image.mode.startswith("I"):  # I;16 and its kin, or I: 32 bits that hold 16
        image, peak = to_8_bits(np.asarray(image), bit_depth)
        traits.append(f"has 16-bit pixels, scaled from 0 ... {2**bit_depth - 1} to 0 ... 255")
    rgb = to_rgb(image)
    if rgb.width != rgb.height:
        traits.append("is not square, so its centre square is used")
    if min(rgb.size) < size:
        traits.append("is smaller than what it is resized to")
    digest = hashlib.blake2b(rgb.tobytes() + repr(rgb.size).encode(), digest_size=16).digest()
    histogram = np.reshape(rgb.histogram(), (3, 256)).sum(0)
    fitted = ImageOps.fit(rgb, (size, size), Image.Resampling.BILINEAR)
    return DecodedImage(np.asarray(fitted).transpose(2, 0, 1), digest, histogram, tuple(traits), peak)


def to_8_bits(values: np.ndarray, bit_depth: int) -> tuple[Image.Image, int]:
    """The image of values in 0 ... 2**bit_depth - 1, and the highest. Raises `ValueError` for values beyond 16 bits."""
    low, peak = int(values.min()), int(values.max())
    if low < 0 or peak > 65535:
        raise ValueError(f"its pixels run from {low} to {peak}, beyond 16 bits")
    values = values.astype(np.float32)  # exact up to 2**24, and no multiple of 257 has a half
    return Image.fromarray(np.round(values / ((2**bit_depth - 1) / 255)).astype(np.uint8)), peak


def to_rgb(image: Image.Image) -> Image.Image:
    """Grey, palette, CMYK, transparent ... -> RGB. Raises `ValueError` for pixels without a known range."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range is not known")
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def check_range(histogram: np.ndarray, where: object) -> list[str]:
    """A remark if a set uses little of 0 ... 255. Raises `BadInput` if it uses so little that its images look black."""
    values, shares = np.flatnonzero(histogram), np.cumsum(histogram) / histogram.sum()
    if values[-1] - values[0] <= INVISIBLE:
        raise BadInput(
            f"The pixels of {where} run from {values[0]} to {values[-1]}, where 0 ... 255 are expected: they would show "
            "hardly anything; stretch all images alike to 0 ... 255."
        )
    low, high = np.searchsorted(shares, (0.001, 0.999))
    if high - low < NARROW:
        return [f"The images are of little contrast: 99.8 % of all pixels are within {low} ... {high} of 0 ... 255."]
    return [f"The images use {len(values)} of 256 values."] if len(values) <= INVISIBLE else []
