"""The training loop: the right part, the right target, and the same bytes after an interruption."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import shut_to_this_process
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from sdlab import latents
from sdlab.base_models import load_base_model
from sdlab.class_encoder import ClassEncoder, ClassTable
from sdlab.data.pixels import to_model
from sdlab.errors import BadInput
from sdlab.latents import Moments, encode_images
from sdlab.runs import trainings
from sdlab.runs.checkpoints import half_precision_copy, load_checkpoint, save_checkpoint
from sdlab.runs.experiment import Experiment
from sdlab.runs.resume_states import TrainingPosition
from sdlab.runs.trainings import TrainingPlan, cosine
from sdlab.training import fine_tune_unet, predict, prediction_target, train


class Killed(Exception):
    pass


class DiesAt:
    """A progress bar that ends the process, as it were, at one optimiser step."""

    def __init__(self, step):
        self.left = step

    def __call__(self, **_):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self, _=1):
        self.left -= 1
        if self.left == 0:
            raise Killed


class Counts(DiesAt):
    """A progress bar that says how many steps were made."""

    def __init__(self):
        super().__init__(math.inf)
        self.made = 0

    def update(self, n=1):
        self.made += n


def new_encoder(base):
    torch.manual_seed(3)
    return ClassEncoder(3, base.tokens, base.width, hidden=16)


def plan(part="class_encoder", epochs=3, **more):
    given = dict(
        part=part, epochs=epochs, batch_size=20, learning_rate=1e-3, weight_decay=4e-3, max_grad_norm=10.0, seed=5
    )
    return TrainingPlan(**given | more)


@pytest.fixture
def moments(base):
    generator = torch.Generator().manual_seed(0)
    return Moments(torch.randn(48, 4, 4, 4, generator=generator), torch.full((48, 4, 4, 4), 0.1), 0.5)


def fit(base, moments, folder, the_plan, **more):
    encoder = new_encoder(base)
    history = list(train(the_plan, base, encoder, moments, np.arange(48) % 3, folder, **more))
    return encoder, history


def files(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.suffix in (".safetensors",) or p.name == "config.json"
    }


@pytest.mark.parametrize("part", ["class_encoder", "unet"])
@pytest.mark.parametrize("step", [1, 3, 4, 8])
@pytest.mark.parametrize("resume_seconds", [0.0, math.inf], ids=["a state a step", "a state an epoch"])
def test_same_bytes_after_a_kill(settings, moments, tmp_path, part, step, resume_seconds):
    """Killed in any epoch, at its start, middle or end: checkpoints, resume state and losses end up byte for byte the same."""
    _, uncut = fit(load_base_model(settings), moments, tmp_path / "whole", plan(part))
    with pytest.raises(Killed):
        fit(
            load_base_model(settings), moments, tmp_path / "cut", plan(part),
            progress=DiesAt(step), resume_seconds=resume_seconds,
        )  # fmt: skip
    bar = Counts()
    _, history = fit(load_base_model(settings), moments, tmp_path / "cut", plan(part), progress=bar)
    assert bar.made == 9 - (
        step - (step % 3 or 3) if resume_seconds else (step - 1)
    )  # steps made again: of an epoch, or one
    whole, cut = files(tmp_path / "whole"), files(tmp_path / "cut")
    assert len(whole) == 3 * 2 + 1 and whole == cut
    assert [(e.epoch, e.loss) for e in history] == [(e.epoch, e.loss) for e in uncut]


def test_a_state_inside_an_epoch_can_be_cut_again(settings, moments, tmp_path):
    """Killed after each step, and gone on with: as one that was never killed."""
    fit(load_base_model(settings), moments, tmp_path / "whole", plan("unet"))
    for _ in range(8):
        with pytest.raises(Killed):
            fit(
                load_base_model(settings),
                moments,
                tmp_path / "cut",
                plan("unet"),
                progress=DiesAt(2),
                resume_seconds=0.0,
            )
    fit(load_base_model(settings), moments, tmp_path / "cut", plan("unet"))
    assert files(tmp_path / "whole") == files(tmp_path / "cut")


@pytest.mark.parametrize("resume_seconds", [0.0, math.inf])
@pytest.mark.parametrize("before", ["save_checkpoint", "write_json", "save_resume_state"])
def test_killed_before_its_last_checkpoint_history_or_state(
    settings, moments, tmp_path, monkeypatch, before, resume_seconds
):
    """The last epoch's three writes: between any two of them, what is missing is made, the state of the end too."""
    _, uncut = fit(load_base_model(settings), moments, tmp_path / "whole", plan())
    original, calls = getattr(trainings, before), []

    def dies_at_the_last(*arguments):
        calls.append(arguments)
        at = next((a for a in arguments if isinstance(a, TrainingPosition)), None)
        if at == TrainingPosition(3) or (at is None and len(calls) == 3):
            raise Killed
        return original(*arguments)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(trainings, before, dies_at_the_last)
        fit(load_base_model(settings), moments, tmp_path / "cut", plan(), resume_seconds=resume_seconds)
    _, history = fit(load_base_model(settings), moments, tmp_path / "cut", plan())
    assert files(tmp_path / "whole") == files(tmp_path / "cut")
    assert [(e.epoch, e.loss) for e in history] == [(e.epoch, e.loss) for e in uncut]


