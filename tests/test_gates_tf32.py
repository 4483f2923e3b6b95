"""The gates of conv_bn_act's kernels for sm_90a on float32: what is planted is caught."""

from __future__ import annotations

import sys
from pathlib import Path

TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.append(str(TOOLS))

import _cuda_rules as rules  # noqa: E402  (it lies in tools/)

KERNEL = (
    "_ZN12resnet_fused22conv_bn_act_tma_kernelIfNS_9Tf32ShapeINS_14WarpgroupShapeILNS_11Orientation"
    "E1ELNS_9ConsumersE0ELi192ELi128ELi3ELi1ELi1EEEEEEEvNS_16ConvTmaArgumentsE"
)
SHARED = KERNEL.replace("Li3ELi1ELi1E", "Li3ELi2ELi2E")
CODE = {
    "HGMMA.64x192x8.F32.TF32": 4, "UTMALDG.4D": 2, "UTMALDG.2D": 1, "UTMALDG.4D.IM2COL": 1,
    "UTMALDG.3D": 2, "UTMASTG.3D": 2, "SYNCS.PHASECHK.TRANS64.TRYWAIT": 8, "STS": 192, "LDS": 96,
    "USETMAXREG.DEALLOC.CTAPOOL": 1, "USETMAXREG.TRY_ALLOC.CTAPOOL": 1,
}  # fmt: skip
SHARES = {
    "UTMALDG_4D": 0, "UTMALDG_4D_MULTICAST": 2, "UTMALDG_2D": 0, "UTMALDG_2D_MULTICAST": 1,
    "UTMALDG_4D_IM2COL": 0, "UTMALDG_4D_IM2COL_MULTICAST": 1, "UCGABAR_ARV": 2, "UCGABAR_WAIT": 2,
}  # fmt: skip


def failures(name: str = KERNEL, arch: str = "90a", registers: int = 168, **code: int) -> list[str]:
    counts = CODE | {key.replace("_", "."): count for key, count in code.items()}
    early = rules.Early(waits=1, triggers=1, constants=1)
    return rules.Kernel(name, arch, registers, instructions=counts, early=early).failures()


def test_a_kernel_on_float32_is_held_to_its_instructions():
    assert failures() == []
    assert failures(SHARED, **SHARES) == []
    for planted, words in (
        ({"arch": "80"}, "it is built for nothing else"),
        ({"registers": 160}, "160 registers, expected 168"),
        ({"name": KERNEL.replace("ELi3E", "ELi4E")}, "262240 bytes of shared memory, at most"),
        ({"HGMMA_64x192x8_F32_TF32": 8}, "8 HGMMA of 192 columns, expected 4"),
        ({"name": KERNEL.replace("Li192E", "Li128E")}, "0 HGMMA of 128 columns, expected 4"),
        ({"UTMALDG_3D": 1}, "5 UTMALDG.*, at least 6"),
        ({"UTMALDG_4D_IM2COL": 0}, "0 UTMALDG"),
        ({"UTMASTG_3D": 1}, "1 UTMASTG.*, at least 2"),
        ({"STS": 191}, "191 STS, at least 192"),
        ({"LDS": 95}, "95 LDS, at least 96"),
        ({"SYNCS_PHASECHK_TRANS64_TRYWAIT": 3}, "3 SYNCS"),
        ({"name": SHARED}, "0 UTMALDG"),
        ({**SHARES, "name": SHARED, "UCGABAR_WAIT": 1}, "1 UCGABAR.WAIT"),
    ):
        assert any(words in said for said in failures(**planted)), planted


def test_its_name_says_what_it_is():
    assert rules.short_name(KERNEL) == "conv_bn_act_tma<float, channels left 192x128 3 stages>"
