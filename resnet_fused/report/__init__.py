"""One picture and one page on how a fused network compares with its unfused self."""

from resnet_fused.report.page import render
from resnet_fused.report.picture import draw

__all__ = ["draw", "render"]
