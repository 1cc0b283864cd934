"""Commands that tests run as a user would."""

import os
import subprocess

from places import ROOT


def run(*command, code=0, env=None, cwd=ROOT, **options) -> str:
    """What a command printed, on stdout and then on stderr; its exit code has to be `code`.

    Args:
      command: words; paths too.
      env: added to this process's environment.
      cwd: the folder to start it in.
      options: of `subprocess.run`.
    """
    result = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
        env={**os.environ, **(env or {})},
        timeout=120,
        stdin=subprocess.DEVNULL,
        **options,
    )
    assert result.returncode == code, f"{result.returncode}: {result.stdout}{result.stderr}"
    return result.stdout + result.stderr
