"""AdamW behind a global-norm clip; updates from non-finite gradients are skipped and counted."""

import functools
from typing import Any

import jax
import optax
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from qlog import models
from qlog.parallel import sharding
from qlog.records import TrainState


def build(config: ConfigDict) -> optax.GradientTransformation:
    """The optimizer of `config.optimizer`; one object per setting, since jit treats it as static."""
    section = dict(config.optimizer)
    del section["max_skipped_in_a_row"]  # the loop's: skipping is unlimited here
    return _build(config.train.steps * config.train.updates_per_batch, **section)


@functools.cache
def _build(
    steps, *, learning_rate, warmup_steps, schedule, max_grad_norm, **adamw
) -> optax.GradientTransformation:
    rest = max(1, steps - warmup_steps)
    after = {
        "constant": optax.constant_schedule(learning_rate),
        "cosine": optax.cosine_decay_schedule(learning_rate, rest),
        "linear": optax.linear_schedule(learning_rate, 0.0, rest),
    }[schedule]
    ramp = optax.linear_schedule(
        learning_rate / (warmup_steps + 1), learning_rate, max(1, warmup_steps)
    )
    optimizer = optax.adamw(optax.join_schedules([ramp, after], [warmup_steps]), **adamw)
    clipped = optax.chain(optax.clip_by_global_norm(max_grad_norm), optimizer)
    return optax.apply_if_finite(clipped, max_consecutive_errors=2**30)


@functools.partial(jax.jit, static_argnames=("optimizer", "mesh"), donate_argnames=("state",))
def apply_update(
    state: TrainState,
    loss_state: Any,
    grads: models.Params,
    *,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """One optax update from the batch's gradients; and its norms.

    With a mesh the new state lies where the old one did, so that the next step compiles nothing.
    """
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {
        "grad_norm": optax.tree.norm(grads),
        "update_norm": optax.tree.norm(updates),
        "param_norm": optax.tree.norm(params),
        "skipped_updates": optax.tree.get(opt_state, "total_notfinite"),
        "skipped_in_a_row": optax.tree.get(opt_state, "notfinite_count"),
    }
    return sharding.constrain_params(
        mesh, TrainState(state.step, params, opt_state, loss_state)
    ), metrics
