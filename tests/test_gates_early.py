"""tools/_cuda_early.py: what it reads from the machine code of kernels that begin early."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.append(str(TOOLS))

import _cuda_early as early  # noqa: E402  (it lies in tools/)
import _cuda_rules as rules  # noqa: E402

NAME = "_ZN12resnet_fused18conv_bn_act_kernelI"
RULE = early.rule_of(NAME)
# Filters by an asynchronous copy and a prefetch, in a loop; x behind the wait.
CODE = """
S2R R0, SR_CTAID.X
ULDC.64 UR4, c[0x0][0x218]
ULDC UR6, c[0x0][0x240]
IMAD.WIDE.U32 R2, R0, UR6, RZ
LDC R9, c[0x0][RZ]
@P0 BRA 0x70
IMAD.MOV.U32 R9, RZ, RZ, RZ
IADD3 R4, P0, R2, UR4, RZ
IADD3.X R5, R3, UR5, RZ, P0, !PT
@!P1 LDGSTS.E.BYPASS.128 [R8], desc[UR10][R4.64]
CCTL.E.PF2 [R4]
@!P0 BRA 0x70
ACQBULK
@P0 PREEXIT
LDC.64 R6, c[0x0][0x210]
LDG.E.128 R12, desc[UR10][R6.64]
STG.E.128 desc[UR10][R6.64], R12
EXIT
"""


def code_of(text: str) -> list[early.Instruction]:
    """The instructions of such a text, an address each."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    made = [early.instruction(f"/*{16 * i:04x}*/ {line} ;") for i, line in enumerate(lines)]
    assert all(one is not None for one in made)
    return [one for one in made if one is not None]


def failures(text: str, rule: early.Rule | None = RULE) -> list[str]:
    """What the gate says of it."""
    assert rule is not None
    found = early.read(code_of(text), "90a", rule).checks(rule)
    return [sentence for sentence, passed in found.items() if not passed]


def test_a_line_of_machine_code():
    line = "        /*12a0*/        @!P1 LDGSTS.E.128 [R8+0x40], desc[UR4][R2.64], P0 ; /* 0x */"
    assert early.instruction(line) == early.Instruction(
        0x12A0, "@!P1", "LDGSTS.E.128", ("[R8+0x40]", "desc[UR4][R2.64]", "P0")
    )
    assert (
        early.instruction("        /*0260*/                   ACQBULK ; /* 0x2e */").operands == ()
    )
    assert early.instruction("                              /* 0x000fe20000000800 */") is None


def test_a_kernel_as_it_should_be_passes():
    assert failures(CODE) == []
    assert early.read(code_of(CODE), "90a", RULE).constants == 2
    kernel = rules.Kernel(NAME, "90a", early=early.Early(waits=1, triggers=1, constants=1))
    assert not any("early" in said or "wait" in said for said in kernel.failures())


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("c[0x0][0x218]", "c[0x0][0x210]", "LDGSTS.E.BYPASS.128 at 0x90 of the pointers at 0 bef"),
        ("c[0x0][0x218]", "c[0x0][0x318]", "of the pointers at 264 before the wait"),
        ("c[0x0][0x218]", "c[0x0][0x250]", "of the pointers at no place before the wait"),
        ("c[0x0][0x218]", "c[0x0][R0]", "of the pointers at -1 before the wait"),
        ("LDC R9, c[0x0][RZ]", "ULDC.64 UR4, c[0x0][0x210]", "of the pointers at 0 before"),
        # On one way alone; by one half of a pair alone.
        ("IMAD.MOV.U32 R9, RZ, RZ, RZ", "@P3 ULDC UR5, c[0x0][0x214]", "at 0, 8 before"),
        ("IMAD.MOV.U32 R9, RZ, RZ, RZ", "LDC.64 R2, c[0x0][0x210]", "at 0, 8 before"),
        ("CCTL.E.PF2 [R4]", "STG.E desc[UR10][R4.64], R0", "STG.E at 0xa0 of the pointers at 8"),
        ("CCTL.E.PF2 [R4]", "REDG.E.ADD desc[UR10][R4.64], R0", "REDG.E.ADD at 0xa0"),
        ("CCTL.E.PF2 [R4]", "PREEXIT", "let begin before the wait"),
        ("CCTL.E.PF2 [R4]", "@P2 EXIT", "EXIT before the wait"),
        ("@P0 BRA 0x70", "@P0 BRA 0x110", "EXIT before the wait"),
        ("\nACQBULK", "\n@P4 ACQBULK", "the wait is left out at times"),
        ("\nACQBULK", "\nNOP", "0 waits for the kernel ahead"),
        ("LDC.64 R6, c[0x0][0x210]", "ACQBULK", "2 waits for the kernel ahead"),
        ("@P0 PREEXIT", "NOP", "0 triggers of the next kernel"),
    ],
)
def test_what_is_planted_is_caught(old, new, words):
    assert CODE.count(old) == 1
    found = failures(CODE.replace(old, new))
    assert any(words in said for said in found), found


