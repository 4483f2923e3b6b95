"""What a record needs beside its numbers: the machine, the versions, the commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil
import torch

PACKAGES = ("torch", "torchvision", "timm", "triton", "numpy")


def versions() -> dict[str, str | None]:
    """Versions of Python, of this package and of those beside it; None where one is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("resnet_fused", *PACKAGES):
        try:
            found[name] = importlib.metadata.version(name.replace("_", "-"))
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["torch"] = torch.__version__  # the wheel's metadata lacks the CUDA suffix
    if found["resnet_fused"] is None:
        from resnet_fused import __version__

        found["resnet_fused"] = __version__
    return found


def machine() -> dict[str, Any]:
    """The processor, its vector units as torch uses them, memory, threads and GPUs."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "cpu": cpu_name(),
        "cores": psutil.cpu_count() or 1,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": gpus(),
    }


def cpu_name() -> str:
    """The processor's name, from the kernel where it tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def gpus() -> list[dict[str, Any]]:
    """Name, compute capability and memory of each GPU that torch sees."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": about.name,
                "capability": f"{about.major}.{about.minor}",
                "memory_gib": round(about.total_memory / 2**30, 1),
            }
        )
    return found


def commit() -> str | None:
    """The commit of the checkout this package runs from, "+" behind it when files differ.

    None outside of a checkout of this project, so that a copy installed into a virtual environment
    inside some other repository does not take that one's commit.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        outputs = [
            subprocess.run(
                ["git", "-C", str(root), *arguments],
                capture_output=True, text=True, timeout=10, check=True, env=environment,
            ).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        ]  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return outputs[0] + ("+" if outputs[1] else "")
