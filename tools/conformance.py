"""Each function of csrc/ptx over random bits: the emulator against the GPU, where there is one.

    python tools/conformance.py                        # what `make conformance` runs
    python tools/conformance.py --require-gpu --json build/conformance.json

Results must agree bit for bit; those of matrix products exactly on integers, elsewhere within the
rounding error of their sums, with NaN where NaN. It also says how the GPU rounds such sums. Without
a GPU the emulator is compared with itself under its other schedules; tests/test_conformance.py
holds it against the PTX manual. The exit status is 0 if all agree, 1 if not.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import emulated
import numpy as np
import toolchain
from _conformance_cases import Cases, Words, all_cases

ROOT = Path(__file__).resolve().parent.parent
# Beyond this size a partial sum may overflow or not, as the order of the terms has it.
NEAR_OVERFLOW = 2.0**127
SCHEDULES = tuple(
    (f"--asynchrony={asynchrony}", f"--order={order}", f"--seed={seed}")
    for seed, (asynchrony, order) in enumerate(
        [("eager", "forward"), ("lazy", "reverse"), ("random", "shuffled"), ("lazy", "shuffled")]
    )
)

HANG_S = 20.0
"""On a GPU all instructions take a second or two."""

Run = Callable[[list[Cases]], list[Words]]


@dataclass(frozen=True)
class Outcome:
    """How two results of one family compare.

    Attributes:
        instruction: its name.
        family: of the inputs.
        words: how many results were compared.
        wrong: how many of them disagree.
        worst: of products, the largest difference as a share of the bound.
        undecided: of products, how many are too near overflow to be compared.
        first: the first disagreement in words, or "".
        question: the manual leaves it open, so that nothing here is wrong.
    """

    instruction: str
    family: str
    words: int
    wrong: int
    worst: float = 0.0
    undecided: int = 0
    first: str = ""
    question: bool = False

    def line(self) -> str:
        """For the table."""
        said = "exact" if self.worst == 0 else f"within {self.worst:.2f} of the bound"
        if self.undecided:
            said += f", {self.undecided} near overflow left out"
        if self.wrong:
            said = f"FAILED: {self.wrong} differ; {self.first}"
        if self.question:
            said = f"left open: {self.wrong} differ" if self.wrong else "left open: agree"
        return f"{self.instruction:28} {self.family:30} {self.words:6} words  {said}"


class Broken:
    """What an instruction does to its process, here, costs the others nothing.

    Attributes:
        sm: of the GPU, 10 times its capability.
        why: instruction -> how its process ended.
    """

    def __init__(self, sm: int) -> None:
        self.sm, self.why = sm, dict[str, str]()

    def run(self, program: Path, folder: Path) -> None:
        """Runs the program over a folder, again without the instruction that it ended in."""
        said = subprocess.run([str(program), "--list"], capture_output=True, text=True, check=True)
        listed = [line.split() for line in said.stdout.splitlines()]
        able = [name for name, _, _, oldest in listed if int(oldest) <= self.sm]
        for name in self.why:
            (folder / f"{name}.in").unlink(missing_ok=True)
        while left := [name for name in able if (folder / f"{name}.in").is_file()]:
            command = [str(program), "--folder", str(folder)]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, check=False, timeout=HANG_S
                )
                if done.returncode == 0:
                    return
                words = done.stderr.strip() or f"exit status {done.returncode}"
            except subprocess.TimeoutExpired:
                words = f"no end within {HANG_S:g} s: it hangs"
            for name in left:  # in the program's order, which writes each result when it has it
                (folder / f"{name}.in").unlink()
                if not (folder / f"{name}.out").is_file():
                    self.why[name] = words
                    break

    def outcomes(self) -> list[Outcome]:
        """One of each."""
        return [Outcome(name, "none", 0, 1, first=why) for name, why in self.why.items()]


def execute(
    program: Path,
    cases: list[Cases],
    options: tuple[str, ...] = (),
    broken: Broken | None = None,
) -> list[Words]:
    """The output words of each of `cases`, or empty ones where the device is too old.

    Args:
        program: built from csrc/driver/conformance*.cu.
        cases: what to run.
        options: of the program.
        broken: takes the instructions that the program ended in, whose words are empty.

    Raises:
        RuntimeError: the program failed; with its words.
    """
    names = dict.fromkeys(case.instruction for case in cases)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for instruction in names:
            parts = [case.words for case in cases if case.instruction == instruction]
            (folder / f"{instruction}.in").write_bytes(np.concatenate(parts).tobytes())
        if broken is not None:
            broken.run(program, folder)
        else:
            command = [str(program), "--folder", name, *options]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
            if done.returncode != 0:
                raise RuntimeError(f"{program.name}: {done.stderr.strip() or done.returncode}")
        results: list[Words] = []
        offset = dict.fromkeys(names, 0)
        for case in cases:
            path = folder / f"{case.instruction}.out"
            words = np.fromfile(path, np.uint32) if path.is_file() else np.zeros(0, np.uint32)
            count = sum(len(c.words) for c in cases if c.instruction == case.instruction)
            output = words.reshape(count, -1)
            begin = offset[case.instruction]
            offset[case.instruction] += len(case.words)
            results.append(output[begin : begin + len(case.words)])
    return results


def magnitudes(case: Cases) -> Cases:
    """The same products without signs: their result is the sum of the terms' sizes."""
    assert case.sizes is not None
    return Cases(case.instruction, case.family, case.sizes, case.compare)


