"""What an optimized HLO module costs on a TPU: FLOPs, bytes of HBM, bytes between chips, seconds.

XLA's own `cost_analysis` counts the body of a loop once, however often it runs. Layers,
microbatches and tokens are loops here, so nearly all of a program is body. This module counts a
body as often as it runs.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from qlog.aot.hlo import Computation, Instruction, Module
from qlog.parallel.chips import Chip

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# A use of an array by one of these is a use of the same array under another name or layout.
_RENAMES = frozenset("bitcast copy reshape transpose convert".split())
_SLICES = ("dynamic-slice", "slice", "gather")
_KERNEL_SLOTS = 512  # about as many keys an attention kernel visits or skips together
# These move nothing: they name what is there, or their data are counted where they are used.
_FREE = frozenset(
    "parameter constant get-tuple-element tuple bitcast after-all partition-id replica-id "
    "opt-barrier add-dependency".split()
)
_KNOWN_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# 'op_name="jit(f)/transpose(jvp(packs))/while"': the name of the scope right around a loop.
_LOOP_SCOPE = re.compile(r'op_name="[^"]*?(\w+)\)*/while"')


class SlicedArray(NamedTuple):
    """An array that a loop reads or writes slice by slice, along one of its axes."""

    shape: tuple[int, ...]  # of the whole array, on one chip
    length: int  # of the axis
    size: int  # of one slice along it

    @property
    def num_slices(self) -> int:
        return -(-self.length // self.size)


class DataLoop(NamedTuple):
    """A loop that ends when the data say so, or a kernel that skips blocks as the data say."""

    scope: str  # the `jax.named_scope` right around the loop; '' where there is none
    array: SlicedArray  # the array with most slices in the body


class Cost(NamedTuple):
    """What a program costs on one chip."""

    flops: float = 0.0  # of matrix products
    bytes: float = 0.0  # moved between HBM and the chip
    sent: Mapping[str, float] = {}  # bytes that the chip sends, by kind of collective
    # False: some Pallas kernel has no cost estimate. Then its FLOPs are missing, and its bytes are
    # those of its operands and results.
    is_whole: bool = True

    def plus(self, other: "Cost", times: float = 1) -> "Cost":
        """This cost, and `times` times the other one."""
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
        """Seconds of each resource at the chip's peak, as if the other two took no time."""
        return {
            "arithmetic": self.flops / chip.flops,
            "memory": self.bytes / chip.hbm_speed,
            "interconnect": sum(self.sent.values()) / chip.link_speed,
        }


def all_slices(loop: DataLoop) -> float:
    """As many iterations as the longest array has slices: what a loop runs at most."""
    return loop.array.num_slices


def module_cost(module: Module, trips: Callable[[DataLoop], float] = all_slices) -> Cost:
    """The cost of the whole module on one chip.

    Args:
      trips: how often a loop runs whose end depends on data; of an attention kernel, how many of
        its blocks of keys it visits. The default takes them all.
    """
    return _Counter(module, trips).total(module.entry)


class _Counter:
    """Sums costs over computations. Each is counted once, however often it is called."""

    def __init__(self, module: Module, trips: Callable[[DataLoop], float]):
        self._module, self._trips = module, trips
        self._totals: dict[str, Cost] = {}

    def total(self, name: str) -> Cost:
        """Of one run of the computation of that name."""
        if name not in self._totals:
            computation, cost = self._module.computations[name], Cost()
            for instruction in computation.values():
                cost = cost.plus(self._cost(instruction, computation))
            self._totals[name] = cost
        return self._totals[name]

    def _all(self, names: list[str], times: float = 1) -> Cost:
        return functools.reduce(
            lambda cost, name: cost.plus(self.total(name), times), names, Cost()
        )

    def _cost(self, instruction: Instruction, computation: Computation) -> Cost:
        if instruction.opcode == "while":
            # The condition runs once more than the body. One comparison more or less is nothing.
            return self._all(instruction.called, self._loop_trips(instruction, computation))
        if instruction.opcode == "conditional":
            # Which branch runs depends on data. A step at its longest takes the most expensive.
            branches = map(self.total, instruction.branches)
            return max(branches, key=lambda cost: (cost.flops, cost.bytes))
        if instruction.opcode in ("call", "async-start"):
            return self._all(instruction.called)
        if instruction.is_kernel:
            visited = self._visited_share(instruction, computation)
            return _own_cost(instruction, computation).scaled(visited)
        if instruction.opcode == "fusion":
            # The instructions of a fusion hand their results on inside the chip. Their FLOPs and
            # collectives count, their bytes do not: HBM sees the operands and the results only.
            moved = _fusion_bytes(instruction, computation, self._module)
            return self._all(instruction.called)._replace(bytes=moved)
        return _own_cost(instruction, computation)

    # ---- How often a loop runs ----

    def _loop_trips(self, loop: Instruction, computation: Computation) -> float:
        # Most loops are scans over layers or chunks: their number is in the program.
        constant = _constant_trips(loop, computation, self._module)
        if constant is not None:
            return constant
        # The rest end when the data say so (all rollouts are done, no more keys are visible). The
        # caller knows what a step at its longest would be, from the loop's name and its arrays.
        scope = _LOOP_SCOPE.search(loop.attributes)
        array = _longest_sliced(loop, self._module)
        return self._trips(DataLoop(scope.group(1) if scope else "", array))

    def _visited_share(self, kernel: Instruction, computation: Computation) -> float:
        """The share of its cost estimate that an attention kernel really spends.

        The estimate is for all queries with all keys. The kernel skips blocks of keys that none of
        its queries sees.
        """
        shapes = [computation[name].results[0].dimensions for name in kernel.operands]
        # Of the operands, [B, K, slots, C] with more than one slot are queries, keys and values.
        caches = [shape for shape in shapes if len(shape) == 4 and shape[2] > 1]
        if "attention" not in kernel.attributes or len(caches) < 3:
            return 1.0
        values = caches[-1]
        array = SlicedArray(values, values[2], _KERNEL_SLOTS)
        return self._trips(DataLoop("attention_blocks", array)) / array.num_slices


