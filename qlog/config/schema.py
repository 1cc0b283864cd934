"""The schema of a run's config: every field, and everything that is known about it.

This file is the reference page. `python -m qlog.main --help-config` prints it, with the values of a
config. A config file starts from `default()` and changes values.

Defaults, types, ranges, words, and what a run may change when it resumes all come from `GROUPS`:
there is no second list. A new field is one `Field` here. What takes more than a range or a word to
check is checked in config/check.py.

Some sections (`loss`, `data.world`) have the arguments of what was chosen there as their keys, and
no others: a key that nothing reads is an error.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference

from qlog.errors import ConfigError

# Not above, and inside functions below: `qlog.losses` imports JAX, which takes most of a second,
# and `--help` reads this file.
if TYPE_CHECKING:
    from qlog import losses

# ---- What is known about a field ----


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of the config.

    Attributes:
      default: its value, whose type all values have to have; or a function that makes it.
      meaning: for users, in sentences.
      unit: what a number counts or measures, such as tokens; '' where the meaning says it.
      range: the least and the greatest value of a number; None of what is no number.
      choices: the words that the field takes, each with its meaning; {} where any text goes.
      keys: of a section whose keys are not fields of this schema: what they are. '' of any other.
      is_function: whether the value may be a function, or a list of functions, in the place of a
        name; what reads the value checks it.
      may_change: whether a run that resumes may have another value. It may where no step computes
        other numbers by it.
    """

    default: Any
    meaning: str
    unit: str = ""
    range: tuple[float, float] | None = None
    choices: Mapping[str, str] = dataclasses.field(default_factory=dict)
    keys: str = ""
    is_function: bool = False
    may_change: bool = False


@dataclasses.dataclass(frozen=True)
class Section:
    """Fields that belong together: `config.train` is one, `config.train.steps` a field of it.

    Attributes:
      meaning: for users, in sentences.
      fields: by their names.
      may_change: whether all its fields may change when a run resumes.
    """

    meaning: str
    fields: Mapping[str, "Field | Section"]
    may_change: bool = False


# Greatest values where a number has no natural end: more than any run needs. So a slip of the hand
# is told in a sentence, and not by an hour of allocation.
_MANY = 10**9  # steps, questions
_LONG = 2**24  # tokens
_BATCH = 2**20  # prompts, rollouts
_DURATION = 10.0**9  # seconds, minutes, median steps
_BELOW_ONE = 1 - 2**-24  # float32 rounds what is nearer to 1

_ERROR_OR_SKIP = {"error": "the run does not start", "skip": "they are left out, and counted"}

# ---- The fields ----

