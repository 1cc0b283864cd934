"""What a run tells about itself: metrics of a step, progress line, rollouts, first table."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from ml_collections import ConfigDict

from qlog import data, losses, models
from qlog.console import count_text
from qlog.experiment import Experiment, cost
from qlog.learner.types import SamplerMismatch
from qlog.parallel import batch_placement, chips
from qlog.records import Groups
from qlog.rollouts import diversity
from qlog.rollouts.text import rollout_texts
from qlog.step import StepResult, Stopwatch
from qlog.storage.paths import Path

# ---- A step, as numbers ----


def measure(
    experiment: Experiment, groups: Groups, result: StepResult, watch: Stopwatch
) -> dict[str, float]:
    """The metrics of one step, by name, on the host. Every process must call.

    Args:
      groups: what the step learned from.
      result: what `step.learn` made of it.
      watch: seconds of the step's phases.
    """
    estimator, sums = experiment.estimator, result.sums
    # Values stay on the devices until the transfer at the end.
    values: dict[str, Any] = {"loss": sums.surrogate.loss / groups.prompts.is_prompt.sum()}
    values |= result.update._asdict()
    if result.terms is not None:
        values |= {f"terms/{name}": x for name, x in result.terms._asdict().items()}
    values |= losses.measurements(result.state.loss_state)
    values |= losses.token_measurements(sums.surrogate)
    # packs that passed through the model on all devices, per pack that held something
    values["learn_waste"] = sums.rows.executed / jnp.maximum(sums.rows.needed, 1)
    if estimator.rationale == "sampled":
        values |= _rollout_metrics(groups, sums.mismatch)
        values |= diversity.measure(groups.rollouts, with_answer=bool(estimator.reward))
    if estimator.reward:
        values["reward"] = groups.reward.mean()
        for name, scores in groups.reward_parts.items():
            values[f"reward/{name}"] = scores.mean()
        if experiment.reward:
            for name, failed in experiment.reward.failures.items():
                values[f"reward/{name}/errors"] = failed.number  # so far
        values["truncated_answers"] = 1 - groups.rollouts.complete.mean()
    values |= _speeds(experiment, groups, sums.surrogate.tokens, watch.seconds)
    # One transfer for all: a transfer for each number would wait for the devices each time.
    return {name: float(value) for name, value in jax.device_get(values).items()} | _memory()


def _rollout_metrics(groups: Groups, mismatch: SamplerMismatch) -> dict[str, Array]:
    """Of sampled rollouts: means over all B x M, unless said otherwise."""
    rollouts = groups.rollouts
    log_m = jnp.log(groups.log_w.shape[1])
    num_tokens = jnp.maximum(mismatch.num_tokens, 1.0)
    return {
        # log of a group's mean w, the estimate of log P; its mean over the groups
        "log_p": (jax.nn.logsumexp(groups.log_w, axis=1) - log_m).mean(),
        "rationale_length": rollouts.rationale_lengths.mean(),
        "budget_hits": rollouts.forced.mean(),
        "ended_early": rollouts.ended_early.mean(),
        # decode steps of all lanes, those of rollouts that are done included, per token kept
        "decode_waste": groups.lane_steps / rollouts.lengths.sum(),
        "mismatch": mismatch.sum / num_tokens,
        "mismatch_max": mismatch.max,
        "mult_prob_error": mismatch.sum_exp / num_tokens,
    }


def _speeds(
    experiment: Experiment, groups: Groups, tokens_learned: Array, seconds: dict[str, float]
) -> dict[str, Any]:
    """Seconds, tokens per second and share of the chips' peak FLOP/s, by phase.

    Args:
      tokens_learned: scalar, of rationales and answers that the gradient passed through.
      seconds: by phase.
    """
    num_devices = experiment.mesh.devices.size
    peaks = chips.peaks(experiment.mesh.devices.flat[0].device_kind)  # of one
    peak = peaks.flops if peaks else None
    flops = _flops(experiment, groups) if peak else {}
    # A prompt counts once for its whole group, as it is computed.
    prompt_tokens = groups.prompts.lengths.sum()
    tokens = {"train": prompt_tokens + tokens_learned}
    if experiment.estimator.rationale == "sampled":
        tokens["decode"] = prompt_tokens + groups.rollouts.lengths.sum()
    values: dict[str, Any] = {}
    for phase, spent in seconds.items():
        values[f"seconds/{phase}"] = spent
        if phase in tokens:
            values[f"tokens_per_s/{phase}"] = tokens[phase] / spent
            values[f"tokens_per_s_per_chip/{phase}"] = tokens[phase] / spent / num_devices
        if peak and phase in flops:
            values[f"flops_utilization/{phase}"] = flops[phase] / spent / num_devices / peak
    # The step's share counts all seconds, those of phases without FLOPs (grading) included.
    if peak:
        whole = sum(flops.values()) / sum(seconds.values())
        values["flops_utilization/step"] = whole / num_devices / peak
    return values


def _flops(experiment: Experiment, groups: Groups) -> dict[str, float]:
    """FLOPs that a step needs, by phase (`models.flops`): gold answers count with training."""
    shape, flops = experiment.policy.config, models.flops
    # int [B], [B, M], [B, M], [B]: `models.flops` takes arrays of lengths.
    prompts, rollouts, rationales, gold = batch_placement.gather_to_host(
        experiment.mesh,
        (
            groups.prompts.lengths,
            groups.rollouts.lengths,
            groups.rollouts.rationale_lengths,
            groups.golds.lengths,
        ),
    )
    # [B, M], tokens that the learner passes behind each prompt.
    trajectories = rationales + gold[:, None]
    if experiment.estimator.answer != "gold":
        trajectories = rollouts
    starts = prompts[:, None]  # a continuation attends to its prompt
    prefill = flops.prefill_need(shape, 1, prompts).flops.sum()
    learned = flops.continuation_need(shape, 1, starts, trajectories).flops.sum()
    need = {"train": 3 * (prefill + learned)}  # a backward pass is two forward passes
    if experiment.estimator.rationale == "sampled":
        sampled = flops.continuation_need(shape, 1, starts, rollouts).flops.sum()
        need["decode"] = prefill + sampled
    return need


def _memory() -> dict[str, float]:
    """GiB on the fullest device of this process; {} where the backend reports none."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    names = {"in_use": "bytes_in_use", "peak": "peak_bytes_in_use"}
    return {
        f"memory_gib/{name}": max(s[key] for s in stats) / 2**30
        for name, key in names.items()
        if all(key in s for s in stats)
    }