@pytest.mark.parametrize("part", ["class_encoder", "unet"])
def test_two_threads_repeat_the_same_bytes(settings, moments, tmp_path, part):
    """Not only one thread does: whatever adds in an order of its own would show here."""
    torch.set_num_threads(2)
    try:
        for name in ("a", "b", "c"):
            fit(load_base_model(settings), moments, tmp_path / name, plan(part))
    finally:
        torch.set_num_threads(1)
    assert files(tmp_path / "a") == files(tmp_path / "b") == files(tmp_path / "c")


def test_fine_tuning_leaves_the_base_model_as_it_is(settings, base, data):
    """A notebook's cell can be interrupted and run again: it starts from the base model, not from what it left of it."""
    run = Experiment(dataclasses.replace(settings, unet_epochs=1), data, base)
    run.progress = DiesAt(1)
    save_checkpoint(new_encoder(base), run.folder / "class_encoder" / "epoch_01")
    before = {k: v.clone() for k, v in base.unet.state_dict().items()}
    moments = Moments(torch.randn(48, 4, 4, 4), torch.full((48, 4, 4, 4), 0.1), 0.5)
    with pytest.raises(Killed):
        list(fine_tune_unet(run, moments, 1))
    assert all(torch.equal(v, before[k]) for k, v in base.unet.state_dict().items())


@pytest.mark.parametrize("part", ["class_encoder", "unet"])
def test_only_the_part_is_trained(base, moments, tmp_path, part):
    before = {k: v.clone() for k, v in base.unet.state_dict().items()}
    untrained = new_encoder(base).state_dict()
    encoder, _ = fit(base, moments, tmp_path, plan(part, epochs=1))
    unet_moved = any(not torch.equal(v, before[k]) for k, v in base.unet.state_dict().items())
    encoder_moved = any(not torch.equal(v, untrained[k]) for k, v in encoder.state_dict().items())
    assert (unet_moved, encoder_moved) == (part == "unet", part == "class_encoder")


