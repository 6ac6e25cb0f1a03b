"""Device, precision and memory: where the arithmetic runs, in which numbers, and the sentence when it does not fit."""

import contextlib
from collections.abc import Iterator

import torch

from sdlab.errors import BadInput


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:1` or `mps` -> a device of this machine. Raises `BadInput`."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    kind, _, index = name.partition(":")
    numbered = index.isdigit() and kind == "cuda" and int(index) < torch.cuda.device_count()
    if not available.get(kind) or (index and not numbered):
        found = ", ".join(kind for kind, there in available.items() if there)
        raise BadInput(
            f"`device` is {name!r}, which this machine does not have: it has {found}; `auto` takes the best."
        )
    return torch.device(name)


def check_processes(count: int, name: str, device: torch.device) -> None:
    """Raises `BadInput` if `training_processes` is more than this machine's devices, or they cannot share a training."""
    if count > 1 and (device.type == "mps" or ":" in name):
        raise BadInput(
            f"`training_processes` is {count} and `device` {name!r}, which is a single one: take `device: cuda` or `cpu`, or "
            "one process."
        )
    if count > 1 and device.type == "cuda" and count > (found := torch.cuda.device_count()):
        raise BadInput(
            f"`training_processes` is {count}, and this machine has {found} GPUs: one process a GPU at most."
        )


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """`auto`: float32 on a CPU, bfloat16 on NVIDIA GPUs since Ampere, float16 on older ones, which emulate bfloat16."""
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def is_out_of_memory(error: BaseException) -> bool:
    """True if torch or Python reports that the memory of a GPU or of the computer is exhausted."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


@contextlib.contextmanager
def raise_on_oom(what: str, remedy: str) -> Iterator[None]:
    """Turn an out-of-memory error of the block into a `BadInput`.

    The batch is never made smaller instead: the last bits of the results would change.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise BadInput(
            f"The memory does not hold {what}: {remedy}, or free memory that other programs hold and repeat the command; "
            "finished results are intact."
        ) from None