# Two pointers come at once, of which the second is no constant (of a network's head: 16 and 24).
PAIR = """
LDC.128 R4, c[0x0][0x220]
LDG.E R9, desc[UR10][R4.64]
ACQBULK
PREEXIT
EXIT
"""
# A store that only the way past a branch leads to.
PAST = """
BRA.DIV UR5, 0x20
STG.E desc[UR10][R6.64], R12
ACQBULK
PREEXIT
EXIT
"""
SHUFFLED = "SHFL.IDX PT, R4, R8, RZ, 0x1f\nSHFL.IDX PT, R5, R9, RZ, 0x1f\n"
HEAD = early.rule_of("head_linear_kernel")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (PAIR, ""),
        (PAIR.replace("[R4.64]", "[R6.64]"), "LDG.E at 0x10 of the pointers at 24 before"),
        # What a lane gives another is no address of anything.
        (PAIR.replace("LDG.E", f"{SHUFFLED}LDG.E"), "at no place before the wait"),
        (PAST, "STG.E at 0x10"),
        (PAST.replace(".DIV UR5", ".U UP0"), "STG.E at 0x10"),
        (PAST.replace("BRA.DIV UR5,", "BRA"), "no constant is asked for"),
        (PAST.replace("BRA.DIV UR5, 0x20", "@P0 BRX R2 -0x100"), "BRX to a place of its own"),
        (PAIR.replace("LDG.E R9,", "UTMAPF.L2.2D [UR4],"), "UTMAPF.L2.2D at 0x10"),
    ],
)
def test_ways_and_pointers_that_are_easily_missed(code, words):
    found = failures(code, HEAD)
    assert any(words in said for said in found) if words else not found, found


# TMA's maps lie in the parameters: filters' before the wait, the image's behind it.
TMA = """
ULDC.64 UR4, c[0x0][0x198]
UMOV UR8, 0x400
UIADD3 UR4, UP0, UR4, 0xf0, URZ
UIADD3.X UR5, URZ, UR5, URZ, UP0, !UPT
UTMALDG.4D [UR8], [UR4]
ACQBULK
@P0 PREEXIT
UTMALDG.4D.IM2COL [UR8], [UR6], UR7
EXIT
"""


def test_filters_come_by_their_map_alone():
    rule = early.rule_of("_ZN12resnet_fused22conv_bn_act_tma_kernelI")
    assert failures(TMA, rule) == []
    for old, new, words in (
        ("0xf0", "0x70", "UTMALDG.4D at 0x40 of the pointers at 112 before the wait"),
        ("c[0x0][0x198]", "c[0x0][0x210]", "at no place before the wait"),
        ("UIADD3 UR4, UP0, UR4, 0xf0", "@P1 UIADD3 UR4, UP0, UR4, 0xf0", "at 0, 240 before"),
        ("UTMALDG.4D [UR8], [UR4]", "UTMASTG.3D [UR4], [UR8]", "UTMASTG.3D at 0x40"),
        ("UTMALDG.4D [UR8], [UR4]", "NOP", "no constant is asked for before the wait"),
    ):
        assert TMA.count(old) == 1
        found = failures(TMA.replace(old, new), rule)
        assert any(words in said for said in found), (old, new, found)


def test_a_map_whose_place_is_reckoned_in_vector_registers():
    """Two copies by one map, apart from each other: its address waits where vectors lie."""
    vectors = TMA.replace(
        """UIADD3 UR4, UP0, UR4, 0xf0, URZ
UIADD3.X UR5, URZ, UR5, URZ, UP0, !UPT
""",
        """LDC.64 R8, c[0x0][0x198]
IADD3 R8, P0, R8, 0xf0, RZ
IMAD.X R9, RZ, RZ, R9, P0
R2UR UR4, R8
R2UR UR5, R9
""",
    )
    rule = early.rule_of("_ZN12resnet_fused22conv_bn_act_tma_kernelI")
    assert vectors.count("IMAD.X") == 1 and failures(vectors, rule) == []
    for old, new, words in (
        ("0xf0", "0x70", "of the pointers at 112 before the wait"),
        ("RZ, RZ, R9", "R3, R3, R9", "of the pointers at 0, 240 before the wait"),
    ):
        found = failures(vectors.replace(old, new), rule)
        assert any(words in said for said in found), (old, new, found)


def test_a_cluster_may_meet_before_the_wait():
    assert failures(CODE.replace("\nACQBULK", "\nUCGABAR_WAIT\nCCTL.IVALL\nACQBULK")) == []


def test_filters_that_do_not_come_early_are_missed():
    late = CODE.replace("@!P1 LDGSTS.E.BYPASS.128 [R8], desc[UR10][R4.64]", "NOP")
    found = failures(late.replace("CCTL.E.PF2 [R4]", "NOP"))
    assert found == ["no constant is asked for before the wait"]


def test_each_kernel_has_its_rule_and_others_none():
    assert early.rule_of("_ZN12resnet_fused16head_mean_kernelI").brings is False
    assert early.rule_of("_ZN12resnet_fused17conv_dgrad_kernelI") is None
    # Training's kernels, and every kernel where there is no such launch, have no such instruction.
    for name, arch in (("_ZN12resnet_fused17conv_dgrad_kernelI", "90a"), (NAME, "80")):
        found = rules.Kernel(name, arch, instructions={"ACQBULK": 1}).failures()
        assert "1 instructions for kernels that begin early, expected none" in found
