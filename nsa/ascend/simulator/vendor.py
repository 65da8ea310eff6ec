"""`python -m nsa.ascend.simulator.vendor > docs/evidence/clock.csv`: the clock against times that the vendor measured.

The examples of asc-devkit's best practices (2026) give times of pipes and cores on two chips: an A2 of 24 cube cores at
1850 MHz, and a 950 of 32 at 1650 MHz. Cycles over time and cores tell the clocks.

- `data_copy`: a matrix of fp16 is copied from memory to UB or L1, by all cores at once and with nothing else. The
  time is that of MTE2, or where four passes were made that of the cores.
- `add_high_performance`: two matrices of fp16 are added. The time is that of the cores, or on the 950 the task's less
  `rates`' for it.
- `matmul_basic_api_high_performance`, and for FIX `matmul_high_performance` with no unit flag: 8192 x 8192 x 8192 in
  fp16. The vendor's kernel is in Ascend C, ours in Triton with the same blocks, so that the core's time is comparable
  only roughly.

Copies and additions are written as traces here, as the descriptions say; the product is compiled and run. Where no byte
is read twice the first part of each core's work is enough, and the time is scaled: `cut`.

Times marked as fitted are calibration: a constant of `rates` was chosen for them. None was chosen for the others, but
they were all known when the form of the model was chosen.
"""

import csv
import sys
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from nsa.ascend import rates
from nsa.ascend.compile import compile_kernel
from nsa.ascend.targets import TARGETS

from . import clock, machine
from .memory import Memory, View
from .run import Run, run
from .trace import Operation, Trace

HALF = np.dtype(np.float16)
CHIPS = {"A2": TARGETS["Ascend910B1"], "A5": TARGETS["Ascend950PR_9589"]}
FITTED = "fitted"  # a constant of `rates` was chosen to give this time
SAME_PLACE = "the clock knows no cores that get in each other's way at one place of L2"


