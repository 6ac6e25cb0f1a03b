"""An experiment's folder: which steps are finished, from what they were made, who is at work, how far it is.

    runs/<experiment>/settings.yaml        what the last opened step was run with
                      records/01.json      a step: its settings, what it was made from, its files with their hashes
                      begun/               what the step inside has so far, to go on from; removed at its end
                      progress.json        how far it is, for `sdlab run`
                      test_readings.jsonl  each reading of the test set

Nothing here imports torch.
"""

import contextlib
import functools
import json
import os
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from sdlab.errors import BadInput
from sdlab.runs.aside import move_results_aside
from sdlab.runs.files import (
    atomic_write,
    folder_size,
    partial_writes,
    raise_on_write_error,
    remove_partial_writes,
    write_json,
)
from sdlab.runs.locks import Lock
from sdlab.runs.progress import Progress
from sdlab.runs.records import (
    STAGES,
    FileHash,
    Reason,
    StageRecord,
    State,
    check_stage,
    environment,
    environment_change,
    environment_differences,
    now,
    read_record,
    record_digest,
    write_record,
)
from sdlab.runs.storage import check_storage
from sdlab.settings import Settings

# Of a training: clocked times, and a state that is of use only until the training ends.
NOT_OUTPUTS = ("history.json", "resume.safetensors")
SHARED = ("settings.yaml", "test_readings.jsonl")  # by all steps
SIDE_OUTPUTS = (*SHARED, "*/history.json", "metrics/plan.json", "pictures/*", "artifacts/*")


