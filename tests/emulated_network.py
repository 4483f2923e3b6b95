"""The kernel of a whole network, emulated, beside the same layers one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import emulated
import torch
from torch import Tensor

from resnet_fused import numerics
from resnet_fused.ops._library import overload

DTYPES = (torch.bfloat16, torch.float16)
TILE = 4
"""Of conv_bn_act's configurations, the one that with as many splits gives the network's bits."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """One convolution of a network whose activations have names.

    Attributes:
        source: what it reads.
        target: what it writes.
        weight: [K, C, R, S] in channels_last.
        scale: [K] float32.
        shift: [K] float32.
        stride: along both axes.
        padding: likewise.
        residual: the name of what is added, or None.
        relu: whether a ReLU comes last.
    """

    source: str
    target: str
    weight: Tensor
    scale: Tensor
    shift: Tensor
    stride: int = 1
    padding: int = 0
    residual: str | None = None
    relu: bool = True

    def shape(self, source: Tensor) -> tuple[int, ...]:
        """Of the target, for a source."""
        n, _, h, w = source.shape
        reach = 2 * self.padding - self.weight.shape[2]
        p, q = ((size + reach) // self.stride + 1 for size in (h, w))
        return n, self.weight.shape[0], p, q

    def operands(self, values: dict[str, Tensor]) -> tuple[Any, ...]:
        """Of `conv_bn_act`, up to the shortcut."""
        residual = None if self.residual is None else values[self.residual]
        return values[self.source], self.weight, self.scale, self.shift, residual

    @property
    def geometry(self) -> tuple[list[int], list[int]]:
        """Stride and padding."""
        return [self.stride] * 2, [self.padding] * 2


def layer(
    generator: torch.Generator, dtype: torch.dtype, sizes: str, names: str, *, exact: bool
) -> Layer:
    """A layer with random parameters.

    Args:
        generator: of the parameters.
        dtype: of the weights.
        sizes: "C K taps stride".
        names: "source target [residual]"; without a residual a name that ends in "'" has no ReLU.
        exact: small integers, so that sums are exact where the inputs are such.
    """
    c, k, taps, stride = map(int, sizes.split())
    source, target, *residual = names.split()
    weight = torch.randn(k, c, taps, taps, generator=generator)
    scale, shift = (torch.randn(k, generator=generator) for _ in range(2))
    if exact:
        weight, shift = weight.sign() * (weight.abs() > 1.0), (2 * shift).round()
        scale = 2.0 ** -(shift.abs() % 2)
    else:
        weight = weight / (c * taps * taps) ** 0.5
    return Layer(
        source,
        target.rstrip("'"),
        weight.to(dtype).to(memory_format=torch.channels_last),
        scale,
        shift,
        stride,
        taps // 2,
        residual[0] if residual else None,
        not target.endswith("'"),
    )


def stage(dtype: torch.dtype, *, exact: bool, images: int = 2) -> tuple[Tensor, list[Layer]]:
    """Two bottlenecks, the first with a projection and stride 2; tiles are cut at both ends.

    Args:
        dtype: of activations and weights.
        exact: small integers.
        images: the batch.
    """
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(images, 72, 14, 14, generator=generator)
    x = (x.round() if exact else x).to(dtype).to(memory_format=torch.channels_last)
    sizes = {
        "72 136 1 2": "x d'",  # beside the next one
        "72 40 3 1": "x a",  # longer than the ring, of more tiles than there are blocks
        "40 40 3 2": "a b",
        "40 136 1 1": "b y d",
        "136 40 1 1": "y e",
        "40 40 3 1": "e f",
        "40 136 1 1 ": "f z y",
    }
    return x, [layer(generator, dtype, *both, exact=exact) for both in sizes.items()]


def shares(dtype: torch.dtype) -> tuple[Tensor, list[Layer]]:
    """Three layers of one tile, two of them of 12 filters, which are not moved 16 bytes at a time.

    Args:
        dtype: of activations and weights.
    """
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(1, 200, 5, 5, generator=generator).round().to(dtype)
    x = x.to(memory_format=torch.channels_last)
    sizes = {"200 12 1 1": "x r'", "200 12 3 1": "x y r", "200 16 3 1": "x z'"}
    return x, [layer(generator, dtype, *both, exact=True) for both in sizes.items()]


def one_by_one(x: Tensor, layers: Sequence[Layer], splits: Sequence[int]) -> dict[str, Tensor]:
    """What conv_bn_act's kernel makes of the layers, in the network's configuration.

    Args:
        x: the input.
        layers: the network.
        splits: of each reduction.
    """
    values = {"x": x}
    op = overload("conv_bn_act", emulated.NAME)
    for one, parts in zip(layers, splits, strict=True):
        with emulated.using(configuration=TILE, splits=parts, schedule=emulated.Schedule()):
            values[one.target] = op(
                *one.operands(values), *one.geometry, [1, 1], 1, "relu" if one.relu else "none"
            )
    return values


def wrong(values: dict[str, Tensor], layers: Sequence[Layer]) -> list[str]:
    """What is beyond its bound, each layer judged from what it has read.

    Args:
        values: activations by name.
        layers: the network.
    """
    found = []
    for one in layers:
        operands, (stride, padding) = one.operands(values), one.geometry
        options = {"stride": tuple(stride), "padding": tuple(padding)}
        oracle = numerics.conv_bn_act_oracle(
            *operands, **options, act="relu" if one.relu else "none"
        )
        bound = numerics.conv_bn_act_bound(*operands, oracle, **options)
        check = numerics.check_bound(values[one.target], oracle, bound)
        if not check.ok:
            found.append(f"{one.target}: {check}")
    return found


class Network:
    """Layers in memory of their own: what a plan, and then a run, is made from.

    Args:
        x: the input, in channels_last.
        layers: in order.
        places: names that lie in another one's memory, which is as large and no longer needed.
    """

    def __init__(self, x: Tensor, layers: Sequence[Layer], places: dict[str, str] | None = None):
        self.layers = list(layers)
        self.guarded: dict[str, emulated.Guarded] = {}
        self.values = {"x": x}
        for one in self.layers:
            shape = one.shape(self.values[one.source])
            like = torch.empty(
                shape, dtype=x.dtype, device="meta", memory_format=torch.channels_last
            )
            place = (places or {}).get(one.target)
            if place is None:
                self.guarded[one.target] = emulated.Guarded(like)
                self.values[one.target] = self.guarded[one.target].tensor
            else:
                memory = self.values[place]
                self.values[one.target] = memory.as_strided(shape, like.stride())
        self.problems = [self._problem(one) for one in self.layers]

    def _problem(self, one: Layer) -> Any:
        x, residual = (self.values.get(name or "") for name in (one.source, one.residual))
        out = self.values[one.target]
        stride, padding = one.geometry
        images = {"x": x, "weight": one.weight, "residual": residual, "out": out}
        assert x is not None
        return emulated.load().ConvBnAct(
            dtype=emulated.TYPE_NAMES[out.dtype],
            allow_tf32=False,
            x_size=x.shape,
            weight_size=one.weight.shape,
            stride=stride,
            padding=padding,
            dilation=[1, 1],
            groups=1,
            relu=one.relu,
            reverse=False,
            dependent=False,
            follows=False,
            arrivals=0,
            arrivals_count=0,
            scale=one.scale.data_ptr(),
            shift=one.shift.data_ptr(),
            **{name: 0 if t is None else t.data_ptr() for name, t in images.items()},
            **{
                f"{name}_stride": (0,) * 4 if t is None else t.stride()
                for name, t in images.items()
            },
        )

    def plan(
        self,
        splits: Sequence[int] = (),
        blocks: int = 0,
        gpu: tuple[int, ...] = emulated.H200,
        **wish: Any,
    ) -> dict[str, Any]:
        """What would be launched.

        Args:
            splits: of each layer, 0 for the plan's choice; or none.
            blocks: of the grid; 0 for the plan's choice.
            gpu: as `emulated.Run` has it.
            **wish: `pixels` of each layer's tiles, blocks of a `cluster` or 1; 0 likewise.

        Raises:
            ValueError: nothing can be.
        """
        return emulated.load().network_plan(self.problems, gpu, list(splits), blocks, **wish)

    def run(
        self, splits: Sequence[int] = (), blocks: int = 0, times: int = 1, **wish: Any
    ) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """Runs it, under the settings of `emulated.using`.

        Args:
            splits: as `plan` takes them.
            blocks: likewise.
            times: runs with one workspace.
            **wish: as `plan` takes it.

        Returns:
            The activations by name, and the reports.

        Raises:
            AssertionError: memory beside an output has been written, or counters are not zeros.
        """
        plan = self.plan(splits, blocks, **wish)
        memory = emulated.Guarded(torch.empty(plan["workspace_bytes"] // 4 + 64))
        workspace = memory.tensor[-memory.tensor.data_ptr() % 256 // 4 :]
        counters = workspace[: plan["counter_bytes"] // 4].view(torch.int32)
        counters.zero_()
        inputs: dict[str, Tensor | None] = {"x": self.values["x"]}
        for i, one in enumerate(self.layers):
            inputs |= {f"{i} {name}": getattr(one, name) for name in ("weight", "scale", "shift")}
        outputs = {name: one.tensor for name, one in self.guarded.items()}
        key = ("network", len(self.layers), self.values["x"].dtype, *splits, blocks)
        reports = []
        for _ in range(times):
            settings = emulated.settings(key, inputs, outputs | {"workspace": workspace})
            reports.append(
                emulated.load().network(
                    settings,
                    self.problems,
                    emulated.H200,
                    list(splits),
                    blocks,
                    workspace.data_ptr(),
                    **wish,
                )
            )
            assert not counters.any(), "counters are not zeros again"
        memory.result()
        results = {name: one.result() for name, one in self.guarded.items()}
        emulated.reported(reports[-1] | {"plan": plan})
        return {"x": self.values["x"]} | results, reports
