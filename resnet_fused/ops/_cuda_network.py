"""Convolutions one behind the other in one launch of the compiled extension (docs/network.md).

No op of this package's own: the layers are those of `conv_bn_act`, and the frozen engine, which
knows that nothing runs between them, may give them to one launch. A plan sees where tensors lie:
layers that neither read nor overwrite one another's memory run side by side, and before each
further one all blocks meet. So memory may serve again behind its last reader, as in an arena.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import admission, backends
from . import _admitted, _cuda, _cuda_plan
from ._cuda_sources import SOURCES

OP = "network"
CONFIGURATIONS = {"clusters_of_8": 8, "clusters_of_4": 4, "through_memory": 1}
"""Name of a way to add up the parts of a tile -> blocks of its clusters."""
DTYPES = (torch.bfloat16, torch.float16)
ALIGNMENT = 256  # bytes, of the workspace
ROOM = 4
"""Bytes of an element of the workspace."""


class Layer(NamedTuple):
    """A layer, as the arguments of `conv_bn_act`, and its result; all on one device.

    Attributes:
        x: [N, C, H, W].
        weight: [K, C/groups, R, S].
        scale: [K], float32.
        shift: [K], float32.
        residual: [N, K, P, Q], or None.
        stride: vertical, horizontal.
        padding: likewise.
        dilation: likewise.
        groups: number of groups.
        act: "relu" or "none".
        out: [N, K, P, Q].
    """

    x: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor
    residual: Tensor | None
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    act: str
    out: Tensor


class Wish(NamedTuple):
    """What is asked of a plan; 0, or no list, leaves it open.

    Attributes:
        blocks: of the launch.
        cluster: blocks of a cluster; 1 is without.
        splits: of each layer's reductions.
        pixels: of each layer's tiles.
    """

    blocks: int = 0
    cluster: int = 0
    splits: tuple[int, ...] = ()
    pixels: tuple[int, ...] = ()


class Plan(NamedTuple):
    """What a launch takes.

    Attributes:
        blocks: of the launch, all on the GPU at once.
        cluster: of them, that merge in shared memory; 1: through global memory.
        launches: of 64 layers at most.
        meetings: of all blocks.
        workspace_bytes: of memory that belongs to this call alone.
        counter_bytes: in front of it: zeros before a launch, and again behind it.
        cycles: predicted, good for comparisons alone.
        splits: of each layer's reductions.
        pixels: of each layer's tiles.
        meets: whether the blocks meet before a layer.
        why: in words.
    """

    blocks: int
    cluster: int
    launches: int
    meetings: int
    workspace_bytes: int
    counter_bytes: int
    cycles: float
    splits: tuple[int, ...]
    pixels: tuple[int, ...]
    meets: tuple[int, ...]
    why: str

    @property
    def wish(self) -> Wish:
        """What has this very plan be made again."""
        return Wish(self.blocks, self.cluster, self.splits, self.pixels)


def _lists(layers: Sequence[Layer]) -> tuple[list, ...]:
    """The layers as the raw ops take them."""
    geometry = [
        number
        for one in layers
        for number in (*one.stride, *one.padding, *one.dilation, one.groups, one.act == "relu")
    ]
    columns = (list(column) for column in zip(*(one[:5] for one in layers), strict=True))
    return (*columns, [int(number) for number in geometry], [one.out for one in layers])


def plan(layers: Sequence[Layer], about: Sequence[int], wish: Wish = Wish()) -> Plan | str:  # noqa: B008
    """What a launch would take on a GPU, or why none does; nothing is launched.

    Args:
        layers: in the order in which one stream would run them; their memory may be on any device.
        about: the GPU's numbers, as of `_cuda_plan.gpu`.
        wish: what is asked for.

    Raises:
        RuntimeError: a layer's tensors do not fit together.
    """
    blocks, cluster, splits, pixels = wish
    found = _cuda_plan.raw(OP, "plan")(
        *_lists(layers), list(about), blocks, cluster, list(splits), list(pixels)
    )
    if found[0] == 0:
        return str(found[-1])
    return Plan(*(tuple(one) if isinstance(one, list) else one for one in found))


def clusters(device: torch.device, cluster: int) -> int:
    """Clusters of so many blocks that a GPU has room for at once, 0 where it has none."""
    with torch.cuda.device(device):
        return int(_cuda_plan.raw(OP, "clusters")(cluster))


def choose(layers: Sequence[Layer], device: torch.device) -> Plan | str:
    """The plan of least predicted time among the configurations that may be used, or why not.

    In clusters no more blocks than this very GPU's GPCs have room for.

    Args:
        layers: as of `plan`.
        device: the GPU.
    """
    names, about = _admitted.names(OP, "cuda", device), _cuda_plan.gpu(device)
    best: Plan | None = None
    refused = []
    for name, cluster in CONFIGURATIONS.items():
        if names is not None and name not in names:
            continue
        made = plan(layers, about, Wish(cluster=cluster))
        if not isinstance(made, str) and cluster > 1:
            room = clusters(device, cluster) * cluster
            if room == 0:
                made = "the extension was built without clusters, or the GPU has no room for one"
            elif room < made.blocks:
                made = plan(layers, about, Wish(room, cluster))
        if isinstance(made, str):
            refused.append(made)
        elif best is None or made.cycles < best.cycles:
            best = made
    return best or (refused[-1] if refused else "none of its configurations was admitted")


def workspace(made: Plan, device: torch.device) -> Tensor:
    """Memory for the launches of a plan, zeros where its counters are."""
    count = -(-made.workspace_bytes // ROOM)
    spare = ALIGNMENT // ROOM
    memory = torch.zeros(count + spare, dtype=torch.int32, device=device)
    first = -memory.data_ptr() % ALIGNMENT // ROOM
    return memory[first : first + count]


def launch(layers: Sequence[Layer], made: Plan, memory: Tensor) -> None:
    """Runs the layers on the current stream.

    Args:
        layers: as of `plan`.
        made: their plan.
        memory: `workspace`; no other launch uses it meanwhile.

    Raises:
        RuntimeError: the launch failed, or was refused.
    """
    blocks, cluster, splits, pixels = made.wish
    *given, outs = _lists(layers)
    _cuda_plan.raw(OP, "out")(*given, outs, memory, blocks, cluster, list(splits), list(pixels))


def alone(made: Plan, index: int) -> tuple[int, int]:
    """Configuration and splits in which `conv_bn_act` gives the bits of a layer of a plan."""
    return int(_cuda_plan.raw(OP, "configuration")()), made.splits[index]


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why layers can't be one launch on a device, or None; it may start the self-check.

    Args:
        device: of the layers.
        dtype: of their activations.
    """
    if dtype not in DTYPES:
        return f"one launch is for 16 bits, the layers are in {dtype}"
    call = backends.Call(OP, device.type, dtype, index=device.index)
    reason = _cuda.supports(call)
    if reason is not None:
        return reason
    # The single kernel that has its bits, and that its first result is compared with.
    names = _admitted.names("conv_bn_act", "cuda", device)
    single = _cuda_plan.configurations("conv_bn_act")[_cuda_plan.raw(OP, "configuration")()]
    if names is not None and single not in names:
        return f"conv_bn_act's {single}, which its result is compared with, is not admitted"
    return None


admission.register(
    admission.Kernel(
        OP,
        "cuda",
        SOURCES[OP],
        "resnet_fused.ops._cuda_network_checks:network_configurations",
        "resnet_fused.ops._cuda_network_checks:network",
    )
)
