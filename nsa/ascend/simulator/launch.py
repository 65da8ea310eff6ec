"""One launch of anybody's kernel, and what it cost."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch

from nsa.ascend.launches import POINTEES
from nsa.ascend.targets import Target, find_target

from .driver import simulator_driver
from .faults import SimulationError
from .report import Report, report_of


def simulate(kernel: Any, arguments: Mapping[str, Any], grid: Sequence[int], target: Target | str) -> Report:
    """Launch a @triton.jit function once in the simulator, and report.

    Args:
        kernel: the JIT function.
        arguments: {argument: CPU tensor, number or value of a tl.constexpr}. Tensors are written in place.
        grid: how many programs, in up to three dimensions.
        target: a `nsa.ascend.targets.Target`, or the name of one.

    Returns:
        A `nsa.ascend.simulator.report.Report`: `print(*report.lines(), sep="\\n")` prints it, and `report.data()` is
        the same as data. Faults are in `report.launch.faults`.

    Raises:
        CompileError: the kernel cannot be compiled, or has an operation that the simulator has not.
    """
    target = find_target(target) if isinstance(target, str) else target
    with simulator_driver(target) as log:
        try:
            kernel[tuple(grid)](**arguments)
        except SimulationError as error:
            return report_of(error.launch, target)
    return report_of(log[-1], target)


def find_kernel(name):
    """The @triton.jit function of "package.module:function"."""
    module, _, function = name.partition(":")
    try:
        return getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"expected a kernel as module:function, got {name!r}: {error}") from error


def random_arguments(signature, sizes):
    """{argument: value}, for a signature such as {"x": "*bf16", "n": "i32"} and sizes such as {"x": [64, 9], "n": 64}.

    A list is for a tensor, of random floats or of integers 0; a number is for a number.
    """
    if set(signature) != set(sizes):
        raise ValueError(f"expected sizes for {', '.join(signature)}, got them for {', '.join(sizes) or 'nothing'}")
    generator = torch.Generator().manual_seed(0)
    values = {}
    for name, type_ in signature.items():
        size = sizes[name]
        if not type_.startswith("*"):
            if isinstance(size, list):
                raise ValueError(f"expected a number for {name}, a {type_}, got {size}")
            values[name] = size
        elif type_[1:] not in POINTEES or not isinstance(size, list):
            raise ValueError(
                f"expected a list of sizes for {name}, and as its type one of {', '.join('*' + t for t in POINTEES)}, "
                f"got {size} and {type_}"
            )
        else:
            dtype = POINTEES[type_[1:]]
            random = torch.randn(size, generator=generator) if dtype.is_floating_point else torch.zeros(size)
            values[name] = random.to(dtype)
    return values
