"""Samplers: a diffusers scheduler by its class name, on the base model's noise schedule, checked before it is used.

Every scheduler of diffusers for latent diffusion can be named (`scheduler: DPMSolverMultistepScheduler`); nothing has to
be added here for it. Special arguments of one scheduler stand in `ARGUMENTS`.
"""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sdlab.errors import BadInput, did_you_mean, first_line
from sdlab.settings import Settings

if TYPE_CHECKING:  # diffusers is slow to import
    from diffusers import SchedulerMixin

# DDIM: `leading` timesteps with offset 1 and a final alpha of 1, the authors' sampler; SD's own config says
# `set_alpha_to_one=False` (docs/method.md, item 14).
ARGUMENTS = {
    "DDIMScheduler": dict(clip_sample=False, set_alpha_to_one=True, steps_offset=1, timestep_spacing="leading")
}


def check_scheduler_name(name: str) -> None:
    """Raises `BadInput` for a name that is not in diffusers' list of schedulers, which is read without importing it."""
    package = Path(importlib.util.find_spec("diffusers").submodule_search_locations[0])
    known = re.findall(r'"(\w+Scheduler)"', (package / "schedulers" / "__init__.py").read_text(encoding="utf-8"))
    if name not in known:
        raise BadInput(
            f"`scheduler` is {name!r}: it has to be the class name of a diffusers scheduler, such as DDIMScheduler."
            f"{did_you_mean(name, known)}"
        )


def make_scheduler(name: str, config: dict, num_inference_steps: Sequence[int] = (5,)) -> "SchedulerMixin":
    """A scheduler that can sample with each of these numbers of inference steps. Raises `BadInput`."""
    check_scheduler_name(name)
    import diffusers

    steps = 0
    try:
        scheduler = getattr(diffusers, name).from_config(config, **ARGUMENTS.get(name, {}))
        for steps in num_inference_steps:
            rehearse(scheduler, steps)
    except Exception as error:  # schedulers for other models fail in ways of their own
        with_steps = f" with {steps} inference steps" if steps else ""
        raise BadInput(
            f"`scheduler` is {name!r}, which cannot sample from this base model{with_steps} ({type(error).__name__}: "
            f"{first_line(error)}): choose another range of steps, or a scheduler for latent diffusion such as DDIMScheduler "
            "or DPMSolverMultistepScheduler."
        ) from None
    return scheduler


def steps_in_use(settings: Settings) -> list[int]:
    """Every number of inference steps that the experiment's searches and tables can ask for."""
    low, high = settings.search_min_inference_steps, settings.search_max_inference_steps
    return sorted({*range(low, high + 1), settings.default_num_inference_steps})


def rehearse(scheduler: "SchedulerMixin", num_inference_steps: int) -> None:
    """Sample from nothing, as the pipeline would. Raises whatever an unsuitable scheduler raises."""
    scheduler.set_timesteps(num_inference_steps)
    latents = torch.zeros(1, 4, 2, 2) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        scheduler.scale_model_input(latents, timestep)
        latents = scheduler.step(torch.zeros_like(latents), timestep, latents).prev_sample
    if num_inference_steps > 1 and not scheduler.timesteps[0] > scheduler.timesteps[-1]:
        raise ValueError("its timesteps rise, so it adds noise")
