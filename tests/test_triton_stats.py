"""Every configuration of conv_bn_stats: the output bit for bit, mean and M2 within their bound."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch
from matrix import ACTIVATION, SPREADS, conv_arguments, norm_values, spread_values
from test_triton_kernels import LAYOUTS, ODD, TRICKY, Poisoned, plan, poisoned_workspace
from triton_trace import PROOF, needs_interpreter, unique_bytes, watch

import resnet_fused as rf
from resnet_fused import backends, cases, numerics, roofline
from resnet_fused.ops import _training_checks_stats as checks
from resnet_fused.ops._library import overload
from resnet_fused.triton import _tiles

pytestmark = [
    *needs_interpreter,
    # NumPy's, about the NaN and Inf that are planted here.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]

DTYPES = {"float16": torch.float16, "float32": torch.float32}
NAN, INF = float("nan"), float("inf")
BY_NAME = {case.name: case for case in TRICKY}
STEM = dataclasses.replace(BY_NAME["stem"], h=15, w=13, k=20)
GROUPED = dataclasses.replace(BY_NAME["grouped"], n=2, residual=False)
TURNS = [STEM] + [
    BY_NAME[name]
    for name in (
        "dilated", "depthwise", "wide_groups", "even_1x1", "one_row", "mostly_padding",
        "multiplier", "even_3x3", "one_pixel", "one_column",
    )
] + [GROUPED]  # fmt: skip
SMALL = cases.ConvCase("small", 2, 24, 5, 6, 40, 2, 2, padding=(1, 1))
LAST = plan(_tiles.BY_NAME["32x64_4w4s"])


def kernel():
    return importlib.import_module("resnet_fused.triton.conv_bn_stats")


class Result:
    """y and stats full of NaN, between memory that must not change."""

    def __init__(self, case, dtype, layout="nhwc"):
        self.activation = Poisoned(case.output_shape, dtype, layout)
        self.rows = torch.full((4, case.k), 77.0)
        self.y, self.stats = self.activation.out, self.rows[1:3]
        self.stats.fill_(NAN)

    def check_guards(self):
        self.activation.check_guards()
        assert (self.rows[[0, 3]] == 77.0).all()


def run(case, x, norm, weight, p=None, layout="nhwc"):
    """Launches with a poisoned workspace; (y, stats)."""
    result = Result(case, x.dtype, layout)
    with poisoned_workspace():
        kernel().launch(
            x, norm, weight, result.y, result.stats, *conv_arguments(case), plan=p
        )  # fmt: skip
    result.check_guards()
    return result.y, result.stats


def nhwc(t):
    return t.contiguous(memory_format=torch.channels_last)


def tiles_of(case, p):
    """How many tiles the statistics were merged from."""
    rows = kernel().MERGE_TILE[0] if p.splits > 1 else p.tile.m
    return _tiles.cdiv(case.n * case.p * case.q, rows)


def check_stats(y, stats, tiles=1):
    oracle = numerics.stats_oracle(y)
    check = numerics.check_bound(stats, oracle, numerics.stats_bound(y, oracle, tiles=tiles))
    assert check.ok, str(check)


def check_exact(case, dtype, p, prologue):
    x, norm, weight = checks.exact_operands(case, dtype)
    norm = norm if prologue else None
    y, stats = run(case, nhwc(x), norm, nhwc(weight), p)
    expected = numerics.conv_bn_stats_oracle(x, norm, weight, **case.geometry)
    assert torch.equal(y, expected.to(dtype)), case.name
    check_stats(y, stats, tiles_of(case, p))


def cells():
    """(plan, dtype, cases): everything in `make proof`, else half of the dtypes, cases by turns.

    ODD alone has steps enough for three parts.
    """
    found = []
    for i, tile in enumerate(_tiles.TILES):
        for splits in (1, 3):
            for name in DTYPES:
                turn = i + (splits > 1) + (name == "float32")
                if PROOF or turn % 2:
                    flat = tile.warps == 4 and (i // 2 + splits) % 2 == 0
                    turns = [ODD] if splits > 1 else TURNS[i :: len(_tiles.TILES)]
                    turns = [ODD, *TURNS] if PROOF else turns
                    p = plan(tile, splits, flat)
                    label = f"{p.name.replace('/', '-')}-{'flat' if flat else 'unrolled'}-{name}"
                    found.append(pytest.param(p, DTYPES[name], turns, id=label))
    return found


@pytest.mark.parametrize(("p", "dtype", "turns"), cells())
def test_every_configuration(p, dtype, turns):
    for case in turns:
        for prologue in (False, True) if PROOF else (True,):
            check_exact(case, dtype, p, prologue)


def test_padding_is_zero_behind_the_relu():
    """A missed mask reads relu(shift) there; the numbers of this case would show it."""
    case = BY_NAME["mostly_padding"]
    x, norm, weight = checks.exact_operands(case, torch.float16)
    norm[1] = 3
    expected = numerics.conv_bn_stats_oracle(x, norm, weight, **case.geometry)
    wider = torch.nn.functional.pad(x, (4, 4, 3, 3))
    missed = numerics.conv_bn_stats_oracle(wider, norm, weight)
    assert missed.shape == expected.shape
    assert (missed != expected).double().mean() > 0.9
    for splits in (1, 2):
        y, _ = run(case, nhwc(x), norm, nhwc(weight), plan(LAST.tile, splits))
        assert torch.equal(y, expected.half())


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("tile", _tiles.TILES, ids=lambda tile: tile.name)
def test_statistics_are_exact_where_no_sum_rounds(tile, splits):
    """Small integers, tiles of 2^n pixels: mean and M2 are float64's, rounded once."""
    dtype = torch.float16 if (tile.m + splits) % 3 else torch.float32
    case = cases.ConvCase("exact", 5, 68, 8, 8, 33)
    x = torch.randint(-1, 2, case.input_shape) * (torch.rand(case.input_shape) < 0.025)
    weight = torch.randint(-1, 2, case.weight_shape)
    y, stats = run(case, nhwc(x.to(dtype)), None, nhwc(weight.to(dtype)), plan(tile, splits))
    assert y.abs().max() > 2
    oracle = numerics.stats_oracle(y)
    assert (oracle[0] != 0).any()
    assert torch.equal(stats, oracle.float())


