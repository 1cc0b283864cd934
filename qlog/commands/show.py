"""What the model will see: `python -m qlog.commands.show configs/hotpotqa.py:warm`.

Prints how long a split's prompts, gold answers and annotated rationales are and may be, and some
examples token for token, as training gets them. Control tokens are shown in ⟦ ⟧, so that they
differ from text that only looks like them. Config fields are set as in training:

    python -m qlog.commands.show configs/hotpotqa.py:cold --split=validation --examples=2 \\
        --config.data.manual_dir=~/hotpotqa --config.tokenizer.path=~/qwen3
"""

import pathlib
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from qlog.commands import entry
from qlog.config import command_line
from qlog.console import complain, count_text, output, printable
from qlog.data import Example, Formatter, Tokenizer, pipeline
from qlog.errors import QLOG_ERRORS
from qlog.experiment import files
from qlog.parallel import process
from qlog.storage import paths

_MEASURED = 20_000  # examples whose lengths count; a synthetic task has no end of them


def report(
    source: pipeline.Source, formatter: Formatter, limits: pipeline.Limits, examples: Sequence[int]
) -> Iterator[str]:
    """Lines about a source: a table of lengths in tokens, then some examples.

    Args:
      limits: None where there is none.
      examples: indices of those that are shown.
    """
    lengths = pipeline.measure_lengths(source, formatter, num_examples=_MEASURED)
    yield f"{formatter.task.name}, {formatter.style}: {count_text(len(source), 'example')}"
    head = ("shortest", "median", "95%", "longest", "limit", "over")
    yield f"{'tokens':<12}" + "".join(f"{word:>9}" for word in head)
    names = ("prompt", "gold answer", "rationale")
    for name, limit, column in zip(names, limits, lengths.T, strict=True):
        # nearest: lengths that some example has, not the mean of two.
        quantiles = np.quantile(column, (0, 0.5, 0.95, 1), method="nearest")
        over = "-" if limit is None else f"{(column > limit.tokens).sum():,}"
        most = "-" if limit is None else f"{limit.tokens:,}"
        yield f"{name:<12}" + "".join(f"{q:>9,}" for q in quantiles) + f"{most:>9}{over:>9}"
    yield f"chat template: {formatter.template_name}"
    yield f"answers end with: {formatter.tokenizer.describe_ends()}"
    # Prompts once more, in a sentence: theirs is the limit that a user can raise, and
    # config.data.overlong says whether a longer one is an error or is skipped.
    over = (lengths[:, 0] > limits.prompt.tokens).sum()
    yield (
        f"{over:,} of {len(lengths):,} prompts exceed {limits.prompt.field} = "
        f"{limits.prompt.value:,}"
    )
    for index in examples:
        yield from _example(source[index], formatter, f"example {index} of {len(source):,}")


def marked(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text of the ids with every control token in ⟦ ⟧."""
    text, plain = "", []
    names = {id_: name for name, id_ in tokenizer.control.items()}
    for id_ in ids:  # runs of plain tokens are decoded together: a character may take several
        if id_ not in names:
            plain.append(id_)
            continue
        text += tokenizer.decode(plain) + f"⟦{names[id_]}⟧"
        plain = []
    return text + tokenizer.decode(plain)


def _example(example: Example, formatter: Formatter, title: str) -> Iterator[str]:
    """The three parts of an example as text, and its gold answer token by token."""
    tokenizer = formatter.tokenizer
    yield f"\n=== {title}, id {example.id}"
    for name, ids in (
        ("prompt", formatter.prompt(example)),
        ("annotated rationale", formatter.rationale(example)),
        ("gold answer", formatter.gold(example)),
    ):
        yield f"--- {name}: {count_text(len(ids), 'token')}"
        yield marked(tokenizer, ids)
    # Token by token only the gold answer: P is the probability of exactly these tokens.
    yield "    " + " ".join(f"{i}:{tokenizer.token(i)!r}" for i in formatter.gold(example))
    if example.aliases:
        yield f"--- aliases: {', '.join(example.aliases)}"


def _open(config: ConfigDict, split: str) -> tuple[pipeline.Source, Formatter, pipeline.Limits]:
    """A split's examples, how training formats them, and how long they may be."""
    formatter = files.load_formatter(config)
    source = files.open_source(config, split, files.prepare_data(config))
    limits = files.data_limits(config, rationales=True)
    return source, formatter, limits


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    with output():
        return _main(argv)


def _main(argv: Sequence[str]) -> int:
    # Flags of this call, so that a second call in the process can define them again.
    values = flags.FlagValues()
    config = command_line.define(values=values)
    split = flags.DEFINE_string("split", "train", "train, validation or test", flag_values=values)
    num_examples = flags.DEFINE_integer(
        "examples", 1, "how many examples to print", lower_bound=1, flag_values=values
    )
    if entry.show_about(argv, __doc__ or "", values):
        return 0
    if len(argv) < 2 or not paths.is_file(pathlib.Path(argv[1].partition(":")[0])):
        complain("name a config file first, as in configs/hotpotqa.py:warm")
        return 2
    # The first argument becomes the flag that names the config.
    argv = [argv[0], f"--config={argv[1]}", *argv[2:]]
    try:
        entry.only_flags(command_line.parse(argv, values))
        process.look_for_devices()  # whoever reads data asks which process this is
        source, formatter, limits = _open(config.value, split.value)
        for line in report(source, formatter, limits, range(min(num_examples.value, len(source)))):
            print(printable(line))
    except (flags.Error, OSError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        complain(entry.sentence(error))
        return 2
    except QLOG_ERRORS as error:
        complain(str(error))
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
