"""The paper's numbers: intact, and consistent with what its text says of them."""

import json
from pathlib import Path

import numpy as np
import pytest

from sdlab.paths import PROJECT_ROOT
from sdlab.report import paper
from sdlab.report.tables import gains, paper_table_1

REFERENCE = Path(__file__).parent / "reference"  # as read from the paper and the authors' repositories
SHARED = PROJECT_ROOT.parent / "shared" / "reference"
OURS = {"ugs": "guidance_scale", "is": "num_inference_steps", "epoch": "epoch"}


def test_tables_are_those_of_the_sources():
    table_1 = json.loads((REFERENCE / "table1.json").read_text())["datasets"]
    table_2 = json.loads((REFERENCE / "table2.json").read_text())["datasets"]
    figure_1 = json.loads((REFERENCE / "figure1.json").read_text())
    authors = json.loads((REFERENCE / "settings.json").read_text())
    assert {k: v["paper_top1_percent"] for k, v in table_1.items()} == paper.TABLE_1_CAS
    assert {k: v["generation_seconds"] for k, v in table_1.items()} == paper.TABLE_1_SECONDS
    assert {k: v["paper_top1_percent"] for k, v in table_2.items()} == paper.TABLE_2
    for name, ours in (("search_1", paper.FIGURE_1_SEARCH_1), ("search_2", paper.FIGURE_1_SEARCH_2)):
        assert {d: {OURS[k]: v for k, v in row.items()} for d, row in figure_1[name].items()} == ours
    assert {
        k: dict(zip(authors["columns"], v, strict=True)) for k, v in authors["datasets"].items()
    } == paper.AUTHORS_SETTINGS
    assert authors["effective_rank_of_class_residuals"] == paper.AUTHORS_EFFECTIVE_RANK


@pytest.mark.skipif(not SHARED.is_dir(), reason="the sources' own figures are not beside this checkout")
def test_the_reference_files_are_the_sources_own():
    for path in REFERENCE.glob("*.json"):
        assert json.loads(path.read_text()) == json.loads((SHARED / path.name).read_text()), path.name


def test_the_texts_ranges_follow_from_table_1():
    """+1.08 to +43.54 after step 2, up to 38 % less time, +10.45 to +46.33 after step 4."""
    ranges = gains(paper_table_1())
    assert ranges["after_2"] == paper.TEXT_RANGES["after_2"] == [1.08, 43.54]
    assert ranges["after_4"] == paper.TEXT_RANGES["after_4"] == [10.45, 46.33]
    assert round(ranges["time_saved_after_2_percent"]) == paper.TEXT_RANGES["time_saved_after_2_percent"] == 38


def test_a_third_of_the_data_sets_is_better_than_real():
    """The abstract's claim, from Table 2: CIFAR10 and RetinaMNIST."""
    better = [d for d, row in paper.TABLE_2.items() if max(v for k, v in row.items() if k != "real") > row["real"]]
    assert better == ["cifar10", "retinamnist"]


def test_generation_times_are_multiples_of_the_steps():
    """docs/method.md, item 5: n x IS x 0.15 s with n a tenth of the real training set, IS after 1 being 50."""
    tenth = paper.TABLE_1_IMAGES
    for dataset, row in paper.TABLE_1_SECONDS.items():
        assert row["after_1"] == pytest.approx(tenth[dataset] * 50 * 0.15, abs=1)
        implied = row["after_4"] / tenth[dataset] / 0.15
        assert implied == pytest.approx(paper.AUTHORS_SETTINGS[dataset]["num_inference_steps"], abs=1)


def test_figure_1_averages():
    """docs/method.md, item 9."""
    for table, means in (
        (paper.FIGURE_1_SEARCH_1, (0.58, 0.368, 0.055)),
        (paper.FIGURE_1_SEARCH_2, (0.692, 0.14, 0.17)),
    ):
        names = ("guidance_scale", "epoch", "num_inference_steps")
        assert [np.mean([row[n] for row in table.values()]) for n in names] == pytest.approx(means, abs=1e-3)
