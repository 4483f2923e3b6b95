"""conv_bn_act_fp8 and quantisation: every code, every case bit for bit, the bound, bad input."""

from __future__ import annotations

import emulated
import emulated_fp8
import pytest
import torch
from fp8_operands import CODES, E4M3, Fp8Operands, exact_operands, random_fp8, same_bits
from matrix import cells

import resnet_fused as rf
from resnet_fused import backends, cases, numerics
from resnet_fused.ops import _e4m3, _triton
from resnet_fused.ops._library import overload
from resnet_fused.triton import _limits, _tiles

OP = "conv_bn_act_fp8"
CASES = {case.name: case for case in cases.CONV_CASES}
WIDE = [torch.float32, torch.bfloat16, torch.float16]


def served(entry, case, out, residual):
    """Whether an implementation takes a case; the emulated kernel is TMA's and says what it can't.

    Any other one takes all of them.
    """
    if entry.name != emulated.NAME:
        return True
    return emulated_fp8.takes(case, out, residual if case.residual else None)


def run(entry, case, operands):
    """A result; None where the emulated kernel refuses the case, in words."""
    arguments = (*operands.tuple(), *operands.options(case))
    residual = E4M3 if operands.residual is None else operands.residual.dtype
    if served(entry, case, operands.out_dtype, residual):
        return overload(OP, entry.name)(*arguments)
    with pytest.raises(ValueError, match="no configuration serves it|is served|are served"):
        overload(OP, entry.name)(*arguments)
    return None


def nearest(v: torch.Tensor) -> torch.Tensor:
    """The nearest number of e4m3 in a table of all, the even code where two are as near."""
    finite = CODES.isfinite() & ~((CODES == 0) & (torch.arange(256) > 0))
    codes, numbers = torch.arange(256)[finite], CODES[finite].double()
    distance = (v.double().view(-1, 1) - numbers).abs()
    tied = distance == distance.min(1, keepdim=True).values
    even = codes % 2 == 0
    return numbers[(tied * (1 + even)).int().argmax(1)].float()


def test_every_number_and_every_tie_is_rounded_to_nearest_even():
    numbers = CODES[CODES.isfinite()].unique()
    assert len(numbers) == 253 and numbers.max() == _e4m3.LARGEST == 448
    middles = (numbers[1:] + numbers[:-1]) / 2
    beside = [torch.nextafter(middles, torch.tensor(s)) for s in (-1e9, 1e9)]
    far = torch.tensor([449.0, 463.9, 464.0, 465.0, 1e4, 1e12, -1e6])
    v = torch.cat([numbers, middles, *beside, far])
    for scale in (1.0, 2.0**-9, 64.0):
        assert torch.equal(rf.ops.quantize_e4m3(v * scale, scale).float(), nearest(v))


def test_nan_stays_and_infinity_saturates():
    v = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    got = rf.ops.quantize_e4m3(v, 3.0).float()
    assert got[0].isnan() and got[1:].tolist() == [448, -448, 0]


def test_weights_have_a_scale_a_channel():
    weight = torch.randn(5, 7, 3, 3) * torch.tensor([1.0, 1e-3, 1e3, 0.0, 1e-41]).view(5, 1, 1, 1)
    weight = weight.contiguous(memory_format=torch.channels_last)
    q, scale = rf.ops.quantize_weight_e4m3(weight)
    assert q.dtype == E4M3 and q.stride() == weight.stride() and scale.dtype == torch.float32
    assert (q.float().abs().amax((1, 2, 3))[:3] == 448).all()
    assert scale[3] == 1 and (q[3].float() == 0).all()
    back, allowed = q.double() * scale.double().view(-1, 1, 1, 1), weight.double().abs() * 2**-4
    smallest = scale.double().view(-1, 1, 1, 1) * 2**-10
    assert ((back - weight).abs() <= torch.maximum(allowed, smallest) * (1 + 1e-6)).all()
    assert rf.ops.quantize_weight_e4m3(torch.empty(2, 0, 1, 1))[1].tolist() == [1, 1]
    assert _e4m3.scale_of(0.0) == 1.0 and _e4m3.scale_of(896.0) == 2.0
    assert _e4m3.scale_of(1e-44) == torch.finfo(torch.float32).tiny


