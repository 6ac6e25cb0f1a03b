"""Run one stage in a child of this process, which has imported everything; it may be killed, or a write refused.

The folders of an undisturbed run after each stage are where disturbed ones begin and what they are compared with.
"""

import builtins
import functools
import io
import json
import os
import pickle
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import papermill
import torch
import yaml

from sdlab import evaluation, generation, latents, search, training
from sdlab.errors import BadInput
from sdlab.paths import PROJECT_ROOT
from sdlab.runs.records import read_record
from sdlab.runs.stages import STAGES
from sdlab.settings import Settings

TESTS = Path(__file__).parents[1]
NUMBERS = tuple(STAGES)
# Measured times, and hashes of files that hold them.
CLOCKED = {"seconds", "generation_seconds", "trial_seconds", "seconds_per_image_step", "sha256"}
NOT_COMPARED = {"metrics/plan.json", "metrics/tables.json"}  # times, and hashes of records


def settings_file(folder: Path) -> Path:
    """Smoke depth with everything under `folder`, and a resume state at every training step."""
    folder.mkdir(parents=True, exist_ok=True)
    given = yaml.safe_load((TESTS / "smoke.yaml").read_text())
    given |= dict(
        runs_root=str(folder / "runs"), reports_root=str(folder / "reports"), num_threads=1, resume_minutes=0.0
    )
    (folder / "smoke.yaml").write_text(yaml.safe_dump(given))
    return folder / "smoke.yaml"


# -------------------------------------------------------------------------------------------------- comparing


def without_clock(value):
    if isinstance(value, dict):
        return {k: without_clock(v) for k, v in value.items() if k not in CLOCKED}
    return [without_clock(v) for v in value] if isinstance(value, list) else value


def content(run: Path) -> dict[str, object]:
    """What a run promises to repeat: shards, checkpoints, latents, resume states as bytes; results and records without times."""
    contents = {}
    for path in sorted(p for p in run.rglob("*") if p.is_file()):
        name = path.relative_to(run).as_posix()
        if path.suffix in (".safetensors", ".npz") or name.startswith(("pictures/", "data/")):
            contents[name] = path.read_bytes()
        elif path.suffix == ".json" and name.startswith(("metrics/", "synthetic/", "class_encoder/", "unet/")):
            if name not in NOT_COMPARED:
                contents[name] = without_clock(json.loads(path.read_text()))
        elif name.startswith("records/") and "notebook" not in name:
            record = json.loads(path.read_text())
            contents[name] = dict(
                settings=record["settings"], outputs=sorted(record["outputs"]), done=bool(record["finished"])
            )
    return contents


def differing(a: dict, b: dict) -> list[str]:
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def strays(run: Path) -> list[str]:
    """Half-written files and intermediate results that a finished run should not have."""
    left = [p for p in run.rglob("*") if p.name.endswith((".part", ".parts")) or p.name in ("begun", "progress.json")]
    return [p.relative_to(run).as_posix() for p in left]


# --------------------------------------------------------------------------------------------- what a child does


class Refusing:
    """Records all writes below a folder; the `at`-th is refused with an errno.

    Opening to write, making a folder, flushing and renaming: the points at which a write begins, reaches the disk and
    takes its name. What is written by other means (safetensors, SQLite) is refused where it is flushed, or by a full disk.
    """

    def __init__(self, folder: Path, at: int | None, number: int):
        self.folder, self.at, self.number = str(folder), at, number
        self.asked: list[str] = []

    def install(self) -> None:
        real_open, real_os_open, fsync, real_replace, real_mkdir = io.open, os.open, os.fsync, os.replace, os.mkdir
        flushed = {}  # descriptor -> path: fsync is told no name

        def opened(file, mode="r", *args, **kwargs):
            if isinstance(file, str | Path) and set(mode) & set("wax+"):
                self.ask(file, "open")
            return real_open(file, mode, *args, **kwargs)

        def os_opened(path, *args, **kwargs):
            descriptor = real_os_open(path, *args, **kwargs)
            flushed[descriptor] = path
            return descriptor

        def fsynced(descriptor):
            self.ask(flushed.get(descriptor, ""), "flush")
            return fsync(descriptor)

        def replaced(source, target, **kwargs):
            self.ask(target, "rename")
            return real_replace(source, target, **kwargs)

        def made_folder(path, *args, **kwargs):
            self.ask(path, "mkdir")
            return real_mkdir(path, *args, **kwargs)

        io.open = builtins.open = opened
        os.open, os.fsync, os.replace, os.mkdir = os_opened, fsynced, replaced, made_folder

    def ask(self, path, what: str) -> None:
        path = Path(os.fsdecode(path))
        if not str(path).startswith(self.folder) or "progress.json" in path.name:  # a display: it stops nothing
            return
        if what == "mkdir" and path.exists():  # asks nothing of the disk
            return
        self.asked.append(f"{what} {path.relative_to(self.folder)}")
        if len(self.asked) == self.at:
            raise OSError(self.number, os.strerror(self.number), str(path))


