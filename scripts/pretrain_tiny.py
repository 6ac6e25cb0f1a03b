"""Pretrain `tiny`, the embedded base model: a latent diffusion model of glyphs.

It stands in for Stable Diffusion at a size that fits in git and on two CPU cores: diffusers'
AutoencoderKL and a cross-attention UNet2DConditionModel that know letters and digits *in general*,
from the fonts that matplotlib ships, and have never seen a handwritten digit. The UNet is conditioned
by eight small text-like tokens (character, font, colours, geometry, rendering). Like SD's text encoder
they are thrown away; a UNet with cross-attention on (tokens, width) embeddings remains.

    python scripts/pretrain_tiny.py vae  --state ~/tiny-state --steps 2400
    python scripts/pretrain_tiny.py unet --state ~/tiny-state --steps 14000
    python scripts/pretrain_tiny.py export --state ~/tiny-state --to sdlab/tiny

(docs/log.md says how the committed weights were made, which differs in one point.)

Every random number derives from (seed, step), so an interrupted run resumes from its state file, and the
first steps repeat exactly on one machine with the same number of threads. `train_log.csv` is in the state's folder.
"""

import csv
import json
import math
import os
import time
from functools import cache
from pathlib import Path

import click
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
DIGIT_SHARE = 0.5  # of all glyphs; the rest are letters
SIZE = 32  # pixels
TOKENS, WIDTH = 8, 64  # of encoder_hidden_states
LATENT_CHANNELS = 8
RESOLUTIONS = (8, 10, 12, 16, 24, 32)  # a glyph is averaged down to one of these, then bilinearly up to SIZE
RESOLUTION_SHARES = (0.30, 0.15, 0.15, 0.15, 0.10, 0.15)
# How often each of the eight tokens is left out. Geometry and font mostly are, so that the model
# varies what it was not given: a class condition is one condition for many different images.
TOKEN_DROPOUT = (0.05, 0.5, 0.3, 0.3, 0.7, 0.3, 0.3, 0.3)
CONDITION_DROPOUT = 0.1  # classifier-free guidance (Ho and Salimans 2022): all tokens zero
SCHEDULER = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000,
                 prediction_type="epsilon", clip_sample=False, set_alpha_to_one=True, steps_offset=1)  # fmt: skip


# ---------------------------------------------------------------------------------------------- glyphs


