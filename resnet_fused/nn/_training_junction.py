"""Where two blocks in a row meet in backward, and what passes from one's node to the other's.

The node of the later block makes the gradient of its input already behind the ReLU of the earlier
block's end, with the reductions of that block's BatchNorms (`conv_bn_dgrad_end`). What autograd
carries is the gradient alone; the reductions are left here, beside it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef


class Junction:
    """Where two nodes meet in backward: the later one leaves the reductions of the earlier one's.

    The later node gives the gradient of its input behind the ReLU of the earlier one's end, and
    autograd brings it there, or what it has become on its way: a sum with others' gradients, a
    hook's result. Only the very tensor, not written since, has the sums that were left with it;
    the mask of any other is made again, which leaves what passed the first one as it is.
    """

    def __init__(self) -> None:
        # No reference: where the earlier node does not run, nobody would drop it.
        self._left: tuple[TensorWeakRef, int, Tensor] | None = None

    def leave(self, dz: Tensor, sums: Tensor) -> None:
        """Keeps the reductions of a gradient that the later node returns."""
        # A tensor of inference mode does not say whether it is written.
        self._left = None if dz.is_inference() else (TensorWeakRef(dz), dz._version, sums)

    def take(self, dout: Tensor) -> Tensor | None:
        """The reductions that were left with `dout`, once, or None."""
        left, self._left = self._left, None
        if left is None:
            return None
        dz, version, sums = left
        if dz() is not dout or dout._version != version:
            return None
        if sums.is_cuda:  # autograd does so with `dout`, where the two nodes' streams differ
            sums.record_stream(torch.cuda.current_stream(sums.device))
        return sums


class End(NamedTuple):
    """A node's end, as the node behind it needs it in backward.

    Attributes:
        y: [N, K, P, Q], the last raw output.
        rows: [4, K] of its BatchNorm.
        residual: a projection's raw output, or None.
        residual_rows: [4, K] of its BatchNorm, or None.
        junction: of the two nodes.
    """

    y: Tensor
    rows: Tensor
    residual: Tensor | None
    residual_rows: Tensor | None
    junction: Junction

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What is kept for backward: the op's arguments, in order."""
        return self[:4]


def is_watched(t: Tensor) -> bool:
    """Whether somebody is to see the gradient of a tensor of the graph."""
    return bool(t._backward_hooks) or t.retains_grad


def packs() -> bool:
    """Whether somebody packs what autograd keeps, to whom two places are two copies."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
