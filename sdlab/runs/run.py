"""An experiment's folder, and one stage of it that a notebook opens, works in and finishes.

    runs/<experiment>/settings.yaml        the settings of the stage that was opened last
                      records/01.json      a stage: its settings, inputs and files with their hashes (`records.py`)
                      begun/               results of an unfinished stage so far; removed at its end (09: audit/begun/)
                      progress.json        how far the stage is, for `sdlab run`
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
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import yaml

from sdlab.errors import BadInput
from sdlab.runs import records
from sdlab.runs.aside import move_results_aside
from sdlab.runs.experiment import Experiment
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
from sdlab.runs.records import FileHash, StageRecord
from sdlab.runs.stages import READS_IMAGES, STAGES, Reason, State, check_stage
from sdlab.runs.storage import check_storage
from sdlab.settings import Settings

# Of a training: measured times, and a state that is needed only until the training ends.
NOT_OUTPUTS = ("history.json", "resume.safetensors")
SHARED = ("settings.yaml", "test_readings.jsonl")  # by all stages
# Fingerprints of what was embedded as `tiny` before -> a commit that has it.
FORMER_TINY = {
    "3c850513136f0e3c518029b68172dc07eab7ab5d513c8e918c1291855e37e885": "90bc8214e951e5a0f66cfc1c30e0d8c7a0f81a66"
}
# Hashed, but no part of a stage's result: stages that need one and have none make their own.
SIDE_OUTPUTS = (*SHARED, "*/history.json", "metrics/plan.json", "metrics/ceiling.json", "metrics/alarm_*.json", "judge/*",
                "logits/*", "pictures/*", "artifacts/*")  # fmt: skip


class Run(Experiment):
    """One stage of an experiment, opened by its notebook: `run = Run(settings, "02_first_search", data, base)`.

    Opening checks before it writes: the stages that this one reads are finished with the present settings and complete; an
    earlier attempt at this stage had the same settings; data set and base model are those of stage 00; no other process
    has opened the folder. Raises `BadInput` otherwise.
    A finished stage opens for reading: its functions load their results.

    Args:
        data, base: objects with a `fingerprint()`; left out by stages that read neither.
    """

    def __init__(self, settings: Settings, stem: str, data: Any = None, base: Any = None):
        super().__init__(settings, data, base)
        self.stage = STAGES[stem[:2]]
        inputs = dict(data=data, base_model=base)
        self.inputs = {name: value.fingerprint() for name, value in inputs.items() if value is not None}
        state = check_stage(settings, self.stage.number)
        self.check_inputs()
        if settings.storage and state.state != State.DONE and self.stage.number <= "04":  # long before the first search
            check_storage(settings)
        trains = state.state != State.DONE and self.stage.number in ("01", "03")
        if trains and base is not None and settings.training_processes > 1:
            from sdlab.devices import check_processes  # imports torch

            check_processes(settings.training_processes, settings.device, base.device)
        self.started, self.lock = time.monotonic(), None
        self.finished = state.state == State.DONE or not self.begin()
        self.progress = functools.partial(
            Progress, None if self.finished else self.folder / "progress.json", stage=self.stage.stem
        )

    @functools.cached_property
    def executor(self) -> Executor:
        """Where tasks run, by the setting `cluster`. Raises `BadInput` without Dask, or if the cluster does not answer."""
        if self.settings.cluster == "none":
            return super().executor
        try:
            from sdlab.cluster.dask_cluster import Cluster
        except ImportError as error:
            raise BadInput(
                f"`cluster` is {self.settings.cluster!r}, which needs Dask ({error}): `pip install -e '.[cluster]'`, or take "
                "`cluster: none`."
            ) from None
        return Cluster(self)

    @property
    def work_folder(self) -> Path | None:
        """Results of an unfinished stage so far, for a resumed run; None once it is finished."""
        if self.finished:
            return None
        # Other stages finish in between, and remove theirs.
        return self.folder / ("audit/begun" if self.stage.on_request else "begun")

    def check_inputs(self) -> None:
        """Raises `BadInput` if the data set or the base model changed since stage 00."""
        first = records.read_record(self.settings, "00")
        for name, fingerprint in self.inputs.items():
            if first is not None and first.inputs.get(name) != fingerprint:
                commit = FORMER_TINY.get(first.inputs.get(name, ""))
                restore = (
                    f"continue with the code of commit {commit}, which has that `tiny`" if commit else "restore it"
                )
                raise BadInput(
                    f"The `{dict(data='dataset', base_model='base_model')[name]}` is no longer the one that "
                    f"00_data_and_base_model saw in {self.folder} (its content differs): {restore}, or give the "
                    "experiment another name."
                )

    def begin(self) -> bool:
        """Lock the folder and record the stage as begun; False if another process finished it in the meantime."""
        self.lock = Lock(self.folder / ".lock", self.folder, self.stage.stem)
        if self.lock.note and not os.environ.get("SDLAB_PROGRESS_FILE_ONLY"):  # else `sdlab run` prints it
            print(self.lock.note)
        remove_partial_writes(partial_writes(self.folder))
        state = check_stage(self.settings, self.stage.number)
        if state.state == State.DONE:
            self.lock.release()
            return False
        if state.reason == Reason.MORE_TRIALS:
            move_results_aside(self.settings, self.stage.number)
        before = records.read_record(self.settings, self.stage.number)
        self.record = StageRecord(
            stage=self.stage.stem,
            settings=self.settings.of_stage(self.stage.number),
            upstream={n: records.record_digest(records.read_record(self.settings, n)) for n in self.stage.upstream},
            inputs=self.inputs,
            begun=before.begun if before else records.now(),
            opened_at=time.time(),
            environment=records.environment(self.base) | self.workers() | self.division(),
            seconds=before.seconds + self.lost_seconds(before) if before else 0.0,
        )
        if before:
            earlier = [*before.earlier_environments, before.environment]
            self.record.earlier_environments = [
                e for e in earlier if records.environment_differences(e, self.record.environment)
            ]
            if note := records.environment_change(self.record):
                print(note)
        records.write_record(self.settings, self.record)
        # After the record, which tells that it is this stage's.
        with atomic_write(self.folder / "settings.yaml") as partial:
            partial.write_text(yaml.safe_dump(self.settings.as_dict(), sort_keys=False), encoding="utf-8")
        return True

    def workers(self) -> dict[str, str | int]:
        """Device and threads of a cluster's workers; nothing if tasks run here. Raises `BadInput` if it does not answer."""
        if self.settings.cluster == "none" or self.base is None or self.stage.number not in READS_IMAGES:
            return {}
        return dict(worker_device=self.executor.environment["device"], worker_threads=self.executor.threads)

    def division(self) -> dict[str, int]:
        """How a training's batches are divided, if they are: it changes last bits."""
        names = ("training_processes", "micro_batch_size")
        divided = {name: getattr(self.settings, name) for name in names}
        whole = {name: getattr(Settings, name) for name in names}
        return divided if self.stage.number in ("01", "03") and divided != whole else {}

    def lost_seconds(self, before: StageRecord) -> float:
        """Seconds that an unfinished attempt worked: from its start until its last sign of progress."""
        if before.finished:
            return 0.0  # the file is of a later stage
        with contextlib.suppress(OSError, ValueError, KeyError):
            state = json.loads((self.folder / "progress.json").read_text(encoding="utf-8"))
            if state["stage"] == self.stage.stem:
                return round(max(state["time"] - before.opened_at, 0.0), 1)
        return 0.0

    def finish(self, *outputs: Path) -> None:
        """Record the stage as finished with these files and folders (all files below them), and release the folder.

        Raises `BadInput` if one is missing: a cell above was left out or interrupted.
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
        self.record.side_outputs = self.side_outputs()
        self.record.finished = records.now()
        self.record.measured = dict(
            folder_bytes=folder_size(self.folder), peak_memory_bytes=max(peak_memory(), self.peak_memory)
        )
        self.record.seconds += round(time.monotonic() - self.started, 1)
        shutil.rmtree(self.work_folder, ignore_errors=True)  # all of it is part of the results now
        records.write_record(self.settings, self.record)
        (self.folder / "progress.json").unlink(missing_ok=True)
        self.finished = True
        self.lock.release()
        if "executor" in self.__dict__:
            self.executor.shutdown()

    def side_outputs(self) -> dict[str, FileHash]:
        """Hashes of files that no later stage reads, but a reader looks at: histories, the plan, pictures, test readings.

        Files that only grow are hashed up to their present length.
        """
        others = set()  # of other stages
        for number in STAGES.keys() - {self.stage.number}:
            if record := records.read_record(self.settings, number):
                others |= record.side_outputs.keys() - set(SHARED)
        paths = [path for pattern in SIDE_OUTPUTS for path in sorted(self.folder.glob(pattern)) if path.is_file()]
        names = {path.relative_to(self.folder).as_posix(): path for path in paths}
        return {name: FileHash.of(path) for name, path in names.items() if name not in others}

    def save_metrics(self, name: str, result: Any) -> Any:
        """Write a result to `metrics/<name>.json`, unless the stage is finished; returns it as it reads back."""
        if not self.finished:
            write_json(self.metrics_path(name), result)
        return json.loads(json.dumps(result))

    def record_test_reading(self, purpose: str) -> None:
        """The sealed protocol promises that the test set only fills the tables: each reading is on record."""
        path = self.folder / "test_readings.jsonl"
        with raise_on_write_error(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(time=records.now(), stage=self.stage.stem, purpose=purpose)) + "\n")


def peak_memory() -> int:
    """The most bytes that this process has held so far: of the GPU if torch has used one, else of RAM."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        used = max(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
        if used:
            return used
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
