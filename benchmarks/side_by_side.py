"""sdlab beside what a user would otherwise run: the same work both ways in one process, alternating, and the ratio of times.

The other way is each time the usual one, well used: diffusers' StableDiffusionPipeline with one PNG an image, diffusers'
training loop with images encoded as they come, a torchvision-style DataLoader loop for the classifier.
"""

import copy
import dataclasses
import functools
import gc
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from sdlab.base_models import BaseModel, load_base_model, load_without_weights, make_scheduler
from sdlab.classifier import ClassifierRecipe, ResNet20
from sdlab.data.images import ImageDataset, Split
from sdlab.data.model_files import is_available_locally
from sdlab.data.pixels import to_model
from sdlab.errors import BadInput
from sdlab.evaluation import train_and_score_classifiers
from sdlab.generation import GenerationPlan, generate, prepare_unet, uniform_labels
from sdlab.latents import encode_images
from sdlab.paths import PROJECT_ROOT
from sdlab.seeds import derive_seed
from sdlab.settings import Settings
from sdlab.training import TrainingPlan, train

silent = functools.partial(tqdm, disable=True)
REFERENCE = PROJECT_ROOT / ".venv" / "reference"  # where `make benchmarks` puts transformers


# ------------------------------------------------------------------------------------------------ side by side


def side_by_side(ways: Mapping[str, Callable[[], Any]], repetitions: int, device: torch.device) -> pd.DataFrame:
    """Seconds of each way: a row a repetition. Each once unclocked, then in turn, every other repetition backwards.

    A way may return its own seconds (a float), where not all of what it does is to be clocked.
    """
    rows = []
    for repetition in range(-1, repetitions):
        row = {}
        for name, way in list(ways.items())[:: 1 if repetition % 2 else -1]:
            gc.collect()
            synchronize(device)
            started = time.perf_counter()
            said = way()
            synchronize(device)
            row[name] = said if isinstance(said, float) else time.perf_counter() - started
        if repetition >= 0:
            rows.append(row)
    return pd.DataFrame(rows, columns=list(ways))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Comparison:
    """One row of the table: medians in seconds, and the ratio of the two ways within each repetition."""

    part: str
    alternative: str
    ours: float
    theirs: float
    ratio: float
    lowest: float
    highest: float
    repetitions: int
    command: str = ""

    @classmethod
    def of(cls, part: str, alternative: str, seconds: pd.DataFrame, settings: Settings) -> "Comparison":
        """`seconds` has the columns `ours` and `theirs`."""
        ratios = seconds.theirs / seconds.ours
        return cls(
            part, alternative, statistics.median(seconds.ours), statistics.median(seconds.theirs),
            statistics.median(ratios), ratios.min(), ratios.max(), len(seconds), f"sdlab benchmark {settings.experiment}",
        )  # fmt: skip


