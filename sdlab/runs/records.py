"""The stages of the pipeline, their records (`records/NN.json`), and the state of a stage: done, begun, stale ...

A record holds the settings and inputs that a stage depends on, digests of its upstream, and hashes of its files.
"""

import contextlib
import functools
import platform
import re
import sys
import typing
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from enum import Enum, StrEnum
from importlib import metadata
from pathlib import Path
from typing import Any

from sdlab.errors import BadInput, brief
from sdlab.paths import project_path
from sdlab.runs.files import (
    MOVE_AWAY,
    check_fields,
    is_inside,
    read_hashed_json,
    sha256_of_file,
    sha256_of_json,
    write_hashed_json,
)
from sdlab.settings import Settings

PACKAGES = ("torch", "diffusers", "optuna", "numpy", "scikit-learn")


@dataclass(frozen=True)
class Stage:
    """One notebook of the pipeline, and the numbers of the stages whose files it reads."""

    number: str
    name: str
    upstream: tuple[str, ...]

    @property
    def stem(self) -> str:
        return f"{self.number}_{self.name}"


STAGES = {
    stage.number: stage
    for stage in (
        Stage("00", "data_and_base_model", ()),
        Stage("01", "class_encoder", ("00",)),
        Stage("02", "first_search", ("01",)),
        Stage("03", "fine_tuning", ("02",)),
        Stage("04", "final_search", ("03",)),
        Stage("05", "scaling", ("04",)),
        Stage("06", "importance", ("02", "04")),
        Stage("07", "paper_tables", ("05", "06")),
    )
}
# Files that a stage writes, finished or not, besides its record and its executed copy.
WRITES = {
    "00": ("data", "metrics/data.json", "metrics/plan.json"),
    "01": ("latents", "class_encoder", "metrics/after_1.json"),
    "02": ("metrics/search_1.json", "metrics/after_2.json", "pictures/*-search_1-*"),
    "03": ("unet", "metrics/after_3.json"),
    "04": ("metrics/search_2.json", "metrics/after_4.json", "pictures/*-search_2-*"),
    "05": ("metrics/real.json", "metrics/scaling.json", "metrics/x[0-9]*.json"),
    "06": ("metrics/importance.json",),
    "07": ("metrics/tables.json",),
}
SEARCHES = {"02": "search_1", "04": "search_2"}  # of stages; `<search>_trials` is the setting that may be raised
INPUTS = {"dataset": "data", "base_model": "base_model"}  # settings that may be paths -> keys of `StageRecord.inputs`
BENCHMARKS = Stage("08", "benchmarks", ())  # of no experiment


@dataclass(frozen=True)
class FileHash:
    """A file as a stage wrote it."""

    sha256: str
    bytes: int

    @classmethod
    def of(cls, path: Path) -> "FileHash":
        return cls(sha256_of_file(path), path.stat().st_size)

    @classmethod
    def from_json(cls, value: Any, path: Path) -> "FileHash":
        """Raises `BadInput` that names `path`, the file with this value."""
        value = check_fields(value, dict(sha256=str, bytes=int), path)
        return cls(value["sha256"], value["bytes"])


@dataclass
class StageRecord:
    """What one stage depended on and wrote. Paths are relative to the experiment's folder; times are ISO 8601 in UTC."""

    stage: str  # its stem
    settings: dict[str, Any]  # those that its results depend on directly
    upstream: dict[str, str]  # number -> digest of that stage's record
    inputs: dict[str, str]  # `data`, `base_model` -> fingerprint
    begun: str
    opened_at: float  # unix seconds
    environment: dict[str, str | int]
    earlier_environments: list[dict[str, str | int]] = field(default_factory=list)  # of interrupted attempts
    seconds: float = 0.0  # of all attempts
    finished: str = ""
    outputs: dict[str, FileHash] = field(default_factory=dict)
    side_outputs: dict[str, FileHash] = field(default_factory=dict)  # files that no later stage reads
    measured: dict[str, int] = field(default_factory=dict)  # folder_bytes, peak_memory_bytes

    @classmethod
    def from_json(cls, value: Any, path: Path) -> "StageRecord":
        """Raises `BadInput` that names `path` for anything but the content of a record of this version."""
        if isinstance(value, dict) and "step" in value:
            raise OlderRun(
                f"{path.parents[1]} was made by an earlier version of sdlab: give the experiment another name, or move "
                "the folder away (that version still reads it)."
            )
        form = {f.name: typing.get_origin(f.type) or f.type for f in fields(cls)}
        value = {name: kept for name, kept in check_fields(value, form, path).items() if name in form}
        for name in ("outputs", "side_outputs"):
            if foreign := [file for file in value[name] if not is_inside(file)]:
                raise BadInput(f"{path} names {brief(foreign[0])}, which is outside the folder: {MOVE_AWAY}.")
            value[name] = {file: FileHash.from_json(entry, path) for file, entry in value[name].items()}
        for environment in value["earlier_environments"]:
            check_fields(environment, {}, path)
        if value["measured"]:
            check_fields(value["measured"], dict(folder_bytes=int, peak_memory_bytes=int), path)
        return cls(**value)


