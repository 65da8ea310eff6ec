"""The vector family: weighted sums of rows on the vector cores, all dtypes, all legal shapes.

    forward   y[w, n, d]  = sum_j    weight[j, n] * x[start_w + j, n, d]
    dInput    dx[t, n, d] = sum_w    weight[t - start_w, n] * dy[w, n, d]     over the windows w that hold row t
    dWeight   dw[j, n]    = sum_w,d  dy[w, n, d] * x[start_w + j, n, d]

Sums are kept in fp32 (fp64 for fp64) and rounded once. A column is BN heads and of each BD elements, the same in
every row; BN and BD divide N and D. Every program walks over all columns and, in each, over every n_programs-th
window or row group, so that what depends on the column alone is loaded once. Offsets that grow with T are 64 bit.
In the forward, BJ is BLOCK or, where Triton wants a power of two, the next one: then the taps from BLOCK on are masked.
The gradients' sums are made BR rows or BJ taps at a time: on Ascend all, on a GPU as many as its registers hold.
"""

import torch
import triton
import triton.language as tl

from nsa.table import GROUP

from .lines import load_row_group
from .tiles import sums_block, window_block


@triton.jit
def load_taps(p, o_j, BLOCK: tl.constexpr, BJ: tl.constexpr):
    """Block of the rows o_j at p; zeros for the rows from BLOCK on."""
    return tl.load(p) if BJ == BLOCK else tl.load(p, mask=o_j < BLOCK, other=0)