def spread(dtype, kappas=(0.0, 1e3), rows=1000):
    """A channel for each kind of values of `matrix.spread_values`: [rows, 40, 1, 1], and a
    convolution that hands on the first of them."""
    channels = [spread_values(kind, kappa, rows) for kind in SPREADS for kappa in kappas]
    x = torch.cat([*channels, torch.zeros(rows, 40 - len(channels), 1, 1)], 1).to(dtype)
    return x, torch.eye(len(channels), 40, dtype=dtype)[:, :, None, None]


SPREAD = cases.ConvCase("spread", 1000, 40, 1, 1, 2 * len(SPREADS))


@pytest.mark.parametrize(
    ("p", "name"),
    [
        (LAST, "float32"),
        (LAST, "float16"),
        (plan(_tiles.BY_NAME["256x128_8w3s"]), "float32"),
        (plan(LAST.tile, 2), "float32"),
    ],
    ids=["32 tiles", "32 tiles of float16", "4 tiles", "63 tiles behind a split"],
)
def test_means_far_from_zero_drifts_and_outliers(p, name):
    x, weight = spread(DTYPES[name])
    y, stats = run(SPREAD, nhwc(x), None, nhwc(weight), p)
    assert torch.equal(y, x[:, : SPREAD.k])
    check_stats(y, stats, tiles_of(SPREAD, p))


@pytest.mark.parametrize(
    "fault",
    [{"pixels": 999}, {"rows": 31}, {"first": 1}, {"last": -1}],
    ids=["a pixel less", "smaller tiles", "not the first tile", "not the last tile"],
)
def test_the_bound_sees_a_merge_that_is_off(fault):
    """By one in 1,000 pixels or 32 tiles; the moments are right."""
    y = spread(torch.float32)[0][:, : SPREAD.k]
    tiles = [numerics.stats_oracle(part) for part in y.split(32)]
    moments, stats = torch.stack(tiles).float(), torch.empty(2, SPREAD.k)
    kernel().merge(moments, stats, 1000, 32)
    check_stats(y, stats, 32)
    part = moments[fault.get("first") : fault.get("last")]
    kernel().merge(part, stats, fault.get("pixels", 1000), fault.get("rows", 32))
    with pytest.raises(AssertionError, match="bound"):
        check_stats(y, stats, 32)


@pytest.mark.parametrize("tiles", [1, 63, 256, 257, 5000])
def test_moments_of_many_tiles_are_merged_in_chunks(tiles):
    """The first tile far from all others: the pivot that costs most."""
    rows, channels = 32, 5
    pixels = tiles * rows - 5
    moments = torch.randn(tiles, 2, channels)
    moments[:, 1] = moments[:, 1].abs() * rows
    moments[0, 0] += 1e4
    moments[:, 0, 1] += 1e3
    moments[:, 0, 2] = moments[0, 0, 2]
    stats = torch.full((2, channels), NAN)
    with poisoned_workspace(), watch() as launches:
        kernel().merge(moments, stats, pixels, rows)
    count = torch.full((tiles, 1), float(rows), dtype=torch.float64)
    count[-1] -= 5
    mean, m2 = moments.double().unbind(1)
    centre = mean[0] + (count * (mean - mean[0])).sum(0) / pixels
    total = (m2 + count * (mean - centre) ** 2).sum(0)
    torch.testing.assert_close(stats[0].double(), centre, rtol=2**-24, atol=0)
    torch.testing.assert_close(stats[1].double(), total, rtol=2**-24, atol=0)
    assert len(launches) == (1 if tiles <= 256 else 2)
    # Each tile is read by one program; the first mean by all of them, and by the second kernel.
    loads = launches[0]["moments"].loads.reshape(tiles, 2, channels)
    assert (loads[1:] == 1).all() and (loads[0, 1] == 1).all()


