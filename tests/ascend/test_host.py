"""The host driver itself. What kernels compute on it: tests/test_kernels.py --kernels host."""

import ctypes
import os
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import driver

from nsa import files
from nsa.ascend import host
from nsa.ascend.compile import CompileError
from nsa.ascend.launches import DTYPES


@triton.jit
def scale(x, y, factor, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + o, mask=o < n, other=0).to(tl.float32) * factor, mask=o < n)


@triton.jit
def add_scalar(x, y, scalar, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + o) + scalar)


@triton.jit
def count(out, values, n):
    o = tl.arange(0, 16)
    for i in range(n):
        tl.atomic_add(out + o, tl.load(values + o + i % 2))


@triton.jit
def fill(y, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + o, BLOCK, mask=o < n)


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


def test_a_float_of_python_is_fp32():
    x, y = torch.randn(64), torch.empty(64)
    for factor in (0.1, -2.5, float("inf"), float("nan")):
        scale[(1,)](x, y, factor, 64, BLOCK=64)
        torch.testing.assert_close(y, x * factor, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("type_", ["fp16", "bf16", "fp32", "fp64"])
def test_float_scalars_of_every_type(type_):
    """The JIT makes fp32 of Python's floats; other types are for who compiles a kernel by its signature."""
    signature = {"x": f"*{type_}", "y": f"*{type_}", "scalar": type_}
    source = triton.compiler.ASTSource(add_scalar, signature, {"BLOCK": 64})
    kernel = triton.compile(source, target=driver.active.get_current_target())
    dtype = DTYPES[type_]
    x, y = torch.randn(64, dtype=torch.float64).to(dtype), torch.empty(64, dtype=dtype)
    kernel[(1, 1, 1)](x, y, 0.7, stream=0)
    assert torch.equal(y, x + torch.tensor(0.7, dtype=torch.float64).to(dtype))


def test_atomics_of_many_programs_lose_nothing():
    """Lowered code adds by a load, an addition and a store: two threads lose sums, now and then a fifth of them."""
    out, rounds = torch.zeros(16), 100_000
    with mock.patch.object(host, "_threads", wraps=host._threads) as threads:
        count[(8,)](out, torch.ones(32), rounds)
        assert list(threads.map.call_args.args[1]) == [0]
        scale[(8,)](torch.ones(64), torch.empty(64), 3, 64, BLOCK=8)
        assert list(threads.map.call_args.args[1]) == list(range(min(8, os.cpu_count())))
    assert torch.equal(out, torch.full((16,), 8.0 * rounds))


FORK = """
import os, signal
import torch, triton, triton.language as tl
from nsa.ascend import host_driver

@triton.jit
def fill(y, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + o, BLOCK, mask=o < n)

y = torch.zeros(100)
with host_driver():
    fill[(7,)](y, 100, BLOCK=16)  # starts the threads
    child = os.fork()
    if not child:
        signal.alarm(60)  # a child that waits for ever ends by this signal
        y.zero_()
        fill[(7,)](y, 100, BLOCK=16)
        os._exit(0 if (y == 16).all() else 1)
print("status", os.waitpid(child, 0)[1])
"""


def test_a_forked_child_has_threads_of_its_own(tmp_path):
    (tmp_path / "fork.py").write_text(FORK)
    done = subprocess.run([sys.executable, tmp_path / "fork.py"], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["status 0"], done.stderr


def test_autotune_takes_the_first_configuration():
    tuned = triton.autotune([triton.Config({"BLOCK": 16}), triton.Config({"BLOCK": 64})], key=["n"])(fill)
    y = torch.zeros(100)
    tuned[lambda meta: (triton.cdiv(100, meta["BLOCK"]),)](y, 100)
    assert torch.equal(y, torch.full((100,), 16.0))


OUTSIDE = """
import torch, triton, triton.language as tl
from nsa.ascend import host_driver

@triton.autotune(configs=[triton.Config({"BLOCK": 16}), triton.Config({"BLOCK": 64})], key=["n"])
@triton.jit
def fill(y, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + o, BLOCK, mask=o < n)

y = torch.zeros(100)
with host_driver():
    fill[(7,)](y, 100)
print(y.unique().tolist())
fill[(7,)](y, 100)
"""


def test_outside_the_driver(tmp_path):
    """In a process of its own: a kernel can be decorated, and a call says what to do."""
    (tmp_path / "outside.py").write_text(OUTSIDE)
    done = subprocess.run([sys.executable, tmp_path / "outside.py"], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[16.0]"
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "RuntimeError: Triton finds no NPU and no GPU: to run a kernel on CPU tensors, call it inside "
        "`with nsa.ascend.host_driver():`"
    )


def test_an_error_leaves_nothing_behind(capfd, tmp_path, monkeypatch):
    """The process that assembles the code may die; the one that runs the kernel says so and goes on."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # empty, so that there is something to assemble
    where_am_i.cache.clear()
    with mock.patch.object(host.assemble, "__file__", "-c"), pytest.raises(CompileError, match="llvm: "):
        where_am_i[(1,)](torch.empty(35), X=5, Y=7)
    assert capfd.readouterr() == ("", "")
    where_am_i[(1,)](torch.empty(35), X=5, Y=7)


def test_libraries_are_kept_in_the_packages_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NSA_CACHE_DIR", str(tmp_path))
    for variable in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(variable, raising=False)
    with host.host_driver():
        scale.cache.clear()
        scale[(1,)](torch.ones(64), torch.empty(64), 7, 64, BLOCK=64)
    assert "TRITON_CACHE_DIR" not in os.environ
    assert list(tmp_path.glob("triton/*/scale.so"))


def test_a_library_that_others_may_change_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "shared"))
    x, y = torch.randn(64), torch.empty(64)
    scale.cache.clear()
    scale[(1,)](x, y, 9, 64, BLOCK=64)
    (tmp_path / "shared").chmod(0o777)
    scale.cache.clear()
    with pytest.raises(RuntimeError, match=r"scale.so is not loaded: others than its owner may write to .*shared"):
        scale[(1,)](x, y, 9, 64, BLOCK=64)


@pytest.mark.parametrize("variable", ["NSA_CACHE_DIR", "TRITON_CACHE_DIR", "TRITON_HOME"])
def test_whatever_the_umask_others_may_not_write(variable, tmp_path, monkeypatch):
    """Triton makes folders and files as open as the umask leaves them, and host_driver() refuses open libraries."""
    for each in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "fresh" / "cache"))
    umask = os.umask(0)
    try:
        scale_compiled_anew(15)
        scale_compiled_anew(15)  # from the cache
    finally:
        os.umask(umask)
    (library,) = tmp_path.glob("fresh/**/scale.so")
    assert files.why_refused(library) is None


def test_a_library_that_others_could_write_for_a_time_is_refused(tmp_path, monkeypatch):
    """Only a file that was closed in from its first moment is made unwritable and then trusted."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    scale_compiled_anew(17)
    (library,) = tmp_path.glob("*/scale.so")
    library.parent.chmod(0o755)  # as the usual umask leaves it
    library.chmod(0o666)
    with pytest.raises(RuntimeError, match=r"is not loaded: others than its owner may write to .*scale.so"):
        scale_compiled_anew(17)


def scale_compiled_anew(factor):
    x, y = torch.randn(64), torch.empty(64)
    scale.cache.clear()
    with host.host_driver():
        scale[(1,)](x, y, factor, 64, BLOCK=64)
    assert torch.equal(y, factor * x)


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    """As with a home folder that is read-only: a folder of this process alone, and a warning."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NSA_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setattr(files, "_temporary_dirs", {})
    with pytest.warns(RuntimeWarning, match="kept for this process alone"):
        scale_compiled_anew(11)


def test_a_folder_where_programs_cannot_run(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", mock.Mock(side_effect=OSError("failed to map segment from shared object")))
    with pytest.raises(OSError, match="must name a folder where programs can run"):
        scale_compiled_anew(13)


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
        host._slot(torch.empty(3, device="meta"), "*fp32")
    with pytest.raises(TypeError, match=r"expected a tensor, or a number of Python's own, got numpy.float32"):
        host._slot(np.float32(0.5), "*fp32")  # Triton takes what has a dtype for a pointer
    with pytest.raises(CompileError, match=r"bishengir-opt: .*'this' is unknown"):
        host._to_llvm_dialect("this is no MLIR", tmp_path)
    with pytest.raises(CompileError, match="expected pointer, integer and float arguments, got f8E5M2 in k"):
        host._definitions(
            "k", "func.func @k(%arg0: i1, %arg1: i1, %arg2: f8E5M2, " + "%arg3: i32, " * 6 + ") attributes"
        )
    with pytest.raises(CompileError, match=r"host: tl\.device_assert, math\.new: no native code"):
        host._refuse(["triton_assert_0", "math.new"])
    monkeypatch.setattr(host.platform, "machine", lambda: "aarch64")
    with pytest.raises(RuntimeError, match=r"expected an x86-64 machine .*, got aarch64"):
        host.processor()
