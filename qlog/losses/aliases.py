"""Named chains of parts: functions from hyperparameters to a loss transform.

All take `q` as a number or a traced array, so `optax.inject_hyperparams(garl)(q=schedule)` works.
"""

from qlog.losses import group_stats, transforms
from qlog.losses.checks import check_choice
from qlog.losses.compose import chain
from qlog.losses.resampling import resample_posterior
from qlog.losses.types import Commitment, LossTransform

BASELINES = ("leave_one_out", "none")
CORRECTIONS = ("none", "jackknife")


def garl(
    q: Commitment = 0.75, baseline: str = "leave_one_out", correction: str = "none"
) -> LossTransform:
    """GARL: score (w_m / wbar^q - wbar_{-m}^(1-q)) / M, path w_m / wbar^q / M (eq 12, Algorithm 1).

    `baseline='none'` is the plug-in estimator (eq 9, 20): same mean, more variance.
    `correction='jackknife'` removes the bias of order 1/M (ours, not the paper's).
    """
    check_choice("baseline", baseline, BASELINES)
    check_choice("correction", correction, CORRECTIONS)
    # The jackknife does the work of both parts, w_m and then w_m / wbar^q, without their bias.
    if correction == "jackknife":
        group = [transforms.jackknife(q)]
    else:
        group = [transforms.rao_blackwell(), transforms.amplify(q)]
    if baseline == "leave_one_out":
        group.append(transforms.leave_one_out_baseline(q))
    return chain(*group)


def paft(
    q: Commitment = 0.75, k: int | None = None, resampling: str = "multinomial"
) -> LossTransform:
    """PAFT: wbar^(1-q) n_m / K for both, n the counts of K posterior draws (eq 14, Algorithm 2)."""
    return chain(resample_posterior(k, resampling), transforms.attenuate(q))


def jensen(q: Commitment = 0.75) -> LossTransform:
    """The Jensen bound: (wbar^(1-q) - wbar_{-m}^(1-q)) / (1-q) and wbar^(1-q) w_m / sum w (ours).

    Without bias for E log_q wbar at every M. q = 0 is `rb_rloo`, q = 1 is `jepo`.
    """
    return transforms.jensen(q)


def jepo() -> LossTransform:
    """JEPO with M samples: log wbar - log wbar_{-m} and w_m / sum w (2503.19618 eq 6, 7)."""
    return jensen(1.0)


def rb_reinforce() -> LossTransform:
    """RB-REINFORCE: GARL plug-in at q = 0, w_m / M; unbiased for every M."""
    return garl(0.0, "none")


def rb_rloo() -> LossTransform:
    """RB-RLOO (VeriFree): GARL at q = 0, (w_m - wbar_{-m}) / M and w_m / M; unbiased."""
    return garl(0.0)


def iwae() -> LossTransform:
    """IWAE: GARL plug-in at q = 1, self-normalised importance weights w_m / sum w."""
    return garl(1.0, "none")


def trice(k: int | None = None, resampling: str = "multinomial") -> LossTransform:
    """EM / TRICE E-step: PAFT at q = 1, n_m / K."""
    return paft(1.0, k, resampling)


def star(q: Commitment = 1.0) -> LossTransform:
    """STaR-like: exact-match rollouts only, uniformly: rbar^(1-q) r_m / sum r for both.

    q = 1 gives every prompt with a right rollout the same weight; q = 0, r_m / M, is
    rejection-sampling fine-tuning on all right rollouts.
    """
    weight = group_stats.log_reward
    return chain(transforms.rao_blackwell(weight), transforms.amplify(q, weight))


def maxrl() -> LossTransform:
    """MaxRL (T -> infinity): (r_m - rbar) / rbar / M on sampled answers, 0 when none is right."""
    weight = group_stats.log_reward
    return chain(
        transforms.rao_blackwell(weight), transforms.amplify(1.0, weight), transforms.center()
    )


def grpo(scale_by_std: bool = True, eps: float = 1e-6) -> LossTransform:
    """GRPO: (r_m - rbar) / (std(r) + eps) / M on sampled answers; Dr. GRPO does not scale."""
    advantage = [transforms.from_reward(), transforms.center()]
    if scale_by_std:
        advantage.append(transforms.scale_by_group_std(eps))
    return chain(*advantage)


def rloo() -> LossTransform:
    """RLOO: (r_m - rbar_{-m}) / M on sampled answers."""
    return chain(transforms.from_reward(), transforms.center_leave_one_out())


def sft() -> LossTransform:
    """SFT: 1 / M on annotated rationales and gold answers, the q = 1 pole."""
    return transforms.uniform()