def _constant_trips(loop: Instruction, computation: Computation, module: Module) -> int | None:
    """How often a loop runs, where the program says it; None where the data decide.

    XLA notes the number on CPUs. TPU programs carry no note, but the loops of JAX and those that
    XLA makes itself count up by one until a condition fails, which is

        ROOT %less = pred[] compare(%step, %limit), direction=LT

    where %limit is a constant of the condition and %step an element of the loop's state, whose
    first value is an operand of the tuple that enters the loop.
    """
    if noted := _KNOWN_TRIP_COUNT.search(loop.attributes):
        return int(noted.group(1))
    condition = module.computations[_called_as("condition", loop)]
    root = next(each for each in condition.values() if each.is_root)
    if root.opcode != "compare" or "direction=LT" not in root.attributes:
        return None
    counter, limit = (condition[name] for name in root.operands)
    position = re.search(r"index=(\d+)", counter.attributes)
    if limit.opcode != "constant" or not position:
        return None
    # The first value of the counter: 0 unless the program has another constant there.
    state = computation[loop.operands[0]]
    initial = computation.get(state.operands[int(position.group(1))])
    while initial is not None and initial.opcode in ("copy", "bitcast"):
        initial = computation.get(initial.operands[0])
    first = initial.number if initial is not None and initial.opcode == "constant" else 0
    return max(0, limit.number - first)


def _longest_sliced(loop: Instruction, module: Module) -> SlicedArray:
    """Of the arrays that the body reads or writes slice by slice, the one with most slices.

    A loop over tokens, chunks or blocks of keys touches one slice of some array in each iteration:
    this array's number of slices is how often the loop runs at most.
    """
    arrays = [SlicedArray((), 1, 1), *_sliced(_called_as("body", loop), module)]
    return max(arrays, key=lambda array: array.length / array.size)


def _called_as(name: str, loop: Instruction) -> str:
    """Name of the computation that is the `body` or `condition` of the loop."""
    found = re.search(rf"{name}=%([\w.\-]+)", loop.attributes)
    if not found:
        raise ValueError(f"{loop.name}: a loop without a {name}")
    return found.group(1)


def _sliced(name: str, module: Module) -> Iterator[SlicedArray]:
    """The arrays that a computation slices, along every axis; those of its fusions too."""
    computation = module.computations[name]
    for each in computation.values():
        if each.opcode == "fusion":
            yield from _sliced(each.called[0], module)
        elif each.opcode in ("dynamic-slice", "dynamic-update-slice"):
            whole = computation[each.operands[0]].results[0].dimensions
            # The slice is the result of a read, and the second operand of a write.
            part = each if each.opcode == "dynamic-slice" else computation[each.operands[1]]
            if len(whole) == 1:  # a table with an entry per chip: no loop goes through it
                continue
            for length, size in zip(whole, part.results[0].dimensions, strict=True):
                yield SlicedArray(whole, length, size)


# ---- One instruction ----


