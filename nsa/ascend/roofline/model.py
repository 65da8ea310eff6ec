"""The bytes and cycles of every task of a call, from the tables and tile sizes that a launch would use.

Each core has pipes that work at the same time:

    MTE2  memory to chip          MTE1  L1 to L0A and L0B      M     cube
    FIX   L0C to memory           V     vector unit            MTE3  vector core to memory

A kernel takes as long as the busiest pipe of its busiest core, or as long as all its bytes take at the DDR rate if
that is longer. Tasks follow each other: kernels, and operators of the framework. Beside its kernel, a task takes
`rates.task_overhead`, which a call's time is given with and without.

The first load of a byte comes from DDR, whose rate the loading cores share in equal parts, to the end: what a core
leaves that is done, no other takes. So where loads are unequal, the simulator may be faster. A byte that is loaded
again, because two runs or windows need it, comes from L2, as do bands of the weights and dWeight's sums, which were
written just before.

The constants are the simulator's. What it knows beyond them is not modelled here: what an instruction takes beside its
bytes, the scalar unit, waits between pipes and between cores, short rows, and all that is small: tables, weights and
dWeight. `simulator.calls` has the times of the compiled kernels.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from nsa import accelerator
from nsa.ascend import rates
from nsa.kernels import cube, fused, tiles
from nsa.table import GROUP, RowGroup, RowRun, WindowRun, WindowTable

OPS = ("forward", "grad_input", "grad_weight")
FAMILIES = ("cube", "vector")
PIPES = ("MTE2", "MTE1", "M", "FIX", "V", "MTE3")
HALF = 2  # bytes of an fp16 or bf16
FLOAT = 4  # bytes of an fp32
REPEAT = 64  # fp32 elements of a repeat, of which `rates.VECTOR` has the cycles
CHECK = ("vconv", "vsub", "vcmp", "vsel", "vcadd")  # what counts elements that are not finite


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
    """One task of a call: a kernel, or an operator of the framework."""

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
    """{op: list of its tasks, `Kernel`s, in the order in which they run}, for one call of each of the three ops."""
    table = _table(work)
    return {op: _MODELS[family][op](work, target, table) for op in OPS}


@cache
def _table(work):
    return WindowTable(documents(work.rows), work.block, work.stride, torch.device("cpu"))


def _window_runs(table, windows):
    return WindowRun(*table.window_runs(windows).numpy().T)


def _new(first, end):
    """How many of the items from first to end - 1, arrays, each range has that no range with a lower first has."""
    order = np.argsort(first, kind="stable")
    before = np.maximum.accumulate(np.append(0, end[order]))[:-1]
    new = np.empty_like(first)
    new[order] = np.maximum(end[order] - np.maximum(first[order], before), 0)
    return new


def _busiest(costs, n_programs):
    """The sum of the program with most to do, where program p takes items p, p + n_programs and so on.

    For costs (5, 4, 3) and two programs this is 8: the first program has the items of 5 and 3.
    """
    return float(np.bincount(np.arange(len(costs)) % n_programs, costs).max())


def _load_cycles(core, first, again, n_programs, target):
    """Cycles of MTE2 for the bytes that one program loads, some for the first time and some again.

    n_programs cores are loading, which share the rates of DDR and L2 up to what one core can draw.
    """
    memory, l2 = {
        "cube": (rates.CUBE_FROM_MEMORY, rates.CUBE_FROM_L2),
        "vector": (rates.VECTOR_FROM_MEMORY, rates.VECTOR_FROM_L2),
    }[core]
    memory = min(memory, target.ddr_read / n_programs) / target.clock
    return first / memory + again / min(l2, rates.l2_total(target) / target.clock / n_programs)


def _cube_kernel(name, target, n_columns, split_of, runs, products, items, moved):
    """A `Kernel` whose items are a column and a split of the runs, and whose programs take turns at them.

    split_of: the split of each run. runs: (loaded first, loaded again, stored) bytes of each run. products: (m, k, n)
    of those that each run needs. items: bytes that each item loads, from L2, and stores beside its runs, numbers or an
    array by split. moved: bytes from and to DDR.
    """
    n_splits = split_of.max() + 1
    n_programs = min(target.cube_cores, n_columns * n_splits)
    generation = rates.GENERATIONS[target.generation]
    first, again, stored = runs
    mte1 = sum(HALF * (m * k / rates.L1_TO_L0A + k * n / generation.l1_to_l0b) for m, k, n in products)
    units = sum(int(np.prod([-(-size // tiles.CUBE) for size in product])) for product in products)
    of_runs = {
        "MTE2": _load_cycles("cube", first, again, n_programs, target),
        "MTE1": np.full(len(first), mte1),
        "M": np.full(len(first), units),
        "FIX": stored / generation.fix,
    }
    loaded, stored_once = items
    beside = {"MTE2": _load_cycles("cube", 0, loaded, n_programs, target), "FIX": stored_once / generation.fix}
    cycles = {}
    for pipe, of_run in of_runs.items():
        of_splits = np.bincount(split_of, of_run, n_splits) + beside.get(pipe, 0)
        cycles[pipe] = _busiest(np.tile(of_splits, n_columns), n_programs)
    macs = n_columns * len(first) * sum(m * k * n for m, k, n in products)
    return Kernel.of(name, moved, macs, cycles)


def _splits_in_a_row(n_columns, n_runs, target):
    """The split of each run, where splits are runs that follow each other: `kernels.lines.first_of_split`."""
    n_splits, _ = cube.splits(n_columns, n_runs, target.cube_cores)
    bounds = np.arange(n_splits + 1) * n_runs // n_splits
    return np.repeat(np.arange(n_splits), np.diff(bounds))


def _band_operators(heads, windows, m, k, block):
    """What the framework does before a kernel that finds its band in memory: zeros, and the taps of all windows."""
    return [
        Kernel.of("zeros", heads * m * k * HALF),
        Kernel.of("copy of the weights", heads * windows * block * HALF),
    ]


def _cube_forward(work, target, table):
    chip = accelerator.chip_of(target)
    tile = chip.forward_tile(*_sizes(work))
    runs = _window_runs(table, tile.windows)
    heads, m, k, d = tile.heads, tile.m, tile.k, tile.bd
    n_columns = work.heads // heads * (work.dim // d)
    split_of = _splits_in_a_row(n_columns, len(runs.row), target)
    row = heads * d * HALF
    # a fused kernel loads whatever rows follow the run's
    end = np.minimum(runs.row + k, work.rows) if chip.fused else runs.row + runs.n_rows
    new = _new(runs.row, end)
    of_runs = new * row, (end - runs.row - new) * row, runs.n_windows * row
    band, products = heads * m * k * HALF, [(m, k, d)] * heads
    moved = n_columns * (new.sum() + table.n_windows) * row
    if chip.fused:
        items = band, heads * d * FLOAT
        moved += n_columns * (split_of[-1] + 1) * fused.band_size(tile.windows, m, tile, work.stride) * HALF
        products.append((m, k, heads * d))  # which shows what is not finite
        return [_cube_kernel("forward_fused_kernel", target, n_columns, split_of, of_runs, products, items, moved)]
    product = _cube_kernel(
        "forward_cube_kernel", target, n_columns, split_of, of_runs, products, (band, 0), moved + n_columns * band
    )
    # the repair reads all of y, some windows a turn: as many as a window has rows
    looked_at = np.minimum(table.n_windows - np.arange(0, table.n_windows, work.block), work.block)
    check = _check("forward_repair_kernel", work, target, looked_at, looked_at, work.block)
    return [*_band_operators(work.heads, tile.windows, m, k, work.block), product, check]


def _cube_grad_input(work, target, table):
    chip = accelerator.chip_of(target)
    tile = chip.grad_input_tile(*_sizes(work))
    runs = RowRun(*table.row_runs(tile.rows).numpy().T)
    heads, r, v, bd = tile.heads, tile.r, tile.v, tile.bd
    n_columns = work.heads // heads * (work.dim // bd)
    n_splits, _ = cube.splits(n_columns, len(runs.row), target.cube_cores)
    split_of = np.arange(len(runs.row)) % n_splits
    row = heads * bd * HALF
    slots, new = runs.end - runs.first, _new(runs.window + runs.first, runs.window + runs.end)
    of_runs = new * row, (slots - new) * row, runs.n_rows * row
    products = [(r, v, bd)] * heads
    moved = n_columns * (new.sum() + work.rows) * row
    if chip.fused:
        items = heads * v * tile.k * HALF, heads * bd * FLOAT
        moved += n_columns * n_splits * fused.band_size(tile.slots, v, tile, work.stride) * HALF
        products.append((tiles.CUBE, v, heads * bd))  # which shows what is not finite
        return [_cube_kernel("grad_input_fused_kernel", target, n_columns, split_of, of_runs, products, items, moved)]
    band = heads * v * r * HALF  # of the columns that are a run's rows
    product = _cube_kernel(
        "grad_input_cube_kernel", target, n_columns, split_of, of_runs, products, (band, 0), moved + n_columns * band
    )
    # the repair reads the dy of every run, GROUP slots at a time
    check = _check("grad_input_repair_kernel", work, target, slots, new, GROUP)
    return [*_band_operators(work.heads, tile.slots, v, tile.k, work.block), product, check]


def _cube_grad_weight(work, target, table):
    tile = accelerator.chip_of(target).grad_weight_tile(*_sizes(work))
    runs = _window_runs(table, tile.windows)
    heads, m, k = tile.heads, tile.m, tile.k
    n_columns = work.heads // heads
    split_of = _splits_in_a_row(n_columns, len(runs.row), target)
    n_splits = split_of[-1] + 1
    longest = np.searchsorted(split_of, np.arange(n_splits))  # the first run of each split
    row = heads * work.dim * HALF
    # of two heads, whatever rows follow the run's are loaded
    end = runs.row + runs.n_rows if heads == 1 else np.minimum(runs.row + k, work.rows)
    new = _new(runs.row, end)
    of_runs = (new + runs.n_windows) * row, (end - runs.row - new) * row, np.zeros(len(new))
    sums = heads * m * runs.n_rows[longest] * FLOAT
    moved = n_columns * ((new.sum() + table.n_windows) * row + sums.sum())
    products = [(m, work.dim, k)] * heads
    name = "grad_weight_cube_kernel"
    product = _cube_kernel(name, target, n_columns, split_of, of_runs, products, (0, sums), moved)
    # the sums along the band, of some taps of some heads in each turn
    bj, columns = tiles.sums_block(GROUP, work.heads, work.dim, HALF)
    turns = np.ones(work.heads // columns["BN"] * (work.block // bj))
    taps = columns["BN"] * bj
    loaded = turns * taps * runs.n_windows[longest].sum() * FLOAT
    elements = {"vadd": turns * taps * n_splits * tiles.padded(tile.windows)}
    return [product, _vector_kernel("grad_weight_repair_kernel", target, 0 * turns, loaded, elements, 0 * turns)]


def _sizes(work):
    return work.block, work.stride, work.heads, work.dim


def _check(name, work, target, looked_at, new, at_a_time):
    """A repair `Kernel` that finds nothing to repair: it reads rows and ends.

    looked_at: rows of each turn, an array, of which new are loaded for the first time; at_a_time: how many rows a
    block has, of which those past the end are masked but cost the vector unit as much.
    """
    row = work.heads * work.dim
    elements = row * at_a_time * -(-looked_at // at_a_time)
    again = (looked_at - new) * row * HALF
    return _vector_kernel(name, target, new * row * HALF, again, dict.fromkeys(CHECK, elements), 0 * looked_at)


def _vector_kernel(name, target, first, again, elements, written):
    """A `Kernel` whose programs take turns at windows or rows, on the vector cores.

    first, again, written: bytes of each turn, arrays; elements: {vector instruction: how many of each turn, an array}.
    """
    n_programs = min(target.vector_cores, len(first))
    repeats = {what: rates.VECTOR.get(what, rates.OTHER_VECTOR)[0] / REPEAT for what in elements}
    cycles = {
        "MTE2": _busiest(_load_cycles("vector", first, again, n_programs, target), n_programs),
        "V": _busiest(sum(elements[what] * repeats[what] for what in elements), n_programs),
        "MTE3": _busiest(written / rates.VECTOR_WRITE, n_programs),
    }
    return Kernel.of(name, first.sum() + written.sum(), 0, cycles)


def _windows_rows(table):
    """Rows of each window that no window before it has."""
    starts = table.starts.numpy()
    return _new(starts, starts + table.block)


def _vector_forward(work, target, table):
    row = work.heads * work.dim
    new, loaded = _windows_rows(table) * row, np.full(table.n_windows, work.block * row)  # elements of x
    elements = dict.fromkeys(("vconv", "vmul", "vadd"), loaded)
    written = np.full(table.n_windows, row * HALF)
    return [_vector_kernel("forward_vector_kernel", target, new * HALF, (loaded - new) * HALF, elements, written)]


def _vector_grad_input(work, target, table):
    row = work.heads * work.dim
    groups = RowGroup(*table.groups.numpy().T)
    loaded, new = (groups.end - groups.first) * row, _new(groups.first, groups.end) * row  # elements of dy
    products = loaded * GROUP
    elements = {"vconv": loaded + GROUP * row, "vmul": products, "vadd": products}  # dy is cast, and then the rows
    written = groups.n_rows * row * HALF
    return [_vector_kernel("grad_input_vector_kernel", target, new * HALF, (loaded - new) * HALF, elements, written)]


def _vector_grad_weight(work, target, table):
    row = work.heads * work.dim
    x = np.full(table.n_windows, work.block * row)  # elements
    new = (_windows_rows(table) + 1) * row  # of x and dy
    elements = {"vconv": x + row, "vmul": x, "vadd": x}
    name = "grad_weight_vector_kernel"
    kernel = _vector_kernel(name, target, new * HALF, (x + row - new) * HALF, elements, 0 * x)
    # fp32 (block, N) of each program, which the framework sums and casts
    sums = min(target.vector_cores, table.n_windows) * work.block * work.heads * FLOAT
    return [kernel._replace(bytes=kernel.bytes + sums), Kernel.of("sum", sums), Kernel.of("cast", 0)]


_MODELS = {
    "cube": dict(zip(OPS, (_cube_forward, _cube_grad_input, _cube_grad_weight))),
    "vector": dict(zip(OPS, (_vector_forward, _vector_grad_input, _vector_grad_weight))),
}
