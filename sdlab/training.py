"""Latents + the part to train -> a checkpoint per epoch and a loss history: one loop for steps 1 and 3.

Step 1 trains the Class-Encoder with the UNet frozen, step 3 the UNet with the Class-Encoder frozen; either minimises

    E || target - unet(sqrt(a_t) x_0 + sqrt(1 - a_t) noise, t, class_encoder(y)) ||^2

with target = noise (epsilon) or sqrt(a_t) noise - sqrt(1 - a_t) x_0 (v), whichever the base model predicts.
All randomness derives from (seed, part, epoch); the resume state says where in an epoch the generator is. So a run that
was cut goes on from its last state with the same bytes.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import safe_open, save_file
from tqdm.auto import tqdm

from sdlab.base_models import BaseModel, first_line, fitting, make_scheduler
from sdlab.files import (
    check_room,
    checked_form,
    checkpoint_hashes,
    checkpoint_sha,
    read_json,
    reading,
    sha256_of_file,
    sha256_of_json,
    write_json,
    written_beside,
)
from sdlab.images import ImageDataset
from sdlab.latents import Moments, encode_images
from sdlab.run import Run
from sdlab.settings import BadInput

if TYPE_CHECKING:  # diffusers is slow to import
    from diffusers import ModelMixin, UNet2DConditionModel

    from sdlab.class_encoder import ClassEncoder, ClassTable


@dataclass(frozen=True)
class TrainingPlan:
    """How one part is trained (section 3, steps 1 and 3)."""

    part: str  # class_encoder or unet
    epochs: int
    batch_size: int
    learning_rate: float  # at the first step; cosine to 0 over all steps
    weight_decay: float
    max_grad_norm: float
    seed: int

    def steps(self, images: int) -> int:
        return self.epochs * math.ceil(images / self.batch_size)


@dataclass(frozen=True)
class Position:
    """Where a training is: after `epochs` whole epochs and `steps` more of the next."""

    epochs: int = 0
    steps: int = 0
    generator: torch.Tensor | None = None  # its state, uint8, where steps > 0
    losses: list[torch.Tensor] = field(default_factory=list)  # of those steps, scalars
    seconds: float = 0.0  # clocked for them


def derive_seed(*parts: int | str) -> int:
    """One seed (63 bits) from several numbers and words; streams with different parts are independent."""
    return int(sha256_of_json(parts)[:16], 16) >> 1


def train(
    plan: TrainingPlan,
    base: BaseModel,
    class_encoder: "ClassEncoder | ClassTable",
    moments: Moments,
    labels: torch.Tensor,
    folder: Path,
    made_from: Any = None,
    progress: Callable = tqdm,
    resume_seconds: float = math.inf,
) -> list[dict]:
    """Train `class_encoder` or `base.unet`, in place; one checkpoint an epoch in `folder/epoch_01` and so on.

    What is there already is kept: a finished training returns its history at once, one that was cut goes on from
    `folder/resume.safetensors`, which is written after each epoch, and inside one when `resume_seconds` have passed.
    Returns an entry an epoch: epoch, loss, learning_rate, steps, seconds.
    `made_from` is whatever names the inputs; with the plan it is the lineage that a resumed run has to match.

    The weights that are trained are float32; the UNet computes in `base.dtype`, float16 with a loss scaler.

    Raises:
        BadInput: the folder holds a training with another plan or other inputs, the loss became NaN or infinite, or disk
            or memory are too small.
    """
    lineage = sha256_of_json([plan.__dict__, made_from, len(moments)])
    history, state = kept_history(folder, lineage), folder / "resume.safetensors"
    whole = len(history) == plan.epochs and all(intact(epoch_folder(folder, e + 1)) for e in range(plan.epochs))
    if whole and not behind(state, plan.epochs):
        return history

    trained = {"class_encoder": class_encoder, "unet": base.unet}[plan.part]
    frozen = {"class_encoder": base.unet, "unet": class_encoder}[plan.part]
    frozen.requires_grad_(False).eval()
    trained.requires_grad_(True).train()
    device, scheduler = base.device, base.noise_scheduler()
    optimizer = torch.optim.AdamW(
        trained.parameters(), lr=plan.learning_rate, weight_decay=plan.weight_decay, eps=1e-8, fused=True
    )
    scaler = torch.amp.GradScaler(device.type, enabled=base.dtype == torch.float16)
    at = load_resume_state(state, lineage, trained, optimizer, scaler)
    if not all(intact(epoch_folder(folder, epoch + 1)) for epoch in range(at.epochs)):
        raise BadInput(
            f"{folder} lacks a checkpoint that its training had written, or it is damaged: move the folder away and run "
            "its step again, which trains the same once more."
        )
    history = history[: at.epochs]
    table = class_encoder.table().detach() if plan.part == "unet" else None
    all_steps, per_epoch = plan.steps(len(moments)), math.ceil(len(moments) / plan.batch_size)
    labels = torch.as_tensor(labels, device=device)
    # Weights and Adam's two moments in float32, and beside it the one before; each epoch's checkpoint: a UNet in half precision, a table.
    numbers = sum(parameter.numel() for parameter in trained.parameters())
    kept = 2 * numbers if table is not None else 4 * class_encoder.table().numel()
    check_room(folder, 2 * 12 * numbers + kept * (plan.epochs - at.epochs), f"Training {plan.part}")

    def save_state(position: Position) -> None:
        save_resume_state(state, lineage, position, trained, optimizer, scaler)

    smaller = f"take a smaller `{plan.part}_batch_size` in an experiment of its own (it is another training)"
    done = at.epochs * per_epoch + at.steps
    with progress(total=all_steps, initial=done, desc=f"train {plan.part}", unit="step") as bar:
        for epoch in range(at.epochs + 1, plan.epochs + 1):
            started, losses = time.perf_counter() - at.seconds, list(at.losses)
            saved = time.monotonic()
            generator = torch.Generator().manual_seed(derive_seed(plan.seed, plan.part, epoch))
            order = torch.randperm(len(moments), generator=generator).split(plan.batch_size)
            if at.steps:
                generator.set_state(at.generator)
            for index in range(at.steps, per_epoch):
                batch, step = order[index], (epoch - 1) * per_epoch + index
                for group in optimizer.param_groups:
                    group["lr"] = cosine(step, all_steps) * plan.learning_rate
                latents = moments.sample(batch.to(device), generator)
                noise = torch.randn(latents.shape, generator=generator).to(device)
                timesteps = torch.randint(
                    0, scheduler.config.num_train_timesteps, (len(batch),), generator=generator
                ).to(device)
                # Of each class once, the same for all its images. A product with one-hot rows looks them up: indexing
                # would add up its gradients in an order that differs from run to run where there are several threads.
                with fitting(f"a step of {plan.part} with {plan.batch_size} images", smaller):
                    conditions = class_encoder.table() if table is None else table
                    rows = F.one_hot(labels[batch.to(device)], len(conditions)).to(conditions.dtype)
                    encoder_hidden_states = (rows @ conditions.flatten(1)).view(-1, *conditions.shape[1:])
                    loss = noise_loss(base, scheduler, latents, noise, timesteps, encoder_hidden_states)
                    if not torch.isfinite(loss):
                        raise BadInput(
                            f"The loss of {plan.part} became {loss.item()} at epoch {epoch}, step {index + 1} of {per_epoch} (training "
                            f"images {', '.join(map(str, batch[:8].tolist()))}{' ...' * (len(batch) > 8)}; {plan.part}_learning_rate "
                            f"{plan.learning_rate}, max_grad_norm {plan.max_grad_norm}, {base.dtype}): earlier checkpoints in {folder} are "
                            "intact; try a smaller learning rate."
                        )
                    scaler.scale(loss).backward()
                    scaler.unscale_(optimizer)
                    torch.nn.utils.clip_grad_norm_(trained.parameters(), plan.max_grad_norm)
                    scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                losses.append(loss.detach())
                bar.update()
                if time.monotonic() - saved > resume_seconds and index + 1 < per_epoch:
                    clocked = time.perf_counter() - started
                    save_state(Position(epoch - 1, index + 1, generator.get_state(), losses, clocked))
                    saved = time.monotonic()
            mean_loss = torch.stack(losses).mean().item()
            rate = optimizer.param_groups[0]["lr"]
            seconds = round(time.perf_counter() - started, 2)
            history.append(dict(epoch=epoch, loss=mean_loss, learning_rate=rate, steps=per_epoch, seconds=seconds))
            save_checkpoint(trained, epoch_folder(folder, epoch))
            write_json(folder / "history.json", dict(lineage=lineage, plan=plan.__dict__, epochs=history))
            at = Position(epoch)
            save_state(at)
    trained.requires_grad_(False).eval()
    return history


def noise_loss(base, scheduler, latents, noise, timesteps, encoder_hidden_states) -> torch.Tensor:
    """Plain MSE of the base model's prediction; all tensors (n, ...), `latents` scaled."""
    noisy = scheduler.add_noise(latents, noise, timesteps)
    weights = base.unet.dtype  # of a frozen UNet base.dtype; of one that is trained float32, and autocast computes
    with torch.autocast(base.device.type, base.dtype, enabled=base.dtype != torch.float32):
        predicted = base.unet(noisy.to(weights), timesteps, encoder_hidden_states.to(weights)).sample
    target = noise if base.prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    return F.mse_loss(predicted.float(), target.float())


