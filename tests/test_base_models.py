"""Base models: read from their own configs, refused in words when something is missing."""

import dataclasses
import shutil

import pytest
import torch

from sdlab.base_models import TINY, choose_device, load_base_model
from sdlab.run import sha256_of_file
from sdlab.settings import BadInput


def test_what_a_base_model_is_comes_from_its_configs(settings, v_base_folder):
    base = load_base_model(settings)
    assert (base.tokens, base.width, base.vae_scale, base.prediction_type) == (5, 12, 4, "epsilon")
    assert (
        load_base_model(dataclasses.replace(settings, base_model=str(v_base_folder))).prediction_type == "v_prediction"
    )


def test_it_is_frozen_and_float32(base):
    parameters = [*base.unet.parameters(), *base.vae.parameters()]
    assert not any(p.requires_grad for p in parameters) and {p.dtype for p in parameters} == {torch.float32}
    assert not base.unet.training and not base.vae.training


def test_the_hashes_are_those_of_the_files(settings, base, base_folder):
    assert base.sha256["unet/diffusion_pytorch_model.safetensors"] == sha256_of_file(
        base_folder / "unet/diffusion_pytorch_model.safetensors"
    )
    assert set(base.sha256) == {"unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"}


def test_tiny_is_small_enough_for_git_and_has_a_card(settings):
    """<= 20 MB, each file <= 15 MiB."""
    sizes = [p.stat().st_size for p in TINY.rglob("*") if p.is_file()]
    assert sum(sizes) <= 20e6 and max(sizes) <= 15 * 2**20
    assert "pretrain_tiny.py" in (TINY / "README.md").read_text()
    base = load_base_model(dataclasses.replace(settings, base_model="tiny"))
    assert (base.tokens, base.width, base.vae_scale) == (8, 64, 8) and base.unet.dtype == torch.float32


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("unet/config.json", "no readable unet/config.json"),
        ("vae/config.json", "no readable vae/config.json"),
        ("scheduler/scheduler_config.json", "no readable scheduler/scheduler_config.json"),
        ("text_encoder/config.json", "no readable text_encoder/config.json"),
        ("unet/diffusion_pytorch_model.safetensors", "pickled weights are not read"),
    ],
)
def test_an_incomplete_folder_is_refused(settings, base_folder, tmp_path, gone, said):
    folder = tmp_path / "incomplete"
    shutil.copytree(base_folder, folder)
    (folder / gone).unlink()
    with pytest.raises(BadInput, match=said):
        load_base_model(dataclasses.replace(settings, base_model=str(folder)))


def test_a_truncated_file_is_refused(settings, base_folder, tmp_path):
    folder = tmp_path / "truncated"
    shutil.copytree(base_folder, folder)
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(BadInput, match="cannot be loaded from"):
        load_base_model(dataclasses.replace(settings, base_model=str(folder)))


@pytest.mark.parametrize(
    ("name", "said"),
    [("tiney", "has to be `tiny`"), ("nobody/nothing", "could not be fetched"), ("../x", "has to be `tiny`")],
)
def test_an_unknown_base_model_is_refused(settings, name, said):
    with pytest.raises(BadInput, match=said):
        load_base_model(dataclasses.replace(settings, base_model=name))


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "cpu:1"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(BadInput, match="which this machine does not have"):
        choose_device(name)


@pytest.mark.parametrize(
    "name", ["FlowMatchEulerDiscreteScheduler", "VQDiffusionScheduler", "DDIMInverseScheduler", "DDIM", "Unheard"]
)
def test_a_scheduler_that_cannot_sample_is_refused_at_once(settings, name):
    with pytest.raises(BadInput, match=f"`scheduler` is '{name}'"):
        load_base_model(dataclasses.replace(settings, scheduler=name))


@pytest.mark.parametrize("size", [12, 20, 9])
def test_a_size_that_the_base_model_cannot_halve_is_refused(settings, size):
    with pytest.raises(BadInput, match=f"`base_image_size` is {size}.*multiple of 8"):
        load_base_model(dataclasses.replace(settings, base_image_size=size))


def test_the_fingerprint_follows_the_weights(settings, base, v_base_folder):
    assert base.fingerprint() == load_base_model(settings).fingerprint()
    assert (
        base.fingerprint()
        != load_base_model(dataclasses.replace(settings, base_model=str(v_base_folder))).fingerprint()
    )
