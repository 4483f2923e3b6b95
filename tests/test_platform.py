"""What a kernel needs of the machine, on given values: no GPU is asked."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from resnet_fused import _platform
from resnet_fused.ops import _selfchecks

BUILD = {"cuda": True, "nvcc": "13.0.88", "archs": ["80", "86", "90a", "100", "120+PTX"]}
FIT = {"torch_cuda": "13.2", "driver": 13020, "capability": (9, 0), "build": BUILD}


@pytest.mark.parametrize("implementation", ["triton", "cuda"])
def test_a_fit_machine(implementation):
    assert _platform.refusal_of_platform(implementation, **FIT) is None


@pytest.mark.parametrize("implementation", ["triton", "cuda"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"torch_cuda": None}, "torch is built without CUDA"),
        ({"driver": None}, "no NVIDIA driver is found"),
        ({"driver": 12080}, "the driver runs CUDA 12.8, too old for torch's CUDA 13.2"),
        ({"capability": None}, "torch can't use the GPU"),
        ({"capability": (7, 5)}, "the GPU is sm_75; kernels need sm_80 or later"),
    ],
)
def test_machines_that_no_kernel_runs_on(implementation, change, reason):
    assert _platform.refusal_of_platform(implementation, **{**FIT, **change}) == reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"torch_cuda": "12.9"}, "built with CUDA 13.0.88, torch with CUDA 12.9"),
        (
            {"torch_cuda": "12.9", "driver": 12090},
            "another major version; build the extension again",
        ),
        ({"build": {**BUILD, "nvcc": None}}, "the extension was built without nvcc"),
        ({"build": {}}, "the extension was built without nvcc"),
        ({"capability": (11, 0)}, "the extension holds no code for sm_110, only for 80, 86, 90a"),
        ({"build": {**BUILD, "archs": []}}, "the extension holds no code for sm_90, only for none"),
    ],
)
def test_machines_that_the_extension_alone_does_not_run_on(change, reason):
    refusal = _platform.refusal_of_platform("cuda", **{**FIT, **change})
    assert refusal is not None and reason in refusal
    assert _platform.refusal_of_platform("triton", **{**FIT, **change}) is None


def test_minor_versions_of_cuda_go_together():
    """A driver of 13.0 runs what 13.2 built: the driver's promise within a major version."""
    assert _platform.refusal_of_platform("cuda", **{**FIT, "driver": 13000}) is None


@pytest.mark.parametrize(
    ("archs", "capability", "held"),
    [
        (["80"], (8, 0), True), (["80"], (8, 9), True), (["86"], (8, 0), False),
        (["80"], (9, 0), False), (["90a"], (9, 0), True), (["100a"], (10, 3), False),
        (["100"], (10, 3), True), (["100f"], (10, 0), True), (["80+PTX"], (9, 0), True),
        (["120+PTX"], (11, 0), False), (["80", "120+PTX"], (13, 0), True), ([], (8, 0), False),
    ],
)  # fmt: skip
def test_which_gpus_code_serves(archs, capability, held):
    assert _platform._holds(archs, capability) is held


def test_this_machine():
    assert _platform.platform_refusal("triton", "cpu") is None
    if not torch.cuda.is_available():
        assert _platform.platform_refusal("triton", 0) in (
            "torch is built without CUDA", "no NVIDIA driver is found", "torch can't use the GPU",
        )  # fmt: skip
    cpu = _platform.identify("cpu")
    assert (cpu.capability, cpu.torch, cpu.cuda) == ("cpu", torch.__version__, torch.version.cuda)


@pytest.mark.parametrize(
    ("content", "driver"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug\n",
            "13000 535.104.05",
        ),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n",
            "13000 580.65.06",
        ),
        ("", "13000"),
        (None, "13000"),
    ],
)
def test_the_drivers_own_version(content, driver, tmp_path, monkeypatch):
    file = tmp_path / "version"
    if content is not None:
        file.write_text(content)
    monkeypatch.setattr(_platform, "DRIVER_FILE", file)
    monkeypatch.setattr(_platform, "cuda_of_driver", lambda: 13000)
    assert _platform._driver() == driver
    monkeypatch.setattr(_platform, "cuda_of_driver", lambda: None)
    assert _platform._driver() is None


def test_no_triton_is_imported():
    code = "import sys, resnet_fused.ops; print(sorted(m for m in sys.modules if m == 'triton'))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


@pytest.fixture
def raw(monkeypatch):
    """The compiled op, and a way to put another in its place."""
    op = getattr(torch.ops.resnet_fused, "bn_act_out", None)
    if op is None:
        pytest.skip("the compiled extension is missing")

    def replace(body):
        monkeypatch.setattr(torch.ops.resnet_fused, "bn_act_out", lambda *args: body(op, *args))

    return replace


def test_the_check_of_bn_act_passes_what_is_right(raw):
    (configuration,) = _selfchecks.bn_act_configurations()
    _selfchecks.bn_act(configuration, "cpu")
    with pytest.raises(ValueError, match="configuration is 'other'; accepted is 'default'"):
        _selfchecks.bn_act("other", "cpu")


def swapped(op, x, scale, shift, residual, relu, out):
    op(x, shift, scale, residual, relu, out)


def without_residual(op, x, scale, shift, residual, relu, out):
    op(x, scale, shift, None, relu, out)


def without_relu(op, x, scale, shift, residual, relu, out):
    op(x, scale, shift, residual, False, out)


def not_written(op, x, scale, shift, residual, relu, out):
    op(x, scale, shift, residual, relu, out)
    out.as_strided((1,), (1,), out.storage_offset()).fill_(float("nan"))


def beside(op, x, scale, shift, residual, relu, out):
    op(x, scale, shift, residual, relu, out)
    out.as_strided((1,), (1,), out.storage_offset() + out.numel()).zero_()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (swapped, "elements are wrong, the first at"),
        (without_residual, "elements are wrong"),
        (without_relu, "elements are wrong"),
        (not_written, "1 of .* elements are NaN or not written"),
        (beside, "elements beside the output were written"),
    ],
)
def test_the_check_of_bn_act_refuses_what_is_wrong(body, message, raw):
    raw(body)
    with pytest.raises(ArithmeticError, match=message):
        _selfchecks.bn_act("default", "cpu")
