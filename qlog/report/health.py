"""Is this run healthy? A verdict for each metric of the README's table, with number and remedy."""

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from qlog.console import count_text
from qlog.report.records import Run

_WINDOW = 0.1  # share of the steps that the beginning and the end of a run are
_ESCAPED = -2.0  # mean log P from which on a run has escaped a cold start: P = 0.14
_RISE = 1.0  # nats that log P must rise to count as an escape under way
_FEW_STEPS = 10  # of fewer no trend is read
_LOSS = 2.0  # nats that log P must lose to count as a collapse


class Verdict(NamedTuple):
    """What one metric says of a run."""

    metric: str
    level: Literal["good", "warning", "bad", "unknown"]
    value: str  # the number that it was judged by
    text: str  # what that means and, unless it is good, the remedy


class _Curve(NamedTuple):
    """A metric over the steps that have it as a finite number; at least one."""

    steps: list[int]  # from 1: steps done
    values: list[float]

    @property
    def first(self) -> float:
        """Mean over the first tenth of the steps."""
        return statistics.fmean(self.values[: self._size])

    @property
    def last(self) -> float:
        """Mean over the last tenth of the steps."""
        return statistics.fmean(self.values[-self._size :])

    @property
    def _size(self) -> int:
        return max(1, round(_WINDOW * len(self.values)))

    def smoothed(self) -> list[float]:
        """Mean over the window that ends at each step."""
        size = self._size
        return [
            statistics.fmean(self.values[max(0, i + 1 - size) : i + 1])
            for i in range(len(self.values))
        ]


def verdicts(run: Run) -> list[Verdict]:
    """A verdict per metric of the table that the run has measured; [] before its first step."""
    found = []
    for metric, judge in _JUDGES.items():
        pairs = [
            (row["step"] + 1, float(row[metric]))
            for row in run.steps
            if isinstance(row.get(metric), int | float)
        ]
        if pairs:
            steps, values = zip(*pairs, strict=True)
            found.append(judge(metric, _Curve(list(steps), list(values)), run.config))
    return found


def metrics() -> list[str]:
    """The metrics that are judged."""
    return list(_JUDGES)


# ---- One function per kind of verdict ----

_Judge = Callable[[str, _Curve, Mapping[str, Any]], Verdict]


def _log_p(metric: str, curve: _Curve, config: Mapping[str, Any]) -> Verdict:
    """Whether log P rises, has risen, is flat, or has fallen from where it was."""
    smoothed = curve.smoothed()
    top = max(range(len(smoothed)), key=smoothed.__getitem__)
    value = f"{curve.first:.2f} to {curve.last:.2f}"
    lost = smoothed[top] - curve.last
    # Each step has other prompts, so that log P wavers though the parameters do not change.
    wavers = statistics.pstdev([b - a for a, b in itertools.pairwise(curve.values)] or [0.0])
    if len(curve.values) < _FEW_STEPS:
        return Verdict(metric, "good", value, "too few steps to judge.")
    if lost > max(_LOSS, wavers, 0.25 * (smoothed[top] - smoothed[0])):
        return Verdict(
            metric,
            "bad",
            value,
            f"log P has fallen by {lost:.1f} from {smoothed[top]:.2f} at step {curve.steps[top]}: "
            f"a collapse; lower optimizer.learning_rate "
            f"({config['optimizer'].get('learning_rate')}), or use paft.",
        )
    if curve.last >= _ESCAPED or curve.last - smoothed[0] >= _RISE:
        return Verdict(metric, "good", value, "log P has risen.")
    # Flat: since when? The last step at which it was a little lower than now.
    before = [i for i, each in enumerate(smoothed) if each < curve.last - 0.5 * _RISE]
    since = curve.steps[before[-1]] if before else curve.steps[0]
    return Verdict(
        metric,
        "warning",
        value,
        f"no escape since step {since}: log P is {curve.last:.2f} after "
        f"{count_text(len(curve.steps), 'step')}; "
        f"{_more_commitment(config)}.",
    )


def _more_commitment(config: Mapping[str, Any]) -> str:
    q = config["loss"].get("q")
    if not isinstance(q, int | float):
        return f"{config['loss'].get('name')} has no q: use garl with q = 0.75"
    return f"raise q ({q:g})" if q < 1 else "q is 1 already: train longer, or from a warmer start"


def _effective_reward(metric: str, curve: _Curve, config: Mapping[str, Any]) -> Verdict:
    # After an escape it falls again: a group whose rollouts are all right has equal weights.
    most = max(curve.smoothed())
    value = f"at most {most:.3g}, {curve.last:.3g} in the end"
    if most < 1e-3:
        text = f"the largest effective reward was {most:.2g} of at most 1: hardly any signal"
        return Verdict(metric, "warning", value, f"{text}; {_more_commitment(config)}.")
    return Verdict(metric, "good", value, "rollouts differ in what they are worth.")


