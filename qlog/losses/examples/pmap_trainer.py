"""The losses inside a pmap trainer of one's own: `python -m qlog.losses.examples.pmap_trainer`.

The policy is a table: one of 16 rationales for each of 64 questions, and each answers with a
probability of its own. Prompts are split over all devices; only `axis_name` tells the loss so.
"""

import jax
import jax.numpy as jnp
import optax

from qlog import losses

PROMPTS, RATIONALES, ROLLOUTS = 64, 16, 8


def log_probs(params, prompts, rationales):
    """log p(z|x) and log p(y*|x,z) of rationales [B, M]: [B, M, 2]."""
    tables = jax.nn.log_softmax(params["rationale"]), jax.nn.log_sigmoid(params["answer"])
    return jnp.stack([t[prompts[:, None], rationales] for t in tables], axis=-1)


def train(estimator: losses.Estimator, steps: int, devices=None):
    """Parameters after `steps` steps, and the mean over prompts of P before each step."""
    optimizer = optax.adam(0.1)

    def step(state, prompts, key):
        params, opt_state, loss_state = state
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, prompts)  # whatever device draws
        draw = jax.vmap(lambda key, logits: jax.random.categorical(key, logits, shape=(ROLLOUTS,)))
        rationales = draw(keys, params["rationale"][prompts])
        log_w = log_probs(params, prompts, rationales)[..., 1]
        scores = losses.zero_scores(*log_w.shape)._replace(log_w=log_w)
        coefficients, loss_state = losses.coefficients(
            estimator.transform, scores, loss_state, key=key, axis_name="devices"
        )

        def loss(params):
            new = log_probs(params, prompts, rationales)
            is_rationale = jnp.broadcast_to(jnp.array([True, False]), new.shape)
            masks = (is_rationale, ~is_rationale)
            return estimator.surrogate(
                coefficients.score, coefficients.path, coefficients.token_weight, new, None, None, *masks
            ).loss

        grads = jax.lax.psum(jax.grad(loss)(params), "devices")  # a loss is a sum: divide once
        updates, opt_state = optimizer.update(
            jax.tree.map(lambda g: g / PROMPTS, grads), opt_state
        )
        return (optax.apply_updates(params, updates), opt_state, loss_state), jnp.exp(log_w)

    mapped = jax.pmap(
        step, axis_name="devices", in_axes=(None, 0, None), out_axes=(None, 0), devices=devices
    )
    prompts = jnp.arange(PROMPTS).reshape(len(devices or jax.devices()), -1)
    answers = -4 + jax.random.normal(jax.random.key(1), (PROMPTS, RATIONALES))  # a cold start
    params = {"rationale": jnp.zeros((PROMPTS, RATIONALES)), "answer": answers}
    scores = losses.zero_scores(PROMPTS, ROLLOUTS)
    state = (params, optimizer.init(params), estimator.transform.init(scores))
    history = []
    for number in range(steps):
        state, success = mapped(state, prompts, jax.random.key(number))
        history.append(float(success.mean()))
    return state[0], history


if __name__ == "__main__":
    print([round(p, 3) for p in train(losses.build("garl", q=0.75), 100)[1][::10]])
