"""What a run reads: model, weights, tokenizer and data, from the files that a config names."""

import dataclasses
import functools
import pathlib

from ml_collections import ConfigDict

from qlog import data, models
from qlog.console import say
from qlog.data import chat_templates, pipeline
from qlog.data.tokenizers import companions
from qlog.errors import ConfigError
from qlog.parallel import distributed
from qlog.storage import assets, paths

_LENGTHS_MEASURED = 256  # examples of an endless source


def corpus(config: ConfigDict) -> data.Corpus:
    """The data that config.data names; reads no file.

    Raises:
      ConfigError: as `data.find_corpus`.
    """
    return data.find_corpus(config.data.to_dict())


def resolve(spec: str, field: str, weights: bool = False) -> pathlib.Path:
    """`models.huggingface.resolve`, once per host. Every process must call it.

    Args:
      spec: a folder, gs:// and s3:// too, or a Hub id.
      field: what named it, for messages.
      weights: whether tensors are wanted besides config and tokenizer.

    Raises:
      ConfigError, PassingError: as `models.huggingface.resolve`.
    """
    found = functools.partial(models.huggingface.resolve, spec, weights=weights, field=field)
    return pathlib.Path(distributed.once_per_host(lambda: str(found())))


def resolve_weights(config: ConfigDict) -> pathlib.Path | None:
    """The local folder of config.weights, downloaded once per host; None of random ones.

    Every process must call it.

    Raises:
      ConfigError, PassingError: as `models.huggingface.resolve`.
    """
    if config.weights == "random":
        return None
    return resolve(config.weights, "config.weights", weights=True)


def check_vocabulary(formatter: data.Formatter, shape: models.DecoderConfig) -> None:
    """Whether the model has an embedding for every token.

    Raises:
      ConfigError: the tokenizer has more tokens.
    """
    if formatter.tokenizer.vocab_size > shape.vocab_size:
        raise ConfigError(
            f"the tokenizer has {formatter.tokenizer.vocab_size} tokens but the model only "
            f"{shape.vocab_size}: raise config.architecture.vocab_size or name another model."
        )


def check_weights(weights: pathlib.Path | None, shape: models.DecoderConfig) -> None:
    """Whether weights are those of the model, before data are read. Every process must call it.

    Args:
      weights: from `resolve_weights`.

    Raises:
      ConfigError: as `models.huggingface.check`.
    """
    if weights is not None:
        distributed.once_per_host(lambda: models.huggingface.check(weights, shape))


def load_formatter(config: ConfigDict) -> data.Formatter:
    """Turns the config's examples into tokens; the tokenizer is fetched once per host.

    Every process must call it.

    Raises:
      ConfigError: as `tokenizer_path`; a wrong style or closing text; a tokenizer without what
        rollouts need.
      PassingError: as `tokenizer_path`.
    """
    named = corpus(config)
    tokenizer = named.tokenizer or data.load(
        distributed.once_per_host(lambda: str(tokenizer_path(config))),
        think_start=config.tokenizer.think_start,
        think_end=config.tokenizer.think_end,
        eos=config.tokenizer.eos,
        chat_template=_chat_template(config),
        chat_template_kwargs=config.tokenizer.chat_template_kwargs.to_dict(),
    )
    return data.Formatter(tokenizer, named.task, config.data.style, config.rollout.closing_text)


def tokenizer_path(config: ConfigDict) -> pathlib.Path:
    """The local file or folder of a config's tokenizer; fetched where it must be.

    Raises:
      ConfigError: config.tokenizer.path is empty, and neither weights nor model brings one.
      PassingError: the Hub or a bucket cannot be reached.
    """
    # `field` is what messages blame: the field that the user has set.
    field, path = "config.tokenizer.path", config.tokenizer.path
    if not path:  # the one next to the weights or, of random weights, to the model's config
        field = "config.weights" if config.weights != "random" else "config.model"
        path = config.weights if config.weights != "random" else config.model
        if path in models.PRESETS:
            raise ConfigError(
                f"config.tokenizer.path is empty and model {path!r} with random weights brings "
                "none: set it to a folder or file with tokenizer.json or a SentencePiece *.model, "
                "or a Hub id."
            )
    if models.huggingface.is_hub_id(path):
        return models.huggingface.resolve(path, weights=False, field=field)
    return assets.local(
        path,
        field,
        lambda name: not name.endswith(".safetensors"),
        companions=companions.NAMES,
    )


