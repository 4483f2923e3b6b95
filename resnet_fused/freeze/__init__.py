"""`freeze`: a model as an inference engine.

    engine = rf.freeze(model.eval(), x)
    scores = engine(x)

A model's graph is traced once, rewritten as steps of this package's ops with constants folded and
packed, and run without modules in between: on the CPU as a list of oneDNN calls for each input
shape, on a GPU as one CUDA graph for each (docs/freeze.md).
"""

from ._freeze import freeze
from .engine import Engine, Report, load_engine

__all__ = ["Engine", "Report", "freeze", "load_engine"]
