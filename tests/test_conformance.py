"""csrc/ptx in the emulator against the PTX manual, and what `make conformance` would notice."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import emulated
import fragment_tables as manual
import numpy as np
import pytest
import wgmma_tables

sys.path.append(str(emulated.TOOLS))
import _conformance_cases as inputs
import _conformance_wgmma as wgmma
import conformance

pytestmark = pytest.mark.emulated

ROOT = emulated.TOOLS.parent
CASES = inputs.all_cases(seed=1, cases=24)
EXPECTED = manual.expected() | {
    "setmaxnreg": lambda words: words,
    "wgmma_groups": wgmma_tables.groups,
    **{
        name: lambda words, shape=shape: wgmma_tables.exact_words(words, *shape)
        for name, shape in wgmma.NAMES.items()
    },
}
PRODUCTS = [case for case in CASES if case.instruction in inputs.MMA]
WIDE = [case for case in CASES if case.instruction in wgmma.NAMES and case.compare == "products"]
SIMPLE = [c for c in CASES if c.instruction not in inputs.MMA and c.compare != "products"]
DEPTH = {"mma_m16n8k16_bf16": 16, "mma_m16n8k16_f16": 16, "mma_m16n8k8_tf32": 8}


def identity(case: inputs.Cases) -> str:
    return f"{case.instruction}-{case.family}".replace(" ", "_")


@pytest.fixture(scope="module")
def program() -> Path:
    """The emulated conformance program; a skip, or an error in `make emulated`, without it."""
    why = emulated.why_not("conformance")
    if why is not None:
        (pytest.fail if emulated.required() else pytest.skip)(why)
    return emulated.builder.output("conformance")


@pytest.fixture(scope="module", params=conformance.SCHEDULES, ids=" ".join)
def scheduled(program: Path, request: pytest.FixtureRequest) -> dict[str, np.ndarray]:
    """The results of all instructions but sums that round, under one schedule."""
    results = conformance.execute(program, SIMPLE, request.param)
    return {identity(case): words for case, words in zip(SIMPLE, results, strict=True)}


@pytest.fixture(scope="module", params=["nearest", "zero"])
def products(program: Path, request: pytest.FixtureRequest) -> tuple[str, dict[str, np.ndarray]]:
    """The results of the products under one rounding."""
    results = conformance.execute(program, PRODUCTS, (f"--rounding={request.param}",))
    found = {identity(case): words for case, words in zip(PRODUCTS, results, strict=True)}
    return request.param, found


@pytest.mark.parametrize("case", SIMPLE, ids=identity)
def test_the_emulator_does_what_the_manual_says(
    scheduled: dict[str, np.ndarray], case: inputs.Cases
) -> None:
    got = scheduled[identity(case)]
    want = EXPECTED[case.instruction](case.words).reshape(got.shape)
    bad = got != want
    if case.compare == "floats":
        bad &= ~(np.isnan(got.view(np.float32)) & np.isnan(want.view(np.float32)))
    if case.instruction == "to_tf32":  # the manual is silent on NaN; see the test below
        bad &= ~np.isnan(case.words.view(np.float32))
    assert not bad.any(), f"{bad.sum()} of {bad.size} words, first at {np.argwhere(bad)[0]}"


def test_tf32_of_a_nan_is_the_addition_free_mask(scheduled: dict[str, np.ndarray]) -> None:
    # What nvcc 13 makes of cvt.rna.tf32 for sm_80 to sm_100: LOP3 with 0xFFFFE000 on a NaN's bits.
    case = next(case for case in SIMPLE if case.instruction == "to_tf32")
    nan = np.isnan(case.words.view(np.float32))
    assert nan.sum() > 10
    assert (scheduled[identity(case)][nan] == case.words[nan] & 0xFFFFE000).all()


def truncated(values: np.ndarray) -> np.ndarray:
    """float64 -> float32 toward zero; beyond the range infinite."""
    with np.errstate(over="ignore"):
        near = values.astype(np.float32)
    over = np.isfinite(near) & (np.abs(near.astype(np.float64)) > np.abs(values))
    return np.where(over, np.nextafter(near, np.float32(0)), near)


@pytest.mark.parametrize("name", inputs.MMA)
def test_products_of_integers_are_exact(
    products: tuple[str, dict[str, np.ndarray]], name: str
) -> None:
    case = next(c for c in PRODUCTS if (c.instruction, c.family) == (name, "integers"))
    exact, size = manual.product(*manual.product_operands(name, case.words))
    assert size.max() < 2**24
    got = manual.accumulator_matrix(products[1][identity(case)].reshape(-1, 32, 4))
    assert (got == exact).all()


@pytest.mark.parametrize("name", inputs.MMA)
def test_sums_round_as_the_schedule_says(
    products: tuple[str, dict[str, np.ndarray]], name: str
) -> None:
    rounding, results = products
    case = next(c for c in PRODUCTS if (c.instruction, c.family) == (name, "one product"))
    exact, _ = manual.product(*manual.product_operands(name, case.words))
    got = manual.accumulator_matrix(results[identity(case)].reshape(-1, 32, 4))
    nearest, zero = exact.astype(np.float32), truncated(exact)
    assert (nearest != zero).mean() > 0.2  # else the inputs would not tell
    assert (got == (zero if rounding == "zero" else nearest)).all()


@pytest.mark.parametrize("family", ["numbers", "any bits"])
@pytest.mark.parametrize("name", inputs.MMA)
def test_products_are_within_the_error_of_a_sum(
    products: tuple[str, dict[str, np.ndarray]], name: str, family: str
) -> None:
    rounding, results = products
    case = next(c for c in PRODUCTS if (c.instruction, c.family) == (name, family))
    exact, size = manual.product(*manual.product_operands(name, case.words))
    bits = results[identity(case)].reshape(-1, 32, 4)
    got = manual.accumulator_matrix(bits)
    nan = np.isnan(exact)
    assert (np.isnan(got[nan])).all()
    assert (bits[np.isnan(bits.view(np.float32))] == 0x7FFFFFFF).all()  # one NaN for all
    infinite = np.isinf(exact)
    with np.errstate(all="ignore"):
        decided = np.isfinite(exact) & (size < conformance.NEAR_OVERFLOW)
    operands_infinite = infinite & np.isinf(got)
    assert (np.sign(got[operands_infinite]) == np.sign(exact[operands_infinite])).all()
    assert decided.mean() > (0.99 if family == "numbers" else 0.05)
    if rounding == "zero":
        assert (got[decided] == truncated(exact)[decided]).mean() > 0.999
    # Half a last place of the size for each of the k sums.
    bound = DEPTH[name] * (2.0**-24 * size + 2.0**-150) * (2 if rounding == "zero" else 1)
    assert (np.abs(got[decided] - exact[decided]) <= bound[decided]).all()


@pytest.fixture(scope="module", params=["nearest", "zero"])
def wide(program: Path, request: pytest.FixtureRequest) -> tuple[str, list[np.ndarray]]:
    """The results of wgmma where sums round, under one rounding."""
    schedule = (f"--rounding={request.param}", "--asynchrony=random", "--order=shuffled")
    return request.param, conformance.execute(program, WIDE, schedule)


def test_wide_products_are_within_the_error_of_a_sum(wide: tuple[str, list[np.ndarray]]) -> None:
    rounding, results = wide
    rounds = 0
    for case, words in zip(WIDE, results, strict=True):
        kind, columns = wgmma.NAMES[case.instruction]
        exact, size = wgmma_tables.product(case.words, kind, columns)
        got = words.view(np.float32).astype(np.float64)
        bound = case.depth * 2.0**-24 * size * (2 if rounding == "zero" else 1)
        assert (np.abs(got - exact) <= bound).all(), identity(case)
        rounds += int((got != exact).sum())
        if rounding == "zero":
            assert (got == truncated(exact)).all()
    assert rounds > 1e5


def test_every_layout_of_wgmma_is_tried() -> None:
    seen = {kind: set() for kind in wgmma.WIDTHS}
    for case in CASES:
        if case.instruction in wgmma.NAMES and case.compare != "question":
            kind, _ = wgmma.NAMES[case.instruction]
            seen[kind] |= {tuple(words[[5, 3, 11, 9]]) for words in case.words}
    majors = (wgmma.K_MAJOR, wgmma.MN_MAJOR)
    ways = {
        (where, swizzle if where != wgmma.REGISTERS else 0, where_b, swizzle_b)
        for where in (*majors, wgmma.REGISTERS)
        for swizzle in wgmma.SPANS
        for where_b in majors
        for swizzle_b in wgmma.SPANS
    }
    assert seen["bf16"] == ways
    for kind in ("tf32", "e4m3"):
        assert {way[1] for way in seen[kind]} == {way[3] for way in seen[kind]} == set(wgmma.SPANS)


def test_fragment_tables_cover_each_element_once() -> None:
    tables = {
        (16, 16): manual.a_m16n8k16(),
        (16, 8): manual.b_m16n8k16(),
        (16, 8, "tf32 a"): manual.a_m16n8k8_tf32(),
        (8, 8): manual.b_m16n8k8_tf32(),
        (16, 8, "c"): manual.accumulators(),
        (64, 136): wgmma_tables.accumulators(136),
        (64, 8): wgmma_tables.fragment("tf32"),
        (64, 16): wgmma_tables.fragment("bf16"),
        (64, 32): wgmma_tables.fragment("e4m3"),
    }
    for shape, (row, col) in tables.items():
        seen = np.zeros(shape[:2], int)
        np.add.at(seen, (row, col), 1)
        assert (seen == 1).all(), shape


def public_functions() -> set[str]:
    """The functions of csrc/ptx that kernels call."""
    found = set()
    for path in (ROOT / "csrc" / "ptx").glob("*.h"):
        text = re.sub(
            r"namespace detail \{.*?\n\}  // namespace detail", "", path.read_text(), flags=re.S
        )
        found |= set(re.findall(r"^RF_DEVICE [\w ]+?[ *&]+(\w+)\(", text, re.M))
    return found


def test_every_function_of_csrc_ptx_is_tried() -> None:
    kernels = "".join(path.read_text() for path in (ROOT / "csrc" / "driver").glob("conformance*"))
    functions = public_functions()
    assert {"cp_async", "ldmatrix_x4", "shuffle_up", "dynamic_shared"} <= functions
    functions.remove("keep")  # no instruction: it speaks to the compiler
    assert {"wgmma", "wgmma_wait_group", "increase_registers"} <= functions
    missing = {name for name in functions if not re.search(rf"ptx::{name}\b", kernels)}
    assert not missing
    listed = {case.instruction for case in CASES}
    assert listed == set(EXPECTED) | set(inputs.MMA)


def test_every_listed_instruction_has_inputs(program: Path) -> None:
    command = [str(program), "--list"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    sizes = {line.split()[0]: int(line.split()[1]) for line in lines}
    assert sizes == {case.instruction: case.words.shape[1] for case in CASES}


# ---- What the comparison with a GPU would notice


def wrong_by_one_bit(words: np.ndarray, bit: int) -> np.ndarray:
    changed = words.copy()
    changed[-1, -5] ^= np.uint32(1 << bit)
    return changed


def test_an_answer_that_the_manual_leaves_open_is_told_and_not_wrong() -> None:
    words = np.arange(8, dtype=np.uint32)[None]
    case = inputs.Cases("wgmma_bf16_64", "shifted", words, "question")
    assert conformance.compare(case, words, words).line().endswith("left open: agree")
    outcome = conformance.compare(case, words, words + np.uint32(1))
    assert outcome.question and outcome.line().endswith("left open: 8 differ")


@pytest.mark.parametrize("case", [c for c in SIMPLE if c.compare != "question"], ids=identity)
def test_one_wrong_bit_is_noticed(scheduled: dict[str, np.ndarray], case: inputs.Cases) -> None:
    right = scheduled[identity(case)]
    assert conformance.compare(case, right, right).wrong == 0
    outcome = conformance.compare(case, right, wrong_by_one_bit(right, 3))
    assert outcome.wrong == 1
    assert "FAILED" in outcome.line()


def test_a_nan_for_a_number_is_noticed() -> None:
    case = inputs.Cases("atomic_add_float", "any bits", np.zeros((1, 4), np.uint32), "floats")
    nans = np.full((1, 4), 0x7FC00000, np.uint32)
    other = np.full((1, 4), 0x7FFFFFFF, np.uint32)
    assert conformance.compare(case, nans, other).wrong == 0
    assert conformance.compare(case, nans, np.zeros((1, 4), np.uint32)).wrong == 4


@pytest.mark.parametrize("name", inputs.MMA)
def test_a_wrong_product_is_noticed(program: Path, name: str) -> None:
    case = next(c for c in PRODUCTS if (c.instruction, c.family) == (name, "numbers"))
    (right,) = conformance.execute(program, [case])
    (sizes,) = conformance.execute(program, [conformance.magnitudes(case)])
    swapped = right.reshape(-1, 32, 4)[:, :, [0, 1, 3, 2]].reshape(right.shape)
    last_place = right ^ np.uint32(1)
    assert conformance.compare(case, right, last_place, sizes).wrong == 0
    assert conformance.compare(case, right, swapped, sizes).wrong > right.size // 4
    assert conformance.compare(case, right, right ^ np.uint32(1 << 20), sizes).wrong > 0


@pytest.mark.parametrize("way", ["nearest", "zero"])
def test_the_way_of_rounding_is_recognised(program: Path, way: str) -> None:
    def run(option: str):
        return lambda cases: conformance.execute(program, cases, (f"--rounding={option}",))

    votes = conformance.rounding(PRODUCTS, run("nearest"), run("zero"), run(way))
    assert set(votes) == set(inputs.MMA)
    for found in votes.values():
        assert found[way] > 300
        assert sum(found.values()) == found[way]


def test_a_missing_gpu_fails_only_where_it_is_required(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(conformance, "gpu", lambda: None)
    assert conformance.main(["--require-gpu"]) == 1
    assert "no GPU" in capsys.readouterr().err


PROGRAM = """#!{python}
import pathlib, sys, time
names = [("first", 80), ("crashes", 80), ("hangs", 80), ("young", 100), ("last", 90)]
if "--list" in sys.argv:
    print("\\n".join(f"{{name}} 4 4 {{sm}}" for name, sm in names))
    sys.exit(0)
