"""The record of a stage (`records/NN.json`): the settings and inputs that it depends on, digests of its upstream, hashes of
its files."""

import contextlib
import platform
import re
import sys
import typing
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from sdlab.errors import BadInput, brief
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


def record_notebook(settings: Settings, number: str, path: Path) -> None:
    """Record an executed copy's hash in `records/NN.notebook.json`: it is written after the stage has finished."""
    name = path.relative_to(settings.run_folder).as_posix()
    write_hashed_json(record_path(settings, f"{number}.notebook"), {name: asdict(FileHash.of(path))})


def record_digest(record: StageRecord) -> str:
    """Identifies a stage's result for the stages after it: settings, upstream, inputs, files."""
    outputs = {name: output.sha256 for name, output in record.outputs.items()}
    return sha256_of_json([record.settings, record.upstream, record.inputs, outputs])


def is_recorded(settings: Settings, number: str, path: Path) -> bool:
    """Whether a finished stage has left this file next to its results. Raises `BadInput` if it was altered since."""
    record = read_record(settings, number)
    entry = record and record.side_outputs.get(path.relative_to(settings.run_folder).as_posix())
    if not entry or not path.exists():
        return False
    if sha256_of_file(path) != entry.sha256:
        raise BadInput(
            f"{path} is damaged (its hash does not match its content): move it away, and stages that need it train their own."
        )
    return True


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
    # Tasks run in this process, and so do trainings, unless something else is recorded.
    if "worker_device" in before.keys() | after.keys():
        before, after = (
            dict(worker_device=e.get("device"), worker_threads=e.get("threads")) | e for e in (before, after)
        )
    if "training_processes" in before.keys() | after.keys():
        before, after = (dict(training_processes=1, micro_batch_size=0) | e for e in (before, after))
    return [f"{name} {was} -> {after[name]}" for name, was in before.items() if after.get(name, was) != was]
