"""The cube family's forward and dInput, each in one launch: for chips whose programs have a cube core and vector cores.

A launch costs as long as half a megabyte a core takes from memory, whatever it does. So one kernel does in turn, for
each item (see `kernels.cube`), what would be three launches otherwise:

    vector cores   write the band of the item's heads to memory
    cube           multiplies it with the rows of the item's runs, and stores the results
    vector cores   repair (see `kernels.repair`), if a result may be wrong

Whether one may be wrong, the cube finds out. Beside the results it sums, over all runs of the item, products of 16 rows
of the band with all that was loaded. Whatever is loaded and not finite makes that sum infinite or NaN for good, in its
own column: an element of the band times an infinity is infinite, or NaN where the element is zero. The vector cores
read one row of these sums, and look at the weights. Where something is not finite, they look at what was loaded, run by
run, and compute a run's results again if that is not finite. They never look at results: one vector core would read
there what the other stores.

The compiler orders what the cores do: vector and cube wait for each other where one reads from memory what the other
has written.
"""

import torch
import triton
import triton.language as tl

from nsa.table import GROUP
from nsa.triton_ascend import launch_again_after_a_crash

from .cube import columns, splits
from .lines import first_of_split, load_row_run, load_window_run
from .repair import count_bad_weights, count_not_finite, is_finite, repair_rows
from .tiles import CUBE, column_size
from .vector import column_offsets, forward_window

REPAIRED = 4096  # elements of a block that is repaired: in UB beside the zeros of the band


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
    """band [M, HEADS * K]: weight[j, i_n + h] at row w, column h * K + w * STRIDE + j; zero elsewhere.

    From a row to the next, the taps are a row and STRIDE elements further on. So they are a block of rows of that
    pitch, with as many zeros between them in each row. The compiler deals rows out to the two vector cores, which have
    no order between them: no element is written twice.

    Returns how many weights of each tap are not finite, [1, BLOCK].
    """
    o_j = tl.arange(0, BLOCK)
    o_w = tl.arange(0, WINDOWS)[:, None] * (HEADS * K + STRIDE)
    o_end = HEADS * K + tl.arange(0, STRIDE)
    tl.store(band + o_w + o_end[None, :], tl.zeros([WINDOWS, STRIDE], band.dtype.element_ty))
    REST: tl.constexpr = M * HEADS * K - WINDOWS * (HEADS * K + STRIDE)
    if REST > 0:
        p_rest = band + WINDOWS * (HEADS * K + STRIDE) + tl.arange(0, REST)
        tl.store(p_rest, tl.zeros([REST], band.dtype.element_ty))
    b_bad = tl.zeros([1, BLOCK], tl.float32)
    for h in range(HEADS):
        if K > BLOCK:
            o_gap = BLOCK + tl.arange(0, K - BLOCK)
            tl.store(band + h * K + o_w + o_gap[None, :], tl.zeros([WINDOWS, K - BLOCK], band.dtype.element_ty))
        # as a block of one column: of a vector of stride 2, the compiler loads an element past the end of the weights
        b_w = tl.trans(tl.load(weight + i_n + h + o_j[:, None] * N + tl.arange(0, 1)[None, :]))  # [1, BLOCK]
        tl.store(band + h * K + o_w + o_j[None, :], tl.broadcast_to(b_w, [WINDOWS, BLOCK]))
        b_bad += tl.where(is_finite(b_w), 0.0, 1.0)
    return b_bad


@triton.jit
def is_poisoned(poison, b_bad, WIDTH: tl.constexpr):
    """Whether one of the sums that show what is not finite is so itself, or something was counted in b_bad [1, ...]."""
    b_poison = tl.load(poison + tl.arange(0, WIDTH)[None, :])
    return tl.sum(tl.sum(tl.where(is_finite(b_poison), 0.0, 1.0), 1) + tl.sum(b_bad, 1), 0) > 0


