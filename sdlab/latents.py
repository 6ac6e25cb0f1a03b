"""Images -> posterior moments of the VAE, computed once and cached: an epoch samples from them instead of encoding.

And images -> VAE -> images: what is lost on the way can be won back by no training that follows.
"""

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
from sdlab.data.images import ImageDataset, Split, TrainingImages, spread
from sdlab.data.npz import read_arrays
from sdlab.data.pixels import to_model, to_uint8
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
    path, size = run.folder / "latents" / "train.npz", run.settings.base_image_size
    encode = in_parts_of_training_set(run, encode_part_of_run)
    return encode_parts(encode, len(run.data.train), run.base, size, path, training_images_key(run), run.progress)


def training_images_key(run: Run) -> str:
    """Names the training images, and how they are resized unless it is the authors' way."""
    resizing = run.settings.base_resizing
    return run.data.fingerprint() + f" {resizing}" * (resizing != "bilinear")


def in_parts_of_training_set(run: Run, function: Callable) -> Callable:
    """`compute(parts, keep, on_progress)`, which calls `function(run, images, size, on_progress)` for each part."""

    def compute(parts: Sequence[range], *how: Callable) -> None:
        size = run.settings.base_image_size
        calls = [(TrainingImages(run.data, indices, size), size) for indices in parts]
        run.executor.each(function, run, calls, *how, steps=PART)

    return compute


def round_trip_training_set(run: Run) -> Split:
    """The training images as the VAE draws them, in the form of generated ones: encoded at `base_image_size`, decoded from the
    posterior's mean, at `image_size` pixels. They are cached until the stage is finished. Raises `BadInput`.
    """
    data, compute = run.data, in_parts_of_training_set(run, round_trip_part_of_run)
    key = cache_key(run.base, training_images_key(run), run.settings.base_image_size, data.image_size)
    path = run.folder / "begun" / "round_trips.npz"
    (images,) = compute_parts(compute, len(data.train), key, path, ("images",), "round trips", run.progress)
    return Split(images, data.train.labels)


def resizing_error(data: ImageDataset, base_size: int, resizing: str = "bilinear", images: int = 1000) -> float:
    """Mean error of a pixel, of 255, if training images are resized to the base model's size and back, without a VAE.

    Resizing is exact at equal sizes. It blurs most just above, and less from four times the size on.
    """
    count = len(data.train)
    indices = spread(count, images)
    batches = [indices[i : i + ENCODE_BATCH] for i in range(0, len(indices), ENCODE_BATCH)]
    at_base_size = (to_model(data.training_images(batch, base_size), base_size, resizing) for batch in batches)
    resized = np.concatenate([to_uint8(batch, data.image_size, resizing) for batch in at_base_size])
    return mean_error(resized, data.train.images[indices])


