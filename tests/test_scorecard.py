"""Scorecards: known answers, sets of every kind, and the page."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from conftest import BIN, command
from PIL import Image
from sklearn.metrics import pairwise_distances

from sdlab.data.images import Split
from sdlab.errors import BadInput
from sdlab.report.scorecard import likeness_table, scorecard_page, scorecard_sentences
from sdlab.runs.experiment import Experiment
from sdlab.runs.files import read_json
from sdlab.runs.run import Run
from sdlab.runs.stages import STAGES
from sdlab.tools.scoring import inception_features, own_settings, real_settings
from sdlab.verdict import any_set, fidelity
from sdlab.verdict.any_set import LabelledSet, match_classes, read_set
from sdlab.verdict.copies import find_copies
from sdlab.verdict.judge import load_judge, make_judge
from sdlab.verdict.scorecard import score_set

LEARNS = dict(classifier_train_steps=60, classifier_epochs=6, classifier_learning_rate=1e-2, classifier_seeds=2)


@pytest.fixture(autouse=True)
def no_bars(monkeypatch):
    monkeypatch.setenv("SDLAB_PROGRESS_FILE_ONLY", "1")


@pytest.fixture
def run(settings, data):
    return Experiment(dataclasses.replace(settings, **LEARNS), data)


# ---------------------------------------------------------------------------------------------------- likeness


def clouds(distance, count=300, width=8):
    rng = np.random.default_rng(0)
    return rng.normal(size=(count, width)), rng.normal(size=(count, width)) + distance


def test_the_same_distribution_has_a_kid_of_nothing_and_another_has_not():
    same, far = fidelity.compare_features(*clouds(0)), fidelity.compare_features(*clouds(3))
    assert abs(same["kid"]) < 2 * same["kid_deviation"] and far["kid"] > 10 * far["kid_deviation"]
    for name in ("precision", "recall", "density", "coverage"):
        assert same[name] > 0.8 and far[name] < 0.1, name


def test_a_narrow_cloud_is_precise_and_lacks_recall():
    made, real = clouds(0)
    found = fidelity.compare_features(0.2 * made, real)
    assert found["precision"] > 0.95 and found["recall"] < 0.2 and found["density"] > 1 and found["coverage"] < 0.7


@pytest.mark.filterwarnings("ignore:Metric `Kernel")
def test_kid_is_torchmetrics():
    metric = pytest.importorskip("torchmetrics.image.kid").KernelInceptionDistance(
        feature=torch.nn.Identity(), subsets=1, subset_size=200, gamma=None
    )
    made, real = (cloud.astype(np.float32)[:200] for cloud in clouds(0.5))
    for cloud, is_real in ((made, False), (real, True)):
        metric.update(torch.from_numpy(cloud), real=is_real)
    whole = fidelity.kid_features_to_metric(
        torch.from_numpy(made), torch.from_numpy(real), kid_subsets=1, kid_subset_size=200, rng_seed=0, verbose=False
    )
    assert whole["kernel_inception_distance_mean"] == pytest.approx(float(metric.compute()[0]), rel=1e-3)


def test_density_and_coverage_by_brute_force(monkeypatch):
    monkeypatch.setattr(fidelity, "CHUNK", 7)
    made, real = clouds(0.7, count=60)
    radius = np.sort(pairwise_distances(real), axis=1)[:, 5]
    inside = pairwise_distances(real, made) <= radius[:, None]
    expected = inside.sum() / (5 * len(made)), inside.any(1).mean()
    assert fidelity.density_and_coverage(made, real) == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------------- copies


def test_copies_are_found_and_repeats_counted(data):
    rng = np.random.default_rng(0)
    noisy = (data.train.images.astype(int) + rng.integers(-2, 3, data.train.images.shape)).clip(0, 255).astype(np.uint8)
    made = Split(np.concatenate([data.train.images[:10], data.train.images[:5], noisy]), np.zeros(63, np.int64))
    found = find_copies(made, data)
    assert (found["exact"], found["repeated"], found["near"]) == (15, 5, 1) and found["distance"] < found["limit"]
    assert found["held_out"] == 0 and find_copies(data.test, data)["held_out"] == len(data.test)
    fresh = rng.integers(0, 256, (60, *data.train.images.shape[1:]), np.uint8)
    assert find_copies(Split(fresh, np.zeros(60, np.int64)), data)["near"] == 0


@pytest.mark.parametrize("held_out", [24, 60, 400])
def test_an_honest_set_is_not_called_near_however_few_real_images_there_are(data, held_out):
    rng, accused = np.random.default_rng(held_out), 0
    for _ in range(60):
        train, val, test, made = (
            Split(rng.integers(0, 256, (n, 3, 2, 2), np.uint8), np.arange(n) % 3)
            for n in (200, held_out // 2, held_out // 2, 300)
        )
        found = find_copies(made, dataclasses.replace(data, train=train, val=val, test=test))
        accused += found["near"] > 3 * found["expected"]
    assert accused <= 1


# ------------------------------------------------------------------------------------------------- known answers


def as_labelled(split) -> LabelledSet:
    return LabelledSet(split, "by name")


def test_a_copy_of_the_training_set_is_as_useful_as_it_and_is_called_a_copy(run, data):
    card = score_set(run, as_labelled(data.train), "copy")
    use = card["utility"]
    assert use["made"]["accuracy"] == use["real"]["accuracy"] and use["difference"]["mean"] == 0
    assert abs(card["likeness"]["this set"]["kid"]) < 0.2 and card["labels"]["collapse"] == []
    assert card["copies"]["exact"] == 48 and "48 of its images are copies" in " ".join(scorecard_sentences(card))
    assert card["balance"]["made"] == card["balance"]["real"] == [16, 16, 16]


def test_noise_and_shuffled_labels_are_useless_and_are_said_to_be(run, data):
    rng = np.random.default_rng(0)
    noise = Split(rng.integers(0, 256, data.train.images.shape, np.uint8), data.train.labels)
    shuffled = Split(data.train.images, rng.permutation(data.train.labels))
    cards = {name: score_set(run, as_labelled(made), name) for name, made in (("noise", noise), ("shuffled", shuffled))}
    for card in cards.values():
        assert card["utility"]["made"]["mean"] < 0.7 < 0.9 < card["utility"]["real"]["mean"]
        assert (
            "collapsed" in scorecard_sentences(card)[1]
            and "too few for such an interval" in scorecard_sentences(card)[0]
        )
    of_noise, of_real = cards["noise"]["likeness"].values()
    assert of_noise["kid"] > 3 * abs(of_real["kid"]) and of_noise["precision"] < of_real["precision"]


def test_classifiers_of_both_train_equally_long_where_epochs_are_counted(settings, data, monkeypatch):
    counted = dict(LEARNS, classifier_train_steps=0, classifier_batch_size=16)
    run, steps = Experiment(dataclasses.replace(settings, **counted), data), []
    train = __import__("sdlab.evaluation").evaluation.train_classifier
    monkeypatch.setattr(
        "sdlab.evaluation.train_classifier",
        lambda t, v, c, r, *more: steps.append(r.train_steps) or train(t, v, c, r, *more),
    )
    made = Split(np.concatenate([data.train.images] * 2), np.concatenate([data.train.labels] * 2))
    score_set(run, as_labelled(made), "twice")
    assert steps == [6 * 6] * 4


def test_too_few_images_are_refused(run, data):
    with pytest.raises(BadInput, match="few has 10 images: at least 24 are needed"):
        score_set(run, as_labelled(Split(data.train.images[:10], data.train.labels[:10])), "few")


def test_another_network_is_named_and_used(run, data):
    asked = []

    def network(images):
        asked.append(len(images))
        return images.reshape(len(images), -1).astype(float)

    card = score_set(run, as_labelled(data.train), "copy", network, "pixels")
    assert card["about"]["network"] == "pixels" and len(asked) == 3


def test_inception_of_other_weights_is_refused(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"no weights")
    with pytest.raises(BadInput, match="holds no weights of InceptionV3"):
        inception_features(str(tmp_path / "weights.pth"), "cpu")


# ---------------------------------------------------------------------------------------------------------- sets


def write_folder(folder, split, names):
    for index, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
        path = folder / names[label] / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(path)


def as_set(split):
    """Images and labels without their order."""
    return sorted((image.tobytes(), int(label)) for image, label in zip(split.images, split.labels, strict=True))


@pytest.mark.parametrize(
    "names", [("left", "middle", "right"), ("000_left", "001_middle", "002_right"), ("0", "1", "2")]
)
def test_a_folder_is_read_whole_in_the_real_labels(data, tmp_path, names):
    write_folder(tmp_path / "made", data.train, names)
    found = read_set(tmp_path / "made", data)
    assert as_set(found.split) == as_set(data.train) and found.matched == ("by number" if "0" in names else "by name")


def test_one_image_a_class_is_a_set_and_files_can_be_left_out(data, tmp_path):
    write_folder(tmp_path / "made", Split(data.train.images[:3], data.train.labels[:3]), ("left", "middle", "right"))
    (tmp_path / "made" / "left" / "note.txt").write_text("no image")
    (tmp_path / "made" / "other").mkdir()
    Image.fromarray(data.train.images[0].transpose(1, 2, 0)).save(tmp_path / "made" / "other" / "a.png")
    with pytest.raises(BadInput, match="has the classes other"):
        read_set(tmp_path / "made", data)
    assert len(read_set(tmp_path / "made", data, exclude="other").split) == 3


def test_an_npz_of_other_size_is_resized(data, tmp_path, monkeypatch):
    monkeypatch.setattr(any_set, "PART", 7)
    images = np.repeat(np.repeat(data.train.images, 2, 2), 2, 3).transpose(0, 2, 3, 1)
    np.savez(tmp_path / "made.npz", train_images=images, train_labels=data.train.labels)
    found = read_set(tmp_path / "made.npz", data).split
    assert found.images.shape == data.train.images.shape and np.array_equal(found.labels, data.train.labels)
    assert abs(found.images.astype(int) - data.train.images).mean() < 20  # antialiased: each is a mean of neighbours


def test_unknown_classes_are_refused_by_name(data, tmp_path):
    with pytest.raises(BadInput, match=r"has the classes up, which bars does not have \(it has left, middle, right\)"):
        match_classes(tmp_path, ("left", "up"), data)
    found, how = match_classes(tmp_path, ("right", "left"), data)
    assert (found["right"], found["left"], how) == (2, 0, "by name")
    assert match_classes(tmp_path, ("2", "0"), data) == ({"2": 2, "0": 0}, "by number")
    with pytest.raises(BadInput, match="has the classes 0, 3, which"):
        match_classes(tmp_path, ("0", "3"), data)


def test_labels_that_mean_nothing_are_seen_where_most_images_are_of_one_class(run, data):
    """A set of one class in eight tenths: its random labels are right in two thirds."""
    rng = np.random.default_rng(0)
    shown = rng.choice(3, 300, p=[0.8, 0.1, 0.1])
    rows = [rng.choice(np.flatnonzero(data.test.labels == label)) for label in shown]
    images = data.test.images[rows]
    honest, random = (
        score_set(run, as_labelled(Split(images, labels)), "set")["labels"]
        for labels in (shown, rng.permutation(shown))
    )
    assert 0.5 < random["chance"] < 0.75 and "not clearly more than chance" in " ".join(random["collapse"])
    assert honest["fidelity"] > 0.9 and not honest["collapse"]


def test_a_set_of_test_images_means_nothing_and_is_said_to(run, data):
    card = score_set(run, as_labelled(Split(data.test.images, data.test.labels)), "test")
    assert (
        scorecard_sentences(card)[0] == "30 of its images are real validation or test images: its scores mean nothing."
    )


def test_a_judge_of_other_images_or_filters_is_not_taken(settings, data, base):
    settings = dataclasses.replace(settings, **LEARNS)
    stage = Run(settings, STAGES["00"].stem, data, base)
    own = make_judge(stage)
    stage.save_metrics("data", {})
    stage.finish(stage.metrics_path("data"))
    wider = dataclasses.replace(settings, classifier_filters=8)
    assert load_judge(Experiment(wider, data)).filters == own.filters == 4
    other = dataclasses.replace(data, train=Split(data.train.images[::-1].copy(), data.train.labels))
    assert load_judge(Experiment(wider, other)).filters == 8


def test_real_may_be_an_experiment_or_a_data_set(tmp_path):
    assert real_settings("digits", {}).classifier_train_steps == 150
    assert real_settings("retinamnist", dict(image_size=28)).dataset == "retinamnist"
    (tmp_path / "photos").mkdir()
    assert real_settings(str(tmp_path / "photos"), {}).dataset == str(tmp_path / "photos")


def test_settings_on_top_are_meant_for_the_real_images(tmp_path):
    given = dict(classifier_seeds=8, runs_root=str(tmp_path))
    own = own_settings("digits", given)
    assert (own.classifier_seeds, own.runs_root) == (4, str(tmp_path)) and own_settings("./digits", given) is None


# ---------------------------------------------------------------------------------------------------------- page


def test_the_page_holds_its_pictures_and_escapes_names(run, data):
    odd = dataclasses.replace(data, class_names=("<b>left</b>", "middle", "right"), name="<script>")
    card = score_set(Experiment(run.settings, odd), as_labelled(data.train), "a & b")
    page = scorecard_page(card, data.train, odd)
    assert "<script>" not in page and "a &amp; b" in page and len(re.findall("data:image/png;base64,", page)) == 3
    assert "src=" in page and not re.search(r'(src|href)="(?!data:)', page)
    assert likeness_table(card).shape == (6, 2) and scorecard_sentences(card)[0] in page.replace("&#39;", "'")


def test_the_command_scores_a_finished_runs_export(finished, tmp_path):
    world, _ = finished
    made = tmp_path / "made.npz"
    assert command(BIN / "sdlab", "export", world / "smoke.yaml", made).returncode == 0
    scored = ("score", made, "--against", world / "smoke.yaml", "--to", tmp_path / "card")
    said = command(BIN / "sdlab", *scored)
    card = read_json(tmp_path / "card" / "scorecard.json")
    assert said.returncode == 0, said.stderr
    assert scorecard_sentences(card)[0] in said.stdout and card["about"]["images"] == 1000
    assert (tmp_path / "card" / "scorecard.html").read_text().startswith("<!DOCTYPE html>")
    assert json.dumps(card, allow_nan=False) and "Traceback" not in said.stderr
    own = command(
        BIN / "sdlab", "score", world / "smoke.yaml", "--against", world / "smoke.yaml", "--to", tmp_path / "own"
    )
    assert own.returncode == 0, own.stderr
    assert read_json(tmp_path / "own" / "scorecard.json")["utility"] == card["utility"]
    again = command(BIN / "sdlab", *scored)
    assert again.returncode == 1 and "nothing is overwritten" in again.stderr
    nothing = command(BIN / "sdlab", "score", tmp_path / "nowhere", "--against", "digits")
    assert nothing.returncode == 1 and "neither a folder, nor an npz" in nothing.stderr
