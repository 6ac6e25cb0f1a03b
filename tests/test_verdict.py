"""The verdict: intervals that hold what they say, controls with known answers, and the sentences about them."""

import dataclasses
import json
import math
import shutil
import sys
from types import SimpleNamespace

import medmnist
import numpy as np
import pytest
import torch
from conftest import BIN, command
from safetensors.numpy import load_file
from scipy import stats

from sdlab import classifier
from sdlab.class_encoder import ClassTable
from sdlab.data.images import Split
from sdlab.errors import BadInput
from sdlab.evaluation import logits_path, save_arrays
from sdlab.metrics import confusion, further_scores, score_predictions
from sdlab.paths import PROJECT_ROOT
from sdlab.report import paper
from sdlab.report import verdict as report
from sdlab.runs.files import read_json, write_json
from sdlab.runs.records import read_record, record_digest
from sdlab.runs.run import Run
from sdlab.runs.stages import STAGES, State, stage_state
from sdlab.runs.verify import verify
from sdlab.sampling_config import SamplingConfig
from sdlab.verdict import collapse, controls
from sdlab.verdict.collapse import judge_images
from sdlab.verdict.intervals import paired_difference
from sdlab.verdict.judge import Judge, load_judge, make_judge

sys.path.insert(0, str(PROJECT_ROOT / "scripts"))
import simulate_intervals as study

LEARNS = dict(
    classifier_train_steps=60, classifier_epochs=6, classifier_learning_rate=1e-2, classifier_seeds=3, scaling_max=2
)


@pytest.fixture(autouse=True)
def no_bars(monkeypatch):
    monkeypatch.setenv("SDLAB_PROGRESS_FILE_ONLY", "1")


# ------------------------------------------------------------------------------------------------------ intervals


@pytest.mark.parametrize("seeds", [4, 8])
@pytest.mark.parametrize("accuracies", [(0.98, 0.965), (0.55, 0.50)])
@pytest.mark.parametrize("luck", [0.03, 0.25])
def test_the_interval_holds_the_truth_as_often_as_it_says(seeds, accuracies, luck):
    """A small copy of the study; its committed table has 2,000 draws a line."""
    covered, width = study.simulate(200, seeds, 400, accuracies, luck)["seeds and images"]
    assert 0.9 <= covered <= 0.99 and width > 0


def test_the_committed_study_keeps_the_bar():
    lines = study.TARGET.read_text().splitlines()
    assert lines[2].startswith("2,000 draws")
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert table[0][:5] == ["seeds", "test images", "task", "classifiers", "seeds and images"]
    of_ours = {tuple(row[:4]): float(row[4].split(" %")[0]) for row in table[2:]}
    asked = [share for (seeds, *_), share in of_ours.items() if int(seeds) >= 4]
    assert len(asked) == 24 and all(93 <= share <= 98 for share in asked)
    assert min(of_ours.values()) == min(share for (seeds, *_), share in of_ours.items() if seeds == "2") > 87


def test_a_difference_is_symmetric_and_narrows_with_its_level():
    rng = np.random.default_rng(0)
    first, second = rng.random((2, 4, 300)) < np.array([0.8, 0.85])[:, None, None]
    there, back = paired_difference(second, first), paired_difference(first, second)
    assert (there.mean, there.low, there.high) == (-back.mean, -back.high, -back.low)
    assert there.mean == pytest.approx(second.mean() - first.mean()) and (there.seeds, there.images) == (4, 300)
    narrow = paired_difference(second, first, level=0.5)
    assert there.low < narrow.low < there.mean < narrow.high < there.high
    assert there.population == "over new test images and new classifier seeds"


def test_one_seed_is_students_interval_over_images():
    rng = np.random.default_rng(0)
    first, second = rng.random((2, 1, 200)) < 0.7
    found, answers = paired_difference(second, first), (second.astype(float) - first)[0]
    low, high = stats.ttest_1samp(answers, 0).confidence_interval()
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high)) and "one classifier" in found.population


