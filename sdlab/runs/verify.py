"""An experiment's folder -> what in it is damaged, missing, foreign or stale, and the command that makes it anew.

Every file is compared with the hash that was written down when it was made: results in the records of their steps, shards
in their set's manifest, weights in their checkpoint's, a resume state in itself, a search's database in its export. And
with what it was made from: a set of images with the checkpoints that are there now, a step with its upstream.
Nothing is written. Nothing here imports torch.
"""

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from sdlab.errors import BadInput
from sdlab.runs.checkpoints import checkpoint_hashes, checkpoint_sha
from sdlab.runs.files import check_fields, files_below, raise_on_read_error, read_hashed_json, read_json, sha256_of_file
from sdlab.runs.records import STAGES, WRITES, read_record, record_digest, settings_differences
from sdlab.runs.shards import read_manifest, shard_path
from sdlab.settings import Settings

# What a run leaves that is hashed nowhere: of no use to any later step, or checked otherwise.
FREE = {"progress.json", "searches.db", "searches.db-journal", "searches.db-wal", "searches.db-shm"}
# Results that name a set.
SETS_OF = {"01": "after_1", "02": "after_2", "03": "after_3", "04": "after_4", "05": "scaling"}


@dataclass(frozen=True)
class Finding:
    """`state` is one of `damaged`, `missing`, `foreign`, `stale`; `path` is relative to the experiment's folder."""

    path: str
    state: str
    why: str
    repair: str


def verify(settings: Settings, heard: Callable[[int], Any] | None = None) -> tuple[list[Finding], int]:
    """What is wrong with an experiment's folder, and how many files were read. `heard` is told each one's bytes.

    Raises `BadInput` if there is no experiment, or if one of its files cannot be read, which says nothing of its content.
    """
    folder = settings.run_folder
    if not folder.is_dir():
        raise BadInput(f"There is no experiment folder {folder}: `sdlab run {settings.experiment}` makes it.")
    for path in files_below(folder):
        with raise_on_read_error(path), contextlib.suppress(FileNotFoundError):  # gone meanwhile
            if path.is_file():  # no pipe, which would wait
                path.open("rb").close()
    return Verification(settings, heard or (lambda _: None)).findings()


