"""Run a program on the cores of a chip, over tensors in host memory."""

from dataclasses import dataclass, field

import torch
from xdsl.dialects.builtin import MemRefType

from .faults import Fault, FaultError
from .machine import Core, arguments_of
from .memory import DTYPES, Memory, View


@dataclass
class Run:
    """What one launch did: a trace of every block of the grid that ran, and what went wrong."""

    program: object
    grid: tuple
    traces: list = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


def run(program, values, grid, blocks=None):
    """Run a `machine.Program` for some blocks of the grid, by default all, one after the other.

    values: tensors on the CPU and numbers, one for each of the kernel's own parameters, in order. Tensors are read and
    written in place, and an access outside of a tensor is a fault.
    """
    done = Run(program, grid)
    arguments = arguments_of(program, global_memory(program, values), grid)
    n_blocks = grid[0] * grid[1] * grid[2]
    for block in range(n_blocks) if blocks is None else blocks:
        core = Core(program, block)
        try:
            core.run(arguments)
        except FaultError as error:
            done.faults.append(error.fault._replace(message=f"{program.name}, block {block}: {error.fault.message}"))
        done.traces.append(core.trace)
    return done


def global_memory(program, values):
    """The values with a `View` in place of each tensor."""
    parameters = program.parameters[3 : 3 + len(values)]
    names = program.module.argument_names if hasattr(program.module, "argument_names") else None
    out = []
    for i, (parameter, value) in enumerate(zip(parameters, values, strict=True)):
        if not isinstance(parameter.type, MemRefType):
            out.append(int(value) if isinstance(value, (bool, int)) else value)
            continue
        dtype = DTYPES[str(parameter.type.element_type)]
        memory = Memory("GM", bytes_of(value), names[i] if names else f"argument {i}")
        size = len(memory.bytes) // dtype.itemsize
        out.append(View(memory, dtype, 0, 0, (size,), (1,)))
    return out


def bytes_of(tensor):
    """The memory that a tensor on the CPU reaches, as a numpy array of bytes that shares it."""
    if tensor.numel() == 0:
        return torch.zeros(0, dtype=torch.uint8).numpy()
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.detach().as_strided((reach,), (1,)).view(torch.uint8).numpy()
