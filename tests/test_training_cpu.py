"""The C++ passes of training, called directly: layouts, memory, threads, bits, bad arguments."""

from __future__ import annotations

import pytest
import torch
from matrix import (
    DTYPES,
    IDS,
    SPREADS,
    compute_dtype,
    kink_values,
    norm_values,
    spread_values,
)
from torch.testing import assert_close

from resnet_fused import _extension, cases, numerics
from resnet_fused.ops import _training
from resnet_fused.ops._library import overload

pytestmark = pytest.mark.skipif(
    not _extension.available(), reason=f"no compiled extension: {_extension.why_not()}"
)
CASES = {case.name: case for case in cases.CONV_CASES}
OPS = torch.ops.resnet_fused
ONE_ROUNDING = [torch.float32, torch.bfloat16, torch.float16]


def sliced(t):
    """The same values inside a larger tensor, with gaps in every dimension, NaN in them."""
    n, c, h, w = t.shape
    larger = torch.full((n + 1, c + 3, h + 1, w + 2), float("nan")).to(t.dtype)
    return larger[1:, 2 : c + 2, :h, 1 : w + 1].copy_(t)


LAYOUTS = {
    "nchw": lambda t: t.contiguous(),
    "nhwc": lambda t: t.contiguous(memory_format=torch.channels_last),
    "sliced nchw": sliced,
    "sliced nhwc": lambda t: sliced(t.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    "channels of nhwc": lambda t: torch.cat((t, t), 1).contiguous(
        memory_format=torch.channels_last
    )[:, : t.shape[1]],
    "whnc": lambda t: t.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0),
}
# Tiles are 128 x 512 or 4096 elements, or images of 2048 together; a task 32768, a row's lanes 32.
SHAPES = [
    (2, 64, 7, 7),
    (3, 65, 5, 3),
    (1, 3, 33, 35),
    (2, 520, 9, 16),
    (5, 4, 1, 9),
    (4, 1, 6, 5),
    (9, 8, 1, 1),
    (1, 1, 1, 1),
    (1, 40, 40, 33),
    (130, 5, 4, 4),  # small images side by side, in two tiles, the second one shorter
]
EMPTY = [(0, 3, 4, 4), (2, 3, 0, 4)]


def poisoned(like, layout=None):
    """NaN in every element: one that is not written shows."""
    t = torch.full_like(like, 77 if like.dtype is torch.uint8 else float("nan"))
    return t if layout is None else LAYOUTS[layout](t)


def rows(count, channels, dtype):
    return torch.full((count, channels), float("nan"), dtype=compute_dtype(dtype))


def values(shape, dtype, integers=False):
    if integers:
        return torch.randint(-4, 5, shape).to(dtype)
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def assert_within(got, oracle, bound):
    found = numerics.check_bound(got, oracle, bound)
    assert found.ok, found


def assert_bits(got, expected):
    """Equal values, and zeros of the same sign; any NaN is one."""
    assert got.dtype is expected.dtype
    assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got.signbit()[got == 0], expected.signbit()[got == 0])


def reference(op):
    return overload(op, "reference")


def stats_of(y):
    stats = rows(2, y.shape[1], y.dtype)
    OPS.bn_stats_out(y, stats)
    return stats


def backward(dout, out, y, norm, residual=None, residual_norm=None, relu=True, dz=None):
    dz = poisoned(y) if dz is None else dz
    sums = rows(2 if residual is None else 3, y.shape[1], y.dtype)
    OPS.bn_add_act_backward_out(dout, out, y, norm, residual, residual_norm, relu, dz, sums)
    return dz, sums


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS.get)
def test_statistics_of_every_layout(dtype, layout):
    for shape in SHAPES:
        y = values(shape, dtype) + torch.arange(shape[1]).view(-1, 1, 1).to(dtype)
        oracle = numerics.stats_oracle(y)
        assert_within(stats_of(LAYOUTS[layout](y)), oracle, numerics.stats_bound(y, oracle))


