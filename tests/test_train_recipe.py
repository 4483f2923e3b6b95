"""Recipes: what they may say, what is said of those that cannot be used, the learning rate."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import train_runs as runs
from torch import nn

from resnet_fused.train import optimizers, recipe


@pytest.mark.parametrize("name", recipe.names())
def test_every_recipe_of_the_package_reads(name):
    made = recipe.read(name)
    assert made.epochs > 0
    assert made == recipe.Recipe.model_validate(made.model_dump())


def test_there_are_recipes_for_each_kind_of_data():
    assert {"digits", "cifar", "imagenet"} <= set(recipe.names())


def test_entries_are_changed_by_their_path(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text("epochs = 7\n[optimizer]\nname = 'adamw'\nlr = 0.001\n")
    made = recipe.read(
        str(file),
        ["optimizer.lr=0.5", "augmentation.policy=augmix", "ema=0.9", "schedule.milestones=[1,2]"],
    )
    assert (made.epochs, made.optimizer.name, made.optimizer.lr) == (7, "adamw", 0.5)
    assert (made.augmentation.policy, made.ema) == ("augmix", 0.9)
    assert made.schedule.milestones == (1, 2)
    assert recipe.read(str(file), ["ema=0.9", "ema=none"]).ema is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["epocs=1"], ["epocs", "accepted", "epochs"]),
        (["optimizer.rate=1"], ["optimizer.rate", "momentum"]),
        (["epochs=0"], ["epochs is 0", "greater than or equal to 1"]),
        (["epochs=many"], ["epochs is 'many'"]),
        (["optimizer.name=adam"], ["optimizer.name is 'adam'", "sgd", "lars", "adamw"]),
        (["epochs"], ["entry=value", "epochs"]),
        (["=1"], ["entry=value"]),
        (["epochs.more=1"], ["epochs", "no entries"]),
        (["loss.label_smoothing=1"], ["label_smoothing"]),
    ],
)
def test_what_cannot_be_used_is_named(changes, words):
    with pytest.raises(recipe.RecipeError) as error:
        recipe.read("digits", changes)
    assert all(word in str(error.value) for word in words), error.value


def test_no_such_recipe_and_no_toml(tmp_path):
    with pytest.raises(recipe.RecipeError, match="'digit' is neither a file nor one of .*digits"):
        recipe.read("digit")
    (tmp_path / "x.toml").write_text("epochs = = 3")
    with pytest.raises(recipe.RecipeError, match="no TOML"):
        recipe.read(str(tmp_path / "x.toml"))


def factors(in_epoch=4, epochs=6, **entries):
    schedule = recipe.Schedule(**entries)
    steps = in_epoch * epochs
    return [optimizers.factor(schedule, step, in_epoch, steps) for step in range(steps)]


def test_a_cosine_falls_from_one_to_its_end():
    found = factors(name="cosine", final=0.1)
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * i / 24)) / 2 for i in range(24)]
    assert found == pytest.approx(expected)


def test_steps_are_taken_at_the_milestones():
    found = factors(name="step", milestones=(2, 4), gamma=0.1)
    assert found == pytest.approx([1.0] * 8 + [0.1] * 8 + [0.01] * 8)


def test_a_warm_up_rises_in_a_line_and_never_beyond():
    found = factors(name="constant", warmup_epochs=2, warmup_start=0.2)
    rise = [b - a for a, b in itertools.pairwise(found[:9])]
    assert rise == pytest.approx([0.8 / 9] * 8)
    assert found[8:] == [1.0] * 16
    assert max(factors(name="cosine", warmup_epochs=2)) <= 1


def test_milestones_and_warm_up_in_steps():
    found = factors(name="step", milestone_steps=(9, 20), milestones=(4,), gamma=0.1)
    assert found == pytest.approx([1.0] * 9 + [0.1] * 7 + [0.01] * 4 + [0.001] * 4)
    found = factors(name="constant", warmup="constant", warmup_steps=3, warmup_start=0.1)
    assert found == [0.1] * 3 + [1.0] * 21


def test_a_plateau_divides_the_rate():
    rule = optimizers.Plateau(recipe.Schedule(name="plateau", patience=2, threshold=0.01))
    found = []
    for error in (0.5, 0.4, 0.4, 0.395, 0.41, 0.3, 0.3, 0.3, 0.3):
        rule.tested(error)
        found.append(rule.factor)
    # Three tests behind 0.4 fell by less than 0.01; three behind 0.3 as well.
    assert found == pytest.approx([1.0] * 4 + [0.1] * 4 + [0.01])
    again = optimizers.Plateau(recipe.Schedule(name="plateau", patience=2, threshold=0.01))
    again.load_state_dict(rule.state_dict())
    for _ in range(3):
        rule.tested(0.3)
        again.tested(0.3)
    assert again.factor == rule.factor == pytest.approx(1e-3)


def test_the_paper_s_recipes_are_the_paper_s():
    imagenet, cifar, deep = (recipe.read(f"paper_{n}") for n in ("imagenet", "cifar", "cifar110"))
    for made in (imagenet, cifar, deep):
        told = made.optimizer
        assert (told.name, told.lr, told.momentum, told.weight_decay) == ("sgd", 0.1, 0.9, 1e-4)
        assert told.decay_all and not told.nesterov
    assert (imagenet.batch_size, imagenet.iterations) == (256, 600_000)
    assert imagenet.schedule.name == "plateau" and imagenet.augmentation.sides == (256, 480)
    assert (cifar.batch_size, cifar.iterations, cifar.augmentation.padding) == (128, 64_000, 4)
    rates = [
        [round(optimizers.factor(made.schedule, step, 390, 64_000), 9) for step in range(64_000)]
        for made in (cifar, deep)
    ]
    assert rates[0] == [1.0] * 32_000 + [0.1] * 16_000 + [0.01] * 16_000
    assert rates[1] == [0.1] * 400 + rates[0][400:]


def test_epochs_that_are_asked_for_stand_in_for_iterations():
    assert recipe.read("paper_cifar", ["epochs=3"]).iterations is None
    assert recipe.read("paper_cifar", ["iterations=5"]).iterations == 5


def test_norms_and_biases_are_decayed_only_where_asked():
    model = runs.network()
    whole = optimizers.build(model, recipe.Optimizer(weight_decay=0.5))
    assert [group["weight_decay"] for group in whole.param_groups] == [0.5]
    parted = optimizers.build(model, recipe.Optimizer(weight_decay=0.5, decay_all=False))
    decayed, plain = (list(group["params"]) for group in parted.param_groups)
    assert [group["weight_decay"] for group in parted.param_groups] == [0.5, 0.0]
    assert all(p.dim() > 1 for p in decayed)
    assert all(p.dim() == 1 for p in plain)
    assert len(decayed) + len(plain) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_every_optimizer_takes_a_step(name):
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    optimizer = optimizers.build(layer, recipe.Optimizer(name=name, lr=0.1))
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(layer.weight, before)
    optimizers.set_rate(optimizer, 0.0)
    assert {group["lr"] for group in optimizer.param_groups} == {0.0}
