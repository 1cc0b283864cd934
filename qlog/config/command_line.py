"""Every field of a config is a flag: `--config=FILE --config.loss.max_coefficient=5`.

The config file is read by ml_collections' `config_flags`. Its own overrides reach only keys that
the file has set, and take their type from the value there, so they know neither None nor the keys
of an empty section. Here a value takes its type from where the key is read: the schema's default,
the recipe's signature, `DecoderConfig`, `World`. A key that nothing describes takes a Python or
JSON literal, else the text itself.

Flags are applied after the file and its variants, the name of the loss first and the others in
their order: of two for one field the last one wins. Those of `config.runs` come after all others,
since an entry changes the config that they make.
"""

import ast
import contextlib
import dataclasses
import itertools
import json
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from qlog.config import schema
from qlog.errors import (
    QLOG_ERRORS,
    ConfigError,
    ctrl_c_stays,
    let_signals_pass,
    summary,
)

_NAME = "config"
_SETTING = re.compile(rf"--?(no)?{_NAME}\.([^=]+)(?:=(.*))?", re.DOTALL)
_BOOLS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
_WORDS = {"true": True, "false": False, "null": None}  # as JSON spells them
_NO_VALUE = object()


class Setting(NamedTuple):
    """One flag that sets one field."""

    flag: str  # as it was given, for messages
    path: tuple[str, ...]  # ("train", "steps")
    text: str


# ---- The flag, and reading a command line ----


def define(
    help_text: str = "Config file, with variants after a colon.",
    values: flags.FlagValues = flags.FLAGS,
) -> flags.FlagHolder:
    """Defines --config. `parse` with the same `values` then reads it and all --config.x=y."""
    # With an empty command line of its own, config_flags looks for no overrides: they are ours.
    return config_flags.DEFINE_config_file(_NAME, None, help_text, flag_values=values, sys_argv=[])


def parse(
    argv: Sequence[str], values: flags.FlagValues = flags.FLAGS, known_only: bool = False
) -> list[str]:
    """Reads a command line: the flags of `values`, and the settings of its --config.

    Args:
      argv: the program's name first.
      known_only: whether flags that `values` does not have are left over, instead of an error.

    Returns:
      The program's name, and what is left besides flags.

    Raises:
      ConfigError: a field that does not exist, a value of another type, or a config file that
        raises.
      flags.Error, OSError: another flag is wrong, or the config file cannot be read.
    """
    program, *words = argv
    for word in words:
        # Libraries below fail on such a name in the middle of a run.
        if not word.isprintable() and any("\ud800" <= c <= "\udfff" for c in word):
            raise ConfigError(f"{word!r} on the command line is not UTF-8: rename the file.")
    _, *words = with_flag_files(argv, values)
    words, settings = split(words)
    named = _named(words)
    file = named.partition(":")[0]
    if file and not os.path.isfile(file):
        folder = os.path.dirname(file) or "."
        there = os.listdir(folder) if os.path.isdir(folder) else []
        raise ConfigError(
            f"--config={named}: {file} is not a file"
            f"{_suggestion(os.path.basename(file), there)}: name a config file, such as "
            "configs/quickstart.py, from the current folder on."
        )
    _let_it_import_its_neighbours(file)
    try:
        with ctrl_c_stays():  # a config file may import JAX
            rest = values([program, *words], known_only=known_only)
            config = values[_NAME].value
            getattr(config, "seed", None)  # a file that did not load raises when it is first used
    except BaseException as error:  # a config file is Python: it may raise anything
        let_signals_pass(error)
        raised, place = _raised_by(file, error)
        if raised is None:
            if isinstance(error, OSError | flags.Error):
                raise _told(error, named, values) from None
            if not isinstance(error, Exception):  # --help ends the process, too
                raise
            raised = error  # of a file that cannot be read as Python: the message says where
        if isinstance(raised, QLOG_ERRORS):
            raise raised from None
        if isinstance(raised, SystemExit):
            raise ConfigError(
                f"--config={named} called sys.exit({raised.code!r}) in line "
                f"{place.rpartition(':')[2]}: a config file has to return a config."
            ) from error
        raise ConfigError(
            f"--config={named} raised {type(raised).__name__}: {summary(raised)}"
            f"{place and f' ({place})'}."
        ) from error
    if config is None and not values[_NAME].present:
        if settings:
            raise ConfigError(f"{settings[0].flag} needs --config=FILE, the config that it changes")
        return rest
    if not isinstance(config, ConfigDict):
        raise _no_config(values)
    apply(config, settings)
    return rest


