"""Settings + a few timed steps -> what an experiment will cost, notebook by notebook, before it is spent.

Three parts: `workload` counts what the notebooks do, `measure` times one of each on this device, `plan` multiplies. The
weights need not be here: of the base models that the README names, the configs in `shapes/` tell the size.
"""

import dataclasses
import itertools
import math
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import optuna
import torch

from sdlab.base_models import BaseModel, load_base_model, load_without_weights
from sdlab.data.images import DatasetFacts
from sdlab.data.model_files import is_available_locally
from sdlab.generation import SamplingConfig
from sdlab.report.costs import planned_settings
from sdlab.runs.files import read_json
from sdlab.runs.records import STAGES, read_record
from sdlab.runs.studies import new_pruner, study_name
from sdlab.search import first_search_space
from sdlab.settings import Settings
from sdlab.tools.measuring import Costs, measure

GB = 1e9


@dataclass
class Work:
    """What one notebook does. Images are generated ones; a pass is one image through the UNet once."""

    images: float = 0
    passes: float = 0
    encoded: int = 0
    class_encoder_steps: int = 0
    unet_steps: int = 0
    searched_images: float = 0  # seen by trials' classifiers in training, each time counted
    searched_checks: float = 0  # judged by them
    classifier_images: float = 0  # the same of the cells' and finalists' classifiers
    classifier_checks: float = 0

    @property
    def steps(self) -> int:
        return round(self.class_encoder_steps + self.unet_steps)

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __mul__(self, factor: float) -> "Work":
        return Work(*(factor * a for a in dataclasses.astuple(self)))


def workload(settings: Settings, facts: DatasetFacts, most: bool = False, pruning: bool = True) -> dict[str, Work]:
    """What notebooks 01 to 05 do: as expected, or at the `most`, or with nothing pruned.

    Expected: steps (IS) in the middle of their range, both passes where guidance acts, and pruning as the search's own pruner
    prunes trials of random quality. At most: the highest IS, nothing pruned. What a finished search found is used.
    """
    s = settings
    optimum_1, optimum_2 = finished_optimum(s, "search_1"), finished_optimum(s, "search_2")
    steps = {"search_1": expected_steps(first_search_space(s).num_inference_steps, most)}
    steps["optimum_1"] = optimum_1.num_inference_steps if optimum_1 else steps["search_1"]
    steps["search_2"] = expected_steps((min(s.search_min_steps, steps["optimum_1"]), steps["optimum_1"]), most)
    steps["optimum_2"] = optimum_2.num_inference_steps if optimum_2 else steps["search_2"]

    def made(images: float, is_: float) -> Work:
        return Work(images=images, passes=(1 + s.guidance_stop - s.guidance_start) * images * is_)

    def search(name: str, trials: int) -> Work:
        unpruned = [Counter(dict.fromkeys(s.rungs(), trials))]
        visits = simulate_pruning(s, name, trials) if pruning and not most else unpruned
        total = Work()
        for visit in visits:
            for last, rung in itertools.pairwise([0, *s.rungs()]):
                trial = made(rung - last, steps[name]) + classifier_work(s, facts, rung, trial=True)
                total += trial * (visit[rung] / len(visits))
        if s.search_finalists > 1:
            finalist = made(s.search_images, steps[name]) + classifier_work(s, facts, s.search_images, finalist=True)
            total += finalist * (s.search_finalists + (name == "search_2"))
        return total

    default = s.default_num_inference_steps
    after = {n: made(s.search_images, i) + classifier_work(s, facts, s.search_images) for n, i in (
        ("01", default), ("02", steps["optimum_1"]), ("03", steps["optimum_1"]), ("04", steps["optimum_2"]))}  # fmt: skip
    scaled = classifier_work(s, facts, facts.train)
    for k in range(1, s.scaling_max + 1):
        scaled += classifier_work(s, facts, k * facts.train)
    pool = s.scaling_max * facts.train
    per_epoch = math.ceil(facts.train / s.class_encoder_batch_size), math.ceil(facts.train / s.unet_batch_size)
    return {
        "01": after["01"] + Work(encoded=facts.train, class_encoder_steps=s.class_encoder_epochs * per_epoch[0]),
        "02": after["02"] + search("search_1", s.search_1_trials),
        "03": after["03"] + Work(unet_steps=s.unet_epochs * per_epoch[1]),
        "04": after["04"] + search("search_2", s.search_2_trials),
        "05": scaled + made(pool, steps["optimum_2"]),
    }


def classifier_work(
    s: Settings, facts: DatasetFacts, images: float, trial: bool = False, finalist: bool = False
) -> Work:
    """A set's classifiers, trained to their last epoch: those of a cell, a finalist or a trial."""
    seeds = s.search_classifier_seeds if trial else s.classifier_seeds
    deciding = {"sealed": facts.val, "paper": facts.test}[s.protocol]
    seen = seeds * (
        s.classifier_steps * s.classifier_batch_size if s.classifier_steps else s.classifier_epochs * images
    )
    read = seeds * (s.classifier_epochs * facts.val + (deciding if trial or finalist else facts.val + facts.test))
    if trial:
        return Work(searched_images=seen, searched_checks=read)
    return Work(classifier_images=seen, classifier_checks=read)


def expected_steps(bounds: tuple[int, int], most: bool) -> float:
    return bounds[1] if most else sum(bounds) / 2


