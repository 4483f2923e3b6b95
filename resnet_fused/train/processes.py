"""One process or many: what torchrun has started, and what they tell each other."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

PARALLEL = ("ddp", "fsdp")


class ProcessError(RuntimeError):
    """Processes that did not find, or have lost, each other; the message says which."""


@dataclass(frozen=True)
class Processes:
    """This process among its like.

    Attributes:
        rank: its number.
        world: how many there are.
        device: where this one computes.
        gloo: the group for what the host has to say; None where there is one process alone.
    """

    rank: int
    world: int
    device: torch.device
    gloo: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and speaks."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def most(self, value: int) -> int:
        """The largest value of any process; all of them have to ask."""
        if self.gloo is None:
            return value
        found = torch.tensor(value)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.gloo)
        return int(found)

    def share(self, value: Any) -> Any:
        """What the first process has."""
        if self.gloo is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0, group=self.gloo)
        return box[0]

    def gather(self, value: object) -> list[Any]:
        """What each process has, by rank; all of them have to ask."""
        if self.gloo is None:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value, group=self.gloo)
        return found

    def wait(self) -> None:
        """Until all are here."""
        if self.gloo is not None:
            dist.barrier(group=self.gloo)

    def agree_on_buffers(self, model: nn.Module) -> None:
        """BatchNorm's running statistics of the first process become everyone's."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


def launched() -> bool:
    """Whether torchrun, or what has its environment, started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


@contextlib.contextmanager
def joined(device: torch.device, timeout: float = 600.0) -> Iterator[Processes]:
    """Finds the other processes, if torchrun has started any, and takes leave of them.

    Args:
        device: of one process; of several each takes the CPU, or the GPU of its local number.
        timeout: seconds to wait for another process before this one gives up.

    Raises:
        ProcessError: the port is in use, or the others did not come.
    """
    if not launched():
        yield Processes(0, 1, device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    limit = datetime.timedelta(seconds=timeout)
    try:
        store, rank, world = next(iter(dist.rendezvous("env://", timeout=limit)))
        # torchrun's store outlives processes that it starts again: what dead ones left in it, such
        # as their addresses, is not to be found.
        attempt = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", timeout=limit,
            store=dist.PrefixStore(attempt, store), rank=rank, world_size=world,
        )  # fmt: skip
        gloo = dist.new_group(backend="gloo", timeout=limit)
    except (RuntimeError, ValueError) as error:
        raise ProcessError(
            f"processes: {os.environ['WORLD_SIZE']} did not meet at {where} ({error}); is the port "
            "in use, or has one of them died?"
        ) from error
    assert isinstance(gloo, dist.ProcessGroup)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), device, gloo)
    finally:
        dist.destroy_process_group()


def _in_rank_order(processes: Processes, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The mean of a bucket's gradients, added in the order of the ranks.

    A ring adds each place of a bucket in an order of its own, and the places change behind the
    first step: three processes that go on in the middle of a run would not find the same bits.
    """
    own = bucket.buffer()
    parts = [torch.empty_like(own) for _ in range(processes.world)]
    work = dist.all_gather(parts, own, async_op=True)
    assert work is not None

    def mean(_: object) -> Tensor:
        total = own.copy_(parts[0])
        for part in parts[1:]:
            total += part
        return total.div_(processes.world)

    return work.get_future().then(mean)


def spread(
    model: nn.Module, processes: Processes, parallel: str, precision: torch.dtype | None
) -> nn.Module:
    """Makes a model learn with the other processes.

    Args:
        model: on its device.
        processes: there may be one alone: then it is left as it is.
        parallel: "ddp" (each has all of it) or "fsdp" (each has a share of each residual block).
        precision: of autocast; None: none.
    """
    if processes.world == 1:
        return model
    if parallel == "ddp":
        if processes.device.type == "cuda":
            return nn.parallel.DistributedDataParallel(model, [processes.device])
        spread = nn.parallel.DistributedDataParallel(model)
        # It reads a hook's annotations, and takes none that are text.
        spread.register_comm_hook(processes, lambda state, bucket: _in_rank_order(state, bucket))
        return spread
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from resnet_fused.convert import is_block

    model.to(memory_format=torch.contiguous_format)  # it takes no other parameters
    mesh = init_device_mesh(processes.device.type, (processes.world,))
    policy = MixedPrecisionPolicy() if precision is None else MixedPrecisionPolicy(precision)
    for block in [module for module in model.modules() if is_block(module)]:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model
