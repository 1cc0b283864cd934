"""The Jinja in which a model's chat template runs: a rendering ends, and stays small.

A chat template is code from the internet. Jinja's sandbox keeps it from files and from Python's
objects, not from loops without an end and texts without a size. Here a `Budget` has two counters
for each rendering, and both grow with the user's text, so that a sane template renders a text of
any length. Work is counted, not timed: what renders does so on every machine.

- Steps: bodies of loops, macros and blocks, tests of filtered loops, calls, and what filters,
  methods and comparisons read.
- Characters made: texts, lists and numbers as they come to be, and what is printed. A list counts
  with all that is in it, as often as it is in it, so that no value is larger than what was counted,
  whatever its parts share. Hence an operation that reads its values once is bounded by them, and
  the few that multiply them (`*`, replace, join, widths) are reckoned before they are done.

What Jinja does not tell its environment is told by filters with names that no template can write,
and that `map` does not take: a global would be a name like any other, and a call of an attribute of
the environment would take the detour of the sandbox's `call`.
"""

import datetime
import functools
import json
import re
import string
import threading
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set, ValuesView
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.filters
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils
import jinja2.visitor
import markupsafe

# What every template sees as today. The true date would change prompts from day to day, so that a
# run that resumes tomorrow would train on other prompts. This one is the default of Llama 3's own
# template; users set another one by the template's own variable (Llama 3: date_string).
TODAY = datetime.datetime(2024, 7, 26)

# ---- Limits of a rendering ----
MOST_STEPS = 100_000
STEPS_PER_CHARACTER = 40  # of the user's text
MOST_MADE = 10_000_000  # characters; some 50 MB at worst
MADE_PER_CHARACTER = 300  # of the user's text
MOST_BITS = 16_384  # of a number
MOST_SOURCE = 1_000_000  # characters of a template; published ones have 20,000
# ---- What counts how much ----
_STEP = 128  # characters that are read count as one step
_NODES = 32  # parts of a body that are one more step
_CALL = 64  # a filter, a test or a method
_ITEM = 16  # what an item of a list counts beside its text: it takes memory, too
_LIST = 48  # what a list counts beside its items
_OBJECT = 100  # what Python prints of an object that is not plain, at most
_ESCAPES = 12  # characters that JSON, repr or a URL make of one, at most
# Names of the filters by which a compiled template reports. No parser takes them for a name.
_BODY, _READ, _KEY, _MADE, _CONCATENATED = "(body)", "(read)", "(key)", "(made)", "(~)"


class Budget(threading.local):
    """What the rendering of this thread may still do.

    Attributes:
      most_steps: the limit of steps.
      most_made: the limit of characters made.
    """

    def __init__(self) -> None:
        self.begin(0)

    def begin(self, length: int) -> None:
        """Starts anew, for a user's text of `length` characters."""
        self.most_steps = MOST_STEPS + STEPS_PER_CHARACTER * length
        self.most_made = MOST_MADE + MADE_PER_CHARACTER * length
        self._work = self.most_steps * _STEP  # left, in characters that are read
        self._made = self.most_made  # left

    def read(self, characters: int) -> None:
        """Counts work.

        Raises:
          SecurityError: more steps than the limit.
        """
        self._work -= characters
        if self._work < 0:
            raise jinja2.exceptions.SecurityError(
                f"it does not end within {self.most_steps:,} steps of its loops, macros and filters"
            )

    def make(self, characters: int, what: str = "it") -> None:
        """Counts what comes to be.

        Raises:
          SecurityError: more characters than the limit.
        """
        if characters > self._made:
            raise jinja2.exceptions.SecurityError(
                f"{what} makes more than a prompt can hold: the limit is {self.most_made:,} "
                "characters and items in all"
            )
        self._made -= characters

    def room(self, characters: int, what: str) -> None:
        """Raises what `make` would raise, and counts nothing."""
        if characters > self._made:
            self.make(characters, what)

    def weigh(self, value: Any) -> int:
        """`weight`, up to what is left."""
        return len(value) if type(value) is str else weight(value, self._made)


