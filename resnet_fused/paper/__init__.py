"""The experiments of "Deep Residual Learning for Image Recognition", one file each.

[He15] in this package is that paper: He, Zhang, Ren, Sun, arXiv:1512.03385.
"""

from resnet_fused.paper.experiment import EXPERIMENTS, Experiment, run
from resnet_fused.paper.scales import Scale, ScaleError, scale_of

__all__ = ["EXPERIMENTS", "Experiment", "Scale", "ScaleError", "run", "scale_of"]
