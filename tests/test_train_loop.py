"""The loop: it learns, goes on as if nothing had happened, and stops where it must."""

from __future__ import annotations

import math
import os
import signal

import pytest
import torch
import train_runs as runs
from safetensors.torch import load_file
from torch.testing import assert_close

import resnet_fused as rf
from resnet_fused.data.images import ImageError
from resnet_fused.data.sources import Source, open_source
from resnet_fused.train import checkpoint, journal
from resnet_fused.train.loop import BEST, FINAL, Trainer
from resnet_fused.train.settings import TrainingError


def metrics(run):
    return (run / journal.METRICS).read_bytes()


def weights(run):
    return load_file(run / FINAL)


def test_it_learns_and_writes_it_down(tmp_path):
    outcome = runs.train(tmp_path, runs.settings(runs.recipe(epochs=12)))
    assert outcome.test["top1"] == 1.0
    lines = journal.read(tmp_path, journal.METRICS)
    steps = [line for line in lines if line["kind"] == "train"]
    tests = [line for line in lines if line["kind"] == "test"]
    assert [line["step"] for line in steps] == list(range(1, 49))
    assert [line["epoch"] for line in tests] == list(range(1, 13))
    assert steps[-1]["loss"] < steps[0]["loss"] / 3
    assert {line["images"] for line in tests} == {13}
    assert outcome.best["top1"] == max(line["top1"] for line in tests)
    timing = journal.read(tmp_path, journal.TIMING)
    assert len(timing) == 48
    parts = ("data", "forward", "backward", "optimizer")
    assert all(0 < sum(line[p] for p in parts) <= line["seconds"] for line in timing)
    assert set(weights(tmp_path)) == set(runs.network().state_dict())
    assert (tmp_path / BEST).exists()


def test_the_weights_are_those_that_were_tested(tmp_path):
    outcome = runs.train(tmp_path)
    model = runs.network()
    model.load_state_dict(weights(tmp_path))
    trainer = runs.trainer(tmp_path / "other", model=model)
    trainer.state.step = trainer.steps
    trainer.journal = None
    trainer._test()
    assert trainer.outcome.test == outcome.test


def test_a_run_of_iterations_ends_with_a_test_within_its_epoch(tmp_path):
    outcome = runs.train(tmp_path, TESTED)
    lines = journal.read(tmp_path, journal.METRICS)
    assert [line["epoch"] for line in lines if line["kind"] == "test"] == [1, 2, 3]
    assert (outcome.step, outcome.steps, lines[-1]["step"]) == (11, 11, 11)
    # No test's error falls by 1: from the second one on each halves the rate.
    rates = [line["lr"] for line in lines if line["kind"] == "train"]
    assert rates[4:8] == [0.05] * 4 and rates[8:] == [0.025] * 3


class Killed(Exception):
    """Stands for a kill -9: nothing of the process's is run any more."""


def until(monkeypatch, step):
    """Steps end with an exception behind this one."""
    take = Trainer._step

    def stepping(self, batches):
        if self.state.step == step:
            raise Killed
        take(self, batches)

    monkeypatch.setattr(Trainer, "_step", stepping)


PLAIN = runs.settings(save_every=3)
RICH = runs.settings(
    runs.recipe(
        ema=0.8, accumulate=2, precision="bfloat16",
        loss={"mixup": 0.4, "cutmix": 0.7, "label_smoothing": 0.1},
        optimizer={"name": "adamw", "lr": 0.01, "clip_norm": 1.0, "decay_all": False},
    ),
    save_every=3, log_every=4, workers=1,
)  # fmt: skip
# A factor of the rate that tests decide, and an end within an epoch.
TESTED = runs.settings(
    runs.recipe(
        iterations=11, schedule={"name": "plateau", "patience": 0, "threshold": 1.0, "gamma": 0.5}
    ),
    save_every=3,
)


