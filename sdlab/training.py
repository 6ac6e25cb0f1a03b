"""Latents + the part to train -> a checkpoint and a record per epoch: one loop for stages 1 and 3.

Stage 1 trains the Class-Encoder with the UNet frozen, stage 3 the UNet with the Class-Encoder frozen. Both minimise

    E || target - unet(z_t, t, class_encoder(c)) ||^2,   z_t = sqrt(a_t) z_0 + sqrt(1 - a_t) noise

with target = noise (epsilon) or sqrt(a_t) noise - sqrt(1 - a_t) z_0 (v), whichever the base model predicts
(docs/method.md, items 12 and 13). All randomness derives from (seed, part, epoch), and the resume state holds the
generator's state, so an interrupted training ends with the same bytes.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from sdlab.base_models import BaseModel
from sdlab.devices import raise_on_oom
from sdlab.errors import BadInput
from sdlab.latents import Moments
from sdlab.runs.checkpoints import checkpoint_sha, epoch_folder, is_intact, load_checkpoint, save_checkpoint
from sdlab.runs.files import check_free_space, sha256_of_json, write_json
from sdlab.runs.resume_states import TrainingPosition, is_behind, load_history, load_resume_state, save_resume_state
from sdlab.runs.run import Run
from sdlab.schedulers import make_scheduler, steps_in_use
from sdlab.seeds import derive_seed, generator

if TYPE_CHECKING:  # diffusers is slow to import
    from sdlab.class_encoder import ClassEncoder, ClassTable


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """How one part is trained (section 3, stages 1 and 3)."""

    part: str  # class_encoder or unet
    epochs: int
    batch_size: int
    learning_rate: float  # at the first training step; cosine to 0 over all of them
    weight_decay: float
    max_grad_norm: float
    seed: int

    def train_steps(self, images: int) -> int:
        return self.epochs * math.ceil(images / self.batch_size)


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One epoch of a training."""

    epoch: int
    loss: float  # mean over the epoch's training steps
    learning_rate: float  # at its last training step
    train_steps: int
    seconds: float


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
) -> Iterator[EpochRecord]:
    """Train `class_encoder` or `base.unet` in place; yields a record per epoch, after its checkpoint is in `folder`.

    Records of a finished training are yielded at once. An interrupted one continues from `folder/resume.safetensors`,
    which is written after each epoch, and inside an epoch after every `resume_seconds`. `made_from` names the inputs;
    with the plan it is the lineage that a resumed training has to match.

    The trained weights are float32; the UNet computes in `base.dtype`, float16 with a loss scaler.

    Raises:
        BadInput: the folder holds a training with another plan or other inputs, the loss became NaN or infinite, or disk
            or memory are too small.
    """
    training = Training(plan, base, class_encoder, moments, folder, made_from)
    if training.is_finished():
        yield from training.history
        return
    training.resume()
    yield from training.history
    labels, scheduler = torch.as_tensor(labels, device=base.device), base.noise_scheduler()
    optimizer, scaler, remedy = training.optimizer, training.scaler, f"take a smaller `{plan.part}_batch_size`"
    with progress(total=training.total, initial=training.done, desc=f"train {plan.part}", unit="step") as bar:
        for epoch in training.remaining_epochs():
            for batch, draw in training.batches(epoch):
                with raise_on_oom(f"a training step of {plan.part} with {plan.batch_size} images", remedy):
                    # Draw a latent of each image from its posterior.
                    latents = moments.sample(batch, draw)

                    # Add noise at a random timestep.
                    noise = torch.randn(latents.shape, generator=draw).to(base.device)
                    timesteps = torch.randint(
                        0, scheduler.config.num_train_timesteps, (len(batch),), generator=draw
                    ).to(base.device)
                    noisy_latents = scheduler.add_noise(latents, noise, timesteps)

                    # Predict the noise, given the class, and compare.
                    encoder_hidden_states = look_up(class_encoder.table(), labels[batch])
                    noise_pred = predict(base, noisy_latents, timesteps, encoder_hidden_states)
                    target = prediction_target(base, scheduler, latents, noise, timesteps)
                    loss = F.mse_loss(noise_pred.float(), target.float())
                    training.check_finite(loss, batch)

                    # Step: clip the gradient, then AdamW.
                    scaler.scale(loss).backward()
                    scaler.unscale_(optimizer)
                    torch.nn.utils.clip_grad_norm_(training.trained.parameters(), plan.max_grad_norm)
                    scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                bar.update()
                training.after_step(loss, draw, resume_seconds)
            yield training.after_epoch()
    training.trained.requires_grad_(False).eval()


