"""Every fault that the emulator can plant in conv_bn_act_fp8 by TMA and wgmma is noticed."""

from __future__ import annotations

import functools

import conv_fp8_by_tma as by_tma
import emulated
import mutants
import pytest
import torch
from conv_fp8_by_tma import OP, operands, tiles
from emulated_fp8 import OUTS
from mutants import HOSTILE, Mutant, Trial

from resnet_fused.cases import ConvCase
from resnet_fused.ops._library import overload

pytestmark = pytest.mark.emulated

CHUNKS = 4
ONE = (1, *emulated.H200[1:])
"""One block takes all tiles, so that every place of the ring is used again."""
TOGETHER, CHANNELS, TURNS = "tma_p128x128_6s", "tma_s192x128_4s", "tma_s128x64_6s_t"
# (configuration, case, places of the result's types): more steps than stages, three tiles and more;
# with the two ways to come by pixels, with and without a shortcut, of either width of the result.
WAYS = (
    (TURNS, ConvCase("turns", 2, 48, 12, 12, 80, 3, 3, (1, 1), (1, 1), residual=True), (0, 1)),
    (TOGETHER, ConvCase("dense", 3, 272, 12, 12, 144, residual=True), (0, 2)),
    (TOGETHER, ConvCase("strided", 2, 48, 15, 13, 144, 3, 3, (2, 2), (1, 1)), (0, 1)),
    (CHANNELS, ConvCase("wide", 2, 144, 14, 15, 144, 3, 1, (1, 1), (1, 0), residual=True), (0, 1)),
)
# What the maps, the plan and the launch do is the host's; here is what the kernel is made of.
FILES = {
    "conv_bn_act_sm90.cuh",
    "pipeline.h",
    "quantised_epilogue.h",
    "warpgroup_epilogue.h",
    "warpgroup_tile.h",
}
# (file, the line's text, instruction, fault) -> why the fault does no harm there.
HARMLESS: dict[tuple[str, str, str, str], str] = {
    ("warpgroup_epilogue.h", "ptx::sync_warp();", "bar.warp.sync", "skip"): (
        "the warp meets again behind what one of its lanes did; fibers wait for each other at the "
        "next instruction of the warp in any case"
    ),
}


def judge(case, given, exact):
    """What is wrong with a result, as a `Trial` asks."""

    def bits(y: torch.Tensor) -> str | None:
        return by_tma.wrong(case, given, y)

    def bound(y: torch.Tensor) -> str | None:
        found = given.check(case, y)
        return None if found.ok else str(found)

    return bits if exact else bound


def trials() -> list[Trial]:
    """Calls that notice faults: on integers under hostile schedules, and on noise."""
    made = []
    index = {tile["name"]: i for i, tile in enumerate(tiles())}
    for name, case, places in WAYS:
        for place, out in enumerate(OUTS[i] for i in places):
            for exact in (True, False) if place == 0 else (True,):
                given = operands(case, out, exact=exact)
                # torch compares no e4m3.
                inputs = (given.x, given.weight, given.scale, given.shift, given.residual)
                bytes_of = [None if t is None else t.view(torch.uint8) for t in inputs]
                for schedule in HOSTILE if exact else HOSTILE[-1:]:
                    made.append(
                        Trial(
                            f"{name} {case.name} {out} exact={exact} {schedule}",
                            functools.partial(
                                overload(OP, emulated.NAME), *inputs, *given.options(case)
                            ),
                            tuple(bytes_of),
                            judge(case, given, exact),
                            {
                                "schedule": schedule, "configuration": index[name], "splits": 1,
                                "gpu": ONE, "reverse": False,
                            },
                        )
                    )  # fmt: skip
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
        ("wgmma.e4m3", "skip"), ("wgmma.e4m3", "stale_accumulator"), ("wgmma.b", "chunk_off"),
        ("wgmma.wait_group", "wait_one_fewer"), ("fence.proxy.async", "no_fence"),
        ("cp.async.bulk.wait_group.read", "skip"), ("bar.sync", "skip"),
    ):  # fmt: skip
        assert wanted in planted
    assert len(found()) > 80
