"""Our way and the usual way to do the same work: settings, clock, comparison, table and figure."""

import gc
import os
import platform
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from sdlab.errors import BadInput
from sdlab.paths import project_path
from sdlab.runs.parameters import notebook_parameters, read_parameters
from sdlab.runs.records import cpu_name
from sdlab.settings import Settings, setting

PARTS = ("generation", "scaling", "classifiers", "class_encoder", "unet")


@dataclass(frozen=True)
class BenchmarkSettings(Settings):
    """The settings of an experiment, and what is timed with them."""

    images: int = setting(250, "", "images that are generated, and that an epoch trains on", low=10)
    parts: str = setting(" ".join(PARTS), "", "the parts to time")
    repetitions: int = setting(5, "", "repetitions of each measurement", low=2)

    @classmethod
    def from_notebook(cls, namespace: Mapping[str, Any]) -> "BenchmarkSettings":
        """Settings of the file `<experiment>.yaml` in this folder; parameters of the notebook override its lines."""
        given = notebook_parameters(namespace)
        path = Path(__file__).with_name(f"{given.get('experiment')}.yaml")
        return cls.from_mapping((read_parameters(path) if path.is_file() else {}) | given)

    def check(self) -> None:
        super().check()
        if not self.parts.split() or not set(self.parts.split()) <= set(PARTS):
            raise BadInput(f"`parts` is {self.parts!r}: allowed are some of `{' '.join(PARTS)}`, separated by spaces.")
        if self.images % self.shard_size:
            raise BadInput(
                f"`images` is {self.images}, but it has to be a multiple of `shard_size` ({self.shard_size}): sdlab "
                "generates whole shards, so the usual way would generate fewer images."
            )

    @property
    def folder(self) -> Path:
        """Where the results are written; git ignores it."""
        return project_path(self.runs_root) / "benchmarks" / self.experiment


def time_in_turn(ways: Mapping[str, Callable[[], Any]], repetitions: int, device: torch.device) -> pd.DataFrame:
    """Seconds of each way (columns) in each repetition (rows).

    Every way first runs once untimed. Then the ways take turns, in the opposite order every other time, so that a
    machine whose speed drifts favours none. A way that times itself returns its seconds as a float.
    """
    rows = []
    for repetition in range(-1, repetitions):
        row = {}
        for name, way in list(ways.items())[:: 1 if repetition % 2 else -1]:
            gc.collect()
            synchronize(device)
            started = time.perf_counter()
            own_seconds = way()
            synchronize(device)
            row[name] = own_seconds if isinstance(own_seconds, float) else time.perf_counter() - started
        if repetition >= 0:
            rows.append(row)
    return pd.DataFrame(rows, columns=list(ways))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare(name: str, usual_way: str, seconds: pd.DataFrame) -> dict[str, Any]:
    """A row of the table: median seconds of both ways, and the ratio usual / ours within each repetition.

    `seconds` has the columns `ours` and `usual`.
    """
    ratios = seconds.usual / seconds.ours
    return dict(
        part=name, usual_way=usual_way, ours=seconds.ours.median(), usual=seconds.usual.median(), ratio=ratios.median(),
        lowest=ratios.min(), highest=ratios.max(), repetitions=len(seconds),
    )  # fmt: skip


def machine(device: torch.device) -> dict[str, Any]:
    """What the times depend on besides the settings."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "not used"
    return {
        "CPU": cpu_name(), "cores": os.cpu_count(), "torch threads": torch.get_num_threads(), "GPU": gpu,
        "torch": torch.__version__, "Python": platform.python_version(), "system": platform.system(),
    }  # fmt: skip


def draw_ratios(table: pd.DataFrame, title: str):
    """How many times faster ours is, with the range over the repetitions; at 1 both are equally fast."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 0.7 * len(table) + 1.2), layout="constrained")
    spread = [table.ratio - table.lowest, table.highest - table.ratio]
    axes.barh([textwrap.fill(part, 52) for part in table.part], table.ratio, xerr=spread, capsize=4, height=0.55)
    axes.axvline(1, color="black", lw=1)
    axes.set(title=title, xlabel="times faster than the usual way", xlim=(0, 1.15 * max(1.5, table.highest.max())))
    axes.invert_yaxis()
    return figure


def save_results(folder: Path, title: str, rows: Sequence[Mapping[str, Any]], remarks: Sequence[str]) -> pd.DataFrame:
    """Write `benchmarks.md`, `.csv` and `.png` to `folder`. Returns the table, three digits of each number as text."""
    table = pd.DataFrame(rows)
    text = table.map(lambda value: f"{value:.3g}" if isinstance(value, float) else str(value))
    lines = [["part", "usual way", "ours, s", "usual, s", "times faster", "lowest", "highest", "n"], ["---"] * 8]
    markdown = "\n".join(f"| {' | '.join(line)} |" for line in [*lines, *text.to_numpy().tolist()])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmarks.md").write_text("\n\n".join([f"# {title}", markdown, *remarks]) + "\n", encoding="utf-8")
    table.to_csv(folder / "benchmarks.csv", index=False, float_format="%.4g")
    draw_ratios(table, title).savefig(folder / "benchmarks.png", dpi=150)
    return text
