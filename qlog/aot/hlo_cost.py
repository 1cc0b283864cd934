"""What an optimised HLO module costs on a TPU: FLOPs, bytes of HBM, bytes between chips, seconds.

XLA's own `cost_analysis` counts a loop's body once, whatever its trip count, and a program whose
layers, microbatches and tokens are loops is nearly all body. Here a body counts as often as it runs.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from qlog.parallel.chips import Chip

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"\b(pred|token|[a-z]+\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_RENAMES = frozenset("bitcast copy reshape transpose convert".split())
_KERNEL_SLOTS = 512  # keys that an attention kernel visits or leaves out together, about
_FREE = frozenset(  # they name what is there, or are paid for where the data are used
    "parameter constant get-tuple-element tuple bitcast after-all partition-id replica-id "
    "opt-barrier add-dependency".split()
)


class Shape(NamedTuple):
    """One array of an instruction's result. `in_hbm`: not in a chip's scratch memories."""

    dtype: str
    dimensions: tuple[int, ...]
    in_hbm: bool

    @property
    def bytes(self) -> float:
        digits = re.search(r"\d+", self.dtype)
        bits = int(digits.group()) if digits else 8 * (self.dtype == "pred")
        return math.prod(self.dimensions) * bits / 8


class Instruction(NamedTuple):
    """One line of HLO: `results` are the arrays of its type, a tuple's flattened."""

    name: str
    opcode: str
    results: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool


