"""Pretrain `tiny`, the embedded base model: a latent diffusion model of pictures in general.

It stands in for Stable Diffusion at a size that fits in git and on two CPU cores: diffusers'
AutoencoderKL and a cross-attention UNet2DConditionModel. They know letters, digits, cells, vessels, textures, shapes
and crops of a few photographs (`pictures/`), and have never seen a handwritten digit or a medical image. The UNet is
conditioned by eight small text-like tokens: what is shown, which variant of it, its colours, geometry and rendering.
Like SD's text encoder they are thrown away; a UNet with cross-attention on (tokens, width) embeddings remains.

    python scripts/pretrain_tiny.py vae  --state ~/tiny-state --steps 12000
    python scripts/pretrain_tiny.py unet --state ~/tiny-state --steps 20000
    python scripts/pretrain_tiny.py export --state ~/tiny-state --to sdlab/tiny

(docs/log.md says how the committed weights were made.)

Every random number derives from (seed, step): a run repeats exactly, cut and resumed or not, on one machine with the
same number of threads. A state folder has, of each stage, `vae.pt` to resume from; `vae.safetensors`, the averaged
weights in half precision, which are also what another training can begin with; and `vae.csv`: step, mean loss of the
last steps (of the VAE: L1 in [-1, 1]), mean seconds a step since the process started.
"""

import csv
import hashlib
import json
import math
import os
import time
from functools import lru_cache, partial
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from pictures.drawing import COLOURS, GEOMETRY, RENDERING, SIZE
from pictures.mixture import CAMERA, KINDS, UNET_SHARES, VAE_SHARES, Batch, draw, kind_of, subjects, variants
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

TOKENS, WIDTH = 8, 64  # of encoder_hidden_states
# How often each of the eight tokens is left out: geometry mostly, the variant in half the pictures, so that the model
# varies what it was not given. A class condition is one condition for many different images.
TOKEN_DROPOUT = (0.05, 0.3, 0.5, 0.3, 0.3, 0.3, 0.7, 0.3)
CONDITION_DROPOUT = 0.1  # classifier-free guidance (Ho and Salimans 2022): all tokens zero
VAE_RATE, UNET_RATE = 5e-4, 1e-3  # peak learning rates of AdamW
KL_WEIGHT = 3e-4  # nats of the posterior, divided by how many numbers an image has; error: L1 + squared, in [-1, 1]
# Images are drawn 1,024 at a time. Each is shown so often, on average: the UNet sees it with another noise each time.
POOL_IMAGES, VAE_SHOWN, UNET_SHOWN = 1024, 4, 16
LOG_EVERY, SAVE_EVERY = 50, 500  # steps
SCHEDULER = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000,
                 prediction_type="epsilon", clip_sample=False, set_alpha_to_one=True, steps_offset=1)  # fmt: skip


