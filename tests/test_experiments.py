"""Every parameter file through all nine notebooks at smoke depth, on small files in the true formats and small SD-shaped models."""

import dataclasses
import functools
import logging
import re

import in_process  # noqa: F401  (registers papermill's engine)
import pandas as pd
import papermill
import pytest
import yaml
from conftest import SMOKE
from make_data import write_cifar, write_folder, write_medmnist
from test_base_models import saved_as

from sdlab.data import named_datasets as official
from sdlab.data.datasets import dataset_facts
from sdlab.paths import PARAMS, PROJECT_ROOT
from sdlab.report.paper import DATASETS
from sdlab.runs.files import read_json
from sdlab.runs.stages import PIPELINE, STAGES, stage_state
from sdlab.settings import Settings
from sdlab.tools import measuring
from sdlab.tools.planning import workload

NOTEBOOKS = PROJECT_ROOT / "notebooks"
# Of seven files in a row: less than smoke.yaml's.
DEPTH = dict(
    search_1_trials=3,
    search_2_trials=2,
    search_images=20,
    search_first_images=10,
    shard_size=10,
    classifier_train_steps=2,
)
KEPT = ("experiment", "dataset", "base_model", "image_size", "base_image_size")  # what smoke.yaml does not decide here


def smoke(tmp_path, base_model, **more) -> dict:
    depth = {name: value for name, value in yaml.safe_load(SMOKE.read_text()).items() if name not in KEPT}
    where = {name: str(tmp_path / name) for name in ("data_root", "runs_root", "reports_root")}
    return depth | DEPTH | where | dict(base_model=str(base_model), base_image_size=16) | more


def run_all(settings: Settings, tmp_path, until: str = "08") -> None:
    logging.getLogger("papermill").setLevel(logging.ERROR)
    for step in (step for step in STAGES.values() if step.number <= until):
        papermill.execute_notebook(
            NOTEBOOKS / f"{step.stem}.ipynb", None, parameters=settings.as_dict(), engine_name="in-process", progress_bar=False,
        )  # fmt: skip


@pytest.fixture(autouse=True)
def no_bars(monkeypatch):
    monkeypatch.setenv("SDLAB_PROGRESS_FILE_ONLY", "1")
    monkeypatch.setattr(measuring, "SECONDS", 0.05)  # the plan's counts are tested here, not its times


@pytest.mark.parametrize("name", [*DATASETS, "retinamnist-tiny"])
def test_every_parameter_file_runs_all_notebooks(name, tmp_path, monkeypatch, base_folder, v_base_folder):
    dataset = name.removesuffix("-tiny")
    if dataset.startswith("cifar"):
        kind = write_cifar(tmp_path / "data_root", dataset, per_batch=20)
        monkeypatch.setattr(official, "cifar", functools.partial(official.cifar, kind=kind, validation=20))
    else:
        table = {dataset: write_medmnist(tmp_path / "data_root", dataset)}
        monkeypatch.setattr(official, "medmnist", functools.partial(official.medmnist, table=table))
    base_model = v_base_folder if dataset in ("cifar10", "bloodmnist") else base_folder
    if name == "cifar100":
        base_model = saved_as(base_folder, tmp_path / "sharded", dict(variant="fp16", half=True, max_shard_size="50KB"))
    precision = {"pathmnist": "bfloat16", "dermamnist": "float16"}.get(name, "auto")
    settings = Settings.from_file(PARAMS / f"{name}.yaml", **smoke(tmp_path, base_model, precision=precision))
    run_all(settings, tmp_path)
    assert [stage_state(settings, number).state for number in PIPELINE] == ["done"] * len(PIPELINE)
    first = pd.read_csv(settings.report_folder / "table_1.csv")
    assert set(first.protocol) == {"sealed" if name.endswith("-tiny") else "paper"} and set(first.dataset) == {dataset}
    assert (first.cas - first.paper - first.difference).abs().max() < 1e-3 and first.paper.notna().all()
    kept = read_json(settings.run_folder / "metrics" / "data.json")
    assert kept["prediction_type"] == ("v_prediction" if base_model == v_base_folder else "epsilon")
    assert set(kept["base_sha256"]) and kept["counts"]["train"]
    check_plan(settings, sum(kept["counts"]["train"]))


def check_plan(settings: Settings, training_images: int) -> None:
    """What was planned is what was done."""
    rows = read_json(settings.run_folder / "metrics" / "plan.json")["rows"]
    for number, part in (("01", "class_encoder"), ("03", "unet")):
        history = read_json(settings.run_folder / part / "history.json")["epochs"]
        assert rows[number]["steps"] == sum(epoch["train_steps"] for epoch in history)
    assert rows["05"]["images"] == settings.scaling_max * training_images
    facts = dataclasses.replace(dataset_facts(settings), train=training_images)
    most = workload(settings, facts, most=True)
    for number, search in (("02", "search_1"), ("04", "search_2")):
        found = read_json(settings.run_folder / "metrics" / f"{search}.json")
        scored_anew = settings.search_images * len(found["finalists"])
        assert most[number]["images"] == found["images"]["without_pruning"] + scored_anew + settings.search_images
        rungs = sum(len(trial["intermediate"]) for trial in found["trials"])
        assert (
            most[number]["trial images"]
            >= rungs * settings.search_classifier_seeds * settings.classifier_train_steps * 32
        )


def test_a_folder_of_your_own_runs_all_notebooks(tmp_path, base_folder):
    """One line names it; its images and splits are kept by the first notebook."""
    folder = write_folder(tmp_path / "pets", 30, ("cat", "dog", "emu"), size=40)
    mine = dict(experiment="mine", dataset=str(folder), image_size=28)
    settings = Settings.from_mapping(smoke(tmp_path, base_folder) | mine)
    run_all(settings, tmp_path)
    assert [stage_state(settings, number).state for number in PIPELINE] == ["done"] * len(PIPELINE)
    assert (settings.run_folder / "data" / "splits.csv").exists()
    text = (settings.report_folder / "table_2.md").read_text()
    assert re.search(r"\| pets +\| mine", text) and str(tmp_path) not in text
    assert str(tmp_path) not in (settings.run_folder / "metrics" / "data.json").read_text()


def test_a_tiny_folder_runs_its_first_notebooks(tmp_path, base_folder):
    """Five images a class: three of each to train on, fewer than the notebooks' figures show."""
    folder = write_folder(tmp_path / "few", 5)
    settings = Settings.from_mapping(
        smoke(tmp_path, base_folder) | dict(experiment="few", dataset=str(folder), image_size=8)
    )
    run_all(settings, tmp_path, until="01")
    assert [stage_state(settings, number).state for number in ("00", "01")] == ["done"] * 2
