"""What users' habits broke, from public reports: storages, raised numbers of trials, kernels, -p, moved data."""

import dataclasses
import functools
import json
import os
import shutil
import sqlite3
import sys
from pathlib import Path

import in_process  # noqa: F401  (registers papermill's engine)
import nbformat
import papermill
import pytest
import yaml
from click.testing import CliRunner
from conftest import SMOKE
from make_data import write_folder

from sdlab.data.datasets import load_dataset
from sdlab.errors import BadInput
from sdlab.paths import PARAMS
from sdlab.runs.files import read_hashed_json, read_json, write_hashed_json, write_json
from sdlab.runs.parameters import parameter_file
from sdlab.runs.records import OlderRun, read_record, record_path
from sdlab.runs.run import Run
from sdlab.runs.stages import PIPELINE, STAGES, Reason, State, check_stage, stage_state
from sdlab.runs.storage import check_storage, sqlite_file, storage_url
from sdlab.runs.studies import open_study, rename_study
from sdlab.runs.verify import verify
from sdlab.search import new_pruner
from sdlab.settings import Settings
from sdlab.tools import cli as cli_module
from sdlab.tools import execution
from sdlab.tools.cli import cli


class Content:
    """Stands for a data set or a base model."""

    def __init__(self, fingerprint):
        self.fingerprint = lambda: fingerprint


def finish_stages(settings, last="08", data=None, base=None):
    """Stages up to `last`, each with one result."""
    for number in STAGES:
        if number <= last and stage_state(settings, number).state != State.DONE:
            run = Run(settings, STAGES[number].stem, data and Content(data), base and Content(base))
            run.save_metrics(f"of_{number}", number)
            run.finish(run.metrics_path(f"of_{number}"))


def states(settings):
    return [stage_state(settings, number).state for number in PIPELINE]


def invoke(*arguments):
    return CliRunner().invoke(cli, list(map(str, arguments)))


@pytest.fixture
def file(settings, tmp_path):
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(settings.as_dict()))
    return tmp_path / "given.yaml"


# ------------------------------------------------------------------------------------------------------- storages


@pytest.mark.parametrize(
    ("storage", "file"),
    [
        ("", "{run}/searches.db"),
        ("sqlite:///my_study.db", "{run}/my_study.db"),
        ("sqlite:///a%20b.db?timeout=5", "{run}/a b.db"),
        ("sqlite+pysqlite:///my.db", "{run}/my.db"),
        ("sqlite:///../shared.db", "{run}/../shared.db"),
        ("sqlite:////srv/studies/x.db", "/srv/studies/x.db"),
        ("sqlite:///~/x.db", "{home}/x.db"),
        ("postgresql://127.0.0.1/x", None),
    ],
)
def test_a_storage_is_one_file_whatever_the_working_directory(settings, tmp_path, monkeypatch, storage, file):
    settings = dataclasses.replace(settings, storage=storage)
    monkeypatch.chdir(tmp_path)
    if file is None:
        assert sqlite_file(settings) is None and storage_url(settings) == storage
        return
    expected = Path(os.path.normpath(file.format(run=settings.run_folder, home=Path.home())))
    assert sqlite_file(settings) == expected
    driver, _, rest = storage_url(settings).partition(":///")
    assert driver == (storage.partition(":")[0] or "sqlite") and rest.startswith("/") and " " not in rest
    assert rest.endswith("?timeout=5") == storage.endswith("?timeout=5")


@pytest.mark.parametrize("storage", ["sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite:///file::memory:?uri=true", "sqlite3:///x"])  # fmt: skip
def test_a_storage_in_memory_is_refused(settings, storage):
    with pytest.raises(BadInput, match=r"The storage sqlite.* cannot be opened \(it names no file .*sqlite:///name.db"):
        check_storage(dataclasses.replace(settings, storage=storage))


