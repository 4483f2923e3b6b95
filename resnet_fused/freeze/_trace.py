"""A model's graph, by torch.fx.

Tracing by fx takes milliseconds, keeps the modules and their names, and holds for every batch and
image size. torch.export takes seconds for a deep network, dissolves BatchNorm into ATen ops of one
example's sizes, and would give the names back only by its metadata; what it could take beyond fx,
control flow that depends on sizes, no ResNet has. What fx cannot follow runs as the modules do.

In-place changes (`out += identity`, `ReLU(inplace=True)`) become new values: later readers of the
changed one read the result. Where that could be wrong, because something may be a view, the model
is not taken.
"""

from __future__ import annotations

import inspect
import operator
import threading
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..nn._modules import has_hooks, is_norm
from . import _calls
from ._ir import Const, Graph, Ref, Step, refs

_LOCK = threading.Lock()  # fx patches nn.Module while it traces: one at a time
# Kinds whose result is new memory, whatever they read; "made" stands for calls of `_MAKE`.
_FRESH = frozenset({"add", "avg_pool", "bn", "conv", "linear", "made", "max_pool", "relu"})
_MAKE = frozenset(
    {
        F.avg_pool2d, F.batch_norm, F.gelu, F.group_norm, F.hardsigmoid, F.hardswish, F.layer_norm,
        F.leaky_relu, F.linear, F.relu6, F.silu, F.softmax, operator.mul, operator.sub,
        operator.truediv, torch.cat, torch.conv2d, torch.mul, torch.sigmoid, torch.sub, torch.tanh,
    }
)  # fmt: skip
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
# Modules that are one function of their input and of attributes: a file can hold those.
_POOL = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
_FUNCTIONS: dict[type[nn.Module], tuple[Any, tuple[str, ...]]] = {
    nn.AvgPool2d: (F.avg_pool2d, _POOL),
    nn.GELU: (F.gelu, ("approximate",)),
    nn.Hardsigmoid: (F.hardsigmoid, ()),
    nn.Hardswish: (F.hardswish, ()),
    nn.LeakyReLU: (F.leaky_relu, ("negative_slope",)),
    nn.ReLU6: (F.relu6, ()),
    nn.SiLU: (F.silu, ()),
    nn.Sigmoid: (torch.sigmoid, ()),
    nn.Tanh: (torch.tanh, ()),
}
_ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")
_RELUS = (torch.relu, torch.relu_, F.relu, F.relu_, "relu", "relu_")
_FLATTENS = (torch.flatten, "flatten")
_IN_PLACE = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


class NotTakenError(Exception):
    """The model has no graph that is known to be right; says why."""


class _Tracer(fx.Tracer):
    """Goes through containers and blocks; what torch.nn offers, and what has hooks, stays whole.

    Args:
        count: how many positional arguments are values; the others keep their defaults.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self._inputs, self._thread = count, threading.get_ident()

    # fx puts these in the place of nn.Module's own: other threads' calls go through them as well.

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Records a module's call, or makes it, in another thread."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A module's attribute, as a value of the graph in this thread alone."""
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """The function to trace, and its arguments."""
        values = [
            self.create_proxy("placeholder", f"input{place}", (), {})
            for place in range(self._inputs)
        ]
        return root_fn, [self.root, *values]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if is_norm(m) or has_hooks(m):
            return True
        kind = type(m)
        return kind.__module__.startswith("torch.nn") and not issubclass(kind, nn.Sequential)


def trace(model: nn.Module, count: int) -> Graph:
    """The graph of a plain model in evaluation mode, called with `count` positional arguments.

    Its steps still hold the model's own modules: nothing is frozen yet.

    Raises:
        NotTakenError: fx can't follow it, or what it does is not known to be right as a graph.
    """
    if has_hooks(model):
        raise NotTakenError("a hook sits on the model itself")
    try:
        with _LOCK:
            graph = _Tracer(count).trace(model)
    except Exception as error:  # whatever a model's code does when it meets a proxy
        first = str(error).partition("\n")[0]
        raise NotTakenError(f"torch.fx cannot trace it: {type(error).__name__}: {first}") from error
    return _Reader(model, graph).graph()


