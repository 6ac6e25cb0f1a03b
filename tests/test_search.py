"""The searches: real Optuna studies in SQLite that prune, resume and keep what a trial saw."""

import contextlib
import dataclasses
import sqlite3
import sys
import time

import numpy as np
import optuna
import pytest
from optuna.storages._cached_storage import _CachedStorage

from sdlab import search as search_module
from sdlab.data.images import Split
from sdlab.errors import BadInput
from sdlab.metrics import Score
from sdlab.runs.run import Run
from sdlab.runs.stages import STAGES, StageState
from sdlab.runs.studies import open_study
from sdlab.sampling_config import SamplingConfig
from sdlab.search import (
    Search,
    SearchSpace,
    export_search,
    final_search_space,
    first_search_space,
    new_pruner,
    run_search,
)


def space(steps=(5, 50), guidance=(0.0, 7.5), epoch=(1, 10)) -> SearchSpace:
    return SearchSpace(num_inference_steps=steps, guidance_scale=guidance, epoch=epoch)


def config(steps, guidance, encoder_epoch, unet_epoch=0) -> SamplingConfig:
    return SamplingConfig(
        num_inference_steps=steps, guidance_scale=guidance, class_encoder_epoch=encoder_epoch, unet_epoch=unet_epoch
    )


def a_search(name="search_1", trials=24, unet_epoch=0, known=None, **ranges) -> Search:
    def config_of(*, num_inference_steps, guidance_scale, epoch):
        return config(num_inference_steps, guidance_scale, epoch, unet_epoch)

    return Search(name=name, space=space(**ranges), trials=trials, config_of=config_of, known=known)


class FakeSet:
    """A synthetic set that costs nothing; it remembers its config."""

    def __init__(self, config, log):
        self.config, self.log, self.folder = config, log, type("Folder", (), {"name": "abc"})

    def split(self, count):
        made = Split(np.zeros((count, 3, 8, 8), np.uint8), np.arange(count) % 3)
        self.log.append((self.config, count))
        object.__setattr__(made, "config", self.config)
        return made

    def seconds(self, count):
        return 0.01 * count


def cas(config: SamplingConfig, count: int) -> float:
    """Best at UGS 2, a little better with more images."""
    return 0.9 - 0.05 * abs(config.guidance_scale - 2) + 0.0001 * count + 0.0001 * config.class_encoder_epoch


@pytest.fixture
def world(settings, monkeypatch):
    """Settings, a run whose upstream is taken as done, and a log of (config, images) as they are made and (split,) as scored."""
    settings = dataclasses.replace(settings, search_1_trials=24, search_images=400, search_first_images=100, search_reduction_factor=4,
                                   search_startup_trials=4, search_finalists=1)  # fmt: skip
    monkeypatch.setattr("sdlab.runs.stages.stage_state", lambda s, n: StageState("not run"))
    monkeypatch.setitem(STAGES, "02", dataclasses.replace(STAGES["02"], upstream=()))
    log = dict(made=[], scored=[], stop_after=None, stop_in_sheet=None)

    def save_image_grid(images, path):
        if log["stop_in_sheet"] is not None and len(log["scored"]) >= log["stop_in_sheet"]:
            raise KeyboardInterrupt
        return draw(images, path)

    draw = search_module.save_image_grid
    monkeypatch.setattr(search_module, "save_image_grid", save_image_grid)

    def generate_set(run, config, count, seed, desc, priority=0):
        if log["stop_after"] is not None and len(log["scored"]) >= log["stop_after"]:
            raise KeyboardInterrupt
        return FakeSet(config, log["made"])

    def score(run, train, seeds, splits, desc, searching, priority=0):
        log["scored"].append(tuple(splits))
        value = cas(train.config, len(train))
        return {name: [Score(value, 1.0, value, (value,) * 3, 30)] for name in splits}

    monkeypatch.setattr(search_module, "generate_set", generate_set)
    monkeypatch.setattr(search_module, "train_and_score_classifiers", score)
    return settings, log


def searched(settings, data, trials=24):
    run = Run(settings, "02_first_search")
    try:
        return run_search(run, a_search(trials=trials)), run
    finally:
        run.lock.release()


WHOLE = {}  # searches that nothing cut, by what they depend on: several tests compare with each


