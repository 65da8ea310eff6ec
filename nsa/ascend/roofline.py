"""How far from the memory limit a launch would be, modelled from its tile plan and the hardware table.

Nothing here is measured. A kernel takes as long as the busiest pipe of its busiest core, or as all its bytes take
at the DDR rate if that is longer; a launch's kernels follow each other. Pipes overlap, as every kernel is
double-buffered. What a kernel loads for the first time comes at the DDR rate, what it loads again (rows that two
tiles or windows share) from L2. Not in the model: launches, scalar work, waits, row lengths.

    MTE2  memory to chip          MTE1  L1 to L0A and L0B      M     cube, 16 x 16 x 16 multiply-adds a cycle
    FIX   L0C to memory           V     vector unit            MTE3  vector core to memory

The limit: every input and output byte once, at the DDR rate.
"""

import io
from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from nsa import accelerator
from nsa.kernels import cube, tiles
from nsa.table import GROUP, RowGroup, RowRun, WindowRun, WindowTable

OPS = ("forward", "grad_input", "grad_weight")
FAMILIES = ("cube", "vector")
PIPES = ("MTE2", "MTE1", "M", "FIX", "V", "MTE3")
HALF = 2  # bytes of an fp16 or bf16
FLOAT = 4
# Bytes a cycle and core of an A2 chip, from the vendor's platform files; assumed the same for A3 and A5
L2_READ, FIX_WRITE, UB_WRITE, L1_TO_L0A, L1_TO_L0B = 110, 86, 64, 512, 256
LANES = 64  # fp32 elements that the vector unit takes a cycle
VECTORS_A_CORE = 2  # vector cores share a cube core's way to memory
CHECKS = 7  # vector operations an element of the search for what is not finite: cast, -, ==, select, three sums


class Shape(NamedTuple):
    """A training step's call: rows, heads, elements of a head, and the windows."""

    rows: int
    heads: int
    dim: int
    block: int
    stride: int

    def __str__(self):
        return f"T {self.rows // 1024}k N {self.heads} D {self.dim} block {self.block} stride {self.stride}"


USUAL = Shape(64 * 1024, 8, 128, 32, 16)
SHAPES = (
    *(USUAL._replace(rows=k * 1024) for k in (8, 16, 32, 64, 128)),
    *(USUAL._replace(heads=n) for n in (1, 2, 4, 16)),
    *(USUAL._replace(dim=d) for d in (64, 256)),
    *(USUAL._replace(block=b, stride=s) for b, s in ((16, 16), (64, 16), (64, 32), (128, 16))),
)


class Kernel(NamedTuple):
    """What one kernel does: bytes from and to memory, multiply-adds of the cube, cycles of each pipe's busiest core."""

    name: str
    bytes: float
    macs: float
    cycles: dict

    @classmethod
    def of(cls, name, moved, macs=0, **cycles):
        return cls(name, float(moved), float(macs), {pipe: float(c) for pipe, c in cycles.items()})

    def seconds(self, target):
        return max(self.bytes / target.ddr_read, max(self.cycles.values(), default=0) / target.clock)


def documents(rows):
    """Ends of packed documents of log-normal lengths, half of them longer than 1,000 rows; always the same."""
    lengths = np.random.default_rng(0).lognormal(np.log(1000), 1, rows).astype(int) + 1
    ends = np.cumsum(lengths)
    return (*ends[ends < rows].tolist(), rows)


def limit(shape, op):
    """Bytes that the op has to move: its inputs and outputs once; weights and their gradient count for nothing."""
    row = shape.heads * shape.dim * HALF
    x, y = shape.rows * row, _table(shape).n_windows * row
    # forward reads x, writes y; dInput reads dy, writes dx; dWeight reads x once more
    return {"forward": x + y, "grad_input": y + x, "grad_weight": x}[op]


def model(shape, target, family):
    """{op: its Kernels}, for one call of each of the three ops."""
    table = _table(shape)
    return {op: _MODELS[family][op](shape, target, table) for op in OPS}


