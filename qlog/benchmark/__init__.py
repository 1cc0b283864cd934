"""How fast, and how near to what the machine can do: `python -m qlog.benchmark --config=...`.

`python -m qlog.benchmark.compare` times the same work in plain PyTorch and transformers too.
"""
