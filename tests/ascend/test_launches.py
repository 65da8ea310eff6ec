"""What a call costs beside its kernels: no compilation once a shape has run, and no work where nothing is to repair."""

from random import Random

import pytest
import torch
from cases import Case
from growth import Engine, Growth
from machines import A2
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from nsa import accelerator
from nsa.accelerator import Machine
from nsa.kernels import append, cube, fused, repair, vector
from nsa.table import WindowTable

CPU = torch.device("cpu")
KERNELS = [
    kernel
    for family in (vector, cube, fused, repair)
    for name, kernel in vars(family).items()
    if isinstance(kernel, JITFunction) and name.endswith("_kernel") and kernel.__module__ == family.__name__
]
VECTOR = {f"{op}_vector_kernel" for op in ("forward", "grad_input", "grad_weight")}
FUSED = {"forward_fused_kernel", "grad_input_fused_kernel", "grad_weight_cube_kernel", "grad_weight_repair_kernel"}
LAUNCHED = {("vector",): VECTOR, ("vector", "cube"): VECTOR | FUSED}  # by families, on A2 and A3
MACHINE = Machine(cube_programs=20, vector_programs=40, plan=A2)
# one window, one run, as many windows or row groups as programs; then at random, counts divisible by 16 among them
PACKS = [(32,), (40,), (32 + 15 * 16,), (32 + 31 * 16,), (640,), (32,) * 16, (33,) * 17, (64, 0, 1, 500)]
PACKS += [(32, *Random(seed).choices((0, 1, 31, 32, 48, 100, 256, 777), k=seed % 7)) for seed in range(50)]


class CountedOperators(TorchDispatchMode):
    """Inside, the names of PyTorch's operators that run are kept."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def moved(tensor, elements):
    """The same tensor so many elements into its memory, as a part of a larger one is."""
    return torch.cat([tensor.new_zeros(elements), tensor.flatten()])[elements:].view(tensor.shape)


@pytest.mark.parametrize("sizes", [(3, 32, torch.bfloat16), (2, 48, torch.float32)], ids=str)
def test_no_lengths_and_no_memory_compile_again(sizes):
    """58 packs, because Triton tells apart integers that are 1, that 16 divides, and others: every count is each once.
    Inputs and tables start at different distances from a multiple of 16 bytes."""
    families = ("vector", "cube") if sizes[2] in accelerator.HALF else ("vector",)
    kernels = [kernel for kernel in KERNELS if kernel.__name__ in LAUNCHED[families]]
    for kernel in KERNELS:
        kernel.cache.clear()
    for i, lengths in enumerate(PACKS):
        case = Case(lengths, 32, 16, *sizes)
        x, weight, dy = (moved(tensor, i * (k + 1) % 9) for k, tensor in enumerate(case.inputs))
        table = WindowTable(case.actual_seq_len, *case.geometry, CPU)
        for table_column in ("starts", "groups"):
            table.__dict__[table_column] = moved(getattr(table, table_column), i % 2)
        for family in families:
            accelerator.forward(x, weight, table, MACHINE, family)
            accelerator.grad_input(dy, weight, table, len(x), MACHINE, family)
            accelerator.grad_weight(dy, x, table, MACHINE, family)
    compiled = {kernel.__name__: len(kernel.cache[0]) for kernel in kernels}
    assert compiled == dict.fromkeys(LAUNCHED[families], 1)


def test_a_repair_is_one_launch():
    """No operator of PyTorch before or after the kernel, and no memory but for dweight."""
    case = Case((100, 64, 20, 40), 32, 16, 16, 16)
    x, weight, dy = case.inputs
    table = WindowTable(case.actual_seq_len, *case.geometry, CPU)
    y, dx = torch.randn_like(dy), torch.randn_like(x)
    tile = A2.grad_weight_tile(*case.geometry, case.n, case.d)
    starts, groups, runs, row_runs = table.starts, table.groups, table.window_runs(tile.windows), table.row_runs(32)
    partial = torch.zeros((1, case.n, tile.m, tile.k))
    before = [result.clone() for result in (y, dx)]
    with CountedOperators() as counted:
        repair.forward(x, weight, starts, y, 4)
        repair.grad_input(dy, weight, groups, row_runs, case.stride, dx, 4)
        repair.grad_weight(dy, x, starts, runs, partial, tile, *case.geometry, 4)
    assert counted.names == ["aten.empty.memory_format"]
    for result, earlier in zip((y, dx), before):
        assert torch.equal(result, earlier)


def test_on_a2_a_call_is_one_launch_and_of_dweight_two(monkeypatch):
    case = Case((100, 64, 20, 40), 32, 16, 16, 16)
    x, weight, dy = case.inputs
    table = WindowTable(case.actual_seq_len, *case.geometry, CPU)
    launched = []
    run_kernel = JITFunction.run

    def run(self, *args, **kwargs):
        launched.append(self.__name__)
        return run_kernel(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", run)
    with CountedOperators() as counted:
        accelerator.forward(x, weight, table, MACHINE, "cube")
        accelerator.grad_input(dy, weight, table, len(x), MACHINE, "cube")
        accelerator.grad_weight(dy, x, table, MACHINE, "cube")
    assert launched == ["forward_fused_kernel", "grad_input_fused_kernel", *sorted(FUSED)[-2:]]
    assert set(counted.names) <= {"aten.empty.memory_format", "aten.lift_fresh.default", "aten.detach.default"}


def test_decode_is_one_launch_and_no_step_compiles_again(monkeypatch):
    """Steps of other lengths, batches and tables, which an engine cuts out of larger ones."""
    growth = Growth(((640,) * 33,), 32, 16, 2, 32, 16, 16)
    engine = Engine(growth)
    engine.grow(growth.steps[-1])
    append.append_vector_kernel.cache.clear()
    grids = []
    run_kernel = JITFunction.run

    def run(self, *args, grid, **kwargs):
        grids.append(grid)
        return run_kernel(self, *args, grid=grid, **kwargs)

    monkeypatch.setattr(JITFunction, "run", run)
    for batch, width, most_windows in ((1, 40, 1), (2, 16, 1), (16, 1, 3), (17, 17, 1), (32, 40, 100), (33, 2, 1)):
        for length in (1, 16, 17, 31, 32, 33, 48, 640):
            before = moved(torch.full((batch,), length - 1, dtype=torch.int32), batch % 3)
            table, slots = (moved(t[:batch, :width], length % 5) for t in (engine.table, engine.cache_table))
            with CountedOperators() as counted:
                accelerator.append(
                    engine.pages, growth.weight, table, before, before + 1, slots, engine.cache, growth.stride,
                    most_windows, MACHINE,
                )  # fmt: skip
            assert counted.names == ["aten.add.Tensor"]  # of this test
    assert len(grids) == 6 * 8
    of_batches = [grids[i : i + 8] for i in range(0, 6 * 8, 8)]
    assert all(len(set(same)) == 1 for same in of_batches)  # what is launched does not depend on lengths
    assert len(append.append_vector_kernel.cache[0]) == 1
