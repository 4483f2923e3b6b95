"""The runs of an experiment: each variant with each seed, trained once, kept, and read again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from resnet_fused.data import loading
from resnet_fused.data.augment import evaluation_transform
from resnet_fused.data.images import ImageError
from resnet_fused.data.sources import Images, Source
from resnet_fused.paper.scales import Scale
from resnet_fused.paper.variants import Variant
from resnet_fused.train import journal, loop, settings
from resnet_fused.train.evaluation import evaluate
from resnet_fused.train.network import Normalised
from resnet_fused.train.processes import Processes

RESULT = "result.json"
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Job:
    """How runs are made.

    Attributes:
        scale: of the experiment.
        source: its data.
        processes: that take part.
        folder: which the runs' folders are put in.
        impl: "fused" or "eager".
        workers: processes that decode images.
        progress: called with steps done, all steps, and a text.
    """

    scale: Scale
    source: Source
    processes: Processes
    folder: Path
    impl: str = "fused"
    workers: int = 0
    progress: Progress = lambda done, total, text: None

    def run_of(self, variant: Variant, seed: int) -> Path:
        """The folder of a run."""
        return self.folder / "runs" / f"{variant.name}-seed{seed}"


@dataclass(frozen=True)
class Run:
    """A run that came to its end.

    Attributes:
        variant: name of the network.
        seed: of its weights and its images' order.
        steps: that were taken.
        train_error: share of the training images that are wrong at the end, not augmented.
        test_error: of the test images.
        parameters: how many the network has.
        folder: of the run.
        train_curve: (step, error) of the training images as they came, augmented.
        test_curve: (step, error) of the tests.
    """

    variant: str
    seed: int
    steps: int
    train_error: float
    test_error: float
    parameters: int
    folder: str
    train_curve: tuple[tuple[int, float], ...] = ()
    test_curve: tuple[tuple[int, float], ...] = ()


class Stopped(Exception):  # noqa: N818 (no error: somebody wanted it)
    """A signal ended a run; its number is in `args`."""


def train(job: Job, variant: Variant, seed: int, done: int, total: int) -> Run:
    """Trains a variant, goes on with it, or reads what came of it.

    Args:
        job: how.
        variant: what.
        seed: of weights and order.
        done: steps of the runs before this one.
        total: of all runs.

    Raises:
        Stopped: a signal came; a checkpoint is there.
        TrainingError, CheckpointError, ImageError: as of `resnet_fused.train.loop.Trainer.train`.
    """
    folder, processes, scale = job.run_of(variant, seed), job.processes, job.scale
    told = settings.Settings(
        f"paper:{variant.name}", scale.data, scale.recipe_of(variant.depth),
        "fused" if job.impl == "fused" else "eager", seed, workers=job.workers, keep=1,
        tensorboard=False,
    )  # fmt: skip
    told.check(job.source, processes.world)
    identity = told.identity() | {
        "classes": list(job.source.classes), "images": len(job.source.train)
    }  # fmt: skip
    if processes.first:
        settings.begin(folder, identity, resume=True)
    known = processes.share(_read(folder) if processes.first else None)
    if known is not None:
        return _with_curves(known, folder)
    model = variant.make(scale, job.source, seed, job.impl, processes.device)
    trainer = loop.Trainer(
        told, job.source, model, processes, folder, _channels(scale, job.source),
        lambda step, _, text: job.progress(done + step, total, f"{variant.label} #{seed}  {text}"),
    )  # fmt: skip
    outcome = trainer.train()
    if outcome.signal:
        raise Stopped(outcome.signal)
    score = _errors(trainer.state.tested, job, job.source.train)
    run = Run(
        variant.name, seed, outcome.step, 1 - score, 1 - outcome.test["top1"],
        sum(p.numel() for p in model.parameters()), str(folder.relative_to(job.folder)),
    )  # fmt: skip
    if processes.first:
        _write(folder / RESULT, run)
    processes.wait()
    return _with_curves(run, folder)


def _channels(scale: Scale, source: Source) -> int:
    return source.channels if scale.family == "cifar" else 3


def _errors(model: nn.Module, job: Job, images: Images) -> float:
    """The share of images that a network has right."""
    size = job.scale.recipe.eval_size or job.scale.recipe.size
    found, problems = evaluate(
        forward_of(model, job), batches_of(job, images, size), len(job.source.classes),
        job.processes.device, job.processes.sum,
    )  # fmt: skip
    if problems:
        raise ImageError(problems[0])
    return found.record()["top1"]


def forward_of(model: nn.Module, job: Job) -> Callable[[Tensor], Tensor]:
    """Bytes of images -> scores, by a network in evaluation mode."""
    norm = Normalised(job.source, _channels(job.scale, job.source), job.processes.device)
    model.eval()
    return lambda images: model(norm(images))


def batches_of(job: Job, images: Images, size: int) -> Any:
    """This process's share of images, not augmented, in batches on the device."""
    recipe, processes = job.scale.recipe, job.processes
    resize = max(recipe.eval_resize or size, size)
    samples = loading.Samples(images, evaluation_transform(size, resize))
    batch = max(recipe.batch_size // processes.world, 1)
    shares = loading.shares(len(samples), batch, processes.rank, processes.world)
    pin = processes.device.type == "cuda"
    loaded = loading.loader(samples, shares, workers=min(job.workers, 4), pin=pin)
    return loading.on_device(loaded, processes.device)


def trained(job: Job, variant: Variant, run: Run) -> nn.Module:
    """The network of a run that came to its end, with its weights, in evaluation mode."""
    from safetensors.torch import load_file

    model = variant.make(job.scale, job.source, run.seed, job.impl, job.processes.device)
    model.load_state_dict(load_file(job.folder / run.folder / loop.FINAL))
    return model.eval()


def every(job: Job, variants: Sequence[Variant]) -> dict[str, list[Run]]:
    """Trains all variants with all seeds.

    Args:
        job: how.
        variants: of unlike names.

    Returns:
        The runs of each variant, by its name, seed after seed.
    """
    seeds = range(job.scale.seeds)
    lengths = [_steps(job, variant) for variant in variants]
    total, done = sum(lengths) * len(seeds), 0
    found: dict[str, list[Run]] = {variant.name: [] for variant in variants}
    # Seed by seed: whoever stops early has each network once.
    for seed in seeds:
        for variant, length in zip(variants, lengths, strict=True):
            found[variant.name].append(train(job, variant, seed, done, total))
            done += length
            job.progress(done, total, f"{variant.label} #{seed}")
    return found


def _steps(job: Job, variant: Variant) -> int:
    recipe = job.scale.recipe_of(variant.depth)
    in_epoch = len(job.source.train) // recipe.batch_size
    return recipe.iterations or in_epoch * recipe.epochs


def step_seconds(folder: Path) -> float:
    """How long the steps of a run took, whenever they were taken, without its tests."""
    return sum(line["seconds"] for line in journal.read(folder, journal.TIMING))


def _with_curves(run: Run, folder: Path) -> Run:
    lines = journal.read(folder, journal.METRICS)
    curves = {
        kind: tuple(
            (line["step"], 1 - line["top1"]) for line in lines
            if line["kind"] == kind and line.get("top1") is not None
        )
        for kind in ("train", "test")
    }  # fmt: skip
    return Run(**{
        **asdict(run), "train_curve": curves["train"], "test_curve": curves["test"],
    })  # fmt: skip


def _write(file: Path, run: Run) -> None:
    content = {k: v for k, v in asdict(run).items() if not k.endswith("curve")}
    temporary = file.with_suffix(".part")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def _read(folder: Path) -> Run | None:
    """What came of a run; None where it has not come to its end."""
    try:
        return Run(**json.loads((folder / RESULT).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise settings.TrainingError(
            f"'{folder / RESULT}' cannot be read ({error}); without it the run's last checkpoint "
            "is taken"
        ) from error
