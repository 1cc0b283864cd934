"""What an earlier start of a run left in its workdir, besides checkpoints: how far it came."""

import json
import math

from ml_collections import ConfigDict

from qlog.config import schema
from qlog.console import say
from qlog.errors import ConfigError, summary
from qlog.runs.folder import RESULTS
from qlog.runs.log import numbers, read_events
from qlog.storage import paths
from qlog.storage.paths import Path

# Settings of an evaluation that change no number of the one after the last step.
_NOT_OF_RESULTS = {"every", "final", "prompts_per_batch"}


def finished_metrics(workdir: Path, config: ConfigDict) -> dict[str, float] | None:
    """The metrics of a run that has finished with these steps; None of one that has more to do.

    A run that finished without `evaluation.final` stays as it is: --mode=evaluate does the same.

    Raises:
      ConfigError: it has finished, and its results are of another evaluation than the config's.
    """
    try:
        record = json.loads(paths.read(workdir / RESULTS))
        step, metrics, evaluated = record["step"], record["metrics"], record["evaluation"]
        # Of a number that is not finite the file has the word.
        metrics = {k: float(v) if isinstance(v, str) else v for k, v in metrics.items()}
        is_done = step >= config.train.steps
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        say(f"{workdir / RESULTS} cannot be read ({summary(error)}): it is written again")
        return None
    if not is_done:
        return None
    now = json.loads(schema.to_json(config.evaluation))
    for name in sorted(now.keys() & evaluated.keys() - _NOT_OF_RESULTS):
        if metrics and now[name] != evaluated[name]:
            raise ConfigError(
                f"config.evaluation.{name} = {now[name]!r}: the run in --workdir has finished, and "
                f"its results are of {evaluated[name]!r}: add --mode=evaluate, which writes other "
                "numbers next to them."
            )
    return metrics


def check_nothing_is_lost(workdir: Path) -> None:
    """Raises ConfigError where a log tells of checkpoints that are gone: it would be emptied."""
    # The newest one that it tells of may have been cut short. It was begun when the ones before it
    # were whole, and an evaluation ends when the checkpoint that it is of is.
    told, whole = {0}, {0}
    for row in read_events(workdir):
        if row["phase"] == "train":
            since = numbers(row).get("steps_since_checkpoint", math.nan)
            if 0 <= since <= row["step"]:
                told.add(row["step"] + 1 - int(since))
        else:
            whole.add(row["step"] + 1)
    whole |= told - {max(told)}
    if max(whole) > 0:
        raise ConfigError(
            f"--workdir: metrics.jsonl tells of a checkpoint at step {max(whole)}, and "
            f"{workdir / 'checkpoints'} has none: put it back, or use another --workdir."
        )


def logged_metrics(workdir: Path, step: int, split: str) -> dict[str, float]:
    """The metrics of an evaluation, from metrics.jsonl; {} where it has none."""
    for row in read_events(workdir):
        if (row["step"], row["phase"]) == (step, split):
            return numbers(row)
    return {}


def is_written(file: Path, record: str) -> bool:
    """Whether the file holds this record, whatever its metrics."""
    try:
        before = json.loads(paths.read(file))
    except FileNotFoundError:
        return False
    except (ValueError, RecursionError):
        before = None
    return isinstance(before, dict) and before | {"metrics": {}} == json.loads(record)
