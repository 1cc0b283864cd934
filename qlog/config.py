"""The settings of a run: every field with its meaning, variants by name, and the checks.

`default()` is the whole schema: a config file starts from it and changes values. Sections whose
keys depend on a choice (`loss`, `data.world`) hold the arguments of what was chosen, no others, so
that no key can be set that nobody reads.
"""

import difflib
import json
import math
from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from qlog import losses, models
from qlog.errors import ConfigError

# Sections whose keys are the arguments of what was chosen there; who reads them checks them.
_CHOICES = ("loss", "architecture", "world", "runs")


def default() -> ConfigDict:
    """Every field of a run with its default. Lengths are in tokens."""
    return ConfigDict(
        {
            "seed": 0,  # data order, sampling keys, random weights
            # Model
            "model": "qwen3_0p6b",  # a preset of qlog.models, a Hugging Face folder (gs://, s3:// too) or Hub id
            "architecture": {},  # fields of DecoderConfig that differ from the preset
            "weights": "random",  # 'random', or as model; Hub ids are looked for in QLOG_ASSETS first
            "init_from": "",  # workdir (or one checkpoint) of another run, to start from its parameters
            "attention": "auto",  # auto: by device; blocks: plain JAX; tpu: Pallas kernels; cudnn: CUDA GPUs
            "dtype": "bfloat16",  # of activations and caches; parameters are float32
            "tokenizer": {
                "path": "",  # folder, file or Hub id; '' takes the one beside the weights or the model
                "think_start": "<think>",  # piece that opens a rationale
                "think_end": "</think>",  # piece that closes it
            },
            # Data
            "data": {
                "name": "hotpotqa",  # finqa | hotpotqa | musique | multihop | multihop_text
                "manual_dir": "",  # folder with the official raw files; '' takes QLOG_ASSETS', or downloads
                "data_dir": "",  # where prepared data live, in a bucket read alone; '' is a cache folder
                "style": "cold",  # warm: instructions and chat template; cold: the input alone
                "max_prompt_tokens": 2048,  # a longer prompt is an error, or skipped
                "overlong": "error",  # error | skip
                "world": {},  # arguments of a synthetic task
            },
            # Rollouts
            "rollout": {
                "rollouts_per_prompt": 32,  # M
                "rationale_budget": 2944,  # free tokens before the thinking-end token is forced
                "answer_reserve": 128,  # tokens kept for the answer, sampled or gold
                "temperature": 1.0,  # of the sampled law, in sampling and in the gradient alike
                "prompts_per_wave": 0,  # of a shard, prompts whose rollouts' caches are in memory at a time; 0 all
                "closing_text": "",  # written before a forced thinking-end token
            },
            # Loss: the name of a recipe of qlog.losses, or a function that returns an Estimator
            "loss": loss("garl", q=0.75),
            "optimizer": {
                "learning_rate": 1e-6,  # peak
                "warmup_steps": 10,  # linear, from 0
                "schedule": "constant",  # after warm-up: constant | cosine | linear (to 0)
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,  # AdamW
                "weight_decay": 0.0,
                "max_grad_norm": 1.0,  # clip to this global norm
                "max_skipped_in_a_row": 10,  # stop after so many non-finite gradients
            },
            "train": {
                "steps": 500,
                "prompts_per_step": 32,  # B
                "updates_per_batch": 1,  # optimizer steps per batch of rollouts, in slices of prompts
                "prompts_per_microbatch": 0,  # of a shard, prompts in memory at a time; 0 is all
                "rollouts_per_microbatch": 0,  # rollouts of a prompt in memory at a time, if they are of
                # full length: shorter ones share rows; 0 is all
                "remat": "full",  # layers the backward pass recomputes: full; attention or dots keep those; none
                # Stop when mean |sampler - learner log_prob| exceeds this; 0 never. The quickstart's model in
                # bfloat16, on a CPU, had at most 0.005, prompts dealt to the wrong processes 0.95.
                "max_mismatch": 0.05,
                "rollouts_every": 10,  # steps between rollouts written to disk
                "rollouts_prompts": 2,  # prompts whose rollouts are written
            },
            "evaluation": {
                "every": 50,  # steps between evaluations; the last step always counts; 0 is never
                "split": "validation",
                "prompts": 0,  # at most so many; 0 is the whole split
                "prompts_per_batch": 32,  # of a shard
                "rollouts_per_prompt": 16,
                "temperature": 1.0,  # 0 is greedy
                "top_k": 0,  # of the most probable tokens; 0 is all. Evaluation only, as top_p:
                "top_p": 1.0,  # the gradient is about the whole law, so rollouts are drawn from it
                "without_rationale": False,  # evaluate with budget 0 beside it
            },
            "checkpoint": {
                "every": 50,  # steps between checkpoints; the last step always counts
                "minutes": 10.0,  # ... and minutes, whichever is sooner; 0 is steps alone
                "keep": 2,  # latest ones kept, beside the best by validation m@k
                "finished": "all",  # of a finished run: all, or best_params: the best one's parameters
            },
            "watchdog": {  # a run in which nothing happens ends with status 75, for the launcher to start again
                "steps": 10.0,  # median steps without a sign of life; 0 is for ever
                "seconds": 600.0,  # but at least so long
                "first_seconds": 7200.0,  # before the third step is done: programs compile
            },
            "profile": {
                "steps": ()
            },  # steps, from 1, traced into WORKDIR/profile; as a flag: 12,13
            # Devices per axis of one slice (of TPUs; a node of GPUs); -1 is the rest. Each slice holds a replica.
            # Prompts are split over slices x data x fsdp shards.
            "mesh": {
                "data": -1,
                "fsdp": 1,
                "tensor": 1,
                "slices": 0,
            },  # 0: as they are; 1: all devices as one
            "runs": {},  # a sweep: name of a run -> what differs in it from this config
        }
    )