def log_work(log: Path, stage: str) -> None:
    """Log each piece of work that a kill may cost as it begins."""

    def logged(module, name: str, line: Callable) -> None:
        original = getattr(module, name)

        def function(*args, **kwargs):
            with log.open("a") as file:
                file.write(line(*args) + "\n")
            return original(*args, **kwargs)

        setattr(module, name, function)

    logged(generation, "generate_images", lambda _, plan, indices, *__: f"shard {plan.key()} {indices[0]}")
    for name in ("encode_part", "round_trip_part"):
        logged(latents, name, lambda base, images, places, *_: f"latents {places.start}")
    logged(
        evaluation,
        "train_classifier",
        lambda train, val, n, recipe, seed, *_: f"classifier {train.fingerprint()} {recipe} {seed}",
    )
    logged(search, "run_trial", lambda run, _, study, order, number, *__: f"trial {study.study_name} {number}")
    if stage in ("01", "03"):  # 00 times a few, for its plan
        logged(training, "predict", lambda *_: "step")


# ---------------------------------------------------------------------------------------------------- attempts


@functools.cache
def warm() -> None:
    """Import what every stage imports, once for all children. This process computes nothing and has one thread."""
    sys.path.append(str(TESTS))
    import diffusers
    import in_process  # noqa: F401  (registers papermill's engine)

    import sdlab.report.figures
    import sdlab.report.tables  # noqa: F401

    _ = diffusers.AutoencoderKL, diffusers.UNet2DConditionModel, diffusers.DDIMScheduler  # loaded when named
    torch.set_num_threads(1)
    os.environ["SDLAB_PROGRESS_FILE_ONLY"] = "1"


def attempt(
    file: Path,
    stage: str,
    *,
    at: int | None = None,
    number: int = 0,
    log: Path | None = None,
    kill_after: float | None = None,
) -> dict | None:
    """Run one stage: `said` (its `BadInput`; "" if it ended well), `crash` (any other error), `asked` (all writes).

    `at`, `number`: which write is refused, with which errno. `kill_after`: seconds after the stage was opened until it is
    killed; None comes back then.
    """
    warm()
    read, write = os.pipe()
    record = Settings.from_file(file).run_folder / "records" / f"{stage}.json"
    child = os.fork()
    if child == 0:
        os.close(read)
        ended = run_here(file, stage, at, number, log)
        if kill_after is not None:
            ended["asked"] = []  # nobody reads yet, and the pipe holds 64 KiB: the stage would wait to be killed
        with os.fdopen(write, "wb") as pipe:
            pickle.dump(ended, pipe)
        os._exit(0)
    os.close(write)
    ends, until = None, None
    while kill_after is not None and not ended_already(child):
        ends = time.monotonic()
        if until is None and record.exists():
            until = ends + kill_after
        if until is not None and ends >= until:
            os.kill(child, signal.SIGKILL)
            break
        time.sleep(0.002)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    assert said or kill_after is not None, f"the child that ran {stage} died"
    return pickle.loads(said) if said else None


def ended_already(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def run_here(file: Path, stage: str, at: int | None, number: int, log: Path | None) -> dict:
    ended = dict(said="", crash="")
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    settings = Settings.from_file(file)
    refusing = Refusing(settings.run_folder.parent, at, number)
    refusing.install()
    if log:
        log_work(log, stage)
    try:
        papermill.execute_notebook(
            PROJECT_ROOT / "notebooks" / f"{STAGES[stage].stem}.ipynb", None, parameters=settings.as_dict(),
            engine_name="in-process", progress_bar=False, cwd=PROJECT_ROOT / "notebooks",
        )  # fmt: skip
    except BadInput as error:
        ended["said"] = str(error)
    except BaseException:
        ended["crash"] = traceback.format_exc()
    return ended | dict(asked=refusing.asked)


def make_stages(folder: Path) -> dict[str, dict]:
    """The undisturbed run: a copy of it after each stage in `folder/after_NN`. Of each stage its `seconds` (since it was
    opened), `asked`, `work`.

    Cached in `folder/stages.json`.
    """
    cached = folder / "stages.json"
    if cached.exists():
        return json.loads(cached.read_text())
    shutil.rmtree(folder / "work", ignore_errors=True)
    file, results = settings_file(folder / "work"), {}
    for stage in NUMBERS:
        log = folder / f"work_{stage}.log"
        log.write_text("")
        ended = attempt(file, stage, log=log)
        assert not ended["said"] and not ended["crash"], ended
        seconds = read_record(Settings.from_file(file), stage).seconds
        results[stage] = dict(seconds=seconds, asked=ended["asked"], work=log.read_text().splitlines())
        shutil.copytree(folder / "work" / "runs", folder / f"after_{stage}", dirs_exist_ok=True)
    cached.write_text(json.dumps(results))
    return results


def before(stages: Path, stage: str, place: Path) -> Path:
    """A parameter file in `place`, whose experiment is where `stage` begins."""
    shutil.rmtree(place / "runs", ignore_errors=True)
    file, index = settings_file(place), NUMBERS.index(stage)
    if index:
        shutil.copytree(stages / f"after_{NUMBERS[index - 1]}", place / "runs")
    return file
