"""The compiled extension: built in place, from a prebuilt wheel, built now, or none."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from gpu.pool import environment, kill

PATTERN = "_C*.so"


def locate(
    root: Path, beside: Path, *, build: bool = False, archs: str | None = None, limit: float = 240.0
) -> tuple[str | None, str]:
    """Finds the extension, the first of: in place, a wheel of build/wheel, a build.

    Args:
        root: the checkout.
        beside: an empty folder, into which a wheel's binary is unpacked; nothing is installed.
        build: whether to build it in place where there is none, with nvcc and cmake.
        archs: the GPU's architecture, for a build; the environment's ARCHS counts before it.
        limit: seconds that a build may take.

    Returns:
        The folder to add to the package's path, None for the package's own; and a sentence on what
        was found.
    """
    placed = sorted((root / "resnet_fused").glob(PATTERN))
    if placed:
        return None, f"in place: {placed[0].relative_to(root)}"
    for wheel in sorted((root / "build" / "wheel").glob("*.whl")):
        try:
            with zipfile.ZipFile(wheel) as archive:
                names = [n for n in archive.namelist() if Path(n).match(f"resnet_fused/{PATTERN}")]
                for name in names:
                    target = beside / Path(name).name
                    target.write_bytes(archive.read(name))
        except (OSError, zipfile.BadZipFile) as error:
            return None, f"none: {wheel.name} can't be unpacked: {error}"
        if names:
            return str(beside), f"from the wheel {wheel.name}, unpacked beside the package"
    if not build:
        return None, "none: not in place, no wheel in build/wheel, and BUILD=1 was not given"
    return None, _build(root, archs, limit)


def _build(root: Path, archs: str | None, limit: float) -> str:
    sys.path.insert(0, str(root / "tools"))
    try:
        import toolchain
    finally:
        sys.path.pop(0)
    nvcc, why = toolchain.find_nvcc()
    if nvcc is None:
        return f"none: it can't be built: {why}"
    if toolchain.find_cmake() is None:
        return "none: it can't be built: no cmake"
    chosen = os.environ.get("ARCHS") or archs
    env = environment({"ARCHS": chosen} if chosen else None)
    process = subprocess.Popen(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=root, env=env,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True, text=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        kill(process)
        return f"none: the build took more than {limit:.0f} s"
    if process.returncode or not list((root / "resnet_fused").glob(PATTERN)):
        return f"none: the build failed: {' '.join(said.split())[-300:]}"
    return f"built now, in place, for {chosen or 'every architecture'} with nvcc {nvcc.version}"


def architecture(capability: tuple[int, int]) -> str:
    """A GPU's architecture as ARCHS names it: "90a" for Hopper, whose own instructions need it."""
    number = f"{capability[0]}{capability[1]}"
    return f"{number}a" if capability == (9, 0) else number
