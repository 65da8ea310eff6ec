"""What is not finite, one element at a time: each repair kernel has to look at all that could make it wrong, and at no
more. At offsets past 2^31: tests/ascend/test_offsets.py.

Run by Triton's interpreter, with `--kernels host` as native code by way of the Ascend toolchain, or a sample of them
with `--kernels simulator` in the simulator of Ascend chips, which also looks for what has no order.
"""

from time import process_time

import pytest
import torch
from cases import Case
from machines import machine
from tolerance import assert_close

from nsa import accelerator
from nsa.kernels import repair
from nsa.table import WindowTable

CPU = torch.device("cpu")
INPUTS = ("x", "weight", "dy")


# 67 windows. The forward looks at y in blocks of 32 windows: 0 to 31, 32 to 63, 64 to 66. Its runs are windows 0 to 63
# and 64 to 66. dInput's runs are rows 0 to 1023 with windows 0 to 63, and the rest with windows 63 to 66; it looks at
# weight and dy in blocks of 16, so that windows 15 and 16 are the last and the first of two blocks. The fused forward
# looks at x in blocks of 32 rows; its runs are 16 windows and 272 rows, from rows 0, 256, 512 on, and of two programs
# the first has the first two of five.
BLOCKS = Case((1100,), 32, 16, 1, 16)
# The second segment has windows 31 to 34, which are a run. Its last row, which window 34 alone holds, makes NaN of all
# four. The forward looks at windows 0 to 31 together, of which window 31 alone is bad.
ONE_OF_A_BLOCK = Case((512, 80), 32, 16, 1, 16)
COLUMNS = Case((160,), 128, 16, 2, 80)  # a block has 16 of the 80 elements of a head, in dInput all
HEADS = Case((64, 50), 32, 16, 6, 16)  # a block has all heads
# The fused kernels have items of 2 of the 4 heads, and of 128 of the 256 elements of dInput.
ITEMS = Case((64, 50), 32, 16, 4, 128)
HALVES = Case((160,), 128, 16, 1, 256)

BAD = [
    *((BLOCKS, "x", (row, 0, row % 16)) for row in (0, 31, 32, 271, 272, 527, 528, 1087)),
    *((BLOCKS, "dy", (window, 0, window % 16)) for window in (0, 15, 16, 63, 66)),
    *((BLOCKS, "weight", (tap, 0)) for tap in (15, 16)),
    (ONE_OF_A_BLOCK, "x", (591, 0, 5)),
    (COLUMNS, "x", (159, 1, 79)),
    (COLUMNS, "dy", (2, 1, 79)),
    (COLUMNS, "weight", (127, 1)),
    (HEADS, "x", (95, 5, 15)),
    (HEADS, "dy", (3, 5, 15)),
    (HEADS, "weight", (31, 5)),
    (HEADS, "x", (113, 0, 0)),  # in no window, but loaded with the first segment's
    (ITEMS, "x", (63, 1, 127)),
    (ITEMS, "x", (64, 2, 0)),
    (ITEMS, "dy", (2, 1, 127)),
    (ITEMS, "dy", (3, 2, 0)),
    (ITEMS, "weight", (31, 1)),
    (ITEMS, "weight", (0, 2)),
    (HALVES, "dy", (0, 0, 127)),
    (HALVES, "dy", (2, 0, 128)),
    (HALVES, "weight", (0, 0)),
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


def test_what_is_finite_is_left_alone(interpreted):
    """Results that are finite but wrong stay as they are: so that it shows, all of them are 1."""
    x, weight, dy = (tensor.clone() for tensor in BLOCKS.inputs)
    table = WindowTable(BLOCKS.actual_seq_len, *BLOCKS.geometry, CPU)
    y, dx = torch.ones_like(dy), torch.ones_like(x)
    runs = table.row_runs(machine(1, interpreted).plan.grad_input_tile(*BLOCKS.geometry, BLOCKS.n, BLOCKS.d).rows)
    repair.forward(x, weight, table.starts, y, 2)
    repair.grad_input(dy, weight, table.groups, runs, BLOCKS.stride, dx, 2)
    assert (y == 1).all()
    assert (dx == 1).all()

    # in the second of three blocks of windows, and in the first of the runs of rows
    y[40, 0, 3], dy[20, 0, 3] = torch.nan, torch.nan
    repair.forward(x, weight, table.starts, y, 2)
    assert (y[:32] == 1).all()
    assert_close(y[32:64], *(t[32:64] for t in (BLOCKS.exact[0], BLOCKS.magnitude[0])), BLOCKS.terms[0])
    assert (y[64:] == 1).all()
    repair.grad_input(dy, weight, table.groups, runs, BLOCKS.stride, dx, 2)
    assert (dx[1024:] == 1).all()
    assert (dx[320:352, 0, 4] != 1).all()  # the rows of window 20; on a GPU runs are shorter


def test_finite_dweight_is_not_summed_again(slow):
    """It does not show in the result, but in processor time: to sum along the band is far less work than over all."""
    case = Case((1616,), 32, 16, 2, 64) if slow else Case((16016,), 32, 16, 8, 128)
    x, _, dy = case.inputs
    table = WindowTable(case.actual_seq_len, *case.geometry, CPU)
    tile = machine(1, slow).plan.grad_weight_tile(*case.geometry, case.n, case.d)
    runs = table.window_runs(tile.windows)

    def seconds(value):
        times = []
        for _ in range(3):
            partial = torch.full((1, case.n, tile.m, tile.k), value)
            start = process_time()
            dw = repair.grad_weight(dy, x, table.starts, runs, partial, tile, *case.geometry, 1)
            times.append(process_time() - start)
        assert dw.isfinite().all()
        return min(times)

    assert seconds(1.0) < seconds(torch.nan) / 4
