"""The CUDA convolutions as far as they go without a GPU: arguments, plans, reasons, self-checks.

What the kernels compute is tested in the emulator, as one more implementation of every op.
"""

from __future__ import annotations

import functools
import importlib

import emulated
import pytest
import torch

import resnet_fused as rf
from resnet_fused import _extension, admission, backends, ops
from resnet_fused.ops import _cuda, _cuda_checks, _cuda_plan

conv_bn_act = importlib.import_module("resnet_fused.ops.conv_bn_act")

H200 = (132, 232448, 233472)
SAME = ((1, 1), (1, 1), (1, 1), 1)
OPS = tuple(_cuda_plan.OPERANDS)

needs_cuda_build = pytest.mark.skipif(
    not _extension.has_cuda_kernels(), reason="the extension was built without nvcc"
)


def image(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "meta") -> torch.Tensor:
    made = torch.zeros(shape, dtype=dtype, device=device)
    return made.contiguous(memory_format=torch.channels_last)


def forward_problem(x: torch.Tensor, weight: torch.Tensor, geometry=SAME) -> _cuda_plan.Problem:
    shape = ops._checks.conv_output_shape("conv_bn_act", x, weight, *geometry)
    out = image(*shape, dtype=x.dtype)
    return _cuda_plan.problem_of("conv_bn_act", (x, weight, None), geometry, out, real=False)


# Plans.


@needs_cuda_build
@pytest.mark.parametrize("op", OPS)
def test_configurations_have_names_of_their_own(op):
    names = _cuda_plan.configurations(op)
    assert len(set(names)) == len(names) >= 2
    assert any(name.startswith("narrow_") for name in names)
    kernel = next(k for k in admission.kernels() if (k.op, k.implementation) == (op, "cuda"))
    assert kernel.list_configurations() == names


@needs_cuda_build
def test_a_split_reduction_needs_this_much_memory():
    # 49 pixels are one tile of 64, 512 channels eight of 64: eight counters of 4 bytes, rounded up
    # to 256, and for each tile and split 64 x 64 sums of 4 bytes.
    made = forward_problem(image(1, 512, 7, 7), image(512, 512, 3, 3))
    index = _cuda_plan.configurations("conv_bn_act").index("64x64_4w4s")
    found = _cuda_plan.plan(made, H200, index, 2)
    assert (found.name, found.splits) == ("64x64_4w4s", 2)
    assert found.workspace_bytes == 256 + 8 * 2 * 64 * 64 * 4
    assert "as asked for" in found.why
    assert _cuda_plan.plan(made, H200, index, 1).workspace_bytes == 0
    # Eight tiles leave 124 multiprocessors idle: the chooser splits by itself.
    assert _cuda_plan.plan(made, H200).splits > 1


@needs_cuda_build
def test_large_layers_take_large_tiles_and_odd_ones_the_narrow_path():
    large = _cuda_plan.plan(forward_problem(image(256, 256, 14, 14), image(256, 256, 3, 3)), H200)
    assert large.name in ("256x128_8w4s", "128x128_4w4s") and large.splits == 1
    stem = forward_problem(image(8, 3, 224, 224), image(64, 3, 7, 7), ((2, 2), (3, 3), (1, 1), 1))
    assert _cuda_plan.plan(stem, H200).name.startswith("narrow_")
    assert stem.notes == (
        "x is read element by element: 3 channels a group",
        "weight is read element by element: 3 channels a group",
    )
    wide = _cuda_plan.plan(stem, H200, 0)
    assert wide.configuration == -1 and "16 bytes" in wide.why


@needs_cuda_build
def test_what_lies_otherwise_is_copied_once_and_said():
    x, weight = torch.zeros(2, 64, 9, 9).bfloat16(), torch.zeros(64, 64, 3, 3).bfloat16()
    made = forward_problem(x, weight)
    assert made.notes == ("x is copied to channels_last", "weight is copied to channels_last")
    assert not _cuda_plan.plan(made, H200).name.startswith("narrow_")
    out = torch.zeros(2, 64, 9, 9).bfloat16()
    real = _cuda_plan.problem_of("conv_bn_act", (x, weight, None), SAME, out)
    assert [t.stride(1) for t in real.operands[:2]] == [1, 1] and real.notes == made.notes
    kept = _cuda_plan.problem_of("conv_bn_act", (*real.operands[:2], None), SAME, out)
    assert all(a is b for a, b in zip(kept.operands, real.operands, strict=True))
    flat = torch.zeros(2 * 64 * 81 + 1).bfloat16()[1:]
    odd = forward_problem(flat.view(2, 9, 9, 64).permute(0, 3, 1, 2), real.operands[1])
    assert odd.notes == ("x is read element by element: its memory is not aligned",)
    assert _cuda_plan.plan(odd, H200).name.startswith("narrow_")


