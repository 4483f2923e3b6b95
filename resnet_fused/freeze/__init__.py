"""`freeze`: a model as an inference engine.

    engine = rf.freeze(model.eval(), x)
    scores = engine(x)

A model's graph is traced once, rewritten as steps of this package's ops with constants folded and
packed, and run without modules in between: on the CPU as a list of oneDNN calls for each input
shape, on a GPU as one CUDA graph for each (docs/freeze.md).
"""

from ._calibrate import calibrate_fp8
from ._fp8 import Fp8Calibration
from ._freeze import freeze
from .engine import Engine, Report, load_engine

__all__ = ["Engine", "Fp8Calibration", "Report", "calibrate_fp8", "freeze", "load_engine"]
