"""Around a training step: autocast, accumulation, checkpoints, copies, torch.compile, sharing."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from nets import images, stir
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet
from torchvision.models.feature_extraction import create_feature_extractor
from training_nets import (
    BACKEND,
    Step,
    assert_like,
    assert_same,
    build,
    gradient_like,
    is_node,
    loss_of,
    norms,
    projection,
    state,
    step,
    steps,
)

import resnet_fused as rf

F64 = torch.float64
BLOCKS = ["torchvision bottleneck halved", "torchvision basic", "padded halved", "stem"]


@pytest.fixture(autouse=True)
def _backend():
    """What a later version takes by itself; a test may ask for another."""
    with rf.backend(BACKEND):
        yield


def network(**options):
    """A fused network of all kinds of blocks, its plain twin, and images, in float64."""
    torch.manual_seed(0)
    plain = resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=7, width_per_group=8)
    plain = stir(plain).double().train()
    twin = copy.deepcopy(plain)
    return rf.fuse(twin, **options), plain, images(3, 32, F64)


# ------------------------------------------------------------------ a step and what surrounds it


def test_a_whole_step_of_a_network():
    fused, plain, x = network()
    assert set(rf.explain(fused.train(), x).counts()) == {BACKEND}
    fused.load_state_dict(plain.state_dict())
    for model in (fused, plain):
        optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        for _ in range(2):
            optimiser.zero_grad()
            loss_of(model, x).backward()
            optimiser.step()
    assert_like(fused, plain, 1e-9)
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_gradient_accumulation():
    fused, plain, x = network()
    for model in (fused, plain):
        for part in (x, x.flip(0), -x):
            loss_of(model, part).backward()
        assert all(bn.num_batches_tracked == 3 for bn in norms(model))
    assert_like(fused, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_gradscaler(dtype):
    model = rf.fuse(stir(rf.unfuse(rf.nn.Bottleneck(16, 8))))
    model = nn.Sequential(model, nn.Flatten(), nn.Linear(32 * 25, 3)).train()
    x = torch.randn(4, 16, 5, 5)
    model[0].downsample = rf.nn.Sequential(*projection(16, 32))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    before = copy.deepcopy(model.state_dict())
    with torch.autocast("cpu", dtype=dtype):
        y = model[0](x.to(dtype))
        loss = model[1:](y).square().mean()
    assert y.dtype == dtype and is_node(y)
    scaler.scale(loss).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    assert {g.dtype for g in grads} == {torch.float32}
    scaler.unscale_(optimiser)
    for p, scaled in zip(model.parameters(), grads, strict=True):
        assert_close(p.grad * 256, scaled)
    scaler.step(optimiser)
    scaler.update()
    changed = [not torch.equal(v, before[k]) for k, v in model.state_dict().items()]
    assert all(changed)


def test_gradscaler_sees_an_overflow_and_skips_the_step():
    model = rf.nn.ConvBNAct(4, 4).train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = model.conv.weight.detach().clone()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = model(torch.randn(2, 4, 5, 5)).sum()
    scaler.scale(loss).backward()
    scaler.step(optimiser)
    scaler.update()
    assert torch.equal(model.conv.weight, before)
    assert scaler.get_scale() < 2.0**40


def test_autocast_leaves_float64_alone_in_training_and_inference():
    for mode in (True, False):
        block, x = build("torchvision basic")
        fused = rf.fuse(block.train(mode))
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert fused(x).dtype == block(x).dtype == F64


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    results = []
    for fuse in (True, False):
        block, x = build("torchvision bottleneck halved")
        model = rf.fuse(block) if fuse else block
        x.requires_grad_()
        y = checkpoint(model, x, use_reentrant=reentrant)
        y.backward(gradient_like(y))
        results.append(Step(y.detach(), {"x": x.grad, **state(model).grads}, state(model).buffers))
        assert model.bn1.num_batches_tracked == 2  # forward runs twice, as with the modules
    assert_same(*results)


def test_ema_follows_parameters_and_statistics():
    averages = []
    for fuse in (True, False):
        fused, plain, x = network()
        model = fused if fuse else plain
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
        optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(2):
            optimiser.zero_grad()
            loss_of(model, x).backward()
            optimiser.step()
            average.update_parameters(model)
        with torch.no_grad():
            averages.append((average.eval()(x), average.state_dict()))
    assert_close(*[y for y, _ in averages], rtol=1e-8, atol=1e-8)
    for name, value in averages[0][1].items():
        assert_close(value, averages[1][1][name], rtol=1e-8, atol=1e-8)


def test_compiled_whole_training_step():
    """The compiler sees PyTorch's own operations: one graph, the same numbers."""
    torch.manual_seed(0)
    fused = stir(nn.Sequential(rf.nn.Stem(3, 6), rf.nn.BasicBlock(6, 8, 2, projection(6, 8, 2))))
    fused, x = rf.fuse(fused.double().train()), images(3, 24, F64)
    plain = rf.unfuse(copy.deepcopy(fused))
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.code))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    loss_of(torch.compile(fused, fullgraph=True, backend=backend), x).backward()
    loss_of(plain, x).backward()
    assert len(graphs) == 1 and "batch_norm" in graphs[0] and "resnet_fused" not in graphs[0]
    assert_like(fused, plain)


