"""An experiment's folder: which steps are finished, from what they were made, who is at work, how far it is.

    runs/<experiment>/settings.yaml        what the last opened step was run with
                      records/01.json      a step: its settings, what it was made from, its files with their hashes
                      begun/               what the step inside has so far, to go on from; removed at its end
                      progress.json        how far it is, for `sdlab run`
                      test_readings.jsonl  each reading of the test set

Nothing here imports torch.
"""

import contextlib
import fcntl
import functools
import json
import os
import platform
import re
import resource
import shutil
import socket
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import yaml
from tqdm.auto import tqdm

from sdlab.files import (
    checked_form,
    half_files,
    inside,
    read_sealed,
    remove_left_over,
    sha256_of_file,
    sha256_of_json,
    size_below,
    write_json,
    write_sealed,
    writing,
    written_beside,
)
from sdlab.settings import BadInput, Settings

# Of a training: clocked times, and a state that is of use only until the training ends.
NOT_OUTPUTS = ("history.json", "resume.safetensors")
SHARED = ("settings.yaml", "test_readings.jsonl")  # by all steps
BESIDE = (*SHARED, "*/history.json", "metrics/plan.json", "pictures/*", "artifacts/*")
PACKAGES = ("torch", "diffusers", "optuna", "numpy", "scikit-learn")


@dataclass(frozen=True)
class Step:
    """One notebook: its number and name, and the steps whose files it reads."""

    number: str
    name: str
    upstream: tuple[str, ...]

    @property
    def stem(self) -> str:
        return f"{self.number}_{self.name}"


STEPS = {
    step.number: step
    for step in (
        Step("00", "data_and_base_model", ()),
        Step("01", "class_encoder", ("00",)),
        Step("02", "first_search", ("01",)),
        Step("03", "fine_tuning", ("02",)),
        Step("04", "final_search", ("03",)),
        Step("05", "scaling", ("04",)),
        Step("06", "importance", ("02", "04")),
        Step("07", "paper_tables", ("05", "06")),
    )
}

# What a step writes, finished or not, beside its record and its executed copy.
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

BENCHMARKS = Step("08", "benchmarks", ())  # of no experiment


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def peak_memory() -> int:
    """The most bytes this process has held so far: of the GPU where torch has used one, else of RAM."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        used = max(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
        if used:
            return used
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def made_with(base: Any) -> dict[str, str | int]:
    """What the last bits of results depend on: versions; where a base model computes, its device, and a CPU's threads."""
    found = {name: metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()}
    torch, device = sys.modules.get("torch"), getattr(base, "device", None)
    if torch is None or device is None:
        return found
    if device.type == "cuda":
        return found | dict(device=torch.cuda.get_device_name(device))
    kind = "" if device.type == "cpu" else f"{device.type} of "
    device = f"{kind}{cpu_name()} ({torch.backends.cpu.get_cpu_capability()})"
    return found | dict(device=device, threads=torch.get_num_threads())


def cpu_name(facts: Path = Path("/proc/cpuinfo")) -> str:
    """As Linux has it on x86; elsewhere the architecture."""
    with contextlib.suppress(OSError):
        if named := re.search(r"model name\s*: (.*)", facts.read_text()):
            return named[1]
    return platform.machine()


# -------------------------------------------------------------------------------------------------- records


def record_path(settings: Settings, number: str) -> Path:
    return settings.run_folder / "records" / f"{number}.json"


RECORD = dict(
    step=str,
    settings=dict,
    upstream=dict,
    inputs=dict,
    outputs=dict,
    begun=str,
    finished=str | None,
    seconds=float | int,
    opened_at=float,
)


def read_record(settings: Settings, number: str) -> dict | None:
    """A step's record; None if it never began. Raises `BadInput` if it is not what was written, or names foreign files."""
    path = record_path(settings, number)
    if not path.exists():
        return None
    record = checked_form(read_sealed(path), RECORD, path)
    for name, noted in [*record["outputs"].items(), *checked_form(record.get("beside", {}), {}, path).items()]:
        if not inside(name):
            raise BadInput(f"{path} names {name!r}, which is outside the folder: move it away and run its step again.")
        checked_form(noted, dict(sha256=str, bytes=int), path)
    means = checked_form(
        dict(made_with={}, made_with_before=[]) | record, dict(made_with=dict, made_with_before=list), path
    )
    for before in means["made_with_before"]:
        checked_form(before, {}, path)
    return record


def change_within(record: dict) -> str:
    """One sentence if a step was not gone on with as it was begun, else nothing."""
    for before in record.get("made_with_before", []):
        if changed := changes(before, record["made_with"]):
            return (
                f"{record['step']} was begun with other means than it went on with ({', '.join(changed)}): what it made is as good, "
                "but not the same bytes as in one go."
            )
    return ""


