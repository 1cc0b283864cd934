"""Real starts of the command: a signal in a real compilation, and two starts at once."""

import signal
import threading
import time

import commanded
import pytest

cache, file, whole = commanded.cache, commanded.file, commanded.whole  # fixtures
LAYERS = 4  # more than `commanded.CHANGES` has: they take longer to compile


@pytest.mark.slow
def test_a_signal_while_the_first_step_compiles(file, cache, tmp_path):
    """Nothing is done yet, so nothing is saved; the process ends by itself, and soon."""
    workdir, empty = tmp_path / "run", tmp_path / "empty"  # of compiled programs
    flags = [f"--config.architecture.num_layers={LAYERS}"]
    process = commanded.start(file, workdir, empty, {"JAX_LOG_COMPILES": "1"}, flags)
    lines = []

    def listen():
        for line in process.stderr:
            lines.append(line)
            if "Compiling jit(decode)" in line and not sent:
                sent.append(time.monotonic())
                process.send_signal(signal.SIGTERM)

    sent = []
    listener = threading.Thread(target=listen)
    listener.start()
    out = process.stdout.read()
    status = process.wait(timeout=120)
    listener.join()
    assert sent, "".join(lines)
    assert status in (0, 75), out + "".join(lines)
    assert "SIGTERM" in out + "".join(lines)
    assert not any("Traceback" in line for line in lines)
    assert not list((workdir / "checkpoints").glob("[0-9]*"))
    # The same command goes on, with what the broken start left in the workdir and in the cache.
    # Another cache: nothing that the signal cut short may reach the run that it is compared with.
    for folder, programs in ((workdir, empty), (tmp_path / "unbroken", cache)):
        status, out, err = commanded.run(file, folder, programs, flags=flags)
        assert status == 0, out + err
    commanded.assert_same_run(workdir, tmp_path / "unbroken", num_layers=LAYERS)


@pytest.mark.slow
def test_two_starts_at_once_in_one_workdir(file, cache, whole, tmp_path):
    workdir = tmp_path / "run"
    processes = [commanded.start(file, workdir, cache) for _ in range(2)]
    ends = [(*process.communicate(timeout=240), process.returncode) for process in processes]
    assert sorted(status for _, _, status in ends) == [0, 75], ends
    (refused,) = [err for _, err, status in ends if status == 75]
    assert (
        len(refused.strip().splitlines()) == 1 and "which still runs: wait for its end" in refused
    )
    commanded.assert_same_run(workdir, whole)
