"""Calls of the Triton kernels whose machine code the gates read, and the launches they lead to.

A call names an op, a shape, a dtype and a layout; `record` runs the op's launch on tensors without
memory, for the GPU that each architecture stands for.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterable
from dataclasses import dataclass

import _triton_aot as aot
import _triton_chains as chains
import _triton_early as early
import _triton_fp8 as fp8
import _triton_stem as stem
import _triton_training as training
import torch
from torch import Tensor

from resnet_fused.cases import (
    BN_ACT_CASES,
    CONV_CASES,
    RESNET50_CHAINS,
    RESNET50_LAYERS,
    BnActCase,
    ChainCase,
    ConvCase,
)
from resnet_fused.triton import _tiles

CONVOLUTIONS = ("conv_bn_act", "conv_dgrad", "conv_wgrad")
"""Ops with matrix kernels; each is a module of resnet_fused.triton with a `launch`."""

CLASSES = {"bf16": "16 bit", "fp16": "16 bit", "tf32": "tf32", "tf32x3": "tf32x3"}
"""Types of operands, and the rows of the resource table that they go to."""

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "e4m3": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Call:
    """One call of an op.

    Attributes:
        op: such as "conv_bn_act".
        shape: sizes, geometry and epilogue.
        type: "bf16", "fp16", "tf32" or "tf32x3", the last two of float32; "e4m3".
        layout: "nhwc"; "nchw"; "sliced", every other column of a wider tensor; "unaligned", one
            element off 16 bytes.
        tile: the configuration that is asked for; None leaves it to the chooser.
        sample: whether CI compiles it.
        form: which operands a call of training has (see `_triton_training`), or "early" (see
            `_triton_early`).
    """

    op: str
    shape: ConvCase | BnActCase | ChainCase
    type: str = "bf16"
    layout: str = "nhwc"
    tile: str | None = None
    sample: bool = False
    form: str = ""

    @property
    def name(self) -> str:
        """For messages: "conv_bn_act 3x3_short n32 tf32 nhwc 64x64_4w4s"."""
        tile = f" {self.tile}" if self.tile else ""
        form = f" ({self.form})" if self.form else ""
        return f"{self.op} {self.shape.name} n{self.shape.n} {self.type} {self.layout}{form}{tile}"

    def tensor(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        """An operand without memory, in the call's layout and, unless given, its dtype."""
        dtype = dtype or _DTYPES.get(self.type, torch.float32)
        if len(sizes) == 1:
            return torch.empty(sizes, dtype=torch.float32, device="meta")
        n, c, h, w = sizes
        if self.layout == "nchw":
            return torch.empty(sizes, dtype=dtype, device="meta")
        if self.layout == "sliced":
            return torch.empty(n, h, 2 * w, c, dtype=dtype, device="meta")[:, :, ::2].permute(
                0, 3, 1, 2
            )
        if self.layout == "unaligned":
            flat = torch.empty(n * h * w * c + 1, dtype=dtype, device="meta")[1:]
            return flat.view(n, h, w, c).permute(0, 3, 1, 2)
        return torch.empty(n, h, w, c, dtype=dtype, device="meta").permute(0, 3, 1, 2)

    def launch(self) -> None:
        """Calls the op's launch.

        Raises:
            LookupError: the chooser does not offer the configuration for this call.
        """
        if self.op in training.OPS:
            return training.launch(self)
        if self.op == chains.OP:
            return chains.launch(self)
        if self.op in stem.OPS:
            return stem.launch(self)
        if self.op == fp8.OP:
            return fp8.launch(self)
        module = importlib.import_module(f"resnet_fused.triton.{self.op}")
        shape = self.shape
        if isinstance(shape, BnActCase):
            x, out = self.tensor(*shape.shape), self.tensor(*shape.shape)
            if shape.layout == "expanded":
                x = self.tensor(1, *shape.shape[1:]).expand(shape.shape)
            residual = self.tensor(*shape.shape) if shape.residual else None
            vector = self.tensor(shape.c)
            return module.launch(x, vector, vector, residual, out, shape.act)
        x, weight = self.tensor(*shape.input_shape), self.tensor(*shape.weight_shape)
        out, vector = self.tensor(*shape.output_shape), self.tensor(shape.k)
        y = self.tensor(*shape.output_shape) if shape.act == "relu" else None
        where = shape.stride, shape.padding, shape.dilation, shape.groups
        allowed = None if self.tile is None else frozenset({self.tile})
        if self.op == "conv_bn_act":
            residual = self.tensor(*shape.output_shape) if shape.residual else None
            operands = (x, weight, vector, vector, residual, out, *where, shape.act)
        elif self.op == "conv_dgrad":
            operands = (out, y, weight, vector, x, *where)
        else:
            operands = (out, y, x, vector, weight, *where)
        return module.launch(*operands, allowed=allowed, **early.arguments(self))


