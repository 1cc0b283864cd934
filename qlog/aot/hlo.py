"""Reads the text of an optimized HLO module, as `compiled.as_text()` prints it.

HLO is XLA's program: a list of computations, each a list of instructions in the order in which
they run. Optimized means after XLA's passes for one device of the mesh: arrays have the shapes that
lie on one chip, communication is explicit, and loops have become `while` instructions that name two
other computations, their body and their condition.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# "%body (arg: (s32[], bf16[64,32])) -> (s32[], bf16[64,32]) {"; "ENTRY " where the program begins.
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
# "  ROOT %dot = f32[64,48]{1,0:T(8,128)} dot(%x, %w), lhs_contracting_dims={1}, ..."
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
# "bf16[64,32]{1,0:T(8,128)(2,1)S(1)}": dtype, sizes, layout. S(n) is a memory other than HBM.
_SHAPE = re.compile(r"\b(pred|token|[a-z]+\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
# Computations are called by attributes: a fusion's calls, a reduction's to_apply, a loop's two.
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%([\w.\-]+)"
)
# The conditional of several cases, a `switch`, names its branches in one list.
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class Shape(NamedTuple):
    """One array of an instruction's result."""

    dtype: str  # as HLO writes it: bf16, f32, s32, pred, ...
    dimensions: tuple[int, ...]  # on one chip
    in_hbm: bool  # else in one of the chip's scratch memories, whose traffic is not counted

    @property
    def bytes(self) -> float:
        digits = re.search(r"\d+", self.dtype)
        # A pred takes a byte; a token orders instructions and takes nothing.
        bits = int(digits.group()) if digits else 8 * (self.dtype == "pred")
        return math.prod(self.dimensions) * bits / 8


class Instruction(NamedTuple):
    """One line of HLO."""

    name: str
    opcode: str  # dot, fusion, while, all-gather-start, ...
    results: tuple[Shape, ...]  # the arrays of its type; those of a tuple, flattened
    operands: tuple[str, ...]  # names of instructions of the same computation
    attributes: str  # what follows the operands; of a constant or parameter, its value first
    is_root: bool  # whether it is the computation's result

    @property
    def bytes(self) -> float:
        """Size of the results, wherever they lie."""
        return sum(shape.bytes for shape in self.results)

    @property
    def hbm_bytes(self) -> float:
        """Size of the results that lie in HBM."""
        return sum(shape.bytes for shape in self.results if shape.in_hbm)

    @property
    def called(self) -> list[str]:
        """Names of the computations that it calls: fused, body and condition, or applied."""
        return _CALLED.findall(self.attributes)

    @property
    def branches(self) -> list[str]:
        """Names of the computations among which a `conditional` chooses."""
        return self.called + _NAME.findall("".join(_BRANCHES.findall(self.attributes)))

    @property
    def is_kernel(self) -> bool:
        """Whether it is a Pallas kernel, which XLA cannot look into."""
        return self.opcode == "custom-call" and "tpu_custom_call" in self.attributes

    @property
    def number(self) -> int:
        """The value of an integer constant, or the position of a parameter."""
        found = re.match(r"-?\d+", self.attributes)
        if not found:
            raise ValueError(
                f"{self.name} = {self.opcode}({self.attributes[:40]}) is not an integer"
            )
        return int(found.group())


# Instructions by name, in the order in which they run.
Computation = dict[str, Instruction]


class Module:
    """An optimized HLO module.

    A program that multiplies x by 28 matrices, one at a time, looks like this (shortened):

        %body (arg: (s32[], bf16[64,64], bf16[28,64,64])) -> (s32[], bf16[64,64], bf16[28,64,64]) {
          %arg = (s32[], bf16[64,64]{1,0}, bf16[28,64,64]{2,1,0}) parameter(0)
          %step = s32[] get-tuple-element(%arg), index=0
          %x = bf16[64,64]{1,0} get-tuple-element(%arg), index=1
          %all = bf16[28,64,64]{2,1,0} get-tuple-element(%arg), index=2
          %one = bf16[1,64,64]{2,1,0:S(1)} dynamic-slice(%all, %step), ...
          ...
        }
        ENTRY %main (x: bf16[64,64], w: bf16[28,64,64]) -> bf16[64,64] {
          ...
          %loop = (...) while(%init), condition=%condition, body=%body, metadata={...}
          ROOT %out = bf16[64,64]{1,0} get-tuple-element(%loop), index=1
        }

    `Module(text).computations["body"]["one"]` is then the Instruction with opcode "dynamic-slice",
    operands ("all", "step") and one result, Shape("bf16", (1, 64, 64), in_hbm=False). S(1) says
    that the slice is read into scratch memory.

    Attributes:
      computations: every computation by its name, in the order of the text.
      entry: name of the computation that runs first.
    """

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        current: Computation = {}
        # A computation is a header, indented instructions, and a line "}" that adds nothing.
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                current = self.computations.setdefault(header.group(2), {})
                self.entry = header.group(2) if header.group(1) else self.entry
            elif found := _INSTRUCTION.match(line):
                instruction = _parse(*found.groups())
                current[instruction.name] = instruction

    def instructions(self) -> Iterator[tuple[Instruction, int]]:
        """Every instruction outside fusions, and in how many loops it lies."""
        yield from self._walk(self.entry, 0)

    def _walk(self, name: str, depth: int) -> Iterator[tuple[Instruction, int]]:
        for instruction in self.computations[name].values():
            yield instruction, depth
            if instruction.opcode in ("while", "call", "conditional"):
                for called in instruction.branches:
                    yield from self._walk(called, depth + (instruction.opcode == "while"))


def _parse(root: str | None, name: str, rest: str) -> Instruction:
    """The parts of `rest`, "TYPE OPCODE(OPERANDS), ATTRIBUTES".

    No regular expression can do it: a tuple's type and a layout have parentheses of their own.
    """
    # "(s32[], bf16[64,32]{1,0}) while(%init), ..." or "bf16[64,32]{1,0} copy(%x), ...".
    type_end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opening = rest.index("(", type_end)
    closing = _closing(rest, opening)
    opcode = rest[type_end:opening].strip()
    operands, attributes = rest[opening + 1 : closing], rest[closing + 1 :]
    if opcode in ("constant", "parameter"):  # "constant(28)", "parameter(0)": no operand, a number
        attributes = operands + attributes
    results = tuple(
        Shape(dtype, tuple(map(int, filter(None, sizes.split(",")))), "S(" not in (layout or ""))
        for dtype, sizes, layout in _SHAPE.findall(rest[:type_end])
    )
    return Instruction(
        name, opcode, results, tuple(_NAME.findall(operands)), attributes, bool(root)
    )


def _closing(text: str, opening: int) -> int:
    """Index of the parenthesis that closes the one at `opening`."""
    depth = 0
    for index in range(opening, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    raise ValueError(f"unbalanced parentheses: {text[:80]}")