def _raised_by(file: str, error: BaseException) -> tuple[BaseException | None, str]:
    """What a config file raised, and where ("mine.py:12"); (None, '') where it raised nothing.

    config_flags and absl put exceptions of their own around those of a file.
    """
    folder, each, seen = os.path.dirname(os.path.abspath(file)), error, set()
    while each is not None and id(each) not in seen:
        frames = traceback.extract_tb(each.__traceback__)
        names = [os.path.abspath(frame.filename) for frame in frames]
        if os.path.abspath(file) in names:
            # The last line of the file, or of a module next to it; libraries may be further in.
            last = max(i for i, name in enumerate(names) if os.path.dirname(name) == folder)
            return each, f"{os.path.basename(names[last])}:{frames[last].lineno}"
        seen.add(id(each))
        each = each.__cause__ or each.__context__
    return None, ""


def _told(error: OSError | flags.Error, named: str, values: flags.FlagValues) -> Exception:
    """A wrong flag, or what config_flags makes of a config file that it cannot load or call."""
    text = str(error)
    if isinstance(error, OSError) and values[_NAME].present:
        # The last line is that of the first exception, whose traceback is lost.
        return ConfigError(
            f"--config={named} could not be loaded: {text.splitlines()[-1].strip()}."
        )
    if "takes 0 positional arguments" in text:
        return ConfigError(
            f"--config={named}: this config file has no variants: leave out what stands behind "
            "the colon, or give its get_config a parameter."
        )
    if "get_config() missing 1 required" in text:
        return ConfigError(
            f"--config={named}: this config file needs a variant behind a colon: name one, or give "
            "the parameter of its get_config a default."
        )
    if values[_NAME].present and values[_NAME].value is None:
        return _no_config(values)
    return error


def _no_config(values: flags.FlagValues) -> ConfigError:
    """Of a file whose get_config returns something else."""
    return ConfigError(
        f"--config={spec(values)}: get_config must return a ConfigDict, got "
        f"{type(values[_NAME].value).__name__}: start from qlog.config.default()"
    )


def _named(words: Sequence[str], name: str = _NAME) -> str:
    """What --NAME gives among the words of a command line; '' where nothing does."""
    named = ""
    for word, after in itertools.pairwise([*words, ""]):
        flag, is_one_word, value = word.lstrip("-").partition("=")
        if word.startswith("-") and flag == name:
            named = value if is_one_word else after  # of several the last one counts
    return named


def _let_it_import_its_neighbours(file: str) -> None:
    """A config file may import modules of its own folder, from wherever the command is started."""
    folder = os.path.dirname(os.path.abspath(file))
    if file and folder not in sys.path:
        sys.path.append(folder)  # last: its modules take the place of no others


def with_flag_files(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """A command line with the lines of each --flagfile=FILE in its place.

    A file may be a pipe of the shell, <(command), which can be read once, or be gone later: what
    comes after reads none.

    Args:
      argv: the program's name first.

    Raises:
      ConfigError: a file is a pipe with a name, or a device: it could be waited for without end.
      flags.Error: a file cannot be read.
    """
    program, *words = argv
    _check_flag_files(words, set())
    # "gnu": it looks further behind a word that is no flag, such as the 3 of `--config.seed 3`.
    try:
        return [program, *values.read_flags_from_files(words, force_gnu=True)]
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"a file of --flagfile is not UTF-8 ({error.reason}): save it as UTF-8."
        ) from None


