"""`tiny`, a diffusers folder or a hub id -> VAE, UNet, scheduler: what Stable Diffusion brings, without its text encoder."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, SchedulerMixin, UNet2DConditionModel

from sdlab.run import sha256_of_file, sha256_of_json
from sdlab.settings import PROJECT_ROOT, BadInput, Settings

TINY = Path(__file__).parent / "tiny"
# Of a hub repository only these are fetched. The text encoder's config (not its weights) says how many tokens it gave.
WEIGHTS = "diffusion_pytorch_model.safetensors"
WANTED = (
    "unet/config.json",
    f"unet/{WEIGHTS}",
    "vae/config.json",
    f"vae/{WEIGHTS}",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
)


@dataclass(frozen=True)
class BaseModel:
    """A frozen latent diffusion model. Latents are (n, latent_channels, size / vae_scale, size / vae_scale)."""

    source: str
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    scheduler_config: dict
    tokens: int  # of encoder_hidden_states (n, tokens, width)
    sha256: dict[str, str]  # of the weight files that were loaded

    @property
    def width(self) -> int:
        return self.unet.config.cross_attention_dim

    @property
    def prediction_type(self) -> str:
        """`epsilon` or `v_prediction`, as the scheduler's config says."""
        return self.scheduler_config["prediction_type"]

    @property
    def vae_scale(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def fingerprint(self) -> str:
        """One hash over weights and noise schedule: what a result was made from."""
        return sha256_of_json([self.sha256, self.scheduler_config])

    def noise_scheduler(self) -> DDIMScheduler:
        """The forward process x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, for training."""
        return DDIMScheduler.from_config(self.scheduler_config)


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:1` or `mps` -> a device that is there. Raises `BadInput`."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    kind, _, index = name.partition(":")
    if not there.get(kind) or (
        index and not (index.isdigit() and kind == "cuda" and int(index) < torch.cuda.device_count())
    ):
        found = ", ".join(k for k, v in there.items() if v)
        raise BadInput(
            f"`device` is {name!r}, which this machine does not have: it has {found}; `auto` takes the best."
        )
    return torch.device(name)


def base_model_folder(settings: Settings) -> tuple[Path, str]:
    """The folder of `settings.base_model` and its name for the record. Raises `BadInput`."""
    name = settings.base_model
    if name == "tiny":
        return TINY, "tiny"
    folder = PROJECT_ROOT / Path(name).expanduser()
    if folder.is_dir():
        return folder, name
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise BadInput(
            f"`base_model` is {name!r}: it has to be `tiny`, a diffusers folder that exists, or a hub id `owner/name`."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = snapshot_download(name, revision=settings.base_model_revision, allow_patterns=list(WANTED))
    except (RepositoryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise BadInput(
            f"The base model {name} at revision {settings.base_model_revision} is not on this machine and could not be "
            f"fetched from the hub ({type(error).__name__}): check name and network, or give a local diffusers folder."
        ) from None
    return Path(folder), f"{name}@{settings.base_model_revision}"


def load_base_model(settings: Settings) -> BaseModel:
    """Load VAE, UNet and scheduler, on `settings.device`, frozen. Raises `BadInput` for whatever is missing."""
    device = choose_device(settings.device)
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    folder, source = base_model_folder(settings)
    config_file(folder, "unet/config.json"), config_file(folder, "vae/config.json")
    scheduler_config = config_file(folder, "scheduler/scheduler_config.json")
    tokens = config_file(folder, "text_encoder/config.json").get("max_position_embeddings")
    if scheduler_config.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction"):
        raise BadInput(
            f"The base model {source} predicts {scheduler_config['prediction_type']}: epsilon and v_prediction are known."
        )
    scheduler_config.setdefault("prediction_type", "epsilon")
    parts = {"vae": AutoencoderKL, "unet": UNet2DConditionModel}
    hashes = {}
    for name, kind in parts.items():
        weights = folder / name / WEIGHTS
        if not weights.is_file():
            raise BadInput(
                f"The base model {source} has no {name}/{WEIGHTS} in {folder}: pickled weights are not read."
            )
        hashes[f"{name}/{WEIGHTS}"] = sha256_of_file(weights)
        try:
            parts[name] = kind.from_pretrained(
                folder / name, local_files_only=True, use_safetensors=True, torch_dtype=torch.float32
            ).to(device)
        except Exception as error:
            raise BadInput(
                f"The base model {source} cannot be loaded from {folder / name}: {first_line(error)}"
            ) from None
        parts[name].requires_grad_(False).eval()
    scale = 2 ** (len(parts["vae"].config.block_out_channels) + len(parts["unet"].config.block_out_channels) - 2)
    if settings.base_image_size % scale:
        raise BadInput(
            f"`base_image_size` is {settings.base_image_size}: the base model {source} halves it to whole pixels, so it has "
            f"to be a multiple of {scale}."
        )
    make_scheduler(settings.scheduler, scheduler_config)  # refuse an unknown one now, not after the first training
    return BaseModel(source, parts["vae"], parts["unet"], scheduler_config, tokens, hashes)


def make_scheduler(name: str, config: dict) -> SchedulerMixin:
    """A diffusers scheduler by class name, on the base model's noise schedule. Raises `BadInput` for one that cannot sample.

    For DDIM: `leading` timesteps offset by 1 and a final alpha of 1, the authors' sampler (METHOD: conventions); SD's own
    config says `set_alpha_to_one=False`.
    """
    kind = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if not isinstance(kind, type) or not issubclass(kind, SchedulerMixin):
        raise BadInput(
            f"`scheduler` is {name!r}: it has to be the class name of a diffusers scheduler, as DDIMScheduler."
        )
    leading = dict(clip_sample=False, set_alpha_to_one=True, steps_offset=1, timestep_spacing="leading")
    try:
        scheduler = kind.from_config(config, **(leading if name == "DDIMScheduler" else {}))
        rehearse(scheduler)
    except Exception as error:
        raise BadInput(
            f"`scheduler` is {name!r}, which cannot sample from this base model ({type(error).__name__}: {first_line(error)}): "
            "take one for latent diffusion, as DDIMScheduler or DPMSolverMultistepScheduler."
        ) from None
    return scheduler


def rehearse(scheduler: SchedulerMixin, num_inference_steps: int = 5) -> None:
    """Five steps on nothing, as the pipeline makes them: raises whatever a scheduler of another kind raises."""
    scheduler.set_timesteps(num_inference_steps)
    latents = torch.zeros(1, 4, 2, 2) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        scheduler.scale_model_input(latents, timestep)
        latents = scheduler.step(torch.zeros_like(latents), timestep, latents).prev_sample
    if not scheduler.timesteps[0] > scheduler.timesteps[-1]:
        raise ValueError("its timesteps rise, so it adds noise")


def config_file(folder: Path, name: str) -> dict:
    """Raises `BadInput` if the base model's folder lacks a config, or it is not JSON."""
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise BadInput(
            f"The base model folder {folder} has no readable {name}: it needs unet/, vae/, scheduler/ in diffusers' "
            "format, and text_encoder/config.json for the number of tokens."
        ) from None


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
