"""What a process sets up before it computes: the compilation cache, and the host's allocator."""

import ctypes
import gc
import os
import pathlib
import sys

import jax

from qlog import extras
from qlog.errors import ConfigError, PassingError, summary
from qlog.storage import assets, paths

# JAX's event after a program was compiled, or read from the cache.
_COMPILED = "/jax/core/compile/backend_compile_duration"
_GPU_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "jax_rocm60_plugin")
_SHARED_TUNING = "xla_gpu_shard_autotuning"  # a flag in XLA_FLAGS
# What shows that an accelerator is plugged in: path -> the extra that drives it.
_HARDWARE = {"/dev/accel0": "tpu", "/dev/vfio/0": "tpu", "/dev/nvidia0": "cuda"}
# The end of JAX's message, in other words than ours.
_JAX_REMEDY = "(set JAX_PLATFORMS='' to automatically choose an available backend)"
# In JAX's message, where the same command may find the device later.
_BUSY = ("already in use", "UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED")
_PATIENCE = 20.0  # seconds for a bucket to answer
_NOTE = """Programs that JAX compiled. They are code:
whoever may write here can run anything as each user who reads here.
"""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # the numbers that mallopt has for these options
_LARGE = 16 << 20  # bytes


def set_up() -> None:
    """Sets up the compilation cache and the allocator; call it before JAX has devices.

    Compiled programs are kept, so that a restarted run compiles nothing: in the folder, gs:// or
    s3:// that JAX_COMPILATION_CACHE_DIR names (set to nothing, they are not kept), or else in the
    user's cache folder. If the bucket does not answer, that is said and the user's folder is used.

    Raises:
      ConfigError: a bucket that `qlog.storage.paths` cannot use.
    """
    # Programs in the cache are code: a user who can write there can run anything as the user of a
    # later run. So a folder that others may write to is used only if the environment names it.
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if folder is None:
        folder = str(assets.cache("xla"))
        jax.config.update("jax_compilation_cache_dir", folder)
    elif folder:
        folder = _reachable(paths.parse(folder, "JAX_COMPILATION_CACHE_DIR"))
        jax.config.update("jax_compilation_cache_dir", folder)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # JAX keeps programs that took a second or more to compile. A run has a hundred that take
        # less; to look for one in a bucket would take longer than to compile it.
        seconds = 1.0 if paths.is_remote(folder) else 0.0
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
    _compile_alone()
    # From a certain size on, glibc gives a freed buffer back to the system. It raises that size by
    # itself, up to 32 MiB, and then keeps many gradients and activations. A fixed size stays.
    set_option = _glibc("mallopt")
    if set_option:
        set_option(_MMAP_THRESHOLD, _LARGE)
        set_option(_TRIM_THRESHOLD, 4 * _LARGE)
        jax.monitoring.register_event_duration_secs_listener(_after_compiling)


def _reachable(folder: paths.Path) -> str:
    """The folder; or the user's cache folder, where the bucket cannot be used.

    JAX itself would try for half a minute, at each of a hundred programs.
    """
    if not paths.is_remote(folder):
        return str(folder)

    def ask() -> None:
        if not folder.exists():  # where it exists, this user may be allowed to read only
            (folder / "README.txt").write_text(_NOTE)

    error = paths.within(_PATIENCE, ask)
    if error is None:
        return str(folder)
    reason = f"{type(error).__name__}: {summary(error)}"
    own = str(assets.cache("xla"))
    print(
        f"qlog: JAX_COMPILATION_CACHE_DIR={folder} cannot be used ({reason}): "
        f"compiled programs go to {own}",
        file=sys.stderr,
        flush=True,
    )
    return own


