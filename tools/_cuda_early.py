"""Programmatic dependent launch in the gates: what a CUDA kernel does before it waits.

Read from the machine code: where `griddepcontrol.wait` (ACQBULK) and `.launch_dependents` (PREEXIT)
stand, which instructions can run before the wait, and which of the kernel's pointers the addresses
of those that touch memory come from. csrc/launch/flow.h says what is allowed.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

WAIT, TRIGGER = "ACQBULK", "PREEXIT"
PARAMETERS = {"90a": 0x210, "100": 0x380, "120": 0x380}
"""Where a kernel's parameters begin in constant bank 0, on architectures that can begin early."""
MEMORY = re.compile(
    r"(LDG|STG|LD|ST|ATOM|ATOMG|RED|REDG|LDGSTS|LDGMC|CCTL|UBLKCP|UBLKPF|UBLKRED|"
    r"UTMALDG|UTMAPF|UTMASTG|UTMAREDG)(\.|$)"
)
"""What reads or writes global memory, or asks for it."""
FORGETS = "CCTL.IVALL"
"""Empties L1, behind a barrier of a cluster; reads and writes nothing."""
PREFETCH = re.compile(r"CCTL\..*PF2")
ENDS = re.compile(r"(EXIT|RET|KILL|BPT)(\.|$)")
JUMPS = re.compile(r"(BRA|BRX|BRXU|JMP|JMX|JMXU|CALL)(\.|$)")
LOADS = re.compile(r"(LDG|LD|LDS|LDSM|LDL|ATOM|ATOMG|ATOMS|S2R|S2UR|SHFL)(\.|$)")
"""What gives values that no address comes from."""
WINDOW = 0x198
"""Where constant bank 0 of sm_90a holds the address of the parameters themselves (seen in what
ptxas 13.0 makes; no manual says it): TMA reads its tensor maps there."""
MAPS = 1 << 20
"""Of an origin: the address of the parameters, and so many bytes into them."""


@dataclass(frozen=True)
class Instruction:
    """One instruction: address, predicate ("@P0", "" for none), opcode, operands."""

    address: int
    predicate: str
    opcode: str
    operands: tuple[str, ...]


@dataclass(frozen=True)
class Rule:
    """What a kernel may touch before it waits.

    Attributes:
        constants: bytes into the kernel's parameters where pointers to constants lie.
        others: likewise, of its other pointers.
        maps: likewise, where tensor maps of constants lie themselves.
        brings: whether it touches a constant at all before the wait, as it is meant to.
    """

    constants: frozenset[int] = frozenset()
    others: frozenset[int] = frozenset()
    brings: bool = False
    maps: frozenset[int] = frozenset()


