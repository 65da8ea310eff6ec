"""What a launch cost and what held it up, in words and as data. Times are `clock`'s: modelled, never measured."""

from bisect import bisect_right
from collections import Counter, defaultdict
from dataclasses import dataclass

from nsa.ascend import rates

from . import checks, clock, faults
from .trace import PIPES

# where a pipe stands on the way of the data through a core
STAGES = {"S": 0, "MTE2": 1, "MTE1": 2, "M": 3, "V": 3, "FIX": 4, "MTE3": 4}
REASONS = 4  # of the critical path, in words


@dataclass
class Report:
    """launch: a `driver.Launch`. target: the `Target` on which it ran. timing: its `clock.Timing`."""

    launch: object
    target: object
    timing: clock.Timing

    @property
    def passed(self):
        """The names of the checks that found nothing."""
        found = {fault.check for fault in self.launch.faults}
        return [name for name in (*faults.OF_EXECUTION, *checks.CHECKS) if name not in found]

    @property
    def limit(self):
        """Seconds that the memory takes, at its full rate, for the bytes that were moved from and to it."""
        return (self.timing.from_memory + self.timing.written) / self.target.ddr_read

    def data(self):
        """All of it as what JSON can hold."""
        timing = self.timing
        return {
            "kernel": self.launch.kernel,
            "target": self.target.name,
            "grid": list(self.launch.grid),
            "checks_passed": self.passed,
            "faults": [str(fault) for fault in self.launch.faults],
            "cycles": timing.cycles,
            "seconds": timing.seconds,
            "task_overhead": rates.task_overhead(self.target),
            "memory_limit": self.limit,
            "busy": timing.busy,
            "bytes": {"from_memory": timing.from_memory, "from_l2": timing.from_l2, "written": timing.written},
            "critical_path": [{"share": share, "what": what} for what, share in critical_path(self)],
        }

    def lines(self):
        """All of it as lines of text."""
        timing = self.timing
        x, y, z = self.launch.grid
        yield f"{self.launch.kernel} on {self.target.name}, grid {x} x {y} x {z}"
        yield f"  checks passed  {', '.join(self.passed)}"
        for fault in self.launch.faults:
            yield f"  FAULT          {fault}"
        if not timing.spans:
            return
        yield f"  time           {timing.cycles:,.0f} cycles, {timing.seconds * 1e6:.2f} us, modelled"
        if self.limit:
            times = timing.seconds / self.limit
            yield f"  memory limit   {self.limit * 1e6:.2f} us for these bytes; it takes {times:.1f} times that"
        yield f"  busy           {', '.join(f'{pipe} {share:.0%}' for pipe, share in timing.busy.items())}"
        yield (
            f"  bytes          {timing.from_memory:,.0f} from memory, {timing.from_l2:,.0f} from L2, "
            f"{timing.written:,.0f} written"
        )
        for i, (what, share) in enumerate(critical_path(self)[:REASONS]):
            yield f"  {'critical path' if i == 0 else '':13}  {what}, {share:.0%}"


def report_of(launch, target):
    """The `Report` of a launch. One that a fault has stopped has no time."""
    return Report(launch, target, clock.Timing() if launch.run.faults else clock.time(launch.run, target))


def critical_path(report):
    """[(what, share of the time)], the largest first: what held the launch up, from its last instruction back.

    Of each instruction on the way, the clock tells what it waited for; the time from the start of that to its own
    start counts for the reason.
    """
    timing = report.timing
    if not timing.spans:
        return []
    walk = _Walk(report)
    spent = Counter()
    span = max(timing.spans, key=lambda span: span.end)
    spent[_busy(span)] += timing.cycles - span.start
    while span is not None:
        what, before = walk.back(span)
        spent[what] += span.start - (before.start if before else 0.0)
        span = before
    return [(what, cycles / timing.cycles) for what, cycles in spent.most_common() if cycles > 0]


