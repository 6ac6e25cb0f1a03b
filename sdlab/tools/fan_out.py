"""A plan on n devices like this one: hours of each notebook, how busy the devices are, and what the driver writes.

Shards, classifiers and parts of the latents divide; training is the driver's device's. A search keeps to its window of
`search_parallel` trials, which is simulated, since trials wait for one another (`TrialOrder` in `runs/studies.py`).
"""

import heapq
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from sdlab.data.images import DatasetFacts
from sdlab.generation import GenerationPlan, SyntheticSet, write_shards
from sdlab.latents import PART
from sdlab.report.costs import format_gigabytes, format_hours
from sdlab.runs.files import existing_parent, write_hashed_json
from sdlab.search import first_search_space
from sdlab.settings import Settings
from sdlab.tools.measuring import Costs
from sdlab.tools.planning import classifier_work, controls_of, generated, inference_steps, seconds, simulate_pruning

SHARDS = 8  # are written to measure the driver


@dataclass(frozen=True)
class Durations:
    """Seconds of single tasks on one device, and of the driver for each shard that it receives."""

    settings: Settings
    facts: DatasetFacts
    costs: Costs
    driver: float

    def shard(self, inference_steps: float) -> float:
        return seconds(generated(self.settings, self.settings.shard_size, inference_steps), self.costs)

    def classifier(self, kind: str, images: float) -> float:
        seeds = self.settings.search_classifier_seeds if kind == "trial" else self.settings.classifier_seeds
        return seconds(classifier_work(self.settings, self.facts, images, kind), self.costs) / seeds

    def shards(self, images: float) -> int:
        return math.ceil(images / self.settings.shard_size)

    def synthetic_set(self, images: float, inference_steps: float, devices: int) -> float:
        count = self.shards(images)
        return max(math.ceil(count / devices) * self.shard(inference_steps), count * self.driver)


def hours_on(devices: int, durations: Durations) -> dict[str, float]:
    """Hours of notebooks 00 to 05 and 08 on so many devices."""
    d, s, facts, costs = durations, durations.settings, durations.facts, durations.costs.seconds
    steps, images = inference_steps(s, most=False), s.search_images

    def cells(*sizes: float) -> float:
        """Classifiers of several cells, side by side."""
        return makespan([d.classifier("cell", size) for size in sizes for _ in range(s.classifier_seeds)], devices)

    def cell(inference_steps: float) -> float:
        return d.synthetic_set(images, inference_steps, devices) + cells(images)

    def search(name: str, trials: int) -> float:
        finalists = s.search_finalists + (name == "search_2") if s.search_finalists > 1 else 0
        again = [d.classifier("finalist", images)] * (finalists * s.classifier_seeds)
        last = d.synthetic_set(finalists * images, steps[name], devices) + makespan(again, devices)
        return search_seconds(devices, d, name, trials) + last

    size, parts = min(PART, facts.train), math.ceil(math.ceil(facts.train / PART) / devices)
    encoding, round_trips = (
        parts * size * seconds for seconds in (costs["encoded"], costs["encoded"] + costs["images"])
    )
    encoder_steps = s.class_encoder_epochs * math.ceil(facts.train / s.class_encoder_batch_size)
    unet_steps = s.unet_epochs * math.ceil(facts.train / s.unet_batch_size)
    sizes = [facts.train, facts.train, *(k * facts.train for k in range(1, s.scaling_max + 1))]
    of_real = [d.classifier("finalist", facts.train)] * s.classifier_seeds
    in_seconds = {
        "00": round_trips + 2 * makespan(of_real, devices) + of_real[0],  # real, round trips, the judge
        "01": encoding + costs["class_encoder steps"] * encoder_steps + cell(s.default_num_inference_steps),
        "02": cell(steps["optimum_1"]) + search("search_1", s.search_1_trials),
        "03": cell(steps["optimum_1"]) + costs["unet steps"] * unet_steps,
        "04": cell(steps["optimum_2"]) + search("search_2", s.search_2_trials),
        "05": d.synthetic_set(s.scaling_max * facts.train, steps["optimum_2"], devices) + cells(*sizes) + round_trips,
        "08": cells(*[(1 + s.scaling_max) / 2 * facts.train] * controls_of(s))
        + round_trips * (s.classifier_train_steps == 0),
    }
    return {number: value / 3600 for number, value in in_seconds.items()}