def report(shape, target, family):
    """The model's numbers of a shape as plain data; times in seconds, `x_limit` as multiples of the limit."""
    kernels = model(shape, target, family)
    seconds = {op: sum(kernel.seconds(target) for kernel in kernels[op]) for op in OPS}
    limits = {op: limit(shape, op) / target.ddr_read for op in OPS}
    groups = {"forward": OPS[:1], "backward": OPS[1:], "both": OPS}
    everything = [kernel for op in OPS for kernel in kernels[op]]
    return {
        "target": target.name,
        **shape._asdict(),
        "family": family,
        "bytes": sum(kernel.bytes for kernel in everything),
        "multiply_adds": sum(kernel.macs for kernel in everything),
        "cycles": {pipe: sum(kernel.cycles.get(pipe, 0) for kernel in everything) for pipe in PIPES},
        "seconds": seconds,
        "x_limit": {
            name: sum(seconds[op] for op in ops) / sum(limits[op] for op in ops) for name, ops in groups.items()
        },
        "kernels": [kernel._asdict() | {"seconds": kernel.seconds(target)} for kernel in everything],
    }


def lines(reports):
    """The reports of one target as lines of text."""
    yield f"{reports[0]['target']}: modelled, not measured; forward and both gradients together; Mcycles of each pipe"
    yield f"{'':46}{'':8}{'MB':>7}{'GMAC':>7}" + "".join(f"{pipe:>7}" for pipe in PIPES) + "   times the memory limit"
    for r in reports:
        shape = Shape(*(r[field] for field in Shape._fields))
        cycles = "".join(f"{r['cycles'][pipe] / 1e6:7.3f}" for pipe in PIPES)
        x = ", ".join(f"{name} {value:.2f}" for name, value in r["x_limit"].items())
        yield f"{shape!s:46}{r['family']:8}{r['bytes'] / 1e6:7.0f}{r['multiply_adds'] / 1e9:7.2f}{cycles}   {x}"


def plot(reports):
    """A PNG, a panel a target: how many times the memory limit all three ops take together, for each shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(report["target"] for report in reports))
    labels = [str(shape) for shape in SHAPES]
    figure, panels = pyplot.subplots(2, -(-len(names) // 2), figsize=(16, 10), sharex=True, sharey=True, squeeze=False)
    for panel, name in zip(panels.flat, names):
        for family, marker in zip(FAMILIES, ("o", "x")):
            x = [r["x_limit"]["both"] for r in reports if (r["target"], r["family"]) == (name, family)]
            panel.plot(x, labels, marker, label=f"{family} family")
        panel.axvline(1, color="black", linewidth=1, label="memory limit")
        panel.set_title(name)
        panel.grid(axis="x", alpha=0.4)
    for panel in panels.flat[len(names) :]:
        panel.set_axis_off()
    panels[0, 0].invert_yaxis()
    panels[0, 0].set_xlim(left=0.9)
    panels[0, 0].legend(loc="upper right")
    figure.suptitle("nsa_compress, forward and both gradients, fp16 or bf16: MODELLED time, never measured on an NPU")
    figure.supxlabel("times the memory limit (every input and output byte once, at the DDR rate)")
    figure.tight_layout()
    png = io.BytesIO()
    figure.savefig(png, dpi=80)
    pyplot.close(figure)
    return png.getvalue()


@cache
def _table(shape):
    return WindowTable(documents(shape.rows), shape.block, shape.stride, torch.device("cpu"))


def _sizes(shape):
    return shape.block, shape.stride, shape.heads, shape.dim


def _covered_rows(shape, table):
    """Rows in at least one window."""
    return int(_window_runs(table, table.n_windows).n_rows.sum())  # one run a segment


def _window_runs(table, windows):
    return WindowRun(*table.window_runs(windows).numpy().T)


def _read_cycles(first, again, cores, target):
    """Cycles of MTE2 for bytes loaded by a core for the first time and again, when all `cores` load."""
    share = cores / target.cube_cores
    return first * target.clock * cores / target.ddr_read + again * share / L2_READ


def _busiest(columns, a_tile, an_item, target):
    """Cycles of each pipe on the busiest cube core: items go round the programs as the kernels' loops have it."""
    n_tiles = len(next(iter(a_tile.values())))
    n_splits, n_programs = cube.splits(columns, n_tiles, target.cube_cores)
    items = np.arange(columns * n_splits)
    busiest = {}
    for pipe in a_tile.keys() | an_item.keys():
        tile_cycles = np.broadcast_to(a_tile.get(pipe, 0.0), n_tiles)
        split = np.array([tile_cycles[s::n_splits].sum() for s in range(n_splits)])
        per_item = split[items % n_splits] + an_item.get(pipe, 0.0)
        busiest[pipe] = float(np.bincount(items % n_programs, per_item).max())
    return busiest, n_splits


