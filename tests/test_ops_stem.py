"""`stem` and `head`: every implementation against the oracles, and what the ops refuse."""

from __future__ import annotations

import dataclasses
import math

import emulated
import pytest
import torch
import torch.nn.functional as F
from matrix import DTYPES, WHOLE, cells, compute_dtype
from torch import Tensor

import resnet_fused as rf
from resnet_fused import numerics
from resnet_fused.cases import HEAD_CASES, STEM_CASES, HeadCase, StemCase
from resnet_fused.ops import _stem_checks
from resnet_fused.ops._library import overload
from resnet_fused.ops._selfchecks import _lay_out
from resnet_fused.triton import _limits, _stem_tiles

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SMALL = STEM_CASES if WHOLE else [c for c in STEM_CASES if c.name in ("usual", "bytes")]
"""What the interpreter, some seconds a case, goes through; its self-checks take every case."""


def operands(case: StemCase, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Random values, gamma of both signs and one zero; images in the case's layout."""
    wide = compute_dtype(dtype)
    images = {"uint8": torch.uint8, "float32": torch.float32}.get(case.images, dtype)
    drawn = torch.randint(0, 256, case.shape) if images is torch.uint8 else torch.randn(case.shape)
    weight = torch.randn(case.weight_shape).to(dtype)
    scale = torch.randn(case.k, dtype=wide)
    scale[0] = 0
    norm = None
    if case.has_norm:
        norm = rf.ops.stem_input_norm(MEAN[: case.c], STD[: case.c], uint8=images is torch.uint8)
        norm = norm.to(wide)
    x = _lay_out(drawn.to(images), case)
    return x, weight, scale, torch.randn(case.k, dtype=wide), norm


def usual(case: StemCase) -> bool:
    """Whether a case has the filters and the pooling that the CUDA kernel is made for."""
    default = StemCase("", *case.shape, case.k)
    return (case.weight_shape, case.stride, case.pool) == (
        default.weight_shape,
        default.stride,
        default.pool,
    )


def calls() -> list[object]:
    """(implementation, dtype, case): of a kernel the cases that it is made for, in the sample."""
    found = []
    for cell in cells("stem"):
        entry, dtype = cell.values
        for case in SMALL if entry.name == "triton" else STEM_CASES:
            weight = torch.empty(case.weight_shape, dtype=dtype, device="meta")
            sizes = _stem_tiles.sizes_of(case.shape, weight, *case.geometry[:2], case.geometry[2:])
            made_for = {"triton": not isinstance(sizes, str), emulated.NAME: usual(case)}
            if made_for.get(entry.name, True):
                name = f"{cell.id}-{case}"
                found.append(pytest.param(entry, dtype, case, id=name, marks=cell.marks))
    return found


@pytest.mark.op_matrix
@pytest.mark.parametrize(("entry", "dtype", "case"), calls())
def test_stem_is_exact_on_integers(entry, dtype, case):
    given = numerics.exact_stem_inputs(case, dtype, torch.Generator().manual_seed(0))
    expected = numerics.stem_oracle(*given, *case.geometry).to(dtype)
    y = overload("stem", entry.name)(_lay_out(given[0], case), *given[1:], *case.geometry)
    assert y.dtype is dtype
    assert torch.equal(y, expected)


@pytest.mark.op_matrix
@pytest.mark.parametrize(("entry", "dtype", "case"), calls())
def test_stem_stays_within_its_bound(entry, dtype, case):
    given = operands(case, dtype)
    oracle = numerics.stem_oracle(*given, *case.geometry)
    bound = numerics.stem_bound(*given, *case.geometry, rounding=entry.rounding)
    check = numerics.check_bound(
        overload("stem", entry.name)(*given, *case.geometry), oracle, bound
    )
    assert check.ok, str(check)


E4M3 = torch.float8_e4m3fn


@pytest.mark.op_matrix
@pytest.mark.parametrize(("entry", "dtype", "case"), calls())
def test_a_result_in_e4m3(entry, dtype, case):
    """Bit for bit on integers, of which some saturate; random values within the bound."""
    if dtype is torch.float64:
        pytest.skip("e4m3 is made of float32, bfloat16 and float16")
    op = overload("stem", entry.name)
    exact = numerics.exact_stem_inputs(case, dtype, torch.Generator().manual_seed(0))
    oracle = numerics.stem_oracle(*exact, *case.geometry, out_scale=2.0**-6)
    expected = numerics.conv_bn_act_fp8_expected(oracle, E4M3)
    y = op(_lay_out(exact[0], case), *exact[1:], *case.geometry, 2.0**-6)
    assert y.dtype is E4M3
    assert torch.equal(y.float(), expected.to(E4M3).float())
    given = operands(case, dtype)
    most = float(numerics.stem_oracle(*given, *case.geometry).max()) if case.n else 448.0
    for out_scale in (most / 448 / 2 or 1.0, most / 5 or 1.0):
        oracle = numerics.stem_oracle(*given, *case.geometry, out_scale=out_scale)
        bound = numerics.stem_bound(
            *given, *case.geometry, rounding=entry.rounding, out_scale=out_scale
        )
        y = op(*given, *case.geometry, out_scale)
        check = numerics.check_bound(y, numerics.conv_bn_act_fp8_expected(oracle, E4M3), bound)
        assert check.ok, str(check)


@pytest.mark.op_matrix
@pytest.mark.parametrize(("entry", "dtype"), cells("stem", (torch.bfloat16, torch.float16)))
def test_a_kernel_rounds_once_to_e4m3(entry, dtype):
    """What lies a little beyond the middle of two numbers of e4m3, 16 bits put into the middle."""
    if entry.rounding != "fused":
        pytest.skip("its parts store 16 bits in between")
    case = STEM_CASES[0]
    given = list(numerics.exact_stem_inputs(case, dtype, torch.Generator().manual_seed(0)))
    given[3] = given[3] + 2.0**-13
    oracle = numerics.stem_oracle(*given, *case.geometry)
    expected = oracle.float().to(E4M3).float()
    for narrow in (torch.bfloat16, torch.float16):
        assert not torch.equal(oracle.to(narrow).float().to(E4M3).float(), expected)
    y = overload("stem", entry.name)(*given, *case.geometry, 1.0)
    assert torch.equal(y.float(), expected)


def test_the_bound_of_e4m3_bites():
    """No saturation, a truncation and a wrong scale all fail."""
    case = dataclasses.replace(STEM_CASES[0], n=4)
    given = operands(case, torch.bfloat16)
    scale = float(numerics.stem_oracle(*given, *case.geometry).max()) / 448 / 2
    oracle = numerics.stem_oracle(*given, *case.geometry, out_scale=scale)
    expected = numerics.conv_bn_act_fp8_expected(oracle, E4M3)
    bound = numerics.stem_bound(*given, *case.geometry, out_scale=scale)

    def ok(y):
        return numerics.check_bound(y, expected, bound).ok

    right = expected.float().to(E4M3)
    assert ok(right)
    assert not ok((expected * 1.04).float().clamp(max=448).to(E4M3))
    down = (right.view(torch.uint8) - (right.double() > expected).to(torch.uint8)).view(E4M3)
    assert not ok(down)
    saturated = right.clone()
    saturated.view(torch.uint8)[right.float() == 448] = 0x7F
    assert not ok(saturated)


def test_the_bound_bites():
    """Padding that is normalised too, a wrong window and a convolution cut to 16 bits all fail."""
    case = next(case for case in STEM_CASES if case.name == "bytes")
    given = operands(case, torch.float32)
    oracle = numerics.stem_oracle(*given, *case.geometry)
    bound = numerics.stem_bound(*given, *case.geometry)
    x, weight, scale, shift, norm = given
    a, b = (row.view(1, -1, 1, 1) for row in norm)
    bordered = F.pad(x.float(), (3, 3, 3, 3)) * a + b
    for v, padding in ((bordered, 0), ((x.float() * a + b).bfloat16().float(), 3)):
        raw = F.conv2d(v, weight, None, 2, padding)
        h = (raw * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)).relu()
        assert not numerics.check_bound(F.max_pool2d(h, 3, 2, 1), oracle, bound).ok


