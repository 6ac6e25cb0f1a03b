"""A training's plan and its bookkeeping: position, learning rate, checks, and what is written when."""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sdlab.cluster.processes import OneProcess
from sdlab.errors import BadInput
from sdlab.runs.checkpoints import epoch_folder, is_intact, save_checkpoint
from sdlab.runs.files import check_free_space, sha256_of_json, write_json
from sdlab.runs.resume_states import TrainingPosition, is_behind, load_history, load_resume_state, save_resume_state
from sdlab.seeds import derive_seed, generator

if TYPE_CHECKING:  # diffusers is slow to import
    from sdlab.base_models import BaseModel

SECONDS_BETWEEN_CHECKS = 1.0  # a check waits for the GPU


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
    first_kept: int = 1  # the first epoch that leaves a checkpoint

    def identity(self) -> dict[str, Any]:
        """What the weights depend on, and the checkpoints if some are left out."""
        return {name: value for name, value in asdict(self).items() if (name, value) != ("first_kept", 1)}

    def kept(self, epochs: int) -> range:
        """Those of the first `epochs` epochs that leave a checkpoint."""
        return range(self.first_kept, epochs + 1)

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


def cosine(step: int, steps: int) -> float:
    """1 at the first step, towards 0 after the last (Keras' CosineDecay with alpha 0)."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


class Training:
    """Set-up, position, checks and saving of one training; the method itself is the loop in `training.train`."""

    def __init__(
        self, plan: TrainingPlan, base: "BaseModel", class_encoder, images: int, folder: Path, made_from: Any,
        processes: OneProcess | None = None,
    ):  # fmt: skip
        self.plan, self.base, self.class_encoder, self.folder = plan, base, class_encoder, folder
        self.processes = processes or OneProcess()
        self.lineage = sha256_of_json([plan.identity(), made_from, images])
        self.images, self.per_epoch = images, math.ceil(images / plan.batch_size)
        self.total = plan.train_steps(images)
        self.history = [EpochRecord(**entry) for entry in load_history(folder, self.lineage)]
        self.state_file = folder / "resume.safetensors"

    def is_finished(self) -> bool:
        """True if every checkpoint is intact and the resume state is that of the end."""
        whole = len(self.history) == self.plan.epochs and self.has_checkpoints(self.plan.epochs)
        return whole and not is_behind(self.state_file, self.plan.epochs)

    def has_checkpoints(self, epochs: int) -> bool:
        return all(is_intact(epoch_folder(self.folder, epoch)) for epoch in self.plan.kept(epochs))

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
        if len(self.history) < self.position.epochs:
            raise BadInput(
                f"{self.folder / 'history.json'} has {len(self.history)} of the {self.position.epochs} epochs that its training "
                "has finished: put a copy of it back, or move the folder away and run its stage again, which repeats the training."
            )
        self.history = self.history[: self.position.epochs]
        self.done = self.position.epochs * self.per_epoch + self.position.steps
        # Weights and Adam's two moments in float32, twice while a state is written; per epoch a half-precision UNet or a table.
        numbers = sum(parameter.numel() for parameter in self.trained.parameters())
        checkpoint = 2 * numbers if plan.part == "unet" else 4 * self.class_encoder.table().numel()
        needed = 2 * 12 * numbers + checkpoint * len(set(plan.kept(plan.epochs)) - set(plan.kept(self.position.epochs)))
        check_free_space(self.folder, needed, f"Training {plan.part}")

    def remaining_epochs(self) -> range:
        return range(self.position.epochs + 1, self.plan.epochs + 1)

    def batches(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Generator]]:
        """The remaining batches of an epoch, (n,) indices each, and the generator that its draws come from."""
        self.epoch, at = epoch, self.position
        self.started, self.saved, self.looked = time.perf_counter() - at.seconds, time.monotonic(), time.monotonic()
        self.losses, self.norms = list(at.losses), []
        draw = generator(derive_seed(self.plan.seed, self.plan.part, epoch))
        self.order = torch.randperm(self.images, generator=draw).split(self.plan.batch_size)
        if at.steps:
            draw.set_state(at.generator)
        for index in range(at.steps, self.per_epoch):
            self.index = index
            rate = cosine((epoch - 1) * self.per_epoch + index, self.total) * self.plan.learning_rate
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            yield self.order[index].to(self.base.device), draw

    def after_step(self, loss: torch.Tensor, norm: torch.Tensor, draw: torch.Generator, resume_seconds: float) -> None:
        """Keep the loss and the gradient's norm; now and then look at them, and keep a resume state if it is time for one."""
        self.losses.append(loss.detach())
        self.norms.append(
            loss.detach() if self.scaler.is_enabled() else norm
        )  # a scaler meets infinite gradients itself
        if time.monotonic() - self.looked > SECONDS_BETWEEN_CHECKS:
            self.check_finite()
        if time.monotonic() - self.saved > resume_seconds and self.index + 1 < self.per_epoch:
            clocked = time.perf_counter() - self.started
            self.save_state(TrainingPosition(self.epoch - 1, self.index + 1, draw.get_state(), self.losses, clocked))
            self.saved = time.monotonic()

    def check_finite(self) -> None:
        """Raises `BadInput` for the first loss or gradient since the last check that is NaN or infinite, with all that tells why.

        It is called before anything is written: finite gradients leave finite weights.
        """
        steps, self.looked = len(self.norms), time.monotonic()
        if not steps:
            return
        values = torch.stack([torch.stack(self.losses[-steps:]), torch.stack(self.norms)]).cpu()  # the one wait
        self.norms = []
        finite = torch.isfinite(values)
        if finite.all():
            return
        step = int((~finite.all(0)).nonzero()[0])
        index, plan = len(self.losses) - steps + step, self.plan
        what, value = ("gradient", values[1]) if finite[0, step] else ("loss", values[0])
        batch = self.order[index]
        images = ", ".join(map(str, batch[:8].tolist())) + " ..." * (len(batch) > 8)
        raise BadInput(
            f"The {what} of {plan.part} became {value[step].item()} at epoch {self.epoch}, step {index + 1} of {self.per_epoch} "
            f"(training images {images}; {plan.part}_learning_rate {plan.learning_rate}, max_grad_norm {plan.max_grad_norm}, "
            f"{self.base.dtype}): earlier checkpoints in {self.folder} are intact; try a smaller learning rate."
        )

    def after_epoch(self) -> EpochRecord:
        """Write the epoch's checkpoint, the history and the resume state."""
        self.check_finite()
        record = EpochRecord(
            epoch=self.epoch,
            loss=torch.stack(self.losses).mean().item(),
            learning_rate=self.optimizer.param_groups[0]["lr"],
            train_steps=self.per_epoch,
            seconds=round(time.perf_counter() - self.started, 2),
        )
        self.history.append(record)
        if self.processes.is_first:
            if self.epoch in self.plan.kept(self.epoch):
                save_checkpoint(self.trained, epoch_folder(self.folder, self.epoch))
            epochs = [asdict(entry) for entry in self.history]
            write_json(
                self.folder / "history.json", dict(lineage=self.lineage, plan=self.plan.identity(), epochs=epochs)
            )
        self.position = TrainingPosition(self.epoch)
        self.save_state(self.position)
        return record

    def save_state(self, position: TrainingPosition) -> None:
        if self.processes.is_first:
            self.check_finite()
            save_resume_state(self.state_file, self.lineage, position, self.trained, self.optimizer, self.scaler)