def cosine(step: int, steps: int) -> float:
    """1 at the first step, towards 0 after the last (Keras' CosineDecay with alpha 0)."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


# ------------------------------------------------------------------------------------------------ the steps


def encode_training_set(run: Run, base: BaseModel, data: ImageDataset) -> Moments:
    """The training images' posterior moments, from `latents/train.npz` if they are there."""
    path, size = run.folder / "latents" / "train.npz", run.settings.base_image_size
    return encode_images(
        lambda indices: data.training_images(indices, size),
        len(data.train), base, size, path, data.fingerprint(), run.progress,
    )  # fmt: skip


def train_class_encoder(run: Run, base: BaseModel, data: ImageDataset, moments: Moments) -> list[dict]:
    """Step 1: a new Class-Encoder, VAE and UNet frozen. Checkpoints in `class_encoder/`."""
    from sdlab.class_encoder import ClassEncoder

    s = run.settings
    make_scheduler(s.scheduler, base.scheduler_config)  # refuse one that cannot sample now, not after the training
    plan = TrainingPlan("class_encoder", s.class_encoder_epochs, s.class_encoder_batch_size, s.class_encoder_learning_rate,
                        s.weight_decay, s.max_grad_norm, s.seed)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(s.seed, "class_encoder"))
        class_encoder = ClassEncoder(data.num_classes, base.tokens, base.width, s.class_encoder_hidden)
    made_from = [data.fingerprint(), base.sha256, s.class_encoder_hidden]
    folder = run.folder / "class_encoder"
    return train(plan, base, class_encoder.to(base.device), moments, data.train.labels, folder, made_from, run.progress,
                 60 * s.resume_minutes)  # fmt: skip


