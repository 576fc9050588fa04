"""The processes of a run: rank, size, device, and the few collective operations."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fewstep.errors import ConfigError


@dataclass(frozen=True)
class World:
    """This process among the others; one process alone is a world of size 1.

    Args:
        owns: whether the process group was made here, and is left at the end. A script that calls several runs in one
            launch makes its own first (``torch.distributed.init_process_group``): a group cannot be made twice.
    """

    rank: int
    size: int
    device: torch.device
    owns: bool = False

    @classmethod
    def join(cls, device: str = "auto") -> World:
        """Read RANK, WORLD_SIZE and LOCAL_RANK (torchrun, accelerate launch) and join the process group.

        Raises:
            ConfigError: the device does not exist here.
        """
        rank, size, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        chosen = pick_device(device, local)
        owns = size > 1 and not dist.is_initialized()
        if owns:
            backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
            dist.init_process_group(backend, rank=rank, world_size=size)
        return cls(rank, size, chosen, owns)

    def leave(self) -> None:
        """Leave the process group, if it was made here."""
        if self.owns and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def leads(self) -> bool:
        """True in the one process that writes and prints."""
        return self.rank == 0

    def share(self, batch_size: int) -> range:
        """This process's positions in the global batch.

        Raises:
            ConfigError: the batch does not divide by the number of processes.
        """
        if batch_size % self.size:
            raise ConfigError(
                "The batch does not divide by the number of processes",
                got=f"batch_size={batch_size}",
                want=f"a multiple of {self.size}",
            )
        local = batch_size // self.size
        return range(self.rank * local, (self.rank + 1) * local)

    def mean(self, value: Tensor) -> Tensor:
        """Mean over the processes, of a small tensor."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.size
        return value

    def any(self, flag: bool) -> bool:
        """True in all processes if true in one."""
        if self.size == 1:
            return flag
        value = torch.tensor([float(flag)])
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def gather(self, rows: Tensor) -> list[Tensor]:
        """The tensors of all processes (any lengths), in order of rank, on the CPU."""
        if self.size == 1:
            return [rows.cpu()]
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, rows.cpu())
        return parts

    def wait(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of that name; "auto" is this process's GPU where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"'{name}' is not a device", want="cpu, cuda, cuda:1 or auto") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"Runs on '{device.type}' are not supported", want="cpu, cuda, cuda:1 or auto")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("No CUDA device is available here", got=name, do="Use --device cpu")
        device = torch.device("cuda", device.index if device.index is not None else local_rank)
        torch.cuda.set_device(device)
    return device
