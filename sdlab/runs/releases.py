"""What makes an experiment's sets again without its data, training or searches: a folder small enough for git.

    reports/<experiment>/release/release.json             classes, base model, optimum, scores; hashes of files and of shards
                                 settings.yaml            those that results depend on
                                 class_encoder/epoch_NN/  the table of conditions at the final search's optimum
                                 unet/epoch_NN/           the UNet there, in half precision
                                 search_1.json, ...       every trial of both searches

Nothing here imports torch.
"""

import dataclasses
import shutil
from pathlib import Path

import yaml

from sdlab.errors import BadInput
from sdlab.paths import relative_to_project
from sdlab.runs.checkpoints import epoch_folder, find_damage
from sdlab.runs.export import description
from sdlab.runs.files import (
    atomic_write,
    check_fields,
    is_inside,
    read_hashed_json,
    read_json,
    sha256_of_file,
    write_hashed_json,
)
from sdlab.runs.parameters import read_parameters
from sdlab.runs.privacy import check_release, privacy_of
from sdlab.runs.records import read_record
from sdlab.runs.shards import read_manifest
from sdlab.runs.stages import INPUTS, STAGES, State, is_path, stage_state
from sdlab.settings import Settings

FORM = dict(about=dict, train_counts=list, base_model=str, pool=dict, environment=dict, files=dict)


def write_release(settings: Settings) -> Path:
    """Write `release/` into the experiment's report folder; returns it.

    Raises `BadInput` if notebook 05 is not finished, if the audit of set or model found more than `privacy_limit` allows, if a
    checkpoint is damaged, and if there is a release already.
    """
    if (state := stage_state(settings, "05").state) != State.DONE:
        raise BadInput(f"{settings.experiment} has nothing to release yet: {STAGES['05'].stem} is {state}.")
    target = settings.report_folder / "release"
    if target.exists():
        raise BadInput(f"{target} exists: nothing is overwritten; move it away.")
    run, about, record = settings.run_folder, description(settings, None), read_record(settings, "05")
    about = check_release(about | dict(privacy=privacy_of(settings)), ("set", "model"), settings.privacy_limit)
    manifest = read_manifest(run / "synthetic" / about["synthetic"])
    with atomic_write(target) as folder:
        folder.mkdir()
        for part, epoch in (("class_encoder", "class_encoder_epoch"), ("unet", "unet_epoch")):
            source = epoch_folder(run / part, about["config"][epoch])
            if damage := find_damage(source):
                raise BadInput(f"The checkpoint {source} is damaged: {damage}.")
            shutil.copytree(source, folder / part / source.name)
        for search in ("search_1", "search_2"):
            shutil.copyfile(run / "metrics" / f"{search}.json", folder / f"{search}.json")
        (folder / "settings.yaml").write_text(yaml.safe_dump(lasting(settings), sort_keys=False))
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        write_hashed_json(
            folder / "release.json",
            dict(
                about=about,
                train_counts=read_json(run / "metrics" / "data.json")["counts"]["train"],
                base_model=record.inputs["base_model"],
                pool=dict(key=manifest["key"], shards={i: shard["sha256"] for i, shard in manifest["shards"].items()}),
                environment=record.environment,
                files={path.relative_to(folder).as_posix(): sha256_of_file(path) for path in files},
            ),
        )
    return target


def lasting(settings: Settings) -> dict:
    """The settings that results depend on; a path of this machine by its last part."""
    fields = dataclasses.fields(settings)
    kept = {f.name: getattr(settings, f.name) for f in fields if f.metadata["stages"] or f.name == "experiment"}
    return kept | {name: Path(kept[name]).name for name in INPUTS if is_path(name, kept[name])}


def read_release(folder: Path) -> dict:
    """`release.json`, every file checked against its hash. Raises `BadInput`."""
    release = check_fields(read_hashed_json(folder / "release.json"), FORM, folder / "release.json")
    for name, sha256 in release["files"].items():
        if not is_inside(name) or not (folder / name).is_file() or sha256_of_file(folder / name) != sha256:
            raise BadInput(f"{folder / name} is not the file that was released: fetch the repository's own again.")
    return release


def install(folder: Path, here: Settings) -> tuple[Settings, dict]:
    """Copy a release's checkpoints to `<runs_root>/<experiment>-from-reference`; returns its settings and `release.json`.

    `here` says where and on what: places, device, where the base model is. Raises `BadInput` for a damaged release, and if the folder
    has other checkpoints.
    """
    release = read_release(folder)
    places = {f.name: getattr(here, f.name) for f in dataclasses.fields(here) if not f.metadata["stages"]}
    places |= dict(base_model=here.base_model, base_model_revision=here.base_model_revision)
    places["experiment"] = f"{release['about']['experiment']}-from-reference"
    settings = Settings.from_mapping(read_parameters(folder / "settings.yaml") | places)
    for file in release["files"]:
        part = file.split("/")[0]
        target = settings.run_folder / file
        if part not in ("class_encoder", "unet"):
            continue
        if not target.exists():
            with atomic_write(target) as partial:
                shutil.copyfile(folder / file, partial)
        elif sha256_of_file(target) != release["files"][file]:
            raise BadInput(
                f"{relative_to_project(target)} is of another release: move {relative_to_project(settings.run_folder)} away."
            )
    return settings, release