@cache
def glyph_bank() -> tuple[torch.Tensor, list[str]]:
    """Every character in every font that has them all: masks (fonts, characters, 64, 64) in [0, 1]."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    banks, names = [], []
    for path in sorted(folder.glob("*.ttf")):
        # Symbol fonts map letters to other signs or to boxes.
        if any(word in path.stem for word in ("Siz", "NonUni", "cmsy", "cmex", "cmmi", "Display", "LastResort")):
            continue
        banks.append(np.stack([render(path, character) for character in CHARACTERS]))
        names.append(path.stem)
    return torch.from_numpy(np.stack(banks)).float() / 255, names


def render(path: Path, character: str) -> np.ndarray:
    """One glyph, scaled to fill 56 of 64 pixels in its longer direction and centred: uint8 (64, 64)."""
    font = ImageFont.truetype(str(path), 96)
    left, top, right, bottom = font.getbbox(character)
    canvas = Image.new("L", (max(right - left, 1), max(bottom - top, 1)))
    ImageDraw.Draw(canvas).text((-left, -top), character, fill=255, font=font)
    scale = 56 / max(canvas.size)
    canvas = canvas.resize([max(1, round(side * scale)) for side in canvas.size], Image.Resampling.LANCZOS)
    square = Image.new("L", (64, 64))
    square.paste(canvas, ((64 - canvas.width) // 2, (64 - canvas.height) // 2))
    return np.asarray(square)


def glyph_batch(count: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Images (count, 3, 32, 32) in [-1, 1] and the attributes of each: character, font, ink, paper, geometry, rendering."""
    bank, fonts = glyph_bank()

    def uniform(*shape, low=0.0, high=1.0):
        return torch.rand(*shape, generator=generator) * (high - low) + low

    is_digit = uniform(count) < DIGIT_SHARE
    digit = torch.randint(0, 10, (count,), generator=generator)
    letter = torch.randint(10, len(CHARACTERS), (count,), generator=generator)
    character = torch.where(is_digit, digit, letter)
    font = torch.randint(0, len(fonts), (count,), generator=generator)
    mask = bank[font, character][:, None]  # (count, 1, 64, 64)

    # Affine jitter and a smooth elastic warp: print becomes something like handwriting.
    geometry = uniform(count, 6, low=-1, high=1)  # rotation, shear, scale x, scale y, shift x, shift y
    angle, shear = geometry[:, 0] * 0.35, geometry[:, 1] * 0.35
    scale_x, scale_y = 1.1 + 0.35 * geometry[:, 2], 1.0 + 0.2 * geometry[:, 3]
    cos, sin = angle.cos(), angle.sin()
    row_x = torch.stack([cos * scale_x, (shear * cos - sin) * scale_y, geometry[:, 4] * 0.1], 1)
    row_y = torch.stack([sin * scale_x, (shear * sin + cos) * scale_y, geometry[:, 5] * 0.1], 1)
    grid = F.affine_grid(torch.stack([row_x, row_y], 1), [count, 1, 64, 64], align_corners=False)
    strength = uniform(count, 1, 1, 1, high=0.13)
    warp = F.interpolate(torch.randn(count, 2, 4, 4, generator=generator) * strength, size=64, mode="bicubic")
    mask = F.grid_sample(mask, grid + warp.permute(0, 2, 3, 1), align_corners=False)

    # Stroke: blur and threshold makes thinner and thicker pens.
    stroke = uniform(count, low=-1, high=1)
    mask = gaussian_blur(mask, torch.full((count,), 2.0))
    mask = torch.sigmoid((mask - (0.42 - 0.22 * stroke)[:, None, None, None]) * 14)
    mask = F.avg_pool2d(mask, 2)  # (count, 1, 32, 32)

    blur = uniform(count).square() * 1.2
    mask = gaussian_blur(mask, blur)
    shares = torch.tensor(RESOLUTION_SHARES)
    which = torch.multinomial(shares, count, replacement=True, generator=generator)
    for index, resolution in enumerate(RESOLUTIONS):
        chosen = which == index
        if resolution < SIZE and chosen.any():
            small = F.adaptive_avg_pool2d(mask[chosen], resolution)
            mask[chosen] = F.interpolate(small, size=SIZE, mode="bilinear", align_corners=False)
    resolution = torch.log2(torch.tensor(RESOLUTIONS)[which] / 16.0)

    # Palette: white on black, black on white, or two colours far enough apart to be read.
    ink, paper = uniform(count, 3), uniform(count, 3)
    near = (ink - paper).abs().mean(1) < 0.25
    ink[near] = (paper[near] + 0.5) % 1.0
    kind = uniform(count)
    level = uniform(count, 1, low=0.85, high=1.0)
    ink, paper = torch.where(kind[:, None] < 0.35, level, ink), torch.where(kind[:, None] < 0.35, 1 - level, paper)
    black = (kind > 0.85)[:, None]
    ink, paper = torch.where(black, 1 - level, ink), torch.where(black, level, paper)
    images = paper[:, :, None, None] * (1 - mask) + ink[:, :, None, None] * mask

    rendering = torch.stack([stroke, blur, resolution], 1)
    attributes = dict(character=character, font=font, ink=ink * 2 - 1, paper=paper * 2 - 1, geometry=geometry,
                rendering=rendering)  # fmt: skip
    return images * 2 - 1, attributes