class OlderRun(BadInput):
    """The folder has records of an earlier version of sdlab."""


def record_path(settings: Settings, number: str) -> Path:
    return settings.run_folder / "records" / f"{number}.json"


def read_record(settings: Settings, number: str) -> StageRecord | None:
    """A stage's record; None if the stage never began. Raises `BadInput` if it was altered or names foreign files."""
    path = record_path(settings, number)
    return StageRecord.from_json(read_hashed_json(path), path) if path.exists() else None


def write_record(settings: Settings, record: StageRecord) -> None:
    write_hashed_json(record_path(settings, record.stage[:2]), asdict(record))


def record_notebook(settings: Settings, stage: Stage, path: Path) -> None:
    """Record an executed copy's hash in `records/NN.notebook.json`: it is written after the stage has finished."""
    name = path.relative_to(settings.run_folder).as_posix()
    write_hashed_json(record_path(settings, f"{stage.number}.notebook"), {name: asdict(FileHash.of(path))})


def record_digest(record: StageRecord) -> str:
    """Identifies a stage's result for the stages after it: settings, upstream, inputs, files."""
    outputs = {name: output.sha256 for name, output in record.outputs.items()}
    return sha256_of_json([record.settings, record.upstream, record.inputs, outputs])


def search_lineage(record: StageRecord) -> str:
    """Identifies what a study's trials depend on: all but their number, which may be raised later."""
    trials = f"{SEARCHES[record.stage[:2]]}_trials"
    settings = {name: value for name, value in record.settings.items() if name != trials}
    return sha256_of_json([settings, record.upstream, record.inputs])


