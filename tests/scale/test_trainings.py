"""One training on 1, 2 and 3 processes: the same losses; and what happens if one of three is killed."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys

import psutil
import pytest
from conftest import ENVIRONMENT
from test_training import DiesAt, Killed
from test_training_processes import experiment, losses, new_experiment, start  # noqa: F401  (a fixture)

from sdlab.errors import BadInput

pytestmark = pytest.mark.scale
EPOCHS = dict(class_encoder_epochs=50, unet_epochs=50)  # each is a training step of 64 images


@pytest.mark.parametrize("part", ["class_encoder", "unet"])
def test_fifty_steps_on_one_two_and_three_processes(experiment, tmp_path, part):  # noqa: F811
    found = {
        count: losses(
            start(
                new_experiment(
                    experiment.settings, runs_root=str(tmp_path / str(count)), training_processes=count, **EPOCHS
                ),
                part,
            )
        )
        for count in (1, 2, 3)
    }
    furthest = {count: max(abs(a / b - 1) for a, b in zip(found[count], found[1], strict=True)) for count in (2, 3)}
    print(f"{part}: largest relative difference of a loss, by processes: {furthest}")
    assert len(found[1]) == 50 and max(furthest.values()) < 1e-4


@pytest.mark.parametrize(
    ("images", "count", "micro_batch_size"), [(64, 2, 13), (2, 3, 0)], ids=["parts", "fewer images than processes"]
)
def test_parts_and_processes_without_rows(experiment, tmp_path, images, count, micro_batch_size):  # noqa: F811
    """In a real group: gradients are exchanged once a batch, and a process without rows takes part."""
    settings = dataclasses.replace(experiment.settings, unet_batch_size=images, unet_epochs=3)
    whole = losses(start(new_experiment(settings, runs_root=str(tmp_path / "one")), "unet"))
    more = dict(runs_root=str(tmp_path / "many"), training_processes=count, micro_batch_size=micro_batch_size)
    assert losses(start(new_experiment(settings, **more), "unet")) == pytest.approx(whole, rel=1e-4)


def test_two_processes_resume_the_middle_of_an_epoch(experiment, tmp_path):  # noqa: F811
    """From the state of one process, which was stopped at the third of an epoch's eight steps."""
    settings = dataclasses.replace(experiment.settings, unet_batch_size=8, unet_epochs=2, resume_minutes=0.0)
    whole = losses(start(new_experiment(settings, runs_root=str(tmp_path / "whole")), "unet"))
    cut = new_experiment(settings, runs_root=str(tmp_path / "cut"))
    cut.progress = DiesAt(11)
    with pytest.raises(Killed):
        list(start(cut, "unet"))
    resumed, began = new_experiment(cut.settings, training_processes=2), []
    resumed.progress = lambda initial, **_: began.append(initial) or DiesAt(math.inf)
    assert losses(start(resumed, "unet")) == pytest.approx(whole, rel=1e-4) and began == [10]


def test_a_killed_process_stops_all_and_the_training_resumes(experiment, tmp_path):  # noqa: F811
    whole = losses(start(new_experiment(experiment.settings, runs_root=str(tmp_path / "whole")), "unet"))
    shared = new_experiment(experiment.settings, runs_root=str(tmp_path / "shared"), training_processes=3)
    with pytest.raises(BadInput, match="a process was killed by signal 9"):
        for record in start(shared, "unet"):
            if record.epoch == 4:
                trainers = processes_of("sdlab.cluster.training_process")
                os.kill(next(p.pid for p in trainers if p.environ()["RANK"] == "1"), signal.SIGKILL)
    assert not processes_of("sdlab.cluster.training_process")
    assert losses(start(shared, "unet")) == pytest.approx(whole, rel=1e-4)


PARENT = """
import json
import sys
from sdlab.base_models import load_base_model
from sdlab.data.datasets import load_dataset
from sdlab.latents import encode_training_set
from sdlab.runs.experiment import Experiment
from sdlab.settings import Settings
from sdlab.training import train_class_encoder
settings = Settings.from_mapping(json.loads(sys.argv[1]))
experiment = Experiment(settings, load_dataset(settings), load_base_model(settings))
for record in train_class_encoder(experiment, encode_training_set(experiment)):
    print(record.epoch, flush=True)
"""


def test_no_process_outlives_a_killed_notebook(experiment, tmp_path):  # noqa: F811
    more = dict(training_processes=2, runs_root=str(tmp_path / "killed"), class_encoder_epochs=5000)
    settings = dataclasses.replace(experiment.settings, **more)
    asked = json.dumps(settings.as_dict())
    parent = subprocess.Popen([sys.executable, "-c", PARENT, asked], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert parent.stdout.readline().strip() == "1"
    started = psutil.Process(parent.pid).children(recursive=True)
    assert len(started) >= 3  # torchrun and two of its own
    parent.kill()
    parent.wait()
    assert not psutil.wait_procs(started, timeout=10)[1]


def processes_of(module: str) -> list[psutil.Process]:
    """Those that torchrun has started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if module in process.cmdline() and "RANK" in process.environ():
                found.append(process)
    return found
