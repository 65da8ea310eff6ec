"""Sizes of blocks and tiles, from the sizes of on-chip memory. One default for every case, no search.

Sizes in elements unless they say bytes. The cube family's inputs have 2 bytes an element, its sums 4; the
compiler keeps two buffers of what a loop loads, so that loading overlaps with computing.
"""

from typing import NamedTuple

import triton
from triton.backends import backends

ANY_SIZE = "ascend" in backends  # triton-ascend takes blocks of any size, other Tritons powers of two
GRANULE = 16  # D comes in multiples of it; rows of another length would be padded on chip
BLOCK_ELEMENTS = 8192  # of a vector block: with its fp32 product and a second buffer, inside 192 KiB
CUBE = 16  # rows and columns of the cube unit's tile
BURST = 512  # bytes of a row from which on loads are efficient, as the vendor advises
WINDOWS = (*range(64, CUBE, -CUBE // 2), *range(CUBE, 0, -1))  # of a tile; at the first, overlap is small
LEAST_ROWS = 128  # of a dInput tile, for which D is cut where L0C is too small
GPU_CHUNK = 64  # rows of a tile that a GPU multiplies at a time
GPU_ROWS = 128  # of dInput that a GPU makes at a time


class Chip(NamedTuple):
    """What the cube family's tiles depend on."""

    l1: int  # bytes
    l0c: int  # bytes
    slices: bool  # whether a block may be cut without leaving L1, so that one load serves several heads
    sums: int  # buffers in L0C that the compiler keeps of a sum carried through a loop


class WindowTile(NamedTuple):
    """A run of windows and the rows they cover. X of `heads` heads is loaded at once, [k, heads * bd]."""

    windows: int
    m: int  # windows, padded to the cube's rows
    k: int  # rows, padded to a multiple of kc
    kc: int  # rows multiplied at a time
    heads: int
    bd: int

    def overlap(self, block, stride):
        """How much of the input is loaded a second time: neighbouring tiles share block - stride rows."""
        return (block - stride) / (self.windows * stride)


class RowTile(NamedTuple):
    """A run of rows, a multiple of the stride, and the slots for all windows that can hold one of them."""

    rows: int
    r: int  # rows, padded
    slots: int
    v: int  # slots, padded to the cube's rows
    heads: int
    bd: int


def padded(size):
    """The least size of a block that holds `size` elements."""
    return size if ANY_SIZE else triton.next_power_of_2(size)


def largest_divisor(size, most):
    """The largest block of at most `most` elements that cuts `size` into equal parts."""
    return max(b for b in range(1, min(size, most) + 1) if size % b == 0 and (ANY_SIZE or b & (b - 1) == 0))


def part_of_d(d, most):
    """The largest part of at most `most` elements, a multiple of the granule, that divides D."""
    return GRANULE * largest_divisor(d // GRANULE, max(most // GRANULE, 1))


def columns(rows, n, d):
    """BN and BD of a vector block: the most columns of an (N, D) row, `rows` of which fit in BLOCK_ELEMENTS."""
    bd = part_of_d(d, BLOCK_ELEMENTS // rows)
    bn = largest_divisor(n, BLOCK_ELEMENTS // (rows * bd)) if bd == d else 1
    return {"BN": bn, "BD": bd}


def forward_tile(block, stride, n, d, chip):
    """The tile of the forward kernel; `chip` None means a GPU."""
    if chip is None:
        return _gpu_window_tile(block, stride, d)
    for heads, windows in _choices(n, BURST // (2 * d), chip):
        tile = _window_tile(windows, block, stride, heads, d)
        x = heads * tile.k * d
        band = heads * tile.m * tile.k
        y = heads * tile.m * d
        if 2 * 2 * (x + band) <= chip.l1 and 2 * 4 * y <= chip.l0c:
            return tile
    raise ValueError(f"no tile of block {block}, stride {stride}, D {d} fits in {chip}")


def grad_weight_tile(block, stride, n, d, chip):
    """The tile of the dWeight kernel, whose sums [k, m] stay in L0C, of at most two heads."""
    if chip is None:
        return _gpu_window_tile(block, stride, d)
    for heads, windows in _choices(n, min(BURST // (2 * d), 2), chip):
        tile = _window_tile(windows, block, stride, heads, d)
        x = heads * tile.k * d
        dy = heads * tile.m * d
        p = heads * tile.k * tile.m
        if 2 * 2 * (x + dy) <= chip.l1 and chip.sums * 4 * p <= chip.l0c:
            return tile
    raise ValueError(f"no tile of block {block}, stride {stride}, D {d} fits in {chip}")


def grad_input_tile(block, stride, n, d, chip):
    """The tile of the dInput kernel; half of L0C holds the [r, bd] sums of its heads."""
    lead = -(-block // stride) - 1
    if chip is None:
        return _row_tile(max(GPU_ROWS // stride, 1), lead, stride, 1, part_of_d(d, 128))
    sums = chip.l0c // 2 // 4
    bd = part_of_d(d, sums // max(stride, LEAST_ROWS))
    most_heads = min(BURST // (2 * d), sums // (stride * bd)) if bd == d and chip.slices else 1
    heads = largest_divisor(n, max(most_heads, 1))
    for windows in WINDOWS:
        tile = _row_tile(windows, lead, stride, heads, bd)
        band = heads * tile.r * tile.v
        dy = heads * tile.v * bd
        dx = heads * tile.r * bd
        if 2 * 2 * (band + dy) <= chip.l1 and dx <= sums:
            return tile
    raise ValueError(f"no tile of block {block}, stride {stride}, D {d} fits in {chip}")


def _choices(n, most_heads, chip):
    """(heads, windows), the best first: long rows, as long as a tile fills the cube's, then little overlap."""
    most = most_heads if chip.slices else 1
    for heads in (h for h in range(max(most, 1), 0, -1) if n % h == 0):
        yield from ((heads, windows) for windows in WINDOWS if windows >= CUBE or heads == 1)


def _window_tile(windows, block, stride, heads, d):
    k = (windows - 1) * stride + block
    return WindowTile(windows, -(-windows // CUBE) * CUBE, k, k, heads, d)


def _row_tile(strides, lead, stride, heads, bd):
    rows, slots = strides * stride, strides + lead
    return RowTile(rows, padded(rows), slots, padded(-(-slots // CUBE) * CUBE), heads, bd)


def _gpu_window_tile(block, stride, d):
    k = (CUBE - 1) * stride + block
    return WindowTile(CUBE, CUBE, -(-k // GPU_CHUNK) * GPU_CHUNK, GPU_CHUNK, 1, part_of_d(d, 128))