def _check_flag_files(words: Sequence[str], seen: set[str]) -> None:
    """Raises ConfigError for a flag file that may never end, also where another one names it."""
    for word, after in itertools.pairwise([*words, ""]):
        flag, is_one_word, value = word.lstrip("-").partition("=")
        file = os.path.expanduser((value if is_one_word else after).strip())
        if not word.startswith("-") or flag != "flagfile" or file in seen:
            continue
        from qlog.storage import paths  # takes a third of a second

        seen.add(file)
        # The shell's own pipes and stdin, which no path leads to, have a writer.
        if os.path.exists(os.path.realpath(file)) and file != "/dev/stdin":
            paths.refuse_what_is_no_file(file, f"--flagfile={file}")
        if os.path.isfile(file):
            with contextlib.suppress(OSError), open(file, errors="replace") as lines:
                _check_flag_files([*lines], seen)


def again(argv: Sequence[str], keep: Sequence[str] = ()) -> list[str]:
    """The words of a command line that make its config: `--config=...` and all that sets fields.

    Args:
      argv: `with_flag_files`, the program's name first.
      keep: names of further flags, which are kept where they are given.
    """
    words, settings = split(argv[1:])
    # Settings may be empty (--config.data.path=), a flag without a value was not given.
    first, *others = [
        [f"--{name}={value}"] if (value := _named(words, name)) else [] for name in (_NAME, *keep)
    ]
    changes = [f"--{_NAME}.{'.'.join(each.path)}={each.text}" for each in settings]
    return [*first, *changes, *itertools.chain(*others)]


def out_of_reach(config: ConfigDict, argv: Sequence[str]) -> Iterator[str]:
    """A sentence for each flag that some of `config.runs` do not take: their entries set the field.

    Args:
      config: what the command line made.
      argv: `with_flag_files`, the program's name first.
    """
    _, settings = split(argv[1:])
    by_path = {setting.path: setting for setting in settings}  # of two for one field the last
    children = schema.several(config)
    for path, setting in by_path.items():
        value, field = _at(config, path), ".".join(path)
        own = {
            name: each
            for name, run in children.items()
            if (each := _at(run, path)) != value and ("runs", name, *path) not in by_path
        }
        if path[0] == "runs" or not own:
            continue
        shown = ", ".join(f"{name} ({v})" for name, v in own.items())
        which = next(iter(own)) if len(own) == 1 else "NAME"
        yield (
            f"{setting.flag} does not reach {shown}, where config.runs sets {field}: "
            f"--config.runs.{which}.{field}={setting.text} does."
        )


def _at(config: ConfigDict, path: Sequence[str]) -> Any:
    """The value of a field, a section as a plain dictionary; None where it has none."""
    node: Any = config
    for key in path:
        node = node.get(key) if isinstance(node, (ConfigDict, dict)) else None
    return node.to_dict() if isinstance(node, ConfigDict) else node


def spec(values: flags.FlagValues = flags.FLAGS) -> str:
    """What --config named: configs/hotpotqa.py:cold,garl."""
    return typing.cast(Any, values[_NAME]).config_filename


def split(words: Sequence[str]) -> tuple[list[str], list[Setting]]:
    """The words that set no field, and the settings: --config.x=y or --config.x y."""
    rest, settings = [], []
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if word == "--":  # flags end here
            return [*rest, word, *words[position:]], settings
        match = _SETTING.fullmatch(word)
        if not match:
            rest.append(word)
            continue
        negated, path, text = match.groups()
        flag = word
        if negated:  # --noconfig.x, as absl spells False
            text = "false" if text is None else text
        elif text is None:
            # A word that looks like a flag is no value, but -1 is. Without a value it says True.
            after = words[position] if position < len(words) else "--"
            if after.startswith("-") and not re.match(r"-[\d.]", after):
                text = "true"
            else:
                text, flag = after, f"{word} {after}"
                position += 1
        settings.append(Setting(flag, tuple(path.split(".")), text))
    return rest, settings


