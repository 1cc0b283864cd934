"""Traces of chosen steps, for TensorBoard's profiler or Perfetto."""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator, Sequence

import jax

from qlog.console import say
from qlog.storage import paths


@contextlib.contextmanager
def profiled(step: int, steps: Sequence[int], workdir: paths.Path) -> Iterator[None]:
    """While inside, every process traces into WORKDIR/profile/step_N, for N = `step`.

    Args:
      step: the step that runs inside, counted from 1 as the progress line does.
      steps: the steps to trace; in others nothing happens.
    """
    if step not in steps:
        yield
        return
    folder = workdir / "profile" / f"step_{step:06d}"
    with contextlib.ExitStack() as stack:
        # The profiler writes local files only; for a bucket they are copied when the step is done.
        local = pathlib.Path(folder)
        if paths.is_remote(folder):
            local = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with jax.profiler.trace(str(local)):
            yield
        if paths.is_remote(folder):
            for file in local.rglob("*"):
                if file.is_file():
                    paths.copy(file, folder / file.relative_to(local).as_posix())
    say(f"step {step}: traced in {folder}")
