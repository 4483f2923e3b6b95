"""Subjects: derived from the networks, built the same everywhere, judged before they are timed."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import resnet_fused as rf
from resnet_fused.bench import limits, subject, work
from resnet_fused.bench.ceilings import Ceilings
from resnet_fused.bench.judging import TOO_NOISY, Judgement, Reference, eager_kernel
from resnet_fused.bench.subject import MODEL_OPS, NETWORKS, Subject, conv_case, conv_name, subjects
from resnet_fused.bench.work import Batch, Work, build, sets_for
from resnet_fused.cases import CONV_CASES, RESNET50_LAYERS
from resnet_fused.roofline import bn_act_cost, conv_cost, conv_dgrad_cost

KERNELS = [
    ("conv_bn_act", "3x3_16_24_at8_add"),
    ("conv_bn_act", "1x1s2_16_24_at8_noact"),
    ("conv_dgrad", "3x3s2_16_24_at8"),
    ("conv_dgrad", "1x1_16_24_at8_noact"),
    ("conv_wgrad", "3x3_16_24_at8"),
    ("bn_act", "16_at8_add"),
]
RATES = Ceilings(1e11, 1e10, "float32")


def _kernel(op: str, name: str, dtype: str = "float32", batch: int = 4) -> Work:
    return build(Subject("kernel", op, name, batch, dtype, "cpu"))


def _block(op: str = "inference", dtype: str = "float32", name: str = "layer2.0") -> Work:
    return build(Subject("block", op, f"resnet18.{name}", 3, dtype, "cpu", size=64))


def _torchvision_convs(name: str) -> set[tuple[int, ...]]:
    """(c, k, r, stride, h) of each convolution, by torchvision's own model and hooks."""
    found: set[tuple[int, ...]] = set()
    with torch.device("meta"):
        model = getattr(torchvision.models, name)().eval()

    def note(conv: Any, args: tuple[Any, ...]) -> None:
        h = args[0].shape[2]
        found.add((conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0], h))

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(note)
    model(torch.empty(1, 3, 224, 224, device="meta"))
    return found


def test_kernels_are_the_convolutions_of_resnet_18_to_152() -> None:
    assert NETWORKS == ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
    made = subjects("kernel", "cpu", batches=[2], ops=["conv_bn_act"])
    assert len({s.key for s in made}) == len(made)
    cases = [conv_case(s.name, s.batch) for s in made]
    assert {(c.c, c.k, c.r, c.stride[0], c.h) for c in cases} == set().union(
        *(_torchvision_convs(name) for name in NETWORKS)
    )
    assert all(conv_name(case) == case.name and case.n == 2 for case in cases)


def test_what_stands_behind_a_convolution_is_part_of_its_case() -> None:
    names = subject.kernel_names("conv_bn_act", "resnet50")
    # The list of shapes that tests use counts a projection as the expansion that it resembles.
    listed = {case.name.removesuffix("_add").removesuffix("_noact") for case in RESNET50_LAYERS}
    assert {name.removesuffix("_add").removesuffix("_noact") for name in names} == listed
    assert {"1x1_64_256_at56_add", "1x1_64_256_at56_noact", "3x3_64_64_at56"} <= set(names)
    assert "3x3_64_64_at56_add" in subject.kernel_names("conv_bn_act", "resnet18")
    gradients = {op: subject.kernel_names(op, "resnet50") for op in ("conv_dgrad", "conv_wgrad")}
    assert set(gradients["conv_wgrad"]) - set(gradients["conv_dgrad"]) == {"7x7s2_3_64_at224"}
    assert not any("_add" in name for name in gradients["conv_dgrad"])


