"""What a process sets up before it computes: the compilation cache, and thrift with memory."""

import ctypes
import os
import pathlib
import sys

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"


def set_up() -> None:
    """Keeps compiled programs on disk, so that a restarted run compiles nothing.

    In JAX_COMPILATION_CACHE_DIR, where that is set (empty: nowhere), else in the user's cache folder.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(home) / "qlog" / "xla"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # A run has a hundred programs that compile within JAX's default of a second.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if sys.platform == "linux":
        jax.monitoring.register_event_duration_secs_listener(_trim)


class Compilations:
    """Counts the programs that are compiled, or read from the cache, until it is closed."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **kwargs) -> None:
        self.count += event == _COMPILED

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)


def _trim(event: str, duration: float, **kwargs) -> None:
    """The compiler leaves hundreds of MiB with the allocator: give them back before the program runs."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if event == _COMPILED and trim:
        trim(0)