def changes(before: dict, after: dict) -> list[str]:
    return [f"{name} {was} -> {after[name]}" for name, was in before.items() if after.get(name, was) != was]


def digest(record: dict) -> str:
    """What a step is, to those that come after it: its settings, its own upstream, its inputs, its files."""
    outputs = {name: output["sha256"] for name, output in record["outputs"].items()}
    return sha256_of_json([record["settings"], record["upstream"], record.get("inputs"), outputs])


def differences(settings: Settings, number: str, record: dict) -> str:
    """How the settings of a step differ from those it was made with, in words; empty if they do not.

    A setting that is newer than the step was at what is its default now.
    """
    ours = settings.of_step(number)
    missing = object()
    changed = [
        f"{name} {theirs!r} -> {ours.get(name)!r}"
        for name, theirs in record["settings"].items()
        if ours.get(name, missing) != theirs
    ]
    changed += [
        f"{name} (new) {ours[name]!r}"
        for name in sorted(ours.keys() - record["settings"].keys())
        if ours[name] != getattr(Settings, name, missing)
    ]
    return ", ".join(changed)


@dataclass(frozen=True)
class StepState:
    """`state` is one of `done`, `begun`, `not run`, `stale`, `damaged`; `why` is empty for `done` and `not run`."""

    state: str
    why: str = ""
    seconds: float = 0.0


def step_state(settings: Settings, number: str) -> StepState:
    """What a step's record and files say, against the present settings and its upstream."""
    record = read_record(settings, number)
    if record is None:
        return StepState("not run")
    changed = differences(settings, number, record)
    if changed:
        return StepState("stale", f"made with other settings: {changed}")
    for upstream in STEPS[number].upstream:
        state = step_state(settings, upstream)
        if state.state != "done":
            return StepState("stale", f"{STEPS[upstream].stem} is {state.state}")
        if record["upstream"].get(upstream) != digest(read_record(settings, upstream)):
            return StepState("stale", f"{STEPS[upstream].stem} was made anew since")
    if not record["finished"]:
        return StepState("begun", "not finished: it goes on where it was")
    for name, output in record["outputs"].items():
        path = settings.run_folder / name
        if not path.is_file():
            return StepState("damaged", f"{name} is missing")
        if path.stat().st_size != output["bytes"]:
            return StepState("damaged", f"{name} has {path.stat().st_size} bytes instead of {output['bytes']}")
        # Weights are hashed when they are loaded; results and manifests are small enough to be hashed each time.
        if path.suffix == ".json" and sha256_of_file(path) != output["sha256"]:
            return StepState("damaged", f"{name} was altered")
    return StepState("done", seconds=record["seconds"])


def check_step(settings: Settings, number: str) -> StepState:
    """The state of a step that can be opened. Raises `BadInput` if what it reads is not there, or it was made otherwise."""
    step, folder = STEPS[number], settings.run_folder
    for upstream in (STEPS[n] for n in step.upstream):
        state = step_state(settings, upstream.number)
        if state.state in ("not run", "begun"):
            raise BadInput(
                f"{step.stem} reads what {upstream.stem} writes, which is {state.state} in {folder}: "
                f"run {upstream.stem} first (`sdlab run` takes them in order)."
            )
        if state.state != "done":
            raise BadInput(f"{upstream.stem} is {state.state} in {folder} ({state.why}): {way_out(state, upstream)}")
    state = step_state(settings, number)
    # What is missing is made again; what was altered is a user's file now, and is not written over.
    if state.state == "stale" or (state.state == "damaged" and not state.why.endswith("is missing")):
        raise BadInput(f"{step.stem} is {state.state} in {folder} ({state.why}): {way_out(state, step)}")
    return state


def way_out(state: StepState, step: Step) -> str:
    if state.state == "damaged" and state.why.startswith(("class_encoder/", "unet/")):
        return f"move the folder {state.why.partition('/')[0]} away and run {step.stem} again, which trains the same once more."
    if state.state == "damaged":
        return f"move that file away if it is still there, and run {step.stem} again, which makes it anew."
    return (
        "undo the change, or give the changed experiment a name of its own (copy its parameter file and change "
        "`experiment`), or move the old folder away."
    )


# ----------------------------------------------------------------------------------------------------- lock


