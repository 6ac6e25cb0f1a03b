"""A `SamplingConfig` -> the pipeline of its checkpoints -> images: where in the search space one samples."""

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sdlab.data.pixels import to_uint8
from sdlab.errors import BadInput
from sdlab.runs.checkpoints import load_checkpoint
from sdlab.runs.experiment import Experiment
from sdlab.schedulers import make_scheduler
from sdlab.settings import Settings

if TYPE_CHECKING:  # diffusers is slow to import
    from diffusers import UNet2DConditionModel

    from sdlab.class_encoder import ClassTable
    from sdlab.diffusion_pipeline import ClassConditionalStableDiffusionPipeline


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """One point of the search space: the sampler's settings and the checkpoints."""

    num_inference_steps: int  # the paper's IS
    guidance_scale: float  # the paper's UGS
    class_encoder_epoch: int  # 0: untrained, so that every condition is the null condition
    unet_epoch: int = 0  # 0: the base model's own UNet

    @classmethod
    def default(cls, settings: Settings) -> "SamplingConfig":
        """Stable Diffusion's defaults at the last Class-Encoder epoch: the paper's "After 1"."""
        return cls(
            num_inference_steps=settings.default_num_inference_steps,
            guidance_scale=settings.default_guidance_scale,
            class_encoder_epoch=settings.class_encoder_epochs,
        )


def load_pipeline(run: Experiment, config: SamplingConfig) -> "ClassConditionalStableDiffusionPipeline":
    """The pipeline of a config's checkpoints. Raises `BadInput` for a missing or damaged one."""
    from diffusers import UNet2DConditionModel

    from sdlab.diffusion_pipeline import ClassConditionalStableDiffusionPipeline

    base, unet, table = run.base, None, load_table(run, config.class_encoder_epoch)
    if config.unet_epoch:
        unet = load_checkpoint(UNet2DConditionModel, run.folder / "unet", config.unet_epoch, base.device, base.dtype)
    scheduler = make_scheduler(run.settings.scheduler, base.scheduler_config)
    unet = prepare_unet(unet or base.unet, table, run.settings)
    return ClassConditionalStableDiffusionPipeline(base.vae, unet, table, scheduler)


def load_table(run: Experiment, epoch: int) -> "ClassTable":
    """The conditions of every class at a Class-Encoder epoch; epoch 0 is untrained (zeros). Raises `BadInput`."""
    from sdlab.class_encoder import ClassTable

    if epoch == 0:
        return (
            ClassTable(run.data.num_classes, run.base.tokens, run.base.width).to(run.base.device).requires_grad_(False)
        )
    return load_checkpoint(ClassTable, run.folder / "class_encoder", epoch, run.base.device)


def prepare_unet(unet: "UNet2DConditionModel", table: "ClassTable", settings: Settings) -> "UNet2DConditionModel":
    """The UNet for bulk generation: keys and values of the classes projected once; channels_last on a GPU; compiled if asked.

    Raises `BadInput` if `compile_unet` finds no compiler.
    """
    from sdlab.class_encoder import with_projected_conditions

    unet = with_projected_conditions(unet, table.table())
    if unet.device.type == "cuda":
        import torch

        unet = unet.to(memory_format=torch.channels_last)
    if settings.compile_unet:
        if not any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++")):
            raise BadInput(
                "`compile_unet` is true, but there is no C++ compiler (g++ or clang++): install one, or leave it out."
            )
        if unet.device.type == "cpu":  # else torch warns that a CUDA toolkit has no GPU
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        unet.compile(dynamic=False)
    return unet


def sample_images(run: Experiment, config: SamplingConfig, labels: Sequence[int], seeds: Sequence[int]) -> np.ndarray:
    """One image per label, image i from the noise of seed i: uint8 (n, 3, base_image_size, base_image_size)."""
    settings = run.settings
    images = load_pipeline(run, config)(
        labels,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        guidance_start=settings.guidance_start,
        guidance_stop=settings.guidance_stop,
        seeds=seeds,
        size=settings.base_image_size,
        output_type="pt",
    ).images
    return to_uint8(images, settings.base_image_size)
