"""tools/gates.py on windows in slices beside a ring of filters: what it catches in machine code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.append(str(TOOLS))

import _cuda_rules as rules  # noqa: E402  (it lies in tools/)

AS_IT_IS = (
    "_ZN12resnet_fused27conv_bn_stats_stream_kernelINS_8BFloat16ENS_17StreamWindowShapeILi192ELi6EE"
    "EEEvNS_24ConvStatsWindowArgumentsE"
)
STATS = AS_IT_IS.replace(
    "NS_17StreamWindowShapeILi192ELi6EEE",
    "NS_14TransformShapeINS_17StreamWindowShapeILi192ELi6EEEEE",
)
COMMON = {
    "HGMMA.64x192x16.F32.BF16": 4, "WARPGROUP.DEPBAR.LE": 2, "UTMALDG.4D": 2,
    "UTMALDG.4D.IM2COL": 2, "SYNCS.PHASECHK.TRANS64.TRYWAIT": 14, "STSM.16.MT88.4": 12,
    "STG.E.128": 13, "SHFL.BFLY": 8, "ATOMG.E.ADD.STRONG.GPU": 2, "DFMA": 84,
    "USETMAXREG.DEALLOC.CTAPOOL": 1, "USETMAXREG.TRY_ALLOC.CTAPOOL": 1,
}  # fmt: skip
CODE = {
    AS_IT_IS: COMMON,
    STATS: COMMON | {
        "SYNCS.PHASECHK.TRANS64.TRYWAIT": 16, "LDS.128": 18, "STS.128": 6,
        "LDG.E.128.CONSTANT": 4, "HMNMX2.BF16_V2.NAN": 16, "FENCE.VIEW.ASYNC.S": 2,
    },
}  # fmt: skip


def failures(of, name=None, arch="90a", registers=168, code=()):
    one = rules.Early(waits=1, triggers=1, constants=1)
    counts = CODE[of] | dict(code)
    return rules.Kernel(name or of, arch, registers, instructions=counts, early=one).failures()


@pytest.mark.parametrize("of", CODE, ids=["as_it_is", "transformed"])
def test_it_is_held_to_its_instructions(of):
    assert failures(of) == []
    for planted, words in (
        ({"arch": "80"}, "it is built for nothing else"),
        ({"registers": 160}, "160 registers, expected 168"),
        ({"name": of.replace("Li192E", "Li256E")}, "0 products of 256 columns"),
        ({"name": of.replace("Li6E", "Li16E")}, "246784 bytes of shared memory, at most"),
        ({"name": of.replace("StreamWindowShape", "Shape")}, "its name spells no configuration"),
    ):
        assert any(words in said for said in failures(of, **planted)), planted
    for opcode, count in CODE[of].items():
        fewer = {"UTMALDG.4D.IM2COL": 0, "SYNCS.PHASECHK.TRANS64.TRYWAIT": 5, "DFMA": 3}
        fewer |= {"LDS.128": 3, "STS.128": 3, "LDG.E.128.CONSTANT": 3, "HMNMX2.BF16_V2.NAN": 7}
        said = failures(of, code={opcode: fewer.get(opcode, count - 1)})
        assert len(said) >= 1, (opcode, said)


def test_their_names_are_readable():
    assert rules.short_name(AS_IT_IS) == (
        "conv_bn_stats_stream<BFloat16, windows for 192 pixels in slices, 6 stages>"
    )
    assert rules.short_name(STATS) == (
        "conv_bn_stats_stream<BFloat16, windows for 192 pixels in slices, 6 stages transformed>"
    )


DGRAD = (
    "_ZN12resnet_fused27conv_bn_dgrad_stream_kernelINS_8BFloat16ENS_18BnDgradStreamShapeILi192ELi6EE"
    "EEvNS_22BnDgradWindowArgumentsE"
)
DGRAD_CODE = {
    "HGMMA.64x192x16.F32.BF16": 4, "WARPGROUP.DEPBAR.LE": 2, "UTMALDG.4D": 2,
    "UTMALDG.4D.IM2COL": 10, "SYNCS.PHASECHK.TRANS64.TRYWAIT": 20, "STSM.16.MT88.4": 48,
    "LDSM.16.MT88.4": 48, "STG.E.128": 13, "ATOMG.E.ADD.STRONG.GPU": 2, "VOTE.ANY": 8,
    "FENCE.VIEW.ASYNC.S": 3, "USETMAXREG.DEALLOC.CTAPOOL": 1, "USETMAXREG.TRY_ALLOC.CTAPOOL": 1,
}  # fmt: skip


def test_the_gradients_is_held_to_its_own():
    def said_of(name=DGRAD, arch="90a", registers=168, code=()):
        counts = DGRAD_CODE | dict(code)
        return rules.Kernel(name, arch, registers, instructions=counts).failures()

    assert said_of() == []
    assert rules.short_name(DGRAD) == (
        "conv_bn_dgrad_stream<BFloat16, windows for 192 pixels in slices, 6 stages>"
    )
    for planted, words in (
        ({"arch": "80"}, "it is built for nothing else"),
        ({"registers": 160}, "160 registers, expected 168"),
        ({"name": DGRAD.replace("Li192E", "Li256E")}, "0 HGMMA"),
        ({"name": DGRAD.replace("Li6E", "Li16E")}, "bytes of shared memory, at most"),
        ({"name": DGRAD.replace("StreamShape", "Shape")}, "its name spells no configuration"),
    ):
        assert any(words in one for one in said_of(**planted)), planted
    fewer = {"UTMALDG.4D.IM2COL": 3, "SYNCS.PHASECHK.TRANS64.TRYWAIT": 7, "VOTE.ANY": 5}
    fewer |= {"FENCE.VIEW.ASYNC.S": 1}
    for opcode, count in DGRAD_CODE.items():
        assert said_of(code={opcode: fewer.get(opcode, count - 1)}), opcode
