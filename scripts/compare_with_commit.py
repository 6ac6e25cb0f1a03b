"""Does this checkout compute what an earlier commit computed? Runs both at smoke depth and compares the results.

python scripts/compare_with_commit.py ee1ccb2 --keep comparison

Both run tests/smoke.yaml (each its own file) in this Python environment, on the CPU, with one thread. Compared are
contents, not files, because file names and record forms may differ:

* latents, checkpoints, resume states: every array, byte for byte
* synthetic sets: images and labels, byte for byte and in order, whatever the name of the set; there may be more of them now
* scores of all cells, trials and finalists of both searches, chosen configs, importances, training losses: exact

Exit status 1 if anything differs, or if there is nothing to compare.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from jupyter_client.manager import run_kernel
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[1]
CODE = ("sdlab/**/*", "notebooks/*.ipynb", "tests/smoke.yaml")  # what a run depends on
MOST_NAMES = 20  # differences printed for each kind and side
Item = tuple[str, str]  # a name, and what must be equal: a digest, or a number in full

# What is read from a run: files, where in their records, which keys. A list is read entry by entry.
ARRAYS = {
    "latents": ("latents/train.npz",),
    "weights": ("class_encoder/epoch_*/*.safetensors", "unet/epoch_*/*.safetensors"),
    "resume states": ("class_encoder/resume.safetensors", "unet/resume.safetensors"),
}
CELLS = [f"metrics/{name}.json" for name in ("after_1", "after_2", "after_3", "after_4", "real", "x[0-9]*")]
SEARCHES = ("metrics/search_1.json", "metrics/search_2.json")
HISTORIES = ("class_encoder/history.json", "unet/history.json")
SCORES = ("accuracy", "mean", "std", "top5", "balanced", "recall", "n")
CONFIG = ("num_inference_steps", "guidance_scale", "class_encoder_epoch", "unet_epoch")
RECORDS = {
    "scores": [(cell, split, SCORES) for cell in CELLS for split in ("val", "test")],
    "trials": [(path, "trials", ("number", "state", "params", "intermediate", "value")) for path in SEARCHES],
    "finalists": [(path, "finalists", ("number", "value", *CONFIG, *SCORES)) for path in SEARCHES],
    "chosen": [*((path, "best", CONFIG) for path in SEARCHES), ("metrics/scaling.json", "", ("chosen", *CONFIG))],
    "importances": [("metrics/importance.json", "", ("search_1", "search_2"))],
    "losses": [(path, "epochs", ("epoch", "loss", "learning_rate")) for path in HISTORIES],
}  # fmt: skip
SHARDS = "synthetic/*/shard_*.safetensors"


def contents(run: Path) -> dict[str, list[Item]]:
    """All that is compared, by kind."""
    items = {kind: [item for pattern in ARRAYS[kind] for item in read_arrays(run, pattern)] for kind in ARRAYS}
    items |= {kind: [item for place in RECORDS[kind] for item in read_records(run, *place)] for kind in RECORDS}
    return items | read_synthetic_sets(run)


def read_arrays(run: Path, pattern: str) -> Iterator[Item]:
    for path, name in files(run, pattern):
        arrays = dict(np.load(path)) if path.suffix == ".npz" else load_file(path)
        for key in ("mean", "std") if path.suffix == ".npz" else arrays:
            yield f"{name} {key}", digest(find(arrays, key, path))


def read_records(run: Path, pattern: str, place: str, keys: tuple[str, ...]) -> Iterator[Item]:
    for path, name in files(run, pattern):
        record = json.loads(path.read_text(encoding="utf-8"))
        part = find(record, place, path) if place else record
        if not part:
            raise click.ClickException(f"{path}: {place!r} is empty.")
        for i, entry in enumerate(part if isinstance(part, list) else [part]):
            for key in keys:
                yield from leaves(find(entry, key, path), f"{name} {place}[{i}] {key}")


def read_synthetic_sets(run: Path) -> dict[str, list[Item]]:
    """Sets, shards and images. A set is the sequence of its shards, a shard its images and labels."""
    sets, shards, images = {}, [], []
    for path, name in files(run, SHARDS):
        shard = load_file(path)
        pixels, labels = find(shard, "images", path), find(shard, "labels", path)
        shards.append((name, digest(pixels, labels)))
        images += [(f"{name} [{i}]", digest(pixels[i], labels[i])) for i in range(len(labels))]
        sets[path.parent.name] = digest(shards[-1][1], sets.get(path.parent.name, ""))
    return {"synthetic sets": list(sets.items()), "synthetic shards": shards, "synthetic images": images}


def files(run: Path, pattern: str) -> list[tuple[Path, str]]:
    """Paths that match, and their names in the run's folder."""
    if not (paths := sorted(run.glob(pattern))):
        raise click.ClickException(f"{run / pattern}: no such file.")
    return [(path, path.relative_to(run).as_posix()) for path in paths]