# Headline -> what stands under it, by name.
GROUPS: dict[str, dict[str, Field | Section]] = {
    "Model": {
        "seed": Field(
            0,
            "The order of the data, the keys of sampling and random weights come from it.",
            # Keys are made of 32 bits: a larger one would be that of a smaller one.
            range=(0, 2**32 - 1),
        ),
        "model": Field(
            "qwen3_0p6b",
            "The shape of the decoder: a preset of qlog.models, a Hugging Face folder (gs:// and "
            "s3:// too), or a Hub id.",
            may_change=True,  # what was read there is compared by content: `contents.identity`
        ),
        "architecture": Field(
            {},
            "What differs from the shape of the model.",
            keys="fields of models.DecoderConfig",
            may_change=True,
        ),
        "weights": Field(
            "random",
            "Where parameters are from: 'random', or a folder or Hub id as in model. Hub ids are "
            "looked for in the folder QLOG_ASSETS first.",
            may_change=True,
        ),
        "init_from": Field(
            "",
            "Another run's workdir, or one of its checkpoints: training starts from its "
            "parameters. '' starts from weights.",
            # A resumed run has its parameters from its checkpoint. With a reference (a KL term) it
            # must stay: `check_same_run` sees to that.
            may_change=True,
        ),
        "attention": Field(
            "auto",
            "Which kernels compute attention.",
            choices={
                "auto": "by device",
                "blocks": "plain JAX, on any device",
                "tpu": "Pallas kernels",
                "cudnn": "for CUDA GPUs",
            },
            may_change=True,
        ),
        "dtype": Field(
            "bfloat16",
            "The type of activations and caches; parameters are float32.",
            choices={"float32": "as parameters are", "bfloat16": "half the memory of float32"},
        ),
        "tokenizer": Section(
            "How text becomes tokens. Synthetic tasks bring their own tokenizer.",
            {
                "path": Field(
                    "",
                    "Folder, file or Hub id; '' takes the tokenizer next to weights or model.",
                    may_change=True,
                ),
                "think_start": Field("<think>", "The piece that opens a rationale."),
                "think_end": Field("</think>", "The piece that closes a rationale."),
                "eos": Field(
                    (),
                    "Control tokens that end an answer; the first of them closes gold answers. () "
                    "takes those of the known families. Those of tokenizer_config.json and "
                    "generation_config.json end an answer as well. As a flag: NAME,NAME.",
                ),
                "chat_template": Field(
                    "",
                    "The template of prompts in the warm style: the path of a .jinja file, or "
                    "'builtin'; '' takes the model's own, or a built-in one where it has none.",
                    may_change=True,
                ),
                "chat_template_kwargs": Field(
                    {},
                    "Variables for the chat template, such as Llama 3's date_string.",
                    keys="variables of the template",
                ),
            },
        ),
    },
    "Data": {
        "data": Section(
            "What is asked, and how it is written.",
            {
                "name": Field(
                    "hotpotqa",
                    "finqa, hotpotqa, musique, jsonl, parquet, multihop or multihop_text; or a "
                    "function, which takes the name of a split and returns its examples.",
                    is_function=True,
                ),
                "files": Field(
                    {},
                    "Where the records of train, validation and test are: for each a path, a "
                    "folder, a glob, or a list of them.",
                    keys="train, validation, test",
                    may_change=True,
                ),
                "fields": Field(
                    {},
                    "Which key of a record is which part of an example; a part that is not named "
                    "has the key of its name. A source may be a list of keys, or a text with keys "
                    "in braces; dots lead into objects and lists (qlog/data/README.md).",
                    keys="id, source, answer, aliases, rationale",
                ),
                "description": Field(
                    "", "The text that the warm style opens with; '' is the dataset's own."
                ),
                "manual_dir": Field(
                    "",
                    "Folder with the official raw files; '' takes those in QLOG_ASSETS, or "
                    "downloads them.",
                    may_change=True,
                ),
                "data_dir": Field(
                    "",
                    "Folder of the prepared data; one in a bucket is only read. '' is a cache "
                    "folder.",
                    may_change=True,
                ),
                "style": Field(
                    "cold",
                    "How a prompt is written.",
                    choices={
                        "warm": "instructions, and the model's chat template",
                        "cold": "only the input",
                    },
                ),
                "max_prompt_tokens": Field(
                    2048,
                    "A longer prompt is an error, or skipped: see data.overlong.",
                    unit="tokens",
                    range=(2, _LONG),
                ),
                "overlong": Field(
                    "error",
                    "What becomes of examples that are longer than their limits.",
                    choices=_ERROR_OR_SKIP,
                ),
                "invalid": Field(
                    "error",
                    "What becomes of records that cannot be used (no answer, not JSON, an id "
                    "twice).",
                    choices=_ERROR_OR_SKIP,
                ),
                "world": Field(
                    {},
                    "The sizes of a synthetic task's worlds.",
                    keys="fields of data.synthetic.World",
                ),
            },
        )
    },
    "Rollouts": {
        "rollout": Section(
            "What is sampled in training: M rollouts per prompt, each a rationale and an answer.",
            {
                "rollouts_per_prompt": Field(
                    32, "M, the size of a prompt's group.", unit="rollouts", range=(1, _BATCH)
                ),
                "rationale_budget": Field(
                    2944,
                    "A rationale that is as long is cut off: the thinking-end token is forced.",
                    unit="tokens",
                    range=(0, _LONG),
                ),
                "answer_reserve": Field(
                    128,
                    "Room that is kept for the answer behind a rationale, sampled or gold.",
                    unit="tokens",
                    range=(1, _LONG),
                ),
                "temperature": Field(
                    1.0,
                    "The temperature of the distribution that is sampled, and that the gradient is "
                    "about.",
                    range=(1e-3, 1e3),
                ),
                "prompts_per_wave": Field(
                    0,
                    "How many prompts of a shard fit into memory with all their rollouts at their "
                    "longest, which bounds what decoding takes; 0 is all.",
                    unit="prompts",
                    range=(0, _BATCH),
                    may_change=True,
                ),
                "cache": Field(
                    "auto",
                    "How keys and values of prompts and rollouts are kept while they are decoded "
                    "and scored (qlog/rollouts/README.md).",
                    choices={
                        "auto": "as dtype",
                        "int8": "in about half the memory of bfloat16, with a scale per token and "
                        "head, which rounds log-probabilities",
                    },
                ),
                "closing_text": Field(
                    "", "A text that is written before a thinking-end token that is forced."
                ),
                "reward": Field(
                    "",
                    "What a sampled answer is worth, for losses that ask for a reward: the name of "
                    "a grader, a function (qlog/grading/README.md), or a list of these or of (one, "
                    "weight), which are added. '' is the loss's own reward.",
                    is_function=True,
                ),
                "reward_threads": Field(
                    32,
                    "How many answers are scored at a time, in training and evaluation; 1 for "
                    "functions that only the main thread may call.",
                    unit="threads",
                    range=(1, 1024),
                    may_change=True,
                ),
            },
        )
    },
    "Learning": {
        "loss": Field(
            lambda: loss("garl", q=0.75),
            "What is learned: loss.name is a recipe of qlog.losses, a losses.Recipe, or a function "
            "that returns an Estimator; the other keys are its arguments.",
            keys="arguments of the loss",
        ),
        "optimizer": Section(
            "AdamW, with warm-up and a limit on the gradient's norm.",
            {
                "learning_rate": Field(1e-6, "The highest learning rate.", range=(0, 1e3)),
                "warmup_steps": Field(
                    10,
                    "How long the learning rate rises, from 0.",
                    unit="steps",
                    range=(0, _MANY),
                ),
                "schedule": Field(
                    "constant",
                    "The learning rate after the warm-up.",
                    choices={
                        "constant": "it stays",
                        "cosine": "it falls to 0 along a cosine",
                        "linear": "it falls to 0 along a line",
                    },
                ),
                "b1": Field(0.9, "AdamW's decay of the mean.", range=(0, _BELOW_ONE)),
                "b2": Field(0.999, "AdamW's decay of the mean square.", range=(0, _BELOW_ONE)),
                "eps": Field(1e-8, "What is added to AdamW's divisor.", range=(0, 1.0)),
                "weight_decay": Field(
                    0.0,
                    "How much of the weights AdamW takes away, times the learning rate.",
                    range=(0, 1e3),
                ),
                "max_grad_norm": Field(
                    1.0,
                    "A gradient with a larger norm is scaled down to it.",
                    range=(1e-12, 1e30),
                ),
                "max_skipped_in_a_row": Field(
                    10,
                    "A gradient that is not finite is skipped; so many in a row stop the run.",
                    unit="steps",
                    range=(1, _MANY),
                    may_change=True,
                ),
            },
        ),
        "train": Section(
            "The steps of training, and how they fit into memory.",
            {
                "steps": Field(
                    500,
                    "How long the run is. With a schedule of the learning rate other than constant "
                    "it must stay.",
                    unit="steps",
                    range=(1, _MANY),
                    may_change=True,
                ),
                "prompts_per_step": Field(
                    32, "B: from how many prompts a step learns.", unit="prompts", range=(1, _BATCH)
                ),
                "updates_per_batch": Field(
                    1,
                    "Optimizer steps per batch of rollouts, each on another part of it.",
                    unit="updates",
                    range=(1, _BATCH),
                ),
                "prompts_per_microbatch": Field(
                    0,
                    "How many prompts of a shard are in memory at a time; 0 is all.",
                    unit="prompts",
                    range=(0, _BATCH),
                    may_change=True,
                ),
                "rollouts_per_microbatch": Field(
                    0,
                    "How many rollouts of a prompt are in memory at a time, at most, if they are "
                    "of full length (shorter ones are packed together); 0 is all.",
                    unit="rollouts",
                    range=(0, _BATCH),
                    may_change=True,
                ),
                "remat": Field(
                    "full",
                    "What the backward pass computes again instead of keeping it, from most memory "
                    "to least.",
                    choices={
                        "none": "nothing",
                        "dots": "all but attention and matrix products",
                        "attention": "all but attention",
                        "full": "whole layers",
                    },
                    may_change=True,
                ),
                "max_mismatch": Field(
                    0.05,
                    "The run stops where mean |sampler - learner log_prob| exceeds it; 0 is never. "
                    "Measured with the quickstart's model on a CPU: at most 0.005 in bfloat16, at "
                    "most 0.004 on int8 caches, and 0.95 when prompts went to the wrong processes.",
                    unit="nats per token",
                    range=(0, 1e3),
                    may_change=True,
                ),
                "terms_every": Field(
                    0,
                    "Steps from one measurement of the gradient's two terms, score and pathwise, "
                    "to the next. Each costs a second backward pass. 0 is never.",
                    unit="steps",
                    range=(0, _MANY),
                    may_change=True,
                ),
                "rollouts_every": Field(
                    10,
                    "Steps from one writing of rollouts to disk to the next.",
                    unit="steps",
                    range=(1, _MANY),
                    may_change=True,
                ),
                "rollouts_prompts": Field(
                    2,
                    "How many prompts' rollouts are written.",
                    unit="prompts",
                    range=(0, _BATCH),
                    may_change=True,
                ),
            },
        ),
    },
    "Evaluation, and what is kept": {
        "evaluation": Section(
            "Questions that are answered several times and graded: p@1, p@k, m@k.",
            {
                "every": Field(
                    50,
                    "Steps from one evaluation to the next; the last step has one, too. 0 is "
                    "never.",
                    unit="steps",
                    range=(0, _MANY),
                ),
                "split": Field(
                    "validation", "The split that is evaluated, and that chooses the best step."
                ),
                "final": Field(
                    "",
                    "What happens when the run ends.",
                    choices={
                        "": "nothing",
                        "test": "its best checkpoint (the highest m@k on evaluation.split; the "
                        "last one, if none was evaluated) is evaluated on the test split, into "
                        "WORKDIR/final.json",
                    },
                ),
                "prompts": Field(
                    0,
                    "How many questions, at most; 0 is the whole split.",
                    unit="questions",
                    range=(0, _MANY),
                ),
                "prompts_per_batch": Field(
                    32,
                    "How many questions of a shard are sampled at a time.",
                    unit="questions",
                    range=(1, _BATCH),
                ),
                "rollouts_per_prompt": Field(
                    16, "k: answers to each question.", unit="answers", range=(1, _BATCH)
                ),
                "temperature": Field(
                    1.0,
                    "The temperature of the answers; 0 always takes the most probable token.",
                    range=(0, 1e3),
                ),
                # Not for training: the gradient is about the whole distribution, so rollouts are
                # drawn from it.
                "top_k": Field(
                    0,
                    "Only so many most probable tokens are sampled; 0 is all.",
                    unit="tokens",
                    range=(0, 2**31 - 1),
                ),
                "top_p": Field(
                    1.0,
                    "Only the most probable tokens that have this probability together are "
                    "sampled.",
                    range=(1e-6, 1.0),
                ),
                "without_rationale": Field(
                    False, "Whether to evaluate a second time, with a rationale budget of 0."
                ),
                "grader": Field(
                    "contains",
                    "Which answers are right: a grader's name or a function, as rollout.reward.",
                    is_function=True,
                ),
                "metrics": Field(
                    (),
                    "Scores of answers whose means are reported besides: a list as rollout.reward.",
                    is_function=True,
                ),
            },
            may_change=True,
        ),
        "checkpoint": Section(
            "Checkpoints: a run resumes from them, and evaluation and export read them.",
            {
                "every": Field(
                    50,
                    "Steps from one checkpoint to the next; the last step has one, too.",
                    unit="steps",
                    range=(1, _MANY),
                ),
                "minutes": Field(
                    10.0,
                    "Minutes from one checkpoint to the next, if that is sooner; 0 counts only "
                    "steps.",
                    unit="minutes",
                    range=(0, _DURATION),
                ),
                "keep": Field(
                    2,
                    "How many of the newest are kept, next to the best one by m@k.",
                    unit="checkpoints",
                    range=(1, _MANY),
                ),
                "finished": Field(
                    "all",
                    "What a finished run keeps.",
                    choices={
                        "all": "what it had",
                        "best_params": "the parameters of the best checkpoint, without the state "
                        "of the optimizer",
                    },
                ),
            },
            may_change=True,
        ),
        "logging": Section(
            "Where metrics go next to metrics.jsonl and TensorBoard.",
            {
                "wandb": Field(
                    "",
                    "Weights & Biases: 'project' or 'entity/project'; '' is off. Needs the extra "
                    "wandb; WANDB_MODE=offline works.",
                ),
            },
            may_change=True,
        ),
        "watchdog": Section(
            "A run in which nothing happens ends with status 75: the launcher starts it again.",
            {
                "steps": Field(
                    10.0,
                    "How long it waits for a sign of life, in median steps; 0 waits without end.",
                    unit="steps",
                    range=(0, _DURATION),
                ),
                "seconds": Field(
                    600.0, "But it waits at least so long.", unit="seconds", range=(1, _DURATION)
                ),
                "first_seconds": Field(
                    7200.0,
                    "How long it waits until the third step is done: programs compile.",
                    unit="seconds",
                    range=(0, _DURATION),
                ),
            },
            may_change=True,
        ),
        "profile": Section(
            "What is traced for a profiler.",
            {
                "steps": Field(
                    (), "Steps, from 1, that are traced into WORKDIR/profile. As a flag: 12,13."
                ),
            },
            may_change=True,
        ),
    },
    "Devices": {
        "mesh": Section(
            "The devices of one slice (of TPUs; a node of GPUs) by axis; -1 is the rest. Each "
            "slice has a replica of the parameters. Prompts are split over slices x data x fsdp "
            "shards.",
            {
                "data": Field(-1, "Replicas of the parameters.", unit="devices", range=(-1, 2**20)),
                "fsdp": Field(
                    1,
                    "Devices that share the parameters, and gather them for each layer.",
                    unit="devices",
                    range=(-1, 2**20),
                ),
                "tensor": Field(
                    1,
                    "Devices that share heads, MLP units and the vocabulary.",
                    unit="devices",
                    range=(-1, 2**20),
                ),
                "slices": Field(
                    0,
                    "0 takes them as they are, 1 takes all devices as one slice.",
                    unit="slices",
                    range=(0, 2**20),
                ),
            },
            may_change=True,
        ),
    },
    "Several runs": {
        "runs": Field(
            {},
            "Several runs in one command, one after the other: the name of each, and what differs "
            "in it from this config.",
            keys="names of runs",
            may_change=True,
        ),
    },
}


