"""ONNX Runtime, its outputs and inputs bound beforehand so that no copies are timed."""

from __future__ import annotations

import functools
import importlib.util
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from resnet_fused.bench.peers import _calls, _onnx_model
from resnet_fused.bench.peers._base import (
    NoPeerError,
    Prepared,
    first_line,
    first_reason,
    for_dtypes,
    for_ops,
    installed,
)

if TYPE_CHECKING:
    from resnet_fused.bench.subject import Subject
    from resnet_fused.bench.work import Work

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_TYPES = {torch.float32: 1, torch.float16: 10, torch.bfloat16: 16}  # onnx.TensorProto's numbers


class OnnxRuntime:
    """Inference by the execution provider of the subject's device."""

    name = "onnxruntime"
    isolated = True  # its thread pool spins, and would take time from the other variants
    limit_s = 300.0

    def why_not(self, subject: Subject) -> str | None:
        """Kernels are given in float32; bfloat16 convolutions are not in the CPU's provider."""
        kernel = subject.level == "kernel"
        dtypes = ("float32",) if kernel else ("float32", "float16")
        if subject.device == "cuda" and not kernel:
            dtypes = (*dtypes, "bfloat16")
        why = "a kernel's graph" if kernel else f"the {PROVIDERS[subject.device]}"
        needed = installed("onnx", "onnx") if kernel else installed("onnxscript", "onnxscript")
        return first_reason(
            for_ops(subject, _calls.INFERENCE),
            installed("onnxruntime", "onnxruntime"),
            needed,
            for_dtypes(subject, dtypes, why),
            _no_cuda() if subject.device == "cuda" else None,
        )

    def prepare(self, work: Work) -> Prepared:
        """Exports, loads and binds; a kernel's sets have a session each, on one thread pool.

        Raises:
            NoPeerError: the export fails, or the runtime refuses the model.
        """
        import onnxruntime

        # Errors alone: the runtime writes to the terminal on its own.
        onnxruntime.set_default_logger_severity(3)
        work = _calls.converted(work, lambda t: t.contiguous())
        with tempfile.TemporaryDirectory(prefix="resnet_fused-onnx-") as name:
            folder = Path(name)
            try:
                sources: list[Any] = _sources(work, folder)
                sessions = [_session(source, work.subject.device) for source in sources]
                runs = _bind(sessions, work)
                runs[0]()
                profile = _profile(sources[0], work, folder)
            except NoPeerError:
                raise
            except Exception as error:  # its exceptions share no base class
                raise NoPeerError(f"onnxruntime refuses it: {first_line(error)}") from error
        return Prepared(lambda i: runs[i](), lambda: profile)


def _no_cuda() -> str | None:
    """The wheel for the CPU lacks a library that the one for GPUs has; nothing is imported."""
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        return None
    library = "libonnxruntime_providers_cuda.so"
    if (Path(spec.origin).parent / "capi" / library).exists():
        return None
    return "the onnxruntime here is for the CPU alone: pip install onnxruntime-gpu"


def _sources(work: Work, folder: Path) -> list[Any]:
    """What sessions are made from: one model, or a kernel for each operand set."""
    if work.module is not None:
        return [str(_onnx_model.export(work, folder))]
    return [_onnx_model.kernel_model(work, i) for i in range(len(work.sets))]


@functools.cache
def _shared_pool(threads: int) -> bool:
    """Gives all sessions one pool of threads: many that spin would take each other's time.

    Returns:
        Whether there is one; an old runtime has none.
    """
    import onnxruntime

    make = getattr(onnxruntime, "set_global_thread_pool_sizes", None)
    if make is None:
        return False
    make(threads, 1)
    return True


def _session(source: Any, device: str, profile: Path | None = None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if _shared_pool(torch.get_num_threads()):
        options.use_per_session_threads = False
    else:
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile / "profile")
    provider = PROVIDERS[device]
    session = onnxruntime.InferenceSession(source, options, providers=[provider])
    if provider not in session.get_providers():
        raise NoPeerError(f"onnxruntime cannot use its {provider} here")
    return session


def _bind(sessions: list[Any], work: Work) -> list[Callable[[], Tensor]]:
    """A call for each operand set, of a session of its own or the only one."""
    return [
        _bound(sessions[i if len(sessions) > 1 else 0], _calls.inputs_of(operands))
        for i, operands in enumerate(work.sets)
    ]


def _bound(session: Any, inputs: list[Tensor]) -> Callable[[], Tensor]:
    device = inputs[0].device
    place = (device.type, device.index or 0)
    binding = session.io_binding()
    for name, t in zip(_onnx_model.INPUTS, inputs, strict=False):
        binding.bind_input(name, *place, _TYPES[t.dtype], list(t.shape), t.data_ptr())
    shape = session.get_outputs()[0].shape
    out = torch.empty(shape, dtype=inputs[0].dtype, device=device)
    binding.bind_output(
        _onnx_model.OUTPUT, *place, _TYPES[out.dtype], list(out.shape), out.data_ptr()
    )
    # The binding holds addresses alone: the closure keeps what lies there.
    kept = (inputs, out)

    def run() -> Tensor:
        session.run_with_iobinding(binding)
        return kept[1]

    return run


def _profile(source: Any, work: Work, folder: Path) -> list[str]:
    """The nodes that ran: "layer1.0.conv1: Conv (CPUExecutionProvider)"."""
    session = _session(source, work.subject.device, folder)
    _bound(session, _calls.inputs_of(work.sets[0]))()
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return node_names(events)


def node_names(events: list[dict[str, Any]]) -> list[str]:
    """The nodes among the events of ONNX Runtime's profile, in order, each once."""
    names: dict[str, None] = {}
    for event in events:
        about = event.get("args", {})
        if event.get("cat") == "Node" and "op_name" in about:
            node = event["name"].removesuffix("_kernel_time")
            names[f"{node}: {about['op_name']} ({about.get('provider', '?')})"] = None
    return list(names)
