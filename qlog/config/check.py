"""All that can be refused by looking at a config, the mesh, or the config of an earlier start.

What can only be checked with files (weights, tokenizer, data) is checked in
qlog/experiment/files.py, which reads them.
"""

import dataclasses
import importlib.metadata
import json
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from qlog import losses, models
from qlog.config import schema
from qlog.config.schema import CHOICES
from qlog.console import count_text
from qlog.errors import ConfigError, last_line, let_signals_pass, summary
from qlog.grading import scorers
from qlog.grading.scorers import Scorer
from qlog.losses.checks import closest
from qlog.models import limits
from qlog.parallel import sharding
from qlog.storage import strict_json

_PLAIN = (str, int, float, bool, types.NoneType)  # exactly: a NumPy float is a float, too


def check_config(config: ConfigDict) -> None:
    """Everything that can be refused by looking at the config and nothing else.

    Raises:
      ConfigError: unknown keys, wrong types, values out of range, an impossible loss, a field that
        the chosen data do not read.
    """
    _check_plain(config, "config")
    _check_keys(config, schema.default(), "config")
    schema.several(config)
    values = schema.fields(config)
    for name, field in schema.FIELDS.items():
        if name not in values:  # {} or {"key": ...} in its place
            raise ConfigError(f"config.{name} must be a value, not a section.")
        _check_value(name, values[name], field)
    for step in config.profile.steps:
        if type(step) is not int or step < 0:
            raise ConfigError(
                f"config.profile.steps = {config.profile.steps!r} must hold whole numbers."
            )
    _check_trackers(config)
    _check_architecture(config)
    _check_tokenizer(config)
    _check_data(config)
    _check_slices(config)
    reward_scorers(config, build_estimator(config))
    evaluation_scorers(config)


def _check_value(name: str, value: Any, field: schema.Field) -> None:
    """Raises ConfigError where the value is out of the field's range, or none of its words."""
    if field.range is not None:
        low, high = field.range
        if not low <= value <= high:  # a NaN is not, either
            most = f"{high:.9g}" if isinstance(high, float) else high
            limit = f"at least {low}" if value < low else f"at most {most}"
            limit = limit if value == value else f"a number from {low} to {most}"
            raise ConfigError(f"config.{name} = {value!r} must be {limit}.")
    if field.choices and value not in field.choices:
        known = " or ".join(word or "''" for word in field.choices)
        raise ConfigError(f"config.{name} = {value!r} is unknown: use {known}.")


def check_final(config: ConfigDict) -> None:
    """Whether a training run reports another split in the end than the one that chooses.

    Raises:
      ConfigError: both are the same, so the number of the best checkpoint would be too high.
    """
    evaluation = config.evaluation
    if evaluation.final and evaluation.final == evaluation.split:
        raise ConfigError(
            f"config.evaluation.final = {evaluation.final!r} is also config.evaluation.split, "
            "which chooses the best checkpoint: its accuracy there would be too high; set "
            "config.evaluation.split = 'validation'."
        )


