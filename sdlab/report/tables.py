"""Files of finished steps -> the paper's tables and Figure 1, beside the paper's own numbers. Imports no torch.

Numbers travel as tidy data frames (a row a cell); only the last step makes text of them. Percentages throughout.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from sdlab.errors import BadInput
from sdlab.importance import PARAMETERS
from sdlab.report import paper
from sdlab.runs.files import atomic_write, read_json
from sdlab.runs.records import read_record, record_digest, stage_state
from sdlab.settings import Settings

FORMATS = ("csv", "md", "tex", "png")
STAGES_OF_TABLE_1 = ("after_1", "after_2", "after_3", "after_4")
METRICS_NOTE = (
    "CAS: top-1 accuracy (%) on real test images of a ResNet20 trained on generated images only; its plateau, early "
    "stopping and choice of weights watch *real validation* images. Mean ± deviation over classifier seeds; the binomial "
    "standard errors of the test and the validation set (s.e., the largest of the line) and the accuracy of always answering the commonest "
    "class (majority) stand beside it."
)


@dataclass(frozen=True)
class Experiment:
    """A finished experiment: its settings and where its files lie."""

    settings: Settings

    @property
    def dataset(self) -> str:
        """The data set's name: of your own the folder's or file's, which must not pass for one of the paper's."""
        name = self.metrics("data")["name"]
        return f"{name} (own)" if name in paper.DATASETS and self.settings.dataset != name else name

    @property
    def title(self) -> str:
        name = paper.DATASET_TITLES.get(self.dataset, self.dataset)
        return f"{name} ({self.settings.experiment}, {self.settings.base_model})"

    def metrics(self, name: str) -> dict:
        return read_json(self.settings.run_folder / "metrics" / f"{name}.json")

    @property
    def digest(self) -> str:
        return record_digest(read_record(self.settings, "05"))


def finished_experiments(settings: Settings) -> list[Experiment]:
    """All experiments under `runs_root` whose tables can be filled (step 05 done), in the order of their names."""
    found = []
    for path in sorted(settings.run_folder.parent.glob("*/settings.yaml")):
        # The folder says where it is now; it may have been moved since.
        moved = dict(runs_root=settings.runs_root, reports_root=settings.reports_root, experiment=path.parent.name)
        try:
            theirs = Settings.from_mapping((yaml.safe_load(path.read_text(encoding="utf-8")) or {}) | moved)
            done = {number: stage_state(theirs, number).state for number in ("05", "06")}
        except (BadInput, yaml.YAMLError, TypeError, KeyError):
            continue  # another version's folder, or none of ours: it must not keep the others from their tables
        if set(done.values()) == {"done"}:
            found.append(Experiment(theirs))
    return found


def experiment_digests(experiments: list[Experiment]) -> dict[str, str]:
    """What tables were made from: a digest of each experiment."""
    return {e.settings.experiment: e.digest for e in experiments}


def tables_are_current(settings: Settings) -> bool:
    """Whether all that 07 writes is in the report folder, and made from the experiments that are finished now."""
    folder = settings.report_folder
    wanted = [f"{table}.{kind}" for table in ("table_1", "table_2") for kind in FORMATS]
    wanted += ["figure_1.csv", "figure_1.png", "figure_steps.png", "figure_scaling.png", "sources.json"]
    if not all((folder / name).exists() for name in wanted):
        return False
    return read_json(folder / "sources.json") == experiment_digests(finished_experiments(settings))


def cell_row(experiment: Experiment, name: str, column: str, extra: Mapping) -> dict:
    """One measured cell in tidy form; percentages."""
    kept, data = experiment.metrics(name), experiment.metrics("data")
    test, published = kept["test"], extra.pop("paper")
    return dict(
        dataset=experiment.dataset,
        experiment=experiment.settings.experiment,
        protocol=experiment.settings.protocol,
        base_model=data["base_model"],
        cell=column,
        cas=100 * test["mean"],
        deviation=np.nan if test["std"] is None else 100 * test["std"],
        standard_error=100 * test["standard_error"],
        seeds=len(test["accuracy"]),
        test_images=test["n"],
        real=100 * experiment.metrics("real")["test"]["mean"],
        validation=100 * kept["val"]["mean"],
        validation_standard_error=100 * kept["val"]["standard_error"],
        balanced=100 * test["balanced"],
        worst_class_recall=100 * min(r for r in test["recall"] if r is not None),
        majority=100 * data["majority_share_test"],
        images=kept["images"],
        paper=np.nan if published is None else published,
        difference=np.nan if published is None else 100 * test["mean"] - published,
        **extra,
    )


def table_1(experiments: list[Experiment]) -> pd.DataFrame:
    """CAS and generation time after each step, a row a cell."""
    rows = []
    for experiment in experiments:
        published = paper.TABLE_1_CAS.get(experiment.dataset, {})
        seconds = paper.TABLE_1_SECONDS.get(experiment.dataset, {})
        for name in STAGES_OF_TABLE_1:
            kept = experiment.metrics(name)
            of_paper = seconds.get("after_2_or_3" if name in ("after_2", "after_3") else name, np.nan)
            extra = dict(
                paper=published.get(name),
                seconds=kept["generation_seconds"],
                seconds_per_image_step=kept["seconds_per_image_step"],
                paper_seconds=of_paper,
                **kept["point"],
            )
            rows.append(cell_row(experiment, name, name, extra))
    return pd.DataFrame(rows)


def table_2(experiments: list[Experiment]) -> pd.DataFrame:
    """CAS of x1 ... x10 beside real training images, a row a cell."""
    rows = []
    for experiment in experiments:
        published = paper.TABLE_2.get(experiment.dataset, {})
        chosen = experiment.metrics("scaling")["chosen"]
        names = ["real", *(f"x{k}" for k in range(1, experiment.settings.scaling_max + 1))]
        for name in names:
            file = name if name == "real" else f"x{int(name[1:]):02d}"
            rows.append(cell_row(experiment, file, name, dict(paper=published.get(name), chosen=name == chosen)))
    return pd.DataFrame(rows)


def gains(values: Mapping[str, Mapping[str, float]], seconds: Mapping[str, tuple[float, float]]) -> dict:
    """The text's summary: points gained since After 1 (lowest, highest) and the largest share of time saved by step 2."""
    gained = {step: [row[step] - row["after_1"] for row in values.values()] for step in ("after_2", "after_4")}
    saved = [100 * (1 - after / before) for before, after in seconds.values()]
    ranges = {step: (round(min(gain), 2), round(max(gain), 2)) for step, gain in gained.items()}
    return ranges | {"time_saved_after_2_percent": round(max(saved), 1)}


