"""OpenVINO on the CPU, at the subject's own precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from resnet_fused.bench.peers import _calls, _onnx_model
from resnet_fused.bench.peers._base import (
    NoPeerError,
    Prepared,
    first_line,
    first_reason,
    for_device,
    for_ops,
    installed,
)

if TYPE_CHECKING:
    from resnet_fused.bench.subject import Subject
    from resnet_fused.bench.work import Work

# dtype -> OpenVINO's short name of it, and that of its type as a property.
_PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


class OpenVino:
    """Inference, compiled for latency; activations are channels_last, as PyTorch's are."""

    name = "openvino"
    isolated = True  # its thread pool is its own
    limit_s = 180.0

    def why_not(self, subject: Subject) -> str | None:
        """Inference on the CPU."""
        return first_reason(
            for_device(subject, "cpu"),
            for_ops(subject, _calls.INFERENCE),
            installed("openvino", "openvino"),
            installed("onnx", "onnx") if subject.level == "kernel" else None,
        )

    def prepare(self, work: Work) -> Prepared:
        """Converts in float32, then compiles for the subject's precision.

        Raises:
            NoPeerError: OpenVINO refuses the model, or would compute in another precision.
        """
        try:
            models = _models(work)
            compiled = [_compiled(model, work) for model in models]
            runs = [
                _bound(compiled[i if len(compiled) > 1 else 0], operands)
                for i, operands in enumerate(work.sets)
            ]
            runs[0]()
        except NoPeerError:
            raise
        except Exception as error:  # its exceptions are RuntimeErrors by most roads, not by all
            raise NoPeerError(f"openvino refuses it: {first_line(error)}") from error
        return Prepared(lambda i: runs[i](), lambda: _profile(models[0], work))


def _models(work: Work) -> list[Any]:
    """One model, or a kernel for each operand set; their tensors channels_last."""
    import openvino

    if work.module is None:
        core = openvino.Core()
        made = [core.read_model(_onnx_model.kernel_model(work, i)) for i in range(len(work.sets))]
    else:
        module = _onnx_model.plain_copy(work.module).float()
        x = work.sets[0].x.detach().float().contiguous()
        with _onnx_model.silenced():
            made = [openvino.convert_model(module, example_input=x, input=[tuple(x.shape)])]
    return [_in_channels_last(model, work.subject.dtype) for model in made]


def _in_channels_last(model: Any, dtype: str) -> Any:
    """Lets a model take and give [N, H, W, C] of the subject's dtype."""
    import openvino
    from openvino.preprocess import PrePostProcessor

    kind = getattr(openvino.Type, _PRECISIONS[dtype])
    rank = len(model.outputs[0].get_partial_shape())
    layouts = openvino.Layout("NCHW"), openvino.Layout("NHWC")
    steps = PrePostProcessor(model)
    for index in range(len(model.inputs)):
        steps.input(index).tensor().set_layout(layouts[1]).set_element_type(kind)
        steps.input(index).model().set_layout(layouts[0])
    steps.output(0).tensor().set_element_type(kind)
    if rank == 4:
        steps.output(0).model().set_layout(layouts[0])
        steps.output(0).tensor().set_layout(layouts[1])
    return steps.build()


def _compiled(model: Any, work: Work, profile: bool = False) -> Any:
    import openvino

    wanted = _PRECISIONS[work.subject.dtype]
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": wanted,
        "PERF_COUNT": profile,
    }
    compiled = openvino.compile_model(model, "CPU", settings)
    found = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if found != wanted:
        raise NoPeerError(f"openvino would compute in {found} on this CPU, not in {wanted}")
    return compiled


def _bound(compiled: Any, operands: Any) -> Callable[[], Tensor]:
    """A call on tensors that OpenVINO reads and writes in place."""
    request, out = _request(compiled, operands)

    def run() -> Tensor:
        request.infer()
        return out

    return run


def _request(compiled: Any, operands: Any) -> tuple[Any, Tensor]:
    request = compiled.create_infer_request()
    inputs = _calls.inputs_of(operands)
    for index, t in enumerate(inputs):
        request.set_input_tensor(index, _shared(t))
    shape = list(compiled.outputs[0].shape)
    rows = torch.empty(shape, dtype=inputs[0].dtype)
    out = rows.permute(0, 3, 1, 2) if len(shape) == 4 else rows
    request.set_output_tensor(0, _shared(out))
    return request, out


def _shared(t: Tensor) -> Any:
    """An OpenVINO tensor on a torch tensor's memory, [N, H, W, C] where it has four dimensions."""
    import openvino

    rows = t.detach().permute(0, 2, 3, 1) if t.dim() == 4 else t.detach()
    if not rows.is_contiguous():
        rows = rows.contiguous()
    if rows.dtype is torch.bfloat16:  # numpy has none: the same bits, named to OpenVINO
        bits = rows.view(torch.int16).numpy()
        return openvino.Tensor(bits, openvino.Shape(list(rows.shape)), openvino.Type.bf16)
    return openvino.Tensor(rows.numpy(), shared_memory=True)


def _profile(model: Any, work: Work) -> list[str]:
    """The nodes that ran: "Multiply_2664: brgconv_avx512_f32 (Convolution)"."""
    request, _ = _request(_compiled(model, work, profile=True), work.sets[0])
    request.infer()
    return executed(request.get_profiling_info())


def executed(nodes: Any) -> list[str]:
    """The nodes of OpenVINO's profile that ran, with the kernel that each one took."""
    return [
        f"{node.node_name}: {node.exec_type} ({node.node_type})"
        for node in nodes
        if node.status.name == "EXECUTED"
    ]
