"""Kernels that start at once: a process imports what the notebooks import, and each kernel is a fork of it.

torch, diffusers and matplotlib take about ten seconds to import. `sdlab run` pays for them once, not in each of eight
notebooks; the kernels are otherwise ordinary ones, each in a process of its own. Nothing is computed before the fork.
Only on Linux machines without a GPU: diffusers asks for GPUs when it is imported, and a GPU's driver, once woken, does
not survive a fork.
"""

import multiprocessing
import os
import sys
import threading
import uuid
from multiprocessing.process import BaseProcess
from pathlib import Path

from jupyter_client import AsyncKernelManager
from jupyter_client.provisioning import LocalProvisioner

GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA, AMD, Windows' Linux
prepared = False
IMPORTED = [
    "ipykernel.kernelapp",
    "sdlab.planning",
    "sdlab.pipeline",
    "sdlab.figures",
    "sdlab.results",
    "sklearn.ensemble",
]


def kernel_manager(light: bool) -> type[AsyncKernelManager]:
    """The class of kernels for papermill: forked ones where that is safe, and the imports for them begun; else ordinary ones.

    A `light` notebook, which imports no torch, is forked only if the imports are there already.
    """
    if sys.platform != "linux" or any(Path(driver).exists() for driver in GPU_DRIVERS):
        return AsyncKernelManager
    if light and not prepared:
        return AsyncKernelManager
    prepare()
    return ForkingKernelManager


def prepare() -> None:
    """Let the imports begin. The first kernel waits for them."""
    global prepared
    prepared = True
    # matplotlib asks for its backend when it is imported, which is before a kernel would say so.
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    multiprocessing.forkserver.ensure_running()


def become_kernel(arguments: list[str], environment: dict[str, str], folder: str) -> None:
    """In the forked process: an IPython kernel, as `python -m ipykernel_launcher` would be one."""
    os.setsid()  # an interrupt at the terminal is for `sdlab run`, which ends its kernel in order
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    threading.Thread(target=end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    from ipykernel.kernelapp import IPKernelApp

    sys.argv = ["ipykernel_launcher", *arguments]
    IPKernelApp.launch_instance(arguments, parent_handle=os.getppid())


def end_with(run: BaseProcess) -> None:
    """No kernel outlives the run that started it, even one that was killed and could not say so."""
    run.join()
    os._exit(1)


class ForkedProcess:
    """A forked kernel with the face of `subprocess.Popen`, as far as jupyter_client looks at it."""

    stdin = stdout = stderr = None

    def __init__(self, process: BaseProcess):
        self.process, self.pid = process, process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int | None:
        self.process.join()
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.process.terminate()

    def kill(self) -> None:
        self.process.kill()


class ForkingProvisioner(LocalProvisioner):
    async def launch_kernel(self, cmd: list[str], **kwargs):
        """`cmd` is that of the kernel's specification: python -m ipykernel_launcher, and its arguments."""
        arguments = cmd[cmd.index("ipykernel_launcher") + 1 :]
        self.cwd = str(kwargs.get("cwd") or Path.cwd())
        process = multiprocessing.get_context("forkserver").Process(
            target=become_kernel, args=(arguments, dict(kwargs["env"]), self.cwd), name="sdlab-kernel"
        )
        process.start()
        self.process, self.pid = ForkedProcess(process), process.pid
        return self.connection_info


class ForkingKernelManager(AsyncKernelManager):
    """For `papermill.execute_notebook(kernel_manager_class=...)`."""

    async def _async_pre_start_kernel(self, **kwargs):
        if self.provisioner is None:
            self.kernel_id = self.kernel_id or str(uuid.uuid4())
            self.provisioner = ForkingProvisioner(kernel_id=self.kernel_id, kernel_spec=self.kernel_spec, parent=self)
        return await super()._async_pre_start_kernel(**kwargs)
