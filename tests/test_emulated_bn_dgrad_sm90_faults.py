"""Every fault that the emulator can plant in conv_bn_dgrad by TMA and wgmma is noticed."""

from __future__ import annotations

import functools

import emulated
import emulated_shapes
import mutants
import mutants_bn_dgrad
import pytest
from mutants import HOSTILE, Mutant, Trial

from resnet_fused.cases import ConvCase
from resnet_fused.ops._library import overload

pytestmark = pytest.mark.emulated

CHUNKS = 4
ONE = (1, *emulated.H200[1:])
"""One block takes all tiles, so that every place of the ring is used again."""
CHUNKED = ConvCase("chunks", 1, 8, 66, 67, 8)
# Three tiles, to which threads bring what is added: at every second pixel.
GATHERED = ConvCase("gathered", 3, 72, 12, 11, 72)
# (configuration, case, all of the op or nothing that may be left out, on noise too): more steps
# than stages, three tiles and more; with the two ways to come by pixels, and to go; one chunk more
# than one.
WAYS = (
    ("tma_p128x64_4s", ConvCase("taps", 2, 72, 12, 12, 40, 3, 3, (1, 1), (1, 1)), True, True),
    ("tma_p128x128_3s", ConvCase("dense", 3, 136, 12, 12, 136), True, True),
    ("tma_p128x64_4s", ConvCase("plain", 3, 72, 12, 11, 72), False, False),
    ("tma_p128x64_4s", ConvCase("by_2", 2, 72, 13, 12, 40, 3, 3, (2, 2), (1, 1)), True, True),
    ("tma_p128x64_4s", CHUNKED, True, False),
    ("tma_p128x64_4s", GATHERED, True, False),
    # Blocks of a cluster share pixels, three tiles of channels in two pairs, or filters, five tiles
    # of pixels in three.
    ("tma_p128x64_4s_2p", ConvCase("pixels", 2, 136, 9, 9, 72, 3, 3, (1, 1), (1, 1)), True, False),
    ("tma_p128x128_3s_2p", ConvCase("matrix", 2, 264, 12, 12, 200), True, False),
    ("tma_p128x128_3s_2c", ConvCase("filters", 4, 72, 12, 12, 264), True, False),
)
FILES = {
    "affine_operand.h",
    "bn_dgrad_store.h",
    "channel_lanes.h",
    "conv_dgrad_sm90.cuh",
    "gathered_addend.h",
    "gradient_rows.h",
    "merge_chunks.h",
    "merge_gradients.h",
    "phase_place.h",
    "pipeline.h",
    "tap_steps.h",
    "turned_products.h",
    "turned_ring.h",
    "warpgroup_epilogue.h",
    "warpgroup_tile.h",
}
# (file, the line's text, instruction, fault) -> why the fault does no harm there.
HARMLESS: dict[tuple[str, str, str, str], str] = {
    ("warpgroup_epilogue.h", "ptx::sync_warp();", "bar.warp.sync", "skip"): (
        "the warp meets again behind what one of its lanes did; fibers wait for each other at the "
        "next instruction of the warp in any case"
    ),
    ("bn_dgrad_store.h", "ptx::sync_warp();", "bar.warp.sync", "skip"): "likewise",
    (
        "turned_ring.h",
        "ptx::mbarrier_arrive_relaxed_cluster(ptx::cluster_address(this->empty(at), rank));",
        "mapa",
        "wrong_lane",
    ): "two lanes tell two blocks: each tells the one that the other would have told",
    ("merge_chunks.h", "ptx::fence_acq_rel_gpu();", "fence.acq_rel", "no_fence"): (
        "the atomic of acquire and release between the barriers is enough"
    ),
}


def trials() -> list[Trial]:
    made = []
    index = {tile["name"]: i for i, tile in enumerate(emulated_shapes.tiles(mutants_bn_dgrad.OP))}
    for name, case, full, noisy in WAYS:
        gpu = emulated.H200 if case is CHUNKED else ONE  # sums of blocks that meet
        for exact in (True, False) if noisy else (True,):
            dtype = emulated.DTYPES[mutants_bn_dgrad.OP][1 if exact else 2]
            step = 2 if case is GATHERED else case.stride[1]
            given = mutants_bn_dgrad._operands(case, dtype, exact, full, "nhwc", step)
            call = functools.partial(
                overload(mutants_bn_dgrad.OP, emulated.NAME), *given, list(case.input_shape), True,
                step, *emulated_shapes.geometry_args(case)[:4],
            )  # fmt: skip
            for schedule in HOSTILE if exact else HOSTILE[-1:]:
                settings = {
                    "schedule": schedule, "configuration": index[name], "splits": 1, "gpu": gpu,
                    "resident_blocks": 2,
                }  # fmt: skip
                judged = mutants_bn_dgrad._judged(case, given, exact, step)
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
    assert len(found()) > 80
