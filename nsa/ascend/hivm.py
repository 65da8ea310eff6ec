"""What a HIVM module says: core type, on-chip memory, buffering, intrinsics, scalar work, transfers."""

import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from xdsl.context import Context
from xdsl.dialects.builtin import (
    Builtin,
    FunctionType,
    IntegerAttr,
    MemRefType,
    ModuleOp,
    UnregisteredAttr,
    UnregisteredOp,
)
from xdsl.ir import Attribute, Block, BlockArgument, Operation, SSAValue
from xdsl.parser import Parser
from xdsl.utils.lexer import Span

BITS = {"i1": 8, "i8": 8, "i16": 16, "f16": 16, "bf16": 16, "i32": 32, "f32": 32, "i64": 64, "f64": 64}
FIRST_ARGUMENT = 3  # a kernel's own arguments come after three of the compiler's
SPACES = {"ub": "UB", "cbuf": "L1", "ca": "L0A", "cb": "L0B", "cc": "L0C"}

_TRANSFERS = ("nd2nz", "load_gm", "fixpipe", "store_ubuf_to_gm")
# %1 = "arith.addi"(%2, %3) and the rest; no %4:2 or %4#1
_SIMPLE_LINE = re.compile(r'(?:%(\w+) = )?"([\w.]+)"\(((?:%\w+(?:, )?)*)\) ([^\n]*)\n')
_OVERFLOW = re.compile(r"(\w+) overflow, requires (\d+) bits while (\d+) bits available")


@dataclass(frozen=True)
class Module:
    """A parsed HIVM module: `op` is xDSL's ModuleOp, in which operations are unregistered; `text` its generic form."""

    op: ModuleOp
    text: str
    lines: dict[Operation, int]  # operation -> its line of the text, from 1


def parse(generic: str) -> Module:
    """The module of a text in MLIR's generic form, which `Artefacts.generic` is."""
    op = _parser(generic).parse_module()
    # the printer writes each operation on a line of its own, and what it contains below it
    starts = [n for n, line in enumerate(generic.splitlines(), 1) if line.lstrip().startswith(("%", '"'))]
    return Module(op, generic, dict(zip(op.walk(), starts, strict=True)))


def name_of(op: Operation) -> str:
    return op.op_name.data if isinstance(op, UnregisteredOp) else op.name


def space_of(type_: Attribute) -> str | None:
    """The address space of a memref's type, such as "gm" or a key of SPACES; None where it names none."""
    space = type_.memory_space if isinstance(type_, MemRefType) else None
    return space.value.data if isinstance(space, UnregisteredAttr) else None


def header_of(module: Module) -> dict[str, int]:
    """The target's description in the module's header: {"UB_SIZE": bits, "VECTOR_CORE_COUNT": ...}."""
    # xDSL keeps what is in the brackets of an attribute that it does not know as text: "NPU" : #spec<#entry<...>, ...>
    system = _parser(module.op.attributes["dlti.target_system_spec"].value.data)
    system.parse_str_literal()
    system.parse_punctuation(":")
    device = _parser(system.parse_attribute().value.data)
    entries = device.parse_comma_separated_list(device.Delimiter.NONE, device.parse_attribute)
    header = {}
    for entry in entries:
        parser = _parser(entry.value.data)
        name = parser.parse_str_literal()
        parser.parse_punctuation(",")
        value = parser.parse_attribute()
        if isinstance(value, IntegerAttr):
            header[name] = value.value.data
    return header


