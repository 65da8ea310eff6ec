"""The cube family's forward and dInput, each in one launch: for chips whose programs have a cube core and vector cores.

A launch costs as long as half a megabyte a core takes from memory, whatever it does. So one kernel does in turn, for
each item (see `kernels.cube`), what would be three launches otherwise:

    vector cores   write the band of the item's heads to memory
    cube           multiplies it with the rows of the item's runs, and stores the results
    vector cores   repair (see `kernels.repair`), if a result may be wrong

Whether one may be wrong, the cube finds out. Beside the results it sums, over all runs of the item, products of 16 rows
of the band with all that was loaded. Whatever is loaded and not finite makes that sum infinite or NaN for good, in its
own column: an element of the band times an infinity is infinite, or NaN where the element is zero. The vector cores read
one row of these sums, and only where it is not finite do they look at the results, run by run.

The compiler orders what the cores do: vector and cube wait for each other where one reads from memory what the other
has written.
"""

import torch
import triton
import triton.language as tl

from nsa.table import GROUP

from .cube import cut, splits
from .lines import load_row_run, load_window_run
from .repair import count_bad_weights, is_finite, repair_rows, repair_windows
from .tiles import CUBE, sums_block, window_block
from .vector import column_offsets, load_taps


@triton.jit
def write_band(
    weight,
    band,
    i_n,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    WINDOWS: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    HEADS: tl.constexpr,
):
    """band [HEADS * M, K]: weight[j, i_n + h] at row h * M + w, column w * STRIDE + j; zero elsewhere."""
    o_j = tl.arange(0, BLOCK)
    zeros = tl.zeros([HEADS * M, K], band.dtype.element_ty)
    tl.store(band + tl.arange(0, HEADS * M)[:, None] * K + tl.arange(0, K)[None, :], zeros)
    for h in range(HEADS):
        b_w = tl.load(weight + i_n + h + o_j * N)  # [BLOCK]
        for w in range(WINDOWS):
            tl.store(band + (h * M + w) * K + w * STRIDE + o_j, b_w)


@triton.jit
def count_poisoned(poison, WIDTH: tl.constexpr):
    """How many columns of the sums that show what is not finite are not finite themselves."""
    b = tl.load(poison + tl.arange(0, WIDTH))
    return tl.sum(tl.where(is_finite(b), 0.0, 1.0), 0).to(tl.int32)