def machine(device: torch.device) -> dict[str, Any]:
    """What the times were taken on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none used"
    return {
        "CPU": cpu, "cores": os.cpu_count(), "torch threads": torch.get_num_threads(), "GPU": gpu,
        "torch": torch.__version__, "Python": platform.python_version(), "system": platform.system(),
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------- generation


def base_to_time(settings: Settings) -> BaseModel:
    """The base model; of one that is not on this machine its true size with random weights, which cost as much."""
    if REFERENCE.is_dir() and str(REFERENCE) not in sys.path:
        sys.path.append(str(REFERENCE))  # before diffusers is imported, which looks for transformers then
    if is_available_locally(settings):
        return load_base_model(settings)
    base, generator = load_without_weights(settings), torch.Generator().manual_seed(0)
    for parameter in (*base.vae.parameters(), *base.unet.parameters()):
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return base


def stable_diffusion_pipeline(base: BaseModel, scheduler):
    """diffusers' own pipeline around the same modules. Raises `BadInput` where transformers is not installed."""
    try:
        from diffusers import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline(
            vae=base.vae, unet=base.unet, scheduler=scheduler, text_encoder=None, tokenizer=None, safety_checker=None,
            feature_extractor=None, image_encoder=None, requires_safety_checker=False,
        )  # fmt: skip
    except (ImportError, RuntimeError) as error:
        raise BadInput(
            f"diffusers' StableDiffusionPipeline cannot be imported ({type(error).__name__}): it needs transformers, which "
            "`make benchmarks` puts into .venv/reference."
        ) from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Generation:
    """The same images both ways: our shards, and diffusers' pipeline with a PNG an image.

    Raises `BadInput` for `benchmark_images` that are not whole shards, and where transformers is not installed.
    """

    def __init__(self, base: BaseModel, settings: Settings, num_classes: int):
        if settings.benchmark_images % settings.shard_size:
            raise BadInput(
                f"`benchmark_images` is {settings.benchmark_images}, no multiple of `shard_size` ({settings.shard_size}): whole "
                "shards are made, so the other way would make fewer images."
            )
        from sdlab.class_encoder import ClassEncoder
        from sdlab.pipeline import ClassConditionalStableDiffusionPipeline

        torch.manual_seed(0)
        encoder = ClassEncoder(num_classes, base.tokens, base.width, settings.class_encoder_hidden).to(base.device)
        torch.nn.init.normal_(encoder.linear_in.bias)  # a trained null condition is not zero
        self.table = encoder.tabulated().to(base.device).requires_grad_(False)
        self.settings, self.base, self.count = settings, base, settings.benchmark_images
        self.pipeline = ClassConditionalStableDiffusionPipeline(
            base.vae, prepare_unet(base.unet, self.table, settings), self.table,
            make_scheduler(settings.scheduler, base.scheduler_config),
        )  # fmt: skip
        self.plan = GenerationPlan(
            "benchmark", settings.scheduler, settings.default_num_inference_steps, settings.default_guidance_scale, (0.0, 1.0),
            uniform_labels(num_classes), 0, settings.base_image_size, settings.base_image_size, settings.shard_size,
        )  # fmt: skip
        self.theirs = stable_diffusion_pipeline(base, make_scheduler(settings.scheduler, base.scheduler_config))
        self.batch_size = self.count

    def name(self) -> str:
        """What is generated, for the table."""
        plan = self.plan
        return (
            f"{self.count} images of {plan.base_size} px, {plan.num_inference_steps} steps, guidance "
            f"{plan.guidance_scale:g}, {str(self.base.dtype).removeprefix('torch.')}{', compile_unet' * self.settings.compile_unet}"
        )

    def inputs(self, first: int, last: int) -> tuple[np.ndarray, torch.Tensor]:
        """Labels and noise of these images, as our shards have them."""
        seeds = [derive_seed(self.plan.seed, i) for i in range(first, last)]
        return self.plan.labels_of(first, last), self.pipeline.noise(seeds, self.plan.base_size)

    def their_images(self, first: int, last: int, output_type: str) -> Any:
        labels, noise = self.inputs(first, last)
        table = self.table.table().to(self.base.unet.dtype)
        return self.theirs(
            prompt_embeds=table[labels], negative_prompt_embeds=table[-1:].repeat(last - first, 1, 1),
            num_inference_steps=self.plan.num_inference_steps, guidance_scale=self.plan.guidance_scale,
            latents=noise.to(self.base.device, self.base.unet.dtype), output_type=output_type,
        ).images  # fmt: skip

    def difference(self, count: int = 4) -> float:
        """The largest difference of a pixel in [0, 1] between the two."""
        labels, noise = self.inputs(0, count)
        ours = self.pipeline(
            labels, self.plan.num_inference_steps, self.plan.guidance_scale, latents=noise, output_type="np"
        ).images
        return float(np.abs(ours - self.their_images(0, count, "np")).max())

    def their_own_difference(self, count: int = 4) -> float:
        """The same between diffusers' own images at two batch sizes: what rounding alone makes."""
        half = count // 2
        halves = [self.their_images(0, half, "np"), self.their_images(half, count, "np")]
        return float(np.abs(np.concatenate(halves) - self.their_images(0, count, "np")).max())

    def find_batch_size(self) -> dict[int, float]:
        """Images a second of diffusers' pipeline at a few batch sizes, the best of which it then uses."""
        rates = {}
        for size in sorted({size for size in (4, 16, 64, 256) if size < self.count} | {self.count}):
            started = time.perf_counter()
            self.their_images(0, size, "pil")
            synchronize(self.base.device)
            rates[size] = size / (time.perf_counter() - started)
        self.batch_size = max(rates, key=rates.get)
        return rates

    def make_ours(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            generate(self.pipeline, self.plan, Path(folder), self.count, silent)

    def make_theirs(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for first in range(0, self.count, self.batch_size):
                images = self.their_images(first, min(first + self.batch_size, self.count), "pil")
                for index, image in enumerate(images, start=first):
                    image.save(Path(folder) / f"{index:06d}.png")


def where_time_goes(generation: Generation) -> tuple[pd.DataFrame, str]:
    """Shares of one pass of the UNet by kind of operation, and in words how near it comes to what the device can do."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes to stderr that there is no GPU
    from torch.profiler import ProfilerActivity, profile
    from torch.utils.flop_counter import FlopCounterMode

    pipeline, device = generation.pipeline, generation.base.device
    rows = min(2 * generation.count, 250)
    labels, noise = torch.zeros(rows, dtype=torch.long, device=device), generation.inputs(0, 1)[1]
    latents = noise.to(device, pipeline.unet.dtype).repeat(rows, 1, 1, 1)

    @torch.no_grad()
    def one_pass():
        pipeline.unet(latents, torch.tensor(500, device=device), pipeline.conditions(labels)[0])

    with FlopCounterMode(display=False) as counter:
        one_pass()
    seconds = side_by_side({"pass": one_pass}, 3, device)["pass"].median()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        one_pass()
        synchronize(device)
    spent = dict.fromkeys(OPERATIONS, 0.0)
    for event in profiler.key_averages():
        kind = next(kind for kind, words in OPERATIONS.items() if any(word in event.key.lower() for word in words))
        spent[kind] += event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
    flops, peak = counter.get_total_flops(), matrix_flops(device, pipeline.unet.dtype)
    words = (
        f"One pass of {rows} images: {flops / 1e9:.0f} GFLOP in {seconds:.3g} s, {flops / seconds / 1e9:.0f} GFLOP/s; a large "
        f"matrix product reaches {peak / 1e9:.0f} here. No way to make the same images takes less than {flops / peak:.3g} s for it."
    )
    shares = pd.DataFrame(dict(operation=spent.keys(), share=[100 * s / sum(spent.values()) for s in spent.values()]))
    return shares, words


# In this order: a name belongs to the first kind that has a word of it.
OPERATIONS = {
    "attention": ("scaled_dot_product", "flash", "fmha", "softmax"),
    "convolutions": ("conv",),
    "matrix products": ("mm", "linear", "gemm", "cutlass", "matmul"),
    "norms": ("norm",),
    "activations": ("gelu", "silu", "sigmoid"),
    "copies and concatenations": ("copy", "cat", "contiguous", "clone"),
    "the rest": ("",),
}


def matrix_flops(device: torch.device, dtype: torch.dtype, side: int = 2048) -> float:
    """FLOP/s of a matrix product that is large enough."""
    side *= 4 if device.type == "cuda" else 1
    a = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / side_by_side({"product": lambda: a @ a}, 5, device)["product"].median()


class Series:
    """x1 ... x10 both ways: one pool, of which each size is the beginning, and a set of its own for each size."""

    def __init__(self, generation: Generation, unit: int, largest: int = 10):
        """`unit` images are x1. Few steps are enough: both ways make them alike."""
        self.plan = dataclasses.replace(generation.plan, num_inference_steps=5, shard_size=unit)
        self.pipeline, self.unit, self.largest = generation.pipeline, unit, largest
        self.images = {"ours": 0, "theirs": 0}  # made in the last round

    def make(self, way: str, sets: Sequence[tuple[GenerationPlan, int]]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for plan, count in sets:
                generate(self.pipeline, plan, Path(folder), count, silent)
            manifests = [json.loads(path.read_text()) for path in Path(folder).glob("*/manifest.json")]
        self.images[way] = self.unit * sum(len(manifest["shards"]) for manifest in manifests)

    def ours(self) -> None:
        self.make("ours", [(self.plan, k * self.unit) for k in range(1, self.largest + 1)])

    def theirs(self) -> None:
        sets = [(dataclasses.replace(self.plan, seed=k), k * self.unit) for k in range(1, self.largest + 1)]
        self.make("theirs", sets)


# ---------------------------------------------------------------------------------------------------- training


class Pixels(Dataset):
    """Images as a usual training loop reads them: one at a time, normalised to [-1, 1]."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(self.images[index]).float() / 127.5 - 1, int(self.labels[index])


class Training:
    """One epoch of step 1 or 3 both ways: from moments that were encoded once, and with images encoded as they come."""

    def __init__(self, part: str, base: BaseModel, settings: Settings, data: ImageDataset):
        s, count = settings, min(settings.benchmark_images, len(data.train))
        size, rate, epochs = {
            "class_encoder": (s.class_encoder_batch_size, s.class_encoder_learning_rate, s.class_encoder_epochs),
            "unet": (s.unet_batch_size, s.unet_learning_rate, s.unet_epochs),
        }[part]
        self.part, self.base, self.settings, self.epochs, self.count = part, base, settings, epochs, count
        self.plan = TrainingPlan(part, 1, size, rate, s.weight_decay, s.max_grad_norm, 0)
        images = data.training_images(range(count), s.base_image_size)
        self.images = (to_model(images, s.base_image_size) * 127.5 + 127.5).round().clamp(0, 255).byte().numpy()
        self.labels = data.train.labels[:count]
        torch.manual_seed(0)
        from sdlab.class_encoder import ClassEncoder

        self.encoder = ClassEncoder(data.num_classes, base.tokens, base.width, s.class_encoder_hidden).to(base.device)

    def parts(self) -> tuple[BaseModel, torch.nn.Module]:
        """Base model and Class-Encoder, one of which is trained. Of a UNet there is one, trained on and on: time does not
        depend on its weights, and at Stable Diffusion's size a second one with its optimiser fills a computer's memory."""
        if self.part == "unet":
            self.base.unet.float()
        return self.base, copy.deepcopy(self.encoder)

    def ours(self) -> float:
        """Seconds of an epoch, and of encoding each image once, shared among the epochs of the settings."""
        base, encoder = self.parts()
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            moments = encode_images(
                lambda rows: self.images[rows.start : rows.stop], self.count, base, self.settings.base_image_size,
                Path(folder) / "moments.npz", "benchmark", silent,
            )  # fmt: skip
            synchronize(base.device)
            encoding = time.perf_counter() - started
            epoch = train(self.plan, base, encoder, moments, self.labels, Path(folder) / "part", None, silent)[-1]
        return encoding / self.epochs + epoch["seconds"]

    def theirs(self) -> float:
        """Seconds of an epoch as diffusers' examples train: encode, add noise, predict, step."""
        base, encoder = self.parts()
        trained, frozen = (encoder, base.unet) if self.part == "class_encoder" else (base.unet, encoder)
        frozen.requires_grad_(False).eval()
        trained.requires_grad_(True).train()
        device, scheduler, unet = base.device, base.noise_scheduler(), base.unet
        loader = DataLoader(Pixels(self.images, self.labels), self.plan.batch_size, shuffle=True)
        optimizer = torch.optim.AdamW(
            trained.parameters(), lr=self.plan.learning_rate, weight_decay=self.plan.weight_decay
        )
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(loader))
        scaler = torch.amp.GradScaler(device.type, enabled=base.dtype == torch.float16)
        started = time.perf_counter()
        for pixels, labels in loader:
            with torch.no_grad():
                latents = base.vae.encode(pixels.to(device)).latent_dist.sample() * base.scaling_factor
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(labels),), device=device)
            noisy = scheduler.add_noise(latents, noise, timesteps)
            with torch.autocast(device.type, base.dtype, enabled=base.dtype != torch.float32):
                one_hot = F.one_hot(labels.to(device), encoder.config.num_classes).float()
                predicted = unet(noisy.to(unet.dtype), timesteps, encoder(one_hot).to(unet.dtype)).sample
            target = noise if base.prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
            loss = F.mse_loss(predicted.float(), target.float())
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(trained.parameters(), self.plan.max_grad_norm)
            scaler.step(optimizer)
            scaler.update()
            decay.step()
            optimizer.zero_grad()
        synchronize(device)
        return time.perf_counter() - started


