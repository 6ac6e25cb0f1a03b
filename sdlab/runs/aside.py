"""`aside/` of an experiment's folder: files that were replaced are moved there, and never deleted."""

import time
from pathlib import Path

from sdlab.runs.files import raise_on_write_error
from sdlab.runs.stages import STAGES, WRITES
from sdlab.settings import Settings


def new_aside_folder(folder: Path) -> Path:
    """`aside/<now>/`, which no stage reads; the name of a folder that does not exist yet."""
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    names = (f"{stamp}{more}" for more in ("", *(f"-{i}" for i in range(2, 1000))))
    return next(folder / "aside" / name for name in names if not (folder / "aside" / name).exists())


def move_aside(folder: Path, paths: list[Path], aside: Path) -> None:
    """Move files and folders of an experiment below `aside`. Raises `BadInput`."""
    with raise_on_write_error(aside):
        for path in paths:
            target = aside / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)


def files_of_stages(settings: Settings, numbers: list[str]) -> list[Path]:
    """Files and folders that these stages wrote, with their records and executed copies."""
    patterns = []
    for number in numbers:
        patterns += [*WRITES[number], f"records/{number}.*", f"notebooks/{STAGES[number].stem}.ipynb"]
    return [path for pattern in patterns for path in sorted(settings.run_folder.glob(pattern))]


def move_results_aside(settings: Settings, number: str) -> None:
    """Of a search that gets more trials: its old results, which the next ones replace. Trials and pictures stay."""
    folder = settings.run_folder
    results = [folder / name for name in WRITES[number] if name.startswith("metrics/") and (folder / name).exists()]
    move_aside(folder, results, new_aside_folder(folder))
