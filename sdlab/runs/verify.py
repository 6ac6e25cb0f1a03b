"""An experiment's folder -> what is damaged, missing, foreign or stale in it, and the command that mends just that.

Every file is compared with the hash recorded when it was written: results in their stage's record, shards in their set's
manifest, weights in their checkpoint's, a resume state in itself, a search's database in its export. Sets and stages are
compared with what they were made from. Nothing is written. Nothing here imports torch.
"""

import contextlib
import json
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any

from sdlab.errors import BadInput
from sdlab.runs.checkpoints import checkpoint_hashes, checkpoint_sha
from sdlab.runs.files import (
    files_below,
    raise_on_read_error,
    read_hashed_json,
    read_json,
    sha256_of_bytes,
    sha256_of_file,
)
from sdlab.runs.records import FileHash, OlderRun, StageRecord, read_record, record_digest
from sdlab.runs.resume_states import is_resume_state_intact
from sdlab.runs.shards import read_manifest, shard_path
from sdlab.runs.stages import (
    PIPELINE,
    SEARCHES,
    STAGES,
    WRITES,
    describe_changes,
    is_search_extended,
    settings_differences,
)
from sdlab.runs.storage import exported_trial, sqlite_file, stored_trials
from sdlab.settings import Settings

# Results that name a set, by their stage.
SETS_OF = {"01": "after_1", "02": "after_2", "03": "after_3", "04": "after_4", "05": "scaling"}
TRAININGS = {"class_encoder": "01", "unet": "03"}  # folder -> stage
LOOKED_AT = ("metrics/plan.json", "metrics/ceiling.json", "metrics/alarm_1.json", "metrics/alarm_3.json")
ALTERED = "its content is not what was written"


class FindingState(StrEnum):
    DAMAGED = "damaged"
    MISSING = "missing"
    FOREIGN = "foreign"
    STALE = "stale"


class Action(Enum):
    """What mends a finding; the value is the sentence that says so."""

    REPAIR = "sdlab repair {experiment} {target}"
    REDO = "sdlab run {experiment} --redo {target}"
    MOVE_AWAY = "move {target} away: no stage reads it"
    RESTORE_COPY = "put a copy of it back: it cannot be made again"
    NOTHING = "nothing has to be done: {target}"


@dataclass(frozen=True)
class Repair:
    """`target` is a path of the experiment's folder, a stage's number (REDO), or a reason (NOTHING)."""

    action: Action
    target: str = ""
    stage: str = ""  # of REPAIR: the number of the stage that makes `target`; empty for a set's shards

    def sentence(self, experiment: str) -> str:
        """The command or advice; `experiment` as the command line names it."""
        return self.action.value.format(experiment=experiment, target=self.target)


@dataclass(frozen=True)
class Finding:
    """A path relative to the experiment's folder, what is wrong with it, and what mends it."""

    path: str
    state: FindingState
    why: str
    repair: Repair


def verify(settings: Settings, on_read: Callable[[int], Any] = lambda _: None) -> tuple[list[Finding], int]:
    """All findings, and the number of files read; `on_read` is called with each file's bytes.

    Raises `BadInput` if there is no experiment, if it is an earlier version's, or if a file may not be read.
    """
    folder = settings.run_folder
    if not folder.is_dir():
        raise BadInput(f"There is no experiment folder {folder}: `sdlab run {settings.experiment}` makes it.")
    for path in files_below(folder):
        with raise_on_read_error(path), contextlib.suppress(FileNotFoundError):  # vanished meanwhile
            if path.is_file():  # a pipe would wait
                path.open("rb").close()
    checks = Checks(settings, on_read)
    records = checks.records = read_records(checks)
    for number, record in records.items():
        check_stage_files(checks, number, record)
    for number in STAGES:
        check_executed_copy(checks, number)
    for part in TRAININGS:
        check_checkpoints(checks, part)
    for synthetic_set in sorted((folder / "synthetic").glob("*")):
        check_set(checks, synthetic_set)
    for number, search in SEARCHES.items():
        if number in records and records[number].finished:
            check_search(checks, search)
    check_foreign_files(checks)
    return sorted(checks.findings, key=lambda f: (f.state, f.path)), len(checks.seen)