# -------------------------------------------------------------------------------------------------- classifier


class Pictures(Dataset):
    """Images as torchvision's data sets give them: PIL, then `ToTensor`."""

    def __init__(self, split: Split):
        from PIL import Image
        from torchvision.transforms import ToTensor

        self.pictures = [Image.fromarray(image) for image in split.images.transpose(0, 2, 3, 1)]
        self.labels, self.transform = split.labels, ToTensor()

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.pictures[index]), int(self.labels[index])


class Judging:
    """A cell's classifiers both ways, one a seed; the accuracies of both are kept, since they have to agree."""

    def __init__(self, settings: Settings, data: ImageDataset, device: torch.device):
        self.settings, self.data, self.device, self.round = settings, data, device, {"ours": 0, "theirs": 0}
        self.accuracy: dict[str, list[float]] = {"ours": [], "theirs": []}
        self.recipe = ClassifierRecipe.of(settings)
        self.loaders = [
            DataLoader(Pictures(split), self.recipe.batch_size if train else 1024, shuffle=train)
            for split, train in ((data.train, True), (data.val, False), (data.test, False))
        ]

    def seeds(self, way: str) -> list[int]:
        """Fresh ones each time, the same for both."""
        self.round[way] += 1
        return [derive_seed("benchmark", self.round[way], i) for i in range(self.settings.classifier_seeds)]

    def ours(self) -> None:
        scores = train_and_score_classifiers(
            self.data.train, self.data, self.settings, self.seeds("ours"), ["test"], silent
        )
        self.accuracy["ours"] += [score.accuracy for score in scores["test"]]

    def theirs(self) -> None:
        for seed in self.seeds("theirs"):
            accuracy = usual_classifier(*self.loaders, self.data.num_classes, self.recipe, seed, self.device)
            self.accuracy["theirs"].append(accuracy)