def _own_cost(instruction: Instruction, computation: Computation) -> Cost:
    """The cost of an instruction that calls no computation."""
    # An asynchronous instruction is two: NAME-start begins, NAME-done waits. The first one counts.
    kind = instruction.opcode.removesuffix("-start")
    is_start = kind != instruction.opcode
    operands = [computation[name] for name in instruction.operands if name in computation]
    read = sum(each.hbm_bytes for each in operands)
    written = instruction.hbm_bytes
    if kind in _COLLECTIVES:
        moved = written if is_start else written + read  # a -start's result holds the operands too
        return Cost(0.0, moved, {kind: _sent_bytes(kind, instruction, operands)})
    if instruction.opcode in _FREE or instruction.opcode.endswith(("-done", "-update")):
        return Cost()
    if instruction.is_kernel:
        # XLA cannot look into a kernel: its author says what it costs (pallas_call, cost_estimate).
        estimate = re.search(r'"cost_estimate":\{([^}]*)\}', instruction.attributes)
        fields = dict(re.findall(r'"(\w+)":"?(\d+)', estimate.group(1))) if estimate else {}
        moved = float(fields.get("bytes_accessed", 0)) or written + read
        return Cost(float(fields.get("flops", 0)), moved, {}, "flops" in fields)
    if instruction.opcode in ("dot", "convolution"):
        flops = _dot_flops if instruction.opcode == "dot" else _convolution_flops
        return Cost(flops(instruction, computation), written + read)
    if instruction.opcode == "copy-start":  # its result holds both copies
        return Cost(0.0, written)
    # A slice reads and writes the slice only, in HBM or not on either side. So does an update,
    # which XLA does in place: the result is the buffer of the operand.
    if kind in ("slice", "dynamic-slice", "gather"):
        # The result of a -start is a tuple that begins with the operand.
        part, source = instruction.results[1 if is_start else 0], operands[0].results[0]
        return Cost(0.0, part.bytes * (part.in_hbm + source.in_hbm))
    if instruction.opcode in ("dynamic-update-slice", "scatter"):
        # Operands are (whole, part, where...) and (whole, where, part).
        part = operands[1 if instruction.opcode == "dynamic-update-slice" else -1].results[0]
        return Cost(0.0, part.bytes * (part.in_hbm + instruction.results[0].in_hbm))
    return Cost(0.0, written + read)


class _Use(NamedTuple):
    """An instruction inside a fusion that reads an array, which it knows as `name`."""

    user: Instruction
    name: str
    computation: Computation  # in which the instruction is


def _fusion_bytes(fusion: Instruction, computation: Computation, module: Module) -> float:
    """Bytes that a fusion moves: operands and results, but of a sliced or updated array the slice.

    Two cases keep an operand from being read whole.
    Sliced: all uses are slices, such as one layer of the stacked parameters. The slices are read.
    Aliased: all uses update a slice of it in place, such as a token's keys in the cache. The result
    is the operand's own buffer, so neither is moved whole: the part that is written is.
    """
    inside = module.computations[fusion.called[0]]
    read, in_place = 0.0, 0.0
    for position, name in enumerate(fusion.operands):
        size = computation[name].hbm_bytes if name in computation else 0.0
        if not size:  # it lies in scratch memory
            continue
        uses = list(_uses(_parameter(inside, position), inside, module))
        if uses and all(use.user.opcode in _SLICES for use in uses):
            read += min(size, sum(use.user.bytes for use in uses))
        elif uses and all(_is_update_of(use.name, use.user) for use in uses):
            parts = (use.computation.get(use.user.operands[1]) for use in uses)
            # Of the result, `size` bytes are this buffer, and only the parts of them are written.
            in_place += size - sum(part.bytes for part in parts if part is not None)
        else:
            read += size
    return read + max(0.0, fusion.hbm_bytes - in_place)


def _is_update_of(name: str, user: Instruction) -> bool:
    return user.opcode == "dynamic-update-slice" and user.operands[0] == name


def _parameter(computation: Computation, position: int) -> str:
    """Name under which a fusion's computation knows its operand of that position."""
    return next(
        each.name
        for each in computation.values()
        if each.opcode == "parameter" and each.number == position
    )


def _uses(name: str, computation: Computation, module: Module) -> Iterator[_Use]:
    """What really reads an array inside a fusion, seen through renamings and inner fusions."""
    for user in computation.values():
        if name not in user.operands:
            continue
        if user.opcode == "fusion":
            inner = module.computations[user.called[0]]
            yield from _uses(_parameter(inner, user.operands.index(name)), inner, module)
        elif user.opcode in _RENAMES and not user.is_root:
            yield from _uses(user.name, computation, module)
        else:
            yield _Use(user, name, computation)


# ---- Communication ----


