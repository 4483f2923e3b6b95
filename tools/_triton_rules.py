"""What the gates ask of the Triton kernels' machine code, each with its reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import _triton_aot as aot

STACK_BESIDE_GROUPS = 64
"""Bytes of stack where groups share a tile: what the second pass after a NaN keeps, at most."""

STACK_BESIDE_PARTS = 80
"""The same of three-term products, whose operands are two parts each: 72 on sm_100 and sm_120, in
the smallest tile that there is."""

STACK_BESIDE_LOOP = 16
"""Bytes of stack outside the main loop, four registers: read back once a tile, not once a step."""

STACK_BESIDE_TAPS = 64
"""The same where taps are unrolled, sixteen registers: read back once a tap, whose loop has four
steps or more. Nine loops in a row share what they keep across each other."""

STACK_RAGGED = 256
"""The same where rows of channels are no multiple of 16 bytes: elements are stored one by one, for
each of which a place is kept across the loop. Such loads, not the stack, bound these kernels."""

LOCAL_RAGGED = 2
"""Accesses to the stack in their main loop, at most, beside dozens of single-element loads."""

SLACK = 2048
"""Bytes of shared memory beside operands and results: barriers, scale, reductions over warps."""


@dataclass(frozen=True)
class Rule:
    """What is particular to one kernel.

    Attributes:
        matrix: whether it multiplies matrices.
        rows: tensors of BLOCK_M rows that it reads in each step.
        vectors: loads of one value a row or column in each step, which can't be 16 bytes wide; of
            kernels without matrices, all narrower loads.
        more: constants of the kernel that mean more, as {name: (rows, vectors)}.
        stores: narrower stores: sums by channel, single bytes.
        planned: whether the chooser's account of shared memory is this kernel's.
        across: whether 16-byte accesses are meant where channels are side by side alone.
        transposed: whether an operand lies across the reduction in memory. The instructions take
            32-bit operands along it alone, so float32 ones are loaded to be turned round.
        strides: parameters that are strides or channel counts. Where each of them is 1 or a
            multiple of 16, and so are the pointers, accesses can be 16 bytes wide. None: none are
            meant.
    """

    matrix: bool
    rows: int = 1
    vectors: int = 0
    more: dict[str, tuple[int, int]] = field(default_factory=dict)
    stores: int = 0
    planned: bool = True
    transposed: bool = False
    across: bool = False
    strides: tuple[str, ...] | None = None


def _strides(*tensors: str, dims: str = "nhw") -> tuple[str, ...]:
    return tuple(f"{tensor}_{dim}" for tensor in tensors for dim in dims)


_CHANNELS = ("channels", "filters", "group_in", "group_out")
_WEIGHT = _strides("weight", dims="krs")
_MASKED = {"MASKED": (1, 0)}
RULES = {
    "conv_bn_act_kernel": Rule(
        True, strides=(*_CHANNELS, *_strides("x"), *_WEIGHT, *_strides("residual", "out"))
    ),
    "conv_dgrad_kernel": Rule(
        True, vectors=1, more=_MASKED, transposed=True,
        strides=(*_CHANNELS, *_strides("dy", "y"), *_WEIGHT, *_strides("dx")),
    ),
    "conv_wgrad_kernel": Rule(
        True, more=_MASKED, transposed=True,
        strides=(*_CHANNELS, *_strides("dy", "y", "x"), *_strides("dweight", dims="krs")),
    ),
    "merge_kernel": Rule(False, strides=("channels", *_strides("residual", "out"))),
    "wgrad_merge_kernel": Rule(
        False, strides=("count", "group_in", *_strides("dweight", dims="krs"))
    ),
    "bn_act_kernel": Rule(
        False, vectors=2, across=True, strides=_strides("x", "residual", "out")
    ),
    "conv_bn_stats_kernel": Rule(
        True, more={"PROLOGUE": (0, 2)}, stores=16,
        strides=(*_CHANNELS, *_strides("x"), *_WEIGHT, *_strides("out")),
    ),
    "bn_add_act_conv_stats_kernel": Rule(
        True, rows=2, vectors=2, more={"NORMED": (0, 2)}, stores=16,
        strides=(
            "channels", "filters", *_strides("y", "residual"), "weight_k",
            *_strides("out", "z"),
        ),
    ),
    "stats_merge_kernel": Rule(False),
    "merge_moments_kernel": Rule(False),
    "merge_chunks_kernel": Rule(False),
    "conv_bn_dgrad_kernel": Rule(
        True, more={"AFFINE": (1, 3)}, stores=16, transposed=True,
        strides=(*_CHANNELS, *_strides("dz", "y"), *_WEIGHT, *_strides("addend", "raw", "dx")),
    ),
    "bn_dgrad_merge_kernel": Rule(False),
    "conv_bn_dgrad_end_kernel": Rule(
        True, more={"AFFINE": (1, 3)}, stores=24, transposed=True,
        strides=(*_CHANNELS, *_strides("dz", "y"), *_WEIGHT, *_strides("addend", "end", "dx")),
    ),
    "bn_dgrad_end_merge_kernel": Rule(False),
    "sums_kernel": Rule(False),
    "conv_bn_wgrad_kernel": Rule(
        True, more={"AFFINE": (1, 0)}, transposed=True,
        strides=(*_CHANNELS, *_strides("dz", "y", "x"), *_strides("dweight", dims="krs")),
    ),
    "conv_bn_grad1x1_kernel": Rule(True, planned=False),
    "conv_bn_grad1x1_end_kernel": Rule(True, planned=False),
    "conv_chain_kernel": Rule(
        True, vectors=2, more={"PROJECTED": (0, 2)}, planned=False,
        strides=(
            "inner", "channels", "filters", "depth", "below",
            *_strides("x", "residual", "projected", "out", "following"),
            "weight_k", "projection_k", "next_k", "front_k",
        ),
    ),
    # Loads are 8 bytes wide where images are dense, and single elements elsewhere.
    "stem_kernel": Rule(True, planned=False),
    "head_kernel": Rule(True, planned=False),
    "pack_kernel": Rule(False),
    "mean_kernel": Rule(False),
    "bn_add_act_kernel": Rule(
        False, vectors=2, more={"SHORTCUT": (0, 2)}, across=True,
        strides=_strides("y", "residual", "out"),
    ),
    "bn_add_act_backward_kernel": Rule(
        False, vectors=3, more={"PROJECTED": (0, 1)}, stores=3, across=True,
        strides=_strides("dout", "out", "y", "residual", "dz"),
    ),
    "bn_backward_apply_kernel": Rule(
        False, vectors=3, across=True, strides=_strides("dz", "y", "dy")
    ),
    "bn_act_pool_kernel": Rule(
        False, vectors=2, stores=2, across=True, strides=_strides("y", "out", "taps")
    ),
    "bn_act_pool_backward_kernel": Rule(
        False, vectors=3 + 8, stores=2, across=True, strides=_strides("dout", "taps", "y", "dz")
    ),
    "merge_sums_kernel": Rule(False),
    "bn_finalize_kernel": Rule(False),
    "bn_update_stats_kernel": Rule(False),
    "bn_backward_finalize_kernel": Rule(False),
}  # fmt: skip


@dataclass(frozen=True)
class Gate:
    """One check.

    Attributes:
        name: for the list of gates.
        reason: why it is one.
        check: what is wrong with a variant's code on an architecture; empty if nothing is.
    """

    name: str
    reason: str
    check: Callable[[aot.Variant, aot.Code, aot.Architecture], str]


def _side(variant: aot.Variant) -> int:
    return variant.constant("SIDE", 1)


def _ragged(variant: aot.Variant) -> bool:
    """Whether a matrix kernel's elements go one by one.

    Where channels are no multiple of 16, and where a row of an image is no run in memory.
    """
    counts = [name for name in _CHANNELS if name in variant.signature]
    scattered = variant.constant("DENSE", True) is False
    return RULES[variant.kernel].matrix and (scattered or not all(map(variant.known, counts)))


def _no_stack(variant: aot.Variant, code: aot.Code, _: aot.Architecture) -> str:
    local = code.count("LDL|STL")
    if _side(variant) > 1:
        three_terms = variant.constant("PRECISION", "") == "tf32x3"
        most = STACK_BESIDE_PARTS if three_terms else STACK_BESIDE_GROUPS
        return f"{code.stack} bytes of stack, at most {most}" if code.stack > most else ""
    unrolled = (
        variant.constant("FLAT", True) is False
        and variant.constant("R") * variant.constant("S") > 1
    )
    most = STACK_BESIDE_TAPS if unrolled else STACK_BESIDE_LOOP
    if _ragged(variant):
        most = STACK_RAGGED
    if code.stack > most or (code.stack and not code.loops):
        where = f"at most {most} bytes, beside the main loop"
        return f"{code.stack} bytes of stack, {local} LDL or STL, {where}"
    return ""


def _no_spill_in_loop(variant: aot.Variant, code: aot.Code, _: aot.Architecture) -> str:
    local = code.count("LDL|STL", loop=True)
    if local <= (LOCAL_RAGGED if _ragged(variant) else 0):
        return ""
    return f"{local} LDL or STL in the main loop, none allowed"


def _registers(variant: aot.Variant, code: aot.Code, _: aot.Architecture) -> str:
    need = code.registers_of_block
    if code.registers > 255 or need > aot.REGISTERS:
        return (
            f"{code.registers} registers x {code.warps} warps are {need}, at most {aot.REGISTERS}"
        )
    return ""


def _shared_fits(variant: aot.Variant, code: aot.Code, architecture: aot.Architecture) -> str:
    most = architecture.limits.shared_memory
    return f"{code.shared} bytes of shared memory, at most {most}" if code.shared > most else ""


def _itemsize(variant: aot.Variant) -> int:
    """Bytes of an operand's element."""
    if _e4m3(variant):
        return 1
    return 4 if variant.constant("PRECISION") in ("tf32", "tf32x3") else 2


