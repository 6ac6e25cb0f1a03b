"""Metrics of finished experiments -> Tables 1 and 2 (a row a cell; percentages) and Figure 1, with the paper's numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import yaml

from sdlab.data.images import ImageDataset
from sdlab.errors import BadInput
from sdlab.report import paper
from sdlab.runs.files import read_json
from sdlab.runs.stages import stage_state
from sdlab.settings import Settings

# The cells of Table 1, and under which name the paper prints the generation time of each.
STAGES_OF_TABLE_1 = {"after_1": "after_1", "after_2": "after_2_or_3", "after_3": "after_2_or_3", "after_4": "after_4"}

# Columns that fit a notebook's page.
SHOWN = ("cas", "deviation", "standard_error", "validation", "balanced", "worst_class_recall", "images",
         "num_inference_steps", "guidance_scale", "seconds")  # fmt: skip


@dataclass(frozen=True)
class FinishedExperiment:
    """A finished experiment: its settings, which say where its files are."""

    settings: Settings

    @property
    def name(self) -> str:
        return self.settings.experiment

    @property
    def dataset(self) -> str:
        """The data set's name. A user's own file or folder called like one of the paper's data sets is marked `(own)`."""
        name = self.metrics("data")["name"]
        return f"{name} (own)" if name in paper.DATASETS and self.settings.dataset != name else name

    def metrics(self, name: str) -> dict:
        return read_json(self.settings.run_folder / "metrics" / f"{name}.json")

    def has_metrics(self, name: str) -> bool:
        return (self.settings.run_folder / "metrics" / f"{name}.json").exists()


def finished_experiments(settings: Settings) -> list[FinishedExperiment]:
    """All experiments under `runs_root` whose tables can be filled (notebooks 05 and 06 are done), in the order of their names."""
    experiments = []
    for path in sorted(settings.run_folder.parent.glob("*/settings.yaml")):
        # A folder may have been moved or renamed since: where it is now counts.
        here = dict(runs_root=settings.runs_root, reports_root=settings.reports_root, experiment=path.parent.name)
        try:
            theirs = Settings.from_mapping((yaml.safe_load(path.read_text(encoding="utf-8")) or {}) | here)
            if all(stage_state(theirs, number).state == "done" for number in ("05", "06")):
                experiments.append(FinishedExperiment(theirs))
        except (BadInput, yaml.YAMLError, TypeError, KeyError):
            continue  # a foreign folder, or one of another version, does not keep the others from their tables
    return experiments


def cell_numbers(cell: Mapping) -> dict[str, float]:
    """The numbers of one scored training set (`metrics/<name>.json`), accuracies in percent; of a generated one, its sampling."""
    test, val = cell["test"], cell["val"]
    sampling = dict(cell.get("config", {}))
    if sampling:
        sampling |= dict(seconds=cell["generation_seconds"], seconds_per_image_step=cell["seconds_per_image_step"])
    return dict(
        cas=100 * test["mean"],
        deviation=np.nan if test["std"] is None else 100 * test["std"],
        standard_error=100 * test["standard_error"],
        seeds=len(test["accuracy"]),
        test_images=test["n"],
        validation=100 * val["mean"],
        validation_standard_error=100 * val["standard_error"],
        balanced=100 * test["balanced"],
        worst_class_recall=100 * min(recall for recall in test["recall"] if recall is not None),
        images=cell["images"],
        **sampling,
    )


def cas_text(row: pd.Series) -> str:
    return f"{row.cas:.2f}" + ("" if pd.isna(row.deviation) else f" ± {row.deviation:.2f}")


def scores_table(cells: Sequence[Mapping | None]) -> pd.DataFrame:
    """Scored training sets, a row each: mean and deviation over classifier seeds, and what plain accuracy can hide."""
    rows = [dict(cell=cell["title"]) | cell_numbers(cell) for cell in cells if cell is not None]
    table = pd.DataFrame(rows).set_index("cell")
    return table[[column for column in SHOWN if column in table]].round(2)


def score_table(cell: Mapping, data: ImageDataset) -> pd.DataFrame:
    """One scored training set, and the accuracy of always answering the most frequent class."""
    return scores_table([cell]).assign(majority=round(100 * data.majority_share(), 2))


def cell_row(experiment: FinishedExperiment, cell: str, metrics: str) -> dict:
    """A cell of a table, whose numbers are in `metrics/<metrics>.json`."""
    data = experiment.metrics("data")
    return dict(
        dataset=experiment.dataset,
        experiment=experiment.name,
        protocol=experiment.settings.protocol,
        base_model=data["base_model"],
        cell=cell,
        **cell_numbers(experiment.metrics(metrics)),
        real=100 * experiment.metrics("real")["test"]["mean"],
        majority=100 * data["majority_share_test"],
    )