class Checks:
    """The findings so far, and the files that were accounted for: the others are foreign."""

    def __init__(self, settings: Settings, on_read: Callable[[int], Any]):
        self.settings, self.folder, self.on_read = settings, settings.run_folder, on_read
        self.findings: list[Finding] = []
        self.seen: dict[str, bool] = {}  # relative path -> True if it is as it was written
        self.records: dict[str, StageRecord] = {}

    @property
    def unfinished(self) -> bool:
        return not self.records.keys() >= {*PIPELINE} or not all(record.finished for record in self.records.values())

    def name(self, path: Path | str) -> str:
        return path if isinstance(path, str) else path.relative_to(self.folder).as_posix()

    def add(self, path: Path | str, state: FindingState, why: str, repair: Repair | str = "") -> None:
        """`repair` may be the number of the stage that makes the file."""
        name = self.name(path)
        self.seen[name] = False
        self.findings.append(
            Finding(name, state, why, repair if isinstance(repair, Repair) else repair_of(name, repair))
        )

    def compare(self, path: Path, sha256: str, missing: str, size: int | None = None, stage: str = "") -> None:
        """A file with its recorded hash and size. One that grows (`.jsonl`) has to begin with the recorded bytes."""
        if not path.is_file():
            self.add(path, FindingState.MISSING, missing, stage)
            return
        present = path.stat().st_size
        size = present if size is None else size
        self.on_read(present)
        if present != size and not (path.suffix == ".jsonl" and present > size):
            self.add(path, FindingState.DAMAGED, f"{present} bytes instead of {size}", stage)
        elif (sha256_of_file(path) if present == size else sha256_of_bytes(path.read_bytes()[:size])) != sha256:
            self.add(path, FindingState.DAMAGED, ALTERED, stage)
        else:
            self.seen.setdefault(self.name(path), True)


def repair_of(name: str, stage: str) -> Repair:
    """The repair of a file that a stage makes; a training's files are made all together."""
    part = name.partition("/")[0]
    if name == "settings.yaml":
        return Repair(Action.NOTHING, "the next stage writes it when it begins")
    if part in ("judge", "logits"):
        return Repair(
            Action.NOTHING, "stages that need it, and do not find it, train their own; move a damaged one away"
        )
    if part in ("pictures", "artifacts") or name in LOOKED_AT:
        return Repair(Action.NOTHING, "people look at it, no stage reads it")
    if name == "test_readings.jsonl":
        return Repair(Action.RESTORE_COPY)
    return Repair(Action.REPAIR, part if part in TRAININGS else name, TRAININGS.get(part, stage))


def read_records(checks: Checks) -> dict[str, StageRecord]:
    records = {}
    for number, stage in STAGES.items():
        name = f"records/{number}.json"
        try:
            record = read_record(checks.settings, number)
            if record is not None and record.stage != stage.stem:
                raise BadInput("of another stage")
        except OlderRun:
            raise
        except BadInput:
            checks.add(name, FindingState.DAMAGED, ALTERED, number)
            continue
        if record is not None:
            records[number], checks.seen[name] = record, True
        elif files := [path for part in WRITES[number] for path in checks.folder.glob(part)]:  # a record comes first
            why = f"{checks.name(files[0])} exists, which {stage.stem} wrote"
            checks.add(name, FindingState.MISSING, why, number)
    return records


def check_stage_files(checks: Checks, number: str, record: StageRecord) -> None:
    """A stage's files, settings and upstream."""
    name, stem, redo = f"records/{number}.json", STAGES[number].stem, Repair(Action.REDO, number)
    latest = max(checks.records, key=lambda n: checks.records[n].opened_at)
    for path, entry in [*record.outputs.items(), *record.side_outputs.items()]:
        if path != "settings.yaml" or number == latest:  # each stage writes it when it begins
            checks.compare(checks.folder / path, entry.sha256, f"{stem} wrote it", entry.bytes, number)
    changes = settings_differences(checks.settings, number, record)
    if changes and not is_search_extended(number, changes):
        why = f"{stem} was made with other settings: {describe_changes(changes)}"
        checks.add(name, FindingState.STALE, why, redo)
    for upstream in STAGES[number].upstream:
        path, before = f"records/{upstream}.json", checks.records.get(upstream)
        if before is None and not (checks.folder / path).exists() and path not in checks.seen:
            checks.add(path, FindingState.MISSING, f"{stem} was made from it", upstream)
        elif before and before.finished and record_digest(before) != record.upstream.get(upstream):
            why = f"{STAGES[upstream].stem} was made again since {stem} was"
            checks.add(name, FindingState.STALE, why, redo)


def check_executed_copy(checks: Checks, number: str) -> None:
    copy = f"notebooks/{STAGES[number].stem}.ipynb"
    path = checks.folder / "records" / f"{number}.notebook.json"
    if not path.exists():
        if (checks.folder / copy).exists():  # else it was run by hand
            checks.add(path, FindingState.MISSING, f"it has the hash of {copy}", number)
            checks.seen.setdefault(copy, True)
        return
    try:
        content = read_hashed_json(path)
        if list(content) != [copy]:
            raise BadInput("of another notebook")
        entry = FileHash.from_json(content[copy], path)
    except BadInput:
        checks.add(path, FindingState.DAMAGED, ALTERED, number)
        return
    checks.seen[checks.name(path)] = True
    checks.compare(checks.folder / copy, entry.sha256, f"{STAGES[number].stem} wrote it", entry.bytes, number)