@pytest.mark.parametrize("kappa", [0.0, 30.0, 1e3, 1e4])
@pytest.mark.parametrize("kind", SPREADS)
def test_statistics_of_spread_values(kind, kappa):
    """As pixels of one channel and as channels beside others, by the bound for merged tiles."""
    column = spread_values(kind, kappa)
    for y in (
        column.view(1, 1, 64, 64),
        column.view(64, 1, 8, 8),
        column.view(4, 1, 32, 32).expand(4, 3, 32, 32).contiguous(),
        column.view(4, 1, 32, 32).repeat(1, 3, 1, 1).contiguous(memory_format=torch.channels_last),
    ):
        oracle = numerics.stats_oracle(y)
        assert_within(stats_of(y), oracle, numerics.stats_bound(y, oracle, tiles=2))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_statistics_of_what_is_not_finite_are_pytorchs(value, layout):
    for place in ((0, 1, 0, 0), (1, 1, 6, 6)):
        y = values((2, 3, 7, 7), torch.float32)
        y[place] = value
        running = torch.zeros(3), torch.zeros(3)
        torch.nn.functional.batch_norm(y, *running, training=True, momentum=1.0)
        got = stats_of(LAYOUTS[layout](y))
        for found, expected in zip(got, running, strict=True):
            assert torch.equal(found.isnan(), expected.isnan())
            assert torch.equal(found.isinf(), expected.isinf())
    y[0, 2, 0, 0] = -value  # Inf and -Inf, or NaN, in one channel
    y[1, 2, 0, 0] = value
    assert stats_of(LAYOUTS[layout](y))[:, 2].isnan().all()


def forward_cases(shape, dtype):
    """Residual, its norm, offset: none, whole, through a BatchNorm, fewer channels."""
    channels = shape[1]
    residual = values(shape, dtype)
    yield None, None, 0
    yield residual, None, 0
    yield residual, norm_values(channels, dtype), 0
    if channels > 2:
        yield residual[:, : channels - 2], None, 1
        yield residual[:, :1], None, channels - 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS.get)
def test_forward_is_the_references(dtype, layout):
    for shape in SHAPES:
        y, norm = values(shape, dtype), norm_values(shape[1], dtype)
        for residual, residual_norm, offset in forward_cases(shape, dtype):
            for act in ("relu", "none"):
                expected = reference("bn_add_act")(y, norm, residual, residual_norm, offset, act)
                placed = None if residual is None else LAYOUTS[layout](residual)
                out = poisoned(y, layout)
                OPS.bn_add_act_out(
                    LAYOUTS[layout](y), norm, placed, residual_norm, offset, act == "relu", out
                )
                if dtype is torch.float64:
                    assert_close(out, expected, rtol=1e-13, atol=1e-13)
                else:
                    assert_bits(out, expected)


@pytest.mark.parametrize("mask", ["out", "again", "none"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS.get)
def test_backward_is_the_references(dtype, layout, mask):
    place = LAYOUTS[layout]
    for shape in SHAPES:
        y, dout, residual = (values(shape, dtype) for _ in range(3))
        norm, residual_norm = (norm_values(shape[1], dtype) for _ in range(2))
        out = values(shape, dtype, integers=True) if mask == "out" else None
        result = out if out is not None else _training.normalised(y, norm)
        expected = dout if mask == "none" else dout.masked_fill(result <= 0, 0)
        placed = None if out is None else place(out)
        for branches in ([(y, norm)], [(y, norm), (residual, residual_norm)]):
            extra = (place(residual), residual_norm) if len(branches) > 1 else ()
            dz, sums = backward(
                place(dout), placed, place(y), norm, *extra, relu=mask != "none",
                dz=poisoned(y, layout),
            )  # fmt: skip
            assert torch.equal(dz, expected)
            oracle = numerics.reductions_oracle(expected, *branches)
            assert_within(sums, oracle, numerics.reductions_bound(expected, *branches))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS.get)
