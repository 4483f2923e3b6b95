"""BatchNorm statistics and parameters under which a wrong normalisation shows.

A network without trained weights has mean 0, variance 1, gamma 1 and beta 0 in every BatchNorm: an
affine that is nearly the identity, in which a wrong eps or a mean of another channel goes unseen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

NEGATIVE = 0.1
"""Share of the channels whose gamma becomes negative."""
ZERO = 0.02
"""Share of the channels whose gamma becomes 0."""


def calibrate_batchnorm(model: nn.Module, x: Tensor, *, seed: int = 0) -> str:
    """Gives every BatchNorm of a model a perturbed gamma and beta, and statistics of real data.

    gamma is multiplied by factors between 0.5 and 1.5, some of them negated and some 0; beta gets
    normal noise of 0.1. Then one forward pass on ``x``, with the BatchNorms alone in training mode,
    sets mean and variance to those of the batch. The same seed, model and x give the same result.

    Args:
        model: changed in place; its training flags, momenta and the random state stay as they are.
        x: [N, C, H, W], what the model takes; real images make real statistics.
        seed: of the perturbation.

    Returns:
        One sentence that says what was done, for a report.

    Raises:
        TypeError: model is no module.
        ValueError: the model has no BatchNorm with parameters and running statistics.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; accepted is an nn.Module")
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    norms = [m for m in norms if m.affine and m.track_running_stats]
    if not norms:
        raise ValueError("model has no BatchNorm with parameters and running statistics")
    below = _perturb(norms, torch.Generator().manual_seed(seed))
    modes = {m: m.training for m in model.modules()}
    momenta = {m: m.momentum for m in norms}
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            # None is the cumulative average: after one batch, that batch's statistics.
            norm.momentum = None
            norm.train()
        with torch.no_grad():
            model(x)
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
    channels = sum(m.num_features for m in norms)
    return (
        f"BatchNorm was calibrated: the statistics of {len(norms)} layers are those of "
        f"{len(x)} images, gamma and beta are perturbed (seed {seed}), and gamma is 0 or less in "
        f"{below} of {channels} channels."
    )


@torch.no_grad()
def _perturb(norms: list[_BatchNorm], generator: torch.Generator) -> int:
    """Perturbs gamma and beta in place; returns how many gammas are not positive."""
    below = 0
    for norm in norms:
        n = norm.num_features
        factor = 0.5 + torch.rand(n, generator=generator)
        lot = torch.rand(n, generator=generator)
        # Each layer has one of each at least, however narrow it is.
        order = torch.randperm(n, generator=generator)
        if n > 2:
            lot[order[0]], lot[order[1]] = 0.0, NEGATIVE + ZERO / 2
        factor = torch.where(lot < NEGATIVE, -factor, factor)
        factor[(lot >= NEGATIVE) & (lot < NEGATIVE + ZERO)] = 0.0
        noise = 0.1 * torch.randn(n, generator=generator)
        norm.weight.mul_(factor.to(norm.weight))
        norm.bias.add_(noise.to(norm.bias))
        below += int((norm.weight <= 0).sum())
    return below
