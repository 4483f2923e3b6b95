"""What the ops of training share: arithmetic that every implementation has in common, and entry.

Per-channel values travel as one tensor `norm` [4, K] in float32 (float64 where the activations are
float64): scale, shift, mean, invstd, rows 0 to 3. A layer's BatchNorm, scale * y + shift, is always
one fused multiply-add: its sign is that of the exact scale * y + shift, so forward and backward
make the same ReLU mask in every implementation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from .. import _extension, backends
from . import _checks, _cuda, _cuda_passes, _results, _triton
from ._library import define, overload

SCALE, SHIFT, MEAN, INVSTD = range(4)
NORM_ROWS = 4
_bodies: dict[str, Callable[..., Any]] = {}
"""The C++ passes' bodies by op: what their overloads call."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and per-channel values for activations of `dtype`."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def per_channel(vector: Tensor) -> Tensor:
    """[K] as [1, K, 1, 1]."""
    return vector.view(1, -1, 1, 1)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Multiply-add a * b + c in float32, rounded once (float64: by PyTorch's own two operations).

    The product of two float32 numbers is exact in float64.
    """
    if a.dtype is torch.float64:
        return torch.addcmul(c, a, b)
    return torch.addcmul(c.double(), a.double(), b.double()).to(torch.float32)


def normalised(y: Tensor, norm: Tensor, act: str = "relu") -> Tensor:
    """act(scale * y + shift) rounded to y's dtype: what the next layer reads [N, K, P, Q]."""
    h = fma(per_channel(norm[SCALE]), y.to(norm.dtype), per_channel(norm[SHIFT]))
    if act == "relu":
        h = torch.where(h < 0, h.new_zeros(()), h)
    return h.to(y.dtype)


def affine_gradient(dz: Tensor, y: Tensor | None, coefficients: Tensor | None) -> Tensor:
    """The gradient of the raw output: A dz + (B y + C), two fused multiply-adds, one rounding."""
    if coefficients is None or y is None:
        return dz
    a, b, c = (per_channel(row) for row in coefficients)
    kept = coefficients.dtype
    return fma(a, dz.to(kept), fma(b, y.to(kept), c)).to(dz.dtype)


def check_norm(op: str, name: str, norm: object, like: Tensor, channels: int) -> Tensor:
    """Checks [4, K] per-channel values on the device of `like`."""
    return check_rows(op, name, norm, like, (NORM_ROWS, channels), "scale, shift, mean, invstd")


def check_rows(
    op: str, name: str, rows: object, like: Tensor, shape: tuple[int, ...], meaning: str
) -> Tensor:
    """Checks a tensor of per-channel values: shape, device, and the dtype of the arithmetic."""
    if not isinstance(rows, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(rows).__name__}")
    _checks.no_tangent(op, name, rows)
    wanted = compute_dtype(like.dtype)
    if rows.dtype is not wanted:
        raise TypeError(f"{op}: {name} has dtype {rows.dtype}; {wanted} is needed")
    if tuple(rows.shape) != shape:
        raise ValueError(
            f"{op}: {name} has shape {tuple(rows.shape)}; {shape} is needed ({meaning})"
        )
    if rows.device != like.device:
        raise ValueError(f"{op}: {name} is on {rows.device}, the activations on {like.device}")
    return rows.contiguous()


def check_total(op: str, total: object, like: Tensor) -> Tensor | None:
    """Checks the number of elements a channel over all ranks: None, or float64 [1]."""
    if total is None:
        return None
    if not isinstance(total, Tensor) or total.dtype is not torch.float64 or total.shape != (1,):
        raise TypeError(f"{op}: total is {total!r}; None or a float64 tensor [1] is accepted")
    if total.device != like.device:
        raise ValueError(f"{op}: total is on {total.device}, the others on {like.device}")
    return total


def check_count(op: str, count: object, total: Tensor | None, *, least: int = 0) -> None:
    """Checks the number of elements a channel of this rank.

    Args:
        op: name for the messages.
        count: what was given.
        total: elements a channel over all ranks, or None.
        least: 2 where one value a channel has no variance; none at all, an empty batch, is right.
    """
    if not isinstance(count, int | torch.SymInt) or count < 0:
        raise ValueError(f"{op}: count is {count!r}; an int of 0 or more is accepted")
    if least > 1 and total is None and count == 1:
        raise ValueError(f"{op}: expected more than 1 value per channel, got count=1")


def supports_cpu(call: backends.Call) -> str | None:
    """Why the C++ kernels can't serve a call, or None."""
    if call.device != "cpu":
        return f"the tensors are on {call.device}"
    if not _extension.available():
        return f"the compiled extension is missing: {_extension.why_not()}"
    return None


def enter(
    op: str,
    schema: str,
    reference: Callable[..., Any],
    about: str,
    *,
    cpu: Callable[..., Any] | None = None,
    fake: Callable[..., Any] | None = None,
    triton: str | None = None,
    cuda: bool = False,
    cuda_pass: bool = False,
    mutates: tuple[str, ...] = (),
    rounding: str = "fused",
    reference_rounding: str | None = None,
    cuda_launch: Callable[..., None] | None = None,
    cuda_checks: str = "_cuda_checks",
) -> None:
    """Defines an op's overloads and enters its implementations.

    Args:
        op: its name.
        schema: arguments and results.
        reference: plain PyTorch's body.
        about: what its kernels do, for `info`.
        cpu: body by the C++ kernels, where there is one.
        fake: makes empty results; by default that of `_results.FORMS`.
        triton: module that holds the self-check of its Triton kernel, where there is one.
        cuda: whether there is a CUDA convolution.
        cuda_pass: whether the CPU's raw op has a CUDA kernel too.
        mutates: arguments that it writes into.
        rounding: the bound of `numerics` that all implementations are held to.
        reference_rounding: that of the reference, where it rounds in another place.
        cuda_launch: of a CUDA kernel that is none of `_cuda`'s, as `_cuda.declare` takes it.
        cuda_checks: module that holds that kernel's self-check.
    """
    fake = fake or _results.FORMS[op].empty
    if triton is not None:
        _triton.declare(op, schema, fake, triton, mutates)
        backends.register(
            backends.Implementation(
                op, "triton", ("triton",), f"Triton, {about}", _triton.supports, rounding
            )
        )
    if cuda:
        _cuda.declare(op, schema, fake, launch=cuda_launch, checks=cuda_checks)
        by = f"hand-written CUDA, {about}"
        backends.register(
            backends.Implementation(op, "cuda", ("cuda",), by, _cuda.supports, rounding)
        )
    if cuda_pass:
        launch, checks = _cuda_passes.launch(op), _cuda_passes.CHECKS
        _cuda.declare(op, schema, fake, launch=launch, checks=checks)
        by = f"hand-written CUDA, {about}"
        backends.register(
            backends.Implementation(op, "cuda", ("cuda",), by, _cuda_passes.supports, rounding)
        )
    if cpu is not None:
        define(f"{op}.cpu", schema, cpu, fake)
        _bodies[op] = cpu
        # The convolutions between the C++ passes are PyTorch's.
        by = "PyTorch's convolution and C++ passes" if op.startswith("conv") else f"C++, {about}"
        backends.register(backends.Implementation(op, "cpu", ("cpu",), by, supports_cpu, rounding))
    define(f"{op}.reference", schema, reference, fake)
    backends.register(
        backends.Implementation(
            op,
            "reference",
            ("reference",) if cpu is not None else ("reference", "cpu"),
            "plain PyTorch, any device and dtype",
            lambda call: None,
            reference_rounding or rounding,
        )
    )


def choice(op: str, t: Tensor) -> backends.Choice:
    """The implementation of an op for activations like `t`, and why."""
    return backends.choose(backends.Call(op, t.device.type, t.dtype, index=t.device.index))


def watched() -> bool:
    """Whether somebody is to see each op: a compiler, a mode, a transform of `torch.func`."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.compiler.is_compiling()
    )


class Table(dict[str, Callable[..., Any]]):
    """The ops of training for activations of one dtype on one device, as checked calls run them.

    Each is found once, when it is first asked for. Where the C++ passes serve and nobody watches,
    an op is their body itself: for a small map the way through the dispatcher takes longer.

    Args:
        call: the facts of a call of an op.
        bodies: whether bodies may be called themselves.
    """

    def __init__(self, call: Callable[[str], backends.Call], bodies: bool) -> None:
        super().__init__()
        self._call = call
        self._bodies = bodies

    def __missing__(self, op: str) -> Callable[..., Any]:
        name = backends.choose(self._call(op)).implementation.name
        found = _bodies[op] if self._bodies and name == "cpu" else overload(op, name)
        self[op] = found
        return found

    def is_body(self, op: str) -> bool:
        """Whether an op is the body of the C++ passes: its parts may be put together otherwise."""
        return self[op] is _bodies.get(op)


@functools.lru_cache(maxsize=64)
def _table(
    device: str, index: int | None, dtype: torch.dtype, circumstances: Hashable, bodies: bool
) -> Table:
    return Table(lambda op: backends.Call(op, device, dtype, index=index), bodies)


def table(like: Tensor) -> Table:
    """The ops for activations like `like`, as things stand now; not for a compiler's eyes."""
    device = like.device
    kind, index = device.type, device.index
    return _table(kind, index, like.dtype, backends.circumstances(kind, index), not watched())


def run(op: str, like: Tensor, *arguments: Any) -> Any:
    """Runs an op on checked arguments, by the implementation that serves `like`."""
    name = "reference" if torch.compiler.is_compiling() else choice(op, like).implementation.name
    return overload(op, name)(*arguments)


def geometry_of(
    op: str, stride: Any, padding: Any, dilation: Any, groups: int
) -> tuple[list[int], list[int], list[int], int]:
    """Stride, padding, dilation as pairs, and groups, as the overloads take them."""
    return (*_checks.geometry(op, stride, padding, dilation), groups)