def table_1(experiments: Sequence[FinishedExperiment]) -> pd.DataFrame:
    """CAS and generation time after each stage, a row a cell."""
    return join_paper([cell_row(e, cell, cell) for e in experiments for cell in STAGES_OF_TABLE_1], paper_table_1())


def table_2(experiments: Sequence[FinishedExperiment]) -> pd.DataFrame:
    """Accuracy of classifiers trained on real images and on x1 ... x10, a row a cell."""
    rows = []
    for experiment in experiments:
        chosen = experiment.metrics("scaling")["chosen"]
        files = {"real": "real"} | {f"x{k}": f"x{k:02d}" for k in range(1, experiment.settings.scaling_max + 1)}
        rows += [cell_row(experiment, cell, file) | dict(chosen=cell == chosen) for cell, file in files.items()]
    return join_paper(rows, paper_table_2())


def join_paper(rows: Sequence[dict], published: pd.DataFrame) -> pd.DataFrame:
    """Our rows with the paper's numbers for the same cells, and the differences; NaN where the paper has none."""
    published = published.drop(columns=["experiment", "real", "seconds_per_image_step"], errors="ignore")
    published = published.rename(columns=dict(cas="paper", seconds="paper_seconds"))
    table = pd.DataFrame(rows).merge(published, how="left", on=["dataset", "cell"])
    return table.assign(difference=table.cas - table.paper)


def paper_table_1() -> pd.DataFrame:
    """The paper's Table 1 in tidy form, with seconds per image and inference step, and the real baseline of its Table 2."""
    rows = []
    for dataset, cas in paper.TABLE_1_CAS.items():
        seconds, steps = paper.TABLE_1_SECONDS[dataset], paper.TABLE_1_IMAGES[dataset] * paper.TABLE_1_STEPS_AFTER_1
        line = (dataset, "", paper.TABLE_2[dataset]["real"], seconds["after_1"] / steps)
        rows += [(*line, cell, cas[cell], seconds[name]) for cell, name in STAGES_OF_TABLE_1.items()]
    columns = ["dataset", "experiment", "real", "seconds_per_image_step", "cell", "cas", "seconds"]
    return pd.DataFrame(rows, columns=columns)


def paper_table_2() -> pd.DataFrame:
    """The paper's Table 2 in tidy form."""
    rows = [(dataset, "", cell, cas) for dataset, row in paper.TABLE_2.items() for cell, cas in row.items()]
    return pd.DataFrame(rows, columns=["dataset", "experiment", "cell", "cas"])


def gains(table: pd.DataFrame) -> dict:
    """The text's summary of a Table 1: CAS gained since stage 1 (lowest, highest), largest share of time saved by stage 2."""
    wide = table.pivot(index=["dataset", "experiment"], columns="cell", values=["cas", "seconds"])
    gained, saved = wide.cas.sub(wide.cas.after_1, axis=0).round(2), 1 - wide.seconds.after_2 / wide.seconds.after_1
    ranges = {stage: [gained[stage].min(), gained[stage].max()] for stage in ("after_2", "after_4")}
    return ranges | {"time_saved_after_2_percent": round(100 * saved.max(), 1)}


def figure_1(experiments: Sequence[FinishedExperiment]) -> pd.DataFrame:
    """Importances (shares of the main effects): a row a search, parameter and experiment, or data set of the paper (`who`)."""
    rows = []
    for experiment in experiments:
        for search, found in experiment.metrics("importance").items():
            effects = found["main_effects"].items()
            rows += [("ours", experiment.name, search, found["n"], p, e["mean"], e["spread"]) for p, e in effects]
    for search, n, published in (("search_1", 50, paper.FIGURE_1_SEARCH_1), ("search_2", 40, paper.FIGURE_1_SEARCH_2)):
        for dataset, shares in published.items():
            rows += [("paper", dataset, search, n, parameter, share, np.nan) for parameter, share in shares.items()]
    return pd.DataFrame(rows, columns=["source", "who", "search", "n", "parameter", "importance", "spread"])


def figure_1_means(effects: pd.DataFrame) -> pd.DataFrame:
    """The bars of Figure 1: means over our experiments and over the paper's data sets, and the number of ours."""
    means = effects.pivot_table(values="importance", index=["search", "parameter"], columns="source")
    count = {"our experiments": effects[effects.source == "ours"].who.nunique()}
    return means.assign(difference=means.ours - means.paper, **count).round(2)
