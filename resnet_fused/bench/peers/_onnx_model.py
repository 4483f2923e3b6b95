"""A subject as an ONNX model: kernels node by node, blocks and models by torch's exporter."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from resnet_fused.bench.peers._base import NoPeerError, first_line
from resnet_fused.bench.peers._calls import EPS

if TYPE_CHECKING:
    from resnet_fused.bench.work import Work

OPSET = 18
IR_VERSION = 10
INPUTS = ("x", "residual")
OUTPUT = "y"


def kernel_model(work: Work, i: int) -> bytes:
    """conv_bn_act or bn_act with operand set i's weights, float32: Conv, BatchNormalization, ...

    Inputs are "x" and, with a shortcut, "residual"; the output is "y".
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    case: Any = work.case
    o = work.sets[i]
    constants = {
        "scale": o.scale, "shift": o.shift,
        "mean": torch.zeros_like(o.scale), "variance": torch.full_like(o.scale, 1.0 - EPS),
    }  # fmt: skip
    nodes, last = [], "x"

    def then(kind: str, *more: str, **attributes: Any) -> None:
        nonlocal last
        made = f"{kind}_{len(nodes)}"
        nodes.append(helper.make_node(kind, [last, *more], [made], name=made, **attributes))
        last = made

    if work.subject.op == "conv_bn_act":
        constants["weight"] = o.weight
        then(
            "Conv", "weight", strides=case.stride, dilations=case.dilation, group=case.groups,
            pads=(*case.padding, *case.padding), kernel_shape=(case.r, case.s),
        )  # fmt: skip
    then("BatchNormalization", "scale", "shift", "mean", "variance", epsilon=EPS)
    if o.residual is not None:
        then("Add", "residual")
    if case.act == "relu":
        then("Relu")
    nodes[-1].output[0] = OUTPUT
    shapes = {"x": tuple(o.x.shape)}
    if o.residual is not None:
        shapes["residual"] = tuple(o.residual.shape)
    out = case.shape if work.subject.op == "bn_act" else case.output_shape
    graph = helper.make_graph(
        nodes, "kernel",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, out)],
        [numpy_helper.from_array(_array(t), name) for name, t in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = IR_VERSION  # what a runtime reads that is older than this onnx
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _array(t: Tensor) -> np.ndarray:
    return t.detach().float().cpu().contiguous().numpy()


def export(work: Work, folder: Path) -> Path:
    """Writes a block or model as `model.onnx`, in its own dtype, with a static batch.

    Args:
        work: an inference subject with a module.
        folder: where the file and its weights come to lie.

    Raises:
        NoPeerError: the exporter fails; in its own first line.
    """
    assert work.module is not None
    module = plain_copy(work.module)
    x = work.sets[0].x.detach().contiguous()
    path = folder / "model.onnx"
    try:
        with silenced():
            torch.onnx.export(
                module, (x,), str(path), dynamo=True, verbose=False, input_names=["x"],
                output_names=[OUTPUT], opset_version=OPSET,
            )  # fmt: skip
    except Exception as error:  # exporters fail in many ways
        raise NoPeerError(f"torch.onnx.export failed: {first_line(error)}") from error
    return path


def plain_copy(module: nn.Module) -> nn.Module:
    """A copy for tracing: evaluation mode, contiguous weights, no gradients."""
    copied = copy.deepcopy(module).eval().requires_grad_(False)
    return copied.to(memory_format=torch.contiguous_format)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Keeps an exporter's talk away from a command's output; errors still rise."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
