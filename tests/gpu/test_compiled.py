"""What community Triton makes of the kernels for GPUs: compiled, never run."""

import sys
from functools import cache
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import grid

from nsa import accelerator
from nsa.ascend.launches import DTYPES, Shape
from nsa.gpu.compile import facts_of, machine_of
from nsa.gpu.targets import TARGETS

KERNELS = {
    family: [f"{what}_{family}_kernel" for what in ("forward", "grad_input", "grad_weight")]
    for family in ("vector", "cube", "repair")
}
REGISTERS = 65536  # of a multiprocessor
WARPS = 12  # that fit on a multiprocessor together, at least: three for each of its four schedulers


def benchmark_shapes():
    """Each (block, stride, N, D, dtype) of the benchmark once; fp16 compiles as bf16 does, but for its conversions."""
    cases = chain.from_iterable(grid.grid("cuda", quick=False).values())
    shapes = {Shape(c.block, c.stride, c.n, c.d, c.dtype_name) for c in cases if c.dtype_name != "fp16"}
    return sorted(shapes | {Shape(128, 16, 8, 256, "bf16")})  # where a spill was found


facts = cache(facts_of)


# 18 shapes, 150 kernels of half a second each: the promise is for every shape of the benchmark
@pytest.mark.parametrize("shape", benchmark_shapes(), ids=str)
def test_sm_90_spills_nothing_and_loads_16_bytes(shape):
    kernels = facts(shape, TARGETS["sm_90"])
    families = ("vector", "cube", "repair") if shape.dtype == "bf16" else ("vector",)
    expected = [*chain.from_iterable(KERNELS[f] for f in families), "append_vector_kernel"]
    assert sorted(k["kernel"] for k in kernels) == sorted(expected)
    for kernel in kernels:
        assert "error" not in kernel, kernel
        assert kernel["stack"] == 0, kernel
        assert kernel["registers"] * 32 * WARPS <= REGISTERS, kernel
        for pointer in ("x", "dy"):
            if reads(kernel["kernel"], pointer):
                widths = set(kernel["loads"][pointer])
                assert widths <= {16, narrowest(kernel["kernel"], pointer, shape)}, kernel


def reads(kernel, pointer):
    return not kernel.startswith({"x": ("grad_input",), "dy": ("forward", "append")}[pointer])


def narrowest(kernel, pointer, shape):
    """Bytes of the narrowest load. Gradients of the vector family, and their repair, take dy a row at a time: of N * D
    elements, each thread of a warp loads its share, which with N 1 and D 128 of bf16 is 8 bytes."""
    if pointer == "x" or "cube" in kernel:
        return 16
    return min(16, shape.heads * shape.dim * DTYPES[shape.dtype].itemsize // 32)


SHAPES = [Shape(32, 16, 8, 128, "bf16"), Shape(80, 48, 3, 112, "fp16"), Shape(128, 128, 128, 256, "bf16")]


# a usual shape, sizes that are no powers of two, the largest: on every kind of GPU
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_ten_kernels_compile_and_fit(shape, target):
    kernels = facts(shape, TARGETS[target])
    assert sorted(k["kernel"] for k in kernels) == sorted(
        [*chain.from_iterable(KERNELS.values()), "append_vector_kernel"]
    )
    for kernel in kernels:
        assert "error" not in kernel, kernel
        assert kernel["shared"] <= TARGETS[target].shared, kernel
        matrix = sum(kernel.get(unit, 0) for unit in ("mma", "wgmma", "tcgen05", "mfma"))
        assert (matrix > 0) == ("cube" in kernel["kernel"]), kernel


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100"])
def test_the_machine_is_what_a_device_is(name):
    device = SimpleNamespace(multi_processor_count=TARGETS[name].multiprocessors)
    with mock.patch.object(torch.cuda, "get_device_properties", return_value=device):
        assert machine_of(TARGETS[name]) == accelerator.machine_of.__wrapped__(torch.device("cuda:0"))


def test_what_is_compiled_is_what_the_launchers_launch():
    """Another plan, other constants: nothing about sizes or warps is written down twice."""
    shape, target = Shape(32, 16, 2, 64, "bf16"), TARGETS["sm_90"]
    machine = machine_of(target)
    other = machine._replace(plan=machine.plan._replace(windows=32, rows=64))
    with mock.patch("nsa.gpu.compile.machine_of", return_value=other):
        kernels = {kernel["kernel"]: kernel for kernel in facts_of(shape, target)}
    assert kernels["forward_cube_kernel"]["constants"]["M"] == "32"
    assert kernels["grad_input_cube_kernel"]["constants"]["R"] == "64"
    assert kernels["grad_input_cube_kernel"]["warps"] == 64 * 64 // 32 // 64
