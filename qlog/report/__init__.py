"""Tables and figures from run directories."""

from qlog.report.sweep import write

__all__ = ["write"]