def find(record: dict, key: str, path: Path) -> Any:
    """The value of `key` where it is least deep in nested records (not in lists)."""
    level = [record]
    while level := [part for part in level if isinstance(part, dict)]:
        values = [part[key] for part in level if key in part]
        if len(values) == 1:
            return values[0]
        if values:
            raise click.ClickException(f"{path}: {len(values)} keys {key!r} at one depth, expected one.")
        level = [value for part in level for value in part.values()]
    raise click.ClickException(f"{path}: no key {key!r}.")


def leaves(value: Any, name: str) -> Iterator[Item]:
    """Every number and word in a nested value; floats in full, and 2 equal to 2.0."""
    if value and isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, f"{name}.{key}")
    else:
        yield name, repr(float(value)) if type(value) in (int, float) else repr(value)


def digest(*arrays: np.ndarray | str) -> str:
    sha = hashlib.sha256()
    for array in map(np.asarray, arrays):
        sha.update(f"{array.dtype.str} {array.shape} ".encode() + array.tobytes())
    return sha.hexdigest()


def unmatched(items: list[Item], others: list[Item], named: bool) -> list[str]:
    """The items for which `others` has no equal left; if `named`, an equal has the same name."""
    left, lines = Counter(other if named else other[1] for other in others), []
    for name, value in items:
        key = (name, value) if named else value
        left[key] -= 1
        if left[key] < 0:
            lines.append(f"{name}: {value[:24]}")
    return lines


def compare(old: Path, new: Path) -> bool:
    """Print one line for each kind of content, and what differs; True if all are equal."""
    before, now, all_equal = contents(old), contents(new), True
    for kind in before:
        named = not kind.startswith("synthetic")  # a set's name is the hash of a record
        lost, added = unmatched(before[kind], now[kind], named), unmatched(now[kind], before[kind], named)
        total, more = len(before[kind]), 0
        if not named:  # further sets, which only illustrate a notebook, change no result
            more, added = len(added), []
        all_equal &= total > 0 and not lost and not added
        click.echo(f"{kind:<16} {total - len(lost):>6} of {total} equal{f', {more} more now' if more else ''}")
        for side, lines in (("before", lost), ("now", added)):
            click.echo("".join(f"    only {side}: {line}\n" for line in lines[:MOST_NAMES]), nl=False)
    return all_equal


def git(*arguments: str) -> str:
    process = subprocess.run(("git", *arguments), stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if process.returncode:
        raise click.ClickException(f"git {arguments[0]} failed.")
    return process.stdout.strip()


def code_digest() -> str:
    """One hash for this checkout's code, committed or not."""
    paths = sorted(path for pattern in CODE for path in ROOT.glob(pattern) if path.is_file() and path.suffix != ".pyc")
    return hashlib.sha256(repr([(str(path), path.read_bytes()) for path in paths]).encode()).hexdigest()


def smoke_run(checkout: Path, folder: Path) -> Path:
    """The folder of a smoke run by a checkout's code; a run that finished before is not repeated."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | dict(PYTHONPATH=str(checkout), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    quiet = ["--IPKernelApp.log_level=50"]  # no warning about TCP
    with run_kernel(kernel_name="python3", env=environment, cwd=str(folder), extra_arguments=quiet) as kernel:
        code = f"import sdlab; assert sdlab.__file__ == {str(checkout / 'sdlab' / '__init__.py')!r}, sdlab.__file__"
        if kernel.execute_interactive(code)["content"]["status"] != "ok":
            raise click.ClickException(f"Notebooks would not import the package of {checkout}.")
    module = "sdlab.workflow" if (checkout / "sdlab" / "workflow.py").exists() else "sdlab.tools.cli"
    command = [sys.executable, "-m", module, "run", "tests/smoke.yaml", "-p", "device", "cpu"]
    command += ["-p", "runs_root", str(folder / "runs"), "-p", "reports_root", str(folder / "reports")]
    click.echo(f"Running {module} of {checkout}; its output goes to {folder / 'run.log'}")
    with (folder / "run.log").open("a") as log:
        if subprocess.run(command, cwd=checkout, env=environment, stdout=log).returncode:
            raise click.ClickException(f"The smoke run of {checkout} failed.")
    return folder / "runs" / "smoke"


@click.command(help=__doc__.partition("\n")[0])
@click.argument("commit", default="ee1ccb2")
@click.option("--keep", type=click.Path(path_type=Path), help="Folder for the runs; a later call continues there.")
def main(commit: str, keep: Path | None) -> None:
    commit = git("rev-parse", "--verify", f"{commit}^{{commit}}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (keep or Path(temporary)).resolve()
        checkout = folder / f"checkout_{commit[:12]}"
        if not checkout.exists():
            git("clone", "--quiet", "--shared", "--no-checkout", str(ROOT), str(checkout))
        git("-C", str(checkout), "checkout", "--quiet", "--force", "--detach", commit)
        old = smoke_run(checkout, folder / f"commit_{commit[:12]}")
        new = smoke_run(ROOT, folder / f"this_{code_digest()[:12]}")  # changed code begins a new run
        equal = compare(old, new)
    click.echo(f"{'Equal to' if equal else 'DIFFERENT from'} {commit[:12]}.")
    sys.exit(not equal)


if __name__ == "__main__":
    main()
