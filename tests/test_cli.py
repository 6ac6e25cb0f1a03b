"""The command line: one sentence and exit code 1 for bad input, and nothing written."""

import dataclasses
import errno
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.error import URLError

import nbformat
import papermill
import pytest
import yaml
from click.testing import CliRunner
from conftest import SMOKE

from sdlab.data.datasets import load_dataset
from sdlab.paths import PARAMS, PROJECT_ROOT
from sdlab.runs.files import write_json
from sdlab.runs.run import Run
from sdlab.runs.stages import STAGES
from sdlab.settings import Settings
from sdlab.tools import cli as cli_module
from sdlab.tools import execution
from sdlab.tools.cli import cli
from sdlab.tools.planning import make_plan


def invoke(*arguments):
    return CliRunner().invoke(cli, list(map(str, arguments)))


@pytest.fixture
def file(tmp_path):
    """A parameter file whose runs would go to tmp_path/runs."""

    def write(**more):
        given = (
            yaml.safe_load(SMOKE.read_text())
            | dict(runs_root=str(tmp_path / "runs"), reports_root=str(tmp_path / "reports"))
            | more
        )
        path = tmp_path / "given.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in given.items() if v is not None}))
        return path

    return write


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (dict(unet_epoch=3), "id you mean `unet_epochs`"),
        (dict(experiment=None), "name no `experiment`"),
        (dict(unet_learning_rate="1e-4"), "without quotes"),
        (dict(search_max_guidance_scale=-1), "`search_max_guidance_scale` is -1.0"),
        (dict(search_min_inference_steps=0), "`search_min_inference_steps` is 0"),
        (dict(search_1_max_epoch=9), "epochs 1 to 2"),
        (dict(dataset="digit"), "Did you mean `digits`"),
        (dict(protocol="open"), "allowed are 'sealed', 'paper'"),
    ],
)
def test_bad_parameters(file, tmp_path, more, said):
    done = invoke("run", file(**more))
    assert done.exit_code == 1 and said in done.output and done.output.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["retinamnist", "cifar10"])
def test_data_that_cannot_be_fetched_stop_a_run_before_its_first_notebook(tmp_path, monkeypatch, name):
    """Which file, from where, into which folder."""

    def no_network(url, **_):
        raise URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    where = [v for n in ("data_root", "runs_root", "reports_root") for v in ("-p", n, tmp_path / n)]
    done = invoke("run", name, *where)
    said = {"retinamnist": "retinamnist.npz", "cifar10": "cifar-10-python.tar.gz"}[name]
    assert done.exit_code == 1 and done.output.count("\n") == 1
    assert f"{said} of {name} is not in {tmp_path / 'data_root'} and could not be fetched from http" in done.output
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "digitz"), "Did you mean `digits`"),
        (("run", "digits", "-p", "unet_epoch", "3"), "id you mean `unet_epochs`"),
        (("run", "digits", "--until", "12"), "notebooks are 00, 01"),
        (("status", "nowhere.yaml"), "no parameter file"),
        (("settings", "unet_epoch"), "id you mean `unet_epochs`"),
    ],
)
def test_bad_arguments(arguments, said):
    done = invoke(*arguments)
    assert done.exit_code == 1 and said in done.output and "Traceback" not in done.output


def test_no_password_and_no_path_of_this_machine_stay_in_an_executed_copy(file, tmp_path):
    """However a notebook's file writes them: as they are in outputs, escaped in the parameters that papermill writes."""
    storage, settings = 'postgresql://me:gehe"im\\ß@host/x', Settings.from_file(file())
    settings = dataclasses.replace(settings, storage=storage)
    folder = tmp_path / "für {mich}"
    for made in (folder, settings.run_folder):
        made.mkdir(parents=True)
    output = folder / "00_data_and_base_model.ipynb"
    cells = [
        nbformat.v4.new_code_cell("storage = ''", metadata=dict(tags=["parameters"])),
        nbformat.v4.new_code_cell("", outputs=[nbformat.v4.new_output("stream", text=f"{storage}, {folder}/x, {PROJECT_ROOT}")]),
    ]  # fmt: skip
    notebook = nbformat.v4.new_notebook(
        cells=cells, metadata=dict(kernelspec=dict(name="python3", language="python", display_name="x"))
    )
    nbformat.write(notebook, output)
    given = dict(storage=storage, runs_root=f"{folder}/runs")
    papermill.execute_notebook(
        execution.unformatted(output), execution.unformatted(output), given, prepare_only=True, progress_bar=False
    )
    text = execution.save_executed_copy(settings, STAGES["00"], output).read_text()
    assert all(word not in text for word in ("gehe", "f\\\\xfcr", "für", str(PROJECT_ROOT)))
    _, injected, shown = nbformat.reads(text, 4).cells
    assert 'storage = "(storage)"' in injected.source and 'runs_root = "runs"' in injected.source
    assert shown.outputs[0].text == "(storage), x, ."


def test_a_full_disk_under_what_is_printed_is_said():
    """The system names no file: a running notebook in the temporary folder, or this command's output into a log."""
    said = cli_module.describe_error(OSError(errno.ENOSPC, "No space left on device"), "run")
    assert said.startswith(
        f"{tempfile.gettempdir()}, or where this command prints to, cannot be written (No space left"
    )


def test_the_dashboard_needs_a_search(file):
    done = invoke("dashboard", file())
    assert done.exit_code == 1 and "run 02_first_search first" in done.output