def test_the_affine_is_the_references(dtype, layout):
    for shape in SHAPES:
        dz, y = (values(shape, dtype) for _ in range(2))
        coefficients = norm_values(shape[1], dtype)[:3].contiguous()
        dy = poisoned(y, layout)
        OPS.bn_backward_apply_out(LAYOUTS[layout](dz), LAYOUTS[layout](y), coefficients, dy)
        expected = _training.affine_gradient(dz, y, coefficients)
        if dtype is torch.float64:
            assert_close(dy, expected, rtol=1e-13, atol=1e-13)
        else:
            assert_bits(dy, expected)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", ONE_ROUNDING, ids=IDS.get)
def test_values_at_the_kink_fall_on_the_references_side(dtype, layout):
    """Next to -shift / scale, where a product rounded before the sum would change the sign."""
    y, norm = kink_values(dtype)
    y = LAYOUTS[layout](y.view(7, -1, 1, 1).expand(-1, -1, 5, 7))
    h = _training.normalised(y, norm)
    wide = y.float() * norm[0].view(-1, 1, 1) + norm[1].view(-1, 1, 1)
    assert dtype is not torch.float32 or ((wide <= 0) != (h <= 0)).any(), "these tell nothing"
    out = poisoned(y)
    OPS.bn_add_act_out(y, norm, None, None, 0, True, out)
    assert_bits(out, h)
    dz, _ = backward(torch.ones_like(y), None, y, norm)
    assert torch.equal(dz, (~(h <= 0)).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=IDS.get)
def test_the_mask_is_of_the_rounded_result(dtype):
    """A positive value that is stored as 0 passes no gradient; NaN does."""
    norm = torch.zeros(4, 3)
    norm[0] = torch.tensor([1.0, 1e-38 if dtype is torch.bfloat16 else 1e-6, float("nan")])
    y = torch.full((1, 3, 2, 2), 2.0**-6, dtype=dtype)
    for layout in ("nchw", "nhwc"):
        placed = LAYOUTS[layout](y)
        dz, _ = backward(torch.ones_like(placed), None, placed, norm)
        h = _training.normalised(y, norm)
        assert torch.equal(dz, (~(h <= 0)).to(dtype))
    if dtype is torch.float16:
        assert not dz[:, 1].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS.get)
def test_operands_of_mixed_layouts(dtype):
    shape = (2, 24, 6, 5)
    y, dout, out, residual = (values(shape, dtype, integers=True) for _ in range(4))
    norm, residual_norm = (norm_values(24, dtype, exact=True) for _ in range(2))
    expected = dout.masked_fill(out <= 0, 0)
    sums = numerics.reductions_oracle(expected, (y, norm), (residual, residual_norm))
    names = list(LAYOUTS)
    for i, first in enumerate(names):
        for j, second in enumerate(names):
            third, fourth = names[(i + j) % len(names)], names[(i + 2 * j + 1) % len(names)]
            dz, found = backward(
                LAYOUTS[first](dout), LAYOUTS[fourth](out), LAYOUTS[second](y), norm,
                LAYOUTS[third](residual), residual_norm, dz=poisoned(y, fourth),
            )  # fmt: skip
            assert torch.equal(dz, expected)
            assert torch.equal(found.double(), sums)


def test_an_expanded_gradient_and_an_expanded_input():
    norm = norm_values(6, torch.float32)
    dout, y = torch.randn(()).expand(2, 6, 5, 5), torch.randn(1, 6, 1, 1).expand(2, 6, 5, 5)
    got = backward(dout, None, y, norm, dz=torch.full((2, 6, 5, 5), float("nan")))
    expected = backward(dout.contiguous(), None, y.contiguous(), norm)
    assert torch.equal(got[0], expected[0])
    assert_within(
        got[1],
        numerics.reductions_oracle(got[0], (y, norm)),
        numerics.reductions_bound(got[0], (y, norm)),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS.get)
