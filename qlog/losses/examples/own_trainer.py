"""The losses in a trainer of one's own: `python -m qlog.losses.examples.own_trainer`.

The policy is a table: 16 rationales for each of 64 questions, and one answer after each. Nothing
else of qlog is used; only `axis_name` says that prompts are split over devices, by pmap or by jit
and shard_map: the step is the same.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from qlog import losses

PROMPTS, RATIONALES, ROLLOUTS = 64, 16, 8


def train(
    estimator: losses.Estimator,
    steps: int,
    num_devices: int | None = None,
    how: Literal["pmap", "shard_map"] = "shard_map",
) -> tuple[dict[str, jax.Array], list[float]]:
    """Parameters after `steps` steps, and the mean over prompts of P before each step.

    Args:
      estimator: must be one of sampled rationales, without a reward.
      steps: how many.
      num_devices: split the prompts over so many; None is all.
      how: what maps the step over devices. Under pmap prompts have an axis of devices in front.
    """
    devices = jax.devices()[:num_devices]
    optimizer = optax.adam(0.1)
    answers = jax.random.normal(jax.random.key(1), (PROMPTS, RATIONALES))
    params = {"rationale": jnp.zeros_like(answers), "answer": answers - 4}  # a cold start

    def log_probs(params, prompts, rationales):  # of z, and of y* after it: [B, M, 2]
        tables = jax.nn.log_softmax(params["rationale"]), jax.nn.log_sigmoid(params["answer"])
        return jnp.stack([table[prompts[:, None], rationales] for table in tables], -1)

    def step(params, opt_state, loss_state, prompts, key):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, prompts)  # on any device the same
        sample = jax.vmap(lambda key, x: jax.random.categorical(key, x, shape=(ROLLOUTS,)))
        rationales = sample(keys, params["rationale"][prompts])
        log_w = log_probs(params, prompts, rationales)[..., 1]
        coefficients, loss_state = losses.coefficients(
            estimator.transform,
            losses.Scores(log_w=log_w),
            loss_state,
            key=key,
            axis_name="devices",
        )

        def loss(params):
            new = log_probs(params, prompts, rationales)
            is_z = jnp.zeros(new.shape, bool).at[..., 0].set(True)
            tokens = losses.TokenLogProbs(new, rationale_mask=is_z, answer_mask=~is_z)
            return estimator.surrogate(coefficients, tokens).loss

        grads = jax.lax.psum(jax.grad(loss)(params), "devices")  # of a sum: divide once
        updates, opt_state = optimizer.update(jax.tree.map(lambda g: g / PROMPTS, grads), opt_state)
        return optax.apply_updates(params, updates), opt_state, loss_state, jnp.exp(log_w)

    prompts, history = jnp.arange(PROMPTS), []
    if how == "pmap":
        axes = (None, None, None, 0)
        mapped = jax.pmap(step, "devices", in_axes=(*axes, None), out_axes=axes, devices=devices)
        prompts = prompts.reshape(len(devices), -1)
    else:
        mesh = Mesh(np.array(devices), ("devices",))
        whole, split = PartitionSpec(), PartitionSpec("devices")
        specs = (whole, whole, whole, split)
        # Unchecked, as under pmap, a gradient is the device's own, and psum adds them up. With
        # check_vma=True jax.grad of replicated parameters adds up by itself: then leave psum out.
        mapped = jax.jit(
            jax.shard_map(
                step, mesh=mesh, in_specs=(*specs, whole), out_specs=specs, check_vma=False
            )
        )
    loss_state = estimator.transform.init(losses.abstract_scores(PROMPTS, ROLLOUTS))
    state = params, optimizer.init(params), loss_state
    for number in range(steps):
        *state, success = mapped(*state, prompts, jax.random.key(number))
        history.append(float(success.mean()))
    return state[0], history


if __name__ == "__main__":
    print([round(p, 3) for p in train(losses.build("garl", q=0.75), 100)[1][::10]])
