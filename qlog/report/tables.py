"""The paper's Tables 1 to 3, cell by cell: the published value, and what our runs say."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from qlog.config import schema
from qlog.report import groups, statistics
from qlog.report.records import Cell, Evaluation, Run

PUBLISHED: dict[str, Any] = json.loads(
    (pathlib.Path(__file__).parent / "published.json").read_text(encoding="utf-8")
)
_BASE, _GRPO = "Base", "GRPO"
# Of config.evaluation: what the numbers of an evaluation depend on.
_SETTINGS = ("temperature", "top_k", "top_p", "prompts", "rollouts_per_prompt")


def cells(runs: Sequence[Run], tables: Sequence[int] = (1, 2, 3)) -> list[Cell]:
    """Every cell of the tables, in the paper's order; of runs that the paper has not, none."""
    found = []
    for table in tables:
        for part in PUBLISHED["tables"][str(table)]["groups"]:
            found += _part(table, part, runs)
    return found


def row_of(config: Mapping[str, Any]) -> str | None:
    """The paper's name of a run's method, 'GARL q=0.75'; None for one that it does not have.

    A loss with other arguments than the recipe's defaults is another method.
    """
    if not groups.is_plain(config):
        return None
    loss = config["loss"]
    name, q = loss.get("name"), loss.get("q")
    if name == "grpo":
        return _GRPO
    if name == "rb_rloo" or (name == "garl" and q == 0):
        return "GARL q=0 (RB-RLOO)"
    if name in ("garl", "paft") and isinstance(q, int | float):
        return f"{name.upper()} q={q:g}"
    return None


def _part(table: int, part: Mapping[str, Any], runs: Sequence[Run]) -> list[Cell]:
    """The cells of one dataset of a table."""
    dataset, found = part["dataset"], {}
    for row in part["rows"]:
        found[row["row"]] = _Row(row["row"], dataset, row["style"], runs)
    reference = found.get(_GRPO)
    cells = []
    for row in part["rows"]:
        mine = found[row["row"]]
        for metric, published in zip(part["metrics"], row["values"], strict=True):
            name = f"substring/{metric}"
            ours = statistics.over_seeds(mine.evaluations, name)
            notes = list(mine.notes)
            if mine.evaluations and ours is None:
                notes.append(f"the evaluation has no {metric}: other numbers of samples")
            against = None
            if reference and mine is not reference and ours is not None:
                against = statistics.paired(mine.evaluations, reference.evaluations, name)
            cells.append(
                Cell(
                    table=table,
                    dataset=dataset,
                    style=row["style"],
                    row=row["row"],
                    metric=metric,
                    published=published,
                    state=mine.state,
                    detail=mine.detail,
                    folders=tuple(str(run.folder) for run in mine.runs),
                    ours=ours,
                    strict=statistics.over_seeds(mine.evaluations, f"contains/{metric}"),
                    against=against,
                    notes=tuple(notes),
                )
            )
    return cells


