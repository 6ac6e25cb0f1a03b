"""Latents + the part to train -> a checkpoint and a record per epoch: one loop for stages 1 and 3.

Stage 1 trains the Class-Encoder with the UNet frozen, stage 3 the UNet with the Class-Encoder frozen. Both minimise

    E || target - unet(z_t, t, class_encoder(c)) ||^2,   z_t = sqrt(a_t) z_0 + sqrt(1 - a_t) noise

with target = noise (epsilon) or sqrt(a_t) noise - sqrt(1 - a_t) z_0 (v), whichever the base model predicts
(docs/method.md, items 12 and 13). All randomness derives from (seed, part, epoch), and the resume state holds the
generator's state, so an interrupted training ends with the same bytes.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from sdlab.base_models import BaseModel
from sdlab.cluster.processes import OneProcess
from sdlab.cluster.torchrun import train_on_devices
from sdlab.devices import raise_on_oom
from sdlab.latents import Moments
from sdlab.runs.checkpoints import checkpoint_sha, load_checkpoint
from sdlab.runs.run import Run
from sdlab.runs.trainings import EpochRecord, Training, TrainingPlan
from sdlab.schedulers import make_scheduler, steps_in_use
from sdlab.seeds import derive_seed

if TYPE_CHECKING:  # diffusers is slow to import
    from sdlab.class_encoder import ClassEncoder, ClassTable


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
    processes: OneProcess | None = None,
) -> Iterator[EpochRecord]:
    """Train `class_encoder` or `base.unet` in place; yields a record per epoch, after its checkpoint is in `folder`.

    Records of a finished training are yielded at once. An interrupted one continues from `folder/resume.safetensors`,
    which is written after each epoch, and inside an epoch after every `resume_seconds`. `made_from` names the inputs;
    with the plan it is the lineage that a resumed training has to match. Of several `processes`, each calls this.

    The trained weights are float32; the UNet computes in `base.dtype`, float16 with a loss scaler.

    Raises:
        BadInput: the folder holds a training with another plan or other inputs, a loss or a gradient became NaN or
            infinite, or disk or memory are too small.
    """
    training = Training(plan, base, class_encoder, len(moments), folder, made_from, processes)
    if training.is_finished():
        yield from training.history
        return
    training.resume()
    yield from training.history
    labels, scheduler = torch.as_tensor(labels, device=base.device), base.noise_scheduler()
    optimizer, scaler, processes = training.optimizer, training.scaler, training.processes
    denoiser = processes.prepare(Denoiser(base, class_encoder))
    remedy = f"take a smaller `micro_batch_size` (0 is all of `{plan.part}_batch_size`)"
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
                    target = prediction_target(base, scheduler, latents, noise, timesteps)

                    # Predict the noise, given the class, and compare.
                    loss = torch.zeros((), device=base.device)
                    for rows, share in processes.parts(len(batch)):
                        noise_pred = denoiser(noisy_latents[rows], timesteps[rows], labels[batch[rows]])
                        mse = F.mse_loss(noise_pred.float(), target[rows].float())
                        scaler.scale(mse * (share * processes.count)).backward()
                        loss += mse.detach() * share

                    # Step: clip the gradient, then AdamW.
                    scaler.unscale_(optimizer)
                    norm = torch.nn.utils.clip_grad_norm_(training.trained.parameters(), plan.max_grad_norm)
                    scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                bar.update()
                training.after_step(processes.sum(loss), norm, draw, resume_seconds)
            yield training.after_epoch()
    training.trained.requires_grad_(False).eval()


class Denoiser(torch.nn.Module):
    """UNet and Class-Encoder as one module: whichever is trained, its gradients are found by DDP."""

    def __init__(self, base: BaseModel, class_encoder: "ClassEncoder | ClassTable"):
        super().__init__()
        self.base, self.unet, self.class_encoder = base, base.unet, class_encoder

    def forward(self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The prediction for noisy latents (n, channels, h, w) of these classes (n,), in the shape of the latents."""
        return predict(self.base, noisy_latents, timesteps, look_up(self.class_encoder.table(), labels))


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


# ---------------------------------------------------------------------------------------- stages 1 and 3


def train_class_encoder(run: Run, moments: Moments) -> Iterator[EpochRecord]:
    """Stage 1: a new Class-Encoder; VAE and UNet are frozen. Checkpoints in `class_encoder/`."""
    from sdlab.class_encoder import ClassEncoder

    s, data, base = run.settings, run.data, run.base
    make_scheduler(s.scheduler, base.scheduler_config, steps_in_use(s))  # refused now, not after the training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(s.seed, "class_encoder"))
        class_encoder = ClassEncoder(data.num_classes, base.tokens, base.width, s.class_encoder_hidden)
    made_from = [data.fingerprint(), base.sha256, s.class_encoder_hidden]
    return train_part(run, "class_encoder", base, class_encoder.to(base.device), moments, made_from)


def fine_tune_unet(run: Run, moments: Moments, class_encoder_epoch: int) -> Iterator[EpochRecord]:
    """Stage 3: a UNet loaded again in float32; the Class-Encoder of stage 2's best epoch is frozen. Checkpoints in `unet/`."""
    from sdlab.class_encoder import ClassTable

    data, base, encoders = run.data, run.base, run.folder / "class_encoder"
    table = load_checkpoint(ClassTable, encoders, class_encoder_epoch, base.device)
    made_from = [data.fingerprint(), base.sha256, checkpoint_sha(encoders, class_encoder_epoch)]
    return train_part(run, "unet", base.with_trainable_unet(), table, moments, made_from, class_encoder_epoch)


def train_part(
    run: Run, part: str, base: BaseModel, class_encoder, moments: Moments, made_from: list, class_encoder_epoch: int = 0
) -> Iterator[EpochRecord]:
    """`train` here, or in as many processes as `training_processes` asks for, each of which comes by here again."""
    s, folder = run.settings, run.folder / part
    own = {name: getattr(s, f"{part}_{name}") for name in ("epochs", "batch_size", "learning_rate")}
    if part == "unet":
        own["first_kept"] = s.first_kept_unet_epoch
    plan = TrainingPlan(part=part, weight_decay=s.weight_decay, max_grad_norm=s.max_grad_norm, seed=s.seed, **own)
    more = s.training_processes > run.processes.count
    if more and not Training(plan, base, class_encoder, len(moments), folder, made_from).is_finished():
        return (EpochRecord(**record) for record in train_on_devices(run, part, class_encoder_epoch))
    return train(plan, base, class_encoder, moments, run.data.train.labels, folder, made_from, run.progress,
                 60 * s.resume_minutes, run.processes)  # fmt: skip
