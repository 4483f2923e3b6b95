"""tools/gates.py on conv_bn_grad1x1's kernel for sm_90a: what it catches in its machine code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.append(str(TOOLS))

import _cuda_rules as rules  # noqa: E402  (it lies in tools/)
from _cuda_grad1x1_rules import grad1x1_tile_of  # noqa: E402  (likewise)

NAME = (
    "_ZN12resnet_fused26conv_bn_grad1x1_tma_kernelINS_8BFloat16ENS_15Grad1x1TmaShapeI"
    "Li256ELi64ELi32ELi4ELb0EEEEEvNS_19Grad1x1TmaArgumentsE"
)
CODE = {
    "HGMMA.64x32x16.F32.BF16": 16, "HGMMA.64x256x16.F32.BF16": 2, "WARPGROUP.DEPBAR.LE": 2,
    "UTMALDG.2D": 11, "UTMASTG.2D": 1, "SYNCS.PHASECHK.TRANS64.TRYWAIT": 4,
    "USETMAXREG.DEALLOC.CTAPOOL": 1, "USETMAXREG.TRY_ALLOC.CTAPOOL": 1, "LDSM.16.MT88.4": 6,
    "STSM.16.MT88.4": 2, "LDS.128": 8, "STS.128": 4, "LDGSTS.E.BYPASS.128": 2, "SHFL.BFLY": 8,
}  # fmt: skip


def failures(name=NAME, arch="90a", registers=168, **code):
    counts = CODE | {key.replace("_", "."): count for key, count in code.items()}
    return rules.Kernel(name, arch, registers, instructions=counts).failures()


def test_its_configuration_is_read_from_its_name():
    tile = grad1x1_tile_of(NAME)
    assert tile is not None
    assert (tile.filters, tile.channels, tile.pixels, tile.stages) == (256, 64, 32, 4)
    # Stages of 2 x 16 KB and 2 x 4 KB, 32 KB of weights, two staging tiles, nine barriers.
    assert tile.shared == 4 * 40960 + 32768 + 2 * 4096 + 72
    assert rules.short_name(NAME) == "conv_bn_grad1x1_tma<BFloat16, 256x64 4 stages>"
    assert grad1x1_tile_of("_ZN12resnet_fused22conv_bn_grad1x1_kernelI") is None


def test_products_of_one_shape_are_counted_together():
    name = NAME.replace("Li256ELi64ELi32ELi4E", "Li64ELi64ELi64ELi6E")
    code = {"HGMMA_64x64x16_F32_BF16": 8, "LDSM_16_MT88_4": 12, "STSM_16_MT88_4": 4}
    assert failures(name=name, **code) == []
    found = failures(name=name, **code | {"HGMMA_64x64x16_F32_BF16": 7})
    assert len(found) == 1 and "7 HGMMA" in found[0]


@pytest.mark.parametrize(
    ("planted", "words"),
    [
        ({"arch": "80"}, "it is built for nothing else"),
        ({"registers": 160}, "160 registers, expected 168"),
        ({"name": NAME.replace("Li4E", "Li6E")}, "bytes of shared memory, at most"),
        ({"name": NAME.replace("TmaShape", "Shape")}, "its name spells no configuration"),
        ({"HGMMA_64x32x16_F32_BF16": 15}, "15 HGMMA"),
        ({"HGMMA_64x256x16_F32_BF16": 1}, "1 HGMMA"),
        ({"WARPGROUP_DEPBAR_LE": 3}, "3 WARPGROUP"),
        ({"UTMALDG_2D": 4}, "4 UTMALDG"),
        ({"UTMASTG_2D": 0}, "0 UTMASTG"),
        ({"LDSM_16_MT88_4": 5}, "5 LDSM"),
        ({"STSM_16_MT88_4": 1}, "1 STSM"),
        ({"LDS_128": 1}, "1 LDS"),
        ({"LDGSTS_E_BYPASS_128": 0}, "0 LDGSTS"),
        ({"SHFL_BFLY": 7}, "7 SHFL"),
        ({"STL": 1}, "1 LDL or STL"),
        ({"ACQBULK": 1}, "1 instructions for kernels that begin early, expected none"),
    ],
    ids=str,
)
def test_it_is_held_to_its_instructions(planted, words):
    assert failures() == []
    found = failures(**planted)
    assert any(words in sentence for sentence in found), found


ENDED = (
    "_ZN12resnet_fused30conv_bn_grad1x1_end_tma_kernelINS_8BFloat16ENS_15Grad1x1TmaShapeI"
    "Li64ELi128ELi32ELi4ELb1EEEEEvNS_22Grad1x1EndTmaArgumentsE"
)
BEHIND_AN_END = {
    "HGMMA.64x32x16.F32.BF16": 8, "HGMMA.64x64x16.F32.BF16": 4, "WARPGROUP.DEPBAR.LE": 4,
    "UTMALDG.2D": 12, "UTMASTG.2D": 1, "SYNCS.PHASECHK.TRANS64.TRYWAIT": 4,
    "USETMAXREG.DEALLOC.CTAPOOL": 1, "USETMAXREG.TRY_ALLOC.CTAPOOL": 1, "LDSM.16.MT88.4": 20,
    "STSM.16.MT88.4": 4, "LDS.128": 8, "STS.128": 4, "LDGSTS.E.BYPASS.128": 4, "SHFL.BFLY": 24,
    "HSET2.BF16_V2.GTU.AND": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("planted", "words"),
    [
        ({"UTMALDG.2D": 6}, "6 UTMALDG"),
        ({"LDSM.16.MT88.4": 19}, "19 LDSM"),
        ({"SHFL.BFLY": 23}, "23 SHFL"),
        ({"HSET2.BF16_V2.GTU.AND": 15}, "15 HSET2"),
        ({"HGMMA.64x64x16.F32.BF16": 3}, "3 HGMMA"),
        ({"STL": 1}, "1 LDL or STL"),
    ],
    ids=str,
)
def test_behind_a_blocks_end_it_reads_masks_and_sums_more(planted, words):
    def failed(**code):
        return rules.Kernel(ENDED, "90a", 168, instructions=BEHIND_AN_END | code).failures()

    assert failed() == []
    found = failed(**planted)
    assert any(words in sentence for sentence in found), found
    tile = grad1x1_tile_of(ENDED)
    # Stages of 2 x 4 KB and 4 x 8 KB, 16 KB of weights, two staging tiles, nine barriers.
    assert tile is not None and tile.ended
    assert tile.shared == 4 * 40960 + 16384 + 2 * 8192 + 72
    assert rules.short_name(ENDED) == "conv_bn_grad1x1_end_tma<BFloat16, 64x128 4 stages>"


def test_what_adds_the_parts_shares_them_among_its_warps():
    def failed(totals, registers=32):
        name = "_ZN12resnet_fused28conv_bn_grad1x1_merge_kernelIfEEvNS_16Grad1x1ArgumentsE"
        code = {"LDG.E": 5, "DADD": 12, "LDS.64": totals}
        return rules.Kernel(name, "80", registers, instructions=code).failures()

    assert failed(7) == []
    assert any("0 LDS.64, at least 7" in sentence for sentence in failed(0))
    assert any("65 registers" in sentence for sentence in failed(7, 65))