@needs_cuda_build
@pytest.mark.parametrize("op", OPS)
def test_refused_configurations_are_not_chosen(op):
    activation, weight = image(4, 64, 28, 28), image(64, 64, 3, 3)
    operands = {
        "conv_bn_act": (activation, weight, None),
        "conv_dgrad": (activation, activation, weight),
        "conv_wgrad": (activation, activation, activation),
    }[op]
    out = weight if op == "conv_wgrad" else activation
    made = _cuda_plan.problem_of(op, operands, SAME, out, real=False)
    first = _cuda_plan.choose(made, H200, None)
    names = frozenset(_cuda_plan.configurations(op))
    assert _cuda_plan.choose(made, H200, names) == first
    second = _cuda_plan.choose(made, H200, names - {first.name})
    assert second.configuration >= 0 and second.name != first.name
    assert second.cycles >= first.cycles
    left = _cuda_plan.choose(made, H200, frozenset(n for n in names if n.startswith("narrow_")))
    assert left.name.startswith("narrow_")
    nothing = _cuda_plan.choose(made, H200, frozenset())
    assert nothing.configuration == -1 and "none was admitted" in nothing.why


@needs_cuda_build
def test_a_gpu_with_little_shared_memory_gets_what_fits():
    made = forward_problem(image(256, 256, 14, 14), image(256, 256, 3, 3))
    little = (40, 65536, 65536)
    found = _cuda_plan.plan(made, little)
    assert found.name not in ("", "256x128_8w4s")
    assert "shared memory" in _cuda_plan.plan(made, little, 0).why


# Arguments: refused in the order of the checks, on the CPU too.


def arguments(**changes):
    made = {
        "x": image(2, 16, 5, 5, device="cpu"),
        "weight": image(8, 16, 3, 3, device="cpu"),
        "scale": torch.ones(8),
        "shift": torch.zeros(8),
        "residual": image(2, 8, 5, 5, device="cpu"),
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
        "groups": 1,
        "relu": True,
        "allow_tf32": False,
        "reverse": False,
        "dependent": False,
        "follows": False,
        "arrivals": None,
        "configuration": -1,
        "splits": 0,
        "out": image(2, 8, 5, 5, device="cpu"),
    }
    return made | changes


SHARED = image(2, 8, 5, 5, device="cpu")
BAD = [
    ({"x": torch.zeros(2, 16, 5).bfloat16()}, "x: expected 4 dimensions"),
    ({"x": image(2, 16, 5, 5, dtype=torch.float64, device="cpu")}, "got float64"),
    ({"x": torch.zeros(2, 16, 5, 5, dtype=torch.int32)}, "x: expected float32, float64"),
    ({"weight": image(8, 16, 3, 3, dtype=torch.float16, device="cpu")}, "weight: expected x's dt"),
    ({"weight": image(8, 4, 3, 3, device="cpu")}, "weight: expected [K, 16/groups, R, S]"),
    ({"groups": 0}, "groups: expected 1 to"),
    ({"groups": 3}, "K a multiple of groups = 3"),
    ({"stride": [0, 1]}, "stride: expected 1 to"),
    ({"padding": [-1, 1]}, "padding: expected 0 to"),
    ({"dilation": [1, 2**40]}, "dilation: expected 1 to"),
    ({"stride": [1, 1, 1]}, "stride: expected 2 integers, got [1, 1, 1]"),
    ({"dilation": [9, 9]}, "weight: it spans 19 pixels"),
    (
        {"out": image(2, 8, 5, 6, device="cpu")},
        "out: expected the convolution's shape [2, 8, 5, 5]",
    ),
    ({"residual": image(2, 8, 5, 1, device="cpu")}, "residual: expected out's shape"),
    ({"scale": torch.ones(7)}, "scale: expected shape [8]"),
    ({"shift": torch.zeros(8).bfloat16()}, "shift: expected float32"),
    ({"scale": torch.ones(16)[::2]}, "scale: expected a contiguous tensor"),
    ({"out": SHARED, "residual": SHARED}, "out: it shares memory with residual"),
    ({"out": image(1, 8, 5, 5, device="cpu").expand(2, 8, 5, 5)}, "out: its elements share memory"),
    ({"arrivals": torch.zeros(4)}, "arrivals: expected contiguous int32 zeros, got float32"),
    (
        {"arrivals": torch.zeros(8, dtype=torch.int32)[::2]},
        "arrivals: expected contiguous int32 zeros, got int32 of [4]",
    ),
    ({}, "conv_bn_act_out: expected CUDA tensors"),
]


