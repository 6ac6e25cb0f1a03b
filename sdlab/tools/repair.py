"""Making damaged files again (`sdlab repair`) and stages again (`sdlab run --redo`); nothing is deleted."""

from pathlib import PurePosixPath

import click

from sdlab.errors import BadInput
from sdlab.paths import relative_to_project
from sdlab.runs.aside import files_of_stages, move_aside, new_aside_folder
from sdlab.runs.experiment import Experiment
from sdlab.runs.files import is_inside
from sdlab.runs.locks import Lock
from sdlab.runs.shards import read_manifest
from sdlab.runs.stages import SEARCHES, STAGES, downstream_stages
from sdlab.runs.verify import Action, verify
from sdlab.settings import Settings
from sdlab.tools.execution import exclusive_command, execute_notebook


def move_stages_aside(settings: Settings, number: str) -> None:
    """Move a stage's files, and those of all stages after it, to aside/; rename its study."""
    folder, numbers = settings.run_folder, downstream_stages(number)
    if not folder.exists():
        return
    paths = files_of_stages(settings, numbers)
    lock, aside = Lock(folder / ".lock", folder, "sdlab run --redo"), new_aside_folder(folder)
    # The studies first: if this is interrupted, the files are still there to be moved the next time.
    for search in (SEARCHES[n] for n in numbers if n in SEARCHES):
        from sdlab.runs.studies import rename_study  # optuna is slow to import

        rename_study(settings, search, f"aside {aside.name}")
    move_aside(folder, paths, aside)
    lock.release()
    if paths:
        click.echo(f"{len(paths)} files and folders were moved to {relative_to_project(aside)}/")


def repair(settings: Settings, path: str, experiment: str) -> str:
    """Make a file or folder again that `verify` names, moving the existing one to aside/. Returns a sentence.

    `experiment` is its name on the command line. Raises `BadInput` if nothing is wrong with `path`, if no repair mends
    it, and if the result differs from what was there.
    """
    folder, findings = settings.run_folder, verify(settings)[0]
    finding = next((f for f in findings if f.path == path or f.path.startswith(f"{path}/")), None)
    if not is_inside(path) or finding is None:
        wrong = ", ".join(finding.path for finding in findings[:5]) or "nothing is"
        raise BadInput(
            f"`{path}` is not among what is wrong with {relative_to_project(folder)} ({wrong}): nothing was done."
        )
    if finding.repair.action != Action.REPAIR:
        raise BadInput(
            f"`{path}` is {finding.state} ({finding.why}), which no repair mends: {finding.repair.sentence(experiment)}."
        )
    target = finding.repair.target  # of a training's file, the whole training
    existed = (folder / target).exists()
    with exclusive_command(settings, "sdlab repair"):
        lock = Lock(folder / ".lock", folder, "sdlab repair")
        if existed:
            move_aside(folder, [folder / target], new_aside_folder(folder))
        lock.release()
        if finding.repair.stage:
            execute_notebook(settings, STAGES[finding.repair.stage])
        else:
            regenerate_shards(settings, PurePosixPath(target).parts[1])
    what = f"{target} was moved to {relative_to_project(folder)}/aside/" if existed else f"{target} did not exist"
    if any(f.path == target or f.path.startswith(f"{target}/") for f in verify(settings)[0]):
        raise BadInput(f"{what}, and the new one differs from it: device, threads or versions differ.")
    return f"{what}; it was made again, with the same content."


def regenerate_shards(settings: Settings, key: str) -> None:
    """Make the missing shards that a set's manifest names. Raises `BadInput` if its inputs have changed.

    Opens no stage: the result is byte for byte the former one, or is refused by its hash.
    """
    from sdlab.base_models import load_base_model  # torch is slow to import
    from sdlab.data.datasets import load_dataset
    from sdlab.generation import generate, plan_generation, real_labels
    from sdlab.sampling_config import SamplingConfig, load_pipeline

    run = Experiment(settings, load_dataset(settings), load_base_model(settings))
    folder = run.folder / "synthetic" / key
    manifest = read_manifest(folder)
    config, drawn = SamplingConfig(**manifest["made_from"]["config"]), manifest["made_from"]["labels"]
    labels = real_labels(run.data.train.labels) if drawn == "real" else None
    plan = plan_generation(run, config, manifest["plan"]["seed"], labels)
    if plan.key() != key:
        raise BadInput(
            f"{folder} was made from other weights, data or settings than those of now: its shards cannot be made again."
        )
    count = (max(map(int, manifest["shards"]), default=-1) + 1) * plan.shard_size  # workers' shards come in any order
    generate(load_pipeline(run, config), plan, folder.parent, count, run.progress, "repair")