def _ess(metric: str, curve: _Curve, config: Mapping[str, Any]) -> Verdict:
    size = config["rollout"].get("rollouts_per_prompt", 1)
    value = f"{curve.last:.1f} of {size}"
    if size >= 4 and curve.last < 1.5:
        text = "one rollout of each group decides; raise rollout.rollouts_per_prompt"
        return Verdict(metric, "warning", value, f"{text} ({size}).")
    return Verdict(metric, "good", value, "several rollouts count in a group.")


def _no_signal(metric: str, curve: _Curve, config: Mapping[str, Any]) -> Verdict:
    value = f"{curve.last:.0%} of groups"
    if curve.last >= 0.9:
        remedy = "easier or harder prompts"
        if not isinstance(config["loss"].get("q"), int | float):
            remedy = "all their rewards are equal; a loss that reads log w, such as garl, has one"
        text = f"{curve.last:.0%} of groups have no gradient: {remedy}."
        return Verdict(metric, "bad" if curve.last >= 0.99 else "warning", value, text)
    return Verdict(metric, "good", value, "groups have a gradient.")


def _mismatch(metric: str, curve: _Curve, config: Mapping[str, Any]) -> Verdict:
    most = max(curve.values)
    at = curve.steps[curve.values.index(most)]
    is_rounded = config["rollout"].get("cache") == "int8"  # the sampler sees other keys and values
    limit = 1e-3 if config.get("dtype") == "float32" and not is_rounded else 0.05
    value = f"{most:.2g} nats at step {at}"
    if most > limit:
        remedy = "train with --config.attention=blocks, and report it"
        if is_rounded:
            remedy = "train with --config.rollout.cache=auto"
        return Verdict(
            metric,
            "bad",
            value,
            f"sampler and learner disagree by {most:.2g} nats per token, above {limit:g}: "
            f"{remedy}.",
        )
    return Verdict(metric, "good", value, f"at most {limit:g}, as it should be.")


def _probability_error(metric: str, curve: _Curve, config: Mapping[str, Any]) -> Verdict:
    most = max(curve.values)
    value = f"{most:.3g}"
    if most > 1.1:
        text = f"token probabilities differ by a factor of {most:.3g} on average: see mismatch."
        return Verdict(metric, "bad", value, text)
    return Verdict(metric, "good", value, "sampler and learner give tokens the same probability.")


def _near_one(remedy: str, good: str) -> _Judge:
    """A share that should not be near 1."""

    def judge(metric: str, curve: _Curve, config: Mapping[str, Any]) -> Verdict:
        value = f"{curve.last:.0%}"
        if curve.last > 0.8:
            text = f"{curve.last:.0%} of rollouts: {remedy.format(**config['rollout'])}."
            return Verdict(metric, "warning", value, text)
        return Verdict(metric, "good", value, good)

    return judge


def _decode_waste(metric: str, curve: _Curve, config: Mapping[str, Any]) -> Verdict:
    value = f"{curve.last:.2f}"
    if curve.last > 1.8:
        text = (
            f"{curve.last:.1f} lane-steps are decoded per token: rollouts end unevenly over the "
            "devices; raise rollout.prompts_per_wave."
        )
        return Verdict(metric, "warning", value, text)
    return Verdict(metric, "good", value, "little is decoded in vain.")


def _learn_waste(metric: str, curve: _Curve, config: Mapping[str, Any]) -> Verdict:
    value = f"{curve.last:.2f}"
    if curve.last > 3:
        part = config["train"].get("rollouts_per_microbatch", 0)
        text = (
            f"{curve.last:.1f} packs are computed for each that has something to learn from: lower "
            f"train.rollouts_per_microbatch ({part}; 0 is all) or train.prompts_per_microbatch."
        )
        return Verdict(metric, "warning", value, text)
    return Verdict(metric, "good", value, "few packs are computed in vain.")


def _ended_early(metric: str, curve: _Curve, config: Mapping[str, Any]) -> Verdict:
    value = f"{curve.first:.0%} to {curve.last:.0%}"
    if curve.last - curve.first > 0.2:
        text = (
            f"rationales without an end rose from {curve.first:.0%} to {curve.last:.0%}: they "
            "collapse; lower optimizer.learning_rate, or use paft."
        )
        return Verdict(metric, "bad", value, text)
    return Verdict(metric, "good", value, "rationales come to their end.")


