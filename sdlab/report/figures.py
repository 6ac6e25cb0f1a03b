"""Figures of losses, searches, scores and importances, and the tables of a search's trials; of images, see `samples`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from sdlab.data.images import ImageDataset
from sdlab.importance import LABELS
from sdlab.runs.files import atomic_write

plt.rcParams["text.parse_math"] = False  # a class may be called "$5 to $10"
ABOVE = dict(loc="outside upper center", ncols=2, frameon=False, fontsize=8)  # a legend that covers nothing


def save_figure(figure: Figure, path: Path) -> Path:
    with atomic_write(path) as part:
        figure.savefig(part, dpi=150, format=path.suffix[1:], bbox_inches="tight")
    return path


def plot_losses(history: Sequence, part: str) -> Figure:
    """Mean loss and learning rate of each epoch, from `EpochRecord`s; the title says how long an epoch took."""
    table = pd.DataFrame(history).set_index("epoch")
    title = f"{part}: {table.train_steps.sum()} training steps, {table.seconds.median():.1f} s an epoch"
    ax = table.loss.plot(style=".-", figsize=(7, 2.8), grid=True, title=title, label="loss")
    ax.set_ylabel("noise MSE")
    table.learning_rate.plot(ax=ax, secondary_y=True, style=":", color="0.5").set_ylabel("learning rate (dotted)")
    return ax.figure


def trials_table(search: Mapping) -> pd.DataFrame:
    """The trials of a search, a row a trial, with its parameters; CAS in percent, a column a rung (NaN if it was not reached)."""
    trials = pd.DataFrame(search["trials"])
    rungs = {f"CAS@{n}": [100 * scores.get(str(n), np.nan) for scores in trials.intermediate] for n in search["rungs"]}
    parameters = pd.DataFrame(list(trials.params))
    return pd.concat([trials[["number", "state"]], parameters, pd.DataFrame(rungs), trials.generation_seconds], axis=1)


def top_trials(search: Mapping, count: int = 5) -> pd.DataFrame:
    """The best trials of those that were scored to the end."""
    last = f"CAS@{search['rungs'][-1]}"
    return trials_table(search).dropna(subset=[last]).nlargest(count, last).round(2).set_index("number")


def finalists_table(search: Mapping) -> pd.DataFrame:
    """The finalists, the chosen one first: CAS (%) in the search, and `again` with fresh noise and more classifier seeds."""
    columns = {"number": "trial", "config.num_inference_steps": "IS", "config.guidance_scale": "UGS"}
    shares = {"value": "CAS_in_search", "again.mean": "CAS_again", "again.std": "deviation"}
    finalists = pd.json_normalize(search["finalists"]).reindex(columns=[*columns, *shares])
    finalists[[*shares]] = 100 * finalists[[*shares]].astype(float)
    return finalists.rename(columns=columns | shares).set_index("trial").round(2)


def plot_search(search: Mapping) -> Figure:
    """CAS of each trial at every rung it reached; the best so far as a line."""
    rungs, counts = trials_table(search).set_index("number").filter(like="CAS@"), search["counts"]
    title = f"{search['study']}: {counts['pruned']} of {counts['trials']} trials pruned"
    ax = rungs.plot(style="o", alpha=0.7, figsize=(7, 3), ylabel="CAS (%)", title=title)
    best = rungs.iloc[:, -1].cummax().ffill().rename("best so far")
    best.plot(ax=ax, color="black", lw=1, drawstyle="steps-post", legend=True, grid=True, xlabel="trial")
    return ax.figure


def plot_marginals(searches: Mapping[str, Mapping]) -> Figure:
    """CAS at the lowest rung against each parameter, a row a search; pruned trials in another colour than complete ones."""
    import seaborn as sns

    tables = []
    for name, search in searches.items():
        cas = {f"CAS@{search['rungs'][0]}": "CAS at the lowest rung (%)"}
        tables.append(trials_table(search).rename(columns=LABELS | cas).assign(search=name))
    points = pd.concat(tables).melt(
        ["search", "state", "CAS at the lowest rung (%)"], list(LABELS.values()), "parameter"
    )
    keys = dict(x="value", y="CAS at the lowest rung (%)", hue="state", row="search", col="parameter")
    grid = sns.relplot(points, height=2.6, facet_kws=dict(sharex=False), **keys)
    return grid.set_titles("{row_name}: {col_name}").set_xlabels("").figure


def plot_recall(cells: Mapping[str, Mapping], data: ImageDataset) -> Figure:
    """Recall of each class on the test set for several training sets."""
    recall = {name: cell["test"]["recall"] for name, cell in cells.items()}
    table = 100 * pd.DataFrame(recall, index=data.class_names, dtype=float)
    figure, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
    table.plot.bar(ax=ax, rot=0, ylabel="recall (%)", ylim=(0, 105), legend=False)
    figure.legend(**ABOVE)
    return figure


def plot_scaling(table: pd.DataFrame, title: str) -> Figure:
    """Accuracy against the size of the synthetic set, and on real images: the rows of one experiment's Table 2."""
    figure, ax = plt.subplots(figsize=(7, 4.4), layout="constrained")
    real, synthetic = table[table.cell == "real"].iloc[0], table[table.cell != "real"]
    sizes, deviation = synthetic.cell.str[1:].astype(int), synthetic.deviation.fillna(0)
    ax.axhline(real.cas, color="black", lw=1.2, label=f"real training set: {real.cas:.1f} %")
    ax.axhspan(real.cas - real.deviation, real.cas + real.deviation, color="black", alpha=0.1, lw=0)
    ax.errorbar(sizes, synthetic.cas, deviation, marker="o", capsize=3, color="C0", label="synthetic only (test)")
    ax.plot(sizes, synthetic.validation, ":", color="C0", alpha=0.7, label="synthetic only (validation)")
    chosen = synthetic[synthetic.chosen].iloc[0]
    split = {"sealed": "validation", "paper": "test"}[chosen.protocol]
    label = f"chosen on {split}: {chosen.cell}, {chosen.cas:.1f} %"
    ax.plot(int(chosen.cell[1:]), chosen.cas, "o", ms=13, mfc="none", mec="C3", label=label)
    low, high = ax.get_ylim()
    if real.majority > low - (high - low) / 2:  # else the axis would show little but the distance to it
        ax.axhline(real.majority, color="black", lw=1, ls="--", label=f"most frequent class: {real.majority:.1f} %")
    ax.set(xlabel="synthetic images, in sizes of the real training set", ylabel="top-1 accuracy (%)", xticks=sizes)
    ax.grid(alpha=0.3)
    figure.legend(title=title, **ABOVE)
    return figure


