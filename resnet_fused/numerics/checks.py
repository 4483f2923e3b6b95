"""Judging an output: by its bound, element by element, or beside the eager chain's error."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from resnet_fused.numerics.oracle import check_like
from resnet_fused.numerics.tolerances import (
    GRADIENT_LIMIT,
    MAX_LIMIT_16BIT,
    RMS_LIMIT_16BIT,
    RMS_LIMIT_FLOAT32,
    RMS_LIMIT_FOLDED,
    chance,
    unit_roundoff,
)


@dataclass(frozen=True)
class BoundCheck:
    """The outcome of an element-wise check; true if every element is within its bound.

    Attributes:
        ok: whether all checked elements pass.
        worst: the largest error/bound; inf where NaN or Inf is missing or out of place.
        index: where that is, () for an empty tensor.
        value: the output there.
        expected: the oracle there.
        count: how many elements fail.
        unchecked: elements whose bound is infinite (an intermediate may overflow there).
        error: the largest absolute error that is a number.
    """

    ok: bool
    worst: float
    index: tuple[int, ...]
    value: float
    expected: float
    count: int
    unchecked: int = 0
    error: float = 0.0

    def __bool__(self) -> bool:
        """Whether the check passed."""
        return self.ok

    def __str__(self) -> str:
        """One line: the verdict, and the worst element."""
        verdict = "within the bound" if self.ok else f"{self.count} elements beyond the bound"
        where = (
            f" at {self.index}: {self.value!r}, expected {self.expected!r}" if self.index else ""
        )
        return f"{verdict}, worst error/bound {self.worst:.4g}{where}"


@dataclass(frozen=True)
class RelativeCheck:
    """Error norms against float64, beside those of the eager chain in the same dtype.

    Attributes:
        ok: whether both ratios are within their limits.
        rms: root mean square error of the output under test.
        eager_rms: that of the eager chain.
        ratio: rms / eager_rms; 0 if both are 0, inf if only eager's is.
        limit: what the ratio may be.
        max: largest absolute error of the output under test.
        eager_max: that of the eager chain.
        max_ratio: max / eager_max.
        max_limit: what it may be; inf where the maximum is not judged.
    """

    ok: bool
    rms: float
    eager_rms: float
    ratio: float
    limit: float
    max: float
    eager_max: float
    max_ratio: float
    max_limit: float

    def __bool__(self) -> bool:
        """Whether the check passed."""
        return self.ok


def check_bound(y: Tensor, oracle: Tensor, bound: Tensor) -> BoundCheck:
    """Judges every element of ``y``: |y - oracle| <= bound, NaN and Inf in place and in sign.

    Inf is right as well where the oracle, within its bound, rounds to beyond the dtype's range.

    Args:
        y: the output under test, in the dtype that it was computed in.
        oracle: float64, the same shape.
        bound: float64, the same shape; inf marks elements that are not judged.

    Raises:
        ValueError: for shapes that differ.
    """
    check_like("y", y, "the oracle", oracle.shape)
    check_like("bound", bound, "the oracle", oracle.shape)
    if not y.numel():
        return BoundCheck(True, 0.0, (), math.nan, math.nan, 0)
    got = y.double()
    error = (got - oracle).abs_()
    ratio = error / bound
    u, largest = unit_roundoff(y.dtype), torch.finfo(y.dtype).max
    inf = largest * ((2 - u) / (2 - 2 * u))
    unchecked = 0
    # max() keeps NaN: where all is finite and far from overflow, which is nearly always, nothing
    # else needs a look.
    reach = float(oracle.abs().max()) + float(bound.max())
    if not (reach < inf and math.isfinite(float(ratio.max()))):
        beyond = oracle.abs() + bound >= inf
        ratio.masked_fill_(got == oracle, 0.0)
        ratio.masked_fill_(torch.isinf(got) & beyond & (got.sign() == oracle.sign()), 0.0)
        ratio.masked_fill_(torch.isnan(oracle) & torch.isnan(got), 0.0)
        ratio.nan_to_num_(nan=math.inf, posinf=math.inf)
        free = torch.isinf(bound)
        unchecked = int(free.sum())
        ratio.masked_fill_(free, 0.0)
        error.nan_to_num_(nan=0.0, posinf=0.0)
    flat = int(ratio.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), ratio.shape))
    worst = float(ratio[index])
    count = int((ratio > 1.0).sum()) if worst > 1.0 else 0
    return BoundCheck(
        count == 0,
        worst,
        index,
        float(got[index]),
        float(oracle[index]),
        count,
        unchecked,
        float(error.max()),
    )


def _norms(y: Tensor, oracle: Tensor, judged: Tensor | None) -> tuple[float, float]:
    """(root mean square, largest) error over the judged elements; None judges all."""
    error = y.double() - oracle
    if judged is not None:
        error = error[judged]
    if not error.numel():
        return 0.0, 0.0
    rms = float(torch.linalg.vector_norm(error)) / math.sqrt(error.numel())
    return rms, float(torch.linalg.vector_norm(error, math.inf))


def _ratio(ours: float, eager: float) -> float:
    if ours == 0.0:
        return 0.0
    return ours / eager if eager > 0.0 else math.inf


def _compare(y: Tensor, eager: Tensor, oracle: Tensor, rms: float, most: float) -> RelativeCheck:
    check_like("y", y, "the oracle", oracle.shape)
    check_like("eager", eager, "the oracle", oracle.shape)
    ours, largest = _norms(y, oracle, None)
    eager_rms, eager_largest = _norms(eager, oracle, None)
    if not (math.isfinite(largest) and math.isfinite(eager_largest)):
        finite = torch.isfinite(oracle) & torch.isfinite(eager)
        ours, largest = _norms(y, oracle, finite)
        eager_rms, eager_largest = _norms(eager, oracle, finite)
        # NaN and Inf that the oracle and eager share must be in y as well.
        odd = ~torch.isfinite(oracle) & (eager.double().nan_to_num() == oracle.nan_to_num())
        if not torch.equal(y.double()[odd].nan_to_num(), oracle[odd].nan_to_num()):
            ours = largest = math.inf
        ours, largest = (math.inf if math.isnan(v) else v for v in (ours, largest))
    ratio, max_ratio = _ratio(ours, eager_rms), _ratio(largest, eager_largest)
    ok = ratio <= rms and (max_ratio <= most or math.isinf(most))
    return RelativeCheck(ok, ours, eager_rms, ratio, rms, largest, eager_largest, max_ratio, most)


def relative_check(
    y: Tensor,
    eager: Tensor,
    oracle: Tensor,
    dtype: torch.dtype | None = None,
    *,
    folded: bool = False,
) -> RelativeCheck:
    """Compares the error of ``y`` with that of the eager chain in the same dtype.

    In 16 bits the rms error must not exceed eager's and the maximum not 1.25 times eager's; in
    float32 and float64 the rms may be 1.5 times eager's; the maximum, a coin toss, is not judged.
    All limits are raised by 4 / sqrt(elements), what chance does to a ratio of two norms.

    Args:
        y: the output under test.
        eager: the unfused modules' output in the same dtype.
        oracle: the unfused modules' output in float64.
        dtype: whose limits hold; y's by default.
        folded: BatchNorm was folded into the weights; in 16 bits the rms may be 1.25 times eager's
            then, and the maximum is not judged.

    Raises:
        ValueError: for shapes that differ.
        TypeError: for another dtype.
    """
    rms, most = RMS_LIMIT_FLOAT32, math.inf
    if unit_roundoff(dtype or y.dtype) > 2.0**-12:
        rms, most = (RMS_LIMIT_FOLDED, math.inf) if folded else (RMS_LIMIT_16BIT, MAX_LIMIT_16BIT)
    raised = chance(y.numel())
    return _compare(y, eager, oracle, rms * raised, most * raised)


def gradient_check(grad: Tensor, eager: Tensor, oracle: Tensor) -> RelativeCheck:
    """`relative_check` for a gradient: both norms may be 1.5 times eager's, in every dtype."""
    unit_roundoff(grad.dtype)
    return _compare(grad, eager, oracle, GRADIENT_LIMIT, GRADIENT_LIMIT)
