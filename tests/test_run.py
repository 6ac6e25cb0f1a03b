"""An experiment's folder: upstream, staleness, damage, locks; and that a refusal writes nothing."""

import dataclasses
import errno
import json
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from sdlab.errors import BadInput
from sdlab.runs.files import atomic_write, file_lock, files_below, partial_writes, remove_partial_writes, write_json
from sdlab.runs.locks import Lock
from sdlab.runs.progress import Progress
from sdlab.runs.records import FileHash, cpu_name, environment_change, read_record, write_record
from sdlab.runs.run import FORMER_TINY, Run
from sdlab.runs.stages import STAGES, Reason, State, stage_state


class Named:
    """Stands for a data set or a base model."""

    def __init__(self, name):
        self.name = name

    def fingerprint(self):
        return self.name


def finish(settings, number, content="x"):
    """Run a stage that writes one file."""
    run = Run(settings, STAGES[number].stem)
    path = run.metrics_path(f"of_{number}")
    write_json(path, content)
    run.finish(path)
    return path


def test_steps_wait_for_what_they_read(settings):
    with pytest.raises(BadInput, match="run 00_data_and_base_model first"):
        Run(settings, "01_class_encoder")
    assert not settings.run_folder.exists()
    finish(settings, "00")
    finish(settings, "01")
    assert [stage_state(settings, n).state for n in ("00", "01", "02")] == [State.DONE, State.DONE, State.NOT_RUN]


def test_an_unfinished_step_is_not_upstream(settings):
    Run(settings, "00_data_and_base_model").lock.release()
    assert stage_state(settings, "00").state == State.BEGUN
    with pytest.raises(BadInput, match="which is begun"):
        Run(settings, "01_class_encoder")


def test_other_settings_than_a_finished_steps_are_refused(settings):
    """By name, old value and new; and nothing is lost."""
    finish(settings, "00")
    path = finish(settings, "01")
    changed = dataclasses.replace(settings, class_encoder_learning_rate=0.5)
    assert stage_state(changed, "01").why == "made with other settings: class_encoder_learning_rate 0.003 -> 0.5"
    before = {p: p.read_bytes() for p in settings.run_folder.rglob("*") if p.is_file()}
    with pytest.raises(
        BadInput,
        match=r"class_encoder_learning_rate 0.003 -> 0.5\): undo the change, or give the changed experiment a name",
    ):
        Run(changed, "01_class_encoder")
    assert path.exists() and before == {p: p.read_bytes() for p in settings.run_folder.rglob("*") if p.is_file()}


def test_other_settings_than_a_begun_steps_are_refused(settings):
    Run(settings, "00_data_and_base_model").lock.release()
    with pytest.raises(BadInput, match="image_size 8 -> 16"):
        Run(dataclasses.replace(settings, image_size=16), "00_data_and_base_model")


def test_settings_that_no_result_depends_on_may_change(settings):
    finish(settings, "00")
    moved = dataclasses.replace(settings, num_threads=2, device="cpu", search_1_trials=99)
    assert stage_state(moved, "00").state == State.DONE


def test_what_comes_after_a_changed_step_is_stale(settings):
    for number in ("00", "01", "02"):
        finish(settings, number)
    changed = dataclasses.replace(settings, class_encoder_epochs=1)
    assert stage_state(changed, "02").why == "01_class_encoder is stale"
    record = read_record(settings, "01")
    path = settings.run_folder / "metrics/of_01.json"
    write_json(path, "another result")
    record.outputs["metrics/of_01.json"] = FileHash.of(path)
    write_record(settings, record)
    assert stage_state(settings, "02").why == "01_class_encoder was made again since"
    with pytest.raises(BadInput, match="`sdlab run smoke --redo 02` makes it and the stages after it again"):
        Run(settings, "02_first_search")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda p: p.unlink(), Reason.MISSING),
        (lambda p: p.write_text("longer than it was"), Reason.ALTERED),
        (lambda p: p.write_text('"y"\n'), Reason.ALTERED),
    ],
)
def test_damage_is_named(settings, damage, reason):
    finish(settings, "00")
    damage(finish(settings, "01"))
    state, path = stage_state(settings, "01"), settings.run_folder / "metrics/of_01.json"
    assert (state.state, state.reason, state.subject) == (State.DAMAGED, reason, "metrics/of_01.json")
    with pytest.raises(BadInput, match="run 01_class_encoder again"):
        Run(settings, "02_first_search")
    if path.exists():  # a user's file now: not written over, not taken for ours
        with pytest.raises(BadInput, match="move that file away"):
            Run(settings, "01_class_encoder")
        path.unlink()
    finish(settings, "01")
    assert stage_state(settings, "01").state == State.DONE


def test_a_result_that_is_not_there_is_not_recorded(settings):
    """A cell was left out, or interrupted."""
    run = Run(settings, "00_data_and_base_model")
    with pytest.raises(BadInput, match=r"of_00\.json is missing: run all cells above"):
        run.finish(run.metrics_path("of_00"))
    assert stage_state(settings, "00").state == State.BEGUN
    run.lock.release()


