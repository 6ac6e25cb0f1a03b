"""What the notebooks show: small figures and tables of images, losses, trials and scores. Imports no torch."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from sdlab.images import ImageDataset, Split
from sdlab.importance import LABELS

plt.rcParams["text.parse_math"] = False  # a class may be called "$5 to $10"


def image_grid(split: Split, per_class: int, title: str) -> Figure:
    """The first images of each class, a row a class (at most 16 classes)."""
    classes = np.unique(split.labels)[:16]
    rows = {str(c): split.images[split.labels == c][:per_class] for c in classes}
    figure = rows_of_images(rows)
    figure.suptitle(title, fontsize=10)
    return figure


def rows_of_images(rows: Mapping[str, np.ndarray]) -> Figure:
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


def loss_curve(history: Sequence[Mapping], part: str) -> Figure:
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


def search_progress(search: Mapping) -> Figure:
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


def marginals(searches: Mapping[str, Mapping]) -> Figure:
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


def finalists(search: Mapping) -> pd.DataFrame:
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


def compare_scores(cells: Sequence[Mapping]) -> pd.DataFrame:
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


def show_score(cell: Mapping, data: ImageDataset) -> pd.DataFrame:
    """One scored cell beside the majority line."""
    table = compare_scores([cell])
    table["majority_line"] = round(100 * data.majority_share(), 2)
    return table


def class_recall(cells: Mapping[str, Mapping], data: ImageDataset) -> Figure:
    """Recall of each class on the test set for several training sets."""
    table = pd.DataFrame({name: cell["test"]["recall"] for name, cell in cells.items()}, index=data.class_names).astype(
        float
    )
    ax = (100 * table).plot.bar(figsize=(7, 2.8), rot=0, ylabel="recall (%)", ylim=(0, 105))
    ax.legend(fontsize=8, loc="lower right")
    return ax.figure


def nearest_neighbours(generated: Split, real: Split, count: int = 14, chunk: int = 256) -> Figure:
    """Generated images, the closest first, above their nearest real training images (Euclidean, pixels)."""
    flat_real = real.images.reshape(len(real), -1).astype(np.float32)
    squared_real, distance, nearest = (flat_real**2).sum(1), [], []
    for start in range(0, len(generated), chunk):  # a whole table of distances would not fit for large sets
        flat = generated.images[start : start + chunk].reshape(-1, flat_real.shape[1]).astype(np.float32)
        squared = (flat**2).sum(1)[:, None] - 2 * flat @ flat_real.T + squared_real
        distance.append(squared.min(1))
        nearest.append(squared.argmin(1))
    closest = np.concatenate(distance).argsort()[:count]
    return rows_of_images(
        {"generated": generated.images[closest], "nearest real": real.images[np.concatenate(nearest)[closest]]}
    )
