"""Execute the benchmarks' notebook: `make benchmarks`, or `python benchmarks/run.py cpu`.

Results go to runs/benchmarks/<experiment>/, which git ignores. The committed ones are in benchmarks/results/; to replace
them, copy the new folder over the old one: `cp runs/benchmarks/cpu/* benchmarks/results/cpu/`.
"""

import logging
import time
from pathlib import Path

import click
import nbformat
import papermill
from comparison import BenchmarkSettings
from papermill.exceptions import PapermillExecutionError

from sdlab.errors import BadInput
from sdlab.paths import PROJECT_ROOT
from sdlab.runs.parameters import read_parameters

HERE = Path(__file__).resolve().parent


@click.command()
@click.argument("experiment")
def main(experiment: str) -> None:
    """Time each part of sdlab against the usual way to do the same work.

    EXPERIMENT is the name of a parameter file in benchmarks/ (cpu, sd2-cpu, sd2-gpu) or the path of one. Nothing else
    should run on the machine meanwhile.
    """
    started, path = time.monotonic(), HERE / f"{experiment}.yaml"
    logging.getLogger("papermill").setLevel(logging.ERROR)
    try:
        parameters = read_parameters(path if path.is_file() else experiment)
        settings = BenchmarkSettings.from_mapping(parameters)
        executed = papermill.execute_notebook(
            nbformat.read(HERE / "benchmarks.ipynb", 4), None, parameters=parameters, cwd=HERE,
            extra_arguments=["--IPKernelApp.log_level=50"],  # no warning about TCP
        )  # fmt: skip
    except BadInput as error:
        raise click.ClickException(str(error)) from None
    except PapermillExecutionError as error:
        sentence = f"The notebook failed in cell [{error.exec_count}] with {error.ename}: {error.evalue}"
        raise click.ClickException(error.evalue if error.ename == "BadInput" else sentence) from None
    executed.metadata["papermill"]["input_path"] = "benchmarks.ipynb"  # else all of its cells
    text = nbformat.writes(executed).replace(f"{PROJECT_ROOT}/", "")  # no path of this machine
    (settings.folder / "benchmarks.ipynb").write_text(text, encoding="utf-8")
    click.echo((settings.folder / "benchmarks.md").read_text(encoding="utf-8"))
    click.echo(
        f"{settings.folder}: table, figure and executed notebook, in {(time.monotonic() - started) / 60:.1f} minutes."
    )
    if (reference := HERE / "results" / settings.experiment / "benchmarks.md").is_file():
        click.echo(f"The committed results to compare with: {reference.relative_to(PROJECT_ROOT)}")


if __name__ == "__main__":
    main()