def plot_stages(table: pd.DataFrame, title: str) -> Figure:
    """CAS after each stage of the pipeline: the rows of one experiment's Table 1."""
    figure, ax = plt.subplots(figsize=(7, 4.4), layout="constrained")
    names = ("After 1\nClass-Encoder", "After 2\nfirst search", "After 3\nfine-tuning", "After 4\nfinal search")
    texts = "{}\n{:.1f} % in {:.0f} s\nIS {}, UGS {:.2f}".format
    labels = map(texts, names, table.cas, table.seconds, table.num_inference_steps, table.guidance_scale)
    ax.bar(list(labels), table.cas, yerr=table.deviation.fillna(0), capsize=4, color=["0.7", "C0", "0.55", "C2"])
    real, majority = table.real.iloc[0], table.majority.iloc[0]
    ax.axhline(real, color="black", lw=1.2, label=f"real images: {real:.1f} %")
    ax.axhline(majority, color="black", lw=1, ls="--", label=f"most frequent class: {majority:.1f} %")
    ax.set(ylabel="CAS (%)", ylim=(0, 102))
    figure.legend(title=title, **ABOVE)
    return figure


def plot_importances(effects: pd.DataFrame) -> Figure:
    """Figure 1: mean importance of each parameter in both searches, ours and the paper's; a dot a data set."""
    import seaborn as sns

    names = {"search_1": "initial search", "search_2": "final search", "paper": "paper (6 data sets)"} | LABELS
    shown = effects.replace(dict.fromkeys(["search", "source", "parameter"], names))
    keys = dict(x="parameter", y="importance", order=["UGS", "epoch", "IS"])
    keys |= dict(hue="source", hue_order=["ours", "paper (6 data sets)"])
    grid = sns.catplot(shown, kind="bar", col="search", errorbar=None, palette=["C0", "0.7"], height=3.6, **keys)
    grid.map_dataframe(sns.stripplot, dodge=True, jitter=False, palette=["black", "0.35"], size=3, **keys)
    return grid.set(ylim=(0, 1), ylabel="share of the main effects (fANOVA)").set_titles("{col_name}").figure
