"""tools/gates.py on conv_bn_act's window kernel: what it catches in its machine code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.append(str(TOOLS))

import _cuda_rules as rules  # noqa: E402  (it lies in tools/)

WINDOW = (
    "_ZN12resnet_fused25conv_bn_act_window_kernelINS_8BFloat16ENS_11WindowShapeILi192ELi128ELi1EEEE"
    "EvNS_19ConvWindowArgumentsE"
)
E4M3 = WINDOW.replace("NS_8BFloat16E", "NS_6E4M3ToINS_10Float8E4M3EEE").replace(
    "ILi192ELi128ELi1E", "ILi192ELi64ELi2E"
)
WIDE = E4M3.replace("10Float8E4M3E", "8BFloat16E")
COMMON = {
    "UTMALDG.4D": 9, "UTMALDG.4D.IM2COL": 2, "SYNCS.PHASECHK.TRANS64.TRYWAIT": 10,
    "USETMAXREG.DEALLOC.CTAPOOL": 1, "USETMAXREG.TRY_ALLOC.CTAPOOL": 1,
}  # fmt: skip
STATS = (
    "_ZN12resnet_fused27conv_bn_stats_window_kernelINS_8BFloat16ENS_14TransformShapeINS_11WindowShape"
    "ILi192ELi128ELi1EEEEEEEvNS_24ConvStatsWindowArgumentsE"
)
PARTS = {
    "QGMMA.64x96x32.F32.E4M3.E4M3": 36, "WARPGROUP.DEPBAR.LE": 10, "FADD": 480, "LDS.U8": 96,
}  # fmt: skip
CODE = {
    WINDOW: {
        "HGMMA.64x192x16.F32.BF16": 36, "STG.E.128": 12, "STSM.16.MT88.4": 24,
        "LDSM.16.MT88.4": 12, "WARPGROUP.DEPBAR.LE": 2, **COMMON,
    },
    E4M3: {
        **PARTS, "STG.E.128": 6, "STS.U8": 192, "F2FP.SATFINITE.E4M3.F32.PACK_AB_MERGE_C": 96,
        **COMMON,
    },
    STATS: COMMON | {
        "HGMMA.64x192x16.F32.BF16": 36, "STG.E.128": 13, "STSM.16.MT88.4": 12,
        "WARPGROUP.DEPBAR.LE": 2, "UTMALDG.4D.IM2COL": 1, "SHFL.BFLY": 8,
        "ATOMG.E.ADD.STRONG.GPU": 2, "DFMA": 84, "LDS.128": 4, "STS.128": 4,
        "HMNMX2.BF16_V2.NAN": 8, "LDG.E.128.CONSTANT": 4, "FENCE.VIEW.ASYNC.S": 2,
    },
    WIDE: {**PARTS, "STG.E.128": 12, "STSM.16.MT88.4": 24, **COMMON},
}  # fmt: skip


def failures(of, name=None, arch="90a", registers=168, **code):
    names = {key: key if key in CODE[of] else key.replace("_", ".") for key in code}
    counts = CODE[of] | {names[key]: count for key, count in code.items()}
    one = rules.Early(waits=1, triggers=1, constants=1)
    return rules.Kernel(name or of, arch, registers, instructions=counts, early=one).failures()


@pytest.mark.parametrize("name", CODE, ids=["bfloat16", "e4m3", "stats", "e4m3_to_bfloat16"])
def test_it_is_held_to_its_instructions(name):
    assert failures(name) == []
    for planted, words in (
        ({"arch": "80"}, "it is built for nothing else"),
        ({"registers": 160}, "160 registers, expected 168"),
        ({"WARPGROUP_DEPBAR_LE": 3}, "3 waits for products, expected"),
        ({"UTMALDG_4D_IM2COL": 0}, "0 UTMALDG"),
        ({"STG_E_128": 11}, "11 STG.128, expected"),
        ({"SYNCS_PHASECHK_TRANS64_TRYWAIT": 4}, "4 SYNCS"),
        ({"name": name.replace("WindowShape", "Shape")}, "its name spells no configuration"),
    ):
        assert any(words in said for said in failures(name, **planted)), planted


def test_each_type_is_held_to_its_own():
    for name, planted, words in (
        (WINDOW, {"HGMMA_64x192x16_F32_BF16": 35}, "35 products of 192 columns, expected 36"),
        (WINDOW, {"name": WINDOW.replace("Li192E", "Li208E")}, "0 products of 208 columns"),
        (WINDOW, {"name": WINDOW.replace("Li192E", "Li256E")}, "238592 bytes of shared memory"),
        (WINDOW, {"STSM_16_MT88_4": 23}, "23 STSM"),
        (WINDOW, {"LDSM_16_MT88_4": 11}, "11 LDSM"),
        (WINDOW, {"UTMALDG_4D_IM2COL": 1}, "1 UTMALDG"),
        (STATS, {"STSM_16_MT88_4": 11}, "11 STSM"),
        (STATS, {"SHFL_BFLY": 7}, "7 SHFL"),
        (STATS, {"ATOMG_E_ADD_STRONG_GPU": 1}, "1 ATOM"),
        (STATS, {"DFMA": 3}, "3 DFMA"),
        (STATS, {"LDS.128": 3}, "3 LDS"),
        (STATS, {"STS.128": 3}, "3 STS"),
        (STATS, {"HMNMX2.BF16_V2.NAN": 7}, "7 HMNMX2"),
        (STATS, {"FENCE.VIEW.ASYNC.S": 1}, "1 FENCE"),
        (STATS, {"SYNCS_PHASECHK_TRANS64_TRYWAIT": 7}, "7 SYNCS"),
        (E4M3, {"QGMMA_64x96x32_F32_E4M3_E4M3": 18}, "18 products of 96 columns, expected 36"),
        (E4M3, {"name": E4M3.replace("Li192E", "Li160E")}, "0 products of 80 columns, expected 36"),
        (E4M3, {"FADD": 479}, "479 FADD"),
        (E4M3, {"STS_U8": 191}, "191 STS"),
        (E4M3, {"LDS_U8": 95}, "95 LDS"),
        (WIDE, {"STSM_16_MT88_4": 23}, "23 STSM"),
        (WIDE, {"STG_E_128": 6}, "6 STG.128, expected 12"),
    ):
        assert any(words in said for said in failures(name, **planted)), (name, planted)


def test_their_names_are_readable():
    assert rules.short_name(WINDOW) == "conv_bn_act_window<BFloat16, windows for 192 pixels>"
    assert rules.short_name(STATS) == (
        "conv_bn_stats_window<BFloat16, windows for 192 pixels transformed>"
    )
    assert rules.short_name(E4M3) == "conv_bn_act_window<E4M3 to E4M3, windows for 192 pixels>"
    assert rules.short_name(WIDE) == "conv_bn_act_window<E4M3 to BFloat16, windows for 192 pixels>"
