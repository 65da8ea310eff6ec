"""How long a launch takes, from what its cores issued. Modelled: no NPU was at hand, and constants are `rates`'.

Discrete events over all cores. The scalar unit of a core hands operations to the queues of the pipes, at a cost, and
stops only at its own waits and accesses and at barriers of all pipes. A pipe takes its queue in order. It is free
for the next instruction before the result of the last one is there; flags and barriers wait for the result.

What goes between a core and memory is a flow. The flows under way share the memory's rate and that of L2 fairly,
each up to what its core can draw, and the shares change when a flow begins or ends. A line is in L2 if less
than the size of L2 was brought in since its last use. What is written is there at once for its core, in L2, which
writes it back to memory at the expense of the other flows; a launch does not wait for the last of that.

Not modelled: banks of L2 and of memory, so nothing of several cores that want the same line at once; queues that are
full; instruction caches; the start of a core.
"""

from collections import defaultdict, deque
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np

from nsa.ascend import rates

PIPES = {"AIC": ("S", "M", "MTE1", "MTE2", "FIX"), "AIV": ("S", "V", "MTE2", "MTE3")}
STEPS = 8  # a flow's part from memory is rounded to one of so many, so that equal flows are one group
PLACES = 512  # bytes, a multiple of all lines: views at the same place in one have the same pattern
EPSILON = 1e-6  # cycles
SLOWED = 1.1  # a transfer that took so many times what it takes alone was held back by others


class CoreName(NamedTuple):
    index: int  # of the cores of a launch: cube cores, with their vector cores, or vector cores
    core_type: str
    sub_block: int


class Span(NamedTuple):
    """An instruction in its pipe, in cycles. waited_for: what held it back last.

    ("flag", flag, the operation that set it), ("queue", pipe): the one before in its pipe, or in the pipe that
    takes turns with it, ("scalar",): it was issued late, ("barrier",), ("bandwidth",): others slowed its
    transfer; None.
    """

    core: CoreName
    pipe: str
    start: float
    end: float
    operation: object
    waited_for: tuple | None


@dataclass
class Timing:
    """From the start of a launch's first core to the end of the last, without what the task costs beside it."""

    seconds: float = 0.0
    cycles: float = 0.0
    spans: list = field(default_factory=list)
    busy: dict = field(default_factory=dict)  # pipe -> share of the time, mean over the cores that have the pipe
    from_memory: float = 0.0  # bytes
    from_l2: float = 0.0
    written: float = 0.0


def time(run, target):
    """The `Timing` of a `run.Run`. Blocks beyond the number of cores follow others: block b runs on core b % cores."""
    return _Clock(run.traces, target).run()