class ThrowawayTextEncoder(torch.nn.Module):
    """What a picture shows -> eight tokens (count, 8, 64). It is thrown away: the Class-Encoder takes its place."""

    def __init__(self):
        super().__init__()
        self.subject = torch.nn.Embedding(len(subjects()), 2 * WIDTH)  # two tokens
        self.variant = torch.nn.Embedding(len(variants()), WIDTH)
        self.paper, self.ink, self.accent = (torch.nn.Linear(COLOURS // 3, WIDTH) for _ in range(3))
        # What the numbers of geometry and rendering mean is each kind's own, and all characters are of one kind.
        self.geometry = torch.nn.Parameter(torch.randn(len(KINDS), 1 + GEOMETRY, WIDTH) * 0.3)
        self.rendering = torch.nn.Parameter(torch.randn(len(KINDS), 1 + RENDERING + CAMERA, WIDTH) * 0.3)
        for embedding in (self.subject, self.variant):
            torch.nn.init.normal_(embedding.weight, std=0.5)

    def forward(self, shown: Batch, keep: torch.Tensor) -> torch.Tensor:
        paper, ink, accent = shown.colours.chunk(3, 1)
        # One-hot, since the gradient of weight[kind] would be summed in no fixed order by several threads.
        kind = F.one_hot(kind_of(shown.subject), len(KINDS)).float()
        geometry, rendering = (
            torch.einsum("nk,ni,kiw->nw", kind, torch.cat([torch.ones(len(numbers), 1), numbers], 1), weight)
            for numbers, weight in ((shown.geometry, self.geometry), (shown.rendering, self.rendering))
        )
        tokens = [*self.subject(shown.subject).chunk(2, 1), self.variant(shown.variant),
                  self.paper(paper), self.ink(ink), self.accent(accent),
                  geometry, rendering]  # fmt: skip
        return torch.stack(tokens, 1) * keep[:, :, None]


def keep_tokens(count: int, generator: torch.Generator) -> torch.Tensor:
    """1 where a token is given, 0 where it is left out: (count, 8)."""
    keep = torch.rand(count, TOKENS, generator=generator) >= torch.tensor(TOKEN_DROPOUT)
    conditional = torch.rand(count, 1, generator=generator) >= CONDITION_DROPOUT
    return (keep & conditional).float()


# ---------------------------------------------------------------------------------------------- models


def new_vae(latents: str) -> AutoencoderKL:
    """32 px <-> channels x size x size, as in "8x8x8".

    Its convolutions begin orthogonal, its residual branches zero, its posterior narrow (standard deviation e^-2). From
    diffusers' own beginning colours shrink on their way through a dozen convolutions: for a thousand steps or more only
    three latent channels of eight are used, and one colour axis is lost (docs/log.md).
    """
    channels, size, _ = (int(number) for number in latents.split("x"))
    widths = {4: (16, 32, 64, 64), 8: (16, 32, 64)}[size]
    model = AutoencoderKL(in_channels=3, out_channels=3, block_out_channels=widths, layers_per_block=1,
                          down_block_types=("DownEncoderBlock2D",) * len(widths),
                          up_block_types=("UpDecoderBlock2D",) * len(widths),
                          latent_channels=channels, norm_num_groups=1, sample_size=SIZE)  # fmt: skip
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.orthogonal_(module.weight)
            torch.nn.init.zeros_(module.bias)
    branches = [module.conv2 for module in model.modules() if isinstance(module, ResnetBlock2D)]
    branches += [module.to_out[0] for module in model.modules() if isinstance(module, Attention)]
    for last in branches:
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.zeros_(last.bias)
    with torch.no_grad():  # the posterior's log variance
        model.quant_conv.weight[channels:] = 0
        model.quant_conv.bias[channels:] = -4
    return model


def new_unet(latents: str) -> UNet2DConditionModel:
    """Attention at 4 x 4 and below: at 8 x 8 it would take most of the time."""
    channels, size, _ = (int(number) for number in latents.split("x"))
    down, up, widths = ("CrossAttnDownBlock2D",) * 2, ("CrossAttnUpBlock2D",) * 2, (64, 128)
    if size == 8:
        down, up, widths = ("DownBlock2D", down[0]), (up[0], "UpBlock2D"), (48, 64)
    return UNet2DConditionModel(sample_size=size, in_channels=channels, out_channels=channels,
                                block_out_channels=widths, layers_per_block=1,
                                down_block_types=down, up_block_types=up,
                                cross_attention_dim=WIDTH, attention_head_dim=4, norm_num_groups=8)  # fmt: skip


def step_generator(seed: int, stage: str, step: int) -> torch.Generator:
    """Random numbers that depend on seed, stage and step only, so that a resumed run draws what an uncut one does."""
    mixed = np.random.SeedSequence([seed, *stage.encode(), step]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed >> 1))


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Of AdamW at a step: a linear rise, then half a cosine to zero at `steps`."""
    return peak * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))


def load_state(path: Path) -> dict:
    saved = torch.load(path, weights_only=True)
    if not isinstance(saved.get("drawn_from"), dict):
        raise click.ClickException(f"{path} was made by an older form of this script: give another --state.")
    return saved


def load_average(state: Path, stage: str) -> tuple[dict[str, torch.Tensor], dict]:
    """The weights that a stage has come to, and what they were drawn from."""
    path = state / f"{stage}.safetensors"
    if not path.exists():
        raise click.ClickException(f"{path} does not exist: run `{stage}` with this --state first.")
    with safe_open(path, "pt") as file:
        weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        return weights, json.loads(file.metadata()["drawn_from"])


def check_settings(path: Path, saved: dict, drawn_from: dict) -> None:
    if saved["drawn_from"] != drawn_from:
        found, asked = (", ".join(f"{k} {v}" for k, v in said.items()) for said in (saved["drawn_from"], drawn_from))
        raise click.ClickException(f"{path} was made with {found}, not {asked}: give the same, or another --state.")


class Trainer:
    """One training loop for both stages: a state file, a log, an average of the weights (EMA).

    The average is also written on its own, after `finish` and in half precision. It is what is exported, and what a
    training without a state begins with.
    """

    def __init__(self, stage: str, module: torch.nn.Module, state: Path, lr: float, drawn_from: dict, finish=dict):
        self.stage, self.module, self.path, self.lr, self.step = stage, module, state / f"{stage}.pt", lr, 0
        self.finish, self.average = finish, state / f"{stage}.safetensors"
        self.drawn_from = drawn_from  # what must not change on resume: seed, batch size, latents, ...
        self.log = []  # rows of step, mean loss, mean seconds a step
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-2,
                                           fused=True)  # fmt: skip
        self.ema = {name: value.detach().clone() for name, value in module.state_dict().items()}
        state.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            saved = load_state(self.path)
            check_settings(self.path, saved, drawn_from)
            module.load_state_dict(saved["module"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.ema, self.step, self.log = saved["ema"], saved["step"], saved["log"]
        elif self.average.exists():
            module.load_state_dict(load_average(state, stage)[0])
            self.ema = {name: value.detach().clone() for name, value in module.state_dict().items()}

    def save(self) -> None:
        saved = dict(
            module=self.module.state_dict(),
            optimizer=self.optimizer.state_dict(),
            ema=self.ema,
            step=self.step,
            drawn_from=self.drawn_from,
            log=self.log,
        )
        torch.save(saved, self.path.with_suffix(".part"))
        os.replace(self.path.with_suffix(".part"), self.path)
        with self.path.with_suffix(".csv").open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(self.log)
        weights = {name: value.half().contiguous() for name, value in self.finish(self.ema).items()}
        save_file(weights, self.average.with_suffix(".part"), {"drawn_from": json.dumps(self.drawn_from)})
        os.replace(self.average.with_suffix(".part"), self.average)

    def run(self, loss_of_step, steps: int) -> None:
        """Up to `steps`, the end of the learning rate's schedule. A state beyond it is left as it is."""
        losses, started, first = [], time.perf_counter(), self.step
        bar = tqdm(total=steps, initial=self.step, desc=self.stage, mininterval=10)
        while self.step < steps:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.step, steps, self.lr)
            loss, shown = loss_of_step(self.step)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            decay = min(0.999, (1 + self.step) / (10 + self.step))
            for name, value in self.module.state_dict().items():
                if value.is_floating_point():
                    self.ema[name].lerp_(value, 1 - decay)
                else:
                    self.ema[name].copy_(value)
            losses.append(shown)
            bar.update()
            if self.step % LOG_EVERY == 0 or self.step == steps:
                seconds = (time.perf_counter() - started) / (self.step - first)
                self.log.append([self.step, round(float(np.mean(losses)), 5), round(seconds, 3)])
                bar.set_postfix(loss=self.log[-1][1], refresh=False)
                losses = []
            if self.step % SAVE_EVERY == 0 or self.step == steps:
                self.save()
        bar.close()


