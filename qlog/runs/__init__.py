"""What a run leaves in its workdir, and whose workdir it is.

In reading order: ownership.py (one run at a time), checkpoints.py (Orbax), log.py (metrics and
rollouts), uploads.py (logs to a bucket), profiling.py (traces of steps), folder.py (the names
of the files). What is made of them: qlog/report.
"""
