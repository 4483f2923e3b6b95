"""stem, head and conv_chain on random data: each configuration, real layers, NaN, huge tensors.

Any implementation of these ops is looked at in the same way: its launch writes into results that
lie between guard bands, and takes the one configuration that it is told to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import resnet_fused as rf
from gpu.device import capture, free_bytes, interleaved, is_cuda, same_bits
from gpu.operands import DEPTH, MODES, ON_THE_CPU, precise, tf32, why_no_cuda
from resnet_fused import numerics
from resnet_fused.bench import work
from resnet_fused.bench.spanning_kernels import KINDS
from resnet_fused.bench.subject import Subject, kernel_names
from resnet_fused.cases import CHAIN_CASES, HEAD_CASES, STEM_CASES
from resnet_fused.ops import _admitted, _chain_checks, _cuda, _results, _triton
from resnet_fused.ops._library import overload
from resnet_fused.ops._selfchecks import GUARD, _lay_out

LAUNCHES: dict[str, Callable[..., None]] = {"triton": _triton._launch, "cuda": _cuda._launch}
CASES: dict[str, tuple[Any, ...]] = {
    "stem": STEM_CASES, "head": HEAD_CASES, "conv_chain": CHAIN_CASES,
}  # fmt: skip
SPECIAL = {"stem": "usual", "head": "no_bias", "conv_chain": "whole_tiles"}
TINY = {
    "stem": ("7x7s2_3_16_at12", "7x7s2_3_16_at12_uint8"), "head": ("48_10_at4",),
    "conv_chain": ("16_32_16_at4", "16_32_0_at4_proj16s2_front16_even"),
}  # fmt: skip
"""Layers of a size for Triton's interpreter."""
AGAIN = 3
REPEATS = 250
NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


class _Maker:
    """Random tensors made on the CPU, the same in each run and everywhere; see `bench.work`."""

    def __init__(self, name: str, dtype: torch.dtype, device: str) -> None:
        seed = zlib.crc32(f"{name}{dtype}".encode())
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.device = dtype, device

    def image(self, *shape: int) -> Tensor:
        made = torch.randn(shape, generator=self.generator).to(self.device, self.dtype)
        return made.contiguous(memory_format=torch.channels_last)

    def pixels(self, *shape: int) -> Tensor:
        made = torch.randint(256, shape, dtype=torch.uint8, generator=self.generator)
        return made.to(self.device).contiguous(memory_format=torch.channels_last)

    def affine(self, channels: int) -> tuple[Tensor, Tensor]:
        lot, size = torch.rand(2, channels, generator=self.generator)
        scale = (0.5 + size) * torch.where(lot < 0.2, -1.0, 1.0)
        return scale.to(self.device), torch.randn(channels, generator=self.generator).to(
            self.device
        )


def make(op: str, case: Any, dtype: torch.dtype, device: str) -> Any:
    """Operands of a case, x in the case's layout."""
    given = KINDS[op].make(_Maker(case.name, dtype, device), case)
    if getattr(case, "layout", "nhwc") == "nhwc":
        return given
    return dataclasses.replace(given, x=_lay_out(given.x, case))


def moved(given: Any, device: str) -> Any:
    """The same operands on another device."""
    fields = {name: None if t is None else t.to(device) for name, t in vars(given).items()}
    return dataclasses.replace(given, **fields)


@contextlib.contextmanager
def only(op: str, implementation: str, configuration: str) -> Iterator[None]:
    """Lets an implementation choose among one configuration; "" for what its launch would take."""
    names = frozenset({configuration}) if configuration else None

    def allowed(asked: str, by: str, device: torch.device) -> frozenset[str] | None:
        return names if (asked, by) == (op, implementation) else None

    with mock.patch.object(_admitted, "names", allowed):
        yield


def poisoned(t: Tensor) -> tuple[Tensor, Tensor]:
    """A result of the same sizes and strides, full of NaN between guard bands, and its buffer."""
    size = t.numel() + 2 * GUARD
    buffer = torch.full((size,), math.nan, dtype=t.dtype, device=t.device)
    return buffer, buffer[GUARD : size - GUARD].as_strided(t.shape, t.stride(), GUARD)