def check_checkpoints(checks: Checks, part: str) -> None:
    """Manifests and weights of all epochs, and the resume state."""
    for epoch in sorted((checks.folder / part).glob("epoch_*")):
        try:
            hashes = checkpoint_hashes(epoch)
        except BadInput:
            checks.add(epoch / "manifest.json", FindingState.DAMAGED, "it names no files and hashes")
            continue
        checks.seen.setdefault(checks.name(epoch / "manifest.json"), True)
        for path, sha256 in ((epoch / name, sha256) for name, sha256 in hashes.items()):
            if checks.name(path) not in checks.seen:  # else its stage is finished, and has it in its record
                checks.compare(path, sha256, "its checkpoint's manifest names it")
    state = checks.folder / part / "resume.safetensors"
    if state.is_file():
        checks.on_read(state.stat().st_size)
        checks.seen[checks.name(state)] = True
        if not is_resume_state_intact(state):
            checks.add(state, FindingState.DAMAGED, ALTERED)


def check_set(checks: Checks, folder: Path) -> None:
    """A synthetic set's manifest, the checkpoints that it was made from, and its shards."""
    name = checks.name(folder / "manifest.json")
    try:
        manifest = read_manifest(folder)
        if manifest["key"] != folder.name:
            raise BadInput("of another set")
    except BadInput:
        exists = (folder / "manifest.json").exists()
        killed_at_first = checks.unfinished and not exists and len(list(folder.glob("shard_*"))) < 2
        if folder.is_dir() and not killed_at_first:
            state = FindingState.DAMAGED if exists else FindingState.MISSING
            checks.add(name, state, "nothing else names its set's shards", repair_of_set(checks, folder))
            for path in folder.iterdir():
                checks.seen.setdefault(checks.name(path), False)
        return
    checks.seen[name] = True
    made_from = manifest["made_from"] or dict(checkpoints={})
    for part, sha256 in made_from["checkpoints"].items():
        epoch = made_from["config"][f"{part}_epoch"]
        with contextlib.suppress(BadInput):
            if checkpoint_sha(checks.folder / part, epoch) != sha256:
                why = f"made with another {part}/epoch_{epoch:02d} than is there now"
                checks.add(name, FindingState.STALE, why, Repair(Action.MOVE_AWAY, checks.name(folder)))
    for index, shard in manifest["shards"].items():
        checks.compare(shard_path(folder, int(index)), shard["sha256"], "its set's manifest names it")


def repair_of_set(checks: Checks, folder: Path) -> Repair:
    """For a set without its manifest: redo the stage whose results come from it; a trial's set is not needed."""
    for number, results in SETS_OF.items():
        with contextlib.suppress(BadInput, OSError):
            if folder.name in json.dumps(read_json(checks.folder / "metrics" / f"{results}.json")):
                return Repair(Action.REDO, number)
    return Repair(Action.MOVE_AWAY, checks.name(folder))


def check_search(checks: Checks, search: str) -> None:
    """A finished search's trials in an SQLite file of the folder, which the dashboard shows, with its export."""
    file, export = sqlite_file(checks.settings), checks.folder / "metrics" / f"{search}.json"
    if file is None or not file.is_relative_to(checks.folder) or not checks.seen.get(checks.name(export)):
        return  # a server, a file elsewhere, or nothing to compare with
    repair = Repair(Action.NOTHING, "its results are in metrics/; `sdlab dashboard` needs a copy of it back")
    if not file.is_file():
        checks.add(file, FindingState.MISSING, "the dashboard shows it", repair)
        return
    checks.on_read(file.stat().st_size)
    checks.seen.setdefault(checks.name(file), True)
    try:
        content = read_json(export)
        exported = [exported_trial(trial) for trial in content["trials"]]
        stored = list(stored_trials(file, str(content["study"])))
    except (sqlite3.Error, KeyError, TypeError, ValueError, AttributeError) as error:
        checks.add(file, FindingState.DAMAGED, f"it cannot be compared with metrics/{search}.json ({error})", repair)
        return
    if stored != exported:
        why = f"its trials of {search} are not those of metrics/{search}.json"
        checks.add(file, FindingState.DAMAGED, why, repair)


def check_foreign_files(checks: Checks) -> None:
    """Files that nothing named. While a stage is unfinished, they may be its own."""
    databases = (sqlite_file(checks.settings), checks.folder / "searches.db")
    free = {f"{database}{suffix}" for database in databases for suffix in ("", "-journal", "-wal", "-shm")}
    for path in files_below(checks.folder):
        name = checks.name(path)
        if name in checks.seen or name == "progress.json" or str(path) in free or name.startswith("aside/"):
            continue
        if path.name == ".lock" or name.startswith(".locks/"):  # empty: the system knows who holds them
            continue
        if not checks.unfinished or name.endswith(".ipynb"):
            checks.add(name, FindingState.FOREIGN, "no stage wrote it", Repair(Action.MOVE_AWAY, name))
