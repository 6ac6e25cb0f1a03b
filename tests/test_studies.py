"""The scripts that compare: searches, points of a search space, committed runs."""

import itertools
import json
import re
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from sdlab.paths import PROJECT_ROOT
from sdlab.report.reference import REFERENCE
from sdlab.settings import Settings

sys.path.insert(0, str(PROJECT_ROOT / "scripts"))
import ablate_protocol
import join_reference
import score_points
import study_searches as script


def write_table(path, deviation=0.005):
    """A table whose best point is UGS 1.2 and the last epoch, whatever the steps."""
    rng, points = np.random.default_rng(0), {}
    for steps, guidance, epoch in itertools.product(script.STEPS, script.GUIDANCE, script.EPOCHS):
        worth = 0.9 - 0.1 * abs(np.log((guidance + 0.5) / 1.7)) - 0.02 * np.log(32 / epoch)
        points[f"{steps}/{guidance:g}/{epoch}"] = {
            f"{noise}/{rung}": {
                split: list(worth - 20 / rung + rng.normal(0, deviation, 2)) for split in ("val", "test")
            }
            for noise, rungs in (("search", script.RUNGS), ("fresh", [1000]))
            for rung in rungs
        }
    path.write_text(json.dumps(dict(experiment="invented", points=points)))
    return path


def test_a_search_of_the_table_finds_its_best_and_counts_images(tmp_path):
    table = script.Table(write_table(tmp_path / "measured.json"))
    best = max(range(len(table.names)), key=table.worth)
    assert table.names[best].split("/")[1:] == ["1.2", "32"]
    assert table.names[table.nearest(7, 1.25, 30)] == "7/1.2/32"
    given = dict(experiment="study", dataset="digits", search_first_images=125, search_images=1000, shard_size=125)
    ends = {}
    for pruner, eta, finalists in (("none", 2, 1), ("successive_halving", 8, 1), ("successive_halving", 8, 3)):
        settings = Settings.from_mapping(given | dict(search_pruner=pruner, search_reduction_factor=eta))
        path = script.simulate_search(table, settings, finalists, 0)
        ends[pruner, finalists] = path[-1]
        assert all(a[0] <= b[0] for a, b in itertools.pairwise(path))
    assert ends["none", 1][0] == 50 * 1000
    assert 50 * 125 < ends["successive_halving", 1][0] < 25_000
    assert ends["successive_halving", 3][0] == ends["successive_halving", 1][0] + 3 * 1000
    assert all(worth > table.worth(best) - 0.05 for _, _, worth in ends.values())


def test_the_noise_floor_is_the_deviation_of_the_table(tmp_path):
    table = script.Table(write_table(tmp_path / "measured.json", deviation=0.03))
    assert all(table.noise[rung] == pytest.approx(0.03, rel=0.25) for rung in script.RUNGS)


def test_the_study_writes_its_table_and_figure(tmp_path):
    path, folder = write_table(tmp_path / "measured.json"), tmp_path / "searches"
    arguments = ["simulate", "--table", str(path), "--folder", str(folder), "--repetitions", "2"]
    result = CliRunner().invoke(script.main, arguments)
    assert result.exit_code == 0, result.output
    assert {p.name for p in folder.iterdir()} == {"searches.md", "searches.png"}
    text = (folder / "searches.md").read_text()
    assert all(f"| {name} |" in text for name in script.STRATEGIES) and "| no pruning | 50,000 | 1.0 |" in text


def test_points_are_scored_on_validation_images_alone(world, finished, monkeypatch):
    read, score = [], score_points.train_and_score_classifiers
    monkeypatch.setattr(
        score_points, "train_and_score_classifiers", lambda *given: read.append(given[3]) or score(*given)
    )
    readings = (world / "runs" / "smoke" / "test_readings.jsonl").read_bytes()
    points = ["3 1.5 2 2", "2 1.0 1 0"]
    asked = [word for point in points for word in ("--point", *point.split())]
    result = CliRunner().invoke(score_points.main, [str(world / "smoke.yaml"), *asked, "--images", "30"])
    assert result.exit_code == 0, result.output
    found = re.findall(r"^(.+): (\S+) ± \S+ % of 297 images, 2 classifiers$", result.stdout, re.MULTILINE)
    assert [point for point, _ in found] == points and all(0 < float(cas) < 60 for _, cas in found)
    assert read == [["val"], ["val"]]
    assert (world / "runs" / "smoke" / "test_readings.jsonl").read_bytes() == readings