def plant(x, norm, weight, name):
    if name == "x":
        x[0, 3, 0, 2], x[-1, -1, 2, 0], x[0, 4, 2, 2] = NAN, INF, -INF
    elif name == "weight":
        weight[0], weight[weight.shape[0] // 2], weight[-1] = NAN, INF, -INF
    else:
        row = norm[0 if name == "scale" else 1]
        row[3], row[5], row[-1] = NAN, INF, -INF


@pytest.mark.parametrize(
    ("case", "splits", "name"),
    [
        (case, splits, name)
        for case in (GROUPED, BY_NAME["even_1x1"])
        for splits in (1, 2)
        for name in ("x", "weight", "scale", "shift")
        # Groups are summed again, one by one: 17 times the time.
        if PROOF or case is not GROUPED or (splits == 1) == (name in ("x", "scale"))
    ],
    ids=str,
)
def test_nan_and_inf_stay_in_their_places(case, name, splits):
    """As the reference has them: an output's in its channel's statistics, all of them NaN."""
    x, weight = torch.randn(case.input_shape), torch.randn(case.weight_shape)
    norm = norm_values(case.c, torch.float16)
    x, weight = x.half(), weight.half()
    plant(x, norm, weight, name)
    y, stats = run(case, nhwc(x), norm, nhwc(weight), plan(_tiles.BY_NAME["64x64_4w4s"], splits))
    oracle = numerics.conv_bn_stats_oracle(x, norm, weight, **case.geometry)
    bound = numerics.conv_bn_stats_bound(x, norm, weight, oracle, **case.geometry)
    check = numerics.check_bound(y, oracle, bound)
    assert check.ok, str(check)
    lost = ~y.isfinite().all(3).all(2).all(0)
    assert lost.any()
    assert stats[:, lost].isnan().all()
    assert torch.equal(
        stats.isnan(), overload("conv_bn_stats", "reference")(
            x, norm, weight, *conv_arguments(case)
        )[1].isnan(),
    )  # fmt: skip
    check_stats(y[:, ~lost], stats[:, ~lost])


@pytest.mark.parametrize(("channel", "value"), [(4, NAN), (79, NAN), (63, INF)])
def test_nothing_leaks_between_groups(channel, value):
    """16 groups of 4 channels share a tile; a shift that is not finite reaches its group alone."""
    case = cases.ConvCase("leak", 2, 80, 4, 3, 80, groups=20)
    x, weight = torch.randn(case.input_shape), torch.rand(case.weight_shape) + 0.1
    norm = norm_values(case.c, torch.float32)
    norm[1, channel] = value
    y, stats = run(case, nhwc(x), norm, nhwc(weight), LAST)
    mine = torch.arange(80) // 4 == channel // 4
    assert (~y[:, mine].isfinite()).all() and y[:, ~mine].isfinite().all()
    assert stats[:, mine].isnan().all()
    check_stats(y[:, ~mine], stats[:, ~mine])


def test_statistics_are_of_the_rounded_output():
    """Values that float16 rounds to Inf are Inf to them; subnormal ones count as they are kept."""
    case = cases.ConvCase("rounded", 4, 16, 3, 3, 3)
    x = torch.rand(case.input_shape).half() + 0.5
    weight = torch.ones(case.weight_shape).half()
    weight[0] *= 6e4
    weight[1] *= 2**-24
    y, stats = run(case, nhwc(x), None, nhwc(weight))
    assert (y[:, 0] == INF).all() and stats[:, 0].isnan().all()
    assert y[:, 1].unique().numel() < 20
    exact = (x.float() * weight[1].float()).sum(1)
    assert exact.unique().numel() > 30
    check_stats(y[:, 1:], stats[:, 1:])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["x", "weight"])
