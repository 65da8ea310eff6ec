"""What can be read off a compiled kernel: its assembly as text, and what the assembler says of registers and stack.

Loads are counted as they stand in the text, not as often as they run.
"""

import re
from collections import Counter, defaultdict

_INSTRUCTION = re.compile(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+(.*);", re.M)
_POINTER = re.compile(r"%rd\d+")  # of 64 bits, as addresses are
_POINTER_PARAMETER = re.compile(r"\.param \.u64 \.ptr .*?(\w+_param_(\d+))\b")
_LOADED = re.compile(r"ld\.global(?:\.\w+(?:::\w+)*)*?(?:\.v(\d))?\.[busf](\d+)$")
_COPIED = re.compile(r"\[.*?\], \[ *(%rd\d+).*?\], (0x[0-9a-f]+|\d+)")
_PTX_COUNTS = {"cp_async": "cp.async.c", "mma": "mma.sync", "wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma"}

_AMD_LOAD = re.compile(r"^\s*(?:global|buffer|flat)_load_(\w+)\b(.*)$", re.M)
_AMD_BYTES = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
_AMD_METADATA = {
    "registers": "vgpr_count",  # with the accumulator's
    "spilled_registers": "vgpr_spill_count",
    "stack": "private_segment_fixed_size",
}


def ptx_facts(ptx, arguments):
    """Facts of a PTX text whose kernel has these arguments, in order.

    `loads` is {pointer argument: {bytes: loads of that width}}, loads into registers and copies into shared memory
    (`cp.async`) alike. The other facts are numbers of instructions. ValueError where an address does not come from
    one pointer alone.
    """
    origins = _origins(ptx)
    loads = defaultdict(Counter)
    for opcode, operands in _INSTRUCTION.findall(ptx):
        if opcode.startswith("ld.global"):
            vector, bits = _LOADED.match(opcode).groups()
            address, size = _POINTER.findall(operands.rpartition("[")[2])[0], int(vector or 1) * int(bits) // 8
        elif opcode.startswith(_PTX_COUNTS["cp_async"]):
            address, size = _COPIED.match(operands).groups()
            size = int(size, 0)
        else:
            continue
        if len(origins[address]) != 1:
            raise ValueError(f"expected an address made of one pointer, got {address} of arguments {origins[address]}")
        loads[arguments[min(origins[address])]][size] += 1
    opcodes = [opcode for opcode, _ in _INSTRUCTION.findall(ptx)]
    counts = {fact: sum(o.startswith(start) for o in opcodes) for fact, start in _PTX_COUNTS.items()}
    return {"loads": {name: dict(sorted(widths.items())) for name, widths in sorted(loads.items())}, **counts}


def _origins(ptx):
    """{64-bit register: the pointer parameters it is made of}; what was loaded from memory is made of none."""
    pointers = {f"[{name}]": int(i) for name, i in _POINTER_PARAMETER.findall(ptx)}
    origins, made_of = defaultdict(set), []
    for opcode, operands in _INSTRUCTION.findall(ptx):
        registers = _POINTER.findall(operands)
        if opcode.startswith("ld.param") and (name := operands.split()[-1]) in pointers:
            origins[registers[0]].add(pointers[name])
        elif registers and not opcode.startswith(("ld.", "st.", "cp.")):
            made_of.append(registers)
    changed = True
    while changed:  # loops hand pointers round
        changed = False
        for target, *sources in made_of:
            new = set().union(*(origins[source] for source in sources)) - origins[target]
            origins[target] |= new
            changed |= bool(new)
    return origins


def cubin_facts(resources):
    """Registers and bytes of stack of a thread, from `cuobjdump -res-usage`: Triton's kernels have a stack only where
    registers did not suffice."""
    registers, stack = re.search(r"\bREG:(\d+) STACK:(\d+)", resources).groups()
    return {"registers": int(registers), "stack": int(stack)}


def amdgcn_facts(text):
    """Facts of an AMD assembly text. `loads` is {"all": {bytes: loads of that width}}: buffer loads do not name the
    pointer that they read."""
    widths = Counter(_AMD_BYTES.get(kind) or _small(kind) for kind, _ in _AMD_LOAD.findall(text))
    to_shared = sum(bool(re.search(r"\blds\b", rest)) for _, rest in _AMD_LOAD.findall(text))
    facts = {name: int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for name, key in _AMD_METADATA.items()}
    return {
        **facts,
        "loads": {"all": dict(sorted(widths.items()))},
        "loads_to_shared": to_shared,
        "mfma": len(re.findall(r"^\s*v_s?mfma", text, re.M)),
    }


def _small(kind):
    """Bytes of a load of less than four, such as ubyte, ushort, short_d16_hi."""
    return 1 if "byte" in kind else 2
