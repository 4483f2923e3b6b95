"""Every fault that the emulator can plant in conv_bn_act by clusters is noticed."""

from __future__ import annotations

import functools

import conv_by_tma
import emulated
import emulated_shapes
import mutants
import pytest
from mutants import Mutant, Trial

from resnet_fused.cases import ConvCase

pytestmark = pytest.mark.emulated

CHUNKS = 2
# (splits, what is tried): shares that differ and go round the ring; with the two ways to come by
# pixels, with and without a shortcut; tiles that end within a share.
WAYS = {
    2: (
        "tma_cluster112x64_4s",
        ConvCase("taps", 1, 72, 9, 7, 72, 3, 3, (1, 1), (1, 1), residual=True),
    ),
    4: ("tma_cluster56x64_6s", ConvCase("dense", 2, 328, 5, 6, 72)),
}
FILES = {
    "cluster_tile.h",
    "conv_bn_act_cluster_sm90.cuh",
    "conv_bn_act_sm90.cuh",
    "pipeline.h",
    "tap_steps.h",
    "warpgroup_tile.h",
}
# (file, the line's text, instruction, fault) -> why the fault does no harm there.
HARMLESS: dict[tuple[str, str, str, str], str] = {
    (
        "conv_bn_act_cluster_sm90.cuh", "ptx::barrier_sync(1, kWarpgroupThreads);", "bar.sync",
        "skip",
    ): (
        "in the emulator one warp's wait is a wait for the whole product; PTX says of "
        "wgmma.wait_group what the executing threads may rely on, so that here all four meet"
    ),
}  # fmt: skip


@functools.cache
def found() -> dict[Mutant, list[Trial]]:
    """Every mutant, with the trials that reach it. Clean runs pass."""
    trials: list[Trial] = []
    for splits, way in WAYS.items():
        trials += conv_by_tma.trials((way,), ("taps",), emulated.H200, splits)
    case, given, expected = conv_by_tma.in_rank_order()
    settings = {**trials[-1].settings, "splits": 4}
    call = functools.partial(emulated_shapes.call, conv_by_tma.OP, case, given)
    trials.append(Trial("in the order of ranks", call, given, mutants._bits(expected), settings))
    return mutants.reached(trials)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_fault_is_noticed(chunk):
    mutants.check(found(), HARMLESS, chunk, CHUNKS)


def test_every_file_takes_part_with_what_it_is_made_of():
    assert {key[0] for key in (mutant.key for mutant in found())} == FILES
    assert set(HARMLESS) <= {mutant.key for mutant in found()}
    planted = {(mutant.instruction, mutant.fault) for mutant in found()}
    for wanted in (
        ("barrier.cluster.arrive", "skip"), ("barrier.cluster.wait", "skip"),
        ("ld.shared::cluster", "row_off"), ("mapa", "wrong_lane"), ("bar.sync", "skip"),
        ("mbarrier.try_wait.parity", "skip"), ("mbarrier.arrive.expect_tx", "wrong_bytes"),
        ("wgmma.a", "row_off"), ("wgmma.wait_group", "wait_one_fewer"), ("st.shared", "skip"),
        ("griddepcontrol.wait", "skip"), ("cp.async.bulk.tensor.im2col", "coordinate_off"),
    ):  # fmt: skip
        assert wanted in planted, wanted
    assert len(found()) > 60
