"""How strongly layers respond: standard deviations behind BatchNorm ([He15] figure 7)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from resnet_fused.convert import unfuse
from resnet_fused.nn._modules import is_norm
from resnet_fused.paper import runs as runs_
from resnet_fused.paper.base import Check, Experiment, Finding, Runs, line, panel
from resnet_fused.paper.runs import Job, Run
from resnet_fused.paper.scales import Scale
from resnet_fused.paper.statistics import Spread
from resnet_fused.paper.variants import Variant, plain, residual


def variants(scale: Scale) -> list[Variant]:
    """Plain and residual networks of the least and of the greatest depth."""
    ends = sorted({scale.depths[0], scale.depths[-1]})
    return [make(scale, depth) for make in (plain, residual) for depth in ends]


def deviations(job: Job, variant: Variant, run: Run) -> list[float]:
    """The standard deviation of each layer's response to the test images, in order.

    [He15] section 4.2, "Analysis of Layer Responses": the outputs of each 3x3 layer, after BN and
    before other nonlinearity (ReLU or addition). Projections are no layers here.
    """
    model = unfuse(runs_.trained(job, variant, run))
    found: dict[str, Tensor] = {}
    handles = []

    def keep(name: str) -> object:
        def hook(_module: nn.Module, _args: object, y: Tensor) -> None:
            values = y.double()
            sums = torch.stack([
                torch.tensor(float(y.numel()), dtype=torch.float64, device=y.device),
                values.sum(), values.square().sum(),
            ])  # fmt: skip
            found[name] = found.get(name, torch.zeros_like(sums)) + sums

        return hook

    for name, module in model.named_modules():
        if is_norm(module) and "downsample" not in name:
            handles.append(module.register_forward_hook(keep(name)))
    size = job.scale.recipe.eval_size or job.scale.recipe.size
    forward = runs_.forward_of(model, job)
    with torch.no_grad():
        for images, _, _ in runs_.batches_of(job, job.source.val, size):
            if images is not None:
                forward(images)
    for handle in handles:
        handle.remove()
    deviations = []
    for sums in found.values():
        count, total, squares = job.processes.sum(sums).tolist()
        mean = total / count
        deviations.append(max(squares / count - mean * mean, 0.0) ** 0.5)
    return deviations


def judge(job: Job, networks: Sequence[Variant], runs: Runs) -> Finding:
    """Residual against plain, deep against shallow; the mean over the layers of the network."""
    layers = {
        variant.name: [deviations(job, variant, run) for run in runs[variant.name]]
        for variant in networks
    }
    means = {
        name: Spread(tuple(sum(each) / len(each) for each in own)) for name, own in layers.items()
    }
    ends = sorted({variant.depth for variant in networks})
    checks = [
        Check(
            f"ResNet-{depth} responds less strongly than plain-{depth}",
            means[f"resnet{depth}"].mean < means[f"plain{depth}"].mean,
            f"{means[f'resnet{depth}'].mean:.3f} against {means[f'plain{depth}'].mean:.3f}",
        )
        for depth in ends
    ]
    if len(ends) == 2:
        low, high = (means[f"resnet{depth}"].mean for depth in ends)
        checks.append(
            Check(
                f"a layer of ResNet-{ends[1]} responds less strongly than one of ResNet-{ends[0]}",
                high < low, f"{high:.3f} against {low:.3f}",
            )
        )  # fmt: skip
    shown = all(check.holds for check in checks)
    text = (
        "Residual layers respond less strongly than plain ones, and less the more of them there "
        "are: they change the signal little."
        if shown
        else "This scale does not show all of it. What does not hold: "
        + "; ".join(check.claim for check in checks if not check.holds)
        + "."
    )
    rows = tuple(
        (variant.label, str(len(layers[variant.name][0])), f"{means[variant.name].mean:.3f}",
         f"{min(map(min, layers[variant.name])):.3f}", f"{max(map(max, layers[variant.name])):.3f}")
        for variant in networks
    )  # fmt: skip
    return Finding(
        text, shown, tuple(checks),
        ("network", "layers", "mean deviation", "least", "greatest"), rows,
        tuple(
            panel(
                title, "layer", "standard deviation",
                [
                    line(
                        variant.label, _points(layers[variant.name], ranked=ranked), number,
                        dashed=variant.group == "plain",
                    )
                    for number, variant in enumerate(networks)
                ],
            )
            for title, ranked in (("in order", False), ("by magnitude", True))
        ),
        {"deviations": layers},
        ("Responses to the test images, behind BatchNorm and before ReLU or addition.",),
    )  # fmt: skip


def _points(layers: Sequence[Sequence[float]], *, ranked: bool) -> list[tuple[float, ...]]:
    """(number, mean over seeds, least, most) of each layer; from the strongest on if `ranked`."""
    kept = [sorted(own, reverse=True) if ranked else own for own in layers]
    return [
        (i + 1, sum(values) / len(values), min(values), max(values))
        for i, values in enumerate(zip(*kept, strict=True))
    ]


EXPERIMENT = Experiment(
    "responses",
    "Do residual layers change the signal little?",
    "Figure 7; section 4.2",
    "Standard deviations of the layers' responses behind BatchNorm, plain against residual.",
    variants,
    judge,
)
