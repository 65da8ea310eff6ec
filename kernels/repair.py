"""What the cube family cannot know is computed again on the vector cores, where the device itself finds it.

In a tile, a zero of the band meets every row. Times a finite number that is nothing; times an infinity or a NaN
it is a NaN in windows, rows or taps that never touch it. Such a result is never finite. So: where a block of
results (for dInput: the weights and the dy that a tile is made of) is finite, it stands; elsewhere the vector
family's sums replace it. The host does not wait for the answer, and in the usual case a kernel reads a small part
of what the cube family read, and ends.
"""

import torch
import triton
import triton.language as tl

from .tiles import columns
from .vector import (
    GROUP,
    column_offsets,
    forward_window,
    grad_input_group,
    grad_weight_heads,
    load_taps,
    window_block,
)


@triton.jit
def count_not_finite(b):
    """How many elements of a three-dimensional block are not finite."""
    b = b.to(tl.float32)
    return tl.sum(tl.sum(tl.sum(tl.where(b - b == 0, 0.0, 1.0), 2), 1), 0).to(tl.int32)


@triton.jit
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
                p_y = y + tl.cast(i_w, tl.int64) * (N * D) + o_j[:, None, None] * (N * D) + o_nd[None, :, :]
                b_y = tl.load(p_y, mask=(o_j < n_windows - i_w)[:, None, None], other=0)  # [BJ, BN, BD]
                if count_not_finite(b_y) > 0:
                    for i in range(i_w, tl.minimum(i_w + BJ, n_windows)):
                        forward_window(x, starts, y, i, b_w, o_j, o_nd, N, D, BLOCK, BJ)


@triton.jit
def grad_input_repair_kernel(
    dy,  # (T', N, D)
    weight,  # (block, N)
    groups,  # (n_groups, 5)
    tiles,  # (n_tiles, 6)
    dx,  # (T, N, D), repaired in place
    block,
    stride,
    n_tiles,
    n_programs,
    N: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    o_g = tl.arange(0, GROUP)  # taps or windows looked at together
    for i_n in range(N // BN):
        for i_d in range(D // BD):
            o_n, o_nd = column_offsets(i_n, i_d, D, BN, BD)
            bad_weights = 0
            for j in range(0, block, GROUP):
                b_w = tl.load(weight + (j + o_g)[:, None] * N + o_n[None, :])  # [GROUP, BN]
                bad_weights += count_not_finite(b_w[:, :, None])
            for i_t in range(tl.program_id(0), n_tiles, n_programs):
                n_rows = tl.load(tiles + i_t * 6 + 1).to(tl.int32)
                window = tl.load(tiles + i_t * 6 + 2)
                first = tl.load(tiles + i_t * 6 + 3).to(tl.int32)
                end = tl.load(tiles + i_t * 6 + 4).to(tl.int32)
                group = tl.load(tiles + i_t * 6 + 5).to(tl.int32)
                bad = bad_weights
                for v in range(first, end, GROUP):
                    p_dy = dy + (window + v) * (N * D) + o_g[:, None, None] * (N * D) + o_nd[None, :, :]
                    b_dy = tl.load(p_dy, mask=(o_g < end - v)[:, None, None], other=0)  # [GROUP, BN, BD]
                    bad += count_not_finite(b_dy)
                if bad > 0:
                    for i_g in range(group, group + (n_rows + GROUP - 1) // GROUP):
                        grad_input_group(
                            dy, weight, groups, dx, stride, i_g, o_n, o_nd, N, D, GROUP, BN, BD, tl.float32
                        )


@triton.jit
def grad_weight_repair_kernel(
    dy,  # (T', N, D)
    x,  # (T, N, D)
    starts,  # (T',)
    dw,  # (BLOCK, N)
    partial,  # (n_programs, BLOCK, N): sums where dw is not finite, else zeros
    n_windows,
    n_programs,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BJ: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    o_j = tl.arange(0, BJ)
    for i_n in range(N // BN):
        o_n = i_n * BN + tl.arange(0, BN)
        b_dw = load_taps(dw + o_j[:, None] * N + o_n[None, :], o_j[:, None], BLOCK, BJ)  # [BJ, BN]
        n_todo = tl.where(count_not_finite(b_dw[:, :, None]) > 0, n_windows, 0)
        grad_weight_heads(dy, x, starts, partial, n_todo, n_programs, i_n, N, D, BLOCK, BJ, BN, BD, tl.float32)


def forward(x, weight, starts, y, n_programs):
    """Repair y (T', N, D) in place."""
    (n_windows, n, d), block = y.shape, weight.shape[0]
    sizes = window_block(block, n, d)
    n_programs = min(n_programs, triton.cdiv(n_windows, sizes["BJ"]))
    forward_repair_kernel[(n_programs,)](x, weight, starts, y, n_windows, n_programs, N=n, D=d, **sizes)


def grad_input(dy, weight, groups, tiles, stride, dx, n_programs):
    """Repair dx (T, N, D) in place; tiles (n_tiles, 6) are those dx was made with."""
    (_, n, d), block, n_tiles = dx.shape, weight.shape[0], tiles.shape[0]
    n_programs = min(n_programs, n_tiles)
    grad_input_repair_kernel[(n_programs,)](
        dy, weight, groups, tiles, dx, block, stride, n_tiles, n_programs,
        N=n, D=d, GROUP=GROUP, **columns(GROUP, n, d),
    )  # fmt: skip


def grad_weight(dy, x, starts, dw, n_programs):
    """dw (block, N) with what was not finite computed again."""
    (_, n, d), block, n_windows = x.shape, dw.shape[0], starts.shape[0]
    n_programs = min(n_programs, n_windows)
    partial = torch.empty((n_programs, block, n), dtype=torch.float32, device=x.device)
    grad_weight_repair_kernel[(n_programs,)](
        dy, x, starts, dw, partial, n_windows, n_programs, N=n, D=d, **window_block(block, n, d)
    )
    return torch.where(dw.isfinite(), dw, partial.sum(0).to(dw.dtype))