def _banded_product(name, target, columns, row, sizes, loaded, distinct, stored):
    """A cube kernel that multiplies each column's matrix with what a tile loads.

    columns: how many; row: bytes of a row in one; sizes: heads, then rows, depth and columns of the product; loaded
    and stored: rows of each tile; distinct: how many different rows are loaded.
    """
    heads, m, k, n = sizes
    band = heads * m * k * HALF
    again = 1 - distinct / loaded.sum()
    a_tile = {
        "MTE2": _read_cycles(loaded * row * (1 - again), loaded * row * again, target.cube_cores, target),
        "MTE1": np.full(len(loaded), band / L1_TO_L0A + k * row / L1_TO_L0B),
        "M": np.full(len(loaded), _cube_cycles(*sizes)),
        "FIX": stored * row / FIX_WRITE,
    }
    an_item = {"MTE2": _read_cycles(band, 0, target.cube_cores, target)}
    cycles, _ = _busiest(columns, a_tile, an_item, target)
    moved = columns * (distinct * row + stored.sum() * row + band)
    return Kernel.of(name, moved, columns * len(loaded) * heads * m * k * n, **cycles)


def _cube_forward(shape, target, table):
    tile = accelerator.chip_of(target).forward_tile(*_sizes(shape))
    _, rows, _, windows = _window_runs(table, tile.windows)
    row = tile.heads * shape.dim * HALF
    sizes = tile.heads, tile.m, tile.k, shape.dim
    columns = shape.heads // tile.heads
    covered = _covered_rows(shape, table)
    kernel = _banded_product("forward_cube_kernel", target, columns, row, sizes, rows, covered, windows)
    checked = _check("forward_repair_kernel", shape, target, table.n_windows)
    return [_band_build(shape.heads * tile.m * tile.k), kernel, checked]


def _cube_grad_input(shape, target, table):
    tile = accelerator.chip_of(target).grad_input_tile(*_sizes(shape))
    runs = RowRun(*table.row_runs(tile.rows).numpy().T)
    row = tile.heads * tile.bd * HALF
    sizes = tile.heads, tile.r, tile.v, tile.bd
    columns = shape.heads // tile.heads * (shape.dim // tile.bd)
    slots = runs.end - runs.first
    kernel = _banded_product("grad_input_cube_kernel", target, columns, row, sizes, slots, table.n_windows, runs.n_rows)
    checked = _check("grad_input_repair_kernel", shape, target, slots.sum())
    return [_band_build(shape.heads * tile.r * tile.v), kernel, checked]


