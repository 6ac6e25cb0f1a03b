"""`tiny`, a diffusers folder or a hub id -> VAE, UNet, scheduler: what Stable Diffusion brings, without its text encoder."""

import copy
import dataclasses
import functools
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sdlab.data.model_files import (
    CONFIGS,
    PARTS,
    PINNED,
    SHAPES,
    base_model_folder,
    check_configs,
    check_shapes,
    hash_weights,
    list_files,
    list_weight_files,
    read_config,
    weight_files,
)
from sdlab.devices import choose_device, choose_precision
from sdlab.errors import BadInput, first_line
from sdlab.runs.files import sha256_of_json
from sdlab.settings import Settings

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, SchedulerMixin, UNet2DConditionModel


@dataclass(frozen=True)
class BaseModel:
    """A frozen latent diffusion model. Latents are (n, latent_channels, size / vae_scale, size / vae_scale).

    The VAE is float32 (it decodes in `dtype` by autocast), the UNet's weights are of `dtype`. Each is loaded when it is
    first asked for: a step that has a UNet of its own, or only reads results, never pays for it.
    """

    source: str
    folder: Path
    device: torch.device
    dtype: torch.dtype  # of denoising
    vae_config: dict
    unet_config: dict
    scheduler_config: dict
    tokens: int  # of encoder_hidden_states (n, tokens, width)
    variants: dict[str, str]  # part -> "" or fp16
    sha256: dict[str, str]  # of the weight files that are loaded
    unet_dtype: torch.dtype | None = None  # of the UNet's weights, if not `dtype`

    @functools.cached_property
    def vae(self) -> "AutoencoderKL":
        """Frozen, in float32. Raises `BadInput` for weights that cannot be loaded."""
        vae = load_part(self.folder, "vae", self.variants["vae"], torch.float32, self.source)
        return vae.to(self.device).requires_grad_(False).eval()

    @functools.cached_property
    def unet(self) -> "UNet2DConditionModel":
        """Frozen, in `dtype`. Raises `BadInput` for weights that cannot be loaded."""
        dtype = self.unet_dtype or self.dtype
        unet = load_part(self.folder, "unet", self.variants["unet"], dtype, self.source)
        return unet.to(self.device).requires_grad_(False).eval()

    def load_and_check(self, scheduler: str) -> "BaseModel":
        """With VAE and UNet loaded now, and the scheduler rehearsed: what cannot be is refused before a step is opened.

        Raises `BadInput`.
        """
        _ = self.vae, self.unet
        make_scheduler(scheduler, self.scheduler_config)
        return self

    def with_trainable_unet(self) -> "BaseModel":
        """The same base model with a UNet of its own, whose weights are float32, loaded when it is asked for."""
        return dataclasses.replace(self, unet_dtype=torch.float32)

    def with_unet(self, unet: "UNet2DConditionModel") -> "BaseModel":
        """The same base model with another UNet in its place."""
        other = copy.copy(self)
        other.__dict__["unet"] = unet
        return other

    @property
    def latent_channels(self) -> int:
        return self.unet_config.get("in_channels", 4)

    @property
    def width(self) -> int:
        return self.unet_config["cross_attention_dim"]

    @property
    def prediction_type(self) -> str:
        """`epsilon` or `v_prediction`, as the scheduler's config says."""
        return self.scheduler_config["prediction_type"]

    @property
    def vae_scale(self) -> int:
        return 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    @property
    def scaling_factor(self) -> float:
        """Of latents: what makes their variance about 1, as the UNet expects them."""
        return self.vae_config.get("scaling_factor", 0.18215)  # AutoencoderKL's own default

    def fingerprint(self) -> str:
        """One hash over weights and noise schedule: what a result was made from."""
        return sha256_of_json([self.sha256, self.scheduler_config])

    def noise_scheduler(self) -> "DDIMScheduler":
        """The forward process x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, for training."""
        from diffusers import DDIMScheduler

        return DDIMScheduler.from_config(self.scheduler_config)


def load_base_model(settings: Settings) -> BaseModel:
    """The base model with its configs read and its weight files hashed. Raises `BadInput` for whatever is missing."""
    device = choose_device(settings.device)
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    folder, source = base_model_folder(settings)
    unet, vae, scheduler, text_encoder = (read_config(folder, name) for name in CONFIGS)
    scheduler.setdefault("prediction_type", "epsilon")
    try:
        check_configs(unet, vae, scheduler, text_encoder)
        variants = {part: weight_files(list_files(folder), part)[0] for part in PARTS}
        weights = [path for part in PARTS for path in list_weight_files(folder, part)]
    except BadInput as error:
        raise BadInput(f"The base model {source} in {folder} cannot be used: {error}") from None
    hashes = {path.relative_to(folder).as_posix(): hash_weights(path, source) for path in weights}
    check_shapes(unet, vae, weights, source)
    scale = 2 ** (len(vae["block_out_channels"]) + len(unet["block_out_channels"]) - 2)
    if settings.base_image_size % scale:
        raise BadInput(
            f"`base_image_size` is {settings.base_image_size}: the base model {source} halves it to whole pixels, so it has "
            f"to be a multiple of {scale}."
        )
    check_scheduler_name(settings.scheduler)  # one that cannot sample is refused before the first training
    return BaseModel(
        source, folder, device, choose_precision(settings.precision, device), vae, unet, scheduler,
        text_encoder["max_position_embeddings"], variants, hashes,
    )  # fmt: skip