def test_seeds_that_differ_widen_it_as_students_interval_over_seeds():
    """If all images of a seed agree, the images tell nothing more than the seeds."""
    second = np.repeat([[True], [False], [True], [True]], 500, axis=1)
    found = paired_difference(second, np.zeros_like(second))
    low, high = stats.ttest_1samp(second[:, 0].astype(float), 0).confidence_interval()
    assert found.low == pytest.approx(low) and found.high == pytest.approx(min(high, 1))


def test_sets_that_hardly_an_image_tells_apart_still_have_an_interval():
    """None of 20 images: a share of 17 % of them could differ and be missed. One, or all: not less."""
    same, one, other = np.ones((4, 20), bool), np.ones((4, 20), bool), np.zeros((4, 20), bool)
    one[0, 0] = False
    bound = 1 - 0.025 ** (1 / 20)
    found = paired_difference(same, same)
    assert found.mean == 0 and found.high == -found.low == pytest.approx(bound)
    assert paired_difference(same, one).high >= bound and paired_difference(same, other).low == pytest.approx(1 - bound)
    assert (paired_difference(same[:, :1], other[:, :1]).low, paired_difference(same[:, :1], same[:, :1]).high) == (
        -1,
        1,
    )


# -------------------------------------------------------------------------------------------------------- metrics


def shares(logits):
    return torch.softmax(torch.tensor(logits), 1).numpy()


@pytest.mark.parametrize("classes", [2, 5])
def test_the_area_under_the_curve_is_medmnists(classes):
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, 200)
    logits = rng.normal(size=(200, classes)) + 1.5 * np.eye(classes)[labels]
    task = "binary-class" if classes == 2 else "multi-class"
    expected = medmnist.evaluator.getAUC(labels[:, None], shares(logits), task)
    assert further_scores(logits, labels)["auc"] == pytest.approx(expected)


def test_what_accuracy_hides():
    labels = np.array([0] * 90 + [1] * 5 + [2] * 5)
    lost = np.tile([3.0, 0.0, 0.0], (100, 1))
    found = further_scores(lost, labels, ordered=True)
    assert score_predictions(lost, labels).accuracy == 0.9 and found["macro_f1"] < 0.33
    assert found["auc"] == 0.5 and found["quadratic_kappa"] == 0
    right = further_scores(10 * np.eye(3)[labels], labels, ordered=True)
    assert (right["macro_f1"], right["auc"], right["quadratic_kappa"]) == (1, 1, 1)
    assert "quadratic_kappa" not in further_scores(lost, labels)
    two = further_scores(10 * np.eye(4)[labels], labels)  # a class that the labels lack
    assert two["auc"] == 1 and two["macro_f1"] == 1
    one, diverged = (
        further_scores(np.eye(3)[[0, 0]], np.array([0, 0])),
        further_scores(np.full((3, 2), np.nan), np.arange(3) % 2),
    )
    assert one["auc"] is None and diverged["auc"] is None


def test_confusion_has_a_row_a_class():
    labels = np.array([0, 0, 1])
    logits = np.stack([np.eye(3)[[0, 1, 1]], np.eye(3)[[0, 0, 2]]])
    assert np.array_equal(confusion(logits, labels)[:2], [[0.75, 0.25, 0], [0, 0.5, 0.5]])
    assert np.isnan(confusion(logits, labels)[2]).all()


# --------------------------------------------------------------------------------------------------- augmentation


def windows(image, reach):
    """Every shift of one image (3, h, w), by brute force."""
    side = image.shape[-1]
    padded = np.pad(image, ((0, 0), (reach, reach), (reach, reach)), mode="edge")
    return {
        (y - reach, x - reach): padded[:, y : y + side, x : x + side]
        for y in range(2 * reach + 1)
        for x in range(2 * reach + 1)
    }