folder = pathlib.Path(sys.argv[sys.argv.index("--folder") + 1])
for name, sm in names:
    given = folder / f"{{name}}.in"
    if not given.exists() or sm > 90:
        continue
    if name == "hangs":
        time.sleep(60)
    if name == "crashes":
        sys.exit("error: cudaMemcpy: an illegal memory access was encountered")
    (folder / f"{{name}}.out").write_bytes(given.read_bytes())
"""


def test_what_an_instruction_does_to_its_process_costs_that_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(conformance, "HANG_S", 5.0)
    program = tmp_path / "program"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    words = np.arange(8, dtype=np.uint32).reshape(2, 4)
    names = ("last", "hangs", "young", "crashes", "first")
    cases = [inputs.Cases(name, "any bits", words) for name in names]
    broken = conformance.Broken(90)
    for _ in range(2):  # what is known of one is not tried again
        results = conformance.execute(program, cases, broken=broken)
        found = {case.instruction: result for case, result in zip(cases, results, strict=True)}
        assert {name for name, result in found.items() if result.size} == {"first", "last"}
        assert np.array_equal(found["last"], words)
    said = {outcome.instruction: outcome for outcome in broken.outcomes()}
    assert set(said) == {"crashes", "hangs"} and all(outcome.wrong for outcome in said.values())
    assert "illegal memory access" in said["crashes"].line()
    assert "no end within 5 s" in said["hangs"].first
    with pytest.raises(RuntimeError, match="illegal memory access"):
        conformance.execute(program, cases[:1] + cases[3:])


def test_wrong_calls_of_the_program_say_what_is_accepted(program: Path, tmp_path: Path) -> None:
    (tmp_path / "shuffle.in").write_bytes(bytes(12))
    calls = {
        ("--folder", str(tmp_path)): "a multiple of 68",
        (): "--folder or --list",
        ("--folder", str(tmp_path / "none")): "holds no",
        ("--folder", str(tmp_path), "--plant", "a:1"): "FILE:LINE:INSTRUCTION:FAULT",
    }
    for options, words in calls.items():
        done = subprocess.run([str(program), *options], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert words in done.stderr


# ---- The faults that each function offers

# Faults that change nothing in a kernel of csrc/driver/conformance_*.cu, and why.
SAME_BYTES = {("st.shared", "chunk_off")}  # what it writes is the same everywhere: zeros
OVERWRITTEN = {("ld.global", "chunk_off"), ("st.shared", "skip"), ("st.shared", "chunk_off")}
HARMLESS: dict[str, set[tuple[str, str]]] = {
    # Every copy there is valid, so that no mask can be left out.
    "cp_async_groups": {("cp.async.cg", "ignore_predicate")},
    "cp_async_mbarrier": {("cp.async.ca", "ignore_predicate")},
    # The halves of K change places in both operands; the first product of a chain ignores the
    # accumulator; without the first commit the first chain's two groups are one.
    "wgmma_groups": {
        ("st.shared", "chunk_off"),
        ("wgmma.f16", "stale_accumulator"),
        ("wgmma.commit_group", "skip"),
    },
    # All bytes of the slots are copied over.
    "cp_async_16": OVERWRITTEN,
    "shared_16": {("st.shared", "skip"), *SAME_BYTES},
    **{f"shared_{size}": SAME_BYTES for size in (1, 2, 4, 8)},
    # Order of global memory between threads of one block: the emulator's is in order anyway, and
    # only ThreadSanitizer, which does not run here, hears of it.
    "atomic_add_acq_rel": {("atom.acq_rel.add.u32", "no_fence")},
    "store_release_load_acquire": {
        ("bar.warp.sync", "skip"),
        ("st.release", "no_fence"),
        ("ld.acquire", "no_fence"),
    },
    "reduce_add_release": {
        ("bar.warp.sync", "skip"),
        ("red.release.add.u32", "no_fence"),
        ("red.release.add.u32", "non_atomic"),  # nobody else changes the flag
        ("ld.acquire", "no_fence"),
    },
    "fence_acq_rel_gpu": {
        ("bar.warp.sync", "skip"),
        ("fence.acq_rel", "no_fence"),
        ("atom.add.u32", "non_atomic"),  # where the flag is raised: nobody else changes it
    },
}
# Nothing runs ahead of this launch; the probes of early launches notice it.
HARMLESS["grid_dependency"] = {("griddepcontrol.wait", "skip")}
HARMLESS |= {f"tma_load{name}": SAME_BYTES for name in ("", "_im2col", "_tf32", "_im2col_tf32")}
HARMLESS |= {
    # Both blocks take each other for themselves.
    name: {*SAME_BYTES, ("mapa", "wrong_lane")}
    for name in ("tma_load_multicast", "tma_load_im2col_multicast")
}
# Only the first arrival hands words over; no copy completes on its mbarrier.
HARMLESS["mbarrier_cluster"] = {
    ("fence.mbarrier_init", "no_fence"),
    ("mapa", "wrong_lane"),
    ("mbarrier.try_wait.parity.cluster", "skip"),
    ("mbarrier.try_wait.parity.relaxed", "skip"),
}
# What is written behind the wait is not to be seen.
HARMLESS["tma_store"] = HARMLESS["tma_store_im2col"] = {
    ("st.shared", "skip"),
    ("st.shared", "chunk_off"),
}
# One of the waits asks for a phase that is complete in any case.
HARMLESS["mbarrier"] = {("mbarrier.test_wait.parity", "skip")}
# Some schedule shows each of the others.
FAULT_SCHEDULES = (
    ("--asynchrony=lazy", "--order=forward"),
    ("--asynchrony=eager", "--order=reverse"),
    ("--asynchrony=random", "--order=shuffled", "--seed=5"),
)


def faults(program: Path, case: inputs.Cases) -> list[str]:
    """FILE:LINE:INSTRUCTION:FAULT of everything that one instruction's kernel can be given."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / f"{case.instruction}.in").write_bytes(case.words[:2].tobytes())
        command = [str(program), "--folder", name, "--sites"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def noticed(program: Path, case: inputs.Cases, right: np.ndarray, fault: str) -> bool:
    """Whether some schedule fails with the fault planted, or gives another result."""
    for schedule in FAULT_SCHEDULES:
        try:
            (got,) = conformance.execute(program, [case], (*schedule, f"--plant={fault}"))
        except RuntimeError as error:
            if "conformance_" not in str(error):  # the message names the kernel's line
                raise
            return True
        if (got != right).any():
            return True
    return False


# Of the many widths of wgmma some.
FAULTED = ("wgmma_bf16_64", "wgmma_f16_16", "wgmma_tf32_8")


def tried_with_faults(case: inputs.Cases) -> bool:
    if case.instruction in wgmma.NAMES:
        return case.instruction in FAULTED and case.family == "numbers"
    return case.family in ("any bits", "numbers") or case.instruction == "wgmma_groups"


@pytest.mark.parametrize("case", list(filter(tried_with_faults, CASES)), ids=identity)
def test_every_fault_changes_what_the_instruction_does(program: Path, case: inputs.Cases) -> None:
    (right,) = conformance.execute(program, [case])
    offered = faults(program, case)
    assert offered
    unnoticed = {
        tuple(fault.rsplit(":", 2)[1:])
        for fault in offered
        if not noticed(program, case, right, fault)
    }
    assert unnoticed == HARMLESS.get(case.instruction, set())
