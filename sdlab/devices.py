"""TODO devices."""

import contextlib
from collections.abc import Iterator

import torch

from sdlab.errors import BadInput


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:1` or `mps` -> a device that is there. Raises `BadInput`."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    kind, _, index = name.partition(":")
    if not there.get(kind) or (
        index and not (index.isdigit() and kind == "cuda" and int(index) < torch.cuda.device_count())
    ):
        found = ", ".join(k for k, v in there.items() if v)
        raise BadInput(
            f"`device` is {name!r}, which this machine does not have: it has {found}; `auto` takes the best."
        )
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """`auto`: float32 on a CPU, bfloat16 on NVIDIA GPUs from Ampere on, float16 on older ones, which only emulate it."""
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python says that no memory is left, of a GPU or of the computer."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


@contextlib.contextmanager
def raise_on_oom(what: str, way_out: str) -> Iterator[None]:
    """Raises `BadInput` where the block needs more memory than there is. Smaller batches would give other bytes: none are made."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise BadInput(
            f"The memory does not hold {what}: {way_out}, or free memory that other programs hold and give the same command; "
            "what was finished before is intact."
        ) from None
