"""What has no order: accesses to the same bytes, one of them a write, that the chip may do in either order.

Order comes from what the trace says, not from when something happened to run:

    a flag               what the setting pipe had done, and all that was known to it, is known to the waiting one
    a barrier            of a pipe: what the pipe had done; of all pipes: what all had done
    the scalar unit      what it has waited for is known to every instruction that it issues later
    the cube             does its own instructions in order, and so does the scalar unit. Another pipe only starts them
                         in order: where two of its instructions meet, there has to be a barrier between, which is
                         what the compiler assumes when it puts barriers in

"Known" is a vector clock: for each pipe, how many of its instructions are done for certain.

Two writes of the same bits have no need of an order: the two vector cores of a mix kernel often do the same.

Nor does it matter what a vector core reads from memory where the compiler leaves all stores to the other one.

Every byte of a memory on chip, and every element of a tensor that somebody writes, remembers the instruction that
wrote it last, for each pipe the one that read or wrote it last, and for other blocks the first of all.
"""

from collections import Counter, defaultdict, deque
from math import gcd

import numpy as np

from nsa.ascend.hivm import name_of, space_of

from .faults import Fault
from .trace import PIPES

IN_ORDER = ("M", "S")
RACE, MEMORY_RACE, BLOCK_RACE, UNWRITTEN = "race on chip", "race in memory", "race between blocks", "never written"
STORES = ("store_ubuf_to_gm", "fixpipe")  # calls that write to memory
FIRST_ONLY = "limit_sub_block_id0"  # the compiler's mark of a branch for the first vector core alone
CHECKS = (RACE, MEMORY_RACE, BLOCK_RACE, UNWRITTEN)


def check(run):
    """The `Fault`s in the order of a `run.Run`, each pair of lines once."""
    return _Checker(run).faults


class _Core:
    """What is known on one core. Pipes are counted over all cores of a block."""

    def __init__(self, trace, index, n_pipes):
        self.trace, self.base = trace, index * len(PIPES)
        self.known = {pipe: np.zeros(n_pipes, np.int64) for pipe in (*PIPES,)}
        self.flags = defaultdict(deque)
        self.versions = [self.known["S"].copy()]  # what the scalar unit knew, each time that it had learnt something
        self.issued_at = _versions(trace)
        self.next = 0

    def key(self, pipe):
        return self.base + PIPES.index(pipe)


def _versions(trace):
    """{id of an operation: how often the scalar unit had waited when it issued it}."""
    version, versions = 0, {}
    for operation in trace.issued:
        versions[id(operation)] = version
        if operation.pipe == "ALL" or (operation.pipe == "S" and operation.kind in ("wait", "team wait")):
            version += 1
    return versions


