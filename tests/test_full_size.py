"""Stable Diffusion 2.0 at its true size, with random weights, through the ordinary path: `make full-size`.

Minutes, 20 GiB of memory and 35 GB of disk on a CPU. Says what it saw: run it with -s.
"""

import dataclasses
import json
import resource
import shutil
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open
from test_training import DiesAt, Killed

from sdlab.base_models import load_base_model
from sdlab.class_encoder import ClassEncoder
from sdlab.data.images import ImageDataset, Split
from sdlab.data.model_files import SHAPES
from sdlab.generation import generate, plan_generation
from sdlab.latents import encode_training_set
from sdlab.runs.checkpoints import load_checkpoint
from sdlab.runs.experiment import Experiment
from sdlab.sampling_config import SamplingConfig, load_pipeline
from sdlab.settings import Settings
from sdlab.training import fine_tune_unet, train_class_encoder

GIB = 2**30
UNET, VAE, ENCODER = 865_910_724, 83_653_863, 39_429_500


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


@contextmanager
def said(what: str):
    started = time.perf_counter()
    yield
    print(f"{what:<58} {time.perf_counter() - started:6.1f} s, peak so far {peak():5.2f} GiB", flush=True)


@pytest.fixture
def folder():
    """Not pytest's tmp_path, which keeps the last three."""
    with tempfile.TemporaryDirectory(prefix="sdlab-full-size-") as name:
        assert shutil.disk_usage(name).free > 35e9, f"35 GB of disk are needed below {name}: set TMPDIR"
        yield Path(name)


def write_stable_diffusion(folder: Path) -> Path:
    """SD 2.0's configs, random weights, diffusers' format."""
    shutil.copytree(SHAPES / "stable-diffusion-2-base", folder)
    torch.manual_seed(0)
    for part, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        kind.from_config(json.loads((folder / part / "config.json").read_text())).save_pretrained(folder / part)
    return folder


def ten_classes() -> ImageDataset:
    rng = np.random.default_rng(0)
    split = Split(rng.integers(0, 256, (10, 3, 32, 32), np.uint8), np.arange(10))
    two = Split(split.images[:2], split.labels[:2])
    return ImageDataset("noise", "made by the tests", tuple("0123456789"), two, split, split)


@pytest.mark.slow
def test_the_whole_method_at_full_size_on_a_cpu(folder):
    torch.set_num_threads(2)
    with said("random weights, saved once as a diffusers folder"):
        write_stable_diffusion(folder / "sd2")
    settings = Settings.from_mapping(
        dict(experiment="full", dataset="digits", base_model=str(folder / "sd2"), runs_root=str(folder), class_encoder_epochs=1,
             class_encoder_batch_size=2, unet_epochs=2, unet_batch_size=2, shard_size=4, search_images=4, search_first_images=4)
    )  # fmt: skip
    data = ten_classes()

    with said("base model: hashed, VAE loaded"):
        base = load_base_model(settings)
        assert base.vae.num_parameters() == VAE
    run = Experiment(settings, data, base)
    run.progress = DiesAt(0)
    assert (base.tokens, base.width, base.vae_scale, base.latent_channels) == (77, 1024, 8, 4)
    assert base.scaling_factor == 0.18215
    with said("UNet loaded in float32"):
        assert base.unet.num_parameters() == UNET
    with said("two images encoded"):
        moments = encode_training_set(run)
    assert moments.mean.shape == (2, 4, 16, 16)
    with said("one Class-Encoder step of two images, table saved"):
        list(train_class_encoder(run, moments))
    del base, run.base
    with safe_open(run.folder / "class_encoder" / "resume.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys() if name.startswith("model.")}  # noqa: SIM118
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == ENCODER
    assert ClassEncoder(10).num_parameters() == ENCODER

    run.progress = DiesAt(2)  # at the second epoch's step
    with said("one fine-tuning step, checkpoint and state saved, killed"), pytest.raises(Killed):
        run.base = load_base_model(settings)
        list(fine_tune_unet(run, moments, 1))
    state = run.folder / "unet" / "resume.safetensors"
    assert state.stat().st_size == pytest.approx(12 * UNET, rel=1e-3)
    run.progress = DiesAt(0)
    with said("resumed: a second step, checkpoint and state saved"):
        run.base = load_base_model(settings)
        history = list(fine_tune_unet(run, moments, 1))
    assert [record.epoch for record in history] == [1, 2] and np.isfinite([record.loss for record in history]).all()
    for epoch in (1, 2):
        weights = run.folder / "unet" / f"epoch_{epoch:02d}" / "diffusion_pytorch_model.safetensors"
        assert weights.stat().st_size == pytest.approx(2 * UNET, rel=1e-3)
    kept = load_checkpoint(UNet2DConditionModel, run.folder / "unet", 2)
    with safe_open(state, "pt") as file:
        for name in ("conv_in.weight", "conv_out.bias", "mid_block.resnets.0.conv1.weight"):
            assert torch.equal(kept.state_dict()[name], file.get_tensor(f"model.{name}").half().float())
    del kept

    base = run.base = load_base_model(settings)
    config = SamplingConfig(num_inference_steps=2, guidance_scale=2.0, class_encoder_epoch=1, unet_epoch=2)
    plan = plan_generation(run, config, seed=0)
    with said("four images at 2 steps with guidance, decoded"):
        pipeline = load_pipeline(run, config)
        assert pipeline.class_encoder.table().shape == (11, 77, 1024) and pipeline.noise([0], 128).shape == (
            1,
            4,
            16,
            16,
        )
        made = generate(pipeline, dataclasses.replace(plan, shard_size=4), folder / "synthetic", 4, run.progress)
    assert made.split(4).images.shape == (4, 3, 32, 32) and "unet" not in base.__dict__
    print(
        f"peak {peak():.2f} GiB, {sum(p.stat().st_size for p in folder.rglob('*') if p.is_file()) / 1e9:.1f} GB on disk"
    )
    assert peak() <= 20