@pytest.mark.parametrize("how", ["shifts", "flips_and_shifts"])
def test_shifts_and_flips_are_those_of_each_image(how):
    images = np.random.default_rng(0).integers(0, 256, (300, 3, 16, 16), np.uint8)
    made = classifier.augmented(torch.from_numpy(images), how, torch.Generator().manual_seed(0)).numpy()
    assert made.dtype == np.uint8 and made.shape == images.shape
    seen = set()
    for image, other in zip(images, made, strict=True):
        ways = {(flipped, *shift): window for flipped in (False, True)
                for shift, window in windows(image[:, :, ::-1] if flipped else image, 2).items()}  # fmt: skip
        (way,) = [way for way, window in ways.items() if np.array_equal(window, other)]
        seen.add(way)
    flips = {flipped for flipped, *_ in seen}
    assert len({shift for _, *shift in map(list, seen) for shift in [tuple(shift)]}) == 25
    assert flips == ({False} if how == "shifts" else {False, True})


def test_none_changes_nothing_and_batches_do_not_depend_on_it(data, monkeypatch):
    images = torch.from_numpy(data.train.images)
    assert classifier.augmented(images, "none", torch.Generator()) is images
    seen = {}
    monkeypatch.setattr(
        classifier,
        "training_step",
        lambda model, optimizer, images, labels, smoothing: seen[how].append(labels) or torch.zeros(()),
    )
    recipe = classifier.ClassifierRecipe(4, 2, 6, 16, 1e-3, 0.1, 5, 5)
    for how in ("none", "shifts"):
        seen[how] = []
        changed = dataclasses.replace(recipe, augmentation=how)
        classifier.train_classifier(data.train, data.val, 3, changed, 7)
    assert all(torch.equal(*pair) for pair in zip(*seen.values(), strict=True)) and len(seen["none"]) == 6


# ------------------------------------------------------------------------------------------------------- controls


def opened(settings, data, base, chosen="x2", **changes) -> Run:
    """Notebook 08's run, after stages that only say which size was chosen."""
    settings = dataclasses.replace(settings, **LEARNS | changes)
    for number in ("00", "01", "02", "03", "04", "05"):
        run = Run(settings, STAGES[number].stem, data, base)
        name = {"05": "scaling"}.get(number, f"of_{number}")
        run.save_metrics(name, dict(chosen=chosen))
        run.finish(run.metrics_path(name))
    return Run(settings, "08_verdict", data, base)


@pytest.fixture
def pool(monkeypatch):
    """Stands for the synthetic pool: `pool(split)` sets what it holds."""

    def of(split):
        monkeypatch.setattr(controls, "load_optimum", lambda *_: None)
        monkeypatch.setattr(
            controls,
            "generate_pool",
            lambda *_: SimpleNamespace(split=lambda n: Split(split.images[:n], split.labels[:n])),
        )

    return of


def doubled(split, labels=None):
    labels = split.labels if labels is None else labels
    return Split(np.concatenate([split.images] * 2), np.concatenate([labels] * 2))


def test_a_copy_of_the_real_images_is_level_with_them_and_shuffled_labels_are_chance(settings, data, base, pool):
    pool(doubled(data.train))
    found = controls.score_controls(opened(settings, data, base, augmentation="shifts"))
    ends = {(d["second"], d["first"]): d for d in found["differences"]}
    copy = ends["synthetic", "real"]
    assert found["arms"]["real"]["mean"] > 0.9 and -0.2 < copy["low"] <= 0 <= copy["high"] < 0.2
    assert [*found["arms"]] == ["real", "augmented", "round_trips", "synthetic", "both"]
    assert [found["arms"][name]["images"] for name in found["arms"]] == [48, 48, 48, 96, 144]
    assert {("synthetic", "augmented"), ("both", "augmented"), ("both", "real")} <= ends.keys()

    rng = np.random.default_rng(0)
    pool(doubled(data.train, rng.permutation(data.train.labels)))
    other = opened(settings, data, base, experiment="shuffled", augmentation="none")
    found = controls.score_controls(other)
    shuffled = {d["second"]: d for d in found["differences"] if d["first"] == "real"}["synthetic"]
    assert shuffled["high"] < -0.2 and found["arms"]["synthetic"]["mean"] < 0.7 and "augmented" not in found["arms"]