@pytest.mark.op_matrix
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("entry", "dtype"), cells("stem", (torch.float32, torch.float16)))
def test_nan_and_inf_stay_where_torch_has_them(entry, dtype, odd):
    """Also in the kernel, which multiplies what one column reads by zeros of another's."""
    case = dataclasses.replace(STEM_CASES[0], n=1)
    given = operands(case, dtype)
    given[0][0, 1, 9, 8] = odd
    oracle = numerics.stem_oracle(*given, *case.geometry)
    y = overload("stem", entry.name)(*given, *case.geometry)
    assert torch.equal(y.isnan(), oracle.isnan())
    assert torch.equal(y.isposinf(), oracle.isposinf())
    assert not torch.isfinite(y).all()


@pytest.mark.op_matrix
@pytest.mark.parametrize("case", HEAD_CASES, ids=str)
@pytest.mark.parametrize(("entry", "dtype"), cells("head"))
def test_head_stays_within_its_bound(entry, dtype, case: HeadCase):
    x = _lay_out(torch.randn(case.shape).to(dtype), case)
    weight = torch.randn(case.classes, case.c).to(dtype)
    bias = torch.randn(case.classes).to(dtype) if case.bias else None
    y = overload("head", entry.name)(x, weight, bias)
    assert y.dtype is dtype
    assert y.is_contiguous()
    oracle, bound = (fn(x, weight, bias) for fn in (numerics.head_oracle, numerics.head_bound))
    check = numerics.check_bound(y, oracle, bound)
    assert check.ok, str(check)


