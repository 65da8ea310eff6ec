"""What is not finite, one element at a time: each repair kernel has to look at all that could make it wrong, and at no
more; and it has to find it at any offset.

Run by Triton's interpreter, or with `--kernels host` as native code by way of the Ascend toolchain.
"""

import pytest
import torch
import triton.language as tl
from cases import Case
from machines import machine
from tolerance import assert_close

from nsa import accelerator
from nsa.kernels import repair, tiles, vector
from nsa.table import WindowTable

CPU = torch.device("cpu")
INPUTS = ("x", "weight", "dy")


@pytest.fixture
def interpreted(request):
    return request.config.getoption("--kernels") == "interpreter"


# 67 windows. The forward looks at y in blocks of 32 windows: 0 to 31, 32 to 63, 64 to 66. Its runs are windows 0 to 63
# and 64 to 66. dInput's runs are rows 0 to 1023 with windows 0 to 63, and the rest with windows 63 to 66; it looks at
# weight and dy in blocks of 16, so that windows 15 and 16 are the last and the first of two blocks.
BLOCKS = Case((1100,), 32, 16, 1, 16)
# The second segment has windows 31 to 34, which are a run. Its last row, which window 34 alone holds, makes NaN of all
# four. The forward looks at windows 0 to 31 together, of which window 31 alone is bad.
ONE_OF_A_BLOCK = Case((512, 80), 32, 16, 1, 16)
COLUMNS = Case((160,), 128, 16, 2, 80)  # a block has 16 of the 80 elements of a head, in dInput all
HEADS = Case((64, 50), 32, 16, 6, 16)  # a block has all heads

BAD = [
    *((BLOCKS, "x", (row, 0, row % 16)) for row in (0, 1023, 1087)),
    *((BLOCKS, "dy", (window, 0, window % 16)) for window in (0, 15, 16, 63, 64, 66)),
    *((BLOCKS, "weight", (tap, 0)) for tap in (15, 16, 31)),
    (ONE_OF_A_BLOCK, "x", (591, 0, 5)),
    (COLUMNS, "x", (159, 1, 79)),
    (COLUMNS, "dy", (2, 1, 79)),
    (COLUMNS, "weight", (127, 1)),
    (HEADS, "x", (95, 5, 15)),
    (HEADS, "dy", (3, 5, 15)),
    (HEADS, "weight", (31, 5)),
]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize(("case", "which", "where"), BAD, ids=lambda value: str(value).replace(" ", ""))
def test_one_bad_element(guarded, interpreted, case, which, where):
    """Each at one end of a block, of a run, or of a tensor; in the two ops that read it."""
    inputs = dict(zip(INPUTS, case.inputs))
    inputs[which] = inputs[which].clone()
    inputs[which][where] = torch.nan
    case = case.with_inputs(*inputs.values())
    x, weight, dy = map(guarded.copy, case.inputs)
    table = WindowTable(case.actual_seq_len, *case.geometry, CPU)
    how = {"machine": machine(2, interpreted), "family": "cube"}
    ops = {
        0: lambda: accelerator.forward(x, weight, table, **how),
        1: lambda: accelerator.grad_input(dy, weight, table, len(x), **how),
        2: lambda: accelerator.grad_weight(dy, x, table, **how),
    }
    for i in {"x": (0, 2), "weight": (0, 1), "dy": (1, 2)}[which]:
        assert_close(ops[i](), case.exact[i], case.magnitude[i], case.terms[i])


FAR = Case((48,), 48, 16, 8, 256, torch.float16)
N_FAR = 2**31 // (FAR.n * FAR.d) + 1000  # rows or windows of more than 2^31 elements, most of them untouched memory


def test_dy_past_2_31():
    """One program of dWeight visits the first window and the last."""
    x, _, dy = FAR.inputs
    far = torch.empty((N_FAR, FAR.n, FAR.d), dtype=FAR.dtype)
    far[0], far[-1:] = 0, dy
    starts = torch.zeros(N_FAR, dtype=torch.int64)
    partial = torch.empty((1, FAR.block, FAR.n))
    bj, sizes = tiles.sums_block(FAR.block, FAR.n, FAR.d, FAR.dtype.itemsize)
    vector.grad_weight_vector_kernel[(1,)](
        far, x, starts, partial, N_FAR, N_FAR - 1,
        N=FAR.n, D=FAR.d, BLOCK=FAR.block, BJ=bj, **sizes, ACC=tl.float32,
    )  # fmt: skip
    assert_close(partial[0].to(FAR.dtype), FAR.exact[2], FAR.magnitude[2], FAR.terms[2])


def test_forward_repair_past_2_31():
    """One program looks at the first block of windows and at the last."""
    x, weight, _ = FAR.inputs
    sizes = tiles.window_block(FAR.block, FAR.n, FAR.d, FAR.dtype.itemsize)
    y = torch.empty((N_FAR, FAR.n, FAR.d), dtype=FAR.dtype)
    y[:64], y[-64:] = 1, 1
    y[-1] = torch.nan
    starts = torch.zeros(N_FAR, dtype=torch.int64)
    n_programs = (N_FAR - 1) // sizes["BJ"]  # so many blocks from the first to the last
    repair.forward_repair_kernel[(1,)](x, weight, starts, y, N_FAR, n_programs, N=FAR.n, D=FAR.d, **sizes)
    assert_close(y[-1:], FAR.exact[0], FAR.magnitude[0], FAR.terms[0])
    assert (y[:64] == 1).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
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
