"""How well does a classifier recipe judge? Validation accuracy of several recipes on the sets of a finished run.

python scripts/compare_recipes.py digits --seeds 4
"""

import dataclasses

import click
import numpy as np

from sdlab.classifier import ClassifierRecipe, train_classifier
from sdlab.data.datasets import load_dataset
from sdlab.data.images import Split
from sdlab.evaluation import generate_pool, load_optimum
from sdlab.generation import generate_set
from sdlab.runs.run import Run
from sdlab.seeds import derive_seed
from sdlab.settings import Settings, parameter_file

RECIPES = (
    dict(steps=150, learning_rate=1e-3),
    dict(steps=300, learning_rate=1e-3),
    dict(steps=150, learning_rate=3e-3),
)


@click.command()
@click.argument("experiment")
@click.option("--seeds", default=4, show_default=True)
def main(experiment: str, seeds: int) -> None:
    from sdlab.base_models import load_base_model

    settings = Settings.from_file(parameter_file(experiment))
    data, base = load_dataset(settings), load_base_model(settings)
    run = Run(settings, "05_scaling", data, base)
    if not run.finished:
        raise click.ClickException(f"{experiment} is not finished: `sdlab run {experiment}` first.")
    point, size = load_optimum(run, "search_2"), len(data.train)
    after_4 = generate_set(run, base, data, point, settings.search_images, derive_seed(settings.seed, "table 1"))
    pool = generate_pool(run, base, data, point, 5 * size)
    sets: dict[str, Split] = {
        "real": data.train, "After 4": after_4.split(settings.search_images), "x1": pool.split(size), "x5": pool.split(5 * size),
    }  # fmt: skip
    for name, train in sets.items():
        for changes in RECIPES:
            recipe = dataclasses.replace(ClassifierRecipe.of(settings), **changes)
            accuracy = [
                100 * train_classifier(train, data.val, data.num_classes, recipe, 100 + s).val_accuracy
                for s in range(seeds)
            ]
            print(
                f"{name:<8} {len(train):>6} images, {changes}: {np.mean(accuracy):.1f}, {np.std(accuracy, ddof=1):.1f}"
            )


if __name__ == "__main__":
    main()
