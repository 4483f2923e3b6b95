"""The gates' rules for chains in e4m3, on machine code that somebody has planted."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))
import _cuda_rules as rules

CHAIN = (
    "_ZN12resnet_fused21conv_chain_tma_kernelINS_10Float8E4M3ENS_13ChainTmaShape"
    "ILi64ELi128ELi8ELi0ELi1ELi1EEEEEvNS_17ChainTmaArgumentsE"
)
PROJECTS = CHAIN.replace("Li128ELi8ELi0E", "Li64ELi6ELi64E")
CODE = {
    "QGMMA.64x64x32.F32.E4M3.E4M3": 2, "QGMMA.64x128x32.F32.E4M3.E4M3": 2, "UTMALDG.4D": 8,
    "UTMALDG.2D": 2, "UTMASTG.2D": 3, "SYNCS.PHASECHK.TRANS64.TRYWAIT": 10, "STS": 24, "LDS": 8,
    "F2FP.SATFINITE.E4M3.F32.PACK_AB_MERGE_C": 48, "FADD": 64, "USETMAXREG.DEALLOC.CTAPOOL": 1,
    "USETMAXREG.TRY_ALLOC.CTAPOOL": 1,
}  # fmt: skip


def failures(name=CHAIN, arch="90a", registers=168, code=None):
    one = rules.Early(waits=1, triggers=1, constants=1)
    counts = CODE | (code or {})
    return rules.Kernel(name, arch, registers, instructions=counts, early=one).failures()


def test_chains_in_e4m3_are_held_to_their_instructions():
    assert failures() == []
    projecting = {"QGMMA.64x64x32.F32.E4M3.E4M3": 6, "UTMALDG.4D": 12, "LDS": 0}
    assert failures(PROJECTS, code=projecting) == []
    for planted, words in (
        ({"arch": "80"}, "it is built for nothing else"),
        ({"registers": 160}, "160 registers, expected 168"),
        (
            {"name": CHAIN.replace("Li8E", "Li12E")},
            "279776 bytes of shared memory, at most 232448",
        ),
        ({"name": PROJECTS}, "2 QGMMA of 64 columns, expected 6"),
        ({"code": {"QGMMA.64x128x32.F32.E4M3.E4M3": 1}}, "1 QGMMA of 128 columns, expected 2"),
        ({"code": {"UTMALDG.4D": 7}}, "9 UTMALDG.*, at least 10"),
        ({"code": {"UTMASTG.2D": 2}}, "2 UTMASTG.*, at least 3"),
        ({"code": {"STS": 23}}, "23 STS, at least 24"),
        ({"code": {"LDS": 7}}, "7 LDS, at least 8"),
        ({"code": {"F2FP.SATFINITE.E4M3.F32.PACK_AB_MERGE_C": 47}}, "47 F2FP"),
        ({"code": {"FADD": 63}}, "63 FADD.*, at least 64"),
        ({"name": CHAIN.replace("ChainTmaShape", "Shape")}, "its name spells no configuration"),
    ):
        said = failures(**planted)
        assert any(words in one for one in said), (planted, said)


def test_their_names():
    assert rules.short_name(CHAIN) == "conv_chain_tma<E4M3, 64 to 128 8 stages>"
    projecting = "conv_chain_tma<E4M3, 64 to 64 6 stages projecting 64>"
    assert rules.short_name(PROJECTS) == projecting
