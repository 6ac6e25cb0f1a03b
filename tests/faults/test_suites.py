"""The suites of kills and of disks that refuse, in short; `make faults` runs them long."""

import json
import os
import sys

import pytest
from conftest import command

from sdlab.paths import PROJECT_ROOT

FAULTS = PROJECT_ROOT / "tests" / "faults"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Both begin with the same undisturbed run."""
    return tmp_path_factory.mktemp("suites")


def test_stages_that_are_killed_end_as_if_they_had_not_been(folder):
    done = command(sys.executable, FAULTS / "kills.py", "--folder", folder, "--kills", 3, "--runs", 0)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in (folder / "kills.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and sum(not row["late"] for row in rows) >= 1
    again = command(sys.executable, FAULTS / "kills.py", "--folder", folder, "--kills", 3, "--runs", 0)  # resumes
    assert again.returncode == 0 and again.stdout.splitlines() == done.stdout.splitlines()[-4:]


def test_a_kill_that_changed_a_byte_would_show(folder):
    """The comparison itself: one bit of a shard."""
    state = folder / "kills.jsonl"
    if not state.exists():  # else the test above has made it
        command(sys.executable, FAULTS / "kills.py", "--folder", folder, "--kills", 1, "--runs", 0)
    state.write_text(state.read_text().splitlines()[0] + "\n")  # the suite continues with its second kill, of 01
    shard = sorted((folder / "after_01").rglob("shard_00000.safetensors"))[0]
    kept = shard.read_bytes()
    try:
        shard.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        done = command(sys.executable, FAULTS / "kills.py", "--folder", folder, "--kills", 2, "--runs", 0)
    finally:
        shard.write_bytes(kept)
    rows = [json.loads(line) for line in state.read_text().splitlines()]
    assert rows[1]["stage"] == "01" and len(rows[1]["differs"]) == 1 and done.returncode == 1


def test_disks_that_refuse_get_one_sentence_and_lose_nothing(folder):
    asked = ("--writes", 5, "--full", 2, "--read-only", 1)
    done = command(sys.executable, FAULTS / "refusals.py", "--folder", folder, *asked)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    last = done.stdout.splitlines()[-1]
    assert last.startswith("writes refused: 5 (") and last.endswith("; not as promised: 0")
    again = command(sys.executable, FAULTS / "refusals.py", "--folder", folder, *asked)  # resumes
    assert again.returncode == 0 and again.stdout.splitlines() == done.stdout.splitlines()
    assert len((folder / "refusals.jsonl").read_text().splitlines()) == len(done.stdout.splitlines()) - 1
    assert os.geteuid() or "read-only ones: 1" in last or "nothing can be mounted here" in last
