"""From prompts to sampled rationales and log w; README.md in this folder has the idea.

In reading order: sampler.py, pool.py, token_choice.py, scoring.py, text.py.
"""
