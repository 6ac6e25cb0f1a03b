"""The parts of sdlab that take time, each with the usual way to do the same work.

The usual way is the common one, well used: diffusers' StableDiffusionPipeline that saves a PNG per image, diffusers'
training loop that encodes images as they come, a torchvision-style DataLoader loop for the classifiers.
"""

import copy
import dataclasses
import functools
import importlib.util
import itertools
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from comparison import BenchmarkSettings, synchronize, time_in_turn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from sdlab.base_models import BaseModel, load_base_model
from sdlab.classifier import ClassifierRecipe, ResNet20
from sdlab.data.images import ImageDataset
from sdlab.data.model_files import is_available_locally
from sdlab.data.pixels import to_model, to_uint8
from sdlab.errors import BadInput
from sdlab.evaluation import train_and_score_classifiers
from sdlab.generation import GenerationPlan, generate
from sdlab.latents import encode_images
from sdlab.paths import PROJECT_ROOT
from sdlab.runs.experiment import Experiment
from sdlab.runs.trainings import TrainingPlan
from sdlab.sampling_config import prepare_unet
from sdlab.schedulers import make_scheduler
from sdlab.seeds import derive_seed
from sdlab.settings import Settings
from sdlab.tools.measuring import load_without_weights
from sdlab.training import train

SILENT = functools.partial(tqdm, disable=True)
REFERENCE = PROJECT_ROOT / ".venv" / "reference"  # `make benchmarks` installs transformers here


def base_model_to_time(settings: Settings) -> BaseModel:
    """The base model; if it is not on this machine, one of its size with random weights, which takes as long."""
    if REFERENCE.is_dir() and str(REFERENCE) not in sys.path:
        sys.path.append(str(REFERENCE))  # before diffusers is imported, which looks for transformers then
    if is_available_locally(settings):
        return load_base_model(settings)
    base, generator = load_without_weights(settings), torch.Generator().manual_seed(0)
    for parameter in (*base.vae.parameters(), *base.unet.parameters()):
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return base


def new_class_encoder(base: BaseModel, settings: Settings, num_classes: int) -> torch.nn.Module:
    """An untrained Class-Encoder, always with the same weights."""
    from sdlab.class_encoder import ClassEncoder  # diffusers is slow to import

    torch.manual_seed(0)
    return ClassEncoder(num_classes, base.tokens, base.width, settings.class_encoder_hidden).to(base.device)