# csrc/launch/*_arguments.cpp and *_plan.cpp assert these places.
_HEAD = frozenset({0, 24, 32})
RULES = {
    "ceilings_launch_kernel": Rule(frozenset(), frozenset({0})),
    "conv_bn_act_kernel": Rule(frozenset({8, 272, 280}), frozenset({0, 232, 240, 256, 264}), True),
    # Aligned to 128 bytes, its parameters begin 0x70 bytes behind the others' first ones. Maps of
    # x, weight, residual and out, then scale and shift.
    "conv_bn_act_tma_kernel": Rule(
        frozenset({0x270, 0x278}), frozenset(), True, frozenset({0x70 + 128})
    ),
    # The same arguments; behind them the norm's scale and shift, and what parts leave: arrivals,
    # moments, merged ones, stats.
    "conv_bn_stats_tma_kernel": Rule(
        frozenset(),
        frozenset({0x70 + 768, 0x70 + 776, *range(0x70 + 824, 0x70 + 856, 8)}),
        True,
        frozenset({0x70 + 128}),
    ),
    "conv_bn_stats_stationary_kernel": Rule(
        frozenset(),
        frozenset({0x70 + 768, 0x70 + 776, *range(0x70 + 824, 0x70 + 856, 8)}),
        True,
        frozenset({0x70 + 128}),
    ),
    # The same arguments; behind them the maps of the shortcut and of the block's output, then scale
    # and shift of a projection's BatchNorm.
    "bn_add_act_conv_stats_tma_kernel": Rule(
        frozenset(),
        frozenset(
            {0x70 + 768, 0x70 + 776, *range(0x70 + 824, 0x70 + 856, 8), 0x70 + 1280, 0x70 + 1288}
        ),
        True,
        frozenset({0x70 + 128}),
    ),
    # Those of conv_bn_act_window_kernel, and behind them the same as of conv_bn_stats_tma_kernel.
    "conv_bn_stats_window_kernel": Rule(
        frozenset(),
        frozenset({0x1F0, 0x70 + 512, 0x70 + 520, *range(0x70 + 584, 0x70 + 616, 8)}),
        True,
        frozenset({0x70 + 128}),
    ),
    # The same arguments.
    "conv_bn_stats_stream_kernel": Rule(
        frozenset(),
        frozenset({0x1F0, 0x70 + 512, 0x70 + 520, *range(0x70 + 584, 0x70 + 616, 8)}),
        True,
        frozenset({0x70 + 128}),
    ),
    # The same as of conv_bn_act_tma_kernel, and behind them residual and out.
    "conv_bn_act_cluster_kernel": Rule(
        frozenset({0x270, 0x278}), frozenset({0x370, 0x378}), True, frozenset({0x70 + 128})
    ),
    # Likewise: maps of x, weight and residual, then out, scale and shift.
    "conv_bn_act_window_kernel": Rule(
        frozenset({0x1F8, 0x200}), frozenset({0x1F0}), True, frozenset({0x70 + 128})
    ),
    # Likewise: maps of x, shortcut, weight, projection, next, out and following, then vectors.
    "conv_chain_tma_kernel": Rule(
        frozenset(range(0x70 + 896, 0x70 + 944, 8)),
        frozenset({0x70 + 944}),
        True,
        frozenset({0x70 + 256, 0x70 + 384, 0x70 + 512}),
    ),
    # Likewise: maps of x, shortcut, the front's filters, weight, projection and next, then vectors.
    "conv_chain_window_kernel": Rule(
        frozenset(range(0x70 + 768, 0x70 + 832, 8)),
        frozenset({0x70 + 832, 0x70 + 856}),
        True,
        frozenset({0x70 + 256, 0x70 + 384, 0x70 + 512, 0x70 + 640}),
    ),
    # The same arguments.
    "conv_chain_stream_kernel": Rule(
        frozenset(range(0x70 + 768, 0x70 + 832, 8)) - {0x70 + 800, 0x70 + 808},
        frozenset({0x70 + 832, 0x70 + 856}),
        True,
        frozenset({0x70 + 256, 0x70 + 384, 0x70 + 640}),
    ),
    "conv_chain_kernel": Rule(
        frozenset({72, 80, 88, 128, 136, 144, 184, 192, 200, 240, 248, 256}),
        frozenset({0, 24, 48, 296, 320}),
        True,
    ),
    "stem_kernel": Rule(frozenset({8, 16, 24, 32}), frozenset({0, 40}), True),
    "stem_wgmma_kernel": Rule(frozenset({8, 16, 24, 32}), frozenset({0, 40}), True),
    "head_linear_kernel": Rule(frozenset({8, 16}), _HEAD, True),
    "head_mean_kernel": Rule(frozenset({8, 16}), _HEAD),
    "bn_act_vector_kernel": Rule(),
    "bn_act_strided_kernel": Rule(),
}
"""By what a kernel's mangled name holds. A kernel of `bn_act` touches nothing at all."""


@dataclass
class Early:
    """What a kernel's machine code says of the kernels around it.

    Attributes:
        waits, triggers: how many of them there are.
        wrong: what stands before the wait and must not, as sentences.
        constants: accesses before the wait that are allowed.
    """

    waits: int = 0
    triggers: int = 0
    wrong: list[str] = field(default_factory=list)
    constants: int = 0

    def checks(self, rule: Rule) -> dict[str, bool]:
        """The gates, as sentences."""
        return {
            f"{self.waits} waits for the kernel ahead, expected 1": self.waits == 1,
            f"{self.triggers} triggers of the next kernel, expected 1": self.triggers == 1,
            "; ".join(dict.fromkeys(self.wrong)): not self.wrong,
            "no constant is asked for before the wait": self.constants > 0 or not rule.brings,
        }


