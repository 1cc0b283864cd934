"""All that can be refused by looking at a config."""

import math

from ml_collections import ConfigDict

from qlog import losses, models
from qlog.config.schema import CHOICES, closest, default
from qlog.errors import ConfigError


def check_config(config: ConfigDict) -> None:
    """Everything that can be refused by looking at the config alone.

    Raises:
      ConfigError: unknown keys, wrong types, values out of range, an impossible loss.
    """
    _check_keys(config, default(), "config")
    rollout, train = config.rollout, config.train
    for section, key, low in (
        ("rollout", "rollouts_per_prompt", 1),
        ("rollout", "rationale_budget", 0),
        ("rollout", "answer_reserve", 1),
        ("rollout", "prompts_per_wave", 0),
        ("train", "steps", 1),
        ("train", "prompts_per_step", 1),
        ("train", "updates_per_batch", 1),
        ("train", "prompts_per_microbatch", 0),
        ("train", "rollouts_per_microbatch", 0),
        ("train", "rollouts_every", 1),
        ("train", "rollouts_prompts", 0),
        ("evaluation", "every", 0),
        ("evaluation", "prompts", 0),
        ("evaluation", "prompts_per_batch", 1),
        ("evaluation", "rollouts_per_prompt", 1),
        ("evaluation", "top_k", 0),
        ("checkpoint", "every", 1),
        ("checkpoint", "keep", 1),
        ("checkpoint", "minutes", 0),
        ("watchdog", "steps", 0),
        ("watchdog", "seconds", 1),
        ("watchdog", "first_seconds", 0),
        ("data", "max_prompt_tokens", 2),
        ("optimizer", "warmup_steps", 0),
        ("optimizer", "max_skipped_in_a_row", 1),
    ):
        _check_range(f"config.{section}.{key}", config[section][key], low, math.inf)
    _check_range("config.optimizer.learning_rate", config.optimizer.learning_rate, 0, math.inf)
    _check_range("config.optimizer.max_grad_norm", config.optimizer.max_grad_norm, 1e-12, math.inf)
    _check_range("config.rollout.temperature", rollout.temperature, 1e-3, math.inf)
    _check_range("config.evaluation.temperature", config.evaluation.temperature, 0, math.inf)
    _check_range("config.evaluation.top_p", config.evaluation.top_p, 1e-6, 1.0)
    for field, value, choices in (
        ("dtype", config.dtype, ("float32", "bfloat16")),
        ("attention", config.attention, ("auto", "blocks", "tpu", "cudnn")),
        ("optimizer.schedule", config.optimizer.schedule, ("constant", "cosine", "linear")),
        ("data.overlong", config.data.overlong, ("error", "skip")),
        ("checkpoint.finished", config.checkpoint.finished, ("all", "best_params")),
        ("train.remat", config.train.remat, tuple(models.REMAT)),
    ):
        if value not in choices:
            raise ConfigError(f"config.{field} = {value!r} is unknown: use {' or '.join(choices)}.")
    if train.prompts_per_step % train.updates_per_batch:
        raise ConfigError(
            f"config.train.updates_per_batch = {train.updates_per_batch} must divide "
            f"train.prompts_per_step = {train.prompts_per_step}."
        )
    for step in config.profile.steps:
        if type(step) is not int or step < 0:
            raise ConfigError(
                f"config.profile.steps = {config.profile.steps!r} must hold whole numbers."
            )
    whole, rows = rollout.rollouts_per_prompt, train.rollouts_per_microbatch
    if rows and whole % rows:
        divisors = ", ".join(str(d) for d in range(1, whole + 1) if whole % d == 0)
        raise ConfigError(
            f"config.train.rollouts_per_microbatch = {rows} must divide {whole}: use 0 (all) or one of "
            f"{divisors}."
        )
    build_estimator(config)


def build_estimator(config: ConfigDict) -> losses.Estimator:
    """The loss that `config.loss` names, for M = rollout.rollouts_per_prompt rollouts.

    Raises:
      ConfigError: unknown name or argument, a value out of range, too few rollouts.
    """
    section = dict(config.loss)
    name = section.pop("name")
    try:
        if callable(name):
            return name(**section)
        built = losses.build(name, num_rollouts=config.rollout.rollouts_per_prompt, **section)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"config.loss: {error}.") from None
    if built.rationale == "annotated" and config.rollout.rollouts_per_prompt != 1:
        raise ConfigError(
            f"config.rollout.rollouts_per_prompt = {config.rollout.rollouts_per_prompt}: the loss "
            f"{name!r} trains on one annotated rationale per prompt; set it to 1."
        )
    return built


def _check_keys(config: ConfigDict, schema: ConfigDict, path: str) -> None:
    missing = [key for key in schema if key not in config]
    if missing:
        raise ConfigError(f"{path}.{missing[0]} is missing: start from qlog.config.default().")
    for key in config:
        name = f"{path}.{key}"
        if key not in schema:
            value = "" if isinstance(config[key], ConfigDict) else f" = {config[key]!r}"
            raise ConfigError(f"{name}{value} is read by nothing{closest(key, schema)}.")
        if key in CHOICES:
            continue  # checked by what was chosen there
        if isinstance(schema[key], ConfigDict):
            if not isinstance(config[key], ConfigDict):
                raise ConfigError(f"{name} = {config[key]!r} must be a section of settings.")
            _check_keys(config[key], schema[key], name)
            continue
        wanted, value = type(schema[key]), config[key]
        if wanted is float and type(value) is int:
            continue
        if type(value) is not wanted:
            raise ConfigError(f"{name} = {value!r} must be of type {wanted.__name__}.")


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not (low <= value <= high and math.isfinite(value)):
        limit = f"at least {low}" if high == math.inf else f"from {low} to {high}"
        raise ConfigError(f"{name} = {value!r} must be {limit}.")
