"""What the base model's VAE costs: its round trips, classifiers in pairs, and one sentence about them."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from sdlab import evaluation, latents
from sdlab.data.pixels import to_model, to_uint8
from sdlab.latents import round_trip_training_set
from sdlab.report.costs import load_ceiling
from sdlab.report.remarks import ceiling_sentence
from sdlab.runs.run import Run
from sdlab.runs.stages import STAGES

LEARNS = dict(classifier_train_steps=60, classifier_epochs=6, classifier_learning_rate=1e-2, classifier_seeds=3)


@pytest.fixture(autouse=True)
def no_bars(monkeypatch):
    monkeypatch.setenv("SDLAB_PROGRESS_FILE_ONLY", "1")


def opened(settings, data, base, **changes) -> Run:
    return Run(dataclasses.replace(settings, **changes), STAGES["00"].stem, data, base)


@pytest.mark.parametrize("resizing", ["bilinear", "bicubic"])
def test_round_trips_are_what_the_vae_draws_of_each_image(settings, data, base, monkeypatch, resizing):
    monkeypatch.setattr(latents, "ENCODE_BATCH", 8)
    monkeypatch.setattr(latents, "PART", 16)
    drawn = round_trip_training_set(opened(settings, data, base, base_resizing=resizing))
    with torch.no_grad():
        mean = base.vae.encode(to_model(data.train.images, settings.base_image_size, resizing)).latent_dist.mean
        expected = to_uint8(base.vae.decode(mean).sample, data.image_size, resizing)
    assert drawn.images.shape == data.train.images.shape and drawn.images.dtype == np.uint8
    assert abs(drawn.images.astype(int) - expected).max() <= 1  # another batch may round otherwise
    assert np.array_equal(drawn.labels, data.train.labels) and drawn.images.std() > 0


def test_resizing_alone_is_exact_at_equal_sizes_and_worst_just_above(data):
    size = data.image_size
    errors = [latents.resizing_error(data, base_size) for base_size in (size, size + 1, 4 * size)]
    assert errors[0] == 0 and errors[1] > 2 * errors[2] > 0
    one = to_uint8(to_model(data.train.images[:1], size + 1), size).astype(int) - data.train.images[:1]
    assert latents.resizing_error(data, size + 1, images=1) == abs(one).mean()


def test_latents_and_ceiling_are_of_the_resizing_that_was_asked_for(settings, data, base):
    means, errors = [], []
    for name, resizing in (("one", "bilinear"), ("two", "bicubic")):
        run = opened(settings, data, base, experiment=name, base_resizing=resizing, classifier_seeds=1)
        means.append(latents.encode_training_set(run).mean)
        errors.append(evaluation.score_ceiling(run)["resizing_error"])
    assert not torch.equal(*means) and errors[0] > errors[1] > 0
    other = opened(settings, data, base, experiment="three", base_resizing="bicubic")
    shutil.copytree(settings.run_folder.parent / "one" / "latents", other.folder / "latents")
    assert torch.equal(latents.encode_training_set(other).mean, means[1])  # not those of the cache


def test_round_trips_that_were_cut_go_on_after_their_last_part(settings, data, base, monkeypatch):
    monkeypatch.setattr(latents, "PART", 16)
    part, asked = latents.round_trip_part, []

    def third_is_cut(base, images, indices, *more):
        asked.append(indices)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return part(base, images, indices, *more)

    monkeypatch.setattr(latents, "round_trip_part", third_is_cut)
    run = opened(settings, data, base)
    with pytest.raises(KeyboardInterrupt):
        round_trip_training_set(run)
    cut = round_trip_training_set(run)
    assert asked == [range(16), range(16, 32), range(32, 48), range(32, 48)]
    assert cut.fingerprint() == round_trip_training_set(run).fingerprint() and len(asked) == 4  # read, not made
    run.save_metrics("data", {})
    run.finish(run.metrics_path("data"))
    assert not list(run.folder.rglob("round_trips*"))


def test_a_vae_that_loses_the_classes_costs_them_and_one_that_loses_nothing_costs_nothing(
    settings, data, base, monkeypatch
):
    """The tests' VAE has random weights. Pairs share a seed, so equal images give equal scores."""
    run = opened(settings, data, base, **LEARNS)
    found = evaluation.score_ceiling(run)
    assert found["split"] == "val" and found["real"]["mean"] > 0.9 and found["cost"] > 0.3
    assert found["cost"] == pytest.approx(found["real"]["mean"] - found["round_trips"]["mean"])
    assert found["error"] > 20 and found["standard_error"] >= 0 and found["real"]["n"] == len(data.val)
    assert not (run.folder / "test_readings.jsonl").exists()
    assert evaluation.score_ceiling(run) == found
    run.lock.release()
    monkeypatch.setattr(evaluation, "round_trip_training_set", lambda run: run.data.train)
    other = opened(settings, data, base, **LEARNS | dict(experiment="other"))
    found = evaluation.score_ceiling(other)
    assert (found["cost"], found["standard_error"], found["error"]) == (0, 0, 0) and found["real"] == found[
        "round_trips"
    ]


