"""A captured training step: the numbers of the ordinary one, and what makes it capture anew.

A stand-in captures and replays on the CPU (`graph_standins`); with a GPU the same is asked of CUDA.
"""

from __future__ import annotations

import copy
import logging

import graph_standins
import pytest
import torch
import train_runs as runs
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import resnet_fused as rf
from resnet_fused.train import CapturedStep, captured, journal
from resnet_fused.train.journal import METRICS
from resnet_fused.train.loop import FINAL
from resnet_fused.train.step import Step, start_momentum

CLASSES = 4
OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, 0.05, momentum=0.9, nesterov=True, fused=True),
    "sgd, damped": lambda ps: torch.optim.SGD(ps, 0.05, momentum=0.9, dampening=0.1, fused=True),
    "adamw": lambda ps: torch.optim.AdamW(ps, 0.01, weight_decay=0.1, fused=True),
}


class Net(nn.Module):
    """A residual network of 8 layers with dropout in front of its classifier."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.body, self.dropout = runs.network(CLASSES), nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self.dropout(x))


def scaler_of(enabled: bool):
    # Its scale overflows float32's gradients at once, and grows again behind two good steps.
    return torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2) if enabled else None


def batch(step: int, images: int = 8, bad: bool = False):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(images, 1, 8, 8, generator=generator)
    if bad:
        x[0, 0, 0, 0] = torch.inf
    labels = torch.randint(CLASSES, (images,), generator=generator)
    return x.contiguous(memory_format=torch.channels_last), labels


class Run:
    """A model, its optimizer and scaler, and the step that trains it."""

    def __init__(self, kind, optimizer="sgd", scaled=False, dropout=0.0, **options) -> None:
        self.model = Net(dropout)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.scaler = scaler_of(scaled)
        self.step = kind(self.model, F.cross_entropy, self.optimizer, self.scaler, **options)

    def tensors(self) -> list[torch.Tensor]:
        """All that a step changes."""
        found = [*self.model.parameters(), *self.model.buffers()]
        for values in self.optimizer.state.values():
            found += [t for t in values.values() if isinstance(t, torch.Tensor)]
        if self.scaler is not None and self.scaler._scale is not None:
            found += [self.scaler._scale, self.scaler._growth_tracker]
        return found

    def take(self, step: int, *, rate: float | None = None, **given):
        for group in self.optimizer.param_groups:
            group["lr"] = 0.05 / (step + 1) if rate is None else rate
        torch.manual_seed(step)
        return self.step(*batch(step, **given))


def stand_in(run: Run) -> graph_standins.StandInGraphs:
    run.step._driver = graph_standins.StandInGraphs(run.tensors)
    return run.step._driver


def pair(**options) -> tuple[Run, Run, graph_standins.StandInGraphs]:
    """The same run twice: ordinary steps, and captured ones."""
    # A float32 rate is what the captured step works with.
    plain, graphed = Run(Step, **options), Run(CapturedStep, **options)
    return plain, graphed, stand_in(graphed)


def float32(rate: float) -> torch.Tensor:
    return torch.tensor(rate)


def same(plain: Run, graphed: Run) -> None:
    for mine, other in zip(graphed.tensors(), plain.tensors(), strict=True):
        assert_close(mine, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scaled": True},
        {"accumulate": 2, "clip_norm": 0.5},
        {"scaled": True, "clip_norm": 0.5, "autocast": torch.bfloat16},
        {"dropout": 0.3},
    ],
    ids=lambda o: "-".join(o) or "bare",
)
def test_the_numbers_are_those_of_ordinary_steps(optimizer, options):
    plain, graphed, driver = pair(optimizer=optimizer, **options)
    for step in range(7):
        # PyTorch's own momentum is garbage where a damped first step is skipped.
        bad = "scaled" in options and step in ((2, 5) if "damped" in optimizer else (0, 5))
        rate = float32(0.05 / (step + 1))  # another one in each step
        expected = plain.take(step, rate=rate, bad=bad)
        found = graphed.take(step, bad=bad)
        for mine, other in zip(found, expected, strict=True):
            assert_close(mine, other, rtol=0, atol=0, equal_nan=True)
        same(plain, graphed)
        assert all(p.grad is None for p in graphed.model.parameters())
    assert (driver.warm, driver.captured, driver.replayed) == (3, 1, 4)
    assert "captured" in graphed.step.explain()


def test_a_bad_gradient_changes_the_scale_alone_within_the_graph():
    _, run, driver = pair(scaled=True)
    for step in range(5):
        run.take(step)
    assert driver.replayed == 2
    weights = [p.detach().clone() for p in run.model.parameters()]
    momentum = [v["momentum_buffer"].clone() for v in run.optimizer.state.values()]
    scale = run.scaler.get_scale()
    run.take(5, bad=True)
    assert run.scaler.get_scale() == scale / 2
    assert_close(list(run.model.parameters()), weights, rtol=0, atol=0)
    again = [v["momentum_buffer"] for v in run.optimizer.state.values()]
    assert_close(again, momentum, rtol=0, atol=0)
    run.take(6)
    assert not torch.equal(next(run.model.parameters()), weights[0])


def test_momentum_of_a_skipped_first_step_is_not_what_memory_held():
    model = Net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    step = Step(model, F.cross_entropy, optimizer, scaler_of(True))
    step(*batch(0, bad=True))
    for values in optimizer.state.values():
        assert not values["momentum_buffer"].any()


def test_momentum_of_zero_is_pytorchs_first_step():
    runs_ = []
    for start in (start_momentum, lambda optimizer: None):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(7))
        optimizer = torch.optim.SGD([weight], 0.1, momentum=0.9, nesterov=True, fused=True)
        start(optimizer)
        for _ in range(3):
            weight.grad = torch.sin(weight.detach())
            optimizer.step()
        runs_.append(weight.detach())
    assert_close(runs_[0], runs_[1], rtol=0, atol=0)


def test_a_schedule_of_pytorchs_reaches_the_graph():
    _, run, driver = pair()
    schedule = torch.optim.lr_scheduler.StepLR(run.optimizer, 1, gamma=0.1)
    for step in range(4):
        run.step(*batch(step))
        schedule.step()
    before = [p.detach().clone() for p in run.model.parameters()]
    for group in run.optimizer.param_groups:
        group["lr"].fill_(0.0)
    run.step(*batch(9))
    assert driver.replayed == 2
    assert_close(list(run.model.parameters()), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "change",
    [
        lambda run: run.model.body.eval(),
        lambda run: next(run.model.parameters()).requires_grad_(False),
        lambda run: run.optimizer.param_groups[0].update(momentum=0.5),
    ],
    ids=["a module in evaluation", "a frozen parameter", "another momentum"],
)
def test_a_changed_setting_is_captured_anew(change):
    plain, graphed, driver = pair()
    for step in range(10):
        if step == 5:
            change(plain)
            change(graphed)
        plain.take(step, rate=float32(0.05 / (step + 1)))
        graphed.take(step)
        same(plain, graphed)
    assert (driver.warm, driver.captured) == (6, 2)


@pytest.mark.parametrize("what", ["weights", "optimizer"])
def test_memory_that_moved_is_captured_anew_at_once(what):
    plain, graphed, driver = pair()
    for step in range(8):
        if step == 5:
            for run in (plain, graphed):
                if what == "weights":
                    weight = next(run.model.parameters())
                    weight.data = weight.data.clone()
                else:
                    run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
        plain.take(step, rate=float32(0.05 / (step + 1)))
        graphed.take(step)
        same(plain, graphed)
    assert (driver.warm, driver.captured) == (3, 2)


def test_each_shape_has_a_graph_and_the_oldest_is_forgotten(monkeypatch):
    monkeypatch.setattr(captured, "MOST", 2)
    plain, graphed, driver = pair()
    for step, images in enumerate((8, 4, 8, 4, 8, 4, 8, 4, 8, 4, 6, 6, 6, 6, 8)):
        plain.take(step, rate=float32(0.05 / (step + 1)), images=images)
        graphed.take(step, images=images)
        same(plain, graphed)
    assert driver.captured == 4  # that of 8 images twice
    assert len(graphed.step._graphs) == 2


def test_evaluation_between_replays_sees_the_new_weights():
    """A replay runs no Python, and what caches folded weights goes by versions."""
    _, graphed, driver = pair()
    x = batch(99)[0]
    seen = []
    for step in range(7):
        graphed.model.train()
        graphed.take(step)
        graphed.model.eval()
        with torch.no_grad():
            seen.append((graphed.model(x), rf.unfuse(copy.deepcopy(graphed.model))(x)))
    assert driver.replayed == 4
    for fused, plain in seen:
        assert_close(fused, plain, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(seen[-1][0], seen[-2][0])


HOOKS = {
    "a module": lambda run: run.model.dropout.register_forward_hook(lambda *a: None),
    "the model": lambda run: run.model.register_full_backward_hook(lambda *a: None),
    "a parameter": lambda run: next(run.model.parameters()).register_hook(lambda g: g),
    "an accumulated gradient": lambda run: next(
        run.model.parameters()
    ).register_post_accumulate_grad_hook(lambda p: None),
    "the optimizer": lambda run: run.optimizer.register_step_post_hook(lambda *a: None),
}


@pytest.mark.parametrize("where", HOOKS)
def test_what_a_replay_would_not_run_is_no_graph(where, caplog):
    _, run, driver = pair()
    handle = HOOKS[where](run)
    with caplog.at_level(logging.WARNING, "resnet_fused.train"):
        for step in range(5):
            run.take(step)
    assert driver.captured == 0
    assert "hook" in run.step.explain()
    assert len(caplog.records) == 1
    handle.remove()
    run.take(5)
    assert "before it is captured" in run.step.explain()


@pytest.mark.parametrize("world", [1, 2])
def test_several_processes_are_no_graph(world, monkeypatch, caplog):
    """One that is alone in its group is captured."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world)
    plain, run, driver = pair()
    with caplog.at_level(logging.WARNING, "resnet_fused.train"):
        for step in range(5):
            plain.take(step, rate=float32(0.05 / (step + 1)))
            run.take(step)
    same(plain, run)
    assert (driver.captured, len(caplog.records)) == ((1, 0) if world == 1 else (0, 1))
    assert ("several processes exchange gradients" in run.step.explain()) == (world == 2)