def test_the_heads_bound_bites():
    """The sum in place of the mean's rounding, and a mean kept in bfloat16 sums, both fail."""
    case = HEAD_CASES[0]
    x, weight = torch.randn(case.shape), torch.randn(case.classes, case.c)
    oracle, bound = (fn(x, weight, None) for fn in (numerics.head_oracle, numerics.head_bound))
    rough = F.linear(x.mean((2, 3)).bfloat16().float(), weight)
    assert not numerics.check_bound(rough, oracle, bound).ok
    wrong = F.linear(x[:, :, :, 1:].mean((2, 3)), weight)
    assert not numerics.check_bound(wrong, oracle, bound).ok


@pytest.mark.interpreter
@pytest.mark.parametrize("name", _stem_checks.stem_configurations())
def test_every_configuration_passes_its_self_check(name, monkeypatch):
    if not WHOLE and name != _stem_tiles.TILES[-1].name:
        chosen = [case for case in STEM_CASES if case.name in ("usual", "two_strips")]
        monkeypatch.setattr(_stem_checks, "STEM_CASES", chosen)
    if not _limits.interpreted():
        pytest.skip("needs TRITON_INTERPRET=1: make interpreter")
    _stem_checks.stem(name, "cpu")


@pytest.mark.interpreter
def test_the_heads_self_check_passes():
    if not _limits.interpreted():
        pytest.skip("needs TRITON_INTERPRET=1: make interpreter")
    _stem_checks.head("default", "cpu")


def test_input_norm_is_what_image_pipelines_do():
    x = torch.randint(0, 256, (1, 3, 5, 6), dtype=torch.uint8)
    a, b = (row.view(1, 3, 1, 1) for row in rf.ops.stem_input_norm(MEAN, STD))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    torch.testing.assert_close(x * a + b, (x / 255 - mean) / std)
    plain = rf.ops.stem_input_norm(MEAN, STD, uint8=False)
    torch.testing.assert_close(plain[0], 1 / torch.tensor(STD))
    for mean, std in ((MEAN, STD[:2]), ([], []), ([0.0], [0.0]), ([0.0], [float("inf")])):
        with pytest.raises(ValueError, match="stem_input_norm"):
            rf.ops.stem_input_norm(mean, std)


def stem_arguments(**changed: object) -> dict[str, object]:
    """Good arguments of `stem`, some of them changed."""
    good = {
        "x": torch.randn(1, 3, 8, 8),
        "weight": torch.randn(4, 3, 7, 7),
        "scale": torch.ones(4),
        "shift": torch.zeros(4),
    }
    return good | changed


