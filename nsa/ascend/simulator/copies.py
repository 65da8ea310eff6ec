"""`python -m nsa.ascend.simulator.copies > docs/evidence/copies.csv`: the clock against copies that the vendor timed.

The vendor's best practices of copying (asc-devkit, examples, `data_copy`, 2026) copy a matrix of fp16 from memory to UB
or to L1, all cores at once and nothing else, and give the time that MTE2 was busy, or where four passes were made that
the cores were. The chips are an A2 of 24 cube cores at 1850 MHz and a 950 of 32 at 1650 MHz: cycles over time and cores
tell the clocks. Here each copy is a trace, as its description says.

Of a copy in which no row is read twice, a part of each core's rows is enough, and its time is scaled: `cut`.
"""

import csv
import sys
from typing import NamedTuple

import numpy as np

from nsa.ascend.targets import TARGETS

from . import clock
from .memory import Memory, View
from .run import Run
from .trace import Operation, Trace

HALF = np.dtype(np.float16)
CHIPS = {"A2": TARGETS["Ascend910B1"], "A5": TARGETS["Ascend950PR_9589"]}
FITTED = "fitted"  # a constant of `rates` was chosen to give this time
NO_BANKS = "rows at a stride of 1024 bytes, by all cores at once: the clock has no banks of L2"


class Copy(NamedTuple):
    """measured: microseconds. passes: of each part of the columns, the number of which is `parts`. shared: every
    core copies the whole matrix, "same" in one order, "staggered" from a place of its own on."""

    chip: str
    to: str
    rows: int
    columns: int
    tile: tuple
    measured: float
    note: str = ""
    passes: int = 1
    parts: int = 1
    shared: str = ""
    cut: int = 1

    @property
    def what(self):
        text = f"{self.rows} x {self.columns} in tiles of {self.tile[0]} x {self.tile[1]}"
        if self.passes > 1:
            text += f", {self.passes} passes" + (f" of each of {self.parts} parts" if self.parts > 1 else "")
        if self.shared:
            text += f", all of it by every core, {self.shared} order"
        return text

    def modelled(self):
        """Microseconds."""
        target = CHIPS[self.chip]
        return clock.time(Run([], (1, 1, 1), self.traces()), target).seconds * self.cut * 1e6

    def traces(self):
        target = CHIPS[self.chip]
        n_cores, core_type = (target.cube_cores, "AIC") if self.to == "L1" else (target.vector_cores, "AIV")
        work = (("nd2nz" if self.to == "L1" else "load", 1),)
        matrix = Memory(
            "GM", range(self.rows * self.columns * HALF.itemsize), "matrix"
        )  # of which only the length matters
        height, width = self.tile
        for core in range(n_cores):
            trace = Trace(core, core_type)
            for row, column in self._tiles(core, n_cores):
                sizes = height, min(width, self.columns - column)
                view = View(matrix, HALF, 0, row * self.columns + column, sizes, (self.columns, 1))
                trace.issued.append(Operation("run", "MTE2", "copy", 0, reads=(view,), work=work))
            yield trace

    def _tiles(self, core, n_cores):
        height, width = self.tile
        own = self.rows // n_cores
        blocks = [core]
        if self.shared:
            start = core if self.shared == "staggered" else 0
            blocks = [(start + i) % n_cores for i in range(0, n_cores, self.cut)]
            used = own
        else:
            used = own // self.cut
        columns = -(-self.columns // self.parts)
        for part in range(self.parts):
            for _ in range(self.passes):
                for block in blocks:
                    for row in range(block * own, block * own + used, height):
                        for column in range(part * columns, min(self.columns, (part + 1) * columns), width):
                            yield row, column


N = 12288
COPIES = [
    Copy("A2", "UB", N, N, (1, 64), 548.161, FITTED, cut=64),
    Copy("A2", "UB", N, N, (64, 64), 220.772, FITTED, cut=4),
    Copy("A2", "UB", N, N, (64, 1024), 202.657),
    Copy("A2", "UB", N, N - 1, (64, 1024), 259.047),
    Copy("A2", "UB", N, N, (64, 1024), 816.05, passes=4),
    Copy("A2", "UB", N, N, (64, 1024), 354.56, passes=4, parts=4),
    Copy("A2", "UB", 6144, 512, (128, 64), 474.717, NO_BANKS, shared="same", cut=4),
    Copy("A2", "UB", 6144, 512, (128, 64), 307.38, NO_BANKS, shared="staggered", cut=4),
    Copy("A2", "L1", N, N, (64, 64), 283.508, FITTED, cut=8),
    Copy("A2", "L1", N, N, (64, 256), 214.519, cut=4),
    Copy("A2", "L1", N, N - 1, (64, 256), 422.515, cut=4),
    Copy("A2", "L1", N, N, (64, 1024), 872.19, passes=4),
    Copy("A2", "L1", N, N, (64, 1024), 397.8, passes=4, parts=4),
    Copy("A2", "L1", 6144, 512, (256, 64), 240.198, NO_BANKS, shared="same"),
    Copy("A2", "L1", 6144, 512, (256, 64), 209.8, NO_BANKS, shared="staggered"),
    Copy("A5", "UB", N, N, (1, 64), 881.13, FITTED, cut=64),
    Copy("A5", "UB", N, N, (64, 64), 205.99, cut=3),
    Copy("A5", "UB", N, N, (64, 1024), 185.66),
    Copy("A5", "UB", N, N - 1, (64, 1024), 189.16),
    Copy("A5", "UB", N, N, (64, 1024), 740.75, passes=4),
    Copy("A5", "UB", N, N, (64, 1024), 354.19, passes=4, parts=4),
    Copy("A5", "UB", 8192, 512, (128, 64), 339.38, shared="same", cut=4),
    Copy("A5", "UB", 8192, 512, (128, 64), 333.08, shared="staggered", cut=4),
    Copy("A5", "L1", N, N, (64, 64), 241.56, FITTED, cut=6),
    Copy("A5", "L1", N, N, (64, 256), 187.19, cut=6),
    Copy("A5", "L1", N, N - 1, (64, 256), 202.97, cut=6),
    Copy("A5", "L1", N, N, (64, 1024), 732.11, passes=4),
    Copy("A5", "L1", N, N, (64, 1024), 389.64, passes=4, parts=4),
    Copy("A5", "L1", 8192, 512, (256, 64), 366.24, NO_BANKS, shared="same"),
    Copy("A5", "L1", 8192, 512, (256, 64), 185.03, shared="staggered"),
]


def table():
    """A dict for each copy."""
    for copy in COPIES:
        modelled = copy.modelled()
        yield {
            "chip": copy.chip,
            "to": copy.to,
            "copy": copy.what,
            "measured_us": copy.measured,
            "modelled_us": round(modelled, 1),
            "modelled_over_measured": round(modelled / copy.measured, 3),
            "note": copy.note,
        }


if __name__ == "__main__":
    rows = list(table())
    writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
