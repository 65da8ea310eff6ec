"""What a HIVM module says, read from its text: core type, on-chip memory, buffering, intrinsics, scalar work."""

import math
import re
from collections import Counter

BITS = {"i1": 8, "i8": 8, "i16": 16, "f16": 16, "bf16": 16, "i32": 32, "f32": 32, "i64": 64, "f64": 64}
SPACES = {"ub": "UB", "cbuf": "L1", "ca": "L0A", "cb": "L0B", "cc": "L0C"}

_CONSTANT = re.compile(r"(%\S+) = (?:arith\.constant |llvm\.mlir\.constant\()(-?\d+) : i64")
_BUFFER = re.compile(
    r"hivm\.hir\.pointer_cast\(([^)]*)\)(?: \[[^\]]*\])? : memref<([^,>]+)[^>]*?#hivm\.address_space<(\w+)>"
)
# the choice between the two addresses of a buffer, as A2 and A3 tools write it, and as the A5 tools do
_ALTERNATION = re.compile(
    r"arith\.select .* : memref<.*#hivm\.address_space<|llvm\.select .* : i1, !llvm\.struct<\(ptr<"
)
_SCALAR = re.compile(r"memref\.(?:load|store) .*#hivm\.address_space<(\w+)>")
_CALL = re.compile(r"(?:func\.call|call) @(\w+)")
_HEADER = re.compile(r'dl_entry<"(\w+)", (\d+) : i32>')
_OVERFLOW = re.compile(r"(\w+) overflow, requires (\d+) bits while (\d+) bits available")


def header_of(hivm):
    """The target's description in the module's header: {"UB_SIZE": bits, "VECTOR_CORE_COUNT": ...}."""
    return {name: int(value) for name, value in _HEADER.findall(hivm)}


def overflow_of(message):
    """{"memory", "required", "available"}, in bytes, if a compiler's message is about on-chip overflow."""
    found = _OVERFLOW.search(message)
    if not found:
        return None
    memory, required, available = found.groups()
    return {"memory": SPACES.get(memory, memory), "required": int(required) // 8, "available": int(available) // 8}


def facts_of(hivm, notes):
    """Findings of one kernel as plain data.

    core: "aic" (cube), "aiv" (vector) or "mix". memory: {on-chip memory: bytes up to the highest address used}.
    multi_buffered: whether a loop alternates between buffers. calls: {intrinsic: how often it is written}.
    scalar_accesses: loads and stores of single elements of on-chip buffers, which is what a gather or
    a mask falls back to; 0 in a kernel that works on blocks. switched_off: what the compiler gave up to fit.
    """
    body = hivm[hivm.index("module attributes") :]
    core = re.search(r"hivm\.module_core_type<(\w+)>", body)
    return {
        "core": core.group(1).lower() if core else "mix",
        "memory": _memory(body),
        "multi_buffered": bool(_ALTERNATION.search(body)),
        "calls": dict(sorted(Counter(_CALL.findall(body)).items())),
        "scalar_accesses": sum(space != "gm" for space in _SCALAR.findall(body)),
        "switched_off": re.findall(r"automatically set (\S+) to false", "\n".join(notes)),
    }


def _memory(body):
    used = {}
    for function in body.split("func.func @"):  # names are a function's own
        constants = {name: int(value) for name, value in _CONSTANT.findall(function)}
        for addresses, type_, space in _BUFFER.findall(function):
            *sizes, element = type_.split("x")
            size = math.prod(map(int, sizes)) * BITS[element] // 8
            end = max(constants[address.strip()] for address in addresses.split(",")) + size
            used[SPACES[space]] = max(used.get(SPACES[space], 0), end)
    return used
