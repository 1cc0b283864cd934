"""Compiling for a pod that is not here; README.md in this folder has the idea.

In reading order: compile_run.py, programs.py, compiler.py, hlo.py, hlo_cost.py, weak_scaling.py,
run_cost.py.
"""
