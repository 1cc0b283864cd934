"""The pages of help: a command's usage, and the fields of the config, from config/schema.py."""

import dataclasses
import inspect
import json
import sys
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict

from qlog.config import schema
from qlog.config.schema import Field, Section
from qlog.console import printable, styled, width
from qlog.errors import ConfigError

_WIDEST = 100  # columns: longer lines are hard to read
# How a value of a type is described.
_KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    tuple: "list, as in a,b",
    list: "list",
    type(None): "None",
}
_DASH = " - "  # between a word of a choice and its meaning

# ---- The usage of a command ----


def usage(about: str, values: flags.FlagValues) -> Iterator[str]:
    """Lines of a command's page: its docstring, then its flags with their defaults.

    Args:
      about: the docstring of the command's module.
      values: the flags; of absl's global ones only those that qlog defines are shown.
    """
    yield inspect.cleandoc(about)
    yield ""
    yield styled("Flags", "bold")
    for flag in _own_flags(values):
        words = "|".join(getattr(flag.parser, "enum_values", ()))
        about = (flag.help or "").removeprefix(f"<{words}>: ")  # absl's own list of the words
        named = f"--{flag.name}" if flag.boolean else f"--{flag.name}={words or flag.name.upper()}"
        yield "  " + styled(named, "bold")
        default = "" if flag.default in (None, "", False) else f" Default: {flag.default}."
        yield from _wrapped(about + default, indent=6)


def _own_flags(values: flags.FlagValues) -> list[flags.Flag]:
    """The flags that modules of qlog define, in their order."""
    found = []
    for module, several in values.flags_by_module_dict().items():
        # A program that runs as __main__ is called by its path there.
        if str(module).startswith("qlog.") or module == sys.argv[0]:
            found += several
    # --config may be defined in another module than the rest, and is the one to read first.
    return sorted(found, key=lambda flag: flag.name != "config")


# ---- The fields of the config ----


class Row(NamedTuple):
    """A field or a section, as the page shows it."""

    group: str  # the headline that it stands under
    path: str  # "train.steps"
    meaning: str  # for users
    value: Any = None  # in this config, as JSON has it; None of a section
    default: Any = None  # of the schema, or of the loss that was chosen
    facts: str = ""  # type, range, unit, whether it may change; '' of a section of the schema
    choices: Mapping[str, str] = types.MappingProxyType({})  # word -> its meaning
    is_detail: bool = False  # shown only where it is asked for


def fields(config: ConfigDict, wanted: str = "") -> Iterator[str]:
    """Lines about the fields of a config: value, default, type, range, meaning.

    Args:
      config: whose values are shown. It is not checked, so that a wrong one can be looked at.
      wanted: of which fields: a section, a field, a part of its name, or a word of its meaning; ''
        is all.

    Raises:
      ConfigError: no field has it.
    """
    rows = list(_rows(config))
    # Of open sections only what is set: all their keys are shown to those who ask for one.
    shown = _matching(rows, wanted) if wanted else [row for row in rows if not row.is_detail]
    if not wanted:
        yield from _wrapped(
            "Every field of the config: its value, and the default where that is another one. "
            "Set it with --config.FIELD=VALUE. A run that resumes keeps what must stay, and may "
            "change the rest. --help-config=WORD shows a section, a field, or all that has the "
            "word."
        )
    above = None
    for row in shown:
        if above is None or row.group != above.group:
            yield ""
            yield styled(f"---- {row.group} ----", "cyan")
            yield ""
        elif row.meaning or above.meaning:  # what needs no words stands close together
            yield ""
        yield from _lines(row)
        above = row


def _matching(rows: list[Row], wanted: str) -> list[Row]:
    """The rows that a word asks for, under the sections that they are in."""
    word = wanted.lower().removeprefix("--").removeprefix("config.")
    # From the closest kind of match to the widest one: the first that finds something is meant.
    tests = (
        lambda row: row.path == word or row.path.startswith(f"{word}."),
        lambda row: word in row.path.lower(),
        lambda row: word in row.meaning.lower(),
    )
    for test in tests:
        found = [row for row in rows if test(row)]
        if found:
            sections = [row.path for row in found if not row.facts]
            above = {row.path.rpartition(".")[0] for row in found}
            return [
                row
                for row in rows
                if row in found
                or (not row.facts and row.path in above)
                or any(row.path.startswith(f"{section}.") for section in sections)
            ]
    from qlog.losses.checks import closest

    names = {row.path for row in rows} | {row.path.split(".")[-1] for row in rows}
    raise ConfigError(
        f"--help-config={wanted}: no field has it in its name or its meaning"
        f"{closest(word, names)}: --help-config shows all."
    )