def whole_search(settings, data, tmp_path, trials=24):
    key = settings.search_pruner, settings.seed, settings.search_reduction_factor, settings.search_parallel, trials
    if key not in WHOLE:
        WHOLE[key] = searched(dataclasses.replace(settings, runs_root=str(tmp_path / "whole")), data, trials)[0]
    return WHOLE[key]


def test_pruning_really_prunes_and_the_best_is_found(world, data):
    settings, _ = world
    found, _ = searched(settings, data)
    assert found["counts"]["trials"] == 24 and found["counts"]["pruned"] >= 5 and found["counts"]["complete"] >= 3
    assert found["images"]["generated"] < found["images"]["without_pruning"] == 24 * 400
    assert abs(found["best"]["config"]["guidance_scale"] - 2) < 1.0
    assert found["best"]["value"] == max(t["value"] for t in found["trials"] if t["state"] == "complete")
    pruned = [t for t in found["trials"] if t["state"] == "pruned"]
    assert all(list(t["intermediate"]) == ["100"] for t in pruned)


def test_every_trial_has_a_value_at_the_lowest_rung(world, data):
    """What fANOVA reads."""
    found, _ = searched(world[0], data)
    assert all("100" in t["intermediate"] for t in found["trials"])


def test_nothing_is_pruned_where_nothing_should_be(world, data):
    found, _ = searched(dataclasses.replace(world[0], search_pruner="none"), data, 8)
    assert found["counts"] == {"trials": 8, "complete": 8, "pruned": 0}


def test_one_bracket_prunes_more_than_hyperband(world, data, tmp_path):
    settings, _ = world
    pruned = {}
    for pruner in ("successive_halving", "hyperband"):
        one = dataclasses.replace(settings, search_pruner=pruner, runs_root=str(tmp_path / pruner))
        pruned[pruner] = searched(one, data)[0]["counts"]["pruned"]
    assert pruned["successive_halving"] > pruned["hyperband"] > 0


@pytest.mark.parametrize("pruner", ["successive_halving", "hyperband"])
@pytest.mark.parametrize("where", ["stop_after", "stop_in_sheet"])
@pytest.mark.parametrize("stop_after", [1, 7, 20])
def test_a_killed_search_ends_where_the_whole_one_does(world, data, tmp_path, where, stop_after, pruner):
    """Same trials, same states, same optimum, whenever it was cut, before a rung or after the pruner has spoken: a cut
    trial goes on under its own number."""
    settings, log = dataclasses.replace(world[0], search_pruner=pruner), world[1]
    whole = whole_search(settings, data, tmp_path)
    log["scored"].clear()
    log[where] = stop_after
    with pytest.raises(KeyboardInterrupt):
        searched(settings, data)
    log[where] = None
    resumed, _ = searched(settings, data)
    times = ("trial_seconds",)
    strip = lambda found: [{k: v for k, v in t.items() if k not in times} for t in found["trials"]]  # noqa: E731
    assert strip(resumed) == strip(whole)
    assert resumed["best"] == whole["best"]


WRITES = [
    "create_new_trial",
    "set_trial_param",
    "set_trial_intermediate_value",
    "set_trial_user_attr",
    "set_trial_system_attr",
    "set_trial_state_values",
]


def cut_writes(monkeypatch, left, cuts):
    """Interrupt after the `left[0]`-th write to the storage."""
    for name in WRITES:
        original = getattr(_CachedStorage, name)

        def writing(self, *args, original=original, name=name, **kwargs):
            done = original(self, *args, **kwargs)
            left[0] -= 1
            if left[0] == 0:
                cuts.append(name)
                raise KeyboardInterrupt
            return done

        monkeypatch.setattr(_CachedStorage, name, writing)


