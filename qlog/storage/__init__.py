"""Disks and buckets.

In reading order: paths.py (one kind of path for both), assets.py (where models, tokenizers and
datasets are found), strict_json.py (JSON that every reader takes).
"""