def test_in_place(dtype, layout):
    for shape in SHAPES[:4]:
        y, dout = (LAYOUTS[layout](values(shape, dtype)) for _ in range(2))
        norm = norm_values(shape[1], dtype)
        expected, sums = backward(dout, None, y, norm, dz=poisoned(dout, layout))
        held = LAYOUTS[layout](dout.clone())
        dz, found = backward(held, None, y, norm, dz=held)
        assert torch.equal(dz, expected)
        assert torch.equal(found, sums)
        dy = poisoned(y, layout)
        OPS.bn_backward_apply_out(dz, y, norm[:3].contiguous(), dy)
        OPS.bn_backward_apply_out(dz, y, norm[:3].contiguous(), dz)
        assert torch.equal(dz, dy)


WINDOWS = [
    ([3, 3], [2, 2], [1, 1]),
    ([2, 2], [2, 2], [0, 0]),
    ([3, 2], [1, 3], [1, 0]),
    ([5, 4], [3, 1], [2, 2]),
    ([1, 1], [2, 2], [0, 0]),
]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS.get)
def test_the_pooling_is_the_references(dtype, layout, window):
    """Many ties, some NaN: the winner is PyTorch's."""
    place = LAYOUTS[layout]
    for shape in ((2, 64, 12, 11), (1, 3, 7, 270), (2, 260, 5, 6)):
        y = values(shape, dtype, integers=True)
        y[torch.rand(shape) < 0.02] = float("nan")
        norm = norm_values(shape[1], dtype, exact=True)
        expected, taps = reference("bn_act_pool")(y, norm, *window)
        out, found = (poisoned(t, layout) for t in (expected, taps))
        OPS.bn_act_pool_out(place(y), norm, *window, out, found)
        assert_bits(out, expected)
        assert torch.equal(found, taps)
        dout = values(expected.shape, dtype)
        expected, _ = reference("bn_act_pool_backward")(dout, taps, y, norm, *window)
        dz, sums = poisoned(y, layout), rows(2, shape[1], dtype)
        OPS.bn_act_pool_backward_out(place(dout), found, place(y), norm, *window, dz, sums)
        assert torch.equal(dz, expected)
        finite = ~y.isnan().any(3).any(2).any(0)
        oracle = numerics.reductions_oracle(expected, (y, norm))[:, finite]
        bound = numerics.reductions_bound(expected, (y, norm))[:, finite]
        assert_within(sums[:, finite], oracle, bound)


def every_result(y, dout, norm):
    """What each pass makes of the same tensors."""
    window = WINDOWS[0]
    pooled, taps = reference("bn_act_pool")(y, norm, *window)
    out, dy, dz = (poisoned(y) for _ in range(3))
    sums = rows(2, y.shape[1], y.dtype)
    OPS.bn_add_act_out(y, norm, dout, None, 0, True, out)
    OPS.bn_backward_apply_out(dout, y, norm[:3].contiguous(), dy)
    OPS.bn_act_pool_out(y, norm, *window, pooled, taps)
    OPS.bn_act_pool_backward_out(pooled, taps, y, norm, *window, dz, sums)
    return stats_of(y), *backward(dout, out, y, norm), dy, dz, sums, pooled, taps


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS.get)
def test_the_bits_depend_on_no_number_of_threads(dtype, layout):
    """And are the same each time: many tasks of both kinds of tiles, some of them shorter."""
    place = LAYOUTS[layout]
    before = torch.get_num_threads()
    try:
        for shape in ((2, 70, 33, 41), (400, 17, 5, 7)):
            y, dout = (place(values(shape, dtype)) for _ in range(2))
            norm = norm_values(shape[1], dtype)
            torch.set_num_threads(1)
            expected = every_result(y, dout, norm)
            for threads in (2, 3, 2):
                torch.set_num_threads(threads)
                for got, wanted in zip(every_result(y, dout, norm), expected, strict=True):
                    assert torch.equal(got, wanted)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty(shape):
    y, norm = torch.empty(shape), norm_values(shape[1], torch.float32)
    assert torch.equal(stats_of(y), torch.zeros(2, 3))
    dz, sums = backward(y, None, y, norm)
    assert dz.shape == shape
    assert torch.equal(sums, torch.zeros(2, 3))
    OPS.bn_add_act_out(y, norm, None, None, 0, True, dz)


