"""Several processes at one search: none takes another's trial, one that dies loses nothing, and the searches end."""

import json
import os
import signal
import sqlite3
import subprocess
import time

import pytest
import yaml
from conftest import BIN, ENVIRONMENT, SMOKE, command

from sdlab.runs.verify import verify
from sdlab.settings import Settings

TRIALS = 10


@pytest.fixture
def file(tmp_path):
    """Smoke depth with a longer first search."""
    given = yaml.safe_load(SMOKE.read_text()) | dict(
        runs_root=str(tmp_path / "runs"), reports_root=str(tmp_path / "reports"), search_1_trials=TRIALS
    )
    (tmp_path / "smoke.yaml").write_text(yaml.safe_dump(given))
    return tmp_path / "smoke.yaml"


def started(*arguments):
    command = list(map(str, (BIN / "sdlab", *arguments)))
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def trials(database, study="smoke-search_1"):
    """(number, state, process that ended it) of each trial so far."""
    if not database.exists():
        return []
    try:
        with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
            return connection.execute(
                "select number, state, (select value_json from trial_user_attributes a where a.trial_id = t.trial_id and key = 'process')"
                " from trials t join studies s on s.study_id = t.study_id where study_name = ? order by number",
                (study,),
            ).fetchall()
    except sqlite3.OperationalError:  # not made yet
        return []


def wait_for(condition, seconds=300):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until
        time.sleep(0.1)
    return found


def test_workers_share_a_search_and_one_that_is_killed_loses_nothing(file, tmp_path):
    database = tmp_path / "runs" / "smoke" / "searches.db"
    workers = [started("work", file) for _ in range(2)]
    run = started("run", file, "--until", "02")
    try:
        ended = wait_for(lambda: [w for w in workers if any(f'"{w.pid} ' in (p or "") for *_, p in trials(database))])
        wait_for(lambda: any(state == "RUNNING" for _, state, _ in trials(database)))
        os.killpg(ended[0].pid, signal.SIGKILL)
        out, err = run.communicate(timeout=300)
        assert run.returncode == 0, out + err
    finally:
        for process in (run, *workers):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    found = trials(database)
    assert [number for number, *_ in found] == list(range(TRIALS))
    assert {state for _, state, _ in found} <= {"COMPLETE", "PRUNED"} and len({p for *_, p in found}) >= 2
    export = json.loads((database.parent / "metrics" / "search_1.json").read_text())
    assert len(export["trials"]) == TRIALS
    assert verify(Settings.from_file(file))[0] == []


def test_a_worker_of_a_finished_run_has_nothing_to_do(finished):
    world, _ = finished
    done = command(BIN / "sdlab", "work", world / "smoke.yaml")
    assert done.returncode == 0 and done.stdout == "" and "waiting" not in done.stderr


def test_a_worker_with_other_settings_is_refused(finished):
    world, _ = finished
    done = command(BIN / "sdlab", "work", world / "smoke.yaml", "-p", "search_images", "60")
    assert done.returncode == 1 and "search_images 40 -> 60" in done.stderr and "Traceback" not in done.stderr