def gaussian_blur(images: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Blur each image of (count, 1, h, w) with its own width (pixels; 0: none)."""
    offsets = torch.arange(-4.0, 5.0)
    kernel = torch.exp(-0.5 * (offsets / sigma.clamp_min(1e-3)[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    count, _, height, width = images.shape
    flat = F.conv2d(images.view(1, count, height, width), kernel[:, None, None, :], padding=(0, 4), groups=count)
    return F.conv2d(flat, kernel[:, None, :, None], padding=(4, 0), groups=count).view(count, 1, height, width)


class ThrowawayTextEncoder(torch.nn.Module):
    """A glyph's attributes -> eight tokens (count, 8, 64). It is thrown away: the Class-Encoder takes its place."""

    def __init__(self, fonts: int):
        super().__init__()
        self.character = torch.nn.Embedding(len(CHARACTERS), WIDTH)
        self.character_style = torch.nn.Embedding(len(CHARACTERS), WIDTH)
        self.font = torch.nn.Embedding(fonts, WIDTH)
        self.ink, self.paper = torch.nn.Linear(3, WIDTH), torch.nn.Linear(3, WIDTH)
        self.geometry, self.rendering = torch.nn.Linear(6, WIDTH), torch.nn.Linear(3, WIDTH)
        self.constant = torch.nn.Parameter(torch.randn(WIDTH) * 0.5)
        for embedding in (self.character, self.character_style, self.font):
            torch.nn.init.normal_(embedding.weight, std=0.5)

    def forward(self, attributes: dict[str, torch.Tensor], keep: torch.Tensor) -> torch.Tensor:
        tokens = [self.character(attributes["character"]), self.font(attributes["font"]), self.ink(attributes["ink"]),
                  self.paper(attributes["paper"]), self.geometry(attributes["geometry"]), self.rendering(attributes["rendering"]),
                  self.character_style(attributes["character"]), self.constant.expand(len(keep), -1)]  # fmt: skip
        return torch.stack(tokens, 1) * keep[:, :, None]


def keep_tokens(count: int, generator: torch.Generator) -> torch.Tensor:
    """1 where a token is given, 0 where it is left out: (count, 8)."""
    keep = torch.rand(count, TOKENS, generator=generator) >= torch.tensor(TOKEN_DROPOUT)
    conditional = torch.rand(count, 1, generator=generator) >= CONDITION_DROPOUT
    return (keep & conditional).float()


# ---------------------------------------------------------------------------------------------- models


def new_vae() -> AutoencoderKL:
    """32 px <-> (8, 4, 4): eight times smaller in each direction, like Stable Diffusion's."""
    channels = (16, 32, 64, 64)
    return AutoencoderKL(in_channels=3, out_channels=3, block_out_channels=channels, layers_per_block=1,
                         down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                         latent_channels=LATENT_CHANNELS, norm_num_groups=8, sample_size=SIZE)  # fmt: skip


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(sample_size=SIZE // 8, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS,
                                block_out_channels=(64, 128), layers_per_block=1,
                                down_block_types=("CrossAttnDownBlock2D",) * 2,
                                up_block_types=("CrossAttnUpBlock2D",) * 2,
                                cross_attention_dim=WIDTH, attention_head_dim=4, norm_num_groups=8)  # fmt: skip


def step_generator(seed: int, stage: str, step: int) -> torch.Generator:
    mixed = np.random.SeedSequence([seed, *stage.encode(), step]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed >> 1))


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    return peak * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))