def overflow_of(message: str) -> dict[str, Any] | None:
    """{"memory", "required", "available"}, in bytes, if a compiler's message is about on-chip overflow."""
    found = _OVERFLOW.search(message)
    if not found:
        return None
    memory, required, available = found.groups()
    return {"memory": SPACES.get(memory, memory), "required": int(required) // 8, "available": int(available) // 8}


def facts_of(module: Module, notes: list[str]) -> dict[str, Any]:
    """Findings of one kernel as plain data.

    core: "aic" (cube), "aiv" (vector) or "mix". memory: {on-chip memory: bytes up to the highest address used}.
    multi_buffered: whether a loop alternates between buffers. calls: {intrinsic: how often it is written}.
    scalar_accesses: loads and stores of single elements of on-chip buffers at an index that varies, which is
    what a gather falls back to; 0 in a kernel that works on blocks. switched_off: what the compiler gave up to fit.
    """
    ops = list(module.op.walk())
    core = module.op.attributes.get("hivm.module_core_type")
    return {
        "core": core.value.data.lower() if core else "mix",
        "memory": _memory(ops),
        "multi_buffered": any(map(_alternates, ops)),
        "calls": dict(sorted(Counter(filter(None, map(_callee, ops))).items())),
        "scalar_accesses": sum(map(_is_scalar_access, ops)),
        "switched_off": re.findall(r"automatically set (\S+) to false", "\n".join(notes)),
    }


def transfers_of(module: Module) -> list[dict[str, Any]]:
    """Every transfer between the kernel's tensors and the chip, as it is written there.

    A list of {"intrinsic"; "argument": position among the kernel's own arguments; "bytes": of a whole block, no
    row masked; "row_bytes": of one row, which for A5 may be several that follow each other; "depth": loops around
    it, an `if` not counted}.
    """
    transfers = []
    for function in module.op.ops:
        if "hacc.entry" in function.attributes:
            arguments = function.regions[0].blocks[0].args[FIRST_ARGUMENT:]
            calls = [op for op in function.walk() if (_callee(op) or "").startswith(_TRANSFERS)]
            for call in calls:
                argument, sizes = _argument(call) if _tensor(call) else (None, None)
                if argument in arguments:
                    transfers.append(_transfer(call, arguments.index(argument), sizes))
    return transfers


def _parser(text):
    return _Parser(_context(), text)


@cache  # types of two contexts are not equal, and `_Parser` remembers types
def _context():
    context = Context(allow_unregistered=True)
    context.load_dialect(Builtin)
    return context


class _Parser(Parser):
    """xDSL's parser, which remembers what stands behind the operands of an operation: most lines end as others did."""

    known: ClassVar[dict] = {}  # text of the rest of the line -> (properties, attributes, function type)

    def __init__(self, context, text):
        super().__init__(context, text)
        self.endings = {} if text.startswith("#") else self.known  # names given in the first lines are this text's own

    def parse_optional_operation(self):
        """Most operations without its lexer: those whose operands were met, and whose end is known."""
        start = self._current_token.span.start
        line = _SIMPLE_LINE.match(self.lexer.input.content, start)
        ending = self.endings.get(line[4]) if line else None
        names = re.findall(r"\w+", line[3]) if ending else []
        if ending is None or not all(name in self.ssa_values for name in names):
            return super().parse_optional_operation()
        properties, attributes, function_type = ending
        op = self._get_op_by_name(line[2]).create(
            operands=[self.ssa_values[name][0] for name in names],
            result_types=function_type.outputs.data,
            properties=dict(properties),
            attributes=dict(attributes),
        )
        if line[1]:
            self._register_ssa_definition(line[1], op.results, Span(*line.span(1), self.lexer.input))
        self._resume_from(line.end())
        return op

    def _parse_generic_operation(self, op_type):
        start = self._current_token.span.start
        arguments = self.parse_op_args_list()
        text, position = self.lexer.input.content, self._current_token.span.start
        end = text.find("\n", position)
        rest = text[position:end]
        if rest not in self.endings:
            self._resume_from(start)
            op = super()._parse_generic_operation(op_type)
            if not (op.regions or op.successors) and self._current_token.span.start > end:
                function_type = FunctionType.from_lists([value.type for value in op.operands], op.result_types)
                self.endings[rest] = dict(op.properties), dict(op.attributes), function_type
            return op
        properties, attributes, function_type = self.endings[rest]
        self._resume_from(end)
        return op_type.create(
            operands=self.resolve_operands(arguments, function_type.inputs.data, position),
            result_types=function_type.outputs.data,
            properties=dict(properties),
            attributes=dict(attributes),
        )


def _callee(op):
    return op.properties["callee"].root_reference.data if name_of(op) == "func.call" else None


def _tensor(call):
    """The view of a tensor in memory that an intrinsic reads or writes; None if it stays on the chip."""
    return next((operand for operand in call.operands[:2] if space_of(operand.type) == "gm"), None)


def _argument(call):
    """The argument of the kernel that an intrinsic reads or writes, and the sizes of the block that is addressed."""
    view, sizes = _tensor(call), [math.inf]
    while not isinstance(view, BlockArgument):  # from view to view
        if name_of(view.owner) == "memref.reinterpret_cast":
            sizes = _sizes(view.owner)
        view = view.owner.operands[0]
    return view, sizes


def _transfer(call, argument, sizes):
    type_ = _tensor(call).type
    return {
        "intrinsic": _callee(call),
        "argument": argument,
        "bytes": _bytes(sizes, type_),
        "row_bytes": _bytes(sizes[-1:], type_),
        "depth": _depth(call),
    }


def _sizes(cast):
    """Of the block that a kernel's pointers address: views of it may be cut by a mask. A5 tools cut here already."""
    n_before = sum(cast.properties["operandSegmentSizes"].get_values()[:2])  # the buffer and its offset
    masked = iter(cast.operands[n_before:])
    return [_bounds(next(masked))[1] if size < 0 else size for size in cast.properties["static_sizes"].get_values()]


def _bytes(sizes, type_):
    if not all(0 <= size < math.inf for size in sizes):
        raise ValueError(f"expected sizes that are known, or that a mask bounds, got {list(sizes)} of {type_}")
    return math.prod(sizes) * BITS[str(type_.element_type)] // 8


def _bounds(value: SSAValue) -> tuple[float, float]:
    """The least and the greatest integer that a value can be, as far as its minima, maxima and constants tell."""
    op = value.owner
    if isinstance(op, Block):
        return -math.inf, math.inf
    name = name_of(op)
    if name in ("arith.constant", "llvm.mlir.constant") and isinstance(op.properties["value"], IntegerAttr):
        number = op.properties["value"].value.data
        return number, number
    if name == "builtin.unrealized_conversion_cast":
        return _bounds(op.operands[0])
    if name in ("llvm.intr.smin", "llvm.intr.smax", "arith.addi", "arith.muli"):
        (low, high), (other_low, other_high) = map(_bounds, op.operands)
        if name == "llvm.intr.smin":
            return min(low, other_low), min(high, other_high)
        if name == "llvm.intr.smax":
            return max(low, other_low), max(high, other_high)
        if name == "arith.addi":
            return low + other_low, high + other_high
        corners = [a and b and a * b for a in (low, high) for b in (other_low, other_high)]  # 0 times infinity is 0
        return min(corners), max(corners)
    return -math.inf, math.inf


def _depth(op):
    """Loops around an operation: `scf.for`, and for A5, whose compiler makes branches of them, cycles of blocks."""
    depth = 0
    while (block := op.parent_block()) is not None:
        depth += sum(block in loop for loop in _loops(block.parent))
        op = op.parent_op()
        depth += name_of(op) == "scf.for"
    return depth


def _loops(region):
    """The blocks of each loop: its first block, and all from which a branch back to that is reached."""
    position = {block: i for i, block in enumerate(region.blocks)}
    sources = {block: [] for block in position}
    for block in position:
        for successor in block.last_op.successors:
            sources[successor].append(block)
    loops = []
    for first in position:
        # in the printed order only a branch back goes up
        waiting = [block for block in sources[first] if position[block] >= position[first]]
        loop = {first} if waiting else set()
        while waiting:
            block = waiting.pop()
            if block not in loop:
                loop.add(block)
                waiting += sources[block]
        loops.append(loop)
    return loops


def _alternates(op):
    """Is it the choice between two addresses of a buffer, as A2 and A3 tools write it, or as the A5 tools do?"""
    if name_of(op) == "arith.select":
        return space_of(op.results[0].type) is not None
    return name_of(op) == "llvm.select" and str(op.results[0].type).startswith("!llvm.struct<(ptr<")


def _is_scalar_access(op):
    if name_of(op) not in ("memref.load", "memref.store"):
        return False
    buffer, *indices = op.operands[name_of(op) == "memref.store" :]  # a store has its value first
    if space_of(buffer.type) in ("gm", None):
        return False
    return any(low != high for low, high in map(_bounds, indices))


def _memory(ops):
    used = {}
    for op in ops:
        if name_of(op) == "hivm.hir.pointer_cast":
            type_ = op.results[0].type
            addresses = op.operands[: op.properties["operandSegmentSizes"].get_values()[0]]
            end = max(_bounds(address)[1] for address in addresses) + _bytes(type_.get_shape(), type_)
            memory = SPACES[space_of(type_)]
            used[memory] = max(used.get(memory, 0), end)
    return used