def test_data_or_base_model_that_changed_under_an_experiment_are_refused(settings):
    run = Run(settings, "00_data_and_base_model", Named("data"), Named("base"))
    run.save_metrics("of_00", 1)
    run.finish(run.metrics_path("of_00"))
    Run(settings, "01_class_encoder", Named("data"), Named("base")).lock.release()
    for data, base, said in (("other", "base", "`dataset`"), ("data", "other", "`base_model`")):
        with pytest.raises(BadInput, match=f"The {said} is no longer the one"):
            Run(settings, "01_class_encoder", Named(data), Named(base))


def test_a_run_begun_with_a_former_tiny_is_told_the_commit_that_has_it(settings):
    (former, commit), *_ = FORMER_TINY.items()
    run = Run(settings, "00_data_and_base_model", Named("data"), Named(former))
    run.save_metrics("of_00", 1)
    run.finish(run.metrics_path("of_00"))
    with pytest.raises(BadInput, match=f"continue with the code of commit {commit}, which has that `tiny`, or give"):
        Run(settings, "01_class_encoder", Named("data"), Named("new"))


def test_a_finished_step_keeps_what_it_has(settings):
    path = finish(settings, "00")
    before = path.read_bytes()
    run = Run(settings, "00_data_and_base_model")
    assert run.save_metrics("of_00", {"new": (1, 2)}) == {"new": [1, 2]}
    assert path.read_bytes() == before


def test_a_finished_step_opens_for_reading_and_is_not_recorded_again(settings):
    finish(settings, "00")
    before = (settings.run_folder / "records" / "00.json").read_bytes()
    run = Run(settings, "00_data_and_base_model")
    assert run.finished
    run.finish(run.metrics_path("of_00"))
    assert (settings.run_folder / "records" / "00.json").read_bytes() == before


HOLD = "import sys, time; from pathlib import Path; from sdlab.runs.locks import Lock; lock = Lock(Path(sys.argv[1]), Path('x'), '01_class_encoder'); print('held', flush=True); time.sleep(60)"


def test_two_runs_into_one_folder(settings, capsys, monkeypatch):
    """The second says who is there; when that process dies, however it dies, the folder is free."""
    monkeypatch.setattr(Lock, "PATIENCE", 0.3)
    settings.run_folder.mkdir(parents=True)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(settings.run_folder / ".lock")], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(BadInput, match=f"in use by 01_class_encoder .process {holder.pid} on"):
        Run(settings, "00_data_and_base_model")
    assert not (settings.run_folder / "records").exists()
    holder.kill()
    holder.wait()
    run = Run(settings, "00_data_and_base_model")
    assert f"last in use by 01_class_encoder (process {holder.pid} on" in capsys.readouterr().out
    run.lock.release()


def test_a_lock_is_waited_for_a_little(tmp_path):
    """A kernel whose parent was killed needs a second or two to notice."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    threading.Timer(0.5, holder.kill).start()
    lock = Lock(tmp_path / "lock", tmp_path, "next")
    assert "01_class_encoder" in lock.note
    lock.release()
    holder.wait()
    again = Lock(tmp_path / "lock", tmp_path, "again")
    assert not again.note  # let go by its holder
    again.release()


def test_a_notebooks_cell_can_be_run_twice(settings):
    """The same process opens the stage again while its first opening still holds the folder."""
    first = Run(settings, "00_data_and_base_model")
    second = Run(settings, "00_data_and_base_model")
    first.lock.release()  # nothing: the second took it over
    assert settings.run_folder / ".lock" in Lock.held
    second.lock.release()


def test_a_stage_that_is_resumed_in_another_environment_says_so(settings, capsys, monkeypatch):
    """The same bytes are promised for the same device, threads and versions only."""
    base = Named("base")
    said = "(threads 1 -> 2): its results are valid, but not bit-identical to an uninterrupted run."
    base.device = torch.device("cpu")
    notes = []
    for threads in (1, 1, 2, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        run = Run(settings, "00_data_and_base_model", base=base)
        run.lock.release()
        notes.append(capsys.readouterr().out.strip())
        assert environment_change(read_record(settings, "00")) == notes[-1]
    assert notes[:2] == ["", ""] and all(note.endswith(said) for note in notes[2:])
    environment = run.record.environment
    assert environment["torch"] == torch.__version__.partition("+")[0] and "(" in environment["device"]
    assert [earlier["threads"] for earlier in run.record.earlier_environments] == [1]


def test_a_training_that_more_processes_resume_says_so(settings, capsys, monkeypatch):
    monkeypatch.setitem(STAGES, "01", dataclasses.replace(STAGES["01"], upstream=()))
    for count in (1, 2, 2):
        run = Run(dataclasses.replace(settings, training_processes=count), "01_class_encoder")
        run.lock.release()
    assert "(training_processes 1 -> 2): its results are valid, but not" in capsys.readouterr().out
    assert run.record.environment["training_processes"] == 2
    assert "training_processes" not in run.record.earlier_environments[0]


def test_a_processor_without_a_name_is_its_architecture(tmp_path):
    """As ARM's on Linux."""
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nBogoMIPS\t: 2000.00\n")
    assert cpu_name(tmp_path / "cpuinfo") == cpu_name(tmp_path / "none") == platform.machine()
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A 2000\n")
    assert cpu_name(tmp_path / "cpuinfo") == "A 2000"


