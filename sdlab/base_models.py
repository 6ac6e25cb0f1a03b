"""`tiny`, a diffusers folder or a hub id -> VAE, UNet and noise schedule: Stable Diffusion without its text encoder.

What may be in a model's folder, and how it is fetched, is in `data/model_files.py`; samplers are in `schedulers.py`.
"""

import copy
import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sdlab.data import model_files
from sdlab.data.model_configs import check_configs, check_shapes
from sdlab.devices import choose_device, choose_precision
from sdlab.errors import BadInput, first_line
from sdlab.schedulers import check_scheduler_name, make_scheduler, steps_in_use
from sdlab.settings import Settings

if TYPE_CHECKING:  # diffusers is the slowest import of all: reading results does without it
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel


@dataclass(frozen=True)
class BaseModel:
    """A frozen latent diffusion model. Latents are (n, latent_channels, size / vae_scale, size / vae_scale).

    The VAE is float32 (it decodes in `dtype` by autocast), the UNet's weights have `dtype`. Each is loaded on first use:
    a stage that trains a UNet of its own, or only reads results, never loads the other.
    """

    source: str
    folder: Path
    device: torch.device
    dtype: torch.dtype  # of denoising
    vae_config: dict
    unet_config: dict
    scheduler_config: dict
    tokens: int  # of encoder_hidden_states (n, tokens, width)
    sha256: dict[str, str]  # of the weight files
    unet_dtype: torch.dtype | None = None  # of the UNet's weights, if not `dtype`

    @functools.cached_property
    def vae(self) -> "AutoencoderKL":
        """Frozen, in float32. Raises `BadInput` for weights that cannot be loaded."""
        vae = load_part(self.folder, "vae", torch.float32, self.source)
        return vae.to(self.device).requires_grad_(False).eval()

    @functools.cached_property
    def unet(self) -> "UNet2DConditionModel":
        """Frozen, in `dtype`. Raises `BadInput` for weights that cannot be loaded."""
        unet = load_part(self.folder, "unet", self.unet_dtype or self.dtype, self.source)
        return unet.to(self.device).requires_grad_(False).eval()

    def load_and_check(self, settings: Settings) -> "BaseModel":
        """Load VAE and UNet now, and rehearse the scheduler with every number of steps that a search may choose.

        Raises `BadInput` before hours of work, not in the middle of them.
        """
        _ = self.vae, self.unet
        make_scheduler(settings.scheduler, self.scheduler_config, steps_in_use(settings))
        return self

    def with_trainable_unet(self) -> "BaseModel":
        """The same base model with a UNet of its own in float32, loaded on first use."""
        return dataclasses.replace(self, unet_dtype=torch.float32)

    def with_unet(self, unet: "UNet2DConditionModel") -> "BaseModel":
        """The same base model with another UNet."""
        other = copy.copy(self)
        other.__dict__["unet"] = unet
        return other

    @property
    def latent_channels(self) -> int:
        return self.unet_config.get("in_channels", 4)

    @property
    def width(self) -> int:
        """Of encoder_hidden_states (n, tokens, width)."""
        return self.unet_config["cross_attention_dim"]

    @property
    def prediction_type(self) -> str:
        """`epsilon` or `v_prediction`, as the scheduler's config says."""
        return self.scheduler_config["prediction_type"]

    @property
    def vae_scale(self) -> int:
        """Pixels per latent, along a side."""
        return 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    @property
    def scaling_factor(self) -> float:
        """Multiplies latents, so that their variance is about 1 as the UNet expects."""
        return self.vae_config.get("scaling_factor", 0.18215)  # AutoencoderKL's own default

    def summary(self) -> dict:
        """What notebook 00 shows and records; loads the weights."""
        return dict(
            base_model=self.source,
            base_sha256=self.sha256,
            unet_parameters=self.unet.num_parameters(),
            vae_parameters=self.vae.num_parameters(),
            encoder_hidden_states=f"{self.tokens} tokens x {self.width}",
            latents=f"{self.latent_channels} channels, 1/{self.vae_scale} of the image's side",
            scaling_factor=self.scaling_factor,
            prediction_type=self.prediction_type,
        )

    def fingerprint(self) -> str:
        """One hash of weights and noise schedule."""
        return model_files.fingerprint(self.sha256, self.scheduler_config)

    def noise_scheduler(self) -> "DDIMScheduler":
        """The forward process z_t = sqrt(a_t) z_0 + sqrt(1 - a_t) noise, for training."""
        from diffusers import DDIMScheduler

        return DDIMScheduler.from_config(self.scheduler_config)


def load_base_model(settings: Settings) -> BaseModel:
    """The base model with its configs read and its weight files hashed. Raises `BadInput` for a missing or unsuitable one."""
    device = device_of(settings)
    folder, source = model_files.base_model_folder(settings)
    unet, vae, scheduler, text_encoder = model_files.read_configs(folder)
    try:
        check_configs(unet, vae, scheduler, text_encoder)
        weights = model_files.list_weights(folder)
    except BadInput as error:
        raise BadInput(f"The base model {source} in {folder} cannot be used: {error}") from None
    hashes = model_files.hash_weights(weights, source)
    check_shapes(unet, vae, weights, source)
    scale = 2 ** (len(vae["block_out_channels"]) + len(unet["block_out_channels"]) - 2)
    if settings.base_image_size % scale:
        raise BadInput(
            f"`base_image_size` is {settings.base_image_size}: the base model {source} halves it to whole pixels, so it has "
            f"to be a multiple of {scale}."
        )
    check_scheduler_name(settings.scheduler)  # refused before the first training
    dtype, tokens = choose_precision(settings.precision, device), text_encoder["max_position_embeddings"]
    return BaseModel(source, folder, device, dtype, vae, unet, scheduler, tokens, hashes)


def device_of(settings: Settings) -> torch.device:
    """The device; torch's threads are set on the way. Raises `BadInput`."""
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    return choose_device(settings.device)


def load_part(folder: Path, part: str, dtype: torch.dtype, source: str) -> torch.nn.Module:
    """VAE or UNet from safetensors. Raises `BadInput`: missing weights are never replaced by random ones."""
    import diffusers

    diffusers.utils.logging.disable_progress_bar()  # of shards: executed notebooks show no bars
    problem = f"The base model {source} cannot be loaded from {folder / part}"
    variant, *_ = model_files.weight_files(model_files.list_files(folder), part)
    how = dict(variant=variant or None, torch_dtype=dtype, local_files_only=True, use_safetensors=True)
    try:
        model, loading = getattr(diffusers, model_files.PARTS[part]).from_pretrained(
            folder / part, output_loading_info=True, **how
        )
    except Exception as error:
        raise BadInput(f"{problem} ({first_line(error)}): take a whole copy of it.") from None
    for what in ("missing_keys", "mismatched_keys", "error_msgs"):
        if loading[what]:
            raise BadInput(
                f"{problem}: {len(loading[what])} {what.replace('_', ' ')}, such as {next(iter(loading[what]))}: config and "
                "weights belong to different models."
            )
    if not_finite := [name for name, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()]:
        raise BadInput(
            f"{problem}: {len(not_finite)} tensors, such as {not_finite[0]}, hold numbers that are not finite; take a whole "
            "copy of it, or a `precision` with a wider range."
        )
    return model
