"""Images -> scores that are high for those that a release was trained on: attacks on a set, and on a model.

On a set: how near is its nearest image of the same class, in pixels, in the VAE's latents, in a classifier's features?
Alone, that finds whoever is typical. *Calibrated* by the distance to the nearest of other real images, it finds those whom
the set is nearer to than chance explains:

    log (distance to the nearest other real image) - log (distance to the nearest generated image)

On a model: how well does it denoise the image, at a few timesteps and noises, alone or compared with the base model, and
how small is its answer to the image itself (2509.25003)? A high score is a guess, not a proof (docs/verdict.md).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch

from sdlab.base_models import BaseModel
from sdlab.data.images import Split
from sdlab.devices import raise_on_oom
from sdlab.latents import Moments
from sdlab.seeds import generator
from sdlab.training import look_up, predict, prediction_target

TIMESTEPS, DRAWS, BATCH = (50, 150, 400), 2, 64  # of 1000; noises at each; images at a time
TOO_NEAR = 1e-3  # of the usual distance to another image: the same image
TINIEST = 1e-12  # squared error, so that a model that knows an image by heart has a logarithm
View = Callable[[np.ndarray], np.ndarray]  # uint8 images (n, 3, h, w) -> what is compared, (n, d)


def set_scores(to_made: Mapping[str, np.ndarray], to_others: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Attacks on a set: name -> a score (n,) of each image, from its distances (n,) in each view.

    `to_made` are distances to the nearest image of the set, `to_others` to the nearest real image that nobody trained on. Each
    view gives two attacks; one more is the mean of the calibrated ones.
    """
    scores, calibrated = {}, []
    for name, made in to_made.items():
        typical = float(np.median(to_others[name])) or 1.0
        # A copy of the image itself among the others says nothing about how near others usually are.
        others = np.where(to_others[name] < TOO_NEAR * typical, typical, to_others[name])
        calibrated.append(np.log(others) - np.log(np.maximum(made, TOO_NEAR * typical)))
        scores |= {name: -made, f"{name}, calibrated": calibrated[-1]}
    return scores | {"all, calibrated": np.mean(calibrated, axis=0)}


def class_distances(asked: Split, among: Split, view: View) -> np.ndarray:
    """The Euclidean distance (n,) of each image to the nearest of its class, or to the nearest of all where there is none of it.

    One class is in memory at a time.
    """
    from sklearn.metrics import pairwise_distances_argmin_min

    distances = np.empty(len(asked))
    for c in np.unique(asked.labels):
        same = asked.labels == c
        distances[same] = pairwise_distances_argmin_min(view(asked.images[same]), view(of_class(among, c)))[1]
    return distances


def of_class(split: Split, label: int) -> np.ndarray:
    """The images of a class; all if there are none."""
    same = split.labels == label
    return split.images[same] if same.any() else split.images


def model_scores(of_model: "Denoised", of_base: "Denoised") -> dict[str, np.ndarray]:
    """Attacks on a released model: name -> a score (n,) of each image. No coin concerns the base model.

    Logarithms, so that no timestep outweighs the others.
    """
    return {
        "denoising loss": -np.log(of_model.losses).mean(0),
        "denoising loss, calibrated": (np.log(of_base.losses) - np.log(of_model.losses)).mean(0),
        "size of the answer": -np.log(of_model.answers).mean(0),
    }


class Denoised(NamedTuple):
    """At each of a few timesteps, of each image, (timesteps, n): the mean squared error over a few noises; the mean square of the
    noise that is predicted in the image itself.
    """

    losses: np.ndarray
    answers: np.ndarray


@torch.no_grad()
def denoise(
    base: BaseModel, table: torch.Tensor, moments: Moments, labels: np.ndarray, seed: int,
    on_progress: Callable[[int], object] = lambda _: None,
) -> Denoised:  # fmt: skip
    """What the UNet of `base` makes of the images with these moments and labels (n,), with a table of conditions.

    Every image gets the same noises. Raises `BadInput` if the memory is too small.
    """
    scheduler = base.noise_scheduler()
    losses, answers = np.zeros((2, len(TIMESTEPS), len(moments)))
    labels = torch.as_tensor(labels, device=base.device)
    for rows in np.array_split(np.arange(len(moments)), range(BATCH, len(moments), BATCH)):
        z_0, draw = moments.mean[rows].float() * moments.scaling_factor, generator(seed)
        encoder_hidden_states = look_up(table, labels[rows])
        for place, t in enumerate(TIMESTEPS):
            timesteps = torch.full((len(rows),), t, device=base.device)
            with raise_on_oom(f"{len(rows)} images in the UNet", "take a smaller `base_image_size`"):
                output = predict(base, z_0, timesteps, encoder_hidden_states).float()
                answers[place, rows] = per_image(as_noise(base, scheduler, output, z_0, timesteps) ** 2)
                for _ in range(DRAWS):
                    noise = torch.randn((1, *z_0.shape[1:]), generator=draw).to(base.device).expand_as(z_0)
                    z_t = scheduler.add_noise(z_0, noise, timesteps)
                    target = prediction_target(base, scheduler, z_0, noise, timesteps)
                    noise_pred = predict(base, z_t, timesteps, encoder_hidden_states).float()
                    losses[place, rows] += per_image((noise_pred - target) ** 2) / DRAWS
        on_progress(len(rows))
    return Denoised(np.maximum(losses, TINIEST), np.maximum(answers, TINIEST))


def as_noise(base: BaseModel, scheduler, output, latents, timesteps) -> torch.Tensor:
    """The predicted noise, whichever the base model predicts: sqrt(a_t) v + sqrt(1 - a_t) z_t of a velocity v."""
    if base.prediction_type == "epsilon":
        return output
    kept = scheduler.alphas_cumprod.to(latents.device)[timesteps].view(-1, 1, 1, 1)
    return kept.sqrt() * output + (1 - kept).sqrt() * latents


def per_image(values: torch.Tensor) -> np.ndarray:
    return values.flatten(1).mean(1).cpu().numpy()
