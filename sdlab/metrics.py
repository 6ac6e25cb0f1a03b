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


def further_scores(logits: np.ndarray, labels: np.ndarray, ordered: bool = False) -> dict[str, float | None]:
    """What accuracy can hide, of logits (n, C): macro-F1, area under the ROC curve, and with `ordered` classes quadratic kappa.

    The area is that of MedMNIST's evaluator: of two classes, the second one's; of more, the mean of each against the rest. A
    class that the labels lack has none; without any, or for logits that are not finite, it is None.
    """
    from sklearn.metrics import cohen_kappa_score, f1_score, roc_auc_score

    logits, predicted = logits.astype(float), logits.argmax(1)
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    classes = range(1, 2) if logits.shape[1] == 2 else range(logits.shape[1])
    classes = classes if np.isfinite(logits).all() else ()
    areas = [roc_auc_score(labels == c, shares[:, c]) for c in classes if 0 < (labels == c).sum() < len(labels)]
    found = dict(
        macro_f1=float(f1_score(labels, predicted, average="macro", labels=np.unique(labels))),
        auc=float(np.mean(areas)) if areas else None,
    )
    if ordered:
        kappa = cohen_kappa_score(labels, predicted, weights="quadratic", labels=range(logits.shape[1]))
        found["quadratic_kappa"] = float(kappa) if math.isfinite(kappa) else None
    return found


def confusion(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Of logits (seeds, n, C): the share of each class's images (rows) that is taken for each class (columns), over all seeds."""
    counts = np.zeros((logits.shape[-1],) * 2)
    np.add.at(counts, (np.tile(labels, len(logits)), logits.argmax(2).ravel()), 1)
    with np.errstate(invalid="ignore"):
        return counts / counts.sum(1, keepdims=True)


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