def test_where_epochs_are_counted_real_images_are_trained_as_long_as_the_chosen_set(settings, data, base, pool):
    pool(doubled(data.train))
    changes = dict(classifier_train_steps=0, classifier_batch_size=16, classifier_seeds=2)
    arms = controls.make_arms(opened(settings, data, base, **changes))
    steps = {name: controls.training_steps(arm.recipe, arm.images) for name, arm in arms.items()}
    epochs = LEARNS["classifier_epochs"]
    assert steps.pop("real") == epochs * 3 and set(steps.values()) == {epochs * 6}
    assert (
        "longer" in steps and arms["round_trips"].cell == "" and arms["longer"].title == "real, trained as long as x2"
    )


def with_logits(settings, data, base, names, **changes) -> Run:
    """Notebook 08's run after a 05 that has left these cells' answers: each of its own, known accuracy."""
    settings = dataclasses.replace(settings, **LEARNS | changes)
    rng, seeds = np.random.default_rng(0), settings.classifier_seeds
    for number in ("00", "01", "02", "03", "04", "05"):
        run = Run(settings, STAGES[number].stem, data, base)
        name = {"05": "scaling"}.get(number, f"of_{number}")
        run.save_metrics(name, dict(chosen="x2"))
        for cell in names if number == "05" else ():
            right = rng.random((seeds, len(data.test))) < names[cell]
            answers = np.where(right, data.test.labels, (data.test.labels + 1) % 3)
            save_arrays(logits_path(run, cell), logits=np.eye(3, dtype=np.float32)[answers], labels=data.test.labels)
        run.finish(run.metrics_path(name))
    return Run(settings, "08_verdict", data, base)


CELLS = {"real": 0.9, "round_trips": 0.8, "x02": 0.6}


def test_cells_of_table_2_are_not_trained_again(settings, data, base, pool, monkeypatch):
    pool(doubled(data.train))
    run = with_logits(settings, data, base, CELLS, augmentation="none")
    trained, train = [], classifier.train_classifier
    monkeypatch.setattr("sdlab.evaluation.train_classifier", lambda t, *more: trained.append(len(t)) or train(t, *more))
    found = controls.score_controls(run)
    assert trained == [144] * 3  # real + x2 alone
    for name, cell in (("real", "real"), ("round_trips", "round_trips"), ("synthetic", "x02")):
        kept = load_file(logits_path(run, cell))["logits"]
        expected = [score_predictions(of_seed, data.test.labels).accuracy for of_seed in kept]
        assert found["arms"][name]["accuracy"] == expected and abs(np.mean(expected) - CELLS[cell]) < 0.2
    readings = [json.loads(line)["purpose"] for line in (run.folder / "test_readings.jsonl").read_text().splitlines()]
    assert readings == ["verdict, real + x2: 3 classifiers"]


def test_answers_that_were_altered_are_refused(settings, data, base, pool):
    pool(doubled(data.train))
    run = with_logits(settings, data, base, CELLS, augmentation="none")
    path = logits_path(run, "real")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"real\.safetensors is damaged"):
        controls.score_controls(run)
    (finding,) = verify(run.settings)[0]
    assert finding.path == "logits/real.safetensors" and "train their own" in finding.repair.sentence("x")


def test_lost_answers_leave_05_finished_and_are_trained_again(settings, data, base, pool):
    pool(doubled(data.train))
    run = with_logits(settings, data, base, CELLS, augmentation="none")
    digest = record_digest(read_record(run.settings, "05"))
    shutil.rmtree(run.folder / "logits")
    assert stage_state(run.settings, "05").state == State.DONE
    found = controls.score_controls(run)
    assert found["arms"]["real"]["mean"] > 0.9 and record_digest(read_record(run.settings, "05")) == digest


def test_a_verdict_that_was_cut_continues(settings, data, base, pool, monkeypatch):
    pool(doubled(data.train))
    run = opened(settings, data, base, augmentation="none", classifier_seeds=2)
    trained, train = [], classifier.train_classifier

    def fifth_is_cut(split, *given):
        trained.append(len(split))
        if len(trained) == 5:
            raise KeyboardInterrupt
        return train(split, *given)

    monkeypatch.setattr("sdlab.evaluation.train_classifier", fifth_is_cut)
    with pytest.raises(KeyboardInterrupt):
        controls.score_controls(run)
    found = controls.score_controls(run)
    assert len(trained) == 9 or len(trained) == 10  # eight, the one that was cut, and perhaps its neighbour
    run.finish(run.metrics_path("verdict"))
    monkeypatch.setattr(controls, "make_arms", None)  # a finished stage shows what it has
    again = Run(run.settings, "08_verdict", data, base)
    assert again.finished and controls.score_controls(again) == found