def _e4m3(variant: aot.Variant) -> bool:
    """Whether the operands are."""
    return variant.signature.get("x") == "*fp8e4nv"


def _meant(variant: aot.Variant) -> tuple[int, int]:
    """Tensors that give a row of the product, and loads of one value a row or column."""
    rule = RULES[variant.kernel]
    more = [counts for name, counts in rule.more.items() if variant.constant(name)]
    return rule.rows + sum(rows for rows, _ in more), rule.vectors + sum(n for _, n in more)


def _row_operands(variant: aot.Variant) -> int:
    """How many tensors give a row of the product: gradient and result where ReLU masks."""
    return _meant(variant)[0]


def planned_shared(variant: aot.Variant) -> int:
    """Bytes of shared memory that a matrix kernel is meant to take.

    The operands of each step in flight, or after the loop the results in float32, a slice at a
    time, whatever is more. In a gradient of the weights the input that is made in registers goes
    through shared memory once more where it is multiplied in three terms: its chooser knows. wgmma
    takes the second operand from shared memory alone: of training's three-term products, whose
    first one is made in registers, it finds both parts of a step's weights there.
    """
    m, n, k = (variant.constant(f"BLOCK_{axis}") for axis in "MNK")
    rows, vectors = _meant(variant)
    tiles = _itemsize(variant) * (rows * m + n)
    operands = variant.options["num_stages"] * k * (tiles + 4 * vectors)
    if variant.kernel == "conv_bn_wgrad_kernel" and variant.constant("NORM"):
        operands += n * k * 4 if variant.constant("PRECISION") == "tf32x3" else 0
    three = variant.capability == 90 and variant.constant("PRECISION") == "tf32x3"
    if three and any(map(variant.constant, ("PROLOGUE", "AFFINE"))):
        operands += 2 * n * k * 4
    results = 4 * m * n // variant.constant("SLICES", 1)
    return max(operands, results) + SLACK


