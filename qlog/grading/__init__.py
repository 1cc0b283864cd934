"""Is an answer right? Rewards of training, and the accuracy of evaluations.

In reading order: graders.py (one answer against its gold answers), scorers.py (graders by name and
functions of your own, called side by side), accuracy.py (all answers of an evaluation: p@k,
majority votes, intervals).
"""
