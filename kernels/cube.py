"""The cube family: the compression as a product with a banded matrix, for fp16 and bf16.

A run of windows of one segment is a product with a matrix that depends on the head's weights alone:

    band_n[w, w * stride + j] = weight[j, n]            zero elsewhere                       [m, k]

    forward   y[windows, n, :]  = band_n @ x[rows of the run, n, :]
    dInput    dx[rows, n, :]    = band'_n @ dy[slots, n, :]   with band'_n[r, v] = weight[r - (v - lead) * stride, n],
                                                              slot v starting (v - lead) strides after the run of rows
    dWeight   p_n              += x[rows of the run, n, :] @ dy[windows, n, :]^T             [k, m], over all runs;
              dw[j, n]          = sum_w p_n[w * stride + j, w]

The matrices are built outside the kernels. A program takes items, each some heads (a column) and every
n_splits-th tile: the column's matrix is loaded once and stays in L1, and dWeight's sums stay in L0C. Rows past
the end of a run are masked, so that nothing outside its windows is read. What is not finite needs
`kernels.repair`: a zero of the band times an infinity is NaN.

A tile's k rows are multiplied kc at a time: on Ascend all at once, on a GPU in chunks.
"""

import torch
import triton
import triton.language as tl

BUSY = 0.95  # of the programs' turns at items must have one


@triton.jit
def cut(b, i_row, i_col, ROWS: tl.constexpr, COLS: tl.constexpr, WHOLE: tl.constexpr):
    """Part (i_row, i_col) of a block, in units of (ROWS, COLS); the block itself if it is WHOLE."""
    return b if WHOLE else tl.extract_slice(b, [i_row * ROWS, i_col * COLS], [ROWS, COLS], [1, 1])