@needs_cuda_build
@pytest.mark.parametrize(("changes", "said"), BAD, ids=[said for _, said in BAD])
def test_bad_arguments_are_named(changes, said):
    given = arguments(**changes)
    with pytest.raises(RuntimeError) as caught:
        torch.ops.resnet_fused.conv_bn_act_out(*given.values())
    assert said in str(caught.value)


@needs_cuda_build
@pytest.mark.parametrize(
    ("op", "changes", "said"),
    [
        ("conv_dgrad", {}, "conv_dgrad_out: expected CUDA tensors"),
        ("conv_dgrad", {"dy": image(2, 8, 5, 4, device="cpu")}, "dy: expected the convolution's"),
        ("conv_dgrad", {"y": image(2, 8, 4, 5, device="cpu")}, "y: expected dy's shape"),
        ("conv_dgrad", {"scale": torch.ones(9)}, "scale: expected shape [8]"),
        ("conv_dgrad", {"out": image(2, 17, 5, 5, device="cpu")}, "weight: expected [K, 17/groups"),
        ("conv_wgrad", {}, "conv_wgrad_out: expected CUDA tensors"),
        ("conv_wgrad", {"out": image(8, 9, 3, 3, device="cpu")}, "out: expected [K, 16/groups"),
        ("conv_wgrad", {"operand": torch.zeros(2, 16, 5, 5)}, "x: expected dy's dtype bfloat16"),
    ],
)
def test_bad_arguments_of_the_gradients_are_named(op, changes, said):
    activation, weight = image(2, 16, 5, 5, device="cpu"), image(8, 16, 3, 3, device="cpu")
    dgrad = op == "conv_dgrad"
    given = {
        "dy": image(2, 8, 5, 5, device="cpu"),
        "y": image(2, 8, 5, 5, device="cpu"),
        "operand": weight if dgrad else activation,
        "scale": torch.ones(8),
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
        "groups": 1,
        "allow_tf32": False,
        "configuration": -1,
        "splits": 0,
        "out": activation if dgrad else weight,
    } | changes
    with pytest.raises(RuntimeError) as caught:
        getattr(torch.ops.resnet_fused, f"{op}_out")(*given.values())
    assert said in str(caught.value)


@needs_cuda_build
@pytest.mark.parametrize("op", OPS)
def test_each_argument_arrives_under_its_own_name(op, monkeypatch):
    x, weight = image(2, 16, 5, 5, device="cpu"), image(8, 16, 3, 3, device="cpu")
    dy, y = image(2, 8, 5, 5, device="cpu"), image(2, 8, 5, 5, device="cpu")
    scale, shift, out = torch.ones(8), torch.zeros(8), torch.empty(0)
    geometry, got = ((1, 2), (3, 4), (5, 6), 1), []
    schema = torch._C._get_schema(f"resnet_fused::{op}_out", "")
    monkeypatch.setattr(_cuda_plan, "raw", lambda op, part: lambda *given: got.extend(given))
    monkeypatch.setattr(_cuda_plan, "tf32", lambda: True)
    named = {
        "scale": scale, "stride": [1, 2], "padding": [3, 4], "dilation": [5, 6], "groups": 1,
        "allow_tf32": True, "configuration": 2, "splits": 3, "out": out,
    }  # fmt: skip
    if op == "conv_bn_act":
        how = {"reverse": True, "dependent": False, "follows": True, "arrivals": torch.zeros(1)}
        named |= {"x": x, "weight": weight, "shift": shift, "residual": y, "relu": True, **how}
        given = (x, weight, scale, shift, y, out, *geometry, "relu")
        _cuda.launch_conv_bn_act(*given, wish=(2, 3), **how)
    elif op == "conv_dgrad":
        named |= {"dy": dy, "y": y, "weight": weight}
        _cuda.launch_conv_dgrad(dy, y, weight, scale, out, *geometry, wish=(2, 3))
    else:
        named |= {"dy": dy, "y": y, "x": x}
        _cuda.launch_conv_wgrad(dy, y, x, scale, out, *geometry, wish=(2, 3))
    names = [argument.name for argument in schema.arguments]
    assert set(names) == set(named) and len(names) == len(got)
    for name, value in zip(names, got, strict=True):
        same = value is named[name] if isinstance(value, torch.Tensor) else value == named[name]
        assert same, name


