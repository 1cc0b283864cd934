"""The command `qlog`, where the package is installed: short for `python -m qlog...`.

qlog --config=...       python -m qlog.main --config=...
qlog report WORKDIR     python -m qlog.report WORKDIR
qlog doctor             python -m qlog.commands.doctor
qlog show CONFIG        python -m qlog.commands.show CONFIG
qlog stage ...          python -m qlog.commands.stage ...
qlog status WORKDIR     python -m qlog.commands.run_status WORKDIR
"""

import os
import runpy
import sys

SUBCOMMANDS = {
    "report": "qlog.report",
    "doctor": "qlog.commands.doctor",
    "show": "qlog.commands.show",
    "stage": "qlog.commands.stage",
    "status": "qlog.commands.run_status",
}


def run() -> None:
    """Runs the module that the first word names, else qlog.main, as `python -m` would.

    Flags, output and exit status are the module's own.
    """
    module = SUBCOMMANDS.get(sys.argv[1]) if len(sys.argv) > 1 else None
    if module:
        del sys.argv[1]
    # An installed script has its own folder first on the path of modules, `python -m` the current
    # one: a config file imports from there (`from configs import quickstart`).
    if not sys.flags.safe_path:  # PYTHONSAFEPATH asks for neither
        sys.path.insert(0, os.getcwd())
    runpy.run_module(module or "qlog.main", run_name="__main__", alter_sys=True)
