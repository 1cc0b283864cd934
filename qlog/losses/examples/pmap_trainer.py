"""The losses in a pmap trainer of one's own: `python -m qlog.losses.examples.pmap_trainer`. The policy is a
table: 16 rationales for each of 64 questions; only `axis_name` says that prompts are split over devices."""

import jax
import jax.numpy as jnp
import optax

from qlog import losses

PROMPTS, RATIONALES, ROLLOUTS = 64, 16, 8


def train(estimator: losses.Estimator, steps: int, devices=None):
    """Parameters after `steps` steps, and the mean over prompts of P before each step."""
    optimizer, answers = (
        optax.adam(0.1),
        jax.random.normal(jax.random.key(1), (PROMPTS, RATIONALES)),
    )
    params = {"rationale": jnp.zeros_like(answers), "answer": answers - 4}  # a cold start

    def log_probs(params, prompts, rationales):  # of z, and of y* after it: [B, M, 2]
        tables = jax.nn.log_softmax(params["rationale"]), jax.nn.log_sigmoid(params["answer"])
        return jnp.stack([table[prompts[:, None], rationales] for table in tables], -1)

    def step(params, opt_state, loss_state, prompts, key):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, prompts)  # whatever device draws
        draw = jax.vmap(lambda key, logits: jax.random.categorical(key, logits, shape=(ROLLOUTS,)))
        rationales = draw(keys, params["rationale"][prompts])
        log_w = log_probs(params, prompts, rationales)[..., 1]
        scores = losses.zero_scores(*log_w.shape)._replace(log_w=log_w)
        c, loss_state = losses.coefficients(
            estimator.transform, scores, loss_state, key=key, axis_name="devices"
        )

        def loss(params):
            new = log_probs(params, prompts, rationales)
            is_z = jnp.zeros(new.shape, bool).at[..., 0].set(True)
            return estimator.surrogate(
                c.score, c.path, c.token_weight, new, None, None, is_z, ~is_z
            ).loss

        grads = jax.lax.psum(jax.grad(loss)(params), "devices")  # of a sum: divide once
        updates, opt_state = optimizer.update(jax.tree.map(lambda g: g / PROMPTS, grads), opt_state)
        return optax.apply_updates(params, updates), opt_state, loss_state, jnp.exp(log_w)

    axes = (None, None, None, 0)
    mapped = jax.pmap(step, "devices", in_axes=(*axes, None), out_axes=axes, devices=devices)
    prompts, history = jnp.arange(PROMPTS).reshape(len(devices or jax.devices()), -1), []
    state = (
        params,
        optimizer.init(params),
        estimator.transform.init(losses.zero_scores(PROMPTS, ROLLOUTS)),
    )
    for number in range(steps):
        *state, success = mapped(*state, prompts, jax.random.key(number))
        history.append(float(success.mean()))
    return state[0], history


if __name__ == "__main__":
    print([round(p, 3) for p in train(losses.build("garl", q=0.75), 100)[1][::10]])