def paper_gains() -> dict:
    """The text's ranges, recomputed from the paper's own Table 1."""
    seconds = {name: (row["after_1"], row["after_2_or_3"]) for name, row in paper.TABLE_1_SECONDS.items()}
    return gains(paper.TABLE_1_CAS, seconds)


def our_gains(table: pd.DataFrame) -> dict:
    """The same ranges from our Table 1."""
    values = {name: dict(zip(rows.cell, rows.cas, strict=True)) for name, rows in table.groupby("experiment")}
    times = {name: dict(zip(rows.cell, rows.seconds, strict=True)) for name, rows in table.groupby("experiment")}
    return gains(values, {name: (row["after_1"], row["after_2"]) for name, row in times.items()})


def gains_sentence(who: str, found: Mapping) -> str:
    gained = {
        step: f"{low:+.2f}" if low == high else f"{low:+.2f} to {high:+.2f}"
        for step, (low, high) in list(found.items())[:2]
    }
    return (
        f"{who}: since step 1, CAS changes by {gained['after_2']} points after step 2 and by {gained['after_4']} after step 4; "
        f"step 2 saves up to {found['time_saved_after_2_percent']:.1f} % of the generation time."
    )


@dataclass(frozen=True)
class Markup:
    """How one text format marks the best cell, the best synthetic cell and a plus-minus."""

    bold: Callable[[str], str]
    underline: Callable[[str], str]
    plus_minus: str


MARKDOWN = Markup("**{}**".format, "<u>{}</u>".format, " ± ")
LATEX = Markup(r"\textbf{{{}}}".format, r"\underline{{{}}}".format, r" $\pm$ ")
PLAIN = Markup("{}*".format, "{}°".format, " ± ")


def cas_text(row: Mapping, markup: Markup) -> str:
    deviation = "" if pd.isna(row["deviation"]) else f"{markup.plus_minus}{row['deviation']:.2f}"
    return f"{row['cas']:.2f}{deviation}"


