"""Builds what runs the CUDA kernels on the CPU, with a C++ compiler and ninja; no nvcc, no torch.

    python tools/emulated.py                  # the modules that the tests import
    python tools/emulated.py --variant asan   # the driver under AddressSanitizer
    python tools/emulated.py --all            # everything
    python tools/emulated.py --sample         # all but what compiles for minutes

Each variant has a folder of its own, build/emulated-<variant>-<hash of compiler and flags>, in
which ninja builds again only what an edit has touched. `current` says whether a program is built
from the sources as they are. The programs:

    _emulated     Python module: any kernel, configuration, schedule and fault on the CPU
    _probes       Python module: the tests' kernels, each with one planted hazard
    driver        the program of csrc/driver/: one op, one shape
    conformance   the program that runs one instruction over given bits
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import shlex
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import toolchain

ROOT = Path(__file__).resolve().parent.parent
COMMON = (
    "-std=c++20 -DRF_EMULATED -Wall -Wextra -Wno-unknown-pragmas -Werror=return-type "
    "-fPIC -fvisibility=hidden -ffp-contract=off -pthread"
)
# With -g1 the sanitizers do not find the lines of templates. Frame pointers make their stacks
# whole. A sanitizer's first finding ends the program, so that it can't go unnoticed.
VARIANTS = {
    "plain": "-O2 -g1",
    "asan": "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all",
    "tsan": "-O1 -g -fno-omit-frame-pointer -fsanitize=thread",
}
# The CPU kernels are the ones that need no emulator.
NOT_EMULATED = ("_cpu.cpp", "_cpu_body.cpp")


@dataclass(frozen=True)
class Program:
    """One thing to link: its own sources and, unless `alone`, every kernel with its launch."""

    name: str
    sources: tuple[str, ...]  # globs from the root
    module: bool  # a Python module, not an executable
    kernels: bool = True
    variants: tuple[str, ...] = ("plain",)
    long: tuple[str, ...] = ()  # variants that compile for minutes: left out of --sample


MAPS = ("csrc/launch/tensor_map*",)  # of the launches, what programs without kernels need
PROBES = tuple(
    f"tests/emulator/{name}.cpp"
    for name in ("hazards", "costs", "copies", "clusters", "products", "grids")
)
PROGRAMS = (
    Program("_emulated", ("csrc/emulated/*.cpp",), module=True),
    Program("_probes", ("tests/emulator/*.cpp", *MAPS), module=True, kernels=False),
    Program(
        "probes",
        ("tests/emulator/program/*.cpp", *PROBES, *MAPS),
        module=False,
        kernels=False,
        variants=("asan", "tsan"),
    ),
    Program(
        "driver",
        ("csrc/driver/driver*.cpp",),
        module=False,
        variants=tuple(VARIANTS),
        long=("asan", "tsan"),
    ),
    Program(
        "conformance",
        ("csrc/driver/conformance*.cu", "csrc/driver/driver_arguments.cpp", *MAPS),
        module=False,
        kernels=False,
    ),
)


def _glob(*patterns: str) -> list[Path]:
    found = {path for pattern in patterns for path in ROOT.glob(pattern)}
    return sorted(path for path in found if path.suffix != ".h")


def runtime_sources() -> list[Path]:
    """The emulator itself."""
    return _glob("csrc/emulator/*.cpp")


def kernel_sources() -> list[Path]:
    """Every launch with its kernels, the CPU's own left out."""
    found = _glob("csrc/launch/*.cpp", "csrc/launch/*.cu")
    return [path for path in found if not path.name.endswith(NOT_EMULATED)]


def flags(variant: str) -> str:
    """The compiler's options for a variant.

    Args:
        variant: one of `VARIANTS`.
    """
    return f"{COMMON} {VARIANTS[variant]}"


def folder(variant: str = "plain") -> Path:
    """Where a variant is built: named by the compiler and all options.

    Args:
        variant: one of `VARIANTS`.

    Raises:
        SystemExit: there is no C++ compiler.
    """
    parts = (compiler(), flags(variant), sys.version, "1")
    key = hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
    return ROOT / "build" / f"emulated-{variant}-{key}"


def compiler() -> str:
    """The C++ compiler.

    Raises:
        SystemExit: there is none.
    """
    found = toolchain.find_cxx()
    if found is None:
        raise SystemExit("error: no C++ compiler found (CXX, c++, g++, clang++)")
    return found


