"""A whole training step as a CUDA graph: one launch in the place of thousands.

The first calls of a batch shape are ordinary steps: they compile what there is to compile, let
cuDNN search, run the self-checks of new kernels and make the optimizer's state. Then forward, loss,
backward, scaling and the optimizer are captured, and every further call copies its batch in and
replays. Capturing computes nothing, so no step is taken twice and none is left out.
"""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from resnet_fused import backends
from resnet_fused.freeze._driver import Driver
from resnet_fused.nn import _prepared
from resnet_fused.nn._modules import has_global_hooks
from resnet_fused.train.step import Loss, Phase, Step, Taken

logger = logging.getLogger("resnet_fused.train")

WARMUP = 3
"""Ordinary steps of a shape before it is captured, as PyTorch's notes on CUDA graphs have it."""
MOST = 8
"""Graphs that are kept; behind them the one that was made first is forgotten."""
_PLAIN = (bool, int, float, str, tuple, type(None))


class Graphs(Driver):
    """Captures on one GPU whose graphs share their memory: they run one after the other.

    Args:
        device: the GPU.
        generators: of random numbers, beside the GPU's own, that the captures draw from.
    """

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator] = ()) -> None:
        super().__init__(device)
        self._generators = tuple(generators)
        # Memory that one capture has freed is the next one's on the same stream alone.
        self._side = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Makes a side stream the current one: no warm-up belongs on the default stream."""
        current = torch.cuda.current_stream()
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            yield
        current.wait_stream(self._side)

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Captures what `run` launches; see `Driver.capture`."""
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        # Only what this thread does may break the capture: a loader's threads go on pinning memory.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"
        ):
            result = run()
        return graph.replay, result


@dataclass(frozen=True)
class _Graph:
    """One shape's step.

    Attributes:
        inputs: images and targets that the graph reads.
        replay: launches it.
        taken: what it writes.
    """

    inputs: tuple[Tensor, Tensor]
    replay: Callable[[], None]
    taken: Taken


