"""Files of a finished run that were altered, cut short, lost or exchanged: each is named, none passes for what it was."""

import json
import os
import random
import re
import shlex
import shutil
import sqlite3

import pytest
import yaml
from conftest import BIN, SMOKE, command

from sdlab.errors import BadInput
from sdlab.runs.files import is_inside, sha256_of_file, write_hashed_json
from sdlab.runs.locks import Lock
from sdlab.runs.records import read_record
from sdlab.runs.verify import Action, FindingState, verify
from sdlab.settings import Settings
from sdlab.tools import execution, repair

FILES = int(os.environ.get("SDLAB_DAMAGED_FILES", 60))  # `make faults` damages more


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run, and its settings."""
    world, _ = finished
    shutil.copytree(world / "runs", tmp_path / "runs")
    given = yaml.safe_load(SMOKE.read_text()) | dict(
        runs_root=str(tmp_path / "runs"), reports_root=str(tmp_path / "reports")
    )
    (tmp_path / "smoke.yaml").write_text(yaml.safe_dump(given))
    return Settings.from_mapping(given), tmp_path / "smoke.yaml"


def files_of(folder):
    names = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
    return [name for name in names if ".lock" not in name]  # which hold nothing


def damage(path, other, how, rng):
    content = bytearray(path.read_bytes())
    if how == "altered":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    elif how == "cut short":
        path.write_bytes(content[: rng.randrange(len(content))])
    elif how == "lost":
        path.unlink()
    else:
        path.write_bytes(other.read_bytes())


def test_a_finished_run_is_as_it_was_written(run):
    settings, file = run
    found, files = verify(settings)
    assert found == [] and files == len(files_of(settings.run_folder))
    done = command(BIN / "sdlab", "verify", file)
    assert done.returncode == 0 and f"{files} files read, 0 not as they were written" in done.stdout
    assert command(BIN / "sdlab", "verify", settings.run_folder).stdout == done.stdout


def test_every_damaged_file_is_named(run):
    """One at a time, seeded: of each kind of damage a quarter. SQLite's own spare bytes are no one's: there, what is lost."""
    settings, _ = run
    folder, rng = settings.run_folder, random.Random(0)
    names, counts = files_of(folder), dict.fromkeys(("altered", "cut short", "lost", "exchanged"), 0)
    content = {name: sha256_of_file(folder / name) for name in names}
    for index in range(FILES):
        how = list(counts)[index % 4]
        name = rng.choice([n for n in names if (folder / n).stat().st_size])
        if name == "searches.db":
            how = "lost"
        if name.endswith("resume.safetensors") and how == "lost":
            how = "altered"  # nothing needs it once its training has ended: it may be thrown away
        kept = (folder / name).read_bytes()
        others = [n for n in names if (folder / n).suffix == (folder / name).suffix and content[n] != content[name]]
        if how == "exchanged" and not others:
            how = "altered"
        damage(folder / name, folder / rng.choice(others) if others else None, how, rng)
        found = {finding.path for finding in verify(settings)[0]}
        assert name in found, (name, how)
        (folder / name).write_bytes(kept)
        counts[how] += 1
    assert verify(settings)[0] == [] and min(counts.values()) >= FILES // 8
    print(counts)


def test_a_database_whose_trials_were_altered_is_named(run):
    settings, _ = run
    with sqlite3.connect(settings.run_folder / "searches.db") as database:
        database.execute("update trial_values set value = value + 1e-9 where trial_id = 1")
    database.close()
    (finding,) = verify(settings)[0]
    assert finding.path == "searches.db" and "not those of metrics/search_1.json" in finding.why


def test_foreign_files_and_hostile_names_are_named(run):
    settings, _ = run
    (settings.run_folder / "metrics" / "x99.json").write_text("{}")
    (finding,) = verify(settings)[0]
    assert (finding.path, finding.state) == ("metrics/x99.json", FindingState.FOREIGN)
    record = settings.run_folder / "records" / "07.json"
    content = json.loads(record.read_text())
    content.pop("sha256")
    content["outputs"]["../../../etc/passwd"] = dict(sha256="0" * 64, bytes=1)
    write_hashed_json(record, content)
    found = {finding.path: finding for finding in verify(settings)[0]}
    assert found["records/07.json"].state == FindingState.DAMAGED
    with pytest.raises(BadInput, match=r"names '../../../etc/passwd', which is outside the folder: move it away"):
        read_record(settings, "07")


@pytest.mark.parametrize(
    ("name", "good"),
    [("a/b.json", True), ("../x", False), ("a/../../x", False), ("/etc/x", False), ("a\\..\\x", False)],
)
def test_names_stay_inside(name, good):
    assert is_inside(name) == good


@pytest.mark.parametrize("what", ["a shard", "a checkpoint", "a score", "a record"])
def test_repair_makes_the_same_bytes_of_just_that(run, what):
    """With the command that verify gives; what was damaged is kept aside, all else stays as it was."""
    settings, file = run
    folder = settings.run_folder
    path = {
        "a shard": sorted((folder / "synthetic").glob("*/shard_00001.safetensors"))[0],
        "a checkpoint": folder / "class_encoder/epoch_01/diffusion_pytorch_model.safetensors",
        "a score": folder / "metrics/x01.json",
        "a record": folder / "records/06.json",
    }[what]
    name, good = path.relative_to(folder).as_posix(), sha256_of_file(path)
    damage(path, None, "altered", random.Random(1))
    bad = path.read_bytes()
    (finding,) = verify(settings)[0]
    assert (finding.path, finding.state, finding.repair.action) == (name, FindingState.DAMAGED, Action.REPAIR)
    target = finding.repair.target
    assert f"sdlab repair {shlex.quote(str(file))} {target}" in command(BIN / "sdlab", "verify", file).stdout
    done = command(BIN / "sdlab", "repair", file, target)
    assert done.returncode == 0, done.stdout + done.stderr
    assert verify(settings)[0] == []
    assert sha256_of_file(path) == good or what == "a record"  # which says when it was opened
    assert [p for p in (folder / "aside").rglob(path.name) if p.read_bytes() == bad]
    assert command(BIN / "sdlab", "run", file).stdout.count("skipped") == 7  # the tables' files were left elsewhere
    assert command(BIN / "sdlab", "repair", file, target).returncode == 1  # nothing is wrong with it any more


def test_redo_moves_aside_and_makes_the_same_again(run):
    """Nothing is deleted; what is made again from the same is the same, and what came before it stays."""
    settings, file = run
    folder = settings.run_folder
    before = {name: (folder / name).read_bytes() for name in files_of(folder)}
    done = command(BIN / "sdlab", "run", file, "--redo", "04", "--until", "04")
    assert done.returncode == 0 and done.stdout.count("skipped") == 4, done.stdout + done.stderr
    (aside,) = (folder / "aside").iterdir()
    moved = {p.relative_to(aside).as_posix(): p.read_bytes() for p in aside.rglob("*") if p.is_file()}
    assert {"metrics/search_2.json", "metrics/x01.json", "records/04.json", "records/07.json"} <= moved.keys()
    assert all(before[name] == content for name, content in moved.items())
    for name in before.keys() - moved.keys() - {"searches.db", "settings.yaml", "test_readings.jsonl"}:
        assert (folder / name).read_bytes() == before[name], name
    best = [
        json.loads(c)["best"]["config"]
        for c in (moved["metrics/search_2.json"], (folder / "metrics/search_2.json").read_bytes())
    ]
    assert best[0] == best[1]
    names = [row[0] for row in sqlite3.connect(folder / "searches.db").execute("select study_name from studies")]
    assert len(names) == 3 and {"smoke-search_1", "smoke-search_2", f"smoke-search_2 (aside {aside.name})"} == set(
        names
    )


def test_redo_that_is_cut_does_it_the_next_time(run, monkeypatch):
    """Between the studies' names and the files: else the old trials would pass for new ones."""
    settings, _ = run

    def cut(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(repair, "move_aside", cut)
        repair.move_stages_aside(settings, "02")
    repair.move_stages_aside(settings, "02")
    assert not (settings.run_folder / "metrics" / "search_1.json").exists()
    with sqlite3.connect(settings.run_folder / "searches.db") as database:
        names = [row[0] for row in database.execute("select study_name from studies")]
    assert len(names) == 2 and all("(aside" in name for name in names)


def test_repair_beside_a_run_touches_nothing(run, monkeypatch):
    settings, file = run
    shard = sorted((settings.run_folder / "synthetic").glob("*/shard_00001.safetensors"))[0]
    damage(shard, None, "altered", random.Random(1))
    bad = shard.read_bytes()
    monkeypatch.setattr(Lock, "PATIENCE", 0.1)
    with execution.exclusive_command(settings, "sdlab run"):
        done = command(BIN / "sdlab", "repair", file, shard.relative_to(settings.run_folder).as_posix())
    assert done.returncode == 1 and "is in use by sdlab run" in done.stderr
    assert shard.read_bytes() == bad and not (settings.run_folder / "aside").exists()


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("metrics/x01.json", "is not among what is wrong with .*: nothing was done"),
        ("../smoke", "is not among what is wrong"),
        ("test_readings.jsonl", "is damaged .*which no repair mends: put a copy of it back"),
    ],
)
def test_what_cannot_be_repaired_is_refused_and_stays(run, path, said):
    settings, file = run
    readings = settings.run_folder / "test_readings.jsonl"
    readings.write_bytes(readings.read_bytes()[:-30])
    before = {name: (settings.run_folder / name).read_bytes() for name in files_of(settings.run_folder)}
    done = command(BIN / "sdlab", "repair", file, path)
    assert done.returncode == 1 and re.search(said, done.stderr) and "Traceback" not in done.stderr
    assert before == {name: (settings.run_folder / name).read_bytes() for name in files_of(settings.run_folder)}