def _shared_planned(variant: aot.Variant, code: aot.Code, _: aot.Architecture) -> str:
    rule = RULES[variant.kernel]
    if not rule.matrix or not rule.planned:
        return ""
    most = planned_shared(variant)
    return f"{code.shared} bytes of shared memory, planned are {most}" if code.shared > most else ""


def matrix_kind(variant: aot.Variant) -> str:
    """The matrix instruction that a kernel is meant to use.

    wgmma and tcgen05 compute 64 rows or more; smaller tiles and other architectures use mma.sync.
    Of e4m3 those of sm_90 and 100 are taken apart into 16-bit ones: they are for ragged rows there.
    """
    rows = variant.constant("BLOCK_M") or variant.constant("COLUMNS")
    if _e4m3(variant) and rows >= 64:
        return {90: "QGMMA", 100: "UTCQMMA"}.get(variant.capability, "QMMA")
    if _e4m3(variant):
        return "HMMA" if variant.capability in (90, 100) else "QMMA"
    if rows >= 64:
        return {90: "HGMMA", 100: "UTCHMMA"}.get(variant.capability, "HMMA")
    return "HMMA"


def _matrix(variant: aot.Variant, code: aot.Code, _: aot.Architecture) -> str:
    if not RULES[variant.kernel].matrix:
        return ""
    kind, found = matrix_kind(variant), code.matrix()
    # One channel makes the reduction's length a constant, and its loop may vanish.
    looped = code.loops or variant.constant("group_in") == 1 or variant.constant("group_out") == 1
    if set(found) == {kind} and looped:
        return ""
    listed = ", ".join(f"{n} {name}" for name, n in found.items()) or "no matrix instructions"
    return f"{listed} in {code.loops} loops, {kind} alone expected"


