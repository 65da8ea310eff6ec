"""Run a program on the cores of a chip, over tensors in host memory."""

from dataclasses import dataclass, field

import numpy as np
import torch
from xdsl.dialects.builtin import MemRefType

from .faults import Fault, FaultError
from .machine import Core, arguments_of
from .memory import DTYPES, Memory, View
from .team import Team

VECTOR_CORES = 2  # beside a cube core


@dataclass
class Run:
    """What one launch did: a trace of every core of every block of the grid that ran, and what went wrong."""

    programs: list
    grid: tuple
    traces: list = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


def run(programs, values, grid, blocks=None, names=None):
    """Run the `machine.Program`s of a kernel for some blocks of the grid, by default all, one after the other.

    values: tensors on the CPU and numbers, one for each of the kernel's own parameters, in order. Tensors are read and
    written in place, and an access outside of a tensor is a fault. names: of the parameters, for messages.
    """
    done = Run(programs, grid)
    n_blocks = grid[0] * grid[1] * grid[2]
    values = global_memory(programs[0], values, names)
    size = programs[0].workspace * n_blocks
    workspace = View(Memory("GM", np.zeros(size, np.uint8), "workspace"), DTYPES["i8"], 0, 0, (size,), (1,))
    arguments = {program: arguments_of(program, values, grid, workspace) for program in programs}
    for block in range(n_blocks) if blocks is None else blocks:
        cores = [
            Core(program, block, sub_block)
            for program in programs
            for sub_block in range(VECTOR_CORES if len(programs) > 1 and program.core_type == "AIV" else 1)
        ]
        try:
            if len(cores) == 1:
                cores[0].run(arguments[programs[0]])
            else:
                Team(cores).run({core: arguments[core.program] for core in cores})
        except FaultError as error:
            done.faults.append(error.fault._replace(message=f"block {block}: {error.fault.message}"))
        done.traces += [core.trace for core in cores]
    return done


def global_memory(program, values, names=None):
    """The values, with a `View` in place of each tensor, and floats in the precision in which the kernel takes them.

    Arguments that are the same tensor share a `Memory`.
    """
    parameters = program.parameters[3 : 3 + len(values)]
    names = names or [f"argument {i}" for i in range(len(values))]
    views, memories = [], {}
    for name, parameter, value in zip(names, parameters, values, strict=True):
        if not isinstance(parameter.type, MemRefType):
            dtype = DTYPES[str(parameter.type)]
            views.append(int(value) if dtype.kind in "biu" else dtype.type(value))
            continue
        dtype = DTYPES[str(parameter.type.element_type)]
        data = bytes_of(value)
        memory = memories.setdefault((value.data_ptr(), len(data)), Memory("GM", data, name))
        views.append(View(memory, dtype, 0, 0, (len(data) // dtype.itemsize,), (1,)))
    return views


def bytes_of(tensor):
    """The memory that a tensor on the CPU reaches, as a numpy array of bytes that shares it."""
    if tensor.numel() == 0:
        return torch.zeros(0, dtype=torch.uint8).numpy()
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.detach().as_strided((reach,), (1,)).view(torch.uint8).numpy()
