"""The whole ResNet-50: its numbers block by block against float64, and its time in inference."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import resnet_fused as rf
from gpu.device import capture, free_bytes, interleaved, is_cuda, synchronize
from gpu.operands import precise, why_no_cuda
from resnet_fused import backends, numerics
from resnet_fused.calibrate import calibrate_batchnorm
from resnet_fused.nn.blocks import PlainBottleneck

GIGABYTES_AN_IMAGE = 0.12
"""What forward and backward of ResNet-50 in bfloat16 keep of one 224x224 image, roughly."""


def dtype_of(device: str) -> torch.dtype:
    """bfloat16; float32 where Triton's interpreter runs."""
    return torch.bfloat16 if is_cuda(device) else torch.float32


def make(device: str, seed: int = 0) -> tuple[nn.Module, int]:
    """A plain ResNet-50 with telling BatchNorms in evaluation mode, and its images' side.

    On the CPU a network of one block stands in.
    """
    torch.manual_seed(seed)
    if is_cuda(device):
        model, size = rf.unfuse(rf.models.resnet50(num_classes=1000)), 224
    else:
        model, size = _Tiny(), 8
    model = model.eval().to(device).to(memory_format=torch.channels_last)
    calibrate_batchnorm(model, images(4, size, device, torch.float32))
    return model.to(dtype_of(device)), size


class _Tiny(nn.Module):
    """Stands in for ResNet-50 where kernels are interpreted: a stem and one bottleneck."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(16), nn.ReLU()
        self.maxpool = nn.MaxPool2d(2)
        self.layer1 = nn.Sequential(PlainBottleneck(16, 4))
        self.layer2, self.layer3, self.layer4 = (nn.Sequential() for _ in range(3))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer1(stem(self, x)).mean((2, 3)))


def images(n: int, size: int, device: str, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random images [n, 3, size, size] in channels_last."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(n, 3, size, size, generator=generator).to(device, dtype)
    return made.contiguous(memory_format=torch.channels_last)


def parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The blocks of a ResNet by name, in order."""
    stages = [f"layer{number}" for number in (1, 2, 3, 4)]
    return [
        (f"{stage}.{number}", block)
        for stage in stages
        for number, block in enumerate(getattr(model, stage))
    ]


def stem(model: Any, x: Tensor) -> Tensor:
    """What comes before the first block, by the plain modules."""
    return model.maxpool(model.relu(model.bn1(model.conv1(x))))


def forward(device: str, batch: int = 4, implementation: str = "triton") -> dict[str, Any]:
    """Each fused block beside the plain one, both against float64 of the same input; the output."""
    if implementation == "cuda" and (why := why_no_cuda(device)) is not None:
        return {"ok": None, "skipped": why}
    plain, size = make(device)
    fused = rf.fuse(plain)
    exact = copy.deepcopy(plain).double()
    dtype = dtype_of(device)
    image = images(batch, size, device, dtype, seed=1)
    rows, failed = {}, ""
    with torch.inference_mode(), rf.backend(implementation):
        x = stem(plain, image)
        for (name, ours), (_, eager), (_, double) in zip(
            parts(fused), parts(plain), parts(exact), strict=True
        ):
            y = eager(x)
            with precise():
                oracle = double(x.double())
            check = numerics.relative_check(ours(x), y, oracle)
            rows[name] = {"ratio": check.ratio, "max_ratio": check.max_ratio}
            if not check.ok:
                limits = f"{check.limit:.3f} and {check.max_limit:.3f}"
                failed = failed or (
                    f"{name}: rms {check.ratio:.3f} and maximum {check.max_ratio:.3f} times "
                    f"eager's, limits {limits}"
                )
            x = y
        with backends.recording() as routes:
            y = fused(image)
        with precise():
            oracle = exact(image.double())
        end = numerics.relative_check(y, plain(image), oracle)
    served = sorted({route.implementation for route in routes})
    found = {"blocks": rows, "end_ratio": end.ratio, "served": served, "layers": len(routes)}
    if served != [implementation]:
        failed = failed or f"layers were served by {', '.join(served)}"
    if not end.ratio <= numerics.END_TO_END_LIMIT * numerics.chance(y.numel()):
        failed = failed or f"the output's rms error is {end.ratio:.3f} times eager's"
    return {"ok": not failed, **found, **({"error": failed} if failed else {})}


