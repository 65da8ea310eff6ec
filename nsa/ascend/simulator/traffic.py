"""What is under way between memory and the cores, and how fast it goes: flows that share.

The flows share the memory's rate and that of L2 fairly, each up to what its core can draw, and the shares change when a
flow begins or ends. A line is in L2 if less than the size of L2 was brought in since its last use. What is written is
there at once for its core, in L2, which writes it back to memory at the expense of the other flows.
"""

from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np

from nsa.ascend import rates

STEPS = 8  # a flow's part from memory is rounded to one of so many, so that equal flows are one group
PLACES = 512  # bytes, a multiple of all lines: views at the same place in one have the same pattern
EPSILON = 1e-6  # cycles


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


class Traffic:
    """The flows of a launch. Rates are bytes a cycle.

    A cube core and its vector cores share nothing here: no source says that they do, and two vector cores together
    draw 136 bytes a cycle out of L2 in the vendor's copies, more than the 110 of the platform files.
    """

    def __init__(self, target, generation):
        self.line = generation.line
        self.l2_size = target.l2
        self.total = target.ddr_read / target.clock  # which what is written back shares: *assumed*
        self.l2_total = rates.l2_total(target) / target.clock
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
        transfer.alone = max(transfer.least, self.now - transfer.start + volume / self._rate_alone(group))
        self._start(group, volume, transfer)

    def _rate_alone(self, group):
        """Of a flow with no others."""
        return min(group.cap, self.total / group.part if group.part else np.inf, self.l2_total)

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
        if step == length:
            length *= size
        else:
            outer.append((size, step))
    starts = np.array([view.address])
    for size, step in outer:
        starts = (starts[None, :] + np.arange(size)[:, None] * step).ravel()
    return starts, length