def test_neighbours_of_a_result_stay():
    larger = torch.full((3, 9, 6, 8), 55.0).contiguous(memory_format=torch.channels_last)
    inner = larger[1:, 2:7, :5, 1:7]
    y, norm = torch.randn(2, 5, 5, 6), norm_values(5, torch.float32)
    OPS.bn_add_act_out(y, norm, None, None, 0, True, inner)
    assert torch.equal(inner, _training.normalised(y, norm))
    inner.fill_(55.0)
    assert bool((larger == 55.0).all())


F32 = (2, 8, 3, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(2, 8, 3)}, r"y: expected 4 dimensions .*\[2, 8, 3\]"),
        ({"y": torch.zeros(F32, dtype=torch.int32)}, "y: expected float32, float64, float16 or"),
        ({"norm": torch.zeros(3, 8)}, r"norm: expected shape \[4, 8\], got \[3, 8\]"),
        ({"norm": torch.zeros(4, 8).double()}, "norm: expected float32 .*got float64"),
        ({"norm": torch.zeros(8, 4).t()}, "norm: expected a contiguous tensor"),
        ({"dout": torch.zeros(2, 8, 1, 1)}, r"dout: expected shape \[2, 8, 3, 3\], got"),
        ({"dout": torch.zeros(F32).half()}, "dout: expected y's dtype float32, got float16"),
        ({"out": torch.zeros(2, 7, 3, 3)}, r"out: expected shape .*\[2, 7, 3, 3\]"),
        ({"residual": torch.zeros(F32)}, "residual: expected together with residual_norm"),
        ({"dz": torch.zeros(1, 8, 3, 3).expand(F32)}, "out: its elements share memory"),
        ({"sums": torch.zeros(3, 8)}, r"sums: expected shape \[2, 8\], got \[3, 8\]"),
    ],
)
def test_a_bad_argument_is_named(change, message):
    arguments = {
        "dout": torch.zeros(F32),
        "out": None,
        "y": torch.zeros(F32),
        "norm": torch.zeros(4, 8),
        "residual": None,
        "residual_norm": None,
        "relu": True,
        "dz": torch.full(F32, 5.0),
        "sums": torch.full((2, 8), 5.0),
    } | change
    with pytest.raises(RuntimeError, match=f"^{message}"):
        OPS.bn_add_act_backward_out(**arguments)
    assert "dz" in change or bool((arguments["dz"] == 5).all()), "written before the check"


def test_shared_memory_is_refused():
    buffer, norm = torch.zeros(300), torch.zeros(4, 8)
    y, shifted = buffer[:144].view(F32), buffer[1:145].view(F32)
    other = torch.zeros(F32)
    for dout, dz in ((shifted, y), (other, y), (other, shifted)):
        with pytest.raises(RuntimeError, match="^out: it shares memory with (y|dout)"):
            backward(dout, None, y if dout is not shifted else other, norm, dz=dz)
    with pytest.raises(RuntimeError, match="^out: it shares memory with y"):
        OPS.bn_add_act_out(y, norm, None, None, 0, True, y)
    dz, sums = buffer[:144].view(F32), buffer[:16].view(2, 8)
    with pytest.raises(RuntimeError, match="^out: it shares memory with dz"):
        OPS.bn_add_act_backward_out(other, None, other.clone(), norm, None, None, True, dz, sums)


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (([16, 16], [2, 2], [1, 1]), "kernel: expected 1 to 255 taps, got 16 x 16"),
        (([3, 3], [0, 2], [1, 1]), "stride: expected at least 1, got 0"),
        (([3, 3], [2, 2], [1, 2]), "padding: expected 0 to half of the kernel's 3, got 2"),
        (([9, 9], [2, 2], [1, 1]), "kernel: 9 is larger than the padded 5"),
    ],
)
def test_a_bad_window_is_named(window, message):
    out = torch.zeros(2, 8, 2, 2)
    with pytest.raises(RuntimeError, match=f"^{message}"):
        OPS.bn_act_pool_out(torch.zeros(F32), torch.zeros(4, 8), *window, out, out.byte())
