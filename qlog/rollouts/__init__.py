"""From prompts to sampled rationales and log w; README.md in this folder has the idea.

In reading order: sampler.py, schedule.py, pool.py, balance.py (on the host), decoding.py, moves.py,
token_choice.py, scoring.py (compiled), then text.py, diversity.py and lengths.py.
"""
