"""Time and memory of each operation on this device, at the base model's real size: what a plan multiplies."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from sdlab.base_models import BaseModel
from sdlab.classifier import ClassifierRecipe, train_classifier
from sdlab.classifier import predict as classify
from sdlab.data.images import DatasetFacts, Split
from sdlab.errors import BadInput
from sdlab.generation import count_parallel_batches
from sdlab.settings import Settings
from sdlab.threads import map_in_threads
from sdlab.training import predict

SECONDS = 0.7  # a measurement grows its batch until one call takes this long,
FEW = 8  # but at least to this size: smaller batches say little about larger ones


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of each operation on this device, and bytes. `nan` bytes: not measured on this system."""

    device: str
    seconds_per_pass: float
    seconds_per_decoding: float
    seconds_per_encoding: float
    seconds_per_class_encoder_step: float
    seconds_per_unet_step: float
    trial_image: float  # seconds of a trial's classifier for one image, once in training
    trial_validation: float  # and for classifying one
    cell_image: float  # the same for a cell's classifiers
    cell_validation: float
    generating_bytes: float
    class_encoder_bytes: float
    unet_bytes: float
    unet_parameters: int
    encoder_parameters: int
    table_numbers: int
    latent_numbers: int


class Meter:
    """Peak memory of a block above its start: on CUDA torch's own count, on Linux that of the process."""

    def __init__(self, device: torch.device):
        self.device = device

    def __enter__(self) -> "Meter":
        self.before = self.now()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        return self

    def __exit__(self, *_) -> None:
        self.bytes = max(self.peak() - self.before, 0)

    def now(self) -> float:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else status_bytes("VmRSS")

    def peak(self) -> float:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else status_bytes("VmHWM")


