"""Files of PyTorch's tensors: `torch.save`'s, by torchvision, timm and others, and safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet_fused.weights.released import Weights, WeightsError

# Under these a checkpoint keeps its state_dict, beside an optimiser and counters.
_KEYS = ("state_dict", "model", "model_state_dict")
# DistributedDataParallel, torch.compile and Lightning put these in front of every name.
_PREFIXES = ("module.", "_orig_mod.", "model.")


def read_torch(file: Path) -> Weights:
    """Reads a state_dict, or a checkpoint that holds one; no code of the file's is run.

    Raises:
        WeightsError: a file that is broken, holds something else, or would run code.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        # Of a broken file torch raises nearly anything; all of it means the same here.
        raise _corrupt(file, error) from error
    return _weights(content, "torch", file)


def read_safetensors(file: Path) -> Weights:
    """Reads a file of safetensors.

    Raises:
        WeightsError: a file that is broken.
        ModuleNotFoundError: safetensors is not installed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        content = load_file(file)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise _corrupt(file, error) from error
    return _weights(content, "safetensors", file)


def _corrupt(file: Path, error: Exception) -> WeightsError:
    line = str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__
    return WeightsError(
        f"'{file}' is corrupt or no file of weights ({line}); accepted: a state_dict saved by "
        "torch.save (tensors only), safetensors, a .caffemodel, or Detectron's .pkl"
    )


def _weights(content: Any, form: str, file: Path) -> Weights:
    for key in _KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    tensors = isinstance(content, dict) and all(isinstance(v, Tensor) for v in content.values())
    if not tensors or not content:
        raise WeightsError(f"'{file}' holds no state_dict (a dict of tensors)")
    state: dict[str, Tensor] = dict(content)
    while (prefix := _prefix(state)) is not None:
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return Weights(state, form, str(file))


def _prefix(state: dict[str, Tensor]) -> str | None:
    """What stands in front of every name."""
    return next((p for p in _PREFIXES if all(key.startswith(p) for key in state)), None)
