"""AdamW behind a global-norm clip; updates from non-finite gradients are skipped and counted."""

import functools

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
    clipped = optax.chain(optax.clip_by_global_norm(max_grad_norm), optimizer)
    return optax.apply_if_finite(clipped, max_consecutive_errors=2**30)
