"""A subject's operands and modules, made from its seed, and the call that a variant has to make."""

from __future__ import annotations

import contextlib
import math
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from resnet_fused import backends
from resnet_fused.bench import judging
from resnet_fused.bench.judging import Judgement
from resnet_fused.bench.kernels import KINDS
from resnet_fused.bench.names import Case
from resnet_fused.bench.subject import STEM, Subject, block_input, plain_network
from resnet_fused.calibrate import calibrate_batchnorm
from resnet_fused.roofline import model_cost

MOST_SETS = 16
CACHES = 2  # times the last cache's size that all sets together hold
MEMORY_SHARE = 0.2  # of the free memory that the sets may take
_CALIBRATION = (8, 96)  # images and pixels that set BatchNorm's statistics
_WATCHED = 6


@dataclass(frozen=True)
class Batch:
    """What a block or a model reads.

    Attributes:
        x: [N, C, H, W] in channels_last; a leaf that asks for its gradient in a block's training.
        target: None for inference; labels [N] for a model's training; for a block's the gradient of
            its output [N, K, P, Q].
    """

    x: Tensor
    target: Tensor | None = None


@dataclass
class Work:
    """A subject, built.

    Attributes:
        subject: what it is.
        sets: rotating operands: those of the kernel's `Kind`, or `Batch`. Together they exceed what
            the last cache holds twice, up to 16 sets; set 0 is what is judged.
        module: for a block or model the plain module in eval or train mode; None for kernels.
        case: of a kernel; None for blocks and models.
        watched: names of the parameters whose gradients a training step returns, "input" for x's.
        exact: neither autocast nor a scaled loss: what an oracle is computed with.
    """

    subject: Subject
    sets: list[Any]
    module: nn.Module | None = None
    case: Case | None = None
    watched: tuple[str, ...] = ()
    reference: judging.Reference | None = None
    exact: bool = False
    _names: dict[int, tuple[Any, ...]] = field(default_factory=dict, repr=False)
    _optimizers: dict[int, tuple[Any, ...]] = field(default_factory=dict, repr=False)

    def mode(self) -> contextlib.AbstractContextManager[Any]:
        """What calls run in: inference mode, or for a training step gradients enabled."""
        return torch.enable_grad() if self.subject.training else torch.inference_mode()

    def run(self, module: Callable[..., Any], i: int = 0) -> Any:
        """One call of a block or model on set i: what every variant that is a module does.

        Args:
            module: `self.module`, or what a variant made of it (fused, compiled); for training its
                parameters keep their names.
            i: index of the set.

        Returns:
            Inference: the output. Training: (loss, name -> gradient of the watched parameters), all
            gradients having been computed; in place of a loss a block's output stands, since its
            output's gradient is given. Nothing is left in `.grad`, but by a step that optimizes.
        """
        batch = self.sets[i]
        if not self.subject.training:
            return module(batch.x)
        if self.subject.optimizes:
            return self._optimized(module, batch)
        names, leaves = self._leaves(module)
        y = module(batch.x)
        if self.subject.level == "model":
            first = F.cross_entropy(y.float(), batch.target)
            found = torch.autograd.grad(first, leaves)
        else:
            first = y
            inputs = [batch.x] if batch.x.requires_grad else []
            found = torch.autograd.grad(y, [*inputs, *leaves], batch.target)
            names = ("input", *names) if inputs else names
        grads = dict(zip(names, found, strict=True))
        return first.detach(), {name: grads[name] for name in self.watched}

    def _optimized(self, module: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        names, leaves = self._leaves(module)
        optimizer, scaler = self._optimizer(module, leaves)
        optimizer.zero_grad(set_to_none=True)
        dtype = self.subject.torch_dtype
        narrow = dtype is not torch.float32 and not self.exact
        with torch.autocast(self.subject.device, dtype if narrow else None, enabled=narrow):
            y = module(batch.x)
        loss = F.cross_entropy(y if self.exact else y.float(), batch.target)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)  # as who clips gradients does; they are what is judged
        scaler.step(optimizer)
        scaler.update()
        grads = dict(zip(names, leaves, strict=True))
        return loss.detach(), {name: grads[name].grad for name in self.watched}

    def _optimizer(
        self, module: Any, leaves: list[Tensor]
    ) -> tuple[torch.optim.SGD, torch.amp.GradScaler]:
        """Fused SGD at a learning rate of zero: all of its work, and the same weights behind it.

        So each call computes the same, and can be judged whenever it is made.
        """
        known = self._optimizers.get(id(module))
        if known is None or known[0] is not module:
            optimizer = torch.optim.SGD(leaves, lr=0.0, momentum=0.9, weight_decay=1e-4, fused=True)
            for leaf in leaves:  # a first step that is skipped would leave it unset
                optimizer.state[leaf]["momentum_buffer"] = torch.zeros_like(leaf)
            scaled = self.subject.torch_dtype is torch.float16 and not self.exact
            # Small enough for the first step, and it grows in no benchmark's time.
            scaler = torch.amp.GradScaler(
                self.subject.device, init_scale=2.0**8, growth_interval=1 << 30, enabled=scaled
            )
            known = self._optimizers[id(module)] = (module, optimizer, scaler)
        return known[1], known[2]

    def _leaves(self, module: Any) -> tuple[tuple[str, ...], list[Tensor]]:
        known = self._names.get(id(module))
        if known is None or known[0] is not module:
            pairs = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
            names = tuple(n.replace("_orig_mod.", "") for n, _ in pairs)
            known = self._names[id(module)] = (module, names, [p for _, p in pairs])
        return known[1], known[2]

    def judge(self, out: Any) -> Judgement:
        """Whether an output of set 0 is right; see `judging` for what that means.

        Args:
            out: what `run` returns; or a kernel's results in the shapes and dtypes of `rf.ops`, a
                lone tensor being the first of them.
        """
        if self.reference is None:
            self.reference = judging.reference(self)
        return judging.judge(self, out)

    def share(self, path: Path) -> None:
        """Writes weights, statistics and the oracle, so that another process need not compute them.

        Args:
            path: of the file, which `build` reads.
        """
        if self.reference is None:
            self.reference = judging.reference(self)
        state = None if self.module is None else self.module.state_dict()
        torch.save({"state": state, "reference": self.reference.to_dict()}, path)