def test_a_relative_storage_is_the_same_for_run_redo_dashboard_and_verify(settings, file, tmp_path, monkeypatch):
    """It was another file in each working directory: `--redo` renamed nothing and handed the old trials back as new."""
    settings = dataclasses.replace(settings, storage="sqlite:///my_study.db")
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    check_storage(settings)  # before there is a folder
    finish_stages(settings, "01")
    run = Run(settings, "02_first_search")
    study = open_study(settings, "search_1", new_pruner(settings))
    study.tell(study.ask(), 0.5)
    trial = dict(number=0, state="complete", params={}, intermediate={}, value=0.5)
    run.save_metrics("search_1", dict(study=study.study_name, trials=[trial]))
    run.finish(run.metrics_path("search_1"))
    monkeypatch.chdir(tmp_path / "there")
    assert verify(settings)[0] == []
    database = settings.run_folder / "my_study.db"
    with sqlite3.connect(database) as connection:
        connection.execute("update trial_values set value = 0.6")
    connection.close()
    assert [finding.path for finding in verify(settings)[0]] == ["my_study.db"]
    executed = []
    monkeypatch.setattr(os, "execv", lambda _, command: executed.extend(command))
    assert invoke("dashboard", file, "-p", "storage", settings.storage).exit_code == 0
    assert executed[1] == f"sqlite:///{database}"
    rename_study(settings, "search_1", "aside")
    assert open_study(settings, "search_1", new_pruner(settings)).trials == []
    assert [path for place in ("here", "there") for path in (tmp_path / place).iterdir()] == []


# --------------------------------------------------------------------------------------------------- more trials


def test_a_finished_search_opens_for_more_trials_and_what_came_after_it_is_stale(settings):
    finish_stages(settings, "03")
    more = dataclasses.replace(settings, search_1_trials=6)
    state = stage_state(more, "02")
    assert (state.state, state.reason) == (State.BEGUN, Reason.MORE_TRIALS) and "search_1_trials 4 -> 6" in state.why
    assert states(more)[:4] == [State.DONE, State.DONE, State.BEGUN, State.STALE] and verify(more)[0] == []
    with pytest.raises(BadInput, match=r"which is begun in .*: run 02_first_search first"):
        check_stage(more, "03")
    write_json(settings.run_folder / "metrics/search_1.json", "of 4 trials")
    run = Run(more, "02_first_search")
    assert not run.finished and not run.metrics_path("search_1").exists()  # else it would pass for the new result
    run.lock.release()
    assert [read_json(path) for path in run.folder.glob("aside/*/metrics/search_1.json")] == ["of 4 trials"]
    assert stage_state(more, "02").reason == Reason.INTERRUPTED
    finish_stages(more, "02")
    assert stage_state(more, "02").state == State.DONE and stage_state(more, "03").reason == Reason.UPSTREAM_REMADE
    with pytest.raises(BadInput, match="`sdlab run smoke --redo 03` makes it and the stages after it again"):
        check_stage(more, "03")


@pytest.mark.parametrize("changes", [dict(search_1_trials=3), dict(search_1_trials=6, search_startup_trials=3)])
def test_fewer_trials_or_another_change_make_a_search_stale(settings, changes):
    finish_stages(settings, "02")
    assert stage_state(dataclasses.replace(settings, **changes), "02").state == State.STALE
    with pytest.raises(BadInput, match=r"search_1_trials 4 -> .*undo the change"):
        Run(dataclasses.replace(settings, **changes), "02_first_search")


def test_an_extended_search_ends_as_one_that_was_as_long_from_the_start(tmp_path, monkeypatch):
    """Same trials, same optimum, same score after it."""
    monkeypatch.setattr(papermill, "execute_notebook", functools.partial(papermill.execute_notebook, engine_name="in-process"))  # fmt: skip

    def search(runs, until, trials):
        given = ("-p", "runs_root", tmp_path / runs, "-p", "search_1_trials", trials, "-p", "search_images", 20)
        done = invoke("run", SMOKE, *given, "--until", until)
        assert done.exit_code == 0, done.output
        return done

    search("short", "01", 2)
    shutil.copytree(tmp_path / "short", tmp_path / "long")
    search("short", "02", 2)
    assert "01_class_encoder         finished before, skipped" in search("short", "02", 4).output
    search("long", "02", 4)
    extended, whole = ({n: read_json(tmp_path / runs / "smoke/metrics" / f"{n}.json") for n in ("search_1", "after_2")} for runs in ("short", "long"))  # fmt: skip
    for result in (extended, whole):
        result["after_2"] = {k: v for k, v in result["after_2"].items() if "seconds" not in k}
        result["search_1"]["trials"] = [{k: v for k, v in t.items() if "seconds" not in k} for t in result["search_1"]["trials"]]  # fmt: skip
    assert extended == whole and len(whole["search_1"]["trials"]) == 4