def makespan(tasks: Sequence[float], devices: int) -> float:
    """When the last of the tasks ends, if each free device takes the next one."""
    free = [0.0] * devices
    for task in tasks:
        heapq.heapreplace(free, free[0] + task)
    return max(free)


def search_seconds(devices: int, durations: Durations, name: str, trials: int, repeats: int = 3) -> float:
    """Seconds of a search's trials: the mean of a few simulations with random inference steps and pruning."""
    s, found = durations.settings, []
    low, high = first_search_space(s).num_inference_steps
    if name == "search_2":
        high = round(inference_steps(s, most=False)["optimum_1"])
        low = min(low, high)
    for repeat, rungs in enumerate(simulate_pruning(s, name, trials, repeats)):
        draw = np.random.default_rng(repeat)
        shard = [durations.shard(steps) for steps in draw.integers(low, high, len(rungs), endpoint=True)]
        found.append(Window(devices, durations, shard, rungs).run())
    return statistics.mean(found)


class Window:
    """Trials of a search on n devices: `search_parallel` at a time, asked, judged and told in their order.

    Args:
        shard: seconds of a shard of each trial.
        reached: how many rungs each trial reaches.
    """

    def __init__(self, devices: int, durations: Durations, shard: Sequence[float], reached: Sequence[int]):
        self.free, self.durations, self.shard, self.reached = devices, durations, shard, reached
        self.settings, rungs = durations.settings, durations.settings.rungs()
        self.images = list(zip(rungs, [rungs[0], *np.diff(rungs)], strict=True))  # of a rung's classifiers; new ones
        self.passed, self.at_a_rung = [0] * len(shard), set()  # trials that wait to be judged
        self.left = [0] * len(shard)  # tasks of a trial's present step
        self.ready: list[tuple[int, int, float, bool]] = []  # trial, order, seconds, is it a shard
        self.events: list[tuple[float, int, int, bool | None]] = []  # time, order, trial, is it a shard
        self.asked = self.told = 0
        self.now = self.driver_free = 0.0
        self.order = itertools.count()

    def run(self) -> float:
        """Seconds until the last trial is told."""
        self.advance()
        while self.events:
            self.now, _, trial, is_shard = heapq.heappop(self.events)
            if is_shard is None:  # the driver has written a shard
                self.end_task(trial, was_shard=True)
            else:
                self.free += 1
                if is_shard:
                    self.driver_free = max(self.driver_free, self.now) + self.durations.driver
                    heapq.heappush(self.events, (self.driver_free, next(self.order), trial, None))
                else:
                    self.end_task(trial, was_shard=False)
            self.start_tasks()
        return self.now

    def add_tasks(self, trial: int, count: int, duration: float, are_shards: bool) -> None:
        self.left[trial] = count
        for _ in range(count):
            heapq.heappush(self.ready, (trial, next(self.order), duration, are_shards))

    def start_tasks(self) -> None:
        while self.free and self.ready:
            trial, order, duration, is_shard = heapq.heappop(self.ready)
            self.free -= 1
            heapq.heappush(self.events, (self.now + duration, order, trial, is_shard))

    def start_rung(self, trial: int) -> None:
        _, new = self.images[self.passed[trial]]
        self.add_tasks(trial, self.durations.shards(new), self.shard[trial], are_shards=True)

    def end_task(self, trial: int, was_shard: bool) -> None:
        self.left[trial] -= 1
        if self.left[trial]:
            return
        if was_shard:
            images, _ = self.images[self.passed[trial]]
            seeds = self.settings.search_classifier_seeds
            self.add_tasks(trial, seeds, self.durations.classifier("trial", images), are_shards=False)
        else:
            self.at_a_rung.add(trial)
            self.advance()

    def advance(self) -> None:
        """Judge, tell and ask whose turn has come."""
        for trial in range(self.told, self.asked):
            alive = [t for t in range(self.told, trial) if self.passed[t] < self.reached[t]]
            if trial in self.at_a_rung and all(self.passed[t] > self.passed[trial] for t in alive):
                self.at_a_rung.remove(trial)
                self.passed[trial] += 1
                if self.passed[trial] < self.reached[trial]:
                    self.start_rung(trial)
        while self.told < self.asked and self.passed[self.told] == self.reached[self.told]:
            self.told += 1
        while self.asked < min(len(self.shard), self.told + self.settings.search_parallel):
            self.asked += 1
            self.start_rung(self.asked - 1)
        self.start_tasks()


