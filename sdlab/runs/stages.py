"""The stages of the pipeline, and the state of each: done, begun, stale ..., by its record, its files and the settings."""

import functools
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Any

from sdlab.errors import BadInput, brief
from sdlab.paths import project_path
from sdlab.runs.files import sha256_of_file, sha256_of_json
from sdlab.runs.records import StageRecord, read_record, record_digest
from sdlab.settings import Settings


@dataclass(frozen=True)
class Stage:
    """One notebook of the pipeline, and the numbers of the stages whose files it reads."""

    number: str
    name: str
    upstream: tuple[str, ...]
    on_request: bool = False  # not a part of `sdlab run`

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
        Stage("08", "verdict", ("05",)),
        Stage("09", "audit", ("05",), on_request=True),
    )
}
PIPELINE = tuple(number for number, stage in STAGES.items() if not stage.on_request)
# Files that a stage writes, finished or not, besides its record and its executed copy.
WRITES = {
    "00": ("data", "judge", "metrics/data.json", "metrics/plan.json", "metrics/ceiling.json"),
    "01": ("latents", "class_encoder", "metrics/after_1.json", "metrics/alarm_1.json"),
    "02": ("metrics/search_1.json", "metrics/after_2.json", "pictures/*-search_1-*"),
    "03": ("unet", "metrics/after_3.json", "metrics/alarm_3.json"),
    "04": ("metrics/search_2.json", "metrics/after_4.json", "pictures/*-search_2-*"),
    "05": ("logits", "metrics/real.json", "metrics/round_trips.json", "metrics/scaling.json", "metrics/x[0-9]*.json"),
    "06": ("metrics/importance.json",),
    "07": ("metrics/tables.json",),
    "08": ("metrics/verdict.json",),
    "09": ("metrics/audit.json", "audit"),
}
SEARCHES = {"02": "search_1", "04": "search_2"}  # of stages; `<search>_trials` is the setting that may be raised
READS_IMAGES = ("00", "01", "02", "03", "04", "05", "08", "09")  # the others read results only
INPUTS = {"dataset": "data", "base_model": "base_model"}  # settings that may be paths -> keys of `StageRecord.inputs`


def downstream_stages(number: str) -> list[str]:
    """The numbers of a stage and of all stages that depend on it, in order."""
    numbers = {number}
    for stage in STAGES.values():
        if numbers & set(stage.upstream):
            numbers.add(stage.number)
    return sorted(numbers)


def search_lineage(record: StageRecord) -> str:
    """Identifies what a study's trials depend on: all but their number, which may be raised later."""
    trials = f"{SEARCHES[record.stage[:2]]}_trials"
    settings = {name: value for name, value in record.settings.items() if name != trials}
    if settings.get("search_parallel") == 1:  # studies that are older than this setting
        del settings["search_parallel"]
    return sha256_of_json([settings, record.upstream, record.inputs])


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
    redo = f"`sdlab run {settings.experiment} --redo {stage.number}`"
    if state.reason == Reason.UPSTREAM_REMADE or (state.reason == Reason.SETTINGS and stage.number == "08"):
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
    from sdlab.data.model_files import base_model_folder, fingerprint, hash_weights, list_weights, read_configs

    folder, source = base_model_folder(settings)
    return fingerprint(hash_weights(list_weights(folder), source), read_configs(folder)[2])


def is_path(name: str, value: Any) -> bool:
    """True for a path, False for the name of a known data set, `tiny` or a hub id."""
    return isinstance(value, str) and ("/" in value if name == "dataset" else value.startswith((".", "/", "~")))
