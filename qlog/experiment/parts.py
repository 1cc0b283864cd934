"""The parts of a run."""

import dataclasses
import functools
import pathlib
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from qlog import data, losses, models
from qlog.config import schema
from qlog.config.streams import Stream, stream_key
from qlog.data.splits import Identified, Split
from qlog.grading.scorers import Panel
from qlog.learner.types import Microbatch
from qlog.parallel import distributed, sharding
from qlog.policy import Policy
from qlog.records import TrainState
from qlog.rollouts.decoding import Sampling
from qlog.runs import checkpoint_reader
from qlog.storage import paths
from qlog.storage.paths import Path

# Batches that evaluation samples in one call, so that one starts before the tail of the last one is
# done. An interrupted evaluation goes on after whole calls.
BATCHES_PER_CALL = 4

_Tree = TypeVar("_Tree")


class EvaluationCalls(NamedTuple):
    """The calls of the sampler that an evaluation is cut into, all of one size."""

    number: int
    batches: int  # of each call
    per_shard: int  # questions of a batch on each shard

    @classmethod
    def of(cls, questions: int, num_shards: int, prompts_per_batch: int) -> "EvaluationCalls":
        """`prompts_per_batch`: as `evaluation.prompts_per_batch`, the most for a shard."""
        # Not more prompts than questions: a few questions on many chips are not filled up with
        # copies.
        per_shard = min(prompts_per_batch, -(-questions // num_shards))
        num_batches = -(-questions // (per_shard * num_shards))
        # A call costs its batches, those of copies that fill up the last one included, and its
        # tail, about as much as one more.
        cost = lambda size: -(-num_batches // size) * (size + 1)
        batches = min(range(1, min(BATCHES_PER_CALL, num_batches) + 1), key=cost)
        return cls(-(-num_batches // batches), batches, per_shard)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The parts of a run. None of them holds parameters.

    Replace data or formatter to train with your own:
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
      reward: scores sampled answers, as `config.rollout.reward` or else the estimator names it;
        without scorers where the estimator asks for no reward. None in an experiment of shapes.
      train_data: prompts with their gold answers; None where nothing is trained.
      evaluation_data: the split that is evaluated; None where nothing is.
      final_data: the split that the best checkpoint is evaluated on when the run ends
        (`config.evaluation.final`); None where it is not.
      weights: local folder that parameters begin with; None where they are random or come from
        another run.
      begins_from: the checkpoint of another run that parameters begin with (`config.init_from`);
        None without one, and of a run that goes on from its own and needs no other.
    """

    config: ConfigDict
    estimator: losses.Estimator
    optimizer: optax.GradientTransformation
    mesh: Mesh
    policy: Policy
    sampling: Sampling
    evaluation_sampling: Sampling
    formatter: data.Formatter | None
    reward: Panel | None
    train_data: data.Dataset | None
    evaluation_data: data.Dataset | None
    weights: pathlib.Path | None = None
    final_data: data.Dataset | None = None
    begins_from: Path | None = None

    def __post_init__(self):
        # Silent otherwise: rewards would all be 0, or answers be graded that nobody asked for.
        needs_answer = self.estimator.reward is not None
        needs_rationales = self.estimator.rationale == "annotated"
        mine = self.train_data
        needs_tokens = self.estimator.gold_log_probs
        fits = (self.sampling.with_answer, self.sampling.gold_tokens > 0)
        if fits != (needs_answer, needs_tokens) or (
            mine is not None and (mine.limits.rationale is not None) != needs_rationales
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

    def trajectory_length(self, rationale: int, answer: int) -> int:
        """R, the slots of a trajectory: the most there can be; one program serves all steps.

        Args:
          rationale: slots of the batch's rationales, which bound annotated ones.
          answer: A, slots of the batch's gold answers.
        """
        sampling = self.sampling
        if self.estimator.answer != "gold":
            return models.whole_tiles(sampling.max_length)
        is_sampled = self.estimator.rationale == "sampled"
        longest = sampling.max_rationale_length if is_sampled else rationale
        return models.whole_tiles(longest + answer)

    def prompts_at_once(self, per_shard: int) -> int:
        """Prompts of the whole mesh at a time, from a config field that counts those of a shard."""
        return per_shard * sharding.num_batch_shards(self.mesh)

    def write_split_ids(self, path: paths.Path) -> None:
        """Writes which examples each split holds, or compares them with what is written there.

        Process 0 does it for all; every process must call. Endless data are made from the config,
        so they have nothing to write.

        Raises:
          ConfigError: on every process: the data have changed since the run began.
        """
        splits = {name: _listed(each) for name, each in self.splits().items() if not each.endless}
        if splits:
            name = data.label(self.config.data.name)
            distributed.once_per_run(lambda: data.write_ids(path, name, splits))

    def splits(self) -> dict[str, data.Dataset]:
        """The open splits by name."""
        evaluation = self.config.evaluation
        opened = {
            "train": self.train_data,
            evaluation.split: self.evaluation_data,
            evaluation.final: self.final_data,
        }
        return {name: dataset for name, dataset in opened.items() if dataset is not None}

    def of_final(self) -> "Experiment":
        """The same experiment, which evaluates on the split of `final_data`."""
        config = schema.merge(self.config, {"evaluation": {"split": self.config.evaluation.final}})
        return dataclasses.replace(self, config=config, evaluation_data=self.final_data)

    def abstract_params(self) -> models.Params:
        """ShapeDtypeStructs of the parameters, with their places on the mesh."""
        init = functools.partial(models.init, self.policy.config)
        shapes = jax.eval_shape(init, jax.random.key(0))
        return _placed(shapes, sharding.param_shardings(self.mesh, shapes))

    def init_params(self) -> models.Params:
        """The parameters that training begins with, float32, on the mesh.

        Random ones, those of `weights`, or those of another run's checkpoint, as the config says.

        Raises:
          ConfigError: the files hold another model, or numbers that are not finite.
        """
        abstract = self.abstract_params()
        # Each way puts every parameter where it belongs at once: no device ever holds all of them.
        if self.config.init_from:
            assert self.begins_from is not None, "prepared without what it begins from"
            params = checkpoint_reader.load_params(self.begins_from, abstract, "config.init_from")
            return models.check_finite(params, f"config.init_from = {self.config.init_from!r}")
        places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        if self.weights is not None:
            params = models.huggingface.load(
                self.weights, self.policy.config, dtype=jnp.float32, shardings=places
            )
            return models.check_finite(params, f"config.weights: {self.weights}")
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
        return _placed(rest, places)._replace(params=params)

    def _initial_state_without_params(self, params: models.Params) -> TrainState:
        prompts = self.config.train.prompts_per_step
        scores = losses.abstract_scores(prompts, self.rollouts_per_prompt)
        return TrainState(
            jnp.zeros((), jnp.int32),
            None,
            self.optimizer.init(params),
            self.estimator.transform.init(scores),
        )


def _listed(dataset: data.Dataset) -> Identified:
    """The official records, which know the split they come from; other data as they are."""
    records = dataset.source.records if isinstance(dataset.source, data.Converted) else None
    return records if isinstance(records, Split) else dataset


def _placed(shapes: _Tree, shardings: Any) -> _Tree:
    """A tree of ShapeDtypeStructs, with these shardings."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