class _Clock:
    def __init__(self, traces, target):
        self.target, self.generation = target, rates.GENERATIONS[target.generation]
        self.timing = Timing()
        self.memory = _Memory(target, self.generation)
        self.events = []  # (time, number, function, arguments)
        self._number = 0
        self._ready = deque()  # what may be able to go on: a function of a pipe or of a core
        blocks = defaultdict(list)
        for trace in traces:
            blocks[trace.block].append(trace)
        is_cube = any(trace.core_type == "AIC" for trace in traces)
        n_cores = target.cube_cores if is_cube else target.vector_cores
        self._waves = defaultdict(deque)  # core -> its blocks
        for block in sorted(blocks):
            self._waves[block % n_cores].append(blocks[block])
        self._names = set()
        self._running = set()
        self.scalar = 0.0  # cycles in which scalar units did something

    def run(self):
        for index in self._waves:
            self._next_block(index, index * rates.START)
        memory, events = self.memory, self.events
        while True:
            self._pump()
            flow_end = memory.next_end()
            now = min(events[0][0] if events else np.inf, flow_end)
            if now == np.inf:
                break
            memory.advance(now)
            for transfer in memory.ended():
                if transfer is not None:
                    self._moved(transfer, now)
            while events and events[0][0] <= now + EPSILON:
                _, _, function, arguments = heappop(events)
                function(*arguments)
        return self._finished()

    def at(self, when, function, *arguments):
        self._number += 1
        heappush(self.events, (when, self._number, function, arguments))

    def _next_block(self, index, now):
        if not self._waves[index]:
            return
        team = [_Core(self, index, trace, now) for trace in self._waves[index].popleft()]
        for core in team:
            self._names.add(core.name)
            self._running.add(core.name)
            core.team = team
        for core in team:
            core.issue()

    def core_ended(self, core):
        self._running.remove(core.name)
        self.timing.cycles = max(self.timing.cycles, core.end)
        if all(other.end is not None for other in core.team):
            self._next_block(core.name.index, max(other.end for other in core.team))

    def ready(self, function):
        self._ready.append(function)

    def _pump(self):
        while self._ready:
            self._ready.popleft()()

    def claim(self, transfer):
        """A DMA instruction comes to the head of its pipe. MTE2 and MTE3 of a vector core take turns."""
        engine = transfer.pipe.engine
        if engine.holder is not None:
            engine.queue.append(transfer)
            return
        engine.holder = transfer
        if engine.free > transfer.start:
            transfer.start, transfer.waited_for = engine.free, ("queue", engine.last)
        self.at(transfer.start + transfer.instructions * self.generation.dma, self._begin, transfer)

    def _begin(self, transfer):
        self.memory.add(transfer, self.timing)

    def _moved(self, transfer, now):
        end = max(now, transfer.start + transfer.least)
        if end > now + EPSILON:
            self.at(end, self._ended, transfer, end)
        else:
            self._ended(transfer, end)

    def _ended(self, transfer, end):
        engine = transfer.pipe.engine
        engine.holder, engine.free, engine.last = None, end, transfer.pipe.name
        transfer.pipe.transferred(transfer, end)
        if engine.queue:
            self.claim(engine.queue.popleft())

    def _finished(self):
        timing = self.timing
        if self._running:
            raise RuntimeError(f"these cores wait for ever: {sorted(self._running)}")
        timing.seconds = timing.cycles / self.target.clock
        spent, cores = defaultdict(float, S=self.scalar), defaultdict(int)
        for span in timing.spans:
            if span.pipe != "S":
                spent[span.pipe] += span.end - span.start
        for name in self._names:
            for pipe in PIPES[name.core_type]:
                cores[pipe] += 1
        if timing.cycles:
            timing.busy = {pipe: spent[pipe] / (n * timing.cycles) for pipe, n in sorted(cores.items())}
        return timing


class _Engine:
    """What moves between memory and a core: one for MTE2, one for MTE3 or FIX, or one for both."""

    def __init__(self):
        self.holder, self.queue, self.free, self.last = None, deque(), 0.0, None


