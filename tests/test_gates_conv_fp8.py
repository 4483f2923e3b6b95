"""The gates' rules for convolutions in e4m3, on machine code that somebody has planted."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))
import _cuda_rules as rules

FP8 = (
    "_ZN12resnet_fused22conv_bn_act_tma_kernelINS_6E4M3ToINS_10Float8E4M3EEENS_14WarpgroupShapeILNS_11OrientationE0"
    "ELNS_9ConsumersE0ELi128ELi128ELi6ELi1ELi1EEEEEvNS_16ConvTmaArgumentsE"
)
FP8_CODE = {
    "QGMMA.64x128x32.F32.E4M3.E4M3": 4, "UTMALDG.4D": 2, "UTMALDG.2D": 1, "UTMALDG.4D.IM2COL": 1,
    "UTMALDG.3D": 1, "UTMASTG.3D": 1, "SYNCS.PHASECHK.TRANS64.TRYWAIT": 8, "STS.U16": 64,
    "LDS.U16": 32, "F2FP.SATFINITE.E4M3.F32.PACK_AB_MERGE_C": 64, "FADD": 64,
    "USETMAXREG.DEALLOC.CTAPOOL": 1, "USETMAXREG.TRY_ALLOC.CTAPOOL": 1,
}  # fmt: skip
FP8_WIDE = FP8.replace("10Float8E4M3E", "7Float16E")
FP8_SHARED = FP8.replace("Li6ELi1E", "Li6ELi2E")
FP8_SHARED_PIXELS = FP8.replace("Li6ELi1ELi1E", "Li6ELi1ELi2E")
FP8_BOTH = FP8.replace("Li6ELi1ELi1E", "Li6ELi2ELi2E")
FP8_TURNS = FP8.replace("OrientationE0", "OrientationE1").replace("ConsumersE0", "ConsumersE1")
FP8_TURNS = FP8_TURNS.replace("Li128ELi128ELi6E", "Li128ELi64ELi6E")


def on_e4m3(name=FP8, **code):
    counts = FP8_CODE | {key.replace("_", "."): count for key, count in code.items()}
    one = rules.Early(waits=1, triggers=1, constants=1)
    return rules.Kernel(name, "90a", 168, instructions=counts, early=one).failures()


def test_a_kernel_on_e4m3_is_held_to_its_instructions():
    assert on_e4m3() == []
    assert on_e4m3(FP8_TURNS, LDS_U8=64, STS_U8=128) == []
    assert on_e4m3(FP8_WIDE, UTMASTG_3D=2, STSM_16_M88_4=16) == []
    meet = {"UCGABAR_ARV": 2, "UCGABAR_WAIT": 2}
    assert on_e4m3(FP8_SHARED, UTMALDG_4D_MULTICAST=2, **meet) == []
    moved = {"UTMALDG_2D_MULTICAST": 1, "UTMALDG_4D_IM2COL_MULTICAST": 1, "UTMALDG_4D_IM2COL": 0}
    assert on_e4m3(FP8_SHARED_PIXELS, **moved, **meet) == []
    assert on_e4m3(FP8_BOTH, UTMALDG_4D_MULTICAST=2, **moved, **meet) == []
    for planted, words in (
        ({"QGMMA_64x128x32_F32_E4M3_E4M3": 8}, "8 QGMMA of 128 columns, expected 4"),
        ({"FADD": 63}, "63 FADD.*, at least 64"),
        ({"STS_U16": 63}, "63 STS"),
        ({"LDS_U16": 31}, "31 LDS"),
        ({"UTMALDG_3D": 0}, "4 UTMALDG.*, at least 5"),
        ({"name": FP8_TURNS}, "0 LDS"),
        ({"name": FP8_WIDE}, "1 UTMASTG.*, at least 2"),
        ({"name": FP8_WIDE, "UTMASTG_3D": 2}, "0 STSM"),
        ({"name": FP8.replace("Li6E", "Li7E")}, "264336 bytes of shared memory, at most 232448"),
        ({"name": FP8_SHARED}, "0 UTMALDG\\.4D\\.MULTICAST, at least 2"),
        ({"name": FP8_SHARED}, "0 UCGABAR.ARV, at least 2"),
        ({"name": FP8_SHARED_PIXELS}, "0 UTMALDG\\.4D\\.IM2COL\\.MULTICAST, at least 1"),
        ({"name": FP8_BOTH, **moved, **meet}, "0 UTMALDG\\.4D\\.MULTICAST, at least 2"),
        ({"name": FP8_BOTH, "UTMALDG_4D_MULTICAST": 2}, "0 UTMALDG\\.4D\\.IM2COL\\.MULTICAST, at "),
    ):
        assert any(words in said for said in on_e4m3(**planted)), (planted, on_e4m3(**planted))


def test_names_are_readable():
    tile = "pixels left 128x128 6 stages"
    assert rules.short_name(FP8) == f"conv_bn_act_tma<E4M3 to E4M3, {tile}>"
    assert rules.short_name(FP8_WIDE) == f"conv_bn_act_tma<E4M3 to Float16, {tile}>"
    assert rules.short_name(FP8_SHARED) == f"conv_bn_act_tma<E4M3 to E4M3, {tile} shared filters>"
    both = f"conv_bn_act_tma<E4M3 to E4M3, {tile} shared filters shared pixels>"
    assert rules.short_name(FP8_BOTH) == both
