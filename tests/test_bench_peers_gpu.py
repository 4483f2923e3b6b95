"""The benchmark's peers for GPUs, without one: wiring on stand-ins, cuDNN's word on its graphs.

A stand-in computes on the CPU what the library would on a GPU, so that a swapped operand or a
forgotten shortcut is judged wrong here. That a library takes the calls is shown on hardware alone.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from types import ModuleType, SimpleNamespace

import cudnn_standin
import pytest
import torch
from bench_subjects import (
    BLOCK,
    CONV_ADD,
    assert_perturbed_is_wrong,
    assert_right,
    block,
    kernel,
    model,
    work_of,
)
from torch import Tensor, nn

from resnet_fused.bench.peers import PEERS, NoPeerError, _kernels
from resnet_fused.bench.peers import _cudnn_patterns as patterns
from resnet_fused.bench.subject import conv_case

RELU_ONLY = kernel("conv_bn_act", "3x3s2_8_16_at8")


@pytest.fixture(autouse=True)
def _no_gpu_is_asked(monkeypatch):
    stream = SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)


@pytest.fixture
def cudnn_ops(monkeypatch):
    """torch.cudnn_convolution_relu and _add_relu, with their signatures, on the CPU."""

    def plain(x: Tensor, weight: Tensor, bias: Tensor, stride, padding, dilation, groups) -> Tensor:
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups).relu_()

    def add(x, weight, z, alpha, bias, stride, padding, dilation, groups) -> Tensor:
        assert alpha == 1.0
        return (torch.conv2d(x, weight, bias, stride, padding, dilation, groups) + z).relu_()

    monkeypatch.setattr(torch, "cudnn_convolution_relu", plain)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add)


@pytest.mark.parametrize(
    "subject",
    [CONV_ADD, RELU_ONLY, BLOCK, block("inference", "resnet18.stem"), model("inference")],
    ids=lambda subject: subject.key,
)
def test_cudnn_by_pytorch(subject, cudnn_ops):
    assert_right(PEERS["cudnn"], work_of(subject))
    if subject.name != "resnet18.stem":  # which has one convolution: see `perturbed`
        assert_perturbed_is_wrong(PEERS["cudnn"], work_of(subject))


def test_cudnn_that_refuses_is_no_peer(monkeypatch):
    def refuse(*_arguments) -> Tensor:
        raise RuntimeError("GET was unable to find an engine to execute this computation")

    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", refuse)
    with pytest.raises(NoPeerError, match="as cuDNN calls: RuntimeError: GET was unable to find"):
        PEERS["cudnn"].prepare(work_of(CONV_ADD))


def use(monkeypatch, name: str, module: object) -> None:
    monkeypatch.setitem(sys.modules, name, module)


GRAPHS = [
    kernel("conv_bn_act", "3x3_8_8_at8_add", "float16"),
    kernel("conv_bn_act", "1x1s2_8_16_at8_noact", "bfloat16"),
    kernel("bn_act", "8_at8_add", "float16"),
    kernel("conv_dgrad", "3x3s2_8_16_at8", "float16"),
    kernel("conv_dgrad", "1x1_8_16_at8_noact", "bfloat16"),
    kernel("conv_wgrad", "3x3s2_8_16_at8", "float16"),
]


@pytest.mark.parametrize("subject", GRAPHS, ids=lambda subject: subject.key)
def test_cudnn_graphs_compute_the_kernels(subject, monkeypatch):
    standin = cudnn_standin.frontend()
    use(monkeypatch, "cudnn", standin)
    names = assert_right(PEERS["cudnn_graph"], work_of(subject))
    assert names[0].startswith(f"{subject.op}: eng0_")
    assert standin.handles == []
    assert_perturbed_is_wrong(PEERS["cudnn_graph"], work_of(subject))


LIVE = [
    (kernel("conv_bn_stats", "3x3_8_16_at8", "float16"), ["conv_bn_stats"]),
    (kernel("conv_bn_stats", "1x1s2_8_16_at8_noact", "bfloat16"), ["conv_stats"]),
    (kernel("conv_bn_dgrad", "3x3_8_16_at8", "float16"), ["bn_backward", "dgrad_relu_bn_sums"]),
    (kernel("conv_bn_dgrad", "1x1_8_16_at8_add_noact", "bfloat16"),
     ["bn_backward", "plain_dgrad", "added"]),
    (kernel("conv_bn_dgrad", "1x1s2_8_16_at8_noact", "float16"), ["bn_backward", "plain_dgrad"]),
    (kernel("conv_bn_wgrad", "3x3_8_16_at8", "float16"), ["bn_backward", "bn_relu_wgrad"]),
    (kernel("conv_bn_wgrad", "3x3s2_8_16_at8_noact", "bfloat16"), ["bn_backward", "plain_wgrad"]),
    (kernel("bn_add_act", "8_at8_add", "float16"), ["bn_add_act"]),
    (kernel("bn_add_act_backward", "8_at8_add", "bfloat16"), ["bn_add_act_backward"]),
]  # fmt: skip
APART = {
    "conv_bn_stats": ["bn_relu", "conv_stats_behind"],
    "conv_bn_dgrad": ["bn_backward", "plain_dgrad", "masked_sums"],
    "conv_bn_wgrad": ["bn_backward", "wgrad_behind"],
}


def graphs_of(names: list[str]) -> list[str]:
    return [name.partition(":")[0] for name in names if ": eng0_" in name]


@pytest.mark.parametrize(("subject", "expected"), LIVE, ids=lambda one: getattr(one, "key", ""))
def test_cudnn_graphs_compute_the_kernels_of_training(subject, expected, monkeypatch):
    """By the specialised patterns, whose first result is judged and must change with operands."""
    use(monkeypatch, "cudnn", cudnn_standin.frontend())
    peer, work = PEERS["cudnn_graph"], work_of(subject)
    on_gpu = dataclasses.replace(subject, device="cuda")
    assert "has no" not in (peer.why_not(on_gpu) or "")
    assert graphs_of(assert_right(peer, work)) == expected
    first = work.sets[0]
    fields = ("norm", "coefficients") if subject.op.startswith("conv") else ("own",)
    for field in fields[: 0 if subject.op == "bn_add_act_backward" else None]:
        rows = getattr(first, field)
        if rows is None:
            continue
        changed = rows.clone()
        changed[:, 0] = changed[:, 0] * -3.0 + 1.0
        spoilt = dataclasses.replace(work, sets=[dataclasses.replace(first, **{field: changed})])
        assert not work.judge(peer.prepare(spoilt).call(0)).ok, field


@pytest.mark.parametrize("op", APART)
def test_what_no_engine_of_training_fuses_is_graphs_apart(op, monkeypatch):
    """The float16 ways with 16 bits within, refused too, are asked for before."""
    asked = []

    def refuse(graph: cudnn_standin.Graph) -> bool:
        kinds = {node.kind for node in graph.nodes}
        conv = kinds & {"conv", "dgrad", "wgrad"}
        asked.append(graph.kinds["intermediate_data_type"])
        return bool(conv) and bool(kinds & {"scale", "drelu"})

    use(monkeypatch, "cudnn", cudnn_standin.frontend(refuse))
    names = assert_right(PEERS["cudnn_graph"], work_of(kernel(op, "3x3_8_16_at8", "float16")))
    assert graphs_of(names) == APART[op]
    assert ("HALF" in asked) is (op != "conv_bn_dgrad")
    asked.clear()
    names = assert_right(PEERS["cudnn_graph"], work_of(kernel(op, "3x3_8_16_at8", "bfloat16")))
    assert graphs_of(names) == APART[op]
    assert set(asked) == {"FLOAT"}


@pytest.mark.parametrize("subject", [GRAPHS[3], GRAPHS[5]], ids=lambda subject: subject.key)
def test_a_gradient_that_no_engine_fuses_is_two_graphs(subject, monkeypatch):
    def refuse(graph: cudnn_standin.Graph) -> bool:
        kinds = {node.kind for node in graph.nodes}
        return "drelu" in kinds and bool(kinds & {"dgrad", "wgrad"})

    use(monkeypatch, "cudnn", cudnn_standin.frontend(refuse))
    names = assert_right(PEERS["cudnn_graph"], work_of(subject))
    assert [name.partition(":")[0] for name in names[:2]] == [
        "masked_gradient", f"plain_{subject.op.removeprefix('conv_')}",
    ]  # fmt: skip


def test_a_graph_that_no_engine_takes_is_no_peer(monkeypatch):
    use(monkeypatch, "cudnn", cudnn_standin.frontend(lambda graph: True))
    with pytest.raises(NoPeerError) as caught:
        PEERS["cudnn_graph"].prepare(work_of(GRAPHS[3]))
    reason = "RefusedError: no engine proposed a plan"
    assert str(caught.value) == f"cuDNN refuses the graph: {reason}; {reason}"


@pytest.mark.parametrize("name", patterns.TRAINING)
def test_cudnn_graphs_compute_the_training_patterns(name):
    """Against the same mathematics, written with PyTorch's modules and autograd."""
    case = conv_case("3x3_8_16_at6", 2)
    generator = torch.Generator().manual_seed(0)
    draft = patterns.Draft(cudnn_standin.frontend(), torch.float32, handle=None)
    patterns.TRAINING[name](draft, case)
    given = {
        key: torch.randn(slot.shape, generator=generator).contiguous(
            memory_format=torch.channels_last
        )
        for key, slot in draft.inputs.items()
    }
    found = [
        torch.empty(slot.shape).contiguous(memory_format=torch.channels_last)
        for slot in draft.outputs
    ]
    pack = {slot.handle: given[key] for key, slot in draft.inputs.items()}
    pack |= {slot.handle: t for slot, t in zip(draft.outputs, found, strict=True)}
    draft.graph.built = ["validate", "graph", "plans", "support", "build"]
    draft.graph.execute(pack, torch.empty(1), handle=None)
    expected = EXPECTED[name](SimpleNamespace(**given))
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs.reshape(ours.shape), rtol=1e-4, atol=1e-4)


