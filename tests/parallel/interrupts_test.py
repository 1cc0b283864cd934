"""Signals in places where Python drops exceptions. More: tests/preemption_test.py."""

import signal
import subprocess
import sys

import pytest

from qlog.parallel import interrupts

_PROGRAM = """
import gc, os, signal, sys, time
from qlog.parallel import interrupts

def get_signal(*_):
    gc.callbacks.clear()
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(1000):  # its handler runs here
        pass

class Finalised:
    def __del__(self):
        get_signal()

def in_a_hook_of_the_collector():
    gc.callbacks.append(get_signal)
    gc.collect()

def in_a_finaliser():
    Finalised()

with interrupts.listening() as interrupts:
    {place}()
    # In one piece: the thread of `interrupts` prints, too.
    sys.stdout.write(f"the signal is known: {interrupts.asked}\\n")
    sys.stdout.flush()
    for _ in range(200):
        time.sleep(0.1)
    print("and is forgotten", flush=True)
"""


@pytest.mark.parametrize("place", ["in_a_hook_of_the_collector", "in_a_finaliser"])
def test_a_signal_is_not_lost_where_python_drops_exceptions(place):
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM.replace("{place}", place)], capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    assert sorted(lines) == ["SIGTERM: ending", "ended", "the signal is known: True"], done
    assert done.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in done.stderr


def test_signs_of_life_say_what_is_done_to_who_listens():
    outer, inner = [], []
    with interrupts.listening() as stop:
        stop.beat(doing="loading")
        with stop.telling(outer.append):
            stop.beat(doing="decoding: token 8")
            stop.beat()  # a sign of life without a word
            with stop.telling(inner.append):
                stop.check("learning")
            stop.check("decoding: token 16")
        stop.beat(doing="leaving")
    assert outer == ["decoding: token 8", "decoding: token 16"] and inner == ["learning"]
