"""Mix kernels of A2 and A3 in the simulator: a cube core and two vector cores that wait for each other."""

from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from nsa.ascend import simulator_driver
from nsa.ascend.hivm import parse
from nsa.ascend.simulator import checks
from nsa.ascend.simulator.faults import FaultError
from nsa.ascend.simulator.machine import programs_of
from nsa.ascend.simulator.run import run
from nsa.ascend.simulator.team import MOST_SETS, Team
from nsa.ascend.simulator.trace import Operation

A2, A3 = "Ascend910B3", "Ascend910_9392"
M, N, K = 32, 64, 48
CUBE, VECTOR = "tcore_type<CUBE>", "tcore_type<VECTOR>"


@triton.jit
def relu(a, b, c, n, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """Of every program's n products: c = max(a @ b, 0), and what the cube makes goes to the vector cores by memory."""
    o_m, o_n, o_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    for i in range(tl.program_id(0) * n, tl.program_id(0) * n + n):
        b_a = tl.load(a + i * M * K + o_m[:, None] * K + o_k[None, :])
        b_b = tl.load(b + i * K * N + o_k[:, None] * N + o_n[None, :])
        b_c = tl.maximum(tl.dot(b_a, b_b), 0)
        tl.store(c + i * M * N + o_m[:, None] * N + o_n[None, :], b_c.to(c.dtype.element_ty))


@triton.jit
def row_sums(a, b, c, n, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    o_m, o_n, o_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    for i in range(n):
        b_a = tl.load(a + i * M * K + o_m[:, None] * K + o_k[None, :])
        b_b = tl.load(b + i * K * N + o_k[:, None] * N + o_n[None, :])
        tl.store(c + i * M + o_m, tl.sum(tl.dot(b_a, b_b), 1))


@triton.jit
def again(a, b, c, n, M: tl.constexpr, N: tl.constexpr):
    """c = a @ max(a @ b, 0): the left operand serves twice, and between the vector cores make the right one."""
    o_m, o_n = tl.arange(0, M), tl.arange(0, N)
    b_a = tl.load(a + o_m[:, None] * M + o_m[None, :])
    for i in range(n):
        o = i * M * N + o_m[:, None] * N + o_n[None, :]
        b_b = tl.maximum(tl.dot(b_a, tl.load(b + o)), 0)
        tl.store(c + o, tl.dot(b_a, b_b.to(a.dtype.element_ty)))


def numbers(*sizes):
    """Small integers, of which bf16 and sums in fp32 lose nothing."""
    return torch.randint(-3, 4, sizes, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.fixture
def log():
    with simulator_driver(A2) as log:
        yield log


@pytest.fixture
def tensors():
    """a, b, and room for c, of four products."""
    return numbers(4, M, K), numbers(4, K, N), torch.empty(4, M, N)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("target", [A2, A3])
def test_vector_work_on_products(tensors, target, dtype):
    a, b, c = tensors
    c = c.to(dtype)
    with simulator_driver(target) as log:
        relu[(2,)](a, b, c, 2, M=M, N=N, K=K)
    assert torch.equal(c, (a.float() @ b.float()).relu().to(dtype))
    cores = [(trace.block, trace.core_type, trace.sub_block) for trace in log[0].run.traces]
    assert cores == [(block, *core) for block in range(2) for core in [("AIC", 0), ("AIV", 0), ("AIV", 1)]]


def test_sums_of_products(log, tensors):
    """Both vector cores make them, and the first one stores them."""
    a, b, _ = tensors
    c = torch.empty(4, M)
    row_sums[(1,)](a, b, c, 4, M=M, N=N, K=K)
    assert torch.equal(c, (a.float() @ b.float()).sum(-1))
    written = [{view.memory.name for op in trace.issued for view in op.writes} for trace in log[0].run.traces]
    assert ["c" in names for names in written] == [False, True, False]


def test_a_left_operand_serves_again(log):
    """triton-ascend 3.2.1 is said to have overwritten it in such a loop."""
    a, b, c = numbers(M, M), numbers(3, M, N), torch.empty(3, M, N)
    again[(1,)](a, b, c, 3, M=M, N=N)
    assert torch.equal(c, a.float() @ (a.float() @ b.float()).relu())


def test_the_workspace(log, tensors):
    """Four buffers for products for each block, which the cube fills in turn while the vector cores read others."""
    relu[(2,)](*tensors, 2, M=M, N=N, K=K)
    cube, vector = log[0].run.programs
    assert (cube.core_type, cube.workspace, vector.workspace) == ("AIC", 4 * 4 * M * N, 4 * 4 * M * N)
    used = [
        {view.address for op in trace.issued for view in (*op.reads, *op.writes) if view.memory.name == "workspace"}
        for trace in log[0].run.traces
    ]
    first = {0, 4 * M * N}
    assert used[0] == first
    assert used[3] == {address + cube.workspace for address in first}


def run_without(log, tensors, *fragments):
    """`relu` in one program, without the lines of its HIVM that have all of one of the lists of fragments."""
    n = len(tensors[0])
    relu[(1,)](*tensors, n, M=M, N=N, K=K)
    kept = [
        line
        for line in log[-1].run.programs[0].module.text.splitlines(keepends=True)
        if not any(all(fragment in line for fragment in each) for each in fragments)
    ]
    done = run(programs_of(parse("".join(kept))), [*tensors, n], (1, 1, 1))
    return [*done.faults, *checks.check(done)]


READY, FREE = ("static_flag_id = 4", "PIPE_FIX"), ("sync_block", "tpipe = #hivm.pipe<PIPE_MTE2>")


def test_a_wait_without_a_set(log, tensors):
    assert run_without(log, tensors) == []
    fault, *_ = run_without(log, tensors, (*READY, CUBE))
    assert fault.check == "deadlock"
    assert fault.message.startswith("block 0: these wait for ever: block 0, AIC 0: sync_block_wait[team, 0] on S, line")
    assert "; block 0, AIV 0: sync_block_wait[team, 4] on S, line" in fault.message
    assert "; block 0, AIV 1: sync_block_wait[team, 4] on S, line" in fault.message


def test_a_set_without_a_wait(log, tensors):
    fault, *_ = run_without(log, tensors, (*READY, VECTOR))
    assert fault.check == "flag left set"
    assert fault.message == "block 0: block 0, AIV 0 never waited for flag 4 of block 0, AIC 0"


@pytest.mark.parametrize("flags", [READY, FREE])
def test_no_order_in_the_workspace(log, tensors, flags):
    """Of the vector cores' reads after the cube's writes, or of the writes of the fifth product after the reads of the
    first, in the same buffer."""
    faults = run_without(log, [torch.cat([tensor, tensor]) for tensor in tensors], flags)
    assert "race in memory" in {fault.check for fault in faults if "workspace" in fault.message}


class Core:
    """Sets flag 3 and waits for it as a list says, and writes down what it has done."""

    def __init__(self, name, steps, done):
        self.name, self.steps, self.done = name, steps, done
        self.program = SimpleNamespace(core_type=name[:3])

    def run(self, _):
        for step in self.steps:
            if step == "set":
                self.team.post(self, 3)
            else:
                self.team.wait(self, Operation("team wait", "S", "wait", 1, flag=("team", 3)))
            self.done.append((self.name, step))


def run_team(cube, *vectors):
    """What the cores of a team did, in order."""
    done = []
    cores = [Core("AIC 0", cube, done), *(Core(f"AIV {i}", steps, done) for i, steps in enumerate(vectors))]
    Team(cores).run(dict.fromkeys(cores))
    return done


def test_the_cube_waits_for_both_vector_cores():
    done = run_team(["wait"], ["set"], ["set"])
    assert done == [("AIV 0", "set"), ("AIV 1", "set"), ("AIC 0", "wait")]
    with pytest.raises(FaultError, match="deadlock: these wait for ever: AIC 0: wait"):
        run_team(["wait"], ["set"], [])


def test_each_vector_core_waits_for_the_cube():
    done = run_team(["set"], ["wait"], ["wait"])
    assert done == [("AIC 0", "set"), ("AIV 0", "wait"), ("AIV 1", "wait")]
    with pytest.raises(FaultError, match="flag left set: AIV 1 never waited for flag 3 of AIC 0"):
        run_team(["set"], ["wait"], [])


def test_a_flag_counts_no_further_than_it_can():
    most = ["set"] * MOST_SETS, ["wait"] * MOST_SETS
    assert len(run_team(most[0], most[1], most[1])) == 3 * MOST_SETS
    with pytest.raises(FaultError, match="flag set twice: AIC 0 sets flag 3 again, which counts to 15, and AIV 0 has"):
        run_team([*most[0], "set"], [*most[1], "wait"], [*most[1], "wait"])