def test_training_lowers_the_loss(base, tmp_path):
    """Latents that depend on the class: a conditioning exists that helps, and is found."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(3, 4, 4, 4, generator=generator) * 2
    moments = Moments(means[torch.arange(48) % 3], torch.full((48, 4, 4, 4), 0.01), 0.5)
    _, history = fit(base, moments, tmp_path, plan("unet", epochs=25, learning_rate=3e-3))
    assert np.mean([h.loss for h in history[-5:]]) < 0.8 * history[0].loss


def test_only_the_last_epochs_are_kept(settings, moments, tmp_path):
    """The same weights as if all were, also after a kill; and a finished training is read again."""
    few = plan("unet", first_kept=2)
    _, uncut = fit(load_base_model(settings), moments, tmp_path / "all", plan("unet"))
    with pytest.raises(Killed):
        fit(load_base_model(settings), moments, tmp_path / "few", few, progress=DiesAt(5))
    fit(load_base_model(settings), moments, tmp_path / "few", few)
    _, history = fit(load_base_model(settings), moments, tmp_path / "few", few, progress=None)
    assert [epoch.loss for epoch in history] == [epoch.loss for epoch in uncut]
    everything, kept = files(tmp_path / "all"), files(tmp_path / "few")
    assert sorted({name.partition("/")[0] for name in kept}) == ["epoch_02", "epoch_03", "resume.safetensors"]
    assert all(content == everything[name] for name, content in kept.items() if name.startswith("epoch"))
    with pytest.raises(BadInput, match="another plan"):
        fit(load_base_model(settings), moments, tmp_path / "few", plan("unet"))


def test_a_finished_training_is_loaded_not_repeated(base, moments, tmp_path):
    _, history = fit(base, moments, tmp_path, plan(epochs=1))
    _, again = fit(base, moments, tmp_path, plan(epochs=1), progress=None)  # would fail if it trained
    assert history == again


@pytest.mark.parametrize("more", [dict(learning_rate=2e-3), dict(seed=6), dict(epochs=4)])
def test_another_plan_in_the_same_folder_is_refused(base, moments, tmp_path, more):
    fit(base, moments, tmp_path, plan(epochs=1))
    before = files(tmp_path)
    with pytest.raises(BadInput, match="another plan or other inputs"):
        fit(base, moments, tmp_path, plan(**{"epochs": 1} | more))
    assert files(tmp_path) == before


def test_a_loss_that_is_not_finite_stops_with_the_step(base, moments, tmp_path):
    moments.mean[7] = math.inf
    with pytest.raises(
        BadInput,
        match=r"became nan at epoch 1, step \d of 3 \(training images \d+, .*class_encoder_learning_rate 0.001",
    ):
        fit(base, moments, tmp_path, plan())


@pytest.mark.parametrize(("part", "epoch"), [("class_encoder", 1), ("unet", 2)])
def test_a_gradient_that_is_not_finite_stops_before_anything_is_written(
    base, moments, tmp_path, monkeypatch, part, epoch
):
    """In the last step of an epoch no later loss would show it: neither its checkpoint nor a state holds such weights."""
    steps, clip = [], torch.nn.utils.clip_grad_norm_

    def breaks(parameters, most):
        parameters = list(parameters)
        steps.append(1)
        if len(steps) == 3 * epoch:
            parameters[0].grad[0] = math.inf
        return clip(parameters, most)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", breaks)
    monkeypatch.setattr(trainings, "SECONDS_BETWEEN_CHECKS", math.inf)
    with pytest.raises(BadInput, match=rf"The gradient of {part} became inf at epoch {epoch}, step 3 of 3 "):
        fit(base, moments, tmp_path, plan(part), resume_seconds=0.0)
    kept = [load_file(path) for path in tmp_path.rglob("*.safetensors")]
    assert len(kept) == epoch and all(tensor.isfinite().all() for state in kept for tensor in state.values())
    assert len(list(tmp_path.glob("epoch_*"))) == epoch - 1


def test_the_first_step_that_is_not_finite_is_named_whenever_it_is_looked_for(base, moments, tmp_path, monkeypatch):
    said = []
    for seconds in (0.0, math.inf):  # after each step; before the first write
        monkeypatch.setattr(trainings, "SECONDS_BETWEEN_CHECKS", seconds)
        moments.mean[7] = math.inf
        with pytest.raises(BadInput, match="became nan at epoch 1") as error:
            fit(base, moments, tmp_path / "same", plan())
        said.append(str(error.value))
    assert said[0] == said[1] and not list(tmp_path.rglob("*.safetensors"))


def damaged(path, how):
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "altered":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["truncated", "altered", "missing"])
def test_a_damaged_checkpoint_is_refused_by_name(base, moments, tmp_path, how):
    """Never random weights instead."""
    fit(base, moments, tmp_path, plan(epochs=2))
    damaged(tmp_path / "epoch_02" / "diffusion_pytorch_model.safetensors", how)
    with pytest.raises(BadInput, match=r"epoch_02 is damaged: diffusion_pytorch_model.safetensors is"):
        load_checkpoint(ClassTable, tmp_path, 2)
    assert load_checkpoint(ClassTable, tmp_path, 1).config.num_classes == 3


def test_a_damaged_checkpoint_is_neither_kept_nor_written_over(base, moments, tmp_path):
    """Without a resume state all epochs are trained again; the damaged one may not pass for one of them."""
    fit(base, moments, tmp_path, plan(epochs=2))
    weights = tmp_path / "epoch_01" / "diffusion_pytorch_model.safetensors"
    damaged(weights, "truncated")
    (tmp_path / "resume.safetensors").unlink()
    before = weights.read_bytes()
    with pytest.raises(BadInput, match="epoch_01 is damaged: move the folder"):
        fit(base, moments, tmp_path, plan(epochs=2))
    assert weights.read_bytes() == before


@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epoch_beyond_the_checkpoints_is_refused(base, moments, tmp_path, epoch):
    fit(base, moments, tmp_path, plan(epochs=2))
    with pytest.raises(BadInput, match=f"no checkpoint of epoch {epoch} in .*which has epochs 1 to 2"):
        load_checkpoint(ClassTable, tmp_path, epoch)


@pytest.mark.parametrize("how", ["truncated", "altered"])
def test_a_damaged_resume_state_is_refused(base, moments, tmp_path, how):
    """One bit is enough: the state carries a hash of itself."""
    with pytest.raises(Killed):
        fit(base, moments, tmp_path, plan(), progress=DiesAt(5))
    damaged(tmp_path / "resume.safetensors", how)
    with pytest.raises(BadInput, match=r"resume\.safetensors is damaged"):
        fit(base, moments, tmp_path, plan())


@pytest.mark.parametrize("name", ["resume.safetensors", "epoch_01/diffusion_pytorch_model.safetensors", "history.json"])
def test_what_may_not_be_read_is_not_called_damaged(base, moments, tmp_path, name):
    """What is damaged is to be moved away, which here would cost the training."""
    with pytest.raises(Killed):
        fit(base, moments, tmp_path, plan(), progress=DiesAt(5))
    with (
        shut_to_this_process(tmp_path / name),
        pytest.raises(BadInput, match=rf"{name} cannot be read \(Permission denied\): mend that, and give the same"),
    ):
        fit(base, moments, tmp_path, plan())
        load_checkpoint(ClassTable, tmp_path, 1)


def test_a_finished_training_without_its_history_is_refused_and_keeps_its_files(base, moments, tmp_path):
    fit(base, moments, tmp_path, plan(epochs=2))
    (tmp_path / "history.json").unlink()
    kept = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    with pytest.raises(BadInput, match=r"history\.json has 0 of the 2 epochs .*: put a copy of it back, or move"):
        fit(base, moments, tmp_path, plan(epochs=2))
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == kept


def test_a_class_encoders_checkpoint_is_its_table(base, moments, tmp_path):
    encoder, _ = fit(base, moments, tmp_path, plan(epochs=2))
    table = load_checkpoint(ClassTable, tmp_path, 2)
    assert torch.equal(table.table(), encoder.table()) and table.table().dtype == torch.float32


def test_a_unets_checkpoint_is_its_half_precision_and_the_resume_state_its_full_one(base, moments, tmp_path):
    fit(base, moments, tmp_path, plan("unet", epochs=2))
    kept = load_file(tmp_path / "epoch_02" / "diffusion_pytorch_model.safetensors")
    full, trained = load_file(tmp_path / "resume.safetensors"), base.unet.state_dict()
    assert kept.keys() == trained.keys()
    assert all(torch.equal(kept[name], value.half()) for name, value in trained.items())
    assert all(torch.equal(full[f"model.{name}"], value) for name, value in trained.items())
    assert str(base.folder) in str(base.unet.config["_name_or_path"])
    assert str(base.folder) not in (tmp_path / "epoch_02" / "config.json").read_text()  # the same bytes elsewhere
    again = load_checkpoint(UNet2DConditionModel, tmp_path, 2)
    assert all(torch.equal(value, kept[name].float()) for name, value in again.state_dict().items())


def test_weights_beyond_half_precision_are_refused(base):
    with torch.no_grad():
        base.unet.conv_in.weight[0, 0, 0, 0] = 1e5
    with pytest.raises(BadInput, match=r"conv_in.weight are beyond the range of float16"):
        half_precision_copy(base.unet)


@pytest.mark.parametrize("part", ["class_encoder", "unet"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_trains_float32_weights_and_resumes_to_the_same_bytes(
    settings, moments, tmp_path, part, precision
):
    """As on a GPU: the frozen UNet's weights in half precision, those that are trained in float32; a scaler for float16."""
    half = dataclasses.replace(settings, precision=precision)

    def started(folder, **more):
        base = load_base_model(half)
        if part == "unet":
            base = base.with_trainable_unet()
        return fit(base, moments, folder, plan(part), **more)

    _, history = started(tmp_path / "whole")
    with pytest.raises(Killed):
        started(tmp_path / "cut", progress=DiesAt(5))
    started(tmp_path / "cut")
    assert files(tmp_path / "whole") == files(tmp_path / "cut")
    kept = load_file(tmp_path / "whole" / "resume.safetensors")
    assert {v.dtype for v in kept.values()} == {torch.float32}
    _, exact = fit(load_base_model(settings), moments, tmp_path / "float32", plan(part))
    assert history[-1].loss == pytest.approx(exact[-1].loss, rel=0.02) and history != exact


