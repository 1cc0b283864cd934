"""What `python -m qlog.main` and the other commands do.

In reading order: entry.py (flags in, mistakes out), modes.py (`--mode`), several_runs.py
(`config.runs`); then a file for each further command: show.py, doctor.py, stage.py, run_status.py.
"""

from qlog.errors import exit_without_train

exit_without_train()
