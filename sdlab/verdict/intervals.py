"""Two training sets, scored in pairs -> the difference of their accuracies, with an interval.

Let d[s, i] be 1, 0 or -1: whether the classifiers of seed s, one trained on each set, were right about test image i, second
minus first. Seeds and images are two crossed samples,

    d[s, i] = mu + seed_s + image_i + rest_si,

so a new classifier and a new test image both move the mean. Its variance has the estimate (Cornfield and Tukey 1956)

    (MS_seeds + MS_images - MS_rest) / (S n)

with degrees of freedom by Satterthwaite 1946. An interval over seeds alone forgets the images, one over images alone the
seeds: `scripts/simulate_intervals.py` shows what each covers.
"""

import math
from dataclasses import dataclass

import numpy as np

POPULATIONS = {
    True: "over new test images and new classifier seeds",
    False: "over new test images; one classifier each",
}


@dataclass(frozen=True)
class Difference:
    """An accuracy minus another one, in shares of 1, and the interval that covers the true value."""

    mean: float
    low: float
    high: float
    standard_error: float
    seeds: int
    images: int
    level: float

    @property
    def population(self) -> str:
        """What the interval speaks about."""
        return POPULATIONS[self.seeds > 1]


def paired_difference(second: np.ndarray, first: np.ndarray, level: float = 0.95) -> Difference:
    """The mean of `second` minus that of `first`, bool (S, n) each: answers of S classifiers to the same n images, right or
    wrong, in pairs of seeds. With one seed it speaks about new images only.
    """
    from scipy import stats  # is slow to import

    answers = second.astype(float) - first.astype(float)
    seeds, images = answers.shape
    mean = float(answers.mean())
    if images == 1:
        return Difference(mean, -1.0, 1.0, 1.0, seeds, images, level)
    variance, freedom = variance_of_mean(answers)
    half = math.sqrt(variance) * float(stats.t.ppf((1 + level) / 2, freedom))
    # Where (almost) no image tells the sets apart: what share could do so, and be missed (Clopper and Pearson).
    half = max(half, 1 - ((1 - level) / 2) ** (1 / images))
    return Difference(mean, max(mean - half, -1.0), min(mean + half, 1.0), math.sqrt(variance), seeds, images, level)


def variance_of_mean(answers: np.ndarray) -> tuple[float, float]:
    """The variance of the mean of (S, n) answers, and its degrees of freedom, at least one."""
    seeds, images = answers.shape
    mean = answers.mean()
    by_image = answers.mean(0) - mean
    ms_images = seeds * float((by_image**2).sum()) / (images - 1)
    if seeds == 1:
        return ms_images / images, images - 1
    by_seed = answers.mean(1) - mean
    ms_seeds = images * float((by_seed**2).sum()) / (seeds - 1)
    rest = answers - mean - by_seed[:, None] - by_image
    ms_rest = float((rest**2).sum()) / ((seeds - 1) * (images - 1))
    total, largest = ms_seeds + ms_images - ms_rest, max(ms_seeds, ms_images)
    if total <= largest:  # one of the two seems to have no effect: it does not count as less than none
        return largest / (seeds * images), seeds - 1 if ms_seeds > ms_images else images - 1
    parts = ((ms_seeds, seeds - 1), (ms_images, images - 1), (ms_rest, (seeds - 1) * (images - 1)))
    freedom = total**2 / sum(square**2 / degrees for square, degrees in parts)
    return total / (seeds * images), max(freedom, 1.0)
