"""From a config to the parts of a run, all checked before anything compiles.

`prepare` builds an Experiment; `prepare_shapes` builds one without files, for compiling or timing
its programs. Everything that a run reads (weights, tokenizer, data) is opened in this module.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from qlog import data, losses, models
from qlog.config import schema
from qlog.config.check import build_estimator, check_batches, check_config
from qlog.config.streams import Stream, stream_key
from qlog.data import pipeline, synthetic
from qlog.data.splits import Split
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

_RECORDS_DIGESTED = 32  # records of each split that `identity` reads whole
_LENGTHS_MEASURED = 256  # examples of a synthetic split, which has no end of them


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The parts of a run. None of them holds parameters.

    Replace data, formatter or grader to train with your own:
    `dataclasses.replace(prepare(config), train_data=mine)`. A loss of your own is a function in
    `config.loss`: how rollouts are drawn and data are read follows from it.

    Attributes:
      config: what the run was asked for.
      estimator: the loss, as `config.loss` names it.
      optimizer: what turns gradients into updates.
      mesh: the devices, and how arrays are split over them.
      policy: all of the model but its parameters.
      sampling: how rollouts of training are drawn.
      evaluation_sampling: how rollouts of evaluation are drawn.
      formatter: from examples to tokens and back; None in an experiment of shapes.
      grader: scores sampled answers for the reward, by the function of `graders.GRADERS` that the
        estimator names (exact match where it names none); counts its failures. None in one of
        shapes.
      train_data: prompts with their gold answers; None where nothing is trained.
      evaluation_data: the split that is evaluated; None where nothing is.
      weights: local folder that parameters begin with; None where they are random or come from
        another run (`config.init_from`).
    """

    config: ConfigDict
    estimator: losses.Estimator
    optimizer: optax.GradientTransformation
    mesh: Mesh
    policy: Policy
    sampling: Sampling
    evaluation_sampling: Sampling
    formatter: data.Formatter | None
    grader: graders.Grader | None
    train_data: data.Dataset | None
    evaluation_data: data.Dataset | None
    weights: pathlib.Path | None = None

    def __post_init__(self):
        # Silent otherwise: rewards would all be 0, or answers be graded that nobody asked for.
        needs_answer = self.estimator.reward is not None
        needs_rationales = self.estimator.rationale == "annotated"
        data = self.train_data
        if self.sampling.with_answer != needs_answer or (
            data is not None and (data.limits.rationale is not None) != needs_rationales
        ):
            raise ValueError(
                "estimator does not fit the other parts of the experiment, which were prepared for "
                "another one: name the loss in config.loss (a function, too) before `prepare`."
            )

    @property
    def rollouts_per_prompt(self) -> int:
        return self.config.rollout.rollouts_per_prompt

    @property
    def microbatch(self) -> Microbatch:
        """How much of an update's batch the gradient has in memory at a time."""
        return Microbatch.of(self.config, self.mesh)

    def prompts_at_once(self, per_shard: int) -> int:
        """Prompts of the whole mesh at a time, from a config field that counts those of a shard."""
        return per_shard * sharding.num_batch_shards(self.mesh)

    def write_split_ids(self, path: paths.Path) -> None:
        """Writes which records each split holds, or compares them with what an earlier start wrote.

        Process 0 does it for all; every process must call. Examples of synthetic tasks are made
        from the config, so they have nothing to write.

        Raises:
          ConfigError: on every process: the data have changed since the run began.
        """
        if records := self._records():
            distributed.once_per_run(lambda: data.write_ids(path, self.config.data.name, records))

    def _records(self) -> dict[str, Split]:
        """The records of each open split that has any; its examples were converted from them."""
        splits = {"train": self.train_data, self.config.evaluation.split: self.evaluation_data}
        return {
            name: dataset.source.records
            for name, dataset in splits.items()
            if dataset is not None
            and isinstance(dataset.source, data.Converted)
            and isinstance(dataset.source.records, Split)
        }

    def abstract_params(self) -> models.Params:
        """ShapeDtypeStructs of the parameters, with their places on the mesh."""
        init = functools.partial(models.init, self.policy.config)
        shapes = jax.eval_shape(init, jax.random.key(0))
        return checkpoints.abstract_like(shapes, sharding.param_shardings(self.mesh, shapes))

    def init_params(self) -> models.Params:
        """The parameters that training begins with, float32, on the mesh.

        Random ones, those of `weights`, or those of another run's checkpoint, as the config says.

        Raises:
          ConfigError: the files hold another model.
        """
        abstract = self.abstract_params()
        # Each way puts every parameter where it belongs at once: no device ever holds all of them.
        if self.config.init_from:
            return checkpoints.load_params(self.config.init_from, abstract, "config.init_from")
        places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        if self.weights is not None:
            return models.huggingface.load(
                self.weights, self.policy.config, dtype=jnp.float32, shardings=places
            )
        key = stream_key(self.config.seed, Stream.INIT)
        init = functools.partial(models.init, self.policy.config)
        return jax.jit(init, out_shardings=places)(key)

    def init_state(self, params: models.Params) -> TrainState:
        """The state of a run that begins with these parameters; it shares their buffers."""
        # Only the rest goes through jit: parameters that passed through it would be copied.
        places = sharding.param_shardings(
            self.mesh, jax.eval_shape(self._initial_state_without_params, params)
        )
        build = jax.jit(self._initial_state_without_params, out_shardings=places)
        return build(params)._replace(params=params)

    def abstract_state(self) -> TrainState:
        """ShapeDtypeStructs of `init_state`, with their places on the mesh."""
        params = self.abstract_params()
        rest = jax.eval_shape(self._initial_state_without_params, params)
        places = sharding.param_shardings(self.mesh, rest)
        return checkpoints.abstract_like(rest, places)._replace(params=params)

    def _initial_state_without_params(self, params: models.Params) -> TrainState:
        prompts = self.config.train.prompts_per_step
        scores = losses.abstract_scores(prompts, self.rollouts_per_prompt)
        return TrainState(
            jnp.zeros((), jnp.int32),
            None,
            self.optimizer.init(params),
            self.estimator.transform.init(scores),
        )


