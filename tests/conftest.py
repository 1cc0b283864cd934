"""Shared set-up: CPU, eight virtual devices, one compilation cache for the whole session."""

import importlib.metadata
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# The suite compiles much and computes little: a third of its time went with LLVM's optimisations,
# and a third of the rest with fused loops that XLA writes as MLIR. Newer XLA has no other way to
# write them, and ends at a flag that it does not know.
_FLAGS = ["--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS]).strip()

import jax  # noqa: E402  (the environment must be set first)
import pytest  # noqa: E402

from qlog.parallel import process  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """A cache that lives as long as the session: equal programs compile once, commands' too."""
    base = tmp_path_factory.getbasetemp()
    ours = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # workers share it
    folder = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ours / "jax_cache"))
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return folder


@pytest.fixture(scope="module", autouse=True)
def bounded_programs():
    """The suite compiles more programs than a process can hold."""
    yield
    process.forget_programs()


@pytest.fixture
def compilations():
    """A function that says how many programs were compiled, or read from the cache, since."""
    counted = process.Compilations()
    yield lambda: counted.num_compiled
    counted.close()


@pytest.fixture(scope="session")
def shared():
    """The folder of real records and vocabularies next to the checkout; skips without it."""
    folder = pathlib.Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("no folder ../shared with real records and vocabularies")
    return folder


def pytest_terminal_summary(terminalreporter):
    """What the fuzzers tried."""
    import fuzzing  # hypothesis takes a while to import

    reports = [report for each in terminalreporter.stats.values() for report in each]
    fuzzing.show(reports, terminalreporter.write_line)
