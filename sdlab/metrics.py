"""The metrics of a classifier on one split: accuracy (the CAS), top-5, balanced accuracy, recall of each class.

A new metric is a field of `Score`, computed in `score_predictions` and averaged over classifier seeds in `summarize`; a
column for it is a line of `report/tables.py: cell_numbers`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np


@dataclass(frozen=True)
class Score:
    """A classifier's results on one split, in shares of 1. `accuracy` is the CAS if it was trained on generated images."""

    accuracy: float
    top5: float
    balanced: float  # mean of the classes' recalls
    recall: tuple[float, ...]  # of each class; nan for a class that the split lacks
    n: int

    @classmethod
    def from_json(cls, fields: dict) -> "Score":
        """From `dataclasses.asdict` after JSON."""
        return cls(**(fields | dict(recall=tuple(fields["recall"]))))


METRICS = [field.name for field in fields(Score)]


def score_predictions(logits: np.ndarray, labels: np.ndarray) -> Score:
    """Every metric of logits (n, C) for labels (n,); top-5 is 1 for five classes or fewer."""
    predicted = logits.argmax(1)
    top5 = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    right = predicted == labels
    recall = tuple(
        float(right[labels == c].mean()) if (labels == c).any() else math.nan for c in range(logits.shape[1])
    )
    return Score(
        accuracy=float(right.mean()),
        top5=float((top5 == labels[:, None]).any(1).mean()),
        balanced=float(np.nanmean(recall)),
        recall=recall,
        n=len(labels),
    )


def summarize(scores: Sequence[Score]) -> dict:
    """Mean and deviation over classifier seeds, in shares of 1, ready for JSON."""
    accuracy = np.array([s.accuracy for s in scores])
    recall = np.array([s.recall for s in scores])
    return dict(
        accuracy=accuracy.tolist(),
        mean=float(accuracy.mean()),
        std=float(accuracy.std(ddof=1)) if len(accuracy) > 1 else None,
        standard_error=math.sqrt(accuracy.mean() * (1 - accuracy.mean()) / scores[0].n),
        top5=float(np.mean([s.top5 for s in scores])),
        balanced=float(np.mean([s.balanced for s in scores])),
        recall=[None if np.isnan(r) else float(r) for r in recall.mean(0)],
        n=scores[0].n,
    )
