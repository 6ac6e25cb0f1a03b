"""How long does each notebook take to start: from nothing until its settings, data and base model are loaded?

    .venv/bin/python scripts/time_starts.py digits

Executes each notebook up to the cell that opens its stage, in a kernel of its own as JupyterLab and papermill start it.
The experiment has to be finished, so that nothing is written. Prints the median and the range of three rounds.
"""

import statistics
import sys
import time

import nbformat
from nbclient import NotebookClient

from sdlab.paths import PROJECT_ROOT
from sdlab.runs.stages import STAGES

NOTEBOOKS = PROJECT_ROOT / "notebooks"


def seconds_to_start(stem: str, experiment: str) -> float:
    notebook = nbformat.read(NOTEBOOKS / f"{stem}.ipynb", 4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    cells[0].source = f"experiment = {experiment!r}"
    opening = next(index for index, cell in enumerate(cells) if "Run(" in cell.source)
    notebook.cells = cells[: opening + 1]
    arguments, metadata = ["--IPKernelApp.log_level=50"], {"path": NOTEBOOKS}
    client = NotebookClient(
        notebook, kernel_name="python3", extra_arguments=arguments, resources={"metadata": metadata}
    )
    started = time.perf_counter()
    with client.setup_kernel():
        for index, cell in enumerate(notebook.cells):
            client.execute_cell(cell, index)
        return time.perf_counter() - started


experiment = sys.argv[1] if len(sys.argv) > 1 else "digits"
rounds = [{stage.stem: seconds_to_start(stage.stem, experiment) for stage in STAGES.values()} for _ in range(3)]
for stem in rounds[0]:
    seconds = [times[stem] for times in rounds]
    print(f"{stem:<22} {statistics.median(seconds):5.1f} s  ({min(seconds):.1f} to {max(seconds):.1f})")