@pytest.mark.parametrize("copied", [None, 0, 1])
def test_behind_a_copy_no_kernel_begins_early(copied, monkeypatch):
    operands = [image(2, 16, 5, 5, device="cpu"), image(8, 16, 3, 3, device="cpu")]
    if copied is not None:
        operands[copied] = operands[copied].contiguous()
    got: list[object] = []
    monkeypatch.setattr(_cuda_plan, "raw", lambda op, part: lambda *given: got.extend(given))
    vectors, out = (torch.ones(8), torch.zeros(8)), torch.empty(0)
    _cuda.launch_conv_bn_act(
        *operands, *vectors, None, out, *SAME, "relu", wish=(0, 1), dependent=True, follows=True
    )
    dependent, follows = got[-6:-4]
    assert dependent is True and follows is (copied is None)


@pytest.mark.parametrize(("early", "follows"), [(True, True), (True, False), (False, True)])
def test_only_a_kernel_that_waits_follows_another(early, follows):
    found = _cuda.order("conv_bn_act", early=early, follows=follows, reverse=True)
    assert found == {"dependent": early, "follows": early and follows, "reverse": True}
    assert "reverse" not in _cuda.order("stem", early=early, follows=follows, reverse=True)


@needs_cuda_build
@pytest.mark.parametrize(
    ("batch", "channels", "size", "split"), [(1, 512, 7, True), (16, 64, 56, False)]
)
def test_splits_that_are_taken_again_and_again_keep_their_counters(
    batch, channels, size, split, monkeypatch
):
    monkeypatch.setattr(_cuda_plan, "gpu", lambda device: H200)
    monkeypatch.setattr(_cuda_plan._admitted, "names", lambda *_: None)
    x = image(batch, channels, size, size, device="cpu")
    weight = image(channels, channels, 3, 3, device="cpu")
    vectors = torch.ones(channels), torch.zeros(channels)
    found = _cuda.prepared("conv_bn_act", x, weight, *vectors, None, *SAME, "relu")
    assert ("arrivals" in found) is split
    if split:
        assert found["arrivals"].numel() == _cuda.COUNTERS and not found["arrivals"].any()
    assert _cuda.prepared("head", x, weight, None) == {}


@needs_cuda_build
@pytest.mark.parametrize("gpu", [(1,), (0, 1, 1), (132, 2**40, 1)])
def test_a_gpu_is_three_numbers(gpu):
    made = forward_problem(image(1, 16, 5, 5), image(16, 16, 3, 3))
    with pytest.raises(RuntimeError, match="gpu: "):
        _cuda_plan.plan(made, gpu)


# Who serves a call, and why not.


@pytest.fixture
def fit_gpu(monkeypatch):
    """A machine on which nothing but the op's own conditions speak against a kernel."""
    monkeypatch.setattr(admission, "refusal", lambda call, implementation: None)
    monkeypatch.setattr(_extension, "has_cuda_kernels", lambda: True)
    monkeypatch.setattr(_cuda_plan, "exists", lambda op: True)
    monkeypatch.setattr(_cuda_plan, "complete", lambda op, device: True)


