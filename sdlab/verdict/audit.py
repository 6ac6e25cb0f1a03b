"""Whom does the chosen set expose? Steps 1 and 3 again on half of the training images, which coins draw, and attacks on it.

A set is made at the settings that were chosen (on all images), k times as large as that half. Whoever holds it, an image and
other images of the same source guesses whether the image was in that half (`attacks.py`); `exposure.py` says how well. The
same for whoever holds the model. At a few UNet epochs, exposure stands next to use: the CAS on validation images.

It is an attack, no proof: there is no formal guarantee, and a better attack may find more. The real model was trained on
twice as many images, in twice as many steps; it may expose each image more or less.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from sdlab.data.images import ImageDataset, Split, sha256_of_arrays
from sdlab.errors import BadInput
from sdlab.evaluation import classifier_seeds, load_optimum, save_arrays, train_and_score_classifiers
from sdlab.generation import SyntheticSet, generate_set, real_labels
from sdlab.latents import Moments, encode_part, encode_training_set
from sdlab.metrics import summarize
from sdlab.runs.checkpoints import checkpoint_sha, load_checkpoint
from sdlab.runs.experiment import Experiment
from sdlab.runs.files import read_json, sha256_of_json
from sdlab.runs.run import Run
from sdlab.sampling_config import SamplingConfig, load_table
from sdlab.seeds import derive_seed
from sdlab.settings import Settings
from sdlab.training import fine_tune_unet, train_class_encoder
from sdlab.verdict.attacks import (
    DRAWS,
    TIMESTEPS,
    Denoised,
    View,
    class_distances,
    denoise,
    model_scores,
    of_class,
    set_scores,
)
from sdlab.verdict.copies import flatten
from sdlab.verdict.exposure import FEWEST, HEADLINE, expose
from sdlab.verdict.judge import load_judge

EPOCHS, SHOWN = 4, 12  # UNet epochs that are attacked, at most; images that are shown


def toss_coins(settings: Settings, data: ImageDataset) -> np.ndarray:
    """Which training images are trained on, bool (n,): a fair coin for each. Raises `BadInput` for too few of either side."""
    members = np.random.default_rng(derive_seed(settings.seed, "audit", "coins")).random(len(data.train)) < 0.5
    inside, outside = int(members.sum()), int((~members).sum())
    if min(inside, outside) < FEWEST:
        raise BadInput(
            f"An audit trains on half of the training images and needs {FEWEST} on each side: of the {len(members)} here, coins "
            f"drew {inside} and left {outside} out."
        )
    return members


def audit(run: Run, members: np.ndarray) -> dict:
    """Stage 09's result: attacks on set and model, saved in `metrics/audit.json`, with the most exposed images in `audit/`."""
    if run.finished:
        return read_json(run.metrics_path("audit"))
    config, chosen = load_optimum(run, "search_2"), read_json(run.metrics_path("scaling"))["chosen"]
    half, moments, count = half_of(run, members), encode_training_set(run), int(chosen[1:]) * int(members.sum())
    train_on(half, moments, members, config)
    attack, found = Attack(half, run, moments), []
    for epoch in attacked_epochs(run.settings, config.unet_epoch):
        point = dataclasses.replace(config, unet_epoch=epoch)
        # The class counts of all training images: those of the members would tell who they are.
        labels, seed = real_labels(run.data.train.labels), derive_seed(run.settings.seed, "audit", "set")
        drawn = generate_set(half, point, count, seed, labels, f"epoch {epoch}")
        made = drawn.split(count)
        cas = train_and_score_classifiers(half, made, classifier_seeds(run), ["val"], f"epoch {epoch}")["val"]
        scores = dict(set=attack.on_set(drawn, made), model=attack.on_model(point))
        found.append(
            dict(epoch=epoch, cas=summarize(cas))
            | {target: expose_each(of_target, members) for target, of_target in scores.items()}
        )
    save_exposed(run, members, made, scores["set"][HEADLINE["set"]])
    sides = dict(members=int(members.sum()), others=int((~members).sum()), calibrated_by=len(run.data.val))
    result = dict(chosen=chosen, config=asdict(config), images=count, **sides, epochs=found)
    return run.save_metrics("audit", result)


def expose_each(scores: Mapping[str, np.ndarray], members: np.ndarray) -> dict[str, dict]:
    return {name: asdict(expose(values, members, len(scores))) for name, values in scores.items()}


def attacked_epochs(settings: Settings, chosen: int) -> list[int]:
    """UNet epochs evenly spread over those that are kept, up to the one that was chosen."""
    first = settings.first_kept_unet_epoch
    spread = np.linspace(first + (chosen - first) / EPOCHS, chosen, EPOCHS)
    return sorted({round(epoch) for epoch in spread})


# ------------------------------------------------------------------------------------------------ the half run


def half_of(run: Run, members: np.ndarray) -> Experiment:
    """The experiment on the members alone, in a folder that is removed when the stage is finished."""
    train = Split(run.data.train.images[members], run.data.train.labels[members])
    data = dataclasses.replace(run.data, train=train, source_images=None, files=())
    half = Experiment(dataclasses.replace(run.settings, cluster="none", training_processes=1), data, run.base)
    half.folder = half.work_folder = run.work_folder
    half.progress = run.progress
    return half


