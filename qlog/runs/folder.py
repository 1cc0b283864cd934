"""The names of what lies in a run's folder."""

from qlog.storage.paths import Path

CONFIG = "config.json"  # the resolved config
METRICS = "metrics.jsonl"  # a line per step, and per evaluation
ROLLOUTS = "rollouts.jsonl"  # a line per rollout, as text
SCORES = "scores.json"  # how good each checkpoint is
FINAL = "final.json"  # numbers of the best checkpoint on evaluation.final
RESULTS = "results.json"  # numbers of the last evaluation; written last, when the run has finished


def questions(samples: Path) -> Path:
    """STEM.questions.json next to STEM.jsonl: each question's accuracy, a hundredth of the size."""
    return samples.with_suffix(".questions.json")