def test_x1_where_epochs_are_counted_needs_no_longer_control(settings, data, base, pool):
    pool(data.train)
    changes = dict(classifier_train_steps=0, classifier_batch_size=16, classifier_seeds=2, chosen="x1")
    arms = controls.make_arms(opened(settings, data, base, **changes))
    assert "longer" not in arms and arms["round_trips"].cell == "round_trips"


# ------------------------------------------------------------------------------------------------------ sentences


def verdict_of(**ends):
    arm = dict(
        images=48, training_steps=60, mean=0.9, std=0.01, balanced=0.9, macro_f1=0.9, auc=0.95, recall=[0.8, None]
    )
    names = {"real": "real", "synthetic": "x4", "both": "real + x4"}
    one = dict(standard_error=0.01, seeds=4, images=1234, level=0.95)
    differences = [
        dict(first=f, second=s, mean=m, low=lo, high=hi) | one for (s, f), (m, lo, hi) in ends["pairs"].items()
    ]
    arms = {n: arm | dict(title=t) for n, t in names.items()}
    return dict(arms=arms, differences=differences, majority=0.3, protocol="sealed")


def test_one_plain_sentence_a_comparison():
    pairs = {("both", "real"): (0.0001, -0.0004, 0.004), ("synthetic", "real"): (-0.012, -0.02, -0.004)}
    said = report.verdict_sentences(verdict_of(pairs=pairs))
    assert said[0] == "x4 is 1.2 points below real (95 % CI -2.0 to -0.4)."
    assert said[1] == "real + x4 is level with real (95 % CI -0.04 to +0.4; the difference may be chance)."
    flattered = report.verdict_sentences(verdict_of(pairs=pairs) | dict(protocol="paper"))
    assert len(said) == 3 and "too good" in flattered[3]
    assert "1,234 real test images; 4 classifiers" in said[2] and "30.0 %" in said[2] and "too few" not in said[2]


def test_the_table_has_a_row_an_arm():
    pairs = {("both", "real"): (0.01, -0.004, 0.024), ("synthetic", "real"): (-0.012, -0.02, -0.004)}
    table = report.verdict_table(verdict_of(pairs=pairs))
    assert table.loc["x4", ["to real", "from", "to"]].round(6).tolist() == [-1.2, -2.0, -0.4]
    text = report.as_text(table)
    assert (
        text.loc["real", "to real"] == "" and text.loc["real", "accuracy"] == "90.0" and text.loc["x4", "to"] == "-0.4"
    )


def test_decisions_say_which_real_images_they_saw(settings):
    sealed = report.decisions_table(settings)["saw real images of"]
    paper = report.decisions_table(dataclasses.replace(settings, protocol="paper"))["saw real images of"]
    assert (sealed == "test").sum() == 1 and (paper == "test").sum() == 3


# ------------------------------------------------------------------------------------------------------- commands


def test_the_command_prints_a_finished_runs_verdict(finished):
    world, done = finished
    said = command(BIN / "sdlab", "verdict", world / "smoke.yaml")
    found = read_json(world / "runs/smoke/metrics/verdict.json")
    assert said.returncode == 0 and report.verdict_sentences(found)[0] in said.stdout
    assert report.verdict_sentences(found)[0] in done.stdout
    for name in ("verdict.csv", "verdict.md", "figure_verdict.png"):
        assert (world / "reports/smoke" / name).stat().st_size


def test_a_verdict_before_its_set_says_what_to_run(world, tmp_path):
    said = command(BIN / "sdlab", "verdict", world / "smoke.yaml", "-p", "runs_root", tmp_path)
    assert (
        said.returncode == 1 and "08_verdict reads what 05_scaling writes" in said.stderr and not [*tmp_path.iterdir()]
    )


# ------------------------------------------------------------------------------------------------- collapse alarm