def weight(value: Any, most: int) -> int:
    """The characters of a value, and `_ITEM` for each item in it at any depth.

    A part that is there twice counts twice, as in what is printed. No more than `most` is reckoned.

    Raises:
      SecurityError: a number of more than MOST_BITS is in it.
    """
    total = 0
    pending = [value]
    while pending and total <= most:
        value = pending.pop()
        kind = type(value)
        if kind is str:
            total += len(value)
        elif kind is list or kind is tuple:
            total += _LIST + _ITEM * len(value)
            if total > most:
                break
            if len(value) > _ITEM and set(map(type, value)) == {str}:  # fast: lines of a text
                total += sum(map(len, value))
            else:
                pending.extend(value)
        elif isinstance(value, (str, bytes)):
            total += len(value)
        elif value is None or kind is bool or kind is float or isinstance(value, jinja2.Undefined):
            continue
        elif isinstance(value, int):
            total += _decimal(value)
        elif isinstance(value, range):
            total += len(value)
        elif kind is dict or isinstance(value, Mapping):
            total += _LIST + 2 * _ITEM * len(value)
            if total <= most:
                pending.extend(value)
                pending.extend(value.values())
        elif isinstance(value, (list, tuple, Set, ValuesView)):  # keys and items are sets
            total += _LIST + _ITEM * len(value)
            if total <= most:
                pending.extend(value)
        elif isinstance(value, _Namespace):
            total += _OBJECT
            pending.append(object.__getattribute__(value, "_Namespace__attrs"))
        elif isinstance(value, (jinja2.utils.Cycler, jinja2.utils.Joiner)):
            total += _OBJECT
            pending.append(vars(value))
        elif isinstance(value, jinja2.runtime.LoopContext):
            total += _OBJECT
            pending.extend((value._before, value._current, value._after))
        else:
            total += _OBJECT
            if isinstance(value, types.MethodType):
                pending.append(value.__self__)
    return total


def _decimal(number: int) -> int:
    """Digits of a number, at most."""
    if number.bit_length() > MOST_BITS:
        raise _too_large("a number")
    return number.bit_length() // 3


def _too_large(what: str) -> jinja2.exceptions.SecurityError:
    return jinja2.exceptions.SecurityError(
        f"{what} makes more than a prompt can hold: the limit of a number is {MOST_BITS:,} bits"
    )


BUDGET = Budget()

# ---- Sizes of what multiplies: functions with the parameters of what they reckon ----


def _width(text: Any, width: int, *_: Any) -> int:  # center, ljust, rjust, zfill
    return max(_length(text), width)


def _length(text: Any) -> int:
    """Characters of a text, or of what it becomes as one."""
    return len(text) if isinstance(text, (str, bytes)) else _ESCAPES * BUDGET.weigh(text)


def _replaced(text: Any, old: Any, new: Any, count: int | None = -1) -> int:
    if not isinstance(text, (str, bytes)):
        return _replaced(_text(text), old, new, count)
    old = old if isinstance(old, (str, bytes)) else _text(old)
    times = text.count(old)  # type: ignore[arg-type]
    if count is not None and count >= 0:
        times = min(times, count)
    return len(text) + times * _length(new)


def _text(value: Any) -> str:
    """`str(value)`, if there is room for it."""
    BUDGET.room(_ESCAPES * BUDGET.weigh(value), "a text")
    return str(value)


def _joined(separator: Any, values: Any) -> int:
    return BUDGET.weigh(values) + _length(separator) * len(values)


def _expanded(text: Any, tabsize: int = 8) -> int:
    tabs = text.count("\t" if isinstance(text, str) else b"\t")
    return len(text) + tabs * max(tabsize, 0)