# ---- Setting fields ----


def apply(config: ConfigDict, settings: Sequence[Setting]) -> None:
    """Changes `config` in place.

    Raises:
      ConfigError: a field that does not exist, or a value of another type.
    """
    entries: dict[str, list[Setting]] = {}
    with config.unlocked(), config.ignore_type():
        plain = []
        for setting in settings:
            if setting.path[0] == "runs" and len(setting.path) > 2:
                entries.setdefault(setting.path[1], []).append(setting)
            else:
                plain.append(setting)
        _apply_to_run(config, plain)
        for name, changes in entries.items():
            _apply_to_entry(config, name, changes)


def _apply_to_run(config: ConfigDict, settings: Sequence[Setting]) -> None:
    """Changes the config of one run. The loss is chosen first: it decides what there is to set."""
    # A loss that is given whole begins the section anew: what came before it is past.
    whole = max((i for i, s in enumerate(settings) if s.path == ("loss",)), default=None)
    if whole is not None:
        before = [setting for setting in settings[:whole] if setting.path[0] != "loss"]
        _apply_to_run(config, before)
        _give_loss(config, settings[whole])
        settings = settings[whole + 1 :]
    names = [setting for setting in settings if setting.path == ("loss", "name")]
    if names:
        _choose_loss(config, names[-1])
    for setting in settings:
        if setting.path != ("loss", "name"):
            _set(config, setting)


def _give_loss(config: ConfigDict, setting: Setting) -> None:
    """--config.loss={"name": "garl", "q": 0.5}: this loss, all else by default."""
    given = _literal(setting.text)
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        raise ConfigError(
            f"{setting.flag}: a loss is given by its name, as in --config.loss.name=garl, or "
            """whole, as in --config.loss='{"name": "garl", "q": 0.5}'."""
        )
    try:
        config.loss = schema.loss(given.pop("name"), **given)
    except ValueError as error:
        raise ConfigError(f"{setting.flag}: {error}.") from None


def _choose_loss(config: ConfigDict, setting: Setting) -> None:
    """Another loss: its own defaults, and what was set to another value than the old one's default.

    An argument of the old loss that the new one does not have goes with the old one.
    """
    from qlog import losses

    try:
        known = losses.arguments(setting.text)
    except ValueError as error:
        raise ConfigError(f"{setting.flag}: {error}.") from None
    usual = losses.arguments(schema.loss_name(config))
    given = {key: value for key, value in config.loss.items() if key != "name"}
    kept = {
        name: value
        for name, value in given.items()
        if name in known and value != usual.get(name, _NO_VALUE)
    }
    config.loss = schema.loss(setting.text, **kept)


def _apply_to_entry(config: ConfigDict, name: str, settings: Sequence[Setting]) -> None:
    """--config.runs.NAME.x=y: changes what differs in one of several runs."""
    if name not in schema.several(config):
        raise ConfigError(
            f"{settings[0].flag}: config.runs has no run {name!r}{_suggestion(name, config.runs)}; "
            f"its runs are {', '.join(config.runs) or 'none'}."
        )
    entry, run = config.runs[name], schema.several(config)[name]
    path_of = lambda setting: setting.path[2:]
    _apply_to_run(run, [setting._replace(path=path_of(setting)) for setting in settings])
    for setting in settings:
        path = path_of(setting)
        # `merge` replaces these sections whole, so the entry has to hold them whole.
        for depth, key in enumerate(path, 1):
            if key in schema.CHOICES:
                path = path[:depth]
                break
        source, target = run, entry
        for key in path[:-1]:
            source = source[key]
            if key not in target:
                target[key] = ConfigDict()
            target = target[key]
        target[path[-1]] = source[path[-1]]