def compare_products(case: Cases, left: Words, right: Words, sizes: Words) -> Outcome:
    """Within the bound of two sums of k + 1 terms, each off by a last place of their size.

    Args:
        case: the inputs.
        left: one result.
        right: the other.
        sizes: the emulator's result on `magnitudes(case)`.
    """
    a, b, size = (x.view(np.float32).astype(np.float64) for x in (left, right, sizes))
    nan = np.isnan(size)
    undecided = ~nan & (size > NEAR_OVERFLOW)
    decided = ~nan & ~undecided
    with np.errstate(all="ignore"):
        bound = 2 * (case.depth + 2) * (2.0**-23 * size + 2.0**-149)
        share = np.where(decided, np.abs(a - b) / bound, 0)
        share = np.where(np.isnan(share), np.inf, share)
    bad = (nan & ~(np.isnan(a) & np.isnan(b))) | (share > 1)
    return Outcome(
        case.instruction,
        case.family,
        a.size,
        int(bad.sum()),
        float(np.where(bad, 0, share).max()),
        int(undecided.sum()),
        _first(bad, left, right),
    )


def _first(bad: np.ndarray, left: Words, right: Words) -> str:
    if not bad.any():
        return ""
    case, word = (int(i[0]) for i in np.nonzero(bad))
    one, other = int(left[case, word]), int(right[case, word])
    return f"case {case}, word {word}: {one:#010x}, not {other:#010x}"


def compare(case: Cases, left: Words, right: Words, sizes: Words | None = None) -> Outcome:
    """Compares two results as the case asks.

    Args:
        case: the inputs.
        left: the emulator's result.
        right: the other one.
        sizes: for "products", the emulator's result on `magnitudes(case)`.

    Raises:
        ValueError: the results have different sizes.
    """
    if left.shape != right.shape:
        raise ValueError(f"{case.instruction}: {left.shape} words against {right.shape}")
    if case.compare == "products":
        assert sizes is not None
        return compare_products(case, left, right, sizes)
    bad = left != right
    if case.compare == "floats":
        bad &= ~(np.isnan(left.view(np.float32)) & np.isnan(right.view(np.float32)))
    return Outcome(
        case.instruction,
        case.family,
        left.size,
        int(bad.sum()),
        first=_first(bad, left, right),
        question=case.compare == "question",
    )


def compare_all(cases: list[Cases], emulator: Run, other: Run) -> list[Outcome]:
    """One outcome a family; families that `other` cannot run are left out."""
    sizes = iter(emulator([magnitudes(case) for case in cases if case.compare == "products"]))
    outcomes = []
    for case, left, right in zip(cases, emulator(cases), other(cases), strict=True):
        size = next(sizes) if case.compare == "products" else None
        if right.size:
            outcomes.append(compare(case, left, right, size))
    return outcomes


def rounding(cases: list[Cases], nearest: Run, zero: Run, other: Run) -> dict[str, dict[str, int]]:
    """How `other` rounds sums of two terms, where the two ways differ.

    Returns:
        By instruction: how many sums agree with "nearest", with "zero", with neither ("other").
    """
    chosen = [case for case in cases if case.family == "one product"]
    found = {}
    for case, up, down, seen in zip(
        chosen, nearest(chosen), zero(chosen), other(chosen), strict=True
    ):
        telling = up != down
        votes = {
            "nearest": int((telling & (seen == up)).sum()),
            "zero": int((telling & (seen == down)).sum()),
        }
        votes["other"] = int(telling.sum()) - votes["nearest"] - votes["zero"]
        found[case.instruction] = votes
    return found


