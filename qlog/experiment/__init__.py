"""The parts of a run, from its config.

In reading order: `parts` (the Experiment), `build` (`prepare`), `files` (what it reads), `cost`
with `phases` (memory) and `duration` (what it takes, before anything is allocated), `contents`
(what it is made of, which a resumed run must share).
"""

from qlog.experiment.build import prepare, prepare_shapes
from qlog.experiment.parts import Experiment

__all__ = ["Experiment", "prepare", "prepare_shapes"]
