"""The processes of a run, as torchrun or ``accelerate launch`` start them; one alone is a world.

A process group exists only where there are several. Numbers that all ranks must agree on are summed
by `Ranks.sum`, on the device and without waiting for it.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

# DistributedDataParallel's C++ part owns the group too. If it is the last owner, which it is where
# an exception's frames outlive the group, it ends gloo's threads without giving the interpreter
# away, and waits for ever for one that needs it to free the last collective's tensors. So a handle
# of Python's, which does give it away, stays for as long as the process.
_kept: list[dist.ProcessGroup | None] = []


@dataclass(frozen=True)
class Ranks:
    """This process among all of them.

    Attributes:
        rank: Its number; rank 0 writes and prints.
        world: How many there are.
        device: Where its model is.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """``values``, in place the sum over all ranks; the device is not waited for."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def from_main(self, value: Any) -> Any:
        """What rank 0 has; any small object of our own."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, 0, device=self.device)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, on every rank."""
        values: list[Any] = [None] * self.world
        if self.world == 1:
            return [value]
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """For all ranks to come here."""
        if self.world > 1:
            dist.barrier()


@contextlib.contextmanager
def open_ranks() -> Iterator[Ranks]:
    """Join the other processes, if the environment or an open process group names any."""
    ours = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if ours:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        if dist.is_initialized():
            _kept.append(dist.group.WORLD)
            yield Ranks(dist.get_rank(), dist.get_world_size(), device)
        else:
            yield Ranks(0, 1, device)
    finally:
        if ours:
            dist.destroy_process_group()
