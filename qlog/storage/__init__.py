"""Disks and buckets.

In reading order: paths.py (one kind of path for both), assets.py (where models, tokenizers and
datasets are found), git_lfs.py (files that were not downloaded), strict_json.py (JSON that every
reader takes, and JSON that others wrote), json_lines.py.
"""