def load_without_weights(settings: Settings) -> BaseModel:
    """A base model of the right size with zeros for weights, for planning before gigabytes are fetched.

    Raises `BadInput` for one whose configs are not in `shapes/`.
    """
    import diffusers

    folder = SHAPES / settings.base_model.rpartition("/")[2]
    if settings.base_model not in PINNED:
        raise BadInput(
            f"The base model {settings.base_model} is not on this machine, so its size is not known: fetch it first (run notebook "
            f"00), or plan with {' or '.join(PINNED)}."
        )
    device = choose_device(settings.device)
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    unet, vae, scheduler, text_encoder = (read_config(folder, name) for name in CONFIGS)
    dtype = choose_precision(settings.precision, device)
    parts = {}
    for part, config, precision in (("vae", vae, torch.float32), ("unet", unet, dtype)):
        with torch.device("meta"):
            model = getattr(diffusers, PARTS[part]).from_config(config)
        zeros = {name: torch.zeros(t.shape, dtype=precision, device=device) for name, t in model.state_dict().items()}
        model.load_state_dict(zeros, assign=True)
        parts[part] = model.requires_grad_(False).eval()
    base = BaseModel(
        f"{settings.base_model}, zeros for weights", folder, device, dtype, vae, unet, scheduler,
        text_encoder["max_position_embeddings"], {}, {},
    )  # fmt: skip
    base.__dict__.update(parts)
    return base


def load_part(folder: Path, part: str, variant: str, dtype: torch.dtype, source: str) -> torch.nn.Module:
    """VAE or UNet from safetensors. Raises `BadInput`: nothing is made up where weights are missing."""
    import diffusers

    diffusers.utils.logging.disable_progress_bar()  # of shards: executed notebooks carry no bars
    try:
        model, loading = getattr(diffusers, PARTS[part]).from_pretrained(
            folder / part, local_files_only=True, use_safetensors=True, variant=variant or None, torch_dtype=dtype,
            output_loading_info=True,
        )  # fmt: skip
    except Exception as error:
        raise BadInput(
            f"The base model {source} cannot be loaded from {folder / part} ({first_line(error)}): take a whole copy of it."
        ) from None
    for what in ("missing_keys", "mismatched_keys", "error_msgs"):
        if loading[what]:
            raise BadInput(
                f"The base model {source} cannot be loaded from {folder / part}: {len(loading[what])} {what.replace('_', ' ')}, "
                f"as {next(iter(loading[what]))}: config and weights belong to different models."
            )
    odd = [name for name, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()]
    if odd:
        raise BadInput(
            f"The base model {source} cannot be used: {len(odd)} tensors of its {part} hold numbers that are not finite, as "
            f"{odd[0]}; take a whole copy of it, or a `precision` of a wider range."
        )
    return model


def check_scheduler_name(name: str) -> None:
    """Raises `BadInput` for what diffusers has no scheduler of. Read from its list, without importing it."""
    package = Path(importlib.util.find_spec("diffusers").submodule_search_locations[0])
    listed = re.findall(r'"(\w+Scheduler)"', (package / "schedulers" / "__init__.py").read_text(encoding="utf-8"))
    if name not in listed:
        raise BadInput(
            f"`scheduler` is {name!r}: it has to be the class name of a diffusers scheduler, as DDIMScheduler."
        )


def make_scheduler(name: str, config: dict) -> "SchedulerMixin":
    """A diffusers scheduler by class name, on the base model's noise schedule. Raises `BadInput` for one that cannot sample.

    For DDIM: `leading` timesteps offset by 1 and a final alpha of 1, the authors' sampler (METHOD: conventions); SD's own
    config says `set_alpha_to_one=False`.
    """
    check_scheduler_name(name)
    import diffusers

    leading = dict(clip_sample=False, set_alpha_to_one=True, steps_offset=1, timestep_spacing="leading")
    try:
        kind = getattr(diffusers, name)  # a few that it lists are made for other models, and hidden
        scheduler = kind.from_config(config, **(leading if name == "DDIMScheduler" else {}))
        check_scheduler_samples(scheduler)
    except Exception as error:
        raise BadInput(
            f"`scheduler` is {name!r}, which cannot sample from this base model ({type(error).__name__}: {first_line(error)}): "
            "take one for latent diffusion, as DDIMScheduler or DPMSolverMultistepScheduler."
        ) from None
    return scheduler


def check_scheduler_samples(scheduler: "SchedulerMixin", num_inference_steps: int = 5) -> None:
    """Five steps on nothing, as the pipeline makes them: raises whatever a scheduler of another kind raises."""
    scheduler.set_timesteps(num_inference_steps)
    latents = torch.zeros(1, 4, 2, 2) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        scheduler.scale_model_input(latents, timestep)
        latents = scheduler.step(torch.zeros_like(latents), timestep, latents).prev_sample
    if not scheduler.timesteps[0] > scheduler.timesteps[-1]:
        raise ValueError("its timesteps rise, so it adds noise")
