"""An attack's scores and who was in -> how well it tells who was in, and what that says about epsilon.

A fair coin decided for each of m images whether it was trained on. A high score is a guess that it was. Three numbers:

* the area under the ROC curve, with DeLong's interval;
* the true positives where 1 % of the others are accused. The threshold is itself drawn with the others, so the interval has
  two parts. The share of the others above their (k + 1)-th highest score is distributed as Beta(k + 1, n - k). The lower end
  belongs to a threshold that certainly accuses at most 1 % (or nobody, where n is too small for that), the upper end to one
  that certainly accuses at least 1 %; at each, the share of hits is binomial (Clopper and Pearson);
* a lower bound of epsilon (delta 0) from one run: were the release epsilon-differentially private, then of g guesses, fixed in
  number beforehand, at least v would be right with a probability of at most

      P[Binomial(g, e^epsilon / (1 + e^epsilon)) >= v]      (Steinke, Nasr, Jagielski 2023)
"""

import math
from dataclasses import dataclass

import numpy as np

from sdlab.errors import BadInput

FALSE_POSITIVES = 0.01  # of the images that were not trained on: as many may be accused
GUESSED = 0.1  # of all images, fixed beforehand: those with the highest scores
HEADLINE = dict(set="all, calibrated", model="denoising loss, calibrated")  # the attacks that epochs are compared by
FEWEST = 100  # images of each kind


@dataclass(frozen=True)
class Exposure:
    """Of one attack: shares of 1 with the ends of their intervals, and epsilon's lower bound, at `level` each.

    `certain` is the share of the others that the threshold of `tpr_low` accuses at most, with the interval's confidence.
    """

    auc: float
    auc_low: float
    auc_high: float
    tpr: float
    tpr_low: float
    tpr_high: float
    certain: float
    guesses: int
    right: int
    epsilon: float
    level: float


def expose(scores: np.ndarray, members: np.ndarray, attacks: int = 1) -> Exposure:
    """Scores (m,) and the coins, bool (m,). Of several `attacks` whose strongest is looked at, each gets 1/attacks of the 5 %.

    Raises `BadInput` for scores that are not finite, and without images of both kinds.
    """
    inside, outside = scores[members], scores[~members]
    if not np.isfinite(scores).all():
        raise BadInput("An attack's scores are not finite, so they tell nothing: take `precision: float32`.")
    if not len(inside) or not len(outside):
        raise BadInput("An attack needs images that were trained on, and others.")
    failure = 0.05 / attacks
    guesses = max(1, round(GUESSED * len(scores)))
    right = int(members[np.argsort(scores, kind="stable")[-guesses:]].sum())
    return Exposure(
        *area_under_curve(inside, outside, failure),
        *found_at_one_percent(inside, outside, failure),
        guesses, right, epsilon_bound(guesses, right, failure), 1 - failure,
    )  # fmt: skip


def found_at_one_percent(inside: np.ndarray, outside: np.ndarray, failure: float) -> tuple[float, float, float, float]:
    """True positives where 1 % of the others are accused: share, ends of its interval; and what the lower end's threshold certainly
    accuses at most. Each end takes half of `failure`, a half of that for its threshold.
    """
    from scipy.stats import beta  # is slow to import

    count, each, places = len(outside), failure / 4, np.arange(len(outside))
    highest = np.sort(outside)[::-1]
    at_most = beta.ppf(1 - each, places + 1, count - places)  # of the others above their (k + 1)-th highest score
    at_least = beta.ppf(each, places + 1, count - places)
    strict = max(0, int((at_most <= FALSE_POSITIVES).sum()) - 1)
    loose = np.flatnonzero(at_least >= FALSE_POSITIVES)[:1]
    middle = max(0, int(FALSE_POSITIVES * (count + 1)) - 1)  # 1 % is the mean of what it accuses
    hits = {name: int((inside > highest[k]).sum()) for name, k in (("strict", strict), ("middle", middle))}
    low = beta.ppf(each, hits["strict"], len(inside) - hits["strict"] + 1) if hits["strict"] else 0.0
    high = 1.0
    # Ties with the threshold count as found: an upper end may not miss them.
    if len(loose) and (most := int((inside >= highest[loose[0]]).sum())) < len(inside):
        high = beta.ppf(1 - each, most + 1, len(inside) - most)
    return hits["middle"] / len(inside), float(low), float(high), float(at_most[strict])


def area_under_curve(inside: np.ndarray, outside: np.ndarray, failure: float) -> tuple[float, float, float]:
    """The chance that one who was in scores higher than one who was not, ties counted half, and its interval (DeLong)."""
    from scipy.stats import norm, rankdata  # is slow to import

    ranks, count = rankdata(np.concatenate([inside, outside])), len(inside)
    above = (ranks[:count] - rankdata(inside)) / len(outside)  # of each who was in: the share of the others below
    below = 1 - (ranks[count:] - rankdata(outside)) / count
    error = math.sqrt(sum(np.var(part, ddof=1) / len(part) for part in (above, below) if len(part) > 1))
    # Where (almost) no pair contradicts another: what share could do so, and be missed.
    half = max(float(norm.ppf(1 - failure / 2)) * error, 1 - (failure / 2) ** (1 / min(count, len(outside))))
    area = float(above.mean())
    return area, max(area - half, 0.0), min(area + half, 1.0)


def epsilon_bound(guesses: int, right: int, failure: float) -> float:
    """The largest epsilon (delta 0) that so many right guesses refute, up to this probability of failure; 0 if none."""
    from scipy.optimize import brentq  # is slow to import
    from scipy.stats import binom

    def surprise(epsilon: float) -> float:
        return float(binom.sf(right - 1, guesses, 1 / (1 + math.exp(-epsilon)))) - failure

    return 0.0 if surprise(0.0) > 0 else float(brentq(surprise, 0.0, 50.0))
