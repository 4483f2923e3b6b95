"""Options that several commands share, and the checks that need torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from resnet_fused.cli._errors import UserError, user_errors

if TYPE_CHECKING:
    import torch

F = TypeVar("F", bound=Callable[..., Any])
DTYPES = ("float32", "bfloat16", "float16")


def json_option(function: F) -> F:
    """`--json`: one JSON document on stdout, nothing else."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)


def device_option(function: F) -> F:
    """`--device`."""
    return click.option(
        "--device", default="cpu", show_default=True, metavar="cpu|cuda|cuda:N", help="Where."
    )(function)


def dtype_option(function: F) -> F:
    """`--dtype`, one of DTYPES."""
    return click.option(
        "--dtype", type=click.Choice(DTYPES), default="float32", show_default=True,
        help="Of weights and activations.",
    )(function)  # fmt: skip


def size_option(function: F) -> F:
    """`--size`, the images' side."""
    return click.option(
        "--size", type=click.IntRange(min=32), default=224, show_default=True,
        metavar="PIXELS", help="Side of the images.",
    )(function)  # fmt: skip


class ListOf(click.ParamType):
    """Values separated by commas, each of the given type, none twice.

    Args:
        item: type of one value.
    """

    def __init__(self, item: click.ParamType) -> None:
        self.item = item
        self.name = f"{item.name},..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A tuple of the values."""
        if not isinstance(value, str):
            return tuple(value)
        words = [word.strip() for word in value.split(",")]
        return tuple(dict.fromkeys(self.item.convert(word, param, ctx) for word in words))


def torch_device(name: str) -> torch.device:
    """The device of this name.

    Raises:
        UserError: no device's name, or one that this machine or this torch lacks.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device: {name!r} is no device; accepted: cpu, cuda, cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device: {name!r} is not supported; accepted: cpu, cuda, cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            reason = "torch sees no CUDA GPU" if torch.version.cuda else "torch has no CUDA"
            raise UserError(f"--device: {name!r} cannot be used, {reason}; use --device cpu")
        if (device.index or 0) >= (count := torch.cuda.device_count()):
            raise UserError(f"--device: {name!r} is not there, this machine has {count} GPU(s)")
    elif device.index not in (None, 0):
        raise UserError(f"--device: {name!r} is not there; accepted: cpu, cuda, cuda:N")
    return device


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of one of the names in DTYPES."""
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def check_environment() -> tuple[str, str]:
    """The backend asked for and who asks.

    Raises:
        UserError: the environment variable names no backend.
    """
    from resnet_fused import backends

    with user_errors():
        return backends.requested()
