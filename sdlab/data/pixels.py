"""Pixel conventions, in one place: uint8 0 ... 255 on disk, [-1, 1] for the base model, NCHW, resizing."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from sdlab.runs.files import atomic_write


def to_model(images: np.ndarray | torch.Tensor, size: int, resizing: str = "bilinear") -> torch.Tensor:
    """uint8 (n, 3, h, w) -> float (n, 3, size, size) in [-1, 1], as the base model's VAE expects (section 4)."""
    return resized(torch.as_tensor(images).float(), size, resizing) / 127.5 - 1


def to_uint8(images: torch.Tensor, size: int, resizing: str = "bilinear") -> np.ndarray:
    """Decoded images (n, 3, h, w) in [-1, 1] -> uint8 (n, 3, size, size)."""
    pixels = resized((images.float().clamp(-1, 1) + 1) * 127.5, size, resizing).round().clamp(0, 255).byte().cpu()
    # A decoder may answer in channels-last strides, which safetensors' numpy writer does not see.
    return np.ascontiguousarray(pixels.numpy())


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """uint8 (n, 3, h, w) -> uint8 (n, 3, size, size)."""
    return resized(torch.as_tensor(images).float(), size).round().clamp(0, 255).byte().numpy()


def resized(images: torch.Tensor, size: int, resizing: str = "bilinear") -> torch.Tensor:
    """Without antialiasing: bilinear, as the authors resize, or bicubic (docs/method.md, item 17). Pixels 0 ... 255."""
    if images.shape[-2:] == (size, size):
        return images
    images = F.interpolate(images, size=(size, size), mode=resizing, align_corners=False)
    return images.clamp(0, 255) if resizing == "bicubic" else images  # which overshoots at edges


def save_image_grid(images: np.ndarray, path: Path) -> Path:
    """A PNG of up to 50 uint8 images (n, 3, h, w), ten a row, each pixel drawn 4 x 4."""
    images = images[:50]
    columns = min(10, len(images))
    rows = len(images) // columns
    tiles = images[: rows * columns].reshape(rows, columns, *images.shape[1:]).transpose(0, 3, 1, 4, 2)
    grid = Image.fromarray(tiles.reshape(rows * images.shape[2], columns * images.shape[3], 3))
    with atomic_write(path) as partial:
        grid.resize((grid.width * 4, grid.height * 4), Image.Resampling.NEAREST).save(partial, "PNG")
    return path
