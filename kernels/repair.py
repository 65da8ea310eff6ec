"""Results of the cube family that one infinity or NaN made wrong, replaced by the vector family's.

A cube kernel multiplies zeros of the band with rows that a window does not hold. Zero times a finite number adds
nothing, but zero times an infinity or a NaN is NaN. With block 32 and stride 16, an infinity in row 0 makes NaN of
every window of the run that begins there, though window 0 alone holds it. A result that went wrong in this way is
never finite. So each kernel here looks for what is not finite, and where it finds some, it computes the results there
again as the vector family does, without the band's zeros:

    forward   looks at blocks of y
    dInput    looks at the weights and at each run's slots of dy, which are fewer than the rows of dx
    dWeight   sums along the band what the cube family has multiplied, and looks at these sums

What is finite stays. The kernels decide this on the device, so the host does not wait. In the usual case there is
nothing to repair: a kernel then reads a small part of what the cube family read, and ends.
"""

import torch
import triton
import triton.language as tl

from nsa.table import GROUP

from .lines import first_of_split, load_row_run, load_window_run
from .tiles import padded, sums_block, window_block
from .vector import (
    column_offsets,
    forward_window,
    grad_input_group,
    load_taps,
)


@triton.jit
def is_finite(b):
    """Which elements of a block are finite."""
    b = b.to(tl.float32)
    return b - b == 0


@triton.jit
def count_not_finite(b):
    """How many elements of a three-dimensional block are not finite."""
    return tl.sum(tl.sum(tl.sum(tl.where(is_finite(b), 0.0, 1.0), 2), 1), 0).to(tl.int32)


@triton.jit
def repair_windows(
    x, starts, y, first, end, b_w, o_j, o_nd, N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BJ: tl.constexpr
):
    """Windows from `first` on, to `end` or as many as are looked at together, in one column."""
    p_y = y + tl.cast(first, tl.int64) * (N * D) + o_j[:, None, None] * (N * D) + o_nd[None, :, :]
    b_y = tl.load(p_y, mask=(o_j < end - first)[:, None, None], other=0)  # [BJ, BN, BD]
    if count_not_finite(b_y) > 0:
        for i in range(first, tl.minimum(first + BJ, end)):
            forward_window(x, starts, y, i, b_w, o_j, o_nd, N, D, BLOCK, BJ)


@triton.jit
def count_bad_weights(weight, block, o_n, N: tl.constexpr, GROUP: tl.constexpr):
    """How many weights of the heads o_n are not finite."""
    o_g = tl.arange(0, GROUP)
    bad = 0
    for j in range(0, block, GROUP):
        b_w = tl.load(weight + (j + o_g)[:, None] * N + o_n[None, :])  # [GROUP, BN]
        bad += count_not_finite(b_w[:, :, None])
    return bad