@pytest.mark.op_matrix
@pytest.mark.parametrize("case", cases.CONV_CASES, ids=str)
@pytest.mark.parametrize(("entry", "dtype"), cells(OP, (E4M3,)))
def test_exact_on_integers(entry, dtype, case, generator):
    for wide in (E4M3, WIDE[case.k % 3] if entry.name != "triton" else torch.float16):
        operands = exact_operands(case, out_dtype=wide)
        if (y := run(entry, case, operands)) is None:
            continue
        assert y.shape == case.output_shape
        assert same_bits(y, operands.expected(case)), case.name


@pytest.mark.op_matrix
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("case", cases.CONV_CASES, ids=str)
@pytest.mark.parametrize(("entry", "dtype"), cells(OP, (E4M3,)))
def test_within_the_bound(entry, dtype, case, layout):
    out = [E4M3, torch.float32, torch.float16][case.c % 3]
    operands = random_fp8(case, out_dtype=out).to_layout(layout)
    if (y := run(entry, case, operands)) is None:
        return
    check = operands.check(case, y)
    assert check.ok, check
    form = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    if y.numel() and case.c > 1:
        assert y.is_contiguous(memory_format=form)


@pytest.mark.op_matrix
@pytest.mark.parametrize("residual", [E4M3, torch.float32, torch.float16])
@pytest.mark.parametrize(("entry", "dtype"), cells(OP, (E4M3,)))
def test_a_shortcut_may_be_wide(entry, dtype, residual):
    case = CASES["3x3_residual"]
    operands = random_fp8(case)
    operands.residual = operands.residual.to(residual)
    y = run(entry, case, operands)
    assert y is None or operands.check(case, y).ok


