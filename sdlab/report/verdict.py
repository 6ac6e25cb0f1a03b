"""`metrics/verdict.json` -> one sentence a comparison, tables and figures."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from sdlab.report.printing import escape_markdown, paragraphs
from sdlab.settings import Settings
from sdlab.verdict.intervals import Difference

COLUMNS = {
    "mean": "accuracy",
    "std": "deviation",
    "balanced": "balanced",
    "macro_f1": "macro-F1",
    "auc": "AUC",
    "quadratic_kappa": "quadratic kappa",
}


def differences(verdict: Mapping) -> list[tuple[str, str, Difference]]:
    """(second, first, difference) by the arms' names."""
    of_numbers = lambda d: Difference(**{k: v for k, v in d.items() if k not in ("first", "second")})  # noqa: E731
    return [(d["second"], d["first"], of_numbers(d)) for d in verdict["differences"]]


def difference_sentence(verdict: Mapping, second: str, first: str) -> str:
    """Such as: x4 is 1.2 points below real (95 % CI -2.0 to -0.4)."""
    (found,) = (d for s, f, d in differences(verdict) if (s, f) == (second, first))
    arms = verdict["arms"]
    return f"{arms[second]['title']} is {compared(found, arms[first]['title'])}."


def compared(found: Difference, first: str) -> str:
    """Such as: 1.2 points below real (95 % CI -2.0 to -0.4)."""
    points, may_be_none = 100 * found.mean, found.low <= 0 <= found.high
    where = (
        "level with"
        if abs(points) < 0.05 and may_be_none
        else f"{abs(points):.1f} points {'above' if points > 0 else 'below'}"
    )
    told = "; the difference may be chance" * may_be_none
    return f"{where} {first} ({100 * found.level:.0f} % CI {signed(found.low)} to {signed(found.high)}{told})"


def signed(share: float) -> str:
    """A share as points: +1.0, -0.4, 0.0."""
    points = 100 * share
    return f"{points:+.1f}" if abs(points) >= 0.05 else f"{points:+.2f}" if points else "0.0"


def verdict_sentences(verdict: Mapping) -> list[str]:
    """The chosen set next to the real images, then every other comparison, and what the intervals speak about."""
    pairs = [(second, first) for second, first, _ in differences(verdict)]
    pairs.sort(key=lambda pair: pair != ("synthetic", "real"))
    _, _, one = differences(verdict)[0]
    classifiers = "one classifier" if one.seeds == 1 else f"{one.seeds} classifiers"
    few = " Two classifiers are too few: such intervals held the truth in 88 % of trials at worst." * (one.seeds == 2)
    about = (
        f"Accuracy on {one.images:,} real test images; {classifiers} a training set, in pairs of seeds; intervals {one.population}, "
        f"each for itself.{few} Another set from the same generator was not drawn. Always answering the most frequent class scores "
        f"{100 * verdict['majority']:.1f} %."
    )
    flattered = ["Protocol `paper`: the set was chosen by these test images, so its score is too good."]
    flattered *= verdict["protocol"] == "paper"
    return [*(difference_sentence(verdict, *pair) for pair in pairs), about, *flattered]


def verdict_table(verdict: Mapping) -> pd.DataFrame:
    """A row an arm, in percent (kappa in shares of 1): what it was trained on, scores, and the difference to real images."""
    to_real = {second: found for second, first, found in differences(verdict) if first == "real"}
    rows = []
    for name, arm in verdict["arms"].items():
        row = {"training set": arm["title"], "images": arm["images"], "most training steps": arm["training_steps"]}
        row |= {title: 100 * arm[key] for key, title in COLUMNS.items() if arm.get(key) is not None}
        row["worst recall"] = 100 * min(recall for recall in arm["recall"] if recall is not None)
        if "quadratic kappa" in row:
            row["quadratic kappa"] /= 100
        if name in to_real:
            ends = to_real[name]
            row |= {"to real": 100 * ends.mean, "from": 100 * ends.low, "to": 100 * ends.high}
        rows.append(row)
    return pd.DataFrame(rows).set_index("training set")


def as_text(table: pd.DataFrame) -> pd.DataFrame:
    """`verdict_table` for readers: whole numbers of images, one decimal, nothing where there is nothing."""
    whole = {name: table[name].map("{:,}".format) for name in ("images", "most training steps")}
    rest = {
        name: table[name].map("{:.2f}".format if name == "quadratic kappa" else "{:.1f}".format)
        for name in table
        if name not in whole
    }
    return pd.DataFrame(whole | rest).mask(table.isna(), "")


def verdict_page(verdict: Mapping) -> str:
    """The sentences and the table as Markdown: the report's verdict.md."""
    text = as_text(verdict_table(verdict)).rename(index=escape_markdown)
    table = text.to_markdown(disable_numparse=True, colalign=["left", *["right"] * len(text.columns)])
    return f"# Verdict\n\n{paragraphs(verdict_sentences(verdict))}\n\n{table}\n"


def plot_differences(verdict: Mapping) -> Figure:
    """Each arm's difference to the real images, with its interval."""
    shown = [(s, d) for s, first, d in differences(verdict) if first == "real"][::-1]
    figure, ax = plt.subplots(figsize=(7, 0.8 + 0.5 * len(shown)), layout="constrained")
    for row, (name, found) in enumerate(shown):
        colour = "C3" if name == "synthetic" else "0.35"
        ax.plot([100 * found.low, 100 * found.high], [row, row], color=colour, lw=2)
        ax.plot(100 * found.mean, row, "o", color=colour)
    ax.axvline(0, color="black", lw=1.2)
    real = verdict["arms"]["real"]
    ax.set(yticks=range(len(shown)), yticklabels=[verdict["arms"][name]["title"] for name, _ in shown], ylim=(-0.6, len(shown) - 0.4),
           xlabel=f"points of accuracy above real images ({100 * real['mean']:.1f} %), 95 % interval")  # fmt: skip
    ax.grid(axis="x", alpha=0.3)
    return figure


def plot_confusion(verdict: Mapping, classes: Sequence[str]) -> Figure:
    """What real and chosen set's classifiers take the images of each class for, in percent."""
    import seaborn as sns

    side = min(max(2.6, 0.4 * len(classes) + 1), 8)
    figure, axes = plt.subplots(1, 2, figsize=(2 * side + 1, side), layout="constrained", sharey=True)
    for ax, name in zip(axes, ("real", "synthetic"), strict=True):
        shares = 100 * np.array(verdict["arms"][name]["confusion"], dtype=float)
        few = len(classes) <= 12
        names = classes if len(classes) <= 30 else "auto"
        sns.heatmap(shares, ax=ax, vmin=0, vmax=100, cmap="Blues", cbar=False, square=True, annot=few, fmt=".0f",
                    annot_kws=dict(size=7), xticklabels=names, yticklabels=names)  # fmt: skip
        ax.set(title=f"trained on {verdict['arms'][name]['title']}", xlabel="taken for", ylabel="")
        ax.tick_params(axis="y", rotation=0)
    axes[0].set_ylabel("class (%)")
    return figure


def decisions_table(settings: Settings) -> pd.DataFrame:
    """Which real images each decision of a run saw."""
    decides = {"sealed": "validation", "paper": "test"}[settings.protocol]
    rows = {
        "weights of Class-Encoder and UNet": "training",
        "steps, guidance, epoch (both searches)": decides,
        "the size x k": decides,
        "a classifier's learning rate, last epoch and weights": "validation",
        "tables, this verdict": "test",
    }
    return pd.Series(rows, name="saw real images of").rename_axis("decision").to_frame()
