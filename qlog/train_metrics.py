"""What a run tells about itself: a step's metrics, its progress line, its rollouts, the first table."""

import pathlib

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from qlog import data, losses, models
from qlog.experiment import Experiment
from qlog.parallel import chips, sharding
from qlog.records import Groups
from qlog.rollouts.text import rollout_texts
from qlog.step import Stopwatch


def measure(
    experiment: Experiment, state, groups: Groups, sums, gauges, norms, watch: Stopwatch
) -> dict[str, float]:
    """The numbers of one step, on the host."""
    rollouts, prompts = groups.rollouts, groups.prompts
    values = {"loss": sums.loss / prompts.is_prompt.sum(), **norms}
    values |= losses.measurements(state.loss_state) | losses.token_measurements(sums)
    train_tokens = prompts.lengths.sum() + sums.tokens
    tokens = {"train": train_tokens}
    if experiment.estimator.rationale == "sampled":
        sampled = jnp.maximum(gauges.sampled, 1.0)
        log_m = jnp.log(groups.log_w.shape[1])
        values |= {
            "log_p": (jax.nn.logsumexp(groups.log_w, axis=1) - log_m).mean(),
            "rationale_length": rollouts.rationale_lengths.mean(),
            "budget_hits": rollouts.forced.mean(),
            "ended_early": rollouts.ended_early.mean(),
            "decode_waste": groups.row_steps / rollouts.lengths.sum(),
            "mismatch": gauges.mismatch / sampled,
            "mismatch_max": gauges.mismatch_max,
            "mult_prob_error": gauges.mismatch_exp / sampled,
        }
        if experiment.estimator.reward:
            values |= {
                "reward": groups.reward.mean(),
                "truncated_answers": 1 - rollouts.complete.mean(),
            }
        tokens["decode"] = prompts.lengths.sum() + rollouts.lengths.sum()
    devices = experiment.mesh.devices
    peak = chips.peak_flops(devices.flat[0].device_kind)
    need = _flops(experiment, groups) if peak else {}
    for phase, seconds in watch.seconds.items():
        values[f"seconds/{phase}"] = seconds
        if phase in tokens:
            values[f"tokens_per_s/{phase}"] = tokens[phase] / seconds
            values[f"tokens_per_s_per_chip/{phase}"] = tokens[phase] / seconds / devices.size
        if peak and phase in need:
            values[f"flops_utilization/{phase}"] = need[phase] / seconds / devices.size / peak
    if peak:
        values["flops_utilization/step"] = (
            sum(need.values()) / sum(watch.seconds.values()) / devices.size / peak
        )
    return {name: float(value) for name, value in jax.device_get(values).items()} | _memory()


def _flops(experiment: Experiment, groups: Groups) -> dict[str, float]:
    """FLOPs that a step needs, by phase (`models.flops`): gold answers count with training."""
    shape, flops = experiment.policy.config, models.flops
    lengths = (
        groups.prompts.lengths,
        groups.rollouts.lengths,
        groups.rollouts.rationale_lengths,
        groups.gold_lengths,
    )
    starts, rollouts, rationales, gold = sharding.gather_to_host(experiment.mesh, lengths)
    prompts = flops.prefill_need(shape, 1, starts).flops.sum()
    trained = rationales + gold[:, None] if experiment.estimator.answer == "gold" else rollouts
    own = flops.continuation_need(shape, 1, starts[:, None], trained).flops.sum()
    decode = prompts + flops.continuation_need(shape, 1, starts[:, None], rollouts).flops.sum()
    need = {"train": 3 * (prompts + own)}
    return need | ({"decode": decode} if experiment.estimator.rationale == "sampled" else {})


