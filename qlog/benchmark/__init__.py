"""How fast, and how near to what the machine can do: `python -m qlog.benchmark --config=...`.

`python -m qlog.benchmark.compare` times the same work in plain PyTorch and transformers too. In
reading order: measure.py (timing, peaks, memory), work.py (the phases of a step), report.py (the
table of a config), __main__.py (the command), compare.py.
"""
