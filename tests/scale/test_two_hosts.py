"""Driver and worker on two hosts: a network, a mount and a UTS namespace each, joined by one cable.

The worker's host has another name and another clock, does not see the run's folder, and the cable is cut in the middle.
A whole smoke run then has the same bytes as one without a cluster. Needs root, iproute2, util-linux and Debian's faketime.
"""

import os
import shutil
import signal
import subprocess
import time

import pytest
from attempts import content, differing, settings_file, strays
from conftest import BIN, ENVIRONMENT

pytestmark = pytest.mark.scale
SCHEDULER = "tcp://10.99.0.1:8786"
TOOLS = ("ip", "unshare", "nsenter", "faketime")
PATIENT = {"DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "10m"}  # of docs/scale.md


def ip(*arguments) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def cable():
    """Two network namespaces, `driver` and `worker`, and the driver's end of the cable between them."""
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        pytest.skip(f"needs {', '.join(missing)}")
    if os.geteuid():
        pytest.skip("needs root, for namespaces")
    for name in ("driver", "worker"):
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)  # of a run that was killed
        ip("netns", "add", name)
    ip("link", "add", "end_d", "netns", "driver", "type", "veth", "peer", "name", "end_w", "netns", "worker")
    for name, end, address in (("driver", "end_d", "10.99.0.1/24"), ("worker", "end_w", "10.99.0.2/24")):
        ip("-n", name, "addr", "add", address, "dev", end)
        ip("-n", name, "link", "set", end, "up")
        ip("-n", name, "link", "set", "lo", "up")
    yield "end_d"
    for name in ("driver", "worker"):
        ip("netns", "del", name)


@pytest.fixture
def start(tmp_path):
    """Start a command on a host, in a session of its own."""
    processes = []

    def start(host, *command, **environment):
        log = (tmp_path / f"{len(processes)}.log").open("w")
        process = subprocess.Popen(
            ["ip", "netns", "exec", host, *map(str, command)], env=ENVIRONMENT | PATIENT | environment,
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A whole smoke run of one process, with four trials at a time."""
    folder = tmp_path_factory.mktemp("undisturbed")
    subprocess.run(
        [BIN / "sdlab", "run", settings_file(folder), "-p", "search_parallel", "4"],
        check=True, env=ENVIRONMENT, capture_output=True,
    )  # fmt: skip
    return content(folder / "runs" / "smoke")


@pytest.mark.parametrize("cut", [0, 10, 60], ids=lambda seconds: f"cut for {seconds} s")
def test_a_run_on_two_hosts_has_the_bytes_of_one(cable, start, undisturbed, tmp_path, cut):
    file, hidden = settings_file(tmp_path), tmp_path / "runs"
    hidden.mkdir()
    start("driver", BIN / "dask", "scheduler", "--host", "10.99.0.1", "--no-dashboard")
    work = f"""
        hostname elsewhere && mount -t tmpfs none '{hidden}' &&
        exec faketime -f '+3d' '{BIN}/dask' worker {SCHEDULER} --nthreads 1 --host 10.99.0.2 --no-dashboard \
            --local-directory '{tmp_path}/worker'
    """
    start("worker", "unshare", "--mount", "--uts", "bash", "-c", work,
          SDLAB_CACHE=str(tmp_path / "cache"), FAKETIME_DONT_FAKE_MONOTONIC="1")  # fmt: skip
    driver = start("driver", BIN / "sdlab", "run", file, "-p", "search_parallel", 4, "-p", "cluster", SCHEDULER)
    run = hidden / "smoke"
    if cut:
        while driver.poll() is None and len(list(run.glob("synthetic/*/shard*"))) < 8:
            time.sleep(0.1)
        ip("-n", "driver", "link", "set", cable, "down")
        time.sleep(cut)
        ip("-n", "driver", "link", "set", cable, "up")
    said = tmp_path / "2.log"
    assert driver.wait(timeout=1200) == 0, said.read_text()
    assert differing(content(run), undisturbed) == [] and strays(run) == []
