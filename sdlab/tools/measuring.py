"""Time and memory of each operation on this device, at the base model's real size: what a plan multiplies."""

import contextlib
import hashlib
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from sdlab.base_models import BaseModel, device_of
from sdlab.classifier import ResNet20, as_tensors, training_step
from sdlab.classifier import predict as classify
from sdlab.data.images import DatasetFacts, Split
from sdlab.data.model_files import PARTS, PINNED, SHAPES, read_configs
from sdlab.devices import choose_precision
from sdlab.errors import BadInput
from sdlab.generation import count_parallel_batches
from sdlab.runs.files import check_fields, read_json, sha256_of_file
from sdlab.settings import Settings
from sdlab.threads import map_in_threads
from sdlab.training import predict

SECONDS = 0.4  # a measurement grows its batch until one call takes this long,
FEW = 8  # but at least to this size: smaller batches say little about larger ones
OPERATIONS = ("passes", "images", "encoded", "class_encoder steps", "unet steps")
OPERATIONS += ("trial images", "trial validations", "cell images", "cell validations")


@dataclass(frozen=True, kw_only=True)
class Costs:
    """The costs of each operation on this device. `nan` bytes: not measured on this system."""

    device: str
    seconds: dict[str, float]  # by operation
    memory: dict[str, float]  # bytes: "generating"; by number, those of a notebook that trains
    sizes: dict[str, int]  # of `model_sizes`

    @classmethod
    def from_file(cls, path: Path, settings: Settings, facts: DatasetFacts, base: BaseModel) -> "Costs":
        """Costs that were measured on another device (`scripts/measure_gpu.py costs`). Raises `BadInput`."""
        given = check_fields(read_json(path), dict(device=str, seconds=dict, memory=dict), path)
        seconds = check_fields(given["seconds"], dict.fromkeys(OPERATIONS, float), path)
        memory = check_fields(given["memory"], dict.fromkeys(("generating", "01", "03"), int), path)
        sizes = model_sizes(settings, facts, base)
        seconds |= file_costs()
        return cls(device=f"{given['device']} (measured elsewhere)", seconds=seconds, memory=memory, sizes=sizes)


def model_sizes(settings: Settings, facts: DatasetFacts, base: BaseModel) -> dict[str, int]:
    """Numbers in "unet", "encoder" (its weights), "table" (an epoch's), "latent" (an image's)."""
    from sdlab.class_encoder import ClassEncoder

    with torch.device("meta"):
        encoder = ClassEncoder(facts.num_classes, base.tokens, base.width, settings.class_encoder_hidden)
    return dict(
        unet=base.unet.num_parameters(),
        encoder=encoder.num_parameters(),
        table=(facts.num_classes + 1) * base.tokens * base.width,
        latent=base.latent_channels * (settings.base_image_size // base.vae_scale) ** 2,
    )


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
            if not seen or device.type == "cuda":  # a GPU loads kernels of their own for each size
                work(batch)
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
    from sdlab.diffusion_pipeline import DECODE_BATCH

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
    adam, sizes = seconds_per_adam_parameter(device), model_sizes(settings, facts, base)
    numbers, encoder_numbers = sizes["unet"], sizes["encoder"]
    seconds = {
        "passes": denoising.seconds,
        "images": decoding.seconds,
        "encoded": encoding.seconds,
        "class_encoder steps": conditioning.seconds * s.class_encoder_batch_size + adam * encoder_numbers,
        "unet steps": tuning.seconds * s.unet_batch_size + adam * numbers,
    }
    seconds |= file_costs()
    for whose, seeds in (("trial", s.search_classifier_seeds), ("cell", s.classifier_seeds)):
        seconds[f"{whose} images"], seconds[f"{whose} validations"] = classifier_costs(s, facts, seeds, device)
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} ({torch.get_num_threads()} threads)"
    )
    return Costs(
        device=f"{name}, {str(base.dtype).removeprefix('torch.')}",
        seconds=seconds,
        memory={
            "generating": held + max(denoising.bytes(2 * shard), decoding.bytes(min(DECODE_BATCH, shard))),
            "01": held + conditioning.bytes(s.class_encoder_batch_size) + 16 * encoder_numbers,
            # Fine-tuning holds no frozen UNet: float32 weights, gradients, and two moments each.
            "03": held - unet.dtype.itemsize * numbers + 16 * numbers + tuning.bytes(s.unet_batch_size),
        },
        sizes=sizes,
    )


def file_costs(size: int = 64 * 2**20) -> dict[str, float]:
    """Seconds of a byte of weights: hashed and read; hashed and written to TMPDIR's disk."""
    content = np.random.default_rng(0).bytes(size)
    with tempfile.TemporaryDirectory() as folder:
        file, started = Path(folder) / "weights", time.perf_counter()
        hashlib.sha256(content).digest()
        with file.open("wb") as opened:
            opened.write(content)
            os.fsync(opened.fileno())
        written = time.perf_counter()
        sha256_of_file(file)
        file.read_bytes()
        return {"bytes written": (written - started) / size, "bytes read": (time.perf_counter() - written) / size}


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
    model = ResNet20(facts.num_classes, s.classifier_filters).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    some = random_split(max(s.classifier_batch_size, 1024), s.image_size)
    images, labels = as_tensors(some, device)

    def fit(count: int) -> None:
        training_step(model.train(), optimizer, images[:count], labels[:count], s.classifier_label_smoothing)

    torch.set_num_threads(threads // workers)
    try:
        training = time_batches(fit, s.classifier_batch_size, device).seconds
        validation = time_batches(
            lambda count: classify(model, Split(some.images[:count], some.labels[:count])), 1024, device
        ).seconds
    finally:
        torch.set_num_threads(threads)
    rounds = math.ceil(seeds / workers) / seeds
    return training * rounds, validation * rounds


def random_split(count: int, size: int) -> Split:
    rng = np.random.default_rng(0)
    return Split(rng.integers(0, 256, (count, 3, size, size), np.uint8), np.zeros(count, np.int64))


def load_without_weights(settings: Settings) -> BaseModel:
    """A base model of the right size with zeros for weights: a plan can be made before gigabytes are fetched.

    Raises `BadInput` for a model whose configs are not in `shapes/`.
    """
    import diffusers

    if settings.base_model not in PINNED:
        raise BadInput(
            f"The base model {settings.base_model} is not on this machine, so its size is unknown: fetch it first (run "
            f"notebook 00), or plan with {' or '.join(PINNED)}."
        )
    device, folder = device_of(settings), SHAPES / settings.base_model.rpartition("/")[2]
    dtype, (unet, vae, scheduler, text_encoder) = (
        choose_precision(settings.precision, device),
        read_configs(folder),
    )
    source, tokens = f"{settings.base_model}, zeros for weights", text_encoder["max_position_embeddings"]
    base = BaseModel(source, folder, device, dtype, vae, unet, scheduler, tokens, {})
    for part, config, precision in (("vae", vae, torch.float32), ("unet", unet, dtype)):
        with torch.device("meta"):
            model = getattr(diffusers, PARTS[part]).from_config(config)
        zeros = {name: torch.zeros(t.shape, dtype=precision, device=device) for name, t in model.state_dict().items()}
        model.load_state_dict(zeros, assign=True)
        base.__dict__[part] = model.requires_grad_(False).eval()
    return base
