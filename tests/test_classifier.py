"""ResNet20 and its training, as docs/method.md, item 16, translates the authors'."""

import dataclasses
import time

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, recall_score, top_k_accuracy_score

from sdlab import evaluation
from sdlab.classifier import (
    ClassifierRecipe,
    ResNet20,
    endless_batches,
    predict,
    split_evenly,
    train_classifier,
)
from sdlab.data.images import Split
from sdlab.errors import BadInput
from sdlab.evaluation import train_and_score_classifiers
from sdlab.metrics import score_predictions, summarize
from sdlab.runs.experiment import Experiment


def accuracy_of(model, split) -> float:
    return score_predictions(predict(model, split), split.labels).accuracy


RECIPE = ClassifierRecipe(
    filters=8,
    epochs=12,
    train_steps=0,
    batch_size=16,
    learning_rate=1e-2,
    label_smoothing=0.1,
    patience=10,
    stop_patience=25,
)


@pytest.mark.parametrize(("filters", "millions"), [(16, 0.27), (64, 4.3)])
def test_depth_and_parameters(filters, millions):
    model = ResNet20(10, filters)
    weighted = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(weighted) == 20
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.03)


def test_shortcuts_have_no_parameters_and_batch_norm_is_keras():
    model = ResNet20(10, 16)
    assert not [m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (1, 1)]
    assert {(m.eps, m.momentum) for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {(1e-5, 0.1)}


def test_shortcut_is_max_pool_and_zero_channels():
    """With its two convolutions silenced, a block is its shortcut."""
    block = ResNet20(10, 4).blocks[3].eval()  # the first of the second stage
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 4, 8, 8)
    out = block(x)
    torch.testing.assert_close(out[:, :4], torch.nn.functional.max_pool2d(x, 3, 2, 1))
    assert out.shape == (2, 8, 4, 4) and not out[:, 4:].any()


@pytest.mark.parametrize("size", [8, 28, 32, 64])
def test_any_image_size(size):
    assert ResNet20(5, 4)(torch.rand(2, 3, size, size)).shape == (2, 5)


def test_it_learns_and_keeps_its_best_weights(data):
    trained = train_classifier(data.train, data.val, 3, RECIPE, seed=0)
    best = max(h["val_accuracy"] for h in trained.history)
    assert trained.val_accuracy == best == accuracy_of(trained.model, data.val)
    assert accuracy_of(trained.model, data.test) > 0.8


def test_labels_matter(data):
    """On shuffled labels nothing is learned: the accuracy above comes from the images."""
    shuffled = Split(data.train.images, np.random.default_rng(1).permutation(data.train.labels))
    accuracy = [accuracy_of(train_classifier(shuffled, data.val, 3, RECIPE, seed=s).model, data.test) for s in range(2)]
    assert np.mean(accuracy) < 0.75


def test_same_seed_same_classifier(data):
    recipe = dataclasses.replace(RECIPE, epochs=2)
    first, second, other = (
        train_classifier(data.train, data.val, 3, recipe, seed=s).model.state_dict() for s in (1, 1, 2)
    )
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_one_budget_of_steps_for_sets_of_every_size(data, monkeypatch):
    steps = []
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *a, **k: steps.append(1))
    for count in (10, 48):
        steps.clear()
        train_classifier(
            Split(data.train.images[:count], data.train.labels[:count]),
            data.val,
            3,
            dataclasses.replace(RECIPE, train_steps=30, epochs=4),
            0,
        )
        assert len(steps) == 30


def test_plateau_and_early_stopping(data, monkeypatch):
    """A learning rate of 0 never gets better after the first epoch: lr falls after each patience, then training ends."""
    recipe = dataclasses.replace(RECIPE, epochs=100, patience=3, stop_patience=8)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *a, **k: None)
    monkeypatch.setattr("sdlab.classifier.predict", lambda model, split: np.eye(3)[np.zeros(len(split), int)])
    history = train_classifier(data.train, data.val, 3, recipe, 0).history
    assert [round(h["learning_rate"], 6) for h in history] == [1e-2] * 4 + [1e-3] * 3 + [1e-4] * 2


def test_the_learning_rate_has_a_floor(data, monkeypatch):
    recipe = dataclasses.replace(RECIPE, epochs=60, patience=1, stop_patience=59)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *a, **k: None)
    monkeypatch.setattr("sdlab.classifier.predict", lambda model, split: np.eye(3)[np.zeros(len(split), int)])
    assert train_classifier(data.train, data.val, 3, recipe, 0).history[-1]["learning_rate"] == 1e-5


def test_score_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    labels, logits = rng.integers(0, 8, 200), rng.normal(size=(200, 8))
    found, predicted = score_predictions(logits, labels), logits.argmax(1)
    assert found.accuracy == accuracy_score(labels, predicted)
    assert found.balanced == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert found.recall == pytest.approx(recall_score(labels, predicted, average=None))
    assert found.top5 == pytest.approx(top_k_accuracy_score(labels, logits, k=5))
    assert summarize([found])["standard_error"] == pytest.approx((found.accuracy * (1 - found.accuracy) / 200) ** 0.5)


