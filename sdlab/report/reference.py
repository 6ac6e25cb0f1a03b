"""A run's tables compared with the committed ones of the same name, and whether they differ by more than noise."""

from statistics import NormalDist

import numpy as np
import pandas as pd

from sdlab.paths import PROJECT_ROOT
from sdlab.settings import Settings

REFERENCE = PROJECT_ROOT / "reports" / "reference"
TABLES = ("table_1.csv", "table_2.csv")
CONDITIONS = ["base_model", "protocol", "seeds", "test_images", "images"]  # equal in cells that compare


def compare_with_reference(settings: Settings) -> pd.DataFrame | None:
    """A row a cell of both tables: CAS (%) `ours` and `committed`, `difference`, `noise` (points), `within`, `other_conditions`.

    `noise` is two standard errors of the difference: 2 * sqrt(d1^2 / n1 + d2^2 / n2 + e^2), with the deviations d over the n
    classifier seeds of each run (0 for a single seed) and once the larger binomial standard error e of the test set, which
    both share. It leaves out that another trial may win a search. It is NaN where `other_conditions` names settings that differ.
    None if nothing is committed under this name, or the run's own tables are missing or are the committed ones.
    """
    folders = settings.report_folder.resolve(), (REFERENCE / settings.experiment).resolve()
    if folders[0] == folders[1] or not all((folder / table).exists() for folder in folders for table in TABLES):
        return None
    names = dict(experiment=str, base_model=str)
    both = (pd.concat([pd.read_csv(folder / table, dtype=names) for table in TABLES]) for folder in folders)
    ours, committed = (cells[cells.experiment == settings.experiment].set_index("cell") for cells in both)
    ours, committed = ours.align(committed, join="inner")
    other = (ours[CONDITIONS] != committed[CONDITIONS]).apply(lambda row: ", ".join(row.index[row]), axis=1)
    variances = [cells.deviation.fillna(0) ** 2 / cells.seeds for cells in (ours, committed)]
    noise = 2 * np.sqrt(sum(variances) + np.maximum(ours.standard_error, committed.standard_error) ** 2)
    cells = pd.DataFrame(dict(ours=ours.cas, committed=committed.cas, difference=ours.cas - committed.cas))
    cells = cells.assign(noise=noise.where(other == ""), other_conditions=other)
    return cells.assign(within=cells.difference.abs() <= cells.noise)


def comparison_sentence(cells: pd.DataFrame | None, experiment: str) -> str:
    """The result of `compare_with_reference`; empty for None. As a whole a run is within noise if its largest difference is at
    most as many standard errors as the normal quantile of 2.5 % divided by the number of cells (Bonferroni)."""
    if cells is None:
        return ""
    committed = f"the committed numbers (reports/reference/{experiment}/)"
    if cells.noise.isna().any():
        other = dict.fromkeys(cells.other_conditions[cells.noise.isna()])
        return f"Not compared with {committed}, whose conditions differ: {'; '.join(other)}."
    if (cells.difference == 0).all():
        return f"All {len(cells)} cells equal {committed}."
    errors = 2 * cells.difference.abs() / cells.noise
    worst, limit = errors.idxmax(), NormalDist().inv_cdf(1 - 0.025 / len(cells))
    return (
        f"Compared with {committed}, {cells.within.sum()} of {len(cells)} cells differ by at most two standard errors. The largest "
        f"difference is {cells.difference[worst]:+.2f} points ({worst}), {errors[worst]:.1f} standard errors; by chance the largest "
        f"of {len(cells)} stays below {limit:.1f}: as a whole {'within' if errors[worst] <= limit else 'beyond'} noise."
    )