def test_the_model_comes_first_and_every_op_before_the_second_of_any() -> None:
    made = subjects("kernel", "cpu", batches=[1, 8], ops=["conv_bn_act", "bn_act"])
    assert [(s.op, s.batch) for s in made[:4]] == [
        ("conv_bn_act", 1), ("conv_bn_act", 8), ("bn_act", 1), ("bn_act", 8),
    ]  # fmt: skip
    own = set(subject.kernel_names("conv_bn_act", "resnet50"))
    names = [s.name for s in made if s.op == "conv_bn_act" and s.batch == 1]
    assert set(names[: len(own)]) == own and len(names) > len(own)
    shares = [subject.kernel_names("conv_bn_act", "resnet50")[name] for name in names[: len(own)]]
    assert shares == sorted(shares, reverse=True)


def test_blocks_are_the_distinct_ones_and_the_stem() -> None:
    made = subjects("block", "cpu", batches=[1])
    assert len(made) == 4 * 2 + 1  # each stage has a first block and others that are alike
    assert {s.name for s in made} >= {"resnet50.stem", "resnet50.layer1.0", "resnet50.layer1.1"}
    assert len(subjects("block", "cpu", model="resnet18", batches=[1])) == 1 + 2 * 3 + 1
    only = subjects("block", "cpu", batches=[1, 8], only="layer1.0/b8")
    assert [s.key for s in only] == ["block/inference/resnet50.layer1.0/b8/float32"]


def test_models_have_keys_of_their_own() -> None:
    made = subjects(
        "model", "cpu", batches=[1, 8], dtypes=["float32", "bfloat16"], ops=MODEL_OPS, size=64
    )
    assert len({s.key for s in made}) == len(made) == 2 * 2 * len(MODEL_OPS)
    assert made[0].key == "model/inference/resnet50/b1/float32/64px"
    assert all(Subject.from_dict(s.to_dict()) == s for s in made)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"level": "layer"}, "level is 'layer'; accepted are kernel, block, model"),
        ({"model": "vgg16"}, "model is 'vgg16'; accepted are resnet18"),
        ({"batches": []}, "batches is empty"),
        ({"dtypes": []}, "dtypes is empty"),
        ({"batches": [0]}, "batch is 0; accepted is an integer of at least 1"),
        ({"dtypes": ["int8"]}, "dtype is 'int8'"),
        ({"ops": ["inference"]}, "ops holds 'inference'; accepted at level kernel"),
        ({"device": "tpu"}, "device is 'tpu'; accepted are cpu, cuda"),
    ],
)
def test_subjects_refuses(arguments: dict[str, Any], match: str) -> None:
    given = {"level": "kernel", "device": "cpu", "batches": [1], **arguments}
    with pytest.raises(ValueError, match=match):
        subjects(given.pop("level"), given.pop("device"), **given)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"more": 1}, "unknown fields \\['more'\\]"),
        ({"op": "training"}, "op is 'training'; accepted are conv_bn_act"),
        ({"name": ""}, "name is empty"),
    ],
)
def test_a_subject_from_elsewhere_is_checked(change: dict[str, Any], match: str) -> None:
    fields = Subject("kernel", "bn_act", "16_at8", 1, "float32", "cpu").to_dict()
    with pytest.raises(ValueError, match=match):
        Subject.from_dict({**fields, **change})
    with pytest.raises(ValueError, match="lacks a field"):
        Subject.from_dict({"level": "kernel"})


def test_names_of_nothing_are_refused() -> None:
    for op, name in (("conv_bn_act", "3x3"), ("bn_act", "3x3_16_16_at8")):
        with pytest.raises(ValueError, match="accepted is a"):
            _kernel(op, name)
    for name in ("resnet50.layer9.0", "resnet50.layer1"):
        with pytest.raises(ValueError, match="accepted are resnet50.layer"):
            build(Subject("block", "inference", name, 1, "float32", "cpu", size=64))
    with pytest.raises(ValueError, match="accepted is a network of"):
        build(Subject("model", "inference", "resnet18.layer1.0", 1, "float32", "cpu", size=64))


def test_a_convolution_that_a_name_cannot_say_has_none() -> None:
    said, unsaid = [], []
    for case in CONV_CASES:
        try:
            name = conv_name(case)
        except ValueError:
            unsaid.append(case.name)
            continue
        said.append(name)
        again = dataclasses.replace(conv_case(name, case.n), name=case.name, tags=case.tags)
        assert again == case
    assert {"no_padding", "uneven"} <= set(unsaid)
    assert len(said) > 20 and len(set(said)) > 20