# ---- What follows from the fields ----


def walk(
    entries: Mapping[str, Field | Section], prefix: str = "", may_change: bool = False
) -> Iterator[tuple[str, Field | Section]]:
    """(dotted path, entry) of all sections and fields; what a section says, its fields say, too."""
    for name, entry in entries.items():
        entry = dataclasses.replace(entry, may_change=entry.may_change or may_change)
        yield prefix + name, entry
        if isinstance(entry, Section):
            yield from walk(entry.fields, f"{prefix}{name}.", entry.may_change)


ENTRIES: dict[str, Field | Section] = {
    path: entry for group in GROUPS.values() for path, entry in walk(group)
}
FIELDS: dict[str, Field] = {
    path: entry for path, entry in ENTRIES.items() if isinstance(entry, Field)
}
# Fields and whole sections, by path, that a resumed run may change; all others must stay. A section
# stands for the fields that it had in older versions, too.
MAY_CHANGE = frozenset(path for path, entry in ENTRIES.items() if entry.may_change)
# The last part of the path of each section whose keys are the arguments of what was chosen there;
# the reader of each checks them.
CHOICES = tuple(path.split(".")[-1] for path, field in FIELDS.items() if field.keys)
# The last part of the path of each field whose value may be a function. (loss.name is an argument
# of the loss, and called as data.name is.)
FUNCTIONS = frozenset(path.split(".")[-1] for path, field in FIELDS.items() if field.is_function)


