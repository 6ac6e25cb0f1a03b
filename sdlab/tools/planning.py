"""Settings + a few timed steps -> what an experiment will cost, notebook by notebook, before it is spent.

`workload` counts the operations of the notebooks, `measure` times one of each on this device, `make_plan` multiplies. The
weights need not be on this machine: for the pinned base models, the configs in `shapes/` give the size.
"""

import dataclasses
import itertools
import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import optuna
import torch

from sdlab.base_models import BaseModel, load_base_model
from sdlab.data.images import DatasetFacts
from sdlab.data.model_files import is_available_locally
from sdlab.evaluation import load_optimum
from sdlab.report.costs import planned_settings
from sdlab.runs.experiment import Experiment
from sdlab.runs.files import free_space
from sdlab.runs.records import read_record
from sdlab.runs.stages import STAGES
from sdlab.runs.studies import study_name
from sdlab.sampling_config import SamplingConfig
from sdlab.search import first_search_space, new_pruner
from sdlab.settings import Settings
from sdlab.tools.measuring import Costs, load_without_weights, measure
from sdlab.verdict.attacks import DRAWS, TIMESTEPS
from sdlab.verdict.audit import attacked_epochs
from sdlab.verdict.collapse import judged_images
from sdlab.verdict.exposure import FEWEST

GB = 1e9


# The work of a notebook: how often each operation of `measure` is made. "images" are generated (and decoded) ones; a pass is
# one image through the UNet once; "trial images" are those that the trials' classifiers see in training, each time
# counted, "trial validations" those that they classify; "cell ..." the same for the classifiers of cells and finalists.
# "shown ..." are those of a notebook's own figures, "decoded" those that only pass the VAE (as dear as a generated one's
# decoding); bytes are weights that are hashed and loaded, or hashed and written.
Work = Counter
COSTS_AS = {"shown passes": "passes", "shown images": "images", "decoded": "images"}


def workload(settings: Settings, facts: DatasetFacts, most: bool = False, pruning: bool = True) -> dict[str, Work]:
    """The work of notebooks 00 to 05 and 08: expected, or at `most`, or with nothing pruned.

    Expected: inference steps in the middle of their range, both passes where guidance acts, and pruning as the search's own
    pruner prunes trials of random quality. At most: the highest IS, nothing pruned. The result of a finished search is used.
    """
    s, steps = settings, inference_steps(settings, most)

    def cell(steps: float) -> Work:
        return generated(s, s.search_images, steps) + classifier_work(s, facts, s.search_images)

    def search(name: str, trials: int) -> Work:
        unpruned = [[len(s.rungs())] * trials]
        simulated = simulate_pruning(s, name, trials) if pruning and not most else unpruned
        total = Work()
        for reached in simulated:
            for index, (last, rung) in enumerate(itertools.pairwise([0, *s.rungs()])):
                trial = generated(s, rung - last, steps[name]) + classifier_work(s, facts, rung, "trial")
                total += scaled(trial, sum(rungs > index for rungs in reached) / len(simulated))
        if s.search_finalists > 1:
            finalist = generated(s, s.search_images, steps[name])
            finalist += classifier_work(s, facts, s.search_images, "finalist")
            total += scaled(finalist, s.search_finalists + (name == "search_2"))
        return total

    round_trips = Work({"encoded": facts.train, "decoded": facts.train})
    scaling = generated(s, s.scaling_max * facts.train, steps["optimum_2"]) + round_trips
    scaling += scaled(classifier_work(s, facts, facts.train), 2)  # real images, and their round trips
    for k in range(1, s.scaling_max + 1):
        scaling += classifier_work(s, facts, k * facts.train)
    encoder_steps = s.class_encoder_epochs * math.ceil(facts.train / s.class_encoder_batch_size)
    unet_steps = s.unet_epochs * math.ceil(facts.train / s.unet_batch_size)
    return {
        "00": round_trips + scaled(classifier_work(s, facts, facts.train, "finalist"), 2 + 1 / s.classifier_seeds),
        "01": cell(s.default_num_inference_steps)
        + Work({"encoded": facts.train, "class_encoder steps": encoder_steps}),
        "02": cell(steps["optimum_1"]) + search("search_1", s.search_1_trials),
        "03": cell(steps["optimum_1"]) + Work({"unet steps": unet_steps}),
        "04": cell(steps["optimum_2"]) + search("search_2", s.search_2_trials),
        "05": scaling,
        "08": controls_work(settings, facts, most),
    }


def controls_work(s: Settings, facts: DatasetFacts, most: bool) -> Work:
    """The verdict's controls, trained as long as the chosen set, whose size is in the middle of x1 ... x10 or at `most` x10."""
    size = (s.scaling_max if most else (1 + s.scaling_max) / 2) * facts.train
    passes = 0 if s.classifier_train_steps else facts.train  # of the round trips, which are no cell of Table 2 then
    return scaled(classifier_work(s, facts, size), controls_of(s)) + Work({"encoded": passes, "decoded": passes})


