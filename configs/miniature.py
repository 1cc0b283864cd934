"""The paper's Tables 1 and 3 and Figures 3 and 4 in miniature, on two CPU cores.

    python -m qlog.main --config=configs/miniature.py

The quickstart's world, three times: from a cold start, from a warm start, and from the warm start
with 20% wrong labels. Each with the paper's methods, their relatives, and three seeds; a seed has
models of its own to start from. qlog/report/RESULTS.md has the results.

    --config=configs/miniature.py:seeds=1    fewer seeds; seeds=2+5 are those two, and so on
    --config=configs/miniature.py:collapse   the warm start with one of GARL's terms left out
    --config=configs/miniature.py:longer     GARL from it with more steps, tokens, or updates
    --config=configs/miniature.py:int8       GARL from the cold start on caches of int8
"""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from configs import quickstart
from qlog import losses
from qlog.config import loss, parse_variants
from qlog.config.variants import Variant
from qlog.errors import ConfigError

SEEDS = (0, 1, 2)
METHODS = {
    "grpo": loss("grpo"),
    "rloo": loss("rloo"),
    "maxrl": loss("maxrl"),
    "garl_q000": loss("garl", q=0.0),
    "garl_q025": loss("garl", q=0.25),
    "garl_q075": loss("garl", q=0.75),
    "paft_q025": loss("paft", q=0.25),
    "paft_q075": loss("paft", q=0.75),
    "jensen_q075": loss("jensen", q=0.75),
}
WRONG = 0.2  # share of the training questions with a wrong gold answer


def get_config(arg: str = "") -> ConfigDict:
    config = quickstart.get_config()
    base = config.runs.base.to_dict()
    config.evaluation.without_rationale = False
    config.evaluation.every = 20
    config.evaluation.final = "test"
    config.checkpoint.finished = "best_params"
    config.runs = {}
    chosen: dict[str, Any] = {"seeds": SEEDS, "runs": _miniature}
    parse_variants(arg, _variants(chosen), config)
    for seed in chosen["seeds"]:
        runs = {"base": base, "warm": _warm()} | chosen["runs"](config)
        for name, run in runs.items():
            whole = {**run, "seed": seed}
            if "init_from" in run:  # of the same seed
                whole["init_from"] = f"{run['init_from']}_{seed}"
            config.runs[f"{name}_{seed}"] = whole
    return config


def _miniature(config: ConfigDict) -> dict[str, Any]:
    """Every method from the cold start, the warm start, and the warm start with wrong labels."""
    noisy = {"data": {"world": {**config.data.world.to_dict(), "wrong": WRONG}}}
    settings = {
        "cold": {"init_from": "base"},
        "warm": {"init_from": "warm"},
        "noisy": {"init_from": "warm", **noisy},
    }
    return {
        f"{setting}_{name}": {**start, "loss": method}
        for setting, start in settings.items()
        for name, method in METHODS.items()
    }


def guarded_score_only(q: float = 0.75, drop: float = 2.0) -> losses.LossTransform:
    """GARL without its pathwise term, which collapses, and the whole PAFT while log P falls."""
    score_only = losses.chain(losses.garl(q), losses.zero_pathwise())
    return losses.guarded(score_only, losses.paft(q), drop)


def _collapse(config: ConfigDict) -> dict[str, Any]:
    """Longer from the warm start, at two rates: which term of GARL holds it, and who notices?"""
    config.train.steps = 300
    config.train.terms_every = 5
    config.evaluation.every = 50
    methods = {
        "grpo": loss("grpo"),
        "paft_q025": loss("paft", q=0.25),
        "paft_q075": loss("paft", q=0.75),
    }
    for q in (0.25, 0.75):
        name = f"q{100 * q:03.0f}"
        methods |= {
            f"garl_{name}": loss("garl", q=q),
            f"garl_{name}_no_path": loss("garl", q=q, pathwise=False),
            f"garl_{name}_no_score": loss("garl", q=q, score=False),
            f"guarded_{name}": loss("guarded_garl", q=q),
            f"guarded_{name}_no_path": loss(losses.Recipe(guarded_score_only), q=q),
        }
    return {
        f"rate{rate:.0e}_{name}": {
            "init_from": "warm",
            "loss": method,
            "optimizer": {"learning_rate": rate},
        }
        for rate in (1e-3, 3e-3)
        for name, method in methods.items()
    }


def _longer(config: ConfigDict) -> dict[str, Any]:
    """Whole GARL from the warm start where it might collapse: what does it take?"""
    config.train.steps = 300
    config.train.terms_every = 5
    config.evaluation.every = 50
    ways = {
        "steps1000": {"train": {"steps": 1000}},
        "budget32": {"rollout": {"rationale_budget": 32}},
        "updates4": {"train": {"updates_per_batch": 4}},
        "few_rollouts": {"rollout": {"rollouts_per_prompt": 4}},
    }
    return {
        f"{name}_garl_q{100 * q:03.0f}": {"init_from": "warm", "loss": loss("garl", q=q), **way}
        for name, way in ways.items()
        for q in (0.25, 0.75)
    }


def _int8(config: ConfigDict) -> dict[str, Any]:
    """GARL from the cold start: what do quantised caches cost, and what do weights correct?"""
    start, int8 = {"init_from": "base"}, {"rollout": {"cache": "int8"}}
    weighted = loss("garl", q=0.75, importance="sequence")
    return {
        "garl": {**start, "loss": loss("garl", q=0.75)},
        "garl_int8": {**start, **int8, "loss": loss("garl", q=0.75)},
        "garl_int8_weights": {**start, **int8, "loss": weighted},
    }


def _warm() -> dict[str, Any]:
    """A model that knows the format and has P from 0.04 to 0.35: the base, fine-tuned a little."""
    return {
        "init_from": "base",
        "loss": loss("sft"),
        "rollout": {"rollouts_per_prompt": 1},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
        "train": {"steps": 20, "prompts_per_step": 32, "terms_every": 0},
        "evaluation": {"every": 0},
    }


def _variants(chosen: dict[str, Any]) -> dict[str, Variant]:
    def seeds(config: ConfigDict, value: str) -> None:
        try:
            numbers = [int(number) for number in value.split("+")]
        except ValueError:
            numbers = [-1]
        chosen["seeds"] = numbers if "+" in value else range(numbers[0])
        if min(numbers) < 0 or not chosen["seeds"]:
            raise ConfigError(f"variant seeds={value!r}: write seeds=3 or seeds=0+4.")

    def study(runs: Callable[[ConfigDict], dict[str, Any]]) -> Variant:
        def variant(config: ConfigDict, value: str) -> None:
            chosen["runs"] = runs

        return variant

    studies = {"collapse": _collapse, "longer": _longer, "int8": _int8}
    return {"seeds": seeds, **{name: study(runs) for name, runs in studies.items()}}
