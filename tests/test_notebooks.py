"""All nine notebooks at smoke depth, in order, through papermill; and each of the ways they can go wrong."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import nbformat
import pytest
import yaml
from conftest import BIN, ENVIRONMENT, command

from sdlab.paths import PROJECT_ROOT
from sdlab.runs.locks import Lock
from sdlab.runs.stages import PIPELINE, State, stage_state
from sdlab.settings import Settings


def settings_of(world) -> Settings:
    return Settings.from_file(world / "smoke.yaml")


def test_a_notebook_before_its_upstream_says_which_to_run(world, tmp_path):
    """Plain papermill: the sentence is the last line, the exit code is not 0, and nothing is written under runs/."""
    out = tmp_path / "too_early.ipynb"
    done = command(
        BIN / "papermill", PROJECT_ROOT / "notebooks/06_importance.ipynb", out, "-f", world / "smoke.yaml",
        "-p", "runs_root", tmp_path / "runs", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert (
        "06_importance reads what 02_first_search writes, which is not run" in last
        and "run 02_first_search first" in last
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        (dict(experiment="smoke", unet_epoch=3), "id you mean `unet_epochs`"),
        (dict(unet_epochs=3), "injected parameters name no `experiment`"),
        (dict(experiment="smoke", dataset="digits", unet_learning_rate="1e-4"), "Write 0.0001 without quotes"),
    ],
)
def test_bad_parameters_through_plain_papermill(tmp_path, parameters, said):
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(parameters))
    done = command(
        BIN / "papermill",
        PROJECT_ROOT / "notebooks/07_paper_tables.ipynb",
        tmp_path / "bad.ipynb",
        "-f",
        tmp_path / "bad.yaml",
        cwd=tmp_path,
    )
    assert done.returncode != 0 and said in done.stderr.strip().splitlines()[-1]
    assert not (PROJECT_ROOT / "runs" / "smoke").exists()


def test_the_whole_pipeline_runs_and_prints_its_tables(finished):
    world, done = finished
    assert [stage_state(settings_of(world), n).state for n in PIPELINE] == [State.DONE] * len(PIPELINE)
    assert "Table 1" in done.stdout and "Table 2" in done.stdout and "9 notebooks in" in done.stdout
    assert "Figures:" in done.stdout and "figure_1.png" in done.stdout
    assert "Traceback" not in done.stderr


def test_every_step_writes_what_its_notebook_promises(finished):
    world, _ = finished
    run, reports = world / "runs/smoke", world / "reports/smoke"
    for name in ("settings.yaml", "latents/train.npz", "class_encoder/epoch_02", "unet/epoch_02", "searches.db", "metrics/search_1.json",
                 "metrics/search_2.json", "metrics/after_1.json", "metrics/after_4.json", "metrics/real.json", "metrics/x02.json",
                 "metrics/ceiling.json", "metrics/round_trips.json", "metrics/importance.json", "test_readings.jsonl", "notebooks/07_paper_tables.ipynb"):  # fmt: skip
        assert (run / name).exists(), name
    for table in ("table_1", "table_2"):
        assert all((reports / f"{table}.{kind}").stat().st_size for kind in ("md", "csv", "tex"))
    assert (reports / "figure_1.png").exists() and len(list(reports.glob("*.ipynb"))) == 9
    assert not list(run.rglob("*.part"))


def test_executed_copies_show_results_and_no_machines_path(finished):
    world, _ = finished
    for path in (world / "reports/smoke").glob("*.ipynb"):
        text = path.read_text()
        assert str(PROJECT_ROOT) not in text
        outputs = [o for c in nbformat.read(path, 4).cells for o in c.get("outputs", [])]
        assert outputs and not [o for o in outputs if o.output_type == "error"]


def test_the_test_set_was_read_for_the_tables_alone(finished):
    """Sealed: Table 1's four cells; real, x1, x2 of Table 2, with the VAE's round trips; the verdict's two controls."""
    world, _ = finished
    readings = [json.loads(line) for line in (world / "runs/smoke/test_readings.jsonl").read_text().splitlines()]
    assert len(readings) == 10 and {r["stage"][:2] for r in readings} == {"01", "02", "03", "04", "05", "08"}
    assert json.loads((world / "runs/smoke/metrics/search_1.json").read_text())["protocol"] == "sealed"


def test_table_1_is_scored_afresh(finished):
    """Other noise than the search's: another set, so another folder, than the trial that won."""
    world, _ = finished
    metrics = world / "runs/smoke/metrics"
    assert (
        json.loads((metrics / "after_2.json").read_text())["config"]
        == json.loads((metrics / "search_1.json").read_text())["best"]["config"]
    )
    manifests = [json.loads(p.read_text())["plan"] for p in (world / "runs/smoke/synthetic").glob("*/manifest.json")]
    assert len({m["seed"] for m in manifests}) == 5  # searches, finalists, Table 1, Table 2, the trial by hand


def test_running_again_skips_everything(finished):
    world, _ = finished
    before = {p: p.stat().st_mtime_ns for p in (world / "runs").rglob("*") if p.is_file()}
    done = command(BIN / "sdlab", "run", world / "smoke.yaml")
    assert (
        done.returncode == 0 and done.stdout.count("finished before, skipped") == 9 and "0 notebooks in" in done.stdout
    )
    assert before == {p: p.stat().st_mtime_ns for p in (world / "runs").rglob("*") if p.is_file()}