@pytest.mark.parametrize("op", OPS)
def test_what_the_cuda_kernels_serve(op, fit_gpu, monkeypatch):
    def refused(dtype, **facts):
        return _cuda.supports(backends.Call(op, "cuda", dtype, index=0, **facts)) or ""

    assert refused(torch.bfloat16) == refused(torch.float16) == ""
    with torch.backends.cudnn.flags(allow_tf32=True):
        assert refused(torch.float32) == ""
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert "allow_tf32 is off" in refused(torch.float32)
        assert refused(torch.bfloat16) == ""
    assert "no CUDA kernel for torch.float64" in refused(torch.float64)
    assert "gradient of scale" in refused(torch.bfloat16, scale_grad=True)
    assert _cuda.supports(backends.Call(op, "cpu", torch.bfloat16)) == "x is on cpu"
    monkeypatch.setattr(admission, "refusal", lambda call, implementation: "not admitted: why")
    assert refused(torch.bfloat16) == "not admitted: why"
    monkeypatch.setattr(_cuda_plan, "exists", lambda op: False)
    assert "build it again" in refused(torch.bfloat16)
    monkeypatch.setattr(_extension, "has_cuda_kernels", lambda: False)
    assert "built without nvcc" in refused(torch.bfloat16)


@pytest.mark.parametrize("op", _cuda.GRADIENTS)
def test_a_gradient_wants_every_configuration(op, fit_gpu, monkeypatch):
    monkeypatch.setattr(_cuda_plan, "complete", lambda op, device: False)
    call = backends.Call(op, "cuda", torch.bfloat16, index=0)
    assert "some of its configurations were refused" in (_cuda.supports(call) or "")


def test_the_switch_for_tf32_is_heeded_from_call_to_call(fit_gpu):
    call = backends.Call("conv_bn_act", "cuda", torch.float32, index=0)
    backends.forget_choices()
    try:
        with rf.backend("cuda"):
            with torch.backends.cudnn.flags(allow_tf32=True):
                assert backends.choose(call).implementation.name == "cuda"
            with torch.backends.cudnn.flags(allow_tf32=False):
                found = backends.choose(call)
                assert found.implementation.name != "cuda"
                assert "allow_tf32 is off" in dict(found.refused)["cuda"]
    finally:
        backends.forget_choices()


@needs_cuda_build
def test_sizes_beyond_a_launch_are_refused_with_the_plans_reason(monkeypatch):
    monkeypatch.setattr(_cuda_plan, "gpu", lambda device: H200)
    monkeypatch.setattr(_cuda_plan._admitted, "names", lambda *_: None)
    usual = image(1, 8, 5, 5), image(8, 8, 3, 3)
    assert conv_bn_act.unfit("cuda", *usual, SAME) is None
    assert conv_bn_act.unfit("reference", *usual, SAME) is None
    far = image(1, 8, 5, 5), image(8, 8, 3, 3)
    spread = ((1 << 30, 1), (1, 1), (1, 1), 1)
    said = conv_bn_act.unfit("cuda", *far, spread)
    assert said is not None and "2^30" in said
    # Autocast has not cast the weight yet when it is asked.
    assert conv_bn_act.unfit("cuda", far[0], far[1].float(), spread) == said
    tall = image(1, 8, 20, 5), image(8, 8, 17, 1)
    said = conv_bn_act.unfit("cuda", *tall, SAME)
    assert said is not None and "17 x 1" in said and "15" in said
    dy, x = image(1, 8, 6, 7), tall[0]
    said = _cuda_plan.unfit("conv_wgrad", (dy, None, x), SAME, tall[1].shape)
    assert said is not None and "17 x 1" in said


@needs_cuda_build
def test_explain_tells_the_configuration_and_what_is_copied(monkeypatch):
    monkeypatch.setattr(_cuda_plan, "gpu", lambda device: H200)
    x, weight = torch.zeros(4, 64, 28, 28).bfloat16(), torch.zeros(64, 64, 3, 3).bfloat16()
    said = conv_bn_act.detail("cuda", x, weight, None, SAME)
    assert said is not None and "least predicted time" in said and "on 132 multiprocessors" in said
    assert said.endswith("x is copied to channels_last; weight is copied to channels_last")
    assert conv_bn_act.detail("triton", x, weight, None, SAME) is None


# The self-check, on the emulator.