def train_on(half: Experiment, moments: Moments, members: np.ndarray, config: SamplingConfig) -> None:
    """Stages 1 and 3 as the settings have them, each up to the epoch that was chosen."""
    of_members = Moments(moments.mean[members], moments.std[members], moments.scaling_factor)
    for record in train_class_encoder(half, of_members):
        if record.epoch == config.class_encoder_epoch:
            break
    for record in fine_tune_unet(half, of_members, config.class_encoder_epoch):
        if record.epoch == config.unet_epoch:
            break


class Attack:
    """The attacks of an attacker who asks about all training images. What was computed lies in the work folder until the stage ends."""

    def __init__(self, half: Experiment, run: Run, moments: Moments):
        self.half, self.run, self.moments = half, run, moments
        self.asked, self.views = run.data.train, views_of(run)
        first = self.asked.images[:4]
        seen = {name: sha256_of_arrays(view(first)) for name, view in self.views.items()}
        self.made_by = [TIMESTEPS, DRAWS, run.settings.seed, seen]
        self.others = self.kept("others", lambda: self.distances(run.data.val))

    def kept(self, made_from: object, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Arrays by name: those of an interrupted attempt, if they were made from the same."""
        path = self.half.folder / "attacks" / f"{sha256_of_json([made_from, self.made_by])[:16]}.safetensors"
        if not path.exists():
            save_arrays(path, **compute())
        return load_file(path)

    def distances(self, among: Split) -> dict[str, np.ndarray]:
        return {name: class_distances(self.asked, among, view) for name, view in self.views.items()}

    def on_set(self, drawn: SyntheticSet, made: Split) -> dict[str, np.ndarray]:
        key = ["set", drawn.fingerprint(len(made))]
        return set_scores(self.kept(key, lambda: self.distances(made)), self.others)

    def on_model(self, config: SamplingConfig) -> dict[str, np.ndarray]:
        encoders, unets = (self.half.folder / part for part in ("class_encoder", "unet"))
        encoder = checkpoint_sha(encoders, config.class_encoder_epoch)
        of_base = self.kept(["base", encoder], lambda: self.denoised(config, 0))
        key = ["model", encoder, checkpoint_sha(unets, config.unet_epoch)]
        of_model = self.kept(key, lambda: self.denoised(config, config.unet_epoch))
        return model_scores(Denoised(**of_model), Denoised(**of_base))

    def denoised(self, config: SamplingConfig, epoch: int) -> dict[str, np.ndarray]:
        """What the half's UNet of an epoch makes of the images; epoch 0 is the base model."""
        base, table = unet_of(self.half, epoch), load_table(self.half, config.class_encoder_epoch).table()
        seed = derive_seed(self.run.settings.seed, "audit", "noise")
        with self.run.progress(total=len(self.moments), desc=f"denoise: epoch {epoch}", unit="img") as bar:
            return denoise(base, table, self.moments, self.asked.labels, seed, bar.update)._asdict()


def unet_of(half: Experiment, epoch: int):
    """The base model with the half's UNet of this epoch; epoch 0 is its own."""
    from diffusers import UNet2DConditionModel

    base = half.base
    if not epoch:
        return base
    return base.with_unet(load_checkpoint(UNet2DConditionModel, half.folder / "unet", epoch, base.device, base.dtype))


def views_of(run: Run) -> dict[str, View]:
    """What is compared: pixels, the means of the VAE's posteriors, and the judge's features.

    The judge was trained on members and others alike, so its features do not tell them apart.
    """
    size, resizing = run.settings.base_image_size, run.settings.base_resizing

    def latents(images: np.ndarray) -> np.ndarray:
        mean, _ = encode_part(run.base, lambda rows: images[rows], range(len(images)), size, lambda _: None, resizing)
        return mean.reshape(len(mean), -1).astype(np.float32)

    return dict(pixels=flatten, latents=latents, features=load_judge(run).features)


# ------------------------------------------------------------------------------------------------ pictures


def exposed_path(run: Experiment) -> Path:
    return run.folder / "audit" / "exposed.safetensors"


def save_exposed(run: Run, members: np.ndarray, made: Split, scores: np.ndarray) -> None:
    """The images with the highest scores, the nearest generated one of their class and the nearest other real one, by pixels."""
    highest, train = np.argsort(scores, kind="stable")[::-1][:SHOWN], run.data.train
    asked = train.images[highest]
    neighbours = [nearest_images(asked, train.labels[highest], split) for split in (made, run.data.val)]
    save_arrays(exposed_path(run), images=np.stack([asked, *neighbours]), members=members[highest])


def nearest_images(images: np.ndarray, labels: Sequence[int], split: Split) -> np.ndarray:
    """Of each image, the nearest one of its class in `split`."""
    from sklearn.metrics import pairwise_distances_argmin

    found = []
    for image, label in zip(images, labels, strict=True):
        candidates = of_class(split, label)
        (place,) = pairwise_distances_argmin(flatten(image[None]), flatten(candidates))
        found.append(candidates[place])
    return np.stack(found)


def load_exposed(run: Experiment) -> dict[str, np.ndarray]:
    """`images` uint8 (3, n, 3, h, w): real, nearest generated, nearest other real; `members` bool (n,): trained on?"""
    return load_file(exposed_path(run))