def default() -> ConfigDict:
    """Every field of a run with its default. Lengths are in tokens."""
    return _open(
        _defaults({name: each for group in GROUPS.values() for name, each in group.items()})
    )


def _defaults(entries: Mapping[str, Field | Section]) -> dict[str, Any]:
    """The defaults of fields and of sections, by name."""
    found: dict[str, Any] = {}
    for name, entry in entries.items():
        if isinstance(entry, Section):
            found[name] = _defaults(entry.fields)
        else:
            found[name] = entry.default() if callable(entry.default) else entry.default
    return found


def loss(name: "losses.Loss", /, **arguments: Any) -> ConfigDict:
    """The `loss` section: a loss and all its arguments, those given and the defaults.

    Args:
      name: a recipe's name, a `losses.Recipe`, or a function that returns a `losses.Estimator`.

    Raises:
      ConfigError: an unknown name, or a function without one.
    """
    from qlog import losses

    try:
        known = losses.arguments(name)
    except ValueError as error:
        raise ConfigError(f"config.loss: {error}.") from None
    return ConfigDict({"name": name, **known, **arguments}, convert_dict=False)


def merge(config: ConfigDict, changes: Mapping[str, Any] | ConfigDict) -> ConfigDict:
    """A copy of `config` with nested `changes`. The sections in CHOICES are replaced whole."""
    merged = config.to_dict()
    for key, value in changes.items():
        both = isinstance(value, (Mapping, ConfigDict)) and isinstance(config.get(key), ConfigDict)
        if both and key not in CHOICES:
            merged[key] = merge(config[key], value)
        else:
            merged[key] = value
    return _open(merged)


