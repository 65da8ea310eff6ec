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
from nsa.ascend.launches import Shape
from nsa.gpu import compile as gpu_compile
from nsa.gpu.compile import facts_of
from nsa.gpu.targets import TARGETS

KERNELS = {
    family: [f"{what}_{family}_kernel" for what in ("forward", "grad_input", "grad_weight")]
    for family in ("vector", "cube", "repair")
}
REGISTERS = 65536  # of a multiprocessor of every NVIDIA GPU since 2012
WARPS = 8  # that fit on a multiprocessor together, at least: one for each of its four schedulers, and one that waits


def benchmark_shapes():
    """Each (block, stride, N, D, dtype) of the benchmark once; fp16 compiles as bf16 does, but for its conversions."""
    cases = chain.from_iterable(grid.grid("cuda", quick=False).values())
    shapes = {Shape(c.block, c.stride, c.n, c.d, c.dtype_name) for c in cases if c.dtype_name != "fp16"}
    return sorted(shapes | {Shape(128, 16, 8, 256, "bf16")})  # where a spill was found


facts = cache(facts_of)


# 18 shapes, 132 kernels of half a second each: the promise is for every shape of the benchmark
@pytest.mark.parametrize("shape", benchmark_shapes(), ids=str)
def test_sm_90_spills_nothing_and_loads_16_bytes(shape):
    kernels = facts(shape, TARGETS["sm_90"])
    families = ("vector", "cube", "repair") if shape.dtype == "bf16" else ("vector",)
    assert sorted(k["kernel"] for k in kernels) == sorted(chain.from_iterable(KERNELS[f] for f in families))
    for kernel in kernels:
        assert "error" not in kernel, kernel
        assert kernel["stack"] == 0, kernel
        assert kernel["registers"] * 32 * WARPS <= REGISTERS, kernel
        wide = {pointer: set(widths) for pointer, widths in kernel["loads"].items() if pointer in ("x", "dy")}
        assert wide.keys() == read_by(kernel["kernel"]), kernel
        assert all(widths == {width_of(kernel, pointer, shape)} for pointer, widths in wide.items()), kernel


def read_by(kernel):
    """Of x and dy, what a kernel reads."""
    return {"forward": {"x"}, "grad_input": {"dy"}, "grad_weight": {"x", "dy"}}[kernel.rpartition("_")[0].rpartition("_")[0]]


SHAPES = [Shape(32, 16, 8, 128, "bf16"), Shape(80, 48, 3, 112, "fp16"), Shape(128, 128, 128, 256, "bf16")]


# a usual shape, sizes that are no powers of two, the largest: on every kind of GPU
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_nine_kernels_compile_and_fit(shape, target):
    kernels = facts(shape, TARGETS[target])
    assert sorted(k["kernel"] for k in kernels) == sorted(chain.from_iterable(KERNELS.values()))
    for kernel in kernels:
        assert "error" not in kernel, kernel
        assert kernel["stack"] == 0, kernel
        assert kernel["shared"] <= TARGETS[target].shared, kernel
        matrix = sum(kernel.get(unit, 0) for unit in ("mma", "wgmma", "tcgen05", "mfma"))
        assert (matrix > 0) == ("cube" in kernel["kernel"]), kernel