def accuracies(found: Mapping[str, Sequence[float]]) -> str:
    """Both ways' accuracies in words: mean, deviation and number of classifiers."""
    said = [f"{way} {100 * np.mean(a):.2f} ± {100 * np.std(a, ddof=1):.2f} %" for way, a in found.items()]
    difference = 100 * (np.mean(found["ours"]) - np.mean(found["theirs"]))
    error = 100 * math.sqrt(sum(np.var(a, ddof=1) / len(a) for a in found.values()))
    return (
        f"Accuracy on test images: {', '.join(said)} ({len(found['ours'])} classifiers each; difference {difference:+.2f} points, "
        f"standard error {error:.2f})."
    )


def usual_classifier(
    train, val, test, num_classes: int, recipe: ClassifierRecipe, seed: int, device: torch.device
) -> float:
    """The recipe of `train_classifier`, as a PyTorch tutorial writes it. Returns the accuracy on `test`."""
    torch.manual_seed(seed)
    model = ResNet20(num_classes, recipe.filters).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="max", factor=0.1, patience=recipe.patience - 1, threshold=0.0, min_lr=recipe.min_learning_rate
    )
    steps = recipe.steps or len(train) * recipe.epochs
    best, best_weights, since_best, done = -1.0, None, 0, 0
    checks = [round(steps * (epoch + 1) / recipe.epochs) for epoch in range(recipe.epochs)]
    while done < steps and since_best < recipe.stop_patience:
        for images, labels in train:
            model.train()
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images.to(device)), labels.to(device), label_smoothing=recipe.label_smoothing)
            loss.backward()
            optimizer.step()
            done += 1
            if done in checks:
                accuracy = usual_accuracy(model, val, device)
                plateau.step(accuracy)
                since_best += 1
                if accuracy > best:
                    best, best_weights, since_best = accuracy, copy.deepcopy(model.state_dict()), 0
            if done >= steps or since_best >= recipe.stop_patience:
                break
    model.load_state_dict(best_weights)
    return usual_accuracy(model, test, device)


