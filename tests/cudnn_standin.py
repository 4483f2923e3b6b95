"""A stand-in for nvidia-cudnn-frontend on the CPU: it computes graphs with PyTorch, in float32.

It takes the calls that the peer makes and no others; what a graph must not do here (an operand that
is not bound, a shape or stride that was not declared) raises as the frontend's own checks would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

DTYPES = {"HALF": torch.float16, "BFLOAT16": torch.bfloat16, "FLOAT": torch.float32}


class RefusedError(RuntimeError):
    pass


class Node:
    """A value of a graph: an input, or what a function makes of other nodes."""

    def __init__(self, make: Callable[[dict[Node, Tensor]], Tensor] | None, kind: str) -> None:
        self.make, self.kind = make, kind
        self.dtype: torch.dtype | None = None
        self.output = False
        self.dim: list[int] | None = None
        self.stride: list[int] | None = None

    def set_output(self, output: bool) -> Node:
        self.output = output
        return self

    def set_data_type(self, dtype: str) -> Node:
        self.dtype = DTYPES[dtype]
        return self

    def set_dim(self, dim: list[int]) -> Node:
        self.dim = dim
        return self

    def set_stride(self, stride: list[int]) -> Node:
        self.stride = stride
        return self

    def value(self, known: dict[Node, Tensor]) -> Tensor:
        if self not in known:
            assert self.make is not None, "an input is not bound"
            made = self.make(known)
            # A value that is stored in 16 bits on the way carries that rounding.
            known[self] = made.to(self.dtype).float() if self.dtype else made
        return known[self]


class Graph:
    """The part of `cudnn.pygraph` that the peer uses."""

    def __init__(self, refuse: Callable[[Graph], bool], handle: object, **kinds: str) -> None:
        assert set(kinds) == {"io_data_type", "intermediate_data_type", "compute_data_type"}
        assert set(kinds.values()) <= set(DTYPES)
        self.handle, self.refuse, self.kinds = handle, refuse, kinds
        self.nodes: list[Node] = []
        self.built: list[str] = []

    def _add(self, kind: str, make: Callable[..., Tensor], *inputs: Node) -> Node:
        node = Node(lambda known: make(*(one.value(known) for one in inputs)), kind)
        self.nodes.append(node)
        return node

    def tensor(self, *, name: str, dim: list[int], stride: list[int], data_type: str) -> Node:
        node = Node(None, f"input {name}").set_dim(dim).set_stride(stride).set_data_type(data_type)
        self.nodes.append(node)
        return node

    def conv_fprop(self, *, image: Node, weight: Node, **geometry: list[int]) -> Node:
        return self._add("conv", lambda x, w: torch.conv2d(x, w, **geometry), image, weight)

    def conv_dgrad(self, *, loss: Node, filter: Node, **geometry: list[int]) -> Node:
        def make(dy: Tensor, w: Tensor) -> Tensor:
            assert node.dim is not None, "the frontend cannot infer a gradient's shape"
            return torch.nn.grad.conv2d_input(node.dim, w, dy, **geometry)

        node = self._add("dgrad", make, loss, filter)
        return node

    def conv_wgrad(self, *, image: Node, loss: Node, **geometry: list[int]) -> Node:
        def make(x: Tensor, dy: Tensor) -> Tensor:
            assert node.dim is not None, "the frontend cannot infer a gradient's shape"
            return torch.nn.grad.conv2d_weight(x, node.dim, dy, **geometry)

        node = self._add("wgrad", make, image, loss)
        return node

    def scale(self, *, input: Node, scale: Node) -> Node:
        return self._add("scale", torch.mul, input, scale)

    def bias(self, *, input: Node, bias: Node) -> Node:
        return self._add("bias", torch.add, input, bias)

    def add(self, *, a: Node, b: Node) -> Node:
        return self._add("add", torch.add, a, b)

    def sub(self, *, a: Node, b: Node) -> Node:
        return self._add("sub", torch.sub, a, b)

    def mul(self, *, a: Node, b: Node) -> Node:
        return self._add("mul", torch.mul, a, b)

    def relu(self, *, input: Node) -> Node:
        return self._add("relu", torch.relu, input)

    def relu_backward(self, *, loss: Node, input: Node) -> Node:
        return self._add("drelu", lambda dy, x: torch.where(x > 0, dy, 0.0), loss, input)

    def reduction(self, *, input: Node, mode: str) -> Node:
        assert mode == "ADD"
        return self._add("sum", lambda t: t.sum((0, 2, 3), keepdim=True), input)

    def genstats(self, *, input: Node) -> tuple[Node, Node]:
        squares = self._add("sum", lambda t: t.square().sum((0, 2, 3), keepdim=True), input)
        return self.reduction(input=input, mode="ADD"), squares

    def validate(self) -> None:
        self.built.append("validate")

    def build_operation_graph(self) -> None:
        self.built.append("graph")

    def create_execution_plans(self, modes: Sequence[str]) -> None:
        assert modes == ["A", "FALLBACK"]
        if self.refuse(self):
            raise RefusedError("no engine proposed a plan\nfor a long reason")
        self.built.append("plans")

    def check_support(self) -> None:
        self.built.append("support")

    def build_plans(self) -> None:
        self.built.append("build")

    def get_workspace_size(self) -> int:
        return 0

    def get_plan_name_at_index(self, index: int) -> str:
        return f"eng{index}_" + "_".join(node.kind for node in self.nodes if node.make)

    def execute(self, pack: dict[Node, Tensor], workspace: Tensor, *, handle: object) -> None:
        assert self.built == ["validate", "graph", "plans", "support", "build"]
        assert handle is self.handle and workspace.numel()
        assert set(pack) == {n for n in self.nodes if n.make is None or n.output}
        for node, t in pack.items():
            assert t.dtype is node.dtype and list(t.shape) == node.dim
            # A dimension of one has no stride of its own.
            held = zip(t.shape, t.stride(), node.stride or (), strict=True)
            assert all(size == 1 or ours == theirs for size, ours, theirs in held), node.kind
        known = {node: t.float() for node, t in pack.items() if node.make is None}
        for node in self.nodes:
            if node.output:
                pack[node].copy_(node.value(known))


def frontend(refuse: Callable[[Graph], bool] = lambda graph: False) -> SimpleNamespace:
    """What stands for the module `cudnn`; `refuse` says which graphs no engine takes."""
    handles: list[object] = []

    def create_handle() -> object:
        handles.append(object())
        return handles[-1]

    return SimpleNamespace(
        data_type=SimpleNamespace(**{name: name for name in DTYPES}),
        heur_mode=SimpleNamespace(A="A", FALLBACK="FALLBACK"),
        reduction_mode=SimpleNamespace(ADD="ADD"),
        pygraph=lambda handle, **kinds: Graph(refuse, handle, **kinds),
        create_handle=create_handle, destroy_handle=lambda handle: handles.remove(handle),
        set_stream=lambda handle, stream: None, handles=handles,
    )  # fmt: skip