def measure_driver(settings: Settings, facts: DatasetFacts) -> float:
    """Seconds in which the driver writes one shard of the largest set, half-way through it, to the disk of the run."""
    plan = GenerationPlan(
        weights="", scheduler="", num_inference_steps=1, guidance_scale=1.0, guidance_interval=(0.0, 1.0), labels=(0,), seed=0,
        base_size=settings.base_image_size, image_size=settings.image_size, shard_size=settings.shard_size,
    )  # fmt: skip
    shape = (settings.shard_size, 3, settings.image_size, settings.image_size)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    half = max(SHARDS, math.ceil(settings.scaling_max * facts.train / settings.shard_size / 2))
    with tempfile.TemporaryDirectory(dir=existing_parent(settings.run_folder)) as folder:
        made = SyntheticSet(Path(folder) / "set", plan)
        made.folder.mkdir()
        before = {str(i): dict(sha256=f"{i:064}", seconds=1.0) for i in range(half)}
        write_hashed_json(made.folder / "manifest.json", made.manifest | dict(shards=before))
        took = []

        def make(indices: Sequence[int], write, on_progress) -> None:
            for index in range(half, half + SHARDS):
                started = time.perf_counter()
                write((index,), (images, 1.0))
                took.append(time.perf_counter() - started)

        write_shards(made, settings.shard_size * (half + SHARDS), make, partial(tqdm, disable=True), "")
    return statistics.median(took)


def fan_out_table(durations: Durations, devices: Sequence[int]) -> pd.DataFrame:
    """A row for each number of devices: time of each notebook and of all, the share of it that they work, the driver's writing."""
    s, rows, alone = durations.settings, [], sum(hours_on(1, durations).values())
    shard, size = durations.shard(inference_steps(s, most=False)["optimum_2"]), 3 * s.shard_size * s.image_size**2
    for count in devices:
        hours = hours_on(count, durations)
        total = sum(hours.values())
        row = {"devices": count, **{number: format_hours(value) for number, value in hours.items()}}
        arriving = min(count / shard, 1 / durations.driver)
        writing = {
            "driver writes": f"{arriving * size / 1e6:.1f} MB/s",
            "driver busy": f"{arriving * durations.driver:.0%}",
        }
        rows.append(row | {"all": format_hours(total), "efficiency": f"{alone / count / total:.0%}"} | writing)
    return pd.DataFrame(rows)


def fan_out_sentences(durations: Durations, unet_numbers: int) -> list[str]:
    """What the table assumes, and where the driver is the limit."""
    s = durations.settings
    shard = durations.shard(inference_steps(s, most=False)["optimum_2"])
    checkpoints = 2 * unet_numbers * (s.unet_kept_epochs or s.unet_epochs) / 1e9
    return [
        f"Each device is like this one. A shard of {s.shard_size} images takes {format_seconds(shard)} on a device and "
        f"{format_seconds(durations.driver)} of the driver (measured, without the network): from about "
        f"{max(1, math.floor(shard / durations.driver)):,} devices on, the driver is the limit of 05.",
        f"Training (01, 03) runs on {s.training_processes} of them (`training_processes`). The searches run {s.search_parallel} "
        "trials at a time (`search_parallel`). Starting workers is not counted.",
        f"Disk of the run: as on one device. Each machine receives up to {format_gigabytes(checkpoints)} of UNets in 04, and keeps at "
        f"most {s.cluster_cache_gb:g} GB in its cache (`cluster_cache_gb`).",
    ]


def format_seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