class _Walk:
    def __init__(self, report):
        self._ends = defaultdict(list)  # (core, pipe) -> its spans in order
        self._span_of = {}  # id of an operation -> its span
        for span in sorted(report.timing.spans, key=lambda span: span.end):
            self._ends[span.core, span.pipe].append(span)
            self._span_of[id(span.operation)] = span
        self._trace_of = {}  # id of an operation -> the operations of its core in the order of issue, and its place
        for trace in report.launch.run.traces:
            for i, operation in enumerate(trace.issued):
                self._trace_of[id(operation)] = trace.issued, i

    def back(self, span):
        """What a span waited for, in words, and the span that this was."""
        kind, *rest = span.waited_for or ("nothing",)
        if kind == "flag":
            flag, setter = rest
            return self._flag(span, flag, setter)
        if kind in ("queue", "bandwidth"):  # what took part in the memory's rate is told of the next span
            before = self._last(span.core, rest[0] if rest else span.pipe, span)
            return (_busy(before) if before else _starts(span)), before
        if kind == "barrier":
            before = self._last(span.core, span.pipe, span)
            return f"{span.pipe} waits at a barrier for its own results, {_line(span)}", before
        return self._scalar(span, *self._trace_of[id(span.operation)])[:2]

    def _flag(self, span, flag, setter):
        """The last span of the pipe that set the flag; or why the flag was set late, if that is later."""
        operations, i = self._trace_of[id(setter)]
        why, stopped, is_sure = self._scalar(span, operations, i)
        for operation in reversed(operations[:i]):
            before = self._span_of.get(id(operation))
            if before and operation.pipe == setter.pipe and before.start < span.start:
                if is_sure and stopped.end > before.end:
                    break
                return _waits(span, before, flag), before
        return why, stopped

    def _scalar(self, span, operations, i):
        """Operation i was issued late: by the scalar unit's own work, or by what that waited for last. In words; the
        span; whether the operation cannot have been issued before that ended."""
        latest, found = 0.0, (_starts(span), None, False)
        for place in reversed(range(i)):
            operation = operations[place]
            before = self._span_of.get(id(operation))
            if before and before.start < span.start:  # what the scalar unit issued before
                if before.start >= latest:
                    found = (
                        f"{span.pipe} waits for the scalar unit to come to {_line(span)}",
                        before,
                        before.pipe == "S",
                    )
                break
            if operation.pipe in ("S", "ALL") and operation.kind in ("barrier", "wait", "team wait"):
                before = self._ended(span, operations, place)
                if before and before.end >= latest:
                    latest, found = before.end, (_stops(span, operation, before), before, True)
        return found

    def _ended(self, span, operations, place):
        """The span for whose end the scalar unit stopped at an operation."""
        stop = operations[place]
        if stop.kind == "team wait":
            others = [key for key in self._ends if key[0].index == span.core.index and key[0][1] != span.core[1]]
        else:
            pipes = PIPES if stop.kind == "barrier" else stop.flag[:1]
            others = [(span.core, pipe) for pipe in pipes]
        ended = [before for before in (self._last(*key, span, ended=True) for key in others) if before]
        return max(ended, key=lambda before: before.end, default=None)

    def _last(self, core, pipe, span, ended=False):
        """The last span of a pipe that began before this one, or that had ended then."""
        spans = self._ends.get((core, pipe), ())
        i = bisect_right(spans, span.start, key=lambda other: other.end if ended else other.start)
        while i and spans[i - 1].start >= span.start:
            i -= 1
        return spans[i - 1] if i else None


def _line(span):
    return f"line {span.operation.line}"


def _busy(span):
    if span.waited_for and span.waited_for[0] == "bandwidth":
        return f"{span.pipe} shares the memory's rate with other cores in {span.operation.name}, {_line(span)}"
    return f"{span.pipe} is busy with {span.operation.name}, {_line(span)}"


def _waits(span, before, flag):
    if flag[0] == "team":
        return f"{span.core.core_type} waits for {before.core.core_type} before {_line(span)}"
    if STAGES[before.pipe] > STAGES[span.pipe]:
        return f"{span.pipe} waits for {before.pipe} to release the buffer of {_line(span)}"
    return f"{span.pipe} waits for {before.pipe} to bring the data of {_line(span)}"


def _stops(span, stop, before):
    if stop.kind == "team wait":
        return _waits(span, before, stop.flag)
    at = "a barrier of all pipes" if stop.kind == "barrier" else "a flag"
    return f"the scalar unit waits at {at}, line {stop.line}, for {before.pipe} to end {before.operation.name}"


def _starts(span):
    return f"the start, to {_line(span)}"
