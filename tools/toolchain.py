"""Finds what builds the extension: cmake, ninja, a C++ compiler, nvcc. Standard library only."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

DEFAULT_ARCHS = "80;86;89;90a;100;120+PTX"
OLDEST_NVCC = (12, 8)  # the first that knows sm_100 and sm_120


@dataclass(frozen=True)
class Nvcc:
    """A usable CUDA compiler: its path and its version, such as "13.0.88"."""

    path: str
    version: str


def _executable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def _from_wheel(module: str, name: str) -> str | None:
    """`name` from a PyPI package such as cmake, beside this Python's scripts or inside it."""
    script = Path(sysconfig.get_path("scripts")) / name
    if _executable(script):
        return str(script)
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        inside = Path(folder) / "data" / "bin" / name
        if _executable(inside):
            return str(inside)
    return None


def find_cmake() -> str | None:
    """The cmake wheel's program, else the one on PATH."""
    return _from_wheel("cmake", "cmake") or shutil.which("cmake")


def find_ninja() -> str | None:
    """The ninja wheel's program, else the one on PATH; None means make."""
    return _from_wheel("ninja", "ninja") or shutil.which("ninja")


def find_cxx() -> str | None:
    """The C++ compiler: $CXX, else the first of c++, g++, clang++ on PATH."""
    named = os.environ.get("CXX", "").split()
    candidates = named[:1] or ["c++", "g++", "clang++"]
    return next((path for path in map(shutil.which, candidates) if path), None)


def _nvcc_candidates() -> list[str]:
    homes = [home for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    sites = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    found = [
        os.environ.get("CUDACXX"),
        *(str(Path(home) / "bin" / "nvcc") for home in homes),
        shutil.which("nvcc"),
        "/usr/local/cuda/bin/nvcc",
        *(str(Path(site) / "nvidia" / "cu13" / "bin" / "nvcc") for site in sites),
    ]
    return [path for path in dict.fromkeys(found) if path and _executable(Path(path))]


def _nvcc_version(path: str) -> str | None:
    try:
        output = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=60, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"\bV(\d+\.\d+\.\d+)", output)
    return match.group(1) if match else None


def find_nvcc() -> tuple[Nvcc | None, str | None]:
    """The CUDA compiler to use, or None and the reason why there is none."""
    if os.environ.get("RESNET_FUSED_NO_CUDA", "0") not in ("", "0"):
        return None, "RESNET_FUSED_NO_CUDA is set"
    if not sys.platform.startswith("linux"):
        return None, f"CUDA kernels are built on Linux only, this is {sys.platform}"
    refused = []
    for path in _nvcc_candidates():
        version = _nvcc_version(path)
        if version is None:
            refused.append(f"{path} does not run")
        elif tuple(map(int, version.split(".")[:2])) < OLDEST_NVCC:
            refused.append(f"{path} is {version}, older than 12.8")
        else:
            return Nvcc(path, version), None
    places = "CUDACXX, CUDA_HOME, PATH, /usr/local/cuda, the nvidia-cuda-nvcc package"
    return None, "; ".join(refused) or f"no nvcc found (looked at {places})"


def architectures(text: str | None = None) -> list[str]:
    """The GPU architectures to build for: `text`, else $ARCHS, else the default.

    Args:
        text: For example "80;90a;120+PTX"; commas and spaces separate too, "9.0a" is "90a".

    Raises:
        ValueError: An entry is no architecture.
    """
    text = text or os.environ.get("ARCHS") or DEFAULT_ARCHS
    archs = [part.replace(".", "") for part in re.split(r"[;,\s]+", text) if part]
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?(\+PTX)?", arch):
            raise ValueError(
                f"ARCHS: {arch!r} is no GPU architecture; give for example ARCHS={DEFAULT_ARCHS!r}"
            )
    return list(dict.fromkeys(archs))


if __name__ == "__main__":  # prints nvcc's path, or says why there is none and fails
    nvcc, why = find_nvcc()
    print(nvcc.path if nvcc else why)
    sys.exit(0 if nvcc else 1)