def test_gradients_that_are_reduced_are_no_graph(tmp_path):
    """By one process, too: DistributedDataParallel's collectives are there all the same."""
    where = f"file://{tmp_path / 'meet'}"
    torch.distributed.init_process_group("gloo", init_method=where, rank=0, world_size=1)
    try:
        run = Run(CapturedStep)
        run.step.model = nn.parallel.DistributedDataParallel(run.model)
        driver = stand_in(run)
        for step in range(5):
            run.take(step)
    finally:
        torch.distributed.destroy_process_group()
    assert driver.captured == 0
    assert "DistributedDataParallel reduces gradients" in run.step.explain()


def test_an_optimizer_of_plain_numbers_is_no_graph():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step = CapturedStep(model, F.cross_entropy, optimizer)
    step(*batch(0))
    assert "fused=True" in step.explain()
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_the_cpu_runs_ordinary_steps_and_says_so(caplog):
    plain, run = Run(Step), Run(CapturedStep)
    with caplog.at_level(logging.WARNING, "resnet_fused.train"):
        for step in range(5):
            plain.take(step, rate=float32(0.05 / (step + 1)))
            run.take(step)
    same(plain, run)
    assert "CUDA graphs are of a GPU" in run.step.explain()
    assert len(caplog.records) == 1


