"""`sdlab` on the command line: runs the notebooks in order with papermill, and says what is done."""

import contextlib
import difflib
import errno
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
from pathlib import Path, PurePosixPath

import click
import yaml
from tqdm import tqdm

from sdlab.data.datasets import dataset_facts, fetch_dataset
from sdlab.errors import BadInput
from sdlab.paths import PROJECT_ROOT, project_path
from sdlab.runs.export import export_set
from sdlab.runs.files import atomic_write, cannot_write, folder_size, is_inside, write_errno
from sdlab.runs.locks import Lock
from sdlab.runs.parameters import from_yaml, read_parameters
from sdlab.runs.records import (
    STAGES,
    WRITES,
    Stage,
    check_stage,
    downstream_stages,
    environment_change,
    read_record,
    record_notebook,
    record_path,
    stage_state,
)
from sdlab.runs.run import Run, move_aside, new_aside_folder
from sdlab.runs.storage import check_storage, storage_url
from sdlab.settings import Settings, parameter_file

NOTEBOOKS = PROJECT_ROOT / "notebooks"


class OneSentence(click.Group):
    """Whatever fails is shown in one sentence, with exit code 1; `--debug` shows where it came from."""

    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if ctx.params.get("debug"):
                raise
            raise click.ClickException(describe_error(error, ctx.invoked_subcommand)) from None


def describe_error(error: Exception, command: str) -> str:
    """One sentence for an error that ended a command."""
    if isinstance(error, BadInput):
        return str(error)
    if number := write_errno(error):  # of what lies outside any run: a terminal's temporary folder, a notebook's copy
        where = getattr(error, "filename", None) or f"{tempfile.gettempdir()}, or where this command prints to,"
        if number in (errno.EACCES, errno.EPERM, errno.EIO):
            return f"{where} cannot be read or written ({os.strerror(number)}): mend that, and give the same command."
        return cannot_write(where, number)
    said = str(error).strip() or "no words"
    return (
        f"This should not have happened ({type(error).__name__}: {said}): `sdlab --debug {command} ...` shows where, and what was "
        "finished before is intact."
    )


