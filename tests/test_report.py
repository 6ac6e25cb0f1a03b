"""The report: the paper's lines untouched, ours next to them, the best marked, missing data sets named, noise told from change."""

import dataclasses
import re

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import record_of

from sdlab.data.images import Split
from sdlab.report import figures, paper, printing, reference, samples, tables
from sdlab.report.costs import format_gigabytes, load_plan, measured_costs
from sdlab.report.printing import print_table_1, print_table_2, save_table
from sdlab.report.reference import compare_with_reference, comparison_sentence
from sdlab.report.remarks import chosen_sentence, table_remarks
from sdlab.report.tables import FinishedExperiment, gains, table_1, table_2
from sdlab.runs.files import write_hashed_json, write_json
from sdlab.runs.stages import StageState

PARAMETERS = ("guidance_scale", "epoch", "num_inference_steps")


def scored(accuracies, n=500):
    a = np.array(accuracies)
    return dict(accuracy=a.tolist(), mean=a.mean(), std=a.std(ddof=1), standard_error=(a.mean() * (1 - a.mean()) / n) ** 0.5,
                top5=1.0, balanced=a.mean() - 0.01, recall=[0.5, None, 0.9], n=n)  # fmt: skip


def experiment(settings, dataset, shift=0.0):
    settings = dataclasses.replace(settings, dataset=dataset, experiment=f"{dataset}-x", scaling_max=3)
    metrics = settings.run_folder / "metrics"
    counts = {"test": [40, 60]}
    data = dict(
        name=dataset, base_model="tiny", majority_share_test=0.6, counts=counts, findings=["Two images of `a|b` twice."]
    )
    write_json(metrics / "data.json", data)
    for step, accuracy in enumerate((0.3, 0.5, 0.45, 0.8), start=1):
        point = dict(class_encoder_epoch=2, unet_epoch=0, num_inference_steps=50 // step, guidance_scale=1.5)
        write_json(metrics / f"after_{step}.json", dict(title=f"After {step}", config=point, images=4000, generation_seconds=100.0 / step,
                   seconds_per_image_step=0.001, val=scored([accuracy]* 3), test=scored([accuracy + shift, accuracy + shift + 0.02])))  # fmt: skip
    for name, accuracy in (("real", 0.9), ("round_trips", 0.87), ("x01", 0.8), ("x02", 0.85), ("x03", 0.82)):
        write_json(
            metrics / f"{name}.json",
            dict(title=name, images=100, val=scored([accuracy] * 2), test=scored([accuracy, accuracy])),
        )
    write_json(metrics / "scaling.json", dict(chosen="x2", protocol="sealed"))
    effects = {p: dict(mean=0.3, spread=0.1) for p in PARAMETERS}
    write_json(
        metrics / "importance.json", {search: dict(n=20, main_effects=effects) for search in ("search_1", "search_2")}
    )
    (settings.run_folder / "test_readings.jsonl").write_text("{}\n" * 5)
    return FinishedExperiment(settings)


@pytest.fixture
def experiments(settings):
    return [experiment(settings, "digits"), experiment(settings, "cifar10", 0.05)]


@pytest.fixture
def printed(experiments):
    """Both tables as text."""
    return print_table_1(table_1(experiments)), print_table_2(table_2(experiments))


def test_the_papers_lines_are_printed_as_they_are(printed):
    """Every number of both tables, whatever we ran."""
    first, second = (table.text for table in printed)
    numbers = lambda line, columns: [float(line[c].replace(",", "")) for c in columns]  # noqa: E731
    for dataset in paper.DATASETS:
        line = first.loc[dataset, "", "paper"]
        assert numbers(line, [f"After {k}" for k in (1, 2, 3, 4)]) == list(paper.TABLE_1_CAS[dataset].values())
        seconds = ("time 1 (s)", "time 2, 3 (s)", "time 4 (s)")
        assert numbers(line, seconds) == list(paper.TABLE_1_SECONDS[dataset].values())
        assert line["s per image and step"] == "0.15"  # of every data set: docs/method.md, item 5
        assert line["Real"] == f"{paper.TABLE_2[dataset]['real']:.2f}"
        line = second.loc[dataset, "", "paper"]
        assert numbers(line, ["Real", *(f"x{k}" for k in range(1, 11))]) == list(paper.TABLE_2[dataset].values())


def test_best_is_bold_and_best_synthetic_underlined(printed):
    first, second = (table.to_markdown() for table in printed)
    ours = next(line for line in second.splitlines() if "digits-x" in line)
    assert all(f" {cell} " in ours for cell in ("**90.00 ± 0.00**", "<u>85.00 ± 0.00</u>", "80.00 ± 0.00"))
    cifar = next(line for line in second.splitlines() if "CIFAR10 " in line and "paper" in line)
    assert " **<u>85.82</u>** " in cifar and " 83.26 " in cifar
    assert " **81.00 ± 1.41** " in next(line for line in first.splitlines() if "digits-x" in line)
    assert r"\textbf{85.82}" in printed[1].to_latex() and r"\underline{85.00 $\pm$ 0.00}" in printed[1].to_latex()


def test_what_was_not_run_is_one_footnote_and_what_was_has_its_difference(printed):
    second = printed[1]
    assert second.footnotes[1] == "Not run here: CIFAR100, PathMNIST, DermaMNIST, BloodMNIST, RetinaMNIST."
    assert len(second.text) == 6 + 2 + 1 and [key[0] for key in second.text.index][:4] == ["digits", *["cifar10"] * 3]
    difference = second.text.loc["cifar10", "cifar10-x", "difference"]
    assert difference["x1"] == f"{80 - 79.09:+.2f}" and difference["x10"] == ""


def test_every_line_names_its_protocol_and_base_model(printed):
    assert printed[0].text.query("source == 'ours'").who.tolist() == [
        "digits-x: tiny, sealed",
        "cifar10-x: tiny, sealed",
    ]


def test_the_terminal_shows_our_own_lines_in_its_width(printed):
    for table in printed:
        text = table.to_terminal()
        assert "digits-x: tiny, sealed" in text and "paper" not in text and "x10" not in text
        assert len({len(line) for line in text.splitlines()[1:]}) == 1 and len(text.splitlines()[1]) < 80


def test_the_tidy_numbers(experiments):
    first = table_1(experiments)
    row = first[(first.experiment == "cifar10-x") & (first.cell == "after_2")].iloc[0]
    assert row.cas == pytest.approx(56) and row.paper == 47.05 and row.difference == pytest.approx(56 - 47.05)
    assert row.seeds == 2 and row.majority == 60 and row.worst_class_recall == 50 and row.paper_seconds == 18600
    assert row.deviation == pytest.approx(100 * np.std([0.55, 0.57], ddof=1))


def test_the_ranges_of_the_text(experiments):
    expected = dict(after_2=[20.0, 20.0], after_4=[50.0, 50.0], time_saved_after_2_percent=50.0)
    assert gains(table_1(experiments)) == expected


def test_latex_and_markdown_hold_the_same_cells(printed):
    latex, markdown = printed[1].to_latex(), printed[1].to_markdown()
    cells = lambda line: re.findall(r"[+-]?[\d.]+", re.sub(r"CIFAR100?|[a-z]+\d+-x|\\pm", "", line))  # noqa: E731
    rows = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert list(map(cells, rows[1:])) == list(map(cells, markdown.splitlines()[2:]))
    assert r"\begin{tabular}{llrrrrrrrrrrrrrr}" in latex


def test_a_table_is_written_in_three_formats(experiments, printed, tmp_path):
    remarks = table_remarks(experiments, table_1(experiments))
    save_table(tmp_path / "report", "table_2", table_2(experiments), printed[1], remarks)
    files = sorted((tmp_path / "report").iterdir())
    assert [f.suffix for f in files] == [".csv", ".md", ".tex"] and all(f.stat().st_size > 500 for f in files)
    again = pd.read_csv(files[0])
    assert again[again.cell == "x2"].cas.tolist() == [85.0, 85.0]


def test_every_cut_and_every_finding_is_printed_under_the_tables(experiments):
    text = "\n".join(table_remarks(experiments, table_1(experiments)))
    for name, (value, default) in experiments[0].settings.deviations().items():
        assert f"{name} {value} ({default})" in text
    assert "most frequent class scores 60.0 %" in text and "5 readings of the test set on record" in text
    assert "real validation" in text and "digits-x: data: Two images of `a|b` twice." in text


def test_only_finished_experiments_are_collected(settings, monkeypatch):
    """A folder that is not finished, of another version, or empty, keeps nobody from their tables."""
    root = settings.run_folder.parent
    for name, text in (("good", yaml.safe_dump(settings.as_dict())), ("half", yaml.safe_dump(settings.as_dict())),
                       ("foreign", "an_old_setting: 1"), ("empty", ""), ("broken", "a: [1")):  # fmt: skip
        (root / name).mkdir(parents=True)
        (root / name / "settings.yaml").write_text(text)
    monkeypatch.setattr(tables, "stage_state", lambda s, n: StageState("done" if s.experiment == "good" else "begun"))
    assert [e.settings.experiment for e in tables.finished_experiments(settings)] == ["good"]


def test_tables_are_made_again_when_an_experiment_is_added_or_a_file_is_gone(experiments, settings, monkeypatch):
    folder, found = settings.report_folder, experiments[:1]
    monkeypatch.setattr(tables, "finished_experiments", lambda s: found)
    monkeypatch.setattr(printing, "experiment_digests", lambda found: {e.name: "its digest" for e in found})
    assert not printing.tables_are_current(settings)
    folder.mkdir(parents=True)
    for name in printing.FILES:
        (folder / name).touch()
    write_json(folder / "sources.json", printing.experiment_digests(found))
    assert printing.tables_are_current(settings)
    found = experiments
    assert not printing.tables_are_current(settings)
    write_json(folder / "sources.json", printing.experiment_digests(found))
    (folder / "table_2.tex").unlink()
    assert not printing.tables_are_current(settings)


def test_the_result_is_the_chosen_size_compared_with_real(experiments):
    """Best of the test scores is x2 here, and validation chose it."""
    said = chosen_sentence(experiments[0])
    assert "chosen on validation images: x2, CAS 85.00 ± 0.00 %; real images 90.00 ± 0.00 % (-5.00 points" in said
    paper_protocol = FinishedExperiment(dataclasses.replace(experiments[0].settings, protocol="paper"))
    assert "chosen on the test set" in chosen_sentence(paper_protocol)
    assert said in table_remarks(experiments, table_1(experiments))


def test_the_ceiling_of_the_vae_is_a_line_under_the_tables(experiments):
    """None for an experiment that was finished before it was measured."""
    (experiments[1].settings.run_folder / "metrics" / "round_trips.json").unlink()
    lines = [line for line in table_remarks(experiments, table_1(experiments)) if "round trip" in line]
    (line,) = lines
    assert (
        line.startswith("digits-x: ")
        and "scores 87.00 ± 0.00 %, -3.00 points to the real ones (standard error of the difference" in line
    )


def test_a_missing_record_of_test_readings_is_told_and_keeps_nobody_from_the_tables(experiments):
    (experiments[1].settings.run_folder / "test_readings.jsonl").unlink()
    lines = [line for line in table_remarks(experiments, table_1(experiments)) if "test set on record" in line]
    assert "(5 readings of the test set on record)" in lines[0]
    assert "(the file is missing: no readings of the test set on record)" in lines[1]


def test_other_importances_make_the_tables_again(experiments, monkeypatch):
    """Figure 1 is made from notebook 06, which does not depend on 05."""
    monkeypatch.setattr(printing, "read_record", lambda settings, number: number)
    monkeypatch.setattr(printing, "record_digest", lambda number: f"digest of {number}")
    assert printing.experiment_digests(experiments[:1]) == {"digits-x": ["digest of 05", "digest of 06"]}


def test_the_picture_of_figure_1_holds_our_bars_and_the_papers(experiments):
    figure = figures.plot_importances(tables.figure_1(experiments))
    assert [len(ax.patches) >= 6 for ax in figure.axes] == [True, True]


def test_figure_1_is_averaged_over_data_sets():
    """docs/method.md, item 9: the paper's means are UGS 0.58, epoch 0.37, IS 0.06, then UGS 0.69, IS 0.17, epoch 0.14."""
    ours = [dict(source="ours", who=who, search="search_1", parameter=p, importance=v)
            for who, shares in (("a", (0.5, 0.3, 0.2)), ("paper-like", (0.9, 0.1, 0.0)))
            for p, v in zip(PARAMETERS, shares, strict=True)]  # fmt: skip
    means = tables.figure_1_means(pd.concat([pd.DataFrame(ours), tables.figure_1([])]))
    first, second = (means.paper.loc[search].to_dict() for search in ("search_1", "search_2"))
    assert first == pytest.approx(dict(epoch=0.37, guidance_scale=0.58, num_inference_steps=0.06), abs=0.011)
    assert second == pytest.approx(dict(epoch=0.14, guidance_scale=0.69, num_inference_steps=0.17), abs=0.011)
    row = means.loc[("search_1", "guidance_scale")]
    assert (row.ours, row.difference, row["our experiments"]) == (0.7, 0.12, 2)


def test_the_legends_of_the_reports_figures_cover_nothing(experiments):
    own = [table[table.experiment == "digits-x"] for table in (table_1(experiments), table_2(experiments))]
    for figure in (figures.plot_stages(own[0], "title"), figures.plot_scaling(own[1], "title")):
        figure.canvas.draw()
        assert figure.legends[0].get_window_extent().y0 > figure.axes[0].get_window_extent().y1


def test_your_own_file_does_not_pass_for_one_of_the_papers_data_sets(settings):
    """An npz of noise called retinamnist.npz, given as a path."""
    own = experiment(dataclasses.replace(settings, dataset="x"), "retinamnist")
    assert own.dataset == "retinamnist" and table_1([own]).paper.notna().all()
    own = FinishedExperiment(dataclasses.replace(own.settings, dataset="somewhere/retinamnist.npz"))
    assert own.dataset == "retinamnist (own)"
    assert table_1([own]).paper.isna().all() and table_2([own]).paper.isna().all()


def test_every_cas_has_what_it_is_to_be_read_against(printed):
    """Majority class, standard errors of test and validation, and the real baseline: docs/method.md, items 6 and 7."""
    for table in printed:
        ours = table.text.query("source == 'ours'")
        assert len(ours) == 2 and (ours["majority"] == "60.0").all()
        assert (ours[["s.e. test", "s.e. val"]].astype(float) > 0).all(axis=None)
        assert ours.Real.str.partition(" ")[0].astype(float).between(88, 93).all()


def test_names_are_no_markup(experiments, printed, tmp_path):
    """Of data sets, base models and classes: in Markdown, LaTeX, on a terminal, and in figures."""
    name = "cats & dogs #1 | all {x} $y^* \\a <b>_`"
    text = printed[1].text.assign(**{"data set": name, "who": "a_b"})
    table = dataclasses.replace(printed[1], text=text)
    markdown, latex = table.to_markdown(), table.to_latex()
    assert r"| cats & dogs #1 \| all {x} \$y^\* \\a \<b>\_\` | a\_b" in markdown and "**<u>85.82</u>**" in markdown
    escaped = r"cats \& dogs \#1 | all \{x\} \$y\textasciicircum *"
    assert escaped in latex and r"\textbackslash a <b>\_` & a\_b & " in latex and r"\textbf{90.00" in latex
    assert name in table.to_terminal() and r"a\|b" in printing.paragraphs(
        table_remarks(experiments, table_1(experiments))
    )
    formula = r"$\nothing^$"  # matplotlib would stop at this one
    split = Split(np.zeros((2, 3, 8, 8), np.uint8), np.array([0, 1]))
    samples.show_image_rows({formula: split.images}).savefig(tmp_path / "rows.png")
    samples.show_nearest_neighbours(split, split, [formula, formula]).savefig(tmp_path / "nearest.png")
    figures.plot_stages(table_1(experiments[:1]), formula).savefig(tmp_path / "stages.png")


def test_paragraphs_have_lines_of_120_characters_and_all_their_words():
    sentences = ["It costs -0.45 points in words. " * 20, "x" * 130]
    written = printing.paragraphs(sentences)
    assert [len(line) > 120 for line in written.splitlines()].count(True) == 1  # a word is never broken
    assert [text.split() for text in written.split("\n\n")] == [text.split() for text in sentences]


def test_the_nearest_real_image_of_each_class_is_shown():
    """Not the closest of all, which may be of one class. A copy is found whatever its label."""
    real = Split(np.random.default_rng(0).integers(0, 256, (20, 3, 4, 4)).astype(np.uint8), np.arange(20) % 2)
    images = real.images[[3, 8, 5, 9]].copy()
    images[[0, 1, 3]] //= np.array([2, 3, 4], np.uint8)[:, None, None, None]
    figure = samples.show_nearest_neighbours(Split(images, np.array([0, 0, 1, 1])), real, ["a", "b"])
    generated, nearest = (np.split(ax.images[0].get_array().transpose(2, 0, 1), 2, axis=2) for ax in figure.axes)
    assert (generated[1] == images[2]).all() and (nearest[1] == images[2]).all()  # the copy
    assert (generated[0] == images[0]).all() or (generated[0] == images[1]).all()
    assert figure.axes[0].get_xticklabels()[1].get_text() == "b\n0.0"


# -------------------------------------------------------------------------------------------- the committed reports


@pytest.mark.parametrize(
    ("change", "said", "within"),
    [
        ({}, "All 8 cells equal the committed numbers .reports/reference/digits-x/", 8),
        (dict(x1=1.0), "8 of 8 cells differ by at most two standard errors. .* as a whole within noise", 8),
        (
            dict(x1=4.5),
            "7 of 8 cells .* [+]4.50 points [(]x1[)], 2.5 standard errors; .* below 2.7: as a whole within",
            7,
        ),
        (dict(x1=-9.0), "7 of 8 cells .* -9.00 points [(]x1[)], .* as a whole beyond noise", 7),
        (dict(protocol="paper", seeds=3), "Not compared .*, whose conditions differ: protocol, seeds[.]", 0),
        (None, "", None),
    ],
)
def test_a_run_is_compared_with_the_committed_one(experiments, tmp_path, monkeypatch, change, said, within):
    monkeypatch.setattr(reference, "REFERENCE", tmp_path / "reference")
    settings = experiments[0].settings
    for name, table in (("table_1", table_1(experiments)), ("table_2", table_2(experiments))):
        printing.save_text(settings.report_folder / f"{name}.csv", table.to_csv(index=False))
        for key, value in (change or {}).items():
            at = (table.cell == key, "cas") if key == "x1" else (table.cell != "", key)
            table.loc[at] = table.loc[at] - value if key == "x1" else value
        if change is not None:
            printing.save_text(tmp_path / "reference" / "digits-x" / f"{name}.csv", table.to_csv(index=False))
    cells = compare_with_reference(settings)
    assert re.search(said, comparison_sentence(cells, "digits-x"))
    assert within == (None if cells is None else cells.within.sum())


def test_the_committed_reports_own_run_is_compared_with_nothing(experiments, monkeypatch):
    monkeypatch.setattr(reference, "REFERENCE", experiments[0].settings.report_folder.parent)
    save_table(
        experiments[0].settings.report_folder, "table_1", table_1(experiments), print_table_1(table_1(experiments)), []
    )
    assert compare_with_reference(experiments[0].settings) is None


def test_a_run_that_saved_no_plan_says_so_and_older_records_are_no_obstacle(settings):
    assert load_plan(settings) is None
    write_hashed_json(settings.run_folder / "records/00.json", record_of(seconds=9.0, settings=settings.of_stage("00")))
    took = measured_costs(settings)["00"]
    assert took["hours"] == 0.0025
    assert format_gigabytes(took["disk_gb"]) == format_gigabytes(took["memory_gb"]) == "unknown"
