"""The prediction of a training step in the docs is that of the code as it is, and adds up."""

from __future__ import annotations

import collections
import importlib
import sys
from pathlib import Path

import pytest
import torch

from resnet_fused import models
from resnet_fused.bench.nodes import nodes, saved_bytes, traffic

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module("predict_training")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_the_page_is_up_to_date(tool):
    page = tool.PAGE.read_text(encoding="utf-8")
    assert f"{tool.BEGIN}\n{tool.table()}\n{tool.END}" in page, "predict_training.py --write"


def test_the_page_has_the_block_ends(tool):
    ends = importlib.import_module("predict_block_end")
    page = ends.PAGE.read_text(encoding="utf-8")
    assert f"{ends.BEGIN}\n{ends.table()}\n{ends.END}" in page, "predict_block_end.py --write"
    found = ends.folds(256)
    assert len(found) == 15  # behind the last of sixteen blocks none runs
    assert sum(one.taken for one in found) == 12
    for one in found:
        # One tensor is read less, and a launch is spared: no more than that can be won.
        most = one.saved / tool.MEMORY + tool.LAUNCH
        assert one.before - one.after <= most * 1.001 or one.bound == "L2"


def test_the_page_has_the_gradients_between_blocks(tool):
    ends = importlib.import_module("predict_end_gradient")
    page = ends.PAGE.read_text(encoding="utf-8")
    assert f"{ends.BEGIN}\n{ends.table()}\n{ends.END}" in page, "predict_end_gradient.py --write"
    found = ends.endings(256)
    taken = collections.Counter(one.taken for one in found)
    assert taken == {ends.ALL: 6, ends.END_ALONE: 9}
    assert sum(one.merged for one in found) == 6
    for one in found:
        assert one.merged is (one.taken == ends.ALL) is (one.united is not None)
        # At most the bytes and a launch, or two where one kernel is in the place of three, and L2's
        # share are spared.
        least = one.less / tool.MEMORY
        assert 0 < one.won <= least + tool.LAUNCH + 1e-9 or one.bound == "L2"
        assert one.after < one.before or one.taken == ends.ALL
        assert one.united is None or one.united < min(one.before, one.after)
    six = [one for one in found if one.taken == ends.ALL]
    won = sum(one.won for one in six) * 1e3
    alone = sum(max(0.0, one.before - one.after) for one in six) * 1e3
    text = f"win {won:.2f} ms of a step, by the table, where the end alone wins {alone:.2f} at most"
    assert text in " ".join(page.split())


def test_what_the_docs_say_of_it(tool):
    """Bytes an image at batch 256, their part of eager's, and those by two kernels each."""
    shape = (256, 3, 224, 224)
    one = sum(traffic(tool._nodes(256))) / 256 / 1e6
    two = sum(traffic(nodes(models.resnet50(), shape, torch.bfloat16))) / 256 / 1e6
    text = f"{one:.1f} MB an image", f"{one / tool.EAGER_MB:.2f} of"
    for page in ("docs/training.md", "CHANGELOG.md"):
        found = " ".join((ROOT / page).read_text(encoding="utf-8").split())
        assert all(words in found for words in text), page
    assert f"in place of {two:.1f}" in " ".join((ROOT / "docs/training.md").read_text().split())
    saved = f"which saves {two - one:.1f} MB an image"
    assert saved in " ".join(tool.PAGE.read_text(encoding="utf-8").split())


def test_no_kernel_is_faster_than_memory(tool):
    sums, layers = tool.predict(256)
    assert layers == 53
    for row in sums:
        assert row.ms >= row.gb * 1e12 / tool.MEMORY * 0.999
        assert sum(row.bound) == row.kernels
    kernels = {row.op: row.kernels for row in sums}
    # None of the images; of 11 layers together with the weights' gradient.
    assert kernels["conv_bn_dgrad"] + kernels["conv_bn_grad1x1"] == 52
    assert kernels["conv_bn_wgrad"] + kernels["conv_bn_grad1x1"] == 53
    assert kernels["conv_bn_grad1x1"] == 11


def test_a_merged_gradient_is_no_dearer_than_two(tool):
    """Of each layer that takes it: memory, L2 and a launch, against those of two kernels."""
    batch = 256
    merged = {node.name: node for node in tool._nodes(batch)}
    shape = (batch, 3, 224, 224)
    for node in nodes(models.resnet50(), shape, torch.bfloat16):
        times = [
            {
                (kernel.op, kernel.layer): max(tool.seconds(one, kernel)) + tool.LAUNCH
                for kernel in one.kernels
            }
            for one in (node, merged[node.name])
        ]
        for (op, layer), seconds in times[1].items():
            if op == "conv_bn_grad1x1":
                two = sum(times[0][kind, layer] for kind in ("conv_bn_dgrad", "conv_bn_wgrad"))
                assert seconds < two, (node.name, layer)


def test_every_convolution_belongs_to_one_node():
    model = models.cifar_resnet20()
    found = nodes(model, (2, 3, 32, 32), torch.float32)
    names = [layer for node in found for layer in node.layers]
    convs = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)]
    assert sorted(names) == sorted(convs)
    assert len(found) == 10  # a stem, nine blocks


def test_what_is_kept_and_moved_of_resnet50():
    """By hand: 22.2 MB raw outputs, 11.0 of blocks, 0.6 of the stem's pooling; bf16, an image."""
    found = nodes(models.resnet50(), (64, 3, 224, 224), torch.bfloat16)
    assert saved_bytes(found, torch.bfloat16) / 64 / 1e6 == pytest.approx(33.9, abs=0.1)
    forward, backward = (part / 64 / 1e6 for part in traffic(found))
    assert forward == pytest.approx(76.8, rel=0.02)  # and weights, shared by 64 images
    passes = nodes(models.resnet50(), (64, 3, 224, 224), torch.bfloat16, folds=False)
    assert sum(traffic(passes)) / 64 / 1e6 > forward + backward + 20
