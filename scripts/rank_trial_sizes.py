"""How large must a trial be? Random points of the final search, judged by few images and by many: validation accuracy.

python scripts/rank_trial_sizes.py digits runs/ranks

Prints a line a point and, for each size, Spearman's rank correlation with the largest. Images are kept in the second
argument's folder, so a run that was cut goes on.
"""

import dataclasses
import random
from pathlib import Path

import click
import pandas as pd
from scipy.stats import spearmanr

SIZES, LARGEST = (250, 500, 1000), 3000


@click.command()
@click.argument("experiment")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--points", default=16, show_default=True)
@click.option("--max-guidance", default=3.6, show_default=True)
def main(experiment: str, folder: Path, points: int, max_guidance: float) -> None:
    from sdlab.base_models import load_base_model
    from sdlab.datasets import load_dataset
    from sdlab.evaluation import found_point, judge, load_pipeline, plan_generation, summary
    from sdlab.generation import generate
    from sdlab.run import Run
    from sdlab.settings import Settings, parameter_file
    from sdlab.training import derive_seed

    settings = Settings.from_file(parameter_file(experiment))
    data, base = load_dataset(settings), load_base_model(settings)
    run = Run(settings, "05_scaling", data, base)
    if not run.finished:
        raise click.ClickException(f"{experiment} is not finished: `sdlab run {experiment}` first.")
    optimum, rng, rows = found_point(run, "search_2"), random.Random(settings.seed), []
    for number in range(points):
        point = dataclasses.replace(
            optimum,
            unet_epoch=rng.randint(1, settings.unet_epochs),
            num_inference_steps=rng.randint(settings.search_min_steps, 7),
            guidance_scale=round(rng.uniform(0.6, max_guidance), 2),
        )
        plan = plan_generation(run, base, data, point, derive_seed(settings.seed, "ranks", number))
        made = generate(load_pipeline(run, base, point), plan, folder, LARGEST)
        row = dict(IS=point.num_inference_steps, UGS=point.guidance_scale, epoch=point.unet_epoch)
        for size in (*SIZES, LARGEST):
            # A trial's two classifiers; the yardstick has four of its own.
            seeds = [1, 2, 3, 4] if size == LARGEST else [11, 12]
            row[size] = summary(judge(made.split(size), data, settings, seeds, ["val"])["val"])["mean"]
        rows.append(row)
        print({k: round(v, 3) for k, v in row.items()}, flush=True)
    table = pd.DataFrame(rows)
    for size in SIZES:
        print(f"{size} images: rank correlation with {LARGEST} images {spearmanr(table[size], table[LARGEST])[0]:.2f}")


if __name__ == "__main__":
    main()