def look_up(table: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`table[labels]`, (n, tokens, width), as a product with one-hot rows.

    The gradient of an indexed table is summed in whatever order the threads finish, so it would not repeat.
    """
    rows = F.one_hot(labels, len(table)).to(table.dtype)
    return (rows @ table.flatten(1)).view(-1, *table.shape[1:])


def predict(base: BaseModel, noisy_latents, timesteps, encoder_hidden_states) -> torch.Tensor:
    """The UNet's prediction (n, channels, h, w), computed in `base.dtype`.

    A trained UNet has float32 weights, and autocast computes in half precision; a frozen one has weights of `base.dtype`.
    """
    weights = base.unet.dtype
    with torch.autocast(base.device.type, base.dtype, enabled=base.dtype != torch.float32):
        return base.unet(noisy_latents.to(weights), timesteps, encoder_hidden_states.to(weights)).sample


def prediction_target(base: BaseModel, scheduler, latents, noise, timesteps) -> torch.Tensor:
    """The noise, or the velocity sqrt(a_t) noise - sqrt(1 - a_t) z_0 of a v-predicting base model."""
    return noise if base.prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)


def cosine(step: int, steps: int) -> float:
    """1 at the first step, towards 0 after the last (Keras' CosineDecay with alpha 0)."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


# ---------------------------------------------------------------------------------- the loop's bookkeeping


class Training:
    """Set-up, position, checks and saving of one training; the method itself is the loop in `train`."""

    def __init__(
        self, plan: TrainingPlan, base: BaseModel, class_encoder, moments: Moments, folder: Path, made_from: Any
    ):
        self.plan, self.base, self.class_encoder, self.folder = plan, base, class_encoder, folder
        self.lineage = sha256_of_json([asdict(plan), made_from, len(moments)])
        self.images, self.per_epoch = len(moments), math.ceil(len(moments) / plan.batch_size)
        self.total = plan.train_steps(self.images)
        self.history = [EpochRecord(**entry) for entry in load_history(folder, self.lineage)]
        self.state_file = folder / "resume.safetensors"

    def is_finished(self) -> bool:
        """True if every checkpoint is intact and the resume state is that of the end."""
        whole = len(self.history) == self.plan.epochs and self.has_checkpoints(self.plan.epochs)
        return whole and not is_behind(self.state_file, self.plan.epochs)

    def has_checkpoints(self, epochs: int) -> bool:
        return all(is_intact(epoch_folder(self.folder, epoch + 1)) for epoch in range(epochs))

    def resume(self) -> None:
        """Freeze one part, make the optimiser of the other, and load the resume state. Raises `BadInput`."""
        plan, base = self.plan, self.base
        parts = {"class_encoder": self.class_encoder, "unet": base.unet}
        self.trained = parts.pop(plan.part)
        self.trained.requires_grad_(True).train()
        for frozen in parts.values():
            frozen.requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(
            self.trained.parameters(), lr=plan.learning_rate, weight_decay=plan.weight_decay, eps=1e-8, fused=True
        )
        self.scaler = torch.amp.GradScaler(base.device.type, enabled=base.dtype == torch.float16)
        self.position = load_resume_state(self.state_file, self.lineage, self.trained, self.optimizer, self.scaler)
        if not self.has_checkpoints(self.position.epochs):
            raise BadInput(
                f"{self.folder} lacks a checkpoint that its training had written, or it is damaged: move the folder away and "
                "run its stage again, which repeats the training."
            )
        self.history = self.history[: self.position.epochs]
        self.done = self.position.epochs * self.per_epoch + self.position.steps
        # Weights and Adam's two moments in float32, twice while a state is written; per epoch a half-precision UNet or a table.
        numbers = sum(parameter.numel() for parameter in self.trained.parameters())
        checkpoint = 2 * numbers if plan.part == "unet" else 4 * self.class_encoder.table().numel()
        needed = 2 * 12 * numbers + checkpoint * (plan.epochs - self.position.epochs)
        check_free_space(self.folder, needed, f"Training {plan.part}")

    def remaining_epochs(self) -> range:
        return range(self.position.epochs + 1, self.plan.epochs + 1)

    def batches(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Generator]]:
        """The remaining batches of an epoch, (n,) indices each, and the generator that its draws come from."""
        self.epoch, at = epoch, self.position
        self.started, self.losses, self.saved = time.perf_counter() - at.seconds, list(at.losses), time.monotonic()
        draw = generator(derive_seed(self.plan.seed, self.plan.part, epoch))
        order = torch.randperm(self.images, generator=draw).split(self.plan.batch_size)
        if at.steps:
            draw.set_state(at.generator)
        for index in range(at.steps, self.per_epoch):
            self.index = index
            rate = cosine((epoch - 1) * self.per_epoch + index, self.total) * self.plan.learning_rate
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            yield order[index].to(self.base.device), draw

    def check_finite(self, loss: torch.Tensor, batch: torch.Tensor) -> None:
        """Raises `BadInput` for a loss that is NaN or infinite, with all that tells why."""
        if torch.isfinite(loss):
            return
        plan, images = self.plan, ", ".join(map(str, batch[:8].tolist())) + " ..." * (len(batch) > 8)
        raise BadInput(
            f"The loss of {plan.part} became {loss.item()} at epoch {self.epoch}, step {self.index + 1} of {self.per_epoch} "
            f"(training images {images}; {plan.part}_learning_rate {plan.learning_rate}, max_grad_norm {plan.max_grad_norm}, "
            f"{self.base.dtype}): earlier checkpoints in {self.folder} are intact; try a smaller learning rate."
        )

    def after_step(self, loss: torch.Tensor, draw: torch.Generator, resume_seconds: float) -> None:
        """Keep the loss, and a resume state if it is time for one."""
        self.losses.append(loss.detach())
        if time.monotonic() - self.saved > resume_seconds and self.index + 1 < self.per_epoch:
            clocked = time.perf_counter() - self.started
            self.save_state(TrainingPosition(self.epoch - 1, self.index + 1, draw.get_state(), self.losses, clocked))
            self.saved = time.monotonic()

    def after_epoch(self) -> EpochRecord:
        """Write the epoch's checkpoint, the history and the resume state."""
        record = EpochRecord(
            epoch=self.epoch,
            loss=torch.stack(self.losses).mean().item(),
            learning_rate=self.optimizer.param_groups[0]["lr"],
            train_steps=self.per_epoch,
            seconds=round(time.perf_counter() - self.started, 2),
        )
        self.history.append(record)
        save_checkpoint(self.trained, epoch_folder(self.folder, self.epoch))
        epochs = [asdict(entry) for entry in self.history]
        write_json(self.folder / "history.json", dict(lineage=self.lineage, plan=asdict(self.plan), epochs=epochs))
        self.position = TrainingPosition(self.epoch)
        self.save_state(self.position)
        return record

    def save_state(self, position: TrainingPosition) -> None:
        save_resume_state(self.state_file, self.lineage, position, self.trained, self.optimizer, self.scaler)


# ---------------------------------------------------------------------------------------- stages 1 and 3


def train_class_encoder(run: Run, moments: Moments) -> Iterator[EpochRecord]:
    """Stage 1: a new Class-Encoder; VAE and UNet are frozen. Checkpoints in `class_encoder/`."""
    from sdlab.class_encoder import ClassEncoder

    s, data, base = run.settings, run.data, run.base
    make_scheduler(s.scheduler, base.scheduler_config, steps_in_use(s))  # refused now, not after the training
    plan = training_plan(run, "class_encoder")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(s.seed, "class_encoder"))
        class_encoder = ClassEncoder(data.num_classes, base.tokens, base.width, s.class_encoder_hidden)
    made_from = [data.fingerprint(), base.sha256, s.class_encoder_hidden]
    return train(plan, base, class_encoder.to(base.device), moments, data.train.labels, run.folder / "class_encoder", made_from,
                 run.progress, 60 * s.resume_minutes)  # fmt: skip


def fine_tune_unet(run: Run, moments: Moments, class_encoder_epoch: int) -> Iterator[EpochRecord]:
    """Stage 3: a UNet loaded again in float32; the Class-Encoder of stage 2's best epoch is frozen. Checkpoints in `unet/`."""
    from sdlab.class_encoder import ClassTable

    s, data, base, encoders = run.settings, run.data, run.base, run.folder / "class_encoder"
    table = load_checkpoint(ClassTable, encoders, class_encoder_epoch, base.device)
    made_from = [data.fingerprint(), base.sha256, checkpoint_sha(encoders, class_encoder_epoch)]
    return train(training_plan(run, "unet"), base.with_trainable_unet(), table, moments, data.train.labels, run.folder / "unet",
                 made_from, run.progress, 60 * s.resume_minutes)  # fmt: skip


def training_plan(run: Run, part: str) -> TrainingPlan:
    s = run.settings
    own = {name: getattr(s, f"{part}_{name}") for name in ("epochs", "batch_size", "learning_rate")}
    return TrainingPlan(part=part, weight_decay=s.weight_decay, max_grad_norm=s.max_grad_norm, seed=s.seed, **own)
