"""The scripts of the longer studies: what they report follows from what was measured."""

import importlib.util
import itertools
import json
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import longer_studies, table_of, table_text
from sdlab.paths import PROJECT_ROOT
from sdlab.settings import Settings

SCRIPTS = PROJECT_ROOT / "scripts"


def script(name):
    sys.path.insert(0, str(SCRIPTS))
    try:
        spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def searches():
    return script("study_searches")


def measured(searches, path, deviation=0.005):
    """A table whose best point is UGS 1.2 and the last epoch, whatever the steps."""
    rng, points = np.random.default_rng(0), {}
    for steps in searches.STEPS:
        for guidance in searches.GUIDANCE:
            for epoch in searches.EPOCHS:
                worth = 0.9 - 0.1 * abs(np.log((guidance + 0.5) / 1.7)) - 0.02 * np.log(32 / epoch)
                points[f"{steps}/{guidance:g}/{epoch}"] = {
                    f"{noise}/{rung}": {
                        split: list(worth - 20 / rung + rng.normal(0, deviation, 2)) for split in ("val", "test")
                    }
                    for noise, rungs in (("search", searches.RUNGS), ("fresh", [1000]))
                    for rung in rungs
                }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(experiment="made up", points=points)))
    return path


def test_a_search_of_the_table_finds_its_best_and_counts_images(searches, tmp_path):
    table = searches.Table(measured(searches, tmp_path / "measured.json"))
    best = max(range(len(table.names)), key=lambda i: searches.worth(table, i))
    assert table.names[best].split("/")[1:] == ["1.2", "32"] and table.nearest(7, 1.25, 30) in range(len(table.names))
    assert table.names[table.nearest(7, 1.25, 30)] == "7/1.2/32"
    given = dict(experiment="study", dataset="digits", search_first_images=125, search_images=1000, shard_size=125)
    ends = {}
    for pruner, eta, finalists in (("none", 2, 1), ("successive_halving", 8, 1), ("successive_halving", 8, 3)):
        settings = Settings.from_mapping(given | dict(search_pruner=pruner, search_reduction_factor=eta))
        path = searches.one_search(table, settings, finalists, 0)
        ends[pruner, finalists] = path[-1]
        assert all(a[0] <= b[0] for a, b in itertools.pairwise(path))
    assert ends["none", 1][0] == 50 * 1000
    assert 50 * 125 < ends["successive_halving", 1][0] < 25_000
    assert ends["successive_halving", 3][0] == ends["successive_halving", 1][0] + 3 * 1000
    assert all(worth > searches.worth(table, best) - 0.05 for _, _, worth in ends.values())


def test_the_noise_floor_is_the_deviation_that_was_put_in(searches, tmp_path):
    table = searches.Table(measured(searches, tmp_path / "measured.json", deviation=0.03))
    assert all(table.noise(rung) == pytest.approx(0.03, rel=0.25) for rung in searches.RUNGS)


def test_what_the_study_writes(searches, tmp_path):
    path = measured(searches, tmp_path / "searches" / "measured.json")
    done = CliRunner().invoke(searches.main, ["simulate", "--table", str(path), "--repetitions", "2"])
    assert done.exit_code == 0, done.output
    assert {p.name for p in path.parent.iterdir()} == {"measured.json", "searches.md", "searches.png", "row.json"}
    text = path.with_name("searches.md").read_text()
    assert all(f"| {name} |" in text for name in searches.STRATEGIES) and "| no pruning | 50,000 | 1.0 |" in text
    (row,) = longer_studies(tmp_path)
    assert row.theirs == 50_000 and row.ratio == pytest.approx(50_000 / row.ours, rel=0.1)
    assert "study_searches.py" in table_text(table_of([row])).loc[0, "command"]
