"""A simulator of Ascend cores, which runs HIVM, the last stage before machine code, on tensors in the host's memory.

simulator_driver   kernels run in it as they are called                                   driver
simulate           one launch, with a report of what it cost and what held it up          launch
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .faults import Fault, SimulationError

if TYPE_CHECKING:
    from .driver import simulator_driver
    from .launch import simulate

__all__ = ["Fault", "SimulationError", "simulate", "simulator_driver"]
_MODULES = {"simulate": ".launch", "simulator_driver": ".driver"}


def __getattr__(name: str) -> Any:
    """What needs Triton only when it is asked for."""
    if name in _MODULES:
        return getattr(import_module(_MODULES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
