"""What each process of `test_train_ranks.py` does: runs of several processes, by gloo."""

from __future__ import annotations

import datetime
import math
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import train_runs as runs

from resnet_fused.train.loop import Trainer
from resnet_fused.train.processes import Processes

LIMIT = 60.0


def processes(ranks: int) -> Processes | None:
    """The first so many of all, as processes of a run; None for the others."""
    world = dist.get_world_size()
    group = dist.new_group(list(range(ranks)), backend="gloo")
    if dist.get_rank() >= ranks:
        return None
    assert ranks == world, "the default group is everyone's"
    return Processes(dist.get_rank(), ranks, runs.CPU, group)


def plain(found: Processes, folder: Path, **changes: Any) -> None:
    """A run with statistics over all images of a step."""
    made = runs.recipe(sync_batchnorm=True, **changes.pop("recipe", {}))
    runs.train(folder, runs.settings(made, **changes), processes=found)


def fsdp(found: Processes, folder: Path) -> None:
    """Spread over the processes; stopped in the middle, and gone on with."""
    told = runs.settings(runs.recipe(sync_batchnorm=True), parallel="fsdp", save_every=3)
    runs.train(folder / "whole", told, processes=found)
    interrupted(found, folder / "parts", told, 7)


def interrupted(found: Processes, folder: Path, told: Any, stop: int) -> None:
    """Ends with an exception at a step, and is begun again."""
    take = Trainer._step

    def stepping(self: Trainer, batches: Any) -> None:
        if self.state.step == stop:
            raise InterruptedError
        take(self, batches)

    Trainer._step = stepping  # type: ignore[method-assign]
    try:
        runs.train(folder, told, processes=found)
    except InterruptedError:
        pass
    finally:
        Trainer._step = take  # type: ignore[method-assign]
    runs.train(folder, told, processes=found)


def resumed(found: Processes, folder: Path) -> None:
    """Interrupted between two lines of metrics, each process with sums of its own."""
    told = runs.settings(runs.recipe(), save_every=3, log_every=5)
    runs.train(folder / "whole", told, processes=found)
    interrupted(found, folder / "parts", told, 4)


def stopped(found: Processes, folder: Path) -> int:
    """A signal comes to one of them; all end behind the same step."""
    take = Trainer._step

    def stepping(self: Trainer, batches: Any) -> None:
        if self.state.step == 2 and found.rank == found.world - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        take(self, batches)

    Trainer._step = stepping  # type: ignore[method-assign]
    try:
        outcome = runs.train(folder, runs.settings(), processes=found)
    finally:
        Trainer._step = take  # type: ignore[method-assign]
    return outcome.step if outcome.signal == signal.SIGTERM else -1


def poisoned(found: Processes, folder: Path) -> str:
    """One of them has a NaN; all say so."""
    trainer = runs.trainer(folder, processes=found)
    if found.rank == 1:
        with torch.no_grad():
            trainer.normalised.shift.fill_(math.nan)
    try:
        trainer.train()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "it went on"


SCENARIOS: dict[str, Callable[[Processes, Path], Any]] = {
    "plain": plain,
    "fsdp": fsdp,
    "resumed": resumed,
    "stopped": stopped,
    "poisoned": poisoned,
}


def work(rank: int, world: int, folder: str) -> None:
    """One process: all scenarios, what each returned or its failure in a file of its own."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=LIMIT),
    )  # fmt: skip
    found = processes(world)
    assert found is not None
    for name, scenario in SCENARIOS.items():
        try:
            result = scenario(found, Path(folder) / name)
        except Exception:
            result = traceback.format_exc()
        torch.save(result, Path(folder) / f"{name}.{rank}.pt")
        dist.barrier()
    dist.destroy_process_group()