def test_epsilon_and_v_targets(settings, v_base_folder):
    """v = sqrt(a) noise - sqrt(1 - a) x_0 (Salimans and Ho 2022), by hand; epsilon is the noise itself."""
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 6, 4, 4, 4, generator=generator)
    timesteps = torch.tensor([0, 10, 300, 500, 900, 999])
    for folder in (settings.base_model, str(v_base_folder)):
        base = load_base_model(dataclasses.replace(settings, base_model=folder))
        states = new_encoder(base).table()[[0, 1, 2, 0, 1, 2]]
        scheduler = base.noise_scheduler()
        a = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        target = noise if base.prediction_type == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * latents
        with torch.no_grad():
            predicted = base.unet(a.sqrt() * latents + (1 - a).sqrt() * noise, timesteps, states).sample
            noisy_latents = scheduler.add_noise(latents, noise, timesteps)
            torch.testing.assert_close(predict(base, noisy_latents, timesteps, states), predicted)
        torch.testing.assert_close(prediction_target(base, scheduler, latents, noise, timesteps), target)
    assert base.prediction_type == "v_prediction"


def test_the_cosine_goes_from_one_to_zero():
    assert cosine(0, 100) == 1 and cosine(50, 100) == pytest.approx(0.5) and cosine(100, 100) == pytest.approx(0)