@pytest.mark.op_matrix
@pytest.mark.parametrize("operand", ["x", "weight", "scale", "shift", "residual"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("out", [E4M3, torch.float16])
@pytest.mark.parametrize(("entry", "dtype"), cells(OP, (E4M3,)))
def test_nan_stays_and_infinity_saturates_in_a_layer(entry, dtype, operand, value, out):
    case = CASES["3x3_residual"]
    operands = random_fp8(case, out_dtype=out)
    operands.scale[0] = 1
    target = getattr(operands, operand)
    if target.dtype == E4M3 and value == float("inf"):
        pytest.skip("e4m3 has no infinity")
    wide = target.float().view(-1)
    wide[len(wide) // 2] = value
    setattr(operands, operand, wide.view(target.shape).to(target.dtype))
    if (y := run(entry, case, operands)) is None:
        return
    check = operands.check(case, y)
    assert check.ok, check
    assert y.float().isnan().any() or value == float("inf")


def plants(case: cases.ConvCase, operands: Fp8Operands) -> dict[str, torch.Tensor]:
    """What wrong kernels would give."""
    right = operands.oracle(case)
    raw = torch.conv2d(operands.x.double(), operands.weight.double(), None, **case.geometry)
    a, b = (v.double().view(1, -1, 1, 1) for v in (operands.scale, operands.shift))
    rest = operands.residual.double() * operands.residual_scale
    down = (right * (1 - 2**-3.5)).clamp(-448, 448)
    return {
        "shift": (raw * a + rest).relu() / operands.out_scale,
        "residual": (raw * a + b).relu() / operands.out_scale,
        "residual's scale": (raw * a + b + operands.residual.double()).relu() / operands.out_scale,
        "result's scale": right * operands.out_scale,
        "ReLU": (raw * a + b + rest) / operands.out_scale,
        "rounding": down,
        "scale": (1.1 * raw * a + b + rest).relu() / operands.out_scale,
    }


def test_the_bound_tells_wrong_results_from_right_ones():
    case = CASES["3x3_residual"]
    operands = random_fp8(case)
    wide = random_fp8(case, out_dtype=torch.float32)
    for name, wrong in plants(case, operands).items():
        assert not operands.check(case, _e4m3.stored(wrong.float())).ok, name
    raw = torch.conv2d(wide.x.double(), wide.weight.double(), None, **case.geometry)
    a, b = (v.double().view(1, -1, 1, 1) for v in (wide.scale, wide.shift))
    rest = wide.residual.double() * wide.residual_scale
    coarse = ((raw.bfloat16().double() * a + b + rest).relu() / wide.out_scale).float()
    assert not wide.check(case, coarse).ok
    # What a unit of 14 bits gives is let through where that is said, and nowhere else.
    narrow = raw * (1 + 2**-13 * torch.randn_like(raw).clamp(-2, 2))
    given = ((narrow * a + b + rest).relu() / wide.out_scale).float()
    assert wide.check(case, given, accumulation="narrow").ok and not wide.check(case, given).ok
    with pytest.raises(ValueError, match=r"accumulation is 'exact'; accepted are 'nearest'"):
        wide.check(case, given, accumulation="exact")


def test_a_saturated_result_must_be_the_largest():
    case = CASES["1x1"]
    operands = exact_operands(case, out_scale=2.0**-6)
    expected = operands.expected(case)
    assert (expected.float() == 448).any() and operands.check(case, expected).ok
    below = torch.where(expected.float() == 448, 416.0, expected.float()).to(E4M3)
    assert not operands.check(case, below).ok


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("channels", [16, 64, 256])
def test_the_noise_of_quantisation_is_as_predicted(channels, relu):
    """Per layer some 3.6% of the output's own size, as docs/fp8.md says."""
    torch.manual_seed(0)
    x = torch.randn(4, channels, 14, 14)
    x = x.relu() if relu else x
    weight, one = torch.randn(64, channels, 3, 3), torch.ones(64)
    scale = _e4m3.scale_of(float(x.abs().max()))
    q, s = rf.ops.quantize_weight_e4m3(weight)
    y = rf.ops.conv_bn_act_fp8(
        rf.ops.quantize_e4m3(x, scale), q, scale * s, 0 * one, act="none", padding=1,
        out_dtype=torch.float32,
    )  # fmt: skip
    exact = torch.conv2d(x.double(), weight.double(), padding=1)
    error = (y - exact).square().mean().sqrt()
    predicted = numerics.fp8_noise(x, weight, one, padding=1).square().mean().sqrt()
    assert 0.9 < error / predicted < 1.1
    assert 0.03 < error / exact.square().mean().sqrt() < 0.042


def test_gradients_and_tangents_are_refused():
    operands = random_fp8(CASES["3x3"])
    operands.scale.requires_grad_()
    call = {"padding": 1}
    with pytest.raises(RuntimeError, match="conv_bn_act_fp8 has no derivative of its own"):
        rf.ops.conv_bn_act_fp8(*operands.tuple(), **call)
    with torch.no_grad():
        rf.ops.conv_bn_act_fp8(*operands.tuple(), **call)


@pytest.mark.op_matrix
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("name", ["3x3_residual", "1x1", "nc11", "empty_batch"])
def test_fake_and_real_agree(name, layout):
    """Not opcheck's schema test: it compares tensors, which torch can't do in e4m3."""
    case = CASES[name]
    operands = random_fp8(case).to_layout(layout)
    arguments = (*operands.tuple(), *operands.options(case))
    torch.library.opcheck(overload(OP, "reference"), arguments, test_utils=("test_faketensor",))
    before = [None if t is None else t.clone() for t in operands.tuple()]
    overload(OP, "reference")(*arguments)
    for t, old in zip(operands.tuple(), before, strict=True):
        assert t is None or same_bits(t, old), "an input was written"


def test_compiled():
    case = CASES["3x3_residual"]
    operands = random_fp8(case).to_layout("nhwc")

    def run(*t):
        return rf.ops.conv_bn_act_fp8(*t, **operands.scales(), **case.geometry)

    expected = run(*operands.tuple())
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(*operands.tuple())
    assert same_bits(found, expected) and found.stride() == expected.stride()


def _call(**changes):
    arguments = {
        "x": torch.randn(2, 8, 5, 5).to(E4M3),
        "weight": torch.randn(16, 8, 3, 3).to(E4M3),
        "scale": torch.ones(16),
        "shift": torch.zeros(16),
        "padding": 1,
    }
    return rf.ops.conv_bn_act_fp8(**{**arguments, **changes})


BAD = {
    "x list": ({"x": [1]}, TypeError, "x must be a Tensor, got list"),
    "x wide": ({"x": torch.randn(2, 8, 5, 5)}, TypeError, "x has dtype torch.float32; accepted"),
    "x 3-D": ({"x": torch.zeros(8, 5, 5).to(E4M3)}, ValueError, "x must have 4 dimensions"),
    "weight": ({"weight": torch.randn(16, 8, 3, 3)}, TypeError, "weight has dtype torch.float32"),
    "channels": ({"weight": torch.zeros(16, 4, 3, 3).to(E4M3)}, ValueError, "x has 8 channels"),
    "device": ({"weight": torch.zeros(16, 8, 3, 3, device="meta").to(E4M3)}, ValueError,
               "weight is on meta"),
    "scale": ({"scale": torch.ones(8)}, ValueError, r"scale has shape \(8,\)"),
    "shift": ({"shift": None}, TypeError, "shift must be a Tensor"),
    "residual": ({"residual": torch.zeros(2, 16, 4, 5)}, ValueError, "residual has shape"),
    "residual dtype": ({"residual": torch.zeros(2, 16, 5, 5).double()}, TypeError,
                       "residual has dtype torch.float64"),
    "out_dtype": ({"out_dtype": torch.float64}, TypeError, "out_dtype is torch.float64; accepted"),
    "out_scale 0": ({"out_scale": 0.0}, ValueError, "out_scale is 0.0; accepted is a positive"),
    "out_scale nan": ({"out_scale": float("nan")}, ValueError, "out_scale is nan"),
    "residual_scale": ({"residual_scale": torch.ones(1)}, TypeError, "residual_scale must be a fl"),
    "act": ({"act": "gelu"}, ValueError, "act is 'gelu'"),
    "groups": ({"groups": 3}, ValueError, "groups=3"),
    "stride": ({"stride": 0}, ValueError, "stride is 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    changes, error, message = BAD[name]
    with pytest.raises(error, match=message):
        _call(**changes)
    assert _call().dtype == E4M3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rf.ops.quantize_e4m3([1.0], 1.0), TypeError, "x must be a Tensor"),
        (lambda: rf.ops.quantize_e4m3(torch.ones(1).double(), 1.0), TypeError, "x has dtype"),
        (lambda: rf.ops.quantize_e4m3(torch.ones(1), -1.0), ValueError, "scale is -1.0"),
        (lambda: rf.ops.quantize_weight_e4m3(torch.ones(2, 2)), ValueError, "4 dimensions, got 2"),
        (lambda: rf.ops.quantize_weight_e4m3(torch.full((1, 1, 1, 1), float("inf"))), ValueError,
         "weight holds NaN or Inf"),
    ],
)  # fmt: skip
def test_bad_input_of_quantisation_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_gpu_that_multiplies_no_e4m3_is_refused_with_the_reason(monkeypatch):
    limits = _tiles.Limits(108, 163 * 1024, 80)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_limits, "limits", lambda device: limits)
    call = backends.Call(OP, "cuda", E4M3, index=0)
    reason = "sm_80 multiplies no e4m3, sm_89 is the first that does"
    assert _triton.supports(call) == reason
    product = _tiles.Product(1000, 64, 1, 256, 1, 1)
    with pytest.raises(LookupError, match="none of the 10 configurations is left"):
        _tiles.choose(product, limits)
    for capability, least in ((89, 32), (90, 64), (100, 64), (120, 32)):
        found = _tiles.Limits(132, 99 * 1024, capability)
        tiles = [t.m for t in _tiles.TILES if _tiles.fits(product, t, found)]
        assert min(tiles) == least, capability
    assert _triton.supports(call._replace(dtype=torch.bfloat16)).startswith("no Triton kernel for")


def test_one_step_holds_whole_instructions():
    """32 bytes of a row, however few channels there are."""
    assert [_tiles.Product(9, 9, 1, depth, 1, 1).step for depth in (1, 40, 500)] == [32, 64, 128]
    assert _tiles.Product(9, 9, 1, 500, 1, 1, ragged=True).step == 64