def _sums(y: Tensor) -> tuple[Tensor, ...]:
    return y, y.sum((0, 2, 3)), y.square().sum((0, 2, 3))


def _conv_bn_stats(o: SimpleNamespace) -> tuple[Tensor, ...]:
    return _sums(torch.conv2d((o.x * o.scale + o.shift).relu(), o.weight, padding=1))


def _dual(o: SimpleNamespace) -> tuple[Tensor, ...]:
    z = (o.x * o.scale + o.shift + o.residual * o.scale2 + o.shift2).relu()
    return z, *_sums(torch.conv2d(z, o.weight, padding=1))


def _dgrad(o: SimpleNamespace) -> tuple[Tensor, ...]:
    """dz is the gradient of z = BatchNorm(x), the sums are those of beta and gamma."""
    scale, shift = (t.clone().requires_grad_() for t in (o.gamma_below, o.beta_below))
    z = (o.x - o.mean) * o.invstd * scale + shift
    z.retain_grad()
    torch.conv2d(z.relu(), o.weight, padding=1).backward(o.g)
    return z.grad, shift.grad, scale.grad


def _wgrad(o: SimpleNamespace) -> tuple[Tensor, ...]:
    weight = torch.zeros(16, 8, 3, 3, requires_grad=True)
    torch.conv2d((o.x * o.scale + o.shift).relu(), weight, padding=1).backward(o.g)
    return (weight.grad,)


