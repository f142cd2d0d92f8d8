"""Several processes that train, sample or measure as one: who has which share, who writes, and how they agree.

`torchrun --nproc-per-node 2 -m ancestral train DATA --to RUN` starts them, and `torch.distributed` joins them: gloo on
CPUs, NCCL on GPUs. Everything random is a function of (seed, step, row), so the number of processes changes rounding
and nothing else.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ancestral.errors import Lost

Value = TypeVar("Value")

CPU = torch.device("cpu")

PATIENCE = timedelta(minutes=30)
"""How long one process waits for another before it gives up: the first writes a checkpoint while the others wait."""


@dataclass(frozen=True)
class Processes:
    """The processes that work together, as one of them sees it.

    Attributes:
        rank: which one this is; the first, 0, is the only one that writes.
        count: how many there are.
        local: how many of them share this machine and its memory.
        device: where this one computes.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = CPU
    local: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def mean(self, values: Sequence[float]) -> list[float]:
        """The mean of each value over the processes."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(total)
        return (total / self.count).tolist()

    def told(self, value: Value) -> Value:
        """The first process's value, in every process."""
        if self.count == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, device=self.device)
        return box[0]

    def gathered(self, value: Value) -> list[Value]:
        """Every process's value, in order of rank, in every process."""
        if self.count == 1:
            return [value]
        box: list[Value] = [value] * self.count
        distributed.all_gather_object(box, value)
        return box

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            distributed.barrier()

    def joined(self, module: nn.Module) -> nn.Module:
        """The module with its gradients averaged over the processes in the backward pass."""
        if self.count == 1:
            return module
        joined = DistributedDataParallel(module, gradient_as_bucket_view=True)
        _JOINED.add(joined)
        return joined

    def divide(self, module: nn.Module) -> None:
        """Leave each process a share of the module's parameters; they come together block by block when they are used.

        Reference: Rajbhandari et al. (2020), stage 3, as PyTorch's `fully_shard`.
        """
        mesh = init_device_mesh(self.device.type, (self.count,))
        module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # fully_shard takes no other
        lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
        blocks = [block for part in lists for block in part if not isinstance(block, nn.ModuleList)]
        for block in [*blocks, module]:
            fully_shard(block, mesh=mesh)


ALONE = Processes()

_JOINED: WeakSet[DistributedDataParallel] = WeakSet()
"""Modules that average their gradients in the group, which gives them up when it ends: who drops one later, and with it
the last hold of the group, waits for the group's threads with the interpreter, which they may be waiting for."""


def apart(module: nn.Module, on: bool) -> AbstractContextManager[None]:
    """Within it, if on, backward passes of a joined module add up gradients without averaging over the processes."""
    return module.no_sync() if on and isinstance(module, DistributedDataParallel) else nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be divided among processes; each of them has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def laid_out_as(own: Tensor, value: Tensor) -> Tensor:
    """The value in memory, and divided among processes, as `own` is."""
    if isinstance(own, DTensor):
        return distribute_tensor(value, own.device_mesh, own.placements)
    return torch.empty_like(own).copy_(value)


@contextmanager
def join() -> Iterator[Processes]:
    """The processes that torchrun started, or this one alone."""
    count, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if count == 1:
        yield Processes(device=device)
        return
    store, rank, count = next(distributed.rendezvous("env://", timeout=PATIENCE))  # type: ignore[attr-defined]
    # torchrun may hand the store of the last attempt to the next one, where addresses of dead processes are found
    attempt = f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    store = distributed.PrefixStore(attempt, store)  # type: ignore[attr-defined]
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=PATIENCE)
    try:
        yield Processes(rank, count, device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, distributed.DistError):
            raise
        raise Lost(
            f"process {rank} of {count} lost the others, one of which has died; run the same command again, which goes "
            "on from the last checkpoint, or let torchrun do so with --max-restarts 3"
        ) from error
    for module in _JOINED:
        del module.reducer, module.logger
    _JOINED.clear()
    distributed.destroy_process_group()