def test_other_settings_than_a_finished_steps_are_refused(finished):
    world, _ = finished
    done = command(BIN / "sdlab", "run", world / "smoke.yaml", "-p", "unet_epochs", "3")
    assert done.returncode == 1
    assert (
        "03_fine_tuning is stale" in done.stderr
        and "unet_epochs 2 -> 3" in done.stderr
        and "Traceback" not in done.stderr
    )
    status = command(BIN / "sdlab", "status", world / "smoke.yaml", "-p", "unet_epochs", "3").stdout
    assert "unet_epochs 2 -> 3" in status and "03_fine_tuning is stale" in status and status.count(" done ") == 3


def test_a_finished_notebook_opens_again_from_any_folder(finished, tmp_path):
    """As a reader would: plain papermill, elsewhere, on a stage that is done; it shows its results and changes nothing."""
    world, _ = finished
    record = (world / "runs/smoke/records/05.json").read_bytes()
    out = tmp_path / "again.ipynb"
    done = command(
        BIN / "papermill", PROJECT_ROOT / "notebooks/05_scaling.ipynb", out, "-f", world / "smoke.yaml", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert (world / "runs/smoke/records/05.json").read_bytes() == record


def test_a_damaged_checkpoint_stops_with_its_name_and_the_failing_notebook_is_kept(finished, tmp_path):
    """Truncated to its old size by a byte flip, so that only the hash can tell."""
    world, _ = finished
    shutil.copytree(world / "runs", tmp_path / "runs")
    run = tmp_path / "runs/smoke"
    for name in ("03", "04", "05", "06", "07"):
        (run / f"records/{name}.json").unlink()
    (run / "metrics/after_3.json").unlink()
    (run / "notebooks/03_fine_tuning.ipynb").unlink()
    shutil.rmtree(run / "unet")
    epoch = json.loads((run / "metrics/search_1.json").read_text())["best"]["config"]["class_encoder_epoch"]
    weights = run / f"class_encoder/epoch_{epoch:02d}/diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    done = command(
        BIN / "sdlab",
        "run",
        world / "smoke.yaml",
        "-p",
        "runs_root",
        tmp_path / "runs",
        "-p",
        "reports_root",
        tmp_path / "reports",
    )
    assert done.returncode == 1 and f"epoch_{epoch:02d} is damaged" in done.stderr and "Traceback" not in done.stderr
    outputs = [o for c in nbformat.read(run / "notebooks/03_fine_tuning.ipynb", 4).cells for o in c.get("outputs", [])]
    assert any(o.output_type == "error" and "is damaged" in o.evalue for o in outputs)


def kernels_of(pid: int) -> int:
    """How many notebook kernels a process has started that are still there."""
    count = 0
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            started = f"JPY_PARENT_PID={pid}\0".encode() in (path / "environ").read_bytes()
            count += started and b"ipykernel_launcher" in (path / "cmdline").read_bytes()
    return count


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks at processes as Linux shows them")
def test_an_interrupted_run_says_so_leaves_no_kernel_and_goes_on(world, tmp_path):
    """Ctrl-C at the terminal reaches the whole process group."""
    where = ("-p", "runs_root", tmp_path / "runs", "-p", "reports_root", tmp_path / "reports", "--until", "01")
    arguments = [str(a) for a in (BIN / "sdlab", "run", world / "smoke.yaml", *where)]
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True,
        # A shell's background jobs ignore Ctrl-C, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    for _ in range(1200):
        if (tmp_path / "runs/smoke/class_encoder/epoch_01").exists():
            break
        time.sleep(0.1)
    assert kernels_of(process.pid) == 1
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "Stopped during 01_class_encoder: the same command resumes" in err
    assert "Traceback" not in err
    for _ in range(100):
        if not kernels_of(process.pid):
            break
        time.sleep(0.1)
    assert not kernels_of(process.pid)
    done = command(*arguments)
    assert done.returncode == 0 and "00_data_and_base_model   finished before, skipped" in done.stdout


def test_a_run_that_is_refused_leaves_the_folder_as_it_was(finished):
    """Another process uses it."""
    world, _ = finished
    run = world / "runs/smoke"
    record = run / "records/06.json"
    kept = record.read_bytes()
    record.unlink()
    before = {p: p.read_bytes() for p in (world / "runs").rglob("*") if p.is_file() and p.name != ".lock"}
    lock = Lock(run / ".lock", run, "somebody else")
    done = command(BIN / "sdlab", "run", world / "smoke.yaml")
    lock.release()
    assert done.returncode == 1 and "in use by somebody else" in done.stderr
    assert before == {p: p.read_bytes() for p in (world / "runs").rglob("*") if p.is_file() and p.name != ".lock"}
    record.write_bytes(kept)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("base_model", "tiney", "has to be `tiny`"), ("scheduler", "DDIM", "class name of a diffusers scheduler")],
)
def test_an_unknown_base_model_or_scheduler_writes_nothing(world, tmp_path, name, value, said):
    done = command(BIN / "sdlab", "run", world / "smoke.yaml", "-p", name, value, "-p", "runs_root", tmp_path / "runs")
    assert done.returncode == 1 and said in done.stderr and not (tmp_path / "runs").exists()


def test_lost_reports_are_made_again(finished):
    world, _ = finished
    (world / "reports/smoke/table_1.md").unlink()
    done = command(BIN / "sdlab", "run", world / "smoke.yaml")
    assert done.returncode == 0 and "1 notebooks in" in done.stdout and (world / "reports/smoke/table_1.md").exists()