@triton.jit(do_not_specialize=["starts", "runs", "n_rows", "n_runs", "n_splits", "n_programs"])
def forward_fused_kernel(
    x,  # (T, N, D)
    weight,  # (BLOCK, N)
    starts,  # (T',)
    runs,  # (n_runs, 4)
    bands,  # (n_programs, BAND), where M rows of HEADS * K begin
    poisons,  # (n_programs, HEADS * D)
    y,  # (T', N, D)
    n_rows,
    n_runs,
    n_splits,
    n_programs,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    WINDOWS: tl.constexpr,
    M: tl.constexpr,  # the cube's rows
    K: tl.constexpr,
    HEADS: tl.constexpr,
    BAND: tl.constexpr,
    BN: tl.constexpr,  # of a column of the repair
    BD: tl.constexpr,
):
    o_m = tl.arange(0, M)
    o_k = tl.arange(0, K)
    o_hk = tl.arange(0, HEADS * K)
    o_hd = tl.arange(0, HEADS * D)
    o_j = tl.arange(0, BLOCK)
    band = bands + tl.program_id(0) * BAND
    poison = poisons + tl.program_id(0) * (HEADS * D)
    for i in range(tl.program_id(0), (N // HEADS) * n_splits, n_programs):
        i_n = i // n_splits * HEADS
        b_bad = write_band(weight, band, i_n, N, BLOCK, STRIDE, WINDOWS, M, K, HEADS)
        b_band = tl.load(band + o_m[:, None] * (HEADS * K) + o_hk[None, :])  # [M, HEADS * K]
        b_poison = tl.zeros([M, HEADS * D], tl.float32)
        first_run = first_of_split(i % n_splits, n_runs, n_splits)
        end_run = first_of_split(i % n_splits + 1, n_runs, n_splits)
        for i_run in range(first_run, end_run):
            row, _, window, n_windows = load_window_run(runs, i_run)
            p_x = x + row * (N * D) + o_k[:, None] * (N * D) + i_n * D + o_hd[None, :]
            p_y = y + window * (N * D) + o_m[:, None] * (N * D) + i_n * D + tl.arange(0, D)[None, :]
            # rows of a following segment come along, times zeros of the band: to mask them costs more than to load them
            b_x = tl.load(p_x, mask=(o_k < n_rows - row)[:, None], other=0)  # [K, HEADS * D]
            for h in tl.static_range(HEADS):
                b_y = tl.dot(columns(b_band, h * K, M, K), columns(b_x, h * D, K, D))  # [M, D]
                tl.store(p_y + h * D, b_y.to(y.dtype.element_ty), mask=(o_m < n_windows)[:, None])
            b_poison = tl.dot(columns(b_band, 0, M, K), b_x, b_poison)
        tl.store(poison + o_m[:, None] * (HEADS * D) + o_hd[None, :], b_poison, mask=(o_m < 1)[:, None])
        if is_poisoned(poison, b_bad, HEADS * D):
            for i_n_repair in range(i_n // BN, (i_n + HEADS) // BN):
                for i_d in range(D // BD):
                    o_n, o_nd = column_offsets(i_n_repair, i_d, D, BN, BD)
                    b_w = tl.load(weight + o_j[:, None] * N + o_n[None, :]).to(tl.float32)  # [BLOCK, BN]
                    for i_run in range(first_run, end_run):
                        row, _, window, n_windows = load_window_run(runs, i_run)
                        end = tl.minimum(n_rows - row, K)
                        bad = 0
                        for k in range(0, K, BLOCK):
                            p_x = x + (row + k) * (N * D) + o_j[:, None, None] * (N * D) + o_nd[None, :, :]
                            b_x = tl.load(p_x, mask=(o_j < end - k)[:, None, None], other=0)  # [BLOCK, BN, BD]
                            bad += count_not_finite(b_x)
                        if bad > 0:
                            for w in range(n_windows):
                                forward_window(x, starts, y, window + w, b_w, o_j, o_nd, N, D, BLOCK, BLOCK)


@triton.jit(do_not_specialize=["groups", "runs", "n_runs", "n_splits", "n_programs"])
def grad_input_fused_kernel(
    dy,  # (T', N, D)
    weight,  # (BLOCK, N)
    groups,  # (n_groups, 5)
    runs,  # (n_runs, 6)
    bands,  # (n_programs, BAND), where V rows of HEADS * K begin
    poisons,  # (n_programs, HEADS * BD)
    dx,  # (T, N, D)
    dx_again,  # dx: the compiler lets a store wait for the one before to the same argument
    n_runs,
    n_splits,
    n_programs,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    SLOTS: tl.constexpr,
    V: tl.constexpr,
    K: tl.constexpr,
    FIRST: tl.constexpr,  # the column of a head's band that is a run's first row
    R: tl.constexpr,
    HEADS: tl.constexpr,
    BAND: tl.constexpr,
    BD: tl.constexpr,
    CUBE: tl.constexpr,
    GROUP: tl.constexpr,
    BR: tl.constexpr,
    RN: tl.constexpr,  # of a column of the repair
    RD: tl.constexpr,
):
    o_r = tl.arange(0, R)
    o_v = tl.arange(0, V)
    o_hk = tl.arange(0, HEADS * K)
    o_hd = tl.arange(0, HEADS * BD)
    o_z = tl.arange(0, CUBE)
    band = bands + tl.program_id(0) * BAND
    poison = poisons + tl.program_id(0) * (HEADS * BD)
    for i in range(tl.program_id(0), (N // HEADS) * (D // BD) * n_splits, n_programs):
        i_n = i // n_splits // (D // BD) * HEADS
        o_d = i // n_splits % (D // BD) * BD
        b_bad = write_band(weight, band, i_n, N, BLOCK, STRIDE, SLOTS, V, K, HEADS)
        b_band = tl.load(band + o_v[:, None] * (HEADS * K) + o_hk[None, :])  # [V, HEADS * K]
        b_poison = tl.zeros([CUBE, HEADS * BD], tl.float32)
        for i_run in range(i % n_splits, n_runs, n_splits):
            row, n_rows, window, first, end, _ = load_row_run(runs, i_run)
            p_dy = dy + window * (N * D) + o_v[:, None] * (N * D) + i_n * D + o_d + o_hd[None, :]
            b_dy = tl.load(p_dy, mask=((o_v >= first) & (o_v < end))[:, None], other=0)  # [V, HEADS * BD]
            o_dx = row * (N * D) + o_r[:, None] * (N * D) + i_n * D + o_d + tl.arange(0, BD)[None, :]
            for h in tl.static_range(HEADS):
                b_left = tl.trans(columns(b_band, h * K + FIRST, V, R))  # [R, V]
                b_dx = tl.dot(b_left, columns(b_dy, h * BD, V, BD))  # [R, BD]
                p_dx = (dx if h % 2 == 0 else dx_again) + o_dx + h * D
                tl.store(p_dx, b_dx.to(dx.dtype.element_ty), mask=(o_r < n_rows)[:, None])
            b_poison = tl.dot(tl.trans(columns(b_band, 0, V, CUBE)), b_dy, b_poison)
        tl.store(poison + o_z[:, None] * (HEADS * BD) + o_hd[None, :], b_poison, mask=(o_z < 1)[:, None])
        if is_poisoned(poison, b_bad, HEADS * BD):
            for i_n_repair in range(i_n // RN, (i_n + HEADS) // RN):
                for i_d in range(o_d // RD, (o_d + BD) // RD):
                    o_n, o_nd = column_offsets(i_n_repair, i_d, D, RN, RD)
                    bad = count_bad_weights(weight, BLOCK, o_n, N, GROUP)
                    for i_run in range(i % n_splits, n_runs, n_splits):
                        repair_rows(
                            dy, weight, groups, runs, dx, STRIDE, i_run, bad, o_n, o_nd, N, D, GROUP, BR, RN, RD
                        )


def forward(x, weight, starts, runs, tile, stride, n_programs):
    """y (T', N, D) of contiguous x (T, N, D) and weight (block, N); starts (T',) int64, T' > 0.

    runs (n_runs, 4) int64 are the runs of windows that fill the `WindowTile` tile.
    """
    (_, n, d), block = x.shape, weight.shape[0]
    y = torch.empty((starts.shape[0], n, d), dtype=x.dtype, device=x.device)
    n_splits, n_programs = splits(n // tile.heads, len(runs), n_programs)
    bands = torch.empty((n_programs, band_size(tile.windows, tile.m, tile, stride)), dtype=x.dtype, device=x.device)
    poisons = torch.empty((n_programs, tile.heads * d), dtype=torch.float32, device=x.device)
    sizes = {
        **{"N": n, "D": d, "BLOCK": block, "STRIDE": stride, "WINDOWS": tile.windows, "M": tile.m, "K": tile.k},
        **{"HEADS": tile.heads, "BAND": bands.shape[1]},
        **column_size(tile.heads, d, REPAIRED // block),
    }
    args = (x, weight, starts, runs, bands, poisons, y, x.shape[0], runs.shape[0], n_splits, n_programs)
    launch_again_after_a_crash(lambda: forward_fused_kernel[(n_programs,)](*args, **sizes))
    return y


def grad_input(dy, weight, groups, runs, tile, stride, n_rows, n_programs):
    """dx (n_rows, N, D) of contiguous dy (T', N, D) and weight (block, N); groups (n_groups, 5) int64.

    runs (n_runs, 6) int64 are the runs of rows that fill the `RowTile` tile.
    """
    (_, n, d), block = dy.shape, weight.shape[0]
    dx = torch.empty((n_rows, n, d), dtype=dy.dtype, device=dy.device)
    n_splits, n_programs = splits((n // tile.heads) * (d // tile.bd), len(runs), n_programs)
    bands = torch.empty((n_programs, band_size(tile.slots, tile.v, tile, stride)), dtype=dy.dtype, device=dy.device)
    poisons = torch.empty((n_programs, tile.heads * tile.bd), dtype=torch.float32, device=dy.device)
    column = column_size(tile.heads, tile.bd, REPAIRED // GROUP)
    sizes = {
        **{"N": n, "D": d, "BLOCK": block, "STRIDE": stride, "SLOTS": tile.slots, "V": tile.v, "K": tile.k},
        **{"FIRST": tile.first, "R": tile.r, "HEADS": tile.heads, "BAND": bands.shape[1], "BD": tile.bd, "CUBE": CUBE},
        **{"GROUP": GROUP, "BR": GROUP, "RN": column["BN"], "RD": column["BD"]},
    }
    args = (dy, weight, groups, runs, bands, poisons, dx, dx, runs.shape[0], n_splits, n_programs)
    launch_again_after_a_crash(lambda: grad_input_fused_kernel[(n_programs,)](*args, **sizes))
    return dx


def band_size(windows, rows, tile, stride):
    """Elements that `write_band` writes: the rows, or as many as the windows' and the zeros after them, if these are
    more."""
    row = tile.heads * tile.k
    return max(rows * row, windows * (row + stride))
