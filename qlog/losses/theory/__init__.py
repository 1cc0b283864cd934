"""What the paper's theory says, as code to plot and to check against.

In reading order: closed_forms.py (formulas), exact.py (a model small enough to enumerate),
plots.py, study.py (what goes beyond the paper, measured).
"""
