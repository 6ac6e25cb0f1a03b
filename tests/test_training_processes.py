"""Trainings that several processes share: as one process trains, resumed from one by the other, stopped as one."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from test_training import DiesAt, Killed, new_encoder

from sdlab.base_models import load_base_model
from sdlab.cluster import torchrun, training_process
from sdlab.cluster.processes import OneProcess, own_rows
from sdlab.data.datasets import load_dataset
from sdlab.devices import check_processes
from sdlab.errors import BadInput
from sdlab.latents import encode_training_set
from sdlab.runs.checkpoints import save_checkpoint
from sdlab.runs.experiment import Experiment
from sdlab.training import fine_tune_unet, train_class_encoder

STEPS = 10  # tests/scale has 50, and three processes


class Share(OneProcess):
    """Process `index` of `count`, without a group."""

    def __init__(self, count, index, micro_batch_size=0):
        super().__init__(micro_batch_size)
        self.count, self.index = count, index


@pytest.mark.parametrize("micro_batch_size", [0, 5])
@pytest.mark.parametrize(("images", "count"), [(64, 1), (64, 3), (7, 2), (2, 3)])
def test_the_mean_over_processes_is_the_mean_over_the_batch(images, count, micro_batch_size):
    """64 images on 3 processes are 21, 21 and 22; 2 on 3 leave one without any, which still takes part."""
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(2, images, 5, generator=generator, dtype=torch.float64)
    weights = torch.randn(5, dtype=torch.float64, generator=generator, requires_grad=True)

    def squared(rows):
        return (inputs[rows] * weights - targets[rows]).square().mean()

    expected = torch.autograd.grad(squared(slice(None)), weights)[0]
    gradients, loss = [], 0.0
    for index in range(count):
        parts = list(Share(count, index, micro_batch_size).parts(images))
        assert parts and all(rows.stop - rows.start <= (micro_batch_size or images) for rows, _ in parts)
        gradients.append(sum(torch.autograd.grad(squared(rows) * share * count, weights)[0] for rows, share in parts))
        loss += sum(squared(rows).item() * share for rows, share in parts)
    torch.testing.assert_close(sum(gradients) / count, expected)  # DDP's mean
    assert loss == pytest.approx(squared(slice(None)).item())


def test_rows_differ_by_one_at_most():
    for images in range(70):
        for count in range(1, 9):
            rows = [own_rows(images, count, index) for index in range(count)]
            assert [row for part in rows for row in part] == list(range(images))
            assert max(map(len, rows)) - min(map(len, rows)) <= 1


@pytest.fixture
def experiment(settings, tmp_path):
    """64 training images, so that an epoch is a training step, and a Class-Encoder for the UNet."""
    rng = np.random.default_rng(0)
    splits = dict(train=64, val=4, test=4)
    arrays = {f"{name}_images": rng.integers(0, 256, (n, 16, 16, 3), np.uint8) for name, n in splits.items()}
    arrays |= {f"{name}_labels": np.arange(n) % 3 for name, n in splits.items()}
    np.savez(tmp_path / "some.npz", **arrays)
    more = dict(class_encoder_epochs=STEPS, unet_epochs=STEPS, class_encoder_batch_size=64, unet_batch_size=64)
    more |= dict(dataset=str(tmp_path / "some.npz"), unet_learning_rate=1e-3, class_encoder_learning_rate=1e-3)
    return new_experiment(dataclasses.replace(settings, **more))


def new_experiment(settings, **changes):
    settings = dataclasses.replace(settings, **changes)
    made = Experiment(settings, load_dataset(settings), load_base_model(settings))
    made.moments = encode_training_set(made)
    save_checkpoint(new_encoder(made.base), made.folder / "class_encoder" / "epoch_01")
    return made


def start(experiment, part):
    if part == "unet":
        return fine_tune_unet(experiment, experiment.moments, 1)
    return train_class_encoder(experiment, experiment.moments)


def losses(history):
    epochs, values = zip(*((record.epoch, record.loss) for record in history), strict=True)
    assert epochs == tuple(range(1, len(epochs) + 1))
    return list(values)


def test_two_processes_train_as_one_and_resume_what_one_began(experiment, tmp_path):
    """The second half of the steps is made by two processes (gloo) from the state of one."""
    whole = losses(start(experiment, "unet"))
    assert len(whole) == STEPS and whole[-1] < 0.9 * whole[0]
    cut = new_experiment(experiment.settings, runs_root=str(tmp_path / "cut"))
    cut.progress = DiesAt(STEPS // 2)
    with pytest.raises(Killed):
        list(start(cut, "unet"))
    resumed = new_experiment(cut.settings, training_processes=2)
    assert losses(start(resumed, "unet")) == pytest.approx(whole, rel=1e-4)
    assert resumed.peak_memory > 1e8  # of its processes, for the stage's record
    assert losses(start(resumed, "unet")) == pytest.approx(whole, rel=1e-4)  # finished: read, without processes


def test_one_process_resumes_what_two_began_and_none_of_them_stays(experiment, tmp_path):
    """Stopped in the middle, as by an interrupt: both end, and their last state is whole."""
    shared = new_experiment(experiment.settings, runs_root=str(tmp_path / "shared"), training_processes=2)
    records = start(shared, "class_encoder")
    for record in records:
        if record.epoch == STEPS // 2:
            break
    started = [p for p in psutil.Process().children(recursive=True) if "sdlab.cluster.training_process" in p.cmdline()]
    assert len(started) == 3  # torchrun and two of its own
    records.close()
    assert not psutil.wait_procs(started, timeout=10)[1]
    alone = new_experiment(shared.settings, training_processes=1)
    assert losses(start(alone, "class_encoder")) == pytest.approx(losses(start(experiment, "class_encoder")), rel=1e-4)


def test_parts_of_a_batch_train_as_the_whole(experiment, tmp_path):
    whole = losses(start(experiment, "unet"))
    parts = new_experiment(experiment.settings, runs_root=str(tmp_path / "parts"), micro_batch_size=24)
    assert losses(start(parts, "unet")) == pytest.approx(whole, rel=1e-4)


def test_a_group_that_is_smaller_than_asked_for_is_refused(settings, monkeypatch):
    """As where accelerate does not know the device and trains n times alone."""
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: SimpleNamespace(num_processes=1, process_index=0))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    job = dict(settings=dataclasses.asdict(dataclasses.replace(settings, training_processes=2)), part="unet")
    with pytest.raises(BadInput, match="`training_processes` is 2, and 1 were connected"):
        training_process.train_as_one_of_many(job)


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (["  rank      : 1", "  exitcode  : -15 (pid: 7)", "  exitcode  : -9 (pid: 8)"], "killed by signal 9"),
        (
            ["[rank1]: Traceback", "[rank1]: RuntimeError: odd", "exitcode : 1 (pid: 8)"],
            r"failed \(RuntimeError: odd\)",
        ),
        (["no module named torchrun"], r"failed \(no module named torchrun\)"),
        ([], r"a process failed"),
    ],
)
def test_processes_that_say_nothing_are_described(lines, sentence):
    with pytest.raises(BadInput, match=sentence):
        raise BadInput(torchrun.describe_end("unet", lines))


@pytest.mark.parametrize(
    ("name", "kind", "sentence"),
    [
        ("cuda", "cuda", "`training_processes` is 3, and this machine has 2 GPUs"),
        ("cuda:1", "cuda", "`device` 'cuda:1', which is a single one"),
        ("mps", "mps", "`device` 'mps', which is a single one"),
    ],
)
def test_more_processes_than_devices_are_refused(monkeypatch, name, kind, sentence):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(BadInput, match=sentence):
        check_processes(3, name, torch.device(kind))
    check_processes(1, name, torch.device(kind))
    check_processes(3, "cpu", torch.device("cpu"))