def fine_tune_unet(
    run: Run, base: BaseModel, data: ImageDataset, moments: Moments, class_encoder_epoch: int
) -> list[dict]:
    """Step 3: a UNet loaded anew in float32, the Class-Encoder of step 2's best epoch frozen. Checkpoints in `unet/`."""
    from sdlab.class_encoder import ClassTable

    s = run.settings
    plan = TrainingPlan(
        "unet", s.unet_epochs, s.unet_batch_size, s.unet_learning_rate, s.weight_decay, s.max_grad_norm, s.seed
    )
    encoders = run.folder / "class_encoder"
    table = load_checkpoint(ClassTable, encoders, class_encoder_epoch, base.device)
    made_from = [data.fingerprint(), base.sha256, checkpoint_sha(encoders, class_encoder_epoch)]
    return train(plan, base.to_train(), table, moments, data.train.labels, run.folder / "unet", made_from, run.progress,
                 60 * s.resume_minutes)  # fmt: skip


# --------------------------------------------------------------------------------------------- checkpoints


def epoch_folder(folder: Path, epoch: int) -> Path:
    return folder / f"epoch_{epoch:02d}"


def save_checkpoint(model: "ModelMixin", folder: Path) -> None:
    """What later steps need of a model, in diffusers' folder format, with a manifest of its files' hashes.

    A Class-Encoder is kept as its table, a UNet in half precision: sampling needs no more, and a run has many of
    them. The full weights are in the resume state. A checkpoint that is there stays.

    Raises `BadInput` if it is there and damaged: it is not written over, and not taken for good.
    """
    if folder.exists():
        if not intact(folder):
            raise BadInput(f"{folder} is damaged: move the folder {folder.parent} away and run its step again.")
        return
    kept = model.tabulated() if hasattr(model, "tabulated") else halved(model)
    with written_beside(folder) as beside:
        kept.save_pretrained(beside, safe_serialization=True)
        files = {file.name: sha256_of_file(file) for file in sorted(beside.iterdir())}
        write_json(beside / "manifest.json", files)


