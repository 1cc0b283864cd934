"""What `python -m qlog.main` and the other commands do.

In reading order: program.py (the command `qlog`), entry.py (flags in, mistakes out), help_pages.py
(`--help`, `--help-config`), modes.py (`--mode`), next_steps.py (what a run says when it ends),
several_runs.py (`config.runs`); then a file for each further command: show.py, doctor.py, stage.py,
run_status.py.
"""
