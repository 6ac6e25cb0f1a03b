"""Settings + a few timed steps -> what an experiment will cost, notebook by notebook, before it is spent.

`workload` counts the operations of the notebooks, `measure` times one of each on this device, `make_plan` multiplies. The
weights need not be on this machine: for the pinned base models, the configs in `shapes/` give the size.
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
from sdlab.evaluation import load_optimum
from sdlab.report.costs import planned_settings
from sdlab.runs.records import STAGES, read_record
from sdlab.runs.run import Experiment
from sdlab.runs.studies import study_name
from sdlab.sampling_config import SamplingConfig
from sdlab.search import first_search_space, new_pruner
from sdlab.settings import Settings
from sdlab.tools.measuring import Costs, measure

GB = 1e9


@dataclass
class Work:
    """The work of one notebook. Images are generated ones; a pass is one image through the UNet once."""

    images: float = 0
    passes: float = 0
    encoded: int = 0
    class_encoder_steps: int = 0
    unet_steps: int = 0
    trial_images: float = 0  # seen by the trials' classifiers in training, each time counted
    trial_validations: float = 0  # images that they classify
    cell_images: float = 0  # the same for the classifiers of cells and finalists
    cell_validations: float = 0

    @property
    def steps(self) -> int:
        return round(self.class_encoder_steps + self.unet_steps)

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __mul__(self, factor: float) -> "Work":
        return Work(*(factor * a for a in dataclasses.astuple(self)))


def workload(settings: Settings, facts: DatasetFacts, most: bool = False, pruning: bool = True) -> dict[str, Work]:
    """The work of notebooks 01 to 05: expected, or at `most`, or with nothing pruned.

    Expected: inference steps in the middle of their range, both passes where guidance acts, and pruning as the search's own
    pruner prunes trials of random quality. At most: the highest IS, nothing pruned. The result of a finished search is used.
    """
    s, steps = settings, inference_steps(settings, most)

    def generated(images: float, steps: float) -> Work:
        return Work(images=images, passes=(1 + s.guidance_stop - s.guidance_start) * images * steps)

    def cell(steps: float) -> Work:
        return generated(s.search_images, steps) + classifier_work(s, facts, s.search_images)

    def search(name: str, trials: int) -> Work:
        unpruned = [Counter(dict.fromkeys(s.rungs(), trials))]
        visits = simulate_pruning(s, name, trials) if pruning and not most else unpruned
        total = Work()
        for visit in visits:
            for last, rung in itertools.pairwise([0, *s.rungs()]):
                trial = generated(rung - last, steps[name]) + classifier_work(s, facts, rung, "trial")
                total += trial * (visit[rung] / len(visits))
        if s.search_finalists > 1:
            finalist = generated(s.search_images, steps[name]) + classifier_work(s, facts, s.search_images, "finalist")
            total += finalist * (s.search_finalists + (name == "search_2"))
        return total

    scaling = generated(s.scaling_max * facts.train, steps["optimum_2"]) + classifier_work(s, facts, facts.train)
    for k in range(1, s.scaling_max + 1):
        scaling += classifier_work(s, facts, k * facts.train)
    encoder_steps = s.class_encoder_epochs * math.ceil(facts.train / s.class_encoder_batch_size)
    unet_steps = s.unet_epochs * math.ceil(facts.train / s.unet_batch_size)
    return {
        "01": cell(s.default_num_inference_steps) + Work(encoded=facts.train, class_encoder_steps=encoder_steps),
        "02": cell(steps["optimum_1"]) + search("search_1", s.search_1_trials),
        "03": cell(steps["optimum_1"]) + Work(unet_steps=unet_steps),
        "04": cell(steps["optimum_2"]) + search("search_2", s.search_2_trials),
        "05": scaling,
    }


def inference_steps(s: Settings, most: bool) -> dict[str, float]:
    """Inference steps of both searches' trials and of both optima: the middle or the end of a range, or the known optimum."""

    def expected(low: float, high: float) -> float:
        return high if most else (low + high) / 2

    optimum_1, optimum_2 = finished_optimum(s, "search_1"), finished_optimum(s, "search_2")
    steps = {"search_1": expected(*first_search_space(s).num_inference_steps)}
    steps["optimum_1"] = optimum_1.num_inference_steps if optimum_1 else steps["search_1"]
    steps["search_2"] = expected(min(s.search_min_inference_steps, steps["optimum_1"]), steps["optimum_1"])
    steps["optimum_2"] = optimum_2.num_inference_steps if optimum_2 else steps["search_2"]
    return steps


def classifier_work(s: Settings, facts: DatasetFacts, images: float, kind: str = "cell") -> Work:
    """The classifiers of one set, trained to their last epoch: of a `cell`, a `finalist` or a `trial`."""
    seeds = s.search_classifier_seeds if kind == "trial" else s.classifier_seeds
    scored = facts.val + facts.test if kind == "cell" else {"sealed": facts.val, "paper": facts.test}[s.protocol]
    seen = (
        s.classifier_train_steps * s.classifier_batch_size if s.classifier_train_steps else s.classifier_epochs * images
    )
    trained, validated = seeds * seen, seeds * (s.classifier_epochs * facts.val + scored)
    if kind == "trial":
        return Work(trial_images=trained, trial_validations=validated)
    return Work(cell_images=trained, cell_validations=validated)


def finished_optimum(settings: Settings, search: str) -> SamplingConfig | None:
    """The optimum of a search, if it is finished."""
    record = read_record(settings, {"search_1": "02", "search_2": "04"}[search])
    return load_optimum(Experiment(settings), search) if record is not None and record.finished else None


def simulate_pruning(settings: Settings, search: str, trials: int, repeats: int = 5) -> list[Counter]:
    """How many trials reach each rung if the search's own pruner prunes trials of random quality: one count per repeat."""
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
    """The plan as plain data: a row per notebook, sums, assumptions and warnings.

    `base` is the base model if it is already loaded. Raises `BadInput` for a base model of unknown size.
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
        remarks=list(facts.remarks),
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
        + work.trial_images * c.trial_image
        + work.trial_validations * c.trial_validation
        + work.cell_images * c.cell_image
        + work.cell_validations * c.cell_validation
    )


def disk(s: Settings, facts: DatasetFacts, c: Costs, number: str, work: Work) -> float:
    """Bytes of a notebook's files: uint8 images; latent moments, class tables, the encoder's resume state; half-precision UNets
    and one full-precision state (weights and Adam's moments)."""
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
    """A sentence for each resource that will not suffice."""
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
        memory = (
            torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        ) / GB  # cached by this process
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GB
    if made["memory_gb"] > memory:
        worst = max(made["rows"].values(), key=lambda row: row["memory_gb"])
        found.append(
            f"Memory: {worst['notebook']} needs about {made['memory_gb']:.1f} GB and {device} has {memory:.1f} GB: choose a smaller "
            "`shard_size` or batch size, or another device."
        )
    return found
