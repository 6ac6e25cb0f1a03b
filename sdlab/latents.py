"""Images -> posterior moments of the VAE, computed once and kept: an epoch samples from them instead of encoding."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from sdlab.base_models import BaseModel
from sdlab.data.npz import read_arrays
from sdlab.data.pixels import to_model
from sdlab.devices import raise_on_oom
from sdlab.errors import BadInput
from sdlab.runs.files import atomic_write, sha256_of_json

ENCODE_BATCH = 64
PART = 1024  # images; of so many at most the work is lost where it is cut


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of each image's latent posterior, (n, channels, h, w) each, before scaling.

    Kept in half precision: 4 KiB an image at SD 2.0's 128 px, 205 MB for 50,000.
    """

    mean: torch.Tensor
    std: torch.Tensor
    scaling_factor: float

    def __len__(self) -> int:
        return len(self.mean)

    def sample(self, indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Fresh latents of these images, scaled as the UNet expects them."""
        mean, std = self.mean[indices].float(), self.std[indices].float()
        noise = torch.randn(mean.shape, generator=generator).to(mean.device)
        return (mean + std * noise) * self.scaling_factor


@torch.no_grad()
def encode_images(
    images: Callable[[range], np.ndarray],
    count: int,
    base: BaseModel,
    size: int,
    path: Path,
    made_from: str,
    progress: Callable = tqdm,
) -> Moments:
    """Moments of `count` images at `size` pixels, from `path` if they were made from the same before.

    Until all are made, they are kept in parts beside it.

    `images` gives those of a range of places: uint8 (n, 3, h, w). `made_from` names images and their order (a
    fingerprint); the VAE's hash is added to it here. Raises `BadInput` if the VAE's answer is not finite.
    """
    vae_sha = {name: sha for name, sha in base.sha256.items() if name.startswith("vae/")}
    key = sha256_of_json([made_from, vae_sha, size, "float16"])
    device = base.device
    parts = path.with_suffix(".parts")
    kept = read_moments(path, key)
    if kept is None:
        pieces = []
        with progress(total=count, desc="encode", unit="img") as bar:
            for start in range(0, count, PART):
                part, stop = parts / f"{start:08d}.npz", min(start + PART, count)
                piece = read_moments(part, key)
                if piece is None:
                    piece = encode_part(images, range(start, stop), base, size, bar.update)
                    write_moments(part, key, piece)
                else:
                    bar.update(stop - start)
                pieces.append(piece)
        # A VAE may answer in another memory layout than a file gives back, and layouts choose algorithms, whose last bits
        # differ: a training that was cut after this would not end with the same bytes.
        kept = tuple(np.ascontiguousarray(np.concatenate(piece)) for piece in zip(*pieces, strict=True))
        write_moments(path, key, kept)
    shutil.rmtree(parts, ignore_errors=True)
    return Moments(*(torch.from_numpy(array).to(device) for array in kept), base.scaling_factor)


def encode_part(
    images: Callable[[range], np.ndarray], places: range, base: BaseModel, size: int, encoded: Callable[[int], Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Means and deviations of the images at some places, float16. Raises `BadInput`."""
    batches = []
    for start in range(places.start, places.stop, ENCODE_BATCH):
        batch = to_model(images(range(start, min(start + ENCODE_BATCH, places.stop))), size).to(base.device)
        with raise_on_oom(f"{len(batch)} images of {size} px in the VAE", "take a smaller `base_image_size`"):
            posterior = base.vae.encode(batch).latent_dist
        batches.append((posterior.mean.half().cpu().numpy(), posterior.std.half().cpu().numpy()))
        encoded(len(batch))
    mean, std = (np.concatenate(batch) for batch in zip(*batches, strict=True))
    if not np.isfinite(mean).all() or not np.isfinite(std).all():
        raise BadInput(
            f"The VAE's posterior of the training images is not finite, or beyond the range of float16 (largest mean "
            f"{np.abs(mean).max():.3g}): is `base_model` whole, and of the right kind?"
        )
    return mean, std


def write_moments(path: Path, key: str, moments: tuple[np.ndarray, np.ndarray]) -> None:
    with atomic_write(path) as beside, beside.open("wb") as file:
        np.savez(file, mean=moments[0], std=moments[1], made_from=key)


def read_moments(path: Path, key: str) -> tuple[np.ndarray, np.ndarray] | None:
    """What `write_moments` wrote; None if there is nothing, or it was made from something else. Raises `BadInput`."""
    if not path.exists():
        return None
    kept = read_arrays(path, ["mean", "std", "made_from"], "move it away and run its step again, which makes it anew")
    return (kept["mean"], kept["std"]) if str(kept["made_from"]) == key else None