def table_of(conditions) -> ClassTable:
    """A table with these conditions of classes, (C, width), and a null condition."""
    table = ClassTable(len(conditions), 1, conditions.shape[1])
    table.conditions.data[:-1] = torch.as_tensor(conditions, dtype=torch.float32)[:, None]
    return table


@pytest.fixture(scope="session")
def judge(data):
    recipe = classifier.ClassifierRecipe(4, 6, 60, 16, 1e-2, 0.1, 10, 25)
    return Judge(classifier.train_classifier(data.train, data.val, data.num_classes, recipe, 0).model)


def many(split, count):
    rows = np.arange(count) % len(split)
    return Split(split.images[rows], split.labels[rows])


def alarm_of(rank, share, classes):
    return collapse.Alarm(
        48,
        classes,
        rank,
        share,
        label_fidelity=0.9,
        p_chance=0.0,
        p_real=0.5,
        chance=0.1,
        real_fidelity=0.9,
        judge_balanced=0.9,
        diversity=1.0,
    )


@pytest.mark.parametrize("classes", [2, 5, 10, 100])
def test_the_rank_is_judged_against_its_ceiling(classes):
    rng = np.random.default_rng(classes)
    good = rng.normal(size=(classes, 300))
    along_a_line = rng.normal(size=(classes, 1)) * rng.normal(size=300) + 0.05 * good
    found = {name: collapse.rank_of(table_of(conditions), classes) for name, conditions in dict(
        good=good, poor=along_a_line, same=np.ones((classes, 8))).items()}  # fmt: skip
    if classes < 5:  # they differ in one direction, whatever was learned
        assert set(found.values()) == {(None, None)} and alarm_of(None, None, 2).reasons == []
        return
    assert found["good"][1] > 0.8 and alarm_of(*found["good"], classes).reasons == []
    for name in ("poor", "same"):
        (reason,) = alarm_of(*found[name], classes).reasons
        assert found[name][1] < 0.2 and f"directions of at most {classes - 1} " in reason
    assert found["same"] == (1, 0)


def test_the_rank_separates_the_authors_runs():
    classes = {"CIFAR100": 100, "CIFAR10": 10, "PathMNIST": 9, "BloodMNIST": 8, "RetinaMNIST": 5, "DermaMNIST": 7}
    ranks = {name.lower(): rank for name, rank in paper.AUTHORS_EFFECTIVE_RANK.items()}
    of_name = {name: math.log(ranks[name.lower()]) / math.log(count - 1) for name, count in classes.items()}
    assert {name for name, found in of_name.items() if found < collapse.RANK} == {"RetinaMNIST", "DermaMNIST"}


def test_the_alarm_is_quiet_on_real_images_and_fires_on_every_kind_of_collapse(judge, data):
    quiet = judge_images(judge, data.test, data)
    assert quiet.reasons == [] and quiet.label_fidelity > 0.9 and 0.7 < quiet.diversity < 1.4
    assert quiet.sentence.startswith("No sign of a collapse: ") and "chance 33%" in quiet.sentence
    rng = np.random.default_rng(0)
    noise = Split(rng.integers(0, 256, data.test.images.shape, np.uint8), data.test.labels)
    shuffled = Split(data.test.images, rng.permutation(data.test.labels))
    for made in (noise, shuffled):
        assert "not clearly more than chance (33%)" in judge_images(judge, made, data).sentence
    first = [np.flatnonzero(data.test.labels == label)[0] for label in data.test.labels]
    copies = judge_images(judge, Split(data.test.images[first], data.test.labels), data)
    assert copies.diversity == 0 and copies.sentence.startswith("WARNING ") and "differ 0.00 times" in copies.sentence


@pytest.mark.parametrize(("classes", "real"), [(2, 0.56), (2, 0.7), (5, 0.35), (7, 0.3), (10, 0.25)])
def test_a_perfect_generator_is_not_accused_by_a_weak_judge(classes, real):
    rng, count, accused = np.random.default_rng(0), collapse.judged_images(classes), 0
    for right in rng.binomial(count, real, 500):
        chance, as_real = (
            float(stats.binomtest(int(right), count, p, alternative=a).pvalue)
            for p, a in ((1 / classes, "greater"), (real, "less"))
        )
        alarm = collapse.Alarm(count, classes, None, None, right / count, chance, as_real, 1 / classes, real, real, 1.0)
        accused += bool(alarm.reasons)
    assert accused <= 10  # 2 %; the significance is 1 %