def build(subject: Subject, shared: Path | None = None) -> Work:
    """Makes operands and modules of a subject: the same ones in every process.

    Args:
        subject: what to build.
        shared: a file that `Work.share` wrote; None computes its content when it is needed.

    Raises:
        ValueError: a name of which nothing can be built; the message says what is accepted.
    """
    given = None if shared is None else torch.load(shared, map_location="cpu", weights_only=True)
    if subject.level == "kernel":
        work = _kernel(subject)
    else:
        work = _network(subject, None if given is None else given["state"])
    if given is not None:
        work.reference = judging.Reference.from_dict(given["reference"], subject.device)
    return work


def _kernel(subject: Subject) -> Work:
    case = subject.case
    assert case is not None
    dtype = subject.torch_dtype
    kind = KINDS[subject.op]
    count = sets_for(kind.cost(case, dtype).bytes, subject.device)
    with torch.no_grad(), backends.backend("reference"):
        sets = [kind.make(_Maker(subject, i), case) for i in range(count)]
    return Work(subject, sets, case=case)


def sets_for(size: int, device: str) -> int:
    """How many sets of so many bytes to rotate among, so that none is found in a cache again."""
    wanted = math.ceil(CACHES * cache_bytes(device) / max(1, size))
    room = int(MEMORY_SHARE * _free_bytes(device) / max(1, size))
    return max(1, min(wanted, room, MOST_SETS))


def cache_bytes(device: str) -> int:
    """Size of the last cache: a GPU's L2, or what the kernel tells of the CPU's."""
    if device == "cuda":
        about = torch.cuda.get_device_properties(torch.cuda.current_device())
        return int(getattr(about, "L2_cache_size", 0)) or 64 << 20
    folder = Path("/sys/devices/system/cpu/cpu0/cache")
    sizes = [_cache_size(path) for path in folder.glob("*/size")]
    return max(sizes, default=0) or 32 << 20


def _cache_size(path: Path) -> int:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return 0
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    digits = text.rstrip("KMG")
    return int(digits) * units.get(text[-1], 1) if digits.isdigit() else 0


def _free_bytes(device: str) -> int:
    return torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available


class _Maker:
    """Random tensors on the subject's device, the same for a subject, set and order of calls."""

    def __init__(self, subject: Subject, index: int) -> None:
        seed = zlib.crc32(f"{subject.key}#{subject.seed}#{index}".encode())
        self.device, self.dtype = subject.device, subject.storage_dtype
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def image(self, *shape: int) -> Tensor:
        made = torch.empty(
            shape, dtype=self.dtype, device=self.device, memory_format=torch.channels_last
        )
        return made.normal_(generator=self.generator)

    def affine(self, channels: int) -> tuple[Tensor, Tensor]:
        """Scale, a fifth of it negative, and shift: [channels] float32."""
        lot, size = torch.rand(2, channels, generator=self.generator, device=self.device)
        sign = torch.where(lot < 0.2, -1.0, 1.0)
        shift = torch.randn(channels, generator=self.generator, device=self.device)
        return (0.5 + size) * sign, shift

    def pixels(self, *shape: int) -> Tensor:
        """Images of bytes, channels_last."""
        made = torch.randint(
            256, shape, dtype=torch.uint8, generator=self.generator, device=self.device
        )
        return made.contiguous(memory_format=torch.channels_last)

    def labels(self, n: int, classes: int) -> Tensor:
        return torch.randint(classes, (n,), generator=self.generator, device=self.device)


