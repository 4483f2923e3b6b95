"""What a node's BatchNorms exchange with other processes, where they are SyncBatchNorms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.bn_finalize import merge_stats
from ._training_plan import Layer


def gathered(stats: Tensor, count: int, group: Any) -> tuple[Tensor, Tensor]:
    """The statistics of all processes, joined in the order of their ranks, and the joined count."""
    from torch.distributed import _functional_collectives as collectives

    # A count is exact in float32 up to 2^24; above, its two halves are.
    # Filled where they are: a copy from the host could be in no CUDA graph.
    halves = [stats.new_full((1,), half) for half in (count >> 20, count & 0xFFFFF)]
    mine = torch.cat((*halves, stats.flatten())).unsqueeze(0)
    # torch 2.15 has renamed it.
    gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
    every = collectives.wait_tensor(gather(mine, 0, group))
    counts = every[:, 0].double() * 2.0**20 + every[:, 1].double()
    return merge_stats(counts, every[:, 2:].unflatten(1, (2, -1)))


def reduced(sums: Tensor, layer: Layer) -> Tensor | None:
    """The sums over all processes, or None where there is one."""
    if layer.group is None:
        return None
    from torch.distributed import _functional_collectives as collectives

    return collectives.wait_tensor(collectives.all_reduce(sums, "sum", layer.group))
