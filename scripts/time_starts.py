"""How long each notebook takes to start: from nothing until its settings, data and base model are there.

    .venv/bin/python scripts/time_starts.py digits

The first two code cells of each notebook in a kernel of its own, as JupyterLab and papermill start it, on an experiment
that is finished (nothing is written then). Three rounds; the median and the range are printed.
"""

import statistics
import sys
import time

import nbformat
from nbclient import NotebookClient

from sdlab.paths import PROJECT_ROOT
from sdlab.runs.records import STAGES

ROUNDS = 3


def seconds_to_start(stem: str, experiment: str) -> float:
    notebook = nbformat.read(PROJECT_ROOT / "notebooks" / f"{stem}.ipynb", 4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"][:2]
    cells[0].source = f"experiment = {experiment!r}"
    notebook.cells = cells
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        extra_arguments=["--IPKernelApp.log_level=50"],
        resources={"metadata": {"path": PROJECT_ROOT / "notebooks"}},
    )
    started = time.perf_counter()
    with client.setup_kernel():
        for index, cell in enumerate(cells):
            client.execute_cell(cell, index)
        return time.perf_counter() - started


experiment = sys.argv[1] if len(sys.argv) > 1 else "digits"
seconds = {step.stem: [] for step in STAGES.values()}
for _ in range(ROUNDS):
    for stem, measured in seconds.items():
        measured.append(seconds_to_start(stem, experiment))
for stem, measured in seconds.items():
    print(f"{stem:<22} {statistics.median(measured):5.1f} s  ({min(measured):.1f} to {max(measured):.1f})")