# ------------------------------------------------------------------------------------------- kernels, parameters


def test_a_notebook_runs_in_this_python_and_is_told_the_parameter_files_lines_only(settings, tmp_path, monkeypatch):
    """Whatever kernels are installed: the first `python3` here is of an environment that was deleted."""
    kernel = tmp_path / "jupyter/kernels/python3/kernel.json"
    write_json(kernel, dict(argv=["/deleted/bin/python", "-m", "ipykernel_launcher", "-f", "{connection_file}"], display_name="x", language="python"))  # fmt: skip
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setattr(execution, "NOTEBOOKS", tmp_path)
    cells = [nbformat.v4.new_code_cell('experiment = "digits"', metadata=dict(tags=["parameters"])), nbformat.v4.new_code_cell("import sys\nprint(sys.executable)")]  # fmt: skip
    kernelspec = dict(name="python3", language="python", display_name="Python 3")
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=kernelspec)), tmp_path / "01_class_encoder.ipynb")  # fmt: skip
    settings.run_folder.mkdir(parents=True)
    execution.execute_notebook(settings, STAGES["01"])
    _, injected, shown = nbformat.read(settings.run_folder / "notebooks/01_class_encoder.ipynb", 4).cells
    assert shown.outputs[0].text.strip().endswith(Path(sys.executable).name)
    assert Path(sys.executable) == Path(execution.PROJECT_ROOT, shown.outputs[0].text.strip())
    names = [line.partition(" = ")[0] for line in injected.source.splitlines()[1:]]
    given = yaml.safe_load(SMOKE.read_text()).keys() | {"runs_root", "reports_root", "base_model"}
    assert {"experiment", "unet_epochs", "runs_root"} <= set(names) <= given


@pytest.mark.parametrize(("given", "more"), [("digits", {}), ("digits", dict(seed=3)), (SMOKE, {}), (SMOKE, dict(experiment="digits"))])  # fmt: skip
def test_a_notebook_reads_the_settings_that_the_command_line_has(given, more):
    """A parameter file of another folder may have the name of an experiment in params/, whose lines are not its own."""
    settings = Settings.from_file(parameter_file(str(given)) if more else given if given == SMOKE else PARAMS / "digits.yaml", **more)  # fmt: skip
    assert Settings.from_notebook(execution.injected_parameters(settings)) == settings


# ------------------------------------------------------------------------------------------------------------- -p


def test_verify_and_repair_take_p_and_print_it(settings, file, tmp_path):
    moved = dataclasses.replace(settings, runs_root=str(tmp_path / "elsewhere"))
    finish_stages(moved)
    given = (file, "-p", "runs_root", tmp_path / "elsewhere")
    assert invoke("verify", file).exit_code == 1 and invoke("verify", *given).exit_code == 0
    assert invoke("verify", moved.run_folder).exit_code == 0 and invoke("verify", moved.run_folder, "-p", "seed", 0).exit_code == 0  # fmt: skip
    (moved.run_folder / "metrics/of_05.json").write_text("{}")
    assert (
        f"sdlab repair {file} -p runs_root {tmp_path}/elsewhere metrics/of_05.json\n" in invoke("verify", *given).output
    )
    done = invoke("repair", *given, "metrics/of_06.json")
    assert done.exit_code == 1 and "`metrics/of_06.json` is not among what is wrong with" in done.output
    for name in ("run", "plan", "status", "verify", "repair", "export", "dashboard"):
        assert "-p, --parameter NAME VALUE" in invoke(name, "--help").output


