"""The repository itself: one source of pins, thin stripped notebooks, imports one way, reports a reader can open."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sdlab.paths import PROJECT_ROOT
from sdlab.report.printing import FILES
from sdlab.report.reference import REFERENCE
from sdlab.runs.stages import STAGES

NOTEBOOKS = sorted((PROJECT_ROOT / "notebooks").glob("*.ipynb"))
BENCHMARKS = sorted((PROJECT_ROOT / "benchmarks").glob("*.ipynb"))
# Each module may import those before it. ARCHITECTURE.md says the same in words.
ORDER = """
class_encoder cluster.processes data.images errors importance metrics paths report.paper threads data.image_decoding
data.naming devices report.samples runs.files runs.parameters cluster.blobs cluster.executors data.folders data.npz
data.pixels report.figures runs.checkpoints runs.locks runs.patient_storage runs.progress runs.resume_states
runs.shards seeds settings classifier data.downloads data.model_files data.own_npz data.splits diffusion_pipeline
report.reference runs.experiment runs.records runs.storage schedulers cluster.torchrun data.model_configs
data.named_datasets data.saved_images runs.studies sampling_config base_models data.own_images generation
cluster.worker data.datasets runs.trainings cluster.dask_cluster runs.stages report.costs report.tables runs.aside
runs.privacy runs.export runs.releases runs.verify tools.execution report.remarks runs.run tools.repair latents report.printing
evaluation search training verdict.intervals report.verdict verdict.controls verdict.judge verdict.collapse verdict.copies
verdict.fidelity verdict.any_set verdict.scorecard report.scorecard verdict.attacks verdict.exposure verdict.audit
report.audit cluster.training_process tools.measuring tools.planning tools.fan_out
tools.released_sets tools.scoring tools.cli
""".split()  # noqa: SIM905


def pins() -> dict[str, str]:
    environment = yaml.safe_load((PROJECT_ROOT / "environment.yml").read_text())
    (section,) = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    return dict(line.partition(";")[0].split("==") for line in section)


def test_the_environment_is_complete_and_exact():
    environment = yaml.safe_load((PROJECT_ROOT / "environment.yml").read_text())
    assert environment["name"] == "sdlab" and environment["channels"] == ["conda-forge"]
    assert {"pip", "make", "git"} <= {d for d in environment["dependencies"] if isinstance(d, str)}
    assert all(re.fullmatch(r"[0-9][\w.]*", version) for version in pins().values())
    asked = (
        "jupyterlab",
        "papermill",
        "torch",
        "diffusers",
        "optuna",
        "optuna-dashboard",
        "torchvision",
        "medmnist",
        "seaborn",
    )
    assert set(asked) <= pins().keys()
    assert pins()["torch"] != "2.13.0"  # a CPU build that torchvision's wheels do not import with


def test_every_dependency_is_pinned_within_its_range():
    project = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text())["project"]
    named = [Requirement(r) for r in [*project["dependencies"], *project["optional-dependencies"]["dev"]]]
    exact = {name.replace("_", "-").lower(): version for name, version in pins().items()}
    for requirement in named:
        assert exact[requirement.name.replace("_", "-").lower()] in requirement.specifier, requirement
    ranges = {r.name: r.specifier for r in named}
    assert "2.11.0" in ranges["torch"] and "0.26.0" in ranges["torchvision"]


def test_make_installs_those_pins():
    """The Makefile's own command, on the same file."""
    makefile = (PROJECT_ROOT / "Makefile").read_text()
    command = re.search(r"\tsed (.*) environment.yml", makefile).group(0).strip().replace("$$", "$")
    printed = subprocess.run(command, shell=True, cwd=PROJECT_ROOT, capture_output=True, text=True, check=True).stdout
    environment = yaml.safe_load((PROJECT_ROOT / "environment.yml").read_text())
    (section,) = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    assert printed.splitlines() == section
    assert "triton==3.9.0; sys_platform == 'linux'" in section  # CUDA parts have no wheels elsewhere


def test_every_pin_installs_on_the_oldest_python_we_promise():
    """3.11.0: Debian's own is 3.11.2, and a pin may ask for a later one."""
    from importlib.metadata import distributions

    from packaging.specifiers import SpecifierSet

    oldest = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert oldest == ">=3.11"
    exact = {canonicalize_name(name) for name in pins()}
    for distribution in distributions():
        if canonicalize_name(distribution.metadata["Name"]) in exact and (
            range := distribution.metadata.get("Requires-Python")
        ):
            assert "3.11.0" in SpecifierSet(range), distribution.metadata["Name"]


def test_the_installed_versions_are_the_pinned_ones():
    from importlib.metadata import version

    assert {name: version(name) for name in ("torch", "diffusers", "optuna", "papermill", "numpy")} == {
        name: pins()[name] for name in ("torch", "diffusers", "optuna", "papermill", "numpy")
    }


def test_ci_runs_what_the_readme_says():
    script = (PROJECT_ROOT / ".ci" / "run").read_text()
    assert [line for line in script.splitlines() if line.startswith("make")] == ["make test"]
    listed = re.search(r"Some tests need (.*) \(Debian's packages?\)", (PROJECT_ROOT / "README.md").read_text())[1]
    assert re.search("for package in (.*); do", script)[1].split() == re.findall("`(.*?)`", listed)
    assert (
        "make test" in (PROJECT_ROOT / "README.md").read_text()
        and "make demo" in (PROJECT_ROOT / "README.md").read_text()
    )


