"""The script that made `tiny`: repeats exactly, resumes to the same weights, and draws what it says."""

import dataclasses
import re
import shutil
import sys

import click
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from PIL import Image

from sdlab.base_models import load_base_model
from sdlab.paths import PROJECT_ROOT

sys.path.insert(0, str(PROJECT_ROOT / "scripts"))
import pretrain_tiny as script
from pictures import cells, drawing, glyphs, mixture, photographs, surfaces

CARD = PROJECT_ROOT / "sdlab" / "tiny" / "README.md"
KINDS = pytest.mark.parametrize("painter", mixture.PAINTERS, ids=mixture.KINDS)


schedule = script.learning_rate


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Pools of three batches of 4, dozens of pictures where the script draws a thousand; torch's threads as before."""
    monkeypatch.setattr(script, "POOL_IMAGES", 12)
    monkeypatch.setattr(script, "VAE_SHOWN", 1)
    monkeypatch.setattr(script, "UNET_SHOWN", 1)
    monkeypatch.setattr(script, "draw", lambda count, *given: mixture.draw(min(count, 64), *given))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def trained(folder, ends, monkeypatch, seed=0, stage="vae"):
    """Trains up to each of `ends` in turn, on a schedule of 8 steps: all but the last are cuts."""
    monkeypatch.setattr(script, "learning_rate", lambda step, total, peak: schedule(step, 8, peak))
    for end in ends:
        getattr(script, stage).callback(state=folder, seed=seed, threads=1, latents="8x8x8", steps=end, batch_size=4)
    return torch.load(folder / f"{stage}.pt", weights_only=True)


def equal(a, b):
    return all(torch.equal(a[key][name], b[key][name]) for key in ("module", "ema") for name in a[key])


def test_seeded_steps_repeat_and_a_cut_run_resumes_the_same(tmp_path, monkeypatch):
    whole = trained(tmp_path / "a", [8], monkeypatch)
    assert equal(whole, trained(tmp_path / "b", [8], monkeypatch))
    assert equal(whole, trained(tmp_path / "c", [3, 8], monkeypatch))
    assert not equal(whole, trained(tmp_path / "d", [8], monkeypatch, seed=1))


def test_a_state_of_other_settings_is_refused(tmp_path, monkeypatch):
    trained(tmp_path, [2], monkeypatch)
    with pytest.raises(
        click.ClickException, match=r"was made with seed 0, batch_size 4, latents 8x8x8, .* not seed 1,"
    ):
        trained(tmp_path, [4], monkeypatch, seed=1)
    torch.save(dict(torch.load(tmp_path / "vae.pt", weights_only=True), drawn_from=[0, 64]), tmp_path / "vae.pt")
    with pytest.raises(click.ClickException, match=r"vae\.pt was made by an older form of this script"):
        trained(tmp_path, [4], monkeypatch)


def test_the_log_of_a_resumed_run_is_an_uncut_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "LOG_EVERY", 2)
    monkeypatch.setattr(script, "SAVE_EVERY", 4)
    whole, cut = (trained(tmp_path / name, ends, monkeypatch)["log"] for name, ends in (("a", [8]), ("b", [4, 8])))
    assert [row[:2] for row in whole] == [row[:2] for row in cut] and [row[0] for row in whole] == [2, 4, 6, 8]
    lines = (tmp_path / "b" / "vae.csv").read_text().split()
    assert [line.split(",")[0] for line in lines] == ["2", "4", "6", "8"]
    assert trained(tmp_path / "c", [7], monkeypatch)["log"][-1][0] == 7  # the last steps, too