def controls_of(s: Settings) -> int:
    """How many sets the verdict trains on that are not cells of Table 2: real + chosen, augmented, and where epochs are counted
    real images and their round trips, trained as long as the chosen set."""
    return 1 + (s.augmentation != "none") + (0 if s.classifier_train_steps else 2)


def audit_work(s: Settings, facts: DatasetFacts, most: bool = False) -> Work:
    """An audit, which is made on request: both trainings on half of the images, and at a few UNet epochs a set of the chosen size
    of that half, classifiers, and attacks."""
    half, epochs = facts.train // 2, len(attacked_epochs(s, s.unet_epochs))
    images = half * (s.scaling_max if most else (1 + s.scaling_max) / 2)
    passes = facts.train * len(TIMESTEPS) * ((1 + DRAWS) * epochs + 1 + DRAWS)
    work = scaled(
        generated(s, images, inference_steps(s, most)["optimum_2"]) + classifier_work(s, facts, images), epochs
    )
    work += Work(
        {
            "class_encoder steps": s.class_encoder_epochs * math.ceil(half / s.class_encoder_batch_size),
            "unet steps": s.unet_epochs * math.ceil(half / s.unet_batch_size),
            "shown passes": passes,
            "encoded": epochs * (facts.train + images) + facts.train + facts.val,
        }
    )
    return work


