"""tools/gates.py on conv_wgrad's kernel for sm_90a: what it catches in its machine code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.append(str(TOOLS))

import _cuda_rules as rules  # noqa: E402  (it lies in tools/)
from _cuda_wgrad_rules import wgrad_of  # noqa: E402  (likewise)

NAME = (
    "_ZN12resnet_fused21conv_wgrad_tma_kernelINS_8BFloat16ENS_13WgradTmaShapeILi64ELi384ELi3EEEEE"
    "vNS_21ConvWgradTmaArgumentsE"
)
CODE = {
    "HGMMA.64x192x16.F32.BF16": 8, "WARPGROUP.DEPBAR.LE": 3, "UTMALDG.2D": 3,
    "UTMALDG.4D.IM2COL": 3, "SYNCS.PHASECHK.TRANS64.TRYWAIT": 6, "LDSM.16.MT88.4": 16,
    "STG.E.128": 24, "USETMAXREG.DEALLOC.CTAPOOL": 1, "USETMAXREG.TRY_ALLOC.CTAPOOL": 1,
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
