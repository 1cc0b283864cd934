"""Variants of a config by name: `configs/hotpotqa.py:warm,garl,q=0.25`."""

from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from qlog import losses
from qlog.config.schema import closest, loss
from qlog.errors import ConfigError


def parse_variants(
    arg: str | None, variants: Mapping[str, Callable[[ConfigDict, str], None]], config: ConfigDict
) -> ConfigDict:
    """Applies 'cold,garl,q=0.75' to `config`: each word or key=value names an entry of `variants`,
    a function of the config and of the value ('' for a bare word). Applied in the order given.

    Raises:
      ConfigError: a variant that does not exist.
    """
    for part in filter(None, (arg or "").split(",")):
        name, _, value = part.strip().partition("=")
        if name not in variants:
            raise ConfigError(
                f"config variant {part.strip()!r} is unknown{closest(name, variants)}: this config "
                f"has {', '.join(sorted(variants))}."
            )
        variants[name](config, value)
    return config


def estimator_variants() -> dict[str, Callable[[ConfigDict, str], None]]:
    """Variants that every config shares: a recipe's name chooses the loss, q=... its commitment."""

    def choose(name):
        def variant(config, value):
            config.loss = loss(name)
            if losses.build(name).rationale == "annotated":
                config.rollout.rollouts_per_prompt = 1
                config.train.rollouts_per_microbatch = 0

        return variant

    def set_q(config, value):
        if "q" not in config.loss:
            raise ConfigError(f"variant q={value} is not read by the loss {config.loss.name!r}.")
        try:
            config.loss.q = float(value)
        except ValueError:
            raise ConfigError(f"variant q={value!r} is not a number.") from None

    return {**{name: choose(name) for name in losses.RECIPES}, "q": set_q}
