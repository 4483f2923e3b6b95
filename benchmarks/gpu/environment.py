"""The machine, the versions, the sources; and the ceilings that rates are held against."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

QUERY = (
    "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu",
    "clocks_event_reasons.active",
)  # fmt: skip


def commit(root: Path) -> str | None:
    """The checkout's commit, read from .git without git; None where there is none."""
    folder = root / ".git"
    try:
        if folder.is_file():  # a worktree: "gitdir: <folder>"
            folder = root / folder.read_text(encoding="utf-8").partition(":")[2].strip()
        head = (folder / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref:"):
            return head or None
        name = head.partition(":")[2].strip()
        shared = folder
        if (folder / "commondir").exists():
            shared = folder / (folder / "commondir").read_text(encoding="utf-8").strip()
        for place in (folder, shared):
            if (place / name).exists():
                return (place / name).read_text(encoding="utf-8").strip()
        for line in (shared / "packed-refs").read_text(encoding="utf-8").splitlines():
            if line.endswith(f" {name}"):
                return line.split()[0]
    except OSError:
        pass
    return None


def smi() -> dict[str, str] | str:
    """What nvidia-smi says of the first GPU; read only. A sentence where it says nothing."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "no nvidia-smi"
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    found = {}
    for fields in (QUERY, QUERY[:-1]):  # an older driver does not know the last one
        try:
            said = subprocess.run(
                [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", gpu],
                capture_output=True, text=True, timeout=15, check=True,
            ).stdout.strip()  # fmt: skip
        except (OSError, subprocess.SubprocessError) as error:
            found = {"problem": str(error)}
            continue
        return dict(zip(fields, [word.strip() for word in said.split(",")], strict=False))
    return found


def machine(device: str) -> dict[str, Any]:
    """The GPU, the software around it, the clocks as they stand."""
    import torch

    from resnet_fused import _extension, _platform
    from resnet_fused.bench import record

    found: dict[str, Any] = {
        "ok": True,
        "versions": record.versions(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "machine": record.machine(),
        "kernel": platform.release(),
        "extension": _extension.build_info() or _extension.why_not(),
        "identity": _platform.identify("cpu" if device == "cpu" else 0)._asdict(),
    }
    if isinstance(found["extension"], dict):
        found["extension"] = {k: v for k, v in found["extension"].items() if k != "sources"}
    if device != "cpu":
        about = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "name": about.name, "capability": [about.major, about.minor],
            "multiprocessors": about.multi_processor_count,
            "memory": about.total_memory, "l2": getattr(about, "L2_cache_size", None),
            "shared_memory_per_block": about.shared_memory_per_block_optin,
        }  # fmt: skip
        found["smi"] = smi()
    return found


def ceilings(device: str, repeats: int = 5) -> dict[str, Any]:
    """A device-to-device copy, and the largest product that is usual, in bfloat16."""
    import torch

    from resnet_fused.bench import ceilings

    dtype = torch.bfloat16 if device != "cpu" else torch.float32
    if device == "cpu":
        # Any number will do where nothing is concluded from it.
        return {"ok": True, "flops": 1e11, "bandwidth": 1e10, "dtype": "float32", "made_up": True}
    rates = ceilings.measure(torch.device(device), dtype, repeats)
    return {"ok": rates.flops > 0 and rates.bandwidth > 0, **rates.to_dict()}


def kernels(device: str) -> dict[str, Any]:
    """Every kernel that waits for admission: its hash and configurations, or why there is none."""
    from resnet_fused import admission

    found = []
    for kernel in admission.kernels():
        entry: dict[str, Any] = {"op": kernel.op, "implementation": kernel.implementation}
        entry |= {"hash": None, "configurations": [], "problem": absent(kernel, device)}
        if entry["problem"] is None:
            try:
                entry["hash"] = admission.source_hash(kernel)
                entry["configurations"] = list(kernel.list_configurations())
            except Exception as error:
                entry["problem"] = f"{type(error).__name__}: {error}"
        entry["check"] = kernel.check
        found.append(entry)
    return {"ok": True, "kernels": found}


def absent(kernel: Any, device: str) -> str | None:
    """Why a kernel can't run here at all, or None."""
    from resnet_fused import _extension, _platform
    from resnet_fused.triton import _limits

    if kernel.implementation == "triton":
        if not _limits.installed():
            return "the triton package is not installed"
    elif not _extension.available():
        return f"the compiled extension is missing: {_extension.why_not()}"
    elif device != "cpu" and not _extension.has_cuda_kernels():
        return "the extension was built without nvcc"
    elif device == "cpu" and kernel.op != "bn_act":
        return "the CUDA convolutions need a GPU"
    return _platform.platform_refusal(kernel.implementation, "cpu" if device == "cpu" else 0)