def _shape(
    name: str, n: int, c: int, size: int, k: int, r: int, *, stride: int = 1, groups: int = 1,
    residual: bool = False,
) -> ConvCase:  # fmt: skip
    return ConvCase(
        name, n, c, size, size, k, r, r, (stride,) * 2, (r // 2,) * 2, groups=groups,
        residual=residual,
    )  # fmt: skip


SHAPES = (
    # Together they reach every branch of the kernels that a configuration has.
    _shape("1x1_residual", 32, 256, 28, 512, 1, residual=True),
    _shape("1x1_long", 32, 512, 28, 128, 1),
    _shape("3x3_long", 32, 256, 14, 256, 3),
    _shape("3x3_short", 32, 64, 56, 64, 3),
    _shape("3x3_stride2", 32, 128, 56, 128, 3, stride=2),
    _shape("3x3_split", 1, 512, 7, 512, 3, residual=True),
    _shape("3x3_grouped", 32, 128, 56, 128, 3, groups=32),
    _shape("3x3_odd", 32, 65, 28, 65, 3, residual=True),
)
"""What each configuration is compiled for, as far as the chooser offers it."""

TABLE_SHAPES = ("1x1_residual", "3x3_short", "3x3_grouped")
"""Those that the resource table is made of: one loop, taps and channels in one, groups."""

TABLE_OPS = (*CONVOLUTIONS, *training.FORMS)
"""The ops of its rows; of training's, 16-bit operands alone."""

HUGE = _shape("1x1_huge", 4096, 256, 56, 64, 1)
"""More than 2^31 elements: offsets of 64 bits."""

RESNEXT = tuple(
    _shape(f"resnext_{c}_at{size}", 32, c, size, c, 3, groups=32, stride=stride)
    for c, size, stride in ((128, 56, 1), (256, 56, 2), (512, 28, 2), (1024, 14, 2), (1024, 7, 1))
)
"""The grouped convolutions of ResNeXt-50 32x4d."""

BN_ACT = tuple(
    BnActCase(f"{layout}{'_residual' if residual else ''}", 32, c, 56, 56, residual)
    for layout, c in (("wide", 256), ("odd", 65))
    for residual in (False, True)
)


SAMPLE = {
    "conv_bn_act": "1x1_residual",
    "conv_dgrad": "1x1_long",
    "conv_wgrad": "1x1_long",
}
"""CI compiles this shape of each op for every configuration, in bfloat16, and `SAMPLE_CLASSES`."""

SAMPLE_CLASSES = (
    ("3x3_long", "bf16", "128x128_8w3s"),
    ("3x3_short", "tf32", "128x64_4w4s"),
    ("1x1_long", "tf32", "64x64_4w4s"),
    ("3x3_short", "tf32x3", "64x64_4w4s"),
    ("3x3_grouped", "bf16", "64x64_4w4s"),
    ("3x3_odd", "bf16", "64x64_4w4s"),
)
"""One of each kind of loop and of operand: shape, type, configuration."""


def _configured(op: str, shape: ConvCase, kind: str, tile: str) -> Call:
    sample = shape.name == SAMPLE[op] and kind == "bf16"
    return Call(op, shape, kind, "nhwc", tile, sample or (shape.name, kind, tile) in SAMPLE_CLASSES)


def calls() -> list[Call]:
    """Every call whose code `make proof` gates."""
    found = [
        _configured(op, shape, kind, tile.name)
        for op in CONVOLUTIONS
        for kind in CLASSES
        for tile in _tiles.TILES
        for shape in SHAPES
        # float16 is bfloat16 but for conversions: the shapes with most of them will do.
        if kind != "fp16" or shape.name in ("1x1_residual", "3x3_short")
    ]
    for op in CONVOLUTIONS:
        for n in (1, 32, 256):
            found += [Call(op, dataclasses.replace(layer, n=n)) for layer in RESNET50_LAYERS]
        found += [Call(op, shape) for shape in RESNEXT]
        found.append(Call(op, HUGE, sample=op == "conv_bn_act"))
        found += [Call(op, case) for case in CONV_CASES if "empty" not in case.tags]
        found += [
            Call(op, shape, "bf16", layout)
            for shape in SHAPES
            for layout in ("nchw", "sliced", "unaligned")
        ]
    for kind in ("bf16", "fp16", "tf32"):
        for layout in ("nhwc", "nchw", "sliced", "unaligned"):
            sample = kind == "bf16" and layout in ("nhwc", "nchw")
            found += [Call("bn_act", case, kind, layout, sample=sample) for case in BN_ACT]
    for case in BN_ACT_CASES:
        if "empty" not in case.tags:
            layout = "nhwc" if case.layout == "expanded" else case.layout
            found.append(Call("bn_act", case, "bf16", layout))
    specs = [*training.convolutions(SHAPES, CLASSES), *training.passes(), *chains.calls(CLASSES)]
    specs += stem.calls(CLASSES)
    specs += fp8.calls(SHAPES, RESNET50_LAYERS)
    one = {"stem": dataclasses.replace(stem.USUAL, n=1), "head": stem.ONE_IMAGE}
    specs += early.calls(SHAPES, RESNET50_LAYERS, RESNET50_CHAINS, one)
    return found + [Call(*spec) for spec in specs]


@dataclass
class Recorded:
    """One variant, and the calls that lead to it."""

    variant: aot.Variant
    calls: list[Call]

    @property
    def name(self) -> str:
        """For messages."""
        return f"sm_{self.variant.capability} {self.variant.kernel}: {self.calls[0].name}"

    @property
    def sample(self) -> bool:
        """Whether CI compiles it: kernels that merge splits only behind the last class."""
        merge = "merge" in self.variant.kernel
        return any(
            call.sample and (not merge or call.tile in (None, "64x64_4w4s")) for call in self.calls
        )

    @property
    def side(self) -> int:
        """Groups that share a tile."""
        return self.variant.constant("SIDE", 1)


def _same_code(variant: aot.Variant) -> str:
    """Equal for variants whose code is the same but for one number.

    How many parts the reduction has is a divisor in the matrix kernels; whether there are parts
    changes the code.
    """
    if "SPLITS" in variant.signature and "merge" not in variant.kernel:
        place = (list(variant.signature).index("SPLITS"),)
        splits = min(2, variant.constants[place])
        variant = dataclasses.replace(variant, constants={**variant.constants, place: splits})
    return variant.key


def record(chosen: Iterable[Call], capability: int) -> tuple[list[Recorded], list[Call]]:
    """What an architecture compiles for these calls, each variant once; and the refused calls.

    A call is refused when the chooser does not offer its configuration there.
    """
    found: dict[str, Recorded] = {}
    refused = []
    limits = aot.ARCHITECTURES[capability].limits
    for call in chosen:
        with aot.recording(limits, tf32=call.type == "tf32") as launches:
            try:
                call.launch()
            except LookupError:
                refused.append(call)
        for launch in launches:
            entry = found.setdefault(_same_code(launch.variant), Recorded(launch.variant, []))
            entry.calls.append(call)
    return list(found.values()), refused