class CapturedStep(Step):
    """A step of training that is captured as a CUDA graph and replayed, one graph a batch shape.

    In the graph are forward, loss, backward, gradient accumulation, clipping, the fused optimizer,
    the dynamic loss scale (a step whose gradients are not finite changes nothing but the scale),
    BatchNorm's running statistics, and the random numbers of the GPU's generator. The learning rate
    is a float32 tensor on the device: schedulers of PyTorch and `group["lr"] = 0.1` both reach the
    graph. Behind a call `.grad` is None: gradients live in the graph.

    What else was captured is looked at in each call: training mode of each module, `requires_grad`,
    where parameters, buffers and the optimizer's state lie, the optimizer's other settings, the
    backend. Where any of it has changed, the shape is captured anew. Values that only Python knows,
    such as a module's attribute, stay what they were; hooks would not run, so a model with hooks is
    not captured.

    What cannot be captured runs as ordinary steps, with one warning; `explain` says why. The
    numbers are those of the ordinary step either way.

        step = CapturedStep(model, loss, torch.optim.SGD(model.parameters(), 0.1, fused=True))
        losses, output = step(images, targets)

    Args:
        model: see `Step`; with its parameters on one GPU.
        loss: see `Step`.
        optimizer: `torch.optim.SGD`, `Adam` or `AdamW` with `fused=True`.
        scaler: of the loss, or None.
        autocast: see `Step`.
        accumulate: see `Step`.
        clip_norm: see `Step`.
        together: see `Step`.
        phase: see `Step`; of a captured step there is "replay" alone.
        generators: of random numbers that the model draws from, beside the GPU's own.
        warmup: ordinary steps of a shape before it is captured, at least 1.

    Raises:
        ValueError: `accumulate` or `warmup` is less than 1.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        optimizer: Optimizer,
        scaler: GradScaler | None = None,
        *,
        autocast: torch.dtype | None = None,
        accumulate: int = 1,
        clip_norm: float | None = None,
        together: Callable[[bool], contextlib.AbstractContextManager[object]] = (
            contextlib.nullcontext
        ),
        phase: Phase = contextlib.nullcontext,
        generators: Sequence[torch.Generator] = (),
        warmup: int = WARMUP,
    ) -> None:
        super().__init__(
            model, loss, optimizer, scaler, autocast=autocast, accumulate=accumulate,
            clip_norm=clip_norm, together=together, phase=phase,
        )  # fmt: skip
        if warmup < 1:
            raise ValueError(f"warmup is {warmup!r}; accepted is an integer of at least 1")
        self._generators, self._warmup = tuple(generators), warmup
        self._driver: Graphs | None = None
        self._rates: dict[int, Tensor] = {}
        self._seen: dict[Hashable, int] = {}
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._told: dict[str, str] = {}
        self._failed = ""

    def explain(self) -> str:
        """A line for each batch shape: captured, not yet, or why not."""
        return "\n".join(f"{shape}: {how}" for shape, how in self._told.items()) or "no step yet"

    def _take(self, images: Tensor, targets: Tensor) -> Taken:
        if is_fused(self.optimizer):
            self._set_rates(images.device)
        self._driver = self._driver or graphs_of(images.device, self._generators)
        reason = self._failed or obstacle(self.model, self.optimizer)
        if self._driver is None:
            reason = reason or f"the images are on {images.device}, CUDA graphs are of a GPU"
        if self._driver is None or reason:
            return self._plain(images, targets, reason or "")
        with self._driver.active():
            if self._driver.capturing():
                return self._plain(images, targets, "the caller captures a graph of his own")
            return self._captured(self._driver, images, targets)

    def _captured(self, driver: Graphs, images: Tensor, targets: Tensor) -> Taken:
        call = (_form(images), _form(targets), *self._settings())
        place = (call, tuple(t.data_ptr() for t in self._tensors()))
        graph = self._graphs.get(place)
        if graph is None:
            seen = self._seen[call] = self._seen.get(call, 0) + 1
            if seen <= self._warmup:
                self._tell(images, f"step {seen} of {self._warmup} before it is captured")
                with driver.aside():
                    return self._bare(images, targets)
            graph = self._capture(driver, images, targets)
            if graph is None:
                return self._plain(images, targets, self._failed)
            self._graphs[place] = graph
            if len(self._graphs) > MOST:
                self._graphs.popitem(last=False)
            self._tell(images, "captured")
        with self._phase("replay"):
            return self._replay(graph, images, targets)

    def _plain(self, images: Tensor, targets: Tensor, reason: str) -> Taken:
        if self._tell(images, f"ordinary steps: {reason}"):
            logger.warning("a step of %s is not captured: %s", tuple(images.shape), reason)
        return self._bare(images, targets)

    def _tell(self, images: Tensor, how: str) -> bool:
        """Notes how a shape runs; whether that is new."""
        shape = f"{list(images.shape)} {str(images.dtype).removeprefix('torch.')}"
        new = self._told.get(shape) != how
        self._told[shape] = how
        return new

    def _bare(self, images: Tensor, targets: Tensor) -> Taken:
        """An ordinary step, without gradients behind it."""
        taken = self._run(images, targets, self._phase)
        self.optimizer.zero_grad(set_to_none=True)
        return taken

    def _set_rates(self, device: torch.device) -> None:
        """Has each group's learning rate in a tensor of ours, whatever was put there."""
        for place, group in enumerate(self.optimizer.param_groups):
            own = self._rates.get(place)
            if own is None:
                own = self._rates[place] = torch.zeros((), dtype=torch.float32, device=device)
            if group["lr"] is not own:
                own.fill_(float(group["lr"]))
                group["lr"] = own

    def _tensors(self) -> Iterator[Tensor]:
        """What a step writes or reads beside its batch, as it lies in memory."""
        for module in self.model.modules():
            for own in (module._parameters, module._buffers):
                yield from (t for t in own.values() if t is not None)
        for values in self.optimizer.state.values():
            yield from (t for t in values.values() if isinstance(t, Tensor))
        if self.scaler.is_enabled():  # both are made in the first step
            own = (self.scaler._scale, self.scaler._growth_tracker)
            yield from (t for t in own if t is not None)

    def _settings(self) -> tuple[Hashable, ...]:
        """What a graph has in it, beside memory, that a later call may find changed."""
        groups, scaler = self.optimizer.param_groups, self.scaler
        return (
            tuple((id(module), module.training) for module in self.model.modules()),
            tuple((id(p), p.requires_grad) for group in groups for p in group["params"]),
            tuple(
                (name, value if isinstance(value, _PLAIN) else id(value))
                for group in groups
                for name, value in group.items()
                if name not in ("params", "initial_lr")
            ),
            scaler.is_enabled()
            and (scaler._growth_factor, scaler._backoff_factor, scaler._growth_interval),
            backends.requested(),
            torch.are_deterministic_algorithms_enabled(),
        )

    def _capture(self, driver: Graphs, images: Tensor, targets: Tensor) -> _Graph | None:
        """The graph of a shape, or None, with the reason in `_failed`."""
        inputs = images.clone(), targets.clone()
        try:
            # As `_replay` counts what was written, what is kept of layers is found to be old.
            with _capturable(self.optimizer), _prepared.counted():
                made = driver.capture(lambda: self._run(*inputs, contextlib.nullcontext))
        except RuntimeError as error:
            self._failed = f"no graph: {str(error).partition(chr(10))[0]}"
            # What a step that broke off has left behind.
            if self.scaler.is_enabled():
                self.scaler._per_optimizer_states.clear()
            for name in ("grad_scale", "found_inf"):
                self.optimizer.__dict__.pop(name, None)
            return None
        finally:
            # The gradients' memory stays with the graphs.
            self.optimizer.zero_grad(set_to_none=True)
        return _Graph(inputs, *made)

    def _replay(self, graph: _Graph, images: Tensor, targets: Tensor) -> Taken:
        for mine, given in zip(graph.inputs, (images, targets), strict=True):
            mine.copy_(given)
        graph.replay()
        # A replay runs no Python: what caches values made of these must see that they are new.
        torch.autograd.graph.increment_version(list(self._tensors()))
        return Taken(*(t.clone() for t in graph.taken))