def _cube_grad_weight(shape, target, table):
    tile = accelerator.chip_of(target).grad_weight_tile(*_sizes(shape))
    _, rows, _, windows = _window_runs(table, tile.windows)
    row = tile.heads * shape.dim * HALF
    covered = _covered_rows(shape, table)
    again = 1 - covered / rows.sum()
    macs = tile.heads * tile.k * tile.m * shape.dim
    sums = tile.heads * tile.k * tile.m * FLOAT
    first = rows * row * (1 - again) + windows * row
    a_tile = {
        "MTE2": _read_cycles(first, rows * row * again, target.cube_cores, target),
        "MTE1": np.full(len(rows), tile.k * row / L1_TO_L0A + tile.m * row / L1_TO_L0B),
        "M": np.full(len(rows), _cube_cycles(tile.heads, tile.k, tile.m, shape.dim)),
    }
    columns = shape.heads // tile.heads
    cycles, n_splits = _busiest(columns, a_tile, {"FIX": sums / FIX_WRITE}, target)
    moved = columns * (covered * row + table.n_windows * row + n_splits * sums)
    kernel = Kernel.of("grad_weight_cube_kernel", moved, columns * len(rows) * macs, **cycles)
    along_band = n_splits * shape.heads * tile.windows * shape.block * FLOAT
    zeros = 2 * min(target.vector_cores, table.n_windows) * shape.block * shape.heads * FLOAT
    return [kernel, Kernel.of("sum along the band", along_band), Kernel.of("grad_weight_repair_kernel", zeros)]


def _cube_cycles(heads, *sizes):
    return heads * np.prod([-(-size // tiles.CUBE) for size in sizes])


def _band_build(elements):
    """Zeros, and the taps into them, by the framework."""
    return Kernel.of("band matrix", 2 * elements * HALF)


def _check(name, shape, target, rows):
    """A repair kernel that finds nothing: it reads rows, and ends."""
    elements = rows * shape.heads * shape.dim
    return Kernel.of(name, elements * HALF, **_vector_cycles(target, elements * HALF, 0, CHECKS * elements, 0, rows))


def _vector_cycles(target, first, again, operations, written, turns):
    """Cycles of the busiest vector core, of `turns` equal pieces of work."""
    cores = target.vector_cores
    share = -(-turns // cores) / turns
    return {
        "MTE2": _read_cycles(first * share, again * share, cores, target),
        "V": operations * share / LANES,
        "MTE3": written * share / UB_WRITE,
    }


def _vector_forward(shape, target, table):
    row = shape.heads * shape.dim
    first, loaded = _covered_rows(shape, table), table.n_windows * shape.block
    written = table.n_windows * row * HALF
    operations = 3 * loaded * row  # cast, multiply, add
    cycles = _vector_cycles(
        target, first * row * HALF, (loaded - first) * row * HALF, operations, written, table.n_windows
    )
    return [Kernel.of("forward_vector_kernel", first * row * HALF + written, **cycles)]


def _vector_grad_input(shape, target, table):
    row = shape.heads * shape.dim
    groups = RowGroup(*table.groups.numpy().T)
    loaded, written = int((groups.end - groups.first).sum()), shape.rows * row * HALF
    operations = (loaded * (1 + 2 * GROUP) + shape.rows) * row  # cast dy, multiply and add to 16 rows, cast the result
    read = table.n_windows * row * HALF
    cycles = _vector_cycles(target, read, loaded * row * HALF - read, operations, written, len(groups.row))
    return [Kernel.of("grad_input_vector_kernel", read + written, **cycles)]


def _vector_grad_weight(shape, target, table):
    row = shape.heads * shape.dim
    first, loaded = _covered_rows(shape, table), table.n_windows * shape.block
    read = (first + table.n_windows) * row * HALF
    operations = (3 * loaded + table.n_windows) * row  # cast, multiply, add; cast dy
    cycles = _vector_cycles(target, read, (loaded - first) * row * HALF, operations, 0, table.n_windows)
    sums = 2 * min(target.vector_cores, table.n_windows) * shape.block * shape.heads * FLOAT
    return [Kernel.of("grad_weight_vector_kernel", read, **cycles), Kernel.of("sum of partial sums", sums)]


_MODELS = {
    "cube": dict(zip(OPS, (_cube_forward, _cube_grad_input, _cube_grad_weight))),
    "vector": dict(zip(OPS, (_vector_forward, _vector_grad_input, _vector_grad_weight))),
}
