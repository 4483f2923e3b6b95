"""Builds resnet_fused_driver for a GPU, with nvcc and ninja and without torch; prints its path.

    python tools/driver.py --archs 90a
    compute-sanitizer $(python tools/driver.py --archs 90a) --op conv_bn_act --data normals

The same sources, built for the emulator, are the `driver` of tools/emulated.py.
"""

from __future__ import annotations

import argparse
import hashlib
import shlex
import subprocess
import sys
from pathlib import Path

import emulated
import toolchain

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("csrc/driver/driver*.cpp",)
FLAGS = "-std=c++20 -O3 -Xcompiler -Wall,-Wextra -Xptxas --warn-on-spills"


def ninja_file(nvcc: str, archs: list[str]) -> str:
    """What ninja is to build.

    Args:
        nvcc: the compiler's path.
        archs: such as ["90a"].
    """
    numbers = [arch.split("+")[0] for arch in archs]
    gencode = " ".join(f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers)
    if "90a" in numbers:
        gencode += " -DRF_WITH_SM90A"
    launcher = f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'tools/strict_nvcc.py'))}"
    lines = [
        f"nvcc = {launcher} {shlex.quote(nvcc)}",
        f"flags = {FLAGS} {gencode}",
        "rule nvcc",
        "  command = $nvcc -x cu $flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $nvcc $flags $in -o $out",
    ]
    sources = sorted({path for pattern in SOURCES for path in ROOT.glob(pattern)})
    objects = []
    for source in (*sources, *emulated.kernel_sources()):
        objects.append(source.relative_to(ROOT).as_posix().replace("/", "_") + ".o")
        lines.append(f"build {objects[-1]}: nvcc {source}")
    lines.append(f"build resnet_fused_driver: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Builds it and prints where it is; 1 with the reason where that fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--archs", help="such as '80;90a'; by default $ARCHS or all")
    parser.add_argument("--jobs", type=int, default=2, help="compilers that run at once")
    options = parser.parse_args(arguments)
    nvcc, why = toolchain.find_nvcc()
    ninja = toolchain.find_ninja()
    if nvcc is None or ninja is None:
        print(f"error: {why or 'no ninja found (`pip install ninja`)'}", file=sys.stderr)
        return 1
    plan = ninja_file(nvcc.path, toolchain.architectures(options.archs))
    key = hashlib.sha256(plan.encode()).hexdigest()[:12]
    folder = ROOT / "build" / f"driver-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(plan)
    command = [ninja, "-C", str(folder), "-j", str(options.jobs), "--quiet"]
    built = subprocess.run(command, stdout=sys.stderr, check=False)
    if built.returncode == 0:
        print(folder / "resnet_fused_driver")
    return built.returncode


if __name__ == "__main__":
    sys.exit(main())