def loss(name: str | Callable, **arguments) -> ConfigDict:
    """The `loss` section: a recipe's name and all its arguments, those given and the defaults."""
    known = {} if callable(name) else losses.arguments(name)
    return ConfigDict({"name": name, **known, **arguments}, convert_dict=False)


def parse_variants(
    arg: str | None, variants: Mapping[str, Callable[[ConfigDict, str], None]], config: ConfigDict
) -> ConfigDict:
    """Applies 'cold,garl,q=0.75' to `config`: each word or key=value names an entry of `variants`,
    a function of the config and of the value ('' for a bare word). Applied in the order given.

    Raises:
      ConfigError: a variant that does not exist.
    """
    for part in filter(None, (arg or "").split(",")):
        name, _, value = part.strip().partition("=")
        if name not in variants:
            raise ConfigError(
                f"config variant {part.strip()!r} is unknown{_closest(name, variants)}: this config "
                f"has {', '.join(sorted(variants))}."
            )
        variants[name](config, value)
    return config


def estimator_variants() -> dict[str, Callable[[ConfigDict, str], None]]:
    """Variants that every config shares: a recipe's name chooses the loss, q=... its commitment."""

    def choose(name):
        def variant(config, value):
            config.loss = loss(name)
            if losses.build(name).rationale == "annotated":
                config.rollout.rollouts_per_prompt = 1
                config.train.rollouts_per_microbatch = 0

        return variant

    def set_q(config, value):
        if "q" not in config.loss:
            raise ConfigError(f"variant q={value} is not read by the loss {config.loss.name!r}.")
        try:
            config.loss.q = float(value)
        except ValueError:
            raise ConfigError(f"variant q={value!r} is not a number.") from None

    return {**{name: choose(name) for name in losses.RECIPES}, "q": set_q}


def merge(config: ConfigDict, changes: Mapping) -> ConfigDict:
    """A copy of `config` with nested `changes`; sections that hold a choice's arguments are
    replaced whole."""
    merged = config.to_dict()
    for key, value in changes.items():
        is_section = isinstance(value, (Mapping, ConfigDict)) and key in config
        if is_section and key not in _CHOICES:
            merged[key] = merge(config[key], value)
        else:
            merged[key] = value
    return ConfigDict(merged)


def check(config: ConfigDict) -> None:
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
    estimator(config)


def estimator(config: ConfigDict) -> losses.Estimator:
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


def to_json(config: ConfigDict) -> str:
    """The resolved config, sorted and indented; functions by their qualified name."""

    def plain(value):
        if callable(value):
            return f"{value.__module__}.{value.__qualname__}"
        return list(value)

    return json.dumps(config.to_dict(), indent=2, sort_keys=True, default=plain)


def _check_keys(config: ConfigDict, schema: ConfigDict, path: str) -> None:
    missing = [key for key in schema if key not in config]
    if missing:
        raise ConfigError(f"{path}.{missing[0]} is missing: start from qlog.config.default().")
    for key in config:
        name = f"{path}.{key}"
        if key not in schema:
            value = "" if isinstance(config[key], ConfigDict) else f" = {config[key]!r}"
            raise ConfigError(f"{name}{value} is read by nothing{_closest(key, schema)}.")
        if key in _CHOICES:
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


def _closest(name: str, known) -> str:
    close = difflib.get_close_matches(name, [str(k) for k in known], n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
