"""From a config to the parts of a run, all checked before anything compiles."""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from qlog import data, losses, models
from qlog.config.check import build_estimator, check_config
from qlog.data import synthetic
from qlog.errors import ConfigError, PassingError
from qlog.grading import graders
from qlog.learner import optimizer
from qlog.learner.types import Microbatch
from qlog.parallel import distributed, sharding
from qlog.policy import Policy
from qlog.records import TrainState
from qlog.rollouts.sampler import Sampling
from qlog.runs import checkpoints
from qlog.storage import assets, paths

_RECORDS_DIGESTED = 32  # of each split, whole


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
      weights: local folder with them; None: random, or from `init_from`.
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
    grader: graders.Grader
    train_data: data.Dataset | None
    evaluation_data: data.Dataset | None
    weights: pathlib.Path | None = None

    @property
    def rollouts_per_prompt(self) -> int:
        return self.config.rollout.rollouts_per_prompt

    @property
    def microbatch(self) -> Microbatch:
        """How much of an update's batch the gradient has in memory at a time."""
        return Microbatch.of(self.config, self.mesh)

    def prompts_at_once(self, per_shard: int) -> int:
        """Prompts over the whole mesh, for a field that counts those of a shard."""
        return per_shard * sharding.batch_shards(self.mesh)

    def write_split_ids(self, path: paths.Path) -> None:
        """Writes which records each split holds, or checks them against an earlier run's: process 0
        does, for all.

        Raises:
          ConfigError: on all of them, the data changed since the run began. Synthetic tasks have nothing to write.
        """
        names = {"train": self.train_data, self.config.evaluation.split: self.evaluation_data}
        drawn = {
            name: dataset.source.records
            for name, dataset in names.items()
            if dataset is not None and isinstance(dataset.source, data.Converted)
        }
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
        if self.weights is not None:
            return models.huggingface.load(
                self.weights, self.policy.config, dtype=jnp.float32, shardings=places
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
            jnp.zeros((), jnp.int32),
            None,
            self.optimizer.init(params),
            self.estimator.transform.init(scores),
        )


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
    check_config(config)
    estimator = build_estimator(config)
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    if train:
        check_batches(config, mesh)
    if config.init_from:
        checkpoints.find_checkpoint(config.init_from, "config.init_from")
    world = _world(config)
    weights = resolve_weights(config)  # missing ones are named before data are read
    tokenizer = world.tokenizer() if world else _load_tokenizer(config)
    shape = model_shape(config)
    if tokenizer.vocab_size > shape.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model only "
            f"{shape.vocab_size}: raise config.architecture.vocab_size or name another model."
        )
    task = synthetic.TASKS[config.data.name] if world else data.TASKS[config.data.name]
    formatter = data.Formatter(tokenizer, task, config.data.style, config.rollout.closing_text)
    sampling = Sampling(
        rationale_budget=config.rollout.rationale_budget,
        answer_reserve=config.rollout.answer_reserve,
        closing=formatter.closing,
        eos=tokenizer.eos_ids,
        pad=tokenizer.pad_id,
        temperature=float(config.rollout.temperature),
        with_answer=estimator.reward is not None,
    )
    if evaluate is None:
        evaluate = config.evaluation.every > 0 or not train
    prepared = prepare_data(config) if (train or evaluate) and not world else None
    open_split = functools.partial(_open_split, config, formatter, world, prepared)
    experiment = Experiment(
        config=config,
        estimator=estimator,
        optimizer=optimizer.build(config),
        mesh=mesh,
        policy=Policy(
            config=shape,
            valid_vocab=tokenizer.vocab_size,
            dtype=jnp.dtype(config.dtype),
            remat=config.train.remat,
            mesh=mesh,
            attention=attention(config, mesh),
        ),
        sampling=sampling,
        evaluation_sampling=evaluation_law(config, sampling),
        formatter=formatter,
        grader=graders.Grader(graders.exact_match),
        train_data=open_split("train", estimator.rationale == "annotated") if train else None,
        evaluation_data=open_split(config.evaluation.split, False) if evaluate else None,
        weights=weights,
    )
    if jax.process_count() > 1:
        _check_hosts(identity(experiment))
    return experiment


