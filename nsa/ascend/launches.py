"""What the project's launchers launch: kernel, signature and constants, recorded instead of run.

The launchers are called with meta tensors, so the compiler sees the very block sizes that users run, and
nothing about them is written down twice.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

from nsa import accelerator
from nsa.table import WindowTable

TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
PAGE = 128  # rows
DTYPES = {name: dtype for dtype, name in TYPES.items()}
_POINTERS = {**TYPES, torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.bool: "i1"}
POINTEES = {name: dtype for dtype, name in _POINTERS.items()}


@dataclass(frozen=True)
class Launch:
    kernel: JITFunction
    signature: dict  # argument name -> "*bf16", "i32", ...
    constants: dict  # constexpr name -> value

    @property
    def name(self):
        return self.kernel.__name__


@dataclass(frozen=True, order=True)
class Shape:
    """What a kernel is compiled for. The compiled kernel takes any number of rows T."""

    block: int
    stride: int
    heads: int
    dim: int
    dtype: str  # a name of TYPES

    def __str__(self):
        return f"block {self.block} stride {self.stride} N {self.heads} D {self.dim} {self.dtype}"


def launches_of(shape, target):
    """The launches of forward, dInput and dWeight on a `Target`, by both families where the dtype allows it, and of
    decode and prefill.

    Each launch of the cube family is followed by that of its repair kernel.
    """
    machine = accelerator.Machine(target.cube_cores, target.vector_cores, accelerator.chip_of(target))
    with recorded() as launches:
        launch_all(shape, machine, n_rows=1000)
    return launches


def launch_all(shape, machine, n_rows):
    """Call forward, dInput and dWeight of every family that takes the dtype, with meta tensors of one segment; then, of
    pages, what decode and prefill call."""
    dtype = DTYPES[shape.dtype]
    table = WindowTable([n_rows], shape.block, shape.stride, torch.device("meta"))
    x = torch.zeros((n_rows, shape.heads, shape.dim), dtype=dtype, device="meta")
    dy = torch.zeros((table.n_windows, shape.heads, shape.dim), dtype=dtype, device="meta")
    weight = torch.zeros((shape.block, shape.heads), dtype=dtype, device="meta")
    for family in ("vector", "cube") if dtype in accelerator.HALF else ("vector",):
        accelerator.forward(x, weight, table, machine, family)
        accelerator.grad_input(dy, weight, table, n_rows, machine, family)
        accelerator.grad_weight(dy, x, table, machine, family)
    pages = torch.zeros((n_rows, PAGE, shape.heads, shape.dim), dtype=dtype, device="meta")
    index = torch.zeros((1, n_rows), dtype=torch.int32, device="meta")
    lengths = (index[0], index[0])
    accelerator.append(pages, weight, index, *lengths, index, pages, shape.stride, n_rows, machine)


@contextmanager
def recorded():
    launches = []

    def record(kernel, *args, grid, warmup, **kwargs):
        values = dict(zip(kernel.arg_names, args)) | kwargs
        constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr}
        signature = {name: _type(value) for name, value in values.items() if name not in constants}
        launches.append(Launch(kernel, signature, constants))

    with mock.patch.object(JITFunction, "run", record):
        yield launches


def _type(value):
    return f"*{_POINTERS[value.dtype]}" if isinstance(value, torch.Tensor) else "i32"