class Trainer:
    """One training loop for both stages: a state file, a log, an average of the weights (EMA)."""

    def __init__(self, stage: str, module: torch.nn.Module, state: Path, lr: float, drawn_from: list[int]):
        self.stage, self.module, self.path, self.lr, self.step = stage, module, state / f"{stage}.pt", lr, 0
        self.drawn_from = drawn_from  # seed and batch size, which must not change on resume
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-2)
        self.ema = {name: value.detach().clone() for name, value in module.state_dict().items()}
        state.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            saved = torch.load(self.path, weights_only=True)
            if saved["drawn_from"] != drawn_from:
                found = "seed {} and batch size {}".format(*saved["drawn_from"])
                raise click.ClickException(f"{self.path} was made with {found}: give the same, or another --state.")
            module.load_state_dict(saved["module"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.ema, self.step = saved["ema"], saved["step"]

    def save(self) -> None:
        saved = dict(
            module=self.module.state_dict(),
            optimizer=self.optimizer.state_dict(),
            ema=self.ema,
            step=self.step,
            drawn_from=self.drawn_from,
        )
        torch.save(saved, self.path.with_suffix(".part"))
        os.replace(self.path.with_suffix(".part"), self.path)

    def run(self, loss_of_step, steps: int, log_every: int = 50, save_every: int = 500) -> None:
        log = self.path.parent / "train_log.csv"
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
                self.ema[name].lerp_(value, 1 - decay) if value.is_floating_point() else self.ema[name].copy_(value)
            losses.append(shown)
            bar.update()
            if self.step % log_every == 0:
                seconds = (time.perf_counter() - started) / (self.step - first)
                with log.open("a", newline="") as file:
                    csv.writer(file).writerow([self.stage, self.step, f"{np.mean(losses):.5f}", f"{seconds:.3f}"])
                losses = []
            if self.step % save_every == 0 or self.step == steps:
                self.save()


# ------------------------------------------------------------------------------------------------ stages


@click.group(context_settings={"show_default": True})
def cli() -> None:
    """Pretrain `tiny`: vae, then unet, then export."""


def common(command):
    for option in (click.option("--state", type=click.Path(path_type=Path), required=True, help="folder of state files"),
                   click.option("--seed", default=0), click.option("--threads", default=0, help="0: torch's choice")):  # fmt: skip
        command = option(command)
    return command


def start(seed: int, threads: int) -> None:
    torch.manual_seed(seed)
    if threads:
        torch.set_num_threads(threads)


@cli.command()
@common
@click.option("--steps", default=2400)
@click.option("--batch-size", default=64)
def vae(state: Path, seed: int, threads: int, steps: int, batch_size: int) -> None:
    """L1 + squared error, and a KL that keeps the latents smooth (weight 1e-3 a dimension)."""
    start(seed, threads)
    model = new_vae()

    def loss_of_step(step):
        generator = step_generator(seed, "vae", step)
        images, _ = glyph_batch(batch_size, generator)
        posterior = model.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        decoded = model.decode(posterior.mean + posterior.std * noise).sample
        l1 = (decoded - images).abs().mean()
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return l1 + F.mse_loss(decoded, images) + 1e-3 * kl, l1.item()

    Trainer("vae", model, state, 2e-3, [seed, batch_size]).run(loss_of_step, steps)


def load_vae(state: Path) -> AutoencoderKL:
    model = new_vae()
    model.load_state_dict(torch.load(state / "vae.pt", weights_only=True)["ema"])
    model.requires_grad_(False).eval()
    generator = step_generator(0, "scale", 0)
    latents = model.encode(glyph_batch(1024, generator)[0]).latent_dist.mean
    model.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return model


@cli.command()
@common
@click.option("--steps", default=14000)
@click.option("--batch-size", default=64)
def unet(state: Path, seed: int, threads: int, steps: int, batch_size: int) -> None:
    """The epsilon loss of a latent diffusion model, AdamW, cosine decay, an average of the weights."""
    start(seed, threads)
    autoencoder, scheduler = load_vae(state), DDIMScheduler(**SCHEDULER)
    both = torch.nn.ModuleDict(dict(unet=new_unet(), text=ThrowawayTextEncoder(len(glyph_bank()[1]))))

    def loss_of_step(step):
        # Each glyph is shown twice, at timesteps t and 999 - t: drawing and encoding cost a third of a step, and the
        # pair evens out the noise levels of a batch. Different tokens are left out for the two.
        generator = step_generator(seed, "unet", step)
        images, attributes = glyph_batch(batch_size // 2, generator)
        attributes = {name: torch.cat([value, value]) for name, value in attributes.items()}
        with torch.no_grad():
            latents = autoencoder.encode(images).latent_dist.mean * autoencoder.config.scaling_factor
        latents = torch.cat([latents, latents])
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(0, 1000, (batch_size // 2,), generator=generator)
        timesteps = torch.cat([timesteps, 999 - timesteps])
        noisy = scheduler.add_noise(latents, noise, timesteps)
        tokens = both["text"](attributes, keep_tokens(len(latents), generator))
        loss = F.mse_loss(both["unet"](noisy, timesteps, tokens).sample, noise)
        return loss, loss.item()

    Trainer("unet", both, state, 1e-3, [seed, batch_size]).run(loss_of_step, steps)


@cli.command()
@common
@click.option("--to", type=click.Path(path_type=Path), required=True)
def export(state: Path, seed: int, threads: int, to: Path) -> None:
    """Write vae/, unet/, scheduler/ as diffusers folders, and samples.png: glyphs drawn, decoded, generated."""
    start(seed, threads)
    autoencoder, scheduler = load_vae(state), DDIMScheduler(**SCHEDULER)
    both = torch.nn.ModuleDict(dict(unet=new_unet(), text=ThrowawayTextEncoder(len(glyph_bank()[1]))))
    both.load_state_dict(torch.load(state / "unet.pt", weights_only=True)["ema"])
    # Half precision halves the files in git. The samples are drawn with the same values, as float32.
    for name, model in (("vae", autoencoder), ("unet", both["unet"])):
        model.half().save_pretrained(to / name)
        model.float()
    scheduler.save_pretrained(to / "scheduler")
    # Only the shape of the text encoder stays, in the form of SD's config: a Class-Encoder has to match it.
    (to / "text_encoder").mkdir(exist_ok=True)
    shape = dict(max_position_embeddings=TOKENS, hidden_size=WIDTH)
    (to / "text_encoder" / "config.json").write_text(json.dumps(shape, indent=2) + "\n")
    draw_samples(autoencoder, both, scheduler, to / "samples.png")


@torch.no_grad()
def draw_samples(autoencoder, both, scheduler, path: Path, columns: int = 16) -> None:
    """Six rows: drawn glyphs, the same decoded, then 0-9 A-F generated with different tokens left out."""
    generator = step_generator(1, "samples", 0)
    drawn, attributes = glyph_batch(columns, generator)
    decoded = autoencoder.decode(autoencoder.encode(drawn).latent_dist.mean).sample
    rows = [drawn, decoded]
    attributes["character"] = torch.arange(columns)
    for colour in (attributes["ink"], attributes["paper"]):
        colour[:] = colour[:1] * 0 + (1 if colour is attributes["ink"] else -1)
    attributes["rendering"] = attributes["rendering"] * 0
    attributes["rendering"][:, 2] = -1.0  # 8 px
    for guidance, left_out in ((1.0, (1, 4)), (2.0, (1, 4)), (2.0, (1, 4, 5)), (2.0, (1, 2, 3, 4, 5))):
        keep = torch.ones(columns, TOKENS)
        keep[:, list(left_out)] = 0
        tokens = torch.cat([both["text"](attributes, keep * 0), both["text"](attributes, keep)])
        scheduler.set_timesteps(25)
        latents = torch.randn(columns, LATENT_CHANNELS, SIZE // 8, SIZE // 8, generator=generator)
        for timestep in scheduler.timesteps:
            uncond, cond = both["unet"](torch.cat([latents] * 2), timestep, tokens).sample.chunk(2)
            latents = scheduler.step(uncond + guidance * (cond - uncond), timestep, latents).prev_sample
        rows.append(autoencoder.decode(latents / autoencoder.config.scaling_factor).sample)
    grid = torch.cat([torch.cat(list(row), 2) for row in rows], 1).clamp(-1, 1)
    array = ((grid + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(array).resize((array.shape[1] * 2, array.shape[0] * 2), Image.Resampling.NEAREST).save(path)


if __name__ == "__main__":
    cli()