def _lines(row: Row) -> Iterator[str]:
    """A row: what it is set to, then what it means."""
    if row.facts:
        changed = f"  (default {_text(row.default)})" if row.value != row.default else ""
        head, facts = f"{row.path} = {_text(row.value)}", f"[{row.facts}]"
        fits = len(head + changed) + 2 + len(facts) <= _columns()
        # The facts stand behind the value, or below it where there is no room.
        yield (
            styled(head, "bold")
            + styled(changed, "yellow")
            + (f"  {styled(facts, 'dim')}" if fits else "")
        )
        if not fits:
            yield from (styled(line, "dim") for line in _wrapped(facts, indent=4))
    else:  # a section
        yield styled(row.path, "bold")
    yield from _wrapped(row.meaning, indent=4)
    for word, meaning in row.choices.items():
        yield from _wrapped(f"{word or repr(word)}{_DASH}{meaning}", indent=6, hanging=4)


def _rows(config: ConfigDict) -> Iterator[Row]:
    """All fields and sections, in the schema's order."""
    values = json.loads(schema.to_json(config))
    defaults = json.loads(schema.to_json(schema.default()))
    for group, entries in schema.GROUPS.items():
        for path, entry in schema.walk(entries):
            if isinstance(entry, Section):
                yield Row(group, path, entry.meaning)
                continue
            value, default = _at(values, path), _at(defaults, path)
            if path in _OPEN:
                yield from _OPEN[path](config, group, path, entry)
            else:
                yield Row(group, path, entry.meaning, value, default, _facts(entry), entry.choices)