def aligned(variant: aot.Variant) -> bool:
    """Whether 16-byte accesses are possible: Triton knows that pointers and strides allow them."""
    names = rule_strides(variant)
    if _side(variant) > 1 or names is None or set(names) - set(variant.signature):
        return False
    pointers = [name for name, kind in variant.signature.items() if kind.startswith("*")]
    units = [name for name in variant.signature if name.endswith("_c")]
    return all(map(variant.known, pointers)) and all(
        variant.known(name) or variant.constant(name) == 1 for name in names
    ) and all(variant.constant(name) == 1 for name in units)  # fmt: skip


def rule_strides(variant: aot.Variant) -> tuple[str, ...] | None:
    """The parameters that decide about wide accesses; None where none are meant."""
    rule = RULES[variant.kernel]
    if not rule.across or rule.strides is None:
        return rule.strides
    return ("columns", *rule.strides) if variant.constant("BY_CHANNEL") else None


def _small_operands(variant: aot.Variant) -> int:
    """How many operands have too small a tile for each thread to load 16 bytes of it."""
    step = variant.constant("BLOCK_K") * _itemsize(variant)
    enough = 16 * 32 * variant.options["num_warps"]
    return _row_operands(variant) * (variant.constant("BLOCK_M") * step < enough) + (
        variant.constant("BLOCK_N") * step < enough
    )


def _wide_loop(variant: aot.Variant, code: aot.Code, _: aot.Architecture) -> str:
    rule = RULES[variant.kernel]
    turned = rule.transposed and variant.constant("PRECISION") in ("tf32", "tf32x3")
    if turned or not aligned(variant):
        return ""
    wide = code.wide("LDGSTS|LDG", loop=rule.matrix)
    narrow = code.count("LDGSTS|LDG", loop=rule.matrix) - wide
    rows, vectors = _meant(variant)
    if not rule.matrix:
        meant = wide and (narrow <= vectors or not rule.across)
        return "" if meant else f"{wide} loads of 16 bytes and {narrow} narrower ones"
    small = _small_operands(variant)
    if (not wide and small <= rows) or narrow > (vectors + small) * code.loops:
        return f"{wide} loads of 16 bytes and {narrow} narrower ones in the main loop"
    return ""


