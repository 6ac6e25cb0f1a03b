"""Tidy tables -> the paper's tables as text: Markdown, LaTeX, and our own lines for a terminal; and the report's files."""

import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from sdlab.report import paper, tables
from sdlab.report.reference import compare_with_reference, comparison_sentence
from sdlab.report.remarks import table_remarks
from sdlab.runs.files import atomic_write, read_json
from sdlab.runs.records import read_record, record_digest
from sdlab.settings import Settings

FILES = (  # of notebook 07
    *(f"{table}.{kind}" for table in ("table_1", "table_2") for kind in ("csv", "md", "tex")),
    *("figure_1.csv", "figure_1.png", "figure_steps.png", "figure_scaling.png", "sources.json"),
)
NAMES = ["data set", "who"]  # columns of names, which a user chose: no markup, so each format escapes them


@dataclass(frozen=True)
class PrintedTable:
    """A table as text: a row a line, indexed by (dataset, experiment, source), where source is paper, ours or difference.

    `best` and `best_synthetic` have the text's shape and mark the best cells of each line.
    """

    title: str
    text: pd.DataFrame
    best: pd.DataFrame
    best_synthetic: pd.DataFrame

    @property
    def footnotes(self) -> list[str]:
        """The meaning of the marks, and the paper's data sets that were not run."""
        run = self.text.query("source == 'ours'").index.get_level_values("dataset")
        not_run = ", ".join(title for dataset, title in paper.DATASET_TITLES.items() if dataset not in run)
        underlined = "; underlined: best synthetic set" if self.best_synthetic.any(axis=None) else ""
        return [f"Bold: best of the line{underlined}.", *([f"Not run here: {not_run}."] if not_run else [])]

    def to_markdown(self) -> str:
        text = self.text.assign(**{name: self.text[name].map(escape_markdown) for name in NAMES})
        text = text.mask(self.best_synthetic, "<u>" + text + "</u>")
        text = text.mask(self.best, "**" + text + "**")
        sides = ["left" if column in NAMES else "right" for column in text]
        return text.to_markdown(index=False, disable_numparse=True, colalign=sides)

    def to_latex(self) -> str:
        style = self.text.style.hide(axis="index").format(escape="latex")
        style = style.apply(lambda _: np.where(self.best_synthetic, "underline:--rwrap;", ""), axis=None)
        style = style.apply(lambda _: np.where(self.best, "textbf:--rwrap;", ""), axis=None)
        columns = "".join("l" if column in NAMES else "r" for column in self.text)
        return style.to_latex(hrules=True, column_format=columns).replace("±", r"$\pm$")

    def to_terminal(self) -> str:
        """Our own lines as columns, which fit the width of a terminal."""
        ours = self.text.query("source == 'ours'").set_index(NAMES).rename_axis([None, None])
        return f"{self.title}\n{ours.loc[:, (ours != '').any()].T.to_string()}"


def escape_markdown(text: str) -> str:
    return re.sub(r"[\\|*_`<\[$]", r"\\\g<0>", text)


def lay_out(
    title: str, table: pd.DataFrame, published: pd.DataFrame, cells: list[str], more: Callable[[pd.DataFrame], dict]
) -> PrintedTable:
    """A line an experiment and, for the paper's data sets, the paper's line and the difference; `more` gives what follows the cells."""
    who = table.experiment + ": " + table.base_model + ", " + table.protocol
    rows = pd.concat([published.assign(source="paper", who="paper"), table.assign(source="ours", who=who)])
    rows["text"] = rows.apply(tables.cas_text, axis=1)
    differences = table.dropna(subset="difference").assign(source="difference", who="difference", cas=np.nan)
    differences["text"] = differences.difference.map("{:+.2f}".format)
    lines = pd.concat([rows, differences])
    lines["data set"] = lines.dataset.replace(paper.DATASET_TITLES)
    for name, order in (("dataset", [*table.dataset, *published.dataset]), ("source", ["paper", "ours", "difference"])):
        lines[name] = pd.Categorical(lines[name], list(dict.fromkeys(order)))
    key = ["dataset", "experiment", "source"]
    text, cas = (lines.pivot(index=[*key, *NAMES], columns="cell", values=name)[cells] for name in ("text", "cas"))
    text, cas = text.reset_index(NAMES), cas.droplevel(NAMES)
    extras = {line: more(group.set_index("cell")) for line, group in rows.groupby(key)}
    text = text.join(pd.DataFrame(extras).T.rename_axis(key)).fillna("")
    synthetic = [cell for cell in cells if cell.startswith("x")]
    marks = (cas[some].eq(cas[some].max(axis=1), axis=0) for some in (cells, synthetic))
    marks = (mark.reindex(columns=text.columns, fill_value=False) for mark in marks)
    printed = {cell: cell.replace("_", " ").capitalize() for cell in ("real", *tables.STAGES_OF_TABLE_1)}
    return PrintedTable(title, *(frame.rename(columns=printed) for frame in (text, *marks)))


