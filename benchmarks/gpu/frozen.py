"""The frozen engine: its numbers by the tiers, replays, shapes, threads, NaN, its time."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import threading
from typing import Any

import torch
from torch import Tensor, nn

import resnet_fused as rf
from gpu import network
from gpu.device import capture, interleaved, is_cuda, same_bits, synchronize
from gpu.operands import MODES, precise
from resnet_fused import numerics
from resnet_fused.calibrate import calibrate_batchnorm
from resnet_fused.freeze import _driver, _gpu, _one_launch

SHAPES = ((1, 224, 224), (3, 224, 224), (2, 97, 131))
"""Images, height, width: a lone one, an odd batch, odd sizes."""
TINY = ((2, 6, 6), (3, 6, 6), (1, 5, 9))
THREADS = 8
ROUNDS = 20
REPLAYS = 3
TORCHS = ("torch", "modules")
"""What the report calls steps that are no kernel's."""


class Standin(_driver.Driver):
    """On the CPU: a graph is what runs again into the memory of the first time."""

    @contextlib.contextmanager
    def active(self) -> Any:
        """Nothing to make current."""
        yield

    def capturing(self) -> bool:
        """Nobody captures."""
        return False

    def capture(self, run: Any) -> tuple[Any, Any]:
        """The call itself, and its results."""
        result = run()

        def replay() -> None:
            result.copy_(run())

        return replay, result

    def mark(self) -> None:
        """There are no streams."""

    def wait(self, mark: Any) -> None:
        """Nobody waits."""

    def stream(self) -> int:
        """There are none."""
        return 0

    def release(self) -> None:
        """No memory is kept."""


def make(device: str, name: str, dtype: torch.dtype) -> nn.Module:
    """A plain network with telling BatchNorms in evaluation mode; a tiny one on the CPU."""
    torch.manual_seed(0)
    if is_cuda(device):
        model: nn.Module = rf.unfuse(getattr(rf.models, name)(num_classes=1000))
        size = 224
    else:
        model, size = network._Tiny(), 8
    model = model.eval().to(device).to(memory_format=torch.channels_last)
    calibrate_batchnorm(model, network.images(4, size, device, torch.float32))
    return model.to(dtype)


def images(shape: tuple[int, int, int], device: str, dtype: torch.dtype, seed: int) -> Tensor:
    """Random images [n, 3, h, w] in channels_last."""
    n, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(n, 3, height, width, generator=generator).to(device, dtype)
    return made.contiguous(memory_format=torch.channels_last)


def engine_of(model: nn.Module, x: Tensor) -> rf.Engine:
    """The engine as a GPU runs it; on the CPU its graphs are the stand-in's."""
    engine = rf.freeze(model, x)
    if x.device.type == "cpu":
        engine._programs.clear()
        builder = _gpu.Builder(_gpu.laid_out(engine._graph), Standin(x.device), engine._free)
        engine._builder = builder
        engine._programs[engine._first], _ = engine._built([x], True)
    return engine


def check(
    device: str, name: str, mode: str, place: int = 0, implementation: str = "triton"
) -> dict[str, Any]:
    """An engine against float64, replayed with several inputs.

    Each result's error is held against eager's; an input that comes again gives the same bits; a
    NaN in one image stays there.

    Args:
        device: where.
        name: of the network.
        mode: "bf16" or "fp16".
        place: of the shape in `SHAPES`.
        implementation: that is to serve every convolution.
    """
    dtype, _ = MODES[mode]
    plain = make(device, name, dtype)
    exact = copy.deepcopy(plain).double()
    shape = (SHAPES if is_cuda(device) else TINY)[place]
    found: dict[str, Any] = {"ok": True, "ratios": {}}
    with torch.inference_mode(), rf.backend(implementation):
        engine = engine_of(plain, images(shape, device, dtype, 1))
        served = {row.implementation for row in engine.report().rows}
        found["served"], found["steps"] = sorted(served), len(engine.report().rows)
        if not served - set(TORCHS) <= {implementation, "parts"}:
            return {**found, "ok": False, "error": f"steps were served by {sorted(served)}"}
        wrong = _at(engine, plain, exact, shape, device, found["ratios"])
    if wrong:
        return {**found, "ok": False, "error": f"{name} {mode} {shape}: {wrong}"}
    return found


