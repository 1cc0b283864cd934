"""A run's config: the schema, variants by name, the checks, and the paper's experiments.

A config file needs only this: `from qlog.config import default, loss`, and `parse_variants` if
it has variants. In reading order: schema.py, variants.py, paper.py, check.py,
command_line.py, streams.py.
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
