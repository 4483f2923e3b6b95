"""Builds the extension resnet_fused._C with CMake; everything else is in pyproject.toml.

What is missing decides what is built: without nvcc the CPU kernels alone, without a C++ compiler
or on Windows the Python package alone (Triton and PyTorch). Each says so in one line, which
`pip install -v` shows and `resnet-fused info` repeats.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

import toolchain  # noqa: E402  (it lies beside, in tools/)

TORCH_TARGET = "2.11"
OLDEST_SETUPTOOLS = 77  # the first that reads this pyproject.toml
NO_TORCH = (
    "resnet_fused: PyTorch is not installed where the build runs. Its extension is built against "
    "the PyTorch that you have, without build isolation:\n"
    "    pip install 'torch>=2.11' 'setuptools>=77' cmake ninja\n"
    "    pip install --no-build-isolation ."
)


def say(line: str) -> None:
    """Prints the one line to where `pip install -v` shows it."""
    print(f"resnet_fused: {line}", file=sys.stderr, flush=True)


def why_no_extension() -> str | None:
    """Why the extension cannot be built here, or None."""
    if sys.platform == "win32":
        return "the compiled extension is not built on Windows; the package runs on PyTorch alone"
    if toolchain.find_cxx() is None:
        return "no C++ compiler found (CXX, c++, g++, clang++): installed without the extension"
    if toolchain.find_cmake() is None:
        return "no cmake found (`pip install cmake ninja`): installed without the extension"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "no Python.h found (Debian: python3-dev): installed without the extension"
    return None


def torch_folder() -> Path:
    """Where torch lies; found without importing it, which would take seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit(NO_TORCH)
    return Path(spec.origin).parent


class CMakeBuild(build_ext):
    """Hands the one extension to CMake."""

    def build_extension(self, ext: Extension) -> None:
        """Configures and builds in build/cmake-<key>, kept so that a second build is quick."""
        torch = torch_folder()
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        nvcc, why_no_cuda = toolchain.find_nvcc()
        archs = toolchain.architectures() if nvcc else []
        if nvcc is None:
            say(f"built without CUDA kernels (CPU and Triton remain): {why_no_cuda}")
        else:
            say(f"CUDA kernels for {', '.join(archs)} with {nvcc.path} {nvcc.version}")
        cxx = toolchain.find_cxx()
        info = {
            "cuda": nvcc is not None,
            "nvcc": nvcc.version if nvcc else None,
            "archs": archs,
            "compiler": first_line([str(cxx), "--version"]),
            "torch_target": TORCH_TARGET,
            "why_no_cuda": why_no_cuda,
        }
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_CXX_COMPILER": cxx,
            "RF_PYTHON_INCLUDE": sysconfig.get_path("include"),
            "RF_TORCH": torch,
            "RF_BUILD_INFO": json.dumps(info),
            "RF_CUDA": "ON" if nvcc else "OFF",
            "RF_ARCHS": ";".join(archs),
        }
        if nvcc:
            options |= {
                "CMAKE_CUDA_COMPILER": nvcc.path,
                "CMAKE_CUDA_HOST_COMPILER": cxx,
                "CMAKE_CUDA_COMPILER_LAUNCHER": f"{sys.executable};{ROOT}/tools/strict_nvcc.py",
            }
        cmake, ninja = str(toolchain.find_cmake()), toolchain.find_ninja()
        if ninja:
            options["CMAKE_MAKE_PROGRAM"] = ninja
        key = hashlib.sha256(repr((cmake, options)).encode()).hexdigest()[:12]
        # Not in the key: an edited source is built again in the same folder.
        options["RF_BUILD_INFO"] = json.dumps(info | {"sources": source_digests()})
        folder = ROOT / "build" / f"cmake-{key}"
        built = folder / "out" / output.name
        options["RF_OUTPUT"] = built
        defines = [f"-D{name}={value}" for name, value in options.items()]
        generator = ["-G", "Ninja" if ninja else "Unix Makefiles"]
        run([cmake, "-S", str(ROOT), "-B", str(folder), *generator, *defines])
        run([cmake, "--build", str(folder), "--parallel"])
        output.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(built), str(output))


def source_digests() -> dict[str, str]:
    """SHA-256 of every file in csrc/: admission compares what was built with what was checked."""
    return {
        path.relative_to(ROOT).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((ROOT / "csrc").rglob("*"))
        if path.is_file()
    }


def first_line(command: list[str]) -> str:
    """The first line that a command prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]


def run(command: list[str]) -> None:
    """Runs a build step; its failure ends the build with what it said and what one can do."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    print(result.stdout, result.stderr, sep="", file=sys.stderr, flush=True)
    if result.returncode != 0:
        raise SystemExit(
            "resnet_fused: building the extension failed (see above). "
            "RESNET_FUSED_NO_CUDA=1 leaves the CUDA kernels out."
        )


if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
    raise SystemExit(
        f"resnet_fused: setuptools {setuptools.__version__} is too old to build with; run\n"
        "    pip install --upgrade 'setuptools>=77' cmake ninja"
    )
reason = why_no_extension()
if reason:
    say(reason)
extensions = [] if reason else [Extension("resnet_fused._C", sources=[], py_limited_api=True)]
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if extensions else {},
)