def _at(tree: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path; None where there is none."""
    value: Any = tree
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _facts(field: Field) -> str:
    """What values a field takes, and whether a resumed run may have another one."""
    if field.keys:
        kind = f"section: {field.keys}"
    else:
        kind = "word" if field.choices else _KINDS[type(field.default)]
    if field.is_function:
        kind += " or function"
    if field.unit:
        kind += f" of {field.unit}" if isinstance(field.default, int) else f", {field.unit}"
    if field.range:
        low, high = (f"{x:,}" if isinstance(x, int) else f"{x:.9g}" for x in field.range)
        kind += f", {low} to {high}"
    return f"{kind}; {'may change' if field.may_change else 'must stay'}"


# ---- Sections whose keys are not of the schema ----


def _loss(config: ConfigDict, group: str, path: str, field: Field) -> Iterator[Row]:
    """The loss that the config chose, what it says of itself, and its arguments."""
    from qlog import losses

    name = schema.loss_name(config)
    try:
        usual, kinds = losses.arguments(name), losses.argument_types(name)
    except ValueError as error:
        raise ConfigError(f"config.loss: {error}.") from None
    yield Row(
        group,
        f"{path}.name",
        f"{field.meaning} Recipes: {', '.join(losses.RECIPES)}.\n\n{_about_loss(name)}",
        losses.label(name),
        schema.default().loss.name,
        "text or function; must stay, as do the arguments",
    )
    given = {key: value for key, value in config.loss.items() if key != "name"}
    for key, value in (usual | given).items():
        default = _plain(usual.get(key, value))  # an argument without a default has none to show
        kind, meaning = _kind(kinds.get(key, Any)), ""
        if isinstance(name, str):
            meaning = losses.ARGUMENTS.get(key, "")  # a key that the recipe does not know
        yield Row(group, f"{path}.{key}", meaning, _plain(value), default, kind)


def _about_loss(name: Any) -> str:
    """What the chosen loss says of itself: the docstring of its function."""
    from qlog import losses

    recipe = losses.RECIPES.get(name, name) if isinstance(name, str) else name
    if not isinstance(recipe, losses.Recipe):
        return inspect.getdoc(recipe) or ""
    about = inspect.getdoc(recipe.transform) or ""
    if recipe.surrogate is not losses.linear:
        about += f"\n\n{recipe.surrogate.__name__}: {inspect.getdoc(recipe.surrogate) or ''}"
    return about


def _record(record: Any, usual: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[Row]:
    """The fields of a dataclass as rows without group and path's beginning."""
    about, hints = _attributes(record), typing.get_type_hints(record)
    for each in dataclasses.fields(record):
        default = usual.get(each.name)
        value = given.get(each.name, default)
        yield Row(
            "",
            each.name,
            about.get(each.name, ""),
            _plain(value),
            _plain(default),
            _kind(hints[each.name]),
            is_detail=value == default,
        )


def _architecture(config: ConfigDict, group: str, path: str, field: Field) -> Iterator[Row]:
    """The fields of the decoder's shape; their values where the model is a preset."""
    from qlog import models

    yield Row(group, path, field.meaning, config.architecture.to_dict(), {}, _facts(field))
    preset = models.PRESETS.get(config.model)
    usual = dataclasses.asdict(preset) if preset else {}
    for row in _record(models.DecoderConfig, usual, config.architecture):
        yield row._replace(group=group, path=f"{path}.{row.path}")


def _world(config: ConfigDict, group: str, path: str, field: Field) -> Iterator[Row]:
    """The fields of a synthetic task's world, where the data are one."""
    from qlog.data.synthetic import World

    yield Row(group, path, field.meaning, config.data.world.to_dict(), {}, _facts(field))
    if config.data.name in ("multihop", "multihop_text"):
        usual = dataclasses.asdict(World())
        for row in _record(World, usual, config.data.world):
            yield row._replace(group=group, path=f"{path}.{row.path}")


def _runs(config: ConfigDict, group: str, path: str, field: Field) -> Iterator[Row]:
    """Only the names of the runs: what differs in each would fill pages."""
    yield Row(group, path, field.meaning, list(config.runs), [], _facts(field))


_OPEN = {"loss": _loss, "architecture": _architecture, "data.world": _world, "runs": _runs}


def _attributes(record: Any) -> dict[str, str]:
    """What the block "Attributes:" of a docstring says, by attribute."""
    _, _, block = (inspect.getdoc(record) or "").partition("Attributes:\n")
    found: dict[str, str] = {}
    name = ""
    for line in block.splitlines():
        if not line.strip():
            break
        if not line.startswith("    "):  # "  name: meaning"; what is further in goes on
            name, _, line = line.strip().partition(":")
        found[name] = f"{found.get(name, '')} {line.strip()}".strip()
    return found


# ---- Text ----


def _kind(hint: Any) -> str:
    """A type in words: 'a whole number or None'."""
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = typing.get_args(hint) if is_union else (hint,)
    kinds = []
    for option in options:
        plain = typing.get_origin(option) or option
        kinds.append(_KINDS.get(plain) or getattr(plain, "__name__", str(plain)))
    return "any value" if hint is Any else " or ".join(dict.fromkeys(kinds))


def _plain(value: Any) -> Any:
    """A value as JSON has it: sections are dictionaries, functions their names."""
    if isinstance(value, ConfigDict):
        return value.to_dict()
    if isinstance(value, tuple):
        return list(value)
    return getattr(value, "__qualname__", value) if callable(value) else value


def _text(value: Any) -> str:
    """A value as a flag takes it; '' and () where it is empty."""
    if isinstance(value, str):
        return printable(value) or "''"
    if isinstance(value, list) and all(isinstance(each, (str, int)) for each in value):
        return printable(",".join(map(str, value))) or "()"
    return printable(str(value))


def _wrapped(text: str, indent: int = 0, hanging: int = 0) -> Iterator[str]:
    """The paragraphs of a text, in lines that fit the terminal."""
    for paragraph in _paragraphs(text.splitlines()):
        yield from textwrap.wrap(
            paragraph,
            _columns(),
            initial_indent=" " * indent,
            subsequent_indent=" " * (indent + hanging),
            break_long_words=False,
            break_on_hyphens=False,
        )


def _columns() -> int:
    """The longest line."""
    return max(min(width(), _WIDEST), 40)


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Lines joined into paragraphs, which empty lines divide."""
    words: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            words.append(line.strip())
        elif words:
            yield " ".join(words)
            words = []