def mean_error(images: np.ndarray, others: np.ndarray) -> float:
    """Mean absolute difference of uint8 pixels, of 255."""
    starts = range(0, len(images), PART)
    parts = ((images[i : i + PART].astype(np.int16), others[i : i + PART]) for i in starts)
    return float(sum(np.abs(part - other).sum() for part, other in parts) / images.size)


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

    `made_from` names images and their order (a fingerprint); the VAE's hash is added here. Raises `BadInput` if the VAE's
    output is not finite.
    """
    key, names = cache_key(base, made_from, size, "float16"), ("mean", "std")
    moments = compute_parts(encode, count, key, path, names, "encode", progress)
    return Moments(*(torch.from_numpy(array).to(base.device) for array in moments), base.scaling_factor)


def cache_key(base: BaseModel, *made_from: Any) -> str:
    """Names what the VAE made from these."""
    vae_sha = {name: sha for name, sha in base.sha256.items() if name.startswith("vae/")}
    return sha256_of_json([made_from[0], vae_sha, *made_from[1:]])


def compute_parts(
    compute: Callable, count: int, key: str, path: Path, names: Sequence[str], desc: str, progress: Callable
) -> tuple[np.ndarray, ...]:
    """Arrays with a row for each of `count` images, from the cache `path` if it has this key; else from
    `compute(parts, keep, on_progress)`. Until all are there, parts lie next to `path`.
    """
    folder, arrays = path.with_suffix(".parts"), read_arrays_of(path, key, names)
    if arrays is None:
        parts = {range(start, min(start + PART, count)): folder / f"{start:08d}.npz" for start in range(0, count, PART)}
        missing = [indices for indices, file in parts.items() if read_arrays_of(file, key, names) is None]

        def keep(call: tuple, made: tuple[np.ndarray, ...]) -> None:
            indices = call[1] if isinstance(call[1], range) else call[0].indices
            write_arrays(parts[indices], key, dict(zip(names, made, strict=True)))

        done = count - sum(map(len, missing))
        with progress(total=count, initial=done, desc=desc, unit="img") as bar:
            compute(missing, keep, bar.update)
        # The VAE's memory layout may differ from a file's, and layouts choose algorithms, whose last bits differ: an
        # interrupted training would not end with the same bytes.
        made = [read_arrays_of(file, key, names) for file in parts.values()]
        arrays = tuple(np.ascontiguousarray(np.concatenate(part)) for part in zip(*made, strict=True))
        write_arrays(path, key, dict(zip(names, arrays, strict=True)))
    shutil.rmtree(folder, ignore_errors=True)
    return arrays


def encode_part_of_run(run: Run, images: TrainingImages | Split, size: int, on_progress: Callable) -> tuple:
    return encode_part(run.base, *source_of(images), size, on_progress, run.settings.base_resizing)


def round_trip_part_of_run(run: Run, images: TrainingImages | Split, size: int, on_progress: Callable) -> tuple:
    source, resizing = source_of(images), run.settings.base_resizing
    return (round_trip_part(run.base, *source, size, run.data.image_size, on_progress, resizing),)


def source_of(images: TrainingImages | Split) -> tuple[Callable[[range], np.ndarray], range]:
    """What reads the images of a part, and their indices: a worker has the part's images as a `Split`."""
    if isinstance(images, Split):
        return lambda indices: images.images[indices], range(len(images))
    return images.read, images.indices


@torch.no_grad()
def encode_part(
    base: BaseModel,
    images: Callable[[range], np.ndarray],
    indices: range,
    size: int,
    on_progress: Callable[[int], Any],
    resizing: str = "bilinear",
) -> tuple[np.ndarray, np.ndarray]:
    """Means and deviations of the images at some indices, float16. Raises `BadInput`."""
    batches = []
    for start in range(indices.start, indices.stop, ENCODE_BATCH):
        read = images(range(start, min(start + ENCODE_BATCH, indices.stop)))
        batch = to_model(read, size, resizing).to(base.device)
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


@torch.no_grad()
def round_trip_part(
    base: BaseModel,
    images: Callable[[range], np.ndarray],
    indices: range,
    size: int,
    image_size: int,
    on_progress: Callable,
    resizing: str = "bilinear",
) -> np.ndarray:
    """The images at some indices through the VAE and back: uint8 (n, 3, image_size, image_size). Raises `BadInput`."""
    batches = []
    for start in range(indices.start, indices.stop, ENCODE_BATCH):
        read = images(range(start, min(start + ENCODE_BATCH, indices.stop)))
        batch = to_model(read, size, resizing).to(base.device)
        with raise_on_oom(f"{len(batch)} images of {size} px in the VAE", "take a smaller `base_image_size`"):
            decoded = base.vae.decode(base.vae.encode(batch).latent_dist.mean).sample
            batches.append(to_uint8(decoded, image_size, resizing))
        on_progress(len(batch))
    return np.concatenate(batches)


def write_arrays(path: Path, key: str, arrays: dict[str, np.ndarray]) -> None:
    with atomic_write(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays, made_from=key)


def read_arrays_of(path: Path, key: str, names: Sequence[str]) -> tuple[np.ndarray, ...] | None:
    """The arrays of `write_arrays`; None if there are none, or they were made from other inputs. Raises `BadInput`."""
    if not path.exists():
        return None
    arrays = read_arrays(path, [*names, "made_from"], "move it away and run its stage again")
    return tuple(arrays[name] for name in names) if str(arrays["made_from"]) == key else None
