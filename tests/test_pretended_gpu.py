"""Sampler, latents, training and classifier on a pretended GPU: no mixed devices, and how often the host waits."""

import dataclasses

import pytest
import torch
from pretend_gpu import GPU, There, move, pretended_gpu, weights_behind
from test_training import new_encoder, plan

from sdlab import classifier
from sdlab.classifier import ClassifierRecipe, ResNet20, train_classifier
from sdlab.cluster.processes import OneProcess
from sdlab.diffusion_pipeline import ClassConditionalStableDiffusionPipeline
from sdlab.latents import Moments, encode_images
from sdlab.runs import trainings
from sdlab.sampling_config import prepare_unet
from sdlab.schedulers import make_scheduler
from sdlab.training import train

SCHEDULERS = (
    "DDIMScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)


@pytest.fixture
def gpu_base(base):
    """The base model of the tests with both parts there, frozen."""
    there = dataclasses.replace(base, device=GPU)
    there.__dict__.update(unet=move(base.unet), vae=move(base.vae))
    return there


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_sampler_never_waits_between_its_steps(settings, base, gpu_base, monkeypatch, scheduler):
    """As many reads for 5 steps as for 2: those of checking the labels."""
    table = new_encoder(base).tabulated().requires_grad_(False)

    def images(count, where):
        pipeline = ClassConditionalStableDiffusionPipeline(
            where.vae,
            prepare_unet(where.unet, table, settings),
            table,
            make_scheduler(scheduler, where.scheduler_config),
        )
        return pipeline([0, 1, 2, 0], count, 2.0, seeds=range(4), size=16, output_type="pt").images

    move(table)
    waits = {}
    for count in (2, 5):
        with pretended_gpu(monkeypatch) as reads:
            made = images(count, gpu_base)
        assert made.device == GPU and made.here.isfinite().all()
        waits[count] = sum(reads.values())
    assert waits[2] == waits[5] <= 3


def test_latents_are_read_back_twice_a_batch(data, base, gpu_base, tmp_path, monkeypatch):
    images = data.train.images
    with pretended_gpu(monkeypatch) as reads:
        there = encode_images(images.__getitem__, len(images), gpu_base, 16, tmp_path / "there.npz", "made from this")
    assert there.mean.device == GPU and sum(reads.values()) == 2  # mean and deviation of 48 images


@pytest.mark.parametrize("part", ["class_encoder", "unet"])
def test_training_waits_at_its_checks_and_writes_only(gpu_base, tmp_path, monkeypatch, part):
    """Two reads an epoch: of losses and norms together, and of their mean. None a step, in two parts a step."""
    monkeypatch.setattr(trainings, "SECONDS_BETWEEN_CHECKS", 1e9)
    encoder = move(new_encoder(gpu_base), trained=part == "class_encoder")
    move(gpu_base.unet, trained=part == "unet")
    draw = torch.Generator().manual_seed(0)
    moments = Moments(There(torch.randn(48, 4, 4, 4, generator=draw)), There(torch.full((48, 4, 4, 4), 0.1)), 0.5)
    with pretended_gpu(monkeypatch) as reads:
        history = list(
            train(
                plan(part, epochs=2), gpu_base, encoder, moments, torch.arange(48) % 3, tmp_path,
                processes=OneProcess(11),
            )
        )  # fmt: skip
    assert [record.train_steps for record in history] == [3, 3]
    in_loop = {at: n for at, n in reads.items() if at[1].startswith(("training.py", "latents.py", "trainings.py"))}
    assert sum(in_loop.values()) == 2 * len(history), in_loop
    written = {at: n for at, n in reads.items() if at not in in_loop}
    assert all(
        at[1].startswith(("checkpoints.py", "resume_states.py", "class_encoder.py", "processes.py")) for at in written
    ), written


def test_only_the_trained_part_is_behind_the_loss(gpu_base, monkeypatch):
    """What the pretended backward pass takes for granted."""
    encoder = move(new_encoder(gpu_base), trained=True)
    with pretended_gpu(monkeypatch):
        loss = encoder.table().sum()
    assert {id(w) for w in weights_behind(loss)} == {id(w) for w in encoder.parameters()}


def test_a_classifier_waits_once_an_epoch_and_a_batch_of_validation(data, monkeypatch):
    recipe = ClassifierRecipe(filters=4, epochs=2, train_steps=0, batch_size=8, learning_rate=1e-3, label_smoothing=0.1,
                              patience=5, stop_patience=5)  # fmt: skip
    monkeypatch.setattr(classifier, "ResNet20", lambda *sizes: Moving(*sizes))
    with pretended_gpu(monkeypatch) as reads:
        trained = train_classifier(data.train, data.val, 3, recipe, 0, GPU)
    assert all(isinstance(value, There) for value in trained.model.state_dict().values())
    assert sum(reads.values()) == 2 * 2, reads  # predictions of the validation images, mean of the losses


class Moving(ResNet20):
    """`Module.to` would ask the driver for memory."""

    def to(self, device, memory_format=None):
        return move(self, trained=True)


def test_mixing_devices_raises(monkeypatch):
    """The check can fail."""
    with pretended_gpu(monkeypatch), pytest.raises(RuntimeError, match="mixes devices"):
        torch.ones(3, device="cuda") + torch.ones(3)


def test_reads_are_counted(monkeypatch):
    with pretended_gpu(monkeypatch) as reads:
        float(torch.ones((), device="cuda"))
        torch.ones(3, device="cuda").cpu()
    assert sum(reads.values()) == 2