def _sent_bytes(kind: str, collective: Instruction, operands: list[Instruction]) -> float:
    """Bytes that one chip sends when the chips of its group form a ring.

    Of n chips, each has `taken` bytes. To gather, it passes on n - 1 pieces of that size. To reduce
    and scatter, it passes on n - 1 pieces of an n-th. To reduce everywhere is both, one after the
    other.
    """
    if kind == "collective-permute":
        return max(shape.bytes for shape in collective.results)
    size = _group_size(collective.attributes)
    taken = sum(each.bytes for each in operands)
    share = (size - 1) / size
    return {
        "all-gather": taken * (size - 1),
        "all-reduce": 2 * share * taken,
        "reduce-scatter": share * taken,
        "all-to-all": share * taken,
    }[kind]


def _group_size(attributes: str) -> int:
    """Chips of one group. XLA writes replica_groups in three ways."""
    # By axes of a mesh: replica_groups=mesh['a'=4,'b'=2] {'a'}. A part of an axis is {'a':(2)2},
    # 'axis':(size before the part)size of the part.
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\].*? \{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found.group(1)))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found.group(2))
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    # As an iota, [groups,chips of each]<=[all]: replica_groups=[2,8]<=[16].
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(found.group(2))
    # As lists of chips: replica_groups={{0,1},{2,3}}.
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(found.group(1).split(","))
    raise ValueError(f"a collective without replica_groups: {attributes[:120]}")


# ---- Matrix products ----


def _dot_flops(dot: Instruction, computation: Computation) -> float:
    """2 x (elements of the result) x (elements of the axes that are summed over)."""
    left = computation[dot.operands[0]].results[0].dimensions
    axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.attributes)
    contracted = [left[int(axis)] for axis in axes.group(1).split(",") if axis] if axes else []
    return 2.0 * math.prod(dot.results[0].dimensions) * math.prod(contracted)


def _convolution_flops(convolution: Instruction, computation: Computation) -> float:
    """The same of a convolution, which is how TPUs write most matrix products.

    `dim_labels=bf0_oi0->bf0` names the axes of image, kernel and result: b(atch), f(eatures),
    i(nput) and o(utput) features, and a digit per spatial axis. The batch axes of a batched product
    become spatial axes, with windows of which all positions but one fall on padding. So pairs of
    result and kernel positions are counted only where the kernel meets an element of the image.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    if not labels:
        raise ValueError(f"{convolution.name}: a convolution without dim_labels")
    image_labels, _, result_labels = labels.groups()
    image_shape = computation[convolution.operands[0]].results[0].dimensions
    image = dict(zip(image_labels, image_shape, strict=True))
    result = dict(zip(result_labels, convolution.results[0].dimensions, strict=True))
    spatial = sorted(label for label in result if label.isdigit())
    windows = _windows(convolution.attributes, len(spatial))
    pairs = 1.0
    for label, window in zip(spatial, windows, strict=True):
        pairs *= _valid_pairs(image[label], result[label], window)
    groups = re.search(r"feature_group_count=(\d+)", convolution.attributes)
    features = image["f"] / (int(groups.group(1)) if groups else 1)
    return 2.0 * result["b"] * result["f"] * features * pairs


class _Window(NamedTuple):
    """How a kernel moves along one spatial axis."""

    size: int  # elements of the kernel
    stride: int  # positions that the kernel moves from one result to the next
    pad: int  # positions before the image
    image_dilation: int  # an element of the image at every such position
    kernel_dilation: int  # an element of the kernel at every such position


def _windows(attributes: str, axes: int) -> list[_Window]:
    """One per spatial axis, from "window={size=2x3 pad=0_0x1_1 ...}".

    Fields that are left out have their default on every axis.
    """
    found = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(re.findall(r"(\w+)=(\S+)", found.group(1))) if found else {}

    def values(field: str, default: str) -> list[int]:
        """Of every axis. A padding LOW_HIGH counts by its low end."""
        texts = fields[field].split("x") if field in fields else [default] * axes
        return [int(text.partition("_")[0]) for text in texts]

    columns = (
        values("size", "1"),
        values("stride", "1"),
        values("pad", "0_0"),
        values("lhs_dilate", "1"),
        values("rhs_dilate", "1"),
    )
    return [_Window(*row) for row in zip(*columns, strict=True)]


@functools.cache
def _valid_pairs(image_size: int, result_size: int, window: _Window) -> int:
    """Of the positions of result and kernel, how many pairs meet an element of the image."""
    # [result_size, window.size]: where in the padded and dilated image a pair looks.
    where = (
        np.arange(result_size)[:, None] * window.stride
        + np.arange(window.size) * window.kernel_dilation
        - window.pad
    )
    is_element = where % window.image_dilation == 0
    return int(((where >= 0) & is_element & (where // window.image_dilation < image_size)).sum())
