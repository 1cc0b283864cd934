"""From rollouts and their coefficients to the next parameters; README.md has the idea.

In reading order: types.py, trajectories.py, packing.py, blocks.py, planning.py, forward.py,
gradient.py, terms.py, optimizer.py.
"""
