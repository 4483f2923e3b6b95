"""Training with batch statistics on the device: each op, each block's step, a captured step."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import resnet_fused as rf
from gpu.device import is_cuda, synchronize
from gpu.network import dtype_of
from resnet_fused import backends
from resnet_fused.bench import work
from resnet_fused.bench.subject import Subject, block_names, kernel_names
from resnet_fused.bench.training_kernels import KINDS

BATCH = 4
REPEATS = 5
NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def kernels(op: str, most: int = 8) -> list[str]:
    """The heaviest calls of an op in ResNet-50."""
    found = kernel_names(op, "resnet50")
    return sorted(found, key=lambda name: -found[name])[:most]


def blocks() -> list[str]:
    """The distinct blocks of ResNet-50, and its stem."""
    return block_names("resnet50")


def kernel(device: str, op: str, name: str, dtype: str = "", batch: int = BATCH) -> dict[str, Any]:
    """One op on random data by Triton: every result by its bound, and the same bits each time.

    Args:
        device: where.
        op: of `KINDS`.
        name: of the call, as `kernels` has them.
        dtype: "" takes bfloat16, in Triton's interpreter float32.
        batch: images.
    """
    kind = "cuda" if is_cuda(device) else "cpu"
    subject = Subject("kernel", op, name, batch, dtype or NAMES[dtype_of(device)], kind)
    made = work.build(subject)
    given, run = made.sets[0], KINDS[op].ours(made.case)
    with torch.inference_mode(), backends.backend("triton"):
        first = run(given)
        again = [run(given) for _ in range(REPEATS)]
    results = KINDS[op].named(first) or {}
    same = all(
        torch.equal(t, (KINDS[op].named(other) or {})[key])
        for other in again
        for key, t in results.items()
    )
    judged = made.judge(first)
    whole = len(results) == len(KINDS[op].results)
    found = {"ok": judged.ok and same and whole, "worst": judged.worst, "repeats": same}
    if not found["ok"]:
        found["error"] = (
            f"{op} {name}: {judged.text}; same bits: {same}; every result there: {whole}"
        )
    return found


def block(device: str, name: str, batch: int = BATCH) -> dict[str, Any]:
    """A block's step by Triton beside eager's own error, both against float64 or float32."""
    kind = "cuda" if is_cuda(device) else "cpu"
    made = work.build(Subject("block", "training", name, batch, NAMES[dtype_of(device)], kind))
    fused = rf.fuse(rf.unfuse(copy.deepcopy(made.module)))
    with made.mode(), backends.backend("triton"), backends.recording() as routes:
        out = made.run(fused)
    judged = made.judge(out)
    taken = sorted({route.implementation for route in routes})
    ok = judged.ok and taken == ["triton"]
    found: dict[str, Any] = {"ok": ok, "worst": judged.worst, "implementations": taken}
    if not ok:
        found["error"] = f"{name}: {judged.text}; ran {taken}"
    return found


def captured(device: str) -> dict[str, Any]:
    """A whole step with its optimiser as a CUDA graph: the same bits as without."""
    if not is_cuda(device):
        return {"ok": None, "skipped": "graphs are captured on a GPU"}
    torch.manual_seed(0)
    build = rf.models.cifar_resnet20
    models = [build().to(device, memory_format=torch.channels_last) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(32, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (32,), device=device)
    with backends.backend("triton"):
        plain = [_step(models[0], _optimizer(models[0]), x, labels) for _ in range(1)]
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        optimizer = _optimizer(models[1])
        state = copy.deepcopy(models[1].state_dict())
        with torch.cuda.stream(side):
            _step(models[1], optimizer, x, labels)
        synchronize(device)
        with torch.no_grad():
            for name, value in models[1].state_dict().items():
                value.copy_(state[name])
            for held in optimizer.state.values():
                held["momentum_buffer"].zero_()
        with torch.cuda.graph(graph):
            loss = _step(models[1], optimizer, x, labels)
        graph.replay()
        synchronize(device)
    same = torch.equal(loss, plain[0])
    state = models[1].state_dict()
    odd = [n for n, t in models[0].state_dict().items() if not torch.equal(t, state[n])]
    ok = same and not odd
    return {"ok": ok} if ok else {"ok": False, "error": f"loss equal: {same}; differ: {odd[:5]}"}


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor) -> Tensor:
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast("cuda", torch.bfloat16):
        scores = model.train()(x)
    loss = nn.functional.cross_entropy(scores.float(), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()