@pytest.mark.parametrize(("op", "name"), KERNELS)
def test_a_kernel_is_built_the_same_everywhere_and_set_by_set(op: str, name: str) -> None:
    first, second = _kernel(op, name), _kernel(op, name)
    other = build(dataclasses.replace(first.subject, seed=1))
    for given, same, odd in zip(first.sets, second.sets, other.sets, strict=True):
        for field, t in vars(given).items():
            if t is not None:
                assert torch.equal(t, getattr(same, field))
                assert not torch.equal(t, getattr(odd, field))
    assert not torch.equal(first.sets[0].scale, first.sets[1].scale)


def test_sets_exceed_the_last_cache_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "cache_bytes", lambda device: 1 << 20)
    monkeypatch.setattr(work, "_free_bytes", lambda device: 1 << 30)
    assert sets_for(1 << 19, "cpu") == 4
    assert sets_for(3 << 19, "cpu") == 2
    assert sets_for(1 << 30, "cpu") == 1
    assert sets_for(1, "cpu") == work.MOST_SETS
    monkeypatch.setattr(work, "_free_bytes", lambda device: 1 << 20)
    assert sets_for(1 << 19, "cpu") == 1  # a fifth of what is free
    monkeypatch.undo()
    assert 1 << 18 <= work.cache_bytes("cpu") < 1 << 32