def test_committed_runs_are_joined_and_figure_1_is_their_mean(tmp_path, monkeypatch):
    for name, change in (("one", 0.1), ("two", 0.3)):
        shutil.copytree(REFERENCE / "digits", tmp_path / name, ignore=shutil.ignore_patterns("release", "*.ipynb"))
        for path in (tmp_path / name).glob("*.csv"):
            table = pd.read_csv(path)
            if "experiment" in table:
                table["experiment"] = table["dataset"] = name
            if path.stem == "figure_1":
                ours = table.source == "ours"
                table.loc[ours, ["who", "importance"]] = [name, change]
            if name == "two":  # with rows of a former run of the first, which lay in the same folder of runs
                column = "who" if path.stem == "figure_1" else "experiment"
                if column in table:
                    table = pd.concat([table[table[column] == name].replace({column: name}, "one"), table])
            table.to_csv(path, index=False)
    monkeypatch.setattr(join_reference, "REFERENCE", tmp_path)
    join_reference.main()
    folder = tmp_path / "all"
    assert {"table_1.md", "table_2.md", "figure_1.csv", "figure_1.png"} <= {path.name for path in folder.iterdir()}
    picture = (folder / "figure_1.png").read_bytes()
    join_reference.main()
    assert (folder / "figure_1.png").read_bytes() == picture
    for name in ("one", "two"):
        assert name in (folder / "table_1.md").read_text() and name in (folder / "table_2.md").read_text()
    effects, means = pd.read_csv(folder / "figure_1.csv"), pd.read_csv(folder / "figure_1_means.csv")
    assert set(effects[effects.source == "ours"].who) == {"one", "two"} and not effects.duplicated().any()
    assert np.allclose(means.ours, 0.2) and (means["our experiments"] == 2).all()


def test_the_committed_join_is_of_the_committed_runs(tmp_path, monkeypatch):
    for path in REFERENCE.glob("*/*.csv"):
        if path.parent.name != "all":
            (tmp_path / path.parent.name).mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / path.parent.name)
    monkeypatch.setattr(join_reference, "REFERENCE", tmp_path)
    join_reference.main()
    made = {path.name: path.read_bytes() for path in (tmp_path / "all").iterdir() if path.suffix != ".png"}
    assert made == {path.name: path.read_bytes() for path in (REFERENCE / "all").iterdir() if path.suffix != ".png"}


# ------------------------------------------------------------------------------------------- what the paper's protocol flatters


def answers(accuracies, classifiers=4, images=400, seed=0):
    """Right answers, (candidates, classifiers, n): images are equally hard for all."""
    chance = np.broadcast_to(np.array(accuracies)[:, None, None], (len(accuracies), classifiers, images))
    return np.random.default_rng(seed).random(chance.shape) < chance


def mean_flattery(answers_of_seed, val, seeds=60):
    found = [ablate_protocol.flattery(answers_of_seed(s), np.array(val), 50, s).mean() for s in range(seeds)]
    return pd.DataFrame(found).mean()


def test_choosing_among_equals_flatters_as_much_as_the_luckiest_of_them():
    """Ten equal sets, two classifiers to choose by and 200 images: the best of ten means, about 1.54 standard errors up."""
    found = mean_flattery(lambda s: answers([0.8] * 10, seed=s), np.zeros((10, 4)))
    expected = 100 * 1.54 * (0.8 * 0.2 / (200 * 2)) ** 0.5
    assert found.printed - found.honest == pytest.approx(expected, rel=0.2)
    assert found.honest == pytest.approx(80, abs=0.5) and found.sealed == pytest.approx(80, abs=0.5)
    # Here nothing ties the images' luck to other classifiers: scored by these, all of it is gone.
    assert found["others, same images"] == pytest.approx(80, abs=0.5)


def test_hard_images_flatter_other_classifiers_too():
    """Each set suits other images, whoever is trained on it: another classifier on the same test images does not help."""

    def suited(seed):
        chance = np.clip(0.8 + 0.4 * np.random.default_rng([seed, 1]).normal(size=(10, 1, 400)), 0, 1)
        return np.random.default_rng(seed).random((10, 4, 400)) < chance

    found = mean_flattery(suited, np.zeros((10, 4)))
    assert found["others, same images"] - found.honest > 0.5 * (found.printed - found.honest) > 0.5


def test_a_clear_winner_is_not_flattered():
    found = mean_flattery(lambda s: answers([0.5, 0.9, 0.6], seed=s), np.repeat([[0.5], [0.9], [0.6]], 4, axis=1))
    assert abs(found.printed - found.honest) < 0.5 and found.honest == found.sealed  # both find the winner


def test_lucky_classifiers_flatter_the_search_and_not_what_is_scored_again():
    levels = lambda seed: 0.8 + 0.05 * np.random.default_rng([seed, 2]).normal(size=(8, 4, 1))  # noqa: E731
    found = mean_flattery(lambda s: np.random.default_rng(s).random((8, 4, 400)) < levels(s), np.zeros((8, 4)))
    assert found.printed - found.honest > 4 and abs(found["others, same images"] - found.honest) < 1


def test_the_ablation_reads_a_finished_run(finished):
    world, _ = finished
    said = CliRunner().invoke(ablate_protocol.main, [str(world / "smoke.yaml"), "--halves", "20"])
    assert said.exit_code == 0, said.output
    assert "250 test images to choose by" in said.output and "size of the set, 2 candidates" in said.output
