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
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from resnet_fused import numerics
from resnet_fused.bench.subject import Subject
from resnet_fused.bench.training_kernels import KINDS
from resnet_fused.cases import BnActCase

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
    found = _named(out, work.subject, several="" not in parts)
    if isinstance(found, str):
        return Judgement(False, math.inf, found)
    if missing := [name for name in parts if name not in found]:
        return Judgement(False, math.inf, f"it lacks {', '.join(missing)}")
    judged = {name: _judge_part(part, found[name]) for name, part in parts.items()}
    looked = [one for name, one in judged.items() if parts[name].noisy <= TOO_NOISY or not one.ok]
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
            if work.subject.op in KINDS:
                part = _training_part(work)
            else:
                part = _bn_part(work) if isinstance(work.case, BnActCase) else _conv_part(work)
        return Reference({"": part})
    return _step_parts(work) if work.subject.training else _forward_part(work)


def _images(n: int) -> tuple[int | None, tuple[int, ...]]:
    return (None, ()) if n <= IMAGES else (0, (0, n - 1))


def _few(t: Tensor | None, axis: int | None, picked: tuple[int, ...]) -> Tensor | None:
    if t is None or axis is None:
        return t
    return t.index_select(axis, torch.tensor(picked, device=t.device))


def _bn_part(work: Work) -> Part:
    given, case = work.sets[0], work.case
    assert isinstance(case, BnActCase)
    eager = eager_kernel(work)
    axis, picked = _images(case.n)
    x, residual = (_few(t, axis, picked) for t in (given.x, given.residual))
    assert x is not None
    oracle = numerics.bn_act_oracle(x, given.scale, given.shift, residual, case.act)
    bound = numerics.bn_act_bound(x, given.scale, given.shift, residual, oracle)
    return _part(axis, picked, oracle, bound, eager)


def _conv_part(work: Work) -> Part:
    case: Any = work.case
    given, op = work.sets[0], work.subject.op
    eager = eager_kernel(work)
    axis, picked = _images(case.n)
    few = dict(vars(given))
    if op == "conv_wgrad":
        axis, picked = _channels(case)
        for name in ("weight", "scale", "shift"):
            few[name] = _few(few[name], axis, picked)
        for name in ("dy", "y"):
            few[name] = _few(few[name], None if axis is None else 1, picked)
    else:
        for name in ("x", "residual", "dy", "y"):
            few[name] = _few(few[name], axis, picked)
    with precise():
        if op == "conv_bn_act":
            oracle, bound = _forward_bound(case, few)
        else:
            oracle, bound = _gradient_bound(op, case, few)
    return _part(axis, picked, oracle, bound, eager)


def _training_part(work: Work) -> Part:
    """The first result of an op of training; its sums are the tests' and self-checks' matter."""
    case, op, kind = work.case, work.subject.op, KINDS[work.subject.op]
    given = work.sets[0]
    eager = eager_kernel(work)
    few = dict(vars(given))
    if op == "conv_bn_wgrad":
        axis, picked = _channels(case)
        for name, along in _OF_FILTERS.items():
            few[name] = _few(few[name], None if axis is None else along, picked)
    else:
        axis, picked = _images(given.dz.shape[0] if given.x is None else given.x.shape[0])
        for name, t in few.items():
            if name != "weight" and t is not None and t.dim() == 4:
                few[name] = _few(t, axis, picked)
    chosen = dataclasses.replace(given, **few)
    with precise():
        found = [kind.bound(case, chosen, **sums) for sums in _sums(eager)]
    widest = functools.reduce(torch.maximum, (bound for _, bound in found))
    return _part(axis, picked, found[0][0], widest, eager)


_OF_FILTERS = {"weight": 0, "dz": 1, "y": 1, "coefficients": 1}
"""Operands with a dimension of output channels, and which it is."""


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