def test_predictions_do_not_depend_on_the_batch(data):
    model = ResNet20(3, 4)
    np.testing.assert_allclose(predict(model, data.test), predict(model, data.test, batch_size=7), rtol=1e-5, atol=1e-5)


def test_every_image_once_a_pass():
    batches = endless_batches(10, 4, torch.Generator().manual_seed(0))
    one_pass = [next(batches) for _ in range(3)]
    assert [len(b) for b in one_pass] == [4, 4, 2] and sorted(torch.cat(one_pass).tolist()) == list(range(10))


def test_steps_are_split_evenly():
    assert split_evenly(10, 4) == [3, 3, 2, 2] and sum(split_evenly(157, 15)) == 157


def test_a_lost_class_shows_beside_the_accuracy(settings, data):
    """No training image of one class: its recall is 0, which the summary keeps although the accuracy looks fair."""
    keep = data.train.labels != 2
    recipe = dataclasses.replace(settings, classifier_train_steps=60, classifier_epochs=6, classifier_filters=8)
    train = Split(data.train.images[keep], data.train.labels[keep])
    scores = train_and_score_classifiers(Experiment(recipe, data), train, [0, 1], ["test"])
    kept = summarize(scores["test"])
    assert kept["recall"][2] == 0 and kept["balanced"] < 0.7 and len(kept["accuracy"]) == 2
    assert kept["std"] == pytest.approx(np.std(kept["accuracy"], ddof=1))


@pytest.fixture
def small(settings):
    return dataclasses.replace(settings, classifier_train_steps=8, classifier_epochs=4, classifier_filters=8)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_classifiers_trained_at_once_are_those_trained_one_after_another(small, data, two_threads):
    """Three seeds in two threads: the same scores, bit for bit, in the order of the seeds, and nothing else changed."""
    random_state = torch.get_rng_state()
    together = train_and_score_classifiers(Experiment(small, data), data.train, [3, 1, 2], ["val", "test"])
    assert torch.get_num_threads() == 2 and torch.equal(torch.get_rng_state(), random_state)
    torch.set_num_threads(1)
    for i, seed in enumerate([3, 1, 2]):
        alone = train_and_score_classifiers(Experiment(small, data), data.train, [seed], ["val", "test"])
        assert alone == {name: [scores[i]] for name, scores in together.items()}
    assert len({s.accuracy for s in together["test"]} | {s.recall for s in together["test"]}) > 1


def test_one_that_fails_ends_the_others(small, data, two_threads, monkeypatch):
    """An interrupt or an error is not kept waiting for classifiers whose scores nobody will read."""
    epochs = []

    def failing(train, val, num_classes, recipe, seed, device, after_epoch):
        if seed == 0:
            raise MemoryError("no more")
        for _ in range(1000):
            time.sleep(0.01)
            after_epoch()
            epochs.append(seed)

    monkeypatch.setattr("sdlab.evaluation.train_classifier", failing)
    with pytest.raises(
        BadInput, match="memory does not hold a classifier's training step of 32 images: take a smaller"
    ):
        train_and_score_classifiers(Experiment(small, data), data.train, [0, 1, 2], ["test"])
    assert len(epochs) < 100 and torch.get_num_threads() == 2


def test_a_trained_classifiers_scores_are_kept_and_read_where_they_are_of_the_same(small, data, tmp_path, monkeypatch):
    """Cut at the second of three, it trains two more, and all are what they would have been. Other images: all anew."""
    trained, whole = [], train_and_score_classifiers(Experiment(small, data), data.train, [3, 1, 2], ["val", "test"])
    original, run = evaluation.train_classifier, Experiment(small, data)
    run.work_folder = tmp_path

    def counted(train, val, num_classes, recipe, seed, *more):
        trained.append(seed)
        if trained == [3, 1]:
            raise KeyboardInterrupt
        return original(train, val, num_classes, recipe, seed, *more)

    monkeypatch.setattr(evaluation, "train_classifier", counted)
    with pytest.raises(KeyboardInterrupt):
        train_and_score_classifiers(run, data.train, [3, 1, 2], ["val", "test"])
    assert train_and_score_classifiers(run, data.train, [3, 1, 2], ["val", "test"]) == whole
    assert train_and_score_classifiers(run, data.train, [3, 1, 2], ["val", "test"]) == whole
    assert trained == [3, 1, 1, 2]
    other = Split(255 - data.train.images, data.train.labels)
    assert train_and_score_classifiers(run, other, [3, 1, 2], ["val", "test"]) != whole
    assert trained == [3, 1, 1, 2, 3, 1, 2]
    for path in tmp_path.glob("classifiers/*.json"):
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(BadInput, match=r"\.json is damaged"):
        train_and_score_classifiers(run, data.train, [3], ["val", "test"])