def _wide_stores(variant: aot.Variant, code: aot.Code, _: aot.Architecture) -> str:
    if not aligned(variant):
        return ""
    wide = code.wide("STG")
    narrow = code.count("STG") - wide
    meant = wide and narrow <= RULES[variant.kernel].stores
    return "" if meant else f"{wide} stores of 16 bytes and {narrow} narrower ones"


def _asynchronous(variant: aot.Variant, code: aot.Code, _: aot.Architecture) -> str:
    if not RULES[variant.kernel].matrix or not aligned(variant):
        return ""
    return "" if code.count("LDGSTS", loop=True) else "no asynchronous copy in the main loop"


def _begins(variant: aot.Variant, code: aot.Code, _: aot.Architecture) -> str:
    """Both PTX and machine code are read: the latter is what runs, the former shows branches."""
    wanted, seen = int(bool(variant.constant("PDL"))), code.dependence
    machine = code.count(aot.WAITS), code.count(aot.TRIGGERS)
    if {(seen.waits, seen.triggers), machine} != {(wanted, wanted)}:
        return (
            f"{seen.waits} waits and {seen.triggers} triggers in PTX, {machine[0]} and "
            f"{machine[1]} in machine code, {wanted} of each expected"
        )
    if variant.options.get("launch_pdl") and not wanted:
        return "launched before the kernel ahead has ended, and does not wait for it"
    if not wanted:
        return ""
    ahead = [*dict.fromkeys(seen.ahead), *code.ahead]
    if ahead or seen.around:
        return f"before the wait: {', '.join(ahead) or 'nothing'}; {seen.around} ways around it"
    # What the kernel ahead writes changes while this one runs.
    constant = sum(n for opcode, n in code.counts.items() if ".CONSTANT" in opcode)
    if seen.read_only + constant:
        return f"{seen.read_only + constant} loads of memory that is taken for read-only"
    return ""


GATES = (
    Gate("stack", "a spilled register costs a trip to memory for each thread; where groups share a "
         "tile, the pass after a NaN may keep a little outside the main loop", _no_stack),
    Gate("loop", "a spill in the main loop is paid for in every step", _no_spill_in_loop),
    Gate("registers", "a block whose registers do not fit can't start", _registers),
    Gate("shared memory", "a block that asks for more than it can have can't start", _shared_fits),
    Gate("planned shared memory", "the chooser counts on the operands in flight; a copy that "
         "nobody planned takes the place of a second block", _shared_planned),
    Gate("matrix instructions", "without them, or with those of an older architecture, a product "
         "runs at half the speed or less", _matrix),
    Gate("wide loads", "16 bytes a thread fill whole lines; narrower loads multiply instructions",
         _wide_loop),
    Gate("wide stores", "likewise", _wide_stores),
    Gate("early begin", "a kernel launched before the one ahead has ended must wait for it, in "
         "every program and before it touches memory; one that is not needs no wait", _begins),
    Gate("asynchronous copies", "a pipeline of one step waits for memory in each", _asynchronous),
)  # fmt: skip


def failures(variant: aot.Variant, code: aot.Code) -> list[str]:
    """The gates that a variant's code does not pass, as sentences."""
    if variant.kernel not in RULES:
        return [f"no rule in {__name__}.RULES names this kernel"]
    architecture = aot.ARCHITECTURES[variant.capability]
    found = ((gate.name, gate.check(variant, code, architecture)) for gate in GATES)
    strangers = set(rule_strides(variant) or ()) - set(variant.signature)
    stale = [f"rule: it names parameters that the kernel lacks: {', '.join(sorted(strangers))}"]
    return [f"{name}: {wrong}" for name, wrong in found if wrong] + (stale if strangers else [])
