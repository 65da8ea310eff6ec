"""One core that runs a HIVM function.

The scalar unit goes through the program in order and hands instructions to the queues of the pipes. A pipe takes its
queue in order, and stops where it waits for a flag that is not set. So what has no order by flags is still run in some
order that the chip could take; `checks` tells where another one could give another result.

A flag counts: the n-th wait takes the n-th set. The vendor forbids a program that sets a flag twice without a wait
between, but the pipes may come to such a state by themselves: one that sets may run ahead of one that waits, as
the vendor's own `mma_tile` does. That the hardware counts there is *assumed*.
"""

from collections import Counter, defaultdict, deque
from functools import cached_property, lru_cache, partial
from math import prod

import numpy as np
from xdsl.dialects.builtin import DenseArrayBase, FloatAttr, IntegerAttr, IntegerType

from nsa.ascend.hivm import header_of, name_of, space_of
from nsa.ascend.targets import generation_of

from . import intrinsics
from .faults import FaultError
from .memory import DTYPES, SPACES, Memory, View, row_major
from .trace import PIPES, Operation, Trace

DYNAMIC = -(2**63)  # MLIR's mark of a size that is an operand
NOT_SATURATED, OVERRIDE = 48, 60  # control bits: infinity and NaN stay what they are; of A5's vector casts alone
PREDICATES = {  # of arith.cmpi and llvm.icmp; the unsigned ones from 6 on
    0: lambda a, b: a == b,
    1: lambda a, b: a != b,
    2: lambda a, b: a < b,
    3: lambda a, b: a <= b,
    4: lambda a, b: a > b,
    5: lambda a, b: a >= b,
}
FLOAT_PREDICATES = {  # of arith.cmpf; 7 is "ordered", and from 8 on one that is not ordered counts as true
    "oeq": 1, "ogt": 2, "oge": 3, "olt": 4, "ole": 5, "one": 6, "ord": 7,
    "ueq": 8, "ugt": 9, "uge": 10, "ult": 11, "ule": 12, "une": 13, "uno": 14,
}  # fmt: skip


def _wrapped(value, bits):
    """A signed integer of so many bits; of one bit, 0 or 1."""
    if bits == 1:
        return value & 1
    half = 1 << (bits - 1)
    return value if -half <= value < half else (value + half) % (2 * half) - half


def _quotient(a, b):
    """Towards zero, as the scalar unit divides."""
    if b == 0:
        raise ZeroDivisionError("the scalar unit divides by zero")
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


BINARY = {
    "addi": lambda a, b: a + b,
    "subi": lambda a, b: a - b,
    "muli": lambda a, b: a * b,
    "divsi": _quotient,
    "remsi": lambda a, b: a - b * _quotient(a, b),
    "andi": lambda a, b: a & b,
    "ori": lambda a, b: a | b,
    "xori": lambda a, b: a ^ b,
    "shli": lambda a, b: a << b,
    "shrsi": lambda a, b: a >> b,
    "maxsi": max,
    "minsi": min,
}
UNSIGNED = {
    "divui": lambda a, b: a // b,
    "remui": lambda a, b: a % b,
    "maxui": max,
    "minui": min,
    "shrui": lambda a, b: a >> b,
}
FLOATS = {
    "addf": lambda a, b: a + b,
    "subf": lambda a, b: a - b,
    "mulf": lambda a, b: a * b,
    "divf": lambda a, b: a / b,
    "maximumf": np.maximum,
    "minimumf": np.minimum,
    "maxnumf": np.fmax,
    "minnumf": np.fmin,
}
# the LLVM dialect, in which A5's modules are, has other names for the same operations
LLVM = {
    "add": "addi", "sub": "subi", "mul": "muli", "sdiv": "divsi", "srem": "remsi", "udiv": "divui", "urem": "remui",
    "and": "andi", "or": "ori", "xor": "xori", "shl": "shli", "ashr": "shrsi", "lshr": "shrui",
    "intr.smax": "maxsi", "intr.smin": "minsi", "intr.umax": "maxui", "intr.umin": "minui",
    "icmp": "cmpi", "select": "select", "trunc": "trunci", "zext": "extui", "sext": "extsi",
    "fadd": "addf", "fsub": "subf", "fmul": "mulf", "fdiv": "divf",
}  # fmt: skip