class Verification:
    """One look at everything. Files that were accounted for are kept, so that those that nothing names stand out."""

    def __init__(self, settings: Settings, heard: Callable[[int], Any]):
        self.settings, self.folder, self.heard = settings, settings.run_folder, heard
        self.seen: dict[str, bool] = {}  # relative path -> whether it is as it was written
        self.found: list[Finding] = []

    def findings(self) -> tuple[list[Finding], int]:
        records = self.known = self.records()
        self.unfinished = len(records) < len(STAGES) or any(not record["finished"] for record in records.values())
        self.last = max(records, key=lambda number: records[number]["opened_at"], default="")
        for number, record in records.items():
            self.step(number, record)
        for number in STAGES:
            self.notebook(number)
        for part in ("class_encoder", "unet"):
            for epoch in sorted((self.folder / part).glob("epoch_*")):
                self.checkpoint(part, epoch)
            self.resume_state(part, self.folder / part / "resume.safetensors")
        for made in sorted((self.folder / "synthetic").glob("*")):
            self.synthetic(made)
        for number, search in (("02", "search_1"), ("04", "search_2")):
            if number in records and records[number]["finished"] and not self.settings.storage:
                self.search(search)
        self.strangers()
        return sorted(self.found, key=lambda f: (f.state, f.path)), len(self.seen)

    # ---------------------------------------------------------------------------------------------- helpers

    def add(self, path: str | Path, state: str, why: str, repair: str) -> None:
        name = path if isinstance(path, str) else path.relative_to(self.folder).as_posix()
        self.seen[name] = False
        self.found.append(Finding(name, state, why, repair))

    def again(self, path: str) -> str:
        """The command that makes `path` anew; a training's files only all together."""
        part = path.partition("/")[0]
        if path == "settings.yaml":
            return "nothing has to be done: it is written anew when the next step begins"
        if part in ("pictures", "artifacts") or path == "metrics/plan.json":
            return "nothing has to be done: it is only looked at, and no step reads it"
        if path == "test_readings.jsonl":
            return "put a copy of it back: it cannot be made again"
        whole = part if part in ("class_encoder", "unet") else path
        return f"sdlab repair {self.settings.experiment} {whole}"

    def compare(self, name: str, noted: dict, number: str, prefix: bool = False) -> None:
        """A file with its noted hash and size; with `prefix`, only its first bytes, since it grows."""
        path, repair = self.folder / name, self.again(name)
        if not path.is_file():
            self.add(name, "missing", f"{STAGES[number].stem} wrote it", repair)
            return
        size = path.stat().st_size
        self.heard(size)
        if size != noted["bytes"] and not (prefix and size > noted["bytes"]):
            self.add(name, "damaged", f"{size} bytes instead of {noted['bytes']}", repair)
        elif sha256_of_first_bytes(path, noted["bytes"]) != noted["sha256"]:
            self.add(name, "damaged", "its content is not what was written", repair)
        else:
            self.seen.setdefault(name, True)

    # ------------------------------------------------------------------------------------------------ steps

    def records(self) -> dict[str, dict]:
        found = {}
        for number in STAGES:
            name = f"records/{number}.json"
            try:
                record = read_record(self.settings, number)
                if record is not None and record["step"] != STAGES[number].stem:
                    raise BadInput("of another step")
            except BadInput:
                self.add(name, "damaged", "its content is not what was written", self.again(name))
                continue
            if record is not None:
                found[number], self.seen[name] = record, True
            elif left := [path for part in WRITES[number] for path in self.folder.glob(part)]:  # it is written first
                why = f"there is {left[0].relative_to(self.folder).as_posix()}, which {STAGES[number].stem} wrote"
                self.add(name, "missing", why, self.again(name))
        return found

    def step(self, number: str, record: dict) -> None:
        """Its outputs and what lies beside them, its settings and its upstream."""
        name = f"records/{number}.json"
        for output, noted in record["outputs"].items():
            self.compare(output, noted, number)
        for path, noted in record.get("beside", {}).items():
            if path != "settings.yaml" or number == self.last:  # each step writes it when it begins
                self.compare(path, noted, number, prefix=path.endswith(".jsonl"))
        changed = settings_differences(self.settings, number, record)
        if changed:
            self.add(name, "stale", f"{STAGES[number].stem} was made with other settings: {changed}", self.redo(number))
        for upstream in STAGES[number].upstream:
            path = f"records/{upstream}.json"
            before = self.known.get(upstream)
            if before is None and not (self.folder / path).exists() and path not in self.seen:
                self.add(path, "missing", f"{STAGES[number].stem} was made from it", self.again(path))
            elif before and before["finished"] and record_digest(before) != record["upstream"].get(upstream):
                why = f"{STAGES[upstream].stem} was made anew since {STAGES[number].stem} was"
                self.add(name, "stale", why, self.redo(number))

    def redo(self, number: str) -> str:
        return f"sdlab run {self.settings.experiment} --redo {number}"

    def notebook(self, number: str) -> None:
        name = f"records/{number}.notebook.json"
        copy = f"notebooks/{STAGES[number].stem}.ipynb"
        if not (self.folder / name).exists():
            if (self.folder / copy).exists():  # else it was run by hand
                self.add(name, "missing", f"it has the hash of {copy}", self.again(name))
                self.seen.setdefault(copy, True)
            return
        try:
            noted = read_hashed_json(self.folder / name)
            if list(noted) != [copy]:
                raise BadInput("of another notebook")
            check_fields(noted[copy], dict(sha256=str, bytes=int), self.folder / name)
        except BadInput:
            self.add(name, "damaged", "its content is not what was written", self.again(name))
            return
        self.seen[name] = True
        for path, hashes in noted.items():
            self.compare(path, hashes, number)

    # -------------------------------------------------------------------------------------------- checkpoints

    def checkpoint(self, part: str, epoch: Path) -> None:
        try:
            hashes = checkpoint_hashes(epoch)
        except BadInput:
            self.add(epoch / "manifest.json", "damaged", "it names no files and hashes", self.again(part))
            return
        self.seen.setdefault((epoch / "manifest.json").relative_to(self.folder).as_posix(), True)
        for name, sha in hashes.items():
            path = epoch / name
            relative = path.relative_to(self.folder).as_posix()
            if relative in self.seen:
                continue  # of a finished step, by its record
            if not path.is_file():
                self.add(path, "missing", "its checkpoint's manifest names it", self.again(part))
                continue
            self.heard(path.stat().st_size)
            if sha256_of_file(path) != sha:
                self.add(path, "damaged", "its content is not what was written", self.again(part))
            self.seen.setdefault(relative, True)

    def resume_state(self, part: str, path: Path) -> None:
        if not path.is_file():
            return
        self.heard(path.stat().st_size)
        self.seen[path.relative_to(self.folder).as_posix()] = True
        if not is_resume_state_intact(path):
            self.add(path, "damaged", "its content is not what was written", self.again(part))

    # -------------------------------------------------------------------------------------------- synthetic sets

    def synthetic(self, made: Path) -> None:
        name = (made / "manifest.json").relative_to(self.folder).as_posix()
        relative = made.relative_to(self.folder).as_posix()
        try:
            manifest = read_manifest(made)
            if manifest["key"] != made.name:
                raise BadInput("of another set")
        except BadInput:
            there = (made / "manifest.json").exists()
            killed_at_first = self.unfinished and not there and len(list(made.glob("shard_*"))) < 2
            if made.is_dir() and not killed_at_first:
                why = "its set's shards cannot be told without it"
                self.add(name, "damaged" if there else "missing", why, self.way_out(made))
                for path in made.iterdir():
                    self.seen.setdefault(path.relative_to(self.folder).as_posix(), False)
            return
        self.seen[name] = True
        for part, sha in (manifest["made_from"] or {}).get("checkpoints", {}).items():
            epoch = manifest["made_from"]["config"][f"{part}_epoch"]
            with contextlib.suppress(BadInput):
                if checkpoint_sha(self.folder / part, epoch) != sha:
                    why = f"made with another {part}/epoch_{epoch:02d} than is there now"
                    self.add(name, "stale", why, f"move {relative}/ away, nothing reads it any more")
        for index, noted in manifest["shards"].items():
            path = shard_path(made, int(index))
            repair = self.again(path.relative_to(self.folder).as_posix())
            if not path.is_file():
                self.add(path, "missing", "its set's manifest names it", repair)
                continue
            self.heard(path.stat().st_size)
            self.seen[path.relative_to(self.folder).as_posix()] = True
            if sha256_of_file(path) != noted["sha256"]:
                self.add(path, "damaged", "its content is not what was written", repair)

    def way_out(self, made: Path) -> str:
        """Of a set without its manifest: make the step anew whose results stand on it, if one reads it still."""
        for number, results in SETS_OF.items():
            with contextlib.suppress(BadInput, OSError):
                if made.name in json.dumps(read_json(self.folder / "metrics" / f"{results}.json")):
                    return self.redo(number)
        return f"move synthetic/{made.name}/ away: it was a trial's, and nothing reads it any more"

    # -------------------------------------------------------------------------------------------------- searches

    def search(self, search: str) -> None:
        """A finished search's trials in the SQLite file, which the dashboard reads, with its export, which counts."""
        path, export = self.folder / "searches.db", self.folder / "metrics" / f"{search}.json"
        if not self.seen.get(f"metrics/{search}.json"):
            return  # nothing to compare with
        repair = "nothing has to be done: its results are in metrics/; `sdlab dashboard` needs a copy of it back"
        if not path.is_file():
            self.add(path, "missing", "the dashboard shows it; its results are in metrics/", repair)
            return
        self.heard(path.stat().st_size)
        self.seen.setdefault("searches.db", True)
        kept = read_json(export)
        try:
            study, exported = kept["study"], [exported_trial(trial) for trial in kept["trials"]]
        except (KeyError, TypeError, ValueError, AttributeError):
            self.add(export, "damaged", "it is no search's", self.again(f"metrics/{search}.json"))
            return
        try:
            stored = list(stored_trials(path, str(study)))
        except (sqlite3.Error, KeyError, TypeError, ValueError, AttributeError) as error:
            self.add(path, "damaged", f"SQLite cannot read it ({error})", repair)
            return
        if stored != exported:
            self.add(path, "damaged", f"its trials of {search} are not those of metrics/{search}.json", repair)

    # ------------------------------------------------------------------------------------------------- strangers

    def strangers(self) -> None:
        """Files that nothing named. Of a step that is not finished there may be any of its own."""
        for path in files_below(self.folder):
            name = path.relative_to(self.folder).as_posix()
            if name in self.seen or name in FREE or name.startswith("aside/"):
                continue
            if path.name == ".lock" or name.startswith(".locks/"):
                continue  # empty: what counts is who holds them
            if self.unfinished and not name.endswith(".ipynb"):
                continue
            self.add(name, "foreign", "no step wrote it", "move it away")


