"""Training with batch statistics on the device: each op, each block's step, a captured step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import resnet_fused as rf
from gpu.device import capture, interleaved, is_cuda, synchronize
from gpu.network import dtype_of
from gpu.operands import why_no_cuda
from resnet_fused import backends
from resnet_fused.bench import work
from resnet_fused.bench.subject import Subject, block_names, conv_case, kernel_names
from resnet_fused.bench.training_kernels import KINDS
from resnet_fused.ops import _grad1x1
from resnet_fused.ops.conv_bn_grad1x1 import unfit
from resnet_fused.train.captured import CapturedStep
from resnet_fused.train.step import Step
from resnet_fused.triton._grad1x1 import serves
from resnet_fused.triton._tiles import Limits

BATCH = 4
REPEATS = 5
STEPS = 10
"""Of which three are taken before the graph."""
NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}

HOPPER = Limits(132, 232448, 90)
"""Those whose kernels take the most shapes."""


def kernels(op: str, most: int = 8) -> list[str]:
    """The heaviest calls of an op in ResNet-50."""
    found = kernel_names(op, "resnet50")
    return sorted(found, key=lambda name: -found[name])[:most]


def blocks() -> list[str]:
    """The distinct blocks of ResNet-50, and its stem."""
    return block_names("resnet50")


def merging_blocks() -> list[str]:
    """Those of the blocks in which some convolution may have both gradients made by one op."""
    return [name for name in blocks() if name.startswith(("resnet50.layer1", "resnet50.layer2"))]


def merging() -> list[str]:
    """The calls of `conv_bn_grad1x1` in ResNet-50 that some GPU has a kernel for."""
    cases = {name: conv_case(name, 1) for name in kernels(_grad1x1.OP, 99)}
    return [name for name, case in cases.items() if serves(case.k, case.c, 2, HOPPER) is not None]


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


def block(
    device: str, name: str, batch: int = BATCH, word: str = "auto", dtype: str = ""
) -> dict[str, Any]:
    """A block's step by Triton beside eager's own error, both against float64 or float32.

    Args:
        device: where.
        name: of the block.
        batch: images.
        word: which 1x1 convolutions have both gradients made by one op: of `_grad1x1.WORDS`. With
            "always" none that does fails.
        dtype: as of `kernel`.
    """
    kind = "cuda" if is_cuda(device) else "cpu"
    precision = dtype or NAMES[dtype_of(device)]
    made = work.build(Subject("block", "training", name, batch, precision, kind))
    fused = rf.fuse(rf.unfuse(copy.deepcopy(made.module)))
    with (
        made.mode(), backends.backend("triton"), backends.recording() as routes,
        _grad1x1.preferring(word),
    ):  # fmt: skip
        out = made.run(fused)
    judged = made.judge(out)
    taken = sorted({route.implementation for route in routes})
    merged = sum(f"by one op ({_grad1x1.OP})" in route.why for route in routes)
    ok = judged.ok and taken == ["triton"] and (merged > 0 or word != "always")
    found: dict[str, Any] = {
        "ok": ok, "worst": judged.worst, "implementations": taken, "merged_gradients": merged,
    }  # fmt: skip
    if not ok:
        found["error"] = f"{name}: {judged.text}; ran {taken}, {merged} merged gradients"
    return found


def gradients(device: str, name: str, batch: int) -> dict[str, Any]:
    """Times both gradients of a 1x1 convolution by one op and by two, each checked before.

    Args:
        device: where.
        name: of a call of `conv_bn_grad1x1`, as `kernels` has them.
        batch: images.

    Returns:
        "us" and "ratios" of the two ways; "expected": which of them a node takes by itself, why.
    """
    kind = "cuda" if is_cuda(device) else "cpu"
    precision = "bfloat16" if is_cuda(device) else "float16"
    made = work.build(Subject("kernel", _grad1x1.OP, name, batch, precision, kind))
    case: Any = made.case
    given = made.sets[0]
    why = unfit(given.dz, case.c)
    if why is not None:
        return {"ok": None, "skipped": why}
    ways = {"merged": KINDS[_grad1x1.OP].ours(case), "two": _by_two(case)}
    with torch.inference_mode(), backends.backend("triton"):
        for way, run in ways.items():
            judged = made.judge(run(given))
            if not judged.ok:
                return {"ok": False, "error": f"{name}, {way}: {judged.text}"}
        variants = {
            way: capture(lambda run=run: [run(one) for one in made.sets], device)
            for way, run in ways.items()
        }
        timed = interleaved(variants, device)
        expected = _grad1x1.way(
            given.dz.device, given.dz.dtype, case.input_shape, case.weight_shape,
            _grad1x1.GEOMETRY, folds=True, masked=given.norm is not None,
        )  # fmt: skip
    return {
        "ok": True, "us": timed.to_dict(len(made.sets)),
        "ratios": {"two_over_merged": timed.ratio("two", "merged")},
        "expected": {"merged": expected.merged, "why": expected.why}, "omitted": {},
    }  # fmt: skip


def _by_two(case: Any) -> Callable[[Any], tuple[Tensor, Tensor, Tensor]]:
    image, weight = KINDS["conv_bn_dgrad"].ours(case), KINDS["conv_bn_wgrad"].ours(case)

    def run(given: Any) -> tuple[Tensor, Tensor, Tensor]:
        dx, sums = image(given)
        return dx, weight(given), sums

    return run


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
        side.wait_stream(torch.cuda.current_stream())  # state is read there
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


def captured_step(device: str, precision: str, implementation: str) -> dict[str, Any]:
    """`train.CapturedStep` beside ordinary steps, in float16 with the loss scale: the same bits.

    In float16 the scale begins so high that steps are skipped, within the graph too.

    Args:
        device: where; on the CPU both take ordinary steps.
        precision: "bfloat16" or "float16", of autocast.
        implementation: of the layers.
    """
    if implementation == "cuda" and (why := why_no_cuda(device)) is not None:
        return {"ok": None, "skipped": why}
    dtype, kind = getattr(torch, precision), "cuda" if is_cuda(device) else "cpu"
    made, scales, said = [], [], ""
    for step_of in (Step, CapturedStep):
        torch.manual_seed(0)
        model = rf.models.cifar_resnet20().to(device, memory_format=torch.channels_last).train()
        optimizer, scaled = _optimizer(model), dtype is torch.float16
        scaler = torch.amp.GradScaler(kind, init_scale=2.0**20, growth_interval=3, enabled=scaled)
        loss = nn.functional.cross_entropy
        step = step_of(model, loss, optimizer, scaler, autocast=dtype)
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"], device=device)
        losses, seen = [], []
        with backends.backend(implementation):
            for number in range(STEPS):
                generator = torch.Generator().manual_seed(number)
                x = torch.randn(BATCH, 3, 32, 32, generator=generator).to(device)
                labels = torch.randint(10, (BATCH,), generator=generator).to(device)
                losses.append(step(x.to(memory_format=torch.channels_last), labels).losses)
                seen.append(scaler.get_scale())
        made.append([*losses, *(t.detach() for t in model.state_dict().values())])
        scales.append(seen)
        said = step.explain() if isinstance(step, CapturedStep) else said
    odd = sum(not torch.equal(a, b) for a, b in zip(*made, strict=True))
    errors = [f"{odd} tensors differ"] * bool(odd)
    errors += [f"scales {scales}"] * (scales[0] != scales[1])
    errors += [f"not captured: {said}"] * (is_cuda(device) and "captured" not in said)
    found: dict[str, Any] = {"ok": not errors, "scales": scales[1], "explain": said}
    return found | ({"error": "; ".join(errors)} if errors else {})


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
