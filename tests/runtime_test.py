"""What a process sets up before it computes."""

import os
import pathlib
import subprocess
import sys

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_PROGRAM = """
import jax
from qlog import runtime

runtime.set_up()
print(jax.jit(lambda x: 3 * x)(14))
"""


def test_a_restart_compiles_nothing_not_even_what_is_quick(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMP", "JAX_PERS"))}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(_ROOT)}

    def programs():
        command = [sys.executable, "-c", _PROGRAM]
        assert subprocess.check_output(command, env=environment, text=True).strip() == "42"
        return {file: file.stat().st_mtime_ns for file in (tmp_path / "qlog/xla").glob("*-cache")}

    first = programs()
    assert first and programs() == first
