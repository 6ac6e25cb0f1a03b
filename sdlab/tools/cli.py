"""`sdlab` on the command line: the commands, and one sentence for whatever fails.

Slow imports (torch, pandas, optuna, sqlalchemy) stay inside the commands that need them.
"""

import errno
import functools
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import yaml
from tqdm import tqdm

from sdlab.errors import BadInput, did_you_mean
from sdlab.paths import project_path, relative_to_project
from sdlab.runs import records
from sdlab.runs.files import atomic_write, cannot_write, folder_size, read_json, write_errno
from sdlab.runs.parameters import from_yaml, parameter_file, read_parameters
from sdlab.runs.stages import PIPELINE, READS_IMAGES, STAGES, State, check_stage, downstream_stages, stage_state
from sdlab.settings import Settings
from sdlab.tools.execution import exclusive_command, execute_notebook


class OneSentence(click.Group):
    """Whatever fails is shown in one sentence, with exit code 1; `--debug` shows the traceback."""

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
    if number := write_errno(error):  # outside any run: a terminal's temporary folder, a notebook's copy
        where = getattr(error, "filename", None) or f"{tempfile.gettempdir()}, or where this command prints to,"
        if number in (errno.EACCES, errno.EPERM, errno.EIO):
            return f"{where} cannot be read or written ({os.strerror(number)}): mend that, and give the same command."
        return cannot_write(where, number)
    text = str(error).strip() or "no words"
    return (
        f"This should not have happened ({type(error).__name__}: {text}): `sdlab --debug {command} ...` shows where, and "
        "what was finished before is intact."
    )


