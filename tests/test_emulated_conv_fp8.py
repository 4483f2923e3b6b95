"""conv_bn_act_fp8 by TMA and wgmma, emulated: its numbers, its costs, and what it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import math

import emulated
import pytest
import torch
from conv_by_tma import sharing
from conv_fp8_by_tma import CASES, FEW, OP, TURNS, operands, run, table, tiles, windows, wrong
from emulated import Schedule
from emulated_fp8 import OUTS, problem_of
from emulated_shapes import lay_out
from fp8_operands import E4M3, Fp8Operands, same_bits

from resnet_fused import cases, numerics
from resnet_fused.cases import ConvCase
from resnet_fused.ops._library import overload

pytestmark = pytest.mark.emulated

CONFIGURATIONS = 8
every = pytest.mark.parametrize("index", range(CONFIGURATIONS))
NAMED = {case.name: case for case in CASES}


def test_each_configuration_has_a_test_and_fits():
    assert len(tiles()) == CONFIGURATIONS
    for tile in tiles():
        assert tile["shared_bytes"] <= emulated.H200[1]
        assert tile["name"].startswith("tma_") and tile["step_bytes"] == 128


@every
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_bit_is_right(index, case):
    """On integers, with saturation and ties; schedule and walk change from case to case."""
    number = CASES.index(case) * CONFIGURATIONS + index
    schedule = dataclasses.replace(emulated.SCHEDULES[number % 9], seed=number)
    for place, out in enumerate(OUTS):
        given = operands(case, out)
        few = (number + place) % 3 != 0
        y, report = run(
            case, given, index, schedule=schedule, reverse=(number + place) // 2 % 2 == 1,
            gpu=FEW if few else emulated.H200, resident_blocks=4,
        )  # fmt: skip
        assert wrong(case, given, y) is None
        blocks = math.prod(sharing(tiles()[index]["name"]))
        assert report["plan"]["blocks"] <= (max(2, blocks) if few else 132)


def test_the_cases_round_and_saturate():
    found = [operands(case, E4M3) for case in CASES]
    oracles = [given.oracle(case) for case, given in zip(CASES, found, strict=True)]
    assert any((oracle.abs() > 448).any() for oracle in oracles)
    for case, given, oracle in zip(CASES, found, oracles, strict=True):
        assert (given.expected(case).double() != oracle).any() or case.name == "pixel", case.name


@every
@pytest.mark.parametrize("rounding", ["nearest", "toward_zero"])
def test_noise_is_within_the_bound(index, rounding):
    accumulation = "nearest" if rounding == "nearest" else "truncate"
    for out, name in itertools.product(OUTS, ("3x3", "1x1")):
        given = operands(NAMED[name], out, exact=False)
        y, _ = run(
            NAMED[name], given, index, schedule=Schedule("random", "shuffled", rounding, seed=index)
        )
        found = given.check(NAMED[name], y, accumulation=accumulation)
        assert found.ok, (out, name, found)


@every
@pytest.mark.parametrize("factor", [1.0, 1.5 * 2.0**-7, 1.25 * 2.0**-9, 1.125])
def test_every_number_is_read_and_rounded(index, factor):
    """All 256 codes, in x and in the shortcut; among the results are ties and subnormals."""
    case = ConvCase("codes", 1, 16, 4, 4, 16, residual=True, act="none")
    codes = lay_out(torch.arange(256, dtype=torch.uint8).view(E4M3).view(1, 16, 4, 4), "nhwc")
    zeros, one = lay_out(torch.zeros(1, 16, 4, 4).to(E4M3), "nhwc"), torch.ones(16)
    eye = lay_out(torch.eye(16).view(16, 16, 1, 1).to(E4M3), "nhwc")
    finite = codes.float().nan_to_num(0.0).to(E4M3)  # a product with NaN is NaN beside a zero too
    for out in OUTS:
        read = Fp8Operands(finite, eye, factor * one, 0 * one, None, 1.0, 1.0, out)
        added = Fp8Operands(zeros, eye, one, 0 * one, codes, factor, 1.0, out)
        for given in (read, added):
            y, _ = run(case, given, index)
            expected = given.expected(case)
            assert torch.equal(y.float().isnan(), expected.float().isnan())
            assert same_bits(y.float().nan_to_num(), expected.float().nan_to_num())


DEEP = ConvCase("parts", 1, 384, 2, 3, 16)


@every
def test_sums_of_128_products_are_added_in_float32(index):
    """A unit that cuts its sums drops 0.75 beside 2^23; what the threads add is rounded."""
    x, weight = torch.zeros(DEEP.input_shape), torch.zeros(DEEP.weight_shape)
    x[:, :128] = weight[:, :128] = 256.0  # 128 products of 2^16
    x[:, 128], weight[:, 128] = 0.75, 1.0
    x[:, 256], weight[:, 256] = 0.75, 1.0
    one = torch.ones(DEEP.k)
    x, weight = (lay_out(t.to(E4M3), "nhwc") for t in (x, weight))
    for out in OUTS:
        given = Fp8Operands(x, weight, one, -(2.0**23) * one, None, 1.0, 1.0, out)
        y, _ = run(DEEP, given, index, schedule=Schedule(rounding="toward_zero"))
        assert (y.float() == 2).all(), "not added up in parts of 128"


WIDE = ConvCase("wide", 2, 64, 18, 15, 336)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("tma_s192x128_4s_2c", NAMED["many"]), ("tma_s192x128_4s_2p", WIDE),
        ("tma_s128x128_6s_2c_2p", WIDE), ("tma_s64x128_8s_2c_2p", WIDE),
        ("tma_s64x64_12s_t_2c_2p", dataclasses.replace(WIDE, k=304)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_blocks_that_share_walk_side_by_side(name, case, reverse):
    """Of odd numbers of tiles of pixels or channels the last cluster's last blocks have none, and
    take part."""
    index = next(i for i, tile in enumerate(tiles()) if tile["name"] == name)
    filters, pixels = sharing(name)
    blocks = filters * pixels
    wide, high = pixels * tiles()[index]["n"], filters * tiles()[index]["m"]
    columns = -(-case.k // wide)
    clusters = -(-540 // high) * columns
    given = operands(case, E4M3)
    two = (2 * blocks + 1, *emulated.H200[1:])  # clusters, and one multiprocessor alone
    for gpu, many in ((emulated.H200, clusters), (two, 2), ((1, *two[1:]), 1)):
        y, report = run(case, given, index, gpu=gpu, reverse=reverse, resident_blocks=2 * blocks)
        assert report["plan"]["blocks"] == many * blocks and wrong(case, given, y) is None
    y, _ = run(case, given, index, gpu=two, reverse=reverse, blocks=(0, blocks - 1))
    there = ~y.float().permute(0, 2, 3, 1).reshape(-1, case.k).isnan()
    pixel, channel = torch.arange(len(there))[:, None], torch.arange(case.k)[None]
    tile = pixel // high * columns + channel // wide
    assert torch.equal(there, (clusters - 1 - tile if reverse else tile) % 2 == 0)


def test_the_bound_for_14_bits_is_for_sums_in_parts():
    """What `accumulation="narrow"` allows, of a unit that cuts its sum at each of its products."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.rand(1, 4608, 1, 1, generator=generator).to(E4M3) for _ in range(2))
    one, zero = torch.ones(1), torch.zeros(1)
    oracle = numerics.conv_bn_act_fp8_oracle(x, weight, one, zero)
    bound = numerics.conv_bn_act_fp8_bound(
        x, weight, one, zero, None, oracle, out_dtype=torch.float32, accumulation="narrow"
    )

    def cut(value: float) -> float:
        """To 14 bits."""
        unit = 2.0 ** (math.frexp(value)[1] - 14)
        return math.floor(value / unit) * unit

    products = (x.double() * weight.double()).view(-1, 32).sum(1).tolist()  # by an instruction each
    whole = part = total = 0.0
    for place, product in enumerate(products):
        whole, part = cut(whole + product), cut(part + product)
        if place % 4 == 3:
            total, part = total + part, 0.0
    assert abs(total - oracle.item()) <= bound.item() < abs(whole - oracle.item())


