"""tools/gates.py on conv_dgrad's kernel for sm_90a: what it catches in its machine code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.append(str(TOOLS))

import _cuda_rules as rules  # noqa: E402  (it lies in tools/)
from _cuda_dgrad_rules import dgrad_of  # noqa: E402  (likewise)

NAME = (
    "_ZN12resnet_fused21conv_dgrad_tma_kernelINS_8BFloat16ENS_13DgradTmaShapeILi128ELi4ELi1ELi1EEEEE"
    "vNS_21ConvDgradTmaArgumentsE"
)
CODE = {
    "HGMMA.64x128x16.F32.BF16": 8, "WARPGROUP.DEPBAR.LE": 3, "UTMALDG.2D": 2, "UTMALDG.4D": 1,
    "UTMALDG.4D.IM2COL": 2, "UTMASTG.3D": 2, "UTMASTG.4D.IM2COL": 2,
    "SYNCS.PHASECHK.TRANS64.TRYWAIT": 5,
    "USETMAXREG.DEALLOC.CTAPOOL": 1, "USETMAXREG.TRY_ALLOC.CTAPOOL": 1, "LDSM.16.M88.4": 24,
    "LDG.E.64.CONSTANT": 16, "STSM.16.M88.4": 8,
}  # fmt: skip


REDUCING = (
    "_ZN12resnet_fused24conv_bn_dgrad_tma_kernelINS_8BFloat16ENS_15BnDgradTmaShapeILi128ELi3ELi1ELi1EEEEE"
    "vNS_23ConvBnDgradTmaArgumentsE"
)
MORE = CODE | {
    "UTMALDG.3D": 8, "UTMALDG.4D.IM2COL": 10, "LDSM.16.M88.4": 48, "LDG.E.64.CONSTANT": 48,
    "STSM.16.M88.4": 32, "ATOMG.E.ADD.STRONG.GPU": 2, "MEMBAR.ALL.GPU": 6,
}  # fmt: skip
SHARING = REDUCING.replace("Li1ELi1E", "Li2ELi2E")
SHARED = MORE | {
    "UTMALDG.4D": 0, "UTMALDG.2D": 0, "UTMALDG.4D.IM2COL": 8, "UTMALDG.4D.MULTICAST": 1,
    "UTMALDG.2D.MULTICAST": 2, "UTMALDG.4D.IM2COL.MULTICAST": 2, "UCGABAR_ARV": 2,
    "UCGABAR_WAIT": 2, "MEMBAR.ALL.GPU": 9,
}  # fmt: skip


def failures(name=NAME, arch="90a", registers=168, **code):
    counts = {REDUCING: MORE, SHARING: SHARED}.get(name, CODE) | {
        key if key.startswith("UCGA") else key.replace("_", "."): count
        for key, count in code.items()
    }
    return rules.Kernel(name, arch, registers, instructions=counts).failures()


def test_its_configuration_is_read_from_its_name():
    tile = dgrad_of(NAME)
    assert tile is not None and (tile.channels, tile.stages) == (128, 4)
    # Stages of 2 x 16 KB and 16 KB, two staging tiles of 16 KB, eight barriers.
    assert tile.shared == 4 * 49152 + 2 * 16384 + 64
    assert rules.short_name(NAME) == "conv_dgrad_tma<BFloat16, 128x128 4 stages>"
    assert dgrad_of("_ZN12resnet_fused17conv_dgrad_kernelI") is None


@pytest.mark.parametrize(
    ("planted", "words"),
    [
        ({"arch": "80"}, "it is built for nothing else"),
        ({"registers": 160}, "160 registers, expected 168"),
        ({"name": NAME.replace("Li4E", "Li5E")}, "bytes of shared memory, at most"),
        ({"name": NAME.replace("DgradTmaShape", "Shape")}, "its name spells no configuration"),
        ({"HGMMA_64x128x16_F32_BF16": 4}, "4 HGMMA"),
        ({"WARPGROUP_DEPBAR_LE": 4}, "4 WARPGROUP"),
        ({"UTMALDG_4D_IM2COL": 1}, "1 UTMALDG"),
        ({"UTMASTG_3D": 1}, r"1 UTMASTG\.3D, at least 2"),
        ({"UTMASTG_4D_IM2COL": 1}, r"1 UTMASTG\.4D\.IM2COL, at least 2"),
        ({"LDSM_16_M88_4": 16}, "16 LDSM"),
        ({"LDG_E_64_CONSTANT": 8}, "8 LDG"),
        ({"STL": 1}, "1 LDL or STL"),
        ({"ACQBULK": 1}, "1 instructions for kernels that begin early, expected none"),
    ],
    ids=str,
)
def test_it_is_held_to_its_instructions(planted, words):
    assert failures() == []
    found = failures(**planted)
    assert any(words in sentence for sentence in found), found


@pytest.mark.parametrize(
    ("planted", "words"),
    [
        ({"UTMALDG_3D": 3}, r"3 UTMALDG\.3D, at least 4"),
        ({"UTMALDG_4D_IM2COL": 5}, r"5 UTMALDG\.4D\.IM2COL, at least 6"),
        ({"LDSM_16_M88_4": 47}, "47 LDSM"),
        ({"STSM_16_M88_4": 24}, "24 STSM"),
        ({"ATOMG_E_ADD_STRONG_GPU": 1}, "1 ATOMG"),
        ({"MEMBAR_ALL_GPU": 7}, "7 MEMBAR.ALL.GPU, at most 6"),
    ],
    ids=str,
)
def test_between_two_batchnorms_it_does_more(planted, words):
    assert failures(REDUCING) == []
    found = failures(REDUCING, **planted)
    assert any(words in sentence for sentence in found), found
    tile = dgrad_of(REDUCING)
    assert tile is not None and tile.shared == 231536 and tile.reduces
    assert rules.short_name(REDUCING) == "conv_bn_dgrad_tma<BFloat16, 128x128 3 stages>"


@pytest.mark.parametrize(
    ("planted", "words"),
    [
        ({"UTMALDG_4D_MULTICAST": 0}, r"0 UTMALDG\.4D\.MULTICAST, at least 1"),
        ({"UTMALDG_2D_MULTICAST": 1}, r"1 UTMALDG\.2D\.MULTICAST, at least 2"),
        ({"UTMALDG_4D_IM2COL_MULTICAST": 1}, r"1 UTMALDG\.4D\.IM2COL\.MULTICAST, at least 2"),
        ({"UTMALDG_4D_IM2COL": 3}, r"3 UTMALDG\.4D\.IM2COL, at least 4"),
        ({"UCGABAR_ARV": 1}, "1 UCGABAR.ARV"),
        ({"UCGABAR_WAIT": 1}, "1 UCGABAR.WAIT"),
        ({"MEMBAR_ALL_GPU": 10}, "10 MEMBAR.ALL.GPU, at most 9"),
    ],
    ids=str,
)
def test_blocks_that_share_are_held_to_it(planted, words):
    assert failures(SHARING) == []
    found = failures(SHARING, **planted)
    assert any(words in sentence for sentence in found), found
    tile = dgrad_of(SHARING)
    assert tile is not None and tile.shared == 231536 + 3 * 16
    assert rules.short_name(SHARING) == (
        "conv_bn_dgrad_tma<BFloat16, 128x128 3 stages shared filters shared pixels>"
    )


ENDING = (
    "_ZN12resnet_fused28conv_bn_dgrad_end_tma_kernelINS_8BFloat16ENS_15BnDgradTmaShapeILi128ELi3ELi1ELi1EEEEE"
    "vNS_26ConvBnDgradEndTmaArgumentsE"
)
OF_ENDS = CODE | {
    "UTMALDG.3D": 8, "UTMALDG.4D.IM2COL": 10, "LDSM.16.M88.4": 40, "LDG.E.64.CONSTANT": 48,
    "SYNCS.PHASECHK.TRANS64.TRYWAIT": 8, "STSM.16.M88.4": 16, "ATOMG.E.ADD.STRONG.GPU": 2,
    "HSET2.BF16_V2.GTU.AND": 64, "MEMBAR.ALL.GPU": 6,
}  # fmt: skip


@pytest.mark.parametrize(
    ("planted", "words"),
    [
        ({"UTMALDG_3D": 7}, r"7 UTMALDG\.3D, at least 8"),
        ({"UTMALDG_4D_IM2COL": 9}, r"9 UTMALDG\.4D\.IM2COL, at least 10"),
        ({"LDSM_16_M88_4": 39}, "39 LDSM"),
        ({"STSM_16_M88_4": 8}, "8 STSM"),
        ({"HSET2.BF16_V2.GTU.AND": 32}, "32 HSET2"),
        ({"SYNCS.PHASECHK.TRANS64.TRYWAIT": 7}, "7 SYNCS"),
        ({"ATOMG_E_ADD_STRONG_GPU": 1}, "1 ATOMG"),
        ({"MEMBAR_ALL_GPU": 7}, "7 MEMBAR.ALL.GPU, at most 6"),
        ({"LDL": 1}, "1 LDL or STL"),
    ],
    ids=str,
)
def test_behind_a_blocks_end_it_masks_by_words(planted, words):
    def failed(**code):
        counts = OF_ENDS | {
            key if "." in key else key.replace("_", "."): count for key, count in code.items()
        }
        return rules.Kernel(ENDING, "90a", 168, instructions=counts).failures()

    assert failed() == []
    found = failed(**planted)
    assert any(words in sentence for sentence in found), found
    tile = dgrad_of(ENDING)
    assert tile is not None and tile.shared == 231536 and tile.ends
    assert rules.short_name(ENDING) == "conv_bn_dgrad_end_tma<BFloat16, 128x128 3 stages>"


WINDOWS = (
    "_ZN12resnet_fused27conv_bn_dgrad_window_kernelINS_8BFloat16ENS_18BnDgradWindowShapeILi192EEEEE"
    "vNS_22BnDgradWindowArgumentsE"
)
OF_WINDOWS = {
    "HGMMA.64x192x16.F32.BF16": 36, "WARPGROUP.DEPBAR.LE": 2, "STSM.16.MT88.4": 48,
    "LDSM.16.MT88.4": 48, "UTMALDG.4D": 9, "UTMALDG.4D.IM2COL": 4,
    "SYNCS.PHASECHK.TRANS64.TRYWAIT": 13, "USETMAXREG.DEALLOC.CTAPOOL": 1,
    "USETMAXREG.TRY_ALLOC.CTAPOOL": 1, "FENCE.VIEW.ASYNC.S": 5, "VOTE.ANY": 6,
    "ATOMG.E.ADD.STRONG.GPU": 2, "STG.E.128": 13,
}  # fmt: skip


@pytest.mark.parametrize(
    ("planted", "words"),
    [
        ({"arch": "80"}, "it is built for nothing else"),
        ({"registers": 160}, "160 registers, expected 168"),
        ({"name": WINDOWS.replace("Li192E", "Li208E")}, "bytes of shared memory, at most"),
        ({"name": WINDOWS.replace("WindowShape", "Shape")}, "its name spells no configuration"),
        ({"HGMMA.64x192x16.F32.BF16": 18}, r"18 HGMMA"),
        ({"WARPGROUP.DEPBAR.LE": 3}, r"3 WARPGROUP\.DEPBAR"),
        ({"UTMALDG.4D.IM2COL": 3}, r"3 UTMALDG\.4D\.IM2COL, at least 4"),
        ({"STSM.16.MT88.4": 24}, "24 STSM"),
        ({"LDSM.16.MT88.4": 24}, "24 LDSM"),
        ({"FENCE.VIEW.ASYNC.S": 1}, "1 FENCE"),
        ({"VOTE.ANY": 0}, "0 VOTE"),
        ({"STG.E.128": 12}, "12 STG.128, expected 13"),
        ({"STL": 1}, "1 LDL or STL"),
    ],
    ids=str,
)
def test_windows_are_held_to_their_instructions(planted, words):
    def failed(name=WINDOWS, arch="90a", registers=168, **code):
        counts = OF_WINDOWS | code
        return rules.Kernel(name, arch, registers, instructions=counts).failures()

    assert failed() == []
    found = failed(**planted)
    assert any(words in sentence for sentence in found), found
    assert rules.short_name(WINDOWS) == "conv_bn_dgrad_window<BFloat16, windows for 192 pixels>"
