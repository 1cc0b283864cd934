"""What a run leaves in its workdir, and whose workdir it is.

In reading order: ownership.py (one run at a time), resumption.py (what an earlier start left),
checkpoints.py (what one run saves, by Orbax), checkpoint_reader.py (which checkpoints there are),
digests.py (whether their files are whole), log.py (metrics and rollouts), trackers.py (TensorBoard,
W&B), uploads.py (logs to a bucket), profiling.py (traces of steps), folder.py (the names of the
files). What is made of them: qlog/report.
"""