@triton.jit
def repair_rows(
    dy,
    weight,
    groups,
    runs,
    dx,
    stride,
    i_run,
    bad,
    o_n,
    o_nd,
    N: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """The rows of one run in one column, if `bad`, or something in its slots, is not finite."""
    o_g = tl.arange(0, GROUP)  # windows looked at together
    _, n_rows, window, first, end, group = load_row_run(runs, i_run)
    for v in range(first, end, GROUP):
        p_dy = dy + (window + v) * (N * D) + o_g[:, None, None] * (N * D) + o_nd[None, :, :]
        b_dy = tl.load(p_dy, mask=(o_g < end - v)[:, None, None], other=0)  # [GROUP, BN, BD]
        bad += count_not_finite(b_dy)
    if bad > 0:
        for i_g in range(group, group + (n_rows + GROUP - 1) // GROUP):
            grad_input_group(dy, weight, groups, dx, stride, i_g, o_n, o_nd, N, D, GROUP, BR, BN, BD, tl.float32)


@triton.jit(do_not_specialize=["starts", "n_windows", "n_programs"])
def forward_repair_kernel(
    x,  # (T, N, D)
    weight,  # (BLOCK, N)
    starts,  # (T',)
    y,  # (T', N, D), repaired in place
    n_windows,
    n_programs,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BJ: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    o_j = tl.arange(0, BJ)  # taps of a window, and windows looked at together
    for i_n in range(N // BN):
        for i_d in range(D // BD):
            o_n, o_nd = column_offsets(i_n, i_d, D, BN, BD)
            b_w = load_taps(weight + o_j[:, None] * N + o_n[None, :], o_j[:, None], BLOCK, BJ).to(tl.float32)
            for i_w in range(tl.program_id(0) * BJ, n_windows, n_programs * BJ):
                repair_windows(x, starts, y, i_w, n_windows, b_w, o_j, o_nd, N, D, BLOCK, BJ)


@triton.jit(do_not_specialize=["groups", "runs", "n_runs", "n_programs"])
def grad_input_repair_kernel(
    dy,  # (T', N, D)
    weight,  # (block, N)
    groups,  # (n_groups, 5)
    runs,  # (n_runs, 6)
    dx,  # (T, N, D), repaired in place
    block,
    stride,
    n_runs,
    n_programs,
    N: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    for i_n in range(N // BN):
        for i_d in range(D // BD):
            o_n, o_nd = column_offsets(i_n, i_d, D, BN, BD)
            bad = count_bad_weights(weight, block, o_n, N, GROUP)
            for i_run in range(tl.program_id(0), n_runs, n_programs):
                repair_rows(dy, weight, groups, runs, dx, stride, i_run, bad, o_n, o_nd, N, D, GROUP, BR, BN, BD)


@triton.jit(do_not_specialize=["starts", "runs", "n_windows", "n_runs", "n_splits", "n_programs"])
def grad_weight_repair_kernel(
    dy,  # (T', N, D)
    x,  # (T, N, D)
    starts,  # (T',)
    runs,  # (n_runs, 4)
    partial,  # (n_splits, N, M, K)
    dw,  # (BLOCK, N)
    n_windows,
    n_runs,
    n_splits,
    n_programs,
    N: tl.constexpr,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    BW: tl.constexpr,  # windows of a run, padded
    M: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    BJ: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    o_w = tl.arange(0, BW)
    for i in range(tl.program_id(0), (N // BN) * (BLOCK // BJ), n_programs):
        i_n = i % (N // BN)
        o_j = i // (N // BN) * BJ + tl.arange(0, BJ)  # taps
        o_n = i_n * BN + tl.arange(0, BN)
        # [n, w, j] is partial[split, n, w, w * STRIDE + j]: from window to window, a row down and STRIDE to the right
        o_p = o_n[:, None, None] * (M * K) + o_w[None, :, None] * (K + STRIDE) + o_j[None, None, :]
        b_sum = tl.zeros([BN, BJ], tl.float32)
        for i_split in range(n_splits):
            first_run = first_of_split(i_split, n_runs, n_splits)
            _, _, _, n_summed = load_window_run(runs, first_run)  # the first run of a split is its longest
            m_p = (o_w < n_summed)[None, :, None]
            b_sum += tl.sum(tl.load(partial + i_split * (N * M * K) + o_p, mask=m_p, other=0), 1)  # [BN, BJ]
        b_dw = tl.trans(b_sum)  # [BJ, BN]
        if count_not_finite(b_dw[:, :, None]) > 0:
            b_new = tl.zeros([BJ, BN], tl.float32)
            for i_d in range(D // BD):
                _, o_nd = column_offsets(i_n, i_d, D, BN, BD)
                b_products = tl.zeros([BJ, BN, BD], tl.float32)
                for i_w in range(n_windows):
                    p_x = x + tl.load(starts + i_w) * (N * D) + o_j[:, None, None] * (N * D) + o_nd[None, :, :]
                    b_dy = tl.load(dy + tl.cast(i_w, tl.int64) * (N * D) + o_nd).to(tl.float32)  # [BN, BD]
                    b_products += tl.load(p_x).to(tl.float32) * b_dy[None, :, :]  # [BJ, BN, BD]
                b_new += tl.sum(b_products, 2)
            b_dw = tl.where(is_finite(b_dw), b_dw, b_new)
        tl.store(dw + o_j[:, None] * N + o_n[None, :], b_dw.to(dw.dtype.element_ty))


def forward(x, weight, starts, y, n_programs):
    """Repair y (T', N, D) in place."""
    (n_windows, n, d), block = y.shape, weight.shape[0]
    sizes = window_block(block, n, d, y.element_size())
    n_programs = min(n_programs, triton.cdiv(n_windows, sizes["BJ"]))
    forward_repair_kernel[(n_programs,)](x, weight, starts, y, n_windows, n_programs, N=n, D=d, **sizes)


def grad_input(dy, weight, groups, runs, stride, dx, n_programs):
    """Repair dx (T, N, D) in place; runs (n_runs, 6) are those that dx was made with."""
    (_, n, d), block, n_runs = dx.shape, weight.shape[0], runs.shape[0]
    br, sizes = sums_block(GROUP, n, d, dy.element_size())
    n_programs = min(n_programs, n_runs)
    grad_input_repair_kernel[(n_programs,)](
        dy, weight, groups, runs, dx, block, stride, n_runs, n_programs,
        N=n, D=d, GROUP=GROUP, BR=br, **sizes,
    )  # fmt: skip


def grad_weight(dy, x, starts, runs, partial, tile, block, stride, n_programs):
    """dw (block, N) of the sums that `kernels.cube.grad_weight` made with this `WindowTile`: one program sums along the
    band for some taps of some heads, and where that is not finite, over all windows."""
    (_, n, d), n_splits = x.shape, partial.shape[0]
    dw = torch.empty((block, n), dtype=x.dtype, device=x.device)
    bj, sizes = sums_block(GROUP, n, d, x.element_size())
    n_programs = min(n_programs, n // sizes["BN"] * (block // bj))
    grad_weight_repair_kernel[(n_programs,)](
        dy, x, starts, runs, partial, dw, dy.shape[0], runs.shape[0], n_splits, n_programs,
        N=n, D=d, STRIDE=stride, BW=padded(tile.windows), M=tile.m, K=tile.k, BLOCK=block, BJ=bj, **sizes,
    )  # fmt: skip
    return dw
