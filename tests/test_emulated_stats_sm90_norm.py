"""conv_bn_stats by TMA and wgmma behind a BatchNorm, emulated: pixels are transformed in shared
memory, between TMA and the products."""

from __future__ import annotations

import dataclasses

import emulated
import pytest
import test_emulated_stats as stats_tests
import torch
from conv_by_tma import CASES, DTYPES, FEW
from emulated import Schedule
from test_emulated_stats import operands, planned, require, require_stats
from test_emulated_stats_sm90 import NAMED, name_of, run, tiles
from test_emulated_stats_sm90 import NAMES as ALL

from resnet_fused import cases, numerics
from resnet_fused.cases import ConvCase

pytestmark = pytest.mark.emulated

SHARING = tuple(name for name in ALL if name.endswith(("_2c", "_2p")))
NAMES = tuple(name for name in ALL if name not in SHARING)
every = pytest.mark.parametrize("name", NAMES)


@every
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_bit_is_right(name, case):
    """On integers. Padding taken for relu(shift) would show, and so would what lies behind the last
    channel: norm's mean is NaN."""
    number = CASES.index(case) * len(NAMES) + NAMES.index(name)
    given = operands(case, DTYPES[number % 2])
    assert given[1][2:].isnan().all()
    schedule = dataclasses.replace(emulated.SCHEDULES[number % 9], seed=number)
    few = number % 3 != 0
    y, stats, _ = run(
        case, given, name, schedule=schedule, gpu=FEW if few else emulated.H200, resident_blocks=2
    )
    require(case, *given, y, stats)


@every
def test_noise_is_within_the_bound(name):
    """Not on integers: h is rounded as if it had been stored."""
    case = NAMED["3x3_wide"]
    for dtype in DTYPES:
        x, norm, weight = operands(case, dtype, exact=False)
        oracle = numerics.conv_bn_stats_oracle(x, norm, weight, **case.geometry)
        bound = numerics.conv_bn_stats_bound(x, norm, weight, oracle, **case.geometry)
        y, stats, _ = run(case, (x, norm, weight), name, gpu=FEW)
        found = numerics.check_bound(y, oracle, bound)
        assert found.ok, str(found)
        require_stats(y, stats)


@every
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_stays_where_it_is(name, value):
    """In x, in scale and in shift: a ReLU keeps a NaN, and takes -Inf away."""
    case = NAMED["3x3_stride2"]
    for place in ("x", "scale", "shift"):
        x, norm, weight = operands(case, torch.bfloat16)
        norm[:2, 5] = 1
        if place == "x":
            x[1, 5, 6, 4] = value
        else:
            norm[("scale", "shift").index(place), 5] = value
        y, _, _ = run(case, (x, norm, weight), name, gpu=FEW)
        oracle = numerics.conv_bn_stats_oracle(x, norm, weight, **case.geometry)
        assert torch.equal(y.isnan(), oracle.isnan())
        assert torch.equal(y.isinf(), oracle.isinf())


def test_the_same_bits_in_every_order():
    case = NAMED["3x3_wide"]
    given = operands(case, torch.float16, exact=False)
    for name in NAMES:
        results = [
            run(case, given, name, schedule=order, gpu=(5, *emulated.H200[1:]), resident_blocks=4)
            for order in (Schedule(), Schedule("lazy", "reverse"), Schedule("random", "shuffled"))
        ]
        for y, stats, _ in results[1:]:
            assert torch.equal(y, results[0][0]) and torch.equal(stats, results[0][1])


@every
def test_what_it_costs(name):
    """No bank conflict; each byte of memory that the layer has."""
    case = ConvCase("layer2.conv2", 1, 128, 8, 48, 128, 3, 3, (1, 1), (1, 1))
    given = operands(case, torch.bfloat16)
    y, stats, report = run(case, given, name, counting=True)
    require(case, *given, y, stats)
    assert report["counters"]["bank_conflicts"] == 0
    tensors = report["tensors"]
    assert tensors["x"]["unique_bytes_read"] == given[0].nbytes
    assert tensors["norm"]["unique_bytes_read"] == 2 * case.c * 4
    assert tensors["weight"]["unique_bytes_read"] == given[2].nbytes
    assert tensors["y"]["unique_bytes_written"] == y.nbytes


def test_strided_images_are_right():
    """x within a wider and longer image: any strides do."""
    case = NAMED["1x1"]
    x, norm, weight = operands(case, torch.bfloat16)
    room = torch.full((2, 12, 20, 80), torch.nan, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    given = (room[:, 8:80, 1:10, 2:20:2].copy_(x), norm, weight)
    for name in NAMES:
        y, stats, _ = run(case, given, name, gpu=FEW)
        require(case, *given, y, stats)


# The plan.


def test_channels_and_addresses_that_threads_cannot_load():
    """Twelve channels of sixteen, which TMA would take; a norm between two multiples of 16."""
    case = ConvCase("slices", 1, 12, 9, 8, 16)
    x, norm, weight = operands(case, torch.bfloat16)
    wide = [t.new_zeros(t.shape[0], 16, *t.shape[2:]).to(memory_format=torch.channels_last)
            for t in (x, weight)]  # fmt: skip
    x, weight = (room[:, :12].copy_(t) for room, t in zip(wide, (x, weight), strict=True))
    index = tiles()[NAMES[0]]["index"]
    for given, said in (
        ((x, norm, weight), "norm: 12 channels; a multiple of 8 is accepted"),
        ((wide[0], torch.zeros(4 * 16 + 1)[1:].view(4, 16), wide[1]), "norm: address is not"),
    ):
        one = dataclasses.replace(case, c=given[0].shape[1])
        with pytest.raises(ValueError, match=said):
            run(one, given, NAMES[0])
        y, stats, report = stats_tests.call(one, *given)
        assert report["plan"]["configuration"] != index
        require(one, *given, y, stats)


def test_which_layers_they_serve():
    """At batch 256 all but 3x3 layers of stride 1, which are in windows, and 1x1 layers whose
    filters stay."""
    taken = set()
    for case in cases.RESNET50_LAYERS:
        made = planned(dataclasses.replace(case, n=256))
        if case.c % 8 != 0:
            continue
        assert "no TMA" not in made["why"]
        windows = case.r == 3 and case.stride == (1, 1)
        stays = name_of(made).startswith("tma_stay")
        assert not stays or case.r == 1
        assert (name_of(made) in NAMES) != (windows or stays), (case.name, made["why"])
        taken.add(name_of(made))
    assert len(taken & set(NAMES)) >= 2, taken


@pytest.mark.parametrize("name", SHARING)
def test_blocks_that_share_operands_transform_nothing(name):
    """They release a stage without any order."""
    with pytest.raises(ValueError, match="norm: not read through by blocks that share filters or"):
        planned(stats_tests.LAYER1, configuration=tiles()[name]["index"])