@pytest.mark.parametrize("told", [PLAIN, RICH, TESTED], ids=["plain", "rich", "tested"])
@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_a_run_that_was_killed_goes_on_bit_for_bit(tmp_path, monkeypatch, told, backend):
    with rf.backend(backend):
        runs.train(tmp_path / "whole", told)
        for stop in (2, 4, 8):
            with monkeypatch.context() as patched:
                until(patched, stop)
                with pytest.raises(Killed):
                    runs.train(tmp_path / "parts", told)
        outcome = runs.train(tmp_path / "parts", told)
    assert outcome.step == (told.recipe.iterations or 12)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_a_checkpoint_that_was_cut_short_is_passed_over(tmp_path, monkeypatch, caplog):
    runs.train(tmp_path / "whole", PLAIN)
    with monkeypatch.context() as patched:
        until(patched, 8)
        with pytest.raises(Killed):
            runs.train(tmp_path / "parts", PLAIN)
    file = checkpoint._folders(tmp_path / "parts")[0] / checkpoint.MODEL
    os.truncate(file, file.stat().st_size // 2)
    runs.train(tmp_path / "parts", PLAIN)
    assert "the one before it is taken" in caplog.text
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_behind_the_step(tmp_path, monkeypatch, number):
    take = Trainer._step

    def stepping(self, batches):
        if self.state.step == 4:
            os.kill(os.getpid(), number)
        take(self, batches)

    runs.train(tmp_path / "whole", runs.settings())
    before = signal.getsignal(number)
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_step", stepping)
        outcome = runs.train(tmp_path / "parts", runs.settings())
    assert (outcome.signal, outcome.step) == (number, 5)
    assert signal.getsignal(number) is before
    assert checkpoint.newest(tmp_path / "parts").step == 5
    assert not (tmp_path / "parts" / FINAL).exists()
    assert runs.train(tmp_path / "parts", runs.settings()).signal == 0
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


def test_a_loss_that_is_no_number_ends_the_run(tmp_path, monkeypatch):
    told = runs.settings(save_every=2)
    take = Trainer._step

    def stepping(self, batches):
        if self.state.step == 4:
            with torch.no_grad():
                self.state.model.fc.weight[0, 0] = math.nan
        take(self, batches)

    monkeypatch.setattr(Trainer, "_step", stepping)
    with pytest.raises(TrainingError) as error:
        runs.train(tmp_path, told)
    text = str(error.value)
    assert "NaN or Inf at step 5 of 12 (epoch 2)" in text
    assert "step-00000004" in text
    saved = checkpoint.newest(tmp_path)
    assert saved.step == 4
    assert all(torch.isfinite(value).all() for value in saved.model.values())


def test_weights_that_are_no_numbers_are_never_saved(tmp_path, monkeypatch):
    take = Trainer._step

    def stepping(self, batches):
        take(self, batches)
        if self.state.step == 4:  # the loss of this step was a number
            with torch.no_grad():
                self.state.model.fc.weight[0, 0] = math.inf

    monkeypatch.setattr(Trainer, "_step", stepping)
    with pytest.raises(TrainingError, match=r"the weights are NaN or Inf at step 4 .*00000002"):
        runs.train(tmp_path, runs.settings(save_every=2))
    assert [checkpoint.read(f).step for f in checkpoint._folders(tmp_path)] == [2]
    # The test behind the epoch came first: its loss is no number, its line is JSON all the same.
    last = journal.read(tmp_path, journal.METRICS)[-1]
    assert (last["kind"], last["loss"]) == ("test", None)
    assert not (tmp_path / BEST).exists()


def test_when_no_image_can_be_read_it_says_so(tmp_path):
    folder = runs.picture_folder(tmp_path / "data")
    for file in (folder / "train").rglob("*.png"):
        file.write_bytes(b"no picture")
    data = open_source(f"imagefolder:{folder}")
    told = runs.settings(runs.recipe(batch_size=4), on_error="skip")
    with pytest.raises(ImageError, match="no image can be read; the first: image: "):
        runs.trainer(tmp_path / "run", told, data=data).train()


def test_parts_of_a_batch_make_the_step_of_the_whole(tmp_path):
    # With frozen statistics a batch is the sum of its parts.
    found = []
    for parts in (1, 3):
        model = runs.network().double()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.train = lambda mode=True, module=module: module
                module.training = False
        told = runs.settings(runs.recipe(accumulate=parts, epochs=1))
        trainer = runs.trainer(tmp_path / str(parts), told, model=model)
        trainer.normalised.double()
        trainer.train()
        found.append(model.state_dict())
    for key, value in found[0].items():
        assert_close(found[1][key], value, rtol=1e-4, atol=1e-6)


def test_the_average_is_what_is_tested(tmp_path):
    told = runs.settings(runs.recipe(ema=0.9))
    trainer = runs.trainer(tmp_path, told)
    first = {key: value.clone() for key, value in trainer.state.model.state_dict().items()}
    trainer.train()
    average, last = weights(tmp_path), trainer.state.model.state_dict()
    key = "layer1.0.conv1.weight"
    moved = (average[key] - first[key]).norm() / (last[key] - first[key]).norm()
    assert 0.1 < moved < 0.95


def test_eager_and_fused_agree_step_by_step(tmp_path):
    lines = {}
    for impl, backend in (("eager", "auto"), ("fused", "cpu")):
        told = runs.settings(runs.recipe(epochs=2), impl=impl)
        with rf.backend(backend):
            trainer = runs.trainer(tmp_path / impl, told)
            trainer.train()
        lines[impl] = journal.read(tmp_path / impl, journal.METRICS)
    for eager, fused in zip(lines["eager"], lines["fused"], strict=True):
        assert fused.keys() == eager.keys()
        assert fused["loss"] == pytest.approx(eager["loss"], rel=2e-3)
    assert metrics(tmp_path / "eager") != metrics(tmp_path / "fused"), "the nodes were not taken"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 51}, ["batch_size is 51", "50 images"]),
        ({"accumulate": 5}, ["batch_size is 12", "accumulate=5"]),
    ],
)
def test_what_does_not_fit_together_is_refused(tmp_path, changes, words):
    with pytest.raises(TrainingError) as error:
        runs.trainer(tmp_path, runs.settings(runs.recipe(**changes)))
    assert all(word in str(error.value) for word in words)


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    runs.train(tmp_path, runs.settings(runs.recipe(epochs=1)))
    (tmp_path / FINAL).unlink()
    other = rf.models.CifarResNet(14, 4, 1)
    with pytest.raises(TrainingError, match="is of another network or optimizer"):
        runs.train(tmp_path, model=other)


def test_float16_scales_its_loss(tmp_path):
    trainer = runs.trainer(tmp_path, runs.settings(runs.recipe(precision="float16", epochs=1)))
    assert trainer.state.scaler.is_enabled()
    trainer.train()
    found = checkpoint.newest(tmp_path)
    assert found.state["scaler"]["scale"] > 1


def test_two_tests_of_one_class_of_images(tmp_path):
    data = runs.source(val=1)
    single = Source("one", data.train, data.val, data.classes, data.mean, data.std, 8)
    outcome = runs.train(tmp_path, data=single)
    assert outcome.test["images"] == 1
