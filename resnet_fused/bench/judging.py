"""Whether a variant's output is right, before it is timed: against float64.

A variant may be anybody's: it may fold BatchNorm, store every step, or add in another order. So a
kernel's element is right within the widest of the bounds of `numerics` for the ways to round that
are in use; an output beyond its bounds is right still if its error is no more than
`END_TO_END_LIMIT` times that of eager PyTorch on the same operands, both as root mean square and at
its largest. Blocks and models are held to the latter; eager in NCHW and in channels_last, which add
in different orders, are one yardstick, the larger error of the two.

float64 is expensive, so a part is compared with it (some images; some output channels of a weight's
gradient) and the rest, every element of it, with eager's own output.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from resnet_fused import numerics
from resnet_fused.bench.kernels import KINDS
from resnet_fused.bench.kinds import Result, widest
from resnet_fused.bench.subject import Subject

if TYPE_CHECKING:
    from resnet_fused.bench.work import Work

IMAGES = 2  # the first and the last
CHANNELS = 16  # of a weight's gradient
# Two right results differ by the sum of their errors at most; where nothing was compared with
# float64 the largest of them may be larger than among what was.
REST = 4.0
# The same for the mean square, of which neither right one has more than its share.
REST_RMS = 3.0
# The largest error of many is less even than their mean square.
MAX_SLACK = 2.0
# Beyond this, eager's own error relative to the values, there is nothing to be right about: the
# gradients of a deep network's first layers in bfloat16 are noise.
TOO_NOISY = 0.5
# Depth of the matrix unit that may cut its sums, by dtype; bfloat16 and float16 share theirs.
_DEPTHS = {torch.bfloat16: 16, torch.float16: 16, torch.float32: 8}


@dataclass(frozen=True)
class Judgement:
    """Whether an output is right.

    Attributes:
        ok: the verdict.
        worst: the largest error over what is accepted; above 1 is wrong. inf for other shapes, NaN
            out of place and the like.
        text: one line that says where and by how much.
    """

    ok: bool
    worst: float
    text: str


@dataclass(frozen=True)
class Part:
    """One tensor of an output, and what it is compared with.

    Attributes:
        axis: of the picked slices; None: all of it is compared with float64.
        picked: indices along the axis.
        oracle: float64 (float32 for a training step in 16 bits), the picked slices.
        bound: element-wise, like the oracle; None where only norms are compared.
        eager: eager's output, whole.
        rms, max: eager's error on the picked slices.
        noisy: eager's rms error relative to the oracle's.
    """

    axis: int | None
    picked: tuple[int, ...]
    oracle: Tensor
    bound: Tensor | None
    eager: Tensor
    rms: float
    max: float
    noisy: float

    def pick(self, t: Tensor) -> Tensor:
        """The slices of a tensor that are compared with float64."""
        if self.axis is None:
            return t
        return t.index_select(self.axis, torch.tensor(self.picked, device=t.device))


@dataclass(frozen=True)
class Reference:
    """What all variants of a subject are judged by: name -> part; "" is a lone tensor."""

    parts: Mapping[str, Part]

    def to_dict(self) -> dict[str, Any]:
        """Plain values and tensors, for `torch.save`."""
        return {name: dict(vars(part)) for name, part in self.parts.items()}

    @classmethod
    def from_dict(cls, d: Mapping[str, Any], device: str) -> Reference:
        """What `to_dict` made, on a device."""
        return cls({name: Part(**_moved(fields, device)) for name, fields in d.items()})


def _moved(fields: Mapping[str, Any], device: str) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in fields.items()}


def judge(work: Work, out: Any) -> Judgement:
    """Judges an output of set 0 by the work's reference."""
    assert work.reference is not None
    parts = work.reference.parts
    if work.subject.level == "kernel":
        found = KINDS[work.subject.op].named(out) or f"it returned a {type(out).__name__}"
    else:
        found = _named(out, work.subject, several="" not in parts)
    if isinstance(found, str):
        return Judgement(False, math.inf, found)
    if missing := [name for name in parts if name not in found]:
        return Judgement(False, math.inf, f"it lacks {', '.join(missing)}")
    judged = {name: _judge_part(part, found[name]) for name, part in parts.items()}
    if work.subject.level == "kernel" and judged[""].ok:
        judged |= _follow(work, found)
    looked = [
        one
        for name, one in judged.items()
        if name not in parts or parts[name].noisy <= TOO_NOISY or not one.ok
    ]
    if not looked:
        text = "eager itself is too far from float64 for a judgement"
        return Judgement(False, math.inf, text)
    worst = max(judged, key=lambda name: judged[name].worst)
    one = judged[worst]
    ok = all(one.ok for one in judged.values())
    return Judgement(ok, one.worst, f"{worst}: {one.text}" if worst else one.text)


