"""Which interval covers the true difference of two training sets? The study behind `sdlab/verdict/intervals.py`.

    .venv/bin/python scripts/simulate_intervals.py      # a few minutes; writes reports/reference/intervals/coverage.md

Two training sets, S classifiers each, n test images. A classifier's answer to an image is right with probability

    sigmoid(level of the set + difficulty of the image + image x set + classifier),

all normal. The true difference is that of the two expected accuracies over all images and all classifiers. Coverage is the
share of draws whose interval holds it; 95 % is asked for, and above 98 % an interval is called conservative.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pandas as pd
from scipy import stats
from scipy.optimize import brentq
from scipy.special import expit
from tqdm import tqdm

from sdlab.paths import PROJECT_ROOT
from sdlab.runs.files import atomic_write
from sdlab.verdict.intervals import paired_difference

TARGET = PROJECT_ROOT / "reports" / "reference" / "intervals" / "coverage.md"
SEEDS, IMAGES = (2, 3, 4, 8), (400, 3000)
ACCURACIES = {"easy": (0.98, 0.965), "hard": (0.55, 0.50)}  # of the two training sets
# Deviations in logits: an image's difficulty, its own effect on one of the sets, and a classifier's luck. Digits' classifiers
# deviate by 0.5 to 2 points, RetinaMNIST's by 2 to 5.
DIFFICULTY, IMAGE_AND_SET, LUCK = 2.0, 1.0, {"alike": 0.03, "differ": 0.25, "differ much": 0.8}
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(80)


def both(second: np.ndarray, first: np.ndarray) -> tuple[float, float]:
    found = paired_difference(second, first)
    return found.low, found.high


def of_sample(values: np.ndarray) -> tuple[float, float]:
    """Student's interval of independent values."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return values.mean() - half, values.mean() + half


def seeds_only(second: np.ndarray, first: np.ndarray) -> tuple[float, float]:
    return of_sample((second.astype(float) - first).mean(1))


def images_only(second: np.ndarray, first: np.ndarray) -> tuple[float, float]:
    return of_sample((second.astype(float) - first).mean(0))


INTERVALS = {"seeds and images": both, "seeds only": seeds_only, "images only": images_only}


def draw(
    rng: np.random.Generator, seeds: int, images: int, levels: tuple[float, float], luck: float
) -> Iterator[np.ndarray]:
    """Right or wrong answers of both sets' classifiers: bool (seeds, images) each."""
    difficulty = rng.normal(0, DIFFICULTY, images)
    for level in levels:
        logits = level + difficulty + rng.normal(0, IMAGE_AND_SET, images) + rng.normal(0, luck, (seeds, 1))
        yield rng.random((seeds, images)) < expit(logits)


def level_of(accuracy: float, luck: float) -> float:
    """The logit that gives this expected accuracy."""
    deviation = (DIFFICULTY**2 + IMAGE_AND_SET**2 + luck**2) ** 0.5
    return brentq(lambda level: WEIGHTS @ expit(level + deviation * NODES) / WEIGHTS.sum() - accuracy, -50, 50)


def simulate(
    draws: int, seeds: int, images: int, accuracies: tuple[float, float], luck: float, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Of each interval: its coverage, and its median width in points."""
    rng, truth = np.random.default_rng(seed), accuracies[1] - accuracies[0]
    levels = tuple(level_of(accuracy, luck) for accuracy in accuracies)
    found = {name: np.empty((draws, 2)) for name in INTERVALS}
    for row in range(draws):
        first, second = draw(rng, seeds, images, levels, luck)
        for name, interval in INTERVALS.items():
            found[name][row] = interval(second, first)
    covered = {name: float(((ends[:, 0] <= truth) & (truth <= ends[:, 1])).mean()) for name, ends in found.items()}
    return {name: (covered[name], 100 * float(np.median(ends[:, 1] - ends[:, 0]))) for name, ends in found.items()}


@click.command(help=__doc__)
@click.option("--draws", default=2000, show_default=True)
@click.option("--target", default=TARGET, type=click.Path(path_type=Path), show_default=True)
def main(draws: int, target: Path) -> None:
    rows, settings = [], list(itertools.product(SEEDS, IMAGES, ACCURACIES.items(), LUCK.items()))
    for seeds, images, (name, accuracies), (kind, luck) in tqdm(settings):
        found = simulate(draws, seeds, images, accuracies, luck)
        row = {"seeds": seeds, "test images": f"{images:,}", "task": name, "classifiers": kind}
        rows.append(row | {interval: f"{100 * c:.1f} % ({width:.2f})" for interval, (c, width) in found.items()})
    table = pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)
    with atomic_write(target) as part:
        part.write_text(
            f"# Coverage of 95 % intervals for a difference of accuracies\n\n{draws:,} draws a line; in brackets the median width "
            f"in points. `scripts/simulate_intervals.py` says how they are drawn.\n\n{table}\n",
            encoding="utf-8",
        )
    click.echo(table)


if __name__ == "__main__":
    main()