def test_the_unet_learns_from_the_vae_of_its_state_folder_and_resumes_in_the_middle_of_a_pool(tmp_path, monkeypatch):
    for folder in ("a", "b"):
        trained(tmp_path / folder, [2], monkeypatch)
    whole = trained(tmp_path / "a", [8], monkeypatch, stage="unet")
    assert whole["step"] == 8 and all(torch.isfinite(v).all() for v in whole["ema"].values())
    assert equal(whole, trained(tmp_path / "b", [4, 8], monkeypatch, stage="unet"))

    trained(tmp_path / "a", [3], monkeypatch)  # the VAE learns one more step: these are no longer the UNet's latents
    with pytest.raises(click.ClickException, match=r"unet\.pt was made with .* vae [0-9a-f]{16}, not "):
        trained(tmp_path / "a", [9], monkeypatch, stage="unet")
    with pytest.raises(click.ClickException, match=r"was trained with another VAE \([0-9a-f]{16}\)"):
        script.export.callback(state=tmp_path / "a", latents="8x8x8", to=tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_an_unet_needs_a_vae_of_the_same_latents(tmp_path, monkeypatch):
    with pytest.raises(
        click.ClickException, match=r"vae\.safetensors does not exist: run `vae` with this --state first"
    ):
        script.load_vae(tmp_path, "8x8x8")
    trained(tmp_path, [2], monkeypatch)
    with pytest.raises(click.ClickException, match="has latents 8x8x8, not 32x4x4: give --latents 8x8x8"):
        script.load_vae(tmp_path, "32x4x4")


def test_latents_are_white_and_pictures_as_before(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "draw", mixture.draw)
    trained(tmp_path, [8], monkeypatch)
    raw, white = script.new_vae("8x8x8").eval(), script.load_vae(tmp_path, "8x8x8")
    raw.load_state_dict(torch.load(tmp_path / "vae.pt", weights_only=True)["ema"])
    images = mixture.draw(256, torch.Generator().manual_seed(5), mixture.UNET_SHARES).images
    with torch.no_grad():
        posterior, before = (model.encode(images).latent_dist for model in (white, raw))
        decoded, decoded_before = white.decode(posterior.mean).sample, raw.decode(before.mean).sample
    assert (decoded - decoded_before).abs().mean() < 2e-3  # in half precision
    rows = posterior.mean.movedim(1, -1).reshape(-1, 8)
    assert rows.mean(0).abs().max() < 0.2 and (torch.cov(rows.T) - torch.eye(8)).abs().max() < 0.25
    # The posterior's noise costs a picture as much as it did.
    noise = torch.randn(before.mean.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        errors = [(model.decode(p.mean + p.std * noise).sample - decoded).abs().mean().item()
                  for model, p in ((white, posterior), (raw, before))]  # fmt: skip
    assert errors[0] == pytest.approx(errors[1], rel=0.3) and white.config.scaling_factor == 1


def test_quality_is_a_distance_between_pictures(tmp_path, monkeypatch, capsys):
    one, other = (torch.randn(4000, 6, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert (
        script.frechet_distance(one, one) == pytest.approx(0, abs=1e-6) and script.frechet_distance(one, other) < 0.02
    )
    assert script.frechet_distance(one, other + 2) == pytest.approx(6 * 4, rel=0.05)  # the means' distance
    assert script.frechet_distance(one, other * 3) == pytest.approx(6 * (3 - 1) ** 2, rel=0.1)  # of the deviations

    trained(tmp_path, [2], monkeypatch)
    trained(tmp_path, [2], monkeypatch, stage="unet")
    monkeypatch.setattr(script, "draw", mixture.draw)
    monkeypatch.setattr(script, "generate", lambda vae, both, shown, *given: shown.images)  # draws what it is told
    script.quality.callback(tmp_path, "8x8x8", num_inference_steps=2, guidance_scale=1.0, images=64)
    said = re.fullmatch(
        r"distance ([0-9.]+) \(floor ([0-9.]+)\), difference ([0-9.]+) of 255\n", capsys.readouterr().out
    )
    assert said[1] == said[2] and float(said[3]) == 0
    monkeypatch.setattr(script, "generate", lambda vae, both, shown, *given: torch.ones_like(shown.images))
    script.quality.callback(tmp_path, "8x8x8", num_inference_steps=2, guidance_scale=1.0, images=64)
    said = re.match(r"distance ([0-9.]+) \(floor ([0-9.]+)\), difference ([0-9.]+)", capsys.readouterr().out)
    assert float(said[1]) > 3 * float(said[2]) and float(said[3]) > 50


def test_averaged_weights_are_what_another_training_begins_with(tmp_path, monkeypatch):
    trained(tmp_path / "a", [4], monkeypatch)
    average = trained(tmp_path / "a", [4], monkeypatch, stage="unet")["ema"]
    (tmp_path / "b").mkdir()
    for stage in ("vae", "unet"):
        shutil.copy(tmp_path / "a" / f"{stage}.safetensors", tmp_path / "b")
    first = trained(tmp_path / "b", [1], monkeypatch, stage="unet")  # a step at a hundredth of the rate
    change = max((first["module"][name] - average[name].half().float()).abs().max().item() for name in average)
    assert 0 < change < 3e-5 and first["step"] == 1 and not (tmp_path / "b" / "vae.pt").exists()


@pytest.mark.parametrize("latents", ["8x8x8", "32x4x4"])
def test_an_exported_model_is_a_base_model_and_its_errors_are_told(tmp_path, monkeypatch, settings, latents):
    runner = CliRunner(catch_exceptions=False)
    for stage in ("vae", "unet"):
        options = [stage, "--state", str(tmp_path), "--latents", latents, "--steps", "2", "--batch-size", "4"]
        assert runner.invoke(script.cli, options).exit_code == 0
    options = ["export", "--state", str(tmp_path), "--latents", latents, "--to", str(tmp_path / "base")]
    assert runner.invoke(script.cli, options).exit_code == 0
    base = load_base_model(dataclasses.replace(settings, base_model=str(tmp_path / "base"), base_image_size=32))
    channels, size, _ = (int(number) for number in latents.split("x"))
    assert (base.tokens, base.width, base.latent_channels, 32 // base.vae_scale) == (8, 64, channels, size)
    assert base.vae_config["scaling_factor"] == 1
    average = torch.load(tmp_path / "unet.pt", weights_only=True)["ema"]
    for name, value in base.unet.state_dict().items():  # the average, in half precision
        assert torch.equal(value, average[f"unet.{name}"].half().float()), name
    average, _ = script.load_average(tmp_path, "vae")  # with white latents
    assert all(torch.equal(value, average[name]) for name, value in base.vae.state_dict().items())
    with Image.open(tmp_path / "base" / "samples.png") as samples:
        assert samples.size == (24 * 64, 10 * 64)

    grey = np.full((5, 28, 28), 128, np.uint8)
    np.savez(tmp_path / "grey.npz", train_images=grey)
    result = runner.invoke(script.cli, ["errors", "--state", str(tmp_path), "--latents", latents,
                                        str(tmp_path / "grey.npz")])  # fmt: skip
    images = torch.full((1, 3, 32, 32), 128 / 127.5 - 1)
    vae = script.load_vae(tmp_path, latents)
    decoded = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
    error = (decoded - images).abs().mean().item() * 127.5
    assert f"grey.npz: {error:.2f} of 255" in result.output and "mixture: " in result.output


@KINDS
def test_pictures_of_each_kind_vary_repeat_and_stay_in_range(painter):
    first, again = (mixture.painted(painter, drawing.Dice(torch.Generator().manual_seed(0)), 48) for _ in range(2))
    assert first.images.shape == (48, 3, 32, 32) and first.images.min() >= -1 and first.images.max() <= 1
    assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in first.__dataclass_fields__)
    assert first.images.flatten(1).std(1).min() > 0.01  # none is one flat colour
    assert first.images.std(0).mean() > 0.15  # and they differ from each other
    assert set(mixture.kind_of(first.subject).tolist()) == {mixture.PAINTERS.index(painter)}
    for numbers, width in ((first.colours, 9), (first.geometry, 6), (first.rendering, 10)):
        assert numbers.shape == (48, width) and numbers.abs().max() <= 1.2 + 1e-5  # a glyph's blur, in pixels
    drawn = painter(drawing.Dice(torch.Generator().manual_seed(0)), 48)  # before a camera cuts the range
    assert drawn.images.min() >= -1e-5 and drawn.images.max() <= 1 + 1e-5


def test_the_mixture_has_every_kind_in_its_share():
    batch = mixture.draw(4000, torch.Generator().manual_seed(0), mixture.UNET_SHARES)
    kind = mixture.kind_of(batch.subject)
    shares = torch.bincount(kind, minlength=len(mixture.PAINTERS)) / len(batch)
    assert torch.allclose(shares, torch.tensor(mixture.UNET_SHARES), atol=0.03)
    assert abs(kind[:1000].float().mean() - kind[3000:].float().mean()) < 0.4  # in random order
    assert batch.subject.max() < len(mixture.subjects()) and batch.variant.max() < len(mixture.variants())
    characters = batch.subject[kind == 0]
    assert 0.4 < (characters < 10).float().mean() < 0.6


class Other(drawing.Dice):
    """The same dice, but for one told number, `factor` times itself: column `column` of the `call`th table of them."""

    def __init__(self, call, column, factor):
        super().__init__(torch.Generator().manual_seed(0))
        self.call, self.column, self.factor, self.width = call, column, factor, None

    def uniform(self, *shape, low=0.0, high=1.0):
        values = super().uniform(*shape, low=low, high=high)
        if (low, high) == (-1, 1) and len(shape) == 2:  # geometry, then rendering
            if self.call == 0:
                self.width = shape[1]
                values[:, self.column : self.column + 1] *= self.factor
            self.call -= 1
        return values


def told_and_shown(one, other):
    """Of two batches: which pictures are told differently, and which are different."""
    told = torch.zeros(len(one.images), dtype=torch.bool)
    for name in ("colours", "geometry", "rendering"):
        told |= (getattr(one, name) != getattr(other, name)).flatten(1).any(1)
    return told, (one.images - other.images).abs().amax((1, 2, 3)) > 1 / 255


@pytest.mark.parametrize("factor", [-1, 0.3])
@KINDS
def test_every_told_number_shows_and_no_other(painter, factor):
    """Of geometry and rendering; for characters' rendering see the next test, photographs have none."""
    one, tables = painter(drawing.Dice(torch.Generator().manual_seed(0)), 96), 0
    for call in range(2):
        width = column = 0
        while column <= width:
            dice = Other(call, column, factor)
            other = painter(dice, 96)
            if dice.width is None:
                break
            tables, width = tables + (column == 0), dice.width - 1
            told, shown = told_and_shown(one, other)
            assert not (shown & ~told).any(), (call, column)
            # A yes or no is told as 1 or -1; other things may hide behind what they surround.
            assert told.any() or factor > 0
            assert not told.any() or shown[told].float().mean() > 0.75, (call, column)
            column += 1
    assert tables == (1 if painter in (glyphs.glyphs, photographs.crops) else 2)


def test_a_glyphs_rendering_shows():
    """Stroke: how much ink; blur and resolution: how soft its edges are."""
    shown = glyphs.glyphs(drawing.Dice(torch.Generator().manual_seed(0)), 2000)
    paper, ink = (shown.colours[:, i, :, None, None] for i in (0, 1))
    cover = ((shown.images - paper) * (ink - paper)).sum(1) / (ink - paper).square().sum(1)
    edges = (cover[:, :, 1:] - cover[:, :, :-1]).abs().amax((1, 2))
    for told, shows, sign in ((0, cover.mean((1, 2)), 1), (1, edges, -1), (2, edges, 1)):
        assert sign * torch.corrcoef(torch.stack([shown.rendering[:, told], shows]))[0, 1] > 0.2, told
    assert not shown.rendering[:, 3:].any()


def test_a_camera_shows_what_it_tells(monkeypatch):
    images = torch.rand(4000, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    seen, strength = mixture.through_a_camera(drawing.Dice(torch.Generator().manual_seed(0)), images, plain=0.3)
    untouched = (strength == 0).all(1)
    assert untouched.float().mean().item() == pytest.approx(0.3, abs=0.03)
    torch.testing.assert_close(seen[untouched], images[untouched])
    assert (seen[~untouched] - images[~untouched]).abs().amax((1, 2, 3)).min() > 1e-4
    for number in range(4):  # each of them alone
        uniform = drawing.Dice.uniform

        def alone(dice, *shape, number=number, uniform=uniform, **given):
            values = uniform(dice, *shape, **given)
            if shape == (200, 4):
                values *= F.one_hot(torch.tensor(number), 4)
            return values

        monkeypatch.setattr(drawing.Dice, "uniform", alone)
        dice = drawing.Dice(torch.Generator().manual_seed(0))
        seen, strength = mixture.through_a_camera(dice, images[:200], plain=0.0)
        assert (strength > 0).any(0).tolist() == [index == number for index in range(4)]
        change = (seen - images[:200]).abs().mean((1, 2, 3))
        assert torch.corrcoef(torch.stack([strength[:, number], change]))[0, 1] > 0.6, number
        monkeypatch.undo()


@pytest.mark.parametrize("colour", range(3))
@pytest.mark.parametrize("painter", mixture.PAINTERS[1:-1], ids=mixture.KINDS[1:-1])
def test_every_told_colour_shows_and_no_other(painter, colour, monkeypatch):
    one = painter(drawing.Dice(torch.Generator().manual_seed(0)), 64)

    def palettes(*given, **named):
        colours = drawing.palettes(*given, **named)
        colours[:, colour] = (colours[:, colour] + 0.4) % 1.0
        return colours

    for module in (cells, surfaces):
        monkeypatch.setattr(module, "palettes", palettes)
    told, shown = told_and_shown(one, painter(drawing.Dice(torch.Generator().manual_seed(0)), 64))
    assert not (shown & ~told).any() and (not told.any() or shown[told].float().mean() > 0.85)
    assert told.any() or (colour == 2 and painter in (surfaces.stripes, surfaces.textures))  # two colours only


def test_glyphs_and_photographs_are_told_their_own_colours():
    shown = glyphs.glyphs(drawing.Dice(torch.Generator().manual_seed(0)), 64)
    corner = shown.images[:, :, :2, :2].mean((2, 3))
    to_paper, to_ink = ((corner - shown.colours[:, i]).abs().mean(1) for i in (0, 1))
    assert to_paper.median() < 0.01 < to_ink.median() and (to_paper < to_ink).float().mean() > 0.9
    farthest = (shown.images - shown.colours[:, 0, :, None, None]).abs().sum(1).flatten(1).argmax(1)
    inked = shown.images.flatten(2)[torch.arange(64), :, farthest]
    assert (inked - shown.colours[:, 1]).abs().mean(1).median() < 0.02
    assert torch.equal(shown.colours[:, 2], shown.colours[:, 1])

    shown = photographs.crops(drawing.Dice(torch.Generator().manual_seed(0)), 64)
    border = torch.ones(64, 64, dtype=torch.bool)
    border[16:-16, 16:-16] = False
    assert torch.allclose(shown.images[:, :, border].mean(2), shown.colours[:, 0], atol=1e-4)
    assert torch.allclose(shown.images[:, :, ~border].mean(2), shown.colours[:, 1], atol=1e-4)
    for image, colours in zip(shown.images, shown.colours, strict=True):
        brightness = image.mean(0)
        bright = brightness >= brightness.flatten().sort(descending=True).values[64 * 64 // 5 - 1]
        assert torch.allclose(image[:, bright].mean(1), colours[2], atol=0.02)


def test_a_cell_without_lobes_has_no_nucleus_and_a_nucleus_stays_in_its_cell(monkeypatch):
    shown = mixture.cells(drawing.Dice(torch.Generator().manual_seed(0)), 400)
    middle = shown.images[:, :, 30:34, 30:34].mean((2, 3))
    to_accent, to_ink = ((middle - shown.colours[:, i]).abs().mean(1) for i in (2, 1))
    without = torch.tensor([variant == "0 lobes" for variant in shown.variant])
    single = torch.tensor([variant == "1 lobes" for variant in shown.variant])
    assert (to_ink < to_accent)[without].float().mean() > 0.8 and (to_accent < to_ink)[single].float().mean() > 0.8
    assert (shown.colours[:, 2] - shown.colours[:, 1]).abs().mean(1).min() >= 0.08 - 1e-6

    covers = []  # of what is painted last: the body, then the nucleus
    paint = drawing.paint
    monkeypatch.setattr(
        cells, "paint", lambda images, colour, cover: covers.append(cover) or paint(images, colour, cover)
    )
    mixture.cells(drawing.Dice(torch.Generator().manual_seed(0)), 400)
    assert (covers[-1] <= covers[-2] + 1e-6).all() and covers[-1][single].amax((1, 2, 3)).median() > 0.9


def test_the_card_has_the_mixtures_shares():
    card = CARD.read_text()
    shares = [[int(cell.strip(" %")) for cell in line.split("|")[2:4]] for line in card.splitlines() if "% |" in line]
    assert shares == [[round(100 * share) for share in both]
                      for both in zip(mixture.VAE_SHARES, mixture.UNET_SHARES, strict=True)]  # fmt: skip


def test_a_vae_begins_with_all_its_channels():
    vae = script.new_vae("8x8x8")
    images = mixture.draw(64, torch.Generator().manual_seed(0), mixture.VAE_SHARES).images
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
    assert torch.allclose(posterior.logvar, torch.full_like(posterior.logvar, -4))
    spread = torch.linalg.eigvalsh(torch.cov(posterior.mean.permute(1, 0, 2, 3).flatten(1)))
    assert spread[0] > 0.005 * spread[-1]
    assert not any(m.conv2.weight.any() for m in vae.modules() if hasattr(m, "conv2"))


def test_photographs_are_none_of_a_data_set_that_is_scored():
    names, pictures = photographs.photographs()
    assert len(names) == len(pictures) == 13 and not {"retina", "immunohistochemistry", "microaneurysms"} & set(names)
    assert all(picture.shape[0] == 3 and picture.min() >= 0 and picture.max() <= 1 for picture in pictures)
    card = CARD.read_text()
    assert all(f"`{name}`" in card for name in names)


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

    def tokens_that_change(**others):
        changed = encoder(dataclasses.replace(shown, **others), torch.ones(8, 8)) - full
        return set((changed.abs().amax((0, 2)) > 0).nonzero().flatten().tolist())

    assert tokens_that_change(subject=shown.subject.flip(0)) == {0, 1, 6, 7}
    assert tokens_that_change(variant=shown.variant.flip(0)) == {2}
    for token in range(3):
        colours = shown.colours.clone()
        colours[:, token * 3] += 0.1
        assert tokens_that_change(colours=colours) == {3 + token}
    assert tokens_that_change(geometry=shown.geometry.flip(0)) == {6}
    assert tokens_that_change(rendering=shown.rendering.flip(0)) == {7}
    keep = script.keep_tokens(20000, torch.Generator().manual_seed(0))
    expected = 1 - (1 - script.CONDITION_DROPOUT) * (1 - torch.tensor(script.TOKEN_DROPOUT))
    assert torch.allclose(1 - keep.mean(0), expected, atol=0.02)


def test_names_are_counted_once():
    for names in (mixture.subjects(), mixture.variants()):
        assert sorted(names.values()) == list(range(len(names)))
    assert len(mixture.subjects()) == 62 + 8 and len(mixture.KINDS) == len(mixture.PAINTERS) == 9
    assert sum(mixture.VAE_SHARES) == pytest.approx(1) and sum(mixture.UNET_SHARES) == pytest.approx(1)


def test_the_conditions_gradient_is_the_same_with_two_threads():
    shown = mixture.draw(64, torch.Generator().manual_seed(0), mixture.UNET_SHARES)
    encoder, gradients = script.ThrowawayTextEncoder(), []
    torch.set_num_threads(2)
    for _ in range(20):
        encoder.zero_grad()
        encoder(shown, torch.ones(64, 8)).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in encoder.parameters()]))
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_blur_keeps_the_mean_and_zero_keeps_the_image(sigma):
    image = torch.zeros(1, 1, 17, 17)
    image[0, 0, 8, 8] = 1
    blurred = drawing.gaussian_blur(image, torch.tensor([sigma]))
    assert blurred.sum().item() == pytest.approx(1, abs=1e-4)
    assert torch.equal(blurred, image) == (sigma == 0)
    flat = drawing.gaussian_blur(torch.full((2, 3, 9, 9), 0.5), torch.tensor([sigma, 1.2]))
    assert torch.allclose(flat, torch.full_like(flat, 0.5), atol=1e-5)  # no dark border