def _named(out: Any, subject: Subject, several: bool = False) -> dict[str, Tensor] | str:
    """An output's tensors by name, or why they are none that is expected."""
    if not subject.training:
        if isinstance(out, Tensor):
            return {"": out}
        leaves = enumerate(tree_leaves(out)) if several else ()
        tensors = {f"output {i}": t for i, t in leaves if isinstance(t, Tensor)}
        return tensors or f"it returned a {type(out).__name__}"
    shaped = isinstance(out, (tuple, list)) and len(out) == 2 and isinstance(out[1], Mapping)
    if not shaped:
        return "a training step returns (loss, name -> gradient)"
    tensors = {"loss": out[0], **out[1]}
    odd = [name for name, t in tensors.items() if not isinstance(t, Tensor)]
    return f"{', '.join(odd)}: no tensor" if odd else tensors


def _judge_part(part: Part, y: Tensor) -> Judgement:
    eager = part.eager
    if y.shape != eager.shape or y.dtype != eager.dtype:
        return Judgement(
            False, math.inf,
            f"shape {tuple(y.shape)} in {y.dtype}, expected {tuple(eager.shape)} in {eager.dtype}",
        )  # fmt: skip
    y = y.detach().to(eager.device)
    got, rms_limit, max_limit = part.pick(y), *_limits(part)
    if part.bound is not None and got.numel():
        check = numerics.check_bound(got, part.oracle, part.bound)
        within = Judgement(check.ok, check.worst, str(check))
        if not check.ok:
            beside = _beside(part, got, rms_limit, max_limit)
            within = beside if beside.ok else within
        most = REST * max(float(part.bound.max()), max_limit)
    else:
        within = _beside(part, got, rms_limit, max_limit)
        most = REST * max_limit
    if not within.ok or part.axis is None:
        return within
    # inf - inf is NaN; a NaN in the wrong place is one here too.
    rms, furthest = _norms(y.float(), eager.float())
    if not furthest <= most:
        text = f"an element is {furthest:.3g} away from eager's, {most:.3g} is accepted"
        return Judgement(False, _share(furthest, most), text)
    # A kernel's elements have bounds of their own, of which eager's error may use far less.
    most = math.inf if part.bound is not None else REST_RMS * rms_limit
    if not rms <= most:
        text = f"all elements are {rms:.3g} (rms) away from eager's, {most:.3g} is accepted"
        return Judgement(False, _share(rms, most), text)
    return within


def _limits(part: Part) -> tuple[float, float]:
    """What the rms and the largest error may be, by eager's."""
    raised = numerics.END_TO_END_LIMIT * numerics.chance(part.oracle.numel())
    # Eager may be exact by chance (a loss, a sum of two); a rounding of the values is always right.
    largest = float(part.oracle.abs().max()) if part.oracle.numel() else 0.0
    least = numerics.unit_roundoff(part.eager.dtype) * largest
    return raised * max(part.rms, least / 4), MAX_SLACK * raised * max(part.max, least)


def _beside(part: Part, got: Tensor, rms_limit: float, max_limit: float) -> Judgement:
    rms, largest = _norms(got, part.oracle)
    use = max(_share(rms, rms_limit), _share(largest, max_limit))
    text = (
        f"rms error {rms:.3g}, largest {largest:.3g}, accepted are {rms_limit:.3g} and "
        f"{max_limit:.3g} by eager's {part.rms:.3g} and {part.max:.3g}"
    )
    return Judgement(use <= 1.0, use, text)