def _at(
    engine: rf.Engine, plain: nn.Module, exact: nn.Module, shape: tuple[int, int, int],
    device: str, ratios: dict[str, float],
) -> str:  # fmt: skip
    """What is wrong at a shape, "" for nothing."""
    dtype = next(plain.parameters()).dtype
    replays = REPLAYS if is_cuda(device) else 1
    fresh = [images(shape, device, dtype, seed) for seed in range(1, 2 + replays)]
    results = [engine(x) for x in fresh]
    again = [engine(x) for x in fresh]
    for place, (x, y, other) in enumerate(zip(fresh, results, again, strict=True)):
        if not same_bits(y, other):
            return f"input {place} gave other bits when it came again"
        with precise():
            oracle = exact(x.double())
        ratio = numerics.relative_check(y, plain(x), oracle).ratio
        ratios[f"{shape} {place}"] = ratio
        if not ratio <= numerics.END_TO_END_LIMIT * numerics.chance(y.numel()):
            return f"the rms error of input {place} is {ratio:.3f} times eager's"
    if len({tuple(y.flatten()[:4].tolist()) for y in results}) < len(results):
        return "two inputs gave one result: a replay read old data"
    spoilt = fresh[-1].clone()
    spoilt[0, 0, spoilt.shape[2] // 2, 0] = float("nan")
    y, other = engine(spoilt), results[-1]
    if not bool(y[0].isnan().any()):
        return "a NaN was lost"
    if not same_bits(y[1:], other[1:]):
        return "a NaN in the first image changed another"
    return ""


def bytes_of(device: str, name: str, implementation: str = "triton") -> dict[str, Any]:
    """An engine of uint8 images beside one of floats that were normalised before: by the tiers."""
    dtype = MODES["bf16" if is_cuda(device) else "fp16"][0]
    plain = make(device, name, dtype)
    exact = copy.deepcopy(plain).double()
    n, height, width = (SHAPES if is_cuda(device) else TINY)[-1]
    x = torch.randint(256, (n, 3, height, width), dtype=torch.uint8, device=device)
    norm = rf.ops.stem_input_norm([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]).to(device)
    with torch.inference_mode(), rf.backend(implementation):
        engine = rf.freeze(plain, x, input_norm=norm)
        results = [engine(x), engine(x), engine(x)]
        a, b = (row.double().view(1, -1, 1, 1) for row in norm)
        given = (x.double() * a + b).to(dtype)
        with precise():
            oracle = exact(given.double())
        ratio = numerics.relative_check(results[0], plain(given), oracle).ratio
    same = all(same_bits(results[0], other) for other in results[1:])
    ok = same and ratio <= numerics.END_TO_END_LIMIT * numerics.chance(oracle.numel())
    found = {"ok": ok, "ratio": ratio}
    return found if ok else {**found, "error": f"ratio {ratio:.3f} to eager's; same bits: {same}"}


def threads(device: str, name: str = "resnet18", implementation: str = "triton") -> dict[str, Any]:
    """Eight threads share an engine, each on a stream of its own: each gets its own results."""
    dtype = MODES["bf16" if is_cuda(device) else "fp16"][0]
    plain = make(device, name, dtype)
    shapes = SHAPES if is_cuda(device) else TINY
    wrong: list[str] = []
    # What runs step by step is compared with replays: kernels that give the same bits.
    with torch.inference_mode(), rf.backend(implementation), _one_launch.preferring("never"):
        engine = engine_of(plain, images(shapes[0], device, dtype, 1))
        # Two shapes, so that programs take turns; each known before the threads begin.
        count = THREADS if is_cuda(device) else 2
        given = [images(shapes[k % 2], device, dtype, 10 + k) for k in range(count)]
        # The second shape runs step by step when it comes first, and is captured after that.
        expected = [engine(x) for x in given]
        again = [engine(x) for x in given]
        synchronize(device)
        if not all(map(same_bits, expected, again)):
            return {"ok": False, "error": "a replay gave other bits than the run step by step"}

    def serve(number: int) -> None:
        stream = torch.cuda.Stream(device) if is_cuda(device) else None
        with torch.inference_mode(), rf.backend(implementation), torch.cuda.stream(stream):
            for _ in range(ROUNDS if is_cuda(device) else 1):
                if not same_bits(engine(given[number]), expected[number]):
                    wrong.append(f"thread {number} got another result")
                    return

    def guarded(number: int) -> None:
        try:
            serve(number)
        except Exception as error:
            wrong.append(f"thread {number}: {type(error).__name__}: {error}")

    workers = [threading.Thread(target=guarded, args=(number,)) for number in range(len(given))]
    for worker in workers:
        worker.start()
        if not is_cuda(device):
            worker.join()  # Triton's interpreter serves one thread at a time
    for worker in workers:
        worker.join()
    return {"ok": not wrong, **({"error": "; ".join(wrong)} if wrong else {})}


@dataclasses.dataclass
class _Kept:
    """The latest result of each variant."""

    results: dict[str, Tensor]

    def of(self, name: str, call: Any) -> Any:
        def run() -> None:
            self.results[name] = call()

        return run


def inference(device: str, name: str, batch: int, rounds: int = 11) -> dict[str, Any]:
    """Images a second of eager channels_last, of the fused model and of the engine, in turns.

    Eager and fused are captured as graphs, the engine replays its own: with the copies of its input
    and of its result, as a user has it.

    Args:
        device: where.
        name: of the network.
        batch: images.
        rounds: samples of each.
    """
    dtype = network.dtype_of(device)
    plain = make(device, name, dtype)
    shape = (batch, 224, 224) if is_cuda(device) else (batch, 6, 6)
    x = images(shape, device, dtype, 4)
    torch.backends.cudnn.benchmark = True
    fused, kept = rf.fuse(plain), _Kept({})
    with torch.inference_mode(), rf.backend("triton"):
        engine = engine_of(plain, x)
        runs = {"eager": lambda: plain(x), "fused": lambda: fused(x), "frozen": lambda: engine(x)}
        calls = {name: kept.of(name, run) for name, run in runs.items()}
        for key in ("eager", "fused"):
            calls[key] = capture(calls[key], device)
        for _ in range(3):
            calls["frozen"]()
        for call in calls.values():
            call()
        synchronize(device)
        for key in ("fused", "frozen"):
            if wrong := network.unlike(kept.results[key], kept.results["eager"]):
                return {"ok": False, "error": f"{key}: {wrong}"}
        timed = interleaved(calls, device, rounds)
    return {
        "ok": True, "us": timed.to_dict(), "ratio": timed.ratio("eager", "frozen"),
        "over_fused": timed.ratio("fused", "frozen"),
        "images_per_s": {key: batch / timed.median(key) for key in timed.seconds},
        "steps": len(engine.report().rows),
    }  # fmt: skip
