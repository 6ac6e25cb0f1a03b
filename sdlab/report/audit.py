"""`metrics/audit.json` -> what an attacker would find, as sentences, a table, a figure and a page."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from sdlab.report.printing import escape_markdown, paragraphs
from sdlab.report.samples import show_image_rows
from sdlab.runs.privacy import attacks_of, strongest
from sdlab.verdict.exposure import HEADLINE

TARGETS = {"set": "the set", "model": "the model"}


def share(found: Mapping, name: str, form: str = "{:.1f}", factor: float = 100) -> str:
    """Such as: 3.2 (1.9 to 5.1)."""
    value, low, high = (form.format(factor * found[key]) for key in (name, f"{name}_low", f"{name}_high"))
    return f"{value} ({low} to {high})"


def target_sentence(audit: Mapping, target: str) -> str:
    """What the attacks on the set, or on the model, find: each number by the attack that is strongest in it."""
    attacks = attacks_of(audit, target)
    (finder, found), (ranker, area), (guesser, bound) = (strongest(attacks, n) for n in ("tpr", "auc", "epsilon"))
    epsilon = f' Epsilon (delta 0) is at least {bound["epsilon"]:.2f} ("{guesser}").' * (bound["epsilon"] > 0)
    return (
        f'Whoever holds {TARGETS[target]} can attack it in {len(attacks)} ways. The one that certainly finds most ("{finder}") finds '
        f"{share(found, 'tpr')} % of the images that were trained on, while it accuses 1 % of the others. The highest AUC is "
        f'{share(area, "auc", "{:.3f}", 1)} ("{ranker}"); 0.5 is guessing.{epsilon}'
    )


def price_sentence(audit: Mapping) -> str:
    """Exposure next to use, from the first of the epochs to the chosen one."""
    first, last = audit["epochs"][0], audit["epochs"][-1]
    if first is last:
        return "The price of longer training is not known: one UNet epoch was looked at."
    areas = ", ".join(
        f"the AUC on {TARGETS[target]} from {first[target][name]['auc']:.3f} to {last[target][name]['auc']:.3f}"
        for target, name in HEADLINE.items()
    )
    return (
        f"The price of longer training: from UNet epoch {first['epoch']} to {last['epoch']}, CAS (validation) goes from "
        f"{100 * first['cas']['mean']:.1f} to {100 * last['cas']['mean']:.1f} %, {areas}."
    )


def audit_sentences(audit: Mapping) -> list[str]:
    set_at_most, model_at_most = (100 * next(iter(attacks_of(audit, target).values()))["certain"] for target in TARGETS)
    return [
        *(target_sentence(audit, target) for target in TARGETS),
        price_sentence(audit),
        "No formal guarantee: these are attacks. A better one may find more, and an image that they miss is not proven safe.",
        'Intervals hold 95 % for all attacks on one target together, each number for itself; "certainly" means by their lower ends. '
        "They take images as independent draws, and say nothing about another training. The lower end of what is found belongs to a "
        f"stricter threshold, which certainly accuses at most {set_at_most:.1f} % (set) and {model_at_most:.1f} % (model) of the others.",
        f"An attacker needs the image in question, and, for a calibrated attack, other images of the same source that nobody trained "
        f"on: here {audit['calibrated_by']:,} validation images. A colleague can have them, or another clinic with the same machine; "
        "everybody can, if a part of the source is public.",
        f"Coins drew {audit['members']:,} training images to train on and left {audit['others']:,} out; the set has "
        f"{audit['images']:,} images ({audit['chosen']} of that half). Steps, guidance and epochs are those that were chosen with all "
        "images. The real model was trained on twice as many images, in twice as many steps: it may expose each more or less.",
    ]


def audit_table(audit: Mapping) -> pd.DataFrame:
    """A row an attack, at the chosen epoch, as text."""
    rows = [
        {
            "attack on": TARGETS[target],
            "attack": name,
            "AUC": share(found, "auc", "{:.3f}", 1),
            "found (%)": share(found, "tpr"),
            "certainly at most (%)": f"{100 * found['certain']:.1f}",
            'right guesses "in"': f"{found['right']} of {found['guesses']}",
            "epsilon at least": f"{found['epsilon']:.2f}",
        }
        for target in TARGETS
        for name, found in attacks_of(audit, target).items()
    ]
    return pd.DataFrame(rows).set_index(["attack on", "attack"])


def epochs_table(audit: Mapping) -> pd.DataFrame:
    """A row a UNet epoch, as text: use, and exposure by one attack on each target."""
    rows = [
        {"UNet epoch": e["epoch"], "CAS (validation, %)": f"{100 * e['cas']['mean']:.1f}"}
        | {f"AUC, {TARGETS[target]}": share(e[target][name], "auc", "{:.3f}", 1) for target, name in HEADLINE.items()}
        for e in audit["epochs"]
    ]
    return pd.DataFrame(rows).set_index("UNet epoch")


def audit_page(audit: Mapping) -> str:
    """Sentences and tables as Markdown: the report's audit.md."""
    tables = [audit_table(audit).reset_index(), epochs_table(audit).reset_index()]
    texts = [
        table.astype(str).map(escape_markdown).to_markdown(
            index=False, disable_numparse=True,
            colalign=["right" if name not in ("attack on", "attack") else "left" for name in table],
        )
        for table in tables
    ]  # fmt: skip
    first, second = texts
    return f"# Audit\n\n{paragraphs(audit_sentences(audit))}\n\n{first}\n\n{second}\n"


def plot_price(audit: Mapping) -> Figure:
    """CAS, and the AUC of one attack on each target, at several UNet epochs."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(6, 4.6), sharex=True, layout="constrained")
    epochs = [e["epoch"] for e in audit["epochs"]]
    cas = np.array([[100 * e["cas"]["mean"], 100 * (e["cas"]["std"] or 0)] for e in audit["epochs"]])
    top.errorbar(epochs, cas[:, 0], cas[:, 1], marker="o", color="0.3", capsize=3)
    top.set(ylabel="CAS, validation (%)")
    for colour, (target, name) in zip(("C3", "C0"), HEADLINE.items(), strict=True):
        found = [e[target][name] for e in audit["epochs"]]
        ends = np.array([[f["auc"] - f["auc_low"], f["auc_high"] - f["auc"]] for f in found]).T
        label = f"{TARGETS[target]} ({name})"
        bottom.errorbar(epochs, [f["auc"] for f in found], ends, marker="o", color=colour, capsize=3, label=label)
    bottom.axhline(0.5, color="black", lw=1.2)
    bottom.set(ylabel="AUC of an attack\n(0.5 is guessing)", xlabel="UNet epoch")
    bottom.legend(fontsize=8)
    for ax in (top, bottom):
        ax.grid(alpha=0.3)
    return figure


def show_exposed(exposed: Mapping[str, np.ndarray]) -> Figure:
    """The images that the attack on the set is surest of, above their neighbours; what is true stands above each."""
    real, made, other = exposed["images"]
    figure = show_image_rows({"asked": real, "nearest generated": made, "nearest other": other})
    centres = (np.arange(len(real)) + 0.5) * real.shape[-1] - 0.5
    figure.axes[0].set_xticks(centres, ["in" if member else "out" for member in exposed["members"]], fontsize=8)
    figure.axes[0].tick_params(top=False, bottom=False, labeltop=True, labelbottom=False)
    figure.set_figheight(2.4)
    figure.subplots_adjust(top=0.86)
    return figure
