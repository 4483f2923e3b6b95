"""gpu-check on a machine where nothing of this package's own needs was installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

ABSENT = (
    "click", "cpuinfo", "hypothesis", "jinja2", "jsonschema", "matplotlib", "onnx", "onnxruntime",
    "openvino", "platformdirs", "pydantic", "pytest", "rich", "safetensors", "scipy", "sklearn",
    "tensorboard", "timm", "torchvision",
)  # fmt: skip
"""docs/gpu_check.md asks for torch, Triton, NumPy and psutil alone."""

PROGRAM = """
import importlib, os, pathlib, sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
import gpu_check, gpu_record
for file in sorted(pathlib.Path("benchmarks/gpu").glob("*.py")):
    importlib.import_module(f"gpu.{file.stem}")
from gpu import environment, plan, worker
worker.prepare("cpu")
assert environment.machine("cpu")["ok"]
kernels = [kernel | {"problem": None} for kernel in environment.kernels("cpu")["kernels"]]
made = [plan.exact(kernels), plan.bounds("cuda:0", kernels), plan.network("cuda:0")]
made += [plan.timings({"flops": 1e15, "bandwidth": 4e12}, ["a"]), plan.warm()]
for task in (task for tasks in made for task in tasks):
    module, _, name = task.function.partition(":")
    assert callable(getattr(importlib.import_module(module), name)), task
from resnet_fused import admission
print(*map(len, made), admission.cache_path())
"""


def test_torch_triton_numpy_and_psutil_are_enough(tmp_path):
    env = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"}
    for name in ("RESNET_FUSED_CACHE", "XDG_CACHE_HOME"):
        env.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, ",".join(ABSENT)], cwd=ROOT, env=env,
        capture_output=True, text=True, timeout=170,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    *counts, cache = done.stdout.split()
    assert all(int(count) for count in counts), counts
    assert cache == str(tmp_path / ".cache" / "resnet_fused" / "admission.json")


def test_a_captured_step_needs_no_recipe():
    program = (
        "import sys; sys.modules['pydantic'] = None\n"
        "from resnet_fused.train import CapturedStep, Step\n"
        "import resnet_fused.train as train\n"
        "assert set(train.__all__) <= set(dir(train))\n"
        "try:\n    train.Nothing\nexcept AttributeError as error:\n    print(error)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True,
        timeout=170,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "no attribute 'Nothing'" in done.stdout