def _translated(text: Any, table: Any, *_: Any, **__: Any) -> int:
    if isinstance(text, bytes) or isinstance(table, (str, bytes)):
        return len(text)
    values = table.values() if isinstance(table, Mapping) else table
    return len(text) * max((BUDGET.weigh(value) for value in values), default=0)


def _to_bytes(number: Any, length: int = 1, *_: Any, **__: Any) -> int:
    return length


def _strftime(pattern: str) -> int:
    return 256 * len(pattern)  # Python asks for no more


def _with_hashes(*values: Any, **_: Any) -> int:
    """Numbers can be chosen so that all have one hash: a table of n takes n * n / 2 looks."""
    for value in values:
        BUDGET.read(len(value) ** 2 // 64)
    return 0


def _from_keys(keys: Any, value: Any = None) -> int:
    return _with_hashes(keys) + len(keys) * (2 * _ITEM + BUDGET.weigh(value))


# A width stands behind the percent sign, or behind the name of a value in parentheses.
_WIDTHS = re.compile(r"[%)][#0\- +]*(\*|\d+)?(?:\.(\*|\d+)?)?")


def _percent(pattern: Any, values: Any) -> int:
    """Of pattern % values, as C's printf."""
    text = pattern if isinstance(pattern, str) else pattern.decode("latin-1")
    widths = [width for found in _WIDTHS.findall(text) for width in found]
    size = len(text) + sum(_number(width) for width in widths if width.isdigit())
    if "*" in widths:
        given = values if isinstance(values, tuple) else (values,)
        size += sum(abs(value) for value in given if isinstance(value, int))
    # Each value is written once, but those that have a name.
    return size + max(text.count("%("), 1) * BUDGET.weigh(values)


def _number(digits: str) -> int:
    """Of digits in a pattern; a width of more than 18 digits is no width."""
    return int(digits[:18])


def _indented(text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> int:
    indention = len(width) if isinstance(width, str) else max(width, 0)
    return len(text) + (1 + len(text.splitlines())) * (indention + 1)


def _batched(values: Any, linecount: int, fill_with: Any = None) -> int:
    # One filling stands at all places.
    return 0 if fill_with is None else max(linecount, 0) * (_ITEM + BUDGET.weigh(fill_with))


def _sliced(values: Any, slices: int, fill_with: Any = None) -> int:
    return max(slices, 0) * (_ITEM + BUDGET.weigh(fill_with))


def _rounded(value: Any, precision: int = 0, method: str = "common") -> int:
    if abs(precision) > MOST_BITS // 4:  # it is a power of ten
        raise _too_large("round")
    return 0


def _wrapped(
    text: str,
    width: int = 79,
    break_long_words: bool = True,
    wrapstring: str | None = None,
    break_on_hyphens: bool = True,
) -> int:
    _by_words(text)
    BUDGET.read(16 * len(text))  # written in Python, it is slow
    return len(text) * (1 + len(wrapstring or "\n"))


def _by_words(text: Any, *_: Any, **__: Any) -> int:
    """For what looks at the rest of a word from each of its characters."""
    longest = max(map(len, text.split()), default=0) if isinstance(text, str) else 0
    if longest > _STEP:
        BUDGET.read(len(text) * longest // 8)
    return 0


def _urls(text: Any, *given: Any, **named: Any) -> int:
    _by_words(text)
    return len(text) * (1 + BUDGET.weigh([given, named])) if given or named else 0


def _stripped(value: Any) -> int:
    """The rest of a text is copied behind each tag."""
    text = value if isinstance(value, str) else _text(value)
    BUDGET.read(len(text) * text.count("<") // _ITEM)
    return 0


def _printed(value: Any) -> int:
    BUDGET.read(64 * BUDGET.weigh(value))  # every level is written once to see whether it fits
    return 0


_CODINGS = ("utf-8", "utf8", "ascii", "latin-1")


def _coded(text: Any, encoding: str = "utf-8", errors: str = "strict") -> int:
    # Others import modules by name, or take a time that grows with the square of the length.
    if encoding.lower() not in _CODINGS or errors not in ("strict", "ignore", "replace"):
        raise jinja2.exceptions.SecurityError(f"{encoding!r}, {errors!r} is no coding of a prompt")
    return 0


def _of_number(value: Any, number: Any = 2) -> int:
    """`is odd` of a text is text % 2."""
    return _percent(value, number) if isinstance(value, (str, bytes)) else 0


_FILTER_SIZES: Mapping[str, Callable[..., int]] = {
    "batch": _batched,
    "center": lambda value, width=80: _width(value, width),
    "format": lambda value, *args, **named: _percent(_text(value), named or args),
    "indent": _indented,
    "pprint": _printed,
    "replace": _replaced,
    "round": _rounded,
    "slice": _sliced,
    "striptags": _stripped,
    "urlize": _urls,
    "wordwrap": _wrapped,
}
_TEST_SIZES: Mapping[str, Callable[..., int]] = dict.fromkeys(
    ("odd", "even", "divisibleby"), _of_number
)
_CALL_SIZES: Mapping[str, Callable[..., int]] = {
    "center": _width,
    "decode": _coded,
    "dict": _with_hashes,
    "difference": _with_hashes,
    "encode": _coded,
    "expandtabs": _expanded,
    "fromkeys": _from_keys,
    "intersection": _with_hashes,
    "join": _joined,
    "ljust": _width,
    "replace": _replaced,
    "rjust": _width,
    "_strftime_now": _strftime,
    "striptags": _stripped,
    "symmetric_difference": _with_hashes,
    "to_bytes": _to_bytes,
    "translate": _translated,
    "union": _with_hashes,
    "zfill": _width,
}
# They give back what was there, or look at a bit of it, however large the rest is.
_FREE_FILTERS = frozenset("attr count d default first last length".split())
_FREE_TESTS = frozenset(
    "boolean callable defined escaped false float integer iterable mapping none number sameas "
    "sequence string true undefined".split()
)
_FREE_METHODS = frozenset("endswith get items keys startswith values".split())


def _counted(function: Callable[..., Any], name: str, size: Callable[..., int] | None) -> Any:
    """A filter or test that counts what it reads and makes, also where `map` or `select` calls it.

    Args:
      function: the filter or test.
      name: its name.
      size: characters that it makes at most, where these can be more than `_ESCAPES` times what it
        is given; with the parameters of `function`, without Jinja's own first one.
    """
    first = int(hasattr(function, "jinja_pass_arg"))

    @functools.wraps(function)  # keeps the marks of pass_context and its like
    def counted(*args: Any, **named: Any) -> Any:
        _reckon(name, size, args[first:], named)
        return _result(function(*args, **named), name)

    return counted


def _reckon(
    name: str, size: Callable[..., int] | None, args: Sequence[Any], named: Mapping[str, Any]
) -> None:
    """Counts what is read; raises if what will be made is too large."""
    given = sum(map(BUDGET.weigh, args))
    if named:
        given += sum(map(BUDGET.weigh, named.values()))
    BUDGET.read(_CALL + given)
    BUDGET.room(_ESCAPES * given, name)
    if size is not None:
        BUDGET.room(size(*args, **named), name)


def _result(result: Any, name: str) -> Any:
    """What was made, counted; generators count their items when these are taken."""
    kind = type(result)
    if kind is str:
        BUDGET.make(len(result), name)
    elif kind is not bool and result is not None:
        if isinstance(result, Iterator) and not isinstance(result, jinja2.runtime.LoopContext):
            return _counted_items(result)
        BUDGET.make(BUDGET.weigh(result), name)
    return result


def _counted_items(items: Iterator[Any]) -> Iterator[Any]:
    for item in items:
        BUDGET.read(_CALL // 2)
        if isinstance(item, (list, tuple)):  # of batch and slice; its items were there before
            BUDGET.make(_LIST + _ITEM * len(item))
        yield item


# ---- What templates are given ----


class _Namespace(jinja2.utils.Namespace):
    """Jinja's `namespace`; its names must not begin with an underscore, a way out of sandboxes."""

    def __init__(*args: Any, **given: Any):
        self, *rest = args  # so that a template may name a variable `self`
        attributes = dict(*rest, **given)
        for name in attributes:
            _refuse_underscore(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: str) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"the name {name!r} begins with an underscore")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return TODAY.strftime(pattern)


def _changing(name: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> None:
        raise jinja2.exceptions.SecurityError(
            f"{name} makes other text each time, so that a resumed run would train on other prompts"
        )

    return refuse


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter writes <, > and & as escapes, for HTML pages."""
    if indent is not None or separators is not None:
        items, depth = _shape(value)
        indention = len(indent) if isinstance(indent, str) else max(indent or 0, 0)
        written = indention * depth + 1 + sum(map(len, separators or ()))
        BUDGET.room(items * written, "tojson")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _shape(value: Any) -> tuple[int, int]:
    """Lines that a value has as indented JSON, at most, and how deep they are."""
    items, depth, level = 0, 0, [value]
    while level:
        items += 2 * len(level)
        depth += 1
        BUDGET.read(len(level))
        inner: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                inner.extend(each.values())
            elif isinstance(each, (list, tuple)):
                inner.extend(each)
        level = inner
    return items, depth


@jinja2.pass_eval_context
def _join(
    eval_ctx: jinja2.nodes.EvalContext, value: Any, d: Any = "", attribute: Any = None
) -> str:
    """Jinja's `join`, of a list: what a generator holds can be weighed then."""
    if attribute is not None:
        value = map(jinja2.filters.make_attrgetter(eval_ctx.environment, attribute), value)
    values = list(value)
    BUDGET.room(_ESCAPES * BUDGET.weigh(values), "join")
    BUDGET.room(_joined(d, values), "join")
    return jinja2.filters.sync_do_join(eval_ctx, values, d)


@jinja2.pass_environment
def _unique(
    environment: jinja2.Environment,
    value: Any,
    case_sensitive: bool = False,
    attribute: Any = None,
) -> Iterator[Any]:
    """Jinja's `unique`, of a list."""
    values = list(value)
    _with_hashes(values)
    return jinja2.filters.sync_do_unique(environment, values, case_sensitive, attribute)


@jinja2.pass_environment
def _sum(
    environment: jinja2.Environment, iterable: Any, attribute: Any = None, start: Any = 0
) -> Any:
    """Jinja's `sum`, of a list: each sum of two lists is a new one."""
    values = list(iterable)
    if not isinstance(start, (int, float)):
        BUDGET.room(len(values) * BUDGET.weigh([start, values]), "sum")
    return jinja2.filters.sync_do_sum(environment, values, attribute, start)


@jinja2.pass_environment
def _groupby(
    environment: jinja2.Environment,
    value: Any,
    attribute: Any,
    default: Any = None,
    case_sensitive: bool = False,
) -> list[Any]:
    """Jinja's `groupby`, of a list: a default is written in lower case for each item."""
    values = list(value)
    BUDGET.room(len(values) * BUDGET.weigh(default), "groupby")
    return jinja2.filters.sync_do_groupby(environment, values, attribute, default, case_sensitive)


@jinja2.pass_context
def _finalize(context: jinja2.runtime.Context, value: Any) -> Any:
    """What a template prints, if it is text, a number, undefined, or a list or dict of these.

    Any other object prints a memory address, or is in an order of its own in each process.
    With the context as a parameter Jinja calls it while it renders, never while it compiles.
    """
    BUDGET.read(_ITEM)
    if not isinstance(value, str):
        BUDGET.room(_ESCAPES * BUDGET.weigh(value), "a text")
        _refuse_objects(value)
        value = str(value)
    BUDGET.make(1 + len(value), "what is printed")
    return value


def _refuse_objects(value: Any) -> None:
    if isinstance(value, dict):
        _refuse_objects([*value.keys(), *value.values()])
    elif isinstance(value, (list, tuple)):
        for each in value:
            _refuse_objects(each)
    elif value is not None and not isinstance(value, (str, int, float, jinja2.Undefined)):
        raise jinja2.TemplateRuntimeError(f"it prints a {type(value).__name__}, which is no text")


# ---- What compiled templates report ----


def _body(work: int, characters: int) -> bool:
    """A body of a loop, macro or block begins, or the test of a loop: true, for an `and`."""
    BUDGET.read(work)
    if characters:
        BUDGET.make(characters)
    return True


def _read(value: Any) -> Any:
    """A value is compared."""
    BUDGET.read(BUDGET.weigh(value))
    return value


def _key(value: Any) -> Any:
    """A value is looked up: its hash is taken, and it is in the message if nothing is found."""
    size = BUDGET.weigh(value)
    BUDGET.read(size)
    BUDGET.room(_ESCAPES * size, "a key")
    return value


def _made(value: Any) -> Any:
    """A list or dict was written, or a part was cut out."""
    BUDGET.make(BUDGET.weigh(value))
    return value


@jinja2.pass_eval_context
def _concatenated(eval_ctx: jinja2.nodes.EvalContext, values: tuple[Any, ...]) -> str:
    """Jinja's `~`."""
    size = sum(len(x) if type(x) is str else _ESCAPES * BUDGET.weigh(x) for x in values)
    BUDGET.room(size, "~")
    join = jinja2.runtime.markup_join if eval_ctx.autoescape else jinja2.runtime.str_join
    text = join(values)
    BUDGET.make(len(text), "~")
    return text


_REPORTS: Mapping[str, Callable[..., Any]] = {
    _BODY: _body,
    _READ: _read,
    _KEY: _key,
    _MADE: _made,
    _CONCATENATED: _concatenated,
}


class _Reporting(jinja2.visitor.NodeTransformer):
    """Puts the reports into a template's tree."""

    def _with_body(self, node: Any) -> Any:
        self.generic_visit(node)
        nodes, characters = _extent(node)
        call = self._report(_BODY, _constant(_STEP * (1 + nodes // _NODES)), _constant(characters))
        node.body.insert(0, jinja2.nodes.ExprStmt(call, lineno=node.lineno))
        if isinstance(node, jinja2.nodes.For) and node.test is not None:
            step = self._report(_BODY, _constant(_STEP), _constant(0))
            node.test = jinja2.nodes.And(step, node.test, lineno=node.lineno)
        return node

    visit_For = visit_Macro = visit_CallBlock = visit_Block = _with_body

    def _as_made(self, node: Any) -> Any:
        self.generic_visit(node)
        if _is_constant(node) or getattr(node, "ctx", "load") != "load":
            return node  # it is no larger than the template
        return self._report(_MADE, node)

    visit_List = visit_Dict = visit_Tuple = _as_made

    def visit_Getitem(self, node: jinja2.nodes.Getitem) -> Any:
        self.generic_visit(node)
        if isinstance(node.arg, jinja2.nodes.Slice):
            return self._report(_MADE, node)
        if not _is_constant(node.arg):
            node.arg = self._report(_KEY, node.arg)
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> Any:
        self.generic_visit(node)
        values = jinja2.nodes.Tuple(node.nodes, "load", lineno=node.lineno)
        return self._report(_CONCATENATED, values)

    def visit_Compare(self, node: jinja2.nodes.Compare) -> Any:
        self.generic_visit(node)
        for operand in node.ops:
            if not _is_constant(operand.expr):
                operand.expr = self._report(_READ, operand.expr)
        # `in` takes the hash of what it looks for, or compares all with it.
        if any(each.op in ("in", "notin") for each in node.ops) and not _is_constant(node.expr):
            node.expr = self._report(_READ, node.expr)
        return node

    @staticmethod
    def _report(name: str, node: Any, *args: Any) -> jinja2.nodes.Filter:
        return jinja2.nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


def _constant(value: int) -> jinja2.nodes.Const:
    return jinja2.nodes.Const(value, lineno=1)


def _is_constant(node: jinja2.nodes.Node) -> bool:
    if isinstance(node, jinja2.nodes.Const):
        return True
    kinds = (jinja2.nodes.Literal, jinja2.nodes.Pair, jinja2.nodes.UnaryExpr)
    return isinstance(node, kinds) and all(map(_is_constant, node.iter_child_nodes()))


def _extent(node: jinja2.nodes.Node) -> tuple[int, int]:
    """Nodes and characters of a body, without the bodies in it that are counted for themselves."""
    nodes = characters = 0
    pending = list(node.iter_child_nodes())
    while pending:
        each = pending.pop()
        nodes += 1
        if isinstance(each, jinja2.nodes.TemplateData):
            characters += len(each.data)
        inner = ("body", "test", "defaults") if isinstance(each, _BODIES) else ()
        pending.extend(each.iter_child_nodes(exclude=inner))
    return nodes, characters


_BODIES = (
    jinja2.nodes.For,
    jinja2.nodes.Macro,
    jinja2.nodes.CallBlock,
    jinja2.nodes.Block,
)


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks text for loss masks; here it is plain text."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A scope of its own, as in transformers: what is set inside does not reach the outside.
        return jinja2.nodes.Scope(body, lineno=line)


class _Formatter(jinja2.sandbox.SandboxedFormatter):
    """str.format, with widths and values counted."""

    def format_field(self, value: Any, format_spec: str) -> str:
        BUDGET.read(_CALL)
        size = sum(map(_number, re.findall(r"\d+", format_spec)))
        BUDGET.room(size + _ESCAPES * BUDGET.weigh(value), "format")
        text = super().format_field(value, format_spec)
        BUDGET.make(1 + len(text), "format")
        return text

    def convert_field(self, value: Any, conversion: Any) -> Any:
        if conversion is None:
            return value
        BUDGET.room(_ESCAPES * BUDGET.weigh(value), "format")
        text = super().convert_field(value, conversion)
        BUDGET.make(len(text), "format")
        return text


class _EscapeFormatter(_Formatter, jinja2.sandbox.SandboxedEscapeFormatter):
    """The same for text that is marked as HTML."""


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with an end: templates that loop, recurse or grow too far are errors."""

    intercepted_binops = frozenset(["+", "-", "*", "//", "%", "**"])

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        if len(source) > MOST_SOURCE:
            raise jinja2.exceptions.SecurityError(
                f"it has {len(source):,} characters, more than {MOST_SOURCE:,}"
            )
        return _Reporting().visit(super()._parse(source, name, filename))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and type(left) is str and type(right) is str:
            BUDGET.make(len(left) + len(right), "+")
        elif isinstance(left, int) and isinstance(right, int):
            _refuse_bits(operator, left, right)
        elif operator == "%":
            if isinstance(left, (str, bytes)):
                BUDGET.room(_ESCAPES * (BUDGET.weigh(left) + BUDGET.weigh(right)), "%")
                BUDGET.room(_percent(left, right), "%")
                return _result(super().call_binop(context, operator, left, right), "%")
        elif operator == "*":
            if isinstance(left, int) or isinstance(right, int):  # a text or a list, repeated
                times, value = (left, right) if isinstance(left, int) else (right, left)
                BUDGET.make(max(times, 0) * BUDGET.weigh(value), "*")
        elif not isinstance(left, float) and not isinstance(right, float):
            BUDGET.make(BUDGET.weigh(left) + BUDGET.weigh(right), operator)
            if operator == "-" and isinstance(left, Set) and isinstance(right, Collection):
                _with_hashes(left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **named: Any) -> Any:
        if not isinstance(__obj, _FUNCTIONS):
            # A macro, a block, a loop: what they do is counted there.
            BUDGET.read(_STEP + _ITEM * (len(args) + len(named)))
            return _result(super().call(__context, __obj, *args, **named), "a call")
        name = __obj.__name__
        owner = getattr(__obj, "__self__", None)
        if name in _FREE_METHODS:
            _reckon(name, None, args, {})
            return super().call(__context, __obj, *args, **named)
        size = _CALL_SIZES.get(name)
        if size is not None:
            # What a generator holds can be reckoned when it is a list.
            args = tuple(list(arg) if isinstance(arg, Iterator) else arg for arg in args)
        given = named
        if named:
            given = {k: v for k, v in named.items() if k not in _OF_THE_COMPILER}
        is_method = owner is not None and not isinstance(owner, type)
        _reckon(name, size, (owner, *args) if is_method else args, given)
        return _result(super().call(__context, __obj, *args, **named), name)

    def getitem(self, obj: Any, argument: Any) -> Any:
        # Filters with an `attribute` come here for each item and each part of the attribute's path.
        BUDGET.read(_ITEM)
        try:
            return obj[argument]
        except (TypeError, LookupError):
            BUDGET.read(_CALL)
            return super().getitem(obj, argument)

    def call_filter(self, name: str, *args: Any, **named: Any) -> Any:
        if name in _REPORTS:  # `map` takes any text as a name
            raise jinja2.TemplateRuntimeError(f"there is no filter {name!r}")
        return super().call_filter(name, *args, **named)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Jinja's own, with a formatter that counts."""
        if super().wrap_str_format(value) is None:
            return None
        owner = value.__self__
        if isinstance(owner, markupsafe.Markup):
            formatter: string.Formatter = _EscapeFormatter(self, escape=owner.escape)
        else:
            formatter = _Formatter(self)

        @functools.wraps(value)
        def format_(*args: Any, **named: Any) -> str:
            if value.__name__ == "format_map":
                if named or len(args) != 1:
                    raise TypeError("format_map() takes exactly one argument")
                args, named = (), args[0]
            return type(owner)(formatter.vformat(owner, args, named))

        return format_


_FUNCTIONS = (types.BuiltinMethodType, types.MethodType, types.FunctionType, type)
_OF_THE_COMPILER = ("_loop_vars", "_block_vars")  # arguments that each call gets


def _refuse_bits(operator: str, left: int, right: int) -> None:
    bits = left.bit_length(), right.bit_length()
    if operator == "**":
        if left in (-1, 0, 1) or right < 0:
            return
        size = bits[0] * right
    elif operator == "*":
        size = sum(bits)
    else:
        size = max(bits)
    if size > MOST_BITS:
        raise _too_large(operator)


def _environment() -> Environment:
    """Jinja as transformers sets it up: templates are written for exactly these settings."""
    # Immutable: a template cannot change the lists and dicts that it is given. The sandbox refuses
    # attributes that begin with an underscore, by which Python objects lead out of it.
    # Not optimized: constants would be made while it compiles, for which there is no budget.
    environment = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
        finalize=_finalize,
        optimized=False,
    )
    filters: dict[str, Any] = environment.filters
    filters.update(
        groupby=_groupby,
        join=_join,
        random=_changing("random"),
        sum=_sum,
        tojson=_tojson,
        unique=_unique,
    )
    for name in filters.keys() - _FREE_FILTERS:
        filters[name] = _counted(filters[name], name, _FILTER_SIZES.get(name))
    filters.update(_REPORTS)
    tests: dict[str, Any] = environment.tests
    for name in tests.keys() - _FREE_TESTS:
        tests[name] = _counted(tests[name], name, _TEST_SIZES.get(name))
    environment.globals.update(
        lipsum=_changing("lipsum"),
        namespace=_Namespace,
        raise_exception=_raise_exception,
        strftime_now=_strftime_now,
    )
    return environment


ENVIRONMENT = _environment()
