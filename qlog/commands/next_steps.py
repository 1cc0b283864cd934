"""What a run says when it ends: what it wrote, and which commands come next."""

import shlex
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from qlog.config import command_line
from qlog.console import say
from qlog.parallel import distributed
from qlog.runs import folder
from qlog.storage import paths
from qlog.storage.paths import Path

# What a run leaves behind, in the order in which a reader looks for it.
_WRITTEN = {
    folder.RESULTS: "the numbers of the last evaluation",
    folder.FINAL: "the numbers of the best checkpoint on the test split",
    folder.METRICS: "every step's metrics; TensorBoard's events are next to it",
    folder.ROLLOUTS: "rollouts as text",
    "samples": "every answer of every evaluation",
    "checkpoints": "the parameters",
    folder.CONFIG: "the config, with all its fields",
}


class _Step(NamedTuple):
    """A command, and what it makes."""

    command: str
    makes: str


def after_training(config: ConfigDict, workdir: Path, argv: Sequence[str]) -> None:
    """Says what a finished run wrote, and what to do next. Every process must call.

    Args:
      argv: the command line of the run, the program's name first; () where it has none: then no
        commands are named.
    """
    there = set(distributed.once_per_run(lambda: paths.names(workdir)))
    say(f"\nWritten into {workdir}:", "bold")
    for name, what in _WRITTEN.items():
        # In a bucket a log is a folder of segments, called by the name without its suffix.
        found = [each for each in (name, name.partition(".")[0]) if each in there]
        if found:
            say(f"  {found[0]:<15} {what}")
    if argv:
        say("\nNext:", "bold")
        for step in _steps(config, workdir, argv):
            say(f"  {step.command}")
            say(f"      {step.makes}", "dim")


def _steps(config: ConfigDict, workdir: Path, argv: Sequence[str]) -> Iterator[_Step]:
    """Commands that use the run, as a shell takes them."""
    place = shlex.quote(str(workdir))
    yield _Step(
        f"python -m qlog.report {place}", "curves, tables and rollouts on a page, report.html"
    )
    again = shlex.join([*command_line.again(argv), f"--workdir={workdir}"])
    for mode, makes in (
        ("evaluate", f"the best checkpoint's accuracy on the {config.evaluation.split} split"),
        ("sample", "its answers, on the screen"),
        ("export", "its model as a Hugging Face folder, for other libraries"),
    ):
        yield _Step(f"python -m qlog.main {again} --mode={mode}", makes)
