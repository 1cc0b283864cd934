"""What a run says when it ends: what it wrote, and which commands come next."""

import os
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from qlog.config import command_line
from qlog.console import is_first_process, say
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


class Step(NamedTuple):
    """A command, and what it makes."""

    command: str  # as a shell takes it, in the folder where the run was started
    makes: str


def after(config: ConfigDict, workdir: Path, argv: Sequence[str]) -> list[Step]:
    """The commands that use a run.

    Args:
      argv: the command line of the run, the program's name first; () where it has none: then there
        are no commands.
    """
    if not argv:
        return []
    again = shlex.join([*command_line.again(argv, ["distributed"]), f"--workdir={workdir}"])
    python = shlex.quote(_python())
    report = f"{python} -m qlog.report {shlex.quote(str(workdir))}"
    steps = [Step(report, "curves, tables and rollouts on a page, report.html")]
    for mode, makes in (
        ("evaluate", f"the best checkpoint's accuracy on the {config.evaluation.split} split"),
        ("sample", "its answers, on the screen"),
        ("export", "its model as a Hugging Face folder, for other libraries"),
    ):
        steps.append(Step(f"{python} -m qlog.main {again} --mode={mode}", makes))
    return steps


def tell(workdir: Path, steps: Sequence[Step]) -> None:
    """Says what a finished run wrote, and what to do next.

    The run has finished, whatever happens here: a workdir that cannot be read now is no error.
    """
    if not is_first_process():  # it alone speaks, and the others need not wait for its listing
        return
    try:
        there = set(paths.names(workdir))
    except Exception:  # OSError, or whatever the library of a store raises
        there = set()
    if there:
        say(f"\nWritten into {workdir}:", "bold")
    for name, what in _WRITTEN.items():
        # In a bucket a log is a folder of segments, called by the name without its suffix.
        found = [each for each in (name, name.partition(".")[0]) if each in there]
        if found:
            say(f"  {found[0]:<15} {what}")
    if steps:
        say("\nNext:", "bold")
        for step in steps:
            say(f"  {step.command}")
            say(f"      {step.makes}", "dim")


def _python() -> str:
    """This Python as a shell finds it from the current folder: .venv/bin/python where it is below.

    The word "python" alone may be another one, or none, where no environment is activated.
    """
    if not sys.executable:  # Python is part of another program
        return "python"
    # Not resolved: the link in an environment is what makes Python look for packages there.
    executable, here = pathlib.Path(sys.executable), pathlib.Path(os.getcwd())
    if executable.parent != here and executable.is_relative_to(here):
        return str(executable.relative_to(here))
    return str(executable)
