"""Sizes of blocks and tiles: one default for every case, no search.

Blocks of the vector family depend on Triton alone. A tile is what a cube kernel computes at a time, one run of a table
for some heads; its sizes are a plan's, `Chip` for Ascend and `Gpu` for a GPU. Sizes are in elements unless they say
bytes. The cube family's inputs have 2 bytes an element, its sums 4.
"""

from typing import NamedTuple

import triton
from triton.backends import backends

from nsa.contract import GRANULE

ANY_SIZE = "ascend" in backends  # triton-ascend takes blocks of any size, other Tritons powers of two
BLOCK_ELEMENTS = 8192  # of a vector block: with its fp32 product and a second buffer, inside 192 KiB
# A GPU: from what is compiled (docs/gpu.md), never measured
GPU_BLOCK = 16384  # bytes of the forward's vector block: of twice as many, registers spill in some shapes
GPU_LOAD = 16  # bytes that a thread loads at once, at most
GPU_SUMS = 64  # that a thread keeps in registers: of twice as many, only two programs fit on a multiprocessor
WARP = 32  # threads
WARPS = 4  # of a program, Triton's default; a multiprocessor has four schedulers
CUBE = 16  # the cube unit multiplies 16 x 16 with 16 x 16 at a time
BURST = 512  # bytes of a row from which on loads are efficient, as the vendor advises
WINDOWS = (*range(64, CUBE, -CUBE // 2), *range(CUBE, 0, -1))  # of a tile; at the first, overlap is small
MOST_HEADS = 2  # whose sums dWeight's kernel keeps
BAND = 88 * 1024  # elements of a band that a fused kernel may hold in UB, of 192 KiB, beside what it repairs
LEAST_ROWS = 128  # of a dInput tile: D is cut where a tile of so many rows would be too large for L0C


class WindowTile(NamedTuple):
    """The block of a run of windows: X of `heads` heads is loaded at once, [k, heads * bd]."""

    windows: int  # at most, of a run
    m: int  # windows, padded to the cube's rows
    k: int  # rows, padded to a multiple of kc
    kc: int  # rows multiplied at a time
    heads: int
    bd: int  # elements of a head, a divisor of D


class RowTile(NamedTuple):
    """The block of a run of rows: dY of `heads` heads is loaded at once, [v, heads * bd]."""

    rows: int  # at most, of a run: a multiple of the stride
    r: int  # rows, padded
    slots: int  # for all windows that can hold one of the rows
    v: int  # slots, padded to the cube's rows
    k: int  # rows that the windows of all slots hold
    first: int  # which of them is the first of the run
    heads: int
    bd: int  # elements of a head, a divisor of D
    options: tuple = ()  # (name, value) of the compiler's options that are not its defaults


class Chip(NamedTuple):
    """The plan for Ascend: the largest tiles that fit on the chip. What a loop loads takes its space twice, because the
    compiler keeps two buffers of it, so that loading overlaps with computing."""

    l1: int  # bytes
    l0c: int  # bytes
    fused: bool  # whether a program has a cube core and vector cores; then one load serves several heads (A2, A3)
    sums: int  # buffers in L0C that the compiler keeps of a sum carried through a loop

    def forward_tile(self, block, stride, n, d):
        """The `WindowTile` of the forward kernel; ValueError if none fits. In a fused kernel, `poison` has as many rows
        as the band, which has to be no more than the cube's."""
        for heads, windows in self._choices(n, BURST // (2 * d)):
            tile = _window_tile(windows, block, stride, heads, d)
            x = heads * tile.k * d
            band = heads * tile.m * tile.k
            y = heads * tile.m * d
            poison = CUBE * heads * d if self.fused else 0
            if self.fused and (windows > CUBE or _band_in_ub(windows, tile.m, tile, stride) > BAND):
                continue
            if 2 * 2 * (x + band) <= self.l1 and 4 * (2 * y + poison) <= self.l0c:
                return tile
        raise self._none_fits(block, stride, d)

    def grad_input_tile(self, block, stride, n, d):
        """The `RowTile` of the dInput kernel; ValueError if none fits. Its sums [r, bd] take half of L0C or, in a fused
        kernel, all that `poison` leaves: while one head's are stored, the next one's are made."""
        poison = CUBE * BURST // 2 if self.fused else 0
        sums = self.l0c // 4 - poison if self.fused else self.l0c // 2 // 4
        bd = part_of_d(d, self.l0c // 2 // 4 // LEAST_ROWS)
        most_heads = min(BURST // (2 * d), sums // (stride * bd)) if bd == d and self.fused else 1
        heads = largest_divisor(n, max(most_heads, 1))
        for strides in WINDOWS:
            tile = _row_tile(strides, block, stride, heads, bd)
            band = heads * tile.v * tile.k
            dy = heads * tile.v * bd
            dx = heads * tile.r * bd
            if self.fused and _band_in_ub(tile.slots, tile.v, tile, stride) > BAND:
                continue
            if 2 * 2 * (band + dy) <= self.l1 and dx <= sums:
                return tile
        raise self._none_fits(block, stride, d)

    def grad_weight_tile(self, block, stride, n, d):
        """The `WindowTile` of the dWeight kernel, which has two heads at most and keeps their sums [k, m] in L0C;
        ValueError if none fits."""
        for heads, windows in self._choices(n, min(BURST // (2 * d), MOST_HEADS)):
            tile = _window_tile(windows, block, stride, heads, d)
            x = heads * tile.k * d
            dy = heads * tile.m * d
            p = heads * tile.k * tile.m
            if 2 * 2 * (x + dy) <= self.l1 and self.sums * 4 * p <= self.l0c:
                return tile
        raise self._none_fits(block, stride, d)

    def _choices(self, n, most_heads):
        """(heads, windows), the best first: long rows, as long as a tile fills the cube's, then little overlap."""
        most = most_heads if self.fused else 1
        for heads in (h for h in range(max(most, 1), 0, -1) if n % h == 0):
            yield from ((heads, windows) for windows in WINDOWS if windows >= CUBE or heads == 1)

    def _none_fits(self, block, stride, d):
        return ValueError(f"no tile of block {block}, stride {stride}, D {d} fits in {self}")


class Gpu(NamedTuple):
    """The plan for a GPU: one head a tile, its rows multiplied in chunks. Assumed, never measured."""

    fused: bool = False
    windows: int = CUBE  # of a run of windows
    chunk: int = 64  # rows of it multiplied at a time
    rows: int = 128  # of a run of rows
    dim: int = 128  # elements of a head, at most

    def forward_tile(self, block, stride, n, d):
        """The `WindowTile` of the forward kernel."""
        k = (self.windows - 1) * stride + block
        k = -(-k // self.chunk) * self.chunk
        return WindowTile(self.windows, self.windows, k, self.chunk, 1, part_of_d(d, self.dim))

    def grad_input_tile(self, block, stride, n, d):
        """The `RowTile` of the dInput kernel, with as many warps as its sums [r, bd] need."""
        tile = _row_tile(max(self.rows // stride, 1), block, stride, 1, part_of_d(d, self.dim))
        return tile._replace(options=(("num_warps", tile.r * tile.bd // (WARP * GPU_SUMS)),))

    def grad_weight_tile(self, block, stride, n, d):
        """The `WindowTile` of the dWeight kernel, which is the forward's."""
        return self.forward_tile(block, stride, n, d)


def padded(size):
    """The least size of a block that holds `size` elements."""
    return size if ANY_SIZE else triton.next_power_of_2(size)


def largest_divisor(size, most):
    """The largest block of at most `most` elements that cuts `size` into equal parts."""
    return max(b for b in range(1, min(size, most) + 1) if size % b == 0 and (ANY_SIZE or b & (b - 1) == 0))


def part_of_d(d, most):
    """The largest part of at most `most` elements, a multiple of the granule, that divides D."""
    return GRANULE * largest_divisor(d // GRANULE, max(most // GRANULE, 1))


def column_size(n, d, elements):
    """BN and BD, the heads and their elements of the widest column of at most so many elements."""
    bd = part_of_d(d, elements)
    bn = largest_divisor(n, elements // bd) if bd == d else 1
    return {"BN": bn, "BD": bd}


def window_block(block, n, d, itemsize):
    """Constants of a block that holds a whole window in one column; `itemsize` is in bytes."""
    bj = padded(block)
    elements = BLOCK_ELEMENTS if ANY_SIZE else GPU_BLOCK // itemsize
    return {"BLOCK": block, "BJ": bj, **column_size(n, d, elements // bj)}


def sums_block(rows, n, d, itemsize):
    """(rows at a time, other constants) of the gradients' sums over `rows` taps, or rows of a group, in one column.

    On a GPU each thread loads GPU_LOAD bytes of a row of dY, if the row of all heads has so many for a warp. With bf16,
    N 8 and D 128 that is a column of 1024 elements for 4 warps, and 8 rows at a time make 64 sums a thread.
    """
    if ANY_SIZE:
        return rows, column_size(n, d, BLOCK_ELEMENTS // rows)
    width = GPU_LOAD // itemsize
    size = column_size(n, d, WARPS * WARP * width)
    warps = max(size["BN"] * size["BD"] // (WARP * width), 1)
    sums = GPU_SUMS if warps > 1 else GPU_SUMS // 2  # with 64, N 4 and D 64, one warp spilled 4 bytes
    return largest_divisor(rows, min(sums // width, CUBE)), {**size, "num_warps": warps}


def page_block(n, d, itemsize):
    """BJ and the other constants of sums over windows whose rows lie in pages, 16 together. On a GPU, half of the
    forward's block at a time: with as many, a few bytes of registers were spilled in some shapes."""
    elements = BLOCK_ELEMENTS if ANY_SIZE else GPU_BLOCK // itemsize // 2
    return {"BJ": GRANULE, **column_size(n, d, elements // GRANULE)}


def _window_tile(windows, block, stride, heads, d):
    k = (windows - 1) * stride + block
    return WindowTile(windows, -(-windows // CUBE) * CUBE, k, k, heads, d)


def _band_in_ub(windows, rows, tile, stride):
    """Elements that `fused.write_band` stores at once: those of one head's taps with the zeros between them, and the
    zeros after the windows."""
    row = tile.heads * tile.k
    return windows * (tile.k + stride) + max(rows * row - windows * (row + stride), 0)


def _row_tile(strides, block, stride, heads, bd):
    lead = -(-block // stride) - 1
    rows, slots = strides * stride, strides + lead
    v = padded(-(-slots // CUBE) * CUBE)
    return RowTile(rows, padded(rows), slots, v, (slots - 1) * stride + block, lead * stride, heads, bd)
