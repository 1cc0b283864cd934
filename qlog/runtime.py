"""What a process sets up before it computes: the compilation cache, and thrift with memory."""

import ctypes
import os
import pathlib
import sys

import jax

from qlog.errors import ConfigError

_COMPILED = "/jax/core/compile/backend_compile_duration"
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's numbers for them
_LARGE = 16 << 20  # bytes


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
    # glibc raises the size from which a freed buffer goes back to the system up to 32 MiB by itself,
    # and so keeps many gradients and activations.
    set_option = _glibc("mallopt")
    if set_option:
        set_option(_MMAP_THRESHOLD, _LARGE)
        set_option(_TRIM_THRESHOLD, 4 * _LARGE)
        jax.monitoring.register_event_duration_secs_listener(_after_compiling)


def refuse_fallback() -> None:
    """Raises ConfigError where JAX_PLATFORMS names an accelerator first, as launchers say it, and JAX
    uses the CPU: it leaves CUDA out without a word where it sees no NVIDIA GPU."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    wanted = platforms.split(",")[0]
    if wanted not in ("", "cpu") and jax.default_backend() == "cpu":
        raise ConfigError(
            f"JAX_PLATFORMS={platforms}, and no {wanted} device is visible here: ask the scheduler or the "
            "container for one, or unset it to train on the CPU."
        )


def release_memory() -> None:
    """Gives memory that this process has freed back to the system: milliseconds, with glibc alone.

    XLA's buffers on CPUs are of all sizes, and what one step leaves behind fits the next one badly.
    """
    trim = _glibc("malloc_trim")
    if trim:
        trim(0)


class Compilations:
    """Counts the programs that are compiled, or read from the cache, until it is closed."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **kwargs) -> None:
        self.count += event == _COMPILED

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)


def _after_compiling(event: str, duration: float, **kwargs) -> None:
    """The compiler leaves hundreds of MiB with the allocator."""
    if event == _COMPILED:
        release_memory()


def _glibc(name: str):
    """A function of the C library, or None where that is not glibc."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return getattr(library, name, None) if hasattr(library, "gnu_get_libc_version") else None
