"""What the notebooks show: small figures and tables of images, losses, trials and scores. Imports no torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from sdlab.data.images import ImageDataset, Split
from sdlab.importance import LABELS
from sdlab.runs.files import atomic_write

plt.rcParams["text.parse_math"] = False  # a class may be called "$5 to $10"


def show_class_rows(split: Split, per_class: int, title: str) -> Figure:
    """The first images of each class, a row a class (at most 16 classes)."""
    classes = np.unique(split.labels)[:16]
    rows = {str(c): split.images[split.labels == c][:per_class] for c in classes}
    figure = show_image_rows(rows)
    figure.suptitle(title, fontsize=10)
    return figure


def show_image_rows(rows: Mapping[str, np.ndarray]) -> Figure:
    """A labelled row of uint8 images (n, 3, h, w) for every entry; sizes may differ between rows."""
    most = max(len(images) for images in rows.values())
    figure, axes = plt.subplots(len(rows), 1, figsize=(0.62 * most + 1, 0.64 * len(rows) + 0.25), squeeze=False)
    for ax, (name, images) in zip(axes[:, 0], rows.items(), strict=True):
        strip = np.concatenate(list(images.transpose(0, 2, 3, 1)), axis=1)
        width = strip.shape[1] * most // max(len(images), 1)
        ax.imshow(strip, interpolation="nearest")
        ax.set_xlim(-0.5, width - 0.5)
        ax.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        ax.set_xticks([])
        ax.set_yticks([])
        for side in ax.spines.values():
            side.set_visible(False)
    figure.subplots_adjust(left=0.13, right=0.99, bottom=0.02, top=0.93, hspace=0.04)
    return figure


def plot_losses(history: Sequence[Mapping], part: str) -> Figure:
    """Mean loss and learning rate of each epoch, and how long an epoch took."""
    table = pd.DataFrame(history)
    figure, ax = plt.subplots(figsize=(7, 2.8))
    ax.plot(table.epoch, table.loss, marker=".", label="loss (mean of the epoch)")
    ax.set(
        xlabel="epoch",
        ylabel="noise MSE",
        title=f"{part}: {table.steps.sum()} steps, {table.seconds.median():.1f} s an epoch",
    )
    rate = ax.twinx()
    rate.plot(table.epoch, table.learning_rate, color="0.6", ls=":")
    rate.set_ylabel("learning rate (dotted)")
    ax.grid(alpha=0.3)
    figure.tight_layout()
    return figure


def trials_table(search: Mapping) -> pd.DataFrame:
    """The trials of an exported search, a row a trial; CAS in percent, a column a rung."""
    rows = []
    for trial in search["trials"]:
        rungs = {
            f"CAS@{n}": 100 * trial["intermediate"][str(n)] if str(n) in trial["intermediate"] else np.nan
            for n in search["rungs"]
        }
        rows.append(
            dict(
                number=trial["number"],
                state=trial["state"],
                **trial["params"],
                **rungs,
                generation_seconds=trial["generation_seconds"],
            )
        )
    return pd.DataFrame(rows)


def plot_search(search: Mapping) -> Figure:
    """CAS of each trial at every rung it reached; the best so far as a line."""
    table, last = trials_table(search), f"CAS@{search['rungs'][-1]}"
    figure, ax = plt.subplots(figsize=(7, 3))
    for index, images in enumerate(search["rungs"]):
        ax.plot(table.number, table[f"CAS@{images}"], "o", ms=4 + 2 * index, alpha=0.7, label=f"{images} images")
    ax.plot(
        table.number, table[last].cummax().ffill(), color="black", lw=1, drawstyle="steps-post", label="best so far"
    )
    ax.set(
        xlabel="trial",
        ylabel="CAS (%)",
        title=f"{search['study']}: {search['counts']['pruned']} of {search['counts']['trials']} trials pruned",
    )
    ax.legend(fontsize=8)
    ax.grid(alpha=0.3)
    figure.tight_layout()
    return figure


def plot_marginals(searches: Mapping[str, Mapping]) -> Figure:
    """CAS at the lowest rung against each parameter, a row a search; a ring for each trial that was scored to the end."""
    figure, axes = plt.subplots(len(searches), 3, figsize=(9, 2.6 * len(searches) + 0.4), sharey="row", squeeze=False)
    for row, (name, search) in zip(axes, searches.items(), strict=True):
        table, lowest = trials_table(search), f"CAS@{search['rungs'][0]}"
        complete = table[table.state == "complete"]
        for ax, parameter in zip(row, LABELS, strict=True):
            ax.scatter(table[parameter], table[lowest], s=18)
            ax.scatter(complete[parameter], complete[lowest], s=70, facecolors="none", edgecolors="C3")
            ax.set_xlabel(LABELS[parameter])
            ax.grid(alpha=0.3)
        row[0].set_ylabel(f"{name}\nCAS at {search['rungs'][0]} images (%)")
    figure.tight_layout()
    return figure


def top_trials(search: Mapping, count: int = 5) -> pd.DataFrame:
    """The best trials that were scored to the end."""
    last = f"CAS@{search['rungs'][-1]}"
    return (
        trials_table(search)
        .dropna(subset=[last])
        .sort_values(last, ascending=False)
        .head(count)
        .round(2)
        .set_index("number")
    )


def finalists_table(search: Mapping) -> pd.DataFrame:
    """The finalists, the chosen one first: the CAS that made them finalists, and the one scored anew (percent)."""
    rows = []
    for f in search["finalists"]:
        point, again = f["point"], f.get("again")
        anew = (
            {}
            if again is None
            else dict(CAS_anew=100 * again["mean"], deviation=100 * (again["std"] or 0), seeds=len(again["accuracy"]))
        )
        rows.append(
            dict(
                trial=f["number"],
                IS=point["num_inference_steps"],
                UGS=point["guidance_scale"],
                CAS_in_search=np.nan if f["value"] is None else 100 * f["value"],
                **anew,
            )
        )
    return pd.DataFrame(rows).set_index("trial").round(2)


def scores_table(cells: Sequence[Mapping]) -> pd.DataFrame:
    """Scored cells side by side, in percent: mean and deviation over classifier seeds, and what plain accuracy can hide."""
    rows = []
    for cell in cells:
        test, point = cell["test"], cell.get("point")
        settings = {} if point is None else dict(
            IS=point["num_inference_steps"], UGS=round(point["guidance_scale"], 2), seconds=cell["generation_seconds"]
        )  # fmt: skip
        rows.append(
            dict(
                cell=cell["title"],
                **settings,
                images=cell["images"],
                CAS=100 * test["mean"],
                deviation=100 * (test["std"] or 0),
                standard_error=100 * test["standard_error"],
                seeds=len(test["accuracy"]),
                validation=100 * cell["val"]["mean"],
                balanced=100 * test["balanced"],
                worst_class=100 * min(r for r in test["recall"] if r is not None),
            )
        )
    return pd.DataFrame(rows).set_index("cell").round(2)


def score_table(cell: Mapping, data: ImageDataset) -> pd.DataFrame:
    """One scored cell beside the majority line."""
    table = scores_table([cell])
    table["majority_line"] = round(100 * data.majority_share(), 2)
    return table


def plot_recall(cells: Mapping[str, Mapping], data: ImageDataset) -> Figure:
    """Recall of each class on the test set for several training sets."""
    table = pd.DataFrame({name: cell["test"]["recall"] for name, cell in cells.items()}, index=data.class_names).astype(
        float
    )
    ax = (100 * table).plot.bar(figsize=(7, 2.8), rot=0, ylabel="recall (%)", ylim=(0, 105))
    ax.legend(fontsize=8, loc="lower right")
    return ax.figure


def show_nearest_neighbours(generated: Split, real: Split, count: int = 14, chunk: int = 256) -> Figure:
    """Generated images, the closest first, above their nearest real training images (Euclidean, pixels)."""
    flat_real = real.images.reshape(len(real), -1).astype(np.float32)
    squared_real, distance, nearest = (flat_real**2).sum(1), [], []
    for start in range(0, len(generated), chunk):  # a whole table of distances would not fit for large sets
        flat = generated.images[start : start + chunk].reshape(-1, flat_real.shape[1]).astype(np.float32)
        squared = (flat**2).sum(1)[:, None] - 2 * flat @ flat_real.T + squared_real
        distance.append(squared.min(1))
        nearest.append(squared.argmin(1))
    closest = np.concatenate(distance).argsort()[:count]
    return show_image_rows(
        {"generated": generated.images[closest], "nearest real": real.images[np.concatenate(nearest)[closest]]}
    )


def save_figure(figure, path: Path) -> Path:
    with atomic_write(path) as beside:
        figure.savefig(beside, dpi=150, format=path.suffix[1:])
    return path


def plot_scaling(table: pd.DataFrame, title: str):
    """CAS against the size of the synthetic set, beside the same recipe on real images."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    real, synthetic = table[table.cell == "real"].iloc[0], table[table.cell != "real"]
    k = synthetic.cell.str[1:].astype(int)
    axes.axhline(real.cas, color="black", lw=1.2, label=f"real training set: {real.cas:.1f} %")
    axes.axhspan(real.cas - real.deviation, real.cas + real.deviation, color="black", alpha=0.1, lw=0)
    axes.errorbar(
        k,
        synthetic.cas,
        synthetic.deviation.fillna(0),
        marker="o",
        capsize=3,
        color="C0",
        label="synthetic only (test)",
    )
    axes.plot(k, synthetic.validation, ":", color="C0", alpha=0.7, label="synthetic only (validation)")
    chosen = synthetic[synthetic.chosen].iloc[0]
    axes.plot(
        int(chosen.cell[1:]),
        chosen.cas,
        "o",
        ms=13,
        mfc="none",
        mec="C3",
        label=f"chosen on {'validation' if chosen.protocol == 'sealed' else 'test'}: {chosen.cell}, {chosen.cas:.1f} %",
    )
    low, high = axes.get_ylim()
    if real.majority > low - (high - low) / 2:  # else the axis would show little but the distance to it
        axes.axhline(
            real.majority, color="black", lw=1, ls="--", label=f"always the commonest class: {real.majority:.1f} %"
        )
    axes.set(xlabel="synthetic images, in sizes of the real training set", ylabel="top-1 accuracy (%)")
    axes.set_title(title, parse_math=False)
    axes.set_xticks(k)
    axes.legend(loc="lower right", fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    return figure


def plot_stages(table: pd.DataFrame, real: float, title: str):
    """CAS after each step of the pipeline."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.4))
    axes.bar(range(len(table)), table.cas, yerr=table.deviation.fillna(0), capsize=4, color=["0.7", "C0", "0.55", "C2"])
    axes.axhline(real, color="black", lw=1.2, label=f"real images: {real:.1f} %")
    majority = table.majority.iloc[0]
    axes.axhline(majority, color="black", lw=1, ls="--", label=f"always the commonest class: {majority:.1f} %")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False, fontsize=8)
    names = ("After 1\nClass-Encoder", "After 2\nfirst search", "After 3\nfine-tuning", "After 4\nfinal search")
    labels = [
        f"{name}\n{row.cas:.1f} % in {row.seconds:.0f} s\nIS {row.num_inference_steps}, UGS {row.guidance_scale:.2f}"
        for name, row in zip(names, table.itertuples(), strict=True)
    ]
    axes.set_xticks(range(4), labels)
    axes.set(ylabel="CAS (%)", ylim=(0, 102))
    axes.set_title(title, pad=24, parse_math=False)
    figure.tight_layout()
    return figure


def plot_importances(effects: pd.DataFrame):
    """Figure 1: mean importance of each parameter in the two searches, the experiments beside the paper."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    shown = effects.assign(
        parameter=effects.parameter.map(LABELS),
        source=np.where(effects.who.str.startswith("paper"), "paper (6 data sets)", "ours"),
    )
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for ax, (search, title) in zip(axes, (("search_1", "initial search"), ("search_2", "final search")), strict=True):
        part = shown[shown.search == search]
        order = ["UGS", "epoch", "IS"]
        sns.barplot(part, x="parameter", y="importance", hue="source", order=order, hue_order=["ours", "paper (6 data sets)"],
                    errorbar=None, palette=["C0", "0.7"], ax=ax)  # fmt: skip
        sns.stripplot(part, x="parameter", y="importance", hue="source", order=order, hue_order=["ours", "paper (6 data sets)"],
                      dodge=True, palette=["black", "0.35"], size=3, legend=False, ax=ax)  # fmt: skip
        ax.set(title=title, xlabel="", ylabel="share of the main effects (fANOVA)", ylim=(0, 1))
    axes[1].get_legend().remove()
    axes[0].legend(title="", fontsize=8)
    figure.tight_layout()
    return figure