class _Core:
    def __init__(self, clock, index, trace, start):
        self.clock, self.name = clock, CoreName(index, trace.core_type, trace.sub_block)
        self.operations, self.next = trace.issued, 0
        self.now = start  # of the scalar unit
        self.end = None
        self.team = ()
        self.flags = defaultdict(deque)  # flag -> (time, operation) of each set that nobody waited for yet
        self.waiting = {}  # flag -> the pipe that waits, or the core if it is its scalar unit
        self.pipes = {}
        self.cache = set()  # lines of the scalar unit's data cache
        shared = _Engine() if trace.core_type == "AIV" else None
        for pipe in PIPES[trace.core_type][1:]:
            self.pipes[pipe] = _Pipe(self, pipe, start, shared or _Engine())

    def issue(self):
        """The scalar unit goes on, to the end or to where it has to wait."""
        operations, clock = self.operations, self.clock
        while self.next < len(operations):
            operation = operations[self.next]
            kind, pipe = operation.kind, operation.pipe
            if kind == "barrier" and pipe == "ALL":
                if not self._is_idle():
                    return
                self.now = max(self.now + operation.scalar, *(p.idle() for p in self.pipes.values()))
            elif pipe == "S":
                if not self._on_scalar_unit(operation):
                    return
            else:
                self.now += operation.scalar + rates.ISSUE
                clock.scalar += operation.scalar + rates.ISSUE
                self.pipes[pipe].queue.append((operation, self.now))
                clock.ready(self.pipes[pipe].go_on)
            self.next += 1
        if self.end is None and self._is_idle():
            self.end = max(self.now, *(pipe.idle() for pipe in self.pipes.values()))
            clock.core_ended(self)

    def _is_idle(self):
        return not any(pipe.queue or pipe.moving for pipe in self.pipes.values())

    def _on_scalar_unit(self, operation):
        """Whether the scalar unit could do its operation, which takes its time then."""
        kind, flag = operation.kind, operation.flag
        if kind in ("wait", "team wait"):
            if not self.flags[flag]:
                self.waiting[flag] = self
                return False
            when, _ = self.flags[flag].popleft()
            cost = rates.SYNCHRONISE if kind == "wait" else rates.TEAM_SYNCHRONISE
            self.now = max(self.now + operation.scalar + rates.ISSUE, when + cost)
            return True
        start = self.now + operation.scalar
        self.now = start + self._scalar_cost(operation)
        self.clock.scalar += self.now - start + operation.scalar
        if kind == "set":
            self.set(operation, self.now)
        elif kind == "team set":
            self.set_for_team(operation, self.now)
        elif kind == "run":
            self.clock.timing.spans.append(Span(self.name, "S", start, self.now, operation, None))
        return True

    def _scalar_cost(self, operation):
        cost = rates.ISSUE if operation.kind != "run" else 0
        for what, amount in operation.work:
            if what not in ("scalar load", "scalar store", "scalar element"):
                raise ValueError(f"no time for {what} on the scalar unit: {operation}")
            for view in (*operation.reads, *operation.writes):
                if view.memory.space != "GM":
                    cost += rates.SCALAR_UB * amount
                    continue
                starts, length = rows_of(view)
                lines = {
                    (view.memory, line)
                    for start in starts.tolist()
                    for line in range(start // rates.SCALAR_LINE, (start + length - 1) // rates.SCALAR_LINE + 1)
                }
                misses = len(lines - self.cache)
                self.cache |= lines
                cost += rates.SCALAR_MISS * misses + rates.SCALAR_HIT * max(amount - misses, 0)
        return cost

    def set(self, operation, when):
        self._set(operation.flag, operation, when)

    def _set(self, flag, operation, when):
        self.flags[flag].append((when, operation))
        waiting = self.waiting.pop(flag, None)
        if waiting is self:
            self.clock.ready(self.issue)
        elif waiting is not None:
            self.clock.ready(waiting.go_on)

    def set_for_team(self, operation, when):
        """A flag for the cores of the other kind. Two vector cores set one for the cube core together."""
        for other in self.team:
            if other.name.core_type == self.name.core_type:
                continue
            peers = [core for core in self.team if core.name.core_type == self.name.core_type]
            key = ("set by", self.name.sub_block, *operation.flag)
            other.flags[key].append((when, operation))
            queues = [other.flags[("set by", peer.name.sub_block, *operation.flag)] for peer in peers]
            if all(queues):
                last = max((queue.popleft() for queue in queues), key=lambda entry: entry[0])
                other._set(operation.flag, last[1], last[0])


class _Pipe:
    def __init__(self, core, name, start, engine):
        self.core, self.name, self.engine = core, name, engine
        self.queue = deque()  # (operation, when it was issued)
        self.free = start  # for the next instruction
        self.done = start  # when the results of all before are there
        self.held_by = None  # why `free` is what it is
        self.moving = False  # an instruction between memory and core is under way

    def idle(self):
        """When all is done, if nothing is in the queue."""
        return max(self.free, self.done)

    def go_on(self):
        queue, core = self.queue, self.core
        was_busy = bool(queue)
        while queue and not self.moving:
            operation, issued = queue[0]
            kind = operation.kind
            if kind == "run":
                queue.popleft()
                self._run(operation, issued)
            elif kind in ("set", "team set"):
                queue.popleft()
                when = max(issued, self.free, self.done)
                (core.set if kind == "set" else core.set_for_team)(operation, when)
            elif kind in ("wait", "team wait"):
                sets = core.flags[operation.flag]
                if not sets:
                    core.waiting[operation.flag] = self
                    return
                queue.popleft()
                when, setter = sets.popleft()
                when += rates.SYNCHRONISE if kind == "wait" else rates.TEAM_SYNCHRONISE
                self._hold(when, ("flag", operation.flag, setter))
            elif kind == "barrier":
                queue.popleft()
                self._hold(self.done, ("barrier",))
            else:
                raise ValueError(f"no time for a {kind}: {operation}")
        if was_busy and not queue and not self.moving:
            core.clock.ready(core.issue)  # it may wait for all pipes

    def _hold(self, when, reason):
        if when > self.free:
            self.free, self.held_by = when, reason

    def _run(self, operation, issued):
        start, waited_for = (self.free, self.held_by) if self.free >= issued else (issued, ("scalar",))
        clock = self.core.clock
        views = [view for view in (*operation.reads, *operation.writes) if view.memory.space == "GM"]
        if views:
            self.moving = True
            transfer = _Transfer(self, operation, views[0], start, waited_for, clock.generation)
            if self.core.name.core_type == "AIV":
                clock.at(start, clock.claim, transfer)
            else:
                clock.claim(transfer)
            return
        cycles, latency = _cycles(operation, clock.generation)
        end = start + cycles
        clock.timing.spans.append(Span(self.core.name, self.name, start, end, operation, waited_for))
        self._ran(end, latency)

    def _ran(self, end, latency):
        self.free, self.held_by = end, ("queue", self.name)
        self.done = max(self.done, end + latency)

    def transferred(self, transfer, end):
        clock = self.core.clock
        slowed = end - transfer.start > SLOWED * transfer.alone
        waited_for = ("bandwidth",) if slowed else transfer.waited_for
        clock.timing.spans.append(Span(self.core.name, self.name, transfer.start, end, transfer.operation, waited_for))
        self.moving = False
        self._ran(end, transfer.latency)
        clock.ready(self.go_on if self.queue else self.core.issue)


def _cycles(operation, generation):
    """How long an instruction has its pipe, and how much later its result is there, if it moves nothing to or from
    memory."""
    cycles, latency = 0.0, rates.STARTUP.get(operation.pipe, 0)
    for what, amount in operation.work:
        if what == "mad":
            cycles += amount * rates.MAD
        elif what == "mad blocks":
            cycles += amount
        elif what == "L1 to L0A":
            cycles += generation.mte1 + amount / rates.L1_TO_L0A_MEASURED
        elif what == "L1 to L0B":
            cycles += generation.mte1 + amount / generation.l1_to_l0b
        elif what == "set_l1":
            cycles += amount / rates.L1_FILL
        elif what == "ub copy":
            blocks, latency = rates.UB_COPY
            cycles += amount / blocks
        elif operation.pipe == "V":
            repeat, latency = rates.VECTOR.get(what, rates.OTHER_VECTOR)
            cycles += amount * repeat
        else:
            raise ValueError(f"no time for {what} on {operation.pipe}: {operation}")
    return cycles, latency


class _Transfer:
    """A DMA instruction between memory and a core."""

    def __init__(self, pipe, operation, view, start, waited_for, generation):
        self.pipe, self.operation, self.view = pipe, operation, view
        self.start, self.waited_for = start, waited_for
        self.is_write = any(view is written for written in operation.writes)
        ((what, self.instructions),) = operation.work
        n_rows = 1
        for size in view.sizes[:-1]:
            n_rows *= size
        row = {"nd2nz": generation.nd2nz_row, "load": generation.burst, "store": generation.burst, "fixpipe": 0}[what]
        self.least = self.instructions * generation.dma + n_rows * row  # cycles
        self.latency = rates.STARTUP[pipe.name]
        self.alone = 0.0  # cycles, if it had all of memory for itself


class _Group:
    """Flows that share alike: `served` bytes were moved for each since the start."""

    def __init__(self, part, cap, is_write):
        self.part, self.cap, self.is_write = part, cap, is_write
        self.served, self.rate = 0.0, 0.0
        self.ends = []  # a heap of (served at the end, number, transfer)


class _Pattern(NamedTuple):
    """bytes of a view, `volume` that the way to memory carries for them, and the `lines` of L2 that they are in."""

    bytes: int
    volume: float
    lines: np.ndarray


class _Memory:
    """Memory and L2 with the flows out of and into them. Rates are bytes a cycle."""

    def __init__(self, target, generation):
        self.line = generation.line
        self.l2_size = target.l2
        self.total = target.ddr_read / target.clock  # which what is written back shares: *assumed*
        scale = target.cube_cores * target.clock / (generation.l2_cores * generation.l2_clock)
        self.l2_total = generation.l2_total * scale / target.clock
        self.caps = {  # core type, is it a write: from or to memory alone, and from L2 alone
            ("AIC", False): (rates.CUBE_FROM_MEMORY / target.clock, rates.CUBE_FROM_L2),
            ("AIV", False): (rates.VECTOR_FROM_MEMORY / target.clock, rates.VECTOR_FROM_L2),
            ("AIC", True): (np.inf, generation.fix),
            ("AIV", True): (np.inf, rates.VECTOR_WRITE),
            ("write back", True): (self.total, np.inf),
        }
        self.now = 0.0
        self.groups = {}
        self._number = 0
        self._stale = False  # whether shares have to be computed anew
        self._shares = {}
        self.brought_in = 0  # bytes, into L2
        self._patterns = {}
        self.last_use = {}  # memory -> for each line of it, `brought_in` at its last use

    def add(self, transfer, timing):
        """A flow begins."""
        pattern, first_line = self._pattern(transfer.view)
        brought_in = self._use(transfer.view.memory, first_line + pattern.lines)
        core_type = transfer.pipe.core.name.core_type
        bytes_, volume = pattern.bytes, pattern.volume
        if transfer.is_write:
            part = 0.0
            timing.written += bytes_
            self._start(self._group("write back", True, 1.0), volume, None)
        else:
            part = min(1.0, round(brought_in / bytes_ * STEPS) / STEPS)
            volume = max(volume, brought_in)
            timing.from_memory += brought_in
            timing.from_l2 += max(0, bytes_ - brought_in)
        transfer.latency += rates.MEMORY_LATENCY if part else rates.L2_LATENCY
        group = self._group(core_type, transfer.is_write, part)
        transfer.alone = max(transfer.least, self.now - transfer.start + volume / group.cap)
        self._start(group, volume, transfer)

    def _start(self, group, volume, transfer):
        self._number += 1
        heappush(group.ends, (group.served + volume, self._number, transfer))
        self._stale = True

    def _group(self, core_type, is_write, part):
        key = core_type, is_write, part
        if key not in self.groups:
            memory, l2 = self.caps[core_type, is_write]
            self.groups[key] = _Group(part, 1 / (part / memory + (1 - part) / l2), is_write)
        return self.groups[key]

    def _pattern(self, view):
        """What a view reaches, and the line of L2 from which on: there are few patterns, in many places."""
        place, step = view.address % PLACES, view.dtype.itemsize
        key = view.sizes, view.strides, step, place
        if key not in self._patterns:
            starts, length = rows_of(view)
            starts = starts - view.address + place
            ends = starts + length
            sectors = (-(-ends // rates.SECTOR) - starts // rates.SECTOR) * rates.SECTOR
            lines = -(-ends // self.line) - starts // self.line
            whole = (starts % self.line != 0) & (lines > 1)
            volume = float(np.where(whole, lines * self.line, sectors).sum())
            first, last = starts // rates.L2_LINE, (ends - 1) // rates.L2_LINE
            reached = [np.arange(a, b + 1) for a, b in zip(first, last)]
            self._patterns[key] = _Pattern(len(starts) * length, volume, np.unique(np.concatenate(reached)))
        return self._patterns[key], (view.address - place) // rates.L2_LINE

    def _use(self, memory, lines):
        """Bytes of lines that were not in L2. All of them are afterwards."""
        last_use = self.last_use.get(memory)
        if last_use is None:
            n_lines = len(memory.bytes) // rates.L2_LINE + 2
            last_use = self.last_use[memory] = np.full(n_lines, -(2**62), np.int64)
        bytes_ = int(np.count_nonzero(last_use[lines] <= self.brought_in - self.l2_size)) * rates.L2_LINE
        self.brought_in += bytes_
        last_use[lines] = self.brought_in
        return bytes_

    def next_end(self):
        """When the next flow ends if none begins before."""
        if self._stale:
            self._share()
        left = [(group.ends[0][0] - group.served) / group.rate for group in self.groups.values() if group.ends]
        return self.now + max(0.0, min(left)) if left else np.inf

    def advance(self, now):
        if now > self.now:
            for group in self.groups.values():
                if group.ends:
                    group.served += group.rate * (now - self.now)
            self.now = now

    def ended(self):
        """The transfers whose flows have ended by now; None for lines that were written back."""
        out = []
        for group in self.groups.values():
            while group.ends and group.ends[0][0] - group.served <= EPSILON * group.rate:
                out.append(heappop(group.ends)[2])
            if not group.ends:
                group.served = 0.0
        if out:
            self._stale = True
        return out

    def _share(self):
        """Fair shares: nobody gets more of memory, nor of L2, than another that wants more than it has."""
        self._stale = False
        active = [group for group in self.groups.values() if group.ends]
        key = tuple((id(group), len(group.ends)) for group in active)
        shares = self._shares.get(key)
        if shares is None:
            counts = [len(group.ends) for group in active]
            wanted = [group.cap * group.part for group in active]
            level = fair_level(counts, wanted, self.total)
            caps = [min(group.cap, level / group.part) if group.part else group.cap for group in active]
            reads = [i for i, group in enumerate(active) if not group.is_write]
            level = fair_level([counts[i] for i in reads], [caps[i] for i in reads], self.l2_total)
            shares = [cap if group.is_write else min(cap, level) for group, cap in zip(active, caps)]
            self._shares[key] = shares
        for group, rate in zip(active, shares):
            group.rate = rate


def fair_level(counts, wanted, total):
    """The most that one of `counts` equal users gets of `total`, if some want less."""
    n = sum(counts)
    for want, count in sorted(zip(wanted, counts)):
        if want * n >= total:
            return total / n
        total -= want * count
        n -= count
    return np.inf


def rows_of(view):
    """The first bytes of a view's contiguous rows, an array, and their length in bytes."""
    length, starts = view.dtype.itemsize, None
    outer = []
    for size, stride in zip(reversed(view.sizes), reversed(view.strides)):
        step = stride * view.dtype.itemsize
        if size == 1:
            continue
        if not outer and step == length:
            length *= size
        else:
            outer.append((size, step))
    starts = np.array([view.address])
    for size, step in outer:
        starts = (starts[None, :] + np.arange(size)[:, None] * step).ravel()
    return starts, length
