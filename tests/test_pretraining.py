"""The script that made `tiny`: repeats exactly, resumes to the same weights, and never draws a handwritten digit."""

import sys

import click
import pytest
import torch

from sdlab.paths import PROJECT_ROOT

sys.path.insert(0, str(PROJECT_ROOT / "scripts"))
import pretrain_tiny as script


def trained(folder, steps, monkeypatch, seed=0, stage="vae"):
    """`steps` is the end of the schedule (8); a list of ends cuts the run there and resumes."""
    monkeypatch.setattr(script, "learning_rate", lambda step, total, peak: script_rate(step, 8, peak))
    for end in steps:
        getattr(script, stage).callback(state=folder, seed=seed, threads=1, steps=end, batch_size=4)
    return torch.load(folder / f"{stage}.pt", weights_only=True)


script_rate = script.learning_rate


def equal(a, b):
    return all(torch.equal(a[key][name], b[key][name]) for key in ("module", "ema") for name in a[key])


def test_seeded_steps_repeat_and_a_cut_run_resumes_the_same(tmp_path, monkeypatch):
    whole = trained(tmp_path / "a", [8], monkeypatch)
    assert equal(whole, trained(tmp_path / "b", [8], monkeypatch))
    assert equal(whole, trained(tmp_path / "c", [3, 8], monkeypatch))
    assert not equal(whole, trained(tmp_path / "d", [8], monkeypatch, seed=1))


def test_a_state_of_another_seed_is_refused(tmp_path, monkeypatch):
    trained(tmp_path, [2], monkeypatch)
    with pytest.raises(click.ClickException, match="was made with seed 0 and batch size 4"):
        trained(tmp_path, [4], monkeypatch, seed=1)


def test_the_unet_learns_from_the_vae_of_its_state_folder(tmp_path, monkeypatch):
    trained(tmp_path, [2], monkeypatch)
    first = trained(tmp_path, [2], monkeypatch, stage="unet")
    assert first["step"] == 2 and all(torch.isfinite(v).all() for v in first["ema"].values())


def test_glyphs_vary_and_stay_in_range():
    images, attributes = script.glyph_batch(64, torch.Generator().manual_seed(0))
    assert images.shape == (64, 3, 32, 32) and images.min() >= -1 and images.max() <= 1
    assert images.flatten(1).std(1).min() > 0.01  # ink on every one
    assert 0.3 < (attributes["character"] < 10).float().mean() < 0.7
    again, _ = script.glyph_batch(64, torch.Generator().manual_seed(0))
    assert torch.equal(images, again)


def test_fonts_are_matplotlibs_own_and_differ():
    bank, names = script.glyph_bank()
    assert len(names) >= 15 and bank.shape[1:] == (62, 64, 64)
    assert bank.flatten(2).mean(2).min() > 0.005  # no font lacks a character
    assert (bank[0] - bank[-1]).abs().mean() > 0.01


def test_attributes_reach_the_condition_and_can_be_left_out():
    _, attributes = script.glyph_batch(4, torch.Generator().manual_seed(0))
    encoder = script.ThrowawayTextEncoder(len(script.glyph_bank()[1]))
    full = encoder(attributes, torch.ones(4, 8))
    assert full.shape == (4, 8, 64) and not encoder(attributes, torch.zeros(4, 8)).any()
    keep = script.keep_tokens(20000, torch.Generator().manual_seed(0))
    expected = 1 - (1 - script.CONDITION_DROPOUT) * (1 - torch.tensor(script.TOKEN_DROPOUT))
    assert torch.allclose(1 - keep.mean(0), expected, atol=0.02)


@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_blur_keeps_the_mean_and_zero_keeps_the_image(sigma):
    image = torch.zeros(1, 1, 17, 17)
    image[0, 0, 8, 8] = 1
    blurred = script.gaussian_blur(image, torch.tensor([sigma]))
    assert blurred.sum().item() == pytest.approx(1, abs=1e-4)
    assert torch.equal(blurred, image) == (sigma == 0)