@pytest.mark.parametrize("pruner", ["successive_halving", "hyperband"])
@pytest.mark.parametrize("seed", range(4))
def test_a_search_cut_between_any_two_writes_ends_where_the_whole_one_does(
    world, data, tmp_path, monkeypatch, pruner, seed
):
    """Cut again and again after a few writes to the storage, wherever that falls: within the drawing of parameters, between
    a pruner's answer and its own note of it, between the attributes of a finished trial."""
    settings = dataclasses.replace(
        world[0], search_pruner=pruner, search_reduction_factor=2, search_startup_trials=2, seed=seed
    )
    whole = whole_search(settings, data, tmp_path, 6)
    rng, left, cuts = np.random.default_rng(seed), [0], []
    cut_writes(monkeypatch, left, cuts)
    resumed = None
    while resumed is None:
        left[0] = int(rng.integers(1, 20))
        with contextlib.suppress(KeyboardInterrupt):
            resumed, _ = searched(settings, data, 6)
    assert len(cuts) >= 5 and "set_trial_param" in cuts
    strip = lambda found: [{k: v for k, v in t.items() if k != "trial_seconds"} for t in found["trials"]]  # noqa: E731
    assert strip(resumed) == strip(whole)
    assert resumed["best"] == whole["best"] and resumed["images"] == whole["images"]


def at_another_pace(monkeypatch, rng):
    """Each score takes another time: trials that run at once finish in any order."""
    score = search_module.train_and_score_classifiers

    def scored(*args, **more):
        time.sleep(float(rng.choice([0, 0.002, 0.01, 0.02])))
        return score(*args, **more)

    monkeypatch.setattr(search_module, "train_and_score_classifiers", scored)


@pytest.mark.parametrize("pruner", ["successive_halving", "hyperband"])
def test_trials_at_a_time_are_the_same_search_at_any_pace(world, data, tmp_path, monkeypatch, pruner):
    """Ten random orders of results for each pruner; in every second one the driver is cut again and again, between writes."""
    settings = dataclasses.replace(
        world[0], search_parallel=3, search_pruner=pruner, search_reduction_factor=2, search_startup_trials=3
    )
    strip = lambda found: [{k: v for k, v in t.items() if k != "trial_seconds"} for t in found["trials"]]  # noqa: E731
    whole = strip(searched(dataclasses.replace(settings, runs_root=str(tmp_path / "whole")), data, 8)[0])
    one_by_one = strip(searched(dataclasses.replace(settings, search_parallel=1), data, 8)[0])
    assert (
        one_by_one[:3] == whole[:3] and one_by_one != whole
    )  # random trials, then others than without the running ones
    assert {t["state"] for t in whole} == {"complete", "pruned"}
    left, cuts = [0], []
    cut_writes(monkeypatch, left, cuts)
    for order in range(10):
        rng, found = np.random.default_rng(order), None
        here = dataclasses.replace(settings, runs_root=str(tmp_path / str(order)))
        with monkeypatch.context() as patch:
            at_another_pace(patch, rng)
            while found is None:
                left[0] = int(rng.integers(5, 60)) if order % 2 else 0
                with contextlib.suppress(KeyboardInterrupt):
                    found, _ = searched(here, data, 8)
        assert strip(found) == whole, order
    assert len(cuts) > 15


def test_a_parallel_search_that_is_extended_is_the_same_as_one_that_was_as_long(world, data, tmp_path):
    settings = dataclasses.replace(world[0], search_parallel=3)
    whole, _ = searched(dataclasses.replace(settings, runs_root=str(tmp_path / "whole"), search_1_trials=9), data, 9)
    searched(dataclasses.replace(settings, search_1_trials=6), data, 6)
    (settings.run_folder / "metrics" / "search_1.json").unlink()
    longer, _ = searched(dataclasses.replace(settings, search_1_trials=9), data, 9)
    assert [t["params"] for t in longer["trials"]] == [t["params"] for t in whole["trials"]]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            sqlite3.OperationalError("database or disk is full"),
            r"searches.db cannot be written \(No space left on device\)",
        ),
        (
            sqlite3.OperationalError("attempt to write a readonly database"),
            r"searches.db cannot be written \(Read-only",
        ),
        (sqlite3.OperationalError("disk I/O error"), r"searches.db cannot be written \(Input/output error\)"),
        (
            sqlite3.OperationalError("server closed the connection"),
            "failed .*server closed.*: when it is available again",
        ),
    ],
)
def test_a_storage_that_fails_on_the_way_is_one_sentence(world, data, monkeypatch, error, said):
    """And the search goes on afterwards."""
    settings, _ = world
    whole, _ = searched(dataclasses.replace(settings, runs_root=settings.runs_root + "2"), data, 3)

    def fails(*_, **__):
        raise optuna.exceptions.StorageInternalError("An exception is raised during the commit.") from error

    with monkeypatch.context() as patch:
        patch.setattr(_CachedStorage, "set_trial_intermediate_value", fails)
        with pytest.raises(BadInput, match=said):
            searched(settings, data, 3)
    assert searched(settings, data, 3)[0]["best"] == whole["best"]


