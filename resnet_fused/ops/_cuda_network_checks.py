"""Self-check of a network's convolutions in one launch: integers, every bit of every layer known.

Blocks wait for one another there. Where they did so in vain, the time limit of the child process
that runs this ends them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import numerics
from . import _cuda_network, _cuda_plan
from ._cuda_checks import place_of
from ._cuda_network import Layer, Plan, Wish
from ._selfchecks import guarded, require_exact

OP = _cuda_network.OP
ADDENDS = 6
"""Of a sum, of +-1 times what is read: through all layers sums stay exact."""
SHAPES = {"stage": (2, 72, 14, 14), "deep": (1, 128, 9, 9)}
NETWORKS = {
    "stage": (
        "72 136 1 2 x d",  # beside the next one
        "72 40 3 1 x a relu",  # of more steps than there are stages
        "40 40 3 2 a b relu",
        "40 136 1 1 b y relu d",
        "136 40 1 1 y e relu",
        "40 40 3 1 e f relu",
        "40 136 1 1 f z relu y",
    ),
    "deep": ("128 64 3 1 x a relu", "64 128 1 1 a b relu x"),
}
"""Layers as "C K taps stride source target [relu [residual]]"."""
SPLITS = {
    ("stage", 1): (1, 1, 3, 1, 2, 2, 1),
    ("stage", 4): (2, 4, 4, 2, 2, 4, 2),
    ("stage", 8): (2, 4, 4, 2, 2, 4, 2),
    ("deep", 1): (9, 2),
    ("deep", 4): (4, 2),
    ("deep", 8): (8, 2),
}
"""Of the layers, by network and blocks of a cluster, beside what a plan chooses."""
PIXELS = {1: (64,), 4: (64, 32), 8: (64, 32)}

Launch = Callable[[Sequence[Layer], Plan, Tensor], None]


def network_configurations() -> tuple[str, ...]:
    """The ways to add up the parts of a tile.

    Raises:
        ImportError: the extension has no such kernel.
    """
    if not _cuda_plan.exists(OP):
        raise ImportError(f"the extension holds no CUDA kernel of {OP}")
    return tuple(_cuda_network.CONFIGURATIONS)


def layers_of(
    name: str, dtype: torch.dtype, device: str, generator: torch.Generator
) -> tuple[list[Layer], list[Tensor]]:
    """A network of `NETWORKS` with results between guard bands, and what those lie in."""
    last = torch.channels_last
    x = torch.randint(-4, 5, SHAPES[name], generator=generator)
    values = {"x": x.to(device, dtype).contiguous(memory_format=last)}
    layers, buffers = [], []
    for words in NETWORKS[name]:
        c, k, taps, stride, source, target, *rest = words.split()
        weight = _filters(int(k), int(c), int(taps), generator)
        scale = torch.tensor([1.0, 0.5, -0.5])[torch.randint(0, 3, (int(k),), generator=generator)]
        shift = torch.randint(-4, 5, (int(k),), generator=generator).float()
        given, by, pad = values[source], int(stride), int(taps) // 2
        sizes = [(size + 2 * pad - int(taps)) // by + 1 for size in given.shape[2:]]
        buffer, out = guarded((given.shape[0], int(k), *sizes), dtype, device)
        buffers.append(buffer)
        values[target] = out
        layers.append(
            Layer(
                given, weight.to(device, dtype).contiguous(memory_format=last), scale.to(device),
                shift.to(device), values[rest[1]] if rest[1:] else None, (by, by), (pad, pad),
                (1, 1), 1, "relu" if rest else "none", out,
            )
        )  # fmt: skip
    return layers, buffers


def _filters(k: int, c: int, taps: int, generator: torch.Generator) -> Tensor:
    """[K, C, taps, taps] of `ADDENDS` +-1 in each filter, zeros elsewhere."""
    flat = torch.zeros(k, c * taps * taps)
    places = torch.rand(flat.shape, generator=generator).topk(ADDENDS, dim=1).indices
    signs = torch.randint(0, 2, places.shape, generator=generator).float() * 2 - 1
    return flat.scatter_(1, places, signs).view(k, c, taps, taps)


def check(
    configuration: str, device: str, launch: Launch, about: Sequence[int], room: int = 0
) -> None:
    """Checks one configuration; one for other GPUs passes unseen: no plan takes it there.

    Args:
        configuration: a key of `_cuda_network.CONFIGURATIONS`.
        device: where.
        launch: as `_cuda_network.launch`.
        about: the GPU's numbers, as of `_cuda_plan.gpu`.
        room: blocks that the GPU has room for, if that is known to be fewer than it seems.

    Raises:
        ArithmeticError: a result is wrong, counters are not zeros again, or nothing was planned.
        ValueError: another configuration.
    """
    place_of(configuration, tuple(_cuda_network.CONFIGURATIONS))
    cluster = _cuda_network.CONFIGURATIONS[configuration]
    if cluster > 1 and (len(about) < 4 or about[3] != _cuda_plan.HOPPER):
        return
    generator = torch.Generator().manual_seed(8)
    count = 0
    for name in NETWORKS:
        for dtype in _cuda_network.DTYPES:
            layers, buffers = layers_of(name, dtype, device, generator)
            cut = SPLITS[name, cluster]
            wishes = [Wish(room, cluster)]
            wishes += [Wish(room, cluster, cut, (size,) * len(cut)) for size in PIXELS[cluster]]
            for wish in wishes:
                made = _cuda_network.plan(layers, about, wish)
                if isinstance(made, str):
                    continue  # it is never used for this
                what = f"{name}, {dtype}, {configuration}, {wish.pixels[:1] or 'as planned'}"
                _twice(what, layers, buffers, made, launch)
                count += 1
    if count == 0:
        raise ArithmeticError(f"{configuration}: no network of the self-check fits it")


def _twice(
    what: str, layers: Sequence[Layer], buffers: Sequence[Tensor], made: Plan, launch: Launch
) -> None:
    """Two launches with one workspace, each judged."""
    memory = _cuda_network.workspace(made, layers[0].x.device)
    for time in ("first", "again"):
        for one in layers:
            one.out.fill_(math.nan)
        launch(layers, made, memory)
        for index, (one, buffer) in enumerate(zip(layers, buffers, strict=True)):
            require_exact(f"{what}, {time}, layer {index}", buffer, one.out, _expected(one))
        if bool(memory[: made.counter_bytes // _cuda_network.ROOM].any()):
            raise ArithmeticError(f"{what}, {time}: its counters are not zeros again")


def _expected(one: Layer) -> Tensor:
    """What a layer makes of what it has read."""
    tensors = [None if t is None else t.cpu() for t in one[:5]]
    oracle = numerics.conv_bn_act_oracle(
        *tensors, stride=tuple(one.stride), padding=tuple(one.padding), act=one.act
    )
    return numerics.exact_expected(oracle, one.out.dtype)


def network(configuration: str, device: str) -> None:
    """Checks one configuration on a GPU.

    Args:
        configuration: "clusters_of_8".
        device: "cuda:0".

    Raises:
        ArithmeticError: a result is wrong.
        ImportError: the extension has no such kernel.
        ValueError: another configuration.
    """
    place_of(configuration, network_configurations())
    where, cluster = torch.device(device), _cuda_network.CONFIGURATIONS[configuration]
    about, room = _cuda_plan.gpu(where), 0
    if cluster > 1 and about[3] == _cuda_plan.HOPPER:
        fits = _cuda_network.clusters(where, cluster) * cluster
        if fits == 0:
            return  # no plan takes it on this GPU
        seems = _cuda_network.plan(
            layers_of("deep", torch.float16, device, torch.Generator())[0], about,
            Wish(cluster=cluster),
        )  # fmt: skip
        room = fits if not isinstance(seems, str) and fits < seems.blocks else 0
    check(configuration, device, _cuda_network.launch, about, room)
