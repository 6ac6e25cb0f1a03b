"""Labels, inference steps, guidance, seeds -> images: Stable Diffusion conditioned on classes, as a diffusers pipeline.

Classifier-free guidance (Ho and Salimans 2022; docs/method.md, item 15) is in `__call__`:

    noise_pred = noise_pred_uncond + guidance_scale * (noise_pred_cond - noise_pred_uncond)
"""

import copy
import inspect
from collections.abc import Callable, Sequence

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor

from sdlab.class_encoder import ClassEncoder, ClassTable
from sdlab.errors import BadInput
from sdlab.seeds import generator

DECODE_BATCH = 64  # images decoded at once: decoding needs far more memory an image than denoising


class ClassConditionalStableDiffusionPipeline(DiffusionPipeline):
    """Class-conditional latent diffusion: the Class-Encoder, or its table, replaces tokenizer and text encoder.

    Denoises in the UNet's dtype and decodes in it by autocast. The UNet may come from `with_projected_conditions`.
    """

    model_cpu_offload_seq = "class_encoder->unet->vae"

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        class_encoder: ClassEncoder | ClassTable,
        scheduler: SchedulerMixin,
    ):
        super().__init__()
        self.register_modules(vae=vae, unet=unet, class_encoder=class_encoder, scheduler=scheduler)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @torch.no_grad()
    def __call__(
        self,
        labels: Sequence[int] | torch.Tensor,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        guidance_start: float = 0.0,
        guidance_stop: float = 1.0,
        seeds: Sequence[int] | None = None,
        latents: torch.Tensor | None = None,
        size: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        after_step: Callable[[], None] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate one image for each label: `images` of the result, as `output_type` asks.

        Args:
            labels: n class indices, 0 ... num_classes - 1.
            num_inference_steps: the paper's IS, at least 1. First-order schedulers make exactly this many steps.
            guidance_scale: the paper's UGS, at least 0. 1 is plain conditional and 0 unconditional sampling, one pass
                each; every other value, including those in (0, 1), makes both passes in one batch.
            guidance_start, guidance_stop: shares of the inference steps between which guidance acts; the other steps are
                plain conditional (Kynkaanniemi et al. 2024). The paper's are 0 and 1.
            seeds: n seeds, one per image: an image depends on its own seed, whatever the batch.
            latents: (n, channels, h, w) standard normal noise instead of `seeds`. One of the two is needed.
            size: side of the image in pixels; default: the UNet's own `sample_size`.
            output_type: `pil`, `np` (n, h, w, 3 in [0, 1]), `pt` (n, 3, h, w in [-1, 1]) or `latent` (unscaled).
            after_step: called after each inference step, for progress.

        Raises:
            BadInput: a label, a number of steps, a guidance scale or its interval out of range; neither seeds nor latents.
        """
        labels = torch.as_tensor(labels, device=self._execution_device, dtype=torch.long)
        self.check(labels, num_inference_steps, guidance_scale, (guidance_start, guidance_stop), seeds, latents)
        cond, uncond = self.conditions(labels)
        if latents is None:
            latents = self.noise(seeds, size)
        # The scheduler's timesteps stay on the CPU: reading one from a GPU would wait for it at every step.
        self.scheduler.set_timesteps(num_inference_steps)
        timesteps = self.scheduler.timesteps
        latents = latents.to(self._execution_device, self.unet.dtype) * self.scheduler.init_noise_sigma
        extra = self.step_generators(seeds)
        # Rounded first: 0.58 x 50 is 28.999... in floating point.
        first, end = (int(round(share * len(timesteps), 6)) for share in (guidance_start, guidance_stop))

        for step, (timestep, timestep_on_device) in enumerate(
            zip(timesteps, timesteps.to(latents.device), strict=True)
        ):
            scale = guidance_scale if first <= step < end else 1
            if scale in (0, 1):
                condition = cond if scale == 1 else uncond
                model_input = self.scheduler.scale_model_input(latents, timestep)
                noise_pred = self.unet(model_input, timestep_on_device, condition).sample
            else:
                model_input = self.scheduler.scale_model_input(torch.cat([latents, latents]), timestep)
                noise_pred = self.unet(model_input, timestep_on_device, torch.cat([uncond, cond])).sample
                noise_pred_uncond, noise_pred_cond = noise_pred.chunk(2)
                noise_pred = noise_pred_uncond + scale * (noise_pred_cond - noise_pred_uncond)
            latents = self.scheduler.step(noise_pred, timestep, latents, **extra).prev_sample
            if after_step:
                after_step()

        images = latents if output_type == "latent" else self.decode(latents)
        if output_type in ("pil", "np"):
            images = self.image_processor.postprocess(images, output_type=output_type)
        return ImagePipelineOutput(images) if return_dict else (images,)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (n, channels, h, w) -> images (n, 3, height, width) in [-1, 1], float32."""
        latents = latents.float() / self.vae.config.scaling_factor
        half = self.unet.dtype != torch.float32
        with torch.autocast(latents.device.type, self.unet.dtype, enabled=half):
            return torch.cat([self.vae.decode(part).sample.float() for part in latents.split(DECODE_BATCH)])

    def copy_for_thread(self) -> "ClassConditionalStableDiffusionPipeline":
        """The same models with a scheduler of its own, which counts steps: for one of several threads."""
        return type(self)(self.vae, self.unet, self.class_encoder, copy.deepcopy(self.scheduler))

    def conditions(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The condition of each image and the null condition, in the form that the UNet takes."""
        if getattr(self.unet, "takes_rows", False):
            cond = labels.view(-1, 1, 1)
            return cond, torch.full_like(cond, self.class_encoder.config.num_classes)
        table = self.class_encoder.table().to(self.unet.dtype)
        return table[labels], table[-1:].expand(len(labels), -1, -1)

    def check(self, labels, num_inference_steps, guidance_scale, interval, seeds, latents) -> None:
        """Raises `BadInput`."""
        classes = self.class_encoder.config.num_classes
        if labels.ndim != 1 or not len(labels) or labels.min() < 0 or labels.max() >= classes:
            raise BadInput(
                f"`labels` has to be a list of class indices 0 to {classes - 1}; found {labels.tolist()[:8]}."
            )
        most = self.scheduler.config.num_train_timesteps - 1  # leading timesteps are offset by one
        if not 1 <= num_inference_steps <= most:
            raise BadInput(f"`num_inference_steps` is {num_inference_steps}: allowed is 1 to {most}.")
        if not 0 <= guidance_scale < float("inf"):
            raise BadInput(f"`guidance_scale` is {guidance_scale}: allowed is 0 or more.")
        if not 0 <= interval[0] <= interval[1] <= 1:
            raise BadInput(
                f"`guidance_start` and `guidance_stop` are {interval[0]} and {interval[1]}: allowed are shares of the steps, 0 to 1, "
                "the first not above the second."
            )
        if (seeds is None) == (latents is None):
            raise BadInput("Give either `seeds` (one an image) or `latents`.")
        count = len(seeds) if latents is None else len(latents)
        if count != len(labels):
            raise BadInput(f"There are {len(labels)} labels, but {count} {'seeds' if latents is None else 'latents'}.")

    def noise(self, seeds: Sequence[int], size: int | None = None) -> torch.Tensor:
        """Initial noise (n, channels, h, w), image i from seed i, drawn on the CPU: the same on every device."""
        side = size // self.vae_scale_factor if size else self.unet.config.sample_size
        shape = (self.unet.config.in_channels, side, side)
        return torch.stack([torch.randn(shape, generator=generator(seed)) for seed in seeds])

    def step_generators(self, seeds: Sequence[int] | None) -> dict:
        """Ancestral and SDE schedulers draw noise at each step: every image has a stream of its own."""
        if seeds is None or "generator" not in inspect.signature(self.scheduler.step).parameters:
            return {}
        return {"generator": [generator(int(seed) ^ 0x5DEECE66D) for seed in seeds]}