def output(name: str, variant: str = "plain") -> Path:
    """The file of a program, built or not.

    Args:
        name: one of the names in `PROGRAMS`.
        variant: one of `VARIANTS`.
    """
    program = next(program for program in PROGRAMS if program.name == name)
    return folder(variant) / (name + (".so" if program.module else ""))


def current(name: str, variant: str = "plain") -> bool:
    """Whether a program is built, from the sources as they are.

    Args:
        name: one of the names in `PROGRAMS`.
        variant: one of `VARIANTS`.
    """
    plan, ninja = folder(variant) / "build.ninja", toolchain.find_ninja()
    if ninja is None or not plan.is_file() or plan.read_text() != ninja_file(variant):
        return False
    command = [ninja, "-C", str(plan.parent), "-n", output(name, variant).name]
    return "no work to do" in subprocess.run(command, capture_output=True, text=True).stdout


def programs_of(variant: str) -> list[Program]:
    """What a variant holds.

    Args:
        variant: one of `VARIANTS`.
    """
    return [p for p in PROGRAMS if variant in p.variants and _glob(*p.sources)]


def _object(source: Path) -> str:
    return source.relative_to(ROOT).as_posix().replace("/", "_") + ".o"


def ninja_file(variant: str) -> str:
    """What ninja may build.

    Args:
        variant: one of `VARIANTS`.
    """
    import pybind11

    includes = [pybind11.get_include(), sysconfig.get_path("include")]
    # As system headers: their warnings are not ours. Sources are named from the root, so that the
    # call sites in reports are "csrc/kernels/..." on every machine.
    python = " ".join(f"-isystem {shlex.quote(path)}" for path in includes)
    lines = [
        "ninja_required_version = 1.8",
        f"cxx = {shlex.quote(compiler())}",
        f"flags = {flags(variant)} -ffile-prefix-map={shlex.quote(str(ROOT))}/=",
        "python =",
        "shared =",
        "rule cxx",
        "  command = $cxx -x c++ $flags $python -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = c++ $in",
        "rule link",
        "  command = $cxx $flags $shared $in -o $out -ldl",
        "  description = link $out",
    ]
    objects: set[str] = set()
    for program in programs_of(variant):
        own = _glob(*program.sources)
        sources = [*own, *runtime_sources(), *(kernel_sources() if program.kernels else [])]
        for source in sources:
            if _object(source) not in objects:
                objects.add(_object(source))
                lines.append(f"build {_object(source)}: cxx {source}")
                if program.module and source in own:
                    lines.append(f"  python = {python}")
        names = " ".join(map(_object, sources))
        lines.append(f"build {output(program.name, variant).name}: link {names}")
        if program.module:
            lines.append("  shared = -shared")
    return "\n".join(lines) + "\n"


def build(variant: str, names: list[str], jobs: int = 2) -> None:
    """Builds programs, or says why not.

    Args:
        variant: one of `VARIANTS`.
        names: names in `PROGRAMS`.
        jobs: compilers that run at once.

    Raises:
        SystemExit: ninja is missing or a compiler failed; its messages stand above.
    """
    ninja = toolchain.find_ninja()
    if ninja is None:
        raise SystemExit("error: no ninja found (`pip install ninja`)")
    place = folder(variant)
    place.mkdir(parents=True, exist_ok=True)
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two builds at once would write the same objects
        (place / "build.ninja").write_text(ninja_file(variant))
        print(f"emulated ({variant}): {', '.join(names)} in {place.relative_to(ROOT)}", flush=True)
        targets = [output(name, variant).name for name in names]
        command = [ninja, "-C", str(place), "-j", str(jobs), "--quiet", *targets]
        if subprocess.run(command, check=False).returncode != 0:
            raise SystemExit(f"error: the emulated kernels ({variant}) were not built (see above)")


def main(arguments: list[str] | None = None) -> int:
    """Builds what the options ask for; 0 when it is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--variant", choices=VARIANTS, default="plain")
    parser.add_argument("--all", action="store_true", help="every variant")
    parser.add_argument("--sample", action="store_true", help="what builds quickly")
    parser.add_argument("--program", choices=[p.name for p in PROGRAMS], action="append")
    parser.add_argument("--jobs", type=int, default=2, help="compilers that run at once")
    options = parser.parse_args(arguments)
    for variant in VARIANTS if options.all or options.sample else (options.variant,):
        programs = [p for p in programs_of(variant) if not (options.sample and variant in p.long)]
        names = [program.name for program in programs]
        wanted = [name for name in names if name in (options.program or names)]
        if wanted:
            build(variant, wanted, options.jobs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