def freeze(model: nn.Module) -> None:
    """Fine-tuning with frozen BatchNorm: statistics and affine stay, convolutions learn."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)


def backward(device: str, batch: int = 4, implementation: str = "triton") -> dict[str, Any]:
    """The gradients of every convolution's weight and of every block's input, block by block."""
    if implementation == "cuda" and (why := why_no_cuda(device)) is not None:
        return {"ok": None, "skipped": why}
    plain, size = make(device)
    freeze(plain)
    fused = rf.fuse(plain)
    exact = copy.deepcopy(plain).double()
    image = images(batch, size, device, dtype_of(device), seed=2)
    with torch.no_grad():
        x = stem(plain, image)
    rows, failed = {}, ""
    for (name, ours), (_, eager), (_, double) in zip(
        parts(fused), parts(plain), parts(exact), strict=True
    ):
        with torch.no_grad():
            following = eager(x)
        dy = images_like(following)
        with rf.backend(implementation):
            mine = gradients(ours, x, dy)
        theirs = gradients(eager, x, dy)
        with precise():
            oracle = gradients(double, x.double(), dy.double())
        for key, value in mine.items():
            check = numerics.gradient_check(value, theirs[key], oracle[key])
            rows[f"{name}.{key}"] = check.ratio
            raised = numerics.chance(value.numel())
            if not (
                check.ratio <= raised * check.limit and check.max_ratio <= raised * check.max_limit
            ):
                failed = failed or (
                    f"{name}.{key}: rms {check.ratio:.3f} and maximum {check.max_ratio:.3f} times "
                    f"eager's, limit {raised * check.limit:.3f}"
                )
        x = following
    found = {"gradients": rows, "worst": max(rows.values())}
    return {"ok": not failed, **found, **({"error": failed} if failed else {})}


def images_like(t: Tensor) -> Tensor:
    """A random gradient of the same shape, dtype and layout."""
    generator = torch.Generator().manual_seed(3)
    made = torch.randn(t.shape, generator=generator).to(t.device, t.dtype)
    return made.contiguous(memory_format=torch.channels_last)


def gradients(block: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Of the input and of every convolution's weight; nothing is left in .grad."""
    given = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    weights = {n: p for n, p in block.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(block(given), [given, *weights.values()], dy)
    return dict(zip(["input", *weights], found, strict=True))


def inference(device: str, batch: int, graphs: bool, rounds: int = 11) -> dict[str, Any]:
    """Images a second of eager channels_last and of the fused model.

    Args:
        device: where.
        batch: images.
        graphs: both as CUDA graphs, or both launched by Python.
        rounds: samples of each.
    """
    plain, size = make(device)
    fused = rf.fuse(plain)
    x = images(batch, size, device, dtype_of(device), seed=4)
    torch.backends.cudnn.benchmark = True
    kept: dict[str, Tensor] = {}

    def run_eager() -> None:
        kept["eager"] = plain(x)

    def run_fused() -> None:
        with rf.backend("triton"):
            kept["fused"] = fused(x)

    with torch.inference_mode():
        calls: dict[str, Callable[[], Any]] = {"eager": run_eager, "fused": run_fused}
        calls = {name: _ready(call, device, graphs) for name, call in calls.items()}
        for call in calls.values():
            call()
        synchronize(device)
        wrong = unlike(kept["fused"], kept["eager"])
        if wrong:
            return {"ok": False, "error": wrong}
        calls["fused_again"] = calls["fused"]
        timed = interleaved(calls, device, rounds)
    return {
        "ok": True, "us": timed.to_dict(), "ratio": timed.ratio("eager", "fused"),
        "noise": timed.ratio("fused", "fused_again"),
        "images_per_s": {name: batch / timed.median(name) for name in timed.seconds},
    }  # fmt: skip


def _ready(call: Callable[[], Any], device: str, graphs: bool) -> Callable[[], Any]:
    if graphs:
        return capture(call, device)
    for _ in range(3 if is_cuda(device) else 1):
        call()
    synchronize(device)
    return call


def unlike(y: Tensor, eager: Tensor) -> str | None:
    """Why an output is not eager's up to 16-bit rounding, or None: a guard against timing nonsense.

    The numbers themselves are judged block by block, against float64.
    """
    error = (y.double() - eager.double()).norm() / eager.double().norm()
    # Two right ones differ by a few hundredths in 16 bits; unrelated ones by 1.4.
    if not bool(error < 0.5):
        return f"the fused output differs from eager's by {float(error):.3g} of its norm"
    return None


def compiled(device: str, batch: int, rounds: int = 7) -> dict[str, Any]:
    """torch.compile of the plain model, in its default mode, beside eager."""
    plain, size = make(device)
    x = images(batch, size, device, dtype_of(device), seed=4)
    torch.backends.cudnn.benchmark = True
    start = time.perf_counter()
    with torch.inference_mode():
        run = torch.compile(plain)
        wrong = unlike(run(x), plain(x))
        if wrong:
            return {"ok": None, "skipped": f"torch.compile: {wrong}"}
        synchronize(device)
        seconds = time.perf_counter() - start
        calls = {"eager": lambda: plain(x), "compiled": lambda: run(x)}
        calls = {name: _ready(call, device, True) for name, call in calls.items()}
        timed = interleaved(calls, device, rounds)
    return {
        "ok": True, "us": timed.to_dict(), "ratio": timed.ratio("eager", "compiled"),
        "compile_s": seconds,
        "images_per_s": {name: batch / timed.median(name) for name in timed.seconds},
    }  # fmt: skip


def training(device: str, batch: int, rounds: int = 7) -> dict[str, Any]:
    """Forward and backward with frozen BatchNorm, launched by Python: eager and fused."""
    free = free_bytes(device)
    if free is not None and free < 2e9 * GIGABYTES_AN_IMAGE * batch:
        return {"ok": None, "skipped": f"needs {2 * GIGABYTES_AN_IMAGE * batch:.0f} GB free"}
    plain, size = make(device)
    freeze(plain)
    fused = rf.fuse(plain)
    x = images(batch, size, device, dtype_of(device), seed=5)
    torch.backends.cudnn.benchmark = True
    weights = [p for p in plain.parameters() if p.requires_grad]

    def step(model: nn.Module) -> tuple[Tensor, ...]:
        return torch.autograd.grad(model(x).float().square().mean(), weights)

    def step_fused() -> tuple[Tensor, ...]:
        with rf.backend("triton"):
            return step(fused)

    if not all(bool(torch.isfinite(grad).all()) for grad in step_fused()):
        return {"ok": False, "error": "a gradient is not finite"}
    calls: dict[str, Callable[[], Any]] = {"eager": lambda: step(plain), "fused": step_fused}
    calls = {name: _ready(call, device, False) for name, call in calls.items()}
    timed = interleaved(calls, device, rounds)
    return {
        "ok": True, "us": timed.to_dict(), "ratio": timed.ratio("eager", "fused"),
        "images_per_s": {name: batch / timed.median(name) for name in timed.seconds},
    }  # fmt: skip
