"""Tasks, tokenizers, formatting and the input pipeline; nothing here imports JAX.

In reading order: examples.py (what a task is made of), invalid.py (records that
cannot be used), tasks.py (FinQA, HotPotQA and MuSiQue as
text, with finqa_program.py), synthetic.py (a task that makes its examples), splits.py (which
records train, validation and test have), builders/ (the official files, prepared by TFDS),
record_files.py (JSON lines and Parquet), own.py (your own records and functions as examples),
hub.py (the official datasets as the Hugging Face Hub has them), catalog.py (which of all this a
config names), tokenizers/ (text to ids and back), chat_templates.py, formatting.py (examples as
token ids), pipeline.py (padded batches), fields.py (names in errors). README.md shows how to train
on your own data.
"""

from qlog.data.builders import prepare
from qlog.data.catalog import Corpus, find_corpus, label
from qlog.data.examples import Converted, Example, Task
from qlog.data.formatting import Formatter
from qlog.data.invalid import InvalidRecord, Skipped
from qlog.data.pipeline import (
    Dataset,
    Limit,
    Limits,
    PromptBatch,
    evaluation_batches,
    measure_lengths,
    open_dataset,
    train_batches,
)
from qlog.data.splits import write_ids
from qlog.data.tasks import TASKS, open_examples
from qlog.data.tokenizers import Tokenizer, load, word_level

__all__ = [
    "Converted",
    "Corpus",
    "Dataset",
    "Example",
    "Formatter",
    "InvalidRecord",
    "Limit",
    "Limits",
    "PromptBatch",
    "Skipped",
    "TASKS",
    "Task",
    "Tokenizer",
    "evaluation_batches",
    "find_corpus",
    "label",
    "load",
    "measure_lengths",
    "open_dataset",
    "open_examples",
    "prepare",
    "train_batches",
    "word_level",
    "write_ids",
]