@pytest.mark.parametrize(("protocol", "split"), [("sealed", "val"), ("paper", "test")])
def test_which_split_decides(world, data, protocol, split):
    """Sealed: no trial sees test data. Paper: it does, and each reading is on record."""
    settings, log = world
    _, run = searched(dataclasses.replace(settings, protocol=protocol), data, 3)
    assert set(log["scored"]) == {(split,)}
    readings = run.folder / "test_readings.jsonl"
    assert len(readings.read_text().splitlines()) == 3 if protocol == "paper" else not readings.exists()


def test_what_a_trial_saw_is_kept_for_the_dashboard(world, data):
    settings, _ = world
    _, run = searched(settings, data, 3)
    study = open_study(settings, "search_1", new_pruner(settings))
    assert isinstance(study.pruner, optuna.pruners.SuccessiveHalvingPruner) and study.direction.name == "MAXIMIZE"
    for trial in study.trials:
        assert {
            "generation_seconds",
            "config",
            "split",
            "images",
            "balanced_accuracy",
            "recall",
        } <= trial.user_attrs.keys()
        picture = run.folder / "artifacts" / trial.user_attrs["artifact"]
        assert picture.read_bytes().startswith(b"\x89PNG")
    with sqlite3.connect(run.folder / "searches.db") as database:
        assert database.execute("select count(*) from trial_intermediate_values").fetchone()[0] >= 3


@pytest.mark.parametrize(
    ("storage", "sentence"),
    [
        ("nonsense://x", "nonsense://x cannot be opened"),
        ("not a url", "cannot be opened"),
        ("sqlite:////nowhere/at/all/x.db", "there is no folder /nowhere/at/all"),
        (
            "postgresql://me@127.0.0.1:1/x",
            r"me@127.0.0.1:1/x cannot be opened .*pip install 'psycopg\[binary\]'",
        ),
    ],
)
def test_a_storage_that_cannot_be_opened_is_refused_before_anything_long(
    world, settings, data, storage, sentence, monkeypatch
):
    """By the search, and by any notebook up to it."""
    monkeypatch.setitem(sys.modules, "psycopg", None)  # as where the extra is not installed
    with pytest.raises(BadInput, match=sentence):
        open_study(dataclasses.replace(world[0], storage=storage), "search_1", None)
    with pytest.raises(BadInput, match=sentence):
        Run(dataclasses.replace(settings, experiment="other", storage=storage), "00_data_and_base_model", data)
    assert not (settings.run_folder.parent / "other").exists()


def test_finalists_are_scored_anew_and_the_better_one_is_chosen(world, data, monkeypatch):
    """Scored again, the trial that won by luck falls behind the second."""
    settings, _ = world
    settings = dataclasses.replace(settings, search_finalists=3, classifier_seeds=2)
    honest, lucky = search_module.train_and_score_classifiers, []

    def score(run, train, seeds, splits, desc, searching, priority=0):
        scored = honest(run, train, seeds, splits, desc, searching, priority)
        if desc == f"finalist {lucky[0] if lucky else ''}" or (desc.startswith("finalist") and not lucky):
            lucky[:] = lucky or [int(desc.split()[1])]
            scored = {
                name: [dataclasses.replace(s, accuracy=s.accuracy - 0.5) for s in of] for name, of in scored.items()
            }
        return {name: of * len(seeds) for name, of in scored.items()}

    monkeypatch.setattr(search_module, "train_and_score_classifiers", score)
    found, _ = searched(settings, data)
    assert len(found["finalists"]) == 3 and found["best"] == found["finalists"][0]
    best_value = max(t["value"] for t in found["trials"] if t["state"] == "complete")
    assert found["finalists"][-1]["value"] == best_value and found["best"]["number"] != lucky[0]
    assert len(found["best"]["again"]["accuracy"]) == 2