def rule_of(name: str) -> Rule | None:
    """The rule of a kernel that may begin early; None of any other."""
    return next((rule for part, rule in RULES.items() if part in name), None)


def instruction(line: str) -> Instruction | None:
    """A line of cuobjdump's -sass, or None where it holds no instruction."""
    found = re.match(r"\s*/\*(\w{4,})\*/\s+(?:(@!?\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);", line)
    if found is None:
        return None
    address, predicate, opcode, operands = found.groups()
    parts = tuple(part.strip() for part in operands.split(",")) if operands.strip() else ()
    return Instruction(int(address, 16), predicate or "", opcode, parts)


def read(code: Sequence[Instruction], arch: str, rule: Rule) -> Early:
    """What a kernel does before its wait.

    Args:
        code: all of its instructions.
        arch: a key of `PARAMETERS`.
        rule: its own.
    """
    found = Early(
        sum(one.opcode.startswith(WAIT) for one in code),
        sum(one.opcode.startswith(TRIGGER) for one in code),
    )
    if found.waits != 1:
        return found
    states = _before_the_wait(code, PARAMETERS[arch])
    for place, state in states.items():
        one = code[place]
        if one.opcode.startswith(WAIT) and one.predicate:
            found.wrong.append("the wait is left out at times")
        if one.opcode.startswith(TRIGGER):
            found.wrong.append("the next kernel is let begin before the wait")
        if ENDS.match(one.opcode):
            found.wrong.append(f"{one.opcode} before the wait")
        if JUMPS.match(one.opcode) and _target(one) is None:
            found.wrong.append(f"{one.opcode} to a place of its own before the wait")
        if not MEMORY.match(one.opcode) or one.opcode.startswith(FORGETS):
            continue
        origin = _origin(one, state)
        allowed = origin & rule.constants and not origin & rule.others and -1 not in origin
        reads = one.opcode.startswith(("LDG", "LD.")) or PREFETCH.match(one.opcode)
        if one.opcode.startswith("UTMALDG"):
            allowed = reads = bool(origin) and origin <= {MAPS + place for place in rule.maps}
        if allowed and reads:
            found.constants += 1
        else:
            known = rule.constants | rule.others | {-1}
            maps = {place - MAPS for place in origin if place >= MAPS}
            places = ", ".join(map(str, sorted(origin & known | maps)))
            what = f"{one.opcode} at {one.address:#x} of the pointers at {places or 'no place'}"
            found.wrong.append(f"{what} before the wait")
    return found


State = dict[str, frozenset[int]]
"""Register -> the places of 8 bytes in the parameters that its value comes from; -1: any."""


def _before_the_wait(code: Sequence[Instruction], base: int) -> dict[int, State]:
    """The state ahead of each instruction that can run before the wait has, and of the wait."""
    places = {one.address: place for place, one in enumerate(code)}
    states: dict[int, State] = {0: {}}
    todo = deque([0])
    while todo:
        place = todo.popleft()
        one, state = code[place], dict(states[place])
        if one.opcode.startswith(WAIT):
            continue
        _write(one, state, base)
        following = []
        target = _target(one)
        if target is not None:
            following.append(places[target])
        # A branch may hang on an operand too: BRA.DIV on whether the warp has diverged.
        alone = target is not None and len(one.operands) == 1
        always = not one.predicate and (alone or ENDS.match(one.opcode))
        if not always and place + 1 < len(code):
            following.append(place + 1)
        for after in following:
            known = states.get(after)
            if known is None:
                states[after] = dict(state)
                todo.append(after)
            elif _join(known, state):
                todo.append(after)
    return states


