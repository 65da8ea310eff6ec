"""Offsets past 2^31 elements that kernels form from a loop's counter, which has 32 bits.

Only native code shows a missing cast: Triton's interpreter counts in Python. For x: tests/test_kernels.py.
"""

import numpy as np
import torch
import triton.language as tl
from cases import Case
from machines import A2
from tolerance import assert_close

from nsa.kernels import repair, tiles, vector

FAR = Case((48,), 48, 16, 8, 256, torch.float16)
N_FAR = 2**31 // (FAR.n * FAR.d) + 1000  # rows or windows of more than 2^31 elements, most of them untouched memory


def test_dy_past_2_31():
    """One program of dWeight visits the first window and the last."""
    x, _, dy = FAR.inputs
    far = torch.empty((N_FAR, FAR.n, FAR.d), dtype=FAR.dtype)
    far[0], far[-1:] = 0, dy
    starts = torch.zeros(N_FAR, dtype=torch.int64)
    partial = torch.empty((1, FAR.block, FAR.n))
    sizes = tiles.window_block(FAR.block, FAR.n, FAR.d, x.element_size())
    vector.grad_weight_vector_kernel[(1,)](
        far, x, starts, partial, N_FAR, N_FAR - 1, N=FAR.n, D=FAR.d, **sizes, ACC=tl.float32
    )
    assert_close(partial[0].to(FAR.dtype), FAR.exact[2], FAR.magnitude[2], FAR.terms[2])


def test_forward_repair_past_2_31():
    """One program looks at the first block of windows and at the last."""
    x, weight, _ = FAR.inputs
    sizes = tiles.window_block(FAR.block, FAR.n, FAR.d, x.element_size())
    y = torch.empty((N_FAR, FAR.n, FAR.d), dtype=FAR.dtype)
    y[:64], y[-64:] = 1, 1
    y[-1] = torch.nan
    starts = torch.zeros(N_FAR, dtype=torch.int64)
    n_programs = (N_FAR - 1) // sizes["BJ"]  # so many blocks from the first to the last
    repair.forward_repair_kernel[(1,)](x, weight, starts, y, N_FAR, n_programs, N=FAR.n, D=FAR.d, **sizes)
    assert_close(y[-1:], FAR.exact[0], FAR.magnitude[0], FAR.terms[0])
    assert (y[:64] == 1).all()


def test_grad_input_repair_past_2_31():
    """The last window and the last rows; the window is in slot 2 of their run."""
    x, weight, dy = FAR.inputs
    dy = dy.clone()
    dy[0, :, 4] = torch.nan  # of every head, so that every block of dx is computed again
    case = FAR.with_inputs(x, weight, dy)
    far, dx = (torch.empty((N_FAR, FAR.n, FAR.d), dtype=FAR.dtype) for _ in range(2))
    far[-1:], dx[-48:] = dy, torch.nan
    groups = torch.tensor([[N_FAR - 48 + i, 16, N_FAR - 1, N_FAR, i] for i in (0, 16, 32)])
    run = torch.tensor([[N_FAR - 48, 48, N_FAR - 3, 2, 3, 0]])
    repair.grad_input(far, weight, groups, run, FAR.stride, dx, 1)
    assert_close(dx[-48:], case.exact[1], case.magnitude[1], case.terms[1])


def test_grad_weight_repair_past_2_31():
    """The last window of many: of the last head alone, whose taps are not finite."""
    case = Case((16,), 16, 16, 128, 256, torch.float16)
    x, _, dy = case.inputs
    n_windows = 2**31 // (case.n * case.d) + 10
    far = torch.from_numpy(np.zeros((n_windows, case.n, case.d), np.float16))  # untouched memory, which reads as zeros
    far[-1:] = dy
    tile = A2.grad_weight_tile(*case.geometry, case.n, case.d)
    partial = torch.zeros((1, case.n, tile.m, tile.k))
    partial[:, -1] = torch.nan
    starts, runs = torch.zeros(n_windows, dtype=torch.int64), torch.tensor([[0, 16, 0, 1]])
    dw = repair.grad_weight(far, x, starts, runs, partial, tile, *case.geometry, 1)
    assert_close(dw[:, -1], case.exact[2][:, -1], case.magnitude[2][:, -1], case.terms[2])
    assert (dw[:, :-1] == 0).all()