def progress(values: dict[str, float]) -> str:
    """The middle of the progress line."""
    # Which of the metrics there are depends on the estimator.
    words = [f"loss {values['loss']:.3g}"]
    for name, label in (
        ("log_p", "log P"),
        ("effective_reward", "effective reward"),
        ("reward", "reward"),
    ):
        if name in values:
            words.append(f"{label} {values[name]:.3g}")
    speeds = [
        f"{name.split('/')[1]} {value:,.0f}"
        for name, value in values.items()
        if name.startswith("tokens_per_s/")
    ]
    return "  ".join(words) + f"  [tokens/s: {', '.join(speeds)}]"


# ---- Rollouts, as text ----


def rollout_rows(
    experiment: Experiment,
    groups: Groups,
    coefficients: losses.Coefficients,
    batch: data.PromptBatch,
) -> list[dict[str, Any]]:
    """Lines of rollouts.jsonl: rollouts of the batch's first prompts. Every process must call.

    Args:
      coefficients: [B, M], that the step gave to the rollouts.
    """
    num_prompts = min(experiment.config.train.rollouts_prompts, len(batch.examples))
    if experiment.estimator.rationale == "annotated" or not num_prompts:
        return []
    formatter = experiment.formatter
    assert formatter, "an experiment of shapes has no rollouts"
    # The prompts may lie on devices of several processes: the gathering is a collective.
    sampled = (
        groups.rollouts,
        groups.log_w,
        groups.reward,
        groups.reward_parts,
        coefficients.score,
        coefficients.path,
    )
    rollouts, log_w, reward, parts, score, path = batch_placement.gather_to_host(
        experiment.mesh, jax.tree.map(lambda x: x[:num_prompts], sampled)
    )
    lines = []
    for b in range(num_prompts):
        prompt = batch.tokens[b, : batch.lengths[b]].tolist()
        texts = rollout_texts(formatter, rollouts, b)
        for m, (rationale, answer) in enumerate(texts):
            lines.append(
                {
                    "id": batch.examples[b].id,
                    "prompt": formatter.tokenizer.decode(prompt, show_control=True),
                    "rollout": m,
                    "rationale": rationale,
                    "answer": answer,
                    "gold": batch.examples[b].answer,
                    "log_w": float(log_w[b, m]),
                    "reward": float(reward[b, m]),
                    **{f"reward/{name}": float(scores[b, m]) for name, scores in parts.items()},
                    # what multiplies the log-probabilities of rationale and answer in the loss
                    "coefficient": float(score[b, m]),
                    "path_coefficient": float(path[b, m]),
                    "forced": bool(rollouts.forced[b, m]),
                }
            )
    return lines


