"""From a config to the parts of a run, all checked before anything compiles."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from qlog import checkpoints, data, distributed, losses, models, optimizer, paths, sharding
from qlog import config as settings
from qlog.data import multihop
from qlog.errors import ConfigError
from qlog.learner import TrainState
from qlog.policy import Policy
from qlog.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The parts of a run; none of them holds parameters.

    Attributes:
      config: as given. estimator, optimizer: built from it.
      mesh: where arrays live.
      policy: the model's static half.
      sampling: how training rollouts are drawn. evaluation_sampling: how evaluation's are.
      formatter: examples to tokens and back.
      grader: exact match for the training reward; counts its failures.
      train_data: None when only an evaluation is wanted; evaluation_data: None without one.
    """

    config: ConfigDict
    estimator: losses.Estimator
    optimizer: optax.GradientTransformation
    mesh: Mesh
    policy: Policy
    sampling: Sampling
    evaluation_sampling: Sampling
    formatter: data.Formatter
    grader: data.Grader
    train_data: data.Dataset | None
    evaluation_data: data.Dataset | None

    @property
    def rollouts_per_prompt(self) -> int:
        return self.config.rollout.rollouts_per_prompt

    def write_split_ids(self, path: paths.Path) -> None:
        """Writes which records each split holds, or checks them against an earlier run's: process 0
        does, for all.

        Raises:
          ConfigError: on all of them, the data changed since the run began. Synthetic tasks have nothing to write.
        """
        names = {"train": self.train_data, self.config.evaluation.split: self.evaluation_data}
        drawn = {
            name: dataset.source.records for name, dataset in names.items()
            if dataset is not None and isinstance(dataset.source, data.Converted)
        }  # fmt: skip
        if drawn:
            distributed.first(lambda: data.write_ids(path, self.config.data.name, drawn))

    def abstract_params(self) -> models.Params:
        """ShapeDtypeStructs of the parameters, with their places on the mesh."""
        init = functools.partial(models.init, self.policy.config)
        shapes = jax.eval_shape(init, jax.random.key(0))
        return checkpoints.abstract_like(shapes, sharding.tree_shardings(self.mesh, shapes))

    def init_params(self) -> models.Params:
        """Random, from weights, or from another run's checkpoint, as the config says."""
        abstract = self.abstract_params()
        if self.config.init_from:
            return checkpoints.load_params(self.config.init_from, abstract, "config.init_from")
        places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        if self.config.weights != "random":
            folder = models.huggingface.resolve(self.config.weights)
            return models.huggingface.load(
                folder, self.policy.config, dtype=jnp.float32, shardings=places
            )
        key = jax.random.fold_in(jax.random.key(self.config.seed), 1)
        init = functools.partial(models.init, self.policy.config)
        return jax.jit(init, out_shardings=places)(key)

    def init_state(self, params: models.Params) -> TrainState:
        """Step 0 with these parameters."""
        places = sharding.tree_shardings(self.mesh, jax.eval_shape(self._rest, params))
        return jax.jit(self._rest, out_shardings=places)(params)._replace(params=params)

    def abstract_state(self) -> TrainState:
        """ShapeDtypeStructs of `init_state`, with their places on the mesh."""
        params = self.abstract_params()
        rest = jax.eval_shape(self._rest, params)
        places = sharding.tree_shardings(self.mesh, rest)
        return checkpoints.abstract_like(rest, places)._replace(params=params)

    def _rest(self, params: models.Params) -> TrainState:
        scores = losses.zero_scores(self.config.train.prompts_per_step, self.rollouts_per_prompt)
        return TrainState(
            jnp.zeros((), jnp.int32), None, self.optimizer.init(params),
            self.estimator.transform.init(scores),
        )  # fmt: skip