def launch(op: str, implementation: str, arguments: tuple[Any, ...]) -> tuple[list[Tensor], bool]:
    """The results of a launch, and whether their guard bands held.

    Args:
        op: of `KINDS`.
        implementation: "triton" or "cuda".
        arguments: in the schema's order.

    Raises:
        LookupError: no configuration takes the call.
    """
    form = _results.FORMS[op]
    empty = form.empty(*arguments)
    pairs = [poisoned(t) for t in (empty if isinstance(empty, tuple) else (empty,))]
    results = [out for _, out in pairs]
    operands = [arguments[place] for place in form.operands.values()]
    LAUNCHES[implementation](op, *operands, *results, *arguments[form.options :])
    held = all(bool(torch.cat([b[:GUARD], b[-GUARD:]]).isnan().all()) for b, _ in pairs)
    return results, held


def expected(op: str, case: Any, given: Any, mode: str, **how: Any) -> list[tuple[Tensor, Any]]:
    """For each result its oracle, and by how its sums are made the bound.

    Args:
        op: of `KINDS`.
        case: sizes.
        given: operands, on the device that is to compute them.
        mode: of `MODES`.
        how: more options of the bound.
    """
    options = {"tf32": mode == "tf32", "k": DEPTH[mode], **how}
    with precise():
        if op == "conv_chain":
            strides = case.projection_stride, case.out_stride
            oracles = numerics.conv_chain_oracle(given.plain, *strides)
            bounds = {
                sums: numerics.conv_chain_bound(given.plain, *strides, accumulation=sums, **options)
                for sums in numerics.ACCUMULATIONS
            }
            return [
                (oracle, {sums: pair[place] for sums, pair in bounds.items()})
                for place, oracle in enumerate(oracles)
                if oracle is not None
            ]
        if op == "head":  # it has one way to round
            options.pop("rounding", None)
        arguments = _arguments(op, case, given)
        oracle_of, bound_of = getattr(numerics, f"{op}_oracle"), getattr(numerics, f"{op}_bound")
        bounds = {
            sums: bound_of(*arguments, accumulation=sums, **options)
            for sums in numerics.ACCUMULATIONS
        }
        return [(oracle_of(*arguments), bounds)]


def _arguments(op: str, case: Any, given: Any) -> tuple[Any, ...]:
    function = KINDS[op].arguments
    assert function is not None
    return function(case)(given)


def judge(op: str, case: Any, given: Any, results: list[Tensor], mode: str, **how: Any) -> Any:
    """Every element of every result by its bound; sums that are cut at each step decide.

    Returns:
        {"ok", "truncate", "nearest": the worst error/bound, "error" if wrong}.
    """
    where = str(given.x.device) if KINDS[op].cost(case, given.weight.dtype).flops > (
        2 * ON_THE_CPU
    ) else "cpu"  # fmt: skip
    found: dict[str, Any] = {"ok": True, "truncate": 0.0, "nearest": 0.0}
    wanted = expected(op, case, moved(given, where), mode, **how)
    for out, (oracle, bounds) in zip(results, wanted, strict=False):
        for sums, bound in bounds.items():
            check = numerics.check_bound(out.to(where), oracle, bound)
            found[sums] = max(found[sums], check.worst)
            if sums == "truncate" and not check.ok:
                found |= {"ok": False, "error": f"{op} {case.name}: {check}"}
    return found


def cases_of(op: str, configuration: str) -> tuple[Any, ...]:
    """The cases that a configuration is looked at with: chains have some for each of Triton's."""
    more: tuple[Any, ...] = ()
    if op == "conv_chain" and configuration in _chain_checks.conv_chain_configurations():
        more = _chain_checks.cases_of(configuration)
    return (*more, *CASES[op])


