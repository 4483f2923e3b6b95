"""What the processes of `test_training_distributed` do: each scenario's results go into a file.

One set of processes runs all scenarios: starting them costs more than what they compute. They
import nothing but torch and resnet_fused.
"""

from __future__ import annotations

import datetime
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

import resnet_fused as rf
from resnet_fused.nn.shortcuts import PaddedShortcut

RANKS = 3
LIMIT = 60
F64 = torch.float64


def backends_here() -> list[str]:
    names = [entry.name for entry in rf.backends.implementations("conv_bn_stats")]
    return [name for name in ("reference", "cpu") if name in names]


def _projection(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: rf.nn.ConvBNAct(4, 6, 3, 2),
    "basic": lambda: rf.nn.BasicBlock(4, 4),
    "bottleneck": lambda: rf.nn.Bottleneck(4, 2, 2, _projection(4, 8, 2)),
    "padded": lambda: rf.nn.BasicBlock(4, 7, 2, PaddedShortcut(4, 7, 2, 1)),
    "stem": lambda: rf.nn.Stem(4, 5),
}


def made(name: str, dtype: torch.dtype = F64) -> nn.Module:
    """A block whose BatchNorms are plain, with telling values; the same in every process."""
    torch.manual_seed(3)
    block = BLOCKS[name]()
    for bn in block.modules():
        if isinstance(bn, nn.BatchNorm2d):
            with torch.no_grad():
                bn.weight.uniform_(-0.5, 1.5)
                bn.bias.normal_()
                bn.running_mean.normal_()
                bn.running_var.uniform_(0.5, 2)
    return block.to(dtype).train()


def batch(images: int, dtype: torch.dtype = F64, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, 4, 9, 8, dtype=F64, generator=generator).to(dtype) * 2 + 1


def gradient_of(y: Tensor, images: int, first: int = 0) -> Tensor:
    """This process's part of the joined batch's gradient."""
    generator = torch.Generator().manual_seed(6)
    whole = torch.randn(images, *y.shape[1:], dtype=F64, generator=generator)
    return whole[first : first + y.shape[0]].to(y.dtype)


def synchronised(block: nn.Module, group: Any = None) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(block, group)


class Shares:
    """How the images of a batch are dealt out to the first ranks.

    Attributes:
        sizes: images of each rank.
    """

    def __init__(self, *sizes: int) -> None:
        self.sizes = sizes

    @property
    def images(self) -> int:
        return sum(self.sizes)

    def of(self, rank: int) -> slice:
        first = sum(self.sizes[:rank])
        return slice(first, first + self.sizes[rank])


SPLITS = {
    "three ranks": Shares(2, 2, 2),
    "unequal": Shares(1, 3, 2),
    "one empty": Shares(2, 0, 3),
    "first empty": Shares(0, 4, 1),
    "all on one": Shares(0, 0, 3),
    "two ranks": Shares(2, 3),
    "all empty": Shares(0, 0, 0),
}


def changes(block: nn.Module, change: str) -> nn.Module:
    found = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm)]
    if change == "momentum None":
        for bn in found:
            bn.momentum = None
    if change == "no running statistics":
        for bn in found:
            bn.track_running_stats, bn.running_mean, bn.running_var = False, None, None
            bn.num_batches_tracked = None
    if change == "last frozen":
        found[-1].eval()
    if change == "first frozen":
        found[0].eval()
    return block


def two_steps(model: nn.Module, x: Tensor, share: Shares, rank: int) -> dict[str, Any]:
    """Two forwards and backwards of this rank's part of a batch."""
    part = share.of(rank)
    outs, inputs = [], []
    for seed in range(2):
        given = (x + seed)[part].clone().requires_grad_()
        y = model(given)
        y.backward(gradient_of(y, share.images, part.start))
        outs.append(y.detach())
        inputs.append(given.grad)
    return {
        "outs": outs,
        "inputs": inputs,
        "grads": {name: p.grad for name, p in model.named_parameters()},
        "buffers": dict(model.named_buffers()),
    }


def sync(
    rank: int, groups: dict[int, Any], block: str, split: str, dtype: torch.dtype, change: str = ""
) -> Any:
    """SyncBatchNorm over the ranks that have a share; None on the others."""
    share = SPLITS[split]
    if rank >= len(share.sizes):
        return None
    results = {}
    for backend in backends_here():
        model = changes(synchronised(made(block, dtype), groups[len(share.sizes)]), change)
        with rf.backend(backend), rf.backends.recording() as routes:
            results[backend] = two_steps(model, batch(share.images, dtype), share, rank)
        assert {route.implementation for route in routes} == {backend}
    return results


def only_some_ranks_synchronise(rank: int, groups: dict[int, Any]) -> Any:
    """Ranks 0 and 1 share their batch, rank 2, in no group of its model, has its own."""
    group = groups[2] if rank < 2 else groups[-1]
    model = synchronised(made("bottleneck"), group)
    with rf.backend(backends_here()[-1]):
        return two_steps(model, batch(4), Shares(2, 2) if rank < 2 else Shares(0, 0, 4), rank)


def left_to_pytorch(rank: int, groups: dict[int, Any]) -> str:
    """PyTorch's SyncBatchNorm itself serves no CPU: a layer that falls to it says so."""
    model = synchronised(made("layer"))
    model.conv.register_forward_hook(lambda *a: None)
    try:
        with rf.backend("reference"):
            model(batch(2))
    except ValueError as error:
        return str(error)
    return "no error"


