"""The pipeline: equal to diffusers' own, honest about guidance, an image depends on its own seed."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sdlab.class_encoder import ClassEncoder, with_projected_conditions
from sdlab.diffusion_pipeline import ClassConditionalStableDiffusionPipeline
from sdlab.errors import BadInput
from sdlab.paths import PROJECT_ROOT
from sdlab.schedulers import make_scheduler

REFERENCE = PROJECT_ROOT / ".venv" / "reference"


@pytest.fixture
def pipeline(base):
    torch.manual_seed(1)
    encoder = ClassEncoder(3, base.tokens, base.width, hidden=16)
    torch.nn.init.normal_(encoder.linear_in.bias)  # a trained null condition is not zero
    return ClassConditionalStableDiffusionPipeline(
        base.vae, base.unet, encoder, make_scheduler("DDIMScheduler", base.scheduler_config)
    )


def latents_of(pipeline, labels, guidance_scale, seeds=None, steps=4, **more):
    seeds = range(len(labels)) if seeds is None else seeds
    return pipeline(labels, steps, guidance_scale, seeds=seeds, output_type="latent", **more).images


def unet_batches(pipeline, monkeypatch) -> list[int]:
    """The batch size of every UNet call made from now on."""
    batches, forward = [], pipeline.unet.forward
    monkeypatch.setattr(pipeline.unet, "forward", lambda x, *a, **k: batches.append(len(x)) or forward(x, *a, **k))
    return batches


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="`make test` puts transformers there")
def test_equals_stable_diffusion_pipeline(pipeline, tmp_path):
    """fp32, guidance > 1, the same embeddings, latents and scheduler: below 1e-4 on images in [0, 1]."""
    pipeline.save_pretrained(tmp_path)
    command = [sys.executable, str(Path(__file__).with_name("reference_pipeline.py")), str(tmp_path), "1.5", "7.5"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(REFERENCE)}, cwd=PROJECT_ROOT
    )
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines()[-2:]:
        difference, spread = map(float, line.split())
        assert difference < 1e-4
        assert spread > 0.01  # images, not a constant that would be equal by itself


def by_hand(pipeline, labels, guidance, steps=4, guided=range(99)):
    """The sampler written out: DDIM, uncond + UGS * (cond - uncond) on the guided steps, every pass on its own."""
    x, scheduler, table = (
        pipeline.noise(range(len(labels))),
        pipeline.scheduler,
        pipeline.class_encoder.table().detach(),
    )
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        for step, t in enumerate(scheduler.timesteps):
            cond = pipeline.unet(x, t, table[labels]).sample
            uncond = pipeline.unet(x, t, table[-1:].repeat(len(labels), 1, 1)).sample
            scale = guidance if step in guided else 1
            x = scheduler.step(uncond + scale * (cond - uncond), t, x).prev_sample
    return x


@pytest.mark.parametrize("guidance", [0.0, 0.3, 1.0, 2.5])
def test_guidance_is_the_formula_at_every_scale(pipeline, guidance):
    """Values in (0, 1) are inside the search range; diffusers' own pipeline ignores them."""
    torch.testing.assert_close(
        latents_of(pipeline, [0, 1, 2], guidance), by_hand(pipeline, [0, 1, 2], guidance), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("interval", "guided"),
    [((0.25, 0.75), [1, 2]), ((0.5, 1.0), [2, 3]), ((0.0, 0.3), [0]), ((0.5, 0.5), []), ((0.3, 0.6), [1])],
)
def test_guidance_acts_in_its_interval_only(pipeline, monkeypatch, interval, guided):
    """Two passes on the guided steps, one plain conditional pass on the others; as diffusers' guiders count them."""
    batches = unet_batches(pipeline, monkeypatch)
    found = latents_of(pipeline, [0, 1], 3.0, guidance_start=interval[0], guidance_stop=interval[1])
    assert batches == [4 if step in guided else 2 for step in range(4)]
    torch.testing.assert_close(found, by_hand(pipeline, [0, 1], 3.0, guided=guided), atol=1e-5, rtol=1e-5)


def test_a_share_of_the_steps_is_not_cut_by_floating_point(pipeline, monkeypatch):
    """0.58 x 50 is 28.999999999999996."""
    batches = unet_batches(pipeline, monkeypatch)
    latents_of(pipeline, [0], 3.0, steps=50, guidance_stop=0.58)
    assert batches == [2] * 29 + [1] * 21


@pytest.mark.parametrize("guidance", [0.0, 0.3, 1.0, 2.5])
def test_conditions_projected_once_make_the_same_images(pipeline, guidance):
    expected = latents_of(pipeline, [0, 2, 1], guidance)
    pipeline.unet = with_projected_conditions(pipeline.unet, pipeline.class_encoder.table())
    torch.testing.assert_close(latents_of(pipeline, [0, 2, 1], guidance), expected, atol=1e-5, rtol=1e-5)


def test_conditions_are_projected_once_and_weights_shared(pipeline):
    """Each cross-attention projects the classes' table once, whatever the steps; nothing else is copied or changed."""
    plain, table = pipeline.unet, pipeline.class_encoder.table()
    projections = [m.to_k for m in plain.modules() if getattr(m, "is_cross_attention", False)]
    seen = []
    hooks = [p.register_forward_hook(lambda _, args, __: seen.append(len(args[0]))) for p in projections]
    sampling = with_projected_conditions(plain, table)
    pipeline.unet = sampling
    latents_of(pipeline, [0, 1], 2.0)
    assert len(projections) == 7 and seen == [4] * 7  # three classes and the null condition
    for hook in hooks:
        hook.remove()
    ours, theirs = dict(sampling.named_parameters()), dict(plain.named_parameters())
    assert theirs.keys() - ours.keys() == {n for n in theirs if "attn2.to_k" in n or "attn2.to_v" in n}
    assert all(ours[name] is theirs[name] for name in ours)
    pipeline.unet = plain  # still takes encoder_hidden_states
    assert torch.isfinite(latents_of(pipeline, [0, 1], 2.0)).all()


