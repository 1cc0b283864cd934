"""Traces of chosen steps, for TensorBoard's profiler or Perfetto."""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator, Sequence

import jax

from qlog.storage import paths
from qlog.storage.paths import Path
from qlog.console import say


@contextlib.contextmanager
def profiled(step: int, steps: Sequence[int], workdir: Path) -> Iterator[None]:
    """While inside, every process traces into WORKDIR/profile/step_N, if N = `step` is one of `steps`;
    both count from 1, as the progress line does.

    A profiler writes local files only: for a bucket they are copied when the step is done.
    """
    if step not in steps:
        yield
        return
    folder = workdir / "profile" / f"step_{step:06d}"
    with contextlib.ExitStack() as stack:
        local = pathlib.Path(folder)
        if paths.is_remote(folder):
            local = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with jax.profiler.trace(str(local)):
            yield
        if paths.is_remote(folder):
            for file in local.rglob("*"):
                if file.is_file():
                    paths.write(folder / file.relative_to(local).as_posix(), file.read_bytes())
    say(f"step {step}: traced in {folder}")