EXPECTED = {
    "conv_bn_stats": _conv_bn_stats,
    "dual_bn_add_relu_conv_stats": _dual,
    "bn_relu_wgrad": _wgrad,
    "dgrad_relu_bn_sums": _dgrad,
}


# What cuDNN tells of an H200: enough to plan for one where there is none.
H200 = {
    "version": 1, "deviceName": "NVIDIA H200", "deviceVer": 900, "driverVer": 13000,
    "cudaDeviceId": 0, "pciDeviceId": 0, "isTccDriver": 0, "supportCoopLaunch": 1,
    "smCountOrigin": 0, "multiProcessorCount": 132, "smClockRateKHz": 1980000,
    "memClockRateKHz": 3201000, "l2CacheSize": 62914560, "totalGlobalMem": 150754820096,
    "warpSize": 32, "regsPerBlock": 65536, "maxRegistersPerSM": 65536, "maxCtasPerSM": 32,
    "maxThreadsPerBlock": 1024, "maxThreadsPerSM": 2048, "maxGridSize": [2147483647, 65535, 65535],
    "maxBlockSize": [1024, 1024, 64], "maxSharedMemoryPerBlock": 49152,
    "maxSharedMemoryPerBlockOptin": 232448, "reservedSharedMemoryPerBlock": 1024,
    "oversizedSharedMemoryPerBlock": 232448,
}  # fmt: skip
# How an engine that would take a graph ends where there is no driver to compile or run with.
NO_DRIVER = ("RUNTIME_PREREQUISITE_MISSING", "cuda_get_device", "driver version is insufficient")