def status_bytes(name: str) -> float:
    """A size from Linux's account of this process; nan elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return math.nan
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), math.nan)


@dataclass(frozen=True)
class Timing:
    """Seconds per item of a batch, and memory as a line in the batch size."""

    seconds: float
    fixed_bytes: float
    bytes_per_item: float

    def bytes(self, batch: int) -> float:
        return self.fixed_bytes + batch * self.bytes_per_item


def time_batches(work: Callable[[int], object], most: int, device: torch.device) -> Timing:
    """`work(batch)` at growing batches: at least up to FEW, then until a call takes long, memory runs out, or `most`."""
    batch, seen = 1, []
    while True:
        try:
            if not seen:
                work(batch)  # warm
            with Meter(device) as meter:
                seconds = time_call(work, batch, device)
        except torch.OutOfMemoryError:  # the batches that did fit are enough; the plan's memory will tell the rest
            break
        seen.append((batch, seconds, meter.bytes))
        if batch >= most or (batch >= FEW and seconds > SECONDS):
            break
        faster = int(SECONDS / max(seconds, 1e-4) / 2)
        batch = min(most, FEW if batch < FEW else batch * max(2, min(8, faster)))
    if not seen:
        raise BadInput(f"Not even one image fits into the memory of {device}: choose another `device` or `base_model`.")
    batch, seconds, most_bytes = seen[-1]
    if seconds < 2 * SECONDS:
        seconds = min(seconds, time_call(work, batch, device))  # other programs only add time
    per_item = max(most_bytes - seen[0][2], 0) / max(batch - 1, 1)
    return Timing(seconds / batch, max(most_bytes - batch * per_item, 0), per_item)


def time_call(work: Callable[[int], object], batch: int, device: torch.device) -> float:
    started = time.perf_counter()
    work(batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


class Operations:
    """Each operation of the method on a batch of zeros, for timing."""

    def __init__(self, settings: Settings, facts: DatasetFacts, base: BaseModel):
        from sdlab.class_encoder import ClassEncoder, with_projected_conditions  # these import diffusers, which is slow

        self.base, self.device, self.size = base, base.device, settings.base_image_size
        self.side = self.size // base.vae_scale
        self.encoder = ClassEncoder(facts.num_classes, base.tokens, base.width, settings.class_encoder_hidden).to(
            self.device
        )
        self.sampling_unet = with_projected_conditions(base.unet, self.encoder.table())

    def latents(self, count: int) -> torch.Tensor:
        return torch.zeros(count, self.base.latent_channels, self.side, self.side, device=self.device)

    def timesteps(self, count: int) -> torch.Tensor:
        return torch.full((count,), 500, device=self.device)

    def conditions(self, count: int) -> torch.Tensor:
        return self.encoder.table()[torch.zeros(count, dtype=torch.long, device=self.device)]

    def denoise(self, count: int) -> None:
        """As many batches at a time as generation makes; two rows are the two passes of one image."""
        workers = count_parallel_batches(count // 2, self.device)
        map_in_threads(self.one_pass, [-(-count // workers)] * workers, workers)

    @torch.no_grad()
    def one_pass(self, count: int, _) -> None:
        rows = torch.zeros(count, 1, 1, dtype=torch.long, device=self.device)
        self.sampling_unet(self.latents(count).to(self.base.unet.dtype), self.timesteps(count), rows)

    @torch.no_grad()
    def decode(self, count: int) -> None:
        with torch.autocast(self.device.type, self.base.dtype, enabled=self.base.dtype != torch.float32):
            self.base.vae.decode(self.latents(count))

    @torch.no_grad()
    def encode(self, count: int) -> None:
        self.base.vae.encode(torch.zeros(count, 3, self.size, self.size, device=self.device))

    def train(self, base: BaseModel, count: int, conditions: torch.Tensor) -> None:
        """Forward and backward pass of a training step."""
        latents = self.latents(count)
        noise_pred = predict(base, latents, self.timesteps(count), conditions)
        F.mse_loss(noise_pred.float(), latents).backward()


def measure(settings: Settings, facts: DatasetFacts, base: BaseModel) -> Costs:
    """Time one of each operation on `base.device`. Leaves the base model as it was."""
    from sdlab.pipeline import DECODE_BATCH

    s, device, unet, shard = settings, base.device, base.unet, settings.shard_size
    op = Operations(settings, facts, base)
    denoising = time_batches(op.denoise, 2 * shard, device)
    held = Meter(device).now()  # weights; on a CPU also Python and its libraries
    decoding = time_batches(op.decode, min(DECODE_BATCH, shard), device)
    encoding = time_batches(op.encode, 64, device)
    conditioning = time_batches(lambda n: op.train(base, n, op.conditions(n)), s.class_encoder_batch_size, device)
    op.encoder.requires_grad_(False)
    tuned, condition = base if base.dtype == torch.float32 else base.with_unet(float32_copy(unet)), op.conditions(1)
    tuned.unet.requires_grad_(True).train()
    try:
        tuning = time_batches(lambda n: op.train(tuned, n, condition.expand(n, -1, -1)), s.unet_batch_size, device)
    finally:
        for parameter in tuned.unet.parameters():
            parameter.grad = None
        tuned.unet.requires_grad_(False).eval()
    adam, numbers, encoder_numbers = (
        seconds_per_adam_parameter(device),
        unet.num_parameters(),
        op.encoder.num_parameters(),
    )
    trial_image, trial_validation = classifier_costs(s, facts, s.search_classifier_seeds, device)
    cell_image, cell_validation = classifier_costs(s, facts, s.classifier_seeds, device)
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"{device} ({torch.get_num_threads()} threads)"
    return Costs(
        device=f"{name}, {str(base.dtype).removeprefix('torch.')}",
        seconds_per_pass=denoising.seconds,
        seconds_per_decoding=decoding.seconds,
        seconds_per_encoding=encoding.seconds,
        seconds_per_class_encoder_step=conditioning.seconds * s.class_encoder_batch_size + adam * encoder_numbers,
        seconds_per_unet_step=tuning.seconds * s.unet_batch_size + adam * numbers,
        trial_image=trial_image,
        trial_validation=trial_validation,
        cell_image=cell_image,
        cell_validation=cell_validation,
        generating_bytes=held + max(denoising.bytes(2 * shard), decoding.bytes(min(DECODE_BATCH, shard))),
        class_encoder_bytes=held + conditioning.bytes(s.class_encoder_batch_size) + 16 * encoder_numbers,
        # Fine-tuning holds no frozen UNet: float32 weights, gradients, and two moments each.
        unet_bytes=held - unet.dtype.itemsize * numbers + 16 * numbers + tuning.bytes(s.unet_batch_size),
        unet_parameters=numbers,
        encoder_parameters=encoder_numbers,
        table_numbers=(facts.num_classes + 1) * base.tokens * base.width,
        latent_numbers=base.latent_channels * op.side**2,
    )


def float32_copy(unet: torch.nn.Module) -> torch.nn.Module:
    copy = type(unet).from_config(unet.config).to(unet.device)
    copy.load_state_dict(unet.state_dict())
    return copy


def seconds_per_adam_parameter(device: torch.device) -> float:
    weights = torch.nn.Parameter(torch.zeros(4_000_000, device=device))
    optimizer = torch.optim.AdamW([weights], fused=True)
    weights.grad = torch.zeros_like(weights)
    return time_batches(lambda n: [optimizer.step() for _ in range(n)], 20, device).seconds / len(weights)


def classifier_costs(s: Settings, facts: DatasetFacts, seeds: int, device: torch.device) -> tuple[float, float]:
    """Seconds of one classifier for one image, in training and in validation, when `seeds` classifiers are trained.

    On a CPU as many train at a time as torch has threads, in as many rounds as needed.
    """
    threads = torch.get_num_threads()
    workers = min(seeds, threads) if device.type == "cpu" else 1
    val, recipe = random_split(8, s.image_size), ClassifierRecipe.from_settings(s)

    def fit(count):
        once = dataclasses.replace(recipe, batch_size=count, epochs=1, train_steps=1)
        return train_classifier(random_split(count, s.image_size), val, facts.num_classes, once, 0, device).model

    torch.set_num_threads(threads // workers)
    try:
        model = fit(8)
        training = time_batches(fit, s.classifier_batch_size, device).seconds
        validation = time_batches(
            lambda count: classify(model, random_split(count, s.image_size)), 1024, device
        ).seconds
    finally:
        torch.set_num_threads(threads)
    rounds = math.ceil(seeds / workers) / seeds
    return training * rounds, validation * rounds


def random_split(count: int, size: int) -> Split:
    rng = np.random.default_rng(0)
    return Split(rng.integers(0, 256, (count, 3, size, size), np.uint8), np.zeros(count, np.int64))
