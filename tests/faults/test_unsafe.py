"""Nothing that runs what others wrote, and no server that strangers reach."""

import ast
import json
import os
import re
import shlex
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from conftest import BIN, ENVIRONMENT

from sdlab.paths import PROJECT_ROOT

# Names whose mere use reads code: pickles, other YAML than plain, code from a hub, source that is built at run time.
UNSAFE_NAMES = {
    "pickle",
    "cPickle",
    "dill",
    "joblib",
    "eval",
    "exec",
    "unsafe_load",
    "full_load",
    "UnsafeLoader",
    "FullLoader",
}
UNSAFE_KEYWORDS = {"allow_pickle", "trust_remote_code"}


def sources():
    folders = (PROJECT_ROOT / name for name in ("sdlab", "scripts", "benchmarks"))
    for path in [path for folder in folders for path in folder.rglob("*.py")]:
        yield path.name, path.read_text()
    for path in [*(PROJECT_ROOT / "notebooks").glob("*.ipynb"), *(PROJECT_ROOT / "benchmarks").glob("*.ipynb")]:
        cells = json.loads(path.read_text())["cells"]
        yield path.name, "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def test_nothing_unpickles_or_runs_what_it_reads():
    """safetensors, npz without pickles, plain YAML. (CIFAR's pickles are torchvision's to read, after their MD5s: test_official.)"""
    seen = 0
    for name, source in sources():
        for node in ast.walk(ast.parse(source)):
            called = {node.id} if isinstance(node, ast.Name) else set()
            if isinstance(node, ast.Attribute):
                called = {node.attr} - {"eval"}  # a model's
            imported = (
                {a.name for a in getattr(node, "names", [])} if isinstance(node, ast.Import | ast.ImportFrom) else set()
            )
            assert not (called | imported) & UNSAFE_NAMES, (name, node.lineno, called | imported)
            if isinstance(node, ast.Call):
                seen += 1
                text = ast.unparse(node.func)
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                # Restricted to tensors: a state of the script that made `tiny`, and InceptionV3 as torch-fidelity publishes it.
                harmless = name in ("pretrain_tiny.py", "scoring.py") and keywords.get("weights_only") == "True"
                assert text not in ("torch.load", "torch.hub.load") or harmless, (name, node.lineno)
                assert text != "yaml.load" or any(
                    k.arg == "Loader" and ast.unparse(k.value) == "ParameterLoader" for k in node.keywords
                )
                for keyword in node.keywords:
                    if keyword.arg in UNSAFE_KEYWORDS:
                        assert ast.unparse(keyword.value) == "False", (name, node.lineno, keyword.arg)
    assert seen > 1000


def test_parameters_are_read_by_a_loader_that_makes_plain_values_only():
    import yaml

    from sdlab.runs.parameters import ParameterLoader

    assert issubclass(ParameterLoader, yaml.SafeLoader)


@pytest.fixture
def laboratory(tmp_path):
    """The command of `make lab`, without a browser and at a port of its own."""
    (line,) = re.findall(r"^\t\$\(BIN\)/(jupyter lab .*)$", (PROJECT_ROOT / "Makefile").read_text(), re.M)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    homes = {name: str(tmp_path) for name in ("HOME", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")}
    command = [str(BIN / "jupyter"), *shlex.split(line)[1:], "--no-browser", f"--port={port}"]
    if os.geteuid() == 0:  # whom Jupyter refuses unless told
        command.append("--allow-root")
    process = subprocess.Popen(
        command, cwd=PROJECT_ROOT, env=ENVIRONMENT | homes, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    yield process, port, tmp_path
    process.terminate()
    process.wait(20)


def answer(url):
    try:
        with urllib.request.urlopen(url, timeout=10) as said:
            return said.status
    except urllib.error.HTTPError as error:
        return error.code


def test_the_laboratory_asks_for_its_token_and_is_reached_from_this_machine_only(laboratory):
    process, port, folder = laboratory
    until, url = time.monotonic() + 90, f"http://127.0.0.1:{port}/api/contents"
    while True:
        try:
            without = answer(url)
            break
        except OSError:
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.3)
    (noted,) = Path(folder).glob("jpserver-*.json")
    token = json.loads(noted.read_text())["token"]
    assert without == 403 and len(token) >= 32 and answer(f"{url}?token={token}") == 200
    listening = {c.laddr.ip for c in psutil.Process(process.pid).net_connections() if c.status == psutil.CONN_LISTEN}
    assert listening and listening <= {"127.0.0.1", "::1"}