class Sweep(NamedTuple):
    """An array of this shape, read or written along an axis of `length` in slices of `size`."""

    shape: tuple[int, ...]
    length: int
    size: int

    @property
    def blocks(self) -> int:
        return -(-self.length // self.size)


class Cost(NamedTuple):
    """FLOPs of matrix products, bytes moved in HBM, and bytes that one chip sends, by collective.

    A kernel counts as its own `cost_estimate` says. `is_whole`: no kernel was without one; else its
    FLOPs are missing here, and its bytes are those of its operands and results.
    """

    flops: float = 0.0
    bytes: float = 0.0
    sent: Mapping[str, float] = {}
    is_whole: bool = True

    def plus(self, other: "Cost", times: float = 1) -> "Cost":
        kinds = [kind for kind in _COLLECTIVES if kind in self.sent or kind in other.sent]
        sent = {k: self.sent.get(k, 0.0) + times * other.sent.get(k, 0.0) for k in kinds}
        return Cost(
            self.flops + times * other.flops,
            self.bytes + times * other.bytes,
            sent,
            self.is_whole and other.is_whole,
        )

    def scaled(self, share: float) -> "Cost":
        """The same with `share` of the FLOPs and of the bytes in HBM."""
        return self._replace(flops=share * self.flops, bytes=share * self.bytes)

    def seconds(self, chip: Chip) -> float:
        """The roofline: the slowest of arithmetic, memory and interconnect, each at its peak."""
        return max(self.times(chip).values())

    def times(self, chip: Chip) -> dict[str, float]:
        """Seconds at the chip's peaks, each resource alone."""
        return {
            "arithmetic": self.flops / chip.flops,
            "memory": self.bytes / chip.hbm_speed,
            "interconnect": sum(self.sent.values()) / chip.link_speed,
        }


class Module:
    """An optimised HLO module, from `compiled.as_text()`.

    Attributes:
      computations: {name: instructions}, in the order of the text.
      entry: name of the one that runs first.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] = []
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                current = self.computations.setdefault(header.group(2), [])
                self.entry = header.group(2) if header.group(1) else self.entry
            elif found := _INSTRUCTION.match(line):
                current.append(_parse(*found.groups()))

    def cost(self, trips: Callable[["Sweep"], float] = lambda sweep: sweep.blocks) -> Cost:
        """Of the whole module on one chip.

        Args:
          trips: how often a loop runs whose end depends on data, by the longest array that it
            sweeps, and how many blocks of its keys attention visits. By default all.
        """

        @functools.cache
        def total(name: str) -> Cost:
            by_name = {each.name: each for each in self.computations[name]}
            cost = Cost()
            for each in by_name.values():
                cost = cost.plus(one(each, by_name))
            return cost

        def all_of(names: list[str], times: float = 1) -> Cost:
            return functools.reduce(lambda cost, name: cost.plus(total(name), times), names, Cost())

        def share(kernel: Instruction, by_name) -> float:
            """Of an attention kernel's estimate, which is for all queries with all keys."""
            shapes = [by_name[name].results[0].dimensions for name in kernel.operands]
            caches = [shape for shape in shapes if len(shape) == 4 and shape[2] > 1]
            if "attention" not in kernel.attributes or len(caches) < 3:
                return 1.0
            sweep = Sweep(caches[-1], caches[-1][2], _KERNEL_SLOTS)  # the values come last
            return trips(sweep) / sweep.blocks

        def one(each: Instruction, by_name) -> Cost:
            called = _CALLED.findall(each.attributes)
            if each.opcode == "while":
                count = self._trips(each, by_name)
                count = trips(self._swept(each)) if count is None else count
                return all_of(called, count)
            if each.opcode == "conditional":
                branches = called + _NAME.findall("".join(_BRANCHES.findall(each.attributes)))
                return max(map(total, branches), key=lambda cost: (cost.flops, cost.bytes))
            if each.opcode in ("call", "async-start"):
                return all_of(called)
            if _is_kernel(each):
                return _own(each, by_name).scaled(share(each, by_name))
            if each.opcode == "fusion":
                return all_of(called)._replace(
                    bytes=_fusion_bytes(each, by_name, self.computations)
                )
            return _own(each, by_name)

        return total(self.entry)

    def instructions(self) -> Iterator[tuple[Instruction, int]]:
        """Every instruction outside fusions, and in how many loops it lies."""

        def walk(name, depth):
            for each in self.computations[name]:
                yield each, depth
                if each.opcode in ("while", "call", "conditional"):
                    inner = _CALLED.findall(each.attributes)
                    inner += _NAME.findall("".join(_BRANCHES.findall(each.attributes)))
                    for called in inner:
                        yield from walk(called, depth + (each.opcode == "while"))

        yield from walk(self.entry, 0)

    def _trips(self, loop: Instruction, by_name: Mapping[str, Instruction]) -> int | None:
        """How often a loop runs: as XLA noted it, or by its condition, a counter below a constant.

        TPU programs carry no notes; JAX's loops, and those that XLA makes, count up by one.
        """
        if noted := _TRIPS.search(loop.attributes):
            return int(noted.group(1))
        name = re.search(r"condition=%([\w.\-]+)", loop.attributes).group(1)
        condition = {each.name: each for each in self.computations[name]}
        root = next(each for each in condition.values() if each.is_root)
        if root.opcode != "compare" or "direction=LT" not in root.attributes:
            return None
        counter, limit = (condition[name] for name in root.operands)
        position = re.search(r"index=(\d+)", counter.attributes)
        if limit.opcode != "constant" or not position:
            return None
        initial = by_name.get(by_name[loop.operands[0]].operands[int(position.group(1))])
        while initial is not None and initial.opcode in ("copy", "bitcast"):
            initial = by_name.get(initial.operands[0])
        first = _integer(initial) if initial is not None and initial.opcode == "constant" else 0
        return max(0, _integer(limit) - first)

    def _swept(self, loop: Instruction) -> "Sweep":
        """The longest array, in slices, that a loop's body reads or writes slice by slice."""
        longest = Sweep((), 1, 1)

        def look(name):
            nonlocal longest
            by_name = {each.name: each for each in self.computations[name]}
            for each in by_name.values():
                if each.opcode == "fusion":
                    look(_CALLED.findall(each.attributes)[0])
                elif each.opcode in ("dynamic-slice", "dynamic-update-slice"):
                    whole = by_name[each.operands[0]].results[0].dimensions
                    part = each if each.opcode == "dynamic-slice" else by_name[each.operands[1]]
                    if len(whole) == 1:  # a table by the chip's number: not swept
                        continue
                    for length, size in zip(whole, part.results[0].dimensions):
                        sweep = Sweep(whole, length, size)
                        longest = max(longest, sweep, key=lambda sweep: sweep.length / sweep.size)

        look(re.search(r"body=%([\w.\-]+)", loop.attributes).group(1))
        return longest


def _integer(constant: Instruction) -> int:
    return int(re.match(r"-?\d+", constant.attributes).group())


def _parse(root: str | None, name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opening = rest.index("(", end)
    closing = _closing(rest, opening)
    arguments = rest[opening + 1 : closing]
    opcode = rest[end:opening].strip()
    attributes = (
        arguments + rest[closing + 1 :]
        if opcode in ("constant", "parameter")
        else rest[closing + 1 :]
    )
    results = tuple(
        Shape(dtype, tuple(map(int, filter(None, sizes.split(",")))), "S(" not in (layout or ""))
        for dtype, sizes, layout in _SHAPE.findall(rest[:end])
    )
    return Instruction(
        name, opcode, results, tuple(_NAME.findall(arguments)), attributes, bool(root)
    )


def _closing(text: str, opening: int) -> int:
    depth = 0
    for index in range(opening, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    raise ValueError(f"unbalanced parentheses: {text[:80]}")


def _bytes(each: Instruction) -> float:
    return sum(shape.bytes for shape in each.results)


def _hbm(each: Instruction) -> float:
    return sum(shape.bytes for shape in each.results if shape.in_hbm)


def _is_kernel(each: Instruction) -> bool:
    return each.opcode == "custom-call" and "tpu_custom_call" in each.attributes


def _own(each: Instruction, by_name: Mapping[str, Instruction]) -> Cost:
    """Of an instruction that calls nothing; of a fusion, of what it calls apart."""
    kind = each.opcode.removesuffix("-start")
    operands = [by_name[name] for name in each.operands if name in by_name]
    if kind in _COLLECTIVES:
        # A -start's result holds the operands too.
        moved = _hbm(each) + (0.0 if each.opcode.endswith("-start") else sum(map(_hbm, operands)))
        return Cost(0.0, moved, {kind: _sent(kind, each, by_name)})
    if each.opcode in _FREE or each.opcode.endswith(("-done", "-update")):
        return Cost()
    if _is_kernel(each):
        estimate = re.search(r'"cost_estimate":\{([^}]*)\}', each.attributes)
        fields = dict(re.findall(r'"(\w+)":"?(\d+)', estimate.group(1))) if estimate else {}
        moved = float(fields.get("bytes_accessed", 0)) or _hbm(each) + sum(map(_hbm, operands))
        return Cost(float(fields.get("flops", 0)), moved, {}, "flops" in fields)
    if each.opcode in ("dot", "convolution"):
        flops = _dot_flops if each.opcode == "dot" else _convolution_flops
        return Cost(flops(each, by_name), _hbm(each) + sum(map(_hbm, operands)))
    if each.opcode == "copy-start":  # its result holds both copies
        return Cost(0.0, _hbm(each))
    if kind in ("slice", "dynamic-slice", "gather"):  # a -start's result begins with the operand
        part, source = each.results[kind != each.opcode], operands[0].results[0]
        return Cost(0.0, part.bytes * (part.in_hbm + source.in_hbm))
    if each.opcode in ("dynamic-update-slice", "scatter"):
        part = operands[1 if each.opcode[0] == "d" else -1].results[0]
        return Cost(0.0, part.bytes * (part.in_hbm + each.results[0].in_hbm))
    return Cost(0.0, _hbm(each) + sum(map(_hbm, operands)))


def _fusion_bytes(each: Instruction, by_name, computations) -> float:
    """Operands and results; of what is only sliced or updated in place, the slice alone."""

    def parameter(inside, position):
        return next(
            x.name
            for x in inside
            if x.opcode == "parameter" and int(re.match(r"\d+", x.attributes).group()) == position
        )

    def ends(name, inside):
        """What really uses an array, seen through renamings and fusions inside of fusions."""
        for user in inside:
            if name not in user.operands:
                continue
            if user.opcode == "fusion":
                within = computations[_CALLED.findall(user.attributes)[0]]
                yield from ends(parameter(within, user.operands.index(name)), within)
            elif user.opcode in _RENAMES and not user.is_root:
                yield from ends(user.name, inside)
            else:
                yield user, name, inside

    inside = computations[_CALLED.findall(each.attributes)[0]]
    total, updated = 0.0, 0.0
    for position, operand in enumerate(each.operands):
        size = _hbm(by_name[operand]) if operand in by_name else 0.0
        uses = list(ends(parameter(inside, position), inside)) if size else []
        if uses and all(user.opcode in ("dynamic-slice", "slice", "gather") for user, *_ in uses):
            size = min(size, sum(_bytes(user) for user, *_ in uses))
        elif uses and all(
            u.opcode == "dynamic-update-slice" and u.operands[0] == n for u, n, _ in uses
        ):
            written = sum(
                _bytes(x) for user, _, within in uses for x in within if x.name == user.operands[1]
            )
            updated += size - written  # the result is the operand's own buffer
            size = 0.0
        total += size
    return total + max(0.0, _hbm(each) - updated)


def _sent(kind: str, each: Instruction, by_name) -> float:
    """Bytes that one chip sends, on a ring of its group."""
    if kind == "collective-permute":
        return max(shape.bytes for shape in each.results)
    size = _group_size(each.attributes)
    taken = sum(
        shape.bytes for name in each.operands if name in by_name for shape in by_name[name].results
    )
    share = (size - 1) / size
    return {
        "all-gather": taken * (size - 1),
        "all-reduce": 2 * share * taken,
        "reduce-scatter": share * taken,
        "all-to-all": share * taken,
    }[kind]


def _group_size(attributes: str) -> int:
    """Chips of one group; replica_groups are written in three ways."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\].*? \{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found.group(1)))
        # An axis may be split: 'axis':(before)size.
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found.group(2))
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(found.group(2))
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(found.group(1).split(","))
    raise ValueError(f"a collective without replica_groups: {attributes[:120]}")


def _dot_flops(each: Instruction, by_name) -> float:
    left = by_name[each.operands[0]].results[0].dimensions
    axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", each.attributes)
    contracted = [left[int(axis)] for axis in axes.group(1).split(",") if axis] if axes else []
    return 2.0 * math.prod(each.results[0].dimensions) * math.prod(contracted)


def _convolution_flops(each: Instruction, by_name) -> float:
    """TPUs write matrix products as convolutions: batch axes are windows that mostly miss."""
    left, _, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.attributes).groups()
    image = dict(zip(left, by_name[each.operands[0]].results[0].dimensions))
    result = dict(zip(out, each.results[0].dimensions))
    groups = re.search(r"feature_group_count=(\d+)", each.attributes)
    pairs = 1.0
    window = re.search(r"window=\{([^}]*)\}", each.attributes)
    fields = dict(re.findall(r"(\w+)=(\S+)", window.group(1))) if window else {}
    spatial = sorted(label for label in result if label.isdigit())
    for index, label in enumerate(spatial):
        of = lambda key, default: fields.get(key, "x".join([default] * len(spatial))).split("x")[
            index
        ]  # noqa: E731, B023
        pairs *= _valid_pairs(
            image[label],
            result[label],
            int(of("size", "1")),
            int(of("stride", "1")),
            int(of("pad", "0_0").split("_")[0]),
            int(of("lhs_dilate", "1")),
            int(of("rhs_dilate", "1")),
        )
    features = image["f"] / (int(groups.group(1)) if groups else 1)
    return 2.0 * result["b"] * result["f"] * features * pairs


@functools.cache
def _valid_pairs(size, out, kernel, stride, low, dilation, kernel_dilation) -> int:
    """Of output and kernel positions, how many meet an element of the input."""
    where = np.arange(out)[:, None] * stride + np.arange(kernel) * kernel_dilation - low
    return int(((where >= 0) & (where % dilation == 0) & (where // dilation < size)).sum())
