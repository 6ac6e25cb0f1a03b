"""Start a training on n devices: n processes under torchrun, whose lines become progress, records and sentences here.

accelerate's `notebook_launcher` needs a kernel that never touched a device; a process of its own needs nothing of it.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from sdlab.errors import BadInput, first_line
from sdlab.runs.experiment import Experiment

MARK = "sdlab:"  # begins a line that a process prints for the one that started them


def train_on_devices(run: Experiment, part: str, class_encoder_epoch: int = 0) -> Iterator[dict[str, Any]]:
    """Train `part` in as many processes as `training_processes` says; yields each epoch's record as it is written.

    Raises `BadInput` with the sentence of the first process that failed; all others are stopped.
    """
    s, tail, started = run.settings, deque(maxlen=400), set()
    count = s.training_processes
    torchrun = f"-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node {count}".split()
    job = json.dumps(dict(settings=s.as_dict(), part=part, class_encoder_epoch=class_encoder_epoch))
    threads = max(1, torch.get_num_threads() // count)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what this process has freed is theirs
    process = subprocess.Popen(
        [sys.executable, *torchrun, "-m", "sdlab.cluster.training_process", job], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        env=os.environ | dict(OMP_NUM_THREADS=str(threads)),
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.callback(stop, process)
        bar = None
        for line in process.stdout:
            if not line.startswith(MARK):
                tail.extend([line.rstrip()] if line.strip() else [])
                continue
            said = json.loads(line.removeprefix(MARK))
            if "error" in said:
                raise BadInput(said["error"])
            if "process" in said:
                started.add(said["process"])
            elif "memory" in said:
                run.peak_memory = max(run.peak_memory, said["memory"])
            elif "total" in said:
                bar = stack.enter_context(run.progress(**said))
            elif "steps" in said:
                bar.update(said["steps"])
            else:
                yield said
        if process.wait():
            raise BadInput(describe_end(part, tail))
    if started != set(range(count)):
        raise BadInput(
            f"Training {part}: {len(started)} of {count} processes have started, so nothing of it can be trusted."
        )


def stop(process: subprocess.Popen) -> None:
    """End torchrun and its processes: they end themselves once their input is closed."""
    process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        if process.poll() is None:
            process.terminate()
            process.wait(10)
    process.kill()
    process.wait()
    process.stdout.close()


def describe_end(part: str, tail: Iterable[str]) -> str:
    """What the last lines say of processes that ended without a sentence of their own."""
    text = "\n".join(tail)
    signals = [int(code) for code in re.findall(r"exitcode\s*: -(\d+)", text) if int(code) != signal.SIGTERM]
    if signals:
        return (
            f"Training {part}: a process was killed by signal {signals[0]} (9 is often the memory's end), and the others were "
            "stopped: the same command resumes."
        )
    errors = re.findall(r"^(?:\[rank\d+\]: )?(\w[\w.]*(?:Error|Exception)\b.*)$", text, re.MULTILINE)
    said = first_line(errors[0]) if errors else first_line(text.rpartition("\n")[2])
    return f"Training {part}: a process failed ({said}), and the others were stopped: finished checkpoints are intact."
