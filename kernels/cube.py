"""The cube family: the compression as a product with a banded matrix, for fp16 and bf16.

Kernels go over runs of windows (forward, dWeight) or runs of rows (dInput), and multiply with a matrix that depends
on a head's weights alone. With block 32 and stride 16, for a run of 2 windows and a run of 32 rows:

    row            0         16        32        48        64        80
    window 0       [-------------------]
    window 1                 [-------------------]                        the run of windows 1 and 2: rows 16 to 63
    window 2                           [-------------------]              the run of rows 32 to 63: lead 1, so that
    window 3                                     [-------------------]    windows 1, 2, 3 are in slots 0, 1, 2

    band of the windows                  band' of the slots
                 row 16  32  48                       row 32  48
    window 1          a   b   .          slot 0            b   .          a: taps 0 to 15, as a line
    window 2          .   a   b          slot 1            a   b          b: taps 16 to 31
                                         slot 2            .   a          .: zeros

In general, with zeros where there is no tap:

    forward   y[windows, n, :]  = band_n @ x[rows of the run, n, :]   band_n[w, w * stride + j] = weight[j, n]
    dInput    dx[rows, n, :]    = band'_n^T @ dy[slots, n, :]         band'_n[v, r] = weight[r - (v - lead) * stride, n]
    dWeight   p_n              += dy[windows, n, :] @ x[rows of the run, n, :]^T       [m, k], over all runs;
              dw[j, n]          = sum_w p_n[w, w * stride + j], which `kernels.repair` sums

The matrices are built outside the kernels here; on A2 and A3 the forward and dInput are those of `kernels.fused`,
which build them by themselves. A column is one or two heads, and of each all or some elements, the same in every row.
Programs take items: an item is one column and one of n_splits parts of the runs. The column's matrix is loaded once an
item and stays in L1, and dWeight's sums stay in L0C. What is not finite needs `kernels.repair`, because a zero of the
band times an infinity is NaN.

A run's k rows are multiplied kc at a time: on Ascend all at once (KC == K), on a GPU in chunks.
"""

import torch
import triton
import triton.language as tl

from nsa.triton_ascend import find_extract_slice

from .lines import first_of_split, load_row_run, load_window_run

# Programs take turns at items, and in the last round some find none. At least this share of the turns has an item:
# 20 programs and 24 items make 2 rounds of 20 turns, of which 0.6 have one; 4 splits make 96 items for 100 turns.
BUSY = 0.95
extract_slice = find_extract_slice()


@triton.jit
def columns(b, first, ROWS: tl.constexpr, COLS: tl.constexpr):
    """COLS columns of a block [ROWS, ...] from `first` on; the block itself if it has no more.

    Never rows: the compiler's library multiplies a block cut out of others' rows as if it were contiguous, and takes
    other elements than those (docs/simulator.md).
    """
    return b if b.shape[1] == COLS else extract_slice(b, [0, first], [ROWS, COLS], [1, 1])


@triton.jit
def load_columns(p, o, K: tl.constexpr, END: tl.constexpr):
    """Columns o, which end at END, of rows of K elements; zeros past the end of the rows."""
    return tl.load(p + o[None, :]) if END <= K else tl.load(p + o[None, :], mask=(o < K)[None, :], other=0)