# ---- From a config to an Experiment ----


def prepare(
    config: ConfigDict,
    devices: Sequence[jax.Device] | None = None,
    train: bool = True,
    evaluate: bool | None = None,
) -> Experiment:
    """Builds every part of a run. Compiles nothing; takes seconds where no files are fetched.

    Args:
      devices: the mesh's; None takes all.
      train: whether train_data is wanted.
      evaluate: whether evaluation_data is; None: if the config evaluates, or nothing is trained.

    Raises:
      ConfigError: something is wrong; one sentence with the field, the value and the remedy.
      PassingError: weights, tokenizer or data cannot be fetched now, or hosts read different ones.
    """
    check_config(config)
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    if train:  # evaluation pads its last batch, so that any number of prompts will do
        check_batches(config, mesh)
    # ---- The model: named before data are read, which takes longer ----
    if config.init_from:
        checkpoints.find_checkpoint(config.init_from, "config.init_from")
    weights = resolve_weights(config)
    formatter = load_formatter(config)
    tokenizer, shape = formatter.tokenizer, model_shape(config)
    if tokenizer.vocab_size > shape.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model only "
            f"{shape.vocab_size}: raise config.architecture.vocab_size or name another model."
        )
    tokens = _Tokens(tokenizer.vocab_size, formatter.closing, tokenizer.eos_ids, tokenizer.pad_id)
    experiment = _build(config, mesh, shape, tokens)
    # ---- The data ----
    if evaluate is None:
        evaluate = config.evaluation.every > 0 or not train
    open_split = functools.partial(
        _open_split, config, formatter, prepare_data(config) if train or evaluate else None
    )
    annotated = experiment.estimator.rationale == "annotated"
    experiment = dataclasses.replace(
        experiment,
        formatter=formatter,
        grader=graders.Grader(graders.by_name(experiment.estimator.reward or "exact_match")),
        train_data=open_split("train", rationales=annotated) if train else None,
        evaluation_data=open_split(config.evaluation.split) if evaluate else None,
        weights=weights,
    )
    if jax.process_count() > 1:  # each host has fetched for itself
        _check_hosts(identity(experiment))
    return experiment


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
    shape = model_shape(config)
    # One token less than the model has rows: as with most tokenizers, rows have to be masked.
    return _build(config, mesh, shape, _Tokens(shape.vocab_size - 1, (1,), (2,), 0))


