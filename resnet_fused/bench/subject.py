"""What is benchmarked: one computation, as plain values from which any process builds the same.

The convolutions are those of the networks in `resnet_fused.models`, found by walking them with
`roofline.model_cost`; no list is typed. A convolution's name says all about it, so that a child
process needs no walk to build it again.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused import backends, models
from resnet_fused.bench import networks
from resnet_fused.bench.kernels import KINDS
from resnet_fused.bench.names import Case, case_of, conv_name, name_of
from resnet_fused.bench.names import bn_case as bn_case
from resnet_fused.bench.names import bn_name as bn_name
from resnet_fused.bench.names import conv_case as conv_case
from resnet_fused.cases import ChainCase, ConvCase
from resnet_fused.convert import unfuse
from resnet_fused.roofline import LayerCost, ModelCost, conv_cost, model_cost

LEVELS = ("kernel", "block", "model")
KERNEL_OPS = tuple(KINDS)
BLOCK_OPS = ("inference", "training", "training_frozen")
"""`training` is a step with batch statistics, `training_frozen` one with fixed BatchNorm."""
MODEL_OPS = (*BLOCK_OPS, "train")
"""`train` is the whole step that users take: weights in float32, autocast, fused SGD."""
OPS = {"kernel": KERNEL_OPS, "block": BLOCK_OPS, "model": MODEL_OPS}
DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("cpu", "cuda")
NETWORKS = tuple(name for name in models.list_models() if re.fullmatch(r"resnet\d+", name))
STEM = "stem"
WEIGHED_AT = 32  # images, when layers are put in order; at 1 the weights' traffic would decide
USUAL = 200.0, 1.0  # a machine with a ridge of 200 FLOPs a byte, of which seconds are in proportion


@dataclass(frozen=True)
class Subject:
    """One computation to time.

    Attributes:
        level: "kernel" (one op), "block" (a residual block or the stem) or "model".
        op: of `OPS[level]`.
        name: a kernel's shape ("3x3_64_64_at56"), a block's ("resnet50.layer1.0") or a model's; in
            inference also that of a foreign network ("timm:resnet50", "mobilenet_v2").
        batch: images.
        dtype: of all tensors but a kernel's scale and shift, which are float32; of op `train` that
            of autocast.
        device: "cpu" or "cuda".
        size: side of the network's images in pixels; a kernel's name holds its own sizes.
        seed: of weights and data.
    """

    level: str
    op: str
    name: str
    batch: int
    dtype: str
    device: str
    size: int = 224
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses what nothing can be built from, naming the field."""
        for field, value, accepted in (
            ("level", self.level, LEVELS),
            ("op", self.op, OPS.get(self.level, ())),
            ("dtype", self.dtype, DTYPES),
            ("device", self.device, DEVICES),
        ):
            if value not in accepted:
                raise ValueError(f"{field} is {value!r}; accepted are {', '.join(accepted)}")
        for field, number in (("batch", self.batch), ("size", self.size)):
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"{field} is {number!r}; accepted is an integer of at least 1")
        if not self.name:
            raise ValueError("name is empty; accepted is a case, a block or a model")

    @property
    def key(self) -> str:
        """Unique in a record: "kernel/conv_bn_act/3x3_64_64_at56/b256/bfloat16"."""
        sized = f"/{self.size}px" if self.level != "kernel" and self.size != 224 else ""
        return f"{self.level}/{self.op}/{self.name}/b{self.batch}/{self.dtype}{sized}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        return getattr(torch, self.dtype)

    @property
    def optimizes(self) -> bool:
        """Whether a call takes the optimizer's step too."""
        return self.op == "train"

    @property
    def storage_dtype(self) -> torch.dtype:
        """The dtype of weights and inputs: where a whole step is taken autocast casts float32."""
        return torch.float32 if self.optimizes else self.torch_dtype

    @property
    def foreign(self) -> bool:
        """Whether it is a network of others, of which only inference as a whole is known."""
        return self.level == "model" and not networks.is_own(self.name)

    @property
    def training(self) -> bool:
        """Whether a call is a training step: autograd records it."""
        return self.op in MODEL_OPS[1:]

    @property
    def case(self) -> Case | None:
        """The case of a kernel; None for blocks and models."""
        if self.level != "kernel":
            return None
        return case_of(KINDS[self.op].form, self.name, self.batch)

    @property
    def call(self) -> backends.Call:
        """What a kernel's implementations are asked to serve."""
        case: Any = self.case
        return backends.Call(
            self.op, self.device, self.torch_dtype, act=getattr(case, "act", "relu"),
            # A chain has a shortcut, whichever.
            residual=getattr(case, "residual", isinstance(case, ChainCase)),
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> Subject:
        """What `to_dict` wrote.

        Raises:
            ValueError: for fields that are missing, unknown, or hold what is not accepted.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(d) - names):
            raise ValueError(f"subject has unknown fields {unknown}; accepted are {sorted(names)}")
        try:
            return cls(**d)
        except TypeError as error:
            raise ValueError(f"subject lacks a field: {error}") from error


@dataclass(frozen=True)
class Layer:
    """A convolution of a network.

    Attributes:
        name: the module's, "layer1.0.conv1".
        case: what it and the BatchNorm, add and ReLU behind it compute, at batch 1.
        first: whether it reads the images, whose gradient nobody needs.
        behind: what runs between it and the next convolution.
    """

    name: str
    case: ConvCase
    first: bool
    behind: tuple[LayerCost, ...] = ()


def plain_network(name: str) -> nn.Module:
    """A network as plain PyTorch modules, with the global random state.

    Raises:
        ValueError: unknown network.
    """
    own = networks.is_own(name)
    return unfuse(networks.build(f"rf:{networks.canonical(name)}" if own else name))


@functools.lru_cache(maxsize=32)
def layers(model: str, size: int = 224) -> tuple[Layer, ...]:
    """The convolutions of a network in order of execution.

    Raises:
        ValueError: unknown network.
    """
    with torch.device("meta"):
        network = plain_network(model)
    return tuple(walk(network, (1, 3, size, size)))


def walk(module: nn.Module, shape: Sequence[int]) -> list[Layer]:
    """The convolutions of a module in order of execution, with what follows each of them.

    Args:
        module: plain modules.
        shape: of its input, [N, C, H, W]; the cases have this N.
    """
    inputs: dict[str, tuple[int, ...]] = {}
    handles = [
        child.register_forward_pre_hook(_noting(inputs, name))
        for name, child in module.named_modules()
        if isinstance(child, nn.Conv2d)
    ]
    try:
        cost = model_cost(module, shape)
    finally:
        for handle in handles:
            handle.remove()
    return _layers_of(module, cost, inputs)


def _noting(into: dict[str, tuple[int, ...]], name: str) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        into[name] = tuple(args[0].shape)

    return hook


def _layers_of(
    module: nn.Module, cost: ModelCost, inputs: dict[str, tuple[int, ...]]
) -> list[Layer]:
    found: list[Layer] = []
    rows = [*cost.layers, None, None]
    for index, row in enumerate(cost.layers):
        if row.kind != "conv":
            continue
        conv: Any = module.get_submodule(row.name)
        after = rows[index + 2]  # behind the BatchNorm
        # The convolution that ends a block reads the shortcut when fused, and nothing else does.
        residual = row.fused.bytes > row.eager.bytes
        act = "relu" if residual or (after is not None and after.kind == "relu") else "none"
        n, c, h, w = inputs[row.name]
        r, s = conv.kernel_size
        case = ConvCase(
            row.name, n, c, h, w, row.shape[1], r, s, conv.stride, conv.padding, conv.dilation,
            conv.groups, residual, act,
        )  # fmt: skip
        case = dataclasses.replace(case, name=conv_name(case))
        behind = itertools.takewhile(lambda later: later.kind != "conv", cost.layers[index + 1 :])
        first = not found and c == cost.input_shape[1]
        found.append(Layer(row.name, case, first, tuple(behind)))
    return found


def subjects(
    level: str,
    device: str,
    *,
    model: str = "resnet50",
    batches: Sequence[int],
    dtypes: Sequence[str] = ("float32",),
    ops: Sequence[str] = (),
    only: str = "",
    size: int = 224,
    seed: int = 0,
) -> list[Subject]:
    """What to time at a level, the most telling first.

    Kernels are the distinct convolutions of ResNet-18 to ResNet-152 and of `model`: first those of
    `model`, by their share of its memory traffic and arithmetic. Blocks are the distinct ones of
    `model` and its stem, by the same share.

    Args:
        level: of `LEVELS`.
        device: "cpu" or "cuda".
        model: a network of `resnet_fused.models`; for a model's inference any that
            `networks.build` makes.
        batches: numbers of images.
        dtypes: of `DTYPES`.
        ops: of `OPS[level]`; none takes the first one.
        only: keeps the subjects whose key holds this text.
        size: side of the images in pixels.
        seed: of weights and data.

    Raises:
        ValueError: for anything else; the message names the argument.
    """
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}; accepted are {', '.join(LEVELS)}")
    known = models.ARCHITECTURES
    if model not in known and (level, *ops) not in (("model",), ("model", "inference")):
        raise ValueError(
            f"model is {model!r}; accepted are {', '.join(known)}, and other networks for the "
            "inference of level model alone"
        )
    for argument, values in (("batches", batches), ("dtypes", dtypes)):
        if not values:
            raise ValueError(f"{argument} is empty; accepted is at least one")
    wanted = tuple(ops) or OPS[level][:1]
    for op in wanted:
        if op not in OPS[level]:
            raise ValueError(f"ops holds {op!r}; accepted at level {level} are {OPS[level]}")
    made = [
        Subject(level, op, name, batch, dtype, device, size, seed)
        for op, name in _names(level, model, wanted, size)
        for dtype in dtypes
        for batch in batches
    ]
    return [subject for subject in made if only in subject.key]


def _names(level: str, model: str, ops: Sequence[str], size: int) -> list[tuple[str, str]]:
    """(op, name) of all subjects of a level, the most telling first."""
    if level == "model":
        return [(op, model) for op in ops]
    if level == "block":
        return [(op, name) for name in block_names(model, size) for op in ops]
    ranked: list[tuple[int, int, float, str, str]] = []
    for order, op in enumerate(ops):
        weights: dict[str, tuple[int, float]] = {}
        for other, network in enumerate(dict.fromkeys([model, *NETWORKS])):
            for name, share in kernel_names(op, network, size).items():
                weights.setdefault(name, (min(other, 1), share))
        by_share = sorted(weights.items(), key=lambda item: (item[1][0], -item[1][1]))
        for rank, (name, (other, _)) in enumerate(by_share):
            ranked.append((other, rank, order, op, name))
    # The heaviest of each op comes before the second of any.
    return [(op, name) for *_, op, name in sorted(ranked, key=lambda item: item[:3])]


def kernel_names(op: str, model: str, size: int = 224) -> dict[str, float]:
    """The distinct calls of an op in a network, with their share of its traffic and arithmetic.

    The share orders the list and is nowhere reported.
    """
    kind, found = KINDS[op], dict[str, float]()
    for _, case in kind.cases(layers(model, size)):
        cost = kind.cost(dataclasses.replace(case, n=WEIGHED_AT), torch.bfloat16)
        name = name_of(case)
        found[name] = found.get(name, 0.0) + cost.seconds(*USUAL)
    return found


def _work(case: ConvCase) -> float:
    return conv_cost(dataclasses.replace(case, n=WEIGHED_AT), torch.bfloat16).seconds(*USUAL)


def block_names(model: str, size: int = 224) -> list[str]:
    """The distinct blocks of a network and its stem, the heaviest first: "resnet50.layer1.0".

    Two blocks are the same when their convolutions are; of those the first one is named.
    """
    groups: dict[str, list[ConvCase]] = {}
    for layer in layers(model, size):
        stage, _, rest = layer.name.partition(".")
        name = f"{stage}.{rest.partition('.')[0]}" if rest else STEM
        groups.setdefault(name, []).append(layer.case)
    kinds: dict[tuple[ConvCase, ...], str] = {}
    weights: dict[str, float] = {}
    for name, cases in groups.items():
        first = kinds.setdefault(tuple(cases), name)
        weights[first] = weights.get(first, 0.0) + sum(map(_work, cases))
    return [f"{model}.{name}" for name in sorted(weights, key=lambda name: -weights[name])]


def block_input(model: str, block: str, size: int = 224) -> tuple[int, int, int]:
    """[C, H, W] of what a block of a network reads.

    Raises:
        ValueError: unknown block.
    """
    if block == STEM:
        return 3, size, size
    for layer in layers(model, size):
        if layer.name.startswith(f"{block}.") and re.fullmatch(r"layer\d+\.\d+", block):
            return layer.case.c, layer.case.h, layer.case.w
    raise ValueError(f"name is {model}.{block}; accepted are {', '.join(block_names(model, size))}")