# --------------------------------------------------------------------------------------------------- moved inputs


@pytest.fixture
def own(settings, tmp_path):
    """A run of a folder's images, finished."""
    settings = dataclasses.replace(settings, dataset=str(write_folder(tmp_path / "images", 8)))
    finish_stages(settings, data=load_dataset(settings).fingerprint())
    return settings, tmp_path / "images"


def test_a_data_set_that_was_moved_is_the_same(own, tmp_path):
    settings, folder = own
    moved = dataclasses.replace(settings, dataset=str(shutil.copytree(folder, tmp_path / "copied")))
    shutil.rmtree(folder)
    assert states(moved) == [State.DONE] * len(PIPELINE) and verify(moved)[0] == []
    assert Run(moved, "01_class_encoder", load_dataset(moved)).finished
    (next((tmp_path / "copied").rglob("*.png"))).unlink()
    other = dataclasses.replace(moved, num_threads=2)  # asked again, as by another process
    assert states(other) == [State.STALE] * len(PIPELINE) and "dataset" in stage_state(other, "00").why


def test_finished_results_open_without_their_data(own, tmp_path, monkeypatch):
    """Of a disk that is not mounted; by its old path and by another one."""
    settings, folder = own
    folder.rename(tmp_path / "unmounted")
    monkeypatch.setattr(cli_module, "is_published", lambda *_: True)
    monkeypatch.setattr(cli_module, "publish", lambda _: None)
    monkeypatch.setattr(cli_module, "show_tables", lambda _: None)
    for path in (folder, "/mnt/nothing/here"):
        gone = dataclasses.replace(settings, dataset=str(path))
        (tmp_path / "given.yaml").write_text(yaml.safe_dump(gone.as_dict()))
        assert invoke("status", tmp_path / "given.yaml").output.count(" done ") == len(PIPELINE)
        assert invoke("verify", tmp_path / "given.yaml").exit_code == 0
        done = invoke("run", tmp_path / "given.yaml")
        assert done.exit_code == 0 and done.output.count("finished before, skipped") == len(PIPELINE)
        assert all(Run(gone, STAGES[number].stem).finished for number in ("06", "07", "08"))
        refused = invoke("run", tmp_path / "given.yaml", "--redo", "05")
        assert refused.exit_code == 1 and "neither a known name nor a path that exists" in refused.output
    assert not (settings.run_folder / "aside").exists()


def test_another_data_set_under_the_same_name_is_stale(own):
    assert states(dataclasses.replace(own[0], dataset="digits"))[0] == State.STALE


def test_a_base_model_that_was_moved_is_the_same(settings, base, base_folder, tmp_path):
    finish_stages(settings, "01", base=base.fingerprint())
    moved = dataclasses.replace(settings, base_model=str(shutil.copytree(base_folder, tmp_path / "base")))
    assert states(moved)[:2] == [State.DONE] * 2
    weights = tmp_path / "base/scheduler/scheduler_config.json"
    write_json(weights, json.loads(weights.read_text()) | dict(beta_end=0.02))
    assert states(dataclasses.replace(moved, num_threads=2))[0] == State.STALE
    assert states(dataclasses.replace(settings, base_model="tiny"))[0] == State.STALE


# ---------------------------------------------------------------------------------------------- an older version's


def test_a_folder_of_an_earlier_version_is_refused_in_one_sentence(settings, file):
    finish_stages(settings, "00")
    path = record_path(settings, "00")
    record = read_hashed_json(path)
    names = dict(stage="step", environment="made_with", side_outputs="beside", earlier_environments="made_with_before")
    write_hashed_json(path, {names.get(name, name): value for name, value in record.items()})
    with pytest.raises(
        OlderRun, match="smoke was made by an earlier version of sdlab: give the experiment another name, or move"
    ):
        read_record(settings, "00")
    for name in ("status", "run", "verify"):
        done = invoke(name, file)
        assert done.exit_code == 1 and done.stderr.count("\n") == 1 and "by an earlier version of sdlab" in done.stderr
