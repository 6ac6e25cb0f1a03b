"""Rehearse an experiment of the paper: every notebook, Stable Diffusion 2.0 at its true size, nothing fetched.

    .venv/bin/python scripts/rehearse.py cifar10
    .venv/bin/python scripts/rehearse.py retinamnist --official data

The weights are random and the images are made, in the formats of the true files. `--official FOLDER` reads and checks
the official file there, and takes as many of its images, the classes in turn. The parameter file is the experiment's
own, at smoke depth (`DEPTH`). Prints time, memory and disk of each notebook, and what `sdlab plan` said before.
Everything goes to runs/rehearsal/; about 20 GB, 20 GiB of memory.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import click
import pandas as pd
import torch

from sdlab.data.datasets import load_dataset
from sdlab.data.images import ImageDataset
from sdlab.data.model_files import SHAPES
from sdlab.data.named_datasets import CIFAR_FACTS
from sdlab.paths import PROJECT_ROOT
from sdlab.runs.parameters import parameter_file
from sdlab.runs.records import read_record
from sdlab.runs.stages import STAGES
from sdlab.settings import Settings

FOLDER = PROJECT_ROOT / "runs" / "rehearsal"
TRAIN, VAL, TEST = 80, 20, 20  # images of a made set
DEPTH = dict(
    class_encoder_epochs=1, unet_epochs=1, default_num_inference_steps=3, search_1_trials=2, search_2_trials=2,
    search_images=10, search_first_images=10, search_startup_trials=1, search_min_inference_steps=2,
    search_max_inference_steps=3, shard_size=10, classifier_epochs=1, classifier_seeds=2, scaling_max=1,
    importance_forests=2,
)  # fmt: skip

# Python runs this at every start: a notebook's kernel knows the made files as it knows the official ones.
MADE_IS_OFFICIAL = """
import functools, json
from pathlib import Path

from sdlab.data import named_datasets
from sdlab.data.images import DatasetFacts

made = json.loads(Path(__file__).with_name("made.json").read_text())
if "class" in made:
    import torchvision.datasets

    kind = type(made["class"], (getattr(torchvision.datasets, made["class"]),), made["attributes"])
    named_datasets.cifar = functools.partial(named_datasets.cifar, kind=kind, validation=made["counts"][1])
    named_datasets.CIFAR_FACTS[made["name"]] = DatasetFacts(*made["counts"], made["classes"], 32)
else:
    table = named_datasets.medmnist_table() | {made["name"]: made["info"]}
    named_datasets.medmnist_table = lambda: table
"""


def write_base_model(folder: Path) -> None:
    """SD 2.0's configs and random weights, in diffusers' format."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(SHAPES / "stable-diffusion-2-base", partial)
    torch.manual_seed(0)
    for part, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        kind.from_config(json.loads((partial / part / "config.json").read_text())).save_pretrained(partial / part)
    partial.rename(folder)


def write_made_data(name: str, folder: Path, official: ImageDataset | None) -> dict[str, str]:
    """Images in the official format below `folder`; the environment in which Python takes them for the official ones."""
    sys.path.insert(0, str(PROJECT_ROOT / "tests"))
    from make_data import CLASSES, write_cifar, write_medmnist

    shutil.rmtree(folder, ignore_errors=True)
    made = dict(name=name)
    if name in CLASSES:
        kind, counts = write_cifar(folder, name, per_batch=(TRAIN + VAL) // 5), (TRAIN, VAL, (TRAIN + VAL) // 5)
        attributes = {key: getattr(kind, key) for key in ("train_list", "test_list", "meta", "tgz_md5")}
        made |= {"class": kind.__name__, "attributes": attributes, "counts": counts, "classes": CLASSES[name]}
    else:
        made["info"] = write_medmnist(folder, name, (TRAIN, VAL, TEST), official.splits if official else None)
    (folder / "python").mkdir()
    (folder / "python" / "made.json").write_text(json.dumps(made))
    (folder / "python" / "sitecustomize.py").write_text(MADE_IS_OFFICIAL)
    before = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {"PYTHONPATH": os.pathsep.join([str(folder / "python"), str(PROJECT_ROOT), *before])}


def sdlab(environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess:
    call = [sys.executable, "-c", "from sdlab.tools.cli import cli; cli()", *map(str, arguments)]
    return subprocess.run(call, env=os.environ | environment, cwd=PROJECT_ROOT, check=True)


@click.command()
@click.argument("experiment")
@click.option("--official", type=click.Path(exists=True, path_type=Path), help="Folder of the official data.")
@click.option("--folder", type=click.Path(path_type=Path), default=FOLDER, show_default=True)
@click.option("-p", "more", nargs=2, multiple=True, metavar="NAME VALUE", help="Another setting.")
def main(experiment: str, official: Path | None, folder: Path, more: tuple[tuple[str, str], ...]) -> None:
    """Rehearse an experiment of the paper at Stable Diffusion 2.0's true size, at smoke depth."""
    settings = Settings.from_file(parameter_file(experiment))
    if official and settings.dataset in CIFAR_FACTS:
        raise click.UsageError("--official knows MedMNIST's files only: leave it out, and the images are made.")
    real = load_dataset(replace(settings, data_root=str(official))) if official else None
    folder.mkdir(parents=True, exist_ok=True)
    given = dict(
        DEPTH, base_model=folder / "stable-diffusion-2-base", runs_root=folder / "runs", reports_root=folder / "reports"
    )
    given["data_root"] = folder / f"data-{settings.dataset}"
    given |= dict(more)
    if given["base_model"] == folder / "stable-diffusion-2-base" and not given["base_model"].exists():
        write_base_model(given["base_model"])
    environment = write_made_data(settings.dataset, given["data_root"], real)
    shutil.rmtree(folder / "runs" / experiment, ignore_errors=True)
    parameters = [word for name, value in given.items() for word in ("-p", name, value)]
    sdlab(environment, "plan", experiment, *parameters)
    started = time.monotonic()
    sdlab(environment, "run", experiment, *parameters)
    print(f"{experiment}: {time.monotonic() - started:.0f} s from 00 to 07")
    settings = replace(settings, runs_root=str(given["runs_root"]))
    planned = json.loads((settings.run_folder / "metrics" / "plan.json").read_text())["rows"]
    rows, before = [], 0
    for number in STAGES:
        record = read_record(settings, number)
        size, memory = record.measured["folder_bytes"], record.measured["peak_memory_bytes"]
        rows.append(
            {
                "notebook": record.stage,
                "planned, s": 3600 * planned[number]["hours"] if number in planned else None,
                "took, s": record.seconds,
                "memory, GB": memory / 1e9,
                "disk, GB": (size - before) / 1e9,
            }
        )
        before = size
    table = pd.DataFrame(rows)
    print(table.to_markdown(index=False, floatfmt=(".0f", ".0f", ".0f", ".1f", ".2f"), missingval=""))
    took = table["took, s"][table["planned, s"].notna()].sum()
    print(f"00 to 05: planned {table['planned, s'].sum():.0f} s, took {took:.0f} s")


if __name__ == "__main__":
    main()