def downstream_stages(number: str) -> list[str]:
    """The numbers of a stage and of all stages that depend on it, in order."""
    numbers = {number}
    for stage in STAGES.values():
        if numbers & set(stage.upstream):
            numbers.add(stage.number)
    return sorted(numbers)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def environment(base: Any) -> dict[str, str | int]:
    """What the last bits of results depend on: versions; if `base` computes, its device, and a CPU's threads."""
    versions = {name: metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()}
    torch, device = sys.modules.get("torch"), getattr(base, "device", None)
    if torch is None or device is None:
        return versions
    if device.type == "cuda":
        return versions | dict(device=torch.cuda.get_device_name(device))
    kind = "" if device.type == "cpu" else f"{device.type} of "
    device = f"{kind}{cpu_name()} ({torch.backends.cpu.get_cpu_capability()})"
    return versions | dict(device=device, threads=torch.get_num_threads())


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The model name that Linux gives on x86; elsewhere the architecture."""
    with contextlib.suppress(OSError):
        if match := re.search(r"model name\s*: (.*)", cpuinfo.read_text()):
            return match[1]
    return platform.machine()


def environment_change(record: StageRecord) -> str:
    """One sentence if a stage was resumed in another environment than it began in, else nothing."""
    for before in record.earlier_environments:
        if changed := environment_differences(before, record.environment):
            return (
                f"{record.stage} was resumed in a different environment ({', '.join(changed)}): its results are valid, "
                "but not bit-identical to an uninterrupted run."
            )
    return ""


def environment_differences(before: dict, after: dict) -> list[str]:
    return [f"{name} {was} -> {after[name]}" for name, was in before.items() if after.get(name, was) != was]


class State(StrEnum):
    DONE = "done"
    BEGUN = "begun"
    NOT_RUN = "not run"
    STALE = "stale"
    DAMAGED = "damaged"


class Reason(Enum):
    """Why a stage is stale, begun or damaged; the value is the sentence about its subject."""

    SETTINGS = "made with other settings: {}"
    UPSTREAM = "{}"
    UPSTREAM_REMADE = "{} was made again since"
    INTERRUPTED = "not finished: it resumes where it stopped"
    MORE_TRIALS = "{}: the search continues, its trials are kept"
    MISSING = "{} is missing"
    ALTERED = "{} was altered"


@dataclass(frozen=True)
class StageState:
    """The state of a stage; `subject` is the file, the stage or the settings that `reason` is about."""

    state: State
    reason: Reason | None = None
    subject: str = ""
    seconds: float = 0.0

    @property
    def why(self) -> str:
        """The reason as a sentence; empty for `done` and `not run`."""
        return self.reason.value.format(self.subject) if self.reason else ""


def stage_state(settings: Settings, number: str) -> StageState:
    """The state of a stage, by its record and files, the present settings, and its upstream."""
    record = read_record(settings, number)
    if record is None:
        return StageState(State.NOT_RUN)
    changes = settings_differences(settings, number, record)
    raised = is_search_extended(number, changes)
    if changes and not raised:
        return StageState(State.STALE, Reason.SETTINGS, describe_changes(changes))
    for upstream in STAGES[number].upstream:
        stem, state = STAGES[upstream].stem, stage_state(settings, upstream).state
        if state != State.DONE:
            return StageState(State.STALE, Reason.UPSTREAM, f"{stem} is {state}")
        if record.upstream.get(upstream) != record_digest(read_record(settings, upstream)):
            return StageState(State.STALE, Reason.UPSTREAM_REMADE, stem)
    if raised:
        return StageState(State.BEGUN, Reason.MORE_TRIALS, describe_changes(changes))
    if not record.finished:
        return StageState(State.BEGUN, Reason.INTERRUPTED)
    for name, output in record.outputs.items():
        path = settings.run_folder / name
        if not path.is_file():
            return StageState(State.DAMAGED, Reason.MISSING, name)
        # Weights are hashed when they are loaded; results and manifests are small enough to be hashed each time.
        altered = path.suffix == ".json" and sha256_of_file(path) != output.sha256
        if altered or path.stat().st_size != output.bytes:
            return StageState(State.DAMAGED, Reason.ALTERED, name)
    return StageState(State.DONE, seconds=record.seconds)


def settings_differences(settings: Settings, number: str, record: StageRecord) -> dict[str, tuple[Any, Any]]:
    """name -> (recorded value, present value) of the settings that a stage's results depend on, if they differ.

    A setting that the record does not have yet had its default. A path counts only if its content differs.
    """
    present, changes = settings.of_stage(number), {}
    for name in (*record.settings, *present):
        before, after = record.settings.get(name, getattr(Settings, name, None)), present.get(name)
        if before != after and not (name in INPUTS and is_same_content(settings, name, before, record)):
            changes[name] = before, after
    return changes


def describe_changes(changes: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{name} {brief(before)} -> {brief(after)}" for name, (before, after) in changes.items())


def is_search_extended(number: str, changes: dict[str, tuple[Any, Any]]) -> bool:
    """True if the only change is a larger number of trials: the search continues with those it has."""
    before, after = changes.get(f"{SEARCHES.get(number)}_trials", (None, None))
    return len(changes) == 1 and isinstance(before, int) and before < after


def check_stage(settings: Settings, number: str) -> StageState:
    """The state of a stage that may be opened. Raises `BadInput` if its upstream is not done, or it is stale or altered."""
    stage, folder = STAGES[number], settings.run_folder
    for which in (*(STAGES[n] for n in stage.upstream), stage):
        state = stage_state(settings, which.number)
        if which != stage and state.state in (State.NOT_RUN, State.BEGUN):
            raise BadInput(
                f"{stage.stem} reads what {which.stem} writes, which is {state.state} in {folder}: "
                f"run {which.stem} first (`sdlab run` takes them in order)."
            )
        # A missing file is made again. An altered one is the user's file now, and is not overwritten.
        mended = which == stage and state.reason == Reason.MISSING
        if state.state in (State.STALE, State.DAMAGED) and not mended:
            raise BadInput(
                f"{which.stem} is {state.state} in {folder} ({state.why}): {remedy(settings, which, state)}."
            )
    return state


def remedy(settings: Settings, stage: Stage, state: StageState) -> str:
    part = state.subject.partition("/")[0]
    if state.state == State.DAMAGED and part in ("class_encoder", "unet"):
        return f"move the folder {part} away and run {stage.stem} again, which repeats the same training"
    if state.state == State.DAMAGED:
        return f"move that file away if it is still there, and run {stage.stem} again, which makes it again"
    if state.reason == Reason.UPSTREAM_REMADE:
        redo = f"`sdlab run {settings.experiment} --redo {stage.number}`"
        return f"{redo} makes it and the stages after it again, and moves the old files to aside/"
    new_name = "a name of its own (copy its parameter file and change `experiment`)"
    return f"undo the change, or give the changed experiment {new_name}, or move the old folder away"


def is_same_content(settings: Settings, name: str, before: Any, record: StageRecord) -> bool:
    """True if a changed path leads to the recorded content: a folder that was moved.

    True too if nothing is at the new path (a disk that is not mounted): finished stages open without their data.
    """
    try:
        if project_path(getattr(settings, name)).exists():
            return content_fingerprint(settings, name) == record.inputs.get(INPUTS[name])
    except BadInput:
        return False
    except OSError:  # no permission to look
        pass
    return is_path(name, before) and is_path(name, getattr(settings, name))


@functools.lru_cache
def content_fingerprint(settings: Settings, name: str) -> str:
    """The fingerprint of the data set or base model that the settings name. Raises `BadInput`."""
    if name == "dataset":
        from sdlab.data.datasets import load_dataset

        return load_dataset(settings).fingerprint()
    from sdlab.data.model_files import PARTS, base_model_folder, hash_weights, list_weight_files, read_config

    folder, source = base_model_folder(settings)
    weights = [path for part in PARTS for path in list_weight_files(folder, part)]
    hashes = {path.relative_to(folder).as_posix(): hash_weights(path, source) for path in weights}
    scheduler = dict(prediction_type="epsilon") | read_config(folder, "scheduler/scheduler_config.json")
    return sha256_of_json([hashes, scheduler])


def is_path(name: str, value: Any) -> bool:
    """True for a path, False for the name of a known data set, `tiny` or a hub id."""
    return isinstance(value, str) and ("/" in value if name == "dataset" else value.startswith((".", "/", "~")))
