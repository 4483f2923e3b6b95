"""What `verify` returns: plain values, as a table and as JSON."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LayerCheck:
    """One convolution with its BatchNorm (and add and ReLU), on the input of the fused run.

    Attributes:
        layer: the convolution's name in the model.
        pattern: what ran as one, "conv+bn+relu" for example.
        implementation: who ran it.
        rounding: which bound it is held to, see `numerics.conv_bn_act_bound`.
        shape: of the output, [N, K, P, Q].
        error: largest absolute error against float64.
        bound_use: largest error/bound of an element; above 1 is a failure. For PyTorch's own
            modules of a kind that has no bound, the rms error as a share of what it may be.
        beyond: how many elements exceed their bound.
        ok: whether none does.
    """

    layer: str
    pattern: str
    implementation: str
    rounding: str
    shape: tuple[int, ...]
    error: float
    bound_use: float
    beyond: int
    ok: bool


@dataclass(frozen=True)
class BlockCheck:
    """A block, or a layer outside of blocks, on the input of the fused run.

    Attributes:
        block: its name in the model.
        fused_rms: root mean square error against the unfused block in float64.
        eager_rms: that of the unfused block in the model's dtype.
        ratio: fused_rms / eager_rms.
        limit: what the ratio may be.
        ok: whether it is.
    """

    block: str
    fused_rms: float
    eager_rms: float
    ratio: float
    limit: float
    ok: bool


@dataclass(frozen=True)
class EndToEnd:
    """The model's output against the unfused model in float64.

    Attributes:
        fused_rms: root mean square error of the fused model.
        eager_rms: that of the unfused model in its dtype.
        ratio: fused_rms / eager_rms.
        fused_max: largest absolute error of the fused model.
        eager_max: that of the unfused model.
        limit: what the ratio may be.
        top1_agree: share of the images for which the largest output is where float64 has it; None
            where the output is not one vector an image. Not judged.
        ok: whether ratio is within the limit.
    """

    fused_rms: float
    eager_rms: float
    ratio: float
    fused_max: float
    eager_max: float
    limit: float
    top1_agree: float | None
    ok: bool


@dataclass(frozen=True)
class Verification:
    """All checks of one model on one batch.

    Attributes:
        layers: one per fused layer, in order of execution.
        blocks: one per block, preceded by the layers outside of blocks.
        end_to_end: the whole model.
        dtype: of the input.
        input_shape: [N, C, H, W].
        images: how many of the images layers and blocks were judged on.
        not_judged: layers of blocks that fell back as a whole, with the reason; their blocks are
            judged.
    """

    layers: tuple[LayerCheck, ...]
    blocks: tuple[BlockCheck, ...]
    end_to_end: EndToEnd
    dtype: str
    input_shape: tuple[int, ...]
    images: int
    not_judged: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return not self.failures

    def __bool__(self) -> bool:
        """The same as ``ok``."""
        return self.ok

    @property
    def failures(self) -> list[str]:
        """One sentence per failed check."""
        found = [
            f"layer {c.layer} ({c.pattern}, {c.implementation}) is off by {c.error:.3g}, "
            f"{c.bound_use:.3g} times what its roundings allow, in {c.beyond} elements"
            for c in self.layers
            if not c.ok
        ]
        found += [
            f"block {c.block} has {c.ratio:.3g} times the rms error of the unfused one "
            f"({c.fused_rms:.3g} against {c.eager_rms:.3g}; {c.limit:g} is allowed)"
            for c in self.blocks
            if not c.ok
        ]
        end = self.end_to_end
        if not end.ok:
            found.append(
                f"the output has {end.ratio:.3g} times the rms error of the unfused model "
                f"({end.fused_rms:.3g} against {end.eager_rms:.3g}; {end.limit:g} is allowed)"
            )
        if not self.layers and not self.blocks:
            found.append("no layer ran fused: nothing was compared")
        return found

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values, ready for JSON: a NaN or Inf becomes null."""
        record = dataclasses.asdict(self)
        return {"ok": self.ok, "failures": self.failures, **_plain(record)}

    def summary(self) -> str:
        """One line."""
        if not self.ok:
            return f"FAILED: {len(self.failures)} checks; first: {self.failures[0]}"
        worst = max((c.bound_use for c in self.layers), default=0.0)
        ratio = max((c.ratio for c in self.blocks), default=0.0)
        return (
            f"ok: {len(self.layers)} layers use at most {worst:.3g} of their bounds, "
            f"{len(self.blocks)} blocks have at most {ratio:.3g} and the output has "
            f"{self.end_to_end.ratio:.3g} times eager's error"
        )

    def __str__(self) -> str:
        """A table of the layers, one of the blocks, the output, and the verdict."""
        width = max([len(c.layer) for c in self.layers] + [len(c.block) for c in self.blocks] + [5])
        lines = [
            f"{'layer':{width}}  {'pattern':17} {'implementation':14} {'output':>17} "
            f"{'error':>9} {'error/bound':>11}"
        ]
        for c in self.layers:
            shape = "x".join(map(str, c.shape))
            lines.append(
                f"{c.layer:{width}}  {c.pattern:17} {c.implementation:14} {shape:>17} "
                f"{c.error:9.2e} {c.bound_use:11.3f}{_mark(c.ok)}"
            )
        lines.append(
            f"{'block':{width}}  {'rms error':>10} {'eager':>10} {'ratio':>7} {'limit':>6}"
        )
        for b in self.blocks:
            lines.append(
                f"{b.block:{width}}  {b.fused_rms:10.2e} {b.eager_rms:10.2e} {b.ratio:7.3f} "
                f"{b.limit:6.2f}{_mark(b.ok)}"
            )
        e = self.end_to_end
        agree = "" if e.top1_agree is None else f", top class as in float64: {e.top1_agree:.0%}"
        lines.append(
            f"output: rms error {e.fused_rms:.2e}, eager {e.eager_rms:.2e}, ratio {e.ratio:.3f} of "
            f"{e.limit:g} allowed{agree}{_mark(e.ok)}"
        )
        if self.images < self.input_shape[0]:
            lines.append(
                f"layers and blocks: the first {self.images} of {self.input_shape[0]} images"
            )
        lines += [f"not judged by itself: {line}" for line in self.not_judged]
        return "\n".join([*lines, self.summary()])


def _mark(ok: bool) -> str:
    return "" if ok else "  FAILED"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
