"""Named chains of parts: functions from hyperparameters to a loss transform.

All take `q` as a number or a traced array, so `optax.inject_hyperparams(garl)(q=schedule)` works.
"""

from qlog.losses import group_stats, subsets, transforms
from qlog.losses.checks import check_choice, check_integer, check_number
from qlog.losses.compose import chain
from qlog.losses.guard import guarded
from qlog.losses.normalization import zero_pathwise
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


def guarded_garl(
    q: Commitment = 0.75,
    baseline: str = "leave_one_out",
    correction: str = "none",
    drop: float = 2.0,
    decay: float = 0.8,
) -> LossTransform:
    """`garl`, and `paft` while the batches' log P is `drop` nats below its best (ours)."""
    return guarded(garl(q, baseline, correction), paft(q), drop, decay)


def jensen(q: Commitment = 0.75) -> LossTransform:
    """The Jensen bound: (wbar^(1-q) - wbar_{-m}^(1-q)) / (1-q) and wbar^(1-q) w_m / sum w (ours).

    Without bias for E log_q wbar at every M. q = 0 is `rb_rloo`, q = 1 is `jepo`.
    """
    return transforms.jensen(q)


def jepo() -> LossTransform:
    """JEPO with M samples: log wbar - log wbar_{-m} and w_m / sum w (2503.19618 eq 6, 7)."""
    return jensen(1.0)


def log_prob() -> LossTransform:
    """Log-probability reward: (log w_m - the mean of the others) / M and 1 / M.

    JEPO with one sample (2503.19618 eq 5), 2602.03979 eq 2, 4, 9.
    """
    return transforms.from_log_weight()


def average_log_prob() -> LossTransform:
    """`log_prob` over the number of the gold answer's tokens (2602.03979 eq 3, 10)."""
    return chain(transforms.from_log_weight(), transforms.per_gold_token())


def rlpr(eps: float = 1e-6) -> LossTransform:
    """RLPR: (r_m - rbar) / (std(r) + eps) / M and 0 (2506.18254).

    r_m is the mean of the gold tokens' probabilities. The paper subtracts from r what the
    answer has without a rationale, and clips at 0. That number is the same for the whole group, so
    without the clip, as here, it cancels.
    """
    return chain(transforms.from_mean_gold_prob(), *_scaled_by_own_std(eps))


def r3(eps: float = 1e-6) -> LossTransform:
    """DRO's R3: (r_m - rbar) / (std(r) + eps) / M and 0, r_m = sum_t omega_t log p_t (2506.13351).

    omega_t, of sum 1, is in proportion to the standard deviation of log p_t over the group: only
    tokens on which rationales differ tell which of them is good.
    """
    return chain(transforms.from_reflective_tokens(), *_scaled_by_own_std(eps))


def nover(efficiency: float = 1.0, eps: float = 1e-6) -> LossTransform:
    """NOVER: (r_m - rbar) / (std(r) + eps) / M and 0 (2505.16022).

    r_m is the rank of the rollout's perplexity of the gold answer in its group, plus `efficiency`
    times the share of the others that are worse and longer. Its format reward is a rollout's own
    end of thinking here, which is forced.
    """
    return chain(transforms.from_perplexity_ranks(efficiency), *_scaled_by_own_std(eps))


def _scaled_by_own_std(eps: float) -> list[LossTransform]:
    return [transforms.center(), transforms.scale_by_own_std(eps), zero_pathwise()]


def tempered(exponent: float = 0.5) -> LossTransform:
    """Tempered likelihood: (w^t - the mean of the others) / M and t w^t / M, for E w^t.

    t = `exponent`. 1 is `rb_rloo`; towards 0 it becomes t times `log_prob`; 1 / (answer's tokens)
    makes w^t a geometric mean.
    """
    check_number("exponent", exponent, 1e-6, 1e3)
    weight = group_stats.power_of(group_stats.log_likelihood, exponent)
    return chain(
        transforms.rao_blackwell(weight),
        transforms.leave_one_out_baseline(0.0, weight),
        transforms.multiply(exponent, score=False),
    )