def _set(config: ConfigDict, setting: Setting) -> None:
    """Sets one field, or one key of an open section; sections that lead to it are made."""
    *sections, last = setting.path
    node, known = config, _types_in(config, ())
    for depth, key in enumerate(sections, 1):
        wanted = _look_up(known, key, setting)
        path = setting.path[:depth]
        if isinstance(wanted, ConfigDict):
            known = _types_in(config, path)
        elif wanted is Any:
            known = Any
        else:  # a record, such as architecture.rope_scaling
            known = next((_hints(t) for t in _options(wanted) if dataclasses.is_dataclass(t)), None)
            if known is None:
                raise ConfigError(
                    f"{setting.flag}: config.{'.'.join(path)} is a value and has no key "
                    f"{setting.path[depth]!r}."
                )
        if node.get(key) is None:
            node[key] = ConfigDict()
        if not isinstance(node[key], (ConfigDict, dict)):
            raise ConfigError(
                f"{setting.flag}: config.{'.'.join(path)} = {node[key]!r} has no keys in this "
                "config: set it whole."
            )
        node = node[key]
    wanted = _look_up(known, last, setting)
    if isinstance(wanted, ConfigDict):
        node[last] = _section(node.get(last, ConfigDict()), wanted, setting)
    else:
        node[last] = _value(setting, wanted)


def _section(old: ConfigDict, default: ConfigDict, setting: Setting) -> ConfigDict:
    """A whole section as a literal: {"a": 1}. An open one is replaced, another one is changed."""
    value = _literal(setting.text)
    if not isinstance(value, dict):
        example = "name" if "name" in default else next(iter(default), "KEY")
        raise ConfigError(
            f"{setting.flag}: config.{'.'.join(setting.path)} is a section: set its keys, as in "
            f"--config.{'.'.join(setting.path)}.{example}=..."
        )
    is_open = setting.path[-1] in schema.CHOICES or not default
    try:
        return ConfigDict(value) if is_open else schema.merge(old, value)
    except ValueError as error:  # a key with a dot
        raise ConfigError(f"{setting.flag}: {str(error).rstrip('.')}.") from None


# ---- The type of a field, from where it is read ----
#
# Readers are imported where a command line asks for them, not above: JAX, grain and tokenizers take
# seconds, and `--help` and a wrong flag need none of them.


def _types_in(config: ConfigDict, path: tuple[str, ...]) -> Any:
    """The keys of a section with their types, a ConfigDict for a section.

    Where any key goes it is no mapping, but the type of all keys.
    """
    if path in _READERS:
        return _READERS[path](config)
    section = schema.default()
    for key in path:
        section = section[key]
    if path and (path[-1] in schema.CHOICES or not section):
        return Any
    is_section = lambda value: isinstance(value, ConfigDict)
    return {
        # A reward is text by default, and may be a list of (name, weight).
        key: value
        if is_section(value)
        else Any
        if value is None or key == "reward"
        else type(value)
        for key, value in section.items()
    }


def _loss_types(config: ConfigDict) -> Any:
    from qlog import losses

    loss = schema.loss_name(config)
    if losses.takes_any(loss):
        return Any
    return {"name": str, **losses.argument_types(loss)}


def _architecture_types(config: ConfigDict) -> Mapping[str, Any]:
    from qlog.models import DecoderConfig

    return _hints(DecoderConfig)


def _world_types(config: ConfigDict) -> Mapping[str, Any]:
    from qlog.data.synthetic import World

    return _hints(World)


def _text_types(config: ConfigDict) -> Any:
    """Of sections that hold names of files and of keys: 2024 is a folder, and no number."""
    return list | str


_READERS: dict[tuple[str, ...], Callable[[ConfigDict], Any]] = {
    ("data", "files"): _text_types,
    ("data", "fields"): _text_types,
    ("loss",): _loss_types,
    ("architecture",): _architecture_types,
    ("data", "world"): _world_types,
}


def _hints(record: Any) -> Mapping[str, Any]:
    """The types of a dataclass's fields."""
    return typing.get_type_hints(record)


