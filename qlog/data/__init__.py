"""Tasks, tokenizers, formatting and the input pipeline; nothing here imports JAX.

In reading order: examples.py (what a task is made of), tasks.py (FinQA, HotPotQA and MuSiQue as
text, with finqa_program.py), synthetic.py (a task that makes its examples), splits.py (which
records train, validation and test have), builders/ (the official files, prepared by TFDS),
tokenizers.py (with tokenizer_files.py, the small files next to a tokenizer), chat_templates.py,
formatting.py (examples as token ids), pipeline.py (padded batches), fields.py (names in errors).

A dataset is added in three places: its builder and its name (builders/), the sizes of its splits
(`splits.SIZES`), and its `Task`, which turns a record into text (`tasks.TASKS`).
"""

from qlog.data.builders import prepare
from qlog.data.examples import Converted, Example, Task
from qlog.data.formatting import Formatter
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
    "Dataset",
    "Example",
    "Formatter",
    "Limit",
    "Limits",
    "PromptBatch",
    "TASKS",
    "Task",
    "Tokenizer",
    "evaluation_batches",
    "load",
    "measure_lengths",
    "open_dataset",
    "open_examples",
    "prepare",
    "train_batches",
    "word_level",
    "write_ids",
]
