"""How much faster are two local workers than one? The figures of docs/scale.md.

    .venv/bin/python scripts/measure_workers.py measure digits sets      # or cells, search; a quarter of an hour each
    .venv/bin/python scripts/measure_workers.py report
    .venv/bin/python scripts/measure_workers.py scheduler                # a minute: workers that do nothing

`measure` trains the experiment's Class-Encoder once, then takes turns: the same work with one worker of one thread and
with two, and the same tasks in one bare process and in two side by side, which is what the machine can give. Starting
the workers is not part of the ratio and has a column of its own. Nothing else should run on the machine meanwhile.

* sets: shards of one synthetic set, in the middle of the search's ranges
* cells: cells of Table 1, one after the other, each of `classifier_seeds` classifiers
* search: the first search with `search_parallel: 4`, finalists included

Results go to runs/workers/, a line a turn; a second call adds the turns that are missing.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from itertools import count
from pathlib import Path

import click
import numpy as np
import pandas as pd
import psutil
import torch

from sdlab.base_models import load_base_model
from sdlab.classifier import ClassifierRecipe
from sdlab.data.datasets import load_dataset
from sdlab.evaluation import train_and_score, train_and_score_classifiers
from sdlab.generation import generate_set, make_shard, plan_generation
from sdlab.paths import PROJECT_ROOT
from sdlab.runs.experiment import Experiment
from sdlab.runs.parameters import parameter_file
from sdlab.runs.run import Run
from sdlab.runs.stages import STAGES
from sdlab.sampling_config import SamplingConfig
from sdlab.search import search_class_encoder
from sdlab.settings import Settings

FOLDER = PROJECT_ROOT / "runs" / "workers"
WORK = ("sets", "cells", "search")
SECONDS_BARE = 15


def prepared(experiment: str) -> Settings:
    """The experiment with a trained Class-Encoder, in a folder of this script's own."""
    roots = ["-p", "runs_root", FOLDER / "prepared", "-p", "reports_root", FOLDER / "reports"]
    command = [Path(sys.executable).parent / "sdlab", "run", experiment, "--until", "01", *roots]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    return replace(Settings.from_file(parameter_file(experiment)), runs_root=str(FOLDER / "prepared"))


def opened(settings: Settings, **changes) -> Run:
    """Stage 02 of a copy of the prepared folder, with nothing of an earlier turn in it."""
    scratch = replace(settings, runs_root=str(FOLDER / "scratch"), **changes)
    shutil.rmtree(scratch.run_folder, ignore_errors=True)
    shutil.copytree(settings.run_folder, scratch.run_folder)
    return Run(scratch, STAGES["02"].stem, load_dataset(scratch), load_base_model(scratch))


def middle(settings: Settings) -> SamplingConfig:
    """In the middle of the first search's ranges."""
    steps = (settings.search_min_inference_steps + settings.search_max_inference_steps) // 2
    epoch = settings.class_encoder_epochs
    return SamplingConfig(num_inference_steps=steps, guidance_scale=2.0, class_encoder_epoch=epoch)


def warm_up(run: Run, workers: int) -> None:
    """Each worker loads the base model and makes one shard; each then trains one classifier."""
    size = run.settings.shard_size
    some = generate_set(run, middle(run.settings), workers * size, seed=10**6).split(size)
    train_and_score_classifiers(run, some, range(10**6, 10**6 + workers), ["val"])


def do_work(run: Run, work: str, amount: int) -> float:
    """Seconds of that many shards, cells, or of the whole search."""
    settings = run.settings
    if work == "cells":
        images = generate_set(run, middle(settings), settings.search_images, seed=2).split(settings.search_images)
    started = time.perf_counter()
    if work == "sets":
        generate_set(run, middle(settings), amount * settings.shard_size, seed=1)
    elif work == "cells":
        for cell in range(amount):
            seeds = range(100 * cell, 100 * cell + settings.classifier_seeds)
            train_and_score_classifiers(run, images, seeds, ["val", "test"])
    else:
        search_class_encoder(run)
    return time.perf_counter() - started