# ---- An evaluation, and the run as a whole ----


def best_metric(config: ConfigDict) -> str:
    """The evaluation metric that chooses the best checkpoint: the majority vote."""
    return f"m@{config.evaluation.rollouts_per_prompt}"


def brief(config: ConfigDict, metrics: dict[str, float]) -> str:
    """An evaluation in one line: p@1, p@k, m@k and log P."""
    k = config.evaluation.rollouts_per_prompt
    names = ("p@1", f"p@{k}", f"m@{k}", "log_p")
    return "  ".join(f"{name} {metrics[name]:.3f}" for name in names)


def describe(experiment: Experiment, workdir: Path, start_step: int) -> dict[str, object]:
    """The table that opens a run, by name of the line."""
    config, shape = experiment.config, experiment.policy.config
    rollout, train = config.rollout, config.train
    devices, num_rollouts = experiment.mesh.devices, experiment.rollouts_per_prompt
    num_params = sum(leaf.size for leaf in jax.tree.leaves(experiment.abstract_params()))
    changed = " with config.architecture" if config.architecture else ""
    model = (
        f"{config.model}{changed}: {count_text(shape.num_layers, 'layer')}, width {shape.width}, "
        f"vocabulary {shape.vocab_size:,}, {config.dtype}"
    )
    train_data = experiment.train_data
    assert train_data is not None, "describe is for runs that train"
    dataset = [f"{data.label(config.data.name)}, {config.data.style}"]
    dataset += [count_text(len(train_data), "prompt")]
    dataset += [f"{n} skipped over {field}" for field, n in train_data.skipped.items()]
    if train_data.invalid.number:
        dataset += [f"{train_data.invalid.number} skipped that cannot be used"]
    budgets = (
        f"prompt {config.data.max_prompt_tokens}, rationale {rollout.rationale_budget}, "
        f"answer {rollout.answer_reserve} tokens"
    )
    return {
        "model": model,
        "parameters": f"{num_params:,} from {config.init_from or config.weights}",
        "devices": (
            f"{devices.size} x {devices.flat[0].device_kind}, "
            + count_text(jax.process_count(), "process", "processes")
        ),
        "mesh": ", ".join(f"{axis} {size}" for axis, size in experiment.mesh.shape.items()),
        "data": ", ".join(dataset),
        "prompts per step": f"{train.prompts_per_step} in "
        + count_text(train.updates_per_batch, "update"),
        "rollouts per prompt (M)": (
            f"{num_rollouts}: "
            + count_text(train.prompts_per_step * num_rollouts, "rollout")
            + " per step"
        ),
        "budgets": budgets,
        **cost.describe(experiment, experiment.evaluation_data is not None, start_step),
        "estimator": _estimator_call(config),
        **_reward_line(experiment),
        "steps": f"{train.steps}" + (f", resuming at {start_step}" if start_step else ""),
        "workdir": workdir,
    }


def _reward_line(experiment: Experiment) -> dict[str, str]:
    """The reward as a sum, such as exact_match + 0.2 in_brackets; {} where there is none."""
    scorers = experiment.reward.scorers if experiment.reward else ()
    terms = [(f"{s.weight:g} " if s.weight != 1 else "") + s.name for s in scorers]
    return {"reward": " + ".join(terms)} if terms else {}


def _estimator_call(config: ConfigDict) -> str:
    """`config.loss` as a call, such as garl(q=0.75)."""
    arguments = dict(config.loss)
    name = arguments.pop("name")
    # What differs from the loss's defaults, and q always.
    usual = losses.arguments(name)
    arguments = {k: v for k, v in arguments.items() if k == "q" or v != usual.get(k)}
    return f"{losses.label(name)}({', '.join(f'{k}={v}' for k, v in arguments.items())})"
