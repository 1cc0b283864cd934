"""Tasks, tokenizers, formatting and the input pipeline; nothing here imports JAX."""

from qlog.data.examples import Converted, Example, Task
from qlog.data.formatting import Formatter
from qlog.data.pipeline import (Dataset, PromptBatch, evaluation_batches, open_dataset,
                                train_batches)
from qlog.data.tokenizers import Tokenizer, load, word_level

__all__ = ["Converted", "Dataset", "Example", "Formatter", "PromptBatch", "Task", "Tokenizer",
           "evaluation_batches", "load", "open_dataset", "train_batches", "word_level"]