def test_a_known_config_is_a_finalist_and_can_win(world, data):
    """Where the trials found nothing as good as what the steps before arrived at."""
    settings = dataclasses.replace(world[0], search_finalists=2, classifier_seeds=2)
    known, run = config(8, 2.0, 50, 16), Run(settings, "02_first_search")
    far = (5.0, 7.5)  # away from UGS 2, where the best is
    found = run_search(run, a_search("search_2", 5, unet_epoch=1, known=known, guidance=far))
    run.lock.release()
    assert found["best"]["number"] == "known" and found["best"]["config"] == dataclasses.asdict(known)
    assert len(found["finalists"]) == 3


def test_all_trials_use_the_same_noise(world, data, monkeypatch):
    seeds = []
    make = search_module.generate_set
    monkeypatch.setattr(
        search_module,
        "generate_set",
        lambda run, config, count, seed, **more: seeds.append(seed) or make(run, config, count, seed, **more),
    )
    searched(world[0], data, 4)
    assert len(set(seeds)) == 1


def test_ranges_of_both_searches(settings):
    s = dataclasses.replace(
        settings, search_min_inference_steps=5, search_max_inference_steps=50, class_encoder_epochs=50, unet_epochs=10
    )
    assert first_search_space(s) == space((5, 50), (0.0, 7.5), (1, 50))
    assert final_search_space(s, config(31, 1.75, 30)) == space((5, 31), (0.0, 3.5), (1, 10))
    assert final_search_space(s, config(5, 0.0, 30)) == space((5, 5), (0.0, 0.0), (1, 10))


def test_degenerate_ranges_are_searched(world, data):
    """IS* = 5 and UGS* = 0 leave one value each: only the epoch varies."""
    settings, _ = world
    run = Run(settings, "02_first_search")
    found = run_search(run, a_search("search_2", 6, steps=(5, 5), guidance=(0.0, 0.0)))
    assert {(t["params"]["num_inference_steps"], t["params"]["guidance_scale"]) for t in found["trials"]} == {(5, 0.0)}
    run.lock.release()


def test_a_study_of_other_checkpoints_is_refused(world, data, tmp_path):
    """A storage outlives the experiment's folder: its trials are of weights that are gone."""
    settings = dataclasses.replace(world[0], storage=f"sqlite:///{tmp_path}/shared.db")
    searched(settings, data, 3)
    elsewhere = dataclasses.replace(settings, runs_root=str(tmp_path / "new"), search_startup_trials=3)
    with pytest.raises(BadInput, match="begun with other settings or checkpoints"):
        searched(elsewhere, data, 3)


def test_a_study_of_another_run_folder_is_refused(world, data, tmp_path):
    """Its trials' images lie there: two folders would take the same trials."""
    settings = dataclasses.replace(world[0], storage=f"sqlite:///{tmp_path}/shared.db")
    searched(settings, data, 3)
    (settings.run_folder / "metrics" / "search_1.json").unlink()
    (settings.run_folder / ".locks" / "folder").write_text("as in a folder of its own")
    with pytest.raises(BadInput, match="of another run folder: give the experiment another name"):
        searched(settings, data, 3)


def test_a_trial_that_nobody_was_told_of_is_not_exported(world, data):
    """A database that was away may have kept it."""
    found, run = searched(world[0], data, 3)
    study = open_study(run.settings, "search_1", new_pruner(run.settings))
    study.ask()
    exported = export_search(study, run.settings, space(), found["finalists"])
    assert exported["trials"] == found["trials"] and len(study.get_trials()) == 4


def test_a_finished_search_is_loaded(world, data):
    settings, log = world
    first, _ = searched(settings, data, 3)
    count = len(log["scored"])
    assert searched(settings, data, 3)[0] == first and len(log["scored"]) == count


def test_a_finished_search_is_extended(world, data, tmp_path):
    """More trials than a finished search has: the same as if it had had so many from the start."""
    settings, _ = world
    whole, _ = searched(dataclasses.replace(settings, runs_root=str(tmp_path / "whole")), data, 6)
    searched(settings, data, 4)
    (settings.run_folder / "metrics/search_1.json").unlink()  # `Run` moves it aside: tests/test_field_runs.py
    extended, _ = searched(settings, data, 6)
    strip = lambda found: [{k: v for k, v in t.items() if k != "trial_seconds"} for t in found["trials"]]  # noqa: E731
    assert strip(extended) == strip(whole) and extended["best"] == whole["best"]