def stable_diffusion_pipeline(base: BaseModel, scheduler: Any) -> Any:
    """diffusers' own pipeline around the same modules. Raises `BadInput` if transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise BadInput("diffusers' StableDiffusionPipeline needs transformers: `make benchmarks` installs it.")
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae=base.vae, unet=base.unet, scheduler=scheduler, text_encoder=None, tokenizer=None, safety_checker=None,
        feature_extractor=None, image_encoder=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Generation:
    """Bulk generation of the same images: sdlab's shards, and diffusers' pipeline with a PNG per image.

    Raises `BadInput` if transformers is not installed.
    """

    def __init__(self, base: BaseModel, settings: BenchmarkSettings, num_classes: int):
        from sdlab.diffusion_pipeline import ClassConditionalStableDiffusionPipeline  # diffusers is slow to import

        encoder = new_class_encoder(base, settings, num_classes)
        torch.nn.init.normal_(encoder.linear_in.bias)  # a trained null condition is not zero
        self.base, self.count = base, settings.images
        self.class_table = encoder.tabulated().to(base.device).requires_grad_(False)
        unet = prepare_unet(base.unet, self.class_table, settings)
        scheduler, theirs = (make_scheduler(settings.scheduler, base.scheduler_config) for _ in range(2))
        self.pipeline = ClassConditionalStableDiffusionPipeline(base.vae, unet, self.class_table, scheduler)
        self.diffusers_pipeline = stable_diffusion_pipeline(base, theirs)
        self.plan = GenerationPlan(
            weights="benchmark", scheduler=settings.scheduler, num_inference_steps=settings.default_num_inference_steps,
            guidance_scale=settings.default_guidance_scale, guidance_interval=(0.0, 1.0),
            labels=tuple(range(num_classes)), seed=0, base_size=settings.base_image_size,
            image_size=settings.base_image_size, shard_size=settings.shard_size,
        )  # fmt: skip
        self.name = (
            f"{self.count} images of {self.plan.base_size} px, {self.plan.num_inference_steps} inference steps, guidance "
            f"{self.plan.guidance_scale:g}, {base.dtype}{', compile_unet' * settings.compile_unet}"
        ).replace("torch.", "")
        self.batch_size = self.count  # of diffusers' pipeline

    @property
    def usual_way(self) -> str:
        return f"StableDiffusionPipeline, batches of {self.batch_size}, a PNG per image"

    def ours(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            generate(self.pipeline, self.plan, Path(folder), self.count, SILENT)

    def usual(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for first in range(0, self.count, self.batch_size):
                images = self.usual_images(first, min(first + self.batch_size, self.count), "pil")
                for index, image in enumerate(images, start=first):
                    image.save(Path(folder) / f"{index:06d}.png")

    def inputs(self, first: int, last: int) -> tuple[np.ndarray, torch.Tensor]:
        """Labels and noise of images `first` to `last - 1`, the same as in sdlab's shards."""
        seeds = [derive_seed(self.plan.seed, i) for i in range(first, last)]
        return self.plan.labels_of(first, last), self.pipeline.noise(seeds, self.plan.base_size)

    def usual_images(self, first: int, last: int, output_type: str) -> Any:
        """Images of diffusers' pipeline: PIL for "pil", an array (n, h, w, 3) in [0, 1] for "np"."""
        labels, noise = self.inputs(first, last)
        conditions = self.class_table.table().to(self.base.unet.dtype)
        return self.diffusers_pipeline(
            prompt_embeds=conditions[labels], negative_prompt_embeds=conditions[-1:].repeat(last - first, 1, 1),
            num_inference_steps=self.plan.num_inference_steps, guidance_scale=self.plan.guidance_scale,
            latents=noise.to(self.base.device, self.base.unet.dtype), output_type=output_type,
        ).images  # fmt: skip

    def largest_differences(self, count: int = 4) -> tuple[float, float]:
        """Largest difference of a pixel in [0, 1]: between the two ways, and of diffusers' own at two batch sizes.

        The second is what rounding alone makes.
        """
        labels, noise = self.inputs(0, count)
        plan, usual = self.plan, self.usual_images(0, count, "np")
        ours = self.pipeline(
            labels, plan.num_inference_steps, plan.guidance_scale, latents=noise, output_type="np"
        ).images
        halves = [self.usual_images(first, first + count // 2, "np") for first in (0, count // 2)]
        return float(np.abs(ours - usual).max()), float(np.abs(np.concatenate(halves) - usual).max())

    def choose_batch_size(self) -> dict[int, float]:
        """Images per second of diffusers' pipeline at a few batch sizes. It uses the fastest from then on."""
        rates = {}
        for size in sorted({size for size in (4, 16, 64, 256) if size < self.count} | {self.count}):
            started = time.perf_counter()
            self.usual_images(0, size, "pil")
            synchronize(self.base.device)
            rates[size] = size / (time.perf_counter() - started)
        self.batch_size = max(rates, key=rates.get)
        return rates


def profile_unet(generation: Generation) -> tuple[pd.Series, str]:
    """One pass of the UNet: share of its time by operation (%), largest first, and a sentence on its arithmetic."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes to stderr that there is no GPU
    from torch.profiler import profile
    from torch.utils.flop_counter import FlopCounterMode

    unet, device = generation.pipeline.unet, generation.base.device
    count, time_of = min(2 * generation.count, 250), f"self_{'cpu' if device.type == 'cpu' else 'device'}_time_total"
    latents = generation.inputs(0, 1)[1].to(device, unet.dtype).repeat(count, 1, 1, 1)
    conditions = generation.pipeline.conditions(torch.zeros(count, dtype=torch.long, device=device))[0]
    side = 2048 if device.type == "cpu" else 8192
    matrix = torch.randn(side, side, device=device, dtype=unet.dtype)

    @torch.no_grad()
    def one_pass():
        unet(latents, torch.tensor(500, device=device), conditions)

    with FlopCounterMode(display=False) as counter:
        one_pass()
    seconds = time_in_turn({"pass": one_pass, "product": lambda: matrix @ matrix}, 5, device).median()
    with profile() as profiler:
        one_pass()
        synchronize(device)
    spent = pd.Series({event.key: getattr(event, time_of) for event in profiler.key_averages()})
    flops, peak = counter.get_total_flops(), 2 * side**3 / seconds["product"]
    return (100 * spent / spent.sum()).sort_values(ascending=False), (
        f"One pass of {count} images: {flops / 1e9:.0f} GFLOP in {seconds['pass']:.3g} s, {flops / seconds['pass'] / 1e9:.0f} "
        f"GFLOP/s. A large matrix product reaches {peak / 1e9:.0f} GFLOP/s; at that rate the pass would take {flops / peak:.3g} s."
    )


class Scaling:
    """Sets of x1 ... x10: each size is the beginning of one pool, or a set of its own."""

    def __init__(self, generation: Generation, unit: int, largest: int = 10):
        """`unit` images are x1. Five inference steps are enough, as both ways generate an image equally fast."""
        self.plan = dataclasses.replace(generation.plan, num_inference_steps=5, shard_size=unit)
        self.pipeline, self.sizes = generation.pipeline, [k * unit for k in range(1, largest + 1)]
        self.name, self.usual_way = f"x1 ... x{largest} of {unit} images", "a separate set for each size"
        self.generated = {"ours": 0, "usual": 0}  # images, in the last repetition

    def ours(self) -> None:
        self.generate("ours", [self.plan] * len(self.sizes))

    def usual(self) -> None:
        self.generate("usual", [dataclasses.replace(self.plan, seed=size) for size in self.sizes])

    def generate(self, way: str, plans: Sequence[GenerationPlan]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for plan, size in zip(plans, self.sizes, strict=True):
                generate(self.pipeline, plan, Path(folder), size, SILENT)
            self.generated[way] = self.plan.shard_size * len(list(Path(folder).glob("*/shard_*")))


class LabelledImages(Dataset):
    """Images one at a time, each transformed when it is asked for, as usual data sets give them."""

    def __init__(self, images: Sequence, labels: np.ndarray, transform: Callable[[Any], torch.Tensor]):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), int(self.labels[index])


class Training:
    """An epoch of the Class-Encoder or the UNet: from latents encoded once, and with images encoded as they come.

    There is one UNet, which both ways continue to train: time does not depend on its weights, and at Stable Diffusion's
    size a second UNet with its optimiser does not fit into the memory.
    """

    def __init__(self, part: str, base: BaseModel, settings: BenchmarkSettings, data: ImageDataset):
        self.part, self.base, self.settings = part, base, settings
        batch_size, learning_rate, self.epochs = (
            getattr(settings, f"{part}_{name}") for name in ("batch_size", "learning_rate", "epochs")
        )
        self.plan = TrainingPlan(
            part=part, epochs=1, batch_size=batch_size, learning_rate=learning_rate, seed=0,
            weight_decay=settings.weight_decay, max_grad_norm=settings.max_grad_norm,
        )  # fmt: skip
        self.count, size = min(settings.images, len(data.train)), settings.base_image_size
        self.images = to_uint8(to_model(data.training_images(range(self.count), size), size), size)
        self.labels = data.train.labels[: self.count]
        self.encoder = new_class_encoder(base, settings, data.num_classes)
        self.name = f"{dict(class_encoder='Class-Encoder', unet='fine-tuning')[part]} epoch, {self.count} images"
        self.usual_way = f"diffusers' training loop, images encoded as they come, batches of {batch_size}"

    def models(self) -> tuple[BaseModel, torch.nn.Module]:
        """The base model and a copy of the Class-Encoder. The weights that are trained are float32."""
        if self.part == "unet":
            self.base.unet.float()
        return self.base, copy.deepcopy(self.encoder)

    def ours(self) -> float:
        """Seconds of an epoch plus its share of encoding, which all epochs of the settings need only once."""
        base, encoder = self.models()
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            moments = encode_images(
                lambda rows: self.images[rows.start : rows.stop], self.count, base, self.settings.base_image_size,
                Path(folder) / "moments.npz", "benchmark", SILENT,
            )  # fmt: skip
            synchronize(base.device)
            encoding = time.perf_counter() - started
            (epoch,) = train(self.plan, base, encoder, moments, self.labels, Path(folder) / "part", None, SILENT)
        return encoding / self.epochs + epoch.seconds

    def usual(self) -> float:
        """Seconds of an epoch as diffusers' examples train: encode, add noise, predict, step."""
        base, encoder = self.models()
        trained, frozen = (encoder, base.unet) if self.part == "class_encoder" else (base.unet, encoder)
        frozen.requires_grad_(False).eval()
        trained.requires_grad_(True).train()
        device, scheduler, unet, plan = base.device, base.noise_scheduler(), base.unet, self.plan
        dataset = LabelledImages(self.images, self.labels, lambda image: torch.from_numpy(image).float() / 127.5 - 1)
        loader = DataLoader(dataset, plan.batch_size, shuffle=True)
        optimizer = torch.optim.AdamW(trained.parameters(), lr=plan.learning_rate, weight_decay=plan.weight_decay)
        lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(loader))
        scaler = torch.amp.GradScaler(device.type, enabled=base.dtype == torch.float16)
        started = time.perf_counter()
        for images, labels in loader:
            with torch.no_grad():
                latents = base.vae.encode(images.to(device)).latent_dist.sample() * base.scaling_factor
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(labels),), device=device)
            noisy = scheduler.add_noise(latents, noise, timesteps)
            with torch.autocast(device.type, base.dtype, enabled=base.dtype != torch.float32):
                one_hot = F.one_hot(labels.to(device), encoder.config.num_classes).float()
                noise_pred = unet(noisy.to(unet.dtype), timesteps, encoder(one_hot).to(unet.dtype)).sample
            target = noise if base.prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
            loss = F.mse_loss(noise_pred.float(), target.float())
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(trained.parameters(), plan.max_grad_norm)
            scaler.step(optimizer)
            scaler.update()
            lr_scheduler.step()
            optimizer.zero_grad()
        synchronize(device)
        return time.perf_counter() - started