class Lock:
    """Held by one process at a time; the system releases it when that process ends, however it ends.

    The process that holds it may take it again: a notebook's cell can be run twice. `note` says from whom it was taken
    over, if that process ended without letting it go. Raises `BadInput` that names the holder.
    """

    held: ClassVar[dict[Path, "Lock"]] = {}
    PATIENCE: ClassVar[float] = 5.0  # seconds: a kernel whose `sdlab run` was killed ends itself within one or two

    def __init__(self, path: Path, folder: Path, what: str):
        if path in Lock.held:
            Lock.held[path].release()
        self.path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("a+")
        until = time.monotonic() + Lock.PATIENCE
        while not self.taken():
            if time.monotonic() > until:
                holder = self.said() or "another process"
                self.file.close()
                raise BadInput(
                    f"The experiment folder {folder} is in use by {holder}: wait for it, stop it, "
                    "or give this run another `experiment` name."
                )
            time.sleep(0.1)
        before = self.said()
        self.note = f"{folder} was last in use by {before}, which ended without a word: going on from what it left."
        if not before:
            self.note = ""
        with writing(path):
            self.file.truncate(0)
            self.file.write(f"{what} (process {os.getpid()} on {socket.gethostname()}, since {now()})")
            self.file.flush()
        Lock.held[path] = self

    def taken(self) -> bool:
        try:
            with writing(self.path):
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def said(self) -> str:
        """What the last holder wrote, unless it let the lock go."""
        self.file.seek(0)
        return self.file.read().strip()

    def release(self) -> None:
        if Lock.held.get(self.path) is self:
            del Lock.held[self.path]
            self.file.truncate(0)
            self.file.close()


def check_storage(settings: Settings) -> None:
    """Raises `BadInput` for a storage that cannot be reached. Creates nothing."""
    import sqlalchemy

    try:
        if set("{}") & set(settings.storage_url):
            raise ValueError("Optuna formats what stands between braces: write %7B for { and %7D for }")
        engine = sqlalchemy.create_engine(settings.storage_url)
        if engine.dialect.name != "sqlite":
            engine.connect().close()
        elif not Path(engine.url.database or ".").resolve().parent.is_dir():
            raise ValueError(f"there is no folder {Path(engine.url.database).resolve().parent}")
        elif Path(engine.url.database or ".").is_file():
            Path(engine.url.database).open("rb").close()
    except ImportError as error:
        reason = f"its driver is not installed ({error}); for postgresql:// `pip install 'psycopg[binary]'`"
    except (sqlalchemy.exc.SQLAlchemyError, ValueError) as error:
        reason = str(error).splitlines()[0]
    except OSError as error:
        reason = error.strerror
    else:
        return
    url = re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", settings.storage_url)  # no password in a log
    raise BadInput(
        f"The storage {url} cannot be opened ({reason}): check the `storage` setting; empty means SQLite in the "
        "experiment's folder."
    )


# ------------------------------------------------------------------------------------------------- progress


