"""Self-checks of training's kernels that multiply no matrices: on integers, bit for bit.

They run in the child process of `resnet_fused._selfcheck`. Scales are powers of two and statistics
are chosen so that every root and quotient is exact: each result has one right value.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..cases import BN_ACT_CASES, BnActCase
from ._selfchecks import GUARD, _lay_out, guarded, require_exact

CONFIGURATION = "default"
NAMES = (
    "nhwc_residual", "nchw_residual", "sliced", "expanded", "unaligned", "odd_nhwc", "odd_nchw",
    "one_channel", "one_pixel", "empty_batch", "many_channels",
)  # fmt: skip
CASES = tuple(case for case in BN_ACT_CASES if case.name in NAMES)
IN_FLOAT32 = ("nhwc_residual", "odd_nhwc")
WINDOWS = (([3, 3], [2, 2], [1, 1]), ([2, 3], [1, 2], [1, 0]))
COUNT = 64
"""Elements a channel of the statistics: quotients by it, and roots of them, are powers of two."""

Check = Callable[[BnActCase, torch.dtype, str], None]


def bn_finalize_configurations() -> tuple[str, ...]:
    """One: its launch leaves nothing to choose."""
    return (CONFIGURATION,)


bn_update_stats_configurations = bn_add_act_configurations = bn_finalize_configurations
bn_add_act_backward_configurations = bn_backward_apply_configurations = bn_add_act_configurations
bn_backward_finalize_configurations = bn_act_pool_configurations = bn_add_act_configurations
bn_act_pool_backward_configurations = bn_add_act_configurations


Launch = Callable[..., None]


def _of_triton(op: str) -> Launch:
    return importlib.import_module(f"resnet_fused.triton.{op}").launch


_launch: Callable[[str], Launch] = _of_triton


@contextlib.contextmanager
def launching(launch: Callable[[str], Launch]) -> Iterator[None]:
    """Checks other kernels than Triton's in the block.

    Args:
        launch: gives an op's launch: launch(*operands, *results, *options).
    """
    global _launch
    before, _launch = _launch, launch
    try:
        yield
    finally:
        _launch = before


def _require(configuration: str) -> None:
    if configuration != CONFIGURATION:
        raise ValueError(f"configuration is {configuration!r}; accepted is {CONFIGURATION!r}")


def _every_case(configuration: str, device: str, check: Check) -> None:
    _require(configuration)
    for case in CASES:
        for dtype in _dtypes(case, device):
            check(case, dtype, device)


def _dtypes(case: BnActCase, device: str) -> Iterator[torch.dtype]:
    """float16 is bfloat16's code but for conversions; interpreted, there is no bfloat16."""
    yield torch.bfloat16 if device.startswith("cuda") else torch.float16
    if case.name in IN_FLOAT32:
        yield torch.float32


def _integers(shape: Sequence[int], dtype: torch.dtype, most: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + most)
    return torch.randint(-most, most + 1, tuple(shape), generator=generator).to(dtype)


def _operand(case: BnActCase, dtype: torch.dtype, device: str, most: int) -> Tensor:
    return _lay_out(_integers(case.shape, dtype, most).to(device), case)


def _norm(channels: int, most: int = 2) -> Tensor:
    """Scale, of both signs, and invstd are powers of two; shift and mean are integers."""
    signs = 1 - 2 * (torch.arange(channels) % 3 == 1).float()
    scale = torch.ldexp(signs, torch.arange(channels) % 3 - 1)
    shift, mean = _integers((2, channels), torch.float32, most)
    return torch.stack((scale, shift, mean, torch.ldexp(torch.ones(channels), -mean)))


def _rows(device: str, *shape: int) -> tuple[Tensor, Tensor]:
    """A buffer full of NaN, and per-channel values between its two guard bands."""
    size = math.prod(shape)
    buffer = torch.full((size + 2 * GUARD,), math.nan, device=device)
    return buffer, buffer[GUARD : GUARD + size].view(shape)


