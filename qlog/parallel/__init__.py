"""One program on many devices; README.md in this folder has the idea.

In reading order: sharding.py, batch_placement.py, distributed.py, interrupts.py, process.py,
chips.py.
"""
