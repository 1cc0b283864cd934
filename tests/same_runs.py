"""Whether two runs are one: parameters, metrics, rollouts, samples and results, bit for bit."""

import json

import jax
import trees

from qlog.experiment import prepare
from qlog.runs import checkpoint_reader
from qlog.runs.log import read_jsonl

# In the names of what a clock or the machine decides.
_TIMED = ("seconds", "per_s", "compilations", "steps_since", "utilization", "memory")


def assert_same_run(config, workdir, whole):
    """Whether `workdir` ended as `whole` did, which nothing disturbed: each row is there once.

    Args:
      config: of both.
    """
    abstract = prepare(config, jax.devices()[:1], train=False, evaluate=False).abstract_params()
    load = lambda folder: checkpoint_reader.load_params(folder, abstract, which="latest")
    trees.assert_equal(load(workdir), load(whole))
    assert rows(workdir) == rows(whole)
    # No *.parts of a half-done evaluation is left, and at least one evaluation is compared.
    assert _names(workdir / "samples") == _names(whole / "samples") != []
    for name in ("rollouts.jsonl", *(f"samples/{name}" for name in _names(whole / "samples"))):
        assert (workdir / name).read_text() == (whole / name).read_text(), name
    results = [json.loads((d / "results.json").read_text())["metrics"] for d in (workdir, whole)]
    assert results[0] == results[1]


def _names(folder):
    return sorted(file.name for file in folder.iterdir())


def rows(workdir):
    """The rows of metrics.jsonl, without what a clock or the machine decides."""
    return [
        {k: v for k, v in row.items() if not any(t in k for t in _TIMED)}
        for row in read_jsonl(workdir / "metrics.jsonl")
    ]
