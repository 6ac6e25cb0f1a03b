"""How cheap can a set be made that trains as well: CAS of cheaper samplers beside 50-step DDIM, paired by seed.

    .venv/bin/python scripts/compare_samplers.py runs/digits

On a finished experiment's chosen checkpoints. Each seed gives every sampler the same noise and the same classifier
seeds, so that differences are paired. CAS is read on validation images. What is done is kept in `--state` and not done again.
"""

import json
import math
import statistics
import time
from pathlib import Path

import click
import numpy as np
import yaml
from scipy.stats import t as student
from tqdm import tqdm

from sdlab.base_models import load_base_model, make_scheduler
from sdlab.data.datasets import load_dataset
from sdlab.data.images import Split
from sdlab.evaluation import train_and_score_classifiers
from sdlab.generation import GenerationPlan, SamplingConfig, generate_images, load_pipeline, uniform_labels
from sdlab.runs.files import read_json, write_json
from sdlab.seeds import derive_seed
from sdlab.settings import Settings

# name -> scheduler, steps, guidance (None: the search's optimum), share of the steps until which guidance acts
SAMPLERS = {
    "DDIM 50": ("DDIMScheduler", 50, None, 1.0),
    "DDIM 10": ("DDIMScheduler", 10, None, 1.0),
    "DPM-Solver++ 10": ("DPMSolverMultistepScheduler", 10, None, 1.0),
    "DPM-Solver++ 8, guidance on the first 3 steps": ("DPMSolverMultistepScheduler", 8, None, 0.4),
    "DPM-Solver++ 7, guidance on the first 2 steps": ("DPMSolverMultistepScheduler", 7, None, 0.3),
    "DPM-Solver++ 11, guidance 1": ("DPMSolverMultistepScheduler", 11, 1.0, 1.0),
    "UniPC 11, guidance 1": ("UniPCMultistepScheduler", 11, 1.0, 1.0),
    "UniPC 9, guidance 1": ("UniPCMultistepScheduler", 9, 1.0, 1.0),
}
COMMAND = "python scripts/compare_samplers.py runs/digits"
REPORT = Path(__file__).resolve().parents[1] / "reports" / "reference" / "samplers"
LINE = -1.0  # points of CAS that a sampler may lose, at most, by its whole interval


class Experiment:
    """Only what is needed of a `Run`, without its lock: nothing is written into the folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.settings = Settings.from_mapping(yaml.safe_load((folder / "settings.yaml").read_text(encoding="utf-8")))


def measured(run: Experiment, base, data, point: SamplingConfig, sampler: str, seed: int) -> dict:
    """CAS (mean over the settings' classifier seeds) and seconds of generating the training images of one seed."""
    scheduler, steps, guidance, until = SAMPLERS[sampler]
    s = run.settings
    guidance = point.guidance_scale if guidance is None else guidance
    pipeline = load_pipeline(run, base, point)
    pipeline.scheduler = make_scheduler(scheduler, base.scheduler_config)
    labels = uniform_labels(data.num_classes)
    plan = GenerationPlan("", scheduler, steps, guidance, (0.0, until), labels, derive_seed(seed, "samplers"), s.base_image_size,
                          data.image_size, s.shard_size)  # fmt: skip
    started = time.perf_counter()
    shards = [
        generate_images(pipeline, plan, range(first, first + s.shard_size))
        for first in range(0, s.search_images, s.shard_size)
    ]
    seconds = time.perf_counter() - started
    images = np.concatenate(shards)
    seeds = [derive_seed(seed, "sampler's classifier", i) for i in range(s.classifier_seeds)]
    scores = train_and_score_classifiers(
        Split(images, plan.labels_of(0, len(images))), data, s, seeds, ["val"], silent
    )["val"]
    return dict(cas=100 * statistics.mean(score.accuracy for score in scores), seconds=seconds)


def silent(**more):
    return tqdm(**more, disable=True)


@click.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.option("--seeds", default=8, show_default=True)
@click.option("--state", default=REPORT / "measured.json", type=click.Path(path_type=Path), show_default=False)
def main(folder: Path, seeds: int, state: Path) -> None:
    """Compare the samplers on the finished experiment in FOLDER; tables beside the state file."""
    run = Experiment(folder)
    data, base = load_dataset(run.settings), load_base_model(run.settings)
    point = SamplingConfig(**read_json(folder / "metrics" / "search_2.json")["best"]["point"])
    done = json.loads(state.read_text()) if state.exists() else {}
    for seed in range(seeds):
        for sampler in SAMPLERS:
            if f"{sampler}/{seed}" not in done:
                done[f"{sampler}/{seed}"] = measured(run, base, data, point, sampler, seed)
                write_json(state, done)
                print(sampler, seed, done[f"{sampler}/{seed}"], flush=True)
    first, lines, fastest = next(iter(SAMPLERS)), [], None
    for sampler in SAMPLERS:
        cas = [done[f"{sampler}/{seed}"]["cas"] for seed in range(seeds)]
        differences = [c - done[f"{first}/{seed}"]["cas"] for seed, c in enumerate(cas)]
        ratios = [done[f"{first}/{seed}"]["seconds"] / done[f"{sampler}/{seed}"]["seconds"] for seed in range(seeds)]
        if sampler == first:
            lines.append(f"| {sampler} | {statistics.mean(cas):.2f} | | 1 |")
            continue
        half = student.ppf(0.975, seeds - 1) * statistics.stdev(differences) / math.sqrt(seeds)
        mean = statistics.mean(differences)
        said = f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})"
        lines.append(f"| {sampler} | {statistics.mean(cas):.2f} | {said} | {statistics.median(ratios):.1f} |")
        if mean - half > LINE and (fastest is None or statistics.median(ratios) > fastest["ratio"]):
            ours, theirs = (
                statistics.median(done[f"{s}/{n}"]["seconds"] for n in range(seeds)) for s in (sampler, first)
            )
            fastest = dict(
                part=f"the same CAS for less: {sampler} (difference {said} points, {seeds} paired seeds)",
                alternative="DDIM, 50 steps", ours=ours, theirs=theirs, ratio=statistics.median(ratios),
                lowest=min(ratios), highest=max(ratios), repetitions=seeds, command=COMMAND,
            )  # fmt: skip
    head = (
        f"# Samplers on {run.settings.experiment}\n\n{point.num_inference_steps} steps were searched for; guidance {point.guidance_scale:.2f}, "
        f"UNet epoch {point.unet_epoch}. CAS in % on validation images, {run.settings.search_images} images, "
        f"{run.settings.classifier_seeds} classifiers a seed; {seeds} paired seeds; intervals of 95 %; times are ratios within a seed.\n\n"
        "| sampler | CAS | difference from DDIM 50 | times faster |\n| --- | --- | --- | --- |\n"
    )
    text = head + "\n".join(lines) + f"\n\nMade by `{COMMAND}`.\n"
    state.with_name("samplers.md").write_text(text)
    if fastest:
        write_json(state.with_name("row.json"), fastest)
    print(text)


if __name__ == "__main__":
    main()
