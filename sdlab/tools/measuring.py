"""TODO tools.measuring."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sdlab.base_models import BaseModel
from sdlab.classifier import ClassifierRecipe, predict, train_classifier
from sdlab.data.images import DatasetFacts, Split
from sdlab.errors import BadInput
from sdlab.generation import count_parallel_batches
from sdlab.settings import Settings
from sdlab.threads import map_in_threads
from sdlab.training import noise_loss

SECONDS = 0.7  # a measurement grows its batch until one call takes so long,
FEW = 8  # but at least to this: smaller ones say little of larger ones


@dataclass(frozen=True)
class Costs:
    """Seconds of one of each on this device, and bytes. `nan` memory: not measured on this system."""

    device: str
    seconds_per_pass: float
    seconds_per_decoding: float
    seconds_per_encoding: float
    seconds_per_class_encoder_step: float
    seconds_per_unet_step: float
    searching: tuple[float, float]  # seconds of a trial's classifier: an image once in training, an image judged
    judging: tuple[float, float]  # of a cell's
    generating_bytes: float
    class_encoder_bytes: float
    unet_bytes: float
    unet_parameters: int
    encoder_parameters: int
    table_numbers: int
    latent_numbers: int


class Meter:
    """Peak memory of a block beyond what was there before it: on CUDA torch's own count, on Linux the process's."""

    def __init__(self, device: torch.device):
        self.device = device

    def __enter__(self) -> "Meter":
        self.before = self.now()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
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
    """Seconds an item in a batch, and memory as a line: so much whatever the batch, so much more an item."""

    seconds: float
    fixed_bytes: float
    bytes_per_item: float

    def bytes(self, batch: int) -> float:
        return self.fixed_bytes + batch * self.bytes_per_item


def time_batches(work: Callable[[int], object], most: int, device: torch.device) -> Timing:
    """`work(batch)` at growing batches: at least to FEW, then until a call takes long, memory runs out, or at `most`."""
    batch, seen = 1, []
    while True:
        try:
            if not seen:
                work(batch)  # warm
            with Meter(device) as meter:
                seconds = time_call(work, batch, device)
        except torch.OutOfMemoryError:  # what fitted says enough; the plan's memory will tell that the whole does not
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
        seconds = min(seconds, time_call(work, batch, device))  # other work on the machine only adds
    per_item = max(most_bytes - seen[0][2], 0) / max(batch - 1, 1)
    return Timing(seconds / batch, max(most_bytes - batch * per_item, 0), per_item)


def time_call(work: Callable[[int], object], batch: int, device: torch.device) -> float:
    started = time.perf_counter()
    work(batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def measure(settings: Settings, facts: DatasetFacts, base: BaseModel) -> Costs:
    """Time one of everything on `base.device`, with the base model's real size. Leaves the base model as it was."""
    from sdlab.class_encoder import ClassEncoder, with_projected_conditions  # these need diffusers, slow to import
    from sdlab.pipeline import DECODE_BATCH

    s, device, unet, vae = settings, base.device, base.unet, base.vae
    side = s.base_image_size // base.vae_scale
    encoder = ClassEncoder(facts.num_classes, base.tokens, base.width, s.class_encoder_hidden).to(device)
    scheduler = base.noise_scheduler()

    def latents(count):
        return torch.zeros(count, base.latent_channels, side, side, device=device)

    def timesteps(count):
        return torch.full((count,), 500, device=device)

    sampling = with_projected_conditions(unet, encoder.table())

    def denoise(count):
        # In as many parts at a time as generation makes; two rows are an image's two passes.
        workers = count_parallel_batches(count // 2, device)
        map_in_threads(one_pass, [-(-count // workers)] * workers, workers)

    @torch.no_grad()
    def one_pass(count, _):
        rows = torch.zeros(count, 1, 1, dtype=torch.long, device=device)
        sampling(latents(count).to(unet.dtype), timesteps(count), rows)

    @torch.no_grad()
    def decode(count):
        with torch.autocast(device.type, base.dtype, enabled=base.dtype != torch.float32):
            vae.decode(latents(count))

    @torch.no_grad()
    def encode(count):
        vae.encode(torch.zeros(count, 3, s.base_image_size, s.base_image_size, device=device))

    def conditions(count):
        return encoder.table()[torch.zeros(count, dtype=torch.long, device=device)]

    def train(trained, count, states):
        noise = latents(count)
        loss = noise_loss(trained, scheduler, noise, noise, timesteps(count), states)
        loss.backward()

    denoising = time_batches(denoise, 2 * s.shard_size, device)
    held = Meter(device).now()  # weights, and on a CPU Python and its libraries
    decoding = time_batches(decode, min(DECODE_BATCH, s.shard_size), device)
    encoding = time_batches(encode, 64, device)
    conditioning = time_batches(lambda n: train(base, n, conditions(n)), s.class_encoder_batch_size, device)
    encoder.requires_grad_(False)
    fresh = base if base.dtype == torch.float32 else base.with_unet(float32_copy(unet))
    fresh.unet.requires_grad_(True).train()
    states = conditions(1)
    try:
        tuning = time_batches(lambda n: train(fresh, n, states.expand(n, -1, -1)), s.unet_batch_size, device)
    finally:
        for parameter in fresh.unet.parameters():
            parameter.grad = None
        fresh.unet.requires_grad_(False).eval()
    adam = seconds_per_adam_parameter(device)
    numbers, encoders = unet.num_parameters(), encoder.num_parameters()
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} ({torch.get_num_threads()} threads)"
    )
    return Costs(
        device=f"{name}, {str(base.dtype).removeprefix('torch.')}",
        seconds_per_pass=denoising.seconds,
        seconds_per_decoding=decoding.seconds,
        seconds_per_encoding=encoding.seconds,
        seconds_per_class_encoder_step=conditioning.seconds * s.class_encoder_batch_size + adam * encoders,
        seconds_per_unet_step=tuning.seconds * s.unet_batch_size + adam * numbers,
        searching=classifier_costs(s, facts, s.search_classifier_seeds, device),
        judging=classifier_costs(s, facts, s.classifier_seeds, device),
        generating_bytes=held + max(denoising.bytes(2 * s.shard_size), decoding.bytes(min(DECODE_BATCH, s.shard_size))),
        class_encoder_bytes=held + conditioning.bytes(s.class_encoder_batch_size) + 16 * encoders,
        # Fine-tuning has no frozen UNet beside it: float32 weights, gradients, and two moments each.
        unet_bytes=held - unet.dtype.itemsize * numbers + 16 * numbers + tuning.bytes(s.unet_batch_size),
        unet_parameters=numbers,
        encoder_parameters=encoders,
        table_numbers=(facts.num_classes + 1) * base.tokens * base.width,
        latent_numbers=base.latent_channels * side**2,
    )  # fmt: skip


def float32_copy(unet: torch.nn.Module) -> torch.nn.Module:
    """In float32, as fine-tuning trains it."""
    other = type(unet).from_config(unet.config).to(unet.device)
    other.load_state_dict(unet.state_dict())
    return other


def seconds_per_adam_parameter(device: torch.device) -> float:
    weights = torch.nn.Parameter(torch.zeros(4_000_000, device=device))
    optimizer = torch.optim.AdamW([weights], fused=True)
    weights.grad = torch.zeros_like(weights)
    return time_batches(lambda n: [optimizer.step() for _ in range(n)], 20, device).seconds / len(weights)


def classifier_costs(s: Settings, facts: DatasetFacts, seeds: int, device: torch.device) -> tuple[float, float]:
    """Seconds of training one classifier on one image once, and of its judging one, where `seeds` are trained as `judge` does.

    On a CPU as many at once as torch has threads, which they share, in as many rounds as it takes.
    """
    threads = torch.get_num_threads()
    workers = min(seeds, threads) if device.type == "cpu" else 1
    tiny, recipe = random_split(8, s.image_size), dataclasses.replace(ClassifierRecipe.of(s), epochs=1, steps=1)

    def fit(count):
        once = dataclasses.replace(recipe, batch_size=count)
        return train_classifier(random_split(count, s.image_size), tiny, facts.num_classes, once, 0, device).model

    torch.set_num_threads(threads // workers)
    try:
        model = fit(8)
        training = time_batches(fit, s.classifier_batch_size, device).seconds
        judging = time_batches(lambda count: predict(model, random_split(count, s.image_size)), 1024, device).seconds
    finally:
        torch.set_num_threads(threads)
    rounds = math.ceil(seeds / workers) / seeds
    return training * rounds, judging * rounds


def random_split(count: int, size: int) -> Split:
    rng = np.random.default_rng(0)
    return Split(rng.integers(0, 256, (count, 3, size, size), np.uint8), np.zeros(count, np.int64))
