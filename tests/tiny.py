"""A tiny policy, prompts and a config that many tests share."""

import jax
import jax.numpy as jnp
import numpy as np

from qlog import losses, models, train
from qlog.config import schema
from qlog.experiment import prepare
from qlog.learner import gradient
from qlog.learner.blocks import Blocks
from qlog.learner.types import LearnerBatch
from qlog.policy import Policy
from qlog.records import Prompts, Trajectories

VALID_VOCAB = 29
SHAPE = models.DecoderConfig(
    vocab_size=32, num_layers=2, width=16, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=24
)
POLICY = Policy(SHAPE, VALID_VOCAB)


def params(seed: int = 0):
    """Random parameters, spread widely enough that tokens differ in probability."""
    tree = models.init(SHAPE, jax.random.key(seed))
    return tree | {"embed": 1.5 * tree["embed"]}


def prompts(lengths=(5, 3, 4), width: int = 6, seed: int = 0) -> Prompts:
    """Right-padded random prompts."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, VALID_VOCAB, (len(lengths), width)).astype(np.int32)
    return Prompts(jnp.array(tokens), jnp.array(lengths, jnp.int32), jnp.ones(len(lengths), bool))


def microbatch(params, policy, batch, prompts=None):
    """What `gradient.add_microbatches` takes for a microbatch of a LearnerBatch; all by default."""
    begin = lambda params, batch: gradient.begin(params, policy, batch)
    grads, needed = jax.eval_shape(begin, params, batch)
    blocks = Blocks(*[np.zeros((1, prompts or len(batch.prompts.lengths)), np.int32)] * 3)
    return grads, params, policy, batch, needed, blocks


def uneven_batch(num_prompts, num_rollouts, slots):
    """A LearnerBatch in which prompt 2 has long rollouts, and the others short ones."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(2, 5, (num_prompts, num_rollouts))
    lengths[2] = slots
    tokens = rng.integers(5, VALID_VOCAB, (num_prompts, num_rollouts, slots))
    is_token = np.arange(slots) < lengths[..., None]
    is_rationale = np.arange(slots) < lengths[..., None] - 1
    trajectories = Trajectories(
        tokens.astype(np.int32),
        is_rationale,
        is_token & ~is_rationale,
        rng.normal(size=is_token.shape).astype(np.float32),
        is_rationale,
        lengths.astype(np.int32),
    )
    score, path = rng.normal(size=(2, num_prompts, num_rollouts)).astype(np.float32)
    score[5], path[5] = 0, 0  # nothing is learned from prompt 5
    others = np.ones((2, num_prompts, num_rollouts), np.float32)
    of_prompts = prompts(lengths=rng.integers(2, 7, num_prompts), seed=4)
    coefficients = losses.Coefficients(score, path, *others)
    return LearnerBatch(jax.tree.map(np.asarray, of_prompts), trajectories, coefficients)


def full_log_probs(tree, prompt, tokens, temperature: float = 1.0):
    """log p of `tokens` after `prompt` from one plain forward pass, no caches: float32 [R]."""
    sequence = np.concatenate([np.asarray(prompt), np.asarray(tokens)])
    padded = np.zeros(48, np.int32)  # causal: padding behind the tokens changes nothing
    padded[: len(sequence)] = sequence
    picked = np.asarray(_picked(tree, padded, temperature))
    return picked[len(prompt) - 1 : len(sequence) - 1]


@jax.jit
def _picked(tree, sequence, temperature):
    hidden = models.extend(tree, SHAPE, sequence[None, None])
    logits = hidden[0, 0] @ models.unembedding(tree)[:VALID_VOCAB].T / temperature
    log_probs = jax.nn.log_softmax(logits)[:-1]
    return jnp.take_along_axis(log_probs, sequence[1:, None], axis=-1)[:, 0]


def config(**changes):
    """A run of the synthetic task that trains in seconds; `changes` are nested."""
    tree = schema.default()
    tree.dtype = "float32"
    tree.architecture = dict(
        vocab_size=48, num_layers=2, width=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=24
    )
    tree.data.name = "multihop"
    tree.data.max_prompt_tokens = 24
    tree.data.world = {"people": 4, "shortest": 1, "longest": 4}
    tree.rollout.rollouts_per_prompt = 4
    tree.rollout.rationale_budget = 4
    tree.rollout.answer_reserve = 8
    tree.loss = schema.loss("garl", q=0.75)
    tree.optimizer.learning_rate = 1e-2
    tree.train.steps = 3
    tree.train.prompts_per_step = 4
    tree.train.remat = "none"
    tree.train.rollouts_every = 1
    tree.evaluation.every = 0
    tree.evaluation.prompts = 6
    tree.evaluation.prompts_per_batch = 4
    tree.evaluation.rollouts_per_prompt = 4
    tree.checkpoint.every = 100
    return schema.merge(tree, changes)


def run(config, workdir, devices=None):
    """Trains a config as the command does: the workdir is claimed before anything is read."""
    with train.claimed(config, workdir) as claim:
        return train.run(prepare(config, devices), workdir, claim)


def graded_garl(q):
    """A loss for `config`: GARL and a reward next to it, so that training samples answers too."""
    return losses.Estimator(
        transform=losses.garl(q), surrogate=losses.linear(), reward="exact_match"
    )