@pytest.fixture(scope="module")
def h200():
    """The real frontend and an H200's properties."""
    cudnn = pytest.importorskip("cudnn", reason="not installed: nvidia-cudnn-frontend")
    try:
        return cudnn, cudnn.create_device_properties(json.dumps(H200))
    except RuntimeError as error:
        pytest.skip(f"cuDNN {cudnn.backend_version()} wants other properties: {error}")


def planned(h200, pattern: patterns.Pattern, dtype: torch.dtype, case: object, **how) -> str:
    """What cuDNN says of a graph for an H200: "built", or why no engine takes it."""
    cudnn, properties = h200
    draft = patterns.Draft(cudnn, dtype, device_property=properties, **how)
    pattern(draft, case)
    draft.graph.validate()
    draft.graph.build_operation_graph()
    try:
        draft.graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        draft.graph.check_support()
        draft.graph.build_plans()
    except Exception as error:
        return str(error)
    return "built"


def taken(found: str) -> bool:
    """Whether an engine takes a graph, as far as can be said without a driver."""
    return found == "built" or any(text in found for text in NO_DRIVER)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", patterns.KERNELS)
def test_an_engine_of_cudnn_takes_each_kernels_graphs(op, dtype, h200):
    name = "3x3_64_64_at56_add" if op == "conv_bn_act" else "3x3s2_128_128_at56"
    case = kernel("bn_act", "256_at56_add").case if op == "bn_act" else conv_case(name, 8)
    for way in patterns.KERNELS[op]:
        for pattern in way:
            found = planned(h200, pattern, dtype, case)
            assert taken(found), f"{pattern.__name__}: {found[:2000]}"


@pytest.mark.parametrize("name", patterns.TRAINING)
def test_an_engine_of_cudnn_takes_each_training_pattern(name, h200):
    case = conv_case("3x3_64_64_at56", 8)
    found = planned(
        h200, patterns.TRAINING[name], torch.float16, case, narrow=name in patterns.NARROW
    )
    assert taken(found), found[:2000]


def test_a_graph_for_which_cudnn_has_no_engine_is_told_apart(h200):
    """Its engine for BatchNorm and ReLU in front of a weight's gradient is float16's alone."""
    case = conv_case("3x3_64_64_at56", 8)
    assert not taken(planned(h200, patterns.bn_relu_wgrad, torch.bfloat16, case, narrow=True))
    assert taken(planned(h200, patterns.bn_relu_wgrad, torch.float16, case, narrow=True))


@pytest.mark.parametrize("subject", [CONV_ADD, BLOCK], ids=lambda subject: subject.key)
def test_tensorrt_gets_the_module_and_its_inputs(subject, monkeypatch):
    seen: list[list[tuple[int, ...]]] = []

    def compile_engine(module: nn.Module, *, ir: str, inputs: list[Tensor], **_options):
        assert ir == "dynamo" and not module.training
        seen.append([tuple(t.shape) for t in inputs])
        return module

    use(monkeypatch, "torch_tensorrt", SimpleNamespace(compile=compile_engine))
    assert_right(PEERS["tensorrt"], work_of(subject))
    shapes = [(2, 8, 8, 8)] * 2 if subject is CONV_ADD else [(2, 64, 8, 8)]
    assert seen == [shapes] * (2 if subject is CONV_ADD else 1)
    assert_perturbed_is_wrong(PEERS["tensorrt"], work_of(subject))


