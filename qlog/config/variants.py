"""Variants of a config by name: `configs/hotpotqa.py:warm,garl,q=0.25`."""

from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from qlog import losses
from qlog.config.schema import loss
from qlog.errors import ConfigError
from qlog.losses.checks import closest

# Changes the config in place. Of `name=value` it gets the value, of a bare name ''.
Variant = Callable[[ConfigDict, str], None]


def parse_variants(
    arg: str | None, variants: Mapping[str, Variant], config: ConfigDict
) -> ConfigDict:
    """Applies 'cold,garl,q=0.75' to `config` in place, in the order given, and returns it.

    Args:
      arg: what stands after the config file's colon: names of `variants`, each with a value or not.

    Raises:
      ConfigError: a variant that does not exist.
    """
    for part in filter(None, (arg or "").split(",")):
        name, _, value = part.strip().partition("=")
        if name not in variants:
            raise ConfigError(
                f"config variant {part.strip()!r} is unknown{closest(name, variants)}: this config "
                f"has {', '.join(sorted(variants)) or 'none'}."
            )
        variants[name](config, value)
    return config


def estimator_variants() -> dict[str, Variant]:
    """The variants that every config shares: each recipe's name chooses the loss, q=... its q."""
    return {**{name: _choose(name) for name in losses.RECIPES}, "q": _set_q}


def _choose(name: str) -> Variant:
    """The variant that trains with the recipe `name`, all its arguments at their defaults."""

    def variant(config: ConfigDict, value: str) -> None:
        config.loss = loss(name)
        if losses.build(name).rationale == "annotated":
            # The data have one rationale per prompt: M = 1, which no microbatch divides further.
            config.rollout.rollouts_per_prompt = 1
            config.train.rollouts_per_microbatch = 0

    return variant


def _set_q(config: ConfigDict, value: str) -> None:
    if "q" not in config.loss:
        raise ConfigError(
            f"variant q={value} is not read by the loss {losses.label(config.loss.name)!r}."
        )
    try:
        config.loss.q = float(value)
    except ValueError:
        raise ConfigError(f"variant q={value!r} is not a number.") from None