def identity(experiment: Experiment) -> dict:
    """What a run is made of, by content, wherever it was read from; JSON, in seconds.

    model: the fields of its DecoderConfig. weights: `models.huggingface.digest`, or '' where they do
    not come from a folder (then `config` says all). tokenizer: `Tokenizer.digest`. splits: of each
    split that is open, a digest of all ids in their order, and of 32 records spread over it, whole; the
    synthetic tasks' are in `config`.
    """
    weights = experiment.weights
    splits = {
        "train": experiment.train_data,
        experiment.config.evaluation.split: experiment.evaluation_data,
    }
    found = {
        "model": dataclasses.asdict(experiment.policy.config),
        "weights": models.huggingface.digest(weights, experiment.policy.config) if weights else "",
        "tokenizer": experiment.formatter.tokenizer.digest,
        "splits": {
            name: _records_digest(dataset.source.records)
            for name, dataset in splits.items()
            if dataset is not None and isinstance(dataset.source, data.Converted)
        },
    }
    return json.loads(json.dumps(found))  # as it is read again, tuples being lists


def _records_digest(records: Sequence[dict]) -> str:
    count = min(len(records), _RECORDS_DIGESTED)
    sample = [records[i * len(records) // count] for i in range(count)]
    text = json.dumps([list(records.ids), sample], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_hosts(found: dict) -> None:
    """Raises unless all processes, each of which read its own host's copies, read the same."""
    everyone = distributed.gather([found])
    for index, other in enumerate(everyone):
        for part in found:
            if other[part] != everyone[0][part]:
                raise PassingError(
                    f"the {part} that process {index} reads differ from those of process 0 "
                    f"({other[part]} and {everyone[0][part]}): they changed while the run started, or "
                    "hosts keep copies of their own; name one revision, or stage them (launch/stage)."
                )


def evaluation_law(config: ConfigDict, sampling: Sampling) -> Sampling:
    """How evaluation draws, where training draws as `sampling`: always with an answer."""
    evaluation = config.evaluation
    return dataclasses.replace(
        sampling,
        temperature=float(evaluation.temperature),
        top_k=evaluation.top_k,
        top_p=float(evaluation.top_p),
        with_answer=True,
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
    """Raises ConfigError unless a step's prompts split evenly over the mesh, and a shard's over waves
    and microbatches."""
    shards, train = sharding.batch_shards(mesh), config.train
    prompts, updates = train.prompts_per_step, train.updates_per_batch
    if prompts % (shards * updates):
        wanted = -(-prompts // (shards * updates)) * shards * updates
        why = f"the {shards} shards (mesh.data x mesh.fsdp over all slices) that prompts are split over"
        if updates > 1:
            why += f", times train.updates_per_batch = {updates}"
        raise ConfigError(
            f"config.train.prompts_per_step = {prompts} is not a multiple of {why}: give "
            f"--config.train.prompts_per_step={wanted}, or a larger mesh.tensor, or run several seeds side "
            "by side on fewer chips each."
        )
    for field, size, whole in (
        (
            "train.prompts_per_microbatch",
            train.prompts_per_microbatch,
            prompts // shards // updates,
        ),
        ("rollout.prompts_per_wave", config.rollout.prompts_per_wave, prompts // shards),
    ):
        if size and whole % size:
            divisors = ", ".join(str(d) for d in range(1, whole + 1) if whole % d == 0)
            raise ConfigError(
                f"config.{field} = {size} must divide the {whole} prompts of each of the {shards} shards: "
                f"use 0 (all) or one of {divisors}."
            )


def _world(config: ConfigDict) -> synthetic.World | None:
    """The synthetic world, or None for a real dataset; refuses keys that the choice does not read."""
    known = (*synthetic.TASKS, *data.TASKS)
    if config.data.name not in known:
        raise ConfigError(
            f"config.data.name = {config.data.name!r} is unknown: use one of {', '.join(known)}."
        )
    if config.data.name not in synthetic.TASKS:
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
    fields = {field.name for field in dataclasses.fields(synthetic.World)}
    for key in config.data.world:
        if key not in fields:
            raise ConfigError(
                f"config.data.world.{key} = {config.data.world[key]!r} is read by nothing: the "
                f"task has {', '.join(sorted(fields))}."
            )
    return synthetic.World(**config.data.world)


def resolve(spec: str, field: str, weights: bool = False) -> pathlib.Path:
    """`models.huggingface.resolve`, once per host; every process must call it."""
    found = functools.partial(models.huggingface.resolve, spec, weights=weights, field=field)
    return pathlib.Path(distributed.once_per_host(lambda: str(found())))


def resolve_weights(config: ConfigDict) -> pathlib.Path | None:
    """The local folder of config.weights, downloaded once per host; None where they are random or
    another run's. Every process must call it.

    Raises:
      ConfigError, PassingError: as `models.huggingface.resolve`.
    """
    if config.weights == "random":
        return None
    return resolve(config.weights, "config.weights", weights=True)


def _load_tokenizer(config: ConfigDict) -> data.Tokenizer:
    section = config.tokenizer
    return data.load(
        distributed.once_per_host(lambda: str(tokenizer_path(config))),
        think_start=section.think_start,
        think_end=section.think_end,
    )


def tokenizer_path(config: ConfigDict) -> pathlib.Path:
    """The local file or folder of a config's tokenizer; fetched where it must be.

    Raises:
      ConfigError: config.tokenizer.path is empty and neither weights nor model brings one.
    """
    field, path = "config.tokenizer.path", config.tokenizer.path
    if not path:
        field = "config.weights" if config.weights != "random" else "config.model"
        path = config.weights if config.weights != "random" else config.model
        if path in models.PRESETS:
            raise ConfigError(
                f"config.tokenizer.path is empty and model {path!r} with random weights brings none: "
                "set it to a folder or file with tokenizer.json or a SentencePiece *.model, or a Hub id."
            )
    if models.huggingface.is_hub_id(path):
        return models.huggingface.resolve(path, weights=False, field=field)
    return assets.local(path, field, lambda name: not name.endswith(".safetensors"))


def model_shape(config: ConfigDict) -> models.DecoderConfig:
    """What config.model and config.architecture say; every process must call it."""
    if config.model in models.PRESETS:
        shape = models.PRESETS[config.model]
    elif "/" in config.model or pathlib.Path(config.model).is_dir():
        shape = models.huggingface.read_config(resolve(config.model, "config.model"))
    else:
        raise ConfigError(
            f"config.model = {config.model!r} is unknown: use one of {', '.join(models.PRESETS)}, "
            "a Hugging Face folder, or a Hub id such as Qwen/Qwen3-0.6B."
        )
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


def prepare_data(config: ConfigDict) -> pathlib.Path:
    """The folder of the prepared dataset, made or copied once per host."""
    section = config.data
    return pathlib.Path(
        distributed.once_per_host(
            lambda: str(
                data.prepare(
                    section.name,
                    manual_dir=section.manual_dir or None,
                    data_dir=section.data_dir or None,
                )
            )
        )
    )


def _open_split(config, formatter, world, prepared, split: str, rationales: bool) -> data.Dataset:
    section = config.data
    if world:
        source = synthetic.open_examples(section.name, split, world)
    else:
        source = data.open_examples(section.name, split, prepared=prepared)
    return data.open_dataset(
        source,
        formatter,
        max_prompt_tokens=section.max_prompt_tokens,
        max_answer_tokens=config.rollout.answer_reserve,
        max_rationale_tokens=config.rollout.rationale_budget + 1 if rationales else None,
        overlong=section.overlong,
        measure=256 if world else None,
        name=f"config.data.name = {section.name!r}, split {split!r}",
    )
