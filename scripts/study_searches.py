"""Which search finds the most for the fewest images: pruners compared on one table of measured points, many times over.

    .venv/bin/python scripts/study_searches.py measure runs/digits     # an hour of two cores; goes on where it was cut
    .venv/bin/python scripts/study_searches.py simulate                # minutes: table, figure

`measure` scores a grid of operating points of a finished experiment at every rung, and once more at the last one with
fresh noise and classifiers. `simulate` lets the package's own samplers and pruners search that table (a point is the
nearest one measured), so that each strategy can be repeated a hundred times; what its winner is worth is read from the
fresh scores, which no search sees.
"""

import itertools
import json
from pathlib import Path

import click
import numpy as np
from compare_samplers import Experiment, silent

from sdlab.base_models import load_base_model
from sdlab.datasets import load_dataset
from sdlab.evaluation import OperatingPoint, judge, load_pipeline
from sdlab.generation import GenerationPlan, generate_images, uniform_labels
from sdlab.images import Split
from sdlab.run import read_json, write_json
from sdlab.training import derive_seed

TABLE = Path(__file__).resolve().parents[1] / "reports" / "searches" / "measured.json"
RUNGS = [125, 250, 500, 1000]
STEPS = [5, 7, 10]
GUIDANCE = [0.0, 0.5, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0, 4.5, 7.5]
EPOCHS = [1, 4, 12, 32]
CLASSIFIERS = 2


@click.group()
def main() -> None:
    pass


# ------------------------------------------------------------------------------------------------------ measure


@main.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.option("--table", default=TABLE, type=click.Path(path_type=Path))
def measure(folder: Path, table: Path) -> None:
    """Score every point of the grid with the checkpoints of the experiment in FOLDER."""
    run = Experiment(folder)
    data, base = load_dataset(run.settings), load_base_model(run.settings)
    class_encoder_epoch = read_json(folder / "metrics" / "search_1.json")["best"]["point"]["class_encoder_epoch"]
    kept = json.loads(table.read_text()) if table.exists() else dict(experiment=run.settings.experiment, points={})
    grid = list(itertools.product(STEPS, GUIDANCE, EPOCHS))
    np.random.default_rng(0).shuffle(grid)  # a table that was cut is still spread over all of it
    for number, (steps, guidance, epoch) in enumerate(grid):
        name = f"{int(steps)}/{guidance:g}/{int(epoch)}"
        if name in kept["points"]:
            continue
        point = OperatingPoint(class_encoder_epoch, int(epoch), int(steps), float(guidance))
        pipeline = load_pipeline(run, base, point)
        scores = {}
        for noise, rungs in (("search", RUNGS), ("fresh", RUNGS[-1:])):
            images = made(run, pipeline, point, data.num_classes, noise)
            for rung in rungs:
                seeds = [derive_seed(noise, "study's classifier", i) for i in range(CLASSIFIERS)]
                scored = judge(head(images, rung), data, run.settings, seeds, ["val", "test"], silent, searching=True)
                scores[f"{noise}/{rung}"] = {split: [s.accuracy for s in scored[split]] for split in scored}
        kept["points"][name] = scores
        write_json(table, kept)
        print(f"{number + 1} of {len(grid)}: {name}, {scores['fresh/1000']['test']}", flush=True)


def head(split: Split, count: int) -> Split:
    return Split(split.images[:count], split.labels[:count])


def made(run: Experiment, pipeline, point: OperatingPoint, num_classes: int, noise: str) -> Split:
    s, labels = run.settings, uniform_labels(num_classes)
    plan = GenerationPlan("", s.scheduler, point.num_inference_steps, point.guidance_scale, (0.0, 1.0), labels,
                          derive_seed(noise, "study"), s.base_image_size, s.image_size, s.shard_size)  # fmt: skip
    shards = [generate_images(pipeline, plan, range(first, first + 250)) for first in range(0, RUNGS[-1], 250)]
    return Split(np.concatenate(shards), plan.labels_of(0, RUNGS[-1]))


if __name__ == "__main__":
    main()
