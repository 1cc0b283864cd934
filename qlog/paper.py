"""The paper's experiments as configs: what Section 7 gives, and our choices where it is silent.

The files in configs/ differ in the dataset and its budgets alone; everything else is here.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from qlog import config as qconfig


def experiment(arg: str | None, *, dataset: str, total_budget: int, max_prompt_tokens: int) -> ConfigDict:
    """Qwen3 0.6B on one dataset, M = 32, cold start and GARL q = 0.75 unless `arg` says otherwise.

    Args:
      arg: variants, as in 'warm,grpo' or 'cold,garl,q=0.25,tiny'.
      dataset: finqa | hotpotqa | musique.
      total_budget: tokens of rationale and answer together (the paper's 4096, 3072, 2048).
      max_prompt_tokens: our choice: the longest prompt of the dataset fits.
    """
    config = qconfig.default()
    config.model = config.weights = "Qwen/Qwen3-0.6B"  # the paper's: post-trained Qwen3 0.6B
    config.data.name = dataset
    config.data.style = "cold"
    config.data.max_prompt_tokens = max_prompt_tokens
    config.data.overlong = "skip"  # our choice: outliers are counted, shown at start and left out
    config.rollout.rollouts_per_prompt = 32  # the paper's
    config.rollout.rationale_budget = total_budget - 128  # the paper's
    config.rollout.answer_reserve = 128  # the paper's
    config.rollout.temperature = 1.0  # our choice: the law that the gradient is about
    config.evaluation.rollouts_per_prompt = 16  # the paper's
    config.evaluation.temperature = 1.0  # our choice: as in training
    config.loss = qconfig.loss("garl", q=0.75)  # the paper's default: with RLOO, divided by M^q
    # Not given by the paper, all ours: common values for RL fine-tuning of models of this size.
    config.optimizer.learning_rate = 1e-6
    config.optimizer.warmup_steps = 10
    config.optimizer.max_grad_norm = 1.0
    config.train.steps = 500
    config.train.prompts_per_step = 32
    config.train.rollouts_per_microbatch = 8
    config.train.prompts_per_microbatch = 16
    return qconfig.parse_variants(arg, variants(), config)


def variants() -> dict[str, Callable[[ConfigDict, str], None]]:
    """cold | warm, the name of any estimator, q=..., tiny."""

    def style(name):
        def variant(config, value):
            config.data.style = name
        return variant

    return {
        **qconfig.estimator_variants(), "cold": style("cold"), "warm": style("warm"), "tiny": tiny
    }


def tiny(config: ConfigDict, value: str = "") -> None:
    """A random model of the same architecture and vocabulary, and budgets for two CPU cores: it
    shows that everything runs on the real records; it learns nothing worth having."""
    config.model, config.weights, config.dtype = "qwen3_0p6b", "random", "float32"
    config.architecture = {
        "num_layers": 2, "width": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16,
        "mlp_width": 128,
    }  # fmt: skip
    config.data.max_prompt_tokens = 4096
    config.rollout.rollouts_per_prompt = min(4, config.rollout.rollouts_per_prompt)
    config.rollout.rationale_budget = 24
    config.rollout.answer_reserve = 32
    config.optimizer.learning_rate = 1e-3
    config.train.steps = 6
    config.train.prompts_per_step = 4
    config.train.rollouts_per_microbatch = config.train.prompts_per_microbatch = 0
    config.train.rollouts_every = 2
    config.evaluation.every = 3
    config.evaluation.prompts = 8
    config.evaluation.prompts_per_batch = 4
    config.evaluation.rollouts_per_prompt = 4
    config.checkpoint.every = 3