# ------------------------------------------------------------------------------------------------ stages


@click.group(context_settings={"show_default": True})
def cli() -> None:
    """Pretrain `tiny`: vae, then unet, then export."""


STATE = click.option("--state", type=click.Path(path_type=Path), required=True, help="folder of state files")
SHAPES = [f"{channels}x{size}x{size}" for size in (4, 8) for channels in (4, 8, 12, 16, 32)]
LATENTS = click.option("--latents", default="8x8x8", type=click.Choice(SHAPES), help="channels x height x width")
SEED = click.option("--seed", default=0)
THREADS = click.option("--threads", default=0, help="0: torch's choice")
STEPS_HELP = "end of the learning rate's schedule: give the same to resume"


def start(seed: int, threads: int) -> None:
    torch.manual_seed(seed)
    if threads:
        torch.set_num_threads(threads)


@cli.command()
@STATE
@LATENTS
@SEED
@THREADS
@click.option("--steps", default=12000, help=STEPS_HELP)
@click.option("--batch-size", default=16)
def vae(state: Path, seed: int, threads: int, latents: str, steps: int, batch_size: int) -> None:
    """L1 + squared error, and a KL that keeps the latents smooth."""
    start(seed, threads)
    model = new_vae(latents)

    @lru_cache(1)
    def pool(index: int) -> torch.Tensor:
        return draw(POOL_IMAGES, step_generator(seed, "vae pool", index), VAE_SHARES).images

    def loss_of_step(step):
        generator = step_generator(seed, "vae", step)
        images = pool(step * batch_size // (POOL_IMAGES * VAE_SHOWN))
        images = images[torch.randint(0, len(images), (batch_size,), generator=generator)]
        posterior = model.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        decoded = model.decode(posterior.mean + posterior.std * noise).sample
        l1 = (decoded - images).abs().mean()
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).sum() / images.numel()
        return l1 + F.mse_loss(decoded, images) + KL_WEIGHT * kl, l1.item()

    drawn_from = dict(seed=seed, batch_size=batch_size, latents=latents, pool=[POOL_IMAGES, VAE_SHOWN])
    Trainer("vae", model, state, VAE_RATE, drawn_from, finish=partial(whitened, latents)).run(loss_of_step, steps)


