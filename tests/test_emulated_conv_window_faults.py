"""Every fault that the emulator can plant in conv_bn_act by windows is noticed."""

from __future__ import annotations

import functools

import conv_by_tma
import emulated
import mutants
import pytest
from mutants import Mutant, Trial

from resnet_fused.cases import ConvCase

pytestmark = pytest.mark.emulated

CHUNKS = 2
ONE = (1, *emulated.H200[1:])
"""One block takes all tiles of a column, so that every window is used again."""
# Five tiles and more, with and without a shortcut; windows of one part and of two.
WAYS = (
    (
        "tma_win96x64_2w",
        ConvCase("shortcut", 3, 64, 12, 11, 64, 3, 3, (1, 1), (1, 1), residual=True),
    ),
    ("tma_win96x64_2w", ConvCase("plain", 1, 64, 6, 80, 128, 3, 3, (1, 1), (1, 1))),
)
FILES = {
    "conv_bn_act_window_sm90.cuh",
    "pipeline.h",
    "warpgroup_epilogue.h",
    "warpgroup_tile.h",
    "window_epilogue.h",
}
# (file, the line's text, instruction, fault) -> why the fault does no harm there.
TURNS = "who multiplies first is a matter of time: each warpgroup has a window of its own"
HARMLESS: dict[tuple[str, str, str, str], str] = {
    (
        "pipeline.h", "ptx::mbarrier_wait_parity(mine_, parity_);", "mbarrier.try_wait.parity",
        "skip",
    ): TURNS,
    (
        "conv_bn_act_window_sm90.cuh", "ptx::wgmma_wait_group<1>();", "wgmma.wait_group", "skip"
    ): TURNS,
    (
        "conv_bn_act_window_sm90.cuh", "ptx::wgmma_wait_group<1>();", "wgmma.wait_group",
        "wait_one_fewer",
    ): TURNS,
    (
        "conv_bn_act_window_sm90.cuh",
        "if (tap == kWindowTaps - 1) ptx::wgmma_commit_group();",
        "wgmma.commit_group",
        "skip",
    ): TURNS,
    ("window_epilogue.h", "ptx::sync_warp();", "bar.warp.sync", "skip"): (
        "the warp meets again behind what one of its lanes did; fibers wait for each other at the "
        "next instruction of the warp in any case"
    ),
}  # fmt: skip


@functools.cache
def found() -> dict[Mutant, list[Trial]]:
    """Every mutant, with the trials that reach it. Clean runs pass."""
    return mutants.reached(conv_by_tma.trials(WAYS, noisy=("shortcut",), gpu=ONE))


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_fault_is_noticed(chunk):
    mutants.check(found(), HARMLESS, chunk, CHUNKS)


def test_every_file_takes_part_with_what_it_is_made_of():
    assert {key[0] for key in (mutant.key for mutant in found())} == FILES
    assert set(HARMLESS) <= {mutant.key for mutant in found()}
    planted = {(mutant.instruction, mutant.fault) for mutant in found()}
    for wanted in (
        ("mbarrier.try_wait.parity", "skip"), ("mbarrier.arrive.expect_tx", "wrong_bytes"),
        ("wgmma.a", "row_off"), ("wgmma.b", "row_off"), ("wgmma.b", "stride_off"),
        ("wgmma.wait_group", "wait_one_fewer"), ("griddepcontrol.wait", "skip"),
        ("cp.async.bulk.tensor.im2col", "coordinate_off"), ("bar.sync", "skip"),
    ):  # fmt: skip
        assert wanted in planted
    assert len(found()) > 70
