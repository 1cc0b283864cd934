"""A run that gets signals at chosen points, as a program.

    preempted.py WORKDIR POINT NTH SIGNALS [STEPS]

POINT is where the NTH time (from 1) a signal comes: decode, gradient, evaluation, save, compile,
weights (before the first step), finished, pruning, closing. Or, without a signal: scoring (it is
killed), stall (it stands still), sealed (checkpoints/ becomes read-only), unreadable (process 1
cannot read a checkpoint), never. SIGNALS are names,
sent one after the other. MODE in the environment is qlog.main's --mode, FINAL is
config.evaluation.final, RUNS are names of config.runs.
"""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import tiny
from orbax.checkpoint import v1 as ocp

from qlog import evaluation, experiment
from qlog.commands import modes
from qlog.errors import Stop
from qlog.experiment import parts
from qlog.learner import gradient, planning
from qlog.parallel import distributed, interrupts
from qlog.rollouts import decoding
from qlog.runs import checkpoints, log

WORKDIR, POINT, NTH, SIGNALS = sys.argv[1:5]
STEPS = int(sys.argv[5]) if len(sys.argv) > 5 else 4
PROCESS = os.environ.get("JAX_PROCESS_ID", "0")


def get_config(**watchdog):
    """Two microbatches a step, an evaluation of three batches after every second."""
    config = tiny.config(
        train={"steps": STEPS, "prompts_per_microbatch": 2 // jax.process_count()},
        checkpoint={"every": 100, "minutes": 0.0},
        rollout={"rationale_budget": 20},  # three chunks of decode steps
        evaluation={
            "every": 2,
            "prompts": 6,
            "prompts_per_batch": 2,
            "final": os.environ.get("FINAL", ""),
        },
        watchdog=watchdog,
    )
    config.runs = {name: {} for name in os.environ.get("RUNS", "").split()}
    return config


def signals():
    if PROCESS == os.environ.get("SIGNALLED", PROCESS):
        for name in SIGNALS.split(","):
            print(f"sending {name}", flush=True)
            os.kill(os.getpid(), getattr(signal, name))
            time.sleep(0.3)


def before(owner, name, point, act=signals):
    """Has `act` called before the NTH call of owner.name."""
    if point != POINT:
        return
    function, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(name)
        if len(calls) == int(NTH):
            act()
        return function(*args, **kwargs)

    setattr(owner, name, wrapped)


def compile_for_long():
    """Like the compiler: minutes in C, without Python's lock, which no signal ends."""
    threading.Timer(0.5, signals).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)


def sleep_for_long():
    print("standing still", flush=True)
    time.sleep(3600)


def seal():
    if PROCESS == "0":
        subprocess.run(["chattr", "+i", f"{WORKDIR}/checkpoints"], check=True)


def fail_on_process_1():
    """Its disk cannot be read, and the other process waits for it."""
    if PROCESS == "1":
        raise OSError(errno.EIO, "Input/output error")


def main():
    planning._FLOPS_PER_PROGRAM = 0.0  # as of large models: a program for each microbatch
    parts.BATCHES_PER_CALL = 1  # as of many questions, which take several calls
    before(decoding, "decode", "decode")
    before(gradient, "add_microbatches", "gradient")
    before(checkpoints.Checkpoints, "save", "save")
    before(decoding, "prefill", "compile", compile_for_long)
    before(gradient, "add_microbatches", "stall", sleep_for_long)
    before(experiment.Experiment, "init_params", "weights")
    before(evaluation, "record", "finished")
    before(checkpoints.Checkpoints, "prune", "pruning")
    before(log.RunLog, "close", "closing")
    before(checkpoints.Checkpoints, "save", "sealed", seal)
    before(checkpoints.Checkpoints, "score", "scoring", lambda: os._exit(9))  # killed outright
    before(ocp.training.Checkpointer, "load_checkpointables", "unreadable", fail_on_process_1)
    before(evaluation, "_rows", "evaluation")  # after a batch was sampled
    if POINT == "save":
        # All is saved then, and the evaluation that comes next compiles: for longer than the
        # patience on a busy machine, where the process would end in there.
        interrupts._PATIENCE = 120.0
    watchdog = {"seconds": 10.0} if POINT == "stall" else {}
    with distributed.processes("auto"):
        mode = os.environ.get("MODE", "train")
        try:
            modes.run(mode, get_config(**watchdog), WORKDIR)
        except Stop as stop:
            sys.exit(stop.status)


if __name__ == "__main__":
    main()
