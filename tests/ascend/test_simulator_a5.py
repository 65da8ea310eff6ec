"""A5 in the simulator: the cube kernels, by the library that the cube core has there; and what is refused."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from cases import Case
from tolerance import assert_close

from nsa import accelerator
from nsa.ascend import CompileError, find_target, simulator_driver
from nsa.ascend.hivm import parse
from nsa.ascend.simulator import intrinsics, simulate
from nsa.ascend.simulator.faults import FaultError
from nsa.ascend.simulator.machine import programs_of
from nsa.ascend.simulator.memory import DTYPES, Memory, View, row_major
from nsa.ascend.simulator.run import run
from nsa.kernels import cube
from nsa.table import WindowTable

A5 = find_target("Ascend950PR_9589")
PLAN = accelerator.chip_of(A5)


@pytest.fixture
def log():
    with simulator_driver(A5) as log:
        yield log


@pytest.mark.parametrize("dtype", accelerator.HALF)
@pytest.mark.parametrize(
    ("lengths", "geometry"),
    [
        ((80, 450, 20, 96), (32, 16, 3, 128)),  # a tail of every segment, several heads
        ((300, 129), (32, 16, 2, 256)),
        ((300, 128, 140), (128, 16, 2, 64)),
    ],
)
def test_cube_kernels(log, lengths, geometry, dtype):
    """Right, and with no fault: a fault is an error."""
    case = Case(lengths, *geometry, dtype)
    x, weight, dy = case.inputs
    table = WindowTable(case.actual_seq_len, *case.geometry, torch.device("cpu"))
    tile = PLAN.forward_tile(*geometry)
    y = cube.forward(x, weight, table.window_runs(tile.windows), tile, case.stride, case.n_windows, 3)
    tile = PLAN.grad_input_tile(*geometry)
    dx = cube.grad_input(dy, weight, table.row_runs(tile.rows), tile, case.stride, len(x), 3)
    for computed, exact, magnitude, terms in zip((y, dx), case.exact, case.magnitude, case.terms):
        assert_close(computed, exact, magnitude, terms)
    assert [launch.run.programs[0].generation for launch in log] == ["A5", "A5"]


@triton.jit
def products(a, b, c, n, M: tl.constexpr, K: tl.constexpr):
    """c[i] = a[i] @ b[i]"""
    o_m, o_k = tl.arange(0, M), tl.arange(0, K)
    for i in range(n):
        b_a = tl.load(a + i * M * K + o_m[:, None] * K + o_k[None, :])
        b_b = tl.load(b + i * K * M + o_k[:, None] * M + o_m[None, :])
        tl.store(c + i * M * M + o_m[:, None] * M + o_m[None, :], tl.dot(b_a, b_b))


def numbers(*sizes):
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0)).bfloat16()


def test_turns_go_on_from_call_to_call():
    """Products in three parts of K each: 128 rows of 384 columns, and half of L0A holds 128 of these."""
    a, b, c = numbers(3, 128, 384), numbers(3, 384, 128), torch.empty(3, 128, 128)
    report = simulate(products, {"a": a, "b": b, "c": c, "n": 3, "M": 128, "K": 384}, (1,), A5)
    assert not report.launch.faults
    assert torch.allclose(c, a.float() @ b.float(), atol=1e-3)
    (trace,) = report.launch.run.traces
    waits = [op.flag[2] for op in trace.issued if op.flag and op.flag[:2] == ("M", "MTE1") and op.kind == "wait"]
    loads = [op.writes[0].address // 32768 for op in trace.issued if op.pipe == "MTE1" and op.kind == "run"]
    turns = [0, 1, 0, 1, 0, 1, 0, 1, 0]
    assert waits == [*turns, 0, 1]  # two more at the program's end
    assert loads == [turn for turn in turns for _ in "ab"]


def run_edited(log, edited=lambda line: line):
    """`products` with an edit of the lines of its HIVM."""
    a, b, c = numbers(1, 64, 64), numbers(1, 64, 64), torch.empty(1, 64, 64)
    products[(1,)](a, b, c, 1, M=64, K=64)
    text = "".join(map(edited, log[-1].run.programs[0].module.text.splitlines(keepends=True)))
    return run(programs_of(parse(text)), [a, b, c, 1], (1, 1, 1))


def test_the_program_sets_the_flags_of_the_turns(log):
    """A2's library sets them itself where the program names no events, which on A5 it never does."""
    setting = '"hivm.hir.set_flag"() <{set_pipe = #hivm.pipe<PIPE_M>, static_event_id = #hivm.event<EVENT_ID0>'
    assert run_edited(log).faults == []
    (fault,) = run_edited(log, lambda line: "" if setting in line and "PIPE_MTE1" in line else line).faults
    assert fault.check == "deadlock"


