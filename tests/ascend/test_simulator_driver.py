"""The simulator's Triton driver. What the op's kernels compute on it: tests/test_kernels.py --kernels simulator."""

from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import driver as triton_driver

from nsa import accelerator
from nsa.ascend import CompileError, find_target, hivm, simulator_driver
from nsa.ascend.simulator import SimulationError
from nsa.ascend.simulator import driver as simulator
from nsa.ascend.simulator.faults import FaultError

A2, A3 = "Ascend910B3", "Ascend910_9392"


@triton.jit
def scale(x, y, factor, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + o, mask=o < n, other=0).to(tl.float32) * factor, mask=o < n)


@triton.jit
def fill(y, value, BLOCK: tl.constexpr):
    tl.store(y + tl.arange(0, BLOCK), value)


@triton.jit
def copy(x, y, bias, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    b_x = tl.load(x + o)
    if bias is not None:
        b_x += tl.load(bias + o)
    tl.store(y + o, b_x)


@triton.jit
def too_large(x, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(x + o, tl.exp(tl.load(x + o)))


@pytest.fixture
def log():
    with simulator_driver(A2) as log:
        yield log


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_launch(log, dtype):
    x, y = torch.randn(300).to(dtype), torch.full((301,), -1.0)
    scale[(3,)](x, y, 7, 300, BLOCK=128)
    assert torch.equal(y[:300], x.float() * 7)
    assert y[300] == -1
    (launch,) = log
    assert (launch.kernel, launch.grid, launch.faults) == ("scale", (3, 1, 1), [])
    assert [trace.block for trace in launch.run.traces] == [0, 1, 2]


@pytest.mark.parametrize("value", [0.1, -2.5, 1, 48, -7, 2**40, True])
def test_numbers(log, value):
    """The JIT makes fp32 of floats, and a constant of 1."""
    y = torch.empty(64, dtype=torch.float32 if isinstance(value, float) else torch.int64)
    fill[(1,)](y, value, BLOCK=64)
    assert torch.equal(y, torch.full_like(y, value))


def test_an_argument_may_be_none(log):
    x, y = torch.randn(64), torch.empty(64)
    copy[(1,)](x, y, None, BLOCK=64)
    assert torch.equal(y, x)
    copy[(1,)](x, y, x, BLOCK=64)
    assert torch.equal(y, 2 * x)


def test_all_faults_are_told_after_the_launch(log):
    """Three programs of four read and write past the end of the tensors, which have room for one and a half."""
    x, y = torch.randn(96), torch.zeros(96)
    with pytest.raises(
        SimulationError, match=r"scale on a grid of \(4, 1, 1\):\naccess outside: block 1: .* of x"
    ) as told:
        scale[(4,)](x, y, 2, 256, BLOCK=64)
    assert [fault.check for fault in told.value.faults] == ["access outside"] * 3
    assert log == [told.value.launch]
    assert torch.equal(y[:64], 2 * x[:64])


def test_what_checks_find_is_a_fault(log):
    x, y = torch.randn(64), torch.zeros(64)
    fault = simulator.Fault("race on chip", "two at once")
    with mock.patch.object(simulator.checks, "check", return_value=[fault]), pytest.raises(SimulationError) as told:
        scale[(1,)](x, y, 2, 64, BLOCK=64)
    assert told.value.faults == [fault]


def test_a_second_launch_parses_nothing(log):
    x, y = torch.randn(64), torch.zeros(64)
    scale[(1,)](x, y, 2, 64, BLOCK=64)
    with mock.patch.object(simulator, "parse", side_effect=AssertionError), simulator_driver(A2) as other:
        scale[(1,)](x, y, 2, 64, BLOCK=64)
    assert (len(log), len(other)) == (1, 1)


def test_each_target_has_its_own_program():
    x, y = torch.randn(64), torch.zeros(64)
    seen = []
    for name in (A2, A3, A2):
        with simulator_driver(find_target(name)) as log:
            scale[(1,)](x, y, 2, 64, BLOCK=64)
            seen.append(log[0].run.programs[0])
    assert seen[0] is seen[2]
    cores = [hivm.header_of(program.module)["VECTOR_CORE_COUNT"] for program in seen]
    assert cores == [40, 48, 40]


def test_driver_is_restored():
    before = triton_driver.active
    with simulator_driver(A2):
        assert triton_driver.active is not before
    assert triton_driver.active is before


class Npu(NamedTuple):
    """As much of a torch.device as is looked at."""

    index: int
    type: str = "npu"


@pytest.mark.parametrize("name", [A2, A3, "Ascend950PR_9589"])
def test_launchers_see_the_chip(name):
    """Though what a device is was asked before, outside; and outside it is what it was."""
    target, outside = find_target(name), accelerator.machine_of(Npu(0))
    with simulator_driver(name):
        machine = accelerator.machine_of(Npu(0))
    assert machine == (target.cube_cores, target.vector_cores, accelerator.chip_of(target))
    assert accelerator.machine_of(Npu(0)) == outside != machine


def test_errors_say_what_is_wrong(log):
    x, y = torch.randn(64), torch.zeros(64)
    with (
        pytest.raises(ValueError, match=r"expected a target, one of Ascend910B1.*, got 'H200'"),
        simulator_driver("H200"),
    ):
        pass
    with pytest.raises(RuntimeError, match=r"expected CPU tensors inside simulator_driver\(\), got one on meta"):
        scale[(1,)](torch.empty(64, device="meta"), y, 2, 64, BLOCK=64)
    with pytest.raises(TypeError, match=r"expected a tensor, or a number of Python's own, got numpy.float32"):
        copy[(1,)](x, y, np.float32(0.5), BLOCK=64)  # Triton takes what has a dtype for a pointer
    with pytest.raises(CompileError, match=r"(?s)hivm: .*ub overflow"):
        too_large[(1,)](torch.zeros(1 << 20), BLOCK=1 << 20)
    with pytest.raises(CompileError, match="ttir: "):
        scale[(1,)](x, y, x, 64, BLOCK=64)
    scale.cache.clear()
    unknown = FaultError("unknown operation", "no simulation of hivm.hir.dance, line 3")
    with (
        mock.patch.object(simulator, "programs_of", side_effect=unknown),
        pytest.raises(CompileError, match=r"simulator: scale: no simulation of hivm.hir.dance, line 3"),
    ):
        scale[(1,)](x, y, 2, 64, BLOCK=64)
    assert log == []