@pytest.mark.parametrize("tiny", [False, True])
def test_latents_are_encoded_once(settings, data, tmp_path, tiny):
    base = load_base_model(dataclasses.replace(settings, base_model="tiny") if tiny else settings)
    path = tmp_path / "train.npz"
    images = data.train.images
    first = encode_images(images.__getitem__, len(images), base, 16, path, "made from this")
    second = encode_images(None, len(images), base, 16, path, "made from this")  # would fail if it encoded
    assert torch.equal(first.mean, second.mean) and torch.equal(first.std, second.std)
    # Their layout in memory too: it chooses algorithms, and so the last bits of a training (tiny's VAE answers channels last).
    assert (first.mean.stride(), first.std.stride()) == (second.mean.stride(), second.std.stride())
    posterior = base.vae.encode(to_model(data.train.images, 16)).latent_dist
    torch.testing.assert_close(first.mean.float(), posterior.mean, atol=1e-4, rtol=1e-3)  # half precision
    torch.testing.assert_close(first.std.float(), posterior.std, atol=1e-4, rtol=1e-3)
    third = encode_images(images[::-1].__getitem__, len(images), base, 16, path, "made from something else")
    assert not torch.equal(first.mean, third.mean)


def test_latents_that_were_cut_go_on_after_their_last_part(base, data, tmp_path, monkeypatch):
    """The same bytes, no image of a finished part encoded again, and no part left."""
    monkeypatch.setattr(latents, "ENCODE_BATCH", 8)
    monkeypatch.setattr(latents, "PART", 16)
    asked, source = [], data.train.images

    def images(places):
        if places.start == 32 and asked.count(range(32, 40)) == 0:
            asked.append(places)
            raise KeyboardInterrupt
        asked.append(places)
        return source[places]

    whole = encode_images(source.__getitem__, len(source), base, 16, tmp_path / "whole" / "train.npz", "made from this")
    path = tmp_path / "cut" / "train.npz"
    with pytest.raises(KeyboardInterrupt):
        encode_images(images, len(source), base, 16, path, "made from this")
    assert [p.name for p in path.parent.iterdir()] == ["train.parts"] and len(asked) == 5
    cut = encode_images(images, len(source), base, 16, path, "made from this")
    assert asked[5:] == [range(32, 40), range(40, 48)]
    assert torch.equal(cut.mean, whole.mean) and torch.equal(cut.std, whole.std)
    assert path.read_bytes() == (tmp_path / "whole" / "train.npz").read_bytes()
    assert [p.name for p in path.parent.iterdir()] == ["train.npz"]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadInput, match=r"train\.npz cannot be read as npz .*: move it away and run its stage again"):
        encode_images(images, len(source), base, 16, path, "made from this")


