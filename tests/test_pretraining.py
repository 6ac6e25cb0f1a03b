"""The script that made `tiny`: repeats exactly, resumes to the same weights, and draws what it says."""

import sys

import click
import pytest
import torch

from sdlab.paths import PROJECT_ROOT

sys.path.insert(0, str(PROJECT_ROOT / "scripts"))
import pretrain_tiny as script
from pictures import drawing, glyphs, mixture, photographs


def trained(folder, steps, monkeypatch, seed=0, stage="vae"):
    """`steps` is the end of the schedule (8); a list of ends cuts the run there and resumes."""
    monkeypatch.setattr(script, "learning_rate", lambda step, total, peak: script_rate(step, 8, peak))
    for end in steps:
        getattr(script, stage).callback(state=folder, seed=seed, threads=1, latents="8x8x8", steps=end, batch_size=4)
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
    with pytest.raises(click.ClickException, match="was made with seed 0, batch size 4 and latents 32x4x4"):
        trained(tmp_path, [4], monkeypatch, seed=1)


def test_the_unet_learns_from_the_vae_of_its_state_folder_and_resumes_in_the_middle_of_a_pool(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "POOL_IMAGES", 16)
    monkeypatch.setattr(script, "POOL_STEPS", 3)
    for folder in ("a", "b"):
        trained(tmp_path / folder, [2], monkeypatch)
    whole = trained(tmp_path / "a", [8], monkeypatch, stage="unet")
    assert whole["step"] == 8 and all(torch.isfinite(v).all() for v in whole["ema"].values())
    assert equal(whole, trained(tmp_path / "b", [4, 8], monkeypatch, stage="unet"))


@pytest.mark.parametrize("painter", mixture.PAINTERS, ids=lambda painter: painter.__name__)
def test_pictures_of_each_kind_vary_repeat_and_stay_in_range(painter):
    first, again = (mixture.painted(painter, drawing.Dice(torch.Generator().manual_seed(0)), 48) for _ in range(2))
    assert first.images.shape == (48, 3, 32, 32) and first.images.min() >= -1 and first.images.max() <= 1
    assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in first.__dataclass_fields__)
    assert first.images.flatten(1).std(1).min() > 0.01  # none is one flat colour
    assert first.images.std(0).mean() > 0.15  # and they differ from each other
    assert len(first.subject.unique()) == (1 if painter is not glyphs.glyphs else len(first.subject.unique()))
    for numbers, width in ((first.colours, 9), (first.geometry, 6), (first.rendering, 10)):
        assert numbers.shape == (48, width) and numbers.abs().max() <= 1.5


def test_the_mixture_has_every_kind_in_its_share():
    batch = mixture.draw(4000, torch.Generator().manual_seed(0), mixture.UNET_SHARES)
    kind = (batch.subject - len(glyphs.CHARACTERS) + 1).clamp_min(0)
    shares = torch.bincount(kind, minlength=len(mixture.PAINTERS)) / len(batch)
    assert torch.allclose(shares, torch.tensor(mixture.UNET_SHARES), atol=0.03)
    assert abs(kind[:1000].float().mean() - kind[3000:].float().mean()) < 0.4  # in random order
    assert batch.subject.max() < len(mixture.subjects()) and batch.variant.max() < len(mixture.variants())
    characters = batch.subject[kind == 0]
    assert 0.4 < (characters < 10).float().mean() < 0.6


def test_what_is_told_is_what_is_shown():
    """Paper's colour at the corners of a silhouette, ink's in its middle; a cell without lobes has no nucleus."""
    dice = drawing.Dice(torch.Generator().manual_seed(0))
    cells = mixture.cells(dice, 400)
    middle = cells.images[:, :, 30:34, 30:34].mean((2, 3))
    to_accent, to_ink = ((middle - cells.colours[:, i]).abs().mean(1) for i in (2, 1))
    without = torch.tensor([variant == "0 lobes" for variant in cells.variant])
    single = torch.tensor([variant == "1 lobes" for variant in cells.variant])
    assert (to_ink < to_accent)[without].float().mean() > 0.8 and (to_accent < to_ink)[single].float().mean() > 0.8


def test_photographs_are_none_of_a_data_set_that_is_scored():
    names, pictures = photographs.photographs()
    assert len(names) == len(pictures) == 13 and not {"retina", "immunohistochemistry", "microaneurysms"} & set(names)
    assert all(picture.shape[0] == 3 and picture.min() >= 0 and picture.max() <= 1 for picture in pictures)
    card = (PROJECT_ROOT / "sdlab" / "tiny" / "README.md").read_text()
    assert all(name.removesuffix(".jpg") in card for name in names)


def test_fonts_are_matplotlibs_own_and_differ():
    bank, names = glyphs.glyph_bank()
    assert len(names) >= 15 and bank.shape[1:] == (62, 64, 64)
    assert bank.flatten(2).mean(2).min() > 0.005  # no font lacks a character
    assert (bank[0] - bank[-1]).abs().mean() > 0.01


def test_what_is_shown_reaches_the_condition_and_can_be_left_out():
    shown = mixture.draw(8, torch.Generator().manual_seed(0), mixture.UNET_SHARES)
    encoder = script.ThrowawayTextEncoder()
    full = encoder(shown, torch.ones(8, 8))
    assert full.shape == (8, 8, 64) and not encoder(shown, torch.zeros(8, 8)).any()
    for name, tokens in (
        ("subject", (0, 1, 6, 7)),
        ("variant", (2,)),
        ("colours", (3, 4, 5)),
        ("geometry", (6,)),
        ("rendering", (7,)),
    ):
        other = mixture.Batch(**{n: getattr(shown, n) for n in shown.__dataclass_fields__})
        setattr(other, name, getattr(shown, name).flip(0))
        changed = (encoder(other, torch.ones(8, 8)) - full).abs().amax((0, 2)) > 0
        assert set(changed.nonzero().flatten().tolist()) == set(tokens), name
    keep = script.keep_tokens(20000, torch.Generator().manual_seed(0))
    expected = 1 - (1 - script.CONDITION_DROPOUT) * (1 - torch.tensor(script.TOKEN_DROPOUT))
    assert torch.allclose(1 - keep.mean(0), expected, atol=0.02)


@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_blur_keeps_the_mean_and_zero_keeps_the_image(sigma):
    image = torch.zeros(1, 1, 17, 17)
    image[0, 0, 8, 8] = 1
    blurred = drawing.gaussian_blur(image, torch.tensor([sigma]))
    assert blurred.sum().item() == pytest.approx(1, abs=1e-4)
    assert torch.equal(blurred, image) == (sigma == 0)
    flat = drawing.gaussian_blur(torch.full((2, 3, 9, 9), 0.5), torch.tensor([sigma, 1.2]))
    assert torch.allclose(flat, torch.full_like(flat, 0.5), atol=1e-5)  # no dark border
