"""tools/gates.py on a block's end by TMA and wgmma: what it catches in its machine code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.append(str(TOOLS))

import _cuda_rules as rules  # noqa: E402  (it lies in tools/)

SHAPE = "NS_13BlockEndShapeILi128ELi256ELi3EEE"
PROJECTED = (
    "_ZN12resnet_fused32bn_add_act_conv_stats_tma_kernelINS_8BFloat16E"
    f"NS_14TransformShapeI{SHAPE}EELb1EEEvNS_20BlockEndTmaArgumentsE"
)
PLAIN = PROJECTED.replace("Lb1E", "Lb0E")
COMMON = {
    "HGMMA.64x128x16.F32.BF16": 8, "WARPGROUP.DEPBAR.LE": 2, "UTMALDG.4D": 2, "UTMALDG.2D": 2,
    "UTMALDG.4D.IM2COL": 2, "UTMASTG.2D": 1, "UTMASTG.3D": 2, "STSM.16.MT88.4": 16,
    "SYNCS.PHASECHK.TRANS64.TRYWAIT": 8, "USETMAXREG.DEALLOC.CTAPOOL": 1,
    "USETMAXREG.TRY_ALLOC.CTAPOOL": 1, "SHFL.BFLY": 16, "ATOMG.E.ADD.STRONG.GPU": 4, "DFMA": 240,
    "LDS.128": 10, "STS.128": 5, "HMNMX2.BF16_V2.NAN": 12, "LDG.E.128.CONSTANT": 4,
    "FENCE.VIEW.ASYNC.S": 3,
}  # fmt: skip
CODE = {PLAIN: COMMON, PROJECTED: COMMON | {"LDG.E.128.CONSTANT": 8}}


def failures(of, name=None, arch="90a", registers=168, code=None):
    counts = CODE[of] | (code or {})
    early = rules.Early(waits=1, triggers=1, constants=1)
    return rules.Kernel(name or of, arch, registers, instructions=counts, early=early).failures()


@pytest.mark.parametrize("name", CODE, ids=["as_it_is", "projected"])
def test_it_is_held_to_its_instructions(name):
    assert failures(name) == []
    for instruction, few, words in (
        ("HGMMA.64x128x16.F32.BF16", 4, "4 products of 128 columns, expected 8"),
        ("WARPGROUP.DEPBAR.LE", 3, "3 waits for products, expected 2"),
        ("UTMALDG.4D", 1, "1 UTMALDG"),
        ("UTMALDG.2D", 1, "1 UTMALDG"),
        ("UTMASTG.2D", 0, "0 UTMASTG"),
        ("UTMASTG.3D", 1, "1 UTMASTG"),
        ("STSM.16.MT88.4", 15, "15 STSM"),
        ("SYNCS.PHASECHK.TRANS64.TRYWAIT", 5, "5 SYNCS"),
        ("SHFL.BFLY", 15, "15 SHFL"),
        ("ATOMG.E.ADD.STRONG.GPU", 3, "3 ATOM"),
        ("DFMA", 7, "7 DFMA"),
        ("LDS.128", 3, "3 LDS"),
        ("STS.128", 1, "1 STS"),
        ("HMNMX2.BF16_V2.NAN", 7, "7 HMNMX2"),
        ("FENCE.VIEW.ASYNC.S", 2, "2 FENCE"),
    ):
        (failure,) = failures(name, code={instruction: few})
        assert words in failure
    assert "160 registers, expected 168" in failures(name, registers=160)
    (failure,) = failures(name, name=name.replace("13BlockEndShape", "5Shape"))
    assert failure == "its name spells no configuration"
    assert "it is built for nothing else" in failures(name, arch="80")[0]


def test_a_projection_has_values_of_its_own():
    assert failures(PLAIN, code={"LDG.E.128.CONSTANT": 4}) == []
    (failure,) = failures(PROJECTED, code={"LDG.E.128.CONSTANT": 7})
    assert failure.startswith("7 LDG") and failure.endswith("at least 8")


def test_names_and_shared_memory():
    name = "bn_add_act_conv_stats_tma<BFloat16, channels left 128x256 3 stages"
    assert rules.short_name(PLAIN) == f"{name}>"
    assert rules.short_name(PROJECTED) == f"{name} projected>"
    (failure,) = failures(PLAIN, name=PLAIN.replace("Li256ELi3E", "Li256ELi4E"))
    assert "bytes of shared memory, at most 232448" in failure