def yardsticks(rows: pd.DataFrame) -> dict[str, str]:
    """What an accuracy has to be read against: the most frequent class, and standard errors (the largest of the line)."""
    columns = {"majority": "majority", "s.e. test": "standard_error", "s.e. val": "validation_standard_error"}
    largest = {title: rows[column].max() for title, column in columns.items()}
    return {title: "" if np.isnan(value) else f"{value:.1f}" for title, value in largest.items()}


def times(rows: pd.DataFrame) -> dict[str, str]:
    """Generation times, for sets of different sizes: seconds per image and step compare (docs/method.md, item 5)."""
    cells = {"time 1 (s)": "after_1", "time 2, 3 (s)": "after_2", "time 4 (s)": "after_4"}
    seconds = {title: rows.seconds[cell] for title, cell in cells.items()}
    texts = {title: f"{value:,.0f}" if value >= 100 else f"{value:.1f}" for title, value in seconds.items()}
    return texts | {"s per image and step": f"{rows.seconds_per_image_step.median():.2g}"}


def print_table_1(table: pd.DataFrame) -> PrintedTable:
    """Table 1 as text: CAS after each stage, generation times, and the same classifier on real images."""
    title = "Table 1: CAS (%) and generation time after each stage"
    more = lambda rows: times(rows) | {"Real": f"{rows.real.iloc[0]:.2f}"} | yardsticks(rows)  # noqa: E731
    return lay_out(title, table, tables.paper_table_1(), list(tables.STAGES_OF_TABLE_1), more)


def print_table_2(table: pd.DataFrame) -> PrintedTable:
    """Table 2 as text: accuracy of the classifier trained on real images, then on x1 ... x10 synthetic ones."""
    title = "Table 2: top-1 accuracy (%) of ResNet20 trained on real images and on synthetic sets of growing size"
    published = tables.paper_table_2()
    sizes = sorted({*table.cell, *published.cell} - {"real"}, key=lambda cell: int(cell[1:]))
    return lay_out(title, table, published, ["real", *sizes], yardsticks)


def save_text(path: Path, text: str) -> Path:
    with atomic_write(path) as part:
        part.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    return path


def save_table(folder: Path, name: str, table: pd.DataFrame, printed: PrintedTable, remarks: Sequence[str]) -> None:
    """Write `name`.csv (the tidy numbers), and .md and .tex (the printed table, with the remarks)."""
    below = [*printed.footnotes, *remarks]
    comments = "\n".join(f"% {line}" for remark in [printed.title, *below] for line in remark.splitlines())
    save_text(folder / f"{name}.csv", table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
    save_text(folder / f"{name}.md", f"# {printed.title}\n\n{printed.to_markdown()}\n\n{paragraphs(below)}")
    save_text(folder / f"{name}.tex", f"{comments}\n{printed.to_latex()}")


def paragraphs(sentences: Sequence[str]) -> str:
    """Plain sentences as paragraphs of Markdown, in lines of at most 120 characters."""
    lines = (textwrap.fill(escape_markdown(s), 120, break_long_words=False, break_on_hyphens=False) for s in sentences)
    return "\n\n".join(lines)


def experiment_digests(experiments: list[tables.FinishedExperiment]) -> dict[str, list[str]]:
    """What tables and Figure 1 are made from: digests of each experiment's sizes (05) and importances (06)."""
    return {e.name: [record_digest(read_record(e.settings, number)) for number in ("05", "06")] for e in experiments}


def tables_are_current(settings: Settings) -> bool:
    """Whether all files of notebook 07 are in the report folder, and made from the experiments that are finished now."""
    folder, digests = settings.report_folder, experiment_digests(tables.finished_experiments(settings))
    return all((folder / name).exists() for name in FILES) and read_json(folder / "sources.json") == digests


def terminal_summary(settings: Settings) -> str:
    """Our lines of both tables, their remarks, and how they differ from the committed ones."""
    experiments, cells = tables.finished_experiments(settings), compare_with_reference(settings)
    first, second = tables.table_1(experiments), tables.table_2(experiments)
    printed = print_table_1(first), print_table_2(second)
    parts = [*(table.to_terminal() for table in printed), *table_remarks(experiments, first)]
    if cells is not None and cells.noise.notna().all():
        parts.append(cells.drop(columns="other_conditions").round(2).to_string())
    return "\n\n".join([*parts, comparison_sentence(cells, settings.experiment)]).rstrip()