def finished_optimum(settings: Settings, search: str):
    """The optimum of a search, if it is finished."""
    record = read_record(settings, {"search_1": "02", "search_2": "04"}[search])
    if record is None or not record.finished:
        return None
    return SamplingConfig(**read_json(settings.run_folder / "metrics" / f"{search}.json")["best"]["point"])


def simulate_pruning(settings: Settings, search: str, trials: int, repeats: int = 5) -> list[Counter]:
    """How many trials reach each rung when trials of random quality meet the search's own pruner: one count a repeat."""
    visits, rungs = [], settings.rungs()
    for repeat in range(repeats):
        rng, visited = np.random.default_rng(repeat), Counter()
        study = optuna.create_study(
            study_name=study_name(settings, search), direction="maximize", pruner=new_pruner(settings),
            sampler=optuna.samplers.RandomSampler(seed=repeat),
        )  # fmt: skip
        for _ in range(trials):
            trial, quality, pruned = study.ask(), rng.uniform(), False
            for rung in rungs:
                visited[rung] += 1
                trial.report(quality + rng.normal(0, 0.1), step=rung)
                if rung < rungs[-1] and trial.should_prune():
                    pruned = True
                    break
            study.tell(trial, None if pruned else quality, state=optuna.trial.TrialState.PRUNED if pruned else None)
        visits.append(visited)
    return visits


def make_plan(settings: Settings, facts: DatasetFacts, base: BaseModel | None = None) -> dict:
    """The plan as plain data: a row a notebook, the sums, what it rests on, and warnings.

    `base` is the base model if it is loaded already. Raises `BadInput` for one of which not even the size is known here.
    """
    here = base is not None or is_available_locally(settings)
    if base is None:
        base = load_base_model(settings) if here else load_without_weights(settings)
    costs = measure(settings, facts, base)
    expected, most = workload(settings, facts), workload(settings, facts, most=True)
    unpruned = workload(settings, facts, pruning=False)
    training = {"01": costs.class_encoder_bytes, "03": costs.unet_bytes}
    rows = {
        number: dict(
            notebook=STAGES[number].stem,
            images=round(work.images),
            steps=work.steps,
            hours=seconds(work, costs) / 3600,
            hours_at_most=seconds(most[number], costs) / 3600,
            pruning_saves=1 - work.images / unpruned[number].images,
            disk_gb=disk(settings, facts, costs, number, work) / GB,
            memory_gb=max(costs.generating_bytes, training.get(number, 0.0)) / GB,
        )
        for number, work in expected.items()
    }
    fetched = 0.0 if here else (4 * costs.unet_parameters + 4 * base.vae.num_parameters()) / GB
    made = dict(
        settings=planned_settings(settings),
        experiment=settings.experiment,
        base_model=settings.base_model,
        base_model_is_here=here,
        device=costs.device,
        training_images=facts.train,
        classes=facts.num_classes,
        unet_parameters=costs.unet_parameters,
        rows=rows,
        hours=sum(row["hours"] for row in rows.values()),
        hours_at_most=sum(row["hours_at_most"] for row in rows.values()),
        disk_gb=sum(row["disk_gb"] for row in rows.values()),
        disk_peak_gb=sum(row["disk_gb"] for row in rows.values()) + 12 * costs.unet_parameters / GB + fetched,
        fetched_gb=fetched,
        memory_gb=max(row["memory_gb"] for row in rows.values()),
        costs=dataclasses.asdict(costs),
    )
    return made | dict(warnings=warnings(settings, made, base.device))


def seconds(work: Work, c: Costs) -> float:
    return (
        work.passes * c.seconds_per_pass
        + work.images * c.seconds_per_decoding
        + work.encoded * c.seconds_per_encoding
        + work.class_encoder_steps * c.seconds_per_class_encoder_step
        + work.unet_steps * c.seconds_per_unet_step
        + work.searched_images * c.searching[0]
        + work.searched_checks * c.searching[1]
        + work.classifier_images * c.judging[0]
        + work.classifier_checks * c.judging[1]
    )


def disk(s: Settings, facts: DatasetFacts, c: Costs, number: str, work: Work) -> float:
    """Bytes that a notebook leaves: uint8 images; latent moments, class tables and the encoder's resume state; half-precision
    UNets and one full-precision state (weights and Adam's moments)."""
    images = work.images * 3 * s.image_size**2
    if number == "01":
        return (
            images
            + 4 * c.latent_numbers * facts.train
            + 4 * c.table_numbers * s.class_encoder_epochs
            + 12 * c.encoder_parameters
        )
    if number == "03":
        return images + 2 * c.unet_parameters * s.unet_epochs + 12 * c.unet_parameters
    return images


def warnings(s: Settings, made: Mapping, device: torch.device) -> list[str]:
    """What will not do: a sentence each."""
    found, folder = [], s.run_folder
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / GB
    if made["disk_peak_gb"] > free:
        found.append(
            f"Disk: up to {made['disk_peak_gb']:.1f} GB are needed and {free:.1f} GB are free: let `runs_root` point to a larger disk, "
            "or train fewer `unet_epochs`."
        )
    if device.type == "cuda":
        memory = (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)) / GB  # ours is ours to use
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GB
    if made["memory_gb"] > memory:
        worst = max(made["rows"].values(), key=lambda row: row["memory_gb"])
        found.append(
            f"Memory: {worst['notebook']} needs about {made['memory_gb']:.1f} GB and {device} has {memory:.1f} GB: choose a smaller "
            "`shard_size` or batch size, or another device."
        )
    return found
