"""A run's config: the schema, variants by name, the checks, and the paper's experiments.

A config file needs only this: `from qlog.config import default, loss`, and `parse_variants` if
it has variants. In reading order: schema.py, variants.py, paper.py, check.py,
command_line.py, streams.py, evaluated.py.
"""

import importlib
from typing import TYPE_CHECKING, Any

from qlog.config.schema import default, loss, merge, to_json

if TYPE_CHECKING:
    from qlog.config.check import build_estimator, check_config
    from qlog.config.variants import estimator_variants, parse_variants

# Imported when they are first used (PEP 562): they need JAX, and `--help` should not wait for it.
_LATER = {
    "build_estimator": "qlog.config.check",
    "check_config": "qlog.config.check",
    "estimator_variants": "qlog.config.variants",
    "parse_variants": "qlog.config.variants",
}

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


def __getattr__(name: str) -> Any:
    """A function of `_LATER`."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)
