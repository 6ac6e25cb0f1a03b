"""The committed runs in one table each, and Figure 1 averaged over their data sets, from their own CSV files.

    python scripts/join_reference.py

Writes table_1.md, table_2.md, figure_1.csv, figure_1_means.csv and figure_1.png to reports/reference/all/. What was
measured, how and with which settings stands under the tables of each run.
"""

from pathlib import Path

import pandas as pd

from sdlab.report import figures, printing, tables
from sdlab.report.reference import REFERENCE
from sdlab.report.remarks import METRICS_NOTE


def joined(name: str) -> pd.DataFrame:
    """The rows of a file of all committed runs, in the order of their names; the paper's once.

    A run's tables hold all experiments of its `runs_root`, perhaps an earlier run of another one: only its own count.
    """
    files = sorted(path for path in REFERENCE.glob(f"*/{name}.csv") if path.parent.name != "all")
    return pd.concat([own_rows(path) for path in files]).drop_duplicates(ignore_index=True)


def own_rows(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path)
    if "source" in table:
        return table[(table.source == "paper") | (table.who == path.parent.name)]
    return table[table.experiment == path.parent.name]


def main() -> None:
    folder = REFERENCE / "all"
    folder.mkdir(exist_ok=True)
    for name, print_table in (("table_1", printing.print_table_1), ("table_2", printing.print_table_2)):
        table = print_table(joined(name))
        below = printing.paragraphs([*table.footnotes, METRICS_NOTE])
        printing.save_text(folder / f"{name}.md", f"# {table.title}\n\n{table.to_markdown()}\n\n{below}")
    effects = joined("figure_1")
    figures.save_figure(figures.plot_importances(effects), folder / "figure_1.png")
    printing.save_text(folder / "figure_1.csv", effects.to_csv(index=False))
    printing.save_text(folder / "figure_1_means.csv", tables.figure_1_means(effects).to_csv())


if __name__ == "__main__":
    main()