def _spoil_one(y: torch.Tensor) -> torch.Tensor:
    y[y.shape[0] // 2, 0, 0, 0] += 1.0 + y.abs().max()
    return y


def _spoil_zeros(y: torch.Tensor) -> torch.Tensor:
    y[y.shape[0] // 2, : y.shape[1] // 2] = 0.0
    return y


def _spoil_nan(y: torch.Tensor) -> torch.Tensor:
    y[-1, -1, -1, -1] = math.nan
    return y


def _spoil_layout(y: torch.Tensor) -> torch.Tensor:
    return y.transpose(2, 3)[:, :, :, :-1] if y.shape[3] > 1 else y.new_zeros(2)


SPOILT = {
    "one element": _spoil_one,
    "zeros in the middle": _spoil_zeros,
    "NaN": _spoil_nan,
    "another shape": _spoil_layout,
    "another dtype": lambda y: y.double(),
    "shifted by 2%": lambda y: y * 1.02,
    "no tensor": lambda y: [y],
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("op", "name"), KERNELS)
def test_a_right_kernel_passes_and_a_spoilt_one_does_not(op: str, name: str, dtype: str) -> None:
    made = _kernel(op, name, dtype)
    with made.mode():
        y = eager_kernel(made)
        assert made.judge(y).ok
        assert made.judge(_fused_kernel(made)).ok
        for what, spoil in SPOILT.items():
            found = made.judge(spoil(y.clone()))
            assert not found.ok and found.worst > 1.0 and found.text, what


def _fused_kernel(made: Work) -> torch.Tensor:
    given, case = made.sets[0], made.case
    assert case is not None
    if made.subject.op == "bn_act":
        return rf.ops.bn_act(given.x, given.scale, given.shift, given.residual, act=case.act)
    geometry = case.geometry  # type: ignore[union-attr]
    if made.subject.op == "conv_bn_act":
        terms = (given.x, given.weight, given.scale, given.shift, given.residual)
        return rf.ops.conv_bn_act(*terms, **geometry, act=case.act)
    if made.subject.op == "conv_dgrad":
        terms = (given.dy, given.weight, given.scale, given.y)
        return rf.ops.conv_dgrad(*terms, input_size=case.input_shape, **geometry)  # type: ignore[union-attr]
    return rf.ops.conv_wgrad(given.dy, given.x, given.weight, given.scale, given.y, **geometry)


def test_the_yardstick_of_a_kernel_is_plain_pytorch() -> None:
    """`eager_kernel` against modules and autograd: it is what everything else is held to."""
    made = _kernel("conv_bn_act", "3x3_16_24_at8_add")
    given, case = made.sets[0], conv_case("3x3_16_24_at8_add", 4)
    x, weight = (t.double().requires_grad_() for t in (given.x, given.weight))
    y = nn.functional.conv2d(x, weight, padding=1) * given.scale.double().view(1, -1, 1, 1)
    y = torch.relu(y + given.shift.double().view(1, -1, 1, 1) + given.residual.double())
    torch.testing.assert_close(eager_kernel(made).double(), y, atol=1e-4, rtol=1e-4)
    for op, leaf in (("conv_dgrad", x), ("conv_wgrad", weight)):
        back = _kernel(op, "3x3_16_24_at8")
        one = back.sets[0]
        sets = dataclasses.replace(one, x=given.x, weight=given.weight, y=y.detach().float())
        back.sets[0] = dataclasses.replace(sets, scale=given.scale)
        (expected,) = torch.autograd.grad(y, leaf, one.dy.double(), retain_graph=True)
        assert back.case is not None and case.k == 24
        torch.testing.assert_close(eager_kernel(back).double(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_block_is_judged_beside_eager(dtype: str) -> None:
    made = _block(dtype=dtype)
    assert made.module is not None
    fused = rf.fuse(made.module)
    with made.mode():
        assert made.judge(made.run(made.module)).ok
        y = made.run(fused)
        assert made.judge(y).ok
        middle = y.clone()
        middle[1] = middle[0]  # an image that is not held against float64
        assert not made.judge(middle).ok
        noisy = y + 0.05 * y.abs().mean() * torch.randn_like(y)
        assert not made.judge(noisy).ok
        made.module.bn1.eps = 0.5  # type: ignore[union-attr]
        assert not made.judge(made.run(made.module)).ok


@pytest.mark.parametrize("op", ["training", "training_frozen"])
def test_a_step_returns_the_gradients_of_autograd_and_leaves_none(op: str) -> None:
    made = _block(op)
    module, batch = made.module, made.sets[0]
    assert module is not None
    assert module.training is (op == "training")
    assert ("bn1.weight" in made.watched) is (op == "training")
    with made.mode():
        y, found = made.run(module)
    assert all(p.grad is None for p in module.parameters()) and batch.x.grad is None
    module(batch.x).backward(batch.target)
    assert list(found) == list(made.watched)
    for name, grad in found.items():
        own = batch.x.grad if name == "input" else module.get_parameter(name).grad
        torch.testing.assert_close(grad, own)
    assert y.shape == batch.target.shape


@pytest.mark.parametrize("op", ["training", "training_frozen"])
def test_a_step_is_judged_gradient_by_gradient(op: str) -> None:
    made = _block(op, "bfloat16")
    assert made.module is not None
    fused = rf.fuse(made.module)
    with made.mode():
        assert made.judge(made.run(made.module)).ok
        assert made.judge(made.run(fused)).ok
        for name in made.watched:
            loss, grads = made.run(fused)
            spoilt = made.judge((loss, {**grads, name: torch.zeros_like(grads[name])}))
            assert not spoilt.ok and spoilt.text.startswith(name)
        loss, grads = made.run(fused)
        grads.pop("input")
        assert "lacks input" in made.judge((loss, grads)).text
        assert "returns (loss" in made.judge(loss).text


def test_where_eager_is_noise_nothing_can_be_right() -> None:
    made = _block()
    with made.mode():
        y = made.run(made.module)  # type: ignore[arg-type]
        assert made.judge(y).ok
        assert made.reference is not None
        part = dataclasses.replace(made.reference.parts[""], noisy=2 * TOO_NOISY)
        made.reference = Reference({"": part})
        assert made.judge(y) == Judgement(
            False, math.inf, "eager itself is too far from float64 for a judgement"
        )


@pytest.mark.parametrize("op", ["inference", "training"])
def test_another_process_judges_by_the_same_oracle(op: str, tmp_path: Path) -> None:
    made = _block(op)
    with torch.no_grad():
        made.module.bn1.running_mean.add_(1.0)  # type: ignore[union-attr]
        made.module.conv1.weight.mul_(1.5)  # type: ignore[union-attr]
    made.share(tmp_path / "shared.pt")
    again = build(made.subject, tmp_path / "shared.pt")
    for name, t in made.module.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(t, again.module.state_dict()[name])  # type: ignore[union-attr]
    with made.mode():
        found = [one.judge(one.run(one.module)) for one in (made, again)]  # type: ignore[arg-type]
        fresh = build(made.subject)  # what its own seed gives is another network
        assert not again.judge(fresh.run(fresh.module)).ok  # type: ignore[arg-type]
    assert found[0] == found[1] and found[0].ok


def test_a_models_step_reaches_from_the_stem_to_the_classifier() -> None:
    made = build(Subject("model", "training_frozen", "resnet18", 2, "float32", "cpu", size=32))
    assert {"conv1.weight", "fc.weight", "fc.bias"} <= set(made.watched)
    assert isinstance(made.sets[0], Batch) and made.sets[0].target.dtype is torch.int64
    with made.mode():
        loss, grads = made.run(made.module)  # type: ignore[arg-type]
    assert loss.dim() == 0 and 0.1 < float(loss) < 20.0
    assert all(float(grad.abs().max()) > 0 for grad in grads.values())


def test_the_limit_of_a_kernel_is_the_rooflines() -> None:
    dtype = torch.float32
    for op, name, of in (
        ("conv_bn_act", "3x3_16_24_at8_add", conv_cost),
        ("conv_dgrad", "3x3_16_24_at8", conv_dgrad_cost),
    ):
        made = _kernel(op, name)
        cost, found = of(conv_case(name, 4), dtype), limits.limit(made, RATES)  # type: ignore[operator]
        assert (found["flops"], found["bytes"]) == (cost.flops, cost.bytes)
        assert found["seconds"] == cost.seconds(RATES.flops, RATES.bandwidth)
        assert found["eager_bytes"] > found["bytes"] and found["eager_seconds"] > found["seconds"]
        assert "layers" not in found
    case = conv_case("3x3_16_24_at8_add", 4)
    whole = conv_cost(case, dtype, fused=False).bytes
    found = limits.limit(_kernel("conv_bn_act", "3x3_16_24_at8_add"), RATES)
    assert found["eager_bytes"] == whole - 2 * 24 * 4  # passes do not count scale and shift
    bn = limits.limit(_kernel("bn_act", "16_at8_add"), RATES)
    assert bn["bytes"] == bn_act_cost((4, 16, 8, 8), dtype, residual=True).bytes


def test_the_limit_of_a_network_is_the_sum_of_its_layers() -> None:
    made = build(Subject("model", "inference", "resnet18", 2, "float32", "cpu", size=32))
    step = dataclasses.replace(made, subject=dataclasses.replace(made.subject, op="training"))
    forward, training = (limits.limit(one, RATES) for one in (made, step))
    for found in (forward, training):
        for key in ("flops", "bytes", "seconds", "eager_bytes", "eager_seconds"):
            assert found[key] == pytest.approx(sum(layer[key] for layer in found["layers"]))
        names = [layer["name"] for layer in found["layers"]]
        assert names[:2] == ["conv1", "maxpool"] and names[-1] == "fc" and len(set(names)) == 23
    first = next(layer["flops"] for layer in forward["layers"] if layer["name"] == "conv1")
    assert training["flops"] == 3 * forward["flops"] - first  # the images' gradient is not needed
    by_name = {layer["name"]: layer for layer in forward["layers"]}
    # The add and the ReLU of a block with a projection belong to the block's last convolution.
    last, projection = by_name["layer2.0.conv2"], by_name["layer2.0.downsample.0"]
    tensor = 2 * 128 * 4 * 4 * 4
    assert last["eager_bytes"] - last["bytes"] == (2 + 3 + 2 - 1) * tensor
    assert projection["eager_bytes"] - projection["bytes"] == 2 * tensor
