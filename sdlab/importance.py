"""Trials -> functional ANOVA: how much of the CAS each parameter, and each pair, explains (Figure 1; Hutter et al. 2014).

A random forest is fitted to the trials. Each of its trees is piecewise constant, so its variance over the whole search
space splits exactly into main effects, pairwise interactions and higher ones. Optuna's evaluator does the same for main
effects only, and reads completed trials only. Ours takes any value that every trial has: where trials were pruned that is
the CAS at the lowest rung (docs/method.md, items 2 and 23). A test compares the main effects with Optuna's.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd

PARAMETERS = ("guidance_scale", "epoch", "num_inference_steps")
LABELS = {"guidance_scale": "UGS", "epoch": "epoch", "num_inference_steps": "IS"}  # the paper's names


def lowest_rung(search: Mapping) -> tuple[np.ndarray, np.ndarray]:
    """Parameters (n, 3) and CAS at the lowest rung (n,) of all trials of an exported search, pruned ones included."""
    rung = str(search["rungs"][0])
    x = np.array([[trial["params"][name] for name in PARAMETERS] for trial in search["trials"]], float)
    return x, np.array([trial["intermediate"][rung] for trial in search["trials"]])


def fanova(search: Mapping, forests: int, trees: int = 64) -> pd.DataFrame:
    """Shares of the variance of the CAS at the lowest rung: one row a forest, columns a parameter or a pair.

    Each forest has its own seed; their spread says how far the few trials determine the answer. A parameter whose
    range is a single value explains nothing: 0.
    """
    from sklearn.ensemble import RandomForestRegressor

    x, y = lowest_rung(search)
    bounds = np.array([search["ranges"][name] for name in PARAMETERS], float)
    rows = []
    for seed in range(forests):
        forest = RandomForestRegressor(trees, max_depth=64, random_state=seed).fit(x, y)
        shares = [tree_shares(tree.tree_, bounds) for tree in forest.estimators_]
        shares = [share for share in shares if share is not None]
        rows.append(np.mean(shares, axis=0) if shares else np.zeros(len(share_names())))
    return pd.DataFrame(rows, columns=share_names())


def share_names() -> list[str]:
    """Parameters, then pairs."""
    return [*PARAMETERS, *(f"{a} x {b}" for a, b in combinations(PARAMETERS, 2))]


def tree_shares(tree, bounds: np.ndarray) -> np.ndarray | None:
    """Main effects and pairwise interactions of one tree as shares of its variance; None if it is constant.

    The thresholds cut the space into boxes; the tree is evaluated once in each, and the box's volume is its weight.
    """
    axes, weights = [], []
    for feature, (low, high) in enumerate(bounds):
        cuts = np.unique(tree.threshold[tree.feature == feature])
        edges = np.unique(np.concatenate([[low], cuts[(cuts > low) & (cuts < high)], [high]]))
        single = len(edges) == 1
        axes.append(edges if single else (edges[:-1] + edges[1:]) / 2)
        weights.append(np.ones(1) if single else np.diff(edges) / (high - low))
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    values = tree.predict(grid.reshape(-1, len(bounds)).astype(np.float32))[:, 0].reshape(grid.shape[:-1])
    values = values - average(values, weights, keep=())
    total = average(values**2, weights, keep=())
    if total < 1e-12:
        return None
    dimensions = range(len(bounds))
    variance = {keep: variance_of(values, weights, keep) for size in (1, 2) for keep in combinations(dimensions, size)}
    mains = [variance[(d,)] for d in dimensions]
    pairs = [variance[(a, b)] - variance[(a,)] - variance[(b,)] for a, b in combinations(dimensions, 2)]
    return np.clip(np.array(mains + pairs) / total, 0, 1)


def average(values: np.ndarray, weights: Sequence[np.ndarray], keep: tuple[int, ...]) -> np.ndarray:
    """Weighted mean over all axes that are not kept."""
    for axis in reversed(range(values.ndim)):
        if axis not in keep:
            values = np.tensordot(values, weights[axis], axes=([axis], [0]))
    return values


def variance_of(values: np.ndarray, weights: Sequence[np.ndarray], keep: tuple[int, ...]) -> float:
    """Variance of E[f | kept parameters], f having mean 0."""
    marginal = average(values, weights, keep)
    return float(average(marginal**2, [weights[axis] for axis in keep], keep=()))


def main_effects(shares: pd.DataFrame) -> pd.DataFrame:
    """The parameters' own shares, made to sum to 1 in each forest, as Optuna's plots and Figure 1 show them."""
    mains = shares[list(PARAMETERS)]
    return mains.div(mains.sum(axis=1).replace(0, 1), axis=0)


def describe_importance(search: Mapping, forests: int) -> dict:
    """fANOVA of one exported search as plain data: shares, main effects, and which parameter is first.

    `first` is None where the CAS does not vary, or no parameter is first in more than half of the forests.
    """
    shares = fanova(search, forests)
    mains = main_effects(shares)
    winners = mains[mains.sum(axis=1) > 0].idxmax(axis=1).value_counts()
    decided = len(winners) and winners.iloc[0] > forests / 2
    return dict(
        n=len(search["trials"]),
        images=search["rungs"][0],
        forests=forests,
        shares={name: dict(mean=shares[name].mean(), spread=float(shares[name].std(ddof=0))) for name in shares},
        main_effects={name: dict(mean=mains[name].mean(), spread=float(mains[name].std(ddof=0))) for name in mains},
        first=winners.index[0] if decided else None,
        forests_that_agree=int(winners.iloc[0]) if decided else 0,
    )
