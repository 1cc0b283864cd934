"""What a process sets up before it computes: the compilation cache, and thrift with memory."""

import ctypes
import importlib.util
import os
import sys

import jax

from qlog.errors import ConfigError
from qlog.storage import assets, paths

_COMPILED = "/jax/core/compile/backend_compile_duration"
_GPU_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "jax_rocm60_plugin")
_SHARED_TUNING = "xla_gpu_shard_autotuning"  # in XLA_FLAGS
# What shows that an accelerator is plugged in: path -> the extra that drives it.
_HARDWARE = {"/dev/accel0": "tpu", "/dev/vfio/0": "tpu", "/dev/nvidia0": "cuda"}
_PATIENCE = 20.0  # seconds for a bucket to answer
_NOTE = """Programs that JAX compiled. They are code: whoever may write here, runs as every user who reads.
"""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's numbers for them
_LARGE = 16 << 20  # bytes


def set_up() -> None:
    """Keeps compiled programs, so that a restarted run compiles nothing; call it before JAX has devices.

    In JAX_COMPILATION_CACHE_DIR, a folder, gs:// or s3://, where that is set (empty: nowhere), else in
    the user's cache folder; there, too, and said, where the bucket does not answer. Compiled programs are code: whoever can write there runs theirs as every
    later run's user. So nothing that others may write is ever taken by default.

    Raises:
      ConfigError: a bucket that `qlog.storage.paths` cannot use.
    """
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if folder is None:
        folder = str(assets.cache("xla"))
        jax.config.update("jax_compilation_cache_dir", folder)
    elif folder:
        folder = _reachable(paths.parse(folder, "JAX_COMPILATION_CACHE_DIR"))
        jax.config.update("jax_compilation_cache_dir", folder)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # A run has a hundred programs that compile within JAX's default of a second. In a bucket each
        # look takes longer than compiling them.
        seconds = 1.0 if paths.is_remote(folder) else 0.0
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
    _compile_alone()
    # glibc raises the size from which a freed buffer goes back to the system up to 32 MiB by itself,
    # and so keeps many gradients and activations.
    set_option = _glibc("mallopt")
    if set_option:
        set_option(_MMAP_THRESHOLD, _LARGE)
        set_option(_TRIM_THRESHOLD, 4 * _LARGE)
        jax.monitoring.register_event_duration_secs_listener(_after_compiling)


def _reachable(folder: paths.Path) -> str:
    """The folder, or the user's where it is in a bucket that cannot be used: JAX would ask for half a
    minute at each of a hundred programs, and go on without."""
    if not paths.is_remote(folder):
        return str(folder)

    def ask():
        if not folder.exists():  # a team's cache may be there to read alone
            (folder / "README.txt").write_text(_NOTE)

    error = paths.within(_PATIENCE, ask)
    if error is None:
        return str(folder)
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    own = str(assets.cache("xla"))
    print(
        f"qlog: JAX_COMPILATION_CACHE_DIR={folder} cannot be used ({reason}): compiled programs go to {own}",
        file=sys.stderr,
        flush=True,
    )
    return own


def _compile_alone() -> None:
    """On GPUs: no process waits for what another one's compiler finds out.

    XLA shares the measuring of kernels out over a run's processes, and each waits up to 24 hours for
    the others' part. A process that finds its program in the cache measures nothing, so where caches
    differ (one per node; a neighbour's run that writes while this one looks) the others wait in vain.
    One process alone shares nothing, so the flag changes nothing there.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if any(map(importlib.util.find_spec, _GPU_PLUGINS)) and _SHARED_TUNING not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{_SHARED_TUNING}=false".lstrip()


def refuse_fallback() -> None:
    """Raises ConfigError where JAX uses the CPU of a machine that has an accelerator.

    JAX goes on on the CPU without a word where a driver or a package is missing, and with
    JAX_PLATFORMS=cuda,cpu where it sees no GPU.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    wanted = platforms.split(",")[0]
    if wanted == "cpu" or jax.default_backend() != "cpu":
        return
    if wanted:
        raise ConfigError(
            f"JAX_PLATFORMS={platforms}, and no {wanted} device is visible here: ask the scheduler or the "
            "container for one, or set it to cpu to train on the CPU."
        )
    for path, extra in _HARDWARE.items():
        if os.path.exists(path):
            raise ConfigError(
                f"{path} is here but JAX uses the CPU: run launch/install {extra}, or set JAX_PLATFORMS=cpu "
                "to train on the CPU."
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
        self.num_compiled = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **kwargs) -> None:
        self.num_compiled += event == _COMPILED

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
