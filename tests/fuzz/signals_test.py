"""Signals at random moments of a real run, again and again: its end is that of an unbroken one."""

import signal
import subprocess
import time

import commanded
import fuzzing
import pytest
from hypothesis import assume
from hypothesis import strategies as st

pytestmark = pytest.mark.slow
cache, file, whole = commanded.cache, commanded.file, commanded.whole  # fixtures
_KINDS = ("SIGINT", "SIGTERM", "SIGKILL")
# What a start that was interrupted may end with: it saved and stopped, it was cut short before it
# had anything to save, or it was killed.
_STATUS = {0, 130, 143, -signal.SIGKILL, -signal.SIGINT, -signal.SIGTERM}


@pytest.fixture(scope="module")
def seconds(tmp_path_factory, file, cache, whole):
    """What a run takes that nothing disturbs; `whole` has compiled its programs."""
    began = time.monotonic()
    status, out, err = commanded.run(file, tmp_path_factory.mktemp("timed"), cache)
    assert status == 0, out + err
    return time.monotonic() - began


def test_signals_at_random_moments(record_property, seconds, whole, file, cache, tmp_path):
    numbers = iter(range(10**6))

    def holds(signals):
        workdir = tmp_path / f"run{next(numbers)}"
        num_reached = 0
        for name, moment, after in signals:
            process = commanded.start(file, workdir, cache)
            time.sleep(moment * seconds)
            num_reached += process.poll() is None
            process.send_signal(getattr(signal, name))
            if after:  # of two signals the second may end it at once
                time.sleep(after)
                process.send_signal(signal.SIGTERM)
            try:
                out, err = process.communicate(timeout=120)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
            assert process.returncode in _STATUS, (process.returncode, out, err)
            assert "Traceback" not in out + err, out + err
        # Where each signal came after the end of the run, nothing was disturbed.
        assume(num_reached)
        status, out, err = commanded.run(file, workdir, cache)
        assert status == 0, out + err
        commanded.assert_same_run(workdir, whole)

    one = st.tuples(st.sampled_from(_KINDS), st.floats(0, 1), st.sampled_from([0.0, 0.0, 0.2]))
    cases = st.lists(one, min_size=1, max_size=3)
    fuzzing.try_cases(record_property, "runs with one to three signals", 20, cases, holds)