class _Shadow:
    """Of one memory, or of tensors that overlap: for each cell numbers of instructions, 0 where there was none."""

    def __init__(self, n_bytes, cell):
        self.cell = cell
        # np.zeros takes no memory for what nobody touches, which np.zeros_like does: of 2^31 cells, 8 GiB an array
        self.written = np.zeros(-(-n_bytes // cell), np.int32)
        self.first = np.zeros(len(self.written), np.int32)  # the first that read or wrote it
        self.last = {}  # pipe -> its last that read or wrote it
        self.starts = {}  # id of a tensor's bytes -> where they begin

    def part(self, cells, view):
        """The cells of a view, as a view of an array of them."""
        per = view.dtype.itemsize // self.cell
        strides = (*(stride * per * 4 for stride in view.strides), 4)
        first = (self.starts.get(id(view.memory.bytes), 0) + view.address) // self.cell
        return np.ndarray((*view.sizes, per), np.int32, cells, first * 4, strides)

    def note(self, view, pipe, number, write):
        if pipe not in self.last:
            self.last[pipe] = np.zeros(len(self.written), np.int32)
        self.part(self.last[pipe], view)[...] = number
        if write:
            self.part(self.written, view)[...] = number
        if view.memory.space == "GM":
            first = self.part(self.first, view)
            first[first == 0] = number


class _Checker:
    def __init__(self, run):
        self.operations, self.keys = [None], [-1]  # by number: the instruction, and its pipe
        self._found = {}  # (check, line, line) -> [message, how often]
        self._chip = {}  # (space, core of the block) -> shadow; numbers go on, so it serves every block
        self._tensors = _written_tensors(run)
        silent = {program.core_type for program in run.programs if not _can_store_from_all(program)}
        self._silent = {id(trace) for trace in run.traces if trace.sub_block and trace.core_type in silent}
        blocks = defaultdict(list)
        for trace in run.traces:
            blocks[trace.block].append(trace)
        for block, traces in blocks.items():
            self._block(block, traces)
        self.faults = [
            Fault(name, f"{message}{f' ({times} times)' if times > 1 else ''}")
            for (name, *_), (message, times) in self._found.items()
        ]

    def _block(self, block, traces):
        n_pipes = len(traces) * len(PIPES)
        self._block_name, self._start = f"block {block}", len(self.operations)
        self._of_pipe = [[] for _ in range(n_pipes)]  # pipe -> numbers of its instructions
        self._posted = defaultdict(lambda: defaultdict(list))  # core that sets -> flag -> what it knew
        self._taken = defaultdict(Counter)
        cores = [_Core(trace, i, n_pipes) for i, trace in enumerate(traces)]
        moved = True
        while moved:
            moved = False
            for core in cores:
                while core.next < len(core.trace.ran) and self._step(core, cores):
                    core.next += 1
                    moved = True

    def _step(self, core, cores):
        """One operation; whether it could go on."""
        operation = core.trace.ran[core.next]
        if operation.kind == "team wait":
            flag, others = operation.flag, [c for c in cores if c.trace.core_type != core.trace.core_type]
            n = self._taken[core][flag]
            if any(len(self._posted[other][flag]) <= n for other in others):
                return False
            self._taken[core][flag] += 1
            self._learn(core, "S", [self._posted[other][flag][n] for other in others])
        elif operation.kind == "barrier" and operation.pipe == "ALL":
            everything = np.max([self._done(core, pipe) for pipe in PIPES], axis=0)
            for pipe in PIPES:
                core.known[pipe] = everything.copy()
            core.versions.append(everything)
        else:
            pipe = operation.pipe
            core.known[pipe] = np.maximum(core.known[pipe], core.versions[core.issued_at[id(operation)]])
            if operation.kind == "run":
                self._run(core, operation)
            elif operation.kind == "set":
                core.flags[operation.flag].append(self._done(core, pipe))
            elif operation.kind == "wait":
                self._learn(core, pipe, [core.flags[operation.flag].popleft()])
            elif operation.kind == "team set":
                self._posted[core][operation.flag].append(self._done(core, pipe))
            else:  # a barrier of one pipe
                core.known[pipe] = self._done(core, pipe)
        return True

    def _learn(self, core, pipe, facts):
        for fact in facts:
            core.known[pipe] = np.maximum(core.known[pipe], fact)
        if pipe == "S":
            core.versions.append(core.known["S"].copy())

    def _done(self, core, pipe):
        """What is known when all that the pipe had is done."""
        done = core.known[pipe].copy()
        key = core.key(pipe)
        done[key] = len(self._of_pipe[key])
        return done

    def _run(self, core, operation):
        key, number = core.key(operation.pipe), len(self.operations)
        known = core.known[operation.pipe].tolist()
        if operation.pipe in IN_ORDER:
            known[key] = len(self._of_pipe[key])
        # of each pipe, the first instruction that may not be done; all before it are
        self._pending = [of[n] if n < len(of) else number for of, n in zip(self._of_pipe, known)]
        reads = [view for view in operation.reads if not (id(core.trace) in self._silent and view.memory.space == "GM")]
        for view in reads:
            self._access(core, operation, view, write=False)
        if not operation.same:
            for view in operation.writes:
                self._access(core, operation, view, write=True)
        self._of_pipe[key].append(number)
        self.operations.append(operation)
        self.keys.append(key)
        for views, write in ((reads, False), (operation.writes, True)):
            for view in views:
                if (shadow := self._shadow(core, view)) is not None:
                    shadow.note(view, key, number, write)

    def _shadow(self, core, view):
        """None where nobody writes."""
        memory = view.memory
        if memory.space == "GM":
            return self._tensors.get(id(memory.bytes))
        place = (memory.space, core.base)
        if place not in self._chip:
            self._chip[place] = _Shadow(len(memory.bytes), 1)
        return self._chip[place]

    def _access(self, core, operation, view, write):
        shadow = self._shadow(core, view)
        if shadow is None:
            return
        written = shadow.part(shadow.written, view)
        if view.memory.space == "GM":
            earliest = shadow.part(shadow.first, view) if write else written
            others = (earliest > 0) & (earliest < self._start)
            if others.any():
                self._report(BLOCK_RACE, operation, self.operations[earliest[others][0]], view, others, write)
        elif not write and (written < self._start).any():
            self._report(UNWRITTEN, operation, None, view, written < self._start, write)
        if write:
            for key, cells in shadow.last.items():
                self._conflicts(operation, view, shadow.part(cells, view), self._pending[key], write)
        else:
            self._conflicts(operation, view, written, min(self._pending), write)

    def _conflicts(self, operation, view, last, pending, write):
        """Reports cells whose last access may not be done: of one pipe, or from number `pending` on of any."""
        if last.max(initial=0) < pending:
            return
        for number in np.unique(last[last >= pending]):
            if number >= self._pending[self.keys[number]]:
                name = MEMORY_RACE if view.memory.space == "GM" else RACE
                self._report(name, operation, self.operations[number], view, last == number, write)

    def _report(self, name, operation, other, view, cells, write):
        lines = sorted(each.line for each in (operation, other) if each)
        key = (name, *lines)
        if key in self._found:
            self._found[key][1] += 1
            return
        where = np.unravel_index(np.flatnonzero(cells)[[0, -1]], cells.shape)
        unit = view.dtype.itemsize // cells.shape[-1]
        first, last = (
            view.address
            + sum(int(w[i]) * stride for w, stride in zip(where, view.strides)) * view.dtype.itemsize
            + int(where[-1][i]) * unit
            for i in (0, 1)
        )
        does = f"{operation} {'writes' if write else 'reads'} bytes {first} to {last + unit - 1} of {view.memory.name}"
        why = f"{other} {'uses' if write else 'writes'}, with no order between them" if other else "nothing has written"
        self._found[key] = [f"{self._block_name}: {does}, which {why}", 1]


def _can_store_from_all(program):
    """Whether a store to memory is in no branch of the first vector core alone."""
    stores = [op for op in program.entry.walk() if _is_store(op)]
    return any(not _is_inside(op, FIRST_ONLY) for op in stores)


def _is_store(op):
    if name_of(op) == "memref.store":
        return space_of(op.operands[1].type) == "gm"
    return name_of(op) == "func.call" and op.properties["callee"].root_reference.data.startswith(STORES)


def _is_inside(op, mark):
    while (op := op.parent_op()) is not None:
        if mark in op.attributes:
            return True
    return False


def _written_tensors(run):
    """{id of a tensor's bytes: a shadow in cells of its elements}, of tensors that somebody writes.

    Tensors that overlap share one.
    """
    memories, itemsizes, written = {}, defaultdict(set), set()
    for trace in run.traces:
        for operation in trace.issued:
            for views in (operation.reads, operation.writes):
                for view in views:
                    if view.memory.space == "GM":
                        memories[key := id(view.memory.bytes)] = view.memory.bytes
                        itemsizes[key].add(view.dtype.itemsize)
                        if views is operation.writes:
                            written.add(key)
    groups, end = [], 0
    for key in sorted(memories, key=lambda key: memories[key].ctypes.data):
        if not groups or memories[key].ctypes.data >= end:
            groups.append([])
        groups[-1].append(key)
        end = max(end, memories[key].ctypes.data + len(memories[key]))
    return dict(pair for keys in groups if written.intersection(keys) for pair in _shadows(keys, memories, itemsizes))


def _shadows(keys, memories, itemsizes):
    """(id, shadow) of tensors that overlap, of which the first begins first."""
    starts = {key: memories[key].ctypes.data - memories[keys[0]].ctypes.data for key in keys}
    size = max(start + len(memories[key]) for key, start in starts.items())
    shadow = _Shadow(size, gcd(*starts.values(), *(n for key in keys for n in itemsizes[key])))
    shadow.starts = starts
    return [(key, shadow) for key in keys]