BYTES = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": [1]}, TypeError, "x must be a Tensor, got list"),
        ({"x": BYTES}, TypeError, r"x is uint8 without input_norm; give rf.ops.stem_input_norm"),
        ({"x": BYTES.int()}, TypeError, "x has dtype torch.int32; accepted are torch.uint8"),
        ({"x": torch.randn(1, 3, 8, 8).half()}, TypeError, "x has dtype torch.float16"),
        ({"x": torch.randn(3, 8, 8)}, ValueError, "x must have 4 dimensions, got 3"),
        ({"x": torch.randn(1, 4, 8, 8)}, ValueError, "x has 4 channels"),
        ({"weight": torch.randn(4, 3, 7)}, ValueError, "weight must have 4 dimensions"),
        ({"weight": BYTES}, TypeError, "weight has dtype torch.uint8"),
        ({"scale": torch.ones(3)}, ValueError, r"scale has shape \(3,\)"),
        ({"shift": torch.ones(4, 1)}, ValueError, r"shift has shape \(4, 1\)"),
        ({"input_norm": torch.ones(3)}, ValueError, r"input_norm has shape \(3,\); \(2, 3\) is"),
        ({"input_norm": torch.ones(2, 3).int()}, TypeError, "input_norm has dtype torch.int32"),
        ({"input_norm": 1.0}, TypeError, "input_norm must be a Tensor, got float"),
        ({"out_scale": 0.0}, ValueError, "out_scale is 0.0; accepted is a positive, finite"),
        ({"out_scale": -1.0}, ValueError, "out_scale is -1.0; accepted is a positive, finite"),
        ({"out_scale": math.nan}, ValueError, "out_scale is nan"),
        ({"out_scale": 1e-40}, ValueError, "out_scale is 1e-40; accepted are normal numbers of"),
        ({"out_scale": 1e39}, ValueError, r"out_scale is 1e\+39; accepted are normal numbers of"),
        ({"out_scale": math.inf}, ValueError, "out_scale is inf"),
        ({"out_scale": torch.ones(())}, TypeError, "out_scale must be a float, got Tensor"),
        ({"out_scale": True}, TypeError, "out_scale must be a float, got bool"),
        ({"stride": 0}, ValueError, "stride is 0"),
        ({"padding": -1}, ValueError, "padding is -1"),
        ({"pool_kernel": 0}, ValueError, "pool_kernel is 0"),
        ({"pool_padding": 2}, ValueError, r"pool_padding is \[2, 2\]; at most half"),
        ({"pool_kernel": 9, "pool_padding": 0}, ValueError, "pool_kernel .* is larger than"),
        ({"x": torch.randn(1, 3, 8, 8, device="meta")}, ValueError, "x is on meta, weight on cpu"),
    ],
)
def test_stem_names_what_is_wrong(changed, error, message):
    with pytest.raises(error, match=f"stem: {message}"):
        rf.ops.stem(**stem_arguments(**changed))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": None}, TypeError, "x must be a Tensor"),
        ({"x": torch.randn(2, 8, 0, 3)}, ValueError, "x has shape .* a mean needs one pixel"),
        ({"weight": torch.randn(5, 7)}, ValueError, r"weight has shape \(5, 7\); \[classes, 8\]"),
        ({"weight": torch.randn(5, 8).half()}, TypeError, "weight has dtype torch.float16, x has"),
        ({"weight": [1]}, TypeError, "weight must be a Tensor, got list"),
        ({"bias": torch.randn(4)}, ValueError, r"bias has shape \(4,\); \[5\] is needed"),
    ],
)
def test_head_names_what_is_wrong(changed, error, message):
    good = {"x": torch.randn(2, 8, 3, 3), "weight": torch.randn(5, 8), "bias": torch.randn(5)}
    with pytest.raises(error, match=f"head: {message}"):
        rf.ops.head(**(good | changed))