def check_batches(config: ConfigDict, mesh: Mesh) -> None:
    """Whether the prompts of a step split evenly over the mesh, waves and microbatches.

    Raises:
      ConfigError: they do not; it names the next size that does.
    """
    shards, train = sharding.num_batch_shards(mesh), config.train
    prompts, updates = train.prompts_per_step, train.updates_per_batch
    if prompts % (shards * updates):
        wanted = -(-prompts // (shards * updates)) * shards * updates
        why = (
            f"the {count_text(shards, 'shard')} (mesh.data x mesh.fsdp over all slices) that "
            "prompts are split over"
        )
        if updates > 1:
            why += f", times train.updates_per_batch = {updates}"
        raise ConfigError(
            f"config.train.prompts_per_step = {prompts} is not a multiple of {why}: give "
            f"--config.train.prompts_per_step={wanted}, or a larger mesh.tensor, or run several "
            "seeds side by side on fewer chips each."
        )
    # What divides the step's prompts may still not divide those of a shard.
    per_shard = prompts // shards
    for field, size, whole in (
        # A microbatch is some of one update's prompts, a wave some of all prompts of the step.
        ("train.prompts_per_microbatch", train.prompts_per_microbatch, per_shard // updates),
        ("rollout.prompts_per_wave", config.rollout.prompts_per_wave, per_shard),
    ):
        if size and whole % size:
            raise ConfigError(
                f"config.{field} = {size} must divide the {count_text(whole, 'prompt')} of each of "
                f"the {count_text(shards, 'shard')}: use 0 (all) or one of {_divisors(whole)}."
            )


def check_same_run(
    before: Mapping[str, Any], config: ConfigDict, knows_reference: bool = False
) -> None:
    """Whether a run may resume: only fields in `schema.MAY_CHANGE` may differ.

    Args:
      before: the config that the newest checkpoint was written under, as read from its JSON.
      knows_reference: whether that checkpoint tells which one the reference is, so that its place
        may change.

    Raises:
      ConfigError: another field differs.
    """
    may_change = schema.MAY_CHANGE
    if build_estimator(config).reference and not knows_reference:
        may_change -= {"init_from"}  # the reference is the model that training began with
    if config.optimizer.schedule != "constant":
        may_change -= {"train.steps"}  # where the learning rate ends: it would jump
    # Through JSON as `before` was: tuples are lists, functions their names.
    new = schema.from_json(json.loads(schema.to_json(config)))
    old = schema.from_json(before)
    # A field that the schema has no more is None in the new one.
    for field in sorted(set(old) | set(new)):
        section = field.partition(".")[0]
        if field in may_change or section in may_change:
            continue
        if old.get(field) != new.get(field):
            raise ConfigError(
                f"config.{field} = {new.get(field)!r} differs from the run in --workdir, which "
                f"began with {old.get(field)!r}: use another --workdir, or the old value."
            )


def build_estimator(config: ConfigDict) -> losses.Estimator:
    """The loss that `config.loss` names, for M = rollout.rollouts_per_prompt rollouts.

    Raises:
      ConfigError: unknown name or argument, a value out of range, too few rollouts, a transform
        that reads scores which the estimator does not ask for.
    """
    name = schema.loss_name(config)
    section = {key: value for key, value in config.loss.items() if key != "name"}
    num_rollouts = config.rollout.rollouts_per_prompt
    try:
        label, built = losses.label(name), losses.estimator(name, section)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"config.loss: {error}.") from None
    except BaseException as error:  # a function may raise anything
        let_signals_pass(error)
        raise ConfigError(
            f"config.loss: {losses.label(name)} raised {type(error).__name__}: {summary(error)} "
            f"({last_line(error)})."
        ) from error
    # Annotated rationales: M copies of the same one would only cost time.
    if built.rationale == "annotated" and num_rollouts != 1:
        raise ConfigError(
            f"config.rollout.rollouts_per_prompt = {num_rollouts}: the loss {label!r} trains on "
            "one annotated rationale per prompt; set it to 1."
        )
    if num_rollouts < built.min_rollouts:
        raise ConfigError(
            f"config.rollout.rollouts_per_prompt = {num_rollouts}: the loss {label!r} needs at "
            f"least {built.min_rollouts} rollouts per prompt for its statistics of groups; "
            "raise it."
        )
    _check_transform(built, config.train.prompts_per_step, num_rollouts)
    return built


def reward_scorers(config: ConfigDict, estimator: losses.Estimator) -> tuple[Scorer, ...]:
    """What scores sampled answers in training: `rollout.reward`, or the estimator's own grader.

    Returns:
      Scorers of distinct names; () where the estimator asks for no reward.

    Raises:
      ConfigError: an unknown name, a function that cannot be called, a reward that nothing reads.
    """
    value = config.rollout.reward
    if estimator.reward is None:
        if value != "":
            raise ConfigError(
                f"config.rollout.reward = {value!r} is read by nothing: the loss learns from the "
                "gold answers' probabilities and samples no answers; remove it, or take a loss "
                "with a reward (grpo, rloo, maxrl). evaluation.metrics measures without one."
            )
        return ()
    if isinstance(value, (list, tuple)) and not value:
        raise ConfigError(f"config.rollout.reward = {value!r} names nothing: '' is the loss's own.")
    own = value == ""
    return scorers.read(
        estimator.reward if own else value, "config.loss.reward" if own else "config.rollout.reward"
    )


def evaluation_scorers(config: ConfigDict) -> tuple[Scorer, tuple[Scorer, ...]]:
    """`evaluation.grader` and `evaluation.metrics`.

    Raises:
      ConfigError: an unknown name, a function that cannot be called, several graders.
    """
    graders = scorers.read(config.evaluation.grader, "config.evaluation.grader")
    if len(graders) != 1:
        raise ConfigError(
            f"config.evaluation.grader = {config.evaluation.grader!r} must be one grader: name the "
            "others in evaluation.metrics."
        )
    metrics = scorers.read(config.evaluation.metrics, "config.evaluation.metrics")
    for scorer in (*graders, *metrics):
        if scorer.weight != 1.0:
            raise ConfigError(
                f"config.evaluation: the weight {scorer.weight} of {scorer.name} is read by "
                "nothing, since metrics are not added up: leave it out."
            )
    return graders[0], metrics


def _check_transform(estimator: losses.Estimator, num_prompts: int, num_rollouts: int) -> None:
    """The transform runs on scores [B, M], of which it gets those that the estimator asks for."""
    everything = losses.abstract_scores(num_prompts, num_rollouts)

    def coefficients(measured: losses.Scores) -> losses.Coefficients:
        transform, key = estimator.transform, jax.random.key(0)
        return losses.coefficients(transform, measured, transform.init(everything), key=key)[0]

    # Traced, not run: it takes hundredths of a second, and no device is looked for.
    try:
        jax.eval_shape(coefficients, estimator.measured(everything))
    except ValueError as error:
        raise ConfigError(f"config.loss: {error}.") from error
    except BaseException as error:  # a schedule of q is a function, and may raise anything
        let_signals_pass(error)
        raise ConfigError(
            f"config.loss cannot be traced by JAX ({type(error).__name__}: {summary(error)})."
        ) from error


def _check_plain(value: Any, name: str, depth: int = 0) -> None:
    """config.json can hold it, by which a run is known when it resumes; functions by their name.

    So NumPy's numbers and arrays are none, nor are sets.
    """
    if depth > strict_json.MAX_DEPTH:  # or it holds itself
        raise ConfigError(f"config holds sections or lists in each other {depth} deep.")
    if isinstance(value, (ConfigDict, Mapping)):
        for key in value:
            if not isinstance(key, str):
                raise ConfigError(f"{name} has the key {key!r}: keys must be text.")
            _check_plain(value[key], f"{name}.{key}", depth + 1)
    elif type(value) in (list, tuple):
        for index, each in enumerate(value):
            _check_plain(each, f"{name}[{index}]", depth + 1)
    elif type(value) not in _PLAIN and not callable(value):
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        raise ConfigError(
            f"{name} = {value!r} is of type {kind}, which a config.json cannot hold: "
            "give a number, text, True, False, None, a list or a section of Python's own types."
        )


def _shown(value: Any) -> str:
    """A value on one line; the text of a section has several."""
    return repr(value.to_dict() if isinstance(value, ConfigDict) else value)


def _check_keys(config: ConfigDict, known: ConfigDict, path: str) -> None:
    """Every key of the schema is there, with its type, and no other key is."""
    missing = [key for key in known if key not in config]
    if missing:
        raise ConfigError(f"{path}.{missing[0]} is missing: start from qlog.config.default().")
    for key in config:
        name = f"{path}.{key}"
        if key not in known:
            value = "" if isinstance(config[key], ConfigDict) else f" = {config[key]!r}"
            raise ConfigError(f"{name}{value} is read by nothing{closest(key, known)}.")
        if key in CHOICES or key in schema.FUNCTIONS:
            continue  # checked by what was chosen there
        if isinstance(known[key], ConfigDict):
            if not isinstance(config[key], ConfigDict):
                raise ConfigError(f"{name} = {config[key]!r} must be a section of settings.")
            _check_keys(config[key], known[key], name)
            continue
        wanted, value = type(known[key]), config[key]
        if wanted is float and type(value) is int:
            continue
        if isinstance(value, ConfigDict):  # its text has several lines
            raise ConfigError(f"{name} must be of type {wanted.__name__}, not a section.")
        if type(value) is not wanted:  # isinstance would take True for an int
            raise ConfigError(f"{name} = {value!r} must be of type {wanted.__name__}.")


def _check_trackers(config: ConfigDict) -> None:
    project = config.logging.wandb
    if not project:
        return
    # What W&B's server refuses in a name, told before anything compiles.
    parts = project.split("/")
    if len(parts) > 2 or not all(parts) or re.search(r"[\\#?%:\s]", project):
        raise ConfigError(
            f"config.logging.wandb = {project!r} must be a project, or an entity and its project: "
            "'PROJECT' or 'ENTITY/PROJECT', without spaces or any of \\ # ? % :."
        )
    if not wandb_is_installed():
        raise ConfigError(
            f"config.logging.wandb = {project!r} needs the package wandb: "
            "pip install 'qlog[wandb]', or leave it ''."
        )


def wandb_is_installed() -> bool:
    """Whether the package is there. Not by importing it, nor by a folder of its name."""
    try:
        importlib.metadata.version("wandb")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _check_architecture(config: ConfigDict) -> None:
    if not isinstance(config.architecture, ConfigDict):
        raise ConfigError(
            f"config.architecture = {config.architecture!r} must be a section of the fields of a "
            "decoder: {} is the model's own."
        )
    known = typing.get_type_hints(models.DecoderConfig)
    for key in config.architecture:
        if key not in known:
            raise ConfigError(
                f"config.architecture.{key} = {_shown(config.architecture[key])} is read by "
                f"nothing: a decoder has {', '.join(sorted(known))}."
            )
        value = config.architecture[key]
        options = typing.get_args(known[key]) or (known[key],)
        if typing.get_origin(known[key]) is tuple:
            options = (tuple,)
        if not any(_is_of_kind(key, value, option) for option in options):
            words = " or ".join(_kind_text(key, option) for option in options)
            raise ConfigError(f"config.architecture.{key} = {_shown(value)} must be {words}.")


# Types of a decoder's fields, in words.
_KINDS = {
    bool: "True or False",
    str: "text",
    tuple: "a list of them",
    types.NoneType: "None",
}


def _kind_text(field: str, kind: Any) -> str:
    """The type of a decoder's field, for "... must be"."""
    if kind in (int, float):
        return (limits.size_text if kind is int else limits.number_text)(field)
    return _KINDS.get(kind, "a section of settings")


def _is_of_kind(field: str, value: Any, kind: Any) -> bool:
    """Whether a value can be that of a field; whether it makes sense, the decoder checks."""
    if kind in (int, float):
        return (limits.is_size if kind is int else limits.is_number)(value, field)
    if kind is tuple:
        return isinstance(value, (list, tuple))
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):  # RopeScaling
        return isinstance(value, (Mapping, ConfigDict, kind))
    return type(value) is kind


