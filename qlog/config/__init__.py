"""A run's config: the schema, variants by name, the checks, and the paper's experiments.

A config file needs no more than this: `from qlog.config import default, loss`.
"""

from qlog.config.check import build_estimator, check_config
from qlog.config.schema import default, loss, merge, to_json
from qlog.config.variants import estimator_variants, parse_variants

__all__ = [
    "build_estimator",
    "check_config",
    "default",
    "estimator_variants",
    "loss",
    "merge",
    "parse_variants",
    "to_json",
]