def test_no_e4m3_of_float64():
    given = {name: t.double() for name, t in stem_arguments().items()}
    with pytest.raises(TypeError, match="stem: out_scale with a weight of float64; accepted are"):
        rf.ops.stem(**given, out_scale=1.0)
    assert rf.ops.stem(**stem_arguments(), out_scale=1).dtype is E4M3  # an int is a number too


def test_a_wanted_gradient_is_refused():
    weight = torch.randn(4, 3, 7, 7, requires_grad=True)
    with pytest.raises(RuntimeError, match="stem has no derivative"):
        rf.ops.stem(**stem_arguments(weight=weight))
    with torch.no_grad():
        rf.ops.stem(**stem_arguments(weight=weight))
    with pytest.raises(RuntimeError, match="head has no derivative"):
        rf.ops.head(torch.randn(2, 8, 3, 3, requires_grad=True), torch.randn(5, 8))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("name", ["parts", "reference"])
def test_opcheck(name, layout):
    form = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    for case in STEM_CASES:
        if case.name in ("usual", "bytes", "one_pixel", "one_channel", "other_pool"):
            x, *rest = operands(case, torch.float32)
            x = x.contiguous(memory_format=form)
            torch.library.opcheck(overload("stem", name), (x, *rest, *case.geometry))
            torch.library.opcheck(overload("stem", name), (x, *rest, *case.geometry, 0.5))
    x = torch.randn(2, 8, 3, 3).contiguous(memory_format=form)
    torch.library.opcheck(overload("head", name), (x, torch.randn(5, 8), None))


def test_autocast_casts_the_weight_not_the_images():
    case = next(case for case in STEM_CASES if case.name == "float_images")
    x, weight, scale, shift, norm = operands(case, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = rf.ops.stem(x, weight, scale, shift, norm)
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, rf.ops.stem(x, weight.bfloat16(), scale, shift, norm))


@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_follows_weight_or_images(dtype):
    x, weight = torch.randn(2, 3, 16, 16).to(dtype), torch.randn(8, 3, 7, 7).to(dtype)
    scale, shift = torch.ones(8), torch.zeros(8)
    assert rf.ops.stem(x, weight, scale, shift).is_contiguous()
    last = torch.channels_last
    for pair in ((x.contiguous(memory_format=last), weight), (x, weight.to(memory_format=last))):
        y = rf.ops.stem(*pair, scale, shift)
        assert y.is_contiguous(memory_format=last)


def test_the_chooser_says_why_not():
    weight = torch.empty(64, 3, 7, 7, dtype=torch.bfloat16, device="meta")
    pool = _stem_tiles.POOL
    ask = _stem_tiles.sizes_of
    assert "pooling" in str(ask((1, 3, 9, 9), weight, [2, 2], [3, 3], ([2, 2], [2, 2], [0, 0])))
    tall = torch.empty(64, 3, 9, 7, device="meta")
    assert "9 rows" in str(ask((1, 3, 9, 9), tall, [2, 2], [3, 3], pool))
    deep = torch.empty(64, 64, 3, 3, device="meta")
    assert "64 channels" in str(ask((1, 64, 9, 9), deep, [2, 2], [1, 1], pool))
    sizes = ask((256, 3, 224, 224), weight, [2, 2], [3, 3], pool)
    wide = ask((256, 3, 224, 224), weight.float(), [2, 2], [3, 3], pool, "tf32")
    for asked, capability, shared, name in (
        (sizes, 90, 227, "64x64_8w2s"),
        (sizes, 86, 99, "64x32_8w2s"),
        (sizes, 120, 99, "32x32_8w2s"),
        (wide, 90, 227, "64x32_8w2s"),
        (wide, 86, 99, "16x32_8w2s"),
    ):
        limits = _stem_tiles.Limits(132, shared * 1024, capability)
        plan = _stem_tiles.choose(asked, limits)
        assert plan.tile.name == name
        assert _stem_tiles.shared_memory(asked, plan.tile, limits) <= limits.shared_memory
    none = f"none of the {len(_stem_tiles.TILES)}"
    assert none in _stem_tiles.choose(sizes, limits, frozenset())
