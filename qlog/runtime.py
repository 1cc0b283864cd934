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
    if sys.platform == "linux":
        jax.monitoring.register_event_duration_secs_listener(_trim)


def _trim(event: str, duration: float, **kwargs) -> None:
    """The compiler leaves hundreds of MiB with the allocator: give them back before the program runs."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if event == _COMPILED and trim:
        trim(0)