@triton.jit(do_not_specialize=["starts", "runs", "n_runs", "n_splits", "n_programs"])
def forward_fused_kernel(
    x,  # (T, N, D)
    weight,  # (BLOCK, N)
    starts,  # (T',)
    runs,  # (n_runs, 4)
    bands,  # (n_programs, HEADS * M, K)
    poisons,  # (n_programs, HEADS * BD)
    y,  # (T', N, D)
    n_runs,
    n_splits,
    n_programs,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    WINDOWS: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    HEADS: tl.constexpr,
    CUBE: tl.constexpr,
    BN: tl.constexpr,  # of a column of the repair
    BD: tl.constexpr,
):
    o_m = tl.arange(0, M)
    o_k = tl.arange(0, K)
    o_nd = tl.arange(0, HEADS * D)
    o_z = tl.arange(0, CUBE)
    o_j = tl.arange(0, BLOCK)
    band = bands + tl.program_id(0) * (HEADS * M * K)
    poison = poisons + tl.program_id(0) * (HEADS * D)
    for i in range(tl.program_id(0), (N // HEADS) * n_splits, n_programs):
        i_n = i // n_splits * HEADS
        write_band(weight, band, i_n, N, BLOCK, STRIDE, WINDOWS, M, K, HEADS)
        b_band = tl.load(band + tl.arange(0, HEADS * M)[:, None] * K + o_k[None, :])  # [HEADS * M, K]
        b_poison = tl.zeros([CUBE, HEADS * D], tl.float32)
        for i_run in range(i % n_splits, n_runs, n_splits):
            row, n_rows, window, n_windows = load_window_run(runs, i_run)
            p_x = x + row * (N * D) + o_k[:, None] * (N * D) + i_n * D + o_nd[None, :]
            p_y = y + window * (N * D) + o_m[:, None] * (N * D) + i_n * D + tl.arange(0, D)[None, :]
            b_x = tl.load(p_x, mask=(o_k < n_rows)[:, None], other=0)  # [K, HEADS * D]
            for h in tl.static_range(HEADS):
                b_y = tl.dot(cut(b_band, h, 0, M, K, HEADS == 1), cut(b_x, 0, h, K, D, HEADS == 1))  # [M, D]
                tl.store(p_y + h * D, b_y.to(y.dtype.element_ty), mask=(o_m < n_windows)[:, None])
            b_poison = tl.dot(cut(b_band, 0, 0, CUBE, K, HEADS * M == CUBE), b_x, b_poison)
        tl.store(poison + o_z[:, None] * (HEADS * D) + o_nd[None, :], b_poison, mask=(o_z < 1)[:, None])
        if count_poisoned(poison, HEADS * D) > 0:
            for c in range(HEADS // BN):
                for i_d in range(D // BD):
                    o_n, o_column = column_offsets(i_n // BN + c, i_d, D, BN, BD)
                    b_w = load_taps(weight + o_j[:, None] * N + o_n[None, :], o_j[:, None], BLOCK, BLOCK)
                    for i_run in range(i % n_splits, n_runs, n_splits):
                        _, _, window, n_windows = load_window_run(runs, i_run)
                        for w in range(0, n_windows, BLOCK):
                            repair_windows(
                                x, starts, y, window + w, window + n_windows, b_w.to(tl.float32), o_j, o_column,
                                N, D, BLOCK, BLOCK,
                            )  # fmt: skip


@triton.jit(do_not_specialize=["groups", "runs", "n_runs", "n_splits", "n_programs"])
def grad_input_fused_kernel(
    dy,  # (T', N, D)
    weight,  # (BLOCK, N)
    groups,  # (n_groups, 5)
    runs,  # (n_runs, 6)
    bands,  # (n_programs, HEADS * V, K)
    poisons,  # (n_programs, HEADS * BD)
    dx,  # (T, N, D)
    n_runs,
    n_splits,
    n_programs,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    SLOTS: tl.constexpr,
    LEAD: tl.constexpr,
    V: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    HEADS: tl.constexpr,
    BD: tl.constexpr,
    CUBE: tl.constexpr,
    GROUP: tl.constexpr,
    BR: tl.constexpr,
    BN_REPAIR: tl.constexpr,
    BD_REPAIR: tl.constexpr,
):
    o_r = tl.arange(0, R)
    o_v = tl.arange(0, V)
    o_nd = tl.arange(0, HEADS * BD)
    o_z = tl.arange(0, CUBE)
    band = bands + tl.program_id(0) * (HEADS * V * K)
    poison = poisons + tl.program_id(0) * (HEADS * BD)
    for i in range(tl.program_id(0), (N // HEADS) * (D // BD) * n_splits, n_programs):
        i_n = i // n_splits // (D // BD) * HEADS
        o_d = i // n_splits % (D // BD) * BD
        write_band(weight, band, i_n, N, BLOCK, STRIDE, SLOTS, V, K, HEADS)
        p_band = band + tl.arange(0, HEADS * V)[:, None] * K + LEAD * STRIDE + o_r[None, :]
        b_band = tl.load(p_band)  # [HEADS * V, R]
        b_poison = tl.zeros([CUBE, HEADS * BD], tl.float32)
        for i_run in range(i % n_splits, n_runs, n_splits):
            row, n_rows, window, first, end, _ = load_row_run(runs, i_run)
            p_dy = dy + window * (N * D) + o_v[:, None] * (N * D) + i_n * D + o_d + o_nd[None, :]
            b_dy = tl.load(p_dy, mask=((o_v >= first) & (o_v < end))[:, None], other=0)  # [V, HEADS * BD]
            p_dx = dx + row * (N * D) + o_r[:, None] * (N * D) + i_n * D + o_d + tl.arange(0, BD)[None, :]
            for h in tl.static_range(HEADS):
                b_left = tl.trans(cut(b_band, h, 0, V, R, HEADS == 1))  # [R, V]
                b_dx = tl.dot(b_left, cut(b_dy, 0, h, V, BD, HEADS == 1))  # [R, BD]
                tl.store(p_dx + h * D, b_dx.to(dx.dtype.element_ty), mask=(o_r < n_rows)[:, None])
            b_poison = tl.dot(tl.trans(cut(b_band, 0, 0, V, CUBE, HEADS == 1 and R == CUBE)), b_dy, b_poison)
        tl.store(poison + o_z[:, None] * (HEADS * BD) + o_nd[None, :], b_poison, mask=(o_z < 1)[:, None])
        if count_poisoned(poison, HEADS * BD) > 0:
            for c in range(HEADS // BN_REPAIR):
                for i_d in range(BD // BD_REPAIR):
                    o_n, o_column = column_offsets(
                        i_n // BN_REPAIR + c, o_d // BD_REPAIR + i_d, D, BN_REPAIR, BD_REPAIR
                    )
                    bad = count_bad_weights(weight, BLOCK, o_n, N, GROUP)
                    for i_run in range(i % n_splits, n_runs, n_splits):
                        repair_rows(
                            dy, weight, groups, runs, dx, STRIDE, i_run, bad, o_n, o_column,
                            N, D, GROUP, BR, BN_REPAIR, BD_REPAIR,
                        )  # fmt: skip
