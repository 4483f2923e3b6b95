"""The benchmark's peers on the CPU: each is right and names what it ran, or says why not."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tempfile
from types import SimpleNamespace

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

from resnet_fused.bench.peers import (
    PEERS,
    NoPeerError,
    _base,
    _kernels,
    bare_onednn,
    joining,
    open_vino,
)
from resnet_fused.bench.peers.fused import Fused
from resnet_fused.bench.peers.timm import same_weights
from resnet_fused.bench.subject import Subject
from resnet_fused.bench.work import Work

NAMES = [
    "eager_nchw", "eager", "fused", "frozen", "triton", "cuda", "parts", "onednn", "inductor",
    "inductor_max_autotune", "inductor_freezing", "cudnn", "cudnn_graph", "timm", "onnxruntime",
    "openvino", "tensorrt", "apex",
]  # fmt: skip
# peer -> what stands among the kernels of a convolution with add and ReLU.
TELLING = {
    "eager_nchw": "aten::native_batch_norm",
    "eager": "aten::native_batch_norm",
    "fused": "resnet_fused.conv_bn_act.",
    "frozen": "conv+bn+add+relu by cpu",
    "onednn": "mkldnn::_convolution_pointwise",
    "onnxruntime": "Conv (CPUExecutionProvider)",
    "openvino": "(Convolution)",
    "inductor": "cpp_fused_",
    "inductor_max_autotune": "cpp_fused_",
    "inductor_freezing": "mkldnn::_convolution_pointwise",
}
IN_PROCESS = ("eager_nchw", "eager", "fused", "frozen", "onednn", "timm")
KERNELS = [
    CONV_ADD,
    kernel("conv_bn_act", "3x3s2_8_16_at8"),
    kernel("conv_bn_act", "1x1_16_8_at8_noact"),
    kernel("conv_bn_act", "3x3_16_16_at8_add", "bfloat16"),
    kernel("bn_act", "8_at8_add"),
    kernel("conv_dgrad", "3x3_8_8_at8"),
    kernel("conv_dgrad", "1x1s2_8_16_at8", "bfloat16"),
    kernel("conv_wgrad", "3x3s2_8_16_at8"),
    kernel("conv_wgrad", "1x1_8_16_at8_noact"),
]
NETWORKS = [
    BLOCK,
    block("inference", "resnet18.stem"),
    block("training", "resnet18.layer2.0"),
    block("training_frozen", "resnet18.layer1.0"),
    model("inference"),
    model("training"),
]


def _runs(subjects: list[Subject], names: tuple[str, ...]) -> list[object]:
    # Networks take seconds; timm has nothing but networks.
    slow = {
        (name, subject): [pytest.mark.slow]
        for subject in subjects
        for name in names
        if subject.level == "model" and (name != "timm" or subject.training)
    }
    return [
        pytest.param(name, subject, id=f"{name}-{subject.key}", marks=slow.get((name, subject), []))
        for subject in subjects
        for name in names
        if PEERS[name].why_not(subject) is None
    ]


def test_the_peers_stand_in_the_order_of_a_report():
    assert list(PEERS) == NAMES
    assert all(peer.name == name and peer.limit_s > 0 for name, peer in PEERS.items())
    isolated = {name for name, peer in PEERS.items() if peer.isolated}
    assert isolated == {*NAMES[8:11], "cudnn_graph", "onnxruntime", "openvino", "tensorrt", "apex"}


@pytest.mark.parametrize(("name", "subject"), _runs([*KERNELS, *NETWORKS], IN_PROCESS))
def test_a_peer_in_this_process_is_right_and_names_its_kernels(name, subject):
    names = assert_right(PEERS[name], work_of(subject))
    if subject in (CONV_ADD, BLOCK):
        assert any(TELLING[name] in found for found in names), names


@pytest.mark.parametrize(
    ("name", "subject"), _runs([CONV_ADD, BLOCK, model("training")], IN_PROCESS)
)
def test_a_peer_with_other_weights_is_wrong(name, subject):
    assert_perturbed_is_wrong(PEERS[name], work_of(subject))


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_runtimes_take_kernels_node_by_node(name):
    needs(name)
    names = assert_right(PEERS[name], work_of(CONV_ADD))
    assert any(TELLING[name] in found for found in names), names
    assert_perturbed_is_wrong(PEERS[name], work_of(CONV_ADD))
    assert_right(PEERS[name], work_of(kernel("bn_act", "8_at8_add")))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_runtimes_take_blocks_and_models(name, monkeypatch):
    needs(name, BLOCK)
    compiled = []
    inner = open_vino._compiled
    monkeypatch.setattr(
        open_vino, "_compiled", lambda *a, **k: compiled.append(a) or inner(*a, **k)
    )
    prepared = PEERS[name].prepare(work_of(BLOCK))
    assert len(compiled) == (name == "openvino")  # once for both operand sets
    prepared.close()
    names = assert_right(PEERS[name], work_of(BLOCK))
    assert any(TELLING[name] in found for found in names), names
    assert_perturbed_is_wrong(PEERS[name], work_of(BLOCK))
    assert_right(PEERS[name], work_of(model("inference")))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inductor", "inductor_max_autotune", "inductor_freezing"])
def test_compiled_kernels(name):
    needs(name)
    work = work_of(CONV_ADD)
    names = assert_right(PEERS[name], work)
    assert any(TELLING[name] in found for found in names), names
    assert_perturbed_is_wrong(PEERS[name], work)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "subject"),
    [("inductor_freezing", BLOCK), ("inductor", block("training", "resnet18.layer1.0"))],
)
def test_compiled_blocks(name, subject):
    needs(name, subject)
    assert_right(PEERS[name], work_of(subject))


def needs(name: str, subject: Subject = CONV_ADD) -> None:
    reason = PEERS[name].why_not(subject)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")


def test_a_failing_compilation_is_a_reason(monkeypatch):
    def broken(*_args, **_options):
        def run(*_operands):
            raise RuntimeError("planted\nin the second line: nothing")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(NoPeerError, match=r"^torch.compile failed: RuntimeError: planted$"):
        PEERS["inductor"].prepare(work_of(CONV_ADD))


def test_openvino_in_another_precision_is_refused(monkeypatch):
    needs("openvino")
    import openvino

    compile_model = openvino.compile_model

    def in_float32(model, device, settings):
        return compile_model(model, device, {**settings, "INFERENCE_PRECISION_HINT": "f32"})

    monkeypatch.setattr(openvino, "compile_model", in_float32)
    subject = kernel("conv_bn_act", "3x3_8_8_at8", "bfloat16")
    with pytest.raises(NoPeerError, match="would compute in f32 on this CPU, not in bf16"):
        PEERS["openvino"].prepare(work_of(subject))


def test_onnxruntime_leaves_no_files(monkeypatch, tmp_path):
    needs("onnxruntime")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    prepared = PEERS["onnxruntime"].prepare(work_of(CONV_ADD))
    assert prepared.kernels()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("op", "calls"),
    [("inference", 4), ("training", 1), ("training_frozen", 1)],  # a step may last many seconds
)
def test_only_what_packs_weights_is_called_again_to_prepare(op, calls, monkeypatch):
    made, run = [], Work.run
    monkeypatch.setattr(Work, "run", lambda *given: (made.append(op), run(*given))[1])
    work = work_of(block(op, "resnet18.layer1.0", "bfloat16"))
    with work.mode():
        PEERS["fused"].prepare(work)
    assert len(made) == calls


def test_a_forced_backend_that_falls_back_is_no_peer():
    with pytest.raises(NoPeerError, match=r"^triton does not serve it: it ran .*reference"):
        Fused("triton").prepare(work_of(CONV_ADD))
    with pytest.raises(NoPeerError, match="cuda does not serve it: it ran "):
        Fused("cuda").prepare(work_of(BLOCK))


def test_timm_says_which_parameters_differ():
    work = work_of(model("inference"))
    other = dataclasses.replace(work, subject=dataclasses.replace(work.subject, name="resnet17"))
    with pytest.raises(NoPeerError, match=r"timm .* has no model 'resnet17'"):
        PEERS["timm"].prepare(other)
    with pytest.raises(NoPeerError, match="its parameters are other ones: RuntimeError: Error"):
        same_weights(torch.nn.Conv2d(3, 4, 1), work.module)


def test_bare_onednn_still_compiles_the_models_of_torchvision():
    work = work_of(model("inference"))
    with torch.inference_mode():
        found = bare_onednn(work.module, work.sets[0].x)(work.sets[0].x)
    assert work.judge(found).ok


CUDA = {
    "kernel": kernel("conv_bn_act", "3x3_64_64_at8", "bfloat16", "cuda"),
    "add": kernel("conv_bn_act", "3x3_64_64_at8_add", "float16", "cuda"),
    "noact": kernel("conv_bn_act", "1x1_64_64_at8_noact", "float16", "cuda"),
    "float32": kernel("conv_bn_act", "3x3_64_64_at8", "float32", "cuda"),
    "block": block("inference", "resnet50.layer1.1", "float16", "cuda"),
    "training": model("training", device="cuda"),
}


@pytest.mark.parametrize(
    ("name", "subject", "reason"),
    [
        ("triton", CONV_ADD, "for a GPU, the subject is on cpu"),
        ("cuda", BLOCK, "for a GPU, the subject is on cpu"),
        ("cudnn", CONV_ADD, "for a GPU, the subject is on cpu"),
        ("cudnn_graph", CONV_ADD, "for a GPU, the subject is on cpu"),
        ("tensorrt", CONV_ADD, "for a GPU, the subject is on cpu"),
        ("apex", CONV_ADD, "for a GPU, the subject is on cpu"),
        ("onednn", CUDA["kernel"], "for the CPU, the subject is on cuda"),
        ("openvino", CUDA["block"], "for the CPU, the subject is on cuda"),
        ("onednn", model("training"), "has no training of a model"),
        ("onednn", kernel("bn_act", "8_at8"), "has no bn_act of a kernel"),
        ("onednn", kernel("conv_bn_act", "3x3_8_8_at8", "float16"),
         "computes in float32 and bfloat16, not float16"),
        ("timm", BLOCK, "has no inference of a block"),
        ("openvino", block("training", "resnet18.stem"), "has no training of a block"),
        ("onnxruntime", model("training"), "has no training of a model"),
        ("onnxruntime", model("inference", dtype="bfloat16"),
         "computes in float32 and float16, not bfloat16 (the CPUExecutionProvider)"),
        ("onnxruntime", kernel("bn_act", "8_at8", "float16"),
         "computes in float32, not float16 (a kernel's graph)"),
        ("inductor_freezing", model("training"),
         "frozen weights are for inference: inductor_freezing has no training of a model"),
        ("cudnn", CUDA["noact"], "cuDNN's fused convolutions end in a ReLU"),
        ("cudnn", CUDA["training"], "has no training of a model"),
        ("cudnn_graph", CUDA["block"], "has no inference of a block"),
    ],
)  # fmt: skip
def test_why_a_peer_is_left_out(name, subject, reason):
    assert PEERS[name].why_not(subject) == reason


@pytest.mark.parametrize(
    ("name", "subject", "module", "reason"),
    [
        ("timm", model("inference"), "timm", "not installed: pip install timm"),
        ("onnxruntime", BLOCK, "onnxruntime", "not installed: pip install onnxruntime"),
        ("onnxruntime", BLOCK, "onnxscript", "not installed: pip install onnxscript"),
        ("onnxruntime", CONV_ADD, "onnx", "not installed: pip install onnx"),
        ("openvino", BLOCK, "openvino", "not installed: pip install openvino"),
        ("openvino", CONV_ADD, "onnx", "not installed: pip install onnx"),
        ("triton", CUDA["kernel"], "triton", "not installed: pip install triton"),
        ("inductor", CUDA["kernel"], "triton", "not installed: pip install triton"),
        ("cudnn_graph", CUDA["kernel"], "cudnn",
         "not installed: pip install nvidia-cudnn-frontend"),
        ("tensorrt", CUDA["block"], "torch_tensorrt", "not installed: pip install torch-tensorrt"),
        ("apex", CUDA["block"], "apex", "not installed: build https://github.com/NVIDIA/apex with "
         "its contrib extensions"),
    ],
)  # fmt: skip
def test_what_is_not_installed_is_said_with_its_remedy(name, subject, module, reason, monkeypatch):
    find = _base.importlib.util.find_spec
    monkeypatch.setattr(
        _base.importlib.util, "find_spec",
        lambda other: None if other == module else find("os"),
    )  # fmt: skip
    assert PEERS[name].why_not(subject) == reason


def test_asking_imports_nothing_heavy():
    code = (
        "import sys; from resnet_fused.bench.peers import joining; "
        "from resnet_fused.bench.subject import Subject; "
        "[joining(Subject('kernel', 'conv_bn_act', '3x3_8_8_at8', 1, 'float32', d)) "
        "for d in ('cpu', 'cuda')]; "
        "heavy = {'timm', 'onnx', 'onnxscript', 'onnxruntime', 'openvino', 'cudnn'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_a_missing_compiler_is_a_reason(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    reason = PEERS["inductor"].why_not(CONV_ADD)
    assert reason == "no C++ compiler for the CPU's code (looked for no-such-compiler)"


@pytest.mark.parametrize(
    ("available", "capability", "reason"),
    [
        (False, (0, 0), "torch sees no GPU"),
        (True, (7, 5), "needs compute capability 8.0, this GPU has 7.5"),
        (True, (9, 0), None),
    ],
)
def test_capabilities(available, capability, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert _base.for_capability(CUDA["kernel"], 8) == reason
    assert _base.for_capability(CONV_ADD, 8) is None


def test_joining_accounts_for_everybody():
    joined, omitted = joining(CONV_ADD)
    assert sorted([*(peer.name for peer in joined), *omitted]) == sorted(NAMES)
    assert [peer.name for peer in joined][:3] == ["eager_nchw", "eager", "fused"]
    assert all(omitted.values())
    few, reasons = joining(CONV_ADD, ["fused", "cudnn", "eager"])
    assert [peer.name for peer in few] == ["eager", "fused"]
    assert list(reasons) == ["cudnn"]
    with pytest.raises(ValueError, match=r"peers holds 'tensorflow'; accepted are eager_nchw, "):
        joining(CONV_ADD, ["eager", "tensorflow"])


def _op(name: str, *children: SimpleNamespace) -> SimpleNamespace:
    made = SimpleNamespace(name=name, cpu_children=list(children), cpu_parent=None)
    for child in children:
        child.cpu_parent = made
    return made


def _flat(event: SimpleNamespace) -> list[SimpleNamespace]:
    return [event, *(inner for child in event.cpu_children for inner in _flat(child))]


def test_a_kernel_on_the_cpu_is_an_op_that_calls_no_other_that_computes():
    conv = _op("aten::mkldnn_convolution", _op("aten::empty"), _op("aten::fill_"))
    events = [
        *_flat(_op("aten::conv2d", _op("aten::convolution", conv))),
        *_flat(_op("aten::to", _op("aten::_to_copy", _op("aten::copy_")))),
        *_flat(_op("autograd::engine::evaluate_function", _op("aten::add_"))),
        *_flat(_op("[memory]")),
        *_flat(_op("aten::add_")),
    ]
    assert _kernels.kernel_names(events, "cpu") == [
        "aten::mkldnn_convolution", "aten::copy_", "aten::add_",
    ]  # fmt: skip


def test_a_kernel_on_a_gpu_is_what_ran_there():
    device = torch.autograd.DeviceType
    events = [
        SimpleNamespace(name=name, device_type=where)
        for name, where in [
            ("aten::conv2d", device.CPU), ("sm90_xmma_fprop", device.CUDA),
            ("Memset (Device)", device.CUDA), ("sm90_xmma_fprop", device.CUDA),
            ("triton_poi_fused_relu", device.CUDA), ("cudaLaunchKernel", device.CPU),
        ]
    ]  # fmt: skip
    found = _kernels.kernel_names(events, "cuda")
    assert found == ["sm90_xmma_fprop", "triton_poi_fused_relu"]
