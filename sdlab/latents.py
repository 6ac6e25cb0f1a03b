"""Images -> posterior moments of the VAE, computed once and cached: an epoch samples from them instead of encoding."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from sdlab.base_models import BaseModel
from sdlab.cluster.executors import InThisProcess
from sdlab.data.images import Split, TrainingImages
from sdlab.data.npz import read_arrays
from sdlab.data.pixels import to_model
from sdlab.devices import raise_on_oom
from sdlab.errors import BadInput
from sdlab.runs.files import atomic_write, sha256_of_json
from sdlab.runs.run import Run

ENCODE_BATCH = 64
PART = 1024  # an interruption loses at most this many images


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of each image's latent posterior, (n, channels, h, w) each, before scaling.

    Cached in half precision: 4 KiB an image at SD 2.0's 128 px, 205 MB for 50,000.
    """

    mean: torch.Tensor
    std: torch.Tensor
    scaling_factor: float

    def __len__(self) -> int:
        return len(self.mean)

    def sample(self, indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Fresh latents (mean + std * noise) * scaling_factor of these images, as the UNet expects them."""
        mean, std = self.mean[indices].float(), self.std[indices].float()
        noise = torch.randn(mean.shape, generator=generator).to(mean.device)
        return (mean + std * noise) * self.scaling_factor


def encode_training_set(run: Run) -> Moments:
    """The training images' posterior moments, cached in `latents/train.npz`."""
    data, size, path = run.data, run.settings.base_image_size, run.folder / "latents" / "train.npz"

    def encode(parts: Sequence[range], *how: Callable) -> None:
        calls = [(TrainingImages(data, indices, size), size) for indices in parts]
        run.executor.each(encode_part_of_run, run, calls, *how, steps=PART)

    return encode_parts(encode, len(data.train), run.base, size, path, data.fingerprint(), run.progress)


def encode_images(
    images: Callable[[range], np.ndarray], count: int, base: BaseModel, size: int, path: Path, made_from: str,
    progress: Callable = tqdm,
) -> Moments:  # fmt: skip
    """Moments of `count` images at `size` pixels, computed in this process, or from the cache `path`.

    `images` returns those of a range of indices: uint8 (n, 3, h, w).
    """

    def encode(parts: Sequence[range], *how: Callable) -> None:
        InThisProcess().each(encode_part, base, [(images, indices, size) for indices in parts], *how)

    return encode_parts(encode, count, base, size, path, made_from, progress)


def encode_parts(
    encode: Callable, count: int, base: BaseModel, size: int, path: Path, made_from: str, progress: Callable
) -> Moments:
    """Moments from the cache `path` if it was made from the same; else `encode(parts, keep, on_progress)` makes them.

    `made_from` names images and their order (a fingerprint); the VAE's hash is added here. Until all are encoded, parts lie
    next to `path`. Raises `BadInput` if the VAE's output is not finite.
    """
    vae_sha = {name: sha for name, sha in base.sha256.items() if name.startswith("vae/")}
    key = sha256_of_json([made_from, vae_sha, size, "float16"])
    folder, moments = path.with_suffix(".parts"), read_moments(path, key)
    if moments is None:
        parts = {range(start, min(start + PART, count)): folder / f"{start:08d}.npz" for start in range(0, count, PART)}
        missing = [indices for indices, file in parts.items() if read_moments(file, key) is None]

        def keep(call: tuple, moments: tuple[np.ndarray, np.ndarray]) -> None:
            indices = call[1] if isinstance(call[1], range) else call[0].indices
            write_moments(parts[indices], key, moments)

        done = count - sum(map(len, missing))
        with progress(total=count, initial=done, desc="encode", unit="img") as bar:
            encode(missing, keep, bar.update)
        # The VAE's memory layout may differ from a file's, and layouts choose algorithms, whose last bits differ: an
        # interrupted training would not end with the same bytes.
        encoded = [read_moments(file, key) for file in parts.values()]
        moments = tuple(np.ascontiguousarray(np.concatenate(part)) for part in zip(*encoded, strict=True))
        write_moments(path, key, moments)
    shutil.rmtree(folder, ignore_errors=True)
    return Moments(*(torch.from_numpy(array).to(base.device) for array in moments), base.scaling_factor)


def encode_part_of_run(run: Run, images: TrainingImages | Split, size: int, on_progress: Callable) -> tuple:
    """A worker has the part's images as a `Split`."""
    if isinstance(images, Split):
        return encode_part(run.base, lambda indices: images.images[indices], range(len(images)), size, on_progress)
    return encode_part(run.base, images.read, images.indices, size, on_progress)


@torch.no_grad()
def encode_part(
    base: BaseModel, images: Callable[[range], np.ndarray], indices: range, size: int, on_progress: Callable[[int], Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Means and deviations of the images at some indices, float16. Raises `BadInput`."""
    batches = []
    for start in range(indices.start, indices.stop, ENCODE_BATCH):
        batch = to_model(images(range(start, min(start + ENCODE_BATCH, indices.stop))), size).to(base.device)
        with raise_on_oom(f"{len(batch)} images of {size} px in the VAE", "take a smaller `base_image_size`"):
            posterior = base.vae.encode(batch).latent_dist
        batches.append((posterior.mean.half().cpu().numpy(), posterior.std.half().cpu().numpy()))
        on_progress(len(batch))
    mean, std = (np.concatenate(batch) for batch in zip(*batches, strict=True))
    if not np.isfinite(mean).all() or not np.isfinite(std).all():
        raise BadInput(
            f"The VAE's posterior of the training images is not finite, or beyond the range of float16 (largest mean "
            f"{np.abs(mean).max():.3g}): is `base_model` whole, and of the right kind?"
        )
    return mean, std


def write_moments(path: Path, key: str, moments: tuple[np.ndarray, np.ndarray]) -> None:
    with atomic_write(path) as partial, partial.open("wb") as file:
        np.savez(file, mean=moments[0], std=moments[1], made_from=key)


def read_moments(path: Path, key: str) -> tuple[np.ndarray, np.ndarray] | None:
    """The arrays of `write_moments`; None if there are none, or they were made from other inputs. Raises `BadInput`."""
    if not path.exists():
        return None
    arrays = read_arrays(path, ["mean", "std", "made_from"], "move it away and run its stage again")
    return (arrays["mean"], arrays["std"]) if str(arrays["made_from"]) == key else None
