"""The tutorial's code, run in its order, prints what the page says."""

import re

import numpy as np
from places import ROOT

PAGE = (ROOT / "qlog/TUTORIAL.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)


def test_the_tutorial_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "tutorial"}
    exec(BLOCKS[0], names)
    shown = [line.strip() for line in PAGE.splitlines() if re.match(r"    \d\.\d+ \[", line)]
    numbers = [re.findall(r"[\d.]+(?:e-?\d+)?", text) for text in shown]
    printed = [re.findall(r"[\d.]+(?:e-?\d+)?", t) for t in capsys.readouterr().out.splitlines()]
    np.testing.assert_allclose(
        np.array(printed, float), np.array(numbers, float), rtol=1e-4, atol=1e-9
    )
    for block in BLOCKS[1:]:
        exec(block, names)
    # Section 2: the estimator's mean is near the exact gradient.
    for truth, estimates in zip(names["truth"], names["estimates"], strict=True):
        np.testing.assert_allclose(estimates.mean(0), truth, atol=0.03 * np.abs(truth).max())
    # Sections 4 and 5: the run trained, and was read.
    assert not names["outcome"].interrupted and names["run"].state.kind == "finished"
    assert names["last"]["log_p"] > names["first"]["log_p"] + 5
    assert len(names["run"].evaluations) == 2