def on_the_emulator(op: str):
    """The launch of a self-check, by the emulated kernel."""

    def launch(operands, more, out, geometry, wish):
        run = functools.partial(emulated.convolution, op)
        lists = [list(one) for one in geometry[:3]]
        with emulated.using(configuration=wish[0], splits=wish[1]):
            if op == "conv_bn_act":
                scale, shift, act = more
                x, weight, residual = operands
                y = run(x, weight, scale, shift, residual, *lists, geometry[3], act)
            elif op == "conv_dgrad":
                dy, mask, weight = operands
                size = list(out.shape)
                y = run(dy, mask, weight, more[0], size, True, *lists, geometry[3])
            else:
                dy, mask, x = operands
                y = run(dy, mask, x, torch.empty_like(out), more[0], *lists, geometry[3])
        out.copy_(y)

    return launch


@needs_cuda_build
@pytest.mark.emulated
@pytest.mark.parametrize("op", OPS)
def test_the_self_check_passes_right_kernels_and_no_wrong_ones(op, monkeypatch):
    monkeypatch.setattr(_cuda_checks, "DTYPES", (torch.float16,))
    monkeypatch.setattr(_cuda_checks, "CONV_CASES", _cuda_checks.CONV_CASES[2:3])
    launch, inputs = on_the_emulator(op), _cuda_checks.INPUTS[op]
    name = next(n for n in _cuda_plan.configurations(op) if n.startswith("narrow_"))
    _cuda_checks.check(op, name, "cpu", inputs, launch, H200)

    def wrong(operands, more, out, *rest):
        launch(operands, more, out, *rest)
        out[-1, -1, -1, -1] += 1

    with pytest.raises(ArithmeticError, match="1 of .* elements are wrong"):
        _cuda_checks.check(op, name, "cpu", inputs, wrong, H200)
    with pytest.raises(ArithmeticError, match="NaN or not written"):
        _cuda_checks.check(op, name, "cpu", inputs, lambda *_: None, H200)


@needs_cuda_build
@pytest.mark.emulated
def test_the_self_check_has_a_case_for_windows():
    """They take none of those that the others are checked on."""
    op, seen = "conv_bn_act", []
    launch = on_the_emulator(op)

    def seeing(operands, more, out, geometry, wish):
        seen.append((wish[0], out.dtype))
        launch(operands, more, out, geometry, wish)

    known = _cuda_plan.configurations(op)
    windows = [name for name in known if name.startswith(_cuda_plan.WINDOW)]
    assert len(windows) == 3
    for name in windows:
        _cuda_checks.check(op, name, "cpu", _cuda_checks.INPUTS[op], seeing, emulated.H200)
    dtypes = (torch.bfloat16, torch.float16)
    assert seen == [(known.index(name), dtype) for name in windows for dtype in dtypes]


@needs_cuda_build
@pytest.mark.emulated
def test_the_self_check_tries_every_size_of_a_cluster(monkeypatch):
    """18 steps are shared by all of them, three steps by two blocks alone."""
    op, seen = "conv_bn_act", []
    monkeypatch.setattr(_cuda_checks, "DTYPES", (torch.bfloat16, torch.float32))
    launch = on_the_emulator(op)

    def seeing(operands, more, out, geometry, wish):
        seen.append((wish, out.dtype))
        launch(operands, more, out, geometry, wish)

    known = _cuda_plan.configurations(op)
    clusters = [name for name in known if name.startswith(_cuda_plan.CLUSTER)]
    assert len(clusters) == 2
    for name in clusters:
        _cuda_checks.check(op, name, "cpu", _cuda_checks.INPUTS[op], seeing, emulated.H200)
    wishes = [(known.index(name), splits) for name in clusters for splits in (2, 4, 8, 2)]
    assert seen == [(wish, torch.bfloat16) for wish in wishes]


@needs_cuda_build
def test_a_self_check_that_checks_nothing_fails(monkeypatch):
    monkeypatch.setattr(_cuda_checks, "CONV_CASES", _cuda_checks.CONV_CASES[3:])  # the stem alone
    inputs = _cuda_checks.INPUTS["conv_bn_act"]
    with pytest.raises(ArithmeticError, match="no case of the self-check fits"):
        _cuda_checks.check("conv_bn_act", "128x128_4w4s", "cpu", inputs, lambda *_: None, H200)
    with pytest.raises(ValueError, match="accepted are '256x128_8w4s'"):
        _cuda_checks.check("conv_bn_act", "1x1", "cpu", inputs, lambda *_: None, H200)