def test_a_released_lock_is_free(tmp_path):
    Lock(tmp_path / "lock", tmp_path, "a").release()
    Lock(tmp_path / "lock", tmp_path, "b").release()


def test_a_half_file_is_never_read(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("{half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"old": 1}


def test_half_files_of_the_dead_are_removed_and_those_of_the_living_stay(tmp_path):
    """Told by who holds them, whatever their names say: of any process, container or machine that shares the disk."""
    code = (
        "import sys, time; from pathlib import Path; from sdlab.runs.files import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])) as temporary: temporary.write_text('half'); print(temporary, flush=True); time.sleep(60)"
    )
    path, parts = tmp_path / "x.json", []
    writers = [
        subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for writer in writers:
        parts.append(Path(writer.stdout.readline().strip()).parent)
    writers[0].kill()
    writers[0].wait()
    (tmp_path / ".x.json.part").write_text("half, of an earlier version")
    with atomic_write(path) as temporary:
        write_json(path, 1)  # the same at once, from within
        assert temporary.parent.is_dir()
        temporary.write_text("2")
    assert path.read_text() == "2" and {p.name for p in tmp_path.iterdir()} == {"x.json", ".x.json.part", parts[1].name}
    assert list(files_below(tmp_path)) == [path] and set(partial_writes(tmp_path)) == {
        parts[1],
        tmp_path / ".x.json.part",
    }
    remove_partial_writes(partial_writes(tmp_path))
    assert {*tmp_path.iterdir()} == {path, parts[1]}
    writers[1].kill()
    writers[1].wait()
    remove_partial_writes(partial_writes(tmp_path))
    assert [*tmp_path.iterdir()] == [path]


def test_a_name_as_long_as_can_be_is_written(tmp_path):
    path = tmp_path / ("\u5408" * 83 + ".json")
    write_json(path, 1)
    assert [*tmp_path.iterdir()] == [path]


def test_a_lock_is_one_processs_until_it_ends(tmp_path):
    code = f"import time; from pathlib import Path; from sdlab.runs.files import file_lock\nwith file_lock(Path({str(tmp_path / 'l')!r})): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with file_lock(tmp_path / "l", wait=False) as mine:
        assert not mine
    holder.kill()
    with file_lock(tmp_path / "l") as mine, file_lock(tmp_path / "l", wait=False) as again:
        assert mine and not again
    holder.wait()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EMFILE])
def test_a_disk_that_refuses_is_one_sentence_and_leaves_what_was(tmp_path, monkeypatch, number):
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})

    def refuses(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("sdlab.runs.files.flush", refuses)
    with pytest.raises(BadInput, match=rf"x.json cannot be written .*{os.strerror(number)}.*is intact"):
        write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1} and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_disk_without_locks_is_named_and_not_taken_for_a_disk_in_use(settings, tmp_path, monkeypatch, number):
    """As Lustre's without `-o flock`."""

    def refuses(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuses)
    said = (
        f"cannot be written .{os.strerror(number)}.: that disk supports no file locks, which keep two runs apart: name"
    )
    with pytest.raises(BadInput, match=rf"\.lock {said}"):
        Run(settings, "00_data_and_base_model")
    with pytest.raises(BadInput, match=rf"cell {said}"), file_lock(tmp_path / "cell"):
        pass
    with pytest.raises(BadInput, match=rf"x.json {said}"):
        write_json(tmp_path / "x.json", {})


def test_a_damaged_record_is_refused(settings):
    finish(settings, "00")
    (settings.run_folder / "records" / "00.json").write_text("{half")
    with pytest.raises(BadInput, match=r"records/00\.json is damaged"):
        stage_state(settings, "00")


def test_progress_is_written_for_the_terminal(settings, monkeypatch):
    monkeypatch.setenv("SDLAB_PROGRESS_FILE_ONLY", "1")
    run = Run(settings, "00_data_and_base_model")
    with run.progress(total=10, desc="work", unit="img") as bar:
        bar.written -= 1
        bar.update(4)
    said = json.loads((run.folder / "progress.json").read_text())
    assert (said["desc"], said["n"], said["total"], said["unit"]) == ("work", 4, 10, "img") and said["rate"] > 0
    run.lock.release()


def test_progress_of_a_download_of_unknown_size_is_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("SDLAB_PROGRESS_FILE_ONLY", "1")
    with Progress(tmp_path / "progress.json", None, "fetch a.npz", "B") as bar:
        bar.update(5)
        bar.update(7)
        assert bar.state["n"] == 12 and bar.state["total"] is None


def test_settings_and_runs_import_no_torch():
    code = "import sys, sdlab.report.tables, sdlab.report.figures, sdlab.runs.export, sdlab.runs.verify, sdlab.tools.cli; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0
