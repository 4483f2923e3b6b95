"""This package's ops as steps: their arguments, who serves them, and how they write into a result.

One table: what differs between the ops is how a step becomes the arguments of the op's schema.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .. import backends
from ..ops import _admitted, _checks, _cuda, _results, _triton, _tuned_calls
from ..ops._library import overload
from ..triton import _limits
from ._ir import Step

Values = Sequence[Any]


def _conv_bn_act(step: Step, values: Values) -> tuple[Any, ...]:
    t, o = step.tensors, step.options
    residual = values[1] if len(values) == 2 else None
    geometry = (o["stride"], o["padding"], o["dilation"], o["groups"])
    return (values[0], t["weight"], t["scale"], t["shift"], residual, *geometry, o["act"])


def _conv_bn_act_fp8(step: Step, values: Values) -> tuple[Any, ...]:
    o = step.options
    return (
        *_conv_bn_act(step, values), o["residual_scale"], o["out_scale"], o["out_dtype"],
    )  # fmt: skip


def _stem(step: Step, values: Values) -> tuple[Any, ...]:
    t, o = step.tensors, step.options
    pool = (o["pool_kernel"], o["pool_stride"], o["pool_padding"])
    norm = t.get("input_norm")
    vectors = (t["scale"], t["shift"], norm)
    geometry = (o["stride"], o["padding"], *pool)
    return (values[0], t["weight"], *vectors, *geometry, o.get("out_scale"))


def _head(step: Step, values: Values) -> tuple[Any, ...]:
    return (values[0], step.tensors["weight"], step.tensors.get("bias"))


_CHAIN = ("weight", "scale", "shift")


def _chain_operands(step: Step, values: Values) -> tuple[Any, ...]:
    t = step.tensors
    projected = "projection_weight" in t
    shortcut = (None, values[1]) if projected else (values[1], None)
    rest = [t.get(f"{part}_{name}") for part in ("projection", "next", "front") for name in _CHAIN]
    own = [t[name] for name in _CHAIN]
    return (values[0], *own, *shortcut, *rest)


def _conv_chain(step: Step, values: Values) -> tuple[Any, ...]:
    o = step.options
    options = (o["projection_stride"], o["out_stride"], o["reverse"])
    return (*_chain_operands(step, values), *options)


_CHAIN_SCALES = ("residual_scale", "out_scale", "next_out_scale", "front_out_scale")


def _conv_chain_fp8(step: Step, values: Values) -> tuple[Any, ...]:
    o = step.options
    scales = (o[name] for name in _CHAIN_SCALES)
    return (*_chain_operands(step, values), o["projection_stride"], o["out_stride"], *scales)


def _choose_conv(step: Step, args: tuple[Any, ...]) -> backends.Choice:
    module = importlib.import_module("resnet_fused.ops.conv_bn_act")
    call = module._call(args[0], args[4], args[9])
    return module._choose(args[0], args[1], call, args[5:9])


def _choose_fp8(step: Step, args: tuple[Any, ...]) -> backends.Choice:
    x, weight, _, _, residual, *options = args
    shape = _checks.conv_output_shape(step.kind, x, weight, *options[:4])
    if residual is not None and list(residual.shape) != shape:
        raise ValueError(
            f"{step.name} in e4m3 got a shortcut {tuple(residual.shape)}; its result's shape, "
            f"{tuple(shape)}, is needed: freeze the model without fp8 for such inputs"
        )
    module = importlib.import_module("resnet_fused.ops.conv_bn_act_fp8")
    return module.choose(x, weight, residual, options)


def _choose_stem(step: Step, args: tuple[Any, ...]) -> backends.Choice:
    module = importlib.import_module("resnet_fused.ops.stem")
    return module.choose(args[0], args[1], args[5], args[6], args[7:10], args[10])


def _choose_head(step: Step, args: tuple[Any, ...]) -> backends.Choice:
    return importlib.import_module("resnet_fused.ops.head").choose(args[0], args[1])


def _choose_chain(step: Step, args: tuple[Any, ...]) -> backends.Choice:
    return importlib.import_module(f"resnet_fused.ops.{step.kind}").choose(args)


class Kind(NamedTuple):
    """An op as a step.

    Attributes:
        arguments: a step and its values, as the arguments of the op's schema.
        choose: the implementation for them.
    """

    arguments: Callable[[Step, Values], tuple[Any, ...]]
    choose: Callable[[Step, tuple[Any, ...]], backends.Choice]


KINDS = {
    "conv_bn_act": Kind(_conv_bn_act, _choose_conv),
    "conv_bn_act_fp8": Kind(_conv_bn_act_fp8, _choose_fp8),
    "conv_chain": Kind(_conv_chain, _choose_chain),
    "conv_chain_fp8": Kind(_conv_chain_fp8, _choose_chain),
    "stem": Kind(_stem, _choose_stem),
    "head": Kind(_head, _choose_head),
}
_LAUNCHES: dict[str, Callable[..., bool | None]] = {
    "triton": _triton._launch,
    "cuda": _cuda._launch,
}
ORDERS: dict[str, Any] = {"triton": _triton, "cuda": _cuda}
"""Who says of an implementation which of its ops can be told when to begin, and from which end."""


class Kernel:
    """One step, its implementation chosen for the very tensors that it gets.

    Attributes:
        name: of the implementation.
        why: why this one, refusals of faster ones included.
        writes: whether it can write into memory that it is given.
        late: why it does not begin before the step ahead has ended; None where it does. By `into`
            alone, where the order of the kernels is known.
    """

    def __init__(self, step: Step, values: Values) -> None:
        self._step, self._kind = step, KINDS[step.kind]
        self._prepared: dict[str, Any] | None = None
        args = self._kind.arguments(step, values)
        choice = self._kind.choose(step, args)
        self.name = choice.implementation.name
        refused = "; ".join(f"not {name}: {reason}" for name, reason in choice.refused)
        ordered = self.name in ORDERS and step.kind in ORDERS[self.name].ORDERED
        self.late = _limits.not_dependent(values[0].device) if ordered else "another kernel"
        said = (choice.why, self._tuned(args), refused, *self._order(ordered))
        self.why = "; ".join(filter(None, said))
        self.writes = self.name in _LAUNCHES and step.kind in _results.FORMS
        self._run = overload(step.kind, self.name)

    def _tuned(self, args: tuple[Any, ...]) -> str | None:
        """That tuning chose its configuration, of an op that spans layers."""
        if self.name not in ORDERS:
            return None
        allowed = _admitted.names(self._step.kind, self.name, args[0].device)
        return _tuned_calls.why(self.name, self._step.kind, args, allowed)

    def _order(self, ordered: bool) -> list[str]:
        """What to say of when it begins, and where."""
        said = []
        if ordered and self.late is None:
            said.append("in the graph it begins before the step ahead has ended")
        elif ordered:
            said.append(f"it begins when the step ahead has ended: {self.late}")
        if self._step.options.get("reverse"):
            taken = ordered or self._step.kind not in _triton.REVERSED  # whose schema says so
            said.append("the batch backwards" if taken else f"the batch forwards: {self.name} must")
        return said

    def __call__(self, values: Values) -> Any:
        """The op, allocating its result."""
        return self._run(*self._kind.arguments(self._step, values))

    def alike(self, values: Values, wish: tuple[int, int]) -> Tensor:
        """The CUDA kernel of `conv_bn_act` in a configuration and splits, allocating its result.

        Args:
            values: of the step's inputs.
            wish: the configuration's index, and the splits.
        """
        form = _results.FORMS[self._step.kind]
        arguments = self._kind.arguments(self._step, values)
        operands = [arguments[place] for place in form.operands.values()]
        out = form.empty(*arguments)
        _LAUNCHES["cuda"](self._step.kind, *operands, out, *arguments[form.options :], wish=wish)
        return out

    def into(self, values: Values, results: Sequence[Tensor], follows: bool = False) -> bool:
        """The kernel, writing into given results.

        Args:
            values: of the step's inputs.
            results: of its outputs.
            follows: whether the kernel ahead in the stream is one that waits for its own.

        Returns:
            Whether what it launched last is such a one.
        """
        form = _results.FORMS[self._step.kind]
        arguments = self._kind.arguments(self._step, values)
        operands = [arguments[place] for place in form.operands.values()]
        options = arguments[form.options :]
        launch = functools.partial(_LAUNCHES[self.name], self._step.kind)
        how: dict[str, Any] = {}
        orders = ORDERS.get(self.name)
        if orders is not None and self._step.kind in orders.ORDERED:
            if self._prepared is None:
                self._prepared = orders.prepared(self._step.kind, *operands, *options)
            back = bool(self._step.options.get("reverse"))
            early = self.late is None
            how = orders.order(self._step.kind, early=early, follows=follows, reverse=back)
            how |= self._prepared
        copied = launch(*operands, *results, *options, **how)
        return self.late is None and not copied