def test_kept_moments_are_small(base, data, tmp_path):
    """4 bytes a latent number: 4 KiB an image at SD 2.0's 4 x 16 x 16 latents, so 205 MB for 50,000 images."""
    path, images = tmp_path / "train.npz", data.train.images
    moments = encode_images(images.__getitem__, len(images), base, 16, path, "made from this")
    held = sum(part.element_size() * part.numel() for part in (moments.mean, moments.std))
    assert held == 4 * moments.mean.numel() and path.stat().st_size < held + 2000
    assert 50_000 * 4 * (4 * 16 * 16) < 250e6
    assert moments.sample(torch.arange(3), torch.Generator()).dtype == torch.float32


def test_a_vae_that_answers_nonsense_is_refused(base, data, tmp_path):
    base.vae.quant_conv.bias.data[0] = float("nan")
    with pytest.raises(BadInput, match="not finite"):
        encode_images(data.train.images.__getitem__, 4, base, 16, tmp_path / "train.npz", "made from this")
    assert not list(tmp_path.glob("*train.npz*"))


def test_exhausted_memory_is_refused_and_names_the_setting(base, data, moments, tmp_path, monkeypatch):
    def no_room(*_, **__):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(type(base.unet), "forward", no_room)
    monkeypatch.setattr(type(base.vae), "encode", no_room)
    with pytest.raises(BadInput, match="does not hold 48 images of 16 px in the VAE: take a smaller `base_image_size`"):
        encode_images(data.train.images.__getitem__, 48, base, 16, tmp_path / "train.npz", "made from this")
    for part in ("class_encoder", "unet"):
        step = f"does not hold a training step of {part} with 20 images: take a smaller `micro_batch_size`"
        with pytest.raises(BadInput, match=step):
            fit(base, moments, tmp_path / part, plan(part))
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("*.npz"))


def test_sampled_latents_have_the_posteriors_moments_and_scale():
    moments = Moments(torch.full((2000, 1, 1, 1), 3.0), torch.full((2000, 1, 1, 1), 2.0), 0.5)
    sample = moments.sample(torch.arange(2000), torch.Generator().manual_seed(0))
    assert sample.mean().item() == pytest.approx(1.5, abs=0.1) and sample.std().item() == pytest.approx(1.0, abs=0.1)
