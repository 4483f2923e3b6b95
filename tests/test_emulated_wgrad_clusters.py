"""conv_wgrad and conv_bn_wgrad by TMA and wgmma, emulated: clusters of blocks that share what they
read. Numbers, costs and faults of each are in the tests of all configurations by TMA."""

from __future__ import annotations

import dataclasses

import emulated
import pytest
import test_emulated_wgrad as bn
import torch
import wgrad_by_tma
from dgrad_by_tma import layer, operands
from emulated import Schedule
from wgrad_by_tma import sharing

from resnet_fused import cases
from resnet_fused.cases import ConvCase

pytestmark = pytest.mark.emulated

BASE = "tma_128x256_3s"
SHARED = (f"{BASE}_2d", f"{BASE}_2x", f"{BASE}_2d_2x")
every = pytest.mark.parametrize("name", SHARED)
# Tiles of 128 by 256: an odd number of each, of groups, and more than lie in a band of them.
CASES = (
    ConvCase("even", 3, 264, 17, 17, 136),
    ConvCase("odd", 3, 520, 13, 11, 264),
    ConvCase("taps", 4, 72, 26, 24, 136, 3, 3, (2, 1), (1, 1)),
    ConvCase("groups", 2, 528, 9, 9, 272, groups=2),
    ConvCase("bands", 1, 520, 9, 9, 1160),
)


def index_of(name: str, op: str = "conv_wgrad") -> int:
    tiles = getattr(emulated.load(), f"{op}_configurations")()
    return [tile["name"] for tile in tiles].index(name)


def test_they_are_all_that_share():
    """What a name says, of both ops."""
    for op in ("conv_wgrad", "conv_bn_wgrad"):
        tiles = getattr(emulated.load(), f"{op}_configurations")()
        assert {t["name"] for t in tiles if t["tma"] and sharing(t) != (1, 1)} == set(SHARED)
    assert [sharing({"name": name}) for name in SHARED] == [(2, 1), (1, 2), (2, 2)]


@every
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_same_bits_as_alone(name, case):
    """On noise, under every schedule: a block's products, and their order, are a lone one's."""
    given = operands(case, torch.bfloat16, exact=False)
    splits = 2 if case.name != "bands" else 1
    alone, _ = wgrad_by_tma.run(case, given, index_of(BASE), splits=splits)
    orders = (Schedule(), Schedule("lazy", "reverse"), Schedule("random", "shuffled", seed=5))
    for order in orders:
        got, _ = wgrad_by_tma.run(case, given, index_of(name), schedule=order, splits=splits)
        assert torch.equal(got, alone), order


@every
def test_behind_a_batch_norm_too(name):
    """dz through BatchNorm's backward; few blocks at a time."""
    case = CASES[1]
    given = bn.exact(case, torch.float16, norm=False)
    got, report = bn.call(
        case, given, configuration=index_of(name, "conv_bn_wgrad"), splits=2, resident_blocks=4,
        schedule=Schedule("random", "shuffled", seed=1),
    )  # fmt: skip
    bn.require(case, given, got)
    assert report["counters"]["bank_conflicts"] == 0
    used = {site["instruction"] for site in report["sites"]}
    assert "cp.async.bulk.tensor.tile.multicast" in used
    assert ("cp.async.bulk.tensor.tile" in used) == (name != SHARED[2])


@every
def test_what_is_asked_of_l2(name):
    """Of tiles that fill their clusters: each operand once for those that share it."""
    case = ConvCase("full", 1, 512, 16, 16, 256)
    given = operands(case, torch.bfloat16)
    dy, y, x = given[:3]
    asked = {}
    for one in (BASE, name):
        _, report = wgrad_by_tma.run(case, given, index_of(one), counting=True)
        assert report["counters"]["bank_conflicts"] == 0
        copies = [s for s in report["sites"] if s["instruction"].startswith("cp.async.bulk.tensor")]
        asked[one] = sum(site["counters"]["global_load_bytes_asked"] for site in copies)
    left, right = sharing({"name": name})
    assert asked[BASE] == 2 * (dy.nbytes + y.nbytes + x.nbytes)
    assert asked[name] == 2 // left * (dy.nbytes + y.nbytes) + 2 // right * x.nbytes


def planned(case, name=None, batch=256, op="conv_bn_wgrad", **options):
    case = dataclasses.replace(case, n=batch)
    index = -1 if name is None else index_of(name, op)
    if op == "conv_wgrad":
        return wgrad_by_tma.planned(layer(case, batch), index, **options)
    return bn.planned(case, prologue=False, configuration=index, **options)


DEEP = ConvCase("layer3.conv1", 256, 1024, 14, 14, 256)


@pytest.mark.parametrize("op", ["conv_wgrad", "conv_bn_wgrad"])
def test_deep_1x1_layers_take_them(op):
    """Least L2 for a product: a step of both is bound by shared memory, 1,280 cycles."""
    made = planned(DEEP, op=op)
    assert made["configuration"] == index_of(SHARED[2], op), made["why"]
    alone, left, right = (planned(DEEP, name, op=op) for name in (BASE, SHARED[0], SHARED[1]))
    assert made["cycles"] < 0.65 * alone["cycles"]
    assert made["cycles"] < left["cycles"] < alone["cycles"]
    assert left["cycles"] == pytest.approx(right["cycles"])
    # Two clusters have all tiles of a part; 32 of them run at once, and more want another round.
    assert made["splits"] == 16 and made["blocks"] == 128
    wider = planned(DEEP, SHARED[2], op=op, splits=17)
    assert wider["blocks"] == 136 and wider["cycles"] > 1.5 * made["cycles"]


def test_which_layers_take_them():
    """Of ResNet-50's that read x as it is: where both sides have several tiles, or the one does."""
    taken = {}
    for case in cases.RESNET50_LAYERS:
        made = planned(case)
        name = bn.configurations()[made["configuration"]]["name"]
        if name in SHARED:
            taken[case.name] = name
            wide, high = case.c * case.r * case.s > 256, case.k > 128
            left, right = sharing({"name": name})
            assert (left == 1 or wide) and (right == 1 or high), (case.name, name)
    assert set(taken.values()) == set(SHARED), taken


def test_a_cluster_without_a_second_tile_is_predicted_worse():
    """128 output channels by 256 columns are one tile: the others would take part for nothing."""
    one = ConvCase("one", 256, 256, 14, 14, 128)
    alone = planned(one, BASE)["cycles"]
    assert all(planned(one, name)["cycles"] > alone for name in SHARED)
    assert planned(one)["configuration"] not in {index_of(n, "conv_bn_wgrad") for n in SHARED}


def test_a_gpu_of_one_multiprocessor_is_planned_for():
    small = (1, *emulated.H200[1:])
    made = planned(DEEP, SHARED[2], batch=1, gpu=small)
    assert made["blocks"] % 4 == 0 and made["cycles"] > 0
