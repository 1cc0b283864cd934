"""qlog: train reasoning language models on the Tsallis q-log loss family."""

from qlog import extras
from qlog.parallel import libtpu

__version__ = "0.1.0"

# What every program with qlog in it needs, a script or a notebook no less than a command. Neither
# call imports JAX or a package of the extra `train`.
extras.check_rooms()
libtpu.keep_quiet()  # JAX may be imported by now: it looks for devices at the first computation