@every
@pytest.mark.parametrize("out", OUTS, ids=str)
def test_nan_stays_and_infinity_saturates(index, out):
    """NaN in x and in the shortcut, infinite scales, and NaN beside x that nobody may read."""
    case = NAMED["3x3_dilated"]
    given = operands(case, out, layout="padded")
    x, residual = given.x.float(), given.residual.float()
    x[0, 3, 4, 5], residual[0, 9, 2, 2] = torch.nan, torch.nan
    scale, shift = given.scale.clone(), given.shift.clone()
    shift[5], shift[6] = torch.inf, -torch.inf
    given = dataclasses.replace(
        given, x=lay_out(x.to(E4M3), "padded"), residual=lay_out(residual.to(E4M3), "nhwc"),
        scale=scale, shift=shift,
    )  # fmt: skip
    y, _ = run(case, given, index, schedule=Schedule("lazy", "reverse"))
    oracle = given.oracle(case)
    assert oracle.isnan().any() and not oracle.isnan().all()
    assert torch.equal(y.float().isnan(), oracle.isnan())
    assert given.check(case, y).ok
    if out is E4M3:
        assert (y[:, 5][~oracle[:, 5].isnan()].float() == 448).all()


@every
def test_what_lies_beside_a_group_is_not_read(index):
    case = NAMED["groups"]
    given = operands(case, E4M3)
    x = given.x.float()
    x[:, :128] = torch.nan
    given = dataclasses.replace(given, x=lay_out(x.to(E4M3), "nhwc"))
    y, _ = run(case, given, index)
    assert y[:, :80].float().isnan().all()
    assert torch.equal(y[:, 80:].float(), given.expected(case)[:, 80:].float())


