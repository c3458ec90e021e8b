"""What a compiled program does, read from its text: bytes between chips, matrix FLOPs, cycles, loops counted in full.

The compiler's own totals (`cost_analysis`) count the body of a loop once. Here every computation is followed from the
entry, and what stands in a loop counts as often as the loop runs; of two branches the longer one counts.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
_SHAPE = re.compile(r"(pred|bf16|[fsu]\d+)\[([\d,]*)\]")


@dataclasses.dataclass
class Work:
    """What a program, or a part of it, does on one chip.

    Attributes:
      flops: of matrix products, those of kernels by their own estimate.
      kernel_flops: the part of `flops` that kernels do.
      cycles: the compiler's estimate for each fused operation, added up; kernels and collectives have none.
      sent: collective -> bytes that the chip sends, by the ring algorithms.
      calls: collective -> how often.
      loops: every loop of known length, those within loops too, as (rounds of one run, work of all its runs).
    """

    flops: float = 0.0
    kernel_flops: float = 0.0
    cycles: float = 0.0
    sent: Counter[str] = dataclasses.field(default_factory=Counter)
    calls: Counter[str] = dataclasses.field(default_factory=Counter)
    loops: list[tuple[int, Work]] = dataclasses.field(default_factory=list)

    def add(self, other: Work, times: float) -> None:
        """Adds another part, done `times` times."""
        self.flops += times * other.flops
        self.kernel_flops += times * other.kernel_flops
        self.cycles += times * other.cycles
        for kind in other.sent:
            self.sent[kind] += round(times * other.sent[kind])
            self.calls[kind] += round(times * other.calls[kind])
        for length, loop in other.loops:
            runs = Work()
            runs.add(loop, times)
            self.loops.append((length, runs))


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    kind: str
    rest: str


def read_program(text: str, loop_length: int = 1) -> Work:
    """Returns the work of a compiled module on one chip.

    Args:
      text: of `jax.stages.Compiled.as_text()`.
      loop_length: how often a loop runs whose length is not written in the program, as that over a traced range.
    """
    computations, entry = _computations(text)
    return _Reader(computations, loop_length).work(entry)


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Returns computation -> instructions, and the name of the entry."""
    found: dict[str, list[_Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line)
        if head:
            current = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current.append(_Instruction(*match.groups()))
    return found, entry


class _Reader:
    def __init__(self, computations: Mapping[str, list[_Instruction]], loop_length: int):
        self.computations, self.loop_length = computations, loop_length
        self.known: dict[str, Work] = {}

    def work(self, name: str) -> Work:
        """The work of one run of a computation."""
        if name not in self.known:
            total = Work()
            shapes = {i.name: i.shape for i in self.computations.get(name, [])}
            for instruction in self.computations.get(name, []):
                self._add(total, instruction, shapes)
            self.known[name] = total
        return self.known[name]

    def _add(self, total: Work, instruction: _Instruction, shapes: Mapping[str, str]) -> None:
        kind, rest = instruction.kind, instruction.rest
        cycles = re.search(r'"estimated_cycles":"(\d+)"', rest)
        total.cycles += int(cycles[1]) if cycles else 0
        if kind == "while":
            length, rounds = self._length(_called(rest, "condition")), Work()
            rounds.add(self.work(_called(rest, "body")), length or self.loop_length)
            total.add(rounds, 1)
            if length:  # loops within it stand beside it in the list, not in its own
                total.loops.append((length, dataclasses.replace(rounds, loops=[])))
        elif kind == "conditional":
            branches = re.findall(r"%([\w.\-]+)", rest.partition("branch_computations={")[2].partition("}")[0])
            branches += [b for key in ("true", "false") if (b := _called(rest, f"{key}_computation"))]
            total.add(max(map(self.work, branches), key=lambda w: (w.flops, w.cycles)), 1)
        elif kind in ("fusion", "call", "async-start"):
            self._add_fused(total, rest)
        elif kind in ("convolution", "dot"):
            total.flops += _matrix_flops(instruction, shapes)
        elif kind == "custom-call":
            estimate = re.search(r'"cost_estimate":\{"flops":"(\d+)"', rest)
            flops = int(estimate[1]) if estimate else 0
            total.flops += flops
            total.kernel_flops += flops
        elif (plain := kind.removesuffix("-start")) in COLLECTIVES:
            _add_collective(total, plain, instruction)

    def _add_fused(self, total: Work, rest: str) -> None:
        """Adds what is fused: an all-reduce of which every chip keeps a slice is a reduce-scatter."""
        called = _called(rest, "calls") or _called(rest, "to_apply")
        work = self.work(called)
        if called.startswith("all-reduce-scatter"):
            work = dataclasses.replace(work, sent=Counter(), calls=Counter({"reduce-scatter": 1}))
            work.sent["reduce-scatter"] = self.work(called).sent["all-reduce"] // 2
        total.add(work, 1)

    def _length(self, condition: str) -> int | None:
        """How often a loop runs: the bound in its condition, None where it has none."""
        bounds = [
            int(match[1])
            for i in self.computations.get(condition, [])
            if i.kind == "constant" and i.shape.startswith("s32[]") and (match := re.match(r"(\d+)\)", i.rest))
        ]
        return max(bounds, default=None)


def _called(rest: str, key: str) -> str:
    match = re.search(rf"\b{key}=%([\w.\-]+)", rest)
    return match[1] if match else ""


def _dims(shape: str) -> list[tuple[str, list[int]]]:
    """Element type and dimensions of every array of a shape."""
    return [(kind, [int(d) for d in dims.split(",") if d]) for kind, dims in _SHAPE.findall(shape)]


def _matrix_flops(instruction: _Instruction, shapes: Mapping[str, str]) -> float:
    """2 x outputs x products for each: the kernel's dimensions but for its output features."""
    operands = [name for name in re.findall(r"%([\w.\-]+)", instruction.rest.partition(")")[0]) if name in shapes]
    outputs = math.prod(_dims(instruction.shape)[0][1])
    if len(operands) < 2:
        return 0.0
    left, right = (_dims(shapes[name])[0][1] for name in operands[:2])
    if instruction.kind == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
        return 2.0 * outputs * math.prod(left[int(d)] for d in contracted[1].split(",")) if contracted else 0.0
    labels = re.search(r"dim_labels=\w+_(\w+)->", instruction.rest)
    if labels is None:
        return 0.0
    window = re.search(r"window=\{size=([\dx]+)(.*?)\}", instruction.rest)
    products = right[labels[1].index("i")]
    spatial = [int(n) for n in window[1].split("x")] if window else []
    for size, padding in zip(spatial, _paddings(window[2] if window else "", len(spatial)), strict=True):
        # A dimension that is only carried along is written as a window of its own size, padded all around.
        products *= 1 if padding >= size - 1 > 0 else size
    return 2.0 * outputs * products


def _paddings(text: str, count: int) -> list[int]:
    match = re.search(r"pad=([\d_\-x]+)", text)
    return [int(part.split("_")[0]) for part in match[1].split("x")] if match else [0] * count


def _add_collective(total: Work, kind: str, instruction: _Instruction) -> None:
    sizes = [_BYTES.get(t, 4) * math.prod(dims) for t, dims in _dims(instruction.shape)]
    if kind == "collective-permute":
        sent = float(sizes[0]) if sizes else 0.0
    else:
        group = _group_size(instruction.rest)
        # A `-start` gives its operand and its result as one tuple; the larger of the two counts.
        whole = max(sizes) if instruction.kind.endswith("-start") else sum(sizes)
        if kind == "reduce-scatter":
            whole *= group
        sent = whole * (group - 1) / group * (2 if kind == "all-reduce" else 1)
    total.sent[kind] += round(sent)
    total.calls[kind] += 1


def _group_size(rest: str) -> int:
    """How many chips take part: replica_groups of a collective in any of its three notations."""
    mesh = re.search(r"replica_groups=mesh\[(.*?)\].*? \{([^}]*)\}", rest)
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", rest)
    if iota:
        return int(iota[2])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    return len(listed[1].split(",")) if listed else 1
