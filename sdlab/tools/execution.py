"""Executing notebooks with papermill: one command at a time, in this Python, with its progress shown here."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from sdlab.errors import BadInput
from sdlab.paths import PARAMS, PROJECT_ROOT, is_file, relative_to_project
from sdlab.runs.files import atomic_write
from sdlab.runs.locks import Lock
from sdlab.runs.parameters import read_parameters
from sdlab.runs.records import record_notebook, record_path
from sdlab.runs.stages import Stage
from sdlab.settings import Settings

NOTEBOOKS = PROJECT_ROOT / "notebooks"


def execute_notebook(settings: Settings, stage: Stage) -> float:
    """Execute one notebook and keep its executed copy. Returns seconds. Raises `BadInput` if it fails."""
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    logging.getLogger("papermill").setLevel(logging.ERROR)
    # An interrupt may leave a task that waited for the kernel: its complaint would follow our own sentence.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    started, record = time.monotonic(), record_path(settings, stage.number)
    before = record.read_bytes() if record.exists() else None
    with scratch(settings) as folder, Watcher(settings.run_folder / "progress.json", stage.stem):
        output = folder / f"{stage.stem}.ipynb"
        try:
            papermill.execute_notebook(
                unformatted(NOTEBOOKS / f"{stage.stem}.ipynb"),
                unformatted(output),
                parameters=injected_parameters(settings),
                progress_bar=False,
                cwd=NOTEBOOKS,
                kernel_name="python3",
                kernel_manager_class=kernel_of_this_python(),
                # Without a warning about TCP, and what an interrupted kernel could not send.
                extra_arguments=["--IPKernelApp.log_level=50"],
            )
        except PapermillExecutionError as error:
            # A notebook that was refused before it opened its stage leaves nothing.
            opened = record.exists() and record.read_bytes() != before
            copy = save_executed_copy(settings, stage, output) if opened else None
            raise BadInput(describe_failure(stage, error, copy)) from error
        except DeadKernelError as error:
            raise BadInput(
                f"The kernel of {stage.stem} died (often: out of memory): the same command resumes there."
            ) from error
        except KeyboardInterrupt:
            raise BadInput(f"Stopped during {stage.stem}: the same command resumes there.") from None
        save_executed_copy(settings, stage, output)
    return time.monotonic() - started


def injected_parameters(settings: Settings) -> dict[str, Any]:
    """What a notebook has to be told: the settings that are not the defaults.

    `Settings.from_notebook` reads `params/<experiment>.yaml` beneath them: names in there are injected whatever their
    value, so that a parameter file of another folder, with the same experiment name, is not mixed with it.
    """
    file = PARAMS / f"{settings.experiment}.yaml"
    named = read_parameters(file) if is_file(file) else {}
    values = settings.as_dict().items()
    return {name: value for name, value in values if name in named or value != getattr(Settings, name, None)}


def kernel_of_this_python() -> type:
    """A kernel manager for the Python that runs this: kernels that are installed may be of another, or of a deleted one."""
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]

    class ThisPython(AsyncKernelManager):
        kernel_spec = KernelSpec(argv=command, display_name="this Python", language="python")

    return ThisPython


def unformatted(path: Path) -> str:
    """A path for papermill, which formats text in braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


def describe_failure(stage: Stage, error: Any, copy: Path | None) -> str:
    """The failing cell's error in words: a `BadInput` is a sentence already."""
    if error.ename == "BadInput":
        return error.evalue
    where = f"; the executed copy is {relative_to_project(copy)}" if copy else ""
    return f"{stage.stem} failed in cell [{error.exec_count}] with {error.ename}: {error.evalue}{where}."


@contextlib.contextmanager
def exclusive_command(settings: Settings, command: str) -> Iterator[None]:
    """One command that executes notebooks of an experiment at a time. Raises `BadInput` that names the other."""
    # Not in the run's folder, where a run that is refused may leave nothing.
    lock = Lock(scratch_folder(settings).with_suffix(".lock"), settings.run_folder, command)
    if lock.note:
        click.echo(lock.note, err=True)
    before, os.environ["SDLAB_PROGRESS_FILE_ONLY"] = os.environ.get("SDLAB_PROGRESS_FILE_ONLY", ""), "1"
    try:
        yield
    finally:
        os.environ["SDLAB_PROGRESS_FILE_ONLY"] = before
        lock.release()