def configuration(
    device: str, op: str, configuration: str, mode: str, implementation: str = "triton"
) -> dict[str, Any]:
    """One configuration on every case that it takes: bounds, guard bands, the same bits again.

    Args:
        device: where.
        op: of `KINDS`.
        configuration: its name.
        mode: of `MODES`.
        implementation: "triton" or "cuda".
    """
    if implementation == "cuda" and (why := why_no_cuda(device)) is not None:
        return {"ok": None, "skipped": why}
    dtype, allowed = MODES[mode]
    found: dict[str, Any] = {"ok": True, "truncate": 0.0, "cases": 0, "unfit": 0}
    found["configuration"] = configuration
    with tf32(allowed), only(op, implementation, configuration):
        for case in _few(cases_of(op, configuration), device):
            given = make(op, case, dtype, device)
            try:
                one = _repeated(op, case, given, mode, implementation)
            except LookupError as error:
                found["unfit"] += 1
                found["why"] = str(error)
                continue
            found["cases"] += 1
            found["truncate"] = max(found["truncate"], one["truncate"])
            if not one["ok"]:
                return {**found, "ok": False, "error": one["error"]}
    if not found["cases"]:
        return {**found, "ok": None, "skipped": f"no case fits: {found['why']}"}
    return found


def _few(cases: tuple[Any, ...], device: str) -> tuple[Any, ...]:
    """All of them on a GPU; two small ones where Triton's interpreter runs."""
    small = [case for case in cases if case.n and case.h * case.w < 100]
    return cases if is_cuda(device) else tuple(small[:2])


def _repeated(op: str, case: Any, given: Any, mode: str, implementation: str) -> dict[str, Any]:
    arguments = _arguments(op, case, given)
    results, held = launch(op, implementation, arguments)
    found = judge(op, case, given, results, mode)
    if not held:
        return {**found, "ok": False, "error": f"{op} {case.name}: elements beside it were written"}
    for _ in range(AGAIN if is_cuda(str(given.x.device)) else 1):
        again, _ = launch(op, implementation, arguments)
        if not all(map(same_bits, results, again)):
            return {**found, "ok": False, "error": f"{op} {case.name}: other bits the second time"}
    return found


def special(
    device: str, op: str, place: str, mode: str, implementation: str = "triton"
) -> dict[str, Any]:
    """A NaN or an infinity at both ends and in the middle of one operand: where the oracle has it.

    Args:
        device: where.
        op: of `KINDS`.
        place: "nan_x", "inf_weight", and so on: of `places`.
        mode: of `MODES`.
        implementation: "triton" or "cuda".
    """
    if implementation == "cuda" and (why := why_no_cuda(device)) is not None:
        return {"ok": None, "skipped": why}
    dtype, allowed = MODES[mode]
    case = next(case for case in CASES[op] if case.name == SPECIAL[op])
    if op == "stem" and not is_cuda(device):  # a strip with a NaN is computed twice
        case = dataclasses.replace(case, h=9, w=9, k=16)
    given = make(op, case, dtype, device)
    value, _, name = place.partition("_")
    put(getattr(given, name), math.nan if value == "nan" else math.inf)
    with tf32(allowed), only(op, implementation, ""):
        return _repeated(op, case, given, mode, implementation)


def put(t: Tensor, value: float) -> None:
    """Writes a value to the first element, the middle one, and negated to the last."""
    for part in (0, 0.5, 1):
        t[tuple(min(size - 1, int(part * size)) for size in t.shape)] = (
            -value if part == 1 else value
        )


def places(op: str) -> list[str]:
    """Where `special` puts what."""
    names = ("x", "residual", "weight", "shift") if op == "conv_chain" else ("x", "weight")
    return [f"{value}_{name}" for name in names for value in ("nan", "inf")]


def public(device: str, op: str, mode: str, implementation: str = "triton") -> dict[str, Any]:
    """The public op on every case, those that no kernel takes included: its parts serve them."""
    if implementation == "cuda" and (why := why_no_cuda(device)) is not None:
        return {"ok": None, "skipped": why}
    dtype, allowed = MODES[mode]
    found: dict[str, Any] = {"ok": True, "truncate": 0.0}
    with tf32(allowed), rf.backend(implementation):
        for case in _few(CASES[op], device):
            given = make(op, case, dtype, device)
            out = KINDS[op].ours(case)(given)
            results = list(out) if isinstance(out, tuple) else [out]
            # Which way it went is not told by the op: the bound of the parts is the wider one.
            one = judge(op, case, given, results, mode, rounding="parts")
            found["truncate"] = max(found["truncate"], one["truncate"])
            if not one["ok"]:
                return {**found, "ok": False, "error": one["error"]}
    return found