@triton.jit
def column_offsets(i_n, i_d, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """The heads of column (i_n, i_d), and the offsets of its elements in a row."""
    o_n = i_n * BN + tl.arange(0, BN)
    return o_n, o_n[:, None] * D + i_d * BD + tl.arange(0, BD)[None, :]  # [BN], [BN, BD]


@triton.jit
def forward_window(
    x, starts, y, i_w, b_w, o_j, o_nd, N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BJ: tl.constexpr
):
    """One window of y in one column."""
    p_x = x + tl.load(starts + i_w) * (N * D) + o_j[:, None, None] * (N * D) + o_nd[None, :, :]
    b_x = load_taps(p_x, o_j[:, None, None], BLOCK, BJ)  # [BJ, BN, BD]
    b_y = tl.sum(b_x.to(b_w.dtype) * b_w[:, :, None], 0)  # [BN, BD]
    tl.store(y + tl.cast(i_w, tl.int64) * (N * D) + o_nd, b_y.to(y.dtype.element_ty))


@triton.jit
def grad_input_group(
    dy,
    weight,
    groups,
    dx,
    stride,
    i_g,
    o_n,
    o_nd,
    N: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    ACC: tl.constexpr,
):
    """One row group of dx in one column, BR rows at a time."""
    row, n_rows, first, end, tap = load_row_group(groups, i_g)
    o_r = tl.arange(0, BR)
    for r in range(0, GROUP, BR):
        j = tap + r
        b_dx = tl.zeros([BR, BN, BD], ACC)
        for i_w in range(first, end):
            b_w = tl.load(weight + (j + o_r)[:, None] * N + o_n[None, :]).to(ACC)  # [BR, BN]
            b_dy = tl.load(dy + tl.cast(i_w, tl.int64) * (N * D) + o_nd).to(ACC)  # [BN, BD]
            b_dx += b_w[:, :, None] * b_dy[None, :, :]
            j -= stride
        p_dx = dx + (row + r) * (N * D) + o_r[:, None, None] * (N * D) + o_nd[None, :, :]
        tl.store(p_dx, b_dx.to(dx.dtype.element_ty), mask=(r + o_r < n_rows)[:, None, None])


@triton.jit(do_not_specialize=["starts", "n_windows", "n_programs"])
def forward_vector_kernel(
    x,  # (T, N, D)
    weight,  # (BLOCK, N)
    starts,  # (T',)
    y,  # (T', N, D)
    n_windows,
    n_programs,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BJ: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    ACC: tl.constexpr,
):
    o_j = tl.arange(0, BJ)
    for i_n in range(N // BN):
        for i_d in range(D // BD):
            o_n, o_nd = column_offsets(i_n, i_d, D, BN, BD)
            b_w = load_taps(weight + o_j[:, None] * N + o_n[None, :], o_j[:, None], BLOCK, BJ).to(ACC)  # [BJ, BN]
            for i_w in range(tl.program_id(0), n_windows, n_programs):
                forward_window(x, starts, y, i_w, b_w, o_j, o_nd, N, D, BLOCK, BJ)


@triton.jit(do_not_specialize=["groups", "n_groups", "n_programs"])
def grad_input_vector_kernel(
    dy,  # (T', N, D)
    weight,  # (block, N)
    groups,  # (n_groups, 5)
    dx,  # (T, N, D)
    stride,
    n_groups,
    n_programs,
    N: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    ACC: tl.constexpr,
):
    for i_n in range(N // BN):
        for i_d in range(D // BD):
            o_n, o_nd = column_offsets(i_n, i_d, D, BN, BD)
            for i_g in range(tl.program_id(0), n_groups, n_programs):
                grad_input_group(dy, weight, groups, dx, stride, i_g, o_n, o_nd, N, D, GROUP, BR, BN, BD, ACC)


@triton.jit(do_not_specialize=["starts", "n_windows", "n_programs"])
def grad_weight_vector_kernel(
    dy,  # (T', N, D)
    x,  # (T, N, D)
    starts,  # (T',)
    partial,  # (n_programs, BLOCK, N): the sum over the windows of each program
    n_windows,
    n_programs,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BJ: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    ACC: tl.constexpr,
):
    for i_n in range(N // BN):
        for j in range(0, BLOCK, BJ):
            o_j = j + tl.arange(0, BJ)
            b_dw = tl.zeros([BJ, BN], ACC)
            for i_d in range(D // BD):
                _, o_nd = column_offsets(i_n, i_d, D, BN, BD)
                b_sum = tl.zeros([BJ, BN, BD], ACC)
                for i_w in range(tl.program_id(0), n_windows, n_programs):
                    p_x = x + tl.load(starts + i_w) * (N * D) + o_j[:, None, None] * (N * D) + o_nd[None, :, :]
                    b_dy = tl.load(dy + tl.cast(i_w, tl.int64) * (N * D) + o_nd).to(ACC)  # [BN, BD]
                    b_sum += tl.load(p_x).to(ACC) * b_dy[None, :, :]  # [BJ, BN, BD]
                b_dw += tl.sum(b_sum, 2)
            o_n = i_n * BN + tl.arange(0, BN)
            tl.store(partial + tl.program_id(0) * (BLOCK * N) + o_j[:, None] * N + o_n[None, :], b_dw)


def forward(x: torch.Tensor, weight: torch.Tensor, starts: torch.Tensor, n_programs: int) -> torch.Tensor:
    """y (T', N, D) of contiguous x (T, N, D) and weight (block, N); starts (T',) int64, T' > 0."""
    (_, n, d), block, n_windows = x.shape, weight.shape[0], starts.shape[0]
    y = torch.empty((n_windows, n, d), dtype=x.dtype, device=x.device)
    n_programs = min(n_programs, n_windows)
    forward_vector_kernel[(n_programs,)](
        x,
        weight,
        starts,
        y,
        n_windows,
        n_programs,
        N=n,
        D=d,
        **window_block(block, n, d, x.element_size()),
        ACC=acc_of(x),
    )
    return y


def grad_input(dy, weight, groups, n_rows, stride, n_programs):
    """dx (n_rows, N, D) of contiguous dy (T', N, D) and weight (block, N); groups (n_groups, 5) int64, T' > 0."""
    (_, n, d), n_groups = dy.shape, groups.shape[0]
    br, sizes = sums_block(GROUP, n, d, dy.element_size())
    dx = torch.empty((n_rows, n, d), dtype=dy.dtype, device=dy.device)
    n_programs = min(n_programs, n_groups)
    grad_input_vector_kernel[(n_programs,)](
        dy, weight, groups, dx, stride, n_groups, n_programs,
        N=n, D=d, GROUP=GROUP, BR=br, **sizes, ACC=acc_of(dy),
    )  # fmt: skip
    return dx


def grad_weight(dy, x, starts, block, n_programs):
    """dw (block, N) of contiguous dy (T', N, D) and x (T, N, D), the same bits every run; T' > 0."""
    (_, n, d), n_windows, acc = x.shape, starts.shape[0], acc_of(x)
    bj, sizes = sums_block(block, n, d, x.element_size())
    n_programs = min(n_programs, n_windows)
    acc_dtype = torch.float64 if acc == tl.float64 else torch.float32
    partial = torch.empty((n_programs, block, n), dtype=acc_dtype, device=x.device)
    grad_weight_vector_kernel[(n_programs,)](
        dy, x, starts, partial, n_windows, n_programs, N=n, D=d, BLOCK=block, BJ=bj, **sizes, ACC=acc
    )
    return partial.sum(0).to(x.dtype)


def acc_of(tensor):
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32