def test_deterministic_algorithms_and_the_same_bits_again():
    block, x = build("torchvision bottleneck halved", torch.float32)
    first = step(rf.fuse(copy.deepcopy(block)), x)
    torch.use_deterministic_algorithms(True)
    try:
        for name in BLOCKS:
            again, given = build(name, torch.float32)
            step(rf.fuse(again), given)
        second = step(rf.fuse(block), x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first.out, second.out)
    for part in ("grads", "buffers"):
        for name, value in getattr(first, part).items():
            assert torch.equal(value, getattr(second, part)[name]), name


def test_fx_and_jit_see_what_they_saw_before():
    fused, plain, x = network()
    ours = create_feature_extractor(fused, {"layer1": "a", "layer4": "b"})
    theirs = create_feature_extractor(plain, {"layer1": "a", "layer4": "b"})
    for key, value in theirs.train()(x).items():
        assert_close(ours.train()(x)[key], value, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        traced = torch.jit.trace(fused.train(), x, check_trace=False)
        assert_close(traced(x), plain(x), rtol=1e-10, atol=1e-10)
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert "aten::batch_norm" in kinds


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_trained_model(how):
    fused, _, x = network()
    loss_of(fused, x).backward()
    if how == "deepcopy":
        twin = copy.deepcopy(fused)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(fused))
    else:
        buffer = io.BytesIO()
        torch.save(fused, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    for model in (fused, twin):
        model.zero_grad()
        loss_of(model, x).backward()
    assert_like(twin, fused, 0.0)


def test_a_graph_can_not_outlive_its_module_s_change_of_class():
    """Gradients are taken by what forward kept, whatever becomes of the module in between."""
    block, x = build("torchvision bottleneck halved")
    fused = rf.fuse(block, inplace=True)
    y = fused(x.requires_grad_())
    expected = step(copy.deepcopy(rf.unfuse(block)), x)
    rf.unfuse(fused, inplace=True)
    fused.bn1.eval()
    fused.bn2.weight.requires_grad_(False)
    fused.bn3.eps = 7.0
    with rf.backend("auto"):
        y.backward(gradient_like(y))
    assert_close(x.grad, expected.grads["x"], rtol=1e-11, atol=1e-11)
    assert_close(fused.conv1.weight.grad, expected.grads["conv1.weight"], rtol=1e-11, atol=1e-11)


# ------------------------------------------------------------------ train and eval


def test_inference_sees_each_steps_statistics_and_weights():
    fused, _, x = network()
    fused, x = fused.float(), x.float()
    optimiser = torch.optim.Adam(fused.parameters(), lr=1e-2, fused=True)
    seen = []
    for _ in range(3):
        fused.train()
        optimiser.zero_grad()
        loss_of(fused, x).backward()
        optimiser.step()
        fused.eval()
        with torch.no_grad():
            for _ in range(2):
                seen.append(fused(x))
                assert_close(seen[-1], rf.unfuse(fused)(x), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(seen[0], seen[2]) and not torch.allclose(seen[2], seen[4])


def test_a_fused_optimisers_step_shows_where_one_batchnorm_is_frozen():
    """Its weights are written without a new version, and the frozen statistics do not change."""
    block = stir(rf.nn.BasicBlock(8, 8).eval())
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        for _ in range(3):
            before = block(x)
    block.bn1.train()
    block.bn2.eval()
    optimiser = torch.optim.Adam([block.conv2.weight], lr=0.3, fused=True)
    y = block(x)
    assert is_node(y)
    y.square().mean().backward()
    optimiser.step()
    block.eval()
    with torch.no_grad():
        after = block(x)
        assert_close(after, rf.unfuse(block)(x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("grad", ["no_grad", "inference_mode", "grad, nothing wants one"])
def test_training_without_gradients_updates_running_statistics(grad):
    fused, plain, x = network()
    modes = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    with modes.get(grad, torch.enable_grad)():
        for model in (fused, plain):
            model.requires_grad_(False)
        ours, theirs = fused(x), plain(x)
    assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    assert not ours.requires_grad
    assert all(bn.num_batches_tracked == 1 for bn in norms(fused))
    assert_like(fused, plain)


# ------------------------------------------------------------------ sharing


def test_one_block_twice_in_one_forward():
    block, x = build("torchvision basic")
    assert_same(*steps(nn.Sequential(block, block), x, BACKEND))


def test_two_inputs_through_one_model_before_any_backward():
    results = []
    *models, x = network()
    for model in models:
        first, second = loss_of(model, x), loss_of(model, x + 1)
        second.backward()
        first.backward()
        results.append(state(model))
    assert_same(*results, 1e-11)


def test_one_batchnorm_behind_two_convolutions_of_a_block():
    block, x = build("torchvision basic")
    block.bn2 = block.bn1
    assert_same(*steps(block, x, BACKEND))


def test_both_trees_of_one_model():
    """The plain tree and the fused one share modules: their gradients add up."""
    fused, plain, x = network()
    both = rf.unfuse(fused)
    loss_of(fused, x).backward()
    loss_of(both, x).backward()
    for _ in range(2):
        loss_of(plain, x).backward()
    assert_like(fused, plain)