def test_status_of_nothing(file, tmp_path):
    done = invoke("status", file())
    assert done.exit_code == 0 and done.output.count("not run") == len(STAGES) and "can run" in done.output
    assert not (tmp_path / "runs").exists()


def test_every_setting_is_listed():
    listed = invoke("settings").output
    assert all(f"\n{name} " in "\n" + listed for name in Settings.__dataclass_fields__)


def test_every_parameter_file_is_valid_and_named_after_its_experiment():
    files = sorted(PARAMS.glob("*.yaml"))
    assert "digits" in [path.stem for path in files]
    for path in files:
        assert Settings.from_file(path).experiment == path.stem


def test_a_parameter_file_says_only_what_deviates():
    for path in PARAMS.glob("*.yaml"):
        given = yaml.safe_load(path.read_text())
        same = [
            name
            for name in given
            if name in Settings.__dataclass_fields__ and given[name] == Settings.__dataclass_fields__[name].default
        ]
        assert not same, f"{path.name}: {same} are the defaults"


def test_help_is_quick_and_imports_nothing_slow():
    code = (
        "import sys, sdlab.tools.cli; sys.exit(bool({'torch', 'pandas', 'sqlalchemy', 'optuna'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT).returncode == 0
    assert "EXPERIMENT is a name in params/" in invoke("--help").output


def test_a_terminal_sees_a_bar_of_what_the_notebook_is_at(tmp_path, capsys):
    """From the first second on; an older file's numbers are not taken for this run's."""
    path = tmp_path / "progress.json"
    write_json(path, dict(desc="old", n=1, total=2, unit="step", rate=1.0, time=0.0))
    watcher = execution.Watcher(path, "01_class_encoder")
    watcher.on_terminal = True
    with watcher:
        time.sleep(0.7)
        write_json(path, dict(desc="train", n=7, total=20, unit="step", rate=1.0, time=time.time()))
        time.sleep(0.8)
    seen = capsys.readouterr().err
    assert "01_class_encoder: starting" in seen and "01_class_encoder: train" in seen and "7/20" in seen
    assert "old" not in seen


def test_a_kept_plan_is_shown_for_its_own_settings_only(file, tmp_path, monkeypatch):
    """Neither the plan of another base model nor what another experiment took."""
    settings = Settings.from_file(file())
    kept = make_plan(settings, load_dataset(settings).facts())
    write_json(settings.run_folder / "metrics" / "plan.json", kept)
    shown = invoke("plan", file())
    assert shown.exit_code == 0 and "The plan that the first notebook made" in shown.output
    assert "05_scaling" in shown.output and "2,000" in shown.output  # x2 of digits' 1000
    other = invoke("plan", file(), "-p", "scaling_max", "3")
    assert other.exit_code == 0 and "first notebook made" not in other.output and "3,000" in other.output


def test_time_of_an_attempt_that_was_cut_counts(file):
    """A long run is a run that was resumed."""
    settings = Settings.from_file(file())
    first = Run(settings, "00_data_and_base_model")
    started = first.record.opened_at
    first.lock.release()
    said = dict(time=started + 100.0, stage="00_data_and_base_model")
    write_json(settings.run_folder / "progress.json", said)
    again = Run(settings, "00_data_and_base_model")
    assert again.record.seconds == pytest.approx(100.0)
    again.lock.release()
    finished = dataclasses.replace(again.record, finished="2026-12-01T00:00:00+00:00")
    assert again.lost_seconds(finished) == 0  # then the file is of a later stage
    write_json(settings.run_folder / "progress.json", said | dict(stage="08_verdict"))
    assert again.lost_seconds(again.record) == 0  # an audit was interrupted, then another stage


@pytest.mark.parametrize(
    ("name", "usage"),
    [
        ("run", "[OPTIONS] EXPERIMENT"),
        ("export", "[OPTIONS] EXPERIMENT TARGET"),
        ("repair", "[OPTIONS] EXPERIMENT PATH"),
        ("verify", "[OPTIONS] EXPERIMENT"),
    ],
)
def test_arguments_come_in_the_order_that_the_readme_gives(name, usage):
    assert CliRunner().invoke(cli, [name, "--help"]).output.splitlines()[0].endswith(f"{name} {usage}")


def test_a_kernels_home_is_emptied_first_and_gone_afterwards(settings):
    """What a killed one left there too; and the temporary folder is then what it was."""
    before = tempfile.gettempdir()
    with execution.scratch(settings) as folder:
        (folder / "left").write_text("by one that was killed")
        kept = folder.rename(folder.with_name(f"{folder.name}-kept"))
    kept.rename(folder)
    with execution.scratch(settings) as again:
        assert again == folder and list(folder.iterdir()) == [] and tempfile.gettempdir() == str(folder)
        with tempfile.NamedTemporaryFile(suffix=".json") as noted:
            assert Path(noted.name).parent == folder
    assert not folder.exists() and tempfile.gettempdir() == before


@pytest.mark.parametrize("debug", [False, True])
def test_an_error_of_our_own_is_one_sentence_too(monkeypatch, debug):
    def breaks(*_):
        raise KeyError("x")

    monkeypatch.setattr(cli_module, "stage_state", breaks)
    done = CliRunner().invoke(cli, ["--debug"] * debug + ["status", "digits"])
    assert done.exit_code == 1
    if debug:
        assert isinstance(done.exception, KeyError)
    else:
        said = "Error: This should not have happened (KeyError: 'x'): `sdlab --debug status ...` shows where"
        assert done.stderr.startswith(said) and len(done.stderr.splitlines()) == 1
