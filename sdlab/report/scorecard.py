"""A scorecard -> sentences, tables, and one HTML page with its pictures inside."""

import base64
import io
from collections.abc import Mapping

import jinja2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from sdlab.data.images import ImageDataset, Split, spread
from sdlab.report import samples
from sdlab.report.figures import ABOVE
from sdlab.report.verdict import compared
from sdlab.verdict.intervals import Difference

SHOWN = {
    "kid": "KID x 1000 (lower is better; 0: alike)",
    "kid_deviation": "its deviation over subsets x 1000",
    "precision": "precision: generated images among real ones",
    "recall": "recall: real images among generated ones",
    "density": "density: as precision, minds outliers less (1: as real)",
    "coverage": "coverage: as recall, minds outliers less",
}

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Scorecard of {{ about.set }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.dataframe { border-collapse: collapse; } .dataframe td, .dataframe th { padding: 0.25rem 0.9rem; text-align: right;
border: 0; border-bottom: 1px solid #ddd; } .dataframe th:first-child { text-align: left; font-weight: normal; }
img { max-width: 100%; } .told { font-size: 1.1rem; } .note { color: #555; font-size: 0.9rem; }
</style></head><body>
<h1>Scorecard of {{ about.set }}</h1>
<p class="note">{{ "{:,}".format(about.images) }} labelled images of {{ about.classes | length }} classes, {{ about.image_size }} px,
compared with {{ about.real }} ({{ about.real_source }}); classes matched {{ about.matched }}.{% for finding in about.findings %}
{{ finding }}{% endfor %}</p>
{% for sentence in sentences %}<p class="told">{{ sentence }}</p>
{% endfor %}
<h2>Of what use is it?</h2>
<p>Classifiers trained on this set and on the real training images: the same recipe, at most as many training steps, the same
seeds; scored on real test images. Whoever chooses among sets by these scores has chosen by the test images.</p>
{{ utility }}
<h2>How alike are the images?</h2>
<p>Features of {{ about.network }}, compared with half of the real images that nobody trained on. The other half stands
next to it: a perfect generator would have its numbers.</p>
{{ likeness }}
<img alt="Images of each class, real and of this set" src="{{ pictures.rows }}">
<h2>Are the labels right?</h2>
<p>The judge, a classifier of real images, takes {{ "{:.1%}".format(labels.fidelity) }} of this set's images for their class, and
{{ "{:.1%}".format(labels.real) }} of real validation images in the same shares of classes; a set whose labels mean nothing would
have {{ "{:.1%}".format(labels.chance) }}.
{% if labels.diversity is not none %}Two images of a class differ {{ "{:.2f}".format(labels.diversity) }} times as much as two real ones.
{% endif %}</p>
<h2>Are these copies?</h2>
<p>{{ "{:,}".format(copies.exact) }} images are, pixel for pixel, real training images, and {{ "{:,}".format(copies.held_out) }} are real
validation or test images; {{ "{:,}".format(copies.repeated) }} repeat another image of the set. Of {{ "{:,}".format(copies.looked_at) }}
images, {{ "{:.1%}".format(copies.near) }} are as near to a training image as the nearest {{ "{:.1%}".format(copies.expected) }} of held-out
real images are; an honest generator has about as many.</p>
<p class="note">Distances certify nothing: a set without near copies can still tell who was in the training set.</p>
<img alt="The nearest pairs of each class" src="{{ pictures.pairs }}">
<h2>How many of each class?</h2>
<img alt="Images of each class" src="{{ pictures.balance }}">
<p class="note">All numbers: scorecard.json.</p>
</body></html>
"""


def scorecard_sentences(card: Mapping) -> list[str]:
    """What a reader has to know: use, labels and variety, copies."""
    use, labels, copies = card["utility"], card["labels"], card["copies"]
    found = Difference(**use["difference"])
    few = ""
    if found.seeds < 3:
        few = f" ({found.seeds} classifier{'s' * (found.seeds > 1)} each are too few for such an interval: `classifier_seeds`)"
    said = [
        f"A classifier trained on it is {compared(found, 'one trained on the real images')}{few}: "
        f"{100 * use['made']['mean']:.1f} % and {100 * use['real']['mean']:.1f} % of {found.images:,} real test images; always "
        f"answering the most frequent class scores {100 * use['majority']:.1f} %."
    ]
    if labels["collapse"]:
        said.append(f"The generator may have collapsed: {'; '.join(labels['collapse'])}.")
    if copies["held_out"]:
        said.insert(
            0, f"{copies['held_out']:,} of its images are real validation or test images: its scores mean nothing."
        )
    if copies["exact"]:
        said.append(f"{copies['exact']:,} of its images are copies of real training images.")
    elif copies["near"] > 3 * copies["expected"]:
        said.append(
            f"{copies['near']:.1%} of its images are as near to a training image as the nearest {copies['expected']:.1%} of held-out "
            "real images are: look at the pairs on the page."
        )
    return said


def utility_table(card: Mapping) -> pd.DataFrame:
    """Scores in percent, a row a training set."""
    names = {"mean": "accuracy", "std": "deviation", "balanced": "balanced", "macro_f1": "macro-F1", "auc": "AUC"}
    rows = {
        title: {
            name: 100 * card["utility"][key][field]
            for field, name in names.items()
            if card["utility"][key][field] is not None
        }
        for key, title in (("made", "this set"), ("real", "real training images"))
    }
    return pd.DataFrame(rows).T.round(1)


def likeness_table(card: Mapping) -> pd.DataFrame:
    """A row a measure, a column a set; KID in thousandths."""
    table = pd.DataFrame(card["likeness"])
    table.loc[["kid", "kid_deviation"]] *= 1000
    return table.loc[[*SHOWN]].rename(index=SHOWN).round(3)


def scorecard_page(card: Mapping, made: Split, real: ImageDataset) -> str:
    """The page as HTML. Names of classes and sets are escaped."""
    pictures = dict(
        rows=as_data(show_both(made, real)),
        pairs=as_data(samples.show_nearest_neighbours(beginning(made), real.train, real.class_names)),
        balance=as_data(plot_balance(card)),
    )
    tables = dict(utility=utility_table(card), likeness=likeness_table(card))
    environment = jinja2.Environment(autoescape=True)
    shown = {
        name: jinja2.utils.markupsafe.Markup(table.rename_axis(None).to_html(border=0))
        for name, table in tables.items()
    }
    return environment.from_string(PAGE).render(card | shown, sentences=scorecard_sentences(card), pictures=pictures)


def beginning(made: Split, count: int = 2000) -> Split:
    """Some images of every class, evenly spread over the set."""
    rows = spread(len(made), count)
    return Split(made.images[rows], made.labels[rows])


def show_both(made: Split, real: ImageDataset, each: int = 8) -> Figure:
    """Real training images and the set's, side by side, a row a class (at most 16)."""
    rows = {}
    for label in np.unique(made.labels)[: samples.MOST_CLASSES]:
        shown = [split.images[split.labels == label][:each] for split in (real.train, made)]
        gap = np.full((1, *made.images.shape[1:]), 255, np.uint8)
        padded = [np.concatenate([s, np.repeat(gap, each - len(s), 0)]) for s in shown]
        name = real.class_names[label]
        rows[name if name == str(label) else f"{label} {name:.16}"] = np.concatenate([padded[0], gap, padded[1]])
    figure = samples.show_image_rows(rows)
    figure.suptitle("real training images | this set", fontsize=10)
    return figure


def plot_balance(card: Mapping) -> Figure:
    """Share of each class in the set and in the real training images."""
    figure, ax = plt.subplots(figsize=(7, 2.8), layout="constrained")
    counts = pd.DataFrame(
        {"this set": card["balance"]["made"], "real training images": card["balance"]["real"]},
        index=card["about"]["classes"],
    )
    (100 * counts / counts.sum()).plot.bar(ax=ax, ylabel="share (%)", rot=0 if len(counts) <= 12 else 90, legend=False)
    figure.legend(**ABOVE)
    return figure


def as_data(figure: Figure) -> str:
    """A figure as an address that holds the picture itself."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
