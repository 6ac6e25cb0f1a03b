"""Latents + the part to train -> a checkpoint per epoch and a loss history: one loop for steps 1 and 3.

Step 1 trains the Class-Encoder with the UNet frozen, step 3 the UNet with the Class-Encoder frozen; either minimises

    E || target - unet(sqrt(a_t) x_0 + sqrt(1 - a_t) noise, t, class_encoder(y)) ||^2

with target = noise (epsilon) or sqrt(a_t) noise - sqrt(1 - a_t) x_0 (v), whichever the base model predicts.
All randomness derives from (seed, part, epoch); the resume state says where in an epoch the generator is. So a run that
was cut goes on from its last state with the same bytes.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from sdlab.base_models import BaseModel, make_scheduler
from sdlab.data.images import ImageDataset
from sdlab.devices import raise_on_oom
from sdlab.errors import BadInput
from sdlab.latents import Moments, encode_images
from sdlab.runs.checkpoints import checkpoint_sha, epoch_folder, is_intact, load_checkpoint, save_checkpoint
from sdlab.runs.files import check_free_space, sha256_of_json, write_json
from sdlab.runs.resume import TrainingPosition, is_behind, load_history, load_resume_state, save_resume_state
from sdlab.runs.run import Run
from sdlab.threads import derive_seed

if TYPE_CHECKING:
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
    history, state = load_history(folder, lineage), folder / "resume.safetensors"
    whole = len(history) == plan.epochs and all(is_intact(epoch_folder(folder, e + 1)) for e in range(plan.epochs))
    if whole and not is_behind(state, plan.epochs):
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
    if not all(is_intact(epoch_folder(folder, epoch + 1)) for epoch in range(at.epochs)):
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
    check_free_space(folder, 2 * 12 * numbers + kept * (plan.epochs - at.epochs), f"Training {plan.part}")

    def save_state(position: TrainingPosition) -> None:
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
                with raise_on_oom(f"a step of {plan.part} with {plan.batch_size} images", smaller):
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
                    save_state(TrainingPosition(epoch - 1, index + 1, generator.get_state(), losses, clocked))
                    saved = time.monotonic()
            mean_loss = torch.stack(losses).mean().item()
            rate = optimizer.param_groups[0]["lr"]
            seconds = round(time.perf_counter() - started, 2)
            history.append(dict(epoch=epoch, loss=mean_loss, learning_rate=rate, steps=per_epoch, seconds=seconds))
            save_checkpoint(trained, epoch_folder(folder, epoch))
            write_json(folder / "history.json", dict(lineage=lineage, plan=plan.__dict__, epochs=history))
            at = TrainingPosition(epoch)
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
    return train(plan, base.with_trainable_unet(), table, moments, data.train.labels, run.folder / "unet", made_from, run.progress,
                 60 * s.resume_minutes)  # fmt: skip
