"""The q-log loss family: estimators composed of parts, as optimisers are in optax.

    estimator = losses.build("garl", q=0.75)                      # a recipe, by name
    transform = losses.chain(losses.garl(0.75), losses.clip_coefficients(5.0))  # or parts, by hand
    state = transform.init(scores)
    coefficients, state = losses.coefficients(transform, scores, state, key=key)

Needs JAX and optax only. README.md in this folder has the picture and the recipes.
"""

from qlog.losses.aliases import (
    garl,
    grpo,
    iwae,
    maxrl,
    paft,
    rb_reinforce,
    rb_rloo,
    rloo,
    sft,
    star,
    trice,
)
from qlog.losses.compose import (
    chain,
    coefficients,
    initial_coefficients,
    inject_hyperparams,
    named_chain,
    p_hat_above,
    stateful,
    stateless,
    where_groups,
)
from qlog.losses.gauges import Measured, measure, measure_groups, measurements
from qlog.losses.group_stats import log_likelihood, log_reward
from qlog.losses.normalization import (
    aggregate,
    clip_coefficients,
    normalize_by_bound,
    zero_pathwise,
)
from qlog.losses.q_schedules import adaptive_q, q_for_pace, schedule, scheduled
from qlog.losses.recipes import RECIPES, Recipe, arguments, build
from qlog.losses.resampling import RESAMPLING, resample_posterior
from qlog.losses.surrogates import add_kl, clipped, kl_estimate, linear, token_measurements
from qlog.losses.transforms import (
    amplify,
    attenuate,
    center,
    center_leave_one_out,
    from_reward,
    jackknife,
    leave_one_out_baseline,
    rao_blackwell,
    scale_by_group_std,
    uniform,
)
from qlog.losses.tsallis import (
    amplification,
    attenuation,
    exp_q,
    j_q,
    log_amplification,
    log_attenuation,
    log_exp_q,
    log_q,
)
from qlog.losses.types import (
    Coefficients,
    Estimator,
    LossTransform,
    Scores,
    Sums,
    Surrogate,
    TokenLogProbs,
    abstract_scores,
)

__all__ = [
    "Coefficients",
    "Estimator",
    "LossTransform",
    "Measured",
    "RECIPES",
    "RESAMPLING",
    "Recipe",
    "Scores",
    "Sums",
    "Surrogate",
    "TokenLogProbs",
    "abstract_scores",
    "adaptive_q",
    "add_kl",
    "aggregate",
    "amplification",
    "amplify",
    "arguments",
    "attenuate",
    "attenuation",
    "build",
    "center",
    "center_leave_one_out",
    "chain",
    "clip_coefficients",
    "clipped",
    "coefficients",
    "exp_q",
    "from_reward",
    "garl",
    "grpo",
    "initial_coefficients",
    "inject_hyperparams",
    "iwae",
    "j_q",
    "jackknife",
    "kl_estimate",
    "leave_one_out_baseline",
    "linear",
    "log_amplification",
    "log_attenuation",
    "log_exp_q",
    "log_likelihood",
    "log_q",
    "log_reward",
    "maxrl",
    "measure",
    "measure_groups",
    "measurements",
    "named_chain",
    "normalize_by_bound",
    "p_hat_above",
    "paft",
    "q_for_pace",
    "rao_blackwell",
    "rb_reinforce",
    "rb_rloo",
    "resample_posterior",
    "rloo",
    "scale_by_group_std",
    "schedule",
    "scheduled",
    "sft",
    "star",
    "stateful",
    "stateless",
    "token_measurements",
    "trice",
    "uniform",
    "where_groups",
    "zero_pathwise",
]
