"""The host driver itself. What kernels compute on it: tests/test_kernels.py --kernels host."""

import subprocess
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import driver

from nsa.ascend import host
from nsa.ascend.compile import CompileError


@triton.jit
def scale(x, y, factor, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + o, mask=o < n, other=0).to(tl.float32) * factor, mask=o < n)


@triton.jit
def where_am_i(y, X: tl.constexpr, Y: tl.constexpr):
    i_x, i_y, i_z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tl.store(y + (i_z * Y + i_y) * X + i_x, i_x + 10 * i_y + 100 * i_z)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("factor", [1, 3, 16])  # the JIT makes a constant of 1, and knows that 16 divides 16
def test_arguments(dtype, factor):
    x, y = torch.randn(1000).to(dtype), torch.full((1001,), -1.0)
    scale[(8,)](x, y, factor, 1000, BLOCK=128)
    assert torch.equal(y[:1000], x.float() * factor)
    assert y[1000] == -1


def test_grid_of_three_dimensions():
    y = torch.full((2, 3, 4), -1, dtype=torch.int32)
    where_am_i[(4, 3, 2)](y, X=4, Y=3)
    expected = torch.arange(4) + 10 * torch.arange(3)[:, None] + 100 * torch.arange(2)[:, None, None]
    assert torch.equal(y, expected.int())


def test_bf16_is_rounded_to_nearest_even():
    values = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 3.4e38, 1e-40, float("inf"), -0.0])
    x, y = torch.cat([values, -values]), torch.empty(16, dtype=torch.bfloat16)
    scale[(1,)](x, y, 1, 16, BLOCK=16)
    assert torch.equal(y.view(torch.int16), x.bfloat16().view(torch.int16))
    scale[(1,)](torch.full((16,), torch.nan), y, 1, 16, BLOCK=16)
    assert y.isnan().all()


def test_compiled_library_is_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x, y = torch.randn(64), torch.empty(64)
    for forget in range(2):
        scale.cache.clear()
        with mock.patch.object(subprocess, "run", side_effect=AssertionError if forget else subprocess.run):
            scale[(1,)](x, y, 5, 64, BLOCK=64)
    assert torch.equal(y, 5 * x)


def test_driver_is_restored():
    def fails_inside():
        with host.host_driver():
            inside.append(driver.active)
            raise KeyError

    before, inside = driver.active, []
    with pytest.raises(KeyError):
        fails_inside()
    assert inside[0] is not before
    assert driver.active is before


def test_errors_say_what_is_wrong(monkeypatch, tmp_path):
    with pytest.raises(RuntimeError, match=r"expected CPU tensors inside host_driver.*, got one on meta"):
        host._slot(torch.empty(3, device="meta"))
    with pytest.raises(CompileError, match=r"bishengir-opt: .*'this' is unknown"):
        host._to_llvm_dialect("this is no MLIR", tmp_path)
    with pytest.raises(CompileError, match="expected pointer and integer arguments, got f32 in k"):
        host._definitions("k", "func.func @k(%arg0: i1, %arg1: i1, %arg2: f32, " + "%arg3: i32, " * 6 + ") attributes")
    with pytest.raises(RuntimeError, match="say nothing of an NPU"):
        driver.active.get_benchmarker()
    monkeypatch.setattr(host.platform, "machine", lambda: "aarch64")
    with pytest.raises(RuntimeError, match=r"expected an x86-64 machine .*, got aarch64"):
        host.processor()
