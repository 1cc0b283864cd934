"""Hugging Face folders in and out.

In reading order: hub.py (where a model's folder is), config_json.py (its shape), tensors.py (files
and names of its weights), reading.py (weights straight onto the mesh), writing.py (and back).
"""

from qlog.models.huggingface.hub import is_hub_id, is_wanted, resolve
from qlog.models.huggingface.reading import check, digest, load, read_config
from qlog.models.huggingface.writing import export, tokenizer_files

__all__ = [
    "check",
    "digest",
    "export",
    "is_hub_id",
    "is_wanted",
    "load",
    "read_config",
    "resolve",
    "tokenizer_files",
]