def layers(op: str, device: str) -> list[str]:
    """The op's calls in ResNet-50, the heaviest first."""
    if not is_cuda(device):
        return list(TINY[op])
    found = kernel_names(op, "resnet50")
    return sorted(found, key=lambda name: -found[name])


def _built(device: str, op: str, name: str, batch: int, mode: str = "") -> work.Work:
    kind = "cuda" if is_cuda(device) else "cpu"
    dtype = MODES[mode][0] if mode else torch.bfloat16 if is_cuda(device) else torch.float16
    made = work.build(Subject("kernel", op, name, batch, NAMES[dtype], kind))
    return made if is_cuda(device) else dataclasses.replace(made, sets=made.sets[:1])


def layer(
    device: str, op: str, name: str, batch: int = 4, implementation: str = "triton",
    repeats: int = AGAIN,
) -> dict[str, Any]:  # fmt: skip
    """A call of ResNet-50 as the implementation would run it: its bound, and the same bits again.

    Args:
        device: where.
        op: of `KINDS`.
        name: of the call, as `layers` has them.
        batch: images.
        implementation: "triton" or "cuda".
        repeats: how often it is run again.
    """
    if implementation == "cuda" and (why := why_no_cuda(device)) is not None:
        return {"ok": None, "skipped": why}
    made = _built(device, op, name, batch)
    arguments = _arguments(op, made.case, made.sets[0])
    with torch.inference_mode(), only(op, implementation, ""):
        try:
            results, held = launch(op, implementation, arguments)
        except LookupError as error:
            return {"ok": None, "skipped": str(error)}
        differ = torch.zeros((), dtype=torch.int64, device=device)
        for _ in range(repeats if is_cuda(device) else 1):
            again, _ = launch(op, implementation, arguments)
            for one, other in zip(results, again, strict=True):
                differ += (one.view(torch.int16) != other.view(torch.int16)).sum()
        judged = made.judge(KINDS[op].whole(tuple(results)) if len(results) > 1 else results[0])
    found = {"ok": judged.ok and held and not int(differ), "worst": judged.worst}
    if not found["ok"]:
        text = f"{judged.text}; bands held: {held}; {int(differ)} bits differ in {repeats} runs"
        found["error"] = f"{op} {name}: {text}"
    return found