def _network(subject: Subject, state: dict[str, Tensor] | None) -> Work:
    module, shape = _foreign(subject) if subject.foreign else _module(subject)
    if state is None:
        n, pixels = _CALIBRATION
        if not subject.foreign:
            _initialise(module, subject)
        else:  # it may take images of one size alone
            pixels = subject.size
        few = (min(v, pixels) for v in shape[1:])
        generator = torch.Generator().manual_seed(subject.seed)
        # On the CPU and in float32, wherever it will run: the statistics are the same everywhere.
        images = torch.randn(n, shape[0], *few, generator=generator)
        if any(_has_statistics(child) for child in module.modules()):
            calibrate_batchnorm(module, images)
    else:
        module.load_state_dict(state)
    module.train(subject.training and subject.op != "training_frozen")
    if subject.op == "training_frozen":
        for child in module.modules():
            if isinstance(child, nn.BatchNorm2d):
                child.requires_grad_(False)
    if not subject.training:
        module.requires_grad_(False)
    module = module.to(subject.device, subject.storage_dtype)
    module = module.to(memory_format=torch.channels_last)
    size = subject.batch * math.prod(shape) * subject.storage_dtype.itemsize
    count = sets_for(size, subject.device)
    sets = [_batch(subject, module, shape, i) for i in range(count)]
    return Work(subject, sets, module, watched=_watched(subject, module, sets[0]))


def _module(subject: Subject) -> tuple[nn.Module, tuple[int, int, int]]:
    """The plain module with unset values on the CPU, and the shape [C, H, W] of one input."""
    model, _, block = subject.name.partition(".")
    with torch.device("meta"):
        network: Any = plain_network(model)
    shape = (3, subject.size, subject.size)
    if block == STEM:
        stem = ("conv1", "bn1", "relu", "maxpool")
        network = nn.Sequential(OrderedDict((name, getattr(network, name)) for name in stem))
    elif block:
        shape = block_input(model, block, subject.size)
        network = network.get_submodule(block)
    return network.to_empty(device="cpu"), shape


def _foreign(subject: Subject) -> tuple[nn.Module, tuple[int, int, int]]:
    """Another's network with its own first weights: what it needs beside them, only it knows."""
    if subject.training:
        raise ValueError(
            f"op is {subject.op!r}; accepted for {subject.name} is inference, training is for the "
            "networks of resnet_fused.models"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(subject.seed)
        network = plain_network(subject.name)
    return network.eval(), (3, subject.size, subject.size)


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.affine and module.track_running_stats


def _initialise(module: nn.Module, subject: Subject) -> None:
    """Weights as a network starts with, from the subject's seed alone."""
    generator = torch.Generator().manual_seed(subject.seed)
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            nn.init.kaiming_normal_(
                child.weight, mode="fan_out", nonlinearity="relu", generator=generator
            )
        elif isinstance(child, nn.Linear):
            nn.init.normal_(child.weight, 0.0, 0.01, generator=generator)
            nn.init.zeros_(child.bias)
        elif isinstance(child, nn.BatchNorm2d):
            child.reset_running_stats()
            nn.init.ones_(child.weight)
            nn.init.zeros_(child.bias)


def _batch(subject: Subject, module: nn.Module, shape: tuple[int, ...], index: int) -> Batch:
    make = _Maker(subject, index)
    x = make.image(subject.batch, *shape)
    if not subject.training:
        return Batch(x)
    if subject.level == "model":
        return Batch(x, make.labels(subject.batch, module.get_submodule("fc").out_features))
    out = output_shape(module, x)
    # The images that the stem reads have no gradient.
    return Batch(x if subject.name.endswith(f".{STEM}") else x.requires_grad_(), make.image(*out))


def output_shape(module: nn.Module, x: Tensor) -> tuple[int, ...]:
    """Of a plain block on x, by the sizes alone."""
    return model_cost(module, tuple(x.shape)).layers[-1].shape


def _watched(subject: Subject, module: nn.Module, batch: Batch) -> tuple[str, ...]:
    """A few of a network's parameters, from start to end; all of a block's, and its input."""
    if not subject.training:
        return ()
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    if subject.level == "block":
        return ("input", *names) if batch.x.requires_grad else tuple(names)
    matrices = [name for name in names if module.get_parameter(name).dim() > 1]
    vectors = [name for name in names if module.get_parameter(name).dim() == 1]
    steps = _WATCHED - 2
    picked = [matrices[i * (len(matrices) - 1) // steps] for i in range(steps + 1)]
    return tuple(dict.fromkeys([*picked, vectors[-1]]))