def _share(error: float, limit: float) -> float:
    if error != error:
        return math.inf
    return 0.0 if error == 0.0 else error / limit if limit > 0.0 else math.inf


def _norms(y: Tensor, oracle: Tensor) -> tuple[float, float]:
    error = y.to(oracle.dtype) - oracle
    if not error.numel():
        return 0.0, 0.0
    rms = float(torch.linalg.vector_norm(error)) / math.sqrt(error.numel())
    return rms, float(error.abs().max())


def _part(
    axis: int | None, picked: tuple[int, ...], oracle: Tensor, bound: Tensor | None, *eager: Tensor
) -> Part:
    """A part whose yardstick is the largest error of one or two eager outputs; the first is kept.

    Each of those is whole, or holds the picked slices alone.
    """
    whole = eager[0].detach()
    made = Part(axis, picked, oracle, bound, whole, 0.0, 0.0, 0.0)
    rms = largest = 0.0
    for one in eager:
        few = one.detach() if one.shape == oracle.shape else made.pick(one.detach())
        errors = _norms(few, oracle)
        rms, largest = max(rms, errors[0]), max(largest, errors[1])
    size = float(torch.linalg.vector_norm(oracle)) / math.sqrt(max(1, oracle.numel()))
    noisy = rms / size if size > 0.0 else 0.0
    return dataclasses.replace(made, rms=rms, max=largest, noisy=noisy)


@contextlib.contextmanager
def precise() -> Iterator[None]:
    """Nothing of cuDNN and nothing in TF32: what an oracle may be computed with."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=False, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def reference(work: Work) -> Reference:
    """Computes what the subject's outputs are judged by."""
    if work.subject.level == "kernel":
        with torch.inference_mode():
            return Reference(_kernel_parts(work))
    return _step_parts(work) if work.subject.training else _forward_part(work)


def _images(n: int) -> tuple[int | None, tuple[int, ...]]:
    return (None, ()) if n <= IMAGES else (0, (0, n - 1))


def _few(t: Tensor | None, axis: int | None, picked: tuple[int, ...]) -> Tensor | None:
    if t is None or axis is None:
        return t
    return t.index_select(axis, torch.tensor(picked, device=t.device))


def _kernel_parts(work: Work) -> dict[str, Part]:
    """Those results of a kernel that its operands alone decide; the first is ""."""
    kind, given = KINDS[work.subject.op], work.sets[0]
    eager = kind.named(kind.eager(work.case, given)(given))
    assert eager is not None
    own = [result for result in kind.results if result.bound is not None]
    return {  # a case may lack the later ones: a chain's next
        name: _kernel_part(work, result, t)
        for result, (name, t) in zip(own, eager.items(), strict=False)
    }


def _kernel_part(work: Work, result: Result, eager: Tensor) -> Part:
    case, given = work.case, work.sets[0]
    few = dict(vars(given))
    if result.filters:
        axis, picked = _channels(case)
        for name, along in result.filters.items():
            few[name] = _few(few[name], None if axis is None else along, picked)
    else:
        images = {n: t for n, t in few.items() if not n.endswith("weight") and _is_image(t)}
        axis, picked = _images(len(next(iter(images.values()))))
        few |= {name: _few(t, axis, picked) for name, t in images.items()}
    chosen = dataclasses.replace(given, **few)
    assert result.bound is not None
    with precise():
        oracle, bound = widest(result.bound(case, chosen, **sums) for sums in _sums(eager))
    return _part(axis, picked, oracle, bound, eager)


def _is_image(t: Any) -> bool:
    return isinstance(t, Tensor) and t.dim() == 4


def _follow(work: Work, found: Mapping[str, Tensor]) -> dict[str, Judgement]:
    """What a kernel's call says about its own first result, against float64 of that result."""
    judged = {}
    for result in KINDS[work.subject.op].results:
        got = found.get(result.name)
        if result.follows is None or got is None:
            continue
        with precise():
            expected = result.follows(work.case, work.sets[0], found[""].detach())
        if expected is None:
            continue
        oracle, bound = expected
        if got.shape != oracle.shape:
            shapes = f"shape {tuple(got.shape)}, expected {tuple(oracle.shape)}"
            judged[result.name] = Judgement(False, math.inf, shapes)
            continue
        check = numerics.check_bound(got.detach().to(oracle.device), oracle, bound)
        judged[result.name] = Judgement(check.ok, check.worst, str(check))
    return judged


