"""Residual blocks that run fused: a mixin over any block class, described by a table of its names.

The mixin adds no state: a plain block becomes a fused one, and back, by its class alone, so the
children, their names and the state_dict are the same (`convert.py` does it for whole models).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, fx, nn

from .. import backends
from ..ops import onednn
from . import _traced, _training_block, _training_route
from ._modules import has_global_hooks, has_hooks, is_norm, pattern_of
from ._route import Chain, conv_bn, nothing_special, ready

Prepared = tuple[Sequence[onednn.Folded | None], onednn.Folded | None]


class Step(NamedTuple):
    """Names of the children that make one convolution layer of a block."""

    conv: str
    bn: str
    act: str


def as_leaf(module: nn.Module, x: fx.Proxy) -> Any:
    """Enters the module as one node into the graph that `torch.fx` is tracing."""
    tracer: Any = x.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (x,), {})


def passes(module: nn.Module | None) -> bool:
    """Whether a module between the layers of a block does nothing (in this mode)."""
    if module is None or type(module) is nn.Identity:
        return True
    return not module.training and type(module).__name__ in ("DropPath", "DropBlock2d")


class Fused:
    """What every fused class shares: the class that it stands for."""

    plain_class: ClassVar[type[nn.Module]]


class FusedBlock(Fused):
    """Mixin: the forward of a residual block ([He15], section 3.2 and figure 5) by fused layers.

    A subclass names the plain block class as its next base. The last step's activation follows the
    shortcut add. The block falls back to the plain forward where a child that the table does not
    know does something.
    """

    steps: tuple[Step, ...]
    extras: ClassVar[tuple[str, ...]] = ()
    residual: bool = True
    """Whether the shortcut is added; without it the block is one of a plain network."""

    @classmethod
    def steps_of(cls, module: nn.Module) -> tuple[Step, ...]:
        """The layers of a block that is, or may become, of this class."""
        return cls.steps

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, fx.Proxy):
            return as_leaf(self, x)
        if torch.compiler.is_compiling():
            bare = all(passes(self._modules.get(name)) for name in self.extras)
            return self._traced(x) if bare and _traced.serves(x) else super().forward(x)
        for name in self.extras:
            if not passes(self._modules.get(name)):
                return self._unfused(x, f"the block's {name} does more than nothing")
        return self.run(x)[0]

    def may_run(self) -> bool:
        """Whether calling the block is `run` and nothing more: no hooks, no live extras."""
        return (
            not has_hooks(self)
            and not has_global_hooks()
            and all(passes(self._modules.get(name)) for name in self.extras)
        )

    def prepared(self, dtype: torch.dtype) -> Prepared:
        """What is ready of each step, and of the projection: one tight pass over the modules."""
        steps = [ready(*self._children(step), dtype) for step in self.steps]
        downsample = self._modules.get("downsample")
        pair = None if downsample is None else projection_of(downsample)
        return steps, None if pair is None else ready(*pair, None, dtype)

    def run(
        self,
        x: Tensor,
        bound: float | None = None,
        prepared: Prepared | None = None,
        give: bool = False,
        row: _training_block.Row | None = None,
    ) -> tuple[Tensor, float | None]:
        """The block on an input [N, C, H, W].

        Args:
            x: the input.
            bound: a bound on its magnitude, if one is known.
            prepared: what `prepared` has returned a moment ago for a plain call on plain data.
            give: nobody else can see `x`: an identity shortcut may become the output's memory.
            row: the blocks in a row that this one trains in, if it does.

        Returns:
            The output, and a bound on its magnitude if one follows.
        """
        if prepared is None and any(_is_live(self._modules[step.bn]) for step in self.steps):
            y, reason = self._train(x, row)
            if y is not None:
                return y, None
            if isinstance(reason, _training_route.TooSmall):
                return self._unfused(x, reason), None
        chain = Chain(x, bound, None if prepared is None else True)
        if prepared is None:
            prepared = self.prepared(x.dtype) if chain.quick else ([None] * len(self.steps), None)
        folded, projected = prepared
        shortcut, given = self._shortcut(x, chain, projected)
        given = given or (give and shortcut is x)
        y = x
        for step, weights in zip(self.steps[:-1], folded, strict=False):
            y = conv_bn(y, *self._children(step), chain=chain, inner=True, folded=weights)
        last = self._children(self.steps[-1])
        y = conv_bn(y, *last, shortcut, chain=chain, give_residual=given, folded=folded[-1])
        return y, chain.bound

    def _train(self, x: Tensor, row: _training_block.Row | None) -> tuple[Tensor | None, str]:
        """The block as one autograd node, or None and why not."""
        block = self.parts()
        reason = _training_route.too_small(x, block.steps)
        if reason is not None:
            return None, reason
        return _training_block.run_block(x, block, row)

    def parts(self) -> _training_block.Block:
        """What a training node is made of."""
        steps = [self._children(step) for step in self.steps]
        downsample = self._modules.get("downsample")
        projection = None if downsample is None else projection_of(downsample)
        return _training_block.Block(steps, downsample, projection, self.residual)

    def _shortcut(
        self, x: Tensor, chain: Chain, folded: onednn.Folded | None
    ) -> tuple[Tensor | None, bool]:
        """The shortcut, and whether nobody else can see it."""
        if not self.residual:
            return None, False
        downsample = self._modules.get("downsample")
        if downsample is None:
            return x, False
        pair = projection_of(downsample)
        if pair is None:
            return downsample(x), False
        shortcut = conv_bn(x, *pair, chain=chain, inner=True, folded=folded)
        chain.residual_bound, chain.bound = chain.bound, chain.x_bound
        return shortcut, True

    def _traced(self, x: Tensor) -> Tensor:
        """The block in a program that torch.compile traces, by ops that it can see into."""
        downsample = self._modules.get("downsample")
        shortcut: Tensor | None = x if self.residual else None
        if downsample is not None:
            pair = projection_of(downsample)
            shortcut = downsample(x) if pair is None else _traced.conv_bn(x, *pair, None, None)
        y = x
        for step in self.steps[:-1]:
            y = _traced.conv_bn(y, *self._children(step), None)
        return _traced.conv_bn(y, *self._children(self.steps[-1]), shortcut)

    def _children(self, step: Step) -> tuple[nn.Module, nn.Module, nn.Module]:
        modules = self._modules
        return modules[step.conv], modules[step.bn], modules[step.act]

    def _unfused(self, x: Tensor, reason: str) -> Tensor:
        y = super().forward(x)
        if backends.is_recording():
            for index, step in enumerate(self.steps):
                conv, bn, act = self._children(step)
                added = self.residual and index == len(self.steps) - 1
                pattern = pattern_of(act, added)
                backends.record(backends.Route(conv, bn, act, pattern, "-", "modules", reason))
        return y


def _is_live(bn: nn.Module) -> bool:
    return is_norm(bn) and _training_route.is_live(bn)


def projection_of(downsample: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """The convolution and BatchNorm of a projection shortcut (option B), or None.

    Only a Sequential of exactly the two, without hooks, is looked through.
    """
    if not isinstance(downsample, nn.Sequential) or len(downsample) != 2 or has_hooks(downsample):
        return None
    if type(downsample) not in (nn.Sequential, Sequential):
        return None
    conv, bn = downsample
    if type(conv) is nn.Conv2d and is_norm(bn) and not has_hooks(conv) and not has_hooks(bn):
        return conv, bn
    return None


def run_in_order(
    modules: Iterable[tuple[str, nn.Module]],
    x: Any,
    needed: frozenset[str] = frozenset(),
    *,
    private: bool = False,
    row: _training_block.Row | None = None,
    behind: Iterable[tuple[str, nn.Module]] = (),
) -> Iterator[tuple[str, Any]]:
    """Runs modules one after the other, each conv-BN(-ReLU) in a row as one layer.

    Args:
        modules: (name, module) in order.
        x: the first one's input.
        needed: names whose own outputs are wanted, so that nothing is fused past them.
        private: the caller keeps the last output alone, so that a block may overwrite the one
            before it, and in training make the next one's first convolution with its own end.
        row: of blocks that the modules' own go on with, where there are some before them.
        behind: modules that the caller runs next, on the last output and with the same row.

    Yields:
        (name of the last module of a layer, its output).
    """
    items = list(modules)
    index = 0
    bound = None  # on the magnitude of x, carried from block to block
    ours = False  # whether x was made here, by layers that nobody watches
    row = row or _training_block.Row()
    ready_blocks: dict[int, Prepared] = {}
    if isinstance(x, Tensor) and nothing_special(x):
        # All blocks at once: their modules are looked at while this code is in the cache.
        ready_blocks = {
            position: module.prepared(x.dtype)
            for position, (_, module) in enumerate(items)
            if isinstance(module, FusedBlock) and module.may_run()
        }
    while index < len(items):
        name, module = items[index]
        layer = [module]
        pool = None
        if type(module) is nn.Conv2d and name not in needed:
            following = items[index + 1 : index + 3]
            if following and is_norm(following[0][1]):
                layer.append(following[0][1])
                act_next = len(following) == 2 and type(following[1][1]) is nn.ReLU
                if act_next and following[0][0] not in needed:
                    layer.append(following[1][1])
                    pool = _pool_of(items, index + 3, x, needed)
        if pool is not None:
            layer.append(pool)
            x, bound, ours = stem(x, *layer), None, False
        elif len(layer) > 1:
            x, bound, ours = conv_bn(x, *layer), None, False
        elif index in ready_blocks:
            folded, _ = ready_blocks[index]
            # A hook on one of its own layers could keep x as well as what comes out.
            unwatched = all(weights is not None for weights in folded)
            x, bound = module.run(x, bound, ready_blocks[index], private and ours and unwatched)
            ours = unwatched
        elif private and isinstance(x, Tensor) and _runs_bare(module):
            following = items[index + 1 : index + 2] or list(behind)[:1]
            row.following = functools.partial(_parts_of, following)
            x, bound, ours = module.run(x, row=row)[0], None, False
        else:
            x, bound, ours = module(x), None, False
        index += len(layer)
        yield items[index - 1][0], x


def _runs_bare(module: nn.Module) -> bool:
    return isinstance(module, FusedBlock) and module.may_run()


def _parts_of(items: Sequence[tuple[str, nn.Module]]) -> _training_block.Block | None:
    """The parts of the first of some modules, if it is a block of which calling it is `run`."""
    return next((module.parts() for _, module in items if _runs_bare(module)), None)


def _pool_of(
    items: list[tuple[str, nn.Module]], index: int, x: Any, needed: frozenset[str]
) -> nn.Module | None:
    """The pooling at `index`, where it may be part of the layer in front of it."""
    if index >= len(items) or items[index - 1][0] in needed:
        return None
    pool = items[index][1]
    return pool if trains_with(items[index - 2][1], pool, x) else None


def trains_with(bn: nn.Module, pool: nn.Module, x: Any) -> bool:
    """Whether a stem's pooling may be part of its layer: in training, where it saves memory."""
    return (
        isinstance(x, Tensor)
        and _is_live(bn)
        and _training_route.pooling_window(pool) is not None
        and not has_global_hooks()
    )