def with_workers(settings: Settings, work: str, amount: int, workers: int) -> dict[str, float]:
    """Seconds of the work with so many local workers, and of their start."""
    more = dict(search_parallel=4, search_1_trials=amount) if work == "search" else {}
    started = time.perf_counter()
    run = opened(settings, cluster="local", workers=workers, cluster_threads=1, **more)
    with redirect_stdout(StringIO()):
        warm_up(run, workers)
    start = time.perf_counter() - started
    seconds = do_work(run, work, amount)
    run.executor.shutdown()
    run.lock.release()
    return dict(seconds=seconds, start=start)


def bare_rates(experiment: str, work: str, processes: int) -> list[float]:
    """Tasks a second of each of so many processes side by side, without Dask."""
    command = [sys.executable, __file__, "bare", experiment, work]
    started = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(processes)
    ]
    for process in started:
        process.stdout.readline()  # it is ready
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    return [float(process.communicate()[0]) for process in started]


@click.group()
def main() -> None:
    """How much faster are two local workers than one?"""


@main.command(hidden=True)
@click.argument("experiment")
@click.argument("work")
def bare(experiment: str, work: str) -> None:
    """One process that makes shards, or trains classifiers; prints its tasks a second."""
    settings = replace(Settings.from_file(parameter_file(experiment)), runs_root=str(FOLDER / "prepared"))
    torch.set_num_threads(1)
    run = Run(settings, STAGES["01"].stem, load_dataset(settings), load_base_model(settings))
    config, recipe = middle(settings), ClassifierRecipe.from_settings(settings, searching=False)

    def task(index: int) -> None:
        if work == "cells":
            train_and_score(run, run.data.train, index, recipe, ["val", "test"], lambda *_: None)
        else:
            make_shard(run, config, plan_generation(run, config, seed=1), index, lambda *_: None)

    task(0)
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.perf_counter()
    for index in count(1):
        task(index)
        if (seconds := time.perf_counter() - started) > SECONDS_BARE:
            print(index / seconds)
            return