def test_operands_in_any_layout(name, layout):
    given = checks.exact_operands(SMALL, torch.float16)
    operands = dict(zip(("x", "norm", "weight"), given, strict=True))
    operands[name] = LAYOUTS[layout](nhwc(operands[name]))
    y, stats = run(SMALL, **operands, p=LAST)
    expected = numerics.conv_bn_stats_oracle(*operands.values(), **SMALL.geometry)
    assert torch.equal(y, expected.half())
    check_stats(y, stats)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_outputs_in_any_layout(layout, splits):
    case = dataclasses.replace(SMALL, c=72)
    x, norm, weight = checks.exact_operands(case, torch.float16)
    y, stats = run(case, nhwc(x), norm, nhwc(weight), plan(LAST.tile, splits), layout)
    expected = numerics.conv_bn_stats_oracle(x, norm, weight, **case.geometry)
    assert torch.equal(y, expected.half())
    check_stats(y, stats)


@pytest.mark.parametrize("splits", [1, 3])
def test_the_same_bits_each_time(splits):
    x, weight = torch.randn(ODD.input_shape), torch.randn(ODD.weight_shape)
    norm = norm_values(ODD.c, torch.float32)
    p = plan(_tiles.BY_NAME["64x128_4w4s"], splits)
    first = run(ODD, nhwc(x), norm, nhwc(weight), p)
    for _ in range(3 if PROOF else 1):
        again = run(ODD, nhwc(x), norm, nhwc(weight), p)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_an_empty_batch_launches_nothing(monkeypatch):
    module = kernel()
    for name in ("conv_bn_stats_kernel", "merge_moments_kernel"):
        monkeypatch.delattr(module, name)
    case = cases.ConvCase("empty", 0, 8, 4, 4, 9)
    x, norm, weight = checks.exact_operands(case, torch.float16)
    y, stats = run(case, x, norm, weight)
    assert y.numel() == 0 and torch.equal(stats, torch.zeros(2, 9))


@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("splits", [1, 2])
def test_each_element_is_written_once_and_no_more_read_than_the_roofline_says(splits, prologue):
    case = cases.ConvCase("3x3", 1, 128, 7, 7, 64, 3, 3, padding=(1, 1))
    x, norm, weight = checks.exact_operands(case, torch.float16)
    y = nhwc(torch.empty(case.output_shape, dtype=torch.float16))
    stats = torch.empty(2, case.k)
    p = plan(_tiles.BY_NAME["32x64_4w4s"], splits)
    with watch() as launches:
        kernel().launch(
            nhwc(x), norm if prologue else None, nhwc(weight), y, stats, *conv_arguments(case),
            plan=p,
        )  # fmt: skip
    assert [launch.name for launch in launches] == [
        "conv_bn_stats_kernel", *["stats_merge_kernel"] * (splits > 1), "merge_moments_kernel",
    ]  # fmt: skip
    stored = launches[-2]
    assert (stored["out"].stores == 1).all() and (stored["moments"].stores == 1).all()
    assert (launches[-1]["stats"].stores == 1).all()
    if prologue:  # mean and invstd are nobody's business
        reads = launches[0]["norm"].loads.reshape(4, case.c)
        assert reads[:2].all() and not reads[2:].any()
    for launch in launches:  # workspace, as partial sums are
        launch.accesses.pop("moments", None)
    cost = roofline.conv_bn_stats_cost(case, torch.float16, prologue=prologue)
    assert unique_bytes(launches) <= 1.1 * cost.bytes


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_the_op_runs_the_kernel(layout):
    x, norm, weight = checks.exact_operands(SMALL, torch.float32)
    x = x.contiguous(memory_format=ACTIVATION[layout])
    with backends.backend("triton"), watch() as launches:
        y, stats = rf.ops.conv_bn_stats(x, weight, norm, padding=1)
    assert launches[0].name == "conv_bn_stats_kernel"
    expected = overload("conv_bn_stats", "reference")(x, norm, weight, *conv_arguments(SMALL))
    assert torch.equal(y, expected[0]) and y.stride() == expected[0].stride()
    assert stats.shape == expected[1].shape and stats.dtype == expected[1].dtype
    check_stats(y, stats)


def test_the_self_check_passes_and_finds_a_wrong_kernel(monkeypatch):
    monkeypatch.setattr(checks, "CONV_CASES", (dataclasses.replace(SMALL, name="3x3"),))
    names = checks.conv_bn_stats_configurations()
    assert names == tuple(tile.name for tile in _tiles.TILES)
    checks.conv_bn_stats("32x64_4w4s", "cpu")
    module, launch = kernel(), kernel().launch

    def wrong(x, norm, weight, y, stats, *rest, **options):
        launch(x, norm, weight, y, stats, *rest, **options)
        stats[1, 7] *= 1.00001

    monkeypatch.setattr(module, "launch", wrong)
    with pytest.raises(ArithmeticError, match="mean and M2 are wrong"):
        checks.conv_bn_stats("32x64_4w4s", "cpu")