def _check_tokenizer(config: ConfigDict) -> None:
    """What can be said about the tokenizer's fields without its files."""
    # Not above, as in `_check_data`.
    from qlog.data.chat_templates import BUILT_IN_NAME

    section = config.tokenizer
    for name in section.eos:
        if not isinstance(name, str) or not name:
            raise ConfigError(
                f"config.tokenizer.eos = {section.eos!r} must hold names of control tokens."
            )
    template, arguments = section.chat_template, section.chat_template_kwargs
    if template not in ("", BUILT_IN_NAME) and not template.endswith(".jinja"):
        raise ConfigError(
            f"config.tokenizer.chat_template = {template!r} must be the path of a .jinja file, "
            f"{BUILT_IN_NAME!r}, or '' for the model's own template"
            f"{closest(template, (BUILT_IN_NAME,))}."
        )
    if not isinstance(arguments, ConfigDict):
        raise ConfigError(
            f"config.tokenizer.chat_template_kwargs = {arguments!r} must be a section of variables."
        )
    for key, value in arguments.items():
        if template == BUILT_IN_NAME:
            raise ConfigError(
                f"config.tokenizer.chat_template_kwargs.{key} = {_shown(value)} is not read by a "
                "built-in template: remove it."
            )
        try:
            json.dumps(value, default=dict)  # a ConfigDict in a list, say
        except (TypeError, ValueError):
            raise ConfigError(
                f"config.tokenizer.chat_template_kwargs.{key} = {_shown(value)} must be text, "
                "numbers, lists or sections of these, as a template reads them."
            ) from None
    if config.data.style == "warm":
        return
    given = {f"chat_template_kwargs.{key}": value for key, value in arguments.items()}
    for key, value in {**({"chat_template": template} if template else {}), **given}.items():
        raise ConfigError(
            f"config.tokenizer.{key} = {_shown(value)} is read only by the warm style: set "
            "config.data.style = 'warm', or remove it."
        )


