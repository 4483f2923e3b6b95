"""scikit-learn's digits, learnt by the command: 97% and more, eager and fused alike."""

from __future__ import annotations

import os
import statistics

import pytest
from command import as_json

import resnet_fused as rf

WHOLE = os.environ.get("HYPOTHESIS_PROFILE") == "proof"
SEEDS = (0, 1, 2) if WHOLE else (0,)
ENOUGH = 0.97


@pytest.fixture(scope="module")
def accuracies(tmp_path_factory):
    """Implementation -> the last test's top-1 for each seed; curves of all runs in one page."""
    top = tmp_path_factory.mktemp("digits")
    found, beside = {}, []
    for impl in ("eager", "fused"):
        found[impl] = []
        for seed in SEEDS:
            output = top / f"{impl}-{seed}"
            more = [word for path in beside for word in ("--beside", path)]
            # Nodes of any size: by themselves layers as small as these run their modules.
            with rf.backend("cpu" if impl == "fused" else "auto"):
                record = as_json(
                    "train", "rf:cifar_resnet20", "--data", "digits", "--output", output,
                    "--impl", impl, "--seed", seed, "--no-tensorboard", *more,
                )  # fmt: skip
            found[impl].append(record["test"]["top1"])
            beside.append(output)
    html = (beside[-1] / "report.html").read_text()
    assert all(f"<td>{path.name}</td>" in html for path in beside)
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_both_learn_to_read_digits(accuracies):
    assert min(accuracies["eager"] + accuracies["fused"]) >= ENOUGH, accuracies


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_both_come_to_the_same(accuracies):
    eager, fused = (statistics.mean(accuracies[impl]) for impl in ("eager", "fused"))
    spread = max(max(values) - min(values) for values in accuracies.values())
    # One seed has no spread: five images of the 360 then.
    assert abs(eager - fused) <= max(spread, 5 / 360), accuracies