def _repetition(metric: str, curve: _Curve, config: Mapping[str, Any]) -> Verdict:
    value = f"{curve.first:.0%} to {curve.last:.0%}"
    if curve.last > 0.6 and curve.last - curve.first > 0.2:
        text = (
            f"rationales repeat themselves: {curve.last:.0%} of their 4-grams occurred before, "
            f"{curve.first:.0%} at the start; lower optimizer.learning_rate, or use paft."
        )
        return Verdict(metric, "warning", value, text)
    return Verdict(metric, "good", value, "rationales do not run in circles.")


def _entropy(metric: str, curve: _Curve, config: Mapping[str, Any]) -> Verdict:
    value = f"{curve.first:.2f} to {curve.last:.2f} nats"
    if curve.last - curve.first > 1:
        text = (
            f"the entropy of a rationale's token rose by {curve.last - curve.first:.1f} nats: "
            "rationales turn to noise; lower optimizer.learning_rate, or use paft."
        )
        return Verdict(metric, "warning", value, text)
    return Verdict(metric, "good", value, "rationales do not turn to noise.")


def _compilations(metric: str, curve: _Curve, config: Mapping[str, Any]) -> Verdict:
    # A start compiles in its first two steps, and a resumed run has several starts.
    late = [
        step
        for index, (step, value) in enumerate(zip(curve.steps, curve.values, strict=True))
        if value > 0 and index >= 2 and max(curve.values[index - 2 : index]) == 0
    ]
    value = f"{count_text(len(late), 'step')} after the second"
    if len(late) > 0.05 * len(curve.steps) and len(late) > 2:
        text = f"programs compiled at steps {late[:3]} and others: shapes change; report it."
        return Verdict(metric, "warning", value, text)
    return Verdict(metric, "good", value, "programs are compiled once per start.")


def _skipped_updates(metric: str, curve: _Curve, config: Mapping[str, Any]) -> Verdict:
    skipped = curve.values[-1]
    if skipped > 0:
        first = next(s for s, v in zip(curve.steps, curve.values, strict=True) if v > 0)
        text = (
            f"{skipped:.0f} gradients were not finite, the first at step {first}: look at "
            "grad_norm, lower optimizer.learning_rate "
            f"({config['optimizer'].get('learning_rate')})."
        )
        return Verdict(metric, "warning", f"{skipped:.0f}", text)
    return Verdict(metric, "good", "0", "every gradient was finite.")


def _utilization(metric: str, curve: _Curve, config: Mapping[str, Any]) -> Verdict:
    best, value = max(curve.smoothed()), f"{curve.last:.1%}"
    if curve.last < 0.6 * best:
        text = (
            f"fell from {best:.1%} to {curve.last:.1%}: lengths grew uneven, or a host is slow; "
            "look at seconds by phase."
        )
        return Verdict(metric, "warning", value, text)
    return Verdict(metric, "good", value, "steady.")


def _memory(metric: str, curve: _Curve, config: Mapping[str, Any]) -> Verdict:
    value = f"{max(curve.values):.1f} GiB"
    text = "to compare with the chip's; near it, lower the fields that --mode=compile names."
    return Verdict(metric, "unknown", value, text)


def _since_checkpoint(metric: str, curve: _Curve, config: Mapping[str, Any]) -> Verdict:
    most, every = max(curve.values), config["checkpoint"].get("every", 0)
    value = f"at most {most:.0f}"
    if every and most > 2 * every:
        text = f"{most:.0f} steps without a checkpoint, which is due every {every}: saving fails."
        return Verdict(metric, "bad", value, text)
    return Verdict(metric, "good", value, "what a lost host costs.")


_JUDGES: dict[str, _Judge] = {
    "log_p": _log_p,
    "effective_reward": _effective_reward,
    "ess": _ess,
    "no_signal": _no_signal,
    "mismatch": _mismatch,
    "mult_prob_error": _probability_error,
    "budget_hits": _near_one(
        "their thinking was forced to end; raise rollout.rationale_budget ({rationale_budget})",
        "rationales end by themselves.",
    ),
    "truncated_answers": _near_one(
        "their answer was cut; raise rollout.answer_reserve ({answer_reserve})",
        "answers end by themselves.",
    ),
    "decode_waste": _decode_waste,
    "learn_waste": _learn_waste,
    "ended_early": _ended_early,
    "entropy/rationale": _entropy,
    "repetition": _repetition,
    "compilations": _compilations,
    "skipped_updates": _skipped_updates,
    "flops_utilization/step": _utilization,
    "memory_gib/peak": _memory,
    "steps_since_checkpoint": _since_checkpoint,
}


def worst(found: Sequence[Verdict]) -> list[Verdict]:
    """The verdicts that ask for something, the bad ones first."""
    order = {"bad": 0, "warning": 1}
    return sorted((v for v in found if v.level in order), key=lambda v: order[v.level])
