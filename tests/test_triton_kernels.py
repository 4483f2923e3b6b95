"""Every configuration of conv_bn_act, bit for bit and within the bound, with hostile operands."""

from __future__ import annotations

import contextlib

import pytest
import torch
from matrix import Operands, geometry_args, random_operands
from triton_trace import PROOF, needs_interpreter

from resnet_fused import cases, numerics
from resnet_fused.triton import _tiles

pytestmark = [
    *needs_interpreter,
    # NumPy's, about the NaN and Inf that are planted here.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]

DTYPES = {"float16": torch.float16, "float32": torch.float32}
GUARD = 77.0
NAN, INF = float("nan"), float("inf")

# 35 pixels, 70 filters, three or more steps for each of four taps: multiples of no tile.
ODD = cases.ConvCase("odd", 1, 130, 9, 8, 70, 2, 2, (2, 1), (1, 0), residual=True)
GROUPED = cases.ConvCase("grouped", 3, 80, 5, 3, 80, 2, 1, padding=(1, 0), groups=20, residual=True)
TRICKY = (
    ODD,
    cases.ConvCase("many", 2, 20, 12, 11, 139, residual=True),
    cases.ConvCase("stem", 1, 3, 19, 17, 64, 7, 7, (2, 2), (3, 3)),
    cases.ConvCase("dilated", 1, 70, 9, 9, 33, 3, 3, (2, 1), (1, 2), (1, 2), residual=True),
    GROUPED,
    cases.ConvCase("wide_groups", 1, 72, 5, 6, 140, 2, 2, groups=2, residual=True),
    cases.ConvCase("depthwise", 1, 70, 6, 6, 70, 3, 3, padding=(1, 1), groups=70, act="none"),
    cases.ConvCase("multiplier", 1, 35, 6, 6, 70, 2, 3, (1, 2), (1, 1), groups=35),
    cases.ConvCase("even_1x1", 1, 64, 9, 9, 64, stride=(2, 2), act="none"),
    cases.ConvCase("even_3x3", 1, 64, 6, 5, 65, 3, 3, padding=(1, 1), residual=True),
    cases.ConvCase("one_row", 1, 12, 9, 7, 8, 1, 7, padding=(0, 3)),
    cases.ConvCase("one_column", 1, 5, 9, 7, 8, 7, 1, padding=(3, 0)),
    cases.ConvCase("one_pixel", 1, 40, 1, 1, 130, residual=True),
    cases.ConvCase("mostly_padding", 1, 9, 2, 3, 17, 2, 2, padding=(3, 4)),
)
BY_NAME = {case.name: case for case in TRICKY}


def plan(tile, splits=1, flat=False):
    return _tiles.Plan(tile, splits, flat, "for the test")


def plans():
    """Every configuration in each way that it may run; flattened loops have 4 warps."""
    return [
        plan(tile, splits, flat)
        for tile in _tiles.TILES
        for flat in ((False, True) if tile.warps == 4 else (False,))
        for splits in (1, 3)
    ]


def cells():
    """(plan, dtype, cases): all in `make proof`, else half of the dtypes and two cases by turns."""
    found = [
        (p, name)
        for p in plans()
        for name in DTYPES
        if PROOF or (name == "float16") == (p.flat == (p.splits > 1))
    ]
    return [
        pytest.param(
            p, DTYPES[name], TRICKY if PROOF else (TRICKY[1 + i % (len(TRICKY) - 1)],),
            id=f"{p.name.replace('/', '-')}-{'flat' if p.flat else 'unrolled'}-{name}",
        )
        for i, (p, name) in enumerate(found)
    ]  # fmt: skip


class Poisoned:
    """An output full of NaN whose every pixel and channel has neighbours that must not change."""

    def __init__(self, shape, dtype, layout="nhwc"):
        n, k, p, q = shape
        if layout == "nhwc":
            self.memory = torch.full((n, p + 2, q + 3, k + 16), GUARD, dtype=dtype)
            self.out = self.memory[:, 1:-1, 1:-2, 8 : 8 + k].permute(0, 3, 1, 2)
        else:
            self.memory = torch.full((n, k + 2, p + 2, q + 3), GUARD, dtype=dtype)
            self.out = self.memory[:, 1:-1, 1:-1, 1:-2]
        self.out.fill_(NAN)

    def check_guards(self):
        written = self.out.clone()
        self.out.fill_(GUARD)
        assert (self.memory == GUARD).all()
        self.out.copy_(written)


@contextlib.contextmanager
def poisoned_workspace():
    """torch.empty gives NaN: what a kernel reads before it is written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run(case, operands, p=None, out=None):
    """Launches into a poisoned output, and looks at its guards."""
    from resnet_fused.triton import conv_bn_act

    poisoned = out or Poisoned(case.output_shape, operands.x.dtype)
    with poisoned_workspace():
        conv_bn_act.launch(*operands.tuple(), poisoned.out, *geometry_args(case), plan=p)
    poisoned.check_guards()
    return poisoned.out


def oracle_of(case, operands):
    return numerics.conv_bn_act_oracle(*operands.tuple(), **case.geometry, act=case.act)


def check_exact(case, dtype, p=None):
    operands = Operands(*numerics.exact_inputs(case, dtype)).to_layout("nhwc")
    expected = numerics.exact_expected(oracle_of(case, operands), dtype)
    assert torch.equal(run(case, operands, p), expected), case.name


def check_bound(case, operands, y):
    oracle = oracle_of(case, operands)
    bound = numerics.conv_bn_act_bound(*operands.tuple(), oracle, **case.geometry)
    check = numerics.check_bound(y, oracle, bound)
    assert check.ok, (case.name, str(check))
    return oracle


@pytest.mark.parametrize(("p", "dtype", "turns"), cells())
def test_every_configuration(p, dtype, turns):
    check_exact(ODD, dtype, p)
    for case in turns:
        operands = random_operands(case, dtype).to_layout("nhwc")
        check_bound(case, operands, run(case, operands, p))
        if PROOF:
            check_exact(case, dtype, p)


@pytest.mark.parametrize("case", TRICKY, ids=str)
def test_every_case_with_the_chosen_configuration(case):
    for dtype in DTYPES.values() if PROOF else [list(DTYPES.values())[case.c % 2]]:
        check_exact(case, dtype)


def plant(t, case, name):
    """NaN and Infs where they can be told apart: in different images, filters or channels."""
    if name in ("x", "residual"):
        image = torch.arange(3) % case.n
        t[image[0], 3, 0, 1], t[image[1], -1, 1, 0] = NAN, INF
        t[image[2], 4, 1, 1] = -INF
    else:
        t[0, ...], t[t.shape[0] // 2, ...], t[-1, ...] = NAN, INF, -INF


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("name", ["x", "weight", "scale", "shift", "residual"])
@pytest.mark.parametrize("case", [GROUPED, BY_NAME["even_3x3"]], ids=str)
def test_nan_and_inf_stay_in_their_places(case, name, splits):
    operands = random_operands(case, torch.float16).to_layout("nhwc")
    plant(getattr(operands, name), case, name)
    y = run(case, operands, plan(_tiles.BY_NAME["64x64_4w4s"], splits))
    oracle = check_bound(case, operands, y)
    assert oracle.isnan().any() and oracle.isfinite().any()


@pytest.mark.parametrize(
    ("channel", "value"),
    [(3, NAN), (4, NAN), (63, NAN), (64, NAN), (79, NAN), (63, INF), (64, -INF)],
)
def test_nothing_leaks_between_groups(channel, value):
    """16 groups of 4 channels share a tile; the last tile has 4 of them."""
    case = cases.ConvCase("leak", 2, 80, 4, 3, 80, groups=20)
    operands = random_operands(case, torch.float32).to_layout("nhwc")
    operands.scale.abs_().add_(0.5)
    operands.weight.abs_().add_(0.1)
    operands.x[1, channel] = value
    y = run(case, operands, plan(_tiles.BY_NAME["32x64_4w4s"]))
    check_bound(case, operands, y)
    first = channel // 4 * 4
    mine = y[1, first : first + 4]
    assert (mine == 0 if value == -INF else ~mine.isfinite()).all()
    mine.zero_()
    assert y.isfinite().all()


def test_overflow_is_inf_and_relu_keeps_nan():
    case = cases.ConvCase("overflow", 1, 64, 2, 2, 8)
    operands = random_operands(case, torch.float16).to_layout("nhwc")
    operands.x.fill_(200.0)
    operands.weight.fill_(200.0)
    operands.scale.copy_(torch.tensor([1, -1, 0, NAN, 0.001, 1, 1, 1]))
    operands.shift.copy_(torch.tensor([0, 0, -1, 0, 0, NAN, INF, -INF]))
    y = run(case, operands)
    check_bound(case, operands, y)
    expected = torch.tensor([INF, 0, 0, NAN, 2560, NAN, INF, 0], dtype=torch.float16)
    torch.testing.assert_close(y[0, :, 0, 0], expected, equal_nan=True, rtol=0, atol=0)


def sliced_channels(t):
    memory = torch.full((*t.shape[:1], t.shape[1] + 5, *t.shape[2:]), NAN, dtype=t.dtype)
    memory = memory.contiguous(memory_format=torch.channels_last)
    memory[:, 3:-2] = t
    return memory[:, 3:-2]


def sliced_pixels(t):
    n, c, h, w = t.shape
    memory = torch.full((n, 2 * h, 3 * w, c), NAN, dtype=t.dtype).permute(0, 3, 1, 2)
    memory[:, :, ::2, ::3] = t
    return memory[:, :, ::2, ::3]


def misaligned(t):
    """Channels adjacent, one element off any alignment."""
    n, c, h, w = t.shape
    memory = torch.full((t.numel() + 1,), NAN, dtype=t.dtype)
    moved = memory[1:].view(n, h, w, c).permute(0, 3, 1, 2)
    moved.copy_(t)
    assert moved.data_ptr() % 4
    return moved


LAYOUTS = {
    "nchw": lambda t: t.contiguous(),
    "sliced_channels": sliced_channels,
    "sliced_pixels": sliced_pixels,
    "misaligned": misaligned,
    "expanded_first": lambda t: t[:1].expand_as(t),
    "expanded_channels": lambda t: t[:, :1].expand_as(t),
    "expanded": lambda t: t[:1, :1, :1, :1].expand_as(t),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
}
LAID_OUT = cases.ConvCase("laid_out", 2, 24, 5, 6, 40, 2, 2, padding=(1, 1), residual=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["x", "weight", "residual"])
def test_operands_in_any_layout(name, layout):
    operands = random_operands(LAID_OUT, torch.float16).to_layout("nhwc")
    setattr(operands, name, LAYOUTS[layout](getattr(operands, name)))
    for splits in (1, 2) if name == "residual" else (1,):
        y = run(LAID_OUT, operands, plan(_tiles.BY_NAME["64x64_4w4s"], splits))
        check_bound(LAID_OUT, operands, y)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_outputs_in_any_layout(layout, splits):
    operands = random_operands(LAID_OUT, torch.float16).to_layout("nhwc")
    out = Poisoned(LAID_OUT.output_shape, torch.float16, layout)
    p = plan(_tiles.BY_NAME["128x32_4w4s"], splits)
    check_bound(LAID_OUT, operands, run(LAID_OUT, operands, p, out))


def test_residual_may_be_the_input():
    case = cases.ConvCase("own", 2, 24, 5, 6, 24, 3, 3, padding=(1, 1), residual=True)
    operands = random_operands(case, torch.float32).to_layout("nhwc")
    operands.residual = operands.x
    check_bound(case, operands, run(case, operands))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_splits_give_the_same_bits_each_time(dtype):
    operands = random_operands(ODD, dtype).to_layout("nhwc")
    p = plan(_tiles.BY_NAME["64x64_4w4s"], 3)
    first = run(ODD, operands, p).clone()
    for _ in range(3):
        assert torch.equal(run(ODD, operands, p), first)


def test_an_empty_batch_launches_nothing(monkeypatch):
    from resnet_fused.triton import conv_bn_act

    monkeypatch.delattr(conv_bn_act, "conv_bn_act_kernel")
    case = cases.ConvCase("empty", 0, 8, 4, 4, 8)
    assert run(case, random_operands(case, torch.float16)).numel() == 0
