"""Images -> posterior moments of the VAE, computed once and kept: an epoch samples from them instead of encoding."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from sdlab.base_models import BaseModel
from sdlab.files import sha256_of_json, written_beside
from sdlab.pixels import to_model
from sdlab.settings import BadInput

ENCODE_BATCH = 64


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

    `images` gives those of a range of places: uint8 (n, 3, h, w). `made_from` names images and their order (a
    fingerprint); the VAE's hash is added to it here. Raises `BadInput` if the VAE's answer is not finite.
    """
    vae_sha = {name: sha for name, sha in base.sha256.items() if name.startswith("vae/")}
    key = sha256_of_json([made_from, vae_sha, size, "float16"])
    device = base.device
    if path.exists():
        with np.load(path, allow_pickle=False) as kept:
            if str(kept["made_from"]) == key:
                mean, std = (torch.from_numpy(kept[name]).to(device) for name in ("mean", "std"))
                return Moments(mean, std, base.scaling_factor)
    parts = []
    with progress(total=count, desc="encode", unit="img") as bar:
        for start in range(0, count, ENCODE_BATCH):
            batch = to_model(images(range(start, min(start + ENCODE_BATCH, count))), size).to(device)
            posterior = base.vae.encode(batch).latent_dist
            parts.append((posterior.mean.half(), posterior.std.half()))
            bar.update(len(batch))
    # A VAE may answer in another memory layout than a file gives back, and layouts choose algorithms, whose last bits
    # differ: a training that was cut after this would not end with the same bytes.
    mean, std = (torch.cat(part).contiguous() for part in zip(*parts, strict=True))
    if not torch.isfinite(mean).all() or not torch.isfinite(std).all():
        raise BadInput(
            f"The VAE's posterior of the training images is not finite, or beyond the range of float16 (largest mean "
            f"{mean.abs().max():.3g}): is `base_model` whole, and of the right kind?"
        )
    with written_beside(path) as beside, beside.open("wb") as file:
        np.savez(file, mean=mean.cpu().numpy(), std=std.cpu().numpy(), made_from=key)
    return Moments(mean, std, base.scaling_factor)