def test_casts_that_saturate_are_refused(log):
    """The compiler sets control bit 48, so that infinity and NaN stay what they are."""
    (fault,) = run_edited(log, lambda line: line.replace("enable = true, idx = 48", "enable = false, idx = 48")).faults
    assert fault.check == "unknown operation"
    assert "no simulation of 0 in control bit 48, line" in fault.message


class Core:
    """As much of a core as mma_tile asks for; instructions are done at once."""

    def __init__(self):
        self.program, self.line = SimpleNamespace(generation="A5"), 7
        self.read = []  # of L1
        self.memories = {space: Memory(space, np.zeros(1 << 17, np.uint8)) for space in ("L1", "L0A", "L0B", "L0C")}

    def view(self, space, dtype, base, *sizes):
        return View(self.memories[space], DTYPES[dtype], base, 0, sizes, row_major(sizes))

    def synchronise(self, *_):
        pass

    barrier = synchronise

    def next_half(self):
        return 0

    def instruction(self, pipe, name, reads, writes, work, effect):
        self.read += [view for view in reads if view.memory.space == "L1"]
        effect()

    def mma_tile(self, m, k, n):
        """Of a [32, 32] and b [32, 32] in L1, into L0C."""
        a, b = self.view("L1", "bf16", 0, 2, 2, 16, 16), self.view("L1", "bf16", 2048, 2, 2, 16, 16)
        for x in (a, b):
            x.array()[:] = np.random.default_rng(0).integers(-9, 9, x.sizes)
        c = self.view("L0C", "f32", 0, 2, 2, 16, 16)
        intrinsics.call("mma_tile_bfloat16_t_to_float", self, (a, b, True, m, k, n, c, *[-1] * 7, 0))
        return [x.array().astype(np.float32).transpose(1, 2, 0, 3).reshape(32, 32) for x in (a, b)]


def test_sums_are_packed_to_the_rows_that_there_are():
    """16 rows of L0C's 32: A5's library puts the second 16 columns where the first 16 of rows 16 to 31 would be, and
    does not load the left operand's other rows."""
    core = Core()
    a, b = core.mma_tile(16, 32, 32)
    sums = core.view("L0C", "f32", 0, 2, 16, 16).array()
    assert np.array_equal(np.concatenate(sums, axis=1), a[:16] @ b)
    assert not core.view("L0C", "f32", 2048, 512).array().any()
    assert [view.sizes for view in core.read] == [(2, 1, 16, 16), (2, 2, 16, 16)]


@pytest.mark.parametrize("sizes", [(0, 32, 32), (32, 0, 32), (32, 32, 0)])
def test_nothing_to_multiply_is_refused(sizes):
    with pytest.raises(FaultError, match=r"mma_tile_bfloat16_t_to_float, line 7, demands m, n and k that are not 0"):
        Core().mma_tile(*sizes)


@triton.jit
def double(x, y, BLOCK: tl.constexpr, FACTOR: tl.constexpr):
    o = tl.arange(0, BLOCK)
    b_x = tl.load(x + o)
    tl.store(y + o, b_x if FACTOR == 1 else b_x * FACTOR)


@pytest.mark.parametrize(
    ("factor", "what"),
    [
        (2, r"hivm_regbaseintrins\.intr\.hivm\.[\w.]+ on A5, line \d+, in the vector function double_outlined_vf_0"),
        # no computation, but the library of A5's vector cores
        (1, r"load_gm_to_ubuf_1d_float on A5, line \d+, in the vector function double$"),
    ],
)
def test_vector_kernels_are_refused(log, factor, what):
    with pytest.raises(CompileError, match=rf"simulator: double: no simulation of {what}"):
        double[(1,)](torch.zeros(64), torch.zeros(64), BLOCK=64, FACTOR=factor)


def test_mix_kernels_are_refused(log):
    """dWeight's sums leave by the vector cores."""
    case = Case((100,), 32, 16, 2, 64)
    x, _, dy = case.inputs
    tile = PLAN.grad_weight_tile(32, 16, 2, 64)
    runs = WindowTable([100], 32, 16, torch.device("cpu")).window_runs(tile.windows)
    with pytest.raises(CompileError, match=r"no simulation of .* on A5, .* function grad_weight_cube_kernel_mix_aiv"):
        cube.grad_weight(dy, x, runs, tile, 2)
