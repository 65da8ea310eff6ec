"""A line of a window table, read by a kernel: the fields in the order in which `nsa.table` has them.

The order stands here as offsets, because a compiled kernel is known by its source text. `tests/test_kernels.py` holds
it to the classes of `nsa.table`.
"""

import triton
import triton.language as tl


@triton.jit
def load_row_group(groups, i):
    """row, n_rows, first, end, tap of a `RowGroup`."""
    p = groups + i * 5
    return tl.load(p), tl.load(p + 1), tl.load(p + 2), tl.load(p + 3), tl.load(p + 4)


@triton.jit
def load_window_run(runs, i):
    """row, n_rows, window, n_windows of a `WindowRun`; counts within the run of 32 bits."""
    p = runs + i * 4
    return tl.load(p), tl.load(p + 1).to(tl.int32), tl.load(p + 2), tl.load(p + 3).to(tl.int32)


@triton.jit
def load_row_run(runs, i):
    """row, n_rows, window, first, end, group of a `RowRun`; counts within the run, and the group, of 32 bits."""
    p = runs + i * 6
    row, n_rows, window = tl.load(p), tl.load(p + 1).to(tl.int32), tl.load(p + 2)
    return row, n_rows, window, tl.load(p + 3).to(tl.int32), tl.load(p + 4).to(tl.int32), tl.load(p + 5).to(tl.int32)


@triton.jit
def first_of_split(i_split, n_runs, n_splits):
    """The first run of a split, where splits are runs that follow each other: rows that two of them share are then
    loaded by one program, one after the other, and found in the cache. `i_split` = n_splits gives the end."""
    return tl.cast(tl.cast(i_split, tl.int64) * n_runs // n_splits, tl.int32)