def several(config: ConfigDict) -> dict[str, ConfigDict]:
    """The whole config of each run of `config.runs`, by its name; {} of a config of one run.

    Raises:
      ConfigError: an entry that is no section, or that has runs of its own; a name that cannot be
        that of a folder.
    """
    runs = {}
    if not isinstance(config.runs, (Mapping, ConfigDict)):
        raise ConfigError(f"config.runs = {config.runs!r} must be a section of runs.")
    for name, changes in config.runs.items():
        if not re.fullmatch(r"[\w-][\w.+-]*", str(name)):
            raise ConfigError(f"config.runs has the name {name!r}: it must be that of a folder.")
        if not isinstance(changes, (Mapping, ConfigDict)):
            raise ConfigError(
                f"config.runs.{name} = {changes!r} must be a section: what differs in this run."
            )
        if "runs" in changes:
            raise ConfigError(f"config.runs.{name}.runs is read by nothing: runs hold no runs.")
        runs[name] = merge(config, {**changes, "runs": {}})
    return runs


def loss_name(config: ConfigDict) -> str | Callable:
    """What `config.loss` names: a recipe's name, a Recipe, or a function.

    Raises:
      ConfigError: the section has no name.
    """
    if not isinstance(config.loss, ConfigDict) or "name" not in config.loss:
        value = config.loss.to_dict() if isinstance(config.loss, ConfigDict) else config.loss
        raise ConfigError(
            f"config.loss = {value!r} has no name: write qlog.config.loss(NAME, ...)."
        )
    if isinstance(config.loss.name, ConfigDict):
        raise ConfigError(
            f"config.loss.name = {config.loss.name.to_dict()!r} must be a name or a function."
        )
    return config.loss.name