def _forward_bound(case: Any, few: dict[str, Any]) -> tuple[Tensor, Tensor]:
    terms = tuple(few[name] for name in ("x", "weight", "scale", "shift", "residual"))
    oracle = numerics.conv_bn_act_oracle(*terms, **case.geometry, act=case.act)
    widest: Tensor | None = None
    for rounding in numerics.ROUNDINGS:
        for sums in _sums(few["x"]):
            bound = numerics.conv_bn_act_bound(
                *terms, oracle=oracle, **case.geometry, rounding=rounding, **sums
            )
            widest = bound if widest is None else torch.maximum(widest, bound)
    assert widest is not None
    # Libraries that fold take the shift as a bias in the tensors' dtype.
    u = numerics.unit_roundoff(few["x"].dtype)
    return oracle, widest + u * few["shift"].double().abs().view(1, -1, 1, 1)


def _gradient_bound(op: str, case: Any, few: dict[str, Any]) -> tuple[Tensor, Tensor]:
    dy, y, weight, scale = (few[name] for name in ("dy", "y", "weight", "scale"))
    # The gradient of the input does not depend on x, that of the weight not on the weight's values.
    x = few["x"] if few["x"] is not None else dy.new_zeros(len(dy), *case.input_shape[1:])
    both = numerics.conv_gradients_oracle(dy, y, x, weight, scale, **case.geometry)
    index, widest = (0 if op == "conv_dgrad" else 1), None
    for sums in _sums(dy):
        bound = numerics.conv_gradients_bound(
            dy, y, x, weight, scale, both, **case.geometry, rounding="folded", **sums
        )[index]
        widest = bound if widest is None else torch.maximum(widest, bound)
    assert widest is not None
    return both[index], widest


def eager_kernel(work: Work, i: int = 0) -> Tensor:
    """What eager PyTorch does for a kernel's subject on set i, pass by pass."""
    case: Any = work.case
    given, op = work.sets[i], work.subject.op
    if op in KINDS:
        return KINDS[op].eager(case)(given)
    if op in ("conv_bn_act", "bn_act"):
        y = given.x
        if op == "conv_bn_act":
            y = F.conv2d(y, given.weight, None, *case.geometry.values())
        mean, var = torch.zeros_like(given.scale), torch.ones_like(given.scale)
        y = F.batch_norm(y, mean, var, given.scale, given.shift, False, 0.0, 1e-30)
        if given.residual is not None:
            y = y + given.residual
        return F.relu(y) if case.act == "relu" else y
    dz = given.dy if given.y is None else torch.where(given.y > 0, given.dy, 0.0)
    dz = dz * given.scale.to(dz.dtype).view(1, -1, 1, 1)
    wanted = [op == "conv_dgrad", op == "conv_wgrad", False]
    x = given.x
    if x is None:  # its sizes alone are read
        x = dz.new_empty(1).expand(case.input_shape)
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        dz, x, given.weight, None, case.stride, case.padding, case.dilation, False, [0, 0],
        case.groups, wanted,
    )  # fmt: skip
    return dx if op == "conv_dgrad" else dweight


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
    wide = _with_batch(work, dataclasses.replace(batch, **_cast(batch, exact)))
    with torch.enable_grad():
        with precise():
            oracle = wide.run(_double(module, exact))
        eager = work.run(copy.deepcopy(module))
        plain = _with_batch(work, dataclasses.replace(batch, **_cast(batch, subject.torch_dtype)))
        other = plain.run(copy.deepcopy(module).to(memory_format=torch.contiguous_format))
    return _parts_by_name(subject, oracle, eager, other)


def _cast(batch: Any, dtype: torch.dtype) -> dict[str, Any]:
    """The batch's tensors in another dtype, contiguous; labels as they are."""
    x = batch.x.detach().to(dtype).contiguous().requires_grad_(batch.x.requires_grad)
    target = batch.target
    if target is not None and target.is_floating_point():
        target = target.to(dtype)
    return {"x": x, "target": target}


def _with_batch(work: Work, batch: Any) -> Work:
    return dataclasses.replace(work, sets=[batch], reference=None, _names={})