@triton.jit
def forward_cube_kernel(
    x,  # (T, N, D)
    band,  # (N, M, K)
    tiles,  # (n_tiles, 4)
    y,  # (T', N, D)
    n_tiles,
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
    o_m = tl.arange(0, M)
    o_k = tl.arange(0, KC)
    for i in range(tl.program_id(0), (N // HEADS) * (D // BD) * n_splits, n_programs):
        i_n = i // n_splits // (D // BD) * HEADS
        o_d = i // n_splits % (D // BD) * BD
        p_band = band + i_n * (M * K) + tl.arange(0, HEADS * M)[:, None] * K + o_k[None, :]
        if KC == K:
            b_band = tl.load(p_band)  # [HEADS * M, K], for all tiles of the item
        for i_t in range(i % n_splits, n_tiles, n_splits):
            row = tl.load(tiles + i_t * 4)
            n_rows = tl.load(tiles + i_t * 4 + 1).to(tl.int32)
            window = tl.load(tiles + i_t * 4 + 2)
            n_windows = tl.load(tiles + i_t * 4 + 3).to(tl.int32)
            p_x = x + row * (N * D) + o_k[:, None] * (N * D) + i_n * D + o_d + tl.arange(0, HEADS * BD)[None, :]
            p_y = y + window * (N * D) + o_m[:, None] * (N * D) + i_n * D + o_d + tl.arange(0, BD)[None, :]
            m_y = (o_m < n_windows)[:, None]
            if KC == K:
                b_x = tl.load(p_x, mask=(o_k < n_rows)[:, None], other=0)  # [K, HEADS * BD]
                for h in tl.static_range(HEADS):
                    b_y = tl.dot(cut(b_band, h, 0, M, K, HEADS == 1), cut(b_x, 0, h, K, BD, HEADS == 1))  # [M, BD]
                    tl.store(p_y + h * D, b_y.to(y.dtype.element_ty), mask=m_y)
            else:
                b_y = tl.zeros([M, BD], tl.float32)
                for k in range(0, K, KC):
                    b_x = tl.load(p_x + k * (N * D), mask=(k + o_k < n_rows)[:, None], other=0)  # [KC, BD]
                    b_y = tl.dot(tl.load(p_band + k), b_x, b_y)
                tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_y)


@triton.jit
def grad_input_cube_kernel(
    dy,  # (T', N, D)
    band,  # (N, R, V)
    tiles,  # (n_tiles, 6)
    dx,  # (T, N, D)
    n_tiles,
    n_splits,
    n_programs,
    N: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    V: tl.constexpr,
    HEADS: tl.constexpr,
    BD: tl.constexpr,
):
    o_r = tl.arange(0, R)
    o_v = tl.arange(0, V)
    for i in range(tl.program_id(0), (N // HEADS) * (D // BD) * n_splits, n_programs):
        i_n = i // n_splits // (D // BD) * HEADS
        o_d = i // n_splits % (D // BD) * BD
        p_band = band + i_n * (R * V) + tl.arange(0, HEADS * R)[:, None] * V + o_v[None, :]
        b_band = tl.load(p_band)  # [HEADS * R, V]
        for i_t in range(i % n_splits, n_tiles, n_splits):
            row = tl.load(tiles + i_t * 6)
            n_rows = tl.load(tiles + i_t * 6 + 1).to(tl.int32)
            window = tl.load(tiles + i_t * 6 + 2)
            first = tl.load(tiles + i_t * 6 + 3).to(tl.int32)
            end = tl.load(tiles + i_t * 6 + 4).to(tl.int32)
            p_dy = dy + window * (N * D) + o_v[:, None] * (N * D) + i_n * D + o_d + tl.arange(0, HEADS * BD)[None, :]
            b_dy = tl.load(p_dy, mask=((o_v >= first) & (o_v < end))[:, None], other=0)  # [V, HEADS * BD]
            p_dx = dx + row * (N * D) + o_r[:, None] * (N * D) + i_n * D + o_d + tl.arange(0, BD)[None, :]
            m_dx = (o_r < n_rows)[:, None]
            for h in tl.static_range(HEADS):
                b_dx = tl.dot(cut(b_band, h, 0, R, V, HEADS == 1), cut(b_dy, 0, h, V, BD, HEADS == 1))  # [R, BD]
                tl.store(p_dx + h * D, b_dx.to(dx.dtype.element_ty), mask=m_dx)


@triton.jit
def grad_weight_cube_kernel(
    dy,  # (T', N, D)
    x,  # (T, N, D)
    tiles,  # (n_tiles, 4)
    partial,  # (n_splits, N, K, M)
    n_tiles,
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
        b_p = tl.zeros([KC, M], tl.float32)
        b_q = tl.zeros([KC, M], tl.float32)  # of the second head
        for i_d in range(D // BD):
            o_nd = i_n * D + i_d * BD + tl.arange(0, HEADS * BD)
            for i_t in range(i % n_splits, n_tiles, n_splits):
                row = tl.load(tiles + i_t * 4)
                n_rows = tl.load(tiles + i_t * 4 + 1).to(tl.int32)
                window = tl.load(tiles + i_t * 4 + 2)
                n_windows = tl.load(tiles + i_t * 4 + 3).to(tl.int32)
                p_x = x + row * (N * D) + o_k[:, None] * (N * D) + o_nd[None, :]
                b_x = tl.load(p_x, mask=(o_k < n_rows)[:, None], other=0)  # [KC, HEADS * BD]
                p_dy = dy + window * (N * D) + o_m[:, None] * (N * D) + o_nd[None, :]
                b_dy = tl.load(p_dy, mask=(o_m < n_windows)[:, None], other=0)  # [M, HEADS * BD]
                if HEADS == 1:
                    b_p = tl.dot(b_x, tl.trans(b_dy), b_p)
                else:
                    b_p = tl.dot(cut(b_x, 0, 0, KC, BD, False), tl.trans(cut(b_dy, 0, 0, M, BD, False)), b_p)
                    b_q = tl.dot(cut(b_x, 0, 1, KC, BD, False), tl.trans(cut(b_dy, 0, 1, M, BD, False)), b_q)
        p_p = partial + (i % n_splits * N + i_n) * (K * M) + o_k[:, None] * M + o_m[None, :]
        tl.store(p_p, b_p)
        if HEADS == 2:
            tl.store(p_p + K * M, b_q)


def forward(x, weight, tiles, tile, stride, n_windows, n_programs):
    """y (T', N, D) of contiguous x (T, N, D) and weight (block, N).

    tiles (n_tiles, 4) int64 are the runs of windows of the `WindowTile` tile; n_windows = T' > 0.
    """
    _, n, d = x.shape
    y = torch.empty((n_windows, n, d), dtype=x.dtype, device=x.device)
    band = band_matrix(weight, stride, tile.windows, tile.m, tile.k)
    columns = (n // tile.heads) * (d // tile.bd)
    n_splits, n_programs = splits(columns, len(tiles), n_programs)
    forward_cube_kernel[(n_programs,)](
        x, band, tiles, y, tiles.shape[0], n_splits, n_programs,
        N=n, D=d, M=tile.m, K=tile.k, KC=tile.kc, HEADS=tile.heads, BD=tile.bd,
    )  # fmt: skip
    return y


def grad_input(dy, weight, tiles, tile, stride, n_rows, n_programs):
    """dx (n_rows, N, D) of contiguous dy (T', N, D) and weight (block, N); tiles (n_tiles, 6) of a `RowTile`."""
    _, n, d = dy.shape
    dx = torch.empty((n_rows, n, d), dtype=dy.dtype, device=dy.device)
    band = slot_matrix(weight, stride, tile)
    n_splits, n_programs = splits((n // tile.heads) * (d // tile.bd), len(tiles), n_programs)
    grad_input_cube_kernel[(n_programs,)](
        dy, band, tiles, dx, tiles.shape[0], n_splits, n_programs,
        N=n, D=d, R=tile.r, V=tile.v, HEADS=tile.heads, BD=tile.bd,
    )  # fmt: skip
    return dx


def grad_weight(dy, x, tiles, tile, block, stride, n_programs):
    """dw (block, N) of contiguous dy (T', N, D) and x (T, N, D), the same bits every run; tiles (n_tiles, 4)."""
    _, n, d = x.shape
    n_splits, n_programs = splits((n // tile.heads) * (tile.k // tile.kc), len(tiles), n_programs)
    partial = torch.empty((n_splits, n, tile.k, tile.m), dtype=torch.float32, device=x.device)
    grad_weight_cube_kernel[(n_programs,)](
        dy, x, tiles, partial, tiles.shape[0], n_splits, n_programs,
        N=n, D=d, M=tile.m, K=tile.k, KC=tile.kc, HEADS=tile.heads, BD=tile.bd,
    )  # fmt: skip
    along_band = partial.as_strided(
        (n_splits, tile.windows, block, n),
        (n * tile.k * tile.m, stride * tile.m + 1, tile.m, tile.k * tile.m),
    )
    return along_band.sum((0, 1)).to(x.dtype)


def band_matrix(weight, stride, windows, m, k):
    """(N, m, k) with [n, w, w * stride + j] = weight[j, n] for w < windows, zero elsewhere."""
    block, n = weight.shape
    band = weight.new_zeros((n, m, k))
    band.as_strided((windows, block, n), (k + stride, 1, m * k)).copy_(weight.expand(windows, block, n))
    return band


def slot_matrix(weight, stride, tile):
    """(N, r, v) with [n, r, v] = weight[r - (v - lead) * stride, n] where that is a tap, zero elsewhere."""
    block, n = weight.shape
    lead = tile.slots - tile.rows // stride
    k = (tile.slots - 1) * stride + block
    band = band_matrix(weight, stride, tile.slots, tile.slots, k)[:, :, lead * stride :][:, :, : tile.rows]
    matrix = weight.new_zeros((n, tile.r, tile.v))
    matrix[:, : tile.rows, : tile.slots] = band.transpose(1, 2)
    return matrix


def splits(columns, n_tiles, n_programs):
    """Parts to cut each column's tiles into, and programs to run: few parts, most programs busy to the end."""
    n_splits = next(s for s in range(1, n_programs + 1) if columns * s >= BUSY * _rounded_up(columns * s, n_programs))
    n_splits = min(n_splits, n_tiles)
    return n_splits, min(n_programs, columns * n_splits)


def _rounded_up(size, step):
    return -(-size // step) * step
