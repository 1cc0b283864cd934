"""How fast, and how near to what the machine can do: `python -m qlog.benchmark --config=...`.

`python -m qlog.benchmark.compare` runs the same work with plain PyTorch and transformers beside it.
"""
