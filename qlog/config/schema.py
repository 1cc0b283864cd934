"""The settings of a run: every field with its meaning, variants by name, and the checks.

`default()` is the whole schema: a config file starts from it and changes values. Sections whose
keys depend on a choice (`loss`, `data.world`) hold the arguments of what was chosen, no others, so
that no key can be set that nobody reads.
"""

import difflib
import json
from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from qlog import losses

# Sections whose keys are the arguments of what was chosen there; who reads them checks them.
CHOICES = ("loss", "architecture", "world", "runs")


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


def merge(config: ConfigDict, changes: Mapping) -> ConfigDict:
    """A copy of `config` with nested `changes`; sections that hold a choice's arguments are
    replaced whole."""
    merged = config.to_dict()
    for key, value in changes.items():
        is_section = isinstance(value, (Mapping, ConfigDict)) and key in config
        if is_section and key not in CHOICES:
            merged[key] = merge(config[key], value)
        else:
            merged[key] = value
    return ConfigDict(merged)


def to_json(config: ConfigDict) -> str:
    """The resolved config, sorted and indented; functions by their qualified name."""

    def plain(value):
        if callable(value):
            return f"{value.__module__}.{value.__qualname__}"
        return list(value)

    return json.dumps(config.to_dict(), indent=2, sort_keys=True, default=plain)


def closest(name: str, known) -> str:
    close = difflib.get_close_matches(name, [str(k) for k in known], n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
