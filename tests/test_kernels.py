"""Forked kernels: started at once, processes of their own, and gone when they should be."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from jupyter_client import AsyncKernelManager

from sdlab import kernels

# A process of its own, as `sdlab run` is one: the forking process belongs to whoever started it.
SCRIPT = """
import json, sys, time
import nbformat
from nbclient.exceptions import DeadKernelError
import papermill
from sdlab.kernels import ForkingKernelManager, prepare

if __name__ == "__main__":
    prepare()
    for path in sys.argv[1:]:
        started = time.perf_counter()
        try:
            papermill.execute_notebook(path, path, progress_bar=False, kernel_name="python3", kernel_manager_class=ForkingKernelManager)
            print(json.dumps(["done", time.perf_counter() - started]), flush=True)
        except DeadKernelError:
            print(json.dumps(["dead", time.perf_counter() - started]), flush=True)
"""


def notebook(path: Path, source: str) -> Path:
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    made.metadata.kernelspec = dict(name="python3", display_name="python3", language="python")
    nbformat.write(made, path)
    return path


def started(tmp_path, *paths) -> subprocess.Popen:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, tmp_path / "script.py", *paths]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def said(path: Path) -> dict:
    (output,) = nbformat.read(path, 4).cells[0].outputs
    return json.loads(output.text)


def gone(pid: int) -> bool:
    """Within ten seconds; a zombie that waits for its parent counts."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes as Linux shows them")
def test_kernels_are_forks_of_one_process_that_has_imported(tmp_path):
    """Each a process of its own with fresh names, torch there before its first cell, the inline backend for figures."""
    source = (
        "import sys, os, json, matplotlib\n"
        "print(json.dumps(dict(pid=os.getpid(), parent=os.getppid(), torch='torch' in sys.modules, mine='x' in globals(),\n"
        "                      backend=matplotlib.rcParams['backend'], folder=os.getcwd())))\nx = 1"
    )
    first, dies, second = (
        notebook(tmp_path / "first.ipynb", source),
        notebook(tmp_path / "dies.ipynb", "import os\nos._exit(3)"),
        notebook(tmp_path / "second.ipynb", source),
    )
    process = started(tmp_path, first, dies, second)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line[0] for line in lines] == ["done", "dead", "done"]  # a kernel that dies is noticed, and only it is lost
    a, b = said(first), said(second)
    assert a["pid"] != b["pid"] and a["parent"] == b["parent"] != process.pid
    assert a["torch"] and b["torch"] and not b["mine"] and "matplotlib_inline" in a["backend"]
    assert gone(a["pid"]) and gone(b["pid"]) and gone(a["parent"])
    assert "Ctrl-C" not in out + err  # the kernel's greeting to whoever starts it by hand


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes as Linux shows them")
def test_a_kernel_ends_with_the_run_that_started_it(tmp_path):
    """Even where the run is killed and can do nothing any more."""
    pid_file = tmp_path / "pid"
    source = f"import os, time\nopen({str(pid_file)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"
    process = started(tmp_path, notebook(tmp_path / "sleeps.ipynb", source))
    for _ in range(600):
        if pid_file.exists() and pid_file.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert gone(int(pid_file.read_text()))


@pytest.mark.parametrize("driver", ["nvidiactl", "kfd"])
def test_where_there_is_a_gpu_kernels_are_ordinary_ones(tmp_path, monkeypatch, driver):
    """A driver that diffusers' import has woken does not survive a fork: days would run on the CPU, or CUDA would refuse."""
    (tmp_path / driver).touch()
    monkeypatch.setattr(kernels, "GPU_DRIVERS", (str(tmp_path / driver),))
    monkeypatch.setattr(kernels, "prepare", None)  # would fail if it were called
    assert kernels.kernel_manager(light=False) is AsyncKernelManager


def test_a_light_notebook_does_not_wait_for_imports_that_it_does_not_need(monkeypatch):
    monkeypatch.setattr(kernels, "GPU_DRIVERS", ())
    monkeypatch.setattr(kernels, "prepare", lambda: monkeypatch.setattr(kernels, "prepared", True))
    monkeypatch.setattr(kernels, "prepared", False)
    found = [kernels.kernel_manager(light) for light in (True, False, True)]
    assert found == [AsyncKernelManager, kernels.ForkingKernelManager, kernels.ForkingKernelManager]
