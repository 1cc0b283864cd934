"""The schema of a run's config: every field with its default and its meaning.

A config file starts from `default()` and changes values. Some sections (`loss`, `data.world`) have
the arguments of what was chosen there as their keys, and no others: a key that nothing reads is an
error.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference

from qlog import losses
from qlog.errors import ConfigError

# Sections whose keys are the arguments of what was chosen there; the reader of each checks them.
CHOICES = (
    "loss",
    "architecture",
    "chat_template_kwargs",
    "files",
    "fields",
    "world",
    "runs",
)
# Keys whose value may be a function, or a list of functions, in the place of a name; what reads the
# value checks it.
FUNCTIONS = ("name", "reward", "grader", "metrics")


def default() -> ConfigDict:
    """Every field of a run with its default. Lengths are in tokens."""
    return _open(
        {
            "seed": 0,  # data order, sampling keys, random weights
            # ---- Model ----
            # A preset of qlog.models, a Hugging Face folder (gs:// and s3:// too), or a Hub id
            "model": "qwen3_0p6b",
            "architecture": {},  # fields of DecoderConfig that differ from the preset
            # 'random', or as model; Hub ids are looked for in QLOG_ASSETS first
            "weights": "random",
            "init_from": "",  # another run's workdir, or one checkpoint: start from its parameters
            # auto: by device; blocks: plain JAX; tpu: Pallas kernels; cudnn: CUDA GPUs
            "attention": "auto",
            "dtype": "bfloat16",  # of activations and caches; parameters are float32
            "tokenizer": {
                "path": "",  # folder, file or Hub id; '' takes the one next to weights or model
                "think_start": "<think>",  # piece that opens a rationale
                "think_end": "</think>",  # piece that closes it
                # Control tokens that end an answer, the one that closes gold answers first; ()
                # takes those of the known families. As a flag: NAME,NAME. Those of
                # tokenizer_config.json and generation_config.json end an answer as well.
                "eos": (),
                # Of the warm style: a .jinja file, 'builtin', or '': the model's own, else built-in
                "chat_template": "",
                "chat_template_kwargs": {},  # variables for it, such as Llama 3's date_string
            },
            # ---- Data ----
            "data": {
                # finqa | hotpotqa | musique | jsonl | parquet | multihop | multihop_text, or a
                # function: its argument is a split's name, its result the examples
                "name": "hotpotqa",
                # Of train, validation and test: a path, folder or glob, or a list of them
                "files": {},
                "fields": {},  # which key of a record is the id, source, answer, aliases, rationale
                "description": "",  # the warm style opens with it; '' is the dataset's own
                # Folder with the official raw files; '' takes those in QLOG_ASSETS, or downloads
                "manual_dir": "",
                # Folder of the prepared data; one in a bucket is only read; '' is a cache folder
                "data_dir": "",
                "style": "cold",  # warm: instructions and chat template; cold: only the input
                "max_prompt_tokens": 2048,  # a longer prompt is an error, or skipped
                "overlong": "error",  # error | skip
                # Of records that cannot be used (no answer, not JSON, an id twice): error | skip,
                # which counts them by reason and tells an example of each
                "invalid": "error",
                "world": {},  # arguments of a synthetic task
            },
            # ---- Rollouts ----
            "rollout": {
                "rollouts_per_prompt": 32,  # M
                "rationale_budget": 2944,  # free tokens before the thinking-end token is forced
                "answer_reserve": 128,  # tokens kept for the answer, sampled or gold
                # Of the distribution that is sampled, and that the gradient is about
                "temperature": 1.0,
                # Of a shard: how many prompts fit into memory with all their rollouts at their
                # longest, which bounds what decoding takes; 0 is all
                "prompts_per_wave": 0,
                # Keys and values of prompts and rollouts while they are decoded and scored: auto
                # (as dtype), or int8 with a scale per token and head, which takes about half the
                # memory of bfloat16 and rounds log-probabilities (qlog/rollouts/README.md)
                "cache": "auto",
                "closing_text": "",  # written before a forced thinking-end token
                # Of sampled answers, for losses that ask for one: the name of a grader, a function
                # (qlog/grading/README.md), or a list of these or of (one, weight), which are added;
                # '' is the loss's own
                "reward": "",
                # Answers that are scored at a time, in training and evaluation; 1 for functions
                # that only the main thread may call
                "reward_threads": 32,
            },
            # ---- Learning ----
            # A recipe of qlog.losses by its name, a losses.Recipe, or a function that returns an
            # Estimator
            "loss": loss("garl", q=0.75),
            "optimizer": {
                "learning_rate": 1e-6,  # peak
                "warmup_steps": 10,  # linear, from 0
                "schedule": "constant",  # after warm-up: constant | cosine | linear (to 0)
                "b1": 0.9,  # AdamW's
                "b2": 0.999,  # AdamW's
                "eps": 1e-8,  # AdamW's
                "weight_decay": 0.0,
                "max_grad_norm": 1.0,  # clip to this global norm
                "max_skipped_in_a_row": 10,  # stop after so many non-finite gradients
            },
            "train": {
                "steps": 500,
                "prompts_per_step": 32,  # B
                "updates_per_batch": 1,  # optimizer steps per batch of rollouts, a part of it each
                "prompts_per_microbatch": 0,  # of a shard: prompts in memory at a time; 0 is all
                # Rollouts of a prompt in memory at a time, if they are of full length (shorter
                # ones are packed together), at most; 0 is all
                "rollouts_per_microbatch": 0,
                # What the backward pass computes again. full: whole layers; attention, dots:
                # all but those; none
                "remat": "full",
                # Stop when mean |sampler - learner log_prob| exceeds this; 0 is never. Measured:
                # at most 0.005 with the quickstart's model in bfloat16 on a CPU, and 0.95 when
                # prompts went to the wrong processes.
                "max_mismatch": 0.05,
                # Steps between measurements of the gradient's two terms, score and pathwise; each
                # costs a second backward pass; 0 is never
                "terms_every": 0,
                "rollouts_every": 10,  # steps between rollouts written to disk
                "rollouts_prompts": 2,  # prompts whose rollouts are written
            },
            # ---- Evaluation, and what is kept ----
            "evaluation": {
                "every": 50,  # steps between evaluations, and the last step; 0 is never
                "split": "validation",
                # test: when the run ends, its best checkpoint (the highest m@k on `split`; the last
                # one, if none was evaluated) is evaluated on the test split, into
                # WORKDIR/final.json. '': it is not
                "final": "",
                "prompts": 0,  # at most so many; 0 is the whole split
                "prompts_per_batch": 32,  # of a shard
                "rollouts_per_prompt": 16,
                "temperature": 1.0,  # 0 is greedy
                # top_k most probable tokens (0 is all) within probability top_p. Not for training:
                # the gradient is about the whole distribution, so rollouts are drawn from it.
                "top_k": 0,
                "top_p": 1.0,
                "without_rationale": False,  # evaluate a second time, with a budget of 0
                "grader": "contains",  # which answers count as right: as rollout.reward
                "metrics": (),  # means that are reported besides: a list as rollout.reward
            },
            "checkpoint": {
                "every": 50,  # steps between checkpoints, and the last step
                "minutes": 10.0,  # ... and minutes, whichever is sooner; 0 is only steps
                "keep": 2,  # newest checkpoints that are kept, besides the best by validation m@k
                "finished": "all",  # a finished run keeps all, or best_params: the best parameters
            },
            "logging": {
                # Weights & Biases, next to metrics.jsonl and TensorBoard: "project" or
                # "entity/project"; '' is off. Needs the extra wandb; WANDB_MODE=offline works
                "wandb": "",
            },
            # A run in which nothing happens ends with status 75: the launcher starts it again
            "watchdog": {
                "steps": 10.0,  # so many median steps without a sign of life; 0 is no limit
                "seconds": 600.0,  # but at least so long
                "first_seconds": 7200.0,  # until the third step is done: programs compile
            },
            "profile": {
                "steps": (),  # steps, from 1, traced into WORKDIR/profile; as a flag: 12,13
            },
            # ---- Devices ----
            # Per axis of one slice (of TPUs; a node of GPUs); -1 is the rest. Each slice has a
            # replica. Prompts are split over slices x data x fsdp shards.
            "mesh": {
                "data": -1,
                "fsdp": 1,
                "tensor": 1,
                "slices": 0,  # 0: as they are; 1: all devices as one slice
            },
            # ---- Several runs ----
            "runs": {},  # name of a run -> what differs in it from this config
        }
    )


# What a run may change when it resumes, by field or whole section, and what must stay. A field may
# change if no step computes other numbers by it. tests/config/schema_test.py wants each field in
# one of the two.
MAY_CHANGE = frozenset(
    {
        # Where things are read: what was read is compared by content (`contents.identity`)
        "model",
        "architecture",
        "weights",
        "tokenizer.path",
        "tokenizer.chat_template",
        "data.manual_dir",
        "data.data_dir",
        "data.files",
        # Parameters come from the checkpoint. With a reference (a KL term) it must stay:
        # `check_same_run` sees to that.
        "init_from",
        # Memory and speed
        "attention",
        "mesh",
        "rollout.prompts_per_wave",
        "rollout.reward_threads",
        "train.prompts_per_microbatch",
        "train.rollouts_per_microbatch",
        "train.remat",
        # When to stop, and what is written
        "train.steps",
        "train.max_mismatch",
        "train.terms_every",
        "train.rollouts_every",
        "train.rollouts_prompts",
        "optimizer.max_skipped_in_a_row",
        "evaluation",
        "checkpoint",
        "logging",
        "watchdog",
        "profile",
        "runs",
    }
)
MUST_STAY = frozenset(
    {
        "seed",
        "dtype",
        "tokenizer.think_start",
        "tokenizer.think_end",
        "tokenizer.eos",
        "tokenizer.chat_template_kwargs",
        "data.name",
        "data.fields",
        "data.description",
        "data.style",
        "data.max_prompt_tokens",
        "data.overlong",
        "data.invalid",
        "data.world",
        "rollout.rollouts_per_prompt",
        "rollout.rationale_budget",
        "rollout.answer_reserve",
        "rollout.temperature",
        "rollout.cache",
        "rollout.closing_text",
        "rollout.reward",
        "loss",
        "optimizer.learning_rate",
        "optimizer.warmup_steps",
        "optimizer.schedule",
        "optimizer.b1",
        "optimizer.b2",
        "optimizer.eps",
        "optimizer.weight_decay",
        "optimizer.max_grad_norm",
        "train.prompts_per_step",
        "train.updates_per_batch",
    }
)


def loss(name: losses.Loss, /, **arguments: Any) -> ConfigDict:
    """The `loss` section: a loss and all its arguments, those given and the defaults.

    Args:
      name: a recipe's name, a `losses.Recipe`, or a function that returns a `losses.Estimator`.

    Raises:
      ConfigError: an unknown name, or a function without one.
    """
    try:
        known = losses.arguments(name)
    except ValueError as error:
        raise ConfigError(f"config.loss: {error}.") from None
    return ConfigDict({"name": name, **known, **arguments}, convert_dict=False)


def merge(config: ConfigDict, changes: Mapping[str, Any] | ConfigDict) -> ConfigDict:
    """A copy of `config` with nested `changes`. The sections in CHOICES are replaced whole."""
    merged = config.to_dict()
    for key, value in changes.items():
        is_section = isinstance(value, (Mapping, ConfigDict)) and key in config
        if is_section and key not in CHOICES:
            merged[key] = merge(config[key], value)
        else:
            merged[key] = value
    return _open(merged)


def several(config: ConfigDict) -> dict[str, ConfigDict]:
    """The whole config of each run of `config.runs`, by its name; {} of a config of one run.

    Raises:
      ConfigError: an entry that is no section, or that has runs of its own; a name that cannot be
        that of a folder.
    """
    runs = {}
    if not isinstance(config.runs, (Mapping, ConfigDict)):
        raise ConfigError(f"config.runs = {config.runs!r} must be a section of runs.")
    for name, changes in config.runs.items():
        if not re.fullmatch(r"[\w-][\w.+-]*", str(name)):
            raise ConfigError(f"config.runs has the name {name!r}: it must be that of a folder.")
        if not isinstance(changes, (Mapping, ConfigDict)):
            raise ConfigError(
                f"config.runs.{name} = {changes!r} must be a section: what differs in this run."
            )
        if "runs" in changes:
            raise ConfigError(f"config.runs.{name}.runs is read by nothing: runs hold no runs.")
        runs[name] = merge(config, {**changes, "runs": {}})
    return runs


def loss_name(config: ConfigDict) -> str | Callable:
    """What `config.loss` names: a recipe's name, a Recipe, or a function.

    Raises:
      ConfigError: the section has no name.
    """
    if not isinstance(config.loss, ConfigDict) or "name" not in config.loss:
        value = config.loss.to_dict() if isinstance(config.loss, ConfigDict) else config.loss
        raise ConfigError(
            f"config.loss = {value!r} has no name: write qlog.config.loss(NAME, ...)."
        )
    return config.loss.name


def _open(tree: Mapping[str, Any]) -> ConfigDict:
    """A ConfigDict that lets keys in FUNCTIONS change their type; it would refuse otherwise."""
    config = ConfigDict(tree)
    for key in config:
        if isinstance(config[key], ConfigDict) and key not in CHOICES:
            config[key] = _open(config[key])
        elif key in FUNCTIONS:
            config[key] = FieldReference(config[key], field_type=object)
    return config


def fields(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Every field by its dotted path ('train.steps'). A section in CHOICES counts as one field."""
    found = {}
    for key, value in config.items():
        if isinstance(value, (Mapping, ConfigDict)) and key not in CHOICES:
            found |= fields(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def to_json(config: ConfigDict) -> str:
    """The resolved config, sorted and indented; functions by their name."""

    def plain(value: Any) -> Any:
        if isinstance(value, losses.Recipe):
            return losses.label(value)
        # Without its module: that of a config file is called by how the file was loaded.
        if callable(value):
            return getattr(value, "__qualname__", None) or value.__name__
        return list(value)

    return json.dumps(config.to_dict(), indent=2, sort_keys=True, default=plain)


def from_json(written: Mapping[str, Any]) -> dict[str, Any]:
    """Every field of a config.json that was read, by its dotted path.

    What an older version wrote lacks fields, and arguments of its loss. It had what is their
    default now.
    """
    found = fields(json.loads(to_json(default()))) | fields(written)
    section = dict(found["loss"])
    try:
        usual = losses.arguments(str(section.get("name")))
    except ValueError:  # a function or an object, of which it has the text only
        usual = {}
    return found | {"loss": json.loads(json.dumps(usual)) | section}
