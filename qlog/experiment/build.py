"""From a config to the parts of a run, all checked before anything compiles.

`prepare` builds an Experiment; `prepare_shapes` builds one without files, for compiling or timing
its programs.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from qlog import models
from qlog.config import schema
from qlog.config.check import (
    build_estimator,
    check_batches,
    check_config,
    check_final,
    evaluation_scorers,
    reward_scorers,
)
from qlog.console import count_text, say
from qlog.errors import ConfigError
from qlog.experiment import contents, cost, files, golds
from qlog.experiment.parts import Experiment
from qlog.grading.scorers import Panel
from qlog.learner import optimizer
from qlog.parallel import sharding
from qlog.policy import Policy
from qlog.rollouts.decoding import Sampling
from qlog.runs import checkpoint_reader
from qlog.storage.paths import Path


def prepare(
    config: ConfigDict,
    devices: Sequence[jax.Device] | None = None,
    train: bool = True,
    evaluate: bool | None = None,
    begins: bool = True,
) -> Experiment:
    """Builds every part of a run. Compiles nothing; takes seconds where no files are fetched.

    Args:
      devices: the mesh's; None takes all.
      train: whether train_data is wanted.
      evaluate: whether evaluation_data is; None: if the config evaluates, or nothing is trained.
      begins: whether the parameters are wanted that a run begins with. A run that goes on from a
        checkpoint of its own needs those of `config.init_from` for a reference only.

    Raises:
      ConfigError: something is wrong, or this machine cannot hold the run; one sentence with the
        field, the value and the remedy.
      PassingError: weights, tokenizer or data cannot be fetched now, or hosts read different ones.
    """
    if evaluate is None:
        evaluate = bool(config.evaluation.every) or not train
    mesh, shape = _check_without_files(config, devices, train, evaluate)
    begins_from = _begins_from(config, begins, train)
    weights = files.resolve_weights(config)
    formatter = files.load_formatter(config)
    files.check_vocabulary(formatter, shape)
    tokenizer = formatter.tokenizer
    tokens = _Tokens(tokenizer.vocab_size, formatter.closing, tokenizer.eos_ids, tokenizer.pad_id)
    experiment = _build(config, mesh, shape, tokens)
    files.check_weights(weights, shape)
    # ---- The data ----
    prepared = files.prepare_data(config) if train or evaluate else None
    open_split = functools.partial(files.open_split, config, formatter, prepared)
    annotated = experiment.estimator.rationale == "annotated"
    experiment = dataclasses.replace(
        experiment,
        formatter=formatter,
        reward=Panel(
            reward_scorers(config, experiment.estimator),
            "config.rollout.reward",
            config.rollout.reward_threads,
        ),
        train_data=open_split("train", rationales=annotated) if train else None,
        evaluation_data=open_split(config.evaluation.split) if evaluate else None,
        final_data=open_split(config.evaluation.final)
        if train and config.evaluation.final
        else None,
        weights=weights,
        begins_from=begins_from,
    )
    if train or evaluate:
        cost.check(experiment, train, evaluate)
    _check_apart(experiment)
    _tell_unreachable_golds(experiment)
    _tell_too_long_context(experiment)
    if jax.process_count() > 1:  # each host has fetched for itself
        is_function = callable(config.data.name)
        contents.check_hosts(contents.identity(experiment), is_function)
    return experiment


def check(
    config: ConfigDict, devices: Sequence[jax.Device] | None = None, begins: bool = True
) -> None:
    """What `prepare` checks of a run that trains before it fetches weights and data.

    For a run that starts later; `files.check` reads what it reads. Every process must call it.

    Args:
      devices, begins: as `prepare` takes them.

    Raises:
      ConfigError, PassingError: as `prepare`.
    """
    _check_without_files(config, devices, train=True, evaluate=bool(config.evaluation.every))
    _begins_from(config, begins, train=True)


def _check_without_files(
    config: ConfigDict, devices: Sequence[jax.Device] | None, train: bool, evaluate: bool
) -> tuple[Mesh, models.DecoderConfig]:
    """The mesh and the shape of the model, when all is checked that needs neither weights nor data.

    Args:
      train, evaluate: what the run does.
    """
    check_config(config)
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    if train:  # evaluation pads its last batch, so that any number of prompts will do
        check_batches(config, mesh)
        check_final(config)
    # Before weights are fetched: by the model's shape alone, and the smallest data that there are.
    shape = files.model_shape(config)
    if train or evaluate:
        cost.check(_build(config, mesh, shape, _placeholders(shape)), train, evaluate)
    return mesh, shape


def _begins_from(config: ConfigDict, begins: bool, train: bool) -> Path | None:
    """The checkpoint that `config.init_from` names; None where there is none, or none is needed.

    Looked for before data are read, which takes longer. Every process must call it.
    """
    is_needed = begins or (train and build_estimator(config).reference)
    if not config.init_from or not is_needed:
        return None
    return checkpoint_reader.find_checkpoint(config.init_from, "config.init_from")


def prepare_shapes(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Experiment:
    """The Experiment of `prepare` without what comes from files: weights, tokenizer, data.

    Its programs have the shapes and costs of the run's. Tokens that only a tokenizer knows are
    placeholders, and the name of a preset's repository on the Hub counts as the preset.

    Args:
      devices: the mesh's, which may be descriptions of devices that are not here; None takes all.

    Raises:
      ConfigError: as `prepare`, of what can be checked without files.
    """
    # Qwen/Qwen3-0.6B -> qwen3_0p6b: most configs name the repository, for its weights.
    preset = config.model.rpartition("/")[2].lower().replace("-", "_").replace(".", "p")
    if preset in models.PRESETS:
        config = schema.merge(config, {"model": preset, "weights": "random"})
    check_config(config)
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    check_batches(config, mesh)
    shape = files.model_shape(config)
    return _build(config, mesh, shape, _placeholders(shape))


def _check_apart(experiment: Experiment) -> None:
    """Whether the examples that are evaluated are others than those that are trained on.

    Raises:
      ConfigError: some are the same, by their ids. Another example with the same text is only told:
        large collections repeat some.
    """
    train, evaluated = experiment.train_data, experiment.evaluation_data
    split = experiment.config.evaluation.split
    if train is None or evaluated is None or split == "train" or train.endless:
        return
    if shared := set(train.ids) & set(evaluated.ids):
        raise ConfigError(
            f"config.data: {len(shared)} of {len(evaluated.ids)} examples of the {split} split are "
            f"in train, too, such as {min(shared)!r}: name files or write a function with other "
            "examples (and other ids) for each split; where only the ids of files are the same, "
            "set config.data.fields.id to '', then ids are digests of the records."
        )
    if repeated := np.isin(evaluated.questions, train.questions).sum():
        number = count_text(int(repeated), "question")
        say(
            f"warning: train has {number} of the {split} split, too, word for word: its accuracy "
            "is not only that of unseen questions"
        )


def _tell_unreachable_golds(experiment: Experiment) -> None:
    """Says how many gold answers can never be right, in training and in evaluation."""
    config, formatter, reward = experiment.config, experiment.formatter, experiment.reward
    assert formatter and reward, "an experiment of shapes has no examples"
    split = config.evaluation.split
    for name, dataset, scorers in (
        ("train", experiment.train_data, reward.scorers),
        (split, experiment.evaluation_data, evaluation_scorers(config)[:1]),
    ):
        if dataset is None or dataset.endless:
            continue
        if found := golds.unreachable(dataset, formatter, scorers):
            say(
                f"warning: {found.number} of {found.looked_at} gold answers of the {name} split "
                f"cannot be right under {found.grader} with this tokenizer, such as "
                f"{found.gold!r} (id {found.example_id!r}), which its tokens spell {found.spelt!r}"
            )


def _tell_too_long_context(experiment: Experiment) -> None:
    """Says where prompts and rollouts may be longer than the context that the model is made for.

    It is no error: RoPE has an angle for each position, and training on longer contexts is how
    models are made for them.
    """
    datasets = (experiment.train_data, experiment.evaluation_data, experiment.final_data)
    prompt = max((each.widths.prompt for each in datasets if each is not None), default=0)
    rollout = experiment.evaluation_sampling.max_length  # the longest there is: with an answer
    context = experiment.policy.config.max_positions
    if prompt and prompt + rollout > context:
        say(
            f"warning: prompts of up to {count_text(prompt, 'token')} and rollouts of up to "
            f"{rollout:,} may exceed the context of the model, architecture.max_positions = "
            f"{context}: lower data.max_prompt_tokens, rollout.rationale_budget or "
            "rollout.answer_reserve, or stretch it (architecture.rope_scaling) and raise "
            "architecture.max_positions"
        )


class _Tokens(NamedTuple):
    """What programs must know of a tokenizer."""

    vocab_size: int
    closing: tuple[int, ...]  # forced where the rationale's budget is spent
    eos: tuple[int, ...]  # any of them ends a sequence
    pad: int


def _placeholders(shape: models.DecoderConfig) -> _Tokens:
    """Tokens for programs that are not run."""
    # One token less than the model has rows: as with most tokenizers, rows have to be masked.
    return _Tokens(max(shape.vocab_size - 1, 1), (1,), (2,), 0)


def _build(
    config: ConfigDict, mesh: Mesh, shape: models.DecoderConfig, tokens: _Tokens
) -> Experiment:
    """All parts that need no files."""
    estimator = build_estimator(config)
    sampling = Sampling(
        rationale_budget=config.rollout.rationale_budget,
        answer_reserve=config.rollout.answer_reserve,
        closing=tokens.closing,
        eos=tokens.eos,
        pad=tokens.pad,
        temperature=float(config.rollout.temperature),
        with_answer=estimator.reward is not None,
        gold_tokens=config.rollout.answer_reserve if estimator.gold_log_probs else 0,
    )
    policy = Policy(
        config=shape,
        valid_vocab=tokens.vocab_size,
        dtype=jnp.dtype(config.dtype),
        remat=config.train.remat,
        mesh=mesh,
        attention=attention_kernels(config, mesh),
        cache=config.rollout.cache,
    )
    return Experiment(
        config=config,
        estimator=estimator,
        optimizer=optimizer.build(config),
        mesh=mesh,
        policy=policy,
        sampling=sampling,
        evaluation_sampling=evaluation_sampling(config, sampling),
        formatter=None,
        reward=None,
        train_data=None,
        evaluation_data=None,
    )


def evaluation_sampling(config: ConfigDict, sampling: Sampling) -> Sampling:
    """How evaluation draws where training draws as `sampling`: it always wants an answer."""
    evaluation = config.evaluation
    return dataclasses.replace(
        sampling,
        temperature=float(evaluation.temperature),
        top_k=evaluation.top_k,
        top_p=float(evaluation.top_p),
        with_answer=True,
        gold_tokens=0,
    )


def attention_kernels(config: ConfigDict, mesh: Mesh) -> str:
    """`Policy.attention`: the kernels that config.attention means on the devices of the mesh.

    Raises:
      ConfigError: kernels of another kind of device.
    """
    # The mesh's devices, not JAX's: --mode=compile has a mesh of devices that are elsewhere.
    device = mesh.devices.flat[0]
    kernels = {"tpu": "tpu", "gpu": "cudnn"}.get(device.platform, "blocks")
    if kernels == "cudnn" and not _has_cudnn_attention(device):
        kernels = "blocks"
    if config.attention in ("tpu", "cudnn") and config.attention != kernels:
        raise ConfigError(
            f"config.attention = {config.attention!r} does not run on these {device.platform} "
            "devices: use 'auto' or 'blocks'."
        )
    return kernels if config.attention == "auto" else config.attention


def _has_cudnn_attention(gpu: jax.Device) -> bool:
    """cuDNN's fused attention wants CUDA, and Ampere or later."""
    return "cuda" in gpu.client.platform_version and float(gpu.compute_capability) >= 8.0
