"""The bytes and cycles of every kernel of a call, from the tables and tile sizes that a launch would use.

Each core has pipes that work at the same time:

    MTE2  memory to chip          MTE1  L1 to L0A and L0B      M     cube
    FIX   L0C to memory           V     vector unit            MTE3  vector core to memory

A kernel takes as long as the busiest pipe of its busiest core, or as long as all its bytes take at the DDR rate if
that is longer; both bounds can hold at once because every kernel is double-buffered. The kernels of a call follow
each other. The first load of a byte comes from DDR, whose rate the loading cores share. A byte that is loaded
again, because two runs or windows need it, comes from L2.

The model has no time for launching a kernel, for the scalar unit, for waits between pipes or for short rows, and
no bytes for tables, weights and dWeight, all of which are small.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from nsa import accelerator
from nsa.ascend.rates import FIX_WRITE, L1_TO_L0A, L1_TO_L0B, L2_READ, LANES, UB_WRITE
from nsa.kernels import cube, tiles
from nsa.table import GROUP, RowGroup, RowRun, WindowRun, WindowTable

OPS = ("forward", "grad_input", "grad_weight")
FAMILIES = ("cube", "vector")
PIPES = ("MTE2", "MTE1", "M", "FIX", "V", "MTE3")
HALF = 2  # bytes of an fp16 or bf16
FLOAT = 4  # bytes of an fp32
CHECKS = 7  # vector operations to count what is not finite, for each element: cast, -, ==, select, a sum an axis


class Workload(NamedTuple):
    """The sizes of a training step's call; `rows` in packed documents, block and stride in rows."""

    rows: int
    heads: int
    dim: int
    block: int
    stride: int

    def __str__(self):
        return f"T {self.rows // 1024}k N {self.heads} D {self.dim} block {self.block} stride {self.stride}"


USUAL = Workload(64 * 1024, 8, 128, 32, 16)
WORKLOADS = (
    *(USUAL._replace(rows=k * 1024) for k in (8, 16, 32, 64, 128)),
    *(USUAL._replace(heads=n) for n in (1, 2, 4, 16)),
    *(USUAL._replace(dim=d) for d in (64, 256)),
    *(USUAL._replace(block=b, stride=s) for b, s in ((16, 16), (64, 16), (64, 32), (128, 16))),
)


class Kernel(NamedTuple):
    """One kernel of a call, or one step of the framework."""

    name: str
    bytes: float  # that all cores together move from and to DDR
    macs: float  # multiply-adds of the cube, of all cores together; zeros of the band count
    cycles: dict  # {pipe: cycles on the core that has most work for it}

    @classmethod
    def of(cls, name, moved, macs=0, cycles=()):
        return cls(name, float(moved), float(macs), {pipe: float(c) for pipe, c in dict(cycles).items()})

    def seconds(self, target):
        return max(self.bytes / target.ddr_read, max(self.cycles.values(), default=0) / target.clock)


def documents(rows):
    """Ends of packed documents of log-normal lengths, half of them longer than 1,000 rows; always the same."""
    lengths = np.random.default_rng(0).lognormal(np.log(1000), 1, rows).astype(int) + 1
    ends = np.cumsum(lengths)
    return (*ends[ends < rows].tolist(), rows)


def limit(work, op):
    """Bytes that the op has to move: its large inputs and outputs, each once."""
    row = work.heads * work.dim * HALF
    x, y = work.rows * row, _table(work).n_windows * row
    # the forward reads x and writes y, dInput reads dy and writes dx; dWeight, which is asked for together with
    # dInput, reads x once more, and its dy is free
    return {"forward": x + y, "grad_input": y + x, "grad_weight": x}[op]


def model(work, target, family):
    """{op: list of its `Kernel`s in the order in which they run}, for one call of each of the three ops."""
    table = _table(work)
    return {op: _MODELS[family][op](work, target, table) for op in OPS}


@cache
def _table(work):
    return WindowTable(documents(work.rows), work.block, work.stride, torch.device("cpu"))


def _covered_rows(table):
    """How many rows lie in at least one window."""
    return int(_window_runs(table, table.n_windows).n_rows.sum())  # one run a segment


def _window_runs(table, windows):
    return WindowRun(*table.window_runs(windows).numpy().T)


def _busiest(costs, n_programs):
    """The sum of the program with most to do, where program p takes items p, p + n_programs and so on.

    For costs (5, 4, 3) and two programs this is 8: the first program has the items of 5 and 3.
    """
    return float(np.bincount(np.arange(len(costs)) % n_programs, costs).max())