@torch.no_grad()
def usual_accuracy(model: ResNet20, loader: DataLoader, device: torch.device) -> float:
    model.eval()
    right = sum(int((model(images.to(device)).argmax(1).cpu() == labels).sum()) for images, labels in loader)
    return right / len(loader.dataset)


# ---------------------------------------------------------------------------------------------------- the table


def longer_studies(reports: Path) -> list[Comparison]:
    """Rows of what takes hours: each of the scripts that make them leaves its own beside its table."""
    rows = []
    for path in sorted(reports.glob("*/row.json")):
        rows.append(Comparison(**json.loads(path.read_text(encoding="utf-8"))))
    return rows


def table_of(comparisons: Sequence[Comparison]) -> pd.DataFrame:
    return pd.DataFrame([asdict(comparison) for comparison in comparisons])


def table_text(table: pd.DataFrame) -> pd.DataFrame:
    """As it is read: seconds (images, where the part says so), how many times less, and the range over the repetitions."""
    return pd.DataFrame(
        {
            "part": table.part,
            "beside": table.alternative,
            "ours": [f"{value:.3g}" for value in table.ours],
            "theirs": [f"{value:.3g}" for value in table.theirs],
            "times": [f"{value:.2f}" for value in table.ratio],
            "range": [f"{low:.2f} to {high:.2f}" for low, high in zip(table.lowest, table.highest, strict=True)],
            "n": table.repetitions,
            "command": [f"`{command}`" for command in table.command],
        }
    )


def draw_ratios(table: pd.DataFrame, title: str):
    """How many times less than the other way takes, with the range over the repetitions; 1 is the same."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 0.7 * len(table) + 1.2))
    places = range(len(table))[::-1]
    spread = [table.ratio - table.lowest, table.highest - table.ratio]
    axes.barh(places, table.ratio, xerr=spread, capsize=4, color="C0", height=0.55)
    axes.axvline(1, color="black", lw=1)
    axes.set_yticks(places, [textwrap.fill(part, 52) for part in table.part], fontsize=8)
    axes.set(xlabel="times less (seconds or images) than the usual way", xlim=(0, 1.15 * max(1.5, table.highest.max())))
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    return figure
