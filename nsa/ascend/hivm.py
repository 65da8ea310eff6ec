"""What a HIVM module says, read from its text: core type, on-chip memory, buffering, intrinsics, scalar work."""

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from xdsl.context import Context
from xdsl.dialects.builtin import Builtin, ModuleOp, UnregisteredOp
from xdsl.ir import Operation
from xdsl.parser import Parser

BITS = {"i1": 8, "i8": 8, "i16": 16, "f16": 16, "bf16": 16, "i32": 32, "f32": 32, "i64": 64, "f64": 64}
FIRST_ARGUMENT = 3  # a kernel's own arguments come after three of the compiler's
SPACES = {"ub": "UB", "cbuf": "L1", "ca": "L0A", "cb": "L0B", "cc": "L0C"}

_CONSTANT = re.compile(r"(%\S+) = (?:arith\.constant |llvm\.mlir\.constant\()(-?\d+) : (?:i64|index)")
_BUFFER = re.compile(
    r"hivm\.hir\.pointer_cast\(([^)]*)\)(?: \[[^\]]*\])? : memref<([^,>]+)[^>]*?#hivm\.address_space<(\w+)>"
)
# the choice between the two addresses of a buffer, as A2 and A3 tools write it, and as the A5 tools do
_ALTERNATION = re.compile(
    r"arith\.select .* : memref<.*#hivm\.address_space<|llvm\.select .* : i1, !llvm\.struct<\(ptr<"
)
_SCALAR = re.compile(r"memref\.(?:load|store) [^\[]*\[([^\]]*)\].*#hivm\.address_space<(\w+)>")
_VIEW = re.compile(r"(%\S+) = memref\.(?:reinterpret_cast|cast|subview|collapse_shape) (%\w+)")
_WHOLE = re.compile(r"sizes: \[([\d, ]+)\].* to memref<[\dx]*x(\w+),")
_TRANSFER = re.compile(r"call @((?:nd2nz|load_gm|fixpipe|store_ubuf_to_gm)\w*)\((%\w+), (%\w+)")
_CALL = re.compile(r"(?:func\.call|call) @(\w+)")
_HEADER = re.compile(r'dl_entry<"(\w+)", (\d+) : i32>')
_OVERFLOW = re.compile(r"(\w+) overflow, requires (\d+) bits while (\d+) bits available")


@dataclass(frozen=True)
class Module:
    """A parsed HIVM module: `op` is xDSL's ModuleOp, in which operations are unregistered; `text` its generic form."""

    op: ModuleOp
    text: str
    lines: dict  # operation -> its line of the text, from 1


def parse(generic: str) -> Module:
    """The module of a text in MLIR's generic form, which `Artefacts.generic` is."""
    context = Context(allow_unregistered=True)
    context.load_dialect(Builtin)
    op = Parser(context, generic).parse_module()
    # the printer writes each operation on a line of its own, and what it contains below it
    starts = [n for n, line in enumerate(generic.splitlines(), 1) if line.lstrip().startswith(("%", '"'))]
    return Module(op, generic, dict(zip(op.walk(), starts, strict=True)))


def name_of(op: Operation) -> str:
    return op.op_name.data if isinstance(op, UnregisteredOp) else op.name


def header_of(hivm: str) -> dict[str, int]:
    """The target's description in the module's header: {"UB_SIZE": bits, "VECTOR_CORE_COUNT": ...}."""
    return {name: int(value) for name, value in _HEADER.findall(hivm)}


def overflow_of(message: str) -> dict[str, Any] | None:
    """{"memory", "required", "available"}, in bytes, if a compiler's message is about on-chip overflow."""
    found = _OVERFLOW.search(message)
    if not found:
        return None
    memory, required, available = found.groups()
    return {"memory": SPACES.get(memory, memory), "required": int(required) // 8, "available": int(available) // 8}


def facts_of(hivm: str, notes: list[str]) -> dict[str, Any]:
    """Findings of one kernel as plain data.

    core: "aic" (cube), "aiv" (vector) or "mix". memory: {on-chip memory: bytes up to the highest address used}.
    multi_buffered: whether a loop alternates between buffers. calls: {intrinsic: how often it is written}.
    scalar_accesses: loads and stores of single elements of on-chip buffers at an index that varies, which is
    what a gather falls back to; 0 in a kernel that works on blocks. switched_off: what the compiler gave up to fit.
    """
    body = hivm[hivm.index("module attributes") :]
    core = re.search(r"hivm\.module_core_type<(\w+)>", body)
    return {
        "core": core.group(1).lower() if core else "mix",
        "memory": _memory(body),
        "multi_buffered": bool(_ALTERNATION.search(body)),
        "calls": dict(sorted(Counter(_CALL.findall(body)).items())),
        "scalar_accesses": _scalar_accesses(body),
        "switched_off": re.findall(r"automatically set (\S+) to false", "\n".join(notes)),
    }


def transfers_of(hivm: str) -> list[dict[str, Any]]:
    """Every transfer between memory and chip of a kernel for A2 or A3, as it is written there.

    A list of {"intrinsic"; "argument": position among the kernel's own arguments; "bytes": of a whole block, no
    row masked; "row_bytes": of one row; "depth": loops around it, an `if` not counted}. For A5 the loops cannot be
    counted: its compiler has turned them into branches.
    """
    function = next(function for function, _ in _functions(hivm) if "hacc.entry" in function.partition("\n")[0])
    views, blocks, nesting, transfers = {}, {}, [], []
    for line in map(str.strip, function.splitlines()[1:]):
        if line.startswith("}") and nesting:
            nesting.pop()
        if line.endswith("{"):
            nesting.append("scf.for" in line)
        if view := _VIEW.match(line):
            views[view.group(1)] = view.group(2)
            if whole := _WHOLE.search(line):
                blocks[view.group(1)] = (list(map(int, whole.group(1).split(","))), whole.group(2))
        if call := _TRANSFER.search(line):
            intrinsic, source, destination = call.groups()
            buffer = source if intrinsic.startswith(("nd2nz", "load")) else destination
            while buffer not in blocks:
                buffer = views[buffer]
            sizes, element = blocks[buffer]
            transfers.append(
                {
                    "intrinsic": intrinsic,
                    "argument": int(views[buffer].removeprefix("%arg")) - FIRST_ARGUMENT,
                    "bytes": math.prod(sizes) * BITS[element] // 8,
                    "row_bytes": sizes[-1] * BITS[element] // 8,
                    "depth": sum(nesting),
                }
            )
    return transfers


def _functions(body):
    """Text and constants of each function: names are a function's own."""
    for function in body.split("func.func @"):
        yield function, {name: int(value) for name, value in _CONSTANT.findall(function)}


def _scalar_accesses(body):
    return sum(
        space != "gm" and any(index.strip() not in constants for index in indices.split(",") if index)
        for function, constants in _functions(body)
        for indices, space in _SCALAR.findall(function)
    )


def _memory(body):
    used = {}
    for function, constants in _functions(body):
        for addresses, type_, space in _BUFFER.findall(function):
            *sizes, element = type_.split("x")
            size = math.prod(map(int, sizes)) * BITS[element] // 8
            end = max(constants[address.strip()] for address in addresses.split(",")) + size
            used[SPACES[space]] = max(used.get(SPACES[space], 0), end)
    return used