def _load_cycles(first, again, n_programs, n_cores, target):
    """Cycles of MTE2 for the bytes that one program loads, some for the first time and some again.

    n_programs of the n_cores cores of their kind are loading. They share the DDR rate, and the cores beside a cube
    core share its way to L2; nothing comes from DDR faster than from L2.
    """
    l2 = L2_READ * target.cube_cores / n_cores
    ddr = min(target.ddr_read / target.clock / n_programs, l2)
    return first / ddr + again / l2


def _cube_cycles(n_columns, n_splits, n_programs, a_run, an_item):
    """{pipe: cycles of its busiest program}, for items that are a column (some heads) and every n_splits-th run.

    a_run: {pipe: cycles of each run, an array}; an_item: {pipe: cycles beside the runs', once an item}.
    """
    items = np.arange(n_columns * n_splits)
    cycles = {}
    for pipe in sorted(a_run.keys() | an_item.keys()):
        of_runs = a_run.get(pipe, np.zeros(n_splits))
        of_splits = np.array([of_runs[s::n_splits].sum() for s in range(n_splits)])
        cycles[pipe] = _busiest(of_splits[items % n_splits] + an_item.get(pipe, 0), n_programs)
    return cycles


def _cube_macs(heads, m, k, n):
    """Multiply-adds of `heads` products of an m by k and a k by n matrix, and the cube's cycles for them."""
    return heads * m * k * n, heads * np.prod([-(-size // tiles.CUBE) for size in (m, k, n)])


def _banded_product(name, target, n_columns, row, sizes, loaded, distinct, stored):
    """The `Kernel` that multiplies each column's banded matrix with the rows that a run loads.

    row: bytes of a row in one column; sizes: heads, and (m, k) of the matrix and (k, n) of the rows; loaded and
    stored: rows of each run, arrays; distinct: how many different rows are loaded.
    """
    heads, m, k, _ = sizes
    band = heads * m * k * HALF  # bytes
    macs, cube_cycles = _cube_macs(*sizes)
    n_runs = len(loaded)
    n_splits, n_programs = cube.splits(n_columns, n_runs, target.cube_cores)
    programs = n_programs, target.cube_cores, target
    first = loaded * row * distinct / loaded.sum()
    a_run = {
        "MTE2": _load_cycles(first, loaded * row - first, *programs),
        "MTE1": np.full(n_runs, band / L1_TO_L0A + k * row / L1_TO_L0B),
        "M": np.full(n_runs, cube_cycles),
        "FIX": stored * row / FIX_WRITE,
    }
    an_item = {"MTE2": _load_cycles(band / n_splits, band - band / n_splits, *programs)}
    cycles = _cube_cycles(n_columns, n_splits, n_programs, a_run, an_item)
    moved = n_columns * (distinct * row + stored.sum() * row + band)
    return Kernel.of(name, moved, n_columns * n_runs * macs, cycles)


def _band_matrix(elements):
    """The framework's part before a banded product: it writes zeros, and then at most as many taps."""
    return Kernel.of("band matrix", 2 * elements * HALF)


def _cube_forward(work, target, table):
    tile = accelerator.chip_of(target).forward_tile(*_sizes(work))
    runs = _window_runs(table, tile.windows)
    row = tile.heads * work.dim * HALF
    sizes = tile.heads, tile.m, tile.k, work.dim
    n_columns = work.heads // tile.heads
    product = _banded_product(
        "forward_cube_kernel", target, n_columns, row, sizes, runs.n_rows, _covered_rows(table), runs.n_windows
    )
    # the repair reads all of y, some windows a turn: as many as a window has rows
    turns = -(-table.n_windows // work.block)
    looked_at = np.minimum(table.n_windows - work.block * np.arange(turns), work.block)
    check = _check("forward_repair_kernel", work, target, looked_at, work.block, table.n_windows)
    return [_band_matrix(work.heads * tile.m * tile.k), product, check]


def _cube_grad_input(work, target, table):
    tile = accelerator.chip_of(target).grad_input_tile(*_sizes(work))
    runs = RowRun(*table.row_runs(tile.rows).numpy().T)
    slots = runs.end - runs.first
    row = tile.heads * tile.bd * HALF
    sizes = tile.heads, tile.r, tile.v, tile.bd
    n_columns = work.heads // tile.heads * (work.dim // tile.bd)
    product = _banded_product(
        "grad_input_cube_kernel", target, n_columns, row, sizes, slots, table.n_windows, runs.n_rows
    )
    # the repair reads the dy of every run, GROUP slots at a time
    check = _check("grad_input_repair_kernel", work, target, slots, GROUP, table.n_windows)
    # cut out of the band of all slots, which is made first
    band_of_slots = tile.slots * ((tile.slots - 1) * work.stride + work.block)
    return [_band_matrix(work.heads * (band_of_slots + tile.r * tile.v)), product, check]


def _cube_grad_weight(work, target, table):
    tile = accelerator.chip_of(target).grad_weight_tile(*_sizes(work))
    _, rows, _, windows = _window_runs(table, tile.windows)
    row = tile.heads * work.dim * HALF
    covered, n_runs, n_columns = _covered_rows(table), len(rows), work.heads // tile.heads
    macs, cube_cycles = _cube_macs(tile.heads, tile.k, tile.m, work.dim)
    sums = tile.heads * tile.k * tile.m * FLOAT  # bytes, of an item
    n_splits, n_programs = cube.splits(n_columns, n_runs, target.cube_cores)
    first = rows * row * covered / rows.sum()
    a_run = {
        "MTE2": _load_cycles(first + windows * row, rows * row - first, n_programs, target.cube_cores, target),
        "MTE1": np.full(n_runs, tile.k * row / L1_TO_L0A + tile.m * row / L1_TO_L0B),
        "M": np.full(n_runs, cube_cycles),
    }
    cycles = _cube_cycles(n_columns, n_splits, n_programs, a_run, {"FIX": sums / FIX_WRITE})
    moved = n_columns * (covered * row + table.n_windows * row + n_splits * sums)
    product = Kernel.of("grad_weight_cube_kernel", moved, n_columns * n_runs * macs, cycles)
    along_band = n_splits * work.heads * tile.windows * work.block * FLOAT
    return [
        product,
        Kernel.of("sum along the band", along_band),
        Kernel.of("grad_weight_repair_kernel", work.block * work.heads * HALF),  # it reads dw and ends
    ]


def _sizes(work):
    return work.block, work.stride, work.heads, work.dim


def _check(name, work, target, looked_at, at_a_time, distinct):
    """A repair `Kernel` that finds nothing to repair: it reads rows and ends.

    looked_at: rows of each turn, an array; at_a_time: how many rows a block has, of which those past the end are
    masked but cost the vector unit as much; distinct: how many different rows there are.
    """
    row = work.heads * work.dim
    operations = CHECKS * row * at_a_time * -(-looked_at // at_a_time)
    return _vector_kernel(name, target, looked_at * row * HALF, distinct * row * HALF, operations, 0 * looked_at)


def _vector_kernel(name, target, loaded, distinct, operations, written):
    """A `Kernel` whose programs take turns at windows or rows, on the vector cores.

    loaded, operations, written: bytes, operations on one element, and bytes of each turn, arrays; distinct: bytes
    that are loaded at least once.
    """
    n_programs = min(target.vector_cores, len(loaded))
    first = loaded * distinct / loaded.sum()
    cycles = {
        "MTE2": _busiest(_load_cycles(first, loaded - first, n_programs, target.vector_cores, target), n_programs),
        "V": _busiest(operations / LANES, n_programs),
        "MTE3": _busiest(written / UB_WRITE, n_programs),
    }
    return Kernel.of(name, distinct + written.sum(), 0, cycles)


def _vector_forward(work, target, table):
    row = work.heads * work.dim
    loaded = np.full(table.n_windows, work.block * row)  # elements of x
    operations = 3 * loaded  # cast, multiply, add
    written = np.full(table.n_windows, row * HALF)
    distinct = _covered_rows(table) * row * HALF
    return [_vector_kernel("forward_vector_kernel", target, loaded * HALF, distinct, operations, written)]


def _vector_grad_input(work, target, table):
    row = work.heads * work.dim
    groups = RowGroup(*table.groups.numpy().T)
    loaded = (groups.end - groups.first) * row  # elements of dy
    operations = loaded * (1 + 2 * GROUP) + GROUP * row  # cast dy, multiply and add to each row; cast the rows
    distinct = table.n_windows * row * HALF
    written = groups.n_rows * row * HALF
    return [_vector_kernel("grad_input_vector_kernel", target, loaded * HALF, distinct, operations, written)]


def _vector_grad_weight(work, target, table):
    row = work.heads * work.dim
    loaded = np.full(table.n_windows, (work.block + 1) * row)  # elements of x and dy
    operations = np.full(table.n_windows, (3 * work.block + 1) * row)  # cast, multiply, add; cast dy
    distinct = (_covered_rows(table) + table.n_windows) * row * HALF
    kernel = _vector_kernel("grad_weight_vector_kernel", target, loaded * HALF, distinct, operations, 0 * loaded)
    # the fp32 sums (block, N) of each program, written and read once more
    sums = 2 * min(target.vector_cores, table.n_windows) * work.block * work.heads * FLOAT
    return [kernel, Kernel.of("sum of partial sums", sums)]


_MODELS = {
    "cube": dict(zip(OPS, (_cube_forward, _cube_grad_input, _cube_grad_weight))),
    "vector": dict(zip(OPS, (_vector_forward, _vector_grad_input, _vector_grad_weight))),
}
