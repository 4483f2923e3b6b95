"""`resnet-fused explain`: which implementation each layer of a model takes, and why."""

from __future__ import annotations

import click

from resnet_fused.cli._errors import UserError
from resnet_fused.cli._options import (
    check_environment,
    device_option,
    dtype_option,
    json_option,
    size_option,
    torch_device,
    torch_dtype,
)
from resnet_fused.cli._output import echo_json, table

MODES = ("inference", "training")


@click.command()
@click.argument("model")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Images.")
@size_option
@dtype_option
@device_option
@click.option(
    "--mode",
    type=click.Choice(MODES),
    default="inference",
    show_default=True,
    help="inference: BatchNorm with its kept statistics, without gradients; training: "
    "with the batch's, and with gradients.",
)
@json_option
def explain(
    model: str, batch: int, size: int, dtype: str, device: str, mode: str, as_json: bool
) -> None:
    """Fuse MODEL and show which implementation serves each layer.

    MODEL is torchvision's name (resnet50), timm:NAME, or rf:NAME (resnet_fused.models). With --mode
    training it is one forward pass in training mode, whose layers also say what their backward
    takes.
    """  # fmt: skip
    check_environment()
    where = torch_device(device)
    import torch

    import resnet_fused as rf
    from resnet_fused.bench.model import cast
    from resnet_fused.cli import _models

    network = _models.load(model)
    fused = rf.fuse(cast(network.model, where, torch_dtype(dtype)))
    fused.train(mode == "training")
    x = torch.zeros(batch, 3, size, size, device=where, dtype=torch_dtype(dtype))
    try:
        with torch.set_grad_enabled(mode == "training"):
            found = rf.explain(fused, x.to(memory_format=torch.channels_last))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"--batch {batch} with --size {size}: {error}; accepted are more images, or larger ones"
        ) from error
    if as_json:
        echo_json({"model": model, "batch": batch, "size": size, "dtype": dtype, "device": device,
                   "mode": mode, **found.to_dict()})  # fmt: skip
        return
    rows = [[row.layer, row.pattern, row.implementation, row.why] for row in found.rows]
    click.echo(table(["layer", "pattern", "implementation", "why"], rows))
    click.echo(found.summary())