def _memory() -> dict[str, float]:
    """GiB of device memory, of the fullest device of the first process; {} where none is reported."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    names = {"in_use": "bytes_in_use", "peak": "peak_bytes_in_use"}
    return {
        f"memory_gib/{name}": max(s[key] for s in stats) / 2**30
        for name, key in names.items()
        if all(key in s for s in stats)
    }


def progress(values: dict[str, float]) -> str:
    """The middle of the progress line."""
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


def rollout_rows(experiment: Experiment, groups: Groups, batch: data.PromptBatch) -> list[dict]:
    """Rollouts of the batch's first prompts as text, for rollouts.jsonl. Every process must call."""
    count = min(experiment.config.train.rollouts_prompts, len(batch.examples))
    if experiment.estimator.rationale == "annotated" or not count:
        return []
    found = (groups.rollouts, groups.log_w, groups.reward)
    rollouts, log_w, reward = sharding.gather_to_host(
        experiment.mesh, jax.tree.map(lambda x: x[:count], found)
    )
    rows = []
    for row in range(count):
        prompt = batch.tokens[row, : batch.lengths[row]].tolist()
        texts = rollout_texts(experiment.formatter, rollouts, row)
        for column, (rationale, answer) in enumerate(texts):
            rows.append(
                {
                    "id": batch.examples[row].id,
                    "prompt": experiment.formatter.tokenizer.decode(prompt, show_control=True),
                    "rollout": column,
                    "rationale": rationale,
                    "answer": answer,
                    "gold": batch.examples[row].answer,
                    "log_w": float(log_w[row, column]),
                    "reward": float(reward[row, column]),
                    "forced": bool(rollouts.forced[row, column]),
                }
            )
    return rows


def best_metric(config: ConfigDict) -> str:
    """The evaluation metric that chooses the best checkpoint: the majority vote."""
    return f"m@{config.evaluation.rollouts_per_prompt}"


def brief(config: ConfigDict, metrics: dict[str, float]) -> str:
    count = config.evaluation.rollouts_per_prompt
    names = ("p@1", f"p@{count}", f"m@{count}", "log_p")
    return "  ".join(f"{name} {metrics[name]:.3f}" for name in names)


def describe(experiment: Experiment, workdir: pathlib.Path, start_step: int) -> dict[str, object]:
    """The rows of the table that opens a run."""
    config, shape = experiment.config, experiment.policy.config
    count = sum(leaf.size for leaf in jax.tree.leaves(experiment.abstract_params()))
    loss = dict(config.loss)
    name = loss.pop("name")
    if isinstance(name, str):  # what differs from the recipe's defaults, and q always
        usual = losses.arguments(name)
        loss = {k: v for k, v in loss.items() if k == "q" or v != usual[k]}
    rows = config.train.prompts_per_step
    devices = experiment.mesh.devices
    return {
        "model": f"{config.model}: {shape.num_layers} layers, width {shape.width}, "
        f"vocabulary {shape.vocab_size:,}, {config.dtype}",
        "parameters": f"{count:,} from {config.init_from or config.weights}",
        "devices": f"{devices.size} x {devices.flat[0].device_kind}, {jax.process_count()} process(es)",
        "mesh": ", ".join(f"{axis} {size}" for axis, size in experiment.mesh.shape.items()),
        "data": f"{config.data.name}, {config.data.style}, {len(experiment.train_data):,} prompts"
        + "".join(
            f", {n} skipped over {field}" for field, n in experiment.train_data.skipped.items()
        ),
        "prompts per step": f"{rows} in {config.train.updates_per_batch} update(s)",
        "rollouts per prompt (M)": f"{experiment.rollouts_per_prompt}: "
        f"{rows * experiment.rollouts_per_prompt} rollouts per step",
        "budgets": f"prompt {config.data.max_prompt_tokens}, rationale "
        f"{config.rollout.rationale_budget}, answer {config.rollout.answer_reserve} tokens",
        "estimator": f"{name if isinstance(name, str) else name.__qualname__}("
        + ", ".join(f"{k}={v}" for k, v in loss.items())
        + ")",
        "steps": f"{config.train.steps}" + (f", resuming at {start_step}" if start_step else ""),
        "workdir": workdir,
    }