class _Tokens(NamedTuple):
    """What programs must know of a tokenizer."""

    vocab_size: int
    closing: tuple[int, ...]  # forced where the rationale's budget is spent
    eos: tuple[int, ...]  # any of them ends a sequence
    pad: int


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
    )
    policy = Policy(
        config=shape,
        valid_vocab=tokens.vocab_size,
        dtype=jnp.dtype(config.dtype),
        remat=config.train.remat,
        mesh=mesh,
        attention=attention_kernels(config, mesh),
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
        grader=None,
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


# ---- What a run is made of ----


def identity(experiment: Experiment) -> dict[str, Any]:
    """What a run is made of, by content, wherever it was read from; takes seconds.

    Returns:
      JSON of
        model: the fields of its DecoderConfig;
        weights: `models.huggingface.digest`, '' where no folder holds them (then the config says
          all);
        tokenizer: `Tokenizer.digest`;
        splits: for each open split a digest of all ids in order and of 32 records spread over it,
          whole. Synthetic tasks have none: the config says all.
    """
    weights, formatter = experiment.weights, experiment.formatter
    assert formatter, "an experiment of shapes has no identity"
    # By content, not by name: the same files may be read from another folder when a run resumes.
    found = {
        "model": dataclasses.asdict(experiment.policy.config),
        "weights": models.huggingface.digest(weights, experiment.policy.config) if weights else "",
        "tokenizer": formatter.tokenizer.digest,
        "splits": {name: _digest(records) for name, records in experiment._records().items()},
    }
    return json.loads(json.dumps(found))  # as a checkpoint gives it back: tuples are lists


def _digest(records: Split) -> str:
    # All ids tell records that were added, left out or moved. A few whole records tell an edited
    # release, and spare reading gigabytes at every start.
    num_read = min(len(records), _RECORDS_DIGESTED)
    sample = [records[i * len(records) // num_read] for i in range(num_read)]
    text = json.dumps([list(records.ids), sample], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_same_parts(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Whether a run that resumes is made of the same model, weights, tokenizer and data.

    Args:
      before: the `identity` that the newest checkpoint was written under; {} of an old one.
      now: the `identity` of this start. A split that only one of the two has open is left out.

    Raises:
      ConfigError: a part differs.
    """
    parts = [
        (part, before[part], now[part])
        for part in ("model", "weights", "tokenizer")
        if part in before
    ]
    for name, old in before.get("splits", {}).items():
        parts.append((f"split {name}", old, now["splits"].get(name, old)))
    for part, old, new in parts:
        if old != new:
            raise ConfigError(
                f"--workdir: the run there has another {part} ({old or 'none'}, not "
                f"{new or 'none'}): use another --workdir, or what the run began with."
            )


def _check_hosts(mine: dict[str, Any]) -> None:
    """Raises PassingError unless all processes, each with its host's files, have read the same."""
    everyone = distributed.gather([mine])
    for index, other in enumerate(everyone):
        for part in mine:
            if other[part] != everyone[0][part]:
                raise PassingError(
                    f"the {part} that process {index} reads differ from those of process 0 "
                    f"({other[part]} and {everyone[0][part]}): they changed while the run "
                    "started, or hosts keep copies of their own; name one revision, or stage them "
                    "(launch/stage)."
                )


# ---- Model, tokenizer and data, from files ----


def resolve(spec: str, field: str, weights: bool = False) -> pathlib.Path:
    """`models.huggingface.resolve`, once per host. Every process must call it.

    Args:
      spec: a folder, gs:// and s3:// too, or a Hub id.
      field: what named it, for messages.
      weights: whether tensors are wanted besides config and tokenizer.

    Raises:
      ConfigError, PassingError: as `models.huggingface.resolve`.
    """
    found = functools.partial(models.huggingface.resolve, spec, weights=weights, field=field)
    return pathlib.Path(distributed.once_per_host(lambda: str(found())))


def resolve_weights(config: ConfigDict) -> pathlib.Path | None:
    """The local folder of config.weights, downloaded once per host; None of random ones.

    Every process must call it.

    Raises:
      ConfigError, PassingError: as `models.huggingface.resolve`.
    """
    if config.weights == "random":
        return None
    return resolve(config.weights, "config.weights", weights=True)


def load_formatter(config: ConfigDict) -> data.Formatter:
    """Turns the config's examples into tokens; the tokenizer is fetched once per host.

    Every process must call it.

    Raises:
      ConfigError: as `tokenizer_path`; a wrong style or closing text; a tokenizer without what
        rollouts need.
      PassingError: as `tokenizer_path`.
    """
    if world := _world(config):
        task, tokenizer = synthetic.TASKS[config.data.name], world.tokenizer()
    else:
        task = data.TASKS[config.data.name]
        tokenizer = data.load(
            distributed.once_per_host(lambda: str(tokenizer_path(config))),
            think_start=config.tokenizer.think_start,
            think_end=config.tokenizer.think_end,
        )
    return data.Formatter(tokenizer, task, config.data.style, config.rollout.closing_text)


def tokenizer_path(config: ConfigDict) -> pathlib.Path:
    """The local file or folder of a config's tokenizer; fetched where it must be.

    Raises:
      ConfigError: config.tokenizer.path is empty, and neither weights nor model brings one.
      PassingError: the Hub or a bucket cannot be reached.
    """
    # `field` is what messages blame: the field that the user has set.
    field, path = "config.tokenizer.path", config.tokenizer.path
    if not path:  # the one next to the weights or, of random weights, to the model's config
        field = "config.weights" if config.weights != "random" else "config.model"
        path = config.weights if config.weights != "random" else config.model
        if path in models.PRESETS:
            raise ConfigError(
                f"config.tokenizer.path is empty and model {path!r} with random weights brings "
                "none: set it to a folder or file with tokenizer.json or a SentencePiece *.model, "
                "or a Hub id."
            )
    if models.huggingface.is_hub_id(path):
        return models.huggingface.resolve(path, weights=False, field=field)
    return assets.local(path, field, lambda name: not name.endswith(".safetensors"))


def model_shape(config: ConfigDict) -> models.DecoderConfig:
    """The decoder that config.model and config.architecture describe. Every process must call it.

    Raises:
      ConfigError: no such model, or fields that do not fit together.
      PassingError: the Hub or a bucket cannot be reached.
    """
    if config.model in models.PRESETS:
        shape = models.PRESETS[config.model]
    elif "/" in config.model or pathlib.Path(config.model).is_dir():
        shape = models.huggingface.read_config(resolve(config.model, "config.model"))
    else:
        raise ConfigError(
            f"config.model = {config.model!r} is unknown: use one of {', '.join(models.PRESETS)}, "
            "a Hugging Face folder, or a Hub id such as Qwen/Qwen3-0.6B."
        )
    try:
        return dataclasses.replace(shape, **config.architecture)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"config.architecture: {error}.") from None


def prepare_data(config: ConfigDict) -> pathlib.Path | None:
    """The folder of the prepared dataset, made or copied once per host; None of a synthetic task.

    Every process must call it.

    Raises:
      ConfigError, PassingError: as `data.prepare`.
    """
    section = config.data
    if section.name in synthetic.TASKS:
        return None
    prepared = functools.partial(
        data.prepare,
        section.name,
        manual_dir=section.manual_dir or None,
        data_dir=section.data_dir or None,
    )
    return pathlib.Path(distributed.once_per_host(lambda: str(prepared())))


def data_limits(config: ConfigDict, rationales: bool) -> data.Limits:
    """How long examples may be; without a limit of rationales they are left out of batches."""
    rollout = config.rollout
    return data.Limits(
        data.Limit("config.data.max_prompt_tokens", config.data.max_prompt_tokens),
        data.Limit("config.rollout.answer_reserve", rollout.answer_reserve),
        # The budget does not count the thinking-end token, which a rationale ends with.
        data.Limit("config.rollout.rationale_budget", rollout.rationale_budget, uncounted=1)
        if rationales
        else None,
    )


def open_source(config: ConfigDict, split: str, prepared: pathlib.Path | None) -> pipeline.Source:
    """The examples of a split.

    Args:
      prepared: what `prepare_data` returned.

    Raises:
      ConfigError: an unknown split, or records that cannot be read.
    """
    if world := _world(config):
        return synthetic.open_examples(config.data.name, split, world)
    return data.open_examples(config.data.name, split, prepared=prepared)


def _world(config: ConfigDict) -> synthetic.World | None:
    """The world of a synthetic task; None of a real dataset."""
    if config.data.name in synthetic.TASKS:
        return synthetic.World(**config.data.world)
    return None


def _open_split(
    config: ConfigDict,
    formatter: data.Formatter,
    prepared: pathlib.Path | None,
    split: str,
    rationales: bool = False,
) -> data.Dataset:
    """A split, every example of it within the config's budgets."""
    section = config.data
    return data.open_dataset(
        open_source(config, split, prepared),
        formatter,
        data_limits(config, rationales),
        overlong=section.overlong,
        measure=None if prepared else _LENGTHS_MEASURED,
        name=f"config.data.name = {section.name!r}, split {split!r}",
    )