def programs_of(module):
    """The `Program`s of a parsed `nsa.ascend.hivm.Module`: one, or for a mix kernel that of the cube and the other."""
    entries = [op for op in module.op.walk() if name_of(op) == "func.func" and "hacc.entry" in op.attributes]
    return sorted((Program(module, entry) for entry in entries), key=lambda program: program.core_type)


class Program:
    """A function of a parsed `nsa.ascend.hivm.Module`, made ready to run on any number of cores."""

    def __init__(self, module, entry):
        self.module, self.entry = module, entry
        self.name = _name(entry)
        self.slots = {}  # SSA value -> index in a core's registers
        self.constants = {}  # index -> value
        self.blocks = {}
        if self.generation == "A5" and self.core_type == "AIV":
            self._refuse_vector_code()
        self._prepare(entry)

    @cached_property
    def core_type(self):
        """ "AIC" (cube) or "AIV" (vector)."""
        return _core_type(self.entry)

    @cached_property
    def generation(self):
        """A5, or None where the module names no chip: what the compiler for A2 and A3 makes."""
        target = self.module.op.attributes.get("hacc.target")
        return None if target is None else generation_of(_word(target))

    @cached_property
    def sizes(self):
        """Of the on-chip memories, in bytes."""
        header = header_of(self.module)
        return {space: header[f"{space}_SIZE"] // 8 for space in ("UB", "L1", "L0A", "L0B", "L0C")}

    @cached_property
    def workspace(self):
        """Bytes in memory that each block needs beside the kernel's tensors."""
        for op in self.module.op.walk():
            if "infer_workspace_shape_function" in str(op.attributes.get("hacc.host_func_type", "")):
                return next(_number(inner.properties["value"]) for inner in op.walk() if "constant" in name_of(inner))
        return 0

    @property
    def parameters(self):
        return self.entry.regions[0].blocks[0].args

    def _prepare(self, function):
        for block in (block for op in function.walk() for region in op.regions for block in region.blocks):
            for value in block.args:
                self.slot(value)
            steps = [self._step(op) for op in block.ops]
            self.blocks[block] = [step for step in steps if step[0] is not None]

    def _refuse_vector_code(self):
        """A5's vector cores compute in registers, in functions of their own, and load and store by another library."""
        for function in self.module.op.walk():
            if name_of(function) != "func.func" or _core_type(function) != "AIV":
                continue
            for op in function.walk():
                name = _callee(op) if name_of(op) == "func.call" else name_of(op)
                if name_of(op) == "func.call" or name.startswith("hivm_regbaseintrins."):
                    where = f"line {self.module.lines[op]}, in the vector function {_name(function)}"
                    raise FaultError("unknown operation", f"no simulation of {name} on A5, {where}")

    def slot(self, value):
        return self.slots.setdefault(value, len(self.slots))

    def _step(self, op):
        """(what does it, line, where the operands are, where the results go, the operation).

        Nothing does a constant, which is in the registers from the start.
        """
        name, line = name_of(op), self.module.lines[op]
        if name in ("arith.constant", "llvm.mlir.constant"):
            self.constants[self.slot(op.results[0])] = _number(op.properties["value"])
            return None, line, [], [], op
        return _does(op, name, line), line, [self.slot(v) for v in op.operands], [self.slot(v) for v in op.results], op


def _does(op, name, line):
    """A function (core, operands, op) -> results for an operation; for control flow the name of what does it."""
    dialect, _, kind = name.partition(".")
    if dialect == "llvm" and kind in LLVM:
        dialect, kind = "arith", LLVM[kind]
    if dialect == "arith" and kind in BINARY:
        return partial(_binary, BINARY[kind], _bits(op.results[0].type))
    if dialect == "arith" and kind in UNSIGNED:
        return partial(_unsigned, UNSIGNED[kind], _bits(op.results[0].type))
    if dialect == "arith" and kind in FLOATS:
        return partial(_float_binary, FLOATS[kind], DTYPES[str(op.results[0].type)])
    found = OPERATIONS.get(f"{dialect}.{kind}")
    if found is None:
        raise FaultError("unknown operation", f"no simulation of {name}, line {line}")
    return found


def _number(attribute):
    if isinstance(attribute, IntegerAttr):
        value, type_ = attribute.value.data, attribute.type
        return value & 1 if isinstance(type_, IntegerType) and type_.width.data == 1 else value
    if isinstance(attribute, FloatAttr):
        return DTYPES[str(attribute.type)].type(attribute.value.data)
    raise FaultError("unknown operation", f"no simulation of the constant {attribute}")


def _bits(type_):
    return type_.width.data if isinstance(type_, IntegerType) else 64


def _word(attribute):
    """AIC of #hivm.func_core_type<AIC>."""
    return attribute.value.data.strip('"')


def _name(function):
    return function.properties["sym_name"].data


def _core_type(function):
    """None of one that runs on the host."""
    attribute = function.attributes.get("hivm.func_core_type")
    return attribute and _word(attribute)


def _pipe(attribute):
    return _word(attribute).removeprefix("PIPE_")


# What an operation says stays the same each time that it runs.
_once_an_operation = lru_cache(1 << 16)


@_once_an_operation
def _operand_bits(op):
    return _bits(op.operands[0].type)


@_once_an_operation
def _result_bits(op):
    return _bits(op.results[0].type)


# What an operation does: (core, operands, op) -> a tuple of results.


def _binary(function, bits, core, operands, op):
    core.scalar += 1
    return (_wrapped(function(*operands), bits),)


def _unsigned(function, bits, core, operands, op):
    core.scalar += 1
    return (_wrapped(function(*(operand % (1 << bits) for operand in operands)), bits),)


def _float_binary(function, dtype, core, operands, op):
    core.scalar += 1
    return (dtype.type(function(*(dtype.type(operand) for operand in operands))),)


def _compare(core, operands, op):
    core.scalar += 1
    predicate, (a, b) = op.properties["predicate"].value.data, operands
    if predicate >= 6:
        bits = _operand_bits(op)
        a, b, predicate = a % (1 << bits), b % (1 << bits), predicate - 4
    return (int(PREDICATES[predicate](a, b)),)


def _compare_floats(core, operands, op):
    core.scalar += 1
    predicate, (a, b) = op.properties["predicate"].value.data, operands
    if predicate in (0, 15):
        return (int(predicate == 15),)
    if np.isnan(a) or np.isnan(b):
        return (int(predicate >= 8),)
    if predicate in (7, 14):
        return (int(predicate == 7),)
    is_true = (None, a == b, a > b, a >= b, a < b, a <= b, a != b)[predicate if predicate < 7 else predicate - 7]
    return (int(is_true),)


def _select(core, operands, op):
    core.scalar += 1
    return (operands[1] if operands[0] else operands[2],)


def _resized(core, operands, op):
    return (_wrapped(operands[0], _result_bits(op)),)


def _widened_unsigned(core, operands, op):
    return (operands[0] % (1 << _operand_bits(op)),)


def _to_integer(core, operands, op):
    core.scalar += 1
    return (int(operands[0]),)


def _to_float(core, operands, op):
    core.scalar += 1
    return (DTYPES[str(op.results[0].type)].type(operands[0]),)


def _same(core, operands, op):
    return tuple(operands)


def _nothing(core, operands, op):
    return ()


def _pointer_cast(core, operands, op):
    space, dtype, sizes = _memref(op)
    return (View(core.memories[space], dtype, operands[0], 0, sizes, row_major(sizes)),)


def _alloca(core, operands, op):
    """Of the scalar unit's stack, which is nobody else's."""
    _, dtype, sizes = _memref(op)
    memory = Memory("stack", np.zeros(prod(sizes) * dtype.itemsize, np.uint8))
    return (View(memory, dtype, 0, 0, sizes, row_major(sizes)),)


def _alloc(core, operands, op):
    """A buffer that the compiler has given no address: a memory of its own, so that no other buffer is in it."""
    space, dtype, sizes = _memref(op)
    sizes = _mixed(sizes, iter(operands))
    name = f"a buffer of {space} without an address, line {core.line}"
    memory = Memory(name, np.full(prod(sizes) * dtype.itemsize, 0xFF, np.uint8))
    return (View(memory, dtype, 0, 0, sizes, row_major(sizes)),)


def _mixed(static, dynamic):
    """The numbers of an attribute, with operands where it says DYNAMIC."""
    return tuple(next(dynamic) if value == DYNAMIC else value for value in static)


@_once_an_operation
def _static(op, name):
    attribute = op.properties[name]
    assert isinstance(attribute, DenseArrayBase)
    return attribute.get_values()


@_once_an_operation
def _groups(op):
    """Dimensions that become one, or that one becomes."""
    return [[index.value.data for index in group] for group in op.properties["reassociation"]]


@_once_an_operation
def _memref(op):
    """(space, dtype, sizes) of an operation's result."""
    type_ = op.results[0].type
    return SPACES.get(space_of(type_)), DTYPES[str(type_.element_type)], tuple(size.data for size in type_.shape)


def _reinterpret_cast(core, operands, op):
    rest = iter(operands[1:])
    (offset,), sizes, strides = (_mixed(_static(op, f"static_{n}"), rest) for n in ("offsets", "sizes", "strides"))
    return (operands[0]._replace(offset=offset, sizes=sizes, strides=strides),)


def _subview(core, operands, op):
    view, rest = operands[0], iter(operands[1:])
    offsets, sizes, steps = (_mixed(_static(op, f"static_{n}"), rest) for n in ("offsets", "sizes", "strides"))
    offset = sum(o * stride for o, stride in zip(offsets, view.strides))
    strides = tuple(step * stride for step, stride in zip(steps, view.strides))
    rank = len(op.results[0].type.shape)
    if rank < len(sizes):  # dimensions of size 1 that the result leaves out
        kept = _kept(sizes, strides, op.results[0].type)
        sizes, strides = tuple(sizes[i] for i in kept), tuple(strides[i] for i in kept)
    return (view.part(offset, sizes, strides),)


def _kept(sizes, strides, type_):
    """Which dimensions a subview keeps: those that its type names in order, one of size 1 where it can be left out."""
    kept, wanted = [], [size.data for size in type_.shape]
    for i, size in enumerate(sizes):
        left = len(sizes) - i
        if (
            len(kept) < len(wanted)
            and (wanted[len(kept)] in (size, DYNAMIC))
            and not (size == 1 and left > len(wanted) - len(kept) and wanted[len(kept)] != 1)
        ):
            kept.append(i)
    return kept


def _collapse_shape(core, operands, op):
    (view,) = operands
    groups = _groups(op)
    sizes, strides = [], []
    for group in groups:
        sizes.append(prod(view.sizes[i] for i in group))
        several = [i for i in group if view.sizes[i] != 1]
        strides.append(view.strides[several[-1] if several else group[-1]])
    return (view.part(0, sizes, strides),)


def _expand_shape(core, operands, op):
    view, rest = operands[0], iter(operands[1:])
    shape = _mixed(_static(op, "static_output_shape"), rest)
    groups = _groups(op)
    strides = [0] * len(shape)
    for stride, group in zip(view.strides, groups):
        for i in reversed(group):
            strides[i] = stride
            stride *= shape[i]
    return (view.part(0, shape, strides),)


def _metadata(core, operands, op):
    (view,) = operands
    return (view._replace(offset=0, sizes=(), strides=()), view.offset, *view.sizes, *view.strides)


def _load(core, operands, op):
    view, indices = operands[0], operands[1:]
    element = view.part(sum(i * stride for i, stride in zip(indices, view.strides)), (), ())
    core.scalar += 1
    if element.memory.space != "stack":
        core.issue(Operation("run", "S", "memref.load", core.line, reads=(element,), work=(("scalar load", 1),)))
    value = element.array()[()]
    return (int(value) if element.dtype.kind in "iub" else value,)


def _store(core, operands, op):
    value, view, indices = operands[0], operands[1], operands[2:]
    element = view.part(sum(i * stride for i, stride in zip(indices, view.strides)), (), ())
    core.scalar += 1
    if element.memory.space != "stack":
        core.issue(Operation("run", "S", "memref.store", core.line, writes=(element,), work=(("scalar store", 1),)))
    element.array()[()] = value
    return ()


def _flag(kind, core, operands, op):
    setting, waiting, event = _flag_of(op)
    core.synchronise(kind, setting, waiting, operands[0] if event is None else event)
    return ()


@_once_an_operation
def _flag_of(op):
    """(setting pipe, waiting pipe, event, or None if it is an operand)."""
    event = op.properties.get("static_event_id")
    event = None if event is None else int(_word(event).removeprefix("EVENT_ID"))
    return _pipe(op.properties["set_pipe"]), _pipe(op.properties["wait_pipe"]), event


def _barrier(core, operands, op):
    core.barrier(_pipe(op.properties["pipe"]))
    return ()


def _block_idx(core, operands, op):
    return (core.block,)


def _sub_block_idx(core, operands, op):
    return (core.sub_block,)


def _view(core, operands, op):
    """A memref of another type at a byte of one of bytes."""
    view, offset, *sizes = operands
    _, dtype, static = _memref(op)
    sizes = _mixed(static, iter(sizes))
    return (View(view.memory, dtype, view.address + offset, 0, sizes, row_major(sizes)),)


def _set_control(core, operands, op):
    """A bit of the control register."""
    bit, value = (op.properties[name].value.data for name in ("idx", "enable"))
    if bit != OVERRIDE and not (bit == NOT_SATURATED and value):
        raise FaultError(
            "unknown operation", f"no simulation of {int(bool(value))} in control bit {bit}, line {core.line}"
        )
    return ()


def _team_flag(kind, core, operands, op):
    """A flag between a cube core and its vector cores."""
    static = op.properties.get("static_flag_id")
    flag = operands[0] if static is None else static.value.data
    if "tsync_instr_mode" in op.properties and "INTRA_BLOCK" not in str(op.properties["tsync_instr_mode"]):
        raise FaultError("unknown operation", f"no simulation of {op.properties['tsync_instr_mode']}, line {core.line}")
    core.synchronise_team(kind, _pipe(op.properties["tpipe" if kind == "set" else "pipe"]), flag)
    return ()


def _callee(op):
    return op.properties["callee"].root_reference.data


def _call(core, operands, op):
    core.scalar += 1
    intrinsics.call(_callee(op), core, operands)
    return ()


OPERATIONS = {
    "arith.cmpi": _compare,
    "arith.cmpf": _compare_floats,
    "arith.select": _select,
    "arith.trunci": _resized,
    "arith.extsi": _resized,
    "arith.index_cast": _resized,
    "arith.extui": _widened_unsigned,
    "arith.index_castui": _widened_unsigned,
    "arith.fptosi": _to_integer,
    "arith.sitofp": _to_float,
    "arith.extf": _to_float,
    "arith.truncf": _to_float,
    "builtin.unrealized_conversion_cast": _same,
    "memref.cast": _same,
    "memref.memory_space_cast": _same,
    "memref.reinterpret_cast": _reinterpret_cast,
    "memref.subview": _subview,
    "memref.collapse_shape": _collapse_shape,
    "memref.expand_shape": _expand_shape,
    "memref.extract_strided_metadata": _metadata,
    "memref.alloc": _alloc,
    "memref.alloca": _alloca,
    "memref.view": _view,
    "memref.load": _load,
    "memref.store": _store,
    "func.call": _call,
    "hivm.hir.pointer_cast": _pointer_cast,
    "hivm.hir.get_block_idx": _block_idx,
    "hivm.hir.get_sub_block_idx": _sub_block_idx,
    "hivm.hir.sync_block_set": partial(_team_flag, "set"),
    "hivm.hir.sync_block_wait": partial(_team_flag, "wait"),
    "hivm.hir.set_ffts_base_addr": _nothing,
    "hivm.hir.set_flag": partial(_flag, "set"),
    "hivm.hir.wait_flag": partial(_flag, "wait"),
    "hivm.hir.pipe_barrier": _barrier,
    "hivm.hir.set_mask_norm": _nothing,
    "hivm.hir.set_ctrl": _set_control,
    "scf.for": "for",
    "scf.if": "if",
    "scf.while": "while",
    "scf.condition": "leave",
    "scf.yield": "leave",
    "cf.br": "branch",
    "cf.cond_br": "conditional branch",
    "func.return": "leave",
}


class Core:
    """A core with its own on-chip memories. `run` takes it through the program as one block of the grid."""

    def __init__(self, program, block, sub_block=0):
        self.program, self.block, self.sub_block = program, block, sub_block
        self.team = None  # of a mix kernel: the `Team` with the other half's cores
        self.memories = {space: Memory(space, np.zeros(size, np.uint8)) for space, size in program.sizes.items()}
        self.trace = Trace(block, program.core_type, sub_block)
        self.line = 0
        self.scalar = 0  # cycles since the last operation was issued
        self._halves = 0  # of L0 that A5's library has taken
        self._queues = {pipe: deque() for pipe in PIPES}
        self._flags = Counter()  # how often each is set now
        self._issued = Counter()  # sets without a wait, in the order of the program
        self._names = defaultdict(list)  # the sets not waited for, for messages
        self._registers = None

    def run(self, arguments):
        """arguments: a value for each parameter of the function: `View`, int or float."""
        self._registers = [self.program.constants.get(i) for i in range(len(self.program.slots))]
        body = self.program.entry.regions[0]
        self._region(body, arguments)
        self.barrier("ALL")
        left = [operation for flag in self._names.values() for operation in flag]
        if left:
            raise FaultError("flag left set", f"at the end of the program nobody waited for: {left[0]}")

    @property
    def name(self):
        return f"block {self.block}, {self.program.core_type} {self.sub_block}"

    # control flow

    def _region(self, region, arguments):
        """Runs a region to its end, and gives the values that it hands on."""
        block = region.blocks[0]
        while True:
            for value, argument in zip(block.args, arguments):
                self._registers[self.program.slots[value]] = argument
            block, arguments = self._block(block)
            if block is None:
                return arguments

    def _block(self, block):
        """Runs a block; gives the block to go to (None: the region ends) and its arguments."""
        registers = self._registers
        for does, line, operands, results, op in self.program.blocks[block]:
            values = [registers[i] for i in operands]
            self.line = line
            if does.__class__ is str:
                if does == "leave":
                    return None, values
                if does == "branch":
                    return op.successors[0], values
                if does == "conditional branch":
                    n = _static(op, "operandSegmentSizes")[1]
                    self.scalar += 1
                    return (op.successors[0], values[1 : n + 1]) if values[0] else (op.successors[1], values[n + 1 :])
                produced = getattr(self, f"_{does}")(op, values)
            else:
                produced = does(self, values, op)
            for i, value in zip(results, produced):
                registers[i] = value
        return None, ()

    def _for(self, op, values):
        low, high, step, *carried = values
        if step <= 0:
            raise FaultError("loop", f"a step of {step}, line {self.line}")
        for i in range(low, high, step):
            self.scalar += 1
            carried = self._region(op.regions[0], (i, *carried))
        return carried

    def _if(self, op, values):
        self.scalar += 1
        region = op.regions[0 if values[0] else 1]
        return self._region(region, ()) if region.blocks else ()

    def _while(self, op, values):
        while True:
            self.scalar += 1
            goes_on, *values = self._region(op.regions[0], values)
            if not goes_on:
                return values
            values = self._region(op.regions[1], values)

    # what intrinsics call

    def next_half(self):
        """Of L0, 0 and 1 in turns over the whole program."""
        self._halves += 1
        return (self._halves - 1) % 2

    def instruction(self, pipe, name, reads, writes, work, effect):
        """An instruction for a pipe. `effect` is called without arguments when the pipe takes it."""
        for view in (*reads, *writes):
            if not view.fits():
                raise FaultError(
                    "access outside",
                    f"{name} on {pipe}, line {self.line}, reaches {view}, which has {len(view.memory.bytes)}",
                )
        operation = Operation("run", pipe, name, self.line, tuple(reads), tuple(writes), tuple(work))
        stored = [view.bits() for view in writes if view.memory.space == "GM"]

        def noted():
            before = [bits.copy() for bits in stored]
            effect()
            operation.same = bool(stored) and all(np.array_equal(*pair) for pair in zip(before, stored))

        self.issue(operation, noted if stored else effect)

    def synchronise(self, kind, setting, waiting, event, name=None):
        """A set or wait of a flag, on the pipe that does it."""
        flag = (setting, waiting, event)
        pipe = setting if kind == "set" else waiting
        operation = Operation(kind, pipe, name or f"{kind}_flag", self.line, flag=flag)
        if kind == "set":
            self._names[flag].append(operation)
            if len(self._names[flag]) > 1:
                first, second = self._names[flag][-2:]
                raise FaultError("flag set twice", f"{first} and {second}, with no wait between")
        elif self._names[flag]:
            self._names[flag].pop(0)
        self.issue(operation)

    def synchronise_team(self, kind, pipe, flag):
        """A set or wait of a flag between this core and those of the other half."""
        self.issue(Operation(f"team {kind}", pipe, f"sync_block_{kind}", self.line, flag=("team", flag)))

    def barrier(self, pipe):
        operation = Operation("barrier", pipe, "pipe_barrier", self.line)
        if pipe != "ALL":
            self.issue(operation)
            return
        self._drain()
        self._refuse_if_stuck(operation)
        self._add(operation)
        self.trace.ran.append(operation)

    def issue(self, operation, effect=None):
        self._add(operation)
        if operation.pipe == "S":
            self._on_scalar_unit(operation)
            return
        self._queues[operation.pipe].append((operation, effect))
        self._drain()

    def _add(self, operation):
        operation.scalar, self.scalar = self.scalar, 0
        self.trace.issued.append(operation)

    def _on_scalar_unit(self, operation):
        """The scalar unit goes on only when this is done."""
        for view in (*operation.reads, *operation.writes):
            if not view.fits():
                raise FaultError("access outside", f"{operation}, reaches {view}, which has {len(view.memory.bytes)}")
        self._drain()
        if not self._take(operation, None):
            self._refuse_if_stuck(operation)
            raise FaultError("deadlock", f"the scalar unit waits for ever: {operation}")
        self._drain()

    def _drain(self):
        """Let every pipe go on as far as it can."""
        moved = True
        while moved:
            moved = False
            for queue in self._queues.values():
                while queue and self._take(*queue[0]):
                    queue.popleft()
                    moved = True

    def _take(self, operation, effect):
        """Whether the pipe could do the operation, which is done then."""
        if operation.kind == "wait":
            if not self._flags[operation.flag]:
                return False
            self._flags[operation.flag] -= 1
        elif operation.kind == "set":
            self._flags[operation.flag] += 1
        elif operation.kind == "team set":
            self.team.post(self, operation.flag[-1])
        elif operation.kind == "team wait":
            if operation.pipe != "S":
                raise FaultError("unknown operation", f"no simulation of {operation}")
            self.team.wait(self, operation)
        if effect is not None:
            effect()
        self.trace.ran.append(operation)
        return True

    def _refuse_if_stuck(self, operation):
        stuck = [queue[0][0] for queue in self._queues.values() if queue]
        if stuck:
            waiting = "; ".join(f"{op.pipe} waits for ever: {op}" for op in stuck)
            raise FaultError("deadlock", f"{waiting}; at {operation}")


def arguments_of(program, values, grid, workspace):
    """What a program is called with: `values` are those of the kernel's own parameters, in order.

    The compiler puts three before them, of which the last is the workspace, a `View`, and the grid after them.
    """
    nothing = View(Memory("GM", np.zeros(0, np.uint8), "lock"), DTYPES["i8"], 0, 0, (0,), (1,))
    before = [0, nothing, workspace]
    n_after = len(program.parameters) - len(before) - len(values)
    return [*before, *values, *grid[:n_after]]
