"""Run by test_diffusion_pipeline.py in a process that has transformers: our images beside diffusers' StableDiffusionPipeline.

Prints the largest difference of decoded images in [0, 1], for each guidance scale given.
"""

import sys

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from sdlab.diffusion_pipeline import ClassConditionalStableDiffusionPipeline

ours = ClassConditionalStableDiffusionPipeline.from_pretrained(sys.argv[1])
theirs = StableDiffusionPipeline(
    vae=ours.vae, unet=ours.unet, scheduler=DDIMScheduler.from_config(ours.scheduler.config), text_encoder=None,
    tokenizer=None, safety_checker=None, feature_extractor=None, image_encoder=None, requires_safety_checker=False,
)  # fmt: skip
for pipeline in (ours, theirs):
    pipeline.set_progress_bar_config(disable=True)
labels, latents = [0, 2, 1, 2], ours.noise(range(4))
table = ours.class_encoder.table().detach()
for guidance_scale in map(float, sys.argv[2:]):
    mine = ours(labels, num_inference_steps=7, guidance_scale=guidance_scale, latents=latents, output_type="np").images
    their = theirs(
        prompt_embeds=table[labels], negative_prompt_embeds=table[-1:].repeat(4, 1, 1), num_inference_steps=7,
        guidance_scale=guidance_scale, latents=latents, output_type="np",
    ).images  # fmt: skip
    print(float(torch.tensor(mine - their).abs().max()), float(torch.tensor(mine).std()))