class Classifiers:
    """A cell's classifiers, one per seed, on the real images. Test accuracies of both ways are kept: they have to agree."""

    def __init__(self, settings: BenchmarkSettings, data: ImageDataset, device: torch.device):
        from PIL import Image
        from torchvision.transforms import ToTensor

        self.settings, self.data, self.device = settings, data, device
        self.recipe, self.repetition = ClassifierRecipe.from_settings(settings), {"ours": 0, "usual": 0}
        self.accuracy: dict[str, list[float]] = {"ours": [], "usual": []}
        self.loaders = []
        for split in (data.train, data.val, data.test):
            pictures = [Image.fromarray(image) for image in split.images.transpose(0, 2, 3, 1)]
            is_train = split is data.train
            dataset = LabelledImages(pictures, split.labels, ToTensor())
            self.loaders.append(DataLoader(dataset, self.recipe.batch_size if is_train else 1024, shuffle=is_train))
        classifiers = f"{settings.classifier_seeds} ResNet20-{settings.classifier_filters}"
        self.name = f"{classifiers} on {len(data.train)} images of {data.image_size} px"
        self.usual_way = "PIL, ToTensor, DataLoader; one classifier after the other"

    def seeds(self, way: str) -> list[int]:
        """New ones in each repetition, the same for both ways."""
        self.repetition[way] += 1
        return [derive_seed("benchmark", self.repetition[way], i) for i in range(self.settings.classifier_seeds)]

    def ours(self) -> None:
        experiment = Experiment(self.settings, self.data)
        experiment.progress = SILENT
        scores = train_and_score_classifiers(experiment, self.data.train, self.seeds("ours"), ["test"])
        self.accuracy["ours"] += [score.accuracy for score in scores["test"]]

    def usual(self) -> None:
        self.accuracy["usual"] += [self.train_usual_classifier(seed) for seed in self.seeds("usual")]

    def train_usual_classifier(self, seed: int) -> float:
        """The recipe of `train_classifier` written like a PyTorch tutorial. Returns the test accuracy."""
        recipe, device, (train, val, test) = self.recipe, self.device, self.loaders
        torch.manual_seed(seed)
        model = ResNet20(self.data.num_classes, recipe.filters).to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, "max", factor=0.1, patience=recipe.patience - 1, threshold=0.0, min_lr=recipe.min_learning_rate
        )
        steps = recipe.train_steps or len(train) * recipe.epochs
        checks = {round(steps * (epoch + 1) / recipe.epochs) for epoch in range(recipe.epochs)}
        best_accuracy, best_weights, checks_since_best = -1.0, None, 0
        batches = itertools.chain.from_iterable(itertools.repeat(train))
        for step, (images, labels) in zip(range(1, steps + 1), batches, strict=False):
            model.train()
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images.to(device)), labels.to(device), label_smoothing=recipe.label_smoothing)
            loss.backward()
            optimizer.step()
            if step in checks:
                val_accuracy = self.usual_accuracy(model, val)
                plateau.step(val_accuracy)
                checks_since_best += 1
                if val_accuracy > best_accuracy:
                    best_accuracy, best_weights, checks_since_best = val_accuracy, copy.deepcopy(model.state_dict()), 0
            if checks_since_best >= recipe.stop_patience:
                break
        model.load_state_dict(best_weights)
        return self.usual_accuracy(model, test)

    @torch.no_grad()
    def usual_accuracy(self, model: ResNet20, loader: DataLoader) -> float:
        model.eval()
        correct = sum(int((model(images.to(self.device)).argmax(1).cpu() == labels).sum()) for images, labels in loader)
        return correct / len(loader.dataset)

    def accuracy_sentence(self) -> str:
        """Mean and deviation of both ways' test accuracies, their difference and its standard error."""
        percent = 100 * pd.DataFrame(self.accuracy)
        texts = [f"{way} {percent[way].mean():.2f} ± {percent[way].std():.2f} %" for way in percent]
        difference, error = percent.ours.mean() - percent.usual.mean(), math.hypot(*percent.sem())
        return (
            f"Accuracy on test images: {', '.join(texts)} ({len(percent)} classifiers each; difference {difference:+.2f} "
            f"points, standard error {error:.2f})."
        )