def _join(known: State, more: State) -> bool:
    """Adds what another way brings; whether that is news."""
    news = False
    for register, origin in more.items():
        if not origin <= known.get(register, frozenset()):
            known[register] = known.get(register, frozenset()) | origin
            news = True
    return news


def _target(one: Instruction) -> int | None:
    """Where a branch or a call leads."""
    if not JUMPS.match(one.opcode):
        return None
    found = re.fullmatch(r"0x([0-9a-f]+)", one.operands[-1] if one.operands else "")
    return int(found[1], 16) if found else None


_REGISTER = re.compile(r"\b(U?R)(\d+)(\.64)?")


def _registers(text: str) -> list[str]:
    found = []
    for kind, number, pair in _REGISTER.findall(text):
        found += [f"{kind}{int(number) + i}" for i in range(2 if pair else 1)]
    return found


def _origin(one: Instruction, state: State) -> frozenset[int]:
    """Which parameters the global address of an access comes from."""
    brackets = [text for text in one.operands if "[" in text]
    # A copy to shared memory names that first; a descriptor stands before its address.
    address = re.findall(r"\[([^\]]*)\]", brackets[-1])[-1] if brackets else ""
    if "desc" not in (brackets[-1] if brackets else "") and ".64" not in address:
        address = re.sub(r"^(U?R\d+)", r"\1.64", address)
    parts = [state.get(register, frozenset()) for register in _registers(address)]
    return frozenset().union(*parts)


def _write(one: Instruction, state: State, base: int) -> None:
    """What an instruction does to the state."""
    operands = one.operands
    if operands and re.fullmatch(r"U?P(\d|T)", operands[0]):  # a predicate beside the register
        operands = operands[1:]
    if not operands or one.opcode.startswith("ST"):
        return
    written = re.fullmatch(r"(U?R)(\d+)(\.reuse)?", operands[0])
    if written is None:
        return
    parts = one.opcode.split(".")
    wide = 4 if "128" in parts else 2 if {"64", "WIDE"} & set(parts) else 1
    pairs = wide > 1 or parts[0].endswith("64")  # sources may be pairs that the text names by one
    brings = parts[0] in ("LDC", "ULDC", "LDCU")  # words in a row, one a register
    origin: frozenset[int] = frozenset()
    if not LOADS.match(one.opcode):
        for text in operands[1:]:
            for register in _registers(text):
                kind, number = re.fullmatch(r"(U?R)(\d+)", register).groups()
                for i in range(2 if pairs else 1):
                    origin |= state.get(f"{kind}{int(number) + i}", frozenset())
            if not brings:
                origin |= _constants(text, base)
    # With a carry and no product a vector register's upper half is added to by IMAD.X as well.
    adds = parts[0] in ("UIADD3", "IADD3")
    adds |= parts[:2] == ["IMAD", "X"] and operands[1:3] == ("RZ", "RZ")
    if any(place >= MAPS for place in origin) and adds:
        # Into the parameters by a number; the upper half of such an address says no more.
        further = sum(int(text, 16) for text in operands if re.fullmatch("0x[0-9a-f]+", text))
        rest = {place for place in origin if place < MAPS}
        moved = {place + further for place in origin if place >= MAPS}
        origin = frozenset(rest if "X" in parts else rest | moved)
    for i in range(wide):
        more = _constants(operands[1], base - 4 * i) if brings else frozenset()
        register = f"{written[1]}{int(written[2]) + i}"
        before = state.get(register, frozenset()) if one.predicate else frozenset()
        state[register] = before | origin | more


def _constants(text: str, base: int) -> frozenset[int]:
    """The place in the parameters of a word that an operand reads."""
    found: set[int] = set()
    for index in re.findall(r"c\[0x0\]\[([^\]]*)\]", text):
        if index != "RZ" and not re.fullmatch(r"0x[0-9a-f]+", index):
            found.add(-1)  # worked out: it could be any
            continue
        if index == f"{WINDOW:#x}":
            found.add(MAPS)
            continue
        found.add(((0 if index == "RZ" else int(index, 16)) - base) // 8 * 8)
    return frozenset(place for place in found if place >= -1)