def _look_up(known: Any, key: str, setting: Setting) -> Any:
    """The type of a key, among `_types_in` its section."""
    if not isinstance(known, Mapping):
        return known
    if key not in known:
        similar = _suggestion(key, known).strip(" ()")
        raise ConfigError(
            f"{setting.flag}: the config has no field {key!r}; "
            + (similar or f"there are {', '.join(known)}.")
        )
    return known[key]


def _suggestion(value: str, choices: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" for the choice that `value` is close to, '' where there is none."""
    from qlog.losses.checks import closest

    return closest(value, choices)


def _options(wanted: Any) -> tuple[Any, ...]:
    """(int, NoneType) for int | None; (int,) for int."""
    is_union = typing.get_origin(wanted) in (typing.Union, types.UnionType)
    return typing.get_args(wanted) if is_union else (wanted,)


# ---- From text to a value ----


def _value(setting: Setting, wanted: Any) -> Any:
    """The value that the text stands for in a field of the type `wanted`.

    Raises:
      ConfigError: none does.
    """
    text, options = setting.text, _options(wanted)
    # 'None' would be a name: of a folder, a project.
    if text in ("None", "null") and wanted is str and _default(setting.path) == "":
        return ""
    if text in ("None", "null") and (types.NoneType in options or Any in options):
        return None
    expected = []
    # Text last: where a field takes a number or a word, 3 is the number.
    for option in sorted(options, key=lambda option: option is str):
        if dataclasses.is_dataclass(option):
            words, read = f"a dictionary of {', '.join(_hints(option))}", _record
        else:
            words, read = _KINDS.get(typing.get_origin(option) or option, ("", None))
        if read is None:  # functions, arrays: no text stands for them; Any: a literal
            continue
        try:
            return read(text, option)
        except ValueError:
            expected.append(words)
    if not expected:
        return _literal(text)
    raise ConfigError(
        f"config.{'.'.join(setting.path)} = {text!r} must be {' or '.join(expected)}."
    )


def _default(path: Sequence[str]) -> Any:
    """The schema's value of a field; None where it has none."""
    return _at(schema.default(), path)


def _list(text: str, option: Any) -> list[Any]:
    value = _literal(text)
    if not isinstance(value, (list, tuple)):
        raise ValueError(text)
    return list(value)


def _bool(text: str, option: Any) -> bool:
    if text.lower() not in _BOOLS:
        raise ValueError(text)
    return _BOOLS[text.lower()]


def _tuple(text: str, option: Any) -> tuple[Any, ...]:
    """12,13 or (12, 13) or [12, 13]; of words without quotes: <|im_end|>,<|endoftext|>."""
    value = _literal(text)
    if not isinstance(value, (tuple, list)):
        parts = (part.strip() for part in text.split(","))
        value = [_literal(part) for part in parts if part]
    item = (typing.get_args(option) or (Any,))[0]
    if item is not Any and not all(type(each) is item for each in value):
        raise ValueError(text)
    return tuple(value)


def _record(text: str, option: Any) -> ConfigDict:
    value = _literal(text)
    if not isinstance(value, dict) or not value.keys() <= _hints(option).keys():
        raise ValueError(text)
    return ConfigDict(value)


def _choice(text: str, option: Any) -> str:
    if text not in typing.get_args(option):
        raise ValueError(text)
    return text


_KINDS: dict[Any, tuple[str, Callable[[str, Any], Any]]] = {
    bool: ("true or false", _bool),
    int: ("a whole number", lambda text, option: int(text)),
    float: ("a number", lambda text, option: float(text)),
    str: ("text", lambda text, option: text),
    list: ("a list", _list),
    tuple: ("values with commas between them, such as 12,13", _tuple),
    typing.Literal: ("one of its words", _choice),
}


def _literal(text: str) -> Any:
    """A Python or JSON literal, else the text itself."""
    if text in _WORDS:
        return _WORDS[text]
    for read in (ast.literal_eval, json.loads):
        try:
            value = read(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        if value is None or isinstance(value, (bool, int, float, str, tuple, list, dict)):
            return value
    return text