class Progress:
    """How far a piece of work is, in a small file, since a kernel's bars do not reach the terminal; and a tqdm bar.

    `sdlab run` renders the file and sets SDLAB_PROGRESS_FILE_ONLY, so that no bars stand in the executed notebooks.
    """

    def __init__(self, path: Path | None, total: int, desc: str, unit: str, initial: int = 0):
        self.path, self.written, self.started = path, 0.0, time.monotonic()
        self.said = dict(desc=desc, n=initial, total=total, unit=unit, rate=0.0, time=time.time())
        self.initial = initial
        silent = bool(os.environ.get("SDLAB_PROGRESS_FILE_ONLY"))
        self.bar = None if silent else tqdm(desc=desc, total=total, initial=initial, unit=unit, leave=False)
        self.say()

    def update(self, n: int = 1) -> None:
        self.said["n"] += n
        self.said["rate"] = (self.said["n"] - self.initial) / max(time.monotonic() - self.started, 1e-9)
        if self.bar is not None:
            self.bar.update(n)
        if time.monotonic() - self.written > 0.5:
            self.say()

    def say(self) -> None:
        self.written = time.monotonic()
        self.said["time"] = time.time()
        # Only a display: a disk that is full must not stop the work for it.
        with contextlib.suppress(BadInput):
            if self.path is not None:
                write_json(self.path, self.said, lasting=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()


# ------------------------------------------------------------------------------------------------------ run


def note_notebook(settings: Settings, step: Step, path: Path) -> None:
    """Record an executed copy's hash beside its step's record: it is written when the step has ended."""
    write_sealed(
        settings.run_folder / "records" / f"{step.number}.notebook.json",
        {
            path.relative_to(settings.run_folder).as_posix(): dict(
                sha256=sha256_of_file(path), bytes=path.stat().st_size
            )
        },
    )


def readers(number: str) -> list[str]:
    """A step and all that are made from it, in order."""
    found = {number}
    for step in STEPS.values():
        if found & set(step.upstream):
            found.add(step.number)
    return sorted(found)


def new_aside(folder: Path) -> Path:
    """`aside/<now>/` of a run, where nothing reads; not made yet."""
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    names = (f"{stamp}{more}" for more in ("", *(f"-{i}" for i in range(2, 1000))))
    return next(folder / "aside" / name for name in names if not (folder / "aside" / name).exists())


def move_aside(folder: Path, paths: list[Path], aside: Path) -> None:
    """Move files and folders of a run below `aside`. Raises `BadInput`."""
    with writing(aside):
        for path in paths:
            target = aside / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)


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
        self.settings, self.step, self.folder = settings, STEPS[stem[:2]], settings.run_folder
        given = dict(data=data, base_model=base)
        self.inputs = {name: value.fingerprint() for name, value in given.items() if value is not None}
        state = check_step(settings, self.step.number)
        self.check_inputs()
        if settings.storage and state.state != "done" and self.step.number <= "04":  # long before the first search
            check_storage(settings)
        self.started, self.lock, self.helping = time.monotonic(), None, helping
        if helping:
            self.record = read_record(settings, self.step.number)
            self.finished = self.record is None or state.state == "done"
        else:
            self.finished = state.state == "done" or not self.begin(base)
        told = not (self.finished or helping)
        self.progress = functools.partial(Progress, self.folder / "progress.json" if told else None)

    def check_inputs(self) -> None:
        """Raises `BadInput` if the data set or the base model changed under the experiment."""
        first = read_record(self.settings, "00")
        for name, found in self.inputs.items():
            if first is not None and first.get("inputs", {}).get(name) != found:
                raise BadInput(
                    f"The `{dict(data='dataset', base_model='base_model')[name]}` is no longer the one that 00_data_and_base_model "
                    f"saw in {self.folder} (its content differs): restore it, or give the experiment another name."
                )

    def begin(self, base: Any) -> bool:
        """Take the folder and record the step as begun; False if another process finished it meanwhile."""
        self.lock = Lock(self.folder / ".lock", self.folder, self.step.stem)
        if self.lock.note and not os.environ.get("SDLAB_PROGRESS_FILE_ONLY"):  # `sdlab run` says it itself
            print(self.lock.note)
        remove_left_over(half_files(self.folder))
        if check_step(self.settings, self.step.number).state == "done":
            self.lock.release()
            return False
        before = read_record(self.settings, self.step.number)
        self.record = dict(
            step=self.step.stem,
            settings=self.settings.of_step(self.step.number),
            upstream={n: digest(read_record(self.settings, n)) for n in self.step.upstream},
            inputs=self.inputs,
            outputs={},
            begun=before["begun"] if before else now(),
            opened=f"{now()} by process {os.getpid()}",
            finished=None,
            seconds=before["seconds"] + self.lost_seconds(before) if before else 0.0,
            opened_at=time.time(),
            made_with=made_with(base),
            made_with_before=[],
        )
        if before:
            means = [*before.get("made_with_before", []), before.get("made_with", {})]
            self.record["made_with_before"] = [m for m in means if changes(m, self.record["made_with"])]
            if note := change_within(self.record):
                print(note)
        write_sealed(record_path(self.settings, self.step.number), self.record)
        # After the record, which says that it is this step's.
        with written_beside(self.folder / "settings.yaml") as beside:
            beside.write_text(yaml.safe_dump(self.settings.as_dict(), sort_keys=False), encoding="utf-8")
        return True

    def lost_seconds(self, before: dict) -> float:
        """How long an attempt was at work that did not finish: until it last said how far it was."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            said = json.loads((self.folder / "progress.json").read_text(encoding="utf-8"))
            return round(max(said["time"] - before["opened_at"], 0.0), 1)
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
        self.record["outputs"] = {
            path.relative_to(self.folder).as_posix(): dict(sha256=sha256_of_file(path), bytes=path.stat().st_size)
            for path in files
            if path.name not in NOT_OUTPUTS
        }
        self.record["beside"] = self.hashes_beside()
        self.record["finished"] = now()
        self.record["measured"] = dict(
            folder_bytes=size_below(self.folder),
            peak_memory_bytes=peak_memory(),
        )
        self.record["seconds"] += round(time.monotonic() - self.started, 1)
        shutil.rmtree(self.begun, ignore_errors=True)  # all of it is in the results by now
        write_sealed(record_path(self.settings, self.step.number), self.record)
        (self.folder / "progress.json").unlink(missing_ok=True)
        self.finished = True
        self.lock.release()

    def hashes_beside(self) -> dict[str, dict]:
        """Of what no later step reads, but a reader looks at: histories, the plan, trials' pictures, readings of the test set.

        Files that only grow are hashed as long as they are now.
        """
        others = set()  # what other steps wrote
        for number in STEPS.keys() - {self.step.number}:
            others |= (read_record(self.settings, number) or {}).get("beside", {}).keys() - set(SHARED)
        paths = [path for part in BESIDE for path in sorted(self.folder.glob(part)) if path.is_file()]
        named = {path.relative_to(self.folder).as_posix(): path for path in paths}
        return {
            name: dict(sha256=sha256_of_file(path), bytes=path.stat().st_size)
            for name, path in named.items()
            if name not in others
        }

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
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(time=now(), step=self.step.stem, what=what)) + "\n")
