"""Every fault that the emulator can plant in conv_bn_dgrad_end by TMA and wgmma is noticed."""

from __future__ import annotations

import functools
from collections.abc import Callable

import emulated
import emulated_bn_dgrad_end
import ended_by_tma
import mutants
import mutants_bn_dgrad_end
import pytest
import torch
from ended_by_tma import OP, WAYS
from mutants import HOSTILE, Mutant, Trial
from test_emulated_bn_dgrad_sm90_faults import CHUNKED, ONE
from test_emulated_bn_dgrad_sm90_faults import HARMLESS as OF_THE_GRADIENT
from torch import Tensor

from resnet_fused.cases import ConvCase
from resnet_fused.ops import _training_checks_dgrad_end as checks
from resnet_fused.ops._library import overload

pytestmark = pytest.mark.emulated

CHUNKS = 4
# (configuration, case, what takes part, on noise too): as for conv_bn_dgrad, with the projection's
# sums behind one another, and without.
PLACES = (
    ("tma_p128x64_4s", ConvCase("taps", 2, 72, 12, 12, 40, 3, 3, (1, 1), (1, 1)), "all", True),
    ("tma_p128x128_3s", ConvCase("dense", 3, 136, 12, 12, 136), "all", True),
    ("tma_p128x64_4s", ConvCase("plain", 3, 72, 12, 11, 72), "plain", False),
    ("tma_p128x64_4s", ConvCase("by_2", 2, 72, 13, 12, 40, 3, 3, (2, 2), (1, 1)), "all", False),
    ("tma_p128x128_3s", ConvCase("identity", 3, 136, 12, 12, 72), "identity", False),
    ("tma_p128x64_4s", CHUNKED, "all", False),
    ("tma_p128x64_4s", CHUNKED, "identity", False),
    # Blocks of a cluster share pixels, three tiles of channels in two pairs, or filters, five tiles
    # of pixels in three.
    ("tma_p128x64_4s_2p", ConvCase("pixels", 2, 136, 9, 9, 72, 3, 3, (1, 1), (1, 1)), "all", False),
    ("tma_p128x128_3s_2c", ConvCase("filters", 4, 72, 12, 12, 264), "identity", False),
)
FILES = {
    "affine_operand.h",
    "bn_dgrad_end_store.h",
    "channel_lanes.h",
    "conv_dgrad_sm90.cuh",
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
    key: why for key, why in OF_THE_GRADIENT.items() if key[0] != "bn_dgrad_store.h"
} | {
    ("bn_dgrad_end_store.h", "ptx::sync_warp();", "bar.warp.sync", "skip"): (
        "the warp meets again behind what one of its lanes did; fibers wait for each other at the "
        "next instruction of the warp in any case"
    ),
}


def judged(
    case: ConvCase, given: checks.Operands, exact: bool
) -> Callable[[tuple[Tensor, Tensor]], str | None]:
    """What is wrong with a gradient and its sums."""
    if exact:
        return lambda got: ended_by_tma.wrong(case, given, *got, case.stride[0])
    return mutants_bn_dgrad_end._judged(case, given, exact)


def trials() -> list[Trial]:
    made = []
    index = {tile["name"]: i for i, tile in ended_by_tma.tiles().items()}
    for name, case, way, noisy in PLACES:
        gpu = emulated.H200 if case is CHUNKED else ONE  # sums of blocks that meet
        takes_part = dict(WAYS[way])
        if case.stride[0] > 1 and takes_part.get("addend", 1):
            takes_part["addend"] = case.stride[0]
        for exact in (True, False) if noisy else (True,):
            dtype = torch.bfloat16 if exact else torch.float16
            given = ended_by_tma.operands(case, dtype, exact=exact, **takes_part)
            # Not NaN, which no comparison finds unchanged.
            given = checks.Operands(*(None if t is None else torch.nan_to_num(t) for t in given))
            geometry = (case.stride, case.padding, case.dilation, case.groups)
            call = functools.partial(overload(OP, emulated.NAME), *given, case.stride[0], *geometry)
            for schedule in HOSTILE if exact else HOSTILE[-1:]:
                settings = {
                    "schedule": schedule, "configuration": index[name], "splits": 1, "gpu": gpu,
                    "resident_blocks": 2,
                }  # fmt: skip
                label = f"{name} {case.name} {way} exact={exact} {schedule}"
                wrong = judged(case, given, exact)
                made.append(Trial(label, call, tuple(given), wrong, settings))
    return made


@functools.cache
def found() -> dict[Mutant, list[Trial]]:
    """Every mutant, with the trials that reach it. Clean runs pass."""
    return mutants.reached(trials())


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_fault_is_noticed(chunk):
    mutants.check(found(), HARMLESS, chunk, CHUNKS)


def test_every_file_takes_part_with_what_it_is_made_of():
    assert emulated_bn_dgrad_end.OP == OP
    assert {key[0] for key in (mutant.key for mutant in found())} == FILES
    assert set(HARMLESS) <= {mutant.key for mutant in found()}
    assert len(found()) > 80