def sha256_of_first_bytes(path: Path, count: int) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while count and (chunk := file.read(min(count, 2**20))):
            found.update(chunk)
            count -= len(chunk)
    return found.hexdigest()


def is_resume_state_intact(path: Path) -> bool:
    """Whether a state of `training.save_resume_state` is what was written."""
    try:
        with safe_open(path, "np") as file:
            kept = json.loads(file.metadata()["sdlab"])
            sha256, found = kept.pop("sha256"), hashlib.sha256(json.dumps(kept).encode())
            for name in sorted(file.keys()):
                found.update(name.encode())
                found.update(file.get_tensor(name).tobytes())
    except Exception:  # whatever a damaged file makes the parsers raise
        return False
    return found.hexdigest() == sha256


def exported_trial(trial: dict) -> tuple[int, str, dict, dict, float | None]:
    """As `stored_trials` gives it. Raises `KeyError`, `TypeError`, ... for what is no trial."""
    rungs = {int(images): value for images, value in trial["intermediate"].items()}
    return trial["number"], trial["state"], trial["params"], rungs, trial["value"]


def stored_trials(path: Path, study: str) -> Iterator[tuple[int, str, dict, dict, float | None]]:
    """Number, state, parameters, readings at the rungs and value of a study's trials.

    Raises `sqlite3.Error`, or `KeyError`, `TypeError`, ... where the tables hold something else.
    """
    with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
        if (said := database.execute("pragma integrity_check").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(said)
        trials = database.execute(
            "select trial_id, number, state from trials where study_id = (select study_id from studies where study_name = ?) order by number",
            (study,),
        ).fetchall()
        for trial, number, state in trials:
            rows = database.execute(
                "select param_name, param_value, distribution_json from trial_params where trial_id = ?", (trial,)
            )
            params = {
                name: int(value) if json.loads(kind)["name"] == "IntDistribution" else value
                for name, value, kind in rows
            }
            at = database.execute(
                "select step, intermediate_value from trial_intermediate_values where trial_id = ?", (trial,)
            )
            rungs = dict(sorted(at.fetchall()))
            value = database.execute("select value from trial_values where trial_id = ?", (trial,)).fetchone()
            yield number, state.lower(), params, rungs, value[0] if value else None