def load_vae(state: Path, latents: str) -> AutoencoderKL:
    """The averaged VAE, with latents that are white on the UNet's mixture."""
    weights, drawn_from = load_average(state, "vae")
    if (found := drawn_from["latents"]) != latents:
        raise click.ClickException(f"The VAE of {state} has latents {found}, not {latents}: give --latents {found}.")
    model = new_vae(latents)
    model.load_state_dict(weights)
    model.register_to_config(scaling_factor=1.0)
    return model.requires_grad_(False).eval()


def load_both(state: Path, latents: str) -> tuple[AutoencoderKL, torch.nn.ModuleDict]:
    """The averaged models of both stages: the VAE, and UNet and text encoder that were trained with it."""
    autoencoder, (weights, drawn_from) = load_vae(state, latents), load_average(state, "unet")
    if (found := drawn_from["vae"]) != identity(autoencoder):
        raise click.ClickException(f"The UNet of {state} was trained with another VAE ({found}): train it again.")
    both = torch.nn.ModuleDict(dict(unet=new_unet(latents), text=ThrowawayTextEncoder()))
    both.load_state_dict(weights)
    return autoencoder, both


@torch.no_grad()
def whitened(latents: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A VAE's weights, with latent channels that are uncorrelated, of mean 0 and variance 1, on the UNet's mixture.

    Its pictures stay the same: the 1 x 1 convolutions next to the latents take the map and its inverse. Channels as
    trained have variances of 0.04 to 3. The loudest, a place's brightness, would still be there at the last timestep,
    and sampling from pure noise would draw all pictures too grey. The posterior's width becomes its mean.
    """
    model = new_vae(latents).eval()
    model.load_state_dict(weights)
    posterior = model.encode(draw(1024, step_generator(0, "scale", 0), UNET_SHARES).images).latent_dist
    channels = model.config.latent_channels
    rows = posterior.mean.movedim(1, -1).reshape(-1, channels).double()
    variances, directions = torch.linalg.eigh(torch.cov(rows.T))
    middle, shrink, grow = rows.mean(0), directions / variances.sqrt(), (directions * variances.sqrt()).T
    width = posterior.var.movedim(1, -1).reshape(-1, channels).double().mean(0) @ shrink.square()

    encode, decode = model.quant_conv, model.post_quant_conv
    weight, bias = encode.weight[:channels, :, 0, 0].double(), encode.bias[:channels].double()
    encode.weight[:channels, :, 0, 0] = (shrink.T @ weight).float()
    encode.bias[:channels] = ((bias - middle) @ shrink).float()
    encode.weight[channels:], encode.bias[channels:] = 0, width.log().float()
    weight, bias = decode.weight[:, :, 0, 0].double(), decode.bias.double()
    decode.weight[:, :, 0, 0] = (weight @ grow.T).float()
    decode.bias[:] = (bias + weight @ middle).float()
    return model.state_dict()


def identity(autoencoder: AutoencoderKL) -> str:
    """Of a VAE's weights: a UNet belongs to one VAE."""
    weights = b"".join(value.numpy().tobytes() for value in autoencoder.state_dict().values())
    return hashlib.sha256(weights).hexdigest()[:16]


@cli.command()
@STATE
@LATENTS
@click.argument("files", nargs=-1, type=click.Path(path_type=Path, exists=True))
def errors(state: Path, latents: str, files: tuple[Path, ...]) -> None:
    """Mean error of round trips through the VAE, of 255: the mixture's own images and the first 1,000 of each npz."""
    model = load_vae(state, latents)
    sets = [("mixture", draw(1000, step_generator(1, "errors", 0), VAE_SHARES).images)]
    for path in files:
        images = torch.from_numpy(np.load(path)["train_images"][:1000]).float()
        images = images.permute(0, 3, 1, 2) if images.dim() == 4 else images[:, None].expand(-1, 3, -1, -1)
        sets.append((str(path), F.interpolate(images, SIZE, mode="bilinear", antialias=True) / 127.5 - 1))
    for name, images in sets:
        with torch.no_grad():
            decoded = [model.decode(model.encode(part).latent_dist.mean).sample for part in images.split(64)]
        error = (torch.cat(decoded).clamp(-1, 1) - images).abs().mean() * 127.5
        click.echo(f"{name}: {error:.2f} of 255")


@cli.command()
@STATE
@LATENTS
@SEED
@THREADS
@click.option("--steps", default=20000, help=STEPS_HELP)
@click.option("--batch-size", default=64)
def unet(state: Path, seed: int, threads: int, latents: str, steps: int, batch_size: int) -> None:
    """The epsilon loss of a latent diffusion model, AdamW, cosine decay, an average of the weights."""
    start(seed, threads)
    autoencoder, scheduler = load_vae(state, latents), DDIMScheduler(**SCHEDULER)
    both = torch.nn.ModuleDict(dict(unet=new_unet(latents), text=ThrowawayTextEncoder()))

    @lru_cache(1)
    @torch.no_grad()
    def pool(index: int) -> tuple[Batch, torch.Tensor, torch.Tensor]:
        drawn = draw(POOL_IMAGES, step_generator(seed, "unet pool", index), UNET_SHARES)
        posteriors = [autoencoder.encode(part).latent_dist for part in drawn.images.split(128)]
        return drawn, torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])

    def loss_of_step(step):
        drawn, mean, std = pool(step * batch_size // (POOL_IMAGES * UNET_SHOWN))
        generator = step_generator(seed, "unet", step)
        rows = torch.randint(0, len(drawn), (batch_size,), generator=generator)
        clean = mean[rows] + std[rows] * torch.randn(mean[rows].shape, generator=generator)
        clean = clean * autoencoder.config.scaling_factor
        noise = torch.randn(clean.shape, generator=generator)
        # One timestep in each of batch_size equal parts of the schedule: every batch has all noise levels.
        timesteps = (torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) * (1000 / batch_size)
        timesteps = timesteps.long().clamp_max(999)
        tokens = both["text"](drawn.rows(rows), keep_tokens(batch_size, generator))
        predicted = both["unet"](scheduler.add_noise(clean, noise, timesteps), timesteps, tokens).sample
        loss = F.mse_loss(predicted, noise)
        return loss, loss.item()

    drawn_from = dict(seed=seed, batch_size=batch_size, latents=latents, pool=[POOL_IMAGES, UNET_SHOWN])
    drawn_from["vae"] = identity(autoencoder)
    Trainer("unet", both, state, UNET_RATE, drawn_from).run(loss_of_step, steps)


@cli.command()
@STATE
@LATENTS
@click.option("--to", type=click.Path(path_type=Path), required=True)
def export(state: Path, latents: str, to: Path) -> None:
    """Write vae/, unet/, scheduler/ as diffusers folders, and samples.png: pictures drawn, decoded, generated."""
    autoencoder, both = load_both(state, latents)
    # Half precision halves the files in git. The samples are drawn with the same values, as float32.
    for name, model in (("vae", autoencoder), ("unet", both["unet"])):
        model.half().save_pretrained(to / name)
        model.float()
    DDIMScheduler(**SCHEDULER).save_pretrained(to / "scheduler")
    # Only the shape of the text encoder stays, in the form of SD's config: a Class-Encoder has to match it.
    (to / "text_encoder").mkdir(exist_ok=True)
    shape = dict(max_position_embeddings=TOKENS, hidden_size=WIDTH)
    (to / "text_encoder" / "config.json").write_text(json.dumps(shape, indent=2) + "\n")
    draw_samples(autoencoder, both, to / "samples.png")


@torch.no_grad()
def draw_samples(autoencoder: AutoencoderKL, both: torch.nn.ModuleDict, path: Path, columns: int = 24) -> None:
    """Two blocks of five rows: pictures as drawn; the same decoded; generated from what is told of them with guidance 1
    and 2; and with guidance 2 without variant and geometry."""
    generator = step_generator(1, "samples", 0)
    shown = draw(columns * 2, generator, UNET_SHARES)
    rows = [shown.images, autoencoder.decode(autoencoder.encode(shown.images).latent_dist.mean).sample]
    for guidance, left_out in ((1.0, ()), (2.0, ()), (2.0, (2, 6))):
        keep = torch.ones(len(shown), TOKENS)
        keep[:, list(left_out)] = 0
        rows.append(generate(autoencoder, both, shown, keep, 25, guidance, generator))
    grid = torch.cat([torch.cat(list(row), 2) for half in range(2) for row in (r.chunk(2)[half] for r in rows)], 1)
    array = ((grid.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(array).resize((array.shape[1] * 2, array.shape[0] * 2), Image.Resampling.NEAREST).save(path)


@torch.no_grad()
def generate(autoencoder, both, shown: Batch, keep: torch.Tensor, steps: int, guidance: float, generator):
    """Pictures (count, 3, 32, 32) from what is told of `shown`, by DDIM."""
    config, scheduler = both["unet"].config, DDIMScheduler(**SCHEDULER)
    scheduler.set_timesteps(steps)
    tokens = torch.cat([both["text"](shown, keep * 0), both["text"](shown, keep)])
    noisy = torch.randn(len(shown), config.in_channels, config.sample_size, config.sample_size, generator=generator)
    for timestep in scheduler.timesteps:
        uncond, cond = both["unet"](torch.cat([noisy] * 2), timestep, tokens).sample.chunk(2)
        noisy = scheduler.step(uncond + guidance * (cond - uncond), timestep, noisy).prev_sample
    parts = (noisy / autoencoder.config.scaling_factor).split(128)
    return torch.cat([autoencoder.decode(part).sample for part in parts]).clamp(-1, 1)


@cli.command()
@STATE
@LATENTS
@click.option("--num-inference-steps", default=25)
@click.option("--guidance-scale", default=2.0)
@click.option("--images", default=768)
def quality(state: Path, latents: str, num_inference_steps: int, guidance_scale: float, images: int) -> None:
    """How near are generated pictures to drawn ones? Each is averaged over 4 x 4 px, to 8 x 8 x 3 numbers in [-1, 1].

    Prints the Frechet distance of these to as many drawn pictures (and of other drawn ones to them: its floor), and the
    mean difference, of 255, from the very picture whose description was told.
    """
    autoencoder, both = load_both(state, latents)
    drawn, others = (draw(images, step_generator(seed, "quality", 0), UNET_SHARES) for seed in (1, 2))
    generator, keep = step_generator(1, "quality noise", 0), torch.ones(images, TOKENS)
    generated = generate(autoencoder, both, drawn, keep, num_inference_steps, guidance_scale, generator)
    drawn, others, generated = (F.avg_pool2d(i, 4).flatten(1) for i in (drawn.images, others.images, generated))
    click.echo(
        f"distance {frechet_distance(generated, others):.2f} (floor {frechet_distance(drawn, others):.2f}), ", nl=False
    )
    click.echo(f"difference {(generated - drawn).abs().mean() * 127.5:.1f} of 255")


def frechet_distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Between the normal distributions with the means and covariances of two sets of rows."""
    one, other = one.double(), other.double()
    first, second = torch.cov(one.T), torch.cov(other.T)
    # The trace of a root of the product is the sum of the roots of its eigenvalues.
    roots = torch.linalg.eigvals(first @ second).real.clamp_min(0).sqrt().sum()
    return ((one.mean(0) - other.mean(0)).square().sum() + first.trace() + second.trace() - 2 * roots).item()


if __name__ == "__main__":
    cli()