def matrix(name, rows, columns):
    """Of which only the length matters."""
    return Memory("GM", range(rows * columns * HALF.itemsize), name)


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
        text = f"copy of {self.rows} x {self.columns} to {self.to}, in tiles of {self.tile[0]} x {self.tile[1]}"
        if self.passes > 1:
            text += f", {self.passes} passes" + (f" of each of {self.parts} parts" if self.parts > 1 else "")
        if self.shared:
            text += f", all of it by every core, {self.shared} order"
        return text

    def modelled(self):
        """Microseconds: of MTE2, or of the core if that was measured."""
        timing = clock.time(Run([], (1, 1, 1), self.traces()), CHIPS[self.chip])
        return timing.seconds * self.cut * (timing.busy["MTE2"] if self.passes == 1 else 1) * 1e6

    def traces(self):
        target = CHIPS[self.chip]
        n_cores, core_type = (target.cube_cores, "AIC") if self.to == "L1" else (target.vector_cores, "AIV")
        work = (("nd2nz" if self.to == "L1" else "load", 1),)
        source = matrix("source", self.rows, self.columns)
        height, width = self.tile
        for core in range(n_cores):
            trace = Trace(core, core_type)
            tiles = list(self._tiles(core, n_cores))
            for row, column in tiles[: len(tiles) // self.cut]:
                sizes = height, min(width, self.columns - column)
                view = View(source, HALF, 0, row * self.columns + column, sizes, (self.columns, 1))
                trace.issued.append(Operation("run", "MTE2", "copy", 0, reads=(view,), work=work))
            yield trace

    def _tiles(self, core, n_cores):
        height, width = self.tile
        own = self.rows // n_cores
        blocks = [core]
        if self.shared:
            blocks = [(core * (self.shared == "staggered") + i) % n_cores for i in range(n_cores)]
        columns = -(-self.columns // self.parts)
        for part in range(self.parts):
            for _ in range(self.passes):
                for block in blocks:
                    for row in range(block * own, (block + 1) * own, height):
                        for column in range(part * columns, min(self.columns, (part + 1) * columns), width):
                            yield row, column


class Add(NamedTuple):
    """Two matrices are added, `chunk` elements at a time. overlap: "none", "next": while a result is stored the next
    operands are loaded, or "double": there are two buffers for everything."""

    chip: str
    cores: int
    chunk: int
    overlap: str
    measured: float
    note: str = ""
    cut: int = 1

    @property
    def what(self):
        return f"addition of 8192 x 8192 on {self.cores} cores, chunks of {self.chunk}, overlap {self.overlap}"

    def modelled(self):
        return clock.time(Run([], (1, 1, 1), self.traces()), CHIPS[self.chip]).seconds * self.cut * 1e6

    def traces(self):
        x, y, z = (matrix(name, 8192, 8192) for name in "xyz")
        own = 8192 * 8192 // self.cores
        buffers = (0, 1) if self.overlap == "double" else (0,)
        # what a load, and what a sum, has to wait for, before it may write into its buffer
        free = [("MTE3", "MTE2")] if self.overlap == "none" else [("V", "MTE2"), ("MTE3", "V")]
        for core in range(self.cores):
            trace = Trace(core, "AIV")
            for pair in free:
                for buffer in buffers:
                    trace.issued.append(flag("set", *pair, buffer))
            chunks = range(core * own, core * own + own // self.cut, self.chunk)
            for i, first in enumerate(chunks):
                _add(
                    trace.issued,
                    [View(m, HALF, 0, first, (self.chunk,), (1,)) for m in (x, y, z)],
                    i % len(buffers),
                    free,
                )
            for pair in free:
                for buffer in buffers:
                    trace.issued.append(flag("wait", *pair, buffer))
            yield trace


def flag(kind, setting, waiting, event):
    return Operation(kind, setting if kind == "set" else waiting, kind, 0, flag=(setting, waiting, event))


def _add(issued, views, buffer, free):
    x, y, z = views
    waits = {waiting: setting for setting, waiting in free}
    bytes_ = x.sizes[0] * HALF.itemsize
    issued.append(flag("wait", waits["MTE2"], "MTE2", buffer))
    for view in (x, y):
        issued.append(Operation("run", "MTE2", "load", 0, reads=(view,), work=(("load", 1),)))
    issued += [flag("set", "MTE2", "V", buffer), flag("wait", "MTE2", "V", buffer)]
    if "V" in waits:
        issued.append(flag("wait", waits["V"], "V", buffer))
    issued.append(Operation("run", "V", "vadd", 0, work=(("vadd", bytes_ // 256),)))
    if "V" in waits:
        issued.append(flag("set", "V", "MTE2", buffer))
    issued += [flag("set", "V", "MTE3", buffer), flag("wait", "V", "MTE3", buffer)]
    issued.append(Operation("run", "MTE3", "store", 0, writes=(z,), work=(("store", 1),)))
    issued.append(flag("set", "MTE3", "V" if "V" in waits else "MTE2", buffer))


@triton.jit
def matmul(a, b, c, SIZE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GRID_M: tl.constexpr):
    """One block of the result for each program."""
    program = tl.program_id(0)
    rows = program % GRID_M * M + tl.arange(0, M)
    columns = program // GRID_M * N + tl.arange(0, N)
    result = tl.zeros((M, N), tl.float32)
    for k in range(0, SIZE, K):
        inner = k + tl.arange(0, K)
        x = tl.load(a + rows[:, None] * SIZE + inner[None, :])
        y = tl.load(b + inner[:, None] * SIZE + columns[None, :])
        result = tl.dot(x, y, result)
    tl.store(c + rows[:, None] * SIZE + columns[None, :], result.to(tl.float16))


class Matmul(NamedTuple):
    """8192 x 8192 x 8192. Each core does one block of 128 x 256, and the time is scaled to all 2048 blocks."""

    chip: str
    pipe: str  # "all" is the core
    measured: float
    note: str = ""

    @property
    def what(self):
        return f"product of 8192 x 8192 x 8192, {'the core' if self.pipe == 'all' else self.pipe}"

    def modelled(self):
        timing, blocks = _product(self.chip)
        return timing.seconds * blocks * (timing.busy[self.pipe] if self.pipe != "all" else 1) * 1e6


@cache
def _product(chip):
    """The `Timing` of a block on each core, and how many a core has. One is run; the others do the same elsewhere."""
    target = CHIPS[chip]
    size, m, n, grid_m = 8192, 128, 256, 4
    signature = dict.fromkeys("abc", "*fp16")
    compiled = compile_kernel(matmul, signature, {"SIZE": size, "M": m, "N": n, "K": 256, "GRID_M": grid_m}, target)
    matrices = [torch.zeros(size, size, dtype=torch.float16) for _ in "abc"]
    first = run(machine.programs_of(compiled.module), matrices, (target.cube_cores, 1, 1), blocks=[0])
    traces = []
    for core in range(target.cube_cores):
        row, column = core % grid_m * m, core // grid_m * n
        places = {"argument 0": row * size, "argument 1": column, "argument 2": row * size + column}
        traces.append(Trace(core, "AIC", issued=[_elsewhere(op, places) for op in first.traces[0].issued]))
    return clock.time(Run([], (1, 1, 1), traces), target), size * size / (m * n) / target.cube_cores


def _elsewhere(operation, places):
    """The operation with its views of tensors so many elements further on. places: by the memories' names."""
    reads, writes = (
        tuple(view.part(places.get(view.memory.name, 0)) for view in views)
        for views in (operation.reads, operation.writes)
    )
    return replace(operation, reads=reads, writes=writes)


N = 12288
TASK = rates.A5.task * 1e6
MEASURED = [
    Copy("A2", "UB", N, N, (1, 64), 548.161, FITTED, cut=1024),
    Copy("A2", "UB", N, N, (64, 64), 220.772, FITTED, cut=48),
    Copy("A2", "UB", N, N, (64, 1024), 202.657, cut=4),
    Copy("A2", "UB", N, N - 1, (64, 1024), 259.047, cut=4),
    Copy("A2", "UB", N, N, (64, 1024), 816.05, passes=4, cut=2),
    Copy("A2", "UB", N, N, (64, 1024), 354.56, passes=4, parts=4, cut=4),
    Copy("A2", "UB", 6144, 512, (128, 64), 474.717, SAME_PLACE, shared="same", cut=8),
    Copy("A2", "UB", 6144, 512, (128, 64), 307.38, SAME_PLACE, shared="staggered", cut=8),
    Copy("A2", "L1", N, N, (64, 64), 283.508, FITTED, cut=48),
    Copy("A2", "L1", N, N, (64, 256), 214.519, cut=16),
    Copy("A2", "L1", N, N - 1, (64, 256), 422.515, FITTED, cut=16),
    Copy("A2", "L1", N, N, (64, 1024), 872.19, passes=4, cut=2),
    Copy("A2", "L1", N, N, (64, 1024), 397.8, passes=4, parts=4, cut=4),
    Copy("A2", "L1", 6144, 512, (256, 64), 240.198, SAME_PLACE, shared="same", cut=8),
    Copy("A2", "L1", 6144, 512, (256, 64), 209.8, SAME_PLACE, shared="staggered", cut=8),
    Copy("A5", "UB", N, N, (1, 64), 881.13, FITTED, cut=1024),
    Copy("A5", "UB", N, N, (64, 64), 205.99, cut=48),
    Copy("A5", "UB", N, N, (64, 1024), 185.66, cut=4),
    Copy("A5", "UB", N, N - 1, (64, 1024), 189.16, cut=4),
    Copy("A5", "UB", N, N, (64, 1024), 740.75, passes=4, cut=2),
    Copy("A5", "UB", N, N, (64, 1024), 354.19, passes=4, parts=4, cut=4),
    Copy("A5", "UB", 8192, 512, (128, 64), 339.38, shared="same", cut=8),
    Copy("A5", "UB", 8192, 512, (128, 64), 333.08, shared="staggered", cut=8),
    Copy("A5", "L1", N, N, (64, 64), 241.56, FITTED, cut=48),
    Copy("A5", "L1", N, N, (64, 256), 187.19, cut=16),
    Copy("A5", "L1", N, N - 1, (64, 256), 202.97, FITTED, cut=16),
    Copy("A5", "L1", N, N, (64, 1024), 732.11, passes=4, cut=2),
    Copy("A5", "L1", N, N, (64, 1024), 389.64, passes=4, parts=4, cut=4),
    Copy("A5", "L1", 8192, 512, (256, 64), 366.24, SAME_PLACE, shared="same", cut=8),
    Copy("A5", "L1", 8192, 512, (256, 64), 185.03, shared="staggered", cut=8),
    Add("A2", 1, 4096, "next", 6909.14, cut=64),
    Add("A2", 48, 4096, "none", 297.14, cut=8),
    Add("A2", 48, 16384, "none", 261.5, cut=4),
    Add("A2", 48, 16384, "double", 257.56, cut=4),
    Add("A5", 1, 4096, "next", 8924.0 - TASK, cut=64),
    Add("A5", 64, 4096, "none", 310.5 - TASK, cut=8),
    Add("A5", 64, 21760, "none", 251.7 - TASK, cut=4),
    Add("A5", 64, 21760, "double", 247.7 - TASK, cut=4),
    Matmul("A2", "M", 3082),
    Matmul("A2", "MTE1", 2538, FITTED),
    Matmul("A2", "MTE2", 3552),
    Matmul("A2", "FIX", 46.4, FITTED),
    Matmul("A2", "all", 3671),
]


def table():
    """A dict for each of MEASURED."""
    for case in MEASURED:
        modelled = case.modelled()
        yield {
            "chip": case.chip,
            "what": case.what,
            "measured_us": case.measured,
            "modelled_us": round(modelled, 1),
            "modelled_over_measured": round(modelled / case.measured, 3),
            "note": case.note,
        }


if __name__ == "__main__":
    rows = list(table())
    writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
