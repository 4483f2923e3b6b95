"""tools/gates.py on conv_wgrad's and conv_bn_wgrad's kernels for sm_90a: what it catches in their
machine code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.append(str(TOOLS))

import _cuda_rules as rules  # noqa: E402  (it lies in tools/)
from _cuda_wgrad_rules import wgrad_of, wgrad_window_of  # noqa: E402  (likewise)

NAME = (
    "_ZN12resnet_fused21conv_wgrad_tma_kernelINS_8BFloat16ENS_13WgradTmaShapeILi64ELi384ELi3EEEEE"
    "vNS_21ConvWgradTmaArgumentsE"
)
CODE = {
    "HGMMA.64x192x16.F32.BF16": 8, "WARPGROUP.DEPBAR.LE": 3, "UTMALDG.2D": 3,
    "UTMALDG.4D.IM2COL": 3, "SYNCS.PHASECHK.TRANS64.TRYWAIT": 6, "LDSM.16.MT88.4": 16,
    "STG.E.128": 24, "USETMAXREG.DEALLOC.CTAPOOL": 1, "USETMAXREG.TRY_ALLOC.CTAPOOL": 1,
}  # fmt: skip

NORMED = (
    "_ZN12resnet_fused24conv_bn_wgrad_tma_kernelINS_8BFloat16ENS_14TransformShapeINS_13Wgrad"
    "TmaShapeILi64ELi384ELi3EEEEEEEvNS_23ConvBnWgradTmaArgumentsE"
)
TRANSFORMS = {
    "LDS.128": 4, "STS.128": 4, "HMNMX2.BF16_V2.NAN": 8, "LDG.E.128.CONSTANT": 4,
    "FENCE.VIEW.ASYNC.S": 2, "SYNCS.PHASECHK.TRANS64.TRYWAIT": 8,
}  # fmt: skip


def failures(name=NAME, arch="90a", registers=168, **code):
    counts = CODE | {key.replace("_", "."): count for key, count in code.items()}
    return rules.Kernel(name, arch, registers, instructions=counts).failures()


def test_its_configuration_is_read_from_its_name():
    tile = wgrad_of(NAME)
    assert tile is not None and (tile.m, tile.n, tile.stages, tile.columns) == (64, 384, 3, 192)
    # Stages of 2 x 8 KB and 48 KB, six barriers.
    assert tile.shared == 3 * 65536 + 48
    assert rules.short_name(NAME) == "conv_wgrad_tma<BFloat16, 64x384 3 stages>"
    assert wgrad_of("_ZN12resnet_fused17conv_wgrad_kernelI") is None


@pytest.mark.parametrize(
    ("planted", "words"),
    [
        ({"arch": "80"}, "it is built for nothing else"),
        ({"registers": 160}, "160 registers, expected 168"),
        ({"name": NAME.replace("Li3E", "Li4E")}, "bytes of shared memory, at most"),
        ({"name": NAME.replace("WgradTmaShape", "Shape")}, "its name spells no configuration"),
        ({"HGMMA_64x192x16_F32_BF16": 4}, "4 HGMMA"),
        ({"WARPGROUP_DEPBAR_LE": 4}, "4 WARPGROUP"),
        ({"UTMALDG_4D_IM2COL": 2}, "2 UTMALDG"),
        ({"UTMALDG_2D": 2}, "5 UTMALDG"),
        ({"LDSM_16_MT88_4": 8}, "8 LDSM"),
        ({"STG_E_128": 12}, "12 STG"),
        ({"STL": 1}, "1 LDL or STL"),
        ({"ACQBULK": 1}, "1 instructions for kernels that begin early, expected none"),
    ],
    ids=str,
)
def test_it_is_held_to_its_instructions(planted, words):
    assert failures() == []
    found = failures(**planted)
    assert any(words in sentence for sentence in found), found


@pytest.mark.parametrize("instruction", TRANSFORMS)
def test_what_is_transformed_is_held_to_more(instruction):
    """One that transforms nothing, and so one instruction fewer of each."""
    tile = wgrad_of(NORMED)
    assert tile is not None and tile.shared == 3 * 65536 + 48 + 72
    assert rules.short_name(NORMED) == "conv_bn_wgrad_tma<BFloat16, 64x384 3 stages transformed>"
    counts = CODE | TRANSFORMS
    assert rules.Kernel(NORMED, "90a", 168, instructions=counts).failures() == []
    counts[instruction] -= 1
    assert len(rules.Kernel(NORMED, "90a", 168, instructions=counts).failures()) == 1


SHARED = NAME.replace(
    "NS_13WgradTmaShapeILi64ELi384ELi3EEEEE",
    "NS_16SharedWgradShapeINS_13WgradTmaShapeILi128ELi256ELi3EEELi2ELi2EEEEE",
)
SHARED_CODE = {key: count for key, count in CODE.items() if "HGMMA" not in key} | {
    "HGMMA.64x256x16.F32.BF16": 8, "STG.E.128": 32, "UTMALDG.2D": 0, "UTMALDG.4D.IM2COL": 0,
    "UTMALDG.2D.MULTICAST": 3, "UTMALDG.4D.IM2COL.MULTICAST": 3, "UCGABAR_ARV": 2,
    "SYNCS.ARRIVE.TRANS64.RED.A1T0": 4, "MEMBAR.ALL.GPU": 3,
}  # fmt: skip


def test_clusters_are_read_from_their_name():
    tile = wgrad_of(SHARED)
    assert tile is not None and (tile.left, tile.right, tile.shares) == (2, 2, True)
    # Stages of 2 x 16 KB and 32 KB, four barriers each.
    assert tile.shared == 3 * (65536 + 32)
    assert rules.short_name(SHARED).endswith("<BFloat16, 128x256 3 stages 2 share dy, 2 x>")
    alone = wgrad_of(NAME)
    assert alone is not None and not alone.shares


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (SHARED, {}),
        (
            SHARED.replace("ELi2ELi2E", "ELi2ELi1E"),
            {
                "UTMALDG.2D": 1, "UTMALDG.4D.IM2COL": 1, "UTMALDG.2D.MULTICAST": 2,
                "UTMALDG.4D.IM2COL.MULTICAST": 2, "SYNCS.ARRIVE.TRANS64.RED.A1T0": 1,
            },
        ),
        (
            SHARED.replace("ELi2ELi2E", "ELi1ELi2E"),
            {
                "UTMALDG.2D": 2, "UTMALDG.4D.IM2COL": 2, "UTMALDG.2D.MULTICAST": 1,
                "UTMALDG.4D.IM2COL.MULTICAST": 1, "SYNCS.ARRIVE.TRANS64.RED.A1T0": 3,
                "MEMBAR.ALL.GPU": 2,
            },
        ),
    ],
)  # fmt: skip
def test_clusters_are_held_to_what_they_share(name, changes):
    counts = SHARED_CODE | changes
    assert rules.Kernel(name, "90a", 168, instructions=counts).failures() == []
    # Copies for one block alone, readers that tell nobody, a fence of each reader.
    for planted in (
        {"UTMALDG.2D.MULTICAST": 0, "UTMALDG.2D": 3},
        {"UTMALDG.4D.IM2COL.MULTICAST": 0, "UTMALDG.4D.IM2COL": 3},
        {"UCGABAR_ARV": 1},
        {"SYNCS.ARRIVE.TRANS64.RED.A1T0": 0},
        {"MEMBAR.ALL.GPU": counts["MEMBAR.ALL.GPU"] + 3},
    ):
        found = rules.Kernel(name, "90a", 168, instructions=counts | planted).failures()
        assert len(found) == 1, (planted, found)


WINDOW = (
    "_ZN12resnet_fused27conv_bn_wgrad_window_kernelINS_8BFloat16ENS_16WgradWindowShapeILi128ELi3EEE"
    "EEvNS_22BnWgradWindowArgumentsE"
)
WINDOW_CODE = {
    "HGMMA.64x64x16.F32.BF16": 32, "HGMMA.64x32x16.F32.BF16": 8, "WARPGROUP.DEPBAR.LE": 3,
    "UTMALDG.4D.IM2COL": 3, "SYNCS.PHASECHK.TRANS64.TRYWAIT": 6, "LDSM.16.MT88.4": 16,
    "LDS.128": 4, "STS.128": 4, "STG.E.128": 36, "USETMAXREG.DEALLOC.CTAPOOL": 1,
    "USETMAXREG.TRY_ALLOC.CTAPOOL": 1,
}  # fmt: skip


def test_windows_are_read_from_their_name():
    tile = wgrad_window_of(WINDOW)
    assert tile is not None and (tile.positions, tile.stages) == (128, 3)
    # Stages of 2 x 16 KB and a window of 248 rows.
    assert tile.shared == 1024 + 3 * (2 * 16384 + 248 * 128)
    assert rules.short_name(WINDOW) == "conv_bn_wgrad_window<BFloat16, 128 positions 3 stages>"
    assert wgrad_window_of(NAME) is None and wgrad_of(WINDOW) is None


@pytest.mark.parametrize(
    ("planted", "words"),
    [
        ({"arch": "80"}, "it is built for nothing else"),
        ({"registers": 160}, "160 registers, expected 168"),
        ({"name": WINDOW.replace("Li3E", "Li4E")}, "bytes of shared memory, at most"),
        ({"name": WINDOW.replace("WgradWindowShape", "Shape")}, "its name spells no"),
        ({"HGMMA.64x64x16.F32.BF16": 28}, "28 HGMMA"),
        ({"HGMMA.64x32x16.F32.BF16": 4}, "4 HGMMA"),
        ({"WARPGROUP.DEPBAR.LE": 4}, "4 WARPGROUP"),
        ({"UTMALDG.4D.IM2COL": 2}, "2 UTMALDG"),
        ({"LDSM.16.MT88.4": 8}, "8 LDSM"),
        ({"LDS.128": 2}, "2 LDS"),
        ({"STS.128": 2}, "2 STS"),
        ({"STG.E.128": 18}, "18 STG"),
        ({"STL": 1}, "1 LDL or STL"),
    ],
    ids=str,
)
def test_windows_are_held_to_their_instructions(planted, words):
    def found(name=WINDOW, arch="90a", registers=168, **code):
        return rules.Kernel(name, arch, registers, instructions=WINDOW_CODE | code).failures()

    assert found() == []
    assert any(words in sentence for sentence in found(**planted)), found(**planted)