def test_tensorrt_that_fails_is_no_peer(monkeypatch):
    def broken(*_arguments, **_options):
        raise ValueError("planted")

    use(monkeypatch, "torch_tensorrt", SimpleNamespace(compile=broken))
    with pytest.raises(NoPeerError, match="torch_tensorrt refuses it: ValueError: planted"):
        PEERS["tensorrt"].prepare(work_of(BLOCK))


class FrozenBn(nn.Module):
    """As apex's: buffers alone, and no eps."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        column = (1, -1, 1, 1)
        scale = self.weight.float() * self.running_var.float().rsqrt()
        shift = self.bias.float() - self.running_mean.float() * scale
        return (x.float() * scale.view(column) + shift.view(column)).to(x.dtype)


class ApexBottleneck(nn.Module):
    """As apex's: its constructor and children, computed by PyTorch."""

    def __init__(self, cin: int, width: int, cout: int, *, use_cudnn: bool, explicit_nhwc: bool):
        super().__init__()
        assert use_cudnn and not explicit_nhwc
        self.conv1 = nn.Conv2d(cin, width, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv3 = nn.Conv2d(width, cout, 1, bias=False)
        self.bn1, self.bn2, self.bn3 = FrozenBn(width), FrozenBn(width), FrozenBn(cout)
        conv = nn.Conv2d(cin, cout, 1, bias=False)
        self.downsample = None if cin == cout else nn.Sequential(conv, FrozenBn(cout))

    def get_scale_bias_callable(self):
        return lambda: None

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn3(self.conv3(self.bn2(self.conv2(y)).relu()))
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


def fused_conv(x, weight, scale, shift, padding, stride) -> Tensor:
    return (torch.conv2d(x, weight, None, stride, padding) * scale + shift).relu()


@pytest.fixture
def apex(monkeypatch):
    for name, part in {
        "apex": {}, "apex.contrib": {}, "apex.contrib.bottleneck": {"Bottleneck": ApexBottleneck},
        "apex.contrib.conv_bias_relu": {"ConvFrozenScaleBiasReLU": fused_conv},
    }.items():  # fmt: skip
        module = ModuleType(name)
        vars(module).update(part)
        use(monkeypatch, name, module)


@pytest.mark.parametrize(
    "subject",
    [
        kernel("conv_bn_act", "3x3s2_8_16_at8", "float16"),
        block("inference", "resnet50.layer1.0", "float16"),
        block("inference", "resnet50.layer1.1", "float16"),
    ],
    ids=lambda subject: subject.key,
)
def test_apex_gets_the_weights(subject, apex):
    assert_right(PEERS["apex"], work_of(subject))
    assert_perturbed_is_wrong(PEERS["apex"], work_of(subject))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("resnet50.layer2.0", "apex strides in the first convolution"),
        ("resnet18.layer1.0", "apex has bottlenecks, no "),
    ],
)
def test_blocks_that_apex_does_not_have(name, reason, apex):
    with pytest.raises(NoPeerError, match=reason):
        PEERS["apex"].prepare(work_of(block("inference", name, "float16")))


def test_apex_names_what_its_fused_convolution_lacks(monkeypatch):
    monkeypatch.setattr("resnet_fused.bench.peers.apex.installed", lambda module, package: None)
    subject = dataclasses.replace(CONV_ADD, device="cuda", dtype="float16")
    reason = "its fused convolution has a ReLU, no add, one group and no dilation"
    assert PEERS["apex"].why_not(subject) == reason
    plain = dataclasses.replace(subject, name="3x3_8_8_at8")
    assert PEERS["apex"].why_not(plain) is None
    wide = dataclasses.replace(plain, dtype="bfloat16")
    assert PEERS["apex"].why_not(wide) == "computes in float16, not bfloat16"


@pytest.mark.filterwarnings("ignore:CUDA is not available:UserWarning")
def test_a_gpus_work_is_waited_for_before_its_kernels_are_read(monkeypatch):
    waited: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(1))
    assert _kernels.traced(lambda i: torch.ones(2) + i, "cuda") == []
    assert waited == [1]
