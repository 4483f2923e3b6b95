"""The loop: steps, tests, checkpoints, and how it begins again where it was stopped."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from resnet_fused.data import loading
from resnet_fused.data.augment import evaluation_transform, training_transform
from resnet_fused.data.images import ImageError
from resnet_fused.data.loading import Samples, Steps, seed_of, seeded
from resnet_fused.data.sources import Source
from resnet_fused.train import checkpoint, optimizers
from resnet_fused.train.captured import CapturedStep
from resnet_fused.train.evaluation import evaluate
from resnet_fused.train.journal import METRICS, TIMING, Journal
from resnet_fused.train.network import Normalised
from resnet_fused.train.phases import Phases
from resnet_fused.train.processes import Processes
from resnet_fused.train.settings import Settings, TrainingError
from resnet_fused.train.state import State
from resnet_fused.train.step import Step

GO, STOP, BAD = 0, 1, 2
"""What the processes agree on behind each step: go on, a signal came, the loss is no number."""
BEST, FINAL = "best.safetensors", "model.safetensors"

Progress = Callable[[int, int, str], None]


@dataclass
class Outcome:
    """How a run ended.

    Attributes:
        step: steps that were taken.
        steps: of the whole run.
        test: the last test: images, top1, top5, loss; empty where there was none.
        best: the largest top1 of any test, and its epoch.
        signal: that stopped it; 0: it came to its end.
        skipped: a message on each image that could not be read.
    """

    step: int
    steps: int
    test: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    signal: int = 0
    skipped: list[str] = field(default_factory=list)


class Trainer:
    """One process's part of a run.

    Args:
        settings: of the run.
        source: its data.
        model: of `network.build`, with its first weights.
        processes: that take part.
        run: the folder; only the first process writes there.
        channels: that the model wants.
        progress: called with steps done, all steps, and a text.
    """

    def __init__(
        self, settings: Settings, source: Source, model: nn.Module, processes: Processes,
        run: Path, channels: int, progress: Progress = lambda done, total, text: None,
    ) -> None:  # fmt: skip
        settings.check(source, processes.world)
        self.settings, self.source, self.processes, self.run = settings, source, processes, run
        self.recipe, self.device = settings.recipe, processes.device
        self.progress = progress
        self.state = State(model, settings, processes)
        self.normalised = Normalised(source, channels, self.device)
        self.in_epoch = len(source.train) // self.recipe.batch_size
        self.steps = self.recipe.iterations or self.in_epoch * self.recipe.epochs
        self.epochs = -(-self.steps // self.in_epoch)
        self.outcome = Outcome(0, self.steps)
        self.phases = Phases(self.device)
        self._sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, right, images
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=self.device)
        self._signal = 0
        self._mix = _mixing(self.recipe.loss, len(source.classes))
        self._rate = 0.0
        self._take = self._made_step()

    def train(self) -> Outcome:
        """Runs to the end, or until a signal comes.

        Raises:
            TrainingError: the loss is NaN or Inf, or the checkpoint is of another network.
            CheckpointError: a checkpoint cannot be written, or none can be read.
            ImageError: an image cannot be read, and `on_error` is "stop".
        """
        places = self._restore()
        first = self.processes.first
        with ExitStack() as stack:
            stack.enter_context(self._signals())
            self.journal: Journal | None = None
            if first:
                self.journal = Journal(
                    self.run, places, self.state.step, tensorboard=self.settings.tensorboard
                )
                stack.callback(self.journal.close)
            self._loop(stack.enter_context(closing(self._batches())))
            if first and not self.outcome.signal:
                checkpoint.write_weights(self.run / FINAL, self.state.weights())
            elif self.state.sharded and not self.outcome.signal:
                self.state.weights()
        self.outcome.step = self.state.step
        return self.outcome

    def load(self, seconds: float) -> dict[str, float]:
        """Loads batches and throws them away: how fast the images come without a network.

        Args:
            seconds: how long, at least; the first batch, for which workers start, is not counted.

        Returns:
            images, seconds, images_per_second: of this process.
        """
        count, begun = 0, 0.0
        with closing(self._batches()) as batches:
            for number, (images, _, problems) in enumerate(batches):
                self._skip(problems)
                if self.device.type == "cuda":
                    torch.cuda.current_stream().synchronize()
                now = time.perf_counter()
                if number == 0:
                    begun = now
                    continue
                count += len(images)
                self.progress(count, self.steps * self.recipe.batch_size, "loading")
                if now - begun >= seconds:
                    break
            passed = time.perf_counter() - begun
        return {"images": count, "seconds": passed, "images_per_second": count / passed}

    def _loop(self, batches: Iterator[Any]) -> None:
        state, settings = self.state, self.settings
        self.phases.take()
        while state.step < self.steps:
            self._step(batches)
            ended = state.step % self.in_epoch == 0 or self._done()
            word = self._agree(ended)
            if ended or state.step % settings.log_every == 0:
                self._log()
            if ended:
                self._test()
            due = settings.save_every is not None and state.step % settings.save_every == 0
            if word == STOP or due or (ended and (settings.save_every is None or self._done())):
                self._save()
            if word == STOP:
                return

    def _done(self) -> bool:
        return self.state.step == self.steps

    def _batches(self) -> Generator[Any, None, None]:
        settings, processes = self.settings, self.processes
        transform = training_transform(self.recipe.augmentation, self.recipe.size)
        on_error = "replace" if settings.on_error == "skip" else "leave out"
        samples = Samples(self.source.train, transform, settings.seed, on_error)
        steps = Steps(
            len(samples), self.recipe.batch_size, self.steps, settings.seed,
            processes.rank, processes.world, self.state.step,
        )  # fmt: skip
        batches = loading.loader(
            samples, steps, workers=settings.workers, pin=self.device.type == "cuda"
        )
        return loading.on_device(batches, self.device)

    def _made_step(self) -> Step:
        """A step of the recipe: from bytes, or from what mixing has made of them."""
        state, recipe = self.state, self.recipe
        cross_entropy = nn.CrossEntropyLoss(label_smoothing=recipe.loss.label_smoothing)
        normalise = nn.Identity() if self._mix is not None else self.normalised
        return (CapturedStep if recipe.capture else Step)(
            nn.Sequential(normalise, state.spread),
            lambda logits, targets: cross_entropy(logits.float(), targets),
            state.optimizer, state.scaler, autocast=state.autocast, accumulate=recipe.accumulate,
            clip_norm=recipe.optimizer.clip_norm, together=self._together,
            phase=self.phases.phase,
        )  # fmt: skip

    def _step(self, batches: Iterator[Any]) -> None:
        state, recipe = self.state, self.recipe
        rank = self.processes.rank
        with self.phases.phase("data"):
            images, labels, problems = next(batches)
            self._skip(problems)
            if images is None:
                raise ImageError(f"data: no image can be read; the first: {problems[0]}")
        # What a model draws itself, as for dropout, depends on the step alone.
        seed = seed_of(self.settings.seed, state.step, rank, 2)
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        rate = optimizers.factor(recipe.schedule, state.step, self.in_epoch, self.steps)
        if state.plateau is not None:
            rate *= state.plateau.factor
        self._rate = recipe.optimizer.lr * rate
        optimizers.set_rate(state.optimizer, self._rate)
        state.model.train()
        losses, logits = self._take(*self._mixed(images, labels))
        with self.phases.phase("optimizer"):
            if state.ema is not None:
                state.ema.update_parameters(state.model)
        self._count(losses, logits, labels)
        self.phases.add_images(recipe.batch_size)
        state.step += 1

    def _mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The batch as the step takes it: bytes, or images that are mixed part by part."""
        if self._mix is None:
            return images, labels
        parts, made = self.recipe.accumulate, []
        with self.phases.phase("forward"):
            pairs = zip(images.chunk(parts), labels.chunk(parts), strict=True)
            for part, (some, wanted) in enumerate(pairs):
                with seeded(self.settings.seed, self.state.step, self.processes.rank, part):
                    made.append(self._mix(self.normalised(some), wanted))
            x, targets = (torch.cat(values) for values in zip(*made, strict=True))
            return x.contiguous(memory_format=torch.channels_last), targets

    def _count(self, losses: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Adds a step to the sums."""
        bad = ~torch.isfinite(losses).all() & (self._first_bad < 0)
        self._first_bad = torch.where(bad, self.state.step, self._first_bad)
        self._sums[0] += losses.double().sum() * (len(labels) // len(losses))
        self._sums[1] += (logits.argmax(1) == labels).sum()
        self._sums[2] += len(labels)

    def _autocast(self) -> torch.autocast:
        dtype = self.state.autocast
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    @contextmanager
    def _together(self, last: bool) -> Iterator[None]:
        """Gradients go to the other processes behind a step's last part alone."""
        spread = self.state.spread
        if isinstance(spread, nn.parallel.DistributedDataParallel):
            with nullcontext() if last else spread.no_sync():
                yield
            return
        if self.state.sharded:
            spread.set_requires_gradient_sync(last)  # type: ignore[operator]
        yield

    def _agree(self, ended: bool) -> int:
        """What all processes are to do next.

        Raises:
            TrainingError: the loss is no number.
        """
        # Asking a GPU costs waiting for it: there it is asked where it is waited for anyway.
        asked = (
            self.device.type == "cpu"
            or ended
            or self.state.step % self.settings.log_every == 0
            or self._signal != 0
        )
        bad = int(self._first_bad) if asked else -1
        word = self.processes.most(BAD if bad >= 0 else STOP if self._signal else GO)
        if word == BAD:
            raise self._no_number("the loss is", max(self.processes.gather(bad)))
        if word == STOP:
            self.outcome.signal = self.processes.most(self._signal)
        return word

    def _no_number(self, what: str, step: int) -> TrainingError:
        """What is said of a run that has left the numbers."""
        last = checkpoint.newest(self.run) if self.processes.first else None
        where = f"'{last.path}'" if last is not None else "none was written yet"
        return TrainingError(
            f"{what} NaN or Inf at step {step + 1} of {self.steps} (epoch "
            f"{step // self.in_epoch + 1}); the last good checkpoint: {where}. A smaller lr, "
            "a longer warm-up or another precision may help"
        )

    def _log(self) -> None:
        """A line of metrics and one of timing, on what came since the last ones."""
        loss, right, count = self.processes.sum(self._sums.clone()).tolist()
        self._sums.zero_()
        timing = self.phases.take()
        step, epoch = self.state.step, (self.state.step - 1) // self.in_epoch + 1
        record: dict[str, Any] = {
            "kind": "train", "step": step, "epoch": epoch,
            "lr": self._rate, "loss": loss / count,
        }  # fmt: skip
        if self._mix is None:
            record["top1"] = right / count
        if self.journal is not None:
            self.journal.write(METRICS, record)
            self.journal.write(TIMING, {"kind": "time", "step": step, "epoch": epoch, **timing})
        rest = (self.steps - step) / max(timing["images_per_second"], 1e-9)
        self.progress(
            step, self.steps,
            f"epoch {epoch}/{self.epochs}  loss {record['loss']:.4f}  "
            f"{timing['images_per_second']:.1f} images/s  "
            f"{rest * self.recipe.batch_size / 60:.1f} min left",
        )  # fmt: skip

    def _test(self) -> None:
        """Tests the network on all images that it does not learn from."""
        recipe, processes, source = self.recipe, self.processes, self.source
        model = self.state.tested
        if not self.state.sharded:
            processes.agree_on_buffers(model)
        size = recipe.eval_size or recipe.size
        samples = Samples(source.val, evaluation_transform(size, recipe.eval_resize))
        batch = max(recipe.batch_size // processes.world, 1)
        batches = loading.shares(len(samples), batch, processes.rank, processes.world)
        model.eval()
        most, calls = processes.most(len(batches)), 0

        def forward(images: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            with self._autocast():
                return model(self.normalised(images))

        loaded = loading.loader(
            samples, batches, workers=min(self.settings.workers, 4), pin=self.device.type == "cuda"
        )

        def fill() -> None:
            # Every call is everyone's: who has fewer images would be waited for without end.
            idle = torch.zeros(1, source.channels, size, size, dtype=torch.uint8)
            for _ in range(most - calls if self.state.sharded else 0):
                forward(idle.to(self.device))

        score, problems = evaluate(
            forward,
            loading.on_device(loaded, self.device),
            len(source.classes), self.device, processes.sum, ended=fill,
        )  # fmt: skip
        self._skip(problems)
        epoch = -(-self.state.step // self.in_epoch)
        self.outcome.test = score.record()
        if self.state.plateau is not None:
            self.state.plateau.tested(1 - self.outcome.test["top1"])
        better = score.record()["top1"] > self.outcome.best.get("top1", -1.0)
        if better and math.isfinite(score.loss):
            self.outcome.best = {"top1": score.record()["top1"], "epoch": epoch}
            weights = self.state.weights()
            if processes.first:
                checkpoint.write_weights(self.run / BEST, weights)
        if self.journal is not None:
            self.journal.write(
                METRICS,
                {"kind": "test", "step": self.state.step, "epoch": epoch, **score.record()},
            )
        self.phases.take()  # a test's time is no step's

    def _save(self) -> None:
        sums = self.processes.gather(self._sums.tolist())
        counters = {
            "sums": sums,
            "places": self.journal.places() if self.journal is not None else {},
            "test": self.outcome.test,
            "best": self.outcome.best,
            "skipped": sorted(set(self.outcome.skipped)),
        }
        taken = self.state.take_down(counters)
        # A step of a finite loss may have made them, and a GPU's loss is not asked for at each.
        if self.processes.most(GO if _finite(taken) else BAD) == BAD:
            raise self._no_number("the weights are", self.state.step - 1)
        if self.processes.first:
            checkpoint.save(self.run, taken, self.settings.keep)
        self.processes.wait()

    def _restore(self) -> dict[str, int]:
        """Goes on from the last whole checkpoint, if there is one; how long the files were."""
        found = checkpoint.newest(self.run) if self.processes.first else None
        found = self.processes.share(found)
        if found is None:
            return {}
        counters = self.state.restore(found)
        sums = counters["sums"]
        if len(sums) == self.processes.world:
            own = sums[self.processes.rank]
        else:  # other processes than before: the first one takes what there is
            own = [sum(column) for column in zip(*sums, strict=True)]
            own = own if self.processes.first else [0.0] * len(own)
        self._sums.copy_(torch.tensor(own, dtype=torch.float64))
        self.outcome.test, self.outcome.best = counters["test"], counters["best"]
        self.outcome.skipped = list(counters["skipped"])
        return counters["places"]

    def _skip(self, problems: list[str]) -> None:
        """Remembers images that could not be read.

        Raises:
            ImageError: none is to be skipped.
        """
        if problems and self.settings.on_error == "stop":
            raise ImageError(problems[0])
        seen = self.outcome.skipped
        seen += [problem for problem in dict.fromkeys(problems) if problem not in seen]

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C end the run behind the step; a second one ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (int(signal.SIGTERM), int(signal.SIGINT))
        before = {number: signal.getsignal(number) for number in numbers}

        def stop(number: int, frame: Any) -> None:
            self._signal = number
            signal.signal(number, before[number])

        for number in before:
            signal.signal(number, stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _finite(taken: checkpoint.Checkpoint) -> bool:
    """Whether all weights of a checkpoint, and their averages, are numbers."""
    tensors = [*taken.model.values(), *(taken.ema or {}).values()]
    return all(bool(torch.isfinite(value).all()) for value in tensors)


def _mixing(loss: Any, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """Mixup, CutMix, one of the two, or None."""
    ways: list[Any] = []
    if loss.mixup:
        ways.append(v2.MixUp(alpha=loss.mixup, num_classes=classes))
    if loss.cutmix:
        ways.append(v2.CutMix(alpha=loss.cutmix, num_classes=classes))
    if not ways:
        return None
    return ways[0] if len(ways) == 1 else v2.RandomChoice(ways)
