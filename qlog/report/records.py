"""Pure records: what is known of a run, of runs of several seeds, of a cell of a table."""

from typing import Any, Literal, NamedTuple

import numpy as np

from qlog.storage.paths import Path

# finished: results.json is there. running: its process gives signs of life. silent: it gave none
# for minutes. stopped: a signal ended it, and the same command goes on. failed: it ended with an
# error, or its process is gone. evaluated: no training, only evaluations. new: nothing is known.
Kind = Literal["finished", "running", "silent", "stopped", "failed", "evaluated", "new"]


class State(NamedTuple):
    """Where a run is."""

    kind: Kind
    step: int  # steps done, as far as the folder tells
    steps: int  # of the whole run
    why: str  # of a failed run: the error, '' of the others


class Evaluation(NamedTuple):
    """A checkpoint on a split, as the run or --mode=evaluate wrote it."""

    split: str  # train, validation or test
    step: int | None  # of the checkpoint; None where it is not known
    source: str  # in words: which parameters
    settings: dict[str, Any]  # config.evaluation of that time
    metrics: dict[str, Any]  # by name; a number that is not finite is text
    ids: tuple[str, ...]  # of the Q questions; () where no file has them
    # By name ("substring/m@16"): float64 [Q], accuracy of each question; {} where ids is ()
    questions: dict[str, np.ndarray]


class Run(NamedTuple):
    """One run, finished or not."""

    folder: Path  # where it is
    name: str  # short, distinct among the runs of a report
    config: dict[str, Any]  # config.json, nested
    state: State
    steps: list[dict[str, Any]]  # lines of metrics.jsonl of the training steps, in their order
    evaluations: list[dict[str, Any]]  # lines of metrics.jsonl of evaluations on evaluation.split
    scores: dict[int, float]  # by step: what chooses the best checkpoint
    final: Evaluation | None  # the best checkpoint on the test split
    base: Evaluation | None  # the model before training on the test split
    seconds: float | None  # of a run of several_runs, start to end
    notes: tuple[str, ...]  # files that could not be read, in sentences


class Group(NamedTuple):
    """Runs of one experiment: they differ in their seed, and in what changes no number."""

    label: str  # method and setting, distinct among the groups of a report
    method: str  # the loss as a call: garl(q=0.75)
    setting: str  # what tells it from other groups of the same method; '' where nothing has to
    runs: tuple[Run, ...]  # by seed


class Estimate(NamedTuple):
    """A number over seeds, in percent."""

    mean: float  # over seeds
    spread: float  # standard deviation over seeds (n - 1); nan of one seed
    low: float  # of the 95% interval
    high: float  # of the 95% interval
    over: Literal["questions", "seeds"]  # what the bootstrap resampled
    values: tuple[float, ...]  # of each seed


class Paired(NamedTuple):
    """A method against another one on the same questions, in percent."""

    difference: float  # mean over questions, each the mean over its seeds
    low: float  # of the 95% interval, bootstrap over questions
    high: float
    p_value: float  # two-sided, of a sign-flip permutation test over questions
    num_questions: int  # that both have answered


class Cell(NamedTuple):
    """A number of a table of the paper, and ours."""

    table: int  # 1, 2 or 3
    dataset: str  # finqa, hotpotqa or musique
    style: str  # cold or warm
    row: str  # the method, as the paper names it
    metric: str  # p@1, p@16 or m@16
    published: float | None  # in percent
    state: str  # run, running, silent, stopped, failed or not run
    detail: str  # seeds, steps, reasons: in words
    folders: tuple[str, ...]  # of all its runs
    ours: Estimate | None  # under the paper's rule (substring); None without a test evaluation
    strict: Estimate | None  # under ours (contains: whole words)
    against: Paired | None  # GRPO of the same dataset in the same table; None where not possible
    notes: tuple[str, ...]  # what differs from the paper's set-up, and what was left out