class _Reader:
    """Turns fx's nodes into steps."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self._root, self._nodes = root, graph.nodes
        self._values: dict[fx.Node, Any] = {}  # a Ref, or a constant tensor
        self._kinds: dict[int, str] = {}  # value -> kind of the step that makes it
        self._read_by: dict[int, list[str]] = {}
        self._steps: list[Step] = []
        self._inputs: list[int] = []
        self._count = 0

    def graph(self) -> Graph:
        output = None
        for node in self._nodes:
            if node.op == "placeholder":
                value = self._new("input")
                self._inputs.append(value)
                self._values[node] = Ref(value)
            elif node.op == "get_attr":
                self._values[node] = self._attribute(str(node.target))
            elif node.op == "call_module":
                self._module(node)
            elif node.op in ("call_function", "call_method"):
                self._function(node)
            else:
                output = self._arguments(node.args[0], {})
        return Graph(tuple(self._steps), tuple(self._inputs), output)

    def _attribute(self, path: str) -> Any:
        found: Any = self._root
        for part in path.split("."):
            found = getattr(found, part)
        return found.detach().clone() if isinstance(found, Tensor) else found

    def _new(self, kind: str) -> int:
        self._kinds[self._count] = kind
        self._count += 1
        return self._count - 1

    def _arguments(self, args: Any, tensors: dict[str, Tensor]) -> Any:
        """Fx's arguments with values for nodes; constant tensors go into `tensors`."""

        def put(node: fx.Node) -> Any:
            value = self._values[node]
            if isinstance(value, Tensor):
                name = f"constant{len(tensors)}"
                tensors[name] = value
                return Const(name)
            return value

        mapped = fx.node.map_arg(args, put)
        return _plain(mapped)

    def _add(self, node: fx.Node, kind: str, inputs: Any, **more: Any) -> None:
        values = tuple(ref.value for ref in inputs)
        nature = "made" if more.get("target") in _MAKE else kind
        result = self._new(nature)
        for value in values:
            self._read_by.setdefault(value, []).append(nature)
        name = more.pop("name", "")
        self._steps.append(Step(kind, name, values, (result,), **more))
        self._values[node] = Ref(result)

    def _changes(self, node: fx.Node, changed: Any) -> None:
        """`node` writes into its operand `changed`: who reads that later reads the result."""
        value = self._values.get(changed)
        if not isinstance(value, Ref):
            raise NotTakenError(f"{node.name} writes into a constant")
        earlier = self._read_by[value.value][:-1]  # the last is this one
        if self._kinds[value.value] not in (*_FRESH, "input") or not _FRESH.issuperset(earlier):
            raise NotTakenError(f"{node.name} writes into what may share memory with another value")
        result = self._values[node]
        for other, held in list(self._values.items()):
            if isinstance(held, Ref) and held == value:
                self._values[other] = result

    def _module(self, node: fx.Node) -> None:
        module = self._root.get_submodule(str(node.target))
        args = self._arguments(node.args, {})
        if len(args) != 1 or not isinstance(args[0], Ref) or node.kwargs:
            return self._call_module(node, module)
        name = str(node.target)
        kind = type(module)
        if has_hooks(module):
            return self._call_module(node, module)
        if kind in _NOTHING and not module.training:
            self._values[node] = args[0]
            return None
        if kind is nn.Conv2d and _plain_conv(module):
            return self._add(node, "conv", args, name=name, module=module, options=_conv(module))
        if is_norm(module):
            options = {"eps": module.eps}
            return self._add(node, "bn", args, name=name, module=module, options=options)
        if kind is nn.ReLU:
            self._add(node, "relu", args, name=name)
            return self._changes(node, node.args[0]) if module.inplace else None
        if kind is nn.MaxPool2d and not module.return_indices:
            return self._add(node, "max_pool", args, name=name, options=_pool(module))
        if kind is nn.AdaptiveAvgPool2d:
            options = {"size": module.output_size}
            return self._add(node, "avg_pool", args, name=name, options=options)
        if kind is nn.Flatten:
            options = {"start": module.start_dim, "end": module.end_dim}
            return self._add(node, "flatten", args, name=name, options=options)
        if kind is nn.Linear:
            return self._add(node, "linear", args, name=name, module=module)
        if kind in _FUNCTIONS:
            found, names = _FUNCTIONS[kind]
            options = {"args": args, "kwargs": {name: getattr(module, name) for name in names}}
            why = f"{found.__name__} is PyTorch's own"
            self._add(node, "call", args, name=name, options=options, why=why, target=found)
            return self._changes(node, node.args[0]) if _inplace(module) else None
        return self._call_module(node, module)

    def _call_module(self, node: fx.Node, module: nn.Module) -> None:
        tensors: dict[str, Tensor] = {}
        args = self._arguments(node.args, tensors)
        if tensors or node.kwargs or not all(isinstance(arg, Ref) for arg in args):
            raise NotTakenError(f"{node.target} is called with more than values")
        name = str(node.target)
        why = f"a {type(module).__name__} is called as it is"
        if has_hooks(module):
            why = "a hook or a forward of its own sits on it"
        changes = _inplace(module)
        known = type(module).__module__.startswith("torch.nn") and not has_hooks(module)
        options = {"guard": changes or not known}
        self._add(node, "module", args, name=name, module=module, why=why, options=options)
        if changes:
            self._changes(node, node.args[0])

    def _function(self, node: fx.Node) -> None:
        target: Any = node.target
        tensors: dict[str, Tensor] = {}
        args = self._arguments(node.args, tensors)
        kwargs = self._arguments(node.kwargs, tensors)
        args, kwargs, changes = _without_inplace(target, args, kwargs)
        changes = changes or _writes(target)
        if "out" in kwargs or target is operator.setitem:
            raise NotTakenError(f"{node.name} writes into a tensor that it is given")
        both = len(args) == 2 and all(isinstance(arg, Ref) for arg in args)
        one = len(args) == 1 and isinstance(args[0], Ref)
        if target in _ADDS and both and not kwargs:
            self._add(node, "add", args, name=node.name)
        elif target in _RELUS and one and not kwargs:
            self._add(node, "relu", args, name=node.name)
        elif target in _FLATTENS and isinstance(args[0], Ref) and len(args) <= 3 and not kwargs:
            ends = dict(zip(("start", "end"), args[1:], strict=False))
            if not all(isinstance(end, int) for end in ends.values()):
                raise NotTakenError(f"{node.name} flattens by a size that is computed")
            options = {"start": 0, "end": -1, **ends}
            self._add(node, "flatten", args[:1], name=node.name, options=options)
        else:
            found = _pure(node, target) if changes else target
            found = _calls.attribute if found is getattr else found
            options = {"args": args, "kwargs": kwargs}
            why = f"{getattr(found, '__name__', found)} is PyTorch's own"
            inputs = tuple(dict.fromkeys(refs([args, kwargs])))
            self._add(
                node, "call", inputs, name=node.name, options=options, why=why, target=found,
                tensors=tensors,
            )  # fmt: skip
        if changes:
            self._changes(node, node.args[0])