def test_a_capture_that_fails_goes_on_by_ordinary_steps(caplog):
    plain, graphed, driver = pair(scaled=True, clip_norm=1.0)

    def broken(run):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    driver.capture = broken
    for step in range(6):
        plain.take(step, rate=float32(0.05 / (step + 1)))
        graphed.take(step)
        same(plain, graphed)
    assert "no graph: CUDA error" in graphed.step.explain()
    assert "more" not in graphed.step.explain()


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_what_a_broken_capture_left_in_scaler_and_optimizer_is_gone(clip_norm):
    plain, graphed, driver = pair(scaled=True, clip_norm=clip_norm)

    def broken(run):
        state = [t.detach().clone() for t in graphed.tensors()]

        def step():
            raise RuntimeError("broke off")

        graphed.optimizer.step = step
        try:
            run()
        finally:
            del graphed.optimizer.step
            for t, was in zip(graphed.tensors(), state, strict=True):
                t.data.copy_(was)

    driver.capture = broken
    for step in range(6):
        plain.take(step, rate=float32(0.05 / (step + 1)))
        graphed.take(step)
        same(plain, graphed)


def test_what_a_step_returned_outlives_the_next_one():
    _, run, _ = pair()
    kept = [run.take(step) for step in range(6)]
    copies = [[t.clone() for t in taken] for taken in kept]
    run.take(6)
    assert_close([list(taken) for taken in kept], copies, rtol=0, atol=0)


def test_parts_add_up_to_the_gradient_of_the_whole_batch():
    weights = []
    for parts in (1, 4):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        step = Step(model, F.cross_entropy, optimizer, accumulate=parts)
        losses, output = step(*batch(0))
        assert losses.shape == (parts,)
        assert output.shape == (8, CLASSES)
        weights.append((losses.mean(), output, list(model.parameters())))
    assert_close(*weights)