@triton.jit(do_not_specialize=["runs", "n_runs", "n_splits", "n_programs"])
def forward_cube_kernel(
    x,  # (T, N, D)
    band,  # (N, M, K)
    runs,  # (n_runs, 4)
    y,  # (T', N, D)
    n_runs,
    n_splits,
    n_programs,
    N: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    KC: tl.constexpr,
    BD: tl.constexpr,
):
    o_m = tl.arange(0, M)
    o_k = tl.arange(0, KC)
    for i in range(tl.program_id(0), N * (D // BD) * n_splits, n_programs):
        i_n = i // n_splits // (D // BD)
        o_nd = i_n * D + i // n_splits % (D // BD) * BD + tl.arange(0, BD)
        p_band = band + i_n * (M * K) + o_m[:, None] * K + o_k[None, :]
        if KC == K:
            b_band = tl.load(p_band)  # [M, K], for all runs of the item
        first_run = first_of_split(i % n_splits, n_runs, n_splits)
        end_run = first_of_split(i % n_splits + 1, n_runs, n_splits)
        for i_run in range(first_run, end_run):
            row, n_rows, window, n_windows = load_window_run(runs, i_run)
            p_x = x + row * (N * D) + o_k[:, None] * (N * D) + o_nd[None, :]
            p_y = y + window * (N * D) + o_m[:, None] * (N * D) + o_nd[None, :]
            if KC == K:  # on Ascend
                b_y = tl.dot(b_band, tl.load(p_x, mask=(o_k < n_rows)[:, None], other=0))  # [M, BD]
            else:  # on a GPU
                b_y = tl.zeros([M, BD], tl.float32)
                for k in range(0, K, KC):
                    b_x = tl.load(p_x + k * (N * D), mask=(k + o_k < n_rows)[:, None], other=0)  # [KC, BD]
                    b_y = tl.dot(tl.load(p_band + k), b_x, b_y)
            tl.store(p_y, b_y.to(y.dtype.element_ty), mask=(o_m < n_windows)[:, None])


@triton.jit(do_not_specialize=["runs", "n_runs", "n_splits", "n_programs"])
def grad_input_cube_kernel(
    dy,  # (T', N, D)
    band,  # (N, V, K)
    runs,  # (n_runs, 6)
    dx,  # (T, N, D)
    n_runs,
    n_splits,
    n_programs,
    N: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    K: tl.constexpr,
    FIRST: tl.constexpr,  # the column of the band that is a run's first row
    R: tl.constexpr,
    BD: tl.constexpr,
):
    o_r = tl.arange(0, R)
    o_v = tl.arange(0, V)
    for i in range(tl.program_id(0), N * (D // BD) * n_splits, n_programs):
        i_n = i // n_splits // (D // BD)
        o_nd = i_n * D + i // n_splits % (D // BD) * BD + tl.arange(0, BD)
        b_band = load_columns(band + i_n * (V * K) + o_v[:, None] * K, FIRST + o_r, K, FIRST + R)  # [V, R]
        for i_run in range(i % n_splits, n_runs, n_splits):
            row, n_rows, window, first, end, _ = load_row_run(runs, i_run)
            p_dy = dy + window * (N * D) + o_v[:, None] * (N * D) + o_nd[None, :]
            b_dy = tl.load(p_dy, mask=((o_v >= first) & (o_v < end))[:, None], other=0)  # [V, BD]
            b_dx = tl.dot(tl.trans(b_band), b_dy)  # [R, BD]
            p_dx = dx + row * (N * D) + o_r[:, None] * (N * D) + o_nd[None, :]
            tl.store(p_dx, b_dx.to(dx.dtype.element_ty), mask=(o_r < n_rows)[:, None])


@triton.jit(do_not_specialize=["runs", "n_rows", "n_runs", "n_splits", "n_programs"])
def grad_weight_cube_kernel(
    dy,  # (T', N, D)
    x,  # (T, N, D)
    runs,  # (n_runs, 4)
    partial,  # (n_splits, N, M, K): of a split, as many windows and rows as its first run has, which is its longest
    n_rows,
    n_runs,
    n_splits,
    n_programs,
    N: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    KC: tl.constexpr,
    HEADS: tl.constexpr,
    BD: tl.constexpr,
):
    tl.static_assert(HEADS <= 2)
    o_m = tl.arange(0, M)
    for i in range(tl.program_id(0), (N // HEADS) * (K // KC) * n_splits, n_programs):
        i_n = i // n_splits // (K // KC) * HEADS
        o_k = i // n_splits % (K // KC) * KC + tl.arange(0, KC)
        b_p = tl.zeros([M, KC], tl.float32)
        if HEADS == 2:
            b_q = tl.zeros([M, KC], tl.float32)  # of the second head
        first_run = first_of_split(i % n_splits, n_runs, n_splits)
        end_run = first_of_split(i % n_splits + 1, n_runs, n_splits)
        for i_d in range(D // BD):
            o_nd = i_n * D + i_d * BD + tl.arange(0, HEADS * BD)
            for i_run in range(first_run, end_run):
                row, n_rows_of_run, window, n_windows = load_window_run(runs, i_run)
                # of two heads, rows of a following segment come along: no tap sums what they add, and to mask them
                # costs more than to load them
                n_loaded = n_rows_of_run if HEADS == 1 else n_rows - row
                p_x = x + row * (N * D) + o_k[:, None] * (N * D) + o_nd[None, :]
                b_x = tl.load(p_x, mask=(o_k < n_loaded)[:, None], other=0)  # [KC, HEADS * BD]
                p_dy = dy + window * (N * D) + o_m[:, None] * (N * D) + o_nd[None, :]
                b_dy = tl.load(p_dy, mask=(o_m < n_windows)[:, None], other=0)  # [M, HEADS * BD]
                if HEADS == 1:
                    b_p = tl.dot(b_dy, tl.trans(b_x), b_p)
                else:
                    b_p = tl.dot(columns(b_dy, 0, M, BD), tl.trans(columns(b_x, 0, KC, BD)), b_p)
                    b_q = tl.dot(columns(b_dy, BD, M, BD), tl.trans(columns(b_x, BD, KC, BD)), b_q)
        # of one head, the compiler multiplies no more rows than a run has: L0C holds nothing past the longest run's
        _, n_summed, _, _ = load_window_run(runs, first_run)
        p_p = partial + (i % n_splits * N + i_n) * (M * K) + o_m[:, None] * K + o_k[None, :]
        tl.store(p_p, b_p, mask=(o_k < n_summed)[None, :])
        if HEADS == 2:
            tl.store(p_p + M * K, b_q, mask=(o_k < n_summed)[None, :])


def forward(x, weight, runs, tile, stride, n_windows, n_programs):
    """y (T', N, D) of contiguous x (T, N, D) and weight (block, N).

    runs (n_runs, 4) int64 are the runs of windows that fill the `WindowTile` tile; n_windows = T' > 0.
    """
    _, n, d = x.shape
    y = torch.empty((n_windows, n, d), dtype=x.dtype, device=x.device)
    band = band_matrix(weight, stride, tile.windows, tile.m, tile.k)
    n_splits, n_programs = splits(n * (d // tile.bd), len(runs), n_programs)
    forward_cube_kernel[(n_programs,)](
        x, band, runs, y, runs.shape[0], n_splits, n_programs,
        N=n, D=d, M=tile.m, K=tile.k, KC=tile.kc, BD=tile.bd,
    )  # fmt: skip
    return y


def grad_input(dy, weight, runs, tile, stride, n_rows, n_programs):
    """dx (n_rows, N, D) of contiguous dy (T', N, D) and weight (block, N).

    runs (n_runs, 6) int64 are the runs of rows that fill the `RowTile` tile.
    """
    _, n, d = dy.shape
    dx = torch.empty((n_rows, n, d), dtype=dy.dtype, device=dy.device)
    band = band_matrix(weight, stride, tile.slots, tile.v, tile.k)
    n_splits, n_programs = splits(n * (d // tile.bd), len(runs), n_programs)
    grad_input_cube_kernel[(n_programs,)](
        dy, band, runs, dx, runs.shape[0], n_splits, n_programs,
        N=n, D=d, V=tile.v, K=tile.k, FIRST=tile.first, R=tile.r, BD=tile.bd, **dict(tile.options),
    )  # fmt: skip
    return dx


def grad_weight(dy, x, runs, tile, n_programs):
    """The sums (n_splits, N, m, k) fp32, of which `kernels.repair` makes dweight, of contiguous dy (T', N, D) and
    x (T, N, D): the same bits every run.

    runs (n_runs, 4) int64 are the runs of windows that fill the `WindowTile` tile.
    """
    _, n, d = x.shape
    n_splits, n_programs = splits((n // tile.heads) * (tile.k // tile.kc), len(runs), n_programs)
    partial = torch.empty((n_splits, n, tile.m, tile.k), dtype=torch.float32, device=x.device)
    grad_weight_cube_kernel[(n_programs,)](
        dy, x, runs, partial, x.shape[0], runs.shape[0], n_splits, n_programs,
        N=n, D=d, M=tile.m, K=tile.k, KC=tile.kc, HEADS=tile.heads, BD=tile.bd,
    )  # fmt: skip
    return partial


def band_matrix(weight, stride, windows, m, k):
    """(N, m, k) with [n, w, w * stride + j] = weight[j, n] for w < windows, zero elsewhere."""
    block, n = weight.shape
    band = weight.new_zeros((n, m, k))
    # [w, j, n] is band[n, w, w * stride + j]: from a window to the next, one row down and `stride` columns right
    diagonals = band.as_strided((windows, block, n), (k + stride, 1, m * k))
    diagonals.copy_(weight.expand(windows, block, n))
    return band


def splits(n_parts, n_runs, n_programs):
    """Into how many splits the runs of each of the result's `n_parts` parts are dealt, and how many programs run: few
    splits, but enough to keep most programs busy to the end."""
    n_splits = next(s for s in range(1, n_programs + 1) if n_parts * s >= BUSY * _rounded_up(n_parts * s, n_programs))
    n_splits = min(n_splits, n_runs)
    return n_splits, min(n_programs, n_parts * n_splits)


def _rounded_up(size, step):
    return -(-size // step) * step