def besides(s: Settings, facts: DatasetFacts, base: BaseModel, sizes: Mapping[str, int], most: bool) -> dict[str, Work]:
    """What these notebooks do besides the method: images of their figures, weights read and written.

    It is minutes with Stable Diffusion 2.0, which is little in an experiment and much in a rehearsal.
    """
    steps, each, default = inference_steps(s, most), min(16, facts.num_classes), s.default_num_inference_steps
    scales, scale_passes = 5, 1 + 1 + 2 + 2 + 2  # UGS 0 and 1 are one pass each
    first, few, judged = s.first_kept_unet_epoch, min(20, default), judged_images(facts.num_classes)
    encoder_epochs = len({1, max(1, s.class_encoder_epochs // 4), s.class_encoder_epochs})
    unet_epochs = len({first, max(first, s.unet_epochs // 4), s.unet_epochs})
    by_hand = s.search_first_images  # 02's trial in the open, 5 steps
    model, unet = 4 * (sizes["unet"] + base.vae.num_parameters()), 2 * sizes["unet"]

    def work(passes: float, images: float, read: float, written: float = 0) -> Work:
        return Work({"shown passes": passes, "shown images": images, "bytes read": read, "bytes written": written})

    return {
        "00": work(24 * few, 24 + min(12, facts.train), model),
        "01": work(((scale_passes + 2 * encoder_epochs) * each + 2 * judged) * few,
                   (scales + encoder_epochs) * each + judged + 5 * min(10, facts.train),
                   model, s.class_encoder_epochs * (12 * sizes["encoder"] + 4 * sizes["table"])),
        "02": work(2 * by_hand * 5 + scale_passes * each * steps["optimum_1"], by_hand + scales * each, model),
        "03": work(2 * ((1 + unet_epochs) * each + judged) * steps["optimum_1"], (1 + unet_epochs) * each + judged,
                   model + 4 * sizes["unet"] + (unet_epochs + 1) * unet,
                   s.unet_epochs * 12 * sizes["unet"] + (s.unet_epochs - first + 1) * unet),
        "04": work((scale_passes + 2) * each * steps["optimum_2"] + 3 * each * default, (scales + 3) * each,
                   model + (scales + 2 + s.search_2_trials + s.search_finalists) * unet),
        "05": work(0, 0, model + unet),
        "08": work(0, 0, model),
    }  # fmt: skip


def generated(s: Settings, images: float, steps: float) -> Work:
    return Work({"images": images, "passes": (1 + s.guidance_stop - s.guidance_start) * images * steps})


def scaled(work: Work, factor: float) -> Work:
    return Work({operation: factor * count for operation, count in work.items()})


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
    whose = "trial" if kind == "trial" else "cell"
    return Work(
        {f"{whose} images": seeds * seen, f"{whose} validations": seeds * (s.classifier_epochs * facts.val + scored)}
    )


def finished_optimum(settings: Settings, search: str) -> SamplingConfig | None:
    """The optimum of a search, if it is finished."""
    record = read_record(settings, {"search_1": "02", "search_2": "04"}[search])
    return load_optimum(Experiment(settings), search) if record is not None and record.finished else None


def simulate_pruning(settings: Settings, search: str, trials: int, repeats: int = 5) -> list[list[int]]:
    """How many rungs each trial reaches if the search's own pruner prunes trials of random quality: a list per repeat."""
    simulated, rungs = [], settings.rungs()
    for repeat in range(repeats):
        rng, reached = np.random.default_rng(repeat), [0] * trials
        study = optuna.create_study(
            study_name=study_name(settings, search), direction="maximize", pruner=new_pruner(settings),
            sampler=optuna.samplers.RandomSampler(seed=repeat),
        )  # fmt: skip
        for number in range(trials):
            trial, quality, pruned = study.ask(), rng.uniform(), False
            for rung in rungs:
                reached[number] += 1
                trial.report(quality + rng.normal(0, 0.1), step=rung)
                if rung < rungs[-1] and trial.should_prune():
                    pruned = True
                    break
            study.tell(trial, None if pruned else quality, state=optuna.trial.TrialState.PRUNED if pruned else None)
        simulated.append(reached)
    return simulated


def make_plan(
    settings: Settings, facts: DatasetFacts, base: BaseModel | None = None, costs_file: Path | None = None
) -> dict:
    """The plan as plain data: a row per notebook, sums, assumptions and warnings.

    `base` is the base model if it is already loaded. The costs of `costs_file` were measured on another device.
    Raises `BadInput` for a base model of unknown size.
    """
    here = base is not None or is_available_locally(settings)
    if base is None:
        base = load_base_model(settings) if here else load_without_weights(settings)
    costs = Costs.from_file(costs_file, settings, facts, base) if costs_file else measure(settings, facts, base)
    remarks = list(facts.remarks)
    if (devices := settings.training_processes) > 1:
        costs = share_trainings(costs, devices)
        remarks.append(f"A training step that {devices} devices share is planned {devices} times as fast, at best: they also "
                       "exchange gradients.")  # fmt: skip
    expected, most = workload(settings, facts), workload(settings, facts, most=True)
    unpruned = workload(settings, facts, pruning=False)
    more, more_at_most = (besides(settings, facts, base, costs.sizes, at_most) for at_most in (False, True))
    rows = {
        number: dict(
            notebook=STAGES[number].stem,
            images=round(work["images"]),
            steps=round(work["class_encoder steps"] + work["unet steps"]),
            hours=seconds(work + more[number], costs) / 3600,
            hours_at_most=seconds(most[number] + more_at_most[number], costs) / 3600,
            pruning_saves=1 - work["images"] / unpruned[number]["images"] if work["images"] else 0.0,
            disk_gb=disk(settings, facts, costs, number, work) / GB,
            memory_gb=max(costs.memory["generating"], costs.memory.get(number, 0.0)) / GB,
        )
        for number, work in expected.items()
    }
    fetched = 0.0 if here else 4 * (costs.sizes["unet"] + base.vae.num_parameters()) / GB
    made = dict(
        settings=planned_settings(settings),
        experiment=settings.experiment,
        base_model=settings.base_model,
        base_model_is_here=here or costs_file is not None,  # else timed with zeros
        device=costs.device,
        training_images=facts.train,
        remarks=remarks,
        classes=facts.num_classes,
        unet_parameters=costs.sizes["unet"],
        rows=rows,
        fetched_gb=fetched,
        memory_gb=max(row["memory_gb"] for row in rows.values()),
        costs=dataclasses.asdict(costs),
    )
    made |= {name: sum(row[name] for row in rows.values()) for name in ("hours", "hours_at_most", "disk_gb")}
    if facts.train >= 2 * FEWEST:
        made["audit_hours"] = seconds(audit_work(settings, facts), costs) / 3600
    made["disk_peak_gb"] = made["disk_gb"] + 12 * costs.sizes["unet"] / GB + fetched
    return made | dict(warnings=[] if costs_file else warnings(settings, made, base.device))


def share_trainings(costs: Costs, devices: int) -> Costs:
    """The costs where so many devices share each training step."""
    shared = {name: took / devices if name.endswith(" steps") else took for name, took in costs.seconds.items()}
    return dataclasses.replace(costs, seconds=shared)


def seconds(work: Work, costs: Costs) -> float:
    return sum(count * costs.seconds[COSTS_AS.get(operation, operation)] for operation, count in work.items())


def disk(s: Settings, facts: DatasetFacts, costs: Costs, number: str, work: Work) -> float:
    """Bytes of a notebook's files: uint8 images; latent moments, class tables, the encoder's resume state; half-precision UNets
    and one full-precision state (weights and Adam's moments)."""
    images, sizes = work["images"] * 3 * s.image_size**2, costs.sizes
    if number == "01":
        return (
            images
            + 4 * sizes["latent"] * facts.train
            + 4 * sizes["table"] * s.class_encoder_epochs
            + 12 * sizes["encoder"]
        )
    return images + (2 * (s.unet_kept_epochs or s.unet_epochs) + 12) * sizes["unet"] if number == "03" else images


def warnings(s: Settings, made: Mapping, device: torch.device) -> list[str]:
    """A sentence for each resource that will not suffice."""
    found, free = [], free_space(s.run_folder) / GB
    if made["disk_peak_gb"] > free:
        found.append(
            f"Disk: up to {made['disk_peak_gb']:.1f} GB are needed and {free:.1f} GB are free: let `runs_root` point to a larger disk, "
            "keep fewer UNets (`unet_kept_epochs`), or train fewer `unet_epochs`."
        )
    if device.type == "cuda":
        memory = (
            torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        ) / GB  # reserved by this process
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GB
    if made["memory_gb"] > memory:
        worst = max(made["rows"].values(), key=lambda row: row["memory_gb"])
        found.append(
            f"Memory: {worst['notebook']} needs about {made['memory_gb']:.1f} GB and {device} has {memory:.1f} GB: choose a smaller "
            "`shard_size` or batch size, or another device."
        )
    return found