def prepare(
    config: ConfigDict,
    devices: Sequence[jax.Device] | None = None,
    train: bool = True,
    evaluate: bool | None = None,
) -> Experiment:
    """Builds every part of a run; takes seconds and compiles nothing.

    Args:
      train: whether train_data is wanted.
      evaluate: whether evaluation_data is; None: if the config evaluates, or nothing is trained.

    Raises:
      ConfigError: whatever is wrong, in one sentence with the field, the value and the remedy.
    """
    settings.check(config)
    estimator = settings.estimator(config)
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    check_batches(config, mesh)
    if config.init_from:
        checkpoints.find_checkpoint(config.init_from, "config.init_from")
    world = _world(config)
    tokenizer = world.tokenizer() if world else _load_tokenizer(config)
    shape = model_shape(config)
    if tokenizer.vocab_size > shape.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model only "
            f"{shape.vocab_size}: raise config.architecture.vocab_size or name another model."
        )
    task = multihop.TASKS[config.data.name] if world else data.TASKS[config.data.name]
    formatter = data.Formatter(tokenizer, task, config.data.style, config.rollout.closing_text)
    sampling = Sampling(
        rationale_budget=config.rollout.rationale_budget,
        answer_reserve=config.rollout.answer_reserve,
        closing=formatter.closing, eos=tokenizer.eos_ids, pad=tokenizer.pad_id,
        temperature=float(config.rollout.temperature),
        with_answer=estimator.reward is not None,
    )  # fmt: skip
    if evaluate is None:
        evaluate = config.evaluation.every > 0 or not train
    open_split = functools.partial(_open_split, config, formatter, world)
    return Experiment(
        config=config, estimator=estimator, optimizer=optimizer.build(config), mesh=mesh,
        policy=Policy(
            config=shape, valid_vocab=tokenizer.vocab_size,
            dtype=jnp.dtype(config.dtype), remat=config.train.remat, mesh=mesh,
            attention=attention(config, mesh),
        ),
        sampling=sampling,
        evaluation_sampling=evaluation_law(config, sampling),
        formatter=formatter,
        grader=data.Grader(data.exact_match),
        train_data=open_split("train", estimator.rationale == "annotated") if train else None,
        evaluation_data=open_split(config.evaluation.split, False) if evaluate else None,
    )  # fmt: skip


def evaluation_law(config: ConfigDict, sampling: Sampling) -> Sampling:
    """How evaluation draws, where training draws as `sampling`: always with an answer."""
    evaluation = config.evaluation
    return dataclasses.replace(
        sampling, temperature=float(evaluation.temperature), top_k=evaluation.top_k,
        top_p=float(evaluation.top_p), with_answer=True,
    )


def attention(config: ConfigDict, mesh: Mesh) -> str:
    """The Policy's `attention`: the kernels of the devices that the mesh holds.

    Raises:
      ConfigError: kernels of another device.
    """
    device = mesh.devices.flat[0]
    kernels = {"tpu": "tpu", "gpu": "cudnn"}.get(device.platform, "blocks")
    if kernels == "cudnn" and not _has_cudnn_attention(device):
        kernels = "blocks"
    if config.attention in ("tpu", "cudnn") and config.attention != kernels:
        raise ConfigError(
            f"config.attention = {config.attention!r} does not run on these {device.platform} devices: "
            "use 'auto' or 'blocks'."
        )
    return kernels if config.attention == "auto" else config.attention


def _has_cudnn_attention(gpu) -> bool:
    """cuDNN's fused attention wants CUDA, and Ampere or later."""
    return "cuda" in gpu.client.platform_version and float(gpu.compute_capability) >= 8.0


def check_batches(config: ConfigDict, mesh: Mesh) -> None:
    """Raises ConfigError unless every batch of prompts splits evenly over the mesh."""
    shards = sharding.batch_shards(mesh)
    rows = config.train.prompts_per_step // config.train.updates_per_batch
    for field, size in (
        ("train.prompts_per_step", rows),
        ("train.prompts_per_microbatch", config.train.prompts_per_microbatch),
        ("rollout.prompts_per_wave", config.rollout.prompts_per_wave),
        ("evaluation.prompts_per_batch", config.evaluation.prompts_per_batch),
    ):
        if size % shards:
            raise ConfigError(
                f"config.{field} = {size} must be a multiple of mesh.data x mesh.fsdp = {shards}, "
                f"over which prompts are split (counted per optimizer step)."
            )


