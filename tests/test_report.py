"""The tables: the paper's lines untouched, ours beside them, the best marked, what was not run said so."""

import dataclasses
import re

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import record_of

from sdlab.report import figures, paper
from sdlab.report import tables as results
from sdlab.report.tables import (
    LATEX,
    MARKDOWN,
    PLAIN,
    Experiment,
    our_gains,
    save_table,
    table_1,
    table_1_text,
    table_2,
    table_2_text,
    to_latex,
    to_markdown,
)
from sdlab.runs.files import write_hashed_json, write_json
from sdlab.runs.records import StageState
from sdlab.tools.cli import plain_table


def scored(accuracies, n=500):
    a = np.array(accuracies)
    return dict(accuracy=a.tolist(), mean=a.mean(), std=a.std(ddof=1), standard_error=(a.mean() * (1 - a.mean()) / n) ** 0.5,
                top5=1.0, balanced=a.mean() - 0.01, recall=[0.5, None, 0.9], n=n)  # fmt: skip


def experiment(settings, dataset, shift=0.0):
    settings = dataclasses.replace(settings, dataset=dataset, experiment=f"{dataset}-x", scaling_max=3)
    metrics = settings.run_folder / "metrics"
    counts = {"test": [40, 60]}
    write_json(metrics / "data.json", dict(name=dataset, base_model="tiny", majority_share_test=0.6, counts=counts))
    for step, accuracy in enumerate((0.3, 0.5, 0.45, 0.8), start=1):
        point = dict(class_encoder_epoch=2, unet_epoch=0, num_inference_steps=50 // step, guidance_scale=1.5)
        write_json(metrics / f"after_{step}.json", dict(title=f"After {step}", point=point, images=4000, generation_seconds=100.0 / step,
                   seconds_per_image_step=0.001, val=scored([accuracy]* 3), test=scored([accuracy + shift, accuracy + shift + 0.02])))  # fmt: skip
    for name, accuracy in (("real", 0.9), ("x01", 0.8), ("x02", 0.85), ("x03", 0.82)):
        write_json(
            metrics / f"{name}.json",
            dict(title=name, images=100, val=scored([accuracy] * 2), test=scored([accuracy, accuracy])),
        )
    write_json(metrics / "scaling.json", dict(chosen="x2", protocol="sealed"))
    effects = {p: dict(mean=0.3, spread=0.1) for p in results.PARAMETERS}
    write_json(
        metrics / "importance.json", {search: dict(n=20, main_effects=effects) for search in ("search_1", "search_2")}
    )
    (settings.run_folder / "test_readings.jsonl").write_text("{}\n" * 5)
    return Experiment(settings)


@pytest.fixture
def experiments(settings):
    return [experiment(settings, "digits"), experiment(settings, "cifar10", 0.05)]


def test_the_papers_lines_are_printed_as_they_are(experiments):
    """Every number of both tables, whatever we ran."""
    first, second = table_1_text(table_1(experiments), MARKDOWN), table_2_text(table_2(experiments), MARKDOWN)
    plain = lambda text: float(re.sub(r"[*]|</?u>|,", "", text))  # noqa: E731
    for dataset, title in paper.DATASET_TITLES.items():
        line = first[(first["data set"] == title) & (first.who == "paper")].iloc[0]
        assert [plain(line[f"After {k}"]) for k in (1, 2, 3, 4)] == list(paper.TABLE_1_CAS[dataset].values())
        seconds = paper.TABLE_1_SECONDS[dataset]
        assert [plain(line[c]) for c in ("time 1 (s)", "time 2, 3 (s)", "time 4 (s)")] == list(seconds.values())
        assert line["s per image and step"] == "0.15"  # of every data set: METHOD, item 5
        line = second[(second["data set"] == title) & (second.who == "paper")].iloc[0]
        assert [plain(line[c]) for c in ("Real", *(f"x{k}" for k in range(1, 11)))] == list(
            paper.TABLE_2[dataset].values()
        )


def test_best_is_bold_and_best_synthetic_underlined(experiments):
    second = table_2_text(table_2(experiments), MARKDOWN)
    ours = second[second.who.str.startswith("digits-x")].iloc[0]
    assert ours["Real"] == "**90.00 ± 0.00**" and ours["x2"] == "<u>85.00 ± 0.00</u>" and ours["x1"] == "80.00 ± 0.00"
    cifar = second[(second["data set"] == "CIFAR10") & (second.who == "paper")].iloc[0]
    assert cifar["x7"] == "**<u>85.82</u>**" and cifar["Real"] == "83.26"
    first = table_1_text(table_1(experiments), MARKDOWN)
    assert first[first.who.str.startswith("digits-x")].iloc[0]["After 4"] == "**81.00 ± 1.41**"


def test_what_was_not_run_says_so_and_what_was_has_its_difference(experiments):
    second = table_2_text(table_2(experiments), MARKDOWN)
    not_run = second[second.who == "ours: not run"]
    assert set(not_run["data set"]) == {"CIFAR100", "PathMNIST", "DermaMNIST", "BloodMNIST", "RetinaMNIST"}
    assert not not_run[["Real", "x1", "x10"]].to_numpy().any()
    difference = second[second.who == "difference"].iloc[0]
    assert difference["x1"] == f"{80 - 79.09:+.2f}" and difference["x10"] == ""


def test_without_any_experiment_only_the_paper_stands():
    assert set(table_2_text(pd.DataFrame(), MARKDOWN).who) == {"paper", "ours: not run"}


def test_every_line_names_its_protocol_and_base_model(experiments):
    assert all(
        "tiny, sealed" in who
        for who in table_1_text(table_1(experiments), MARKDOWN).who
        if who.split(":")[0].endswith("-x")
    )


def test_the_tidy_numbers(experiments):
    first = table_1(experiments)
    row = first[(first.experiment == "cifar10-x") & (first.cell == "after_2")].iloc[0]
    assert row.cas == pytest.approx(56) and row.paper == 47.05 and row.difference == pytest.approx(56 - 47.05)
    assert row.seeds == 2 and row.majority == 60 and row.worst_class_recall == 50 and row.paper_seconds == 18600
    assert row.deviation == pytest.approx(100 * np.std([0.55, 0.57], ddof=1))


def test_the_ranges_of_the_text(experiments):
    found = our_gains(table_1(experiments))
    assert (
        found["after_2"] == (20.0, 20.0)
        and found["after_4"] == (50.0, 50.0)
        and found["time_saved_after_2_percent"] == 50.0
    )


def test_latex_and_markdown_hold_the_same_cells(experiments):
    table = table_2(experiments)
    latex, markdown = to_latex(table_2_text(table, LATEX)), to_markdown(table_2_text(table, MARKDOWN))
    assert latex.count(r"\\") == markdown.count("\n")  # the header counts, the rule does not
    assert r"\textbf{\underline{85.82}}" in latex and r"\begin{tabular}{llrrrrrrrrrrrrrr}" in latex


def test_a_table_is_written_in_four_formats(experiments, tmp_path):
    files = save_table(tmp_path, "table_2", "Table 2", table_2(experiments), table_2_text, results.notes(experiments))
    assert sorted(f.suffix for f in files) == [".csv", ".md", ".png", ".tex"] and all(
        f.stat().st_size > 500 for f in files
    )
    again = pd.read_csv(tmp_path / "table_2.csv")
    assert again[again.cell == "x2"].cas.tolist() == [85.0, 85.0]


def test_every_cut_is_printed_under_the_tables(experiments):
    text = "\n".join(results.notes(experiments))
    for name, (value, default) in experiments[0].settings.deviations().items():
        assert f"`{name}` {value} ({default})" in text
    assert "always answering the commonest class scores 60.0 %" in text and "5 readings on record" in text
    assert "real validation" in text


def test_only_finished_experiments_are_collected(settings, monkeypatch):
    """A folder that is not finished, of another version, or empty, keeps nobody from their tables."""
    root = settings.run_folder.parent
    for name, text in (("good", yaml.safe_dump(settings.as_dict())), ("half", yaml.safe_dump(settings.as_dict())),
                       ("foreign", "an_old_setting: 1"), ("empty", ""), ("broken", "a: [1")):  # fmt: skip
        (root / name).mkdir(parents=True)
        (root / name / "settings.yaml").write_text(text)
    monkeypatch.setattr(results, "stage_state", lambda s, n: StageState("done" if s.experiment == "good" else "begun"))
    assert [e.settings.experiment for e in results.finished_experiments(settings)] == ["good"]


def test_tables_are_made_again_when_an_experiment_is_added_or_a_file_is_gone(experiments, settings, monkeypatch):
    folder, found = settings.report_folder, experiments[:1]
    monkeypatch.setattr(results, "finished_experiments", lambda s: found)
    monkeypatch.setattr(Experiment, "digest", property(lambda e: "digest of " + e.settings.experiment))
    assert not results.tables_are_current(settings)
    for name, make, text in (("table_1", table_1, table_1_text), ("table_2", table_2, table_2_text)):
        save_table(folder, name, name, make(found), text, [])
    for name in ("figure_1.csv", "figure_1.png", "figure_steps.png", "figure_scaling.png"):
        (folder / name).touch()
    write_json(folder / "sources.json", results.experiment_digests(found))
    assert results.tables_are_current(settings)
    found = experiments
    assert not results.tables_are_current(settings)
    write_json(folder / "sources.json", results.experiment_digests(found))
    (folder / "table_2.tex").unlink()
    assert not results.tables_are_current(settings)


def test_the_result_is_the_chosen_size_beside_real(experiments):
    """Best of the test scores is x2 here, and chosen is what validation chose."""
    said = results.chosen_sentence(experiments[0])
    assert (
        "digits-x: chosen on validation images: x2, CAS 85.00 ± 0.00 % beside 90.00 ± 0.00 % for real images (-5.00 points"
        in said
    )
    paper_protocol = Experiment(dataclasses.replace(experiments[0].settings, protocol="paper"))
    assert "chosen on the test set" in results.chosen_sentence(paper_protocol)
    assert said in results.notes(experiments)


def test_the_picture_of_figure_1_holds_our_bars_and_the_papers():
    rows = [
        dict(who=who, search=s, parameter=p, importance=0.3, spread=0.0, n=5)
        for who in ("digits", "paper: cifar10")
        for s in ("search_1", "search_2")
        for p in results.PARAMETERS
    ]
    figure = results.draw_importances(pd.DataFrame(rows))
    assert [len(ax.patches) >= 6 for ax in figure.axes] == [True, True]


def test_figure_1_is_averaged_over_data_sets():
    """METHOD, item 9: the paper's means are UGS 0.58, epoch 0.37, IS 0.06, then UGS 0.69, IS 0.17, epoch 0.14."""
    ours = [dict(who=who, search="search_1", parameter=p, importance=v) for who, shares in (("a", (0.5, 0.3, 0.2)), ("b", (0.9, 0.1, 0.0)))
            for p, v in zip(("guidance_scale", "epoch", "num_inference_steps"), shares, strict=True)]  # fmt: skip
    means = results.figure_1_means(pd.concat([pd.DataFrame(ours), results.figure_1([])]))
    paper_means = means.paper.unstack()
    first, second = (paper_means.loc[search].to_dict() for search in ("search_1", "search_2"))
    assert first == pytest.approx(dict(epoch=0.37, guidance_scale=0.58, num_inference_steps=0.06), abs=0.011)
    assert second == pytest.approx(dict(epoch=0.14, guidance_scale=0.69, num_inference_steps=0.17), abs=0.011)
    row = means.loc[("search_1", "guidance_scale")]
    assert (row.ours, row.difference, row["ours, data sets"]) == (0.7, 0.12, 2)


def test_your_own_file_does_not_pass_for_one_of_the_papers_data_sets(settings):
    """An npz of noise called retinamnist.npz, given as a path."""
    own = experiment(dataclasses.replace(settings, dataset="x"), "retinamnist")
    assert own.dataset == "retinamnist" and table_1([own]).paper.notna().all()
    own = Experiment(dataclasses.replace(own.settings, dataset="somewhere/retinamnist.npz"))
    assert (
        own.dataset == "retinamnist (own)" and table_1([own]).paper.isna().all() and table_2([own]).paper.isna().all()
    )


def test_every_cas_stands_beside_what_it_has_to_be_read_against(experiments):
    """Majority class, standard errors of test and validation, and the real baseline: METHOD, items 6 and 7."""
    for text in (table_1_text(table_1(experiments), PLAIN), table_2_text(table_2(experiments), PLAIN)):
        ours = text[text.who.str.contains(": tiny")]
        assert len(ours) and (ours["majority"] == "60.0").all()
        assert (ours[["s.e. test", "s.e. val"]].astype(float) > 0).all().all()
    first = table_1_text(table_1(experiments), PLAIN)
    assert (first[first.who == "paper"].Real == [f"{row['real']:.2f}" for row in paper.TABLE_2.values()]).all()
    assert first[first.who.str.contains(": tiny")].Real.astype(float).between(88, 93).all()
    assert (first[first.who == "ours: not run"][["Real", "majority", "s.e. test"]] == "").all().all()


def test_names_cannot_break_a_table():
    name = "cats & dogs #1 | all {x} $y^* \\a"
    text = pd.DataFrame([{"data set": name, "who": "a_b", "Real": r"\textbf{97.0}"}])
    markdown = results.to_markdown(text)
    assert r"| cats & dogs #1 \| all {x} $y^\* \\a | a\_b | \textbf{97.0} |" in markdown
    assert name in plain_table(markdown) and "a_b" in plain_table(markdown)
    latex = r"cats \& dogs \#1 | all \{x\} \$y\textasciicircum{}* \textbackslash{}a & a\_b & \textbf{97.0} \\"
    assert latex in results.to_latex(text)


def test_names_are_no_formulas(tmp_path):
    """matplotlib would stop at this one."""
    name = r"$\nothing^$"
    results.draw_table(
        pd.DataFrame([{"data set": name, "who": name, "Real": "97.0*"}]), "title", tmp_path / "table.png"
    )
    figure = figures.show_image_rows({name: np.zeros((2, 3, 8, 8), np.uint8)})
    figure.savefig(tmp_path / "rows.png")
    assert (tmp_path / "table.png").stat().st_size and (tmp_path / "rows.png").stat().st_size


def test_a_run_that_kept_no_plan_says_so_and_older_records_are_no_obstacle(settings):
    assert results.kept_plan(settings) is None
    write_hashed_json(settings.run_folder / "records/00.json", record_of(seconds=9.0, settings=settings.of_stage("00")))
    took = results.actual(settings)["00"]
    assert took["hours"] == 0.0025 and results.size(took["disk_gb"]) == results.size(took["memory_gb"]) == "unknown"