@main.command()
@click.argument("experiment")
@click.argument("work", type=click.Choice(WORK))
@click.option("--turns", default=3, show_default=True)
@click.option("--minutes", default=3.2, show_default=True, help="Of one worker, in each turn.")
@click.option("--amount", default=0, help="Shards, cells or trials of each turn; 0: as many as take the minutes.")
def measure(experiment: str, work: str, turns: int, minutes: float, amount: int) -> None:
    """Time one and two workers in turn, and one and two bare processes."""
    settings, file = prepared(experiment), FOLDER / "measured.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    lines = [line for line in lines if (line["experiment"], line["work"]) == (experiment, work)]
    if lines:
        amount = lines[0]["amount"]
    elif not amount:
        few = {"sets": 4, "cells": 2, "search": 8}[work]
        amount = 2 * max(few // 2, round(few * 30 * minutes / with_workers(settings, work, few, 1)["seconds"]))
    for turn in range(len(lines), turns):
        one, two = (with_workers(settings, work, amount, workers) for workers in (1, 2))
        alone, side = (bare_rates(experiment, work, processes) for processes in (1, 2))
        line = dict(
            experiment=experiment, work=work, amount=amount, turn=turn, one=one, two=two, alone=alone, side=side
        )
        with file.open("a") as out:
            out.write(json.dumps(line) + "\n")
        print(efficiency(line), ceiling(line), line, flush=True)


# ---------------------------------------------------------------------------------------------------- the scheduler

LIGHT_WORKERS = """
import asyncio, sys
from distributed import Worker

async def main(address, count, folder):
    options = dict(nthreads=1, memory_limit=0, dashboard=False, local_directory=folder)
    workers = await asyncio.gather(*(Worker(address, **options) for _ in range(count)))
    await asyncio.gather(*(worker.finished() for worker in workers))

asyncio.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
"""


def nothing(run: Experiment, shape: tuple[int, ...], on_progress: Callable) -> np.ndarray:
    """A task that costs nothing but its result, which is as large as a shard."""
    return np.zeros(shape, np.uint8)


@main.command()
@click.option("--workers", default=20, show_default=True, help="In two processes.")
@click.option("--tasks", default=3000, show_default=True)
def scheduler(workers: int, tasks: int) -> None:
    """Tasks a second of a driver and a scheduler, with workers that do nothing: the share that a thousand real ones need."""
    settings, file = prepared("digits"), FOLDER / "scheduler.json"
    file.unlink(missing_ok=True)
    dask = [sys.executable, "-m", "dask", "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    processes = [subprocess.Popen([*dask, "--scheduler-file", str(file)], stderr=subprocess.DEVNULL)]
    try:
        while not (file.exists() and file.read_text().strip()):
            time.sleep(0.1)
        light = [sys.executable, "-c", LIGHT_WORKERS, json.loads(file.read_text())["address"], str(workers // 2)]
        processes += [
            subprocess.Popen([*light, str(FOLDER / f"light_{i}")], stderr=subprocess.DEVNULL) for i in range(2)
        ]
        run = opened(settings, cluster=str(file))
        run.executor.client.wait_for_workers(workers, timeout=300)
        for shape in ((0,), (256, 3, 32, 32)):
            calls = [(shape,)] * tasks
            run.executor.each(nothing, run, calls[: 2 * workers], lambda *_: None, lambda _: None)  # warm
            before, started = [seconds_of(pid) for pid in (processes[0].pid, os.getpid())], time.perf_counter()
            run.executor.each(nothing, run, calls, lambda *_: None, lambda _: None)
            took = time.perf_counter() - started
            after = [seconds_of(pid) for pid in (processes[0].pid, os.getpid())]
            busy = ", ".join(
                f"{who} {1000 * (b - a) / tasks:.2f} ms"
                for who, a, b in zip(("scheduler", "driver"), before, after, strict=True)
            )
            print(f"{workers} workers, results of {int(np.prod(shape)):,} bytes: {tasks / took:.0f} tasks a second; of the processor, "
                  f"a task takes: {busy}", flush=True)  # fmt: skip
        run.executor.shutdown()
        run.lock.release()
    finally:
        for process in processes:
            process.kill()


def seconds_of(pid: int) -> float:
    """Processor time of a process."""
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


# ------------------------------------------------------------------------------------------------------- the report


def efficiency(line: dict) -> float:
    return line["one"]["seconds"] / (2 * line["two"]["seconds"])


def ceiling(line: dict) -> float:
    return sum(line["side"]) / (2 * line["alone"][0])


@main.command()
@click.argument("file", type=click.Path(exists=True, path_type=Path), default=FOLDER / "measured.jsonl")
def report(file: Path) -> None:
    """A row for each experiment and kind of work; medians of its turns."""
    rows = {}
    for line in map(json.loads, file.read_text().splitlines()):
        rows.setdefault((line["experiment"], line["work"]), []).append(line)

    def median(lines: list[dict], value) -> float:
        return statistics.median(map(value, lines))

    table = [
        {
            "experiment": experiment,
            "work": f"{lines[0]['amount']} {dict(sets='shards', cells='cells', search='trials, k = 4')[work]}",
            "one worker, s": round(median(lines, lambda line: line["one"]["seconds"])),
            "two, s": round(median(lines, lambda line: line["two"]["seconds"])),
            "efficiency": f"{median(lines, efficiency):.2f} ({', '.join(f'{efficiency(line):.2f}' for line in lines)})",
            "bare processes": f"{median(lines, ceiling):.2f}",
            "start of two, s": round(median(lines, lambda line: line["two"]["start"])),
        }
        for (experiment, work), lines in rows.items()
    ]
    print(pd.DataFrame(table).to_markdown(index=False))


if __name__ == "__main__":
    main()