def layout_lines(
    table: pd.DataFrame, published: Mapping, columns: list[str], markup: Markup, synthetic: list[str]
) -> pd.DataFrame:
    """One line an experiment and, for the paper's data sets, the paper's line, the difference, or `not run`.

    The best value of a line is bold; if `synthetic` names columns, the best of those is underlined.
    """
    lines = []
    ours = (
        {name: rows.set_index("cell") for name, rows in table.groupby("experiment", sort=False)} if len(table) else {}
    )

    def line(title, who, numbers: Mapping[str, float], texts: Mapping[str, str]):
        best = max(numbers.values(), default=math.nan)
        best_synthetic = max((numbers[c] for c in synthetic if c in numbers), default=math.nan)
        marked = {}
        for column in columns:
            text = texts.get(column, "")
            if column in synthetic and numbers.get(column) == best_synthetic:
                text = markup.underline(text)
            marked[column] = markup.bold(text) if column in numbers and numbers[column] == best else text
        lines.append({"data set": title, "who": who, **marked})

    datasets = list(dict.fromkeys([*(table.dataset if len(table) else []), *published]))
    for dataset in datasets:
        title = paper.DATASET_TITLES.get(dataset, dataset)
        if dataset in published:
            numbers = {c: published[dataset][c] for c in columns if c in published[dataset]}
            line(title, "paper", numbers, {c: f"{v:.2f}" for c, v in numbers.items()})
        run = [rows for rows in ours.values() if rows.dataset.iloc[0] == dataset]
        for rows in run:
            who = f"{rows.experiment.iloc[0]}: {rows.base_model.iloc[0]}, {rows.protocol.iloc[0]}"
            line(title, who, rows.cas.to_dict(), {c: cas_text(row, markup) for c, row in rows.iterrows()})
            if dataset in published:
                line(title, "difference", {}, {c: f"{d:+.2f}" for c, d in rows.difference.items() if not pd.isna(d)})
        if not run:
            lines.append({"data set": title, "who": "ours: not run", **dict.fromkeys(columns, "")})
    return pd.DataFrame(lines)


def table_1_text(table: pd.DataFrame, markup: Markup) -> pd.DataFrame:
    """Table 1 as text: CAS of the four steps, then generation seconds."""
    text = layout_lines(table, paper.TABLE_1_CAS, list(STAGES_OF_TABLE_1), markup, synthetic=[])
    times = {"after_1": "time 1 (s)", "after_2": "time 2, 3 (s)", "after_4": "time 4 (s)"}
    for cell, title in times.items():
        key = "after_2_or_3" if cell == "after_2" else cell
        text[title] = [time_text(table, row, cell, key) for _, row in text.iterrows()]
    text["s per image and step"] = [speed_text(table, row) for _, row in text.iterrows()]
    text["Real"] = [real_text(table, row) for _, row in text.iterrows()]
    text = with_yardsticks(text, table)
    return text.rename(columns={name: name.replace("_", " ").capitalize() for name in STAGES_OF_TABLE_1})


def time_text(table: pd.DataFrame, line: Mapping, cell: str, key: str) -> str:
    if line["who"] == "paper":
        return f"{paper.TABLE_1_SECONDS[dataset_of(line)][key]:,}"
    rows = rows_of(table, line)
    return "" if rows is None else f"{rows[rows.cell == cell].seconds.iloc[0]:,.1f}"


def real_text(table: pd.DataFrame, line: Mapping) -> str:
    """The same classifier on real images, which a CAS is to come up to."""
    if line["who"] == "paper":
        return f"{paper.TABLE_2[dataset_of(line)]['real']:.2f}"
    rows = rows_of(table, line)
    return "" if rows is None else f"{rows.real.iloc[0]:.2f}"