def test_in_a_capture_of_the_callers_it_is_an_ordinary_step():
    _, run, driver = pair()
    driver.own_capture = True
    for step in range(5):
        run.take(step)
    assert (driver.warm, driver.captured) == (0, 0)
    assert "the caller captures" in run.step.explain()


@pytest.mark.parametrize(
    ("options", "words"),
    [({"accumulate": 0}, "accumulate is 0"), ({"warmup": 0}, "warmup is 0")],
)
def test_options_that_make_no_sense_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Run(CapturedStep, **options)


def test_a_batch_that_cannot_be_divided_is_refused():
    with pytest.raises(ValueError, match="a multiple of accumulate=3"):
        Run(CapturedStep, accumulate=3).take(0)


# ------------------------------------------------------------------ runs


RECIPES = {
    "plain": {},
    "mixed and averaged": {"loss": {"mixup": 0.2}, "ema": 0.8, "accumulate": 2},
    "clipped, in bfloat16": {
        "optimizer": {"name": "adamw", "lr": 0.01, "clip_norm": 0.5}, "precision": "bfloat16",
    },
}  # fmt: skip


@pytest.mark.parametrize("changes", RECIPES.values(), ids=RECIPES)
def test_a_run_with_graphs_learns_what_one_without_does(tmp_path, changes):
    told = runs.settings(runs.recipe(capture=True, **changes))
    files = []
    for name in ("without", "with"):
        trainer = runs.trainer(tmp_path / name, told)
        if name == "with":
            driver = graph_standins.StandInGraphs(lambda t=trainer: list(t._take._tensors()))
            trainer._take._driver = driver
        trainer.train()
        files.append([(tmp_path / name / file).read_bytes() for file in (METRICS, FINAL)])
    assert files[0] == files[1]
    assert (driver.warm, driver.captured, driver.replayed) == (3, 1, 9)
    first = journal.read(tmp_path / "with", METRICS)[0]
    assert 0.7 < first["loss"] < 2.3  # of four classes, log 4, whatever the parts
    timing = journal.read(tmp_path / "with", journal.TIMING)
    assert [line["replay"] > 0 for line in timing] == [False] * 3 + [True] * 9


def test_a_run_with_graphs_that_was_stopped_goes_on_as_if_it_had_not(tmp_path):
    told = runs.settings(runs.recipe(capture=True), save_every=5)
    runs.train(tmp_path / "whole", told)
    run = tmp_path / "stopped"
    for stop in (True, False):
        trainer = runs.trainer(run, told)
        trainer._take._driver = graph_standins.StandInGraphs(
            lambda t=trainer: list(t._take._tensors())
        )
        if stop:
            trainer.steps = 5
            trainer._done = lambda: False
            trainer._test = lambda: None
        trainer.train()
    assert (run / FINAL).read_bytes() == (tmp_path / "whole" / FINAL).read_bytes()


def test_lars_is_not_captured_and_the_run_says_so(tmp_path, caplog):
    pytest.importorskip("timm")
    made = runs.recipe(capture=True, epochs=1, optimizer={"name": "lars", "lr": 0.05})
    with caplog.at_level(logging.WARNING, "resnet_fused.train"):
        runs.train(tmp_path, runs.settings(made))
    assert "Lars was not made with fused=True" in caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_on_a_gpu_a_replay_gives_the_bits_of_an_ordinary_step(optimizer, dtype):
    torch.use_deterministic_algorithms(True)
    try:
        made = []
        for kind in (Step, CapturedStep):
            torch.manual_seed(0)
            model = rf.models.resnet18(num_classes=CLASSES).cuda().train()
            model = model.to(memory_format=torch.channels_last)
            opt = OPTIMIZERS[optimizer](model.parameters())
            scaler = torch.amp.GradScaler("cuda", enabled=dtype is torch.float16)
            step = kind(model, F.cross_entropy, opt, scaler, autocast=dtype, accumulate=2)
            for group in opt.param_groups:
                group["lr"] = torch.tensor(group["lr"], device="cuda")
            losses = []
            for number in range(8):
                torch.cuda.manual_seed(number)
                generator = torch.Generator().manual_seed(number)
                x = torch.randn(8, 3, 64, 64, generator=generator).cuda()
                labels = torch.randint(CLASSES, (8,), generator=generator).cuda()
                losses.append(step(x, labels).losses)
            made.append((losses, list(model.parameters()), list(model.buffers())))
        assert "captured" in step.explain()
        assert_close(made[1], made[0], rtol=0, atol=0)
    finally:
        torch.use_deterministic_algorithms(False)