def peak_memory() -> int:
    """The most bytes this process has held so far: of the GPU where torch has used one, else of RAM."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        used = max(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
        if used:
            return used
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Run:
    """One step of one experiment, opened by its notebook: `run = Run(settings, "02_first_search", data, base)`.

    Opening checks before it writes: the steps this one reads are finished, made with the present settings, and
    complete; if this step was begun or finished before, it was with the same settings; data set and base model are
    those that step 00 saw; nobody else is at work. Raises `BadInput` otherwise.
    A finished step opens for reading: its functions load what they once made.

    Args:
        data, base: whatever has a `fingerprint()`; left out by steps that read neither.
        helping: join a step that another process has opened, to work on beside it: no lock is taken, nothing recorded.
    """

    def __init__(self, settings: Settings, stem: str, data: Any = None, base: Any = None, helping: bool = False):
        self.settings, self.stage, self.folder = settings, STAGES[stem[:2]], settings.run_folder
        given = dict(data=data, base_model=base)
        self.inputs = {name: value.fingerprint() for name, value in given.items() if value is not None}
        state = check_stage(settings, self.stage.number)
        self.check_inputs()
        if settings.storage and state.state != State.DONE and self.stage.number <= "04":  # long before the first search
            check_storage(settings)
        self.started, self.lock, self.helping = time.monotonic(), None, helping
        if helping:
            self.record = read_record(settings, self.stage.number)
            self.finished = self.record is None or state.state == State.DONE
        else:
            self.finished = state.state == State.DONE or not self.begin(base)
        told = not (self.finished or helping)
        self.progress = functools.partial(Progress, self.folder / "progress.json" if told else None)

    def check_inputs(self) -> None:
        """Raises `BadInput` if the data set or the base model changed under the experiment."""
        first = read_record(self.settings, "00")
        for name, found in self.inputs.items():
            if first is not None and first.inputs.get(name) != found:
                raise BadInput(
                    f"The `{dict(data='dataset', base_model='base_model')[name]}` is no longer the one that 00_data_and_base_model "
                    f"saw in {self.folder} (its content differs): restore it, or give the experiment another name."
                )

    def begin(self, base: Any) -> bool:
        """Take the folder and record the step as begun; False if another process finished it meanwhile."""
        self.lock = Lock(self.folder / ".lock", self.folder, self.stage.stem)
        if self.lock.note and not os.environ.get("SDLAB_PROGRESS_FILE_ONLY"):  # `sdlab run` says it itself
            print(self.lock.note)
        remove_partial_writes(partial_writes(self.folder))
        state = check_stage(self.settings, self.stage.number)
        if state.state == State.DONE:
            self.lock.release()
            return False
        if state.reason == Reason.MORE_TRIALS:
            move_results_aside(self.settings, self.stage.number)
        before = read_record(self.settings, self.stage.number)
        self.record = StageRecord(
            stage=self.stage.stem,
            settings=self.settings.of_stage(self.stage.number),
            upstream={n: record_digest(read_record(self.settings, n)) for n in self.stage.upstream},
            inputs=self.inputs,
            begun=before.begun if before else now(),
            opened_at=time.time(),
            environment=environment(base),
            seconds=before.seconds + self.lost_seconds(before) if before else 0.0,
        )
        if before:
            earlier = [*before.earlier_environments, before.environment]
            self.record.earlier_environments = [
                e for e in earlier if environment_differences(e, self.record.environment)
            ]
            if note := environment_change(self.record):
                print(note)
        write_record(self.settings, self.record)
        # After the record, which says that it is this step's.
        with atomic_write(self.folder / "settings.yaml") as beside:
            beside.write_text(yaml.safe_dump(self.settings.as_dict(), sort_keys=False), encoding="utf-8")
        return True

    def lost_seconds(self, before: StageRecord) -> float:
        """How long an attempt was at work that did not finish: until it last said how far it was."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            said = json.loads((self.folder / "progress.json").read_text(encoding="utf-8"))
            return round(max(said["time"] - before.opened_at, 0.0), 1)
        return 0.0

    def finish(self, *outputs: Path) -> None:
        """Record the step as finished with these files and folders (all files below them), and let the folder go.

        Raises `BadInput` if one is not there: a cell above was left out or interrupted.
        """
        if self.finished:
            return
        files = []
        for output in outputs:
            below = [output] if output.is_file() else sorted(path for path in output.rglob("*") if path.is_file())
            if not below:
                raise BadInput(f"{output} is missing: run all cells above this one first.")
            files += below
        self.record.outputs = {
            path.relative_to(self.folder).as_posix(): FileHash.of(path)
            for path in files
            if path.name not in NOT_OUTPUTS
        }
        self.record.side_outputs = self.hash_side_outputs()
        self.record.finished = now()
        self.record.measured = dict(folder_bytes=folder_size(self.folder), peak_memory_bytes=peak_memory())
        self.record.seconds += round(time.monotonic() - self.started, 1)
        shutil.rmtree(self.begun, ignore_errors=True)  # all of it is in the results by now
        write_record(self.settings, self.record)
        (self.folder / "progress.json").unlink(missing_ok=True)
        self.finished = True
        self.lock.release()

    def hash_side_outputs(self) -> dict[str, FileHash]:
        """Of what no later step reads, but a reader looks at: histories, the plan, trials' pictures, readings of the test set.

        Files that only grow are hashed as long as they are now.
        """
        others = set()  # what other steps wrote
        for number in STAGES.keys() - {self.stage.number}:
            if record := read_record(self.settings, number):
                others |= record.side_outputs.keys() - set(SHARED)
        paths = [path for part in SIDE_OUTPUTS for path in sorted(self.folder.glob(part)) if path.is_file()]
        named = {path.relative_to(self.folder).as_posix(): path for path in paths}
        return {name: FileHash.of(path) for name, path in named.items() if name not in others}

    def keep(self, name: str, result: Any) -> Any:
        """Write a result to `metrics/<name>.json`, unless the step is finished; the result as it reads back."""
        if not self.finished:
            write_json(self.metrics(name), result)
        return json.loads(json.dumps(result))

    @property
    def begun(self) -> Path:
        """Where an unfinished step keeps what it has so far, to go on from; removed when it is finished."""
        return self.folder / "begun"

    def metrics(self, name: str) -> Path:
        """Where a result is kept: `metrics/<name>.json`."""
        return self.folder / "metrics" / f"{name}.json"

    def note_test_reading(self, what: str) -> None:
        """The sealed protocol promises that the test set only fills the tables: each reading is on record."""
        path = self.folder / "test_readings.jsonl"
        with raise_on_write_error(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(time=now(), stage=self.stage.stem, what=what)) + "\n")
