"""Is an answer right? Rewards of training, and the accuracy of evaluations.

In reading order: graders.py (one answer against its gold answers), accuracy.py (all answers of an
evaluation: p@k, majority votes, intervals).
"""