class _Row:
    """The runs of a row of a table, and what they have come to.

    Attributes:
      runs: of one experiment, by seed.
      evaluations: on the test split, of those that have one.
      state, detail, notes: as in `Cell`.
    """

    def __init__(self, row: str, dataset: str, style: str, runs: Sequence[Run]):
        self.runs: tuple[Run, ...] = ()
        self.evaluations: list[Evaluation] = []
        self.notes: list[str] = []
        is_base = row == _BASE
        mine = [
            run
            for run in runs
            if (run.config["data"].get("name"), run.config["data"].get("style")) == (dataset, style)
            and (_has_base(run) if is_base else _is_trained(run) and row_of(run.config) == row)
        ]
        if not mine:
            self.state, self.detail = "not run", "not run"
            return
        self._choose(mine, is_base)
        for run in self.runs:
            evaluation = run.base if is_base else run.final if _is_finished(run) else None
            if evaluation is not None:
                self.evaluations.append(evaluation)
                self._check(run, evaluation, is_base)
        self.state, self.detail = _state(self.runs, is_base)

    def _choose(self, runs: Sequence[Run], is_base: bool) -> None:
        """Takes one experiment: the paper's set-up if there is one, then that of most seeds."""
        alike = groups.group(runs)
        if is_base:  # training's settings do not matter to it
            alike = [alike[0]._replace(runs=tuple(runs))]
        ranked = sorted(
            alike,
            key=lambda group: (
                len(_deviations(group.runs[0].config)),
                -sum(_is_finished(run) for run in group.runs),
                -len(group.runs),
            ),
        )
        self.runs = ranked[0].runs
        deviations = _deviations(self.runs[0].config)
        if deviations:
            self.notes.append("not the paper's set-up: " + "; ".join(deviations))
        chosen = groups.numbers(self.runs[0].config)
        for other in ranked[1:]:
            theirs = groups.numbers(other.runs[0].config)
            fields = [key for key in {**chosen, **theirs} if chosen.get(key) != theirs.get(key)]
            names = ", ".join(run.name for run in other.runs)
            self.notes.append(f"left out, since {', '.join(fields)} differ: {names}")
        seeds = [run.config.get("seed") for run in self.runs]
        if len(set(seeds)) < len(seeds):
            self.notes.append(f"the seeds are not distinct ({seeds}): the spread is too small")

    def _check(self, run: Run, evaluation: Evaluation, is_base: bool) -> None:
        """Notes what keeps a number from being the one that the table means."""
        if evaluation.split != "test":
            self.notes.append(f"{run.name}: the numbers are of the split {evaluation.split!r}")
        wanted = run.config["evaluation"]
        for name in _SETTINGS:
            got = evaluation.settings.get(name, wanted.get(name))
            if got != wanted.get(name):
                self.notes.append(
                    f"{run.name}: evaluated with {name} = {got}, not {wanted.get(name)}"
                )
        if not is_base and run.scores:
            best = max(run.scores, key=lambda step: (run.scores[step], -step))
            if evaluation.step != best:
                self.notes.append(
                    f"{run.name}: step {evaluation.step} was evaluated, the best on "
                    f"{wanted.get('split')} is step {best}"
                )


def _has_base(run: Run) -> bool:
    return run.base is not None


def _is_trained(run: Run) -> bool:
    return run.state.kind not in ("evaluated", "new")


def _is_finished(run: Run) -> bool:
    return run.state.kind == "finished"


def _deviations(config: Mapping[str, Any]) -> list[str]:
    """Where a config differs from what the paper gives, in words."""
    fields = schema.from_json(config)
    given = dict(PUBLISHED["given"])
    budget = PUBLISHED["rationale_budget"].get(fields.get("data.name"))
    if budget:
        given["rollout.rationale_budget"] = budget
    return [
        f"{name} = {fields.get(name)!r} (the paper: {value!r})"
        for name, value in given.items()
        if fields.get(name) != value
    ]


def _state(runs: Sequence[Run], is_base: bool) -> tuple[str, str]:
    """What a cell says of its runs: the state of the one that got furthest, and all in words."""
    words: dict[str, list[str]] = {}
    for run in runs:
        seed, state = f"seed {run.config.get('seed', 0)}", run.state
        if is_base:
            words.setdefault("run", []).append(seed)
        elif state.kind == "finished" and run.final is None:
            words.setdefault("not evaluated", []).append(
                f"{seed} has finished without numbers of the test split (--mode=evaluate "
                f"--config.evaluation.split=test writes them)"
            )
        elif state.kind == "finished":
            assert run.final is not None
            words.setdefault("run", []).append(f"{seed}, best step {run.final.step}")
        else:
            reason = f": {state.why}" if state.why else ""
            words.setdefault(state.kind, []).append(
                f"{seed}, step {state.step} of {state.steps}{reason}"
            )
    order = ("run", "running", "silent", "stopped", "failed", "not evaluated")
    kinds = [kind for kind in order if kind in words]
    return kinds[0], "; ".join(f"{kind} ({'; '.join(words[kind])})" for kind in kinds)