LAYERS = (
    ConvCase("layer1.conv3", 1, 64, 16, 16, 256, residual=True),
    ConvCase("layer2.conv2", 1, 128, 8, 12, 128, 3, 3, (1, 1), (1, 1)),
)


@every
@pytest.mark.parametrize("out", OUTS[:2], ids=str)
@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)
def test_what_it_costs(index, case, out):
    """No bank conflict; of memory nothing but what the layer has, each byte of it."""
    given = operands(case, out)
    y, report = run(case, given, index, counting=True)
    assert wrong(case, given, y) is None
    assert report["counters"]["bank_conflicts"] == 0
    roof = sum(t.nbytes for t in (*given.tuple(), y) if t is not None)
    moved = sum(t["unique_bytes_read"] for t in report["tensors"].values())
    moved += sum(t["unique_bytes_written"] for t in report["tensors"].values())
    assert 0.999 * roof <= moved <= 1.1 * roof, report["tensors"]
    assert report["counters"]["global_store_bytes_asked"] == y.nbytes
    # Pixels as often as there are taps and tiles of channels, filters for each tile of pixels; what
    # a cluster shares once for all of its blocks.
    copies = [s for s in report["sites"] if s["instruction"].startswith("cp.async.bulk.tensor")]
    loaded = sum(site["counters"]["global_load_bytes_asked"] for site in copies)
    share_filters, share_pixels = sharing(tiles()[index]["name"])
    columns = -(-case.k // (tiles()[index]["n"] * share_pixels))
    rows = -(-case.n * case.p * case.q // (tiles()[index]["m"] * share_filters))
    pixels = given.x.nbytes * case.r * case.s * columns
    residual = 0 if given.residual is None else given.residual.nbytes
    assert 0.8 * pixels <= loaded - given.weight.nbytes * rows - residual <= pixels


def planned(case, given, index=-1, splits=0, gpu=emulated.H200, **changes):
    """The plan for operands, some of them changed."""
    given = dataclasses.replace(given, **changes)
    out = lay_out(torch.zeros(case.output_shape).to(given.out_dtype), "nhwc")
    geometry = (list(case.stride), list(case.padding), list(case.dilation), case.groups)
    made = problem_of(*given.tuple(), out, *geometry, case.act, 1.0, 1.0)
    return getattr(emulated.load(), f"{OP}_plan")(made, gpu, index, splits)


def test_what_tma_or_the_kernel_cannot_take_is_refused_in_words():
    case = NAMED["1x1"]
    given = operands(case, E4M3)
    refused = [
        (case, {"x": given.x.contiguous()}, "x: its channels are not adjacent"),
        (case, {"weight": lay_out(given.weight, "unaligned")}, "weight: address is"),
        (case, {"residual": given.residual.contiguous()}, "residual: its channels are not"),
        (case, {"residual": given.residual.half()}, "residual: float16; float8_e4m3fn is served"),
        (case, {"out_dtype": torch.float32}, "out: float32; float8_e4m3fn, bfloat16 and float16"),
        (ConvCase("c", 1, 24, 5, 5, 16), None, "x: strides"),
        (ConvCase("k", 1, 16, 5, 5, 24), None, "out: strides"),
        (ConvCase("g", 1, 128, 5, 5, 64, groups=2), None, "groups: 64 channels of each"),
        (ConvCase("s", 1, 16, 5, 20, 16, stride=(1, 9)), None, "stride: 9"),
    ]
    for shape, changes, said in refused:
        those = given if changes is not None else operands(shape, E4M3)
        for index in range(-1, CONFIGURATIONS):
            with pytest.raises(ValueError, match=said) as error:
                planned(shape, those, index, **(changes or {}))
            assert index < 0 or tiles()[index]["name"] in str(error.value) or ";" in said
    with pytest.raises(ValueError, match="splits: only 1 is served by TMA"):
        planned(case, given, 0, 2)
    for gpu in (emulated.A100, emulated.H200[:3], (*emulated.H200[:3], 100)):
        with pytest.raises(ValueError, match="for GPUs of capability 9.0"):
            planned(case, given, gpu=gpu)


def test_wide_channels_are_whole_in_fewer():
    """16 bytes of a wide result are 8 channels of it."""
    case = ConvCase("k", 1, 16, 5, 5, 24)
    for index in range(CONFIGURATIONS):
        given = operands(case, torch.float16)
        y, _ = run(case, given, index)
        assert wrong(case, given, y) is None


def on_meta(case):
    """The plan's problem of a layer without memory."""
    x, weight, out = (
        torch.empty(shape, dtype=E4M3, device="meta").contiguous(memory_format=torch.channels_last)
        for shape in (case.input_shape, case.weight_shape, case.output_shape)
    )
    vector, residual = torch.empty(case.k, device="meta"), out if case.residual else None
    geometry = (list(case.stride), list(case.padding), list(case.dilation), case.groups)
    return problem_of(x, weight, vector, vector, residual, out, *geometry, case.act, 1.0, 1.0)


def test_the_layers_of_resnet50_are_served_by_them():
    taken = set()
    for layer, batch in itertools.product(cases.RESNET50_LAYERS[1:], (1, 4, 32, 256)):
        made = on_meta(dataclasses.replace(layer, n=batch))
        found = getattr(emulated.load(), f"{OP}_plan")(made, emulated.H200, -1, 0)
        taken.add(table()[found["configuration"]]["name"])
        assert "least predicted time" in found["why"]
        small = layer.c == 64 and layer.r == 3
        assert (found["configuration"] in windows()) == small, (layer, batch)
    assert len(taken) == len(table()), taken


def test_what_does_not_lie_in_channels_last_is_copied():
    case = NAMED["3x3"]
    given = operands(case, E4M3)
    plain = dataclasses.replace(
        given, x=given.x.contiguous(), weight=given.weight.contiguous(),
        residual=given.residual.contiguous(),
    )  # fmt: skip
    y = overload(OP, emulated.NAME)(*plain.tuple(), *plain.options(case))
    assert y.is_contiguous() and torch.equal(y.float(), given.expected(case).float())


def test_several_launches_share_a_batch():
    """A launch counts its pixels in 31 bits."""
    made = on_meta(ConvCase("huge", 100_000, 16, 224, 224, 16))
    found = getattr(emulated.load(), f"{OP}_plan")(made, emulated.H200, TURNS, 0)
    assert found["launches"] == 3 and found["blocks"] == 132
