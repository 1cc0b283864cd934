"""AdamW behind a clip of the gradient's global norm, with warm-up; a gradient that is not finite is
skipped and counted."""

import functools
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from qlog import models
from qlog.learner.types import UpdateMetrics
from qlog.parallel import sharding
from qlog.records import TrainState


def build(config: ConfigDict) -> optax.GradientTransformation:
    """The optimizer of `config.optimizer`, for as many updates as the run makes.

    Equal settings give the same object: jit takes it as static and would compile anew for another.
    """
    section = config.optimizer
    return _build(
        num_updates=config.train.steps * config.train.updates_per_batch,
        learning_rate=section.learning_rate,
        warmup_steps=section.warmup_steps,
        schedule=section.schedule,
        b1=section.b1,
        b2=section.b2,
        eps=section.eps,
        weight_decay=section.weight_decay,
        max_grad_norm=section.max_grad_norm,
    )


@functools.cache
def _build(
    *,
    num_updates: int,
    learning_rate: float,
    warmup_steps: int,
    schedule: str,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    max_grad_norm: float,
) -> optax.GradientTransformation:
    # ---- The rate, by update ----
    # The rate rises in warmup_steps + 1 equal parts: the first update has one, and is not lost.
    ramp = optax.linear_schedule(
        learning_rate / (warmup_steps + 1), learning_rate, max(1, warmup_steps)
    )
    # What comes after the warm-up counts from its own beginning (`join_schedules` subtracts the
    # boundary), so cosine and linear reach 0 after the last update.
    rest = max(1, num_updates - warmup_steps)
    after_warmup = {
        "constant": optax.constant_schedule(learning_rate),
        "cosine": optax.cosine_decay_schedule(learning_rate, rest),
        "linear": optax.linear_schedule(learning_rate, 0.0, rest),
    }[schedule]
    rate = optax.join_schedules([ramp, after_warmup], [warmup_steps])
    # ---- The update ----
    # The clip comes before AdamW: its moments are those of clipped gradients. Weight decay is part
    # of AdamW and is not clipped.
    adamw = optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    clipped = optax.chain(optax.clip_by_global_norm(max_grad_norm), adamw)
    # A skipped update leaves parameters and moments as they are. How many in a row are too many is
    # for the training loop to say: here the limit is out of reach, and the counts are metrics.
    return optax.apply_if_finite(clipped, max_consecutive_errors=2**30)


@functools.partial(jax.jit, static_argnames=("optimizer", "mesh"), donate_argnames=("state",))
def apply_update(
    state: TrainState,
    loss_state: Any,
    grads: models.Params,
    *,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
) -> tuple[TrainState, UpdateMetrics]:
    """One update of parameters and moments.

    Args:
      state: donated. Its `step` stays as it is: a step may have several updates.
      loss_state: what the loss keeps between steps, in the new state.
      grads: of the batch, float32 like the parameters.
      optimizer: from `build`, or another one inside `optax.apply_if_finite`.
      mesh: the new state lies on it where the old one did, so that the next step compiles nothing.
    """
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    # For a gradient that is not finite, `apply_if_finite` gives updates of 0 and the old moments.
    # Its counters are found by name, wherever they lie in the optimizer's state.
    metrics = UpdateMetrics(
        grad_norm=optax.tree.norm(grads),
        update_norm=optax.tree.norm(updates),
        param_norm=optax.tree.norm(params),
        skipped_updates=optax.tree.get(opt_state, "total_notfinite"),
        skipped_in_a_row=optax.tree.get(opt_state, "notfinite_count"),
    )
    # Donated buffers can only be taken over by results that lie where the arguments lay.
    state = TrainState(state.step, params, opt_state, loss_state)
    return sharding.constrain_params(mesh, state), metrics