def rb_pass_at_k(k: int = 4, baseline: str = "leave_one_out") -> LossTransform:
    """pass@k on w: w_m times k/M times the mean of prod (1 - w_j) over subsets of k - 1 others.

    For 1 - (1-P)^k, without bias. With a baseline the score has w_m - wbar_{-m} for w_m.
    """
    return chain(*_reinforce(baseline), subsets.pass_at_k(k))


def rb_maxrl(order: int = 4, baseline: str = "leave_one_out") -> LossTransform:
    """MaxRL of order T on w: the sum over k = 1 ... T of `rb_pass_at_k` / k (2602.02710).

    For -sum_{k <= T} (1-P)^k / k, without bias: T = 1 is `rb_rloo`, T = M comes close to log P.
    """
    return chain(*_reinforce(baseline), subsets.truncated_likelihood(order))


def _reinforce(baseline: str) -> list[LossTransform]:
    check_choice("baseline", baseline, BASELINES)
    parts = [transforms.rao_blackwell()]
    return parts if baseline == "none" else [*parts, transforms.leave_one_out_baseline(0.0)]


def pkpo(k: int = 4, baseline: str = "leave_one_out") -> LossTransform:
    """PKPO: k/M times the mean of max(r_m, max S) - max S over subsets S of k - 1 others.

    For the expected best of k rewards, pass@k where they are 0 and 1 (2505.15201). Without a
    baseline max S is not subtracted. k = 1 is `rloo`.
    """
    check_choice("baseline", baseline, BASELINES)
    check_integer("k", k)
    if k == 1:
        return rloo() if baseline == "leave_one_out" else transforms.from_reward()
    return subsets.max_at_k(k, baseline == "leave_one_out")


def rs_grpo(beta: float = 2.0) -> LossTransform:
    """RS-GRPO: (e^(beta r_m) / mean e^(beta r) - 1) / (beta M), for log E[e^(beta r)] / beta.

    2509.24261. Towards beta = 0 it is GRPO without the division by the standard deviation; a large
    beta seeks the best reward.
    """
    check_number("beta", beta, 1e-3, 1e3)
    weight = group_stats.log_risk(beta)
    return chain(
        transforms.rao_blackwell(weight),
        transforms.amplify(1.0, weight),
        transforms.center(),
        transforms.multiply(1 / beta),
    )


def lite_ppo(eps: float = 1e-6) -> LossTransform:
    """Lite PPO: (r_m - rbar) / (std of the batch's rewards + eps) / M (2508.08221)."""
    return chain(transforms.from_reward(), transforms.center(), transforms.scale_by_batch_std(eps))


def reinforce_plus_plus(eps: float = 1e-6) -> LossTransform:
    """REINFORCE++: (r_m - batch mean) / (std of the batch's rewards + eps) / M (2501.03262)."""
    return chain(
        transforms.from_reward(), transforms.center_batch(), transforms.scale_by_batch_std(eps)
    )


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


def grpo(scale_by_std: bool = True, eps: float = 1e-6, sample_std: bool = False) -> LossTransform:
    """GRPO: (r_m - rbar) / (std(r) + eps) / M on sampled answers; Dr. GRPO does not scale."""
    advantage = [transforms.from_reward(), transforms.center()]
    if scale_by_std:
        advantage.append(transforms.scale_by_group_std(eps, sample_std))
    return chain(*advantage)


def rloo() -> LossTransform:
    """RLOO: (r_m - rbar_{-m}) / M on sampled answers."""
    return chain(transforms.from_reward(), transforms.center_leave_one_out())


def sft() -> LossTransform:
    """SFT: 1 / M on annotated rationales and gold answers, the q = 1 pole."""
    return transforms.uniform()