def time(
    device: str, op: str, name: str, batch: int, kernels: Mapping[str, Sequence[str]],
    rates: Mapping[str, float] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A call by each implementation, by the op's parts and by eager, judged before they are timed.

    Args:
        device: where.
        op: of `KINDS`.
        name: of the call, as `layers` has them.
        batch: images.
        kernels: implementation -> configurations that are timed by themselves too, as
            "triton NAME"; "triton" alone is what its chooser takes.
        rates: the ceilings, for the part of them that was reached.

    Returns:
        "us" of each variant, "ratios" of parts and eager over "best", the fastest of ours,
        "of_floor" of that.
    """
    made = _built(device, op, name, batch)
    case, kind = made.case, KINDS[op]
    ways: dict[str, Any] = {one: _forced(op, case, one) for one in kernels}
    ways |= {
        f"{one} {configuration}": _forced(op, case, one, configuration)
        for one, names in kernels.items()
        for configuration in names
    }
    ways |= {"parts": _by_parts(op, case), "eager": kind.eager(case, made.sets[0])}
    variants, omitted = dict[str, Any](), dict[str, str]()
    with torch.inference_mode():
        for way, run in ways.items():
            try:
                judged = made.judge(run(made.sets[0]))
            except LookupError as error:
                omitted[way] = str(error)
                continue
            if not judged.ok and way != "eager":
                return {"ok": False, "error": f"{op} {name}, {way}: {judged.text}"}
            variants[way] = capture(lambda run=run: [run(one) for one in made.sets], device)
        ours = [way for way in variants if way not in ("parts", "eager")]
        if not ours:
            return {"ok": None, "skipped": "; ".join(dict.fromkeys(omitted.values()))}
        timed = interleaved(variants, device)
    best = min(ours, key=timed.median)
    found: dict[str, Any] = {
        "ok": True, "us": timed.to_dict(len(made.sets)), "omitted": omitted, "best": best,
        "ratios": {f"{way}_over_best": timed.ratio(way, best) for way in ("parts", "eager")},
    }  # fmt: skip
    if rates:
        cost = kind.cost(case, made.subject.torch_dtype)
        floor = cost.seconds(rates["flops"], rates["bandwidth"])
        found["of_floor"] = floor * len(made.sets) / timed.median(best)
    return found


def _forced(
    op: str, case: Any, implementation: str, configuration: str = ""
) -> Callable[[Any], Any]:
    """The very overload: where it can't take the call, no other way is timed in its name."""
    kind, run = KINDS[op], overload(op, implementation)

    def call(given: Any) -> Any:
        with only(op, implementation, configuration):
            return kind.whole(run(*_arguments(op, case, given)))

    return call


def _by_parts(op: str, case: Any) -> Callable[[Any], Any]:
    """Each convolution by Triton's kernel: none is admitted yet while this runs."""
    run = _forced(op, case, "parts")

    def call(given: Any) -> Any:
        with rf.backend("triton"):
            return run(given)

    return call


def large(device: str, op: str, implementation: str = "triton") -> dict[str, Any]:
    """More than 2^31 elements: the first, the crossing and the last images are judged.

    Args:
        device: where; the CPU takes five images.
        op: "stem" (its result is that large) or "conv_chain" (out and the shortcut are).
        implementation: "triton" or "cuda".
    """
    if implementation == "cuda" and (why := why_no_cuda(device)) is not None:
        return {"ok": None, "skipped": why}
    mode = "bf16" if is_cuda(device) else "fp16"
    name = {"stem": "7x7s2_3_64_at224", "conv_chain": "64_256_64_at56"}[op]
    name = name if is_cuda(device) else TINY[op][0]
    few = _built(device, op, name, 3, mode)
    small: Any = few.case
    largest = small.c * small.h * small.w if op == "conv_chain" else small.k * (small.h // 4) ** 2
    images = 2**31 // largest + 3 if is_cuda(device) else 5
    free, size = free_bytes(device), KINDS[op].cost(
        dataclasses.replace(small, n=images), MODES[mode][0]
    ).bytes  # fmt: skip
    if free is not None and free < 1.15 * size:
        return {"ok": None, "skipped": f"needs {1.15 * size / 1e9:.0f} GB free"}
    judged = [0, min(images - 2, 2**31 // largest), images - 1]
    given = few.sets[0]
    fields = {
        field: _spread(t, judged, images)
        for field, t in vars(given).items()
        if isinstance(t, Tensor) and t.dim() == 4 and not field.endswith("weight")
    }
    case = dataclasses.replace(small, n=images)
    arguments = _arguments(op, case, dataclasses.replace(given, **fields))
    with torch.inference_mode(), only(op, implementation, ""):
        results, held = launch(op, implementation, arguments)
    found = judge(op, small, given, [t[judged] for t in results], mode)
    if not held:
        found |= {"ok": False, "error": f"{op}: elements beside the result were written"}
    return {**found, "images": images, "elements": images * largest}


def _spread(t: Tensor, images: list[int], count: int) -> Tensor:
    """`t`'s images at places of a larger tensor of zeros, channels_last."""
    whole = torch.zeros(
        (t.shape[1] * t.shape[2] * t.shape[3] * count,), dtype=t.dtype, device=t.device
    )
    n, c, h, w = count, *t.shape[1:]
    whole = whole.view(n, h, w, c).permute(0, 3, 1, 2)
    whole[images] = t
    return whole
