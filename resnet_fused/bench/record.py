"""The record of a run: what it says beside its numbers, its schema, and how it is read.

`record.schema.json` describes it field by field.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil
import torch

from resnet_fused import admission
from resnet_fused.bench import gauges
from resnet_fused.bench.plain import plain

SCHEMA = 2  # raised when a field changes its meaning; 1 was a whole model's record
KIND = "bench"
SCHEMA_FILE = Path(__file__).with_name("record.schema.json")
PACKAGES = (
    "torch", "torchvision", "timm", "triton", "numpy", "onnxruntime", "openvino", "onnx",
    "onnxscript", "nvidia-cudnn-frontend", "tensorrt", "apex",
)  # fmt: skip


def begin(command: str, settings: dict[str, Any], of: int) -> dict[str, Any]:
    """A record of which nothing was reached yet: valid, and filled row by row.

    Args:
        command: what was typed.
        settings: how it is measured.
        of: how many subjects were asked for.
    """
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": command,
        "versions": versions(),
        "machine": machine(),
        "sources": sources(),
        "settings": plain(settings),
        "ceilings": {},
        "complete": False,
        "reached": 0,
        "of": of,
        "seconds": 0.0,
        "rows": [],
    }


def sources() -> dict[str, str]:
    """Hash of the sources of each kernel that needs admission, "conv_bn_act.cuda" for example."""
    from resnet_fused import ops  # noqa: F401  (the ops enter their kernels)

    found = {}
    for kernel in admission.kernels():
        try:
            found[kernel.name] = admission.source_hash(kernel)
        except OSError:  # not built from a checkout
            continue
    return found


@functools.cache
def schema() -> dict[str, Any]:
    """The JSON schema of a record."""
    return json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))


def validate(record: Any) -> None:
    """Checks a record against its schema; without jsonschema only the outermost fields.

    Raises:
        ValueError: it is no record of schema 2; the message names the field.
    """
    if not isinstance(record, dict) or "schema" not in record:
        raise ValueError("it is no record of this package: it has no field `schema`")
    if record["schema"] != SCHEMA:
        raise ValueError(
            f"its schema is {record['schema']!r}; this version reads {SCHEMA}, take the version "
            "that wrote it"
        )
    if record.get("kind") != KIND:
        raise ValueError(f"its kind is {record.get('kind')!r}; accepted is {KIND!r}")
    if importlib.util.find_spec("jsonschema") is None:
        missing = [name for name in schema()["required"] if name not in record]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}")
        return
    import jsonschema

    checker = jsonschema.Draft202012Validator(schema())
    problem = jsonschema.exceptions.best_match(checker.iter_errors(record))
    if problem is not None:
        where = "/".join(map(str, problem.absolute_path)) or "the record"
        raise ValueError(f"{where}: {problem.message[:300]}")


def read(path: Path | str) -> dict[str, Any]:
    """Reads a record.

    Raises:
        ValueError: the file cannot be read, is no JSON, or no record of schema 2; the message
            names the file and says what it is instead.
    """
    file = Path(path)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise ValueError(f"{file}: is no JSON ({error})") from error
    try:
        validate(found)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return found


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
    """The processor, its vector units as torch uses them, memory, threads; GPUs and clocks."""
    clocks = gauges.clocks(gauges.current_gpu()) if torch.cuda.is_available() else None
    return {
        "system": f"{platform.system()} {platform.release()}",
        "cpu": cpu_name(),
        "cores": psutil.cpu_count() or 1,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": gpus(),
        "driver": None if clocks is None else clocks.pop("driver"),
        "clocks": clocks,
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
    """Name, compute capability and memory of each GPU that torch sees; first the one it uses."""
    if not torch.cuda.is_available():
        return []
    found, used = [], torch.cuda.current_device()
    for index in sorted(range(torch.cuda.device_count()), key=lambda index: index != used):
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