def _compile_alone() -> None:
    """On GPUs: each process measures its kernels itself.

    By default XLA divides the measuring among the processes of a run, and each waits up to 24 hours
    for the results of the others. But a process that finds its program in the cache measures
    nothing. So where caches differ (one per node, or another run that writes at this moment), the
    others wait in vain. In a run of one process the flag changes nothing.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if any(map(extras.is_installed, _GPU_PLUGINS)) and _SHARED_TUNING not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{_SHARED_TUNING}=false".lstrip()


def look_for_devices() -> None:
    """Has JAX look for its devices, if it has not yet: its own errors do not say what to do.

    Raises:
      ConfigError: JAX_PLATFORMS names a platform that JAX does not know, or cannot start here.
      PassingError: another process holds the device, or it does not answer now.
    """
    platforms = jax.config.jax_platforms
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # an assertion: no plug-in for any of them
        if not platforms:
            raise
        reason = summary(error).removesuffix(_JAX_REMEDY)
        reason = f" ({reason})" if str(error) else ""
        where = f"JAX_PLATFORMS={platforms}"
        if any(word in reason for word in _BUSY):
            raise PassingError(
                f"{where}, and the device cannot be had now{reason}: end the process that holds "
                "it, or wait; the same command goes on."
            ) from error
        raise ConfigError(
            f"{where}, but JAX cannot use it here{reason}: install what drives the device "
            "(launch/install cuda13 for NVIDIA GPUs, launch/install tpu for TPUs), or unset "
            "JAX_PLATFORMS."
        ) from error


def refuse_fallback() -> None:
    """Refuses to compute on the CPU of a machine that has an accelerator.

    JAX does so silently when a driver or a package is missing, and with JAX_PLATFORMS=cuda,cpu when
    it sees no GPU.

    Raises:
      ConfigError: JAX uses the CPU, and JAX_PLATFORMS does not ask for it; or as `look_for_devices`
        does.
    """
    look_for_devices()
    platforms = os.environ.get("JAX_PLATFORMS", "")
    wanted = platforms.split(",")[0]
    if wanted == "cpu" or jax.default_backend() != "cpu":
        return
    if wanted:
        raise ConfigError(
            f"JAX_PLATFORMS={platforms}, and no {wanted} device is visible here: ask the scheduler "
            "or the container for one, or set it to cpu to train on the CPU."
        )
    for path, extra in _HARDWARE.items():
        if os.path.exists(path):
            raise ConfigError(
                f"{path} is here but JAX uses the CPU: run launch/install {extra}, or set "
                "JAX_PLATFORMS=cpu to train on the CPU."
            )


def release_memory() -> None:
    """Gives memory that this process has freed back to the system; takes milliseconds.

    XLA's buffers on CPUs have all sizes, and the gaps that one step leaves fit the next one badly.
    Does nothing where the C library is not glibc.
    """
    trim = _glibc("malloc_trim")
    if trim:
        trim(0)


def forget_programs(most_mappings: int = 30_000) -> bool:
    """Forgets what is compiled if there is much of it; between runs, since it compiles anew then.

    A program on a CPU is several mappings of memory. Linux gives a process 65,530 of them
    (vm.max_map_count), and XLA crashes when it wants more: after some hundred runs in one process.

    Returns:
      Whether it did.
    """
    mappings = pathlib.Path("/proc/self/maps")
    if not mappings.exists() or mappings.read_bytes().count(b"\n") <= most_mappings:
        return False
    jax.clear_caches()
    gc.collect()
    return True


class Compilations:
    """Counts the programs that are compiled, or read from the cache, until it is closed.

    Attributes:
      num_compiled: how many so far.
    """

    def __init__(self):
        self.num_compiled = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **kwargs) -> None:
        self.num_compiled += event == _COMPILED

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)


def _after_compiling(event: str, duration: float, **kwargs) -> None:
    """Gives back what the compiler has freed, hundreds of MiB."""
    if event == _COMPILED:
        release_memory()


def _glibc(name: str):
    """A function of the C library; None where that is not glibc (musl, macOS, Windows)."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return getattr(library, name, None) if hasattr(library, "gnu_get_libc_version") else None