def network() -> nn.Sequential:
    torch.manual_seed(4)
    down = _projection(5, 8, 2)
    return nn.Sequential(
        rf.nn.Stem(4, 5), rf.nn.BasicBlock(5, 5), rf.nn.Bottleneck(5, 2, 2, down),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    ).double().to(memory_format=torch.channels_last)  # fmt: skip


def train(model: nn.Module, x: Tensor, rounds: int = 2, average: bool = False) -> list[Tensor]:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(rounds):
        optimiser.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        for p in model.parameters() if average else ():
            dist.all_reduce(p.grad)
            p.grad /= RANKS
        optimiser.step()
        losses.append(loss.detach())
    return losses


def ddp(rank: int, groups: dict[int, Any], kind: str) -> dict[str, Any]:
    """The same training by fused and by plain modules."""
    x = batch(9, seed=8)[3 * rank : 3 * rank + 3]
    results = {}
    for name in ("fused", "plain"):
        model = network() if name == "fused" else rf.unfuse(network())
        wrapped = nn.parallel.DistributedDataParallel(
            model,
            gradient_as_bucket_view=kind == "bucket view",
            static_graph=kind == "static graph",
        )
        with rf.backend(backends_here()[-1]), rf.backends.recording() as routes:
            losses = train(wrapped, x)
        assert {route.op for route in routes} == ({"conv_bn_stats"} if name == "fused" else set())
        for p in model.parameters():
            assert p.grad.stride() == p.stride()
        results[name] = {"state": model.state_dict(), "losses": losses}
    return results


def average(rank: int, groups: dict[int, Any]) -> dict[str, Any]:
    """SyncBatchNorm and averaged gradients, against one process on the whole batch.

    What DistributedDataParallel does on GPUs: on the CPU it refuses modules with SyncBatchNorm.
    """
    x = batch(9, seed=8)
    model, whole = synchronised(network()), rf.unfuse(network())
    with rf.backend(backends_here()[-1]):
        losses = train(model, x[3 * rank : 3 * rank + 3], average=True)
    return {
        "fused": {"state": model.state_dict(), "losses": losses},
        "plain": {"losses": train(whole, x), "state": whole.state_dict()},
    }


def fsdp(rank: int, groups: dict[int, Any], precision: str) -> dict[str, Any]:
    """fully_shard on each block and on the whole, against the same without sharding."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor

    mesh = dist.init_device_mesh("cpu", (RANKS,))
    x = batch(9, seed=8)[3 * rank : 3 * rank + 3]
    results = {}
    for name in ("fused", "plain"):
        # Its parameters are to be contiguous.
        model = network().to(memory_format=torch.contiguous_format)
        if precision == "bfloat16":
            model, x = model.float(), x.float()
        model = model if name == "fused" else rf.unfuse(model)
        policy = MixedPrecisionPolicy()
        if precision == "bfloat16" and name == "fused":
            # PyTorch's BatchNorm takes no 16-bit parameters beside float32 statistics on the CPU.
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in (*model[:3], model):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        with rf.backend(backends_here()[-1]), rf.backends.recording() as routes:
            losses = train(model, x)
            training = [route.op for route in routes]
        with torch.no_grad(), rf.backend("auto"):
            evaluated = [model.eval()(x), model(x)]
        with rf.backend(backends_here()[-1]):
            losses += train(model.train(), x, 1)
        with torch.no_grad(), rf.backend("auto"):
            evaluated.append(model.eval()(x))
        state = {
            key: value.full_tensor() if isinstance(value, DTensor) else value
            for key, value in model.state_dict().items()
        }
        results[name] = {"state": state, "losses": losses, "eval": evaluated, "ops": training}
    return results


def scenarios() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Name -> what to run, and its arguments."""
    found: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {}
    for block in BLOCKS:
        found[f"sync {block} unequal"] = sync, (block, "unequal", F64)
    for split in SPLITS:
        found[f"sync bottleneck {split}"] = sync, ("bottleneck", split, F64)
    for change in ("momentum None", "no running statistics", "last frozen", "first frozen"):
        found[f"sync bottleneck {change}"] = sync, ("bottleneck", "unequal", F64, change)
    for split in ("unequal", "two ranks"):
        found[f"sync float32 {split}"] = sync, ("bottleneck", split, torch.float32)
    found["subset"] = only_some_ranks_synchronise, ()
    found["left to pytorch"] = left_to_pytorch, ()
    for kind in ("", "bucket view", "static graph"):
        found[f"ddp {kind}"] = ddp, (kind,)
    found["average"] = average, ()
    for precision in ("float64", "bfloat16"):
        found[f"fsdp {precision}"] = fsdp, (precision,)
    return found


def work(rank: int, folder: str) -> None:
    """One process: all scenarios, each result or its failure in a file of its own."""
    torch.set_num_threads(1)
    warnings.simplefilter("error", FutureWarning)  # collectives that torch is about to remove
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=LIMIT),
    )
    groups = {3: dist.group.WORLD, 2: dist.new_group([0, 1]), -1: dist.new_group([2])}
    for index, (name, (function, arguments)) in enumerate(scenarios().items()):
        try:
            result = function(rank, groups, *arguments)
        except Exception:
            result = traceback.format_exc()
        torch.save((name, result), Path(folder) / f"{index}.{rank}.pt")
        dist.barrier()
    dist.destroy_process_group()