def _open(tree: Mapping[str, Any]) -> ConfigDict:
    """A ConfigDict that lets keys in FUNCTIONS change their type; it would refuse otherwise."""
    config = ConfigDict(tree)
    for key in config:
        if isinstance(config[key], ConfigDict) and key not in CHOICES:
            config[key] = _open(config[key])
        elif key in FUNCTIONS:
            config[key] = FieldReference(config[key], field_type=object)
    return config


def fields(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Every field by its dotted path ('train.steps'). A section in CHOICES counts as one field."""
    found = {}
    for key, value in config.items():
        if isinstance(value, (Mapping, ConfigDict)) and key not in CHOICES:
            found |= fields(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def to_json(config: ConfigDict) -> str:
    """The resolved config, sorted and indented; functions by their name."""
    from qlog import losses

    def plain(value: Any) -> Any:
        if isinstance(value, losses.Recipe):
            return losses.label(value)
        # Without its module: that of a config file is called by how the file was loaded.
        if callable(value):
            return getattr(value, "__qualname__", None) or value.__name__
        return list(value)

    return json.dumps(config.to_dict(), indent=2, sort_keys=True, default=plain)


def from_json(written: Mapping[str, Any]) -> dict[str, Any]:
    """Every field of a config.json that was read, by its dotted path.

    What an older version wrote lacks fields, and arguments of its loss. It had what is their
    default now.
    """
    from qlog import losses

    found = fields(json.loads(to_json(default()))) | fields(written)
    section = dict(found["loss"])
    try:
        usual = losses.arguments(str(section.get("name")))
    except ValueError:  # a function or an object, of which it has the text only
        usual = {}
    return found | {"loss": json.loads(json.dumps(usual)) | section}
