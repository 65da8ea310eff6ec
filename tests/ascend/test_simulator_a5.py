"""A5 in the simulator: the forward and dInput on the cube, as A5's library multiplies; an error for vector code."""

import pytest
import torch

from nsa import accelerator, reference
from nsa.ascend import CompileError, find_target, simulator_driver
from nsa.kernels import cube
from nsa.table import WindowTable

A5 = find_target("Ascend950PR_9589")
BLOCK, STRIDE, ENDS, N, D, PROGRAMS = 32, 16, [100, 700], 2, 128, 3


def numbers(*sizes, dtype=torch.bfloat16):
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0)).to(dtype)


def simulated(dtype):
    """(log, x, weight, dy, y, dx) of the cube kernels as `nsa.accelerator` launches them on an A5 chip.

    What follows them there, the repair kernels, is vector code.
    """
    table, chip = WindowTable(ENDS, BLOCK, STRIDE, torch.device("cpu")), accelerator.chip_of(A5)
    x, weight, dy = (numbers(*sizes, dtype=dtype) for sizes in ((ENDS[-1], N, D), (BLOCK, N), (table.n_windows, N, D)))
    tile, row_tile = chip.forward_tile(BLOCK, STRIDE, N, D), chip.grad_input_tile(BLOCK, STRIDE, N, D)
    with simulator_driver(A5) as log:
        y = cube.forward(x, weight, table.window_runs(tile.windows), tile, STRIDE, table.n_windows, PROGRAMS)
        dx = cube.grad_input(dy, weight, table.row_runs(row_tile.rows), row_tile, STRIDE, len(x), PROGRAMS)
    return log, x, weight, dy, y, dx


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_cube_kernels_are_right(dtype):
    _, x, weight, dy, y, dx = simulated(dtype)
    x = x.double().requires_grad_()
    exact = reference.nsa_compress(x, weight.double(), BLOCK, STRIDE, actual_seq_len=ENDS)
    torch.testing.assert_close(y, exact.to(dtype))
    torch.testing.assert_close(dx, torch.autograd.grad(exact, x, dy.double())[0].to(dtype))


def test_the_halves_of_l0_take_turns_over_the_whole_program():
    """Each product of dInput is one part; the program has set a flag for each half."""
    (_, grad_input), *_ = simulated(torch.bfloat16)
    several = 0
    for trace in grad_input.run.traces:
        products = [operation for operation in trace.ran if operation.kind == "run" and operation.pipe == "M"]
        halves = [view.address for each in products for view in each.reads if view.memory.space == "L0A"]
        assert halves == [i % 2 * A5.l0a // 2 for i in range(len(products))]
        sets = [operation.flag[2] for operation in trace.issued if (operation.flag or ())[:2] == ("M", "MTE1")]
        assert len(sets) == 2 * (len(products) + 2)  # a set and a wait of each
        several += len(products) > 2
    assert several


def test_vector_code_is_an_error_that_names_function_and_operation():
    table = WindowTable(ENDS, BLOCK, STRIDE, torch.device("cpu"))
    machine = accelerator.Machine(PROGRAMS, PROGRAMS, accelerator.chip_of(A5))
    message = (
        r"simulator: forward_vector_kernel: no simulation of hivm_regbaseintrins\.intr\.hivm\.\S+, line \d+, "
        r"in the vector function forward_vector_kernel_outlined_vf_\d"
    )
    with simulator_driver(A5) as log, pytest.raises(CompileError, match=message):
        accelerator.forward(numbers(ENDS[-1], N, D), numbers(BLOCK, N), table, machine, "vector")
    assert log == []