@click.group(cls=OneSentence, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def cli(debug: bool) -> None:
    """A small labelled image set -> a synthetic one that trains a classifier as well.

    EXPERIMENT is a name in params/ (digits) or the path of a parameter file.
    """


def read_settings(experiment: str, on_top: dict[str, Any], folders: bool) -> Settings:
    """Settings of a parameter file, or with `folders` of an experiment's folder, wherever it was moved to."""
    if not (folders and os.path.isdir(experiment)):  # noqa: PTH112 (Path.is_dir raises for a long name)
        return Settings.from_file(parameter_file(experiment), **on_top)
    folder = Path(experiment).resolve()
    if not (folder / "settings.yaml").is_file():
        raise BadInput(
            f"{experiment} is no experiment's folder: it has no settings.yaml: give one of those in runs/, or a name."
        )
    where = dict(runs_root=str(folder.parent), experiment=folder.name)
    return Settings.from_mapping(read_parameters(folder / "settings.yaml") | on_top | where)


def with_settings(command: Callable, folders: bool = False) -> Callable:
    """The argument EXPERIMENT and the option -p, as `settings`."""

    @click.argument("experiment")
    @click.option(
        "-p", "--parameter", "given", nargs=2, multiple=True, metavar="NAME VALUE", help="Lay a setting on top."
    )
    @click.pass_context
    def wrapped(ctx, experiment, given, **kwargs):
        settings = read_settings(experiment, {name: parse(name, value) for name, value in given}, folders)
        ctx.meta["words"] = [experiment, *(word for pair in given for word in ("-p", *pair))]
        return ctx.invoke(command, settings=settings, **kwargs)

    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    # click reads them from the last to the first: EXPERIMENT comes before a command's own arguments.
    wrapped.__click_params__ = getattr(command, "__click_params__", []) + getattr(wrapped, "__click_params__", [])
    return wrapped


def parse(name: str, value: str) -> Any:
    """A value of -p, read as in a parameter file. Raises `BadInput`."""
    try:
        return from_yaml(value)
    except yaml.YAMLError:
        raise BadInput(f"The value of -p {name} is {value!r}, which YAML cannot read: put it in quotes.") from None


def as_typed(settings: Settings) -> str:
    """The experiment in the words of this command, for a command that is printed."""
    words = click.get_current_context().meta["words"]
    return settings.experiment if Path(words[0]).is_dir() else shlex.join(words)


@cli.command()
@with_settings
@click.option("--until", default=max(PIPELINE), show_default=True, help="Last notebook to run, by number.")
@click.option(
    "--redo", metavar="NN", help="Run this notebook and those that read it again; their files are moved to aside/."
)
@click.option("--strict", is_flag=True, help="Stop if the generator seems to have collapsed (01, 03).")
@click.option("--from-reference", is_flag=True, help="Make the released sets of reports/reference/ instead.")
def run(settings: Settings, until: str, redo: str | None, strict: bool, from_reference: bool) -> None:
    """Run the notebooks in order; skip finished ones, stop at the first failure."""
    if from_reference:
        from sdlab.tools.released_sets import make_released_set

        folder, about, comparison = make_released_set(settings, whole=True)
        click.echo(f"{about['images']} images in {relative_to_project(folder)}/. {comparison}")
        return
    for name, number in (("until", until), ("redo", redo)):
        if number not in (None, *STAGES):
            raise BadInput(f"`--{name}` is {number!r}: notebooks are {', '.join(STAGES)}.")
    until = max(until, redo) if redo and STAGES[redo].on_request else until
    # Finished results open without the data set.
    reading_images = [number for number in READS_IMAGES if number <= until]
    again = downstream_stages(redo) if redo else ()
    if any(number in again or stage_state(settings, number).state != State.DONE for number in reading_images):
        fetch_inputs(settings)
    started, executed = time.monotonic(), 0
    with exclusive_command(settings, "sdlab run"):
        if redo:
            from sdlab.tools.repair import move_stages_aside

            for number in sorted(STAGES.keys() - {*again}) if strict else ():
                warn_of_collapse(settings, number, strict)  # before anything is moved

            audited = (
                "09" in downstream_stages(redo) and until < "09" and records.read_record(settings, "09") is not None
            )
            move_stages_aside(settings, redo)
            if audited:
                click.echo(
                    "The audit was of the former run, and was moved aside, too: `sdlab audit` makes a new one. Until then, its pages in the "
                    "report folder are of the former run."
                )
        for stage in STAGES.values():
            if stage.number > until:
                break
            done = check_stage(settings, stage.number).state == State.DONE
            if done and is_published(settings, stage.number):
                click.echo(f"{stage.stem:<24} finished before, skipped")
            else:
                seconds = execute_notebook(settings, stage)
                executed += 1
                click.echo(f"{stage.stem:<24} {seconds:7.1f} s")
                if note := records.environment_change(records.read_record(settings, stage.number)):
                    click.echo(note, err=True)
            warn_of_collapse(settings, stage.number, strict)
    if until >= "07":
        publish(settings)
        show_tables(settings)
    click.echo(f"\n{executed} notebooks in {(time.monotonic() - started) / 60:.1f} minutes.")


def is_published(settings: Settings, number: str) -> bool:
    """Whether the report folder has what a finished stage writes there."""
    if number == "08":
        from sdlab.report.verdict import verdict_page

        path, found = settings.report_folder / "verdict.md", read_json(settings.run_folder / "metrics" / "verdict.json")
        return path.exists() and path.read_text(encoding="utf-8") == verdict_page(found)
    if number == "09":
        from sdlab.report.audit import audit_page

        path, found = settings.report_folder / "audit.md", read_json(settings.run_folder / "metrics" / "audit.json")
        return path.exists() and path.read_text(encoding="utf-8") == audit_page(found)
    if number == "07":
        from sdlab.report.printing import tables_are_current  # pandas is slow to import

        return tables_are_current(settings)
    return True


def warn_of_collapse(settings: Settings, number: str, strict: bool) -> None:
    """Print the alarm of a stage, if it gave one. Raises `BadInput` if it is `strict`."""
    path = settings.run_folder / "metrics" / f"alarm_{int(number)}.json"
    alarm = read_json(path) if path.exists() else dict(collapsed=False)
    if alarm["collapsed"] and strict:
        raise BadInput(f"{alarm['sentence']} The run stops here (`--strict`); without it the same command continues.")
    if alarm["collapsed"]:
        click.echo(alarm["sentence"], err=True)


def fetch_inputs(settings: Settings) -> None:
    """Fetch data set and base model with bars of their own, before any notebook starts. Raises `BadInput`."""
    from sdlab.data.datasets import fetch_dataset

    fetch_dataset(settings)
    if settings.base_model != "tiny" and not project_path(settings.base_model).is_dir():
        from sdlab.data.model_files import base_model_folder

        base_model_folder(settings)


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
    if (settings.run_folder / "metrics" / "verdict.json").exists():
        show_verdict(settings)
    click.echo(
        f"Figures: {', '.join(f'{folder}/{path.name}' for path in sorted(settings.report_folder.glob('*.png')))}"
    )
    click.echo(f"Tables (Markdown, CSV, LaTeX) and executed notebooks: {folder}/")


def show_verdict(settings: Settings) -> None:
    from sdlab.report.verdict import verdict_sentences

    found = read_json(settings.run_folder / "metrics" / "verdict.json")
    click.echo("Verdict\n" + "\n".join(verdict_sentences(found)) + "\n")


@cli.command()
@with_settings
def verdict(settings: Settings) -> None:
    """Is the chosen set as good as the real images, and how sure is that? Runs notebook 08 if it is not finished."""
    run_if_needed(settings, "08", "sdlab verdict")
    show_verdict(settings)


def run_if_needed(settings: Settings, number: str, command: str) -> None:
    """Run one notebook, unless it is finished."""
    if check_stage(settings, number).state != State.DONE:
        fetch_inputs(settings)
        with exclusive_command(settings, command):
            execute_notebook(settings, STAGES[number])
        publish(settings)


@cli.command()
@with_settings
def audit(settings: Settings) -> None:
    """Whom does the chosen set expose, and whom the model? Runs notebook 09 if it is not finished: trains again, on half of the images."""
    from sdlab.report.audit import audit_sentences

    run_if_needed(settings, "09", "sdlab audit")
    click.echo("\n".join(audit_sentences(read_json(settings.run_folder / "metrics" / "audit.json"))))


@cli.command()
@click.argument("images")
@click.option(
    "--against",
    metavar="REAL",
    required=True,
    help="An experiment (a parameter file), or a data set as `dataset` takes it.",
)
@click.option("--to", "target", type=click.Path(path_type=Path), help="A new folder.  [default: reports/score-IMAGES]")
@click.option("--inception", metavar="FILE", type=click.Path(exists=True, dir_okay=False),
              help="InceptionV3's weights: its features instead of the judge's.")  # fmt: skip
@click.option("--exclude", default="", help="Of a folder: names or patterns to leave out, comma between.")
@click.option("-p", "--parameter", "given", nargs=2, multiple=True, metavar="NAME VALUE", help="Lay a setting on top.")
def score(images: str, against: str, target: Path | None, inception: str | None, exclude: str, given: tuple) -> None:
    """A scorecard of any labelled images: IMAGES is a folder of classes, an npz, or an experiment, whose chosen set it is.

    Of what use they are to a classifier, how alike real ones, whether labels are right, and whether they are copies: one page
    and scorecard.json.
    """
    from sdlab.tools.scoring import score_images

    on_top = {name: parse(name, value) for name, value in given}
    folder, sentences = score_images(images, against, target, inception, exclude, on_top)
    click.echo("\n".join(sentences))
    click.echo(f"{relative_to_project(folder)}/: scorecard.html, scorecard.json")


@cli.command()
@with_settings
def status(settings: Settings) -> None:
    """What is done, what is stale, and why."""
    click.echo(f"{settings.experiment} in {relative_to_project(settings.run_folder)}, protocol {settings.protocol}")
    for stage in STAGES.values():
        state = stage_state(settings, stage.number)
        why = state.why
        if state.state == State.DONE:
            why = f"{state.seconds:.0f} s"
        elif state.state == State.NOT_RUN:
            missing = [STAGES[n].stem for n in stage.upstream if stage_state(settings, n).state != State.DONE]
            why = f"waits for {', '.join(missing)}" if missing else "can run"
        click.echo(f"  {stage.stem:<24} {state.state:<8} {why}")


@cli.command("verify")
@functools.partial(with_settings, folders=True)
def verify_run(settings: Settings) -> None:
    """Check every file of an experiment against its hash and what it was made from. EXPERIMENT may be its folder too.

    Names each damaged, missing, foreign or stale file and the command that mends just that; exit code 1 if there is one.
    """
    from sdlab.runs.verify import verify

    with tqdm(
        total=folder_size(settings.run_folder), unit="B", unit_scale=True, desc="verify", leave=False, disable=None
    ) as bar:
        findings, files = verify(settings, bar.update)
    for finding in findings:
        click.echo(f"{finding.state:<8} {finding.path}: {finding.why}")
        click.echo(f"         {finding.repair.sentence(as_typed(settings))}")
    click.echo(
        f"{relative_to_project(settings.run_folder)}: {files} files read, {len(findings)} not as they were written."
    )
    if findings:
        raise SystemExit(1)


@cli.command("repair")
@with_settings
@click.argument("path")
def repair_file(settings: Settings, path: str) -> None:
    """Make one file or folder of an experiment again, the same bytes; PATH is as `sdlab verify` names it.

    The existing files are moved to aside/ first, never deleted.
    """
    from sdlab.tools.repair import repair

    click.echo(repair(settings, path, as_typed(settings)))


@cli.command()
@with_settings
@click.option("--again", is_flag=True, help="Time again, even if the first notebook saved a plan.")
@click.option(
    "--costs",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Costs that were measured on another device, like those in reports/reference/gpu/.",
)
@click.option(
    "--workers", metavar="N", type=click.IntRange(1), multiple=True, help="Also on N devices; may be repeated."
)
def plan(settings: Settings, again: bool, costs: Path | None, workers: tuple[int, ...]) -> None:
    """The costs of the experiment here: time, disk and memory of each notebook, and the measured costs of finished ones.

    Times a few real steps, and fetches nothing.
    """
    from sdlab.report.costs import load_ceiling, load_plan, measured_costs, plan_sentences, plan_table
    from sdlab.report.remarks import ceiling_sentence

    made, took = load_plan(settings), measured_costs(settings)
    if again or costs or made is None:
        from sdlab.data.datasets import dataset_facts

        facts = dataset_facts(settings)
        if not costs:
            click.echo("Timing a few steps ...", err=True)
        from sdlab.tools.planning import make_plan  # torch and diffusers are slow to import

        made = make_plan(settings, facts, costs_file=costs)
    else:
        click.echo("The plan that the first notebook made (--again times it again):\n")
    first, *sentences = plan_sentences(made)
    click.echo(f"{first}\n")
    click.echo(plan_table(made, took).set_index("notebook").rename_axis(None).to_string())
    if ceiling := load_ceiling(settings):
        sentences.append(ceiling_sentence(ceiling))
    click.echo("\n" + "\n".join(sentences))
    if workers:
        from sdlab.data.datasets import dataset_facts
        from sdlab.tools.fan_out import Durations, fan_out_sentences, fan_out_table, measure_driver
        from sdlab.tools.measuring import Costs

        facts = dataset_facts(settings)
        durations = Durations(settings, facts, Costs(**made["costs"]), measure_driver(settings, facts))
        table = fan_out_table(durations, sorted({1, *workers}))
        click.echo("\n" + table.set_index("devices").to_string() + "\n")
        click.echo("\n".join(fan_out_sentences(durations, made["unet_parameters"])))


@cli.command()
@with_settings
@click.option("--port", default=8080, show_default=True)
def dashboard(settings: Settings, port: int) -> None:
    """Watch the searches in optuna-dashboard, on 127.0.0.1, pictures included."""
    from sdlab.runs.storage import check_storage, sqlite_file, storage_url

    file = sqlite_file(settings)
    if file and not file.exists():
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
@click.option("--from-reference", is_flag=True, help="Of the release in reports/reference/: made first.")
def export(settings: Settings, target: Path, images: int | None, from_reference: bool) -> None:
    """Write the chosen synthetic set to TARGET: a folder of PNGs, one subfolder a class, or a file ending in .npz."""
    from sdlab.runs.export import check_target, export_set, write_set
    from sdlab.runs.privacy import privacy_sentence

    if from_reference:
        from sdlab.tools.released_sets import make_released_set

        check_target(target)
        folder, about, comparison = make_released_set(settings, images)
        click.echo(comparison)
        about = write_set(folder, about, target)
    else:
        about = export_set(settings, target, images)
    click.echo(f"{target}: {about['images']} images of {len(about['classes'])} classes, {about['image_size']} px.")
    click.echo(privacy_sentence(about["privacy"]))


@cli.command("release")
@with_settings
def release(settings: Settings) -> None:
    """Write what makes the experiment's sets again to its report folder: two checkpoints, settings, searches, hashes."""
    from sdlab.runs.releases import write_release

    target = write_release(settings)
    click.echo(f"{relative_to_project(target)}: {folder_size(target) / 1e6:.1f} MB.")


@cli.command("settings")
@click.argument("name", required=False)
def list_settings(name: str | None) -> None:
    """All settings, with the paper's values; or one."""
    import dataclasses

    fields = {f.name: f for f in dataclasses.fields(Settings)}
    if name and name not in fields:
        hint = did_you_mean(name, fields) or " `sdlab settings` lists them all."
        raise BadInput(f"`{name}` is not a setting.{hint}")
    for f in [fields[name]] if name else fields.values():
        default = "(required)" if f.default is dataclasses.MISSING else repr(f.default)
        click.echo(f"{f.name:<30} {default:<46} {f.metadata['text']}")


if __name__ == "__main__":
    cli()