def stem(x: Tensor, conv: nn.Module, bn: nn.Module, act: nn.Module, pool: nn.Module) -> Tensor:
    """Convolution, live BatchNorm, ReLU and max pooling, as one autograd node where it can be."""
    if not torch.compiler.is_compiling():
        y, _ = _training_route.run_stem(x, conv, bn, act, pool)
        if y is not None:
            return y
    return pool(conv_bn(x, conv, bn, act))


class FusedSequential(Fused):
    """Mixin for containers that run their children in order and return the last output."""

    @staticmethod
    def must_be_plain(x: Any) -> bool:
        """Whether a compiler or tracer is to see the modules themselves."""
        return torch.compiler.is_compiling() or isinstance(x, fx.Proxy)

    def forward(self, x: Any) -> Any:
        if self.must_be_plain(x):
            return super().forward(x)
        y = x
        for _, y in run_in_order(self._modules.items(), x, private=True):  # noqa: B007
            pass
        return y


class Sequential(FusedSequential, nn.Sequential):
    """An `nn.Sequential` in which a Conv2d, its BatchNorm2d and ReLU in a row run as one layer."""

    plain_class = nn.Sequential


_NOTHING = nn.Identity()


class FusedStem(Fused):
    """Mixin for networks whose own forward calls conv1, bn1 and an activation in a row.

    The plain class's method runs on a view of the network in which `conv1` does the work of all
    three and the other two do nothing: its code stays whatever it is in the installed version. So
    it is with the stages: each hands on to the next what a block hands on to the block behind it.
    """

    stem: ClassVar[Step]
    stages: ClassVar[tuple[str, ...]] = ("layer1", "layer2", "layer3", "layer4")

    def _stage_views(self, x: Any) -> dict[str, Any]:
        """Stages by name as calls that share a row, where nobody is told of what lies between."""
        if FusedSequential.must_be_plain(x) or has_global_hooks():
            return {}
        stages = [(name, self._modules.get(name)) for name in self.stages]
        row = _training_block.Row()
        found = {}
        for (name, stage), (_, after) in itertools.pairwise([*stages, ("", None)]):
            if not _in_a_row(stage):
                continue
            behind = after._modules.items() if _in_a_row(after) else ()
            found[name] = functools.partial(_run_stage, stage, row, behind)
        return found

    def _stem_view(self, x: Any, *, joined: bool = False) -> nn.Module:
        """The view, or the network itself where the stem must stay as it is.

        Args:
            x: the network's input.
            joined: the method calls the stages one behind the other and shows none's output.
        """
        conv, bn, act = (getattr(self, name) for name in self.stem)
        untouched = (
            torch.compiler.is_compiling()
            or isinstance(x, fx.Proxy)
            or type(conv) is not nn.Conv2d
            or not is_norm(bn)
            or type(act) is not nn.ReLU
            or has_hooks(act)
        )
        view = object.__new__(self.plain_class)
        view.__dict__.update(self.__dict__)
        if not untouched:
            swapped: dict[str, Any] = {
                self.stem.conv: lambda y: conv_bn(y, conv, bn, act),
                self.stem.bn: _NOTHING,
                self.stem.act: _NOTHING,
            }
            pool = self._modules.get("maxpool")
            if pool is not None and trains_with(bn, pool, x):
                swapped[self.stem.conv] = lambda y: stem(y, conv, bn, act, pool)
                swapped["maxpool"] = _NOTHING
            view.__dict__["_modules"] = {**self._modules, **swapped}
        if joined and (stages := self._stage_views(x)):
            view.__dict__["_modules"] = {**view._modules, **stages}
        return view


def _in_a_row(stage: Any) -> bool:
    """Whether calling a stage is to run its blocks and nothing more."""
    return type(stage) is Sequential and not has_hooks(stage)


def _run_stage(stage: nn.Module, row: _training_block.Row, behind: Any, x: Any) -> Any:
    y = x
    for _, y in run_in_order(stage._modules.items(), x, private=True, row=row, behind=behind):  # noqa: B007
        pass
    return y
