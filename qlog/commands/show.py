"""What the model will see: `python -m qlog.commands.show configs/hotpotqa.py:warm`.

Prints the lengths of a split's prompts, gold answers and annotated rationales beside their limits,
and some examples token for token as training gets them. Control tokens stand in ⟦ ⟧, so that they
differ from text that only looks like them. Config fields are set as in training:

    python -m qlog.commands.show configs/hotpotqa.py:cold --split=validation --examples=2 \\
        --config.data.manual_dir=~/hotpotqa --config.tokenizer.path=~/qwen3
"""

import pathlib
import sys
from collections.abc import Iterator, Sequence

import huggingface_hub
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from qlog import experiment
from qlog.data import pipeline, synthetic, tasks, tokenizers
from qlog.data.examples import Example
from qlog.data.formatting import Formatter
from qlog.errors import ConfigError

_MEASURED = 20_000  # a synthetic task has no end of examples


def report(
    source: pipeline.Source, formatter: Formatter, limits: pipeline.Limits, examples: Sequence[int]
) -> Iterator[str]:
    """Lines about a source: a table of lengths in tokens, then the examples with these indices."""
    lengths = pipeline.measure_lengths(source, formatter, count=_MEASURED)
    yield f"{formatter.task.name}, {formatter.style}: {len(source):,} examples"
    head = ("shortest", "median", "95%", "longest", "limit", "over")
    yield f"{'tokens':<12}" + "".join(f"{word:>9}" for word in head)
    for name, limit, column in zip(("prompt", "gold answer", "rationale"), limits, lengths.T):
        quantiles = np.quantile(column, (0, 0.5, 0.95, 1), method="nearest")
        over = "-" if limit is None else f"{(column > limit.tokens).sum():,}"
        most = "-" if limit is None else f"{limit.tokens:,}"
        yield f"{name:<12}" + "".join(f"{q:>9,}" for q in quantiles) + f"{most:>9}{over:>9}"
    over = (lengths[:, 0] > limits.prompt.tokens).sum()
    yield (
        f"{over:,} of {len(lengths):,} prompts exceed {limits.prompt.field} = "
        f"{limits.prompt.value:,}"
    )
    for index in examples:
        yield from _example(source[index], formatter, f"example {index} of {len(source):,}")


def marked(tokenizer: tokenizers.Tokenizer, ids: Sequence[int]) -> str:
    """Text of the ids with every control token in ⟦ ⟧."""
    text, plain = "", []
    names = {id_: name for name, id_ in tokenizer.control.items()}
    for id_ in ids:
        if id_ not in names:
            plain.append(id_)
            continue
        text += tokenizer.decode(plain) + f"⟦{names[id_]}⟧"
        plain = []
    return text + tokenizer.decode(plain)


def _example(example: Example, formatter: Formatter, title: str) -> Iterator[str]:
    tokenizer = formatter.tokenizer
    yield f"\n=== {title}, id {example.id}"
    for name, ids in (
        ("prompt", formatter.prompt(example)),
        ("annotated rationale", formatter.rationale(example)),
        ("gold answer", formatter.gold(example)),
    ):
        yield f"--- {name}: {len(ids):,} tokens"
        yield marked(tokenizer, ids)
    yield "    " + " ".join(f"{i}:{tokenizer.token(i)!r}" for i in formatter.gold(example))
    if example.aliases:
        yield f"--- aliases: {', '.join(example.aliases)}"


def _open(config: ConfigDict, split: str) -> tuple[pipeline.Source, Formatter, pipeline.Limits]:
    section, tokens, rollout = config.data, config.tokenizer, config.rollout
    if section.name in synthetic.TASKS:
        world = synthetic.World(**section.world)
        task, tokenizer = synthetic.TASKS[section.name], world.tokenizer()
        source = synthetic.open_examples(section.name, split, world)
    else:
        source = tasks.open_examples(
            section.name,
            split,
            manual_dir=section.manual_dir or None,
            data_dir=section.data_dir or None,
        )
        task = tasks.TASKS[section.name]
        tokenizer = tokenizers.load(
            tokens.path or _beside_the_weights(config),
            think_start=tokens.think_start,
            think_end=tokens.think_end,
        )
    formatter = Formatter(tokenizer, task, section.style, rollout.closing_text)
    return source, formatter, experiment.data_limits(config, rationales=True)


def _beside_the_weights(config: ConfigDict) -> str:
    """The folder that training takes the tokenizer from; of a Hub id the tokenizer alone is
    downloaded."""
    model = config.model if config.weights == "random" else config.weights
    if pathlib.Path(model).expanduser().is_dir():
        return model
    reason = "a model without files"
    if "/" in model:
        name, _, revision = model.partition("@")
        try:
            return huggingface_hub.snapshot_download(
                name, revision=revision or None, allow_patterns=["tokenizer.json", "*.model"]
            )
        except Exception as error:  # the Hub's client raises what its layers below raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    raise ConfigError(
        f"config.tokenizer.path is empty and {model!r} brings no tokenizer ({reason}): set it to a "
        "folder or file with tokenizer.json or a SentencePiece *.model."
    )


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    if len(argv) < 2 or not pathlib.Path(argv[1].partition(":")[0]).is_file():
        print("name a config file first, as in configs/hotpotqa.py:warm", file=sys.stderr)
        return 2
    argv = [argv[0], f"--config={argv[1]}", *argv[2:]]
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    split = flags.DEFINE_string("split", "train", "train, validation or test", flag_values=values)
    count = flags.DEFINE_integer("examples", 1, "how many examples to print", flag_values=values)
    try:
        values(argv)
        source, formatter, limits = _open(config.value, split.value)
        for line in report(source, formatter, limits, range(min(count.value, len(source)))):
            print(line)
    except (ConfigError, flags.Error) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