def test_a_judge_that_is_blind_itself_accuses_nobody():
    seen = dict(
        images=48, classes=10, effective_rank=6.0, rank_share=0.8, label_fidelity=0.1, p_chance=0.5, p_real=0.0,
        chance=0.1, real_fidelity=0.9, diversity=0.1,
    )  # fmt: skip
    assert collapse.Alarm(**seen, judge_balanced=0.9).sentence.startswith("WARNING ")
    blind = collapse.Alarm(**seen, judge_balanced=0.15)
    assert blind.reasons == [] and blind.sentence.endswith("only 15% of real images for their class: too few to tell.")


def test_one_image_a_class_tells_nothing_about_diversity(judge, data):
    assert judge_images(judge, Split(data.test.images[:3], data.test.labels[:3]), data).diversity is None


def test_a_run_is_looked_at_once_by_the_judge_of_its_first_stage(settings, data, base, monkeypatch):
    settings = dataclasses.replace(settings, **LEARNS)
    run = Run(settings, STAGES["00"].stem, data, base)
    made = make_judge(run)
    assert made.accuracy(data.val) > 0.9
    run.save_metrics("data", {})
    run.finish(run.metrics_path("data"))
    monkeypatch.setattr("sdlab.verdict.judge.train_judge", None)  # it is read
    run = Run(settings, STAGES["01"].stem, data, base)
    config = SamplingConfig(num_inference_steps=2, guidance_scale=1.0, class_encoder_epoch=0)
    alarm = collapse.look_for_collapse(run, "alarm_1", config)
    assert alarm.images == 96 and "not clearly more than chance" in alarm.sentence  # the base model has random weights
    assert np.array_equal(made.logits(data.val.images), load_judge(run).logits(data.val.images))
    monkeypatch.setattr(collapse, "sample_some", None)
    assert collapse.look_for_collapse(run, "alarm_1", config) == alarm
    saved = read_json(run.metrics_path("alarm_1"))
    assert saved["collapsed"] and saved["sentence"] == alarm.sentence


def test_a_run_that_is_older_than_judges_trains_one_for_the_stage(settings, data, base):
    run = opened(settings, data, base)
    first = load_judge(run).logits(data.val.images)
    assert not (run.folder / "judge").exists() and (run.work_folder / "judge.safetensors").exists()
    assert np.array_equal(first, load_judge(run).logits(data.val.images))


def test_the_command_line_warns_and_with_strict_stops(finished, tmp_path):
    """At smoke depth the judge is blind; so the alarm is told to have seen a collapse."""
    world, _ = finished
    shutil.copytree(world / "runs", tmp_path / "runs")
    where = ("-p", "runs_root", tmp_path / "runs")
    alarm = read_json(tmp_path / "runs/smoke/metrics/alarm_1.json")
    assert not alarm["collapsed"] and "too few to tell" in alarm["sentence"]
    said = dict(collapsed=True, sentence="WARNING The generator may have collapsed: so it was told.")
    write_json(tmp_path / "runs/smoke/metrics/alarm_1.json", alarm | said)
    whole = command(BIN / "sdlab", "run", world / "smoke.yaml", "--until", "02", *where)
    assert whole.returncode == 0 and said["sentence"] in whole.stderr and "02_first_search" in whole.stdout
    strict = command(BIN / "sdlab", "run", world / "smoke.yaml", "--until", "02", "--strict", *where)
    assert strict.returncode == 1 and "The run stops here" in strict.stderr and "02_first_search" not in strict.stdout
    redo = command(BIN / "sdlab", "run", world / "smoke.yaml", "--redo", "02", "--strict", *where)
    assert redo.returncode == 1 and "The run stops here" in redo.stderr and not (tmp_path / "runs/smoke/aside").exists()