def halved(unet: "UNet2DConditionModel") -> "UNet2DConditionModel":
    """A copy in float16, without a second one in float32. Raises `BadInput` if a weight is beyond its range."""
    # Where its base lay is this machine's, and would give other bytes elsewhere.
    config = {name: value for name, value in unet.config.items() if name != "_name_or_path"}
    with torch.device("meta"):
        copy = type(unet).from_config(config)
    weights = {name: value.half() for name, value in unet.state_dict().items()}
    if beyond := [name for name, value in weights.items() if not torch.isfinite(value).all()]:
        raise BadInput(f"The UNet's weights {beyond[0]} are beyond the range of float16: try a smaller learning rate.")
    copy.load_state_dict(weights, assign=True)
    return copy


def intact(folder: Path) -> bool:
    return (folder / "manifest.json").is_file() and not damage(folder)


def damage(folder: Path) -> str:
    """The first file of a checkpoint that is not as it was written, in words; empty if all are."""
    for name, sha in checkpoint_hashes(folder).items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256_of_file(folder / name) != sha:
            return f"{name} is truncated or altered"
    return ""


def load_checkpoint(
    kind: "type[ModelMixin]",
    folder: Path,
    epoch: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> "ModelMixin":
    """The model of one epoch, its files' hashes checked. Raises `BadInput`: weights are never made up."""
    path = epoch_folder(folder, epoch)
    if not (path / "manifest.json").is_file():
        found = sorted(int(p.name[6:]) for p in folder.glob("epoch_*"))
        has = f"epochs {found[0]} to {found[-1]}" if found else "no checkpoint"
        raise BadInput(f"There is no checkpoint of epoch {epoch} in {folder}, which has {has}.")
    broken = damage(path)
    if broken:
        raise BadInput(f"The checkpoint {path} is damaged: {broken}. Move {folder} away and run its step again.")
    try:
        model = kind.from_pretrained(path, local_files_only=True, use_safetensors=True, torch_dtype=dtype)
    except Exception as error:
        raise BadInput(f"The checkpoint {path} cannot be loaded: {first_line(error)}") from None
    return model.to(device).requires_grad_(False).eval()


def kept_history(folder: Path, lineage: str) -> list[dict]:
    """The epochs already trained. Raises `BadInput` if the folder holds another training."""
    if not (folder / "history.json").exists():
        return []
    path, form = folder / "history.json", dict(lineage=str, plan=dict, epochs=list)
    kept = checked_form(read_json(path), form, path)
    if kept["lineage"] != lineage:
        raise BadInput(
            f"{folder} holds a training with another plan or other inputs: give the experiment another name, "
            "or move the folder away."
        )
    return kept["epochs"]


def save_resume_state(
    path: Path, lineage: str, at: Position, model: torch.nn.Module, optimizer: torch.optim.Optimizer, scaler
) -> None:
    """Weights and Adam's moments in full precision, in one safetensors file: one rolling state, not one an epoch.

    For SD 2.0's UNet these are 10.4 GB: they are written from where they lie, without a copy (on a GPU: one in RAM).
    With them goes a hash of them all, so that a state that was altered is not gone on from.
    """
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"adam.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    if at.steps:
        tensors |= {"generator": at.generator, "losses": torch.stack(at.losses).float()}
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    kept = dict(lineage=lineage, epochs=at.epochs, steps=at.steps, seconds=at.seconds, scaler=scaler.state_dict())
    digest = hashlib.sha256(json.dumps(kept).encode())
    for name in sorted(tensors):
        add_tensor(digest, name, tensors[name])
    check_room(path, sum(value.nbytes for value in tensors.values()), f"The resume state {path.name}")
    kept["sha256"] = digest.hexdigest()
    with written_beside(path) as beside:  # one entry of metadata: several come in any order
        save_file(tensors, beside, metadata={"sdlab": json.dumps(kept)})


def behind(path: Path, epochs: int) -> bool:
    """Whether a state is of before the end of its training: that was killed between its last checkpoint and its last state."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["sdlab"])["epochs"] < epochs
    except Exception:  # none, or none that can be read: nothing needs it any more, and `sdlab verify` names it
        return False


def add_tensor(digest, name: str, value: torch.Tensor) -> None:
    """Its name and bytes, to a hash."""
    digest.update(name.encode())
    digest.update(value.reshape(-1).view(torch.uint8).numpy())


@torch.no_grad()
def load_resume_state(
    path: Path, lineage: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer, scaler
) -> Position:
    """Fill `model`, `optimizer` and `scaler` from the state file; where that training was. Raises `BadInput`."""
    if not path.exists():
        return Position()
    try:
        with reading(path):  # safetensors would say that it is not there
            path.open("rb").close()
        with safe_open(path, "pt") as file:
            kept, names = json.loads(file.metadata()["sdlab"]), sorted(file.keys())
        sha256 = kept.pop("sha256")
        digest = hashlib.sha256(json.dumps(kept).encode())
        if kept["lineage"] != lineage:
            raise BadInput(f"{path} belongs to a training with another plan or other inputs: move its folder away.")
        weights, parameters, more = model.state_dict(), dict(model.named_parameters()), {}
        for name in names:
            value = read_tensor(path, name)
            add_tensor(digest, name, value)
            kind, _, rest = name.partition(".")
            if kind == "model":
                weights.pop(rest).copy_(value)
            elif kind == "adam":
                of, _, key = rest.rpartition(".")
                optimizer.state[parameters[of]][key] = value.to(parameters[of].device, copy=True)
            else:
                more[name] = value.clone()
        if weights or digest.hexdigest() != sha256:
            raise ValueError("its content is not what was written")
        losses = list(more.get("losses", torch.empty(0)).to(next(model.parameters()).device))
        at = Position(kept["epochs"], kept["steps"], more.get("generator"), losses, kept["seconds"])
        if kept["scaler"]:
            scaler.load_state_dict(kept["scaler"])
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(
            f"{path} is damaged ({first_line(error)}): move its folder away and run its step again."
        ) from None
    return at


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """One tensor of a file. Opened anew for each, so that not all of a large file stays mapped in memory at once."""
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)
