"""The processes of a training: this one, or n under torchrun, each with its rows of every batch.

Every process draws the whole batch's images, noise and timesteps from the same generator and takes its rows. DDP then
averages the gradients over the processes, so that the loss of m of B rows on one of n processes counts n m / B.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator


class OneProcess:
    """A training in this process alone; a batch in parts of at most `micro_batch_size` images (0: in one)."""

    count, index = 1, 0

    def __init__(self, micro_batch_size: int = 0):
        self.micro_batch_size = micro_batch_size

    @property
    def is_first(self) -> bool:
        """True for the process that writes."""
        return self.index == 0

    def prepare(self, module: torch.nn.Module) -> torch.nn.Module:
        return module

    def parts(self, images: int) -> Iterator[tuple[slice, float]]:
        """This process's rows of a batch, and their share of it; one after another if the memory does not hold all at once.

        Gradients are exchanged in the backward pass of the last part.
        """
        rows = own_rows(images, self.count, self.index)
        size = self.micro_batch_size or max(len(rows), 1)
        pieces = [rows[start : start + size] for start in range(0, len(rows), size)]
        for piece in pieces or [range(1)]:  # a process without rows takes part, with weight 0
            with nullcontext() if piece is (pieces or [piece])[-1] else self.no_exchange():
                yield slice(piece.start, piece.stop), len(piece) / images if pieces else 0.0

    def no_exchange(self) -> AbstractContextManager:
        return nullcontext()

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over all processes."""
        return value


class ProcessOfMany(OneProcess):
    """One of n processes that accelerate has connected."""

    def __init__(self, accelerator: "Accelerator", micro_batch_size: int = 0):
        super().__init__(micro_batch_size)
        self.accelerator, self.count, self.index = accelerator, accelerator.num_processes, accelerator.process_index

    def prepare(self, module: torch.nn.Module) -> torch.nn.Module:
        """The module as DDP, which averages gradients."""
        self.prepared = self.accelerator.prepare_model(module, device_placement=False)
        return self.prepared

    def no_exchange(self) -> AbstractContextManager:
        return self.accelerator.no_sync(self.prepared)

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(value, "sum")


def own_rows(images: int, count: int, index: int) -> range:
    """Rows of process `index` of `count`: consecutive ones, whose numbers differ by at most one between processes."""
    return range(images * index // count, images * (index + 1) // count)
