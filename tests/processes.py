"""Commands that tests run as a user would."""

import os
import subprocess

from places import ROOT


def run(*command, code=0, env=None, **options) -> str:
    """What a command printed, on stdout and then on stderr; its exit code has to be `code`.

    Args:
      command: words; paths too.
      env: added to this process's environment.
      options: of `subprocess.run`.
    """
    result = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        env={**os.environ, **(env or {})},
        timeout=120,
        stdin=subprocess.DEVNULL,
        **options,
    )
    assert result.returncode == code, f"{result.returncode}: {result.stdout}{result.stderr}"
    return result.stdout + result.stderr
