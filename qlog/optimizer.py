"""AdamW behind a global-norm clip; updates from non-finite gradients are skipped and counted."""

import functools

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict


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
    return skip_nonfinite(optax.chain(optax.clip_by_global_norm(max_grad_norm), optimizer))


def skip_nonfinite(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optax.apply_if_finite`, with its state, without a limit and without its `lax.cond`.

    The branches of a cond hold gradients and updates at a time, twice the parameters' memory;
    selects fuse into the update.
    """

    def init(params):
        return optax.ApplyIfFiniteState(
            notfinite_count=jnp.zeros((), jnp.int32), last_finite=jnp.array(True),
            total_notfinite=jnp.zeros((), jnp.int32), inner_state=inner.init(params),
        )  # fmt: skip

    def update(updates, state, params=None):
        finite = jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(updates)]).all()
        wanted, inner_state = inner.update(updates, state.inner_state, params)

        def choose(new, old):
            return jax.tree.map(functools.partial(jnp.where, finite), new, old)

        return choose(wanted, optax.tree.zeros_like(wanted)), optax.ApplyIfFiniteState(
            notfinite_count=jnp.where(finite, 0, state.notfinite_count + 1),
            last_finite=finite,
            total_notfinite=state.total_notfinite + ~finite,
            inner_state=choose(inner_state, state.inner_state),
        )

    return optax.GradientTransformation(init, update)