def scratch_folder(settings: Settings) -> Path:
    """The folder of an experiment's kernel: the same each time, so that what a killed one left is found and removed."""
    name = hashlib.sha256(str(settings.run_folder).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"sdlab-{os.getuid()}-{name}"


@contextlib.contextmanager
def scratch(settings: Settings) -> Iterator[Path]:
    """An empty folder for an executed notebook and Jupyter's temporary files; removed at the end."""
    folder = scratch_folder(settings)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, exist_ok=True)  # a network disk may keep a dying kernel's
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise BadInput(f"{folder} is somebody else's: set TMPDIR to a folder of your own.")
    before, tempfile.tempdir = tempfile.tempdir, str(folder)  # where Jupyter writes
    try:
        yield folder
    finally:
        tempfile.tempdir = before
        shutil.rmtree(folder, ignore_errors=True)


def save_executed_copy(settings: Settings, stage: Stage, output: Path) -> Path | None:
    """Move an executed notebook into the run's folder, without this machine's paths; None if the run wrote nothing."""
    if not settings.run_folder.exists() or not output.exists():
        return None
    text = output.read_text(encoding="utf-8")
    if settings.storage:  # may hold a password
        for form in forms_in_notebooks(settings.storage):
            text = text.replace(form, "(storage)")
    for path in (str(output.parent), str(PROJECT_ROOT)):
        for form in forms_in_notebooks(path):
            text = text.replace(form + "/", "").replace(form, ".")
    copy = settings.run_folder / "notebooks" / output.name
    with atomic_write(copy) as temporary:
        temporary.write_text(text, encoding="utf-8")
    record_notebook(settings, stage.number, copy)
    return copy


def forms_in_notebooks(text: str) -> tuple[str, str]:
    """A text in the two forms of a notebook's file: of an output, and of the parameters that papermill injects."""
    escaped = text.encode("unicode_escape").decode().replace('"', r"\"")
    return tuple(json.dumps(form, ensure_ascii=False)[1:-1] for form in (text, escaped))


class Watcher(threading.Thread):
    """Shows the progress file of a running notebook: a bar on a terminal, now and then a line in a log."""

    def __init__(self, path: Path, stem: str):
        super().__init__(daemon=True)
        self.path, self.stem, self.ended, self.started = path, stem, threading.Event(), time.time()
        self.on_terminal = sys.stderr.isatty()

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_) -> None:
        self.ended.set()
        self.join()

    def run(self) -> None:
        # A kernel imports for some seconds before it has anything to show.
        bar, shown, last_line = self.new_bar("starting", bar_format="{desc}{elapsed}"), None, time.monotonic()
        while not self.ended.wait(0.5):
            progress = self.read()
            if progress and shown != (shown := (progress["desc"], progress["total"])):
                bar.close()
                bar = self.new_bar(**{key: progress[key] for key in ("desc", "total", "unit")}, initial=progress["n"])
            bar.n = progress.get("n", 0)
            bar.refresh()
            if progress and not self.on_terminal and time.monotonic() - last_line > 15:
                last_line = time.monotonic()
                click.echo(f"  {self.stem}: " + "{desc} {n}/{total} {unit} ({rate:.3g}/s)".format(**progress), err=True)
        bar.close()

    def new_bar(self, desc: str, **kwargs: Any) -> tqdm:
        return tqdm(desc=f"{self.stem}: {desc}", leave=False, disable=not self.on_terminal, **kwargs)

    def read(self) -> dict:
        """The progress; empty if there is none yet, or an earlier run's."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            progress = json.loads(self.path.read_text(encoding="utf-8"))
            return progress if progress["time"] >= self.started else {}
        return {}