def with_yardsticks(text: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """What an accuracy has to be read against: the commonest class, and standard errors (the largest of the line)."""
    for title, column in (
        ("majority", "majority"),
        ("s.e. test", "standard_error"),
        ("s.e. val", "validation_standard_error"),
    ):
        rows = [rows_of(table, line) for _, line in text.iterrows()]
        text[title] = ["" if row is None else f"{row[column].max():.1f}" for row in rows]
    return text


def rows_of(table: pd.DataFrame, line: Mapping) -> pd.DataFrame | None:
    """The cells of one of our own lines."""
    if ":" not in line["who"] or line["who"] == "ours: not run":
        return None
    return table[table.experiment == line["who"].split(":")[0]]


def dataset_of(line: Mapping) -> str:
    return next(name for name, title in paper.DATASET_TITLES.items() if title == line["data set"])


def speed_text(table: pd.DataFrame, line: Mapping) -> str:
    """Seconds an image and step, which alone compare: the times are for sets of different sizes (METHOD, item 5)."""
    if line["who"] == "paper":
        name = dataset_of(line)
        made = paper.TABLE_1_IMAGES[name] * paper.TABLE_1_STEPS_AFTER_1
        return f"{paper.TABLE_1_SECONDS[name]['after_1'] / made:.2g}"
    rows = rows_of(table, line)
    return "" if rows is None else f"{rows.seconds_per_image_step.median():.2g}"


def table_2_text(table: pd.DataFrame, markup: Markup) -> pd.DataFrame:
    """Table 2 as text: real, then x1 ... x10."""
    most = max([10, *(int(c[1:]) for c in table.cell if c != "real")] if len(table) else [10])
    synthetic = [f"x{k}" for k in range(1, most + 1)]
    text = layout_lines(table, paper.TABLE_2, ["real", *synthetic], markup, synthetic).rename(columns={"real": "Real"})
    return with_yardsticks(text, table)


def with_names(text: pd.DataFrame, escaped: Callable[[str], str]) -> list[list[str]]:
    """The cells; those of the first two columns are names, which a user chose and which are no markup."""
    rows = [[str(cell) for cell in row] for row in text.to_numpy().tolist()]
    return [[*map(escaped, row[:2]), *row[2:]] for row in rows]


def to_markdown(text: pd.DataFrame) -> str:
    cells = with_names(text, lambda name: re.sub(r"[\\|*_`<\[]", r"\\\g<0>", name))
    lines = [list(text.columns), ["---"] * len(text.columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def to_latex(text: pd.DataFrame) -> str:
    columns = "ll" + "r" * (len(text.columns) - 2)
    words = {"\\": "textbackslash", "~": "textasciitilde", "^": "textasciicircum"}
    escaped = with_names(
        text,
        lambda name: re.sub(r"[%_#&{}$\\~^]", lambda c: f"\\{words[c[0]]}{{}}" if c[0] in words else f"\\{c[0]}", name),
    )
    body = [" & ".join(row) + r" \\" for row in [list(text.columns), *escaped]]
    return "\n".join(
        [
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            body[0],
            r"\midrule",
            *body[1:],
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def notes(experiments: list[Experiment]) -> list[str]:
    """What has to stand under the tables: protocol, error bars, the majority line, and every cut."""
    lines = [METRICS_NOTE]
    for experiment in experiments:
        data, s = experiment.metrics("data"), experiment.settings
        n = data["counts"]["test"]
        readings = len((s.run_folder / "test_readings.jsonl").read_text().splitlines())
        seen = (
            "validation images; the test set only filled the tables"
            if s.protocol == "sealed"
            else "the *test set* (the paper's way)"
        )
        lines.append(
            f"{s.experiment}: protocol `{s.protocol}`: every decision of the run (trials, epochs, early stopping, size) saw {seen} ({readings} readings on record). Base model "
            f"{data['base_model']}; {sum(n)} test images; always answering the commonest class scores "
            f"{100 * data['majority_share_test']:.1f} %; classifier images {s.image_size} px."
        )
        lines.append(chosen_sentence(experiment))
        if cuts := ", ".join(f"`{name}` {value} ({default})" for name, (value, default) in s.deviations().items()):
            lines.append(f"{s.experiment}: settings that differ from the paper's, which are in brackets: {cuts}.")
    return lines


def chosen_sentence(experiment: Experiment) -> str:
    """The result of an experiment: the size that was chosen without its test score, beside the real baseline."""
    chosen, real = experiment.metrics("scaling")["chosen"], experiment.metrics("real")["test"]
    test = experiment.metrics(f"x{int(chosen[1:]):02d}")["test"]
    by = "validation images" if experiment.settings.protocol == "sealed" else "the test set"
    error = 100 * math.hypot(test["standard_error"], real["standard_error"])
    return (
        f"{experiment.settings.experiment}: chosen on {by}: {chosen}, CAS {percent(test)} beside {percent(real)} for real images "
        f"({100 * (test['mean'] - real['mean']):+.2f} points; {len(test['accuracy'])} classifier seeds each; standard error of the "
        f"difference on {test['n']} test images at most {error:.2f})."
    )


def percent(test: Mapping) -> str:
    return f"{100 * test['mean']:.2f}" + ("" if test["std"] is None else f" ± {100 * test['std']:.2f}") + " %"


def figure_1(experiments: list[Experiment]) -> pd.DataFrame:
    """Importances of each search, averaged over forests: a row an experiment, search and parameter, the paper's too."""
    rows = []
    for experiment in experiments:
        for name, found in experiment.metrics("importance").items():
            common = dict(who=experiment.settings.experiment, search=name, n=found["n"])
            rows += [
                dict(common, parameter=p, importance=e["mean"], spread=e["spread"])
                for p, e in found["main_effects"].items()
            ]
    for name, published in (("search_1", paper.FIGURE_1_SEARCH_1), ("search_2", paper.FIGURE_1_SEARCH_2)):
        for dataset, values in published.items():
            common = dict(who=f"paper: {dataset}", search=name, n=50 if name == "search_1" else 40)
            rows += [dict(common, parameter=p, importance=values[p], spread=np.nan) for p in PARAMETERS]
    return pd.DataFrame(rows)


def figure_1_means(effects: pd.DataFrame) -> pd.DataFrame:
    """Figure 1's bars: means over data sets, ours and the paper's, and how many there are."""
    source = np.where(effects.who.str.startswith("paper"), "paper", "ours")
    grouped = effects.assign(source=source).groupby(["search", "parameter", "source"])
    means = grouped.importance.mean().unstack().reindex(columns=["ours", "paper"])
    means["difference"] = means.ours - means.paper
    means["ours, data sets"] = effects[source == "ours"].who.nunique()
    return means.round(2)


def save_text(path: Path, text: str) -> Path:
    with atomic_write(path) as beside:
        beside.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    return path


def save_table(
    folder: Path, name: str, title: str, table: pd.DataFrame, layout: Callable, remarks: list[str]
) -> list[Path]:
    """`name`.csv (tidy numbers), .md, .tex and .png of one table, the remarks under it."""
    with atomic_write(folder / f"{name}.csv") as beside:
        table.to_csv(beside, index=False, float_format="%.6g")
    marks = "Bold: best of the line" + ("; underlined: best synthetic." if name == "table_2" else ".")
    below = "\n\n".join([marks, *remarks])
    save_text(folder / f"{name}.md", f"# {title}\n\n{to_markdown(layout(table, MARKDOWN))}\n\n{below}")
    comments = "\n".join(f"% {remark}" for remark in [title, marks, *remarks])
    save_text(folder / f"{name}.tex", f"{comments}\n{to_latex(layout(table, LATEX))}")
    draw_table(layout(table, PLAIN), title, folder / f"{name}.png")
    return [folder / f"{name}.{kind}" for kind in FORMATS]


def draw_table(text: pd.DataFrame, title: str, path: Path) -> None:
    """A picture of a table: `*` in the text is drawn bold, `°` underlined, the lines of the paper grey."""
    from matplotlib.figure import Figure

    widths = [max(len(str(v)) for v in [column, *text[column]]) + 2 for column in text.columns]
    figure = Figure(figsize=(0.085 * sum(widths), 0.26 * (len(text) + 3)))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, sum(widths))
    axes.set_ylim(len(text) + 2.4, 0)
    axes.text(0.5, 0.5, title, weight="bold", size=9, va="center")
    starts = np.cumsum([0, *widths[:-1]]) + 1
    for start, column in zip(starts, text.columns, strict=True):
        axes.text(start, 1.5, column, weight="bold", size=8, va="center")
    axes.plot([0, sum(widths)], [2, 2], color="black", lw=0.8)
    for index, (_, row) in enumerate(text.iterrows()):
        y = index + 2.6
        grey = row["who"] in ("paper", "ours: not run", "difference")
        for start, column in zip(starts, text.columns, strict=True):
            shown = str(row[column])
            name = column in ("data set", "who")  # which a user chose: no markup
            plain = shown if name else shown.replace("*", "").replace("°", "")
            weight = "bold" if "*" in shown and not name else "normal"
            colour = "0.45" if grey else "black"
            axes.text(start, y, plain, size=8, va="center", weight=weight, color=colour, parse_math=False)
            if "°" in shown and not name:
                axes.plot([start, start + 0.82 * len(plain)], [y + 0.38] * 2, lw=0.8, color=colour)
    with atomic_write(path) as beside:
        figure.savefig(beside, dpi=150, format="png", bbox_inches="tight", pad_inches=0.1)