@click.group(cls=OneSentence, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def cli(debug: bool) -> None:
    """A small labelled image set -> a synthetic one that trains a classifier as well.

    EXPERIMENT is a name in params/ (digits) or the path of a parameter file.
    """


def with_settings(command):
    """The argument EXPERIMENT and the option -p, as `settings`."""

    @click.argument("experiment")
    @click.option(
        "-p", "--parameter", "given", nargs=2, multiple=True, metavar="NAME VALUE", help="Lay a setting on top."
    )
    @click.pass_context
    def wrapped(ctx, experiment, given, **kwargs):
        on_top = {name: parsed(name, value) for name, value in given}
        return ctx.invoke(command, settings=Settings.from_file(parameter_file(experiment), **on_top), **kwargs)

    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    # click reads them from the last to the first: EXPERIMENT comes before a command's own arguments.
    wrapped.__click_params__ = getattr(command, "__click_params__", []) + getattr(wrapped, "__click_params__", [])
    return wrapped


def parsed(name: str, value: str):
    """A value of -p, as a parameter file would read it. Raises `BadInput`."""
    try:
        return from_yaml(value)
    except yaml.YAMLError:
        raise BadInput(f"The value of -p {name} is {value!r}, which YAML cannot read: put it in quotes.") from None


@cli.command()
@with_settings
@click.option("--until", default="07", show_default=True, help="Last notebook to run, by number.")
@click.option(
    "--redo", metavar="NN", help="Run this notebook and those that read it anew; what they made is moved to aside/."
)
def run(settings: Settings, until: str, redo: str | None) -> None:
    """Run the notebooks in order; skip what is finished, stop at the first failure."""
    for name, number in (("until", until), ("redo", redo)):
        if number not in (None, *STAGES):
            raise BadInput(f"`--{name}` is {number!r}: notebooks are {', '.join(STAGES)}.")
    from sdlab.report.printing import tables_are_current  # pandas is slow to import, and `sdlab --help` needs none

    fetch_dataset(settings)
    fetch_base_model(settings)
    started, executed = time.monotonic(), 0
    with exclusive_command(settings, "sdlab run"):
        if redo:
            move_stages_aside(settings, redo)
        for step in STAGES.values():
            if step.number > until:
                break
            done = check_stage(settings, step.number).state == "done"
            if done and (step.number != "07" or tables_are_current(settings)):
                click.echo(f"{step.stem:<24} finished before, skipped")
                continue
            seconds = execute_notebook(settings, step)
            executed += 1
            click.echo(f"{step.stem:<24} {seconds:7.1f} s")
            if note := environment_change(read_record(settings, step.number)):
                click.echo(note, err=True)
    if until == max(STAGES):
        publish(settings)
        show_tables(settings)
    click.echo(f"\n{executed} notebooks in {(time.monotonic() - started) / 60:.1f} minutes.")


@contextlib.contextmanager
def exclusive_command(settings: Settings, what: str) -> Iterator[None]:
    """One command that runs notebooks of an experiment at a time. Raises `BadInput` that names the other."""
    # Not in the run's folder, where a run that is refused may leave nothing.
    lock = Lock(scratch_folder(settings).with_suffix(".lock"), settings.run_folder, what)
    if lock.note:
        click.echo(lock.note, err=True)
    before, os.environ["SDLAB_PROGRESS_FILE_ONLY"] = os.environ.get("SDLAB_PROGRESS_FILE_ONLY", ""), "1"
    try:
        yield
    finally:
        os.environ["SDLAB_PROGRESS_FILE_ONLY"] = before
        lock.release()


def scratch_folder(settings: Settings) -> Path:
    """Where an experiment's kernel is at home: the same each time, so that what a killed one left is found and removed."""
    name = hashlib.sha256(str(settings.run_folder).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"sdlab-{os.getuid()}-{name}"


@contextlib.contextmanager
def scratch(settings: Settings) -> Iterator[Path]:
    """An empty folder for an executed notebook, and for what Jupyter notes of its kernel; gone at the end."""
    folder = scratch_folder(settings)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, exist_ok=True)  # a network disk may keep a dying kernel's
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise BadInput(f"{folder} is somebody else's: set TMPDIR to a folder of your own.")
    before, tempfile.tempdir = tempfile.tempdir, str(folder)  # where Jupyter puts it
    try:
        yield folder
    finally:
        tempfile.tempdir = before
        shutil.rmtree(folder, ignore_errors=True)


def move_stages_aside(settings: Settings, number: str) -> None:
    """Move what a step made, and what was made from it, to aside/; of its search, the study to another name."""
    folder = settings.run_folder
    paths = []
    for step in map(STAGES.get, downstream_stages(number)):
        patterns = (*WRITES[step.number], f"records/{step.number}.*", f"notebooks/{step.stem}.ipynb")
        paths += [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    if not folder.exists():
        return
    lock, aside = Lock(folder / ".lock", folder, "sdlab run --redo"), new_aside_folder(folder)
    # The studies first: where this is cut, the files are still there to be moved the next time.
    for search in [
        search for step, search in (("02", "search_1"), ("04", "search_2")) if step in downstream_stages(number)
    ]:
        from sdlab.runs.studies import rename_study  # optuna is slow to import

        rename_study(settings, search, f"aside {aside.name}")
    move_aside(folder, paths, aside)
    lock.release()
    if paths:
        click.echo(f"{len(paths)} files and folders were moved to {relative_to_project(aside)}/")


def fetch_base_model(settings: Settings) -> None:
    """Fetch a hub's base model with the hub's own bars, before any notebook starts."""
    name = settings.base_model
    if name != "tiny" and not (project_path(name)).is_dir():
        from sdlab.data.model_files import base_model_folder  # torch is slow to import

        base_model_folder(settings)


def execute_notebook(settings: Settings, step: Stage) -> float:
    """One notebook through papermill, its progress shown here. Returns seconds. Raises `BadInput` on its failure."""
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    logging.getLogger("papermill").setLevel(logging.ERROR)
    # An interrupt may leave a task that waited for the kernel: its complaint would follow our own sentence.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    started, record = time.monotonic(), record_path(settings, step.number)
    before = record.read_bytes() if record.exists() else None
    with scratch(settings) as folder, Watcher(settings.run_folder / "progress.json", step.stem):
        output = folder / f"{step.stem}.ipynb"
        try:
            papermill.execute_notebook(
                unformatted(NOTEBOOKS / f"{step.stem}.ipynb"),
                unformatted(output),
                parameters=settings.as_dict(),
                progress_bar=False,
                cwd=NOTEBOOKS,
                extra_arguments=[
                    "--IPKernelApp.log_level=50"
                ],  # a warning about TCP; what an interrupted kernel could not send
            )
        except PapermillExecutionError as error:
            # A notebook that was refused before it opened its step leaves nothing.
            opened = record.exists() and record.read_bytes() != before
            kept = save_executed_copy(settings, step, output) if opened else None
            raise BadInput(failure(step, error, kept)) from error
        except DeadKernelError as error:
            raise BadInput(
                f"The kernel of {step.stem} died (often: out of memory): the same command goes on where it was."
            ) from error
        except KeyboardInterrupt:
            raise BadInput(f"Stopped during {step.stem}: the same command goes on where it was.") from None
        save_executed_copy(settings, step, output)
    return time.monotonic() - started


def unformatted(path: Path) -> str:
    """A path for papermill, which formats what stands between braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


def failure(step: Stage, error, kept: Path | None) -> str:
    """The failing cell's error in words: a `BadInput` is a sentence already."""
    if error.ename == "BadInput":
        return error.evalue
    where = f"; the executed copy is {relative_to_project(kept)}" if kept else ""
    return f"{step.stem} failed in cell [{error.exec_count}] with {error.ename}: {error.evalue}{where}."


def save_executed_copy(settings: Settings, step: Stage, output: Path) -> Path | None:
    """Move an executed notebook into the run's folder, machine paths taken out; nothing if the run wrote nothing."""
    if not settings.run_folder.exists() or not output.exists():
        return None
    text = output.read_text(encoding="utf-8")
    if settings.storage:  # may hold a password
        for form in as_in_notebooks(settings.storage):
            text = text.replace(form, "(storage)")
    for path in (str(output.parent), str(PROJECT_ROOT)):
        for form in as_in_notebooks(path):
            text = text.replace(form + "/", "").replace(form, ".")
    kept = settings.run_folder / "notebooks" / output.name
    with atomic_write(kept) as beside:
        beside.write_text(text, encoding="utf-8")
    if step.number in STAGES:
        record_notebook(settings, step, kept)
    return kept


def as_in_notebooks(text: str) -> tuple[str, str]:
    """How a text stands in a notebook's file: in an output, and in the parameters that papermill writes."""
    escaped = text.encode("unicode_escape").decode().replace('"', r"\"")
    return tuple(json.dumps(form, ensure_ascii=False)[1:-1] for form in (text, escaped))


def publish(settings: Settings) -> None:
    """Copy the executed notebooks to the report folder, for readers on the web."""
    for path in sorted((settings.run_folder / "notebooks").glob("*.ipynb")):
        with atomic_write(settings.report_folder / path.name) as part:
            shutil.copyfile(path, part)


def show_tables(settings: Settings) -> None:
    """Print both tables, how they differ from the committed ones, and the places of all files."""
    from sdlab.report.printing import terminal_summary  # pandas is slow to import

    folder = relative_to_project(settings.report_folder)
    click.echo(f"\n{terminal_summary(settings)}\n")
    click.echo(
        f"Figures: {', '.join(f'{folder}/{path.name}' for path in sorted(settings.report_folder.glob('*.png')))}"
    )
    click.echo(f"Tables (Markdown, CSV, LaTeX) and executed notebooks: {folder}/")


def relative_to_project(path: Path) -> str:
    """A path as a reader wants it: relative to the project if it is in it."""
    return str(path.relative_to(PROJECT_ROOT)) if path.is_relative_to(PROJECT_ROOT) else str(path)


class Watcher(threading.Thread):
    """Renders the progress file of a running notebook: a bar on a terminal, now and then a line in a log."""

    def __init__(self, path: Path, stem: str):
        super().__init__(daemon=True)
        self.path, self.stem, self.ended, self.bar = path, stem, threading.Event(), None
        self.on_terminal = sys.stderr.isatty()

    def __enter__(self) -> "Watcher":
        self.started_at = time.time()
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()
        self.join()
        if self.bar is not None:
            self.bar.close()

    def run(self) -> None:
        last_line = time.monotonic()
        if self.on_terminal:  # a kernel imports for some seconds before it has anything to say
            self.bar = tqdm(desc=f"{self.stem}: starting", bar_format="{desc}{elapsed}", leave=False)
        while not self.ended.wait(0.5):
            try:
                said = json.loads(self.path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                said = {}
            if said.get("time", 0) < self.started_at:  # none yet, or of an earlier run
                if self.bar is not None:
                    self.bar.refresh()
                continue
            if self.on_terminal:
                self.draw(said)
            elif time.monotonic() - last_line > 15:
                last_line = time.monotonic()
                click.echo(
                    f"  {self.stem}: {said['desc']} {said['n']}/{said['total']} {said['unit']} ({said['rate']:.3g}/s)",
                    err=True,
                )

    def draw(self, said: dict) -> None:
        desc = f"{self.stem}: {said['desc']}"
        if self.bar is None or self.bar.desc != desc + ": " or self.bar.total != said["total"]:
            if self.bar is not None:
                self.bar.close()
            self.bar = tqdm(desc=desc, total=said["total"], initial=said["n"], unit=said["unit"], leave=False)
        self.bar.n = said["n"]
        self.bar.refresh()


@cli.command()
@with_settings
def work(settings: Settings) -> None:
    """Take trials of the searches beside `sdlab run`: on another GPU (-p device cuda:1), or a machine that shares the folder.

    Waits for each search to begin, and ends with the last. A search that several processes are at does not repeat.
    """
    loaded = ()
    for number, search in (("02", "search_class_encoder"), ("04", "search_unet")):
        step = STAGES[number]
        wait_for_stage(settings, step, begun=True)
        if not loaded:
            from sdlab.base_models import load_base_model  # torch, diffusers and optuna are slow to import
            from sdlab.data.datasets import load_dataset

            loaded = load_dataset(settings), load_base_model(settings)
        run = Run(settings, step.stem, *loaded, helping=True)
        if not run.finished:
            from sdlab import search as searches

            getattr(searches, search)(run, loaded[1], loaded[0])
            click.echo(f"{step.stem}: no trial is left to take")
        wait_for_stage(settings, step, begun=False)


def wait_for_stage(settings: Settings, step: Stage, begun: bool) -> None:
    """Wait until a step is finished, or with `begun` until it is at work. Raises `BadInput` for one that cannot be."""
    said = False
    while (record := read_record(settings, step.number)) is None or not (begun or record["finished"]):
        if not said:
            what = "begin" if begun else "end"
            click.echo(f"waiting for {step.stem} to {what} (`sdlab run {settings.experiment}`)", err=True)
            said = True
        time.sleep(1)
    check_stage(settings, step.number)


@cli.command()
@with_settings
def status(settings: Settings) -> None:
    """What is done, what is stale, and why."""
    click.echo(f"{settings.experiment} in {relative_to_project(settings.run_folder)}, protocol {settings.protocol}")
    for step in STAGES.values():
        state = stage_state(settings, step.number)
        if state.state == "done":
            why = f"{state.seconds:.0f} s"
        elif state.state == "not run":
            missing = [STAGES[n].stem for n in step.upstream if stage_state(settings, n).state != "done"]
            why = f"waits for {', '.join(missing)}" if missing else "can run"
        else:
            why = state.why
        click.echo(f"  {step.stem:<24} {state.state:<8} {why}")


@cli.command("verify")
@click.argument("path")
def verify_run(path: str) -> None:
    """Check every file of an experiment against its hash and what it was made from. PATH is its folder, or its name.

    Names each damaged, missing, foreign or stale file and the command that makes just that anew; exit code 1 if there is one.
    """
    from sdlab.runs.verify import verify

    settings = settings_of(path)
    with tqdm(
        total=folder_size(settings.run_folder), unit="B", unit_scale=True, desc="verify", leave=False, disable=None
    ) as bar:
        found, files = verify(settings, bar.update)
    for finding in found:
        click.echo(f"{finding.state:<8} {finding.path}: {finding.why}\n         {finding.repair}")
    click.echo(
        f"{relative_to_project(settings.run_folder)}: {files} files read, {len(found)} not as they were written."
    )
    if found:
        raise SystemExit(1)


def settings_of(path: str) -> Settings:
    """The settings of an experiment's folder, wherever it was moved to, or of a parameter file. Raises `BadInput`."""
    folder = Path(path)
    if not folder.is_dir():
        return Settings.from_file(parameter_file(path))
    if not (folder / "settings.yaml").is_file():
        raise BadInput(
            f"{path} is no experiment's folder: it has no settings.yaml: give one of those in runs/, or an experiment's name."
        )
    given = read_parameters(folder / "settings.yaml")
    return Settings.from_mapping(given | dict(runs_root=str(folder.resolve().parent), experiment=folder.resolve().name))


@cli.command()
@with_settings
@click.argument("path")
def repair(settings: Settings, path: str) -> None:
    """Make one file or folder of an experiment anew, the same bytes; PATH is as `sdlab verify` names it.

    What is there is moved to aside/ first, never deleted.
    """
    from sdlab.runs.verify import verify

    folder, found = settings.run_folder, verify(settings)[0]
    meant = [finding for finding in found if finding.path == path or finding.path.startswith(f"{path}/")]
    if not is_inside(path) or not meant:
        wrong = ", ".join(finding.path for finding in found[:5]) or "nothing is"
        raise BadInput(
            f"`{path}` is not among what is wrong with {relative_to_project(folder)} ({wrong}): nothing was done."
        )
    if not meant[0].repair.startswith("sdlab repair"):
        raise BadInput(f"`{path}` is {meant[0].state} ({meant[0].why}), which no repair makes good: {meant[0].repair}.")
    path = meant[0].repair.split()[-1]  # of a training's file, the training
    with exclusive_command(settings, "sdlab repair"):
        there = (folder / path).exists()
        lock, step = Lock(folder / ".lock", folder, "sdlab repair"), stage_that_writes(settings, path)
        if there:
            move_aside(folder, [folder / path], new_aside_folder(folder))
        lock.release()
        if path.startswith("synthetic/"):
            from sdlab.generation import regenerate_shards  # torch and diffusers are slow to import

            regenerate_shards(settings, PurePosixPath(path).parts[1])
        elif step is not None:
            execute_notebook(settings, step)
    left = [finding.path for finding in verify(settings)[0]]
    said = f"{path} was moved to {relative_to_project(folder)}/aside/" if there else f"{path} was not there"
    if any(name == path or name.startswith(f"{path}/") for name in left):
        raise BadInput(f"{said}, and what was made is not what it was: device, threads or versions differ.")
    click.echo(f"{said}; made anew, as it was.")


def stage_that_writes(settings: Settings, path: str) -> Stage | None:
    """The step that writes a file or folder of a run."""
    if path.startswith("records/"):
        return STAGES.get(path[8:10])
    for number, step in STAGES.items():
        record = None
        with contextlib.suppress(BadInput):
            record = read_record(settings, number)
        names = [*record["outputs"], *record.get("beside", {}), f"notebooks/{step.stem}.ipynb"] if record else []
        if any(name == path or name.startswith(f"{path}/") for name in names):
            return step
    return None


@cli.command()
@with_settings
@click.option("--again", is_flag=True, help="Time anew, even where the first notebook kept a plan.")
def plan(settings: Settings, again: bool) -> None:
    """What the experiment will cost here: time, disk and memory of each notebook; what finished ones took beside it.

    Times a few real steps, and fetches nothing.
    """
    from sdlab.report.costs import load_plan, measured_costs, plan_sentences, plan_table

    made, took = load_plan(settings), measured_costs(settings)
    if again or made is None:
        facts = dataset_facts(settings)
        click.echo("Timing a few steps ...", err=True)
        from sdlab.tools.planning import make_plan  # torch and diffusers are slow to import

        made = make_plan(settings, facts)
    else:
        click.echo("The plan that the first notebook made (--again times anew):\n")
    first, *sentences = plan_sentences(made)
    click.echo(f"{first}\n")
    click.echo(plan_table(made, took).set_index("notebook").rename_axis(None).to_string())
    click.echo("\n" + "\n".join(sentences))


@cli.command()
@with_settings
@click.option("--port", default=8080, show_default=True)
def dashboard(settings: Settings, port: int) -> None:
    """Watch the searches in optuna-dashboard, on 127.0.0.1, pictures included."""
    if not settings.storage and not (settings.run_folder / "searches.db").exists():
        raise BadInput(
            f"{settings.experiment} has no search yet: run 02_first_search first (`sdlab run {settings.experiment}`)."
        )
    check_storage(settings)
    command = [str(Path(sys.executable).with_name("optuna-dashboard")), storage_url(settings), "--host", "127.0.0.1"]
    artifacts = settings.run_folder / "artifacts"
    if artifacts.is_dir():
        command += ["--artifact-dir", str(artifacts)]
    os.execv(command[0], [*command, "--port", str(port)])


@cli.command("export")
@with_settings
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--images", type=int, help="How many, from the first on.  [default: the size that notebook 05 chose]")
def export(settings: Settings, target: Path, images: int | None) -> None:
    """Write the chosen synthetic set to TARGET: a folder of PNGs, one subfolder a class, or a file ending in .npz."""
    about = export_set(settings, target, images)
    click.echo(f"{target}: {about['images']} images of {len(about['classes'])} classes, {about['image_size']} px.")


@cli.command("settings")
@click.argument("name", required=False)
def list_settings(name: str | None) -> None:
    """All settings, with the paper's values; or one."""
    import dataclasses

    fields = {f.name: f for f in dataclasses.fields(Settings)}
    if name and name not in fields:
        near = difflib.get_close_matches(name, fields, n=1)
        hint = f"did you mean `{near[0]}`?" if near else "`sdlab settings` lists them all."
        raise BadInput(f"`{name}` is not a setting: {hint}")
    for f in [fields[name]] if name else fields.values():
        default = "(required)" if f.default is dataclasses.MISSING else repr(f.default)
        click.echo(f"{f.name:<30} {default:<46} {f.metadata['text']}")


if __name__ == "__main__":
    cli()
