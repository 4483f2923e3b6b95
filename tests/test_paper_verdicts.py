"""What the paper's experiments conclude from numbers that are given to them."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import paper_runs
import pytest
import torch
from torch import nn

from resnet_fused.paper import EXPERIMENTS, ScaleError, base, gradient_paths, scale_of, statistics
from resnet_fused.paper.scales import SCALES, kinds
from resnet_fused.paper.statistics import Spread, above, by_step, noise
from resnet_fused.train.recipe import RecipeError

F64 = torch.float64


def judged(tmp_path, name, errors, **changes):
    """The finding of an experiment on runs whose training and test errors are these."""
    job = paper_runs.job(tmp_path, **changes)
    networks = EXPERIMENTS[name].variants(job.scale)
    runs = {v.name: paper_runs.made_up(v.name, errors[v.name]) for v in networks}
    return EXPERIMENTS[name].judge(job, networks, runs)


# ------------------------------------------------------------------ statistics


def test_means_spreads_and_noise():
    a, b = Spread((0.1, 0.2, 0.3)), Spread((0.5,))
    assert a.mean == pytest.approx(0.2) and a.deviation == pytest.approx(0.1)
    assert b.deviation is None and b.percent() == "50.00%"
    assert a.percent() == "20.00% ± 10.00"
    assert noise(a, b) == pytest.approx(2 * 0.1 / math.sqrt(3))
    assert noise(a, a) == pytest.approx(2 * math.sqrt(2) * 0.1 / math.sqrt(3))
    assert above(b, a) and not above(a, b) and not above(a, a)
    assert not above(Spread((0.3, 0.2, 0.1)), Spread((0.1, 0.1, 0.1)))


def test_curves_of_seeds_meet_where_all_have_a_step():
    found = by_step([[(1, 0.5), (2, 0.3)], [(2, 0.1), (3, 0.0)]])
    assert found == [(2, pytest.approx(0.2), 0.1, 0.3)]
    assert by_step([]) == []


# ------------------------------------------------------------------ verdicts

DEGRADED = {"plain8": [0.01, 0.02], "plain14": [0.3, 0.4], "resnet8": [0.01, 0.02],
            "resnet14": [0.01, 0.01]}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "shown", "says"),
    [
        ({}, True, "Degradation shows"),
        ({"plain8": [0.2, 0.06]}, None, "Too short: plain-8"),
        ({"plain8": [0.05, 0.05]}, None, "Too short"),
        ({"plain8": [0.049, 0.049]}, True, "Degradation shows"),
        ({"plain14": [0.02, 0.01]}, False, "plain-14 is not above plain-8"),
        ({"plain14": [0.0, 0.9]}, False, "not above plain-8 by more than the seeds' noise"),
        ({"resnet14": [0.2, 0.2]}, False, "ResNet-14 is above ResNet-8"),
    ],
)
def test_degradation(tmp_path, change, shown, says):
    found = judged(tmp_path, "degradation", DEGRADED | change)
    assert found.shown is shown and says in found.verdict
    assert len(found.rows) == 4 and found.rows[0][0] == "plain-8"
    assert [panel["title"] for panel in found.panels] == ["plain", "residual"]


def test_degradation_of_one_depth_says_so(tmp_path):
    found = judged(
        tmp_path, "degradation", {"plain8": [0.01], "resnet8": [0.01]}, depths=(8,), seeds=1
    )
    assert found.shown is None and "One depth alone" in found.verdict


@pytest.mark.parametrize(
    ("errors", "shown", "says"),
    [
        ([0.30, 0.12, 0.11, 0.10], True, "degradation. The best is C, the worst A."),
        ([0.30, 0.11, 0.11, 0.11], True, "degradation. Among them none is better"),
        ([0.30, 0.25, 0.11, 0.10], False, "differ as much"),
        ([0.30, 0.30, 0.11, 0.10], False, "option A is not better"),
        ([0.30, 0.40, 0.31, 0.32], False, "option A and B and C is not better"),
    ],
)
def test_shortcuts(tmp_path, errors, shown, says):
    names = ["plain14", "resnet14-a", "resnet14-b", "resnet14-c"]
    own = {name: [e, e + 1e-4] for name, e in zip(names, errors, strict=True)}
    found = judged(tmp_path, "shortcuts", own)
    assert found.shown is shown and says in found.verdict


@pytest.mark.parametrize(
    ("errors", "shown", "says"),
    [
        ((0.2, 0.1), True, "better at equal cost: 29 layers against 20"),
        ((0.1, 0.2), False, "basic blocks are better"),
        ((0.1, 0.1), False, "does not show a difference"),
    ],
)
def test_bottlenecks_cost_the_same(tmp_path, errors, shown, says):
    own = {"resnet20": [errors[0]] * 2, "bottleneck29": [errors[1]] * 2}
    found = judged(tmp_path, "bottleneck", own, depths=(20,))
    assert found.shown is shown and says in found.verdict
    costs = found.values["multiply_adds"]
    assert found.checks[0].holds
    assert costs["bottleneck29"] == pytest.approx(costs["resnet20"], rel=0.05)


def test_bottlenecks_that_cost_more_are_said_to(tmp_path):
    # With one block a stage, those that widen to four times the channels weigh.
    found = judged(tmp_path, "bottleneck", {"resnet8": [0.2, 0.2], "bottleneck11": [0.1, 0.1]})
    assert found.checks[0].holds is False and found.shown is False


@pytest.mark.parametrize(
    ("errors", "shown", "says"),
    [
        ([0.3, 0.2, 0.1], True, "Depth pays"),
        ([0.2, 0.2, 0.2], False, "Depth does not hurt"),
        ([0.2, 0.1, 0.3], False, "ResNet-32 has no higher test error than ResNet-14"),
    ],
)
def test_depth(tmp_path, errors, shown, says):
    own = {f"resnet{d}": [e, e] for d, e in zip((8, 14, 32), errors, strict=True)}
    found = judged(tmp_path, "depth", own)
    assert found.shown is shown and says in found.verdict


GAP = {"resnet14": [0.01, 0.02], "plain14": [0.40, 0.42]}


@pytest.mark.parametrize(
    ("halves", "shown", "says"),
    [
        (([0.02, 0.03], [0.41, 0.40]), True, "it is the add alone that helps"),
        (([0.41, 0.40], [0.10, 0.12]), True, "it is the gradient alone that helps"),
        (([0.20, 0.21], [0.10, 0.12]), True, "Both halves help: the add alone closes 52%"),
        (([0.10, 0.60], [0.32, 0.36]), None, "cannot be told here: the gradient alone closes 18%"),
        (([0.41, 0.42], [0.50, 0.50]), True, "Neither half"),
    ],
)
def test_gradient_paths(tmp_path, halves, shown, says):
    own = GAP | {"resnet14-forward": halves[0], "resnet14-backward": halves[1]}
    found = judged(tmp_path, "gradient-paths", own)
    assert found.shown is shown and says in found.verdict, found.verdict


def test_gradient_paths_without_a_gap_cannot_tell(tmp_path):
    names = ("resnet14", "plain14", "resnet14-forward", "resnet14-backward")
    own = {name: [0.1, 0.1] for name in names}
    found = judged(tmp_path, "gradient-paths", own)
    assert found.shown is None and "cannot tell" in found.verdict
    assert found.values["share_of_the_gap"] == {"forward": None, "backward": None}


# ------------------------------------------------------------------ the halves of a shortcut


@pytest.mark.parametrize(
    ("kind", "adds", "carries"),
    [(gradient_paths.ForwardOnly, 1, 0), (gradient_paths.BackwardOnly, 0, 1)],
)
def test_halves_of_a_shortcut(kind, adds, carries):
    inner = nn.Conv2d(3, 3, 1, bias=False).to(F64)
    x = torch.randn(2, 3, 4, 4, dtype=F64, requires_grad=True)
    for shortcut, whole in ((kind(), x), (kind(inner), inner(x))):
        y = shortcut(x)
        assert torch.equal(y, adds * whole)
        gradient = torch.randn_like(y)
        expected = torch.autograd.grad(whole, x, gradient, retain_graph=True)[0]
        if carries:
            assert torch.equal(torch.autograd.grad(y, x, gradient)[0], expected)
        else:
            assert not y.requires_grad


@pytest.mark.parametrize("way", gradient_paths.WAYS)
def test_halves_wrap_the_shortcuts_that_were_there(tmp_path, way):
    job = paper_runs.job(tmp_path, depths=(8,))
    networks = {v.name: v for v in EXPERIMENTS["gradient-paths"].variants(job.scale)}
    whole, half = (
        networks[name].build(job.scale, job.source) for name in ("resnet8", f"resnet8-{way}")
    )
    before = [m.downsample for m in whole.modules() if hasattr(m, "downsample")]
    after = [m.downsample for m in half.modules() if hasattr(m, "downsample")]
    assert {type(m) for m in after} == {gradient_paths.WAYS[way][1]}
    kinds = [nn.Identity if m is None else type(m) for m in before]
    assert [type(m.shortcut) for m in after] == kinds
    assert len(set(kinds)) == 2


# ------------------------------------------------------------------ scales


def test_every_kind_of_data_has_every_scale():
    assert kinds() == ["digits", "cifar10", "imagefolder"]
    for kind in kinds():
        for name in SCALES:
            found = scale_of(f"{kind}:somewhere", name)
            assert found.seeds >= 1 and len(found.depths) >= 2
            for experiment in EXPERIMENTS.values():
                names = []
                for variant in experiment.variants(found):
                    variant.check(found)
                    names.append(variant.name)
                assert len(set(names)) == len(names)


def test_full_scale_is_the_paper_s():
    cifar, images = scale_of("cifar10", "full"), scale_of("imagefolder:x", "full")
    assert (cifar.recipe.iterations, cifar.recipe.batch_size) == (64_000, 128)
    assert cifar.depths == (20, 32, 44, 56, 110) and cifar.seeds == 5
    assert cifar.recipe_of(110).schedule.warmup_steps == 400
    assert cifar.recipe_of(56).schedule.warmup_steps is None
    assert (images.recipe.iterations, images.recipe.size) == (600_000, 224)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (("mnist", "tiny"), ScaleError, "no experiment runs on 'mnist'; accepted: digits"),
        (("digits", "huge"), ScaleError, "there is no 'huge'; accepted: tiny, small, full"),
    ],
)
def test_unknown_data_and_scales(arguments, error, says):
    with pytest.raises(error, match=says):
        scale_of(*arguments)
    with pytest.raises(RecipeError, match="there is no entry"):
        scale_of("digits", "tiny", changes=("iteration=3",))


def test_tables_name_what_the_paper_reports():
    assert base.COLUMNS[-1] == "paper"
    published = EXPERIMENTS["degradation"].judge.__globals__["PUBLISHED"]
    # [He15], Table 6.
    expected = {20: 8.75, 32: 7.51, 44: 7.17, 56: 6.97, 110: 6.43}
    for depth, error in expected.items():
        assert published["cifar"][f"resnet{depth}"] == f"{error:.2f}% test"
    assert statistics.noise(Spread((0.1,)), Spread((0.2,))) == 0


def test_the_page_is_what_its_records_say():
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, str(root / "tools" / "paper_numbers.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