def _result(case: BnActCase, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    buffer, out = guarded(case.shape, dtype, device)
    if case.layout == "nchw":
        out = buffer[GUARD:-GUARD].view(case.shape)
    return buffer, out


def _per_channel(values: Tensor) -> Tensor:
    return values.double().view(1, -1, 1, 1)


def _affine(t: Tensor, norm: Tensor) -> Tensor:
    return t.cpu().double() * _per_channel(norm[0]) + _per_channel(norm[1])


def _reductions(dz: Tensor, *centred: tuple[Tensor, Tensor]) -> Tensor:
    """The sums of dz and of dz (t - mean), exact."""
    factors = (t.cpu().double() - _per_channel(norm[2]) for t, norm in centred)
    return torch.stack([dz.sum((0, 2, 3)), *((dz * f).sum((0, 2, 3)) for f in factors)]).float()


def bn_add_act(configuration: str, device: str) -> None:
    """Checks `bn_add_act` on every case and kind of shortcut.

    Args:
        configuration: "default".
        device: "cuda:0", or "cpu" in Triton's interpreter.

    Raises:
        ArithmeticError: a result is wrong.
        ValueError: another configuration.
    """
    _every_case(configuration, device, _bn_add_act)


def _bn_add_act(case: BnActCase, dtype: torch.dtype, device: str) -> None:
    y, r = (_operand(case, dtype, device, most) for most in (4, 3))
    norm, own = _norm(case.c), _norm(case.c, 3)
    part, offset = max(1, case.c // 2), case.c // 4
    wide = torch.zeros(case.shape, dtype=torch.float64)
    wide[:, offset : offset + part] = r[:, :part].cpu().double()
    kinds = (
        (None, None, 0, 0.0),
        (r, None, 0, r.cpu().double()),
        (r, own, 0, _affine(r, own)),
        (r[:, :part], None, offset, wide),
    )
    for residual, residual_norm, place, added in kinds:
        buffer, out = _result(case, dtype, device)
        given = None if residual_norm is None else residual_norm.to(device)
        _launch("bn_add_act")(y, norm.to(device), residual, given, out, place, case.act)
        z = _affine(y, norm) + added
        expected = (z.clamp(min=0) if case.act == "relu" else z).to(dtype)
        require_exact(f"bn_add_act {case.name}, {dtype}", buffer, out, expected)


def bn_add_act_backward(configuration: str, device: str) -> None:
    """Checks `bn_add_act_backward`; arguments and errors as `bn_add_act`'s."""
    _every_case(configuration, device, _bn_add_act_backward)


def _bn_add_act_backward(case: BnActCase, dtype: torch.dtype, device: str) -> None:
    dout, y, r, result = (_operand(case, dtype, device, most) for most in (4, 3, 2, 1))
    norm, own = _norm(case.c), _norm(case.c, 3)
    for out, residual in ((None, None), (result, None), (result, r)):
        buffer, dz = _result(case, dtype, device)
        around, sums = _rows(device, 2 if residual is None else 3, case.c)
        own_norm = None if residual is None else own.to(device)
        given = (dout, out, y, norm.to(device), residual, own_norm)
        _launch("bn_add_act_backward")(*given, dz, sums, "relu")
        passed = (_affine(y, norm) if out is None else out.cpu().double()) > 0
        expected = torch.where(passed, dout.cpu().double(), 0)
        what = f"bn_add_act_backward {case.name}, {dtype}"
        require_exact(what, buffer, dz, expected.to(dtype))
        terms = [(y, norm), *([] if residual is None else [(residual, own)])]
        require_exact(f"{what}, sums", around, sums, _reductions(expected, *terms))


def bn_backward_apply(configuration: str, device: str) -> None:
    """Checks `bn_backward_apply`; arguments and errors as `bn_add_act`'s."""
    _every_case(configuration, device, _bn_backward_apply)


def _bn_backward_apply(case: BnActCase, dtype: torch.dtype, device: str) -> None:
    dz, y = (_operand(case, dtype, device, most) for most in (4, 3))
    coefficients = _norm(case.c)[[0, 1, 2]]
    buffer, dy = _result(case, dtype, device)
    _launch("bn_backward_apply")(dz, y, coefficients.to(device), dy)
    a, b, c = map(_per_channel, coefficients)
    expected = a * dz.cpu().double() + b * y.cpu().double() + c
    require_exact(f"bn_backward_apply {case.name}, {dtype}", buffer, dy, expected.to(dtype))


def _pooled(y: Tensor, norm: Tensor, window: Sequence[list[int]]) -> tuple[Tensor, ...]:
    """What is pooled over, the result and the taps that won, all exact."""
    h = _affine(y, norm).clamp(min=0).requires_grad_()
    kernel, stride, padding = window
    out, index = torch.nn.functional.max_pool2d(h, kernel, stride, padding, return_indices=True)
    first = [
        torch.arange(size) * step - pad
        for size, step, pad in zip(out.shape[2:], stride, padding, strict=True)
    ]
    down = index // y.shape[3] - first[0].view(-1, 1)
    return h, out, (down * kernel[1] + index % y.shape[3] - first[1]).to(torch.uint8)


def _windows(case: BnActCase) -> Iterator[Sequence[list[int]]]:
    for window in WINDOWS:
        if all(
            size + 2 * pad >= k for size, k, _, pad in zip(case.shape[2:], *window, strict=True)
        ):
            yield window


def bn_act_pool(configuration: str, device: str) -> None:
    """Checks `bn_act_pool`; arguments and errors as `bn_add_act`'s."""
    _every_case(configuration, device, _bn_act_pool)


def _bn_act_pool(case: BnActCase, dtype: torch.dtype, device: str) -> None:
    y, norm = _operand(case, dtype, device, 4), _norm(case.c)
    for window in _windows(case):
        _, expected, winners = _pooled(y, norm, window)
        buffer, out = guarded(tuple(expected.shape), dtype, device)
        taps = torch.full_like(out, 255, dtype=torch.uint8)
        _launch("bn_act_pool")(y, norm.to(device), out, taps, *window)
        what = f"bn_act_pool {case.name}, {window}, {dtype}"
        require_exact(what, buffer, out, expected.detach().to(dtype))
        if not torch.equal(taps.cpu(), winners):
            raise ArithmeticError(f"{what}: other taps won than the first of the largest")


def bn_act_pool_backward(configuration: str, device: str) -> None:
    """Checks `bn_act_pool_backward`; arguments and errors as `bn_add_act`'s."""
    _every_case(configuration, device, _bn_act_pool_backward)


def _bn_act_pool_backward(case: BnActCase, dtype: torch.dtype, device: str) -> None:
    y, norm = _operand(case, dtype, device, 4), _norm(case.c)
    for window in _windows(case):
        h, pooled, taps = _pooled(y, norm, window)
        dout = _integers(pooled.shape, dtype, 3)
        (gradient,) = torch.autograd.grad(pooled, h, dout.double())
        expected = torch.where(h > 0, gradient, 0)
        buffer, dz = _result(case, dtype, device)
        around, sums = _rows(device, 2, case.c)
        given = (dout.to(device), taps.to(device), y, norm.to(device))
        _launch("bn_act_pool_backward")(*given, dz, sums, *window)
        what = f"bn_act_pool_backward {case.name}, {window}, {dtype}"
        require_exact(what, buffer, dz, expected.to(dtype))
        require_exact(f"{what}, sums", around, sums, _reductions(expected, (y, norm)))


def _statistics(channels: int) -> tuple[Tensor, Tensor, float]:
    """Mean and M2 [2, K], the standard deviation with eps: a power of two; and eps."""
    deviation = torch.ldexp(torch.ones(channels), torch.arange(channels) % 4)
    mean = _integers((channels,), torch.float32)
    return torch.stack((mean, COUNT * (deviation.square() - 0.25))), deviation, 0.25


def bn_finalize(configuration: str, device: str) -> None:
    """Checks `bn_finalize`; arguments and errors as `bn_add_act`'s."""
    _require(configuration)
    for channels in (1, 65, 300):
        stats, deviation, eps = _statistics(channels)
        gamma, beta = _integers((2, channels), torch.float32, 3)
        total = torch.tensor([COUNT], dtype=torch.float64, device=device)
        plain, none = torch.ones(channels), torch.zeros(channels)
        for given, count in ((None, COUNT), (total, 3)):
            for a, b in ((gamma, beta), (None, None)):
                scale = (plain if a is None else a) / deviation
                shift = (none if b is None else b) - stats[0] * scale
                buffer, norm = _rows(device, 4, channels)
                vectors = (None if t is None else t.to(device) for t in (a, b))
                _launch("bn_finalize")(stats.to(device), given, *vectors, norm, count, eps)
                expected = torch.stack((scale, shift, stats[0], 1 / deviation))
                require_exact(f"bn_finalize, {channels} channels", buffer, norm, expected)


def bn_update_stats(configuration: str, device: str) -> None:
    """Checks `bn_update_stats`; arguments and errors as `bn_add_act`'s."""
    _require(configuration)
    for channels in (1, 65, 1100):
        mean, variance, kept = (_integers((channels,), torch.float32, most) for most in (4, 3, 2))
        stats = torch.stack((mean, COUNT * variance)).to(device)
        total = torch.tensor([COUNT + 1], dtype=torch.float64, device=device)
        for given, count in ((None, COUNT + 1), (total, 3)):
            for momentum, factor in ((0.5, 0.5), (None, 0.25)):
                places = [_rows(device, channels) for _ in range(2)]
                for _, place in places:
                    place.copy_(kept)
                tracked = torch.tensor(3, device=device)
                running = (place for _, place in places)
                _launch("bn_update_stats")(stats, given, *running, tracked, count, momentum)
                for batch, (buffer, place) in zip((mean, variance), places, strict=True):
                    expected = (1 - factor) * kept + factor * batch
                    what = f"bn_update_stats, {channels} channels"
                    require_exact(what, buffer, place, expected)
                if tracked.item() != 4:
                    raise ArithmeticError(f"bn_update_stats: it counted {tracked.item()}, not 4")


def bn_backward_finalize(configuration: str, device: str) -> None:
    """Checks `bn_backward_finalize`; arguments and errors as `bn_add_act`'s."""
    _require(configuration)
    for channels in (1, 65, 300):
        sums, everywhere = (_integers((3, channels), torch.float32, most) for most in (4, 3))
        norm = _norm(channels)
        scale, _, mean, invstd = norm.double()
        total = torch.tensor([COUNT], dtype=torch.float64, device=device)
        for all_sums, given, count in ((None, None, COUNT), (everywhere, total, 3)):
            for row, frozen in ((1, False), (2, False), (1, True)):
                found = [_rows(device, *shape) for shape in ((3, channels), (channels,))]
                found.append(_rows(device, channels))
                every = None if all_sums is None else all_sums.to(device)
                operands = (sums.to(device), every, given, norm.to(device))
                results = (place for _, place in found)
                _launch("bn_backward_finalize")(*operands, *results, count, row, frozen)
                s = (sums if all_sums is None else all_sums).double()
                b = -scale * invstd * invstd * s[row] / COUNT * (not frozen)
                c = (-scale * s[0] / COUNT - b * mean) * (not frozen)
                expected = torch.stack((scale, b, c)), invstd * sums[row], sums[0]
                for (buffer, place), right in zip(found, expected, strict=True):
                    what = f"bn_backward_finalize, {channels} channels"
                    require_exact(what, buffer, place, right.float())