def test_there_is_a_notebook_for_every_step():
    assert [path.stem for path in NOTEBOOKS] == [step.stem for step in STAGES.values()]


@pytest.mark.parametrize("path", [*NOTEBOOKS, *BENCHMARKS], ids=lambda p: p.stem)
def test_notebooks_are_thin_stripped_and_have_one_parameters_cell(path):
    notebook = nbformat.read(path, 4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert not any(c.outputs or c.execution_count for c in code)
    (parameters,) = [c for c in code if "parameters" in c.metadata.get("tags", [])]
    assert parameters.source.startswith('experiment = "')
    assert "Settings.from_notebook(locals())" in code[1].source
    lines = [line for c in code for line in c.source.splitlines() if line.strip()]
    assert len(lines) <= 110 and not [line for line in lines if line.startswith(("def ", "class "))]
    first = notebook.cells[0].source
    title = f"# {path.stem[:2]} " if path in NOTEBOOKS else f"# {path.stem.capitalize()}\n"
    assert first.startswith(title) and "| reads | writes | minutes" in first
    if path in NOTEBOOKS:  # the same number stands in the README
        (minutes,) = re.findall(r"\| ([\d.]+) \|$", first, re.MULTILINE)
        row = next(
            line
            for line in (PROJECT_ROOT / "README.md").read_text().splitlines()
            if line.startswith(f"| [{path.stem[:2]} ")
        )
        assert row.endswith(f"| {minutes} |")


def imported_modules(path: Path) -> set[str]:
    """The package's modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sdlab":
            inner = [f"{node.module}.{alias.name}".removeprefix("sdlab.") for alias in node.names]
            modules = [name for name in inner if name in ORDER]
            found |= set(modules) if modules else {node.module.removeprefix("sdlab").lstrip(".")}
    return found - {""}


def test_imports_run_one_way():
    package = PROJECT_ROOT / "sdlab"
    files = {".".join(p.relative_to(package).with_suffix("").parts): p for p in package.rglob("*.py")}
    files = {name: path for name, path in files.items() if path.stem != "__init__"}
    assert files.keys() == set(ORDER)
    for name, path in files.items():
        late = {m for m in imported_modules(path) if ORDER.index(m) >= ORDER.index(name)}
        assert not late, f"{name} imports {late}"
    assert "optuna" not in (package / "training.py").read_text()


def reports():
    tracked = subprocess.run(
        ["git", "ls-files", "reports", "benchmarks/results"], cwd=PROJECT_ROOT, capture_output=True, text=True
    ).stdout.split()
    return [PROJECT_ROOT / name for name in tracked]


def test_reports_are_complete_small_and_name_no_machines_path():
    names = {path.relative_to(PROJECT_ROOT).as_posix() for path in reports()}
    digits = {*FILES, *(f"{step.stem}.ipynb" for step in STAGES.values())}
    assert {f"reports/reference/digits/{name}" for name in digits} <= names
    for folder in REFERENCE.glob("*/release"):
        assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 25e6, folder
    for path in reports():
        weights = path.suffix == ".safetensors"
        assert weights or path.stat().st_size <= 2 * 2**20, path
        if path.suffix != ".png" and not weights:
            text = path.read_text()
            # Any absolute path of two parts or more, whatever the machine: a quote, a space or a line's start before it.
            assert not re.search(r"(?:^|[\s\"'(=]|\\n)(?:/[A-Za-z][\w.-]*){2,}", text, re.MULTILINE), path


def test_a_readers_own_runs_leave_the_checkout_clean():
    names = [
        "reports/digits/table_1.md",
        "runs/digits/settings.yaml",
        "data/x.npz",
        "reports/reference/digits/table_1.md",
    ]
    ignored = subprocess.run(
        ["git", "check-ignore", "--no-index", *names], cwd=PROJECT_ROOT, capture_output=True, text=True
    )
    assert ignored.stdout.split() == names[:3]


def test_executed_reports_hold_results_and_no_errors():
    for path in (p for p in reports() if p.suffix == ".ipynb"):
        notebook = json.loads(path.read_text())
        outputs = [o for c in notebook["cells"] for o in c.get("outputs", [])]
        assert outputs and not [o for o in outputs if o["output_type"] == "error"], path
        assert not [o for o in outputs if o.get("name") == "stderr"], path


def test_the_wheel_holds_every_module(tmp_path):
    """Subpackages and data files are found: every module imports from the wheel, outside the repository."""
    source = tmp_path / "source"
    for name in ("pyproject.toml", "README.md", "LICENSE", "sdlab"):
        path = PROJECT_ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            source.mkdir(exist_ok=True)
            shutil.copy(path, source / name)
    build = "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    modules = [f"sdlab.{name}" for name in ORDER]
    code = f"import importlib, sdlab; [importlib.import_module(m) for m in {modules}]; print(sdlab.__file__)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    ).stdout
    assert printed.startswith(str(tmp_path / "installed"))
    assert (tmp_path / "installed/sdlab/tiny/unet/config.json").is_file()