def graphs_of(device: torch.device, generators: Sequence[torch.Generator] = ()) -> Graphs | None:
    """What captures on a device, or None where nothing can."""
    return Graphs(device, generators) if device.type == "cuda" else None


def is_fused(optimizer: Optimizer) -> bool:
    """Whether an optimizer's step is PyTorch's fused one, whose learning rate may be a tensor."""
    return all(group.get("fused") for group in optimizer.param_groups)


def obstacle(model: nn.Module, optimizer: Optimizer) -> str | None:
    """Why a step of a model by an optimizer cannot be captured, or None.

    Args:
        model: that learns.
        optimizer: of its parameters.
    """
    if not is_fused(optimizer):
        name = type(optimizer).__name__
        return f"{name} was not made with fused=True: its learning rate is a number of Python's"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return "the optimizer has hooks, which a replay would not run"
    places = {p.device for group in optimizer.param_groups for p in group["params"]}
    if len(places) > 1:
        return f"the parameters are on {len(places)} devices"
    if (who := _exchanges(model)) is not None:
        return f"{who} gradients, and no collective has been tried in a graph"
    if has_global_hooks():
        return "global module hooks are registered, which a replay would not run"
    for name, module in model.named_modules():
        slots = module.__dict__
        if any(slots[kind] for kind in _HOOKS):
            return f"{name or 'the model'} has a hook, which a replay would not run"
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            return f"{name} has a hook, which a replay would not run"
    return None


def _exchanges(model: nn.Module) -> str | None:
    """Who exchanges gradients, with the verb, or None.

    A graph with collectives needs more than a warm-up (NCCL's error handling off when the group is
    made, DistributedDataParallel made on the side stream, 11 steps ahead; PyTorch's notes on CUDA
    graphs), and ranks that capture at the same step or not at all: see docs/train.md.
    """
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    if distributed.get_world_size() > 1:
        return "several processes exchange"
    # Alone it reduces all the same, by hooks that no module shows.
    wrapper = nn.parallel.DistributedDataParallel
    wraps = any(isinstance(module, wrapper) for module in model.modules())
    return f"{wrapper.__name__} reduces" if wraps else None


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextlib.contextmanager
def _capturable(optimizer: Optimizer) -> Iterator[None]:
    """Adam's word that it may be captured, which outside of a capture it would warn about."""
    groups = [group for group in optimizer.param_groups if "capturable" in group]
    before = [group["capturable"] for group in groups]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group, value in zip(groups, before, strict=True):
            group["capturable"] = value


def _form(t: Tensor) -> tuple[Hashable, ...]:
    return tuple(t.shape), t.stride(), t.dtype, t.device
