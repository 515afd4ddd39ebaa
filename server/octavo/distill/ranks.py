"""Several processes that train one head: who they are, and sums over them. Knows no model.

Started by `torchrun`; without it there is one rank, and every function does nothing.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

_PATIENCE = datetime.timedelta(days=1)  # the first rank alone generates, for hours


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process among those that train."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier()

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Every rank's gradients become the sum of all ranks', in one message."""
        if self.size == 1:
            return
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        parts = torch.split(flat, [grad.numel() for grad in grads])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def summed(self, values: Tensor) -> Tensor:
        """The sum of all ranks' values."""
        if self.size > 1:
            dist.all_reduce(values)
        return values


@contextmanager
def joined(*, on_gpu: bool) -> Iterator[Ranks]:
    """Joins the other processes that torchrun started, if it did; each has a GPU of its own."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if size == 1:
        yield Ranks()
        return
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_PATIENCE)
    try:
        yield Ranks(rank=dist.get_rank(), size=size)
    finally:
        dist.destroy_process_group()
