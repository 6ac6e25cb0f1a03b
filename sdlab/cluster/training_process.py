"""One of the processes of a training on n devices, started by torchrun: `python -m sdlab.cluster.training_process JOB`.

It reads settings, data, base model and latents as a notebook does. The first process writes and tells of the progress.
"""

import json
import os
import sys
import threading
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any

import accelerate
import torch
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from sdlab.base_models import load_base_model
from sdlab.cluster.processes import ProcessOfMany
from sdlab.cluster.torchrun import MARK
from sdlab.data.datasets import load_dataset
from sdlab.devices import choose_device
from sdlab.errors import BadInput
from sdlab.latents import encode_training_set
from sdlab.runs.experiment import Experiment
from sdlab.runs.run import peak_memory
from sdlab.settings import Settings
from sdlab.training import fine_tune_unet, train_class_encoder

WRITING = timedelta(hours=1)  # the others wait while the first process writes gigabytes


def say(**words: Any) -> None:
    """One line, written at once: lines of several processes do not mix, nor with what a library left without an end."""
    os.write(1, f"\n{MARK}{json.dumps(words)}\n".encode())


class Said:
    """A progress bar in the process that started this one."""

    def __init__(self, **bar: Any):
        say(**bar)

    def update(self) -> None:
        say(steps=1)

    def __enter__(self) -> "Said":
        return self

    def __exit__(self, *_) -> None:
        pass


class Silent(Said):
    def __init__(self, **bar: Any):
        pass

    def update(self) -> None:
        pass


def end_with_parent() -> None:
    """End this process as soon as the one that holds the other end of its input is gone, however it ended."""

    def wait() -> None:
        while os.read(0, 1024):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def train_as_one_of_many(job: dict[str, Any]) -> None:
    """Join the group, train the part, and tell of it. Raises `BadInput` if the group is smaller than asked for."""
    settings = Settings.from_mapping(job["settings"])
    on_cpu = choose_device(settings.device).type == "cpu"
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    accelerator = accelerate.Accelerator(cpu=on_cpu, kwargs_handlers=[ddp, InitProcessGroupKwargs(timeout=WRITING)])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # accelerate sets its own
    if accelerator.num_processes != settings.training_processes:
        raise BadInput(
            f"`training_processes` is {settings.training_processes}, and {accelerator.num_processes} were connected: the "
            "installed accelerate or torch cannot train on this kind of device in several processes."
        )
    say(process=accelerator.process_index)
    device = "cpu" if on_cpu else f"cuda:{accelerator.local_process_index}"
    experiment = Experiment(settings, load_dataset(settings), load_base_model(replace(settings, device=device)))
    experiment.processes = ProcessOfMany(accelerator, settings.micro_batch_size)
    first = experiment.processes.is_first
    experiment.progress = Said if first else Silent
    moments = encode_training_set(experiment)
    if job["part"] == "class_encoder":
        records = train_class_encoder(experiment, moments)
    else:
        records = fine_tune_unet(experiment, moments, job["class_encoder_epoch"])
    for record in records:
        if first:
            say(**asdict(record))
    say(memory=peak_memory())
    accelerator.end_training()


def main() -> None:
    end_with_parent()
    try:
        train_as_one_of_many(json.loads(sys.argv[1]))
    except BadInput as error:
        say(error=str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