def test_at_one_there_is_one_conditional_pass(pipeline, monkeypatch):
    batches = unet_batches(pipeline, monkeypatch)
    latents_of(pipeline, [0, 1], 1.0)
    assert batches == [2] * 4
    batches.clear()
    latents_of(pipeline, [0, 1], 1.5)
    assert batches == [4] * 4


def test_at_zero_the_label_does_not_matter(pipeline):
    assert torch.equal(latents_of(pipeline, [0, 1, 2], 0.0), latents_of(pipeline, [2, 2, 0], 0.0))
    assert not torch.allclose(latents_of(pipeline, [0, 1, 2], 0.5), latents_of(pipeline, [2, 2, 0], 0.5))


def test_the_null_condition_is_the_encoders_zero_vector(pipeline):
    """Not zeros, not a class: changing the encoder's bias changes unconditional samples."""
    torch.testing.assert_close(pipeline.class_encoder.table()[-1], pipeline.class_encoder(torch.zeros(1, 3))[0])
    before = latents_of(pipeline, [0], 0.0)
    torch.nn.init.normal_(pipeline.class_encoder.linear_in.bias, std=3)
    assert not torch.allclose(before, latents_of(pipeline, [0], 0.0))


def test_an_image_depends_on_its_own_seed_whatever_the_batch(pipeline):
    together = latents_of(pipeline, [0, 1, 2], 2.0, seeds=[5, 6, 7])
    alone = latents_of(pipeline, [1], 2.0, seeds=[6])
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(alone, latents_of(pipeline, [1], 2.0, seeds=[7]))


def test_saved_and_loaded_it_makes_the_same_images(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    again = ClassConditionalStableDiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(again.class_encoder, ClassEncoder)
    for part in (
        again.vae,
        again.unet,
    ):  # torch multiplies by weights that want a gradient in another way: other last bits
        part.requires_grad_(False)
    images = [p([0, 1], 3, 2.0, seeds=[1, 2], output_type="np").images for p in (pipeline, again)]
    assert np.array_equal(*images)


@pytest.mark.parametrize("steps", [1, 5, 6, 7, 31, 48, 50])
def test_exactly_as_many_steps_as_asked(pipeline, steps, monkeypatch):
    """The authors' sampler makes up to 17 % more."""
    batches = unet_batches(pipeline, monkeypatch)
    latents_of(pipeline, [0], 1.0, steps=steps)
    assert len(batches) == steps
    assert pipeline.scheduler.timesteps[-1] == 1  # leading, offset 1
    assert pipeline.scheduler.final_alpha_cumprod == 1.0


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler",
                                  "EulerAncestralDiscreteScheduler", "DDPMScheduler"])  # fmt: skip
def test_any_diffusers_scheduler_by_name(base, pipeline, name):
    pipeline.scheduler = make_scheduler(name, base.scheduler_config)
    first, second = (latents_of(pipeline, [0, 1], 1.5, seeds=[3, 4], steps=6) for _ in range(2))
    assert torch.equal(first, second) and torch.isfinite(first).all()
    assert not torch.allclose(first, latents_of(pipeline, [0, 1], 1.5, seeds=[8, 9], steps=6))


@pytest.mark.parametrize("name", ["Unheard", "UNet2DConditionModel", "NoScheduler", "DDIM"])
def test_an_unknown_scheduler_is_refused(base, name):
    with pytest.raises(BadInput, match="class name of a diffusers scheduler"):
        make_scheduler(name, base.scheduler_config)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(labels=[3], seeds=[0]), "class indices 0 to 2"),
        (dict(labels=[-1], seeds=[0]), "class indices 0 to 2"),
        (dict(labels=[], seeds=[]), "class indices 0 to 2"),
        (dict(labels=[0], seeds=[0], num_inference_steps=0), "allowed is 1 to 999"),
        (dict(labels=[0], seeds=[0], guidance_scale=-1.0), "0 or more"),
        (dict(labels=[0], seeds=[0], guidance_scale=float("nan")), "0 or more"),
        (dict(labels=[0], seeds=[0], guidance_start=0.6, guidance_stop=0.5), "shares of the steps"),
        (dict(labels=[0], seeds=[0], guidance_stop=1.5), "shares of the steps"),
        (dict(labels=[0]), "either `seeds`"),
        (dict(labels=[0, 1], seeds=[0]), "2 labels, but 1 seeds"),
    ],
)
def test_bad_arguments_are_refused(pipeline, arguments, said):
    with pytest.raises(BadInput, match=said):
        pipeline(**arguments)


def test_output_types(pipeline):
    pil = pipeline([0, 1], 2, 1.0, seeds=[0, 1]).images
    array = pipeline([0, 1], 2, 1.0, seeds=[0, 1], output_type="np").images
    tensor = pipeline([0, 1], 2, 1.0, seeds=[0, 1], output_type="pt").images
    assert pil[0].size == (16, 16) and array.shape == (2, 16, 16, 3) and tensor.shape == (2, 3, 16, 16)
    np.testing.assert_allclose(np.asarray(pil[1]) / 255, array[1], atol=1 / 255)
    np.testing.assert_allclose((tensor.clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1), array, atol=1e-6)
