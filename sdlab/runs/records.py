"""TODO runs.records."""

import contextlib
import platform
import re
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from sdlab.errors import BadInput
from sdlab.runs.files import (
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
    """One notebook: its number and name, and the steps whose files it reads."""

    number: str
    name: str
    upstream: tuple[str, ...]

    @property
    def stem(self) -> str:
        return f"{self.number}_{self.name}"


STAGES = {
    step.number: step
    for step in (
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


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def environment(base: Any) -> dict[str, str | int]:
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
    record = check_fields(read_hashed_json(path), RECORD, path)
    for name, noted in [*record["outputs"].items(), *check_fields(record.get("beside", {}), {}, path).items()]:
        if not is_inside(name):
            raise BadInput(f"{path} names {name!r}, which is outside the folder: move it away and run its step again.")
        check_fields(noted, dict(sha256=str, bytes=int), path)
    means = check_fields(
        dict(made_with={}, made_with_before=[]) | record, dict(made_with=dict, made_with_before=list), path
    )
    for before in means["made_with_before"]:
        check_fields(before, {}, path)
    return record


def environment_change(record: dict) -> str:
    """One sentence if a step was not gone on with as it was begun, else nothing."""
    for before in record.get("made_with_before", []):
        if changed := environment_differences(before, record["made_with"]):
            return (
                f"{record['step']} was begun with other means than it went on with ({', '.join(changed)}): what it made is as good, "
                "but not the same bytes as in one go."
            )
    return ""


def environment_differences(before: dict, after: dict) -> list[str]:
    return [f"{name} {was} -> {after[name]}" for name, was in before.items() if after.get(name, was) != was]


def record_digest(record: dict) -> str:
    """What a step is, to those that come after it: its settings, its own upstream, its inputs, its files."""
    outputs = {name: output["sha256"] for name, output in record["outputs"].items()}
    return sha256_of_json([record["settings"], record["upstream"], record.get("inputs"), outputs])


def settings_differences(settings: Settings, number: str, record: dict) -> str:
    """How the settings of a step differ from those it was made with, in words; empty if they do not.

    A setting that is newer than the step was at what is its default now.
    """
    ours = settings.of_stage(number)
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
class StageState:
    """`state` is one of `done`, `begun`, `not run`, `stale`, `damaged`; `why` is empty for `done` and `not run`."""

    state: str
    why: str = ""
    seconds: float = 0.0


def stage_state(settings: Settings, number: str) -> StageState:
    """What a step's record and files say, against the present settings and its upstream."""
    record = read_record(settings, number)
    if record is None:
        return StageState("not run")
    changed = settings_differences(settings, number, record)
    if changed:
        return StageState("stale", f"made with other settings: {changed}")
    for upstream in STAGES[number].upstream:
        state = stage_state(settings, upstream)
        if state.state != "done":
            return StageState("stale", f"{STAGES[upstream].stem} is {state.state}")
        if record["upstream"].get(upstream) != record_digest(read_record(settings, upstream)):
            return StageState("stale", f"{STAGES[upstream].stem} was made anew since")
    if not record["finished"]:
        return StageState("begun", "not finished: it goes on where it was")
    for name, output in record["outputs"].items():
        path = settings.run_folder / name
        if not path.is_file():
            return StageState("damaged", f"{name} is missing")
        if path.stat().st_size != output["bytes"]:
            return StageState("damaged", f"{name} has {path.stat().st_size} bytes instead of {output['bytes']}")
        # Weights are hashed when they are loaded; results and manifests are small enough to be hashed each time.
        if path.suffix == ".json" and sha256_of_file(path) != output["sha256"]:
            return StageState("damaged", f"{name} was altered")
    return StageState("done", seconds=record["seconds"])


def check_stage(settings: Settings, number: str) -> StageState:
    """The state of a step that can be opened. Raises `BadInput` if what it reads is not there, or it was made otherwise."""
    step, folder = STAGES[number], settings.run_folder
    for upstream in (STAGES[n] for n in step.upstream):
        state = stage_state(settings, upstream.number)
        if state.state in ("not run", "begun"):
            raise BadInput(
                f"{step.stem} reads what {upstream.stem} writes, which is {state.state} in {folder}: "
                f"run {upstream.stem} first (`sdlab run` takes them in order)."
            )
        if state.state != "done":
            raise BadInput(f"{upstream.stem} is {state.state} in {folder} ({state.why}): {remedy(state, upstream)}")
    state = stage_state(settings, number)
    # What is missing is made again; what was altered is a user's file now, and is not written over.
    if state.state == "stale" or (state.state == "damaged" and not state.why.endswith("is missing")):
        raise BadInput(f"{step.stem} is {state.state} in {folder} ({state.why}): {remedy(state, step)}")
    return state


def remedy(state: StageState, step: Stage) -> str:
    if state.state == "damaged" and state.why.startswith(("class_encoder/", "unet/")):
        return f"move the folder {state.why.partition('/')[0]} away and run {step.stem} again, which trains the same once more."
    if state.state == "damaged":
        return f"move that file away if it is still there, and run {step.stem} again, which makes it anew."
    return (
        "undo the change, or give the changed experiment a name of its own (copy its parameter file and change "
        "`experiment`), or move the old folder away."
    )


def record_notebook(settings: Settings, step: Stage, path: Path) -> None:
    """Record an executed copy's hash beside its step's record: it is written when the step has ended."""
    write_hashed_json(
        settings.run_folder / "records" / f"{step.number}.notebook.json",
        {
            path.relative_to(settings.run_folder).as_posix(): dict(
                sha256=sha256_of_file(path), bytes=path.stat().st_size
            )
        },
    )


def downstream_stages(number: str) -> list[str]:
    """A step and all that are made from it, in order."""
    found = {number}
    for step in STAGES.values():
        if found & set(step.upstream):
            found.add(step.number)
    return sorted(found)