def _world(config: ConfigDict) -> multihop.World | None:
    """The synthetic world, or None for a real dataset; refuses keys that the choice does not read."""
    known = (*multihop.TASKS, *data.TASKS)
    if config.data.name not in known:
        raise ConfigError(
            f"config.data.name = {config.data.name!r} is unknown: use one of {', '.join(known)}."
        )
    if config.data.name not in multihop.TASKS:
        for key in config.data.world:
            raise ConfigError(
                f"config.data.world.{key} = {config.data.world[key]!r} is read by the synthetic "
                f"tasks alone, not by {config.data.name!r}: remove it."
            )
        return None
    for section, key in (("data", "manual_dir"), ("data", "data_dir"), ("tokenizer", "path")):
        if config[section][key]:
            raise ConfigError(
                f"config.{section}.{key} = {config[section][key]!r} is not read by the synthetic "
                f"task {config.data.name!r}: remove it."
            )
    fields = {field.name for field in dataclasses.fields(multihop.World)}
    for key in config.data.world:
        if key not in fields:
            raise ConfigError(
                f"config.data.world.{key} = {config.data.world[key]!r} is read by nothing: the "
                f"task has {', '.join(sorted(fields))}."
            )
    return multihop.World(**config.data.world)


def _load_tokenizer(config: ConfigDict) -> data.Tokenizer:
    section = config.tokenizer
    path = section.path or (config.weights if config.weights != "random" else config.model)
    if not section.path and path in models.PRESETS:
        raise ConfigError(
            f"config.tokenizer.path is empty and model {path!r} with random weights brings none: "
            "set it to a folder or file with tokenizer.json or a SentencePiece *.model."
        )
    if not section.path:
        path = models.huggingface.resolve(path)
    return data.load(path, think_start=section.think_start, think_end=section.think_end)


def model_shape(config: ConfigDict) -> models.DecoderConfig:
    if config.model in models.PRESETS:
        shape = models.PRESETS[config.model]
    elif "/" in config.model or pathlib.Path(config.model).is_dir():
        shape = models.huggingface.read_config(models.huggingface.resolve(config.model))
    else:
        raise ConfigError(
            f"config.model = {config.model!r} is unknown: use one of {', '.join(models.PRESETS)}, "
            "a Hugging Face folder, or a Hub id such as Qwen/Qwen3-0.6B."
        )
    if config.weights != "random":
        if "/" not in config.weights and not pathlib.Path(config.weights).is_dir():
            raise ConfigError(
                f"config.weights = {config.weights!r} is no folder: give a folder with "
                "*.safetensors, a Hub id, or 'random'."
            )
        models.huggingface.resolve(config.weights)  # missing ones are named before data are read
    fields = {field.name for field in dataclasses.fields(models.DecoderConfig)}
    for key in config.architecture:
        if key not in fields:
            raise ConfigError(
                f"config.architecture.{key} = {config.architecture[key]!r} is read by nothing: "
                f"a decoder has {', '.join(sorted(fields))}."
            )
    try:
        return dataclasses.replace(shape, **config.architecture)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"config.architecture: {error}.") from None


def _open_split(config, formatter, world, split: str, rationales: bool) -> data.Dataset:
    section = config.data
    if world:
        source = multihop.open_examples(section.name, split, world)
    else:
        source = data.open_examples(
            section.name, split,
            manual_dir=section.manual_dir or None, data_dir=section.data_dir or None,
        )  # fmt: skip
    return data.open_dataset(
        source, formatter,
        max_prompt_tokens=section.max_prompt_tokens,
        max_answer_tokens=config.rollout.answer_reserve,
        max_rationale_tokens=config.rollout.rationale_budget + 1 if rationales else None,
        overlong=section.overlong,
        measure=256 if world else None,
        name=f"config.data.name = {section.name!r}, split {split!r}",
    )  # fmt: skip