def _channels(case: Any) -> tuple[int | None, tuple[int, ...]]:
    """Output channels of a weight's gradient, spread evenly; all of a grouped one."""
    if case.k <= CHANNELS or case.groups > 1:
        return None, ()
    return 0, tuple(i * (case.k - 1) // (CHANNELS - 1) for i in range(CHANNELS))


def _sums(t: Tensor) -> list[dict[str, Any]]:
    """How sums may be made where a tensor lies: rounded to nearest, on a GPU also cut."""
    options: dict[str, Any] = {"accumulation": "nearest"}
    if t.device.type != "cuda":
        return [options]
    options["tf32"] = (
        t.dtype is torch.float32 and torch.backends.cudnn.conv.fp32_precision != "ieee"
    )
    return [options, {**options, "accumulation": "truncate", "k": _DEPTHS[t.dtype]}]


def eager_kernel(work: Work, i: int = 0) -> Tensor:
    """What eager PyTorch does for a kernel's subject on set i, pass by pass: the first result."""
    kind = KINDS[work.subject.op]
    found = kind.named(kind.eager(work.case, work.sets[i])(work.sets[i]))
    assert found is not None
    return found[""]


def _double(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(module).to(dtype)


def _forward_part(work: Work) -> Reference:
    module, x = work.module, work.sets[0].x
    assert module is not None
    with torch.inference_mode():
        eager = module(x)
        lone = isinstance(eager, Tensor)
        axis, picked = _images(len(x)) if lone else (None, ())
        few = _few(x, axis, picked)
        assert few is not None
        other = copy.deepcopy(module).to(memory_format=torch.contiguous_format)(few.contiguous())
        with precise():
            oracle = _double(module, torch.float64)(few.double())
        if lone:
            return Reference({"": _part(axis, picked, oracle, None, eager, other)})
    return _parts_by_name(work.subject, oracle, eager, other)


def _parts_by_name(subject: Subject, *outputs: Any) -> Reference:
    """The parts of outputs of several tensors: in float64, eager's, and eager's in NCHW."""
    named = [_named(out, subject, several=True) for out in outputs]
    oracles, eagers, others = (n for n in named if not isinstance(n, str))
    return Reference(
        {name: _part(None, (), t, None, eagers[name], others[name]) for name, t in oracles.items()}
    )


def _step_parts(work: Work) -> Reference:
    """A step's loss and gradients hang on every image, so the whole step is computed in float64.

    A step in 16 bits is held against float32, whose error is 2^-16 of theirs, at half the memory.
    """
    subject, batch, module = work.subject, work.sets[0], work.module
    assert module is not None
    exact = torch.float32 if subject.torch_dtype.itemsize == 2 else torch.float64
    wide = _with_batch(work, dataclasses.replace(batch, **_cast(batch, exact)), exact=True)
    with torch.enable_grad():
        with precise():
            oracle = wide.run(_double(module, exact))
        eager = work.run(copy.deepcopy(module))
        plain = _with_batch(work, dataclasses.replace(batch, **_cast(batch, subject.storage_dtype)))
        other = plain.run(copy.deepcopy(module).to(memory_format=torch.contiguous_format))
    return _parts_by_name(subject, oracle, eager, other)


def _cast(batch: Any, dtype: torch.dtype) -> dict[str, Any]:
    """The batch's tensors in another dtype, contiguous; labels as they are."""
    x = batch.x.detach().to(dtype).contiguous().requires_grad_(batch.x.requires_grad)
    target = batch.target
    if target is not None and target.is_floating_point():
        target = target.to(dtype)
    return {"x": x, "target": target}


def _with_batch(work: Work, batch: Any, *, exact: bool = False) -> Work:
    return dataclasses.replace(
        work, sets=[batch], reference=None, exact=exact, _names={}, _optimizers={}
    )
