"""How long a launch takes, from what its cores issued. Modelled: no NPU was at hand, and constants are `rates`'.

Discrete events over all cores. The scalar unit of a core hands operations to the queues of the pipes, at a cost, and
stops only at its own waits and accesses and at barriers of all pipes. A pipe takes its queue in order. It is free
for the next instruction before the result of the last one is there; flags and barriers wait for the result.

What goes between memory and cores is `traffic`. A launch does not wait for what is in L2 at its end and still has to be
written back to memory.

Not modelled: banks of L2 and of memory, so nothing of several cores that want the same line at once; queues that are
full; instruction caches, and whatever a core does before its first instruction.
"""

from collections import defaultdict, deque
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np

from nsa.ascend import rates

from .traffic import EPSILON, Traffic, rows_of

PIPES = {"AIC": ("S", "M", "MTE1", "MTE2", "FIX"), "AIV": ("S", "V", "MTE2", "MTE3")}
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
        self.traffic = Traffic(target, self.generation)
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
        traffic, events = self.traffic, self.events
        while True:
            self._pump()
            flow_end = traffic.next_end()
            now = min(events[0][0] if events else np.inf, flow_end)
            if now == np.inf:
                break
            traffic.advance(now)
            for transfer in traffic.ended():
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
        self.traffic.add(transfer, self.timing)

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
            cycles += generation.mte1 + amount / rates.L1_TO_L0A
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
