"""CAS on validation images at chosen points of an experiment's search space: what a change of training brings.

    sdlab run digits --until 03 -p unet_epochs 32 -p runs_root /tmp/tried
    python scripts/score_points.py digits --point 9 1.0 22 32 --images 4000 -p unet_epochs 32 -p runs_root /tmp/tried

A point is IS, UGS, epoch of the Class-Encoder, epoch of the UNet (0: the base model's). All points get the same noise
and the classifiers of the run's cells. Nothing is saved, and no test image is read.
"""

import dataclasses

import click
import numpy as np

from sdlab.base_models import load_base_model
from sdlab.data.datasets import load_dataset
from sdlab.data.images import Split
from sdlab.evaluation import classifier_seeds, train_and_score_classifiers
from sdlab.generation import generate_images, plan_generation
from sdlab.metrics import summarize
from sdlab.runs.experiment import Experiment
from sdlab.sampling_config import SamplingConfig, load_pipeline
from sdlab.seeds import derive_seed
from sdlab.settings import Settings
from sdlab.tools.cli import with_settings

BATCH = 250  # images
NAMES = [field.name for field in dataclasses.fields(SamplingConfig)]


@click.command()
@with_settings
@click.option(
    "--point", "points", type=(int, float, int, int), multiple=True, required=True, metavar="IS UGS EPOCH EPOCH"
)
@click.option("--images", default=1000, show_default=True, help="Images of each point.")
def main(settings: Settings, points: tuple[tuple, ...], images: int) -> None:
    """Score points with the checkpoints of EXPERIMENT."""
    run = Experiment(settings, load_dataset(settings), load_base_model(settings))
    for point in points:
        config = SamplingConfig(**dict(zip(NAMES, point, strict=True)))
        plan = plan_generation(run, config, derive_seed(settings.seed, "points"))
        pipeline = load_pipeline(run, config)
        parts = [range(i, min(i + BATCH, images)) for i in range(0, images, BATCH)]
        drawn = Split(
            np.concatenate([generate_images(pipeline, plan, part) for part in parts]), plan.labels_of(0, images)
        )
        scores = train_and_score_classifiers(run, drawn, classifier_seeds(run), ["val"], "point")["val"]
        cas = summarize(scores)
        deviation = "" if cas["std"] is None else f" ± {100 * cas['std']:.1f}"
        said = f"{100 * cas['mean']:.1f}{deviation} % of {cas['n']} images, {len(scores)} classifiers"
        click.echo(f"{' '.join(map(str, point))}: {said}")


if __name__ == "__main__":
    main()
