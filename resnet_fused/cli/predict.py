"""`resnet-fused predict`: what is in a picture, by a fused network."""

from __future__ import annotations

from pathlib import Path

import click

from resnet_fused.cli._errors import user_errors
from resnet_fused.cli._options import (
    check_environment,
    device_option,
    dtype_option,
    json_option,
    torch_device,
    torch_dtype,
)
from resnet_fused.cli._output import echo_json


@click.command()
@click.argument("image", type=click.Path(path_type=Path))
@click.option("--model", default="resnet50", show_default=True, help="As for `explain`.")
@click.option(
    "--weights",
    default="DEFAULT",
    show_default=True,
    metavar="FILE|NAME",
    help="A .pth, .pt or .safetensors file, or published weights (IMAGENET1K_V2), downloaded.",
)
@click.option("--topk", type=click.IntRange(min=1), default=5, show_default=True, help="Classes.")
@device_option
@dtype_option
@json_option
def predict(
    image: Path, model: str, weights: str, topk: int, device: str, dtype: str, as_json: bool
) -> None:
    """Name the most likely classes of IMAGE."""
    check_environment()
    where = torch_device(device)
    import torch

    import resnet_fused as rf
    from resnet_fused.bench.model import cast
    from resnet_fused.cli import _models
    from resnet_fused.data import load_image

    # The picture first: nobody wants to learn after a download that its name was misspelt.
    with user_errors():
        picture = load_image(image)
    network = _models.load(model, weights, quiet=as_json)
    fused = rf.fuse(cast(network.model, where, torch_dtype(dtype)))
    x = network.transform(picture)[None].to(device=where, dtype=torch_dtype(dtype))
    with torch.inference_mode():
        logits = fused(x.to(memory_format=torch.channels_last))[0]
    probabilities = logits.float().softmax(0)
    best = probabilities.topk(min(topk, len(probabilities)))
    found = [
        {"rank": rank, "index": index, "label": network.categories[index], "probability": value}
        for rank, (value, index) in enumerate(
            zip(best.values.tolist(), best.indices.tolist(), strict=True), start=1
        )
    ]
    if as_json:
        echo_json({"image": str(image), "model": model, "weights": network.weights,
                   "device": str(where), "dtype": dtype, "predictions": found})  # fmt: skip
        return
    for entry in found:
        click.echo(f"{entry['probability']:7.2%}  {entry['label']}")
