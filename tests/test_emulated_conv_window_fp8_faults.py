"""Every fault that the emulator can plant in conv_bn_act_fp8 by windows is noticed."""

from __future__ import annotations

import functools

import emulated
import mutants
import pytest
from conv_fp8_by_tma import trials
from mutants import Mutant, Trial
from test_emulated_conv_window import conv3x3

pytestmark = pytest.mark.emulated

CHUNKS = 3
ONE = (1, *emulated.H200[1:])
"""One block takes all tiles of a column, so that every window is used again."""
# (configuration, case, places of the result's types). Five tiles and more, with and without a
# shortcut, of either width of the result; windows of one part and of two.
WAYS = (
    ("tma_win96x64_2w", conv3x3("shortcut", 3, 12, 11, residual=True), (0, 1)),
    ("tma_win96x64_2w", conv3x3("plain", 1, 6, 80, 128), (0,)),
)
FILES = {
    "conv_bn_act_window_sm90.cuh",
    "pipeline.h",
    "quantised_epilogue.h",
    "warpgroup_epilogue.h",
    "warpgroup_tile.h",
    "window_epilogue.h",
}
TURNS = "who multiplies first is a matter of time: each warpgroup has a window of its own"
# (file, the line's text, instruction, fault) -> why the fault does no harm there.
HARMLESS: dict[tuple[str, str, str, str], str] = {
    (
        "pipeline.h", "ptx::mbarrier_wait_parity(mine_, parity_);", "mbarrier.try_wait.parity",
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
    return mutants.reached(trials(WAYS, ONE))


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_fault_is_noticed(chunk):
    mutants.check(found(), HARMLESS, chunk, CHUNKS)


def test_every_file_takes_part_with_what_it_is_made_of():
    assert {key[0] for key in (mutant.key for mutant in found())} == FILES
    assert set(HARMLESS) <= {mutant.key for mutant in found()}
    planted = {(mutant.instruction, mutant.fault) for mutant in found()}
    for wanted in (
        ("mbarrier.try_wait.parity", "skip"), ("mbarrier.arrive.expect_tx", "wrong_bytes"),
        ("wgmma.e4m3", "skip"), ("wgmma.e4m3", "stale_accumulator"), ("wgmma.a", "row_off"),
        ("wgmma.b", "chunk_off"), ("wgmma.b", "stride_off"), ("wgmma.fence", "skip"),
        ("wgmma.wait_group", "wait_one_fewer"), ("griddepcontrol.wait", "skip"),
        ("cp.async.bulk.tensor.im2col", "coordinate_off"), ("bar.sync", "skip"),
    ):  # fmt: skip
        assert wanted in planted
    assert len(found()) > 80