def _check_data(config: ConfigDict) -> None:
    """The data exist, as far as no file has to be read, and every key that is set is read."""
    # Not above: tokenizers and grain take a second, and config files need only the schema.
    from qlog.data import find_corpus, label, splits

    corpus = find_corpus(config.data.to_dict())
    # A function may know others.
    if not callable(config.data.name) and config.evaluation.split not in splits.NAMES:
        raise ConfigError(
            f"config.evaluation.split = {config.evaluation.split!r} is unknown: use one of "
            f"{', '.join(splits.NAMES)}{closest(config.evaluation.split, splits.NAMES)}."
        )
    if config.data.description and config.data.style != "warm":
        raise ConfigError(
            f"config.data.description = {config.data.description!r} is read only by the warm "
            "style: set config.data.style = 'warm', or remove it."
        )
    if corpus.tokenizer is None:
        return
    for key in ("path", "eos", "chat_template", "chat_template_kwargs"):
        value = config.tokenizer[key]
        if value:
            raise ConfigError(
                f"config.tokenizer.{key} = {_shown(value)} is not read by "
                f"{label(config.data.name)!r}, which brings its own tokenizer: remove it."
            )


def _check_slices(config: ConfigDict) -> None:
    """What a step is cut into divides it: updates its prompts, microbatches a prompt's rollouts."""
    rollout, train = config.rollout, config.train
    if train.prompts_per_step % train.updates_per_batch:
        raise ConfigError(
            f"config.train.updates_per_batch = {train.updates_per_batch} must divide "
            f"train.prompts_per_step = {train.prompts_per_step}."
        )
    whole, part = rollout.rollouts_per_prompt, train.rollouts_per_microbatch
    if part and whole % part:
        raise ConfigError(
            f"config.train.rollouts_per_microbatch = {part} must divide {whole}: use 0 (all) or "
            f"one of {_divisors(whole)}."
        )


def _divisors(whole: int) -> str:
    return ", ".join(str(d) for d in range(1, whole + 1) if whole % d == 0)
