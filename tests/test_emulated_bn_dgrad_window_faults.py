"""Every fault that the emulator can plant in conv_bn_dgrad by windows on wgmma is noticed."""

from __future__ import annotations

import functools

import emulated
import emulated_shapes
import mutants
import mutants_bn_dgrad
import pytest
from mutants import HOSTILE, Mutant, Trial
from test_emulated_bn_dgrad_window import SMALL, WAYS, WIDE, image, operands

from resnet_fused.ops._library import overload

pytestmark = pytest.mark.emulated

CHUNKS = 4
ONE = (1, *emulated.H200[1:])
"""One block takes all tiles, so that every window is used again."""
CHUNKED = image("chunks", 1, 80, 80)
# (configuration, case, what takes part, on noise too): five tiles and more, windows of two parts
# and of three; two columns of channels; one chunk more than one.
TRIALS = (
    (SMALL, image("all", 3, 12, 11), "all", True),
    (SMALL, image("parts", 1, 6, 80, 128), "layer", False),
    (WIDE, image("shortcut", 2, 20, 25), "shortcut", False),
    (SMALL, image("plain", 2, 12, 19), "plain", False),
    (SMALL, CHUNKED, "layer", False),
)
FILES = {
    "affine_window.h",
    "bn_dgrad_window_end.h",
    "channel_lanes.h",
    "conv_bn_act_window_sm90.cuh",
    "conv_bn_dgrad_window_sm90.cuh",
    "merge_chunks.h",
    "merge_gradients.h",
    "pipeline.h",
    "transform_ring.h",
    "warpgroup_epilogue.h",
    "window_epilogue.h",
}
TURNS = "who multiplies first is a matter of time: each warpgroup has a window of its own"
KERNEL = "conv_bn_act_window_sm90.cuh"
# (file, the line's text, instruction, fault) -> why the fault does no harm there.
HARMLESS: dict[tuple[str, str, str, str], str] = {
    (
        "pipeline.h", "ptx::mbarrier_wait_parity(mine_, parity_);", "mbarrier.try_wait.parity",
        "skip",
    ): TURNS,
    (KERNEL, "ptx::wgmma_wait_group<1>();", "wgmma.wait_group", "skip"): TURNS,
    (KERNEL, "ptx::wgmma_wait_group<1>();", "wgmma.wait_group", "wait_one_fewer"): TURNS,
    (
        KERNEL, "if (tap == kWindowTaps - 1) ptx::wgmma_commit_group();", "wgmma.commit_group",
        "skip",
    ): TURNS,
    ("bn_dgrad_window_end.h", "ptx::sync_warp();", "bar.warp.sync", "skip"): (
        "the warp meets again behind what one of its lanes did"
    ),
    ("merge_chunks.h", "ptx::fence_acq_rel_gpu();", "fence.acq_rel", "no_fence"): (
        "the atomic of acquire and release between the barriers is enough"
    ),
}  # fmt: skip


def trials(ways=TRIALS) -> list[Trial]:
    made = []
    index = {tile["name"]: i for i, tile in enumerate(emulated_shapes.tiles(mutants_bn_dgrad.OP))}
    for name, case, way, noisy in ways:
        gpu = emulated.H200 if case is CHUNKED else ONE  # sums of blocks that meet
        for exact in (True, False) if noisy else (True,):
            dtype = emulated.DTYPES[mutants_bn_dgrad.OP][1 if exact else 2]
            given = operands(case, dtype, exact=exact, **WAYS[way])
            if given.norm is not None:
                given.norm[3] = 0  # not NaN, which no comparison finds unchanged
            call = functools.partial(
                overload(mutants_bn_dgrad.OP, emulated.NAME), *given, list(case.input_shape), True,
                1, *emulated_shapes.geometry_args(case)[:4],
            )  # fmt: skip
            for schedule in HOSTILE if exact else HOSTILE[-1:]:
                settings = {
                    "schedule": schedule, "configuration": index[name], "splits": 1, "gpu": gpu,
                    "resident_blocks": 2,
                }  # fmt: skip
                judged = mutants_bn_dgrad._judged(case, given, exact)
                label = f"{name} {case.name} exact={exact} {schedule}"
                made.append(Trial(label, call, tuple(given), judged, settings))
    return made


@functools.cache
def found() -> dict[Mutant, list[Trial]]:
    """Every mutant, with the trials that reach it. Clean runs pass."""
    return mutants.reached(trials())


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_fault_is_noticed(chunk):
    mutants.check(found(), HARMLESS, chunk, CHUNKS)


def test_every_file_takes_part_with_what_it_is_made_of():
    assert {key[0] for key in (mutant.key for mutant in found())} == FILES
    assert set(HARMLESS) <= {mutant.key for mutant in found()}
    planted = {(mutant.instruction, mutant.fault) for mutant in found()}
    for wanted in (
        ("fence.proxy.async", "no_fence"), ("mbarrier.init", "wrong_count"),
        ("mbarrier.try_wait.parity", "skip"), ("mbarrier.arrive.expect_tx", "wrong_bytes"),
        ("wgmma.a", "row_off"), ("wgmma.b", "row_off"), ("wgmma.wait_group", "wait_one_fewer"),
        ("cp.async.bulk.tensor.im2col", "coordinate_off"), ("bar.sync", "skip"),
        ("shfl.sync.bfly", "wrong_lane"), ("vote.sync.ballot", "skip"), ("st.shared", "skip"),
    ):  # fmt: skip
        assert wanted in planted, planted
    assert len(found()) > 80