def _plain(structure: Any) -> Any:
    """Fx's immutable lists and dicts as ordinary ones."""
    if isinstance(structure, dict):
        return {name: _plain(part) for name, part in structure.items()}
    if isinstance(structure, slice):
        return slice(*(_plain(p) for p in (structure.start, structure.stop, structure.step)))
    if isinstance(structure, Ref | Const):
        return structure
    if isinstance(structure, list):
        return [_plain(part) for part in structure]
    if isinstance(structure, tuple) and not hasattr(structure, "_fields"):
        return tuple(_plain(part) for part in structure)
    return structure


def _without_inplace(target: Any, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any], bool]:
    """The arguments without `inplace`, however it was given, and whether it was true."""
    if getattr(target, "__module__", None) != F.__name__:
        return args, kwargs, bool(kwargs.pop("inplace", False))
    bound = inspect.signature(target).bind(*args, **kwargs)
    given = bound.arguments.pop("inplace", False)
    given = bound.arguments.get("kwargs", {}).pop("inplace", given)
    return bound.args, bound.kwargs, bool(given)


def _writes(target: Any) -> bool:
    if isinstance(target, str):
        return target.endswith("_") and not target.endswith("__")
    name = getattr(target, "__name__", "")
    return target in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def _pure(node: fx.Node, target: Any) -> Any:
    """The function that gives what an in-place one leaves behind."""
    if isinstance(target, str):
        if hasattr(Tensor, target.rstrip("_")):
            return target.rstrip("_")
        raise NotTakenError(f"{node.name}: Tensor.{target} has no form that leaves its operand")
    if target in _IN_PLACE:
        return _IN_PLACE[target]
    home = F if target.__module__ == F.__name__ else torch
    found = getattr(home, target.__name__.rstrip("_"), None)
    if found is None:
        raise NotTakenError(f"{node.name}: {target.__name__} has no form that leaves its operand")
    return found


def _inplace(module: nn.Module) -> bool:
    return bool(getattr(module, "inplace", False))


def _plain_conv(conv: nn.Conv2d) -> bool:
    return conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def _conv(conv: nn.Conv2d) -> dict[str, Any]:
    return {
        "stride": list(conv.stride),
        "padding": list(conv.padding),
        "dilation": list(conv.dilation),
        "groups": conv.groups,
    }


def _pool(pool: nn.MaxPool2d) -> dict[str, Any]:
    names = {"kernel": "kernel_size", "stride": "stride", "padding": "padding"}
    return {
        **{key: getattr(pool, name) for key, name in names.items()},
        "dilation": pool.dilation,
        "ceil_mode": pool.ceil_mode,
    }