def gpu() -> tuple[str, str] | None:
    """Name and architecture ("90a") of the first GPU, or None."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    first = done.stdout.strip().splitlines()[:1]
    if done.returncode != 0 or not first:
        return None
    name, capability = (part.strip() for part in first[0].rsplit(",", 1))
    number = capability.replace(".", "")
    return name, "90a" if number == "90" else number


def digest() -> str:
    """A hash of all that the program is made of."""
    known = hashlib.sha256()
    for room in ("driver", "launch", "ptx"):
        for path in sorted((ROOT / "csrc" / room).iterdir()):
            known.update(f"{room}/{path.name}\n".encode() + path.read_bytes())
    return known.hexdigest()


def build_for(architecture: str) -> Path:
    """The program built by nvcc, once for each state of the sources.

    Args:
        architecture: such as "80" or "90a".

    Raises:
        SystemExit: no nvcc, or it failed.
    """
    nvcc, why = toolchain.find_nvcc()
    if nvcc is None:
        raise SystemExit(f"error: {why}")
    sources = sorted(ROOT.glob("csrc/driver/conformance*.cu"))
    sources.append(ROOT / "csrc/driver/driver_arguments.cpp")
    sources += [ROOT / "csrc/launch" / name for name in ("tensor_map.cu", "tensor_map_rules.cpp")]
    key = hashlib.sha256(repr((nvcc, architecture, digest())).encode()).hexdigest()[:12]
    folder = ROOT / "build" / f"conformance-sm_{architecture}-{key}"
    program = folder / "conformance"
    if program.is_file():
        return program
    folder.mkdir(parents=True, exist_ok=True)
    machine = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    strict = ["-Xcudafe", "--promote_warnings", "-Xptxas", "--warning-as-error"]
    flags = ["-std=c++20", "-O2", machine, *strict]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.name}.o"
        _call([nvcc.path, *flags, "-c", str(source), "-o", str(target)])
        return target

    with concurrent.futures.ThreadPoolExecutor() as pool:
        objects = list(pool.map(compile_one, sources))
    _call([nvcc.path, machine, *map(str, objects), "-o", str(program)])
    return program


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"error: {' '.join(command)}\n{done.stdout}{done.stderr}")


def emulator_program() -> Path:
    """The emulated program, built if it is not there or older than its sources."""
    if not emulated.current("conformance"):
        emulated.build("plain", ["conformance"], max(2, (os.cpu_count() or 2) // 2))
    return emulated.output("conformance")


def both_programs(architecture: str) -> tuple[Path, Path]:
    """The emulated program and the GPU's, built at once."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        emulator, hardware = pool.submit(emulator_program), pool.submit(build_for, architecture)
        return emulator.result(), hardware.result()


def main(arguments: list[str] | None = None) -> int:
    """Compares and prints; 0 if everything agrees."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", type=int, default=256, help="blocks an instruction and family")
    parser.add_argument("--seed", type=int, default=0, help="of the random bits")
    parser.add_argument("--require-gpu", action="store_true", help="fail where there is none")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcome there")
    options = parser.parse_args(arguments)
    device = gpu()
    if device is None and options.require_gpu:
        print("error: no GPU found (nvidia-smi shows none)", file=sys.stderr)
        return 1
    program, built = both_programs(device[1]) if device else (emulator_program(), None)
    cases = all_cases(options.seed, options.cases)

    def emulator(*schedule: str) -> Run:
        return lambda some: execute(program, some, schedule)

    record: dict[str, object] = {"seed": options.seed, "cases": options.cases}
    if device is None:
        print("no GPU: the emulator is compared with itself, under other schedules")
        others = [emulator(*schedule) for schedule in SCHEDULES[1:]]
        others.append(emulator("--rounding=zero"))
        outcomes = [o for other in others for o in compare_all(cases, emulator(), other)]
        record["device"] = None
    else:
        name, architecture = device
        print(f"{name}, sm_{architecture}, against the emulator")
        assert built is not None
        broken = Broken(int(architecture.rstrip("a")))
        hardware: Run = lambda some: execute(built, some, broken=broken)  # noqa: E731
        outcomes = compare_all(cases, emulator(), hardware)
        outcomes += broken.outcomes()
        sound = [case for case in cases if case.instruction not in broken.why]
        sums = rounding(sound, emulator(), emulator("--rounding=zero"), hardware)
        record |= {"device": name, "architecture": architecture, "rounding": sums}
        for instruction, votes in sums.items():
            counted = ", ".join(f"{count} as {way}" for way, count in votes.items())
            print(f"{instruction}: sums of two terms round {counted}")
    failed = [outcome for outcome in outcomes if outcome.wrong and not outcome.question]
    for outcome in outcomes if device else failed:
        print(outcome.line())
    print(f"{len(outcomes)} comparisons, {len(failed)} failed")
    if options.json:
        record["outcomes"] = [asdict(outcome) for outcome in outcomes]
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
