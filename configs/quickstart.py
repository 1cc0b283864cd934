"""The whole method in five minutes on two CPU cores: who escapes a cold start?

    python -m qlog.main --config=configs/quickstart.py

A small decoder first learns the plain text of a synthetic world (facts, and walks along them). It
knows neither that questions exist nor how answers are written: P, its chance to answer right, is
tiny. From there each estimator of the family trains by itself, and GRPO to compare. README.md has
the results, with seeds.
"""

from ml_collections import ConfigDict

from qlog.config import default, loss, parse_variants

Q = (0.0, 0.25, 0.5, 0.75, 1.0)  # 0 is reinforcement learning, 1 log marginal likelihood


def get_config(arg: str = "") -> ConfigDict:
    config = default()
    config.dtype = "float32"
    config.architecture = {
        "vocab_size": 48,
        "num_layers": 2,
        "width": 64,
        "num_heads": 4,
        "num_kv_heads": 4,
        "head_dim": 16,
        "mlp_width": 128,
        "rope_theta": 1e4,
    }
    config.data.name = "multihop"
    config.data.max_prompt_tokens = 24
    config.data.world = {
        "names": 24,
        "people": 6,
        "hops": 3,
        "shortest": 4,
        "longest": 6,
        "heed": 0.8,
    }
    config.rollout.rollouts_per_prompt = 16
    config.rollout.rationale_budget = 8
    config.rollout.answer_reserve = 8
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 5
    config.optimizer.b2 = 0.95  # gradients grow by orders of magnitude during the escape
    config.train.steps = 100
    config.train.prompts_per_step = 8
    config.train.remat = "none"
    config.train.rollouts_every = 50
    config.evaluation.every = 1000
    config.evaluation.prompts = 128
    config.evaluation.prompts_per_batch = 128
    config.evaluation.without_rationale = True
    config.checkpoint.every = 1000
    base = {
        "data": {"name": "multihop_text"},
        "loss": loss("sft"),
        "rollout": {"rollouts_per_prompt": 1},
        "optimizer": {"learning_rate": 5e-3, "warmup_steps": 50, "schedule": "cosine"},
        "train": {"steps": 1000, "prompts_per_step": 32},
        "evaluation": {"every": 0},
    }
    runs = {"base": base, "grpo": {"init_from": "base", "loss": loss("grpo")}}
    for q in Q:
        runs[f"garl_q{100 * q:03.0f}"] = {"init_from": "base", "loss": loss("garl", q=q)}
    runs["paft_q075"] = {"init_from": "garl_q075", "loss": loss("paft", q=0.75)}
    config.runs = runs
    return parse_variants(arg, {}, config)
