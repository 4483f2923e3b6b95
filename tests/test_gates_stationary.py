"""tools/gates.py on conv_bn_stats whose filters stay: what it catches in its machine code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.append(str(TOOLS))

import _cuda_rules as rules  # noqa: E402  (it lies in tools/)

SHAPE = "NS_15StationaryShapeILi8ELi4EEE"
PLAIN = (
    f"_ZN12resnet_fused31conv_bn_stats_stationary_kernelINS_8BFloat16E{SHAPE}EEvNS_21"
    "ConvStatsTmaArgumentsE"
)
NORMED = PLAIN.replace(SHAPE, f"NS_14TransformShapeI{SHAPE}E")
COMMON = {
    "HGMMA.64x128x16.F32.BF16": 8, "WARPGROUP.DEPBAR.LE": 2, "UTMALDG.4D": 1, "UTMALDG.2D": 1,
    "UTMALDG.4D.IM2COL": 1, "UTMASTG.3D": 2, "STSM.16.MT88.4": 16,
    "SYNCS.PHASECHK.TRANS64.TRYWAIT": 7, "USETMAXREG.DEALLOC.CTAPOOL": 1,
    "USETMAXREG.TRY_ALLOC.CTAPOOL": 1, "SHFL.BFLY": 16, "ATOMG.E.ADD.STRONG.GPU": 4, "DFMA": 158,
}  # fmt: skip
CODE = {
    PLAIN: COMMON,
    NORMED: COMMON | {
        "LDS.128": 7, "STS.128": 7, "HMNMX2.BF16_V2.NAN": 12, "LDG.E.128.CONSTANT": 4,
        "FENCE.VIEW.ASYNC.S": 4, "SYNCS.PHASECHK.TRANS64.TRYWAIT": 9,
    },
}  # fmt: skip


def failures(of, name=None, arch="90a", registers=168, code=None):
    counts = CODE[of] | (code or {})
    early = rules.Early(waits=1, triggers=1, constants=1)
    return rules.Kernel(name or of, arch, registers, instructions=counts, early=early).failures()


@pytest.mark.parametrize("name", CODE, ids=["as_it_is", "behind_a_norm"])
def test_it_is_held_to_its_instructions(name):
    assert failures(name) == []
    for instruction, few, words in (
        ("HGMMA.64x128x16.F32.BF16", 4, "4 products of 128 columns, expected 8"),
        ("WARPGROUP.DEPBAR.LE", 3, "3 waits for products, expected 2"),
        ("UTMALDG.4D", 0, "0 UTMALDG"),
        ("UTMALDG.2D", 0, "0 UTMALDG"),
        ("UTMALDG.4D.IM2COL", 0, "0 UTMALDG"),
        ("UTMASTG.3D", 1, "1 UTMASTG"),
        ("STSM.16.MT88.4", 15, "15 STSM"),
        ("SYNCS.PHASECHK.TRANS64.TRYWAIT", 4, "4 SYNCS"),
        ("SHFL.BFLY", 15, "15 SHFL"),
        ("ATOMG.E.ADD.STRONG.GPU", 3, "3 ATOM"),
        ("DFMA", 7, "7 DFMA"),
    ):
        (failure,) = failures(name, code={instruction: few})
        assert words in failure
    assert "160 registers, expected 168" in failures(name, registers=160)
    (failure,) = failures(name, name=name.replace("15StationaryShape", "5Shape"))
    assert failure == "its name spells no configuration"
    assert "it is built for nothing else" in failures(name, arch="80")[0]


def test_what_is_transformed_is_held_to_whole_units_and_pairs():
    for instruction, few in (
        ("LDS.128", 3), ("STS.128", 3), ("HMNMX2.BF16_V2.NAN", 7), ("LDG.E.128.CONSTANT", 3),
        ("FENCE.VIEW.ASYNC.S", 2), ("SYNCS.PHASECHK.TRANS64.TRYWAIT", 7),
    ):  # fmt: skip
        (failure,) = failures(NORMED, code={instruction: few})
        assert failure.startswith(f"{few} ")


def test_names_and_shared_memory():
    name = "conv_bn_stats_stationary<BFloat16, filters of 4 steps stay, 8 stages"
    assert rules.short_name(PLAIN) == f"{name}>"
    assert rules.short_name(NORMED) == f"{name} transformed>"
    (failure,) = failures(PLAIN, name=PLAIN.replace("Li8ELi4E", "Li8ELi8E"))
    assert "bytes of shared memory, at most 232448" in failure