def test_it_is_measured_again_for_another_classifier_unless_the_stage_is_finished(settings, data, base, monkeypatch):
    run = opened(settings, data, base, classifier_seeds=1)
    first = evaluation.score_ceiling(run)
    assert first["standard_error"] is None
    run.lock.release()
    run = opened(settings, data, base, classifier_seeds=1, classifier_filters=8)
    second = evaluation.score_ceiling(run)
    assert (first["recipe"]["filters"], second["recipe"]["filters"]) == (4, 8)
    run.lock.release()
    run = opened(settings, data, base, classifier_filters=8)
    assert settings.classifier_seeds > 1 and second["standard_error"] is None
    second = evaluation.score_ceiling(run)
    assert second["standard_error"] is not None and second["split"] == "val"
    run.lock.release()
    run = opened(settings, data, base, classifier_filters=8, protocol="paper")
    assert evaluation.score_ceiling(run)["split"] == "test"
    run.lock.release()
    run = opened(settings, data, base, classifier_filters=8)
    assert evaluation.score_ceiling(run) == second
    run.save_metrics("data", {})
    run.finish(run.metrics_path("data"))
    monkeypatch.setattr(evaluation, "round_trip_training_set", None)  # nothing is made
    assert evaluation.score_ceiling(opened(settings, data, base)) == second
    assert load_ceiling(run.settings) == second
    assert load_ceiling(dataclasses.replace(run.settings, image_size=9)) is None  # another experiment's
    run.metrics_path("ceiling").unlink()
    nothing = evaluation.score_ceiling(opened(settings, data, base))
    assert nothing is None and "was not measured" in ceiling_sentence(nothing)


def test_the_papers_protocol_reads_the_test_set_and_says_so(settings, data, base):
    run = opened(settings, data, base, protocol="paper", classifier_seeds=2)
    found = evaluation.score_ceiling(run)
    (reading,) = map(json.loads, (run.folder / "test_readings.jsonl").read_text().splitlines())
    assert found["split"] == "test" and found["real"]["n"] == len(data.test) and "4 classifiers" in reading["purpose"]


def test_a_cell_of_round_trips_is_a_reading_on_record(settings, data, base):
    run = opened(settings, data, base)
    cell = evaluation.score_round_trips(run)
    (reading,) = map(json.loads, (run.folder / "test_readings.jsonl").read_text().splitlines())
    assert reading["purpose"].startswith("round trips through the VAE") and cell["test"]["n"] == len(data.test)
    assert evaluation.score_round_trips(run) == cell and cell["images"] == len(data.train)


def test_one_sentence_has_the_cost_its_error_and_both_scores():
    def score(mean):
        return dict(mean=mean, std=0.01, n=297)

    found = dict(split="val", real=score(0.975), round_trips=score(0.942), cost=0.033, standard_error=0.004, error=9.13)
    said = ceiling_sentence(found)
    assert said.startswith("This base model's VAE costs 3.3 points here (standard error 0.4): ")
    assert said.endswith(" of 255.")
    resized = found | dict(resizing_error=3.88, base_image_size=32)
    assert ceiling_sentence(resized).endswith(" of 255 (3.9 by resizing to 32 px and back alone).")
    assert ceiling_sentence(found | dict(resizing_error=0.0, base_image_size=32)) == said
    assert "97.50 ± 1.00 % on 297 validation images" in said and "94.20 ± 1.00 %; mean error of a pixel 9.1 of" in said