def chat_template_path(config: ConfigDict) -> pathlib.Path | None:
    """The local file that config.tokenizer.chat_template names, fetched where it must be.

    None where it names no file.

    Raises:
      ConfigError, PassingError: as `storage.assets.local`.
    """
    spec = config.tokenizer.chat_template
    if spec in ("", chat_templates.BUILT_IN_NAME):
        return None
    return assets.local(spec, "config.tokenizer.chat_template")


def _chat_template(config: ConfigDict) -> str:
    """config.tokenizer.chat_template, with a file in a bucket as the path of its local copy."""
    if config.data.style == "cold":
        return chat_templates.BUILT_IN_NAME  # not read: a faulty template does no harm
    found = functools.partial(chat_template_path, config)
    return distributed.once_per_host(lambda: str(found() or "")) or config.tokenizer.chat_template


def model_shape(config: ConfigDict) -> models.DecoderConfig:
    """The decoder that config.model and config.architecture describe. Every process must call it.

    Raises:
      ConfigError: no such model, or fields that do not fit together.
      PassingError: the Hub or a bucket cannot be reached.
    """
    if config.model in models.PRESETS:
        shape = models.PRESETS[config.model]
    elif "/" in config.model or paths.is_folder(pathlib.Path(config.model)):
        shape = models.huggingface.read_config(resolve(config.model, "config.model"))
    else:
        raise ConfigError(
            f"config.model = {config.model!r} is unknown: use one of {', '.join(models.PRESETS)}, "
            "a Hugging Face folder, or a Hub id such as Qwen/Qwen3-0.6B."
        )
    try:
        return dataclasses.replace(shape, **config.architecture.to_dict())
    except (ValueError, TypeError) as error:
        raise ConfigError(f"config.architecture: {error}.") from None


def prepare_data(config: ConfigDict) -> str | None:
    """Downloads or copies the data once per host; what it returns is for `open_source`.

    Every process must call it.

    Raises:
      ConfigError, PassingError: the data cannot be fetched, or fetched now.
    """
    return distributed.once_per_host(corpus(config).prepare)


def data_limits(config: ConfigDict, rationales: bool) -> data.Limits:
    """How long examples may be; without a limit of rationales they are left out of batches."""
    rollout = config.rollout
    return data.Limits(
        data.Limit("config.data.max_prompt_tokens", config.data.max_prompt_tokens),
        data.Limit("config.rollout.answer_reserve", rollout.answer_reserve),
        # The budget does not count the thinking-end token, which a rationale ends with.
        data.Limit("config.rollout.rationale_budget", rollout.rationale_budget, uncounted=1)
        if rationales
        else None,
    )


def open_source(config: ConfigDict, split: str, prepared: str | None) -> pipeline.Source:
    """The examples of a split.

    Args:
      prepared: what `prepare_data` returned.

    Raises:
      ConfigError: an unknown split, or records that cannot be read.
    """
    return corpus(config).open(split, prepared)


def check(config: ConfigDict) -> None:
    """Reads all that a training run of this config reads, but measures and keeps nothing of it.

    For a run that starts later: what is missing or damaged shows now. Every process must call it.

    Raises:
      ConfigError, PassingError: weights, tokenizer, model or data cannot be read.
    """
    weights, shape = resolve_weights(config), model_shape(config)
    check_vocabulary(load_formatter(config), shape)
    check_weights(weights, shape)
    prepared = prepare_data(config)
    splits = ["train", config.evaluation.split if config.evaluation.every else ""]
    for split in filter(None, [*splits, config.evaluation.final]):
        open_source(config, split, prepared)


def open_split(
    config: ConfigDict,
    formatter: data.Formatter,
    prepared: str | None,
    split: str,
    rationales: bool = False,
) -> data.Dataset:
    """A split, every example of it within the config's budgets.

    Args:
      prepared: what `prepare_data` returned.
      rationales: whether batches have annotated rationales.

    Raises:
      ConfigError: as `open_source` and `data.open_dataset`.
    """
    section, source = config.data, open_source(config, split, prepared)
    dataset = data.open_dataset(
        source,
        formatter,
        data_limits(config, rationales),
        overlong=section.overlong,
        invalid=section.invalid,
        measure=_LENGTHS_MEASURED if corpus(config).endless else None,
        name=f"config.data.name = {data.label(section.name)!r}, split {split!r}",
    )
    # ---- What was left out, and what is odd ----
    # Files know what they left out; of official datasets the records do, not the examples.
    files = source.records if isinstance(source, data.Converted) else source
    skipped = getattr(files, "skipped", data.Skipped()) + dataset.invalid
    for line in skipped.lines():
        say(f"{split}: skipped {line}")
    for note in getattr(files, "notes", ()):
        say(f"warning: {split}: {note}")
    return dataclasses.replace(dataset, invalid=skipped)
