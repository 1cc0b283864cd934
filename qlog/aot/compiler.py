"""The TPU compiler without a TPU: devices of a topology, and what a compiled program needs.

libtpu compiles for any slice that it knows by name. The executables cannot run here, but they tell
their memory and their optimized HLO.
"""

import math
import os
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from qlog.aot import hlo, hlo_cost
from qlog.errors import ConfigError, summary
from qlog.parallel.chips import Chip

# What the compiler says when a program does not fit: "required for ... (17.3G)" or "Used 17.3G".
_MEMORY_NEEDED = re.compile(r"required for .*?\((\d+\.?\d*)([KMGT])\)|Used (\d+\.?\d*)([KMGT])")


class CompiledProgram(NamedTuple):
    """One compiled program on one chip. Sizes are bytes of HBM."""

    arguments: float  # nan where the compiler gave up for memory
    temporaries: float  # nan likewise
    # All that lies in HBM while it runs: arguments, temporaries, results that are not in buffers of
    # arguments, and what other programs left there. A rough number where the compiler gave up.
    peak: float
    cost: hlo_cost.Cost | None  # of one run, loops in full; None where the compiler gave up
    runs: float  # per training step; 0 of what evaluation runs between steps

    def seconds(self, chip: Chip) -> float:
        """Of all its runs in a step, at the roofline; nan where the cost is unknown."""
        if not self.runs:
            return 0.0
        return math.nan if self.cost is None else self.runs * self.cost.seconds(chip)


def topology_devices(topology: str) -> Sequence[jax.Device]:
    """Descriptions of the devices of a TPU slice, 'v5e:4x4', or of several, '2*v5e:4x4'.

    Raises:
      ConfigError: no libtpu, or a topology that it does not know.
    """
    from jax.experimental import topologies

    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise ConfigError(
            "--mode=compile needs the TPU compiler: install the extra 'tpu' (pip install libtpu)."
        ) from None
    # libtpu locks the chips of a host for one process. No chip is used here, so nothing is locked.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    num_slices, star, one_slice = topology.rpartition("*")
    try:
        several = {"num_slices": int(num_slices)} if star else {}
        return topologies.get_topology_desc(one_slice, platform="tpu", **several).devices
    except Exception as error:  # whatever libtpu raises
        raise ConfigError(
            f"--topology={topology!r} is not known to libtpu ({summary(error)}): "
            "write v5e:4x4, v6e:2x4, v5p:4x4x4, or 2*v5e:4x4 for two slices."
        ) from None


def compile_lowered(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles without a trace in the persistent cache, which cannot read such programs back."""
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
    try:
        return lowered.compile()
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


def compile_program(
    lowered: jax.stages.Lowered,
    runs: float = 1,
    resident: float = 0.0,
    trips: Callable[[hlo_cost.DataLoop], float] = hlo_cost.all_slices,
) -> CompiledProgram:
    """Compiles one program and reads what it needs.

    Args:
      lowered: from `jax.jit(...).lower`, for the devices of a topology.
      runs: per training step.
      resident: bytes of HBM per chip that other programs' arrays take while it runs.
      trips: how often loops run, as `hlo_cost.module_cost` takes it.

    Raises:
      jax.errors.JaxRuntimeError: the compiler failed, for another reason than memory.
    """
    try:
        program = compile_lowered(lowered)
    except jax.errors.JaxRuntimeError as error:
        needed = _MEMORY_NEEDED.search(str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not needed:
            raise
        size, unit = filter(None, needed.groups())
        peak = float(size) * 1024 ** (" KMGT".index(unit)) + resident
        return CompiledProgram(math.nan, math.nan, peak, None, runs)
    memory = program.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    # Donated arguments and the results that replace them are one buffer.
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return CompiledProgram(
        arguments,
        temporaries,
        arguments + temporaries + results + resident,
        hlo_cost.module_cost(hlo.Module(program.as_text() or ""), trips),
        runs,
    )
